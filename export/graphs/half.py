"""A float32 ONNX graph with float16 weights: matrix products in float16, sensitive operators in float32.

The rule is that of torch's autocast (torch.amp, "op-specific behaviour"), applied to a graph instead of to a
run:

- matrix products, fused attention and convolutions take float16, and their weights are stored in it: most of the work
  and of the bytes is there;
- operators that only move numbers or are applied element by element (bias, GELU, reshape …) keep the precision of their
  input;
- if float16 meets float32, as at the residual sum, the result is float32;
- everything else (softmax, layer normalisation, the resize of positions) is computed in float32.

So the residual stream, whose large values overflow float16 in some networks, never leaves float32, and no softmax or
norm relies on a runtime's own precautions. Inputs and outputs stay float32.

Any other overflow (float16's largest number is 65,504) would show on a GPU only: ONNX Runtime's CPU kernels compute
float16 in float32. So the largest values are measured in the float32 graph, over photographs, and a product whose
inputs or outputs come near the limit is computed in float32.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs.graph import Rewriter, Store
from dinokit.export.verification.sessions import start_session
from dinokit.model_folder.contract import INPUT

if TYPE_CHECKING:
    import onnx

__all__ = ["to_half", "weights_in_float"]

_PRODUCTS = {"MatMul", "Gemm", "Conv", "MultiHeadAttention"}
_FOLLOWERS = {
    *("Add", "Sub", "Mul", "Div", "Neg"),
    *("Gelu", "Erf", "Relu", "Sigmoid", "Tanh"),
    *("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Identity"),
    *("Slice", "Split", "Concat", "Gather"),
}
_FLOAT = 1  # onnx.TensorProto.FLOAT
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_normal)
_ROOM = 4
"""Safety factor: other pictures may give values this many times as large as the measured ones."""


def to_half(
    model: onnx.ModelProto, store: Store | None = None, pixels: NDArray[np.float32] | None = None
) -> onnx.ModelProto:
    """The same network with float16 weights and products.

    Args:
        model: float32, as :func:`dinokit.vit_graph.build_vit_graph` writes it or torch.onnx exports it; not
            modified.
        store: its large weights if they are outside; new ones are added.
        pixels: (B, C, H, W) photographs as the model takes them. Tensors that come near float16's largest number stay
            float32. None: every computed tensor is assumed to fit.

    Returns:
        A new model with the same inputs and outputs.
    """
    large: set[str] = set()
    if pixels is not None:
        largest = _largest(model, store, _would_be_half(model, store), pixels)
        # Negated, so that NaN does not fit.
        large = {name for name, size in largest.items() if not size * _ROOM <= _LARGEST}
    return _Half(model, store, large).run()


def _would_be_half(model: onnx.ModelProto, store: Store | None) -> list[str]:
    """The tensors that a trial pass computes in float16; its weights are discarded."""
    first = _Half(model, None if store is None else ChainMap({}, store))
    first.run()
    return sorted(first.computed_half)


def weights_in_float(model: onnx.ModelProto) -> tuple[str, ...]:
    """Names of the product weights that :func:`to_half` left in float32."""
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    products = (node for node in model.graph.node if node.op_type in _PRODUCTS)
    names = (name for node in products for name in node.input[1:2])
    return tuple(dict.fromkeys(name for name in names if kinds.get(name) == _FLOAT))


def _largest(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    names: Sequence[str],
    pixels: NDArray[np.float32],
) -> dict[str, float]:
    """The largest magnitude of each of these tensors of a float32 graph."""
    import onnx

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    del watched.graph.output[:]
    for name in names:
        # Reduced inside the graph: the whole tensors would take gigabytes.
        size, largest = f"{name}:size", f"{name}:largest"
        watched.graph.node.append(onnx.helper.make_node("Abs", [name], [size]))
        watched.graph.node.append(onnx.helper.make_node("ReduceMax", [size], [largest], keepdims=0))
        watched.graph.output.append(onnx.helper.make_tensor_value_info(largest, _FLOAT, []))
    found = start_session(watched, store).run(None, {INPUT: pixels})
    return {name: float(value) for name, value in zip(names, found, strict=True)}


class _Half(Rewriter):
    """``half`` holds the names of the float16 tensors; every other float tensor is float32.

    ``large``: those that float16 cannot hold; ``computed_half``: all that are float16 at any node, without weights.
    """

    def __init__(
        self, model: onnx.ModelProto, store: Store | None = None, large: Set[str] = frozenset()
    ) -> None:
        super().__init__(model, store)
        self.half: set[str] = set()
        self.large = large
        self.computed_half: set[str] = set()
        self.floats = self.float_tensors()

    def run(self) -> onnx.ModelProto:
        for node in self.source_nodes:
            if node.op_type in _PRODUCTS:
                in_half = all(self.fits(name) for name in node.input if name in self.floats)
            elif node.op_type in _FOLLOWERS:
                in_half = self.may_stay_half(node)
            else:
                in_half = False
            self.add(node, in_half=in_half and not self.large & {*node.input, *node.output})
        return self.finish()

    def add(self, node: onnx.NodeProto, *, in_half: bool) -> None:
        """Adds a node and casts its float inputs to the precision it computes in."""
        if in_half:
            ends = self.floats.intersection((*node.input, *node.output))
            self.computed_half |= ends.difference(self.weights)
        for index, name in enumerate(node.input):
            if name in self.floats:
                node.input[index] = self.as_half(name) if in_half else self.as_float(name)
        outputs = [name for name in node.output if name in self.floats]
        if not in_half or not outputs:
            self.nodes.append(node)
            return
        for index, name in enumerate(node.output):
            if name in self.outputs:  # the graph's own outputs stay float32
                node.output[index] = f"{name}:float16"
        self.nodes.append(node)
        for name in outputs:
            self.half.add(name)
            if name in self.outputs:
                self.op("Cast", f"{name}:float16", output=name, to=self.onnx.TensorProto.FLOAT)
                self.half.discard(name)

    def may_stay_half(self, node: onnx.NodeProto) -> bool:
        """Whether a node that follows its inputs computes in float16: each input is float16 or a weight."""
        inputs = [name for name in node.input if name in self.floats]
        computed = [name for name in inputs if name not in self.weights]
        if not computed or not all(name in self.half for name in computed):
            return False
        # A factor below float16's normal range (a layer scale of 1e-5) would lose its digits.
        return all(
            self.fits(name, smallest=_SMALLEST if node.op_type in ("Mul", "Div") else 0.0) for name in inputs
        )

    def fits(self, name: str, smallest: float = 0.0) -> bool:
        """Whether a weight can be float16; computed tensors always can."""
        if name not in self.weights:
            return True
        size = np.abs(self.array(name))
        return bool(size.max(initial=0) <= _LARGEST and (size[size > 0] >= smallest).all())

    def as_half(self, name: str) -> str:
        if name in self.half:
            return name
        if name in self.weights:
            values: NDArray[np.float16] = self.array(name).astype(np.float16)
            return self.constant(f"{name}:float16", values)
        return self.once("Cast", name, f"{name}:cast_float16", to=self.onnx.TensorProto.FLOAT16)

    def as_float(self, name: str) -> str:
        if name not in self.half:
            return name
        return self.once("Cast", name, f"{name}:cast_float32", to=self.onnx.TensorProto.FLOAT)
