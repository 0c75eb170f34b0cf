"""The ONNX graph of any network: written from the weights for a DINO ViT, made by torch for any other.

torch has two exporters. The older one records a run ("tracing"): it is fast and needs no further package, but treats
whatever the network decides from a picture's size as constant. The newer one (``torch.export``) supports free sizes,
but needs onnxscript, and minutes for large networks. So the older one is tried first, and the newer one if the older
fails, no longer exists, or gives other numbers than the network at another size.

Weights too large for one ONNX file never pass through the exporter: the older one records the run with them as inputs,
which become external weights afterwards. The newer one cannot do that.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError, UsageError
from dinokit.export.graphs.graph import check_graph
from dinokit.export.variants import Variant
from dinokit.model_folder.architecture import TimmArchitecture, VitArchitecture
from dinokit.model_folder.contract import INPUT, declared_shapes
from dinokit.vit_graph import OPSET, split_vit_graph
from dinokit.vit_graph.storage import LARGEST_FILE, MemoryStorage

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from dinokit.model_folder.config import BackboneConfig

__all__ = ["check_variants", "network_graph", "trace_graph"]

Graph = tuple["onnx.ModelProto", dict[str, NDArray[np.float32]]]

_TOLERANCE = 1e-3
"""For numbers around 1. It only detects a graph with a constant size; the comparison later is stricter."""


def network_graph(
    config: BackboneConfig, weights: Mapping[str, NDArray[np.float32]], module: nn.Module
) -> Graph:
    """The float32 graph of a network and its large weights, which are outside the graph.

    Args:
        config: of the network.
        weights: by timm's names; used for a ViT.
        module: the network itself with its weights, in evaluation mode, float32, on the CPU; used for any other.

    Raises:
        ModelError: neither the writer nor torch can make the graph.
    """
    if isinstance(config.architecture, VitArchitecture):
        return split_vit_graph(config.architecture, weights)
    return trace_graph(module, config.architecture)


def trace_graph(module: nn.Module, architecture: TimmArchitecture) -> Graph:
    """See :func:`network_graph`; inputs and outputs as in :mod:`dinokit.model_folder.contract`.

    Batch, height and width are free if the network takes any size, otherwise only the batch.
    """
    wrapped = _wrapped(module, architecture)
    names = [name for name in declared_shapes(architecture) if name != INPUT]
    reasons = []
    size = sum(tensor.nbytes for tensor in wrapped.state_dict().values())
    exporters = (_by_tracing, _by_torch_export) if size < LARGEST_FILE else (_by_tracing_without_weights,)
    for export in exporters:
        try:
            with warnings.catch_warnings(), _silence():
                # The older exporter's deprecation, and warnings from inside the newer one.
                warnings.simplefilter("ignore")
                made = export(wrapped, architecture, names)
            model, store = _tidied(made, architecture, wrapped)
            reason = _why_wrong(model, store, wrapped, architecture, names)
        except Exception as error:  # exporters raise errors of every kind
            said = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # torch writes in colours
            reason = said.partition("\n")[0] or type(error).__name__
        if not reason:
            return model, store
        reasons.append(reason)
    raise ModelError(f"torch cannot write this network as ONNX ({'; then: '.join(reasons)})")


def check_variants(variants: Sequence[Variant], config: BackboneConfig) -> None:
    """Raises UsageError for a variant that only a ViT can have."""
    if isinstance(config.architecture, VitArchitecture):
        return
    if any(variant.target == "ort-cuda" for variant in variants):
        raise UsageError(
            f"target 'ort-cuda' is for the Vision Transformers of DINO, DINOv2 and DINOv3, and {config.name} is not "
            "one of them; use --precision fp16 with the target portable, which ONNX Runtime runs on CUDA"
        )


# -- the two exporters

_ONE_AT_A_TIME = threading.Lock()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discards stdout, including C++'s: when torch's tracer fails, it prints the whole graph.

    The descriptor belongs to the process, so only one thread at a time may do this.
    """
    with _ONE_AT_A_TIME, contextlib.redirect_stdout(io.StringIO()):
        try:
            before = os.dup(1)
        except OSError:  # stdout is closed
            yield
            return
        try:
            _flush_c()
            with open(os.devnull, "wb") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 1)
            yield
        finally:
            _flush_c()  # otherwise C++'s buffer would be written after stdout is restored
            os.dup2(before, 1)
            os.close(before)


def _flush_c() -> None:
    with contextlib.suppress(OSError, AttributeError, TypeError):  # Windows does not have this library
        ctypes.CDLL(None).fflush(None)


def _wrapped(module: nn.Module, architecture: TimmArchitecture) -> nn.Module:
    from torch import nn

    from dinokit.runtime.timm_networks import features

    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = module

        def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
            pooled, tokens = features(self.network, pixel_values)
            return (pooled,) if architecture.token_dim is None or tokens is None else (pooled, tokens)

    return Outputs().eval()


def _by_tracing_without_weights(
    wrapped: nn.Module, architecture: TimmArchitecture, names: list[str]
) -> onnx.ModelProto:
    """The graph takes the weights as inputs, by their names in the module."""
    return _by_tracing(wrapped, architecture, names, weights_inside=False)


def _by_tracing(
    wrapped: nn.Module, architecture: TimmArchitecture, names: list[str], *, weights_inside: bool = True
) -> onnx.ModelProto:
    import onnx
    import torch

    free = {
        name: {axis: size for axis, size in enumerate(shape) if isinstance(size, str)}
        for name, shape in declared_shapes(architecture).items()
    }
    content = io.BytesIO()
    torch.onnx.export(
        wrapped,
        (_pixels(architecture, 2, *_example(architecture)),),
        content,  # type: ignore[arg-type]  # a file object is what this exporter takes
        dynamo=False,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=names,
        dynamic_axes=free,
        export_params=weights_inside,
        do_constant_folding=weights_inside,
    )
    return onnx.load_from_string(content.getvalue())


def _by_torch_export(wrapped: nn.Module, architecture: TimmArchitecture, names: list[str]) -> onnx.ModelProto:
    import torch

    free = [0, 2, 3] if architecture.takes_any_size else [0]
    program = torch.onnx.export(
        wrapped,
        (_pixels(architecture, 2, *_example(architecture)),),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=names,
        dynamic_shapes=(dict.fromkeys(free, torch.export.Dim.DYNAMIC),),
        verbose=False,
    )
    if program is None:
        raise ModelError("torch.onnx.export returned nothing")
    model: onnx.ModelProto = program.model_proto
    return model


def _example(architecture: TimmArchitecture) -> tuple[int, int]:
    """A height and a width that differ, so that neither exporter treats them as the same number."""
    height, width = architecture.image_size
    return (height, width + architecture.stride) if architecture.takes_any_size else (height, width)


def _pixels(architecture: TimmArchitecture, batch: int, height: int, width: int) -> Tensor:
    import torch

    generator = torch.Generator().manual_seed(0)  # leaves the caller's random state alone
    return torch.randn(batch, architecture.in_chans, height, width, generator=generator)


# -- from the exporters' graphs to dinokit's form


def _tidied(made: onnx.ModelProto, architecture: TimmArchitecture, wrapped: nn.Module) -> Graph:
    """Constants become weights, large weights go outside, sizes get names, and traces of the machine are removed."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(made)
    del model.metadata_props[:]
    graph = model.graph
    nodes, constants = [], []
    same: dict[str, str] = {}  # torch writes equal weights once, and the others as Identity of that one
    given = {tensor.name for tensor in graph.initializer}
    outputs = {value.name for value in graph.output}
    for node in graph.node:
        if node.op_type == "Identity" and node.input[0] in given and node.output[0] not in outputs:
            same[node.output[0]] = node.input[0]
            continue
        for place, name in enumerate(node.input):
            node.input[place] = same.get(name, name)
        node.doc_string = ""
        node.name = node.name or node.output[0]
        # The newer exporter stores stack traces here, with paths of the machine.
        del node.metadata_props[:]
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if node.op_type == "Constant" and value is not None:
            tensor = onnx.TensorProto()
            tensor.CopyFrom(value)
            tensor.name = node.output[0]
            constants.append(tensor)
        else:
            nodes.append(node)
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    graph.initializer.extend(constants)
    del graph.value_info[:]
    handed_in = [value for value in graph.input if value.name != INPUT]
    handed_in = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in handed_in]
    _declare(graph, architecture)
    graph.input.extend(handed_in)
    check_graph(model)

    outside = MemoryStorage()
    del graph.input[1:]
    weights = wrapped.state_dict() if handed_in else {}
    for value in handed_in:
        values = weights[value.name].detach().numpy()
        kind = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.TensorProto(name=value.name, dims=values.shape, data_type=kind)
        if kind == onnx.TensorProto.FLOAT:
            outside(tensor, values)
        else:  # a counter or an index: small
            tensor = onnx.numpy_helper.from_array(values, value.name)
        graph.initializer.append(tensor)
    for tensor in graph.initializer:
        tensor.doc_string = ""
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.data_location != tensor.EXTERNAL:
            values = onnx.numpy_helper.to_array(tensor)
            for field in ("raw_data", "float_data"):
                tensor.ClearField(field)
            outside(tensor, values)
    return model, outside.weights


def _declare(graph: onnx.GraphProto, architecture: TimmArchitecture) -> None:
    from onnx import TensorProto
    from onnx.helper import make_tensor_value_info

    values = [
        make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in declared_shapes(architecture).items()
    ]
    del graph.input[:]
    del graph.output[:]
    graph.input.append(values[0])
    graph.output.extend(values[1:])


def _why_wrong(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[np.float32]],
    wrapped: nn.Module,
    architecture: TimmArchitecture,
    names: list[str],
) -> str:
    """Runs the graph at two sizes and returns what is wrong with it, or an empty text."""
    import torch

    from dinokit.runtime.onnx import OnnxEngine

    engine = OnnxEngine(model.SerializeToString(), weights=store, device="cpu")
    height, width = architecture.image_size
    sizes = [(height, width)]
    if architecture.size_multiple:
        sizes.append((height + architecture.size_multiple, width + 3 * architecture.size_multiple))
    for batch, size in enumerate(sizes, start=1):
        pixels = _pixels(architecture, batch, *size)
        with torch.inference_mode():
            right = dict(zip(names, (tensor.numpy() for tensor in wrapped(pixels)), strict=True))
        ours = engine.run(pixels.numpy(), names)
        for name in names:
            if ours[name].shape != right[name].shape:
                return f"its graph gives {name} of shape {ours[name].shape} for {right[name].shape}"
            scale = max(1.0, float(np.abs(right[name]).max()))
            if not float(np.abs(ours[name] - right[name]).max()) <= _TOLERANCE * scale:
                return f"its graph gives another {name} at {size[0]}x{size[1]} pixels"
    return ""
