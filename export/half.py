"""A float32 ONNX graph with float16 weights: matrix products in float16, what is delicate in float32.

The rule is that of torch's autocast (torch.amp, "op-specific behaviour"), applied to a graph instead of to a
run:

- matrix products, fused attention and convolutions take float16, and their weights are stored so: that is where
  the work and the bytes are;
- what only moves numbers or is applied one by one (bias, GELU, reshape …) stays in the precision it is given;
- where float16 meets float32, as at the residual sum, the result is float32;
- everything else (softmax, layer normalisation, the resize of positions) computes in float32.

So the residual stream, whose large values overflow float16 in some networks, never leaves float32, nor does a
softmax or a norm depend on a runtime's own care. Inputs and outputs stay float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs import Rewriter, Store

if TYPE_CHECKING:
    import onnx

__all__ = ["to_half"]

_PRODUCTS = {"MatMul", "Gemm", "Conv", "MultiHeadAttention"}
_FOLLOWERS = {
    *("Add", "Sub", "Mul", "Div", "Neg"),
    *("Gelu", "Erf", "Relu", "Sigmoid", "Tanh"),
    *("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Identity"),
    *("Slice", "Split", "Concat", "Gather"),
}
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST = float(np.finfo(np.float16).smallest_normal)


def to_half(model: onnx.ModelProto, store: Store | None = None) -> onnx.ModelProto:
    """The same network with float16 weights and products.

    Args:
        model: float32, as :func:`dinokit.vit_graph.build_vit_graph` writes it or torch.onnx exports it. It is
            left as it is.
        store: its large weights where they are outside; gets the new ones.

    Returns:
        A new model with the same inputs and outputs.
    """
    return _Half(model, store).run()


class _Half(Rewriter):
    """``half`` holds the names of the float16 tensors; every other float tensor is float32."""

    def __init__(self, model: onnx.ModelProto, store: Store | None = None) -> None:
        super().__init__(model, store)
        self.half: set[str] = set()
        self.floats = self.float_tensors()

    def run(self) -> onnx.ModelProto:
        for node in self.source_nodes:
            if node.op_type in _PRODUCTS:
                in_half = all(self.fits(name) for name in node.input if name in self.floats)
            elif node.op_type in _FOLLOWERS:
                in_half = self.may_stay_half(node)
            else:
                in_half = False
            self.add(node, in_half=in_half)
        return self.finish()

    def add(self, node: onnx.NodeProto, *, in_half: bool) -> None:
        """Adds a node, its float inputs brought to the precision it computes in."""
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
        """Whether a node that follows its inputs computes in float16: all of them are, or are weights."""
        inputs = [name for name in node.input if name in self.floats]
        computed = [name for name in inputs if name not in self.weights]
        if not computed or not all(name in self.half for name in computed):
            return False
        # A factor below float16's normal range (a layer scale of 1e-5) would lose its digits.
        return all(
            self.fits(name, smallest=_SMALLEST if node.op_type in ("Mul", "Div") else 0.0) for name in inputs
        )

    def fits(self, name: str, smallest: float = 0.0) -> bool:
        """Whether a weight can be float16; what is computed can."""
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
