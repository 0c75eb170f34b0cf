"""``embedder.onnx``: the network with normalisation inside, for servers and other languages.

Its input is the crop, ``image`` (B, H, W, C) uint8 RGB, its output ``embedding`` (B, D) float32. Resizing and cropping
stay outside: no two runtimes resize alike, and a resize that differs from training's costs accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.export.graphs.graph import Rewriter, Store
from dinokit.model_folder.contract import EMBEDDING, IMAGE, INPUT, POOLED

if TYPE_CHECKING:
    import onnx

    from dinokit.pictures.preprocess import Preprocessing

__all__ = ["CropEngine", "to_embedder"]


def to_embedder(
    model: onnx.ModelProto,
    preprocessing: Preprocessing,
    store: Store | None = None,
    *,
    keep: Sequence[str] = (),
) -> onnx.ModelProto:
    """The network from a uint8 crop to its embedding.

    Args:
        model: any variant with input ``pixel_values`` and output ``pooler_output``.
        preprocessing: its mean and standard deviation go into the graph.
        store: the model's large weights if they are outside.
        keep: outputs of the model to keep beside the embedding.

    Returns:
        A new model without the nodes that only the other outputs needed.
    """
    return _Embedder(model, store).run(preprocessing, keep)


class _Embedder(Rewriter):
    def run(self, preprocessing: Preprocessing, keep: Sequence[str]) -> onnx.ModelProto:
        planes = self.op("Transpose", IMAGE, output=f"{IMAGE}:planes", perm=[0, 3, 1, 2])
        floats = self.op("Cast", planes, output=f"{IMAGE}:float", to=self.onnx.TensorProto.FLOAT)
        # As Preprocessing.normalise: one multiplication and one addition.
        std = np.asarray(preprocessing.std, np.float32).reshape(-1, 1, 1)
        mean = np.asarray(preprocessing.mean, np.float32).reshape(-1, 1, 1)
        scale = self.constant("normalise:scale", (1 / (255 * std)).astype(np.float32))
        shift = self.constant("normalise:shift", (-mean / std).astype(np.float32))
        scaled = self.op("Mul", floats, scale, output=f"{IMAGE}:scaled")
        self.op("Add", scaled, shift, output=INPUT)

        needed = self.needed_for(POOLED, *keep)
        self.nodes += [node for node in self.source_nodes if needed.intersection(node.output)]
        self.op("Identity", POOLED, output=EMBEDDING)
        self.kept = [value for value in self.model.graph.output if value.name in keep]
        return self.finish()

    def needed_for(self, *outputs: str) -> set[str]:
        """The tensors that ``outputs`` depend on."""
        needed = set(outputs)
        for node in reversed(self.model.graph.node):
            if needed.intersection(node.output):
                needed.update(node.input)
        return needed

    def finish(self) -> onnx.ModelProto:
        graph = self.model.graph
        batch, channels, height, width = (d.dim_value or d.dim_param for d in _dims(graph.input[0]))
        result = next(value for value in graph.output if value.name == POOLED)
        values = self.onnx.helper.make_tensor_value_info
        types = self.onnx.TensorProto
        changed = self.onnx.ModelProto()
        changed.CopyFrom(self.model)
        del changed.graph.input[:]
        del changed.graph.output[:]
        changed.graph.input.append(values(IMAGE, types.UINT8, [batch, height, width, channels]))
        width_d = _dims(result)[1].dim_value
        changed.graph.output.append(values(EMBEDDING, types.FLOAT, [batch, width_d]))
        changed.graph.output.extend(self.kept)
        self.model = changed
        return super().finish()


def _dims(value: onnx.ValueInfoProto) -> list[onnx.TensorShapeProto.Dimension]:
    return list(value.type.tensor_type.shape.dim)


class CropEngine:
    """Runs an embedder on the CPU with plain ONNX Runtime, to compare it with its network."""

    device = "cpu"

    def __init__(self, file: Path) -> None:
        """Raises ModelError if ONNX Runtime cannot open the file."""
        import onnxruntime as ort

        from dinokit.runtime.onnx import session_options

        self._file = file
        try:
            self._session = ort.InferenceSession(
                str(file), session_options(), providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise ModelError(f"{file} cannot be opened by ONNX Runtime: {error}") from error

    def embed(self, crops: NDArray[Any]) -> NDArray[np.float32]:
        """(B, H, W, C) uint8 to (B, D) float32; finer values are rounded, as every user of the graph must do."""
        if crops.dtype != np.uint8:
            crops = np.rint(crops).clip(0, 255).astype(np.uint8)
        found: NDArray[np.float32] = self._session.run([EMBEDDING], {IMAGE: crops})[0]
        return found
