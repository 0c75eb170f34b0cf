"""A float32 ONNX graph with int8 weights: for CPUs, a quarter of the bytes and more pictures a second.

Matrix products with a weight are done in integers; each column of a weight has its own scale ("per channel"),
found now, and each row of the activations, that is each token, has its own, found while the graph runs
("dynamic"): no calibration pictures are needed.

Why a scale a token, where ONNX Runtime's `quantize_dynamic` has one for the whole batch: a token with large
values would cost all others their digits, and a picture's vector would depend on the pictures that happen to be in
its batch. Products of two activations (attention) and everything else stay float32.

In numbers, with x (…, K) float32 and W (K, N)::

    w_n  = max |W_:n| / 127                 weights:      int8    W / w           -127 … 127
    m_t  = max |x_t:|                       activations:  uint8   127 x / m + 128    1 … 255
    x W ≈ (integers) · w_n / 127 · m_t

On x86 processors without VNNI the product of uint8 and int8 can saturate inside ONNX Runtime; its option
``session.x64quantprecision`` = 1 prevents that. dinokit's engine sets it unless the processor is known to have VNNI,
where it is not needed and slow.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs import Rewriter, Store

if TYPE_CHECKING:
    import onnx

__all__ = ["to_int8"]

_LEVELS = 127
_ZERO = 128
_TINY = 1e-12  # instead of a division by zero: a row of zeros stays one


def to_int8(model: onnx.ModelProto, store: Store | None = None) -> onnx.ModelProto:
    """The same network with int8 weights in its MatMul and Gemm.

    Args:
        model: float32. It is left as it is.
        store: its large weights where they are outside; gets the new ones.

    Returns:
        A new model with the same float32 inputs and outputs; standard operators only.
    """
    return _Int8(model, store).run()


class _Int8(Rewriter):
    def run(self) -> onnx.ModelProto:
        for node in self.source_nodes:
            if (
                node.op_type == "MatMul"
                and self.is_matrix(node.input[1])
                and node.input[0] not in self.weights
            ):
                self.product(node.input[0], node.input[1], self.array(node.input[1]), node.output[0])
            elif node.op_type == "Gemm" and self.is_plain_gemm(node):
                self.gemm(node)
            else:
                self.nodes.append(node)
        return self.finish()

    def is_matrix(self, name: str) -> bool:
        tensor = self.weights.get(name)
        return (
            tensor is not None and len(tensor.dims) == 2 and tensor.data_type == self.onnx.TensorProto.FLOAT
        )

    def is_plain_gemm(self, node: onnx.NodeProto) -> bool:
        """x W + b, as linear layers are exported; other uses of Gemm stay as they are."""
        options = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        plain = not options.get("transA", 0) and options.get("alpha", 1.0) == options.get("beta", 1.0) == 1.0
        return plain and self.is_matrix(node.input[1]) and node.input[0] not in self.weights

    def gemm(self, node: onnx.NodeProto) -> None:
        options = {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}
        kernel = self.array(node.input[1])
        kernel = kernel.T if options.get("transB", 0) else kernel
        bias = node.input[2] if len(node.input) > 2 else ""
        out = node.output[0]
        product = self.product(node.input[0], node.input[1], kernel, f"{out}:product" if bias else out)
        if bias:
            self.op("Add", product, bias, output=out)

    def product(self, x: str, weight: str, kernel: NDArray[np.float32], out: str) -> str:
        """``x @ kernel`` in integers."""
        scale = np.abs(kernel).max(axis=0) / _LEVELS
        scale[scale == 0] = 1  # a column of zeros
        integers = self.constant(f"{weight}:int8", np.rint(kernel / scale).astype(np.int8))
        column_scale = self.constant(f"{weight}:scale", (scale / _LEVELS).astype(np.float32))
        quantised, row_max = self.quantised(x)
        total = self.op("MatMulInteger", quantised, integers, self.zero(), output=f"{out}:int32")
        y = self.op("Cast", total, output=f"{out}:float", to=self.onnx.TensorProto.FLOAT)
        # One scale after the other: ONNX Runtime 1.31 takes the product of both for one scale of the whole tensor
        # when it fuses MatMulInteger, and then all rows but the first come out wrong.
        y = self.op("Mul", y, column_scale, output=f"{out}:columns")
        return self.op("Mul", y, row_max, output=out)

    def quantised(self, x: str) -> tuple[str, str]:
        """``x`` as uint8 and the largest size in each row (…, 1); made once for q, k and v."""
        row_max, quantised = f"{x}:row_max", f"{x}:uint8"
        if quantised not in self._made:
            self._made.add(quantised)
            size = self.op("Abs", x, output=f"{x}:abs")
            axis = self.constant("quantise:axis", np.array([-1], np.int64))
            largest = self.op("ReduceMax", size, axis, output=f"{x}:largest", keepdims=1)
            self.op(
                "Max", largest, self.constant("quantise:tiny", np.array(_TINY, np.float32)), output=row_max
            )
            share = self.op("Div", x, row_max, output=f"{x}:share")
            step = self.constant("quantise:step", np.array(1 / _LEVELS, np.float32))
            self.op("QuantizeLinear", share, step, self.zero(), output=quantised)
        return quantised, row_max

    def zero(self) -> str:
        return self.constant("quantise:zero", np.array(_ZERO, np.uint8))
