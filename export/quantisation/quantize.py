"""A float32 ONNX graph with int8 weights: for CPUs, a quarter of the bytes. Without VNNI it is not faster.

Matrix products with a weight are computed in integers; each column of a weight has its own scale ("per channel"),
fixed here, and each row of the activations, that is each token, has its own, computed while the graph runs ("dynamic").

Why one scale per token, when ONNX Runtime's `quantize_dynamic` has one for the whole batch: a token with large values
would take precision from all others, and a picture's vector would depend on the other pictures in its batch. Products
of two activations (attention) and everything else stay float32.

Why most activations are multiplied twice, once for their first eight bits and once for the next: most of the loss of an
int8 network comes from eight-bit activations. ``int8.py`` finds out which products need only eight bits; for the others
a second integer product takes less time than a float product, and no byte of the file (``benchmarks/int8.py``).

In numbers, with x (…, K) float32 and W (K, N)::

    w_n  = max |W_:n| / 90                  weights:      int8    Q = W / w, rounded by rounding.py    -90 … 90
    m_t  = max |x_t:|                       activations:  l = 90 x / m,  a = round(l),  b = round(180 (l - a))
                                            as uint8      a + 91,  b + 91                              1 … 181
    x W ≈ (a Q + b Q / 180) · w_n / 90 · m_t             without b if one product is enough

and if one product is enough and x is never below some c < 0, as after a GELU, with all levels for the values above c::

    m_t  = max (x_t: - c)                   activations:  a = round(181 (x - c) / m)                   0 … 181
    x W ≈ a Q · w_n / 181 · m_t + c · w_n · (sum of Q's column n)

So 2 · 181 · 90 < 2^15, as every processor needs it (``rounding.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dinokit.export.graphs.graph import Rewriter, Store
from dinokit.export.quantisation.products import Product, lower_bounds, product_of
from dinokit.export.quantisation.rounding import Rounded, round_to_nearest

if TYPE_CHECKING:
    import onnx

__all__ = ["ALL_LEVELS", "FINE_LEVELS", "LEVELS", "WEIGHT_LEVELS", "to_int8"]

WEIGHT_LEVELS = 90
"""Levels of int8 weights on either side of zero."""
LEVELS = 90
"""Levels of uint8 activations on either side of zero."""
ALL_LEVELS = 181
"""Levels of uint8 activations with a lower bound."""
_FINER = 2 * LEVELS  # steps of the second product in one step of the first: |l - a| ≤ 1/2
FINE_LEVELS = LEVELS * _FINER
"""Levels on either side of zero, for activations that are multiplied twice."""
_ZERO = 91
_TINY = 1e-12  # avoids a division by zero: a row of zeros stays zero


def to_int8(
    model: onnx.ModelProto,
    store: Store | None = None,
    *,
    rounded: Mapping[str, Rounded] | None = None,
    once: Collection[str] = (),
    in_float: Collection[str] = (),
) -> onnx.ModelProto:
    """The same network with int8 weights in its MatMul and Gemm.

    Args:
        model: float32; not modified.
        store: its large weights if they are outside; new ones are added.
        rounded: rounded weights by name; the others are rounded to the nearest integer.
        once: names of weights whose activations' first eight bits are enough.
        in_float: names of weights whose products stay float32.

    Returns:
        A new model with the same float32 inputs and outputs; standard operators only.
    """
    return _Int8(model, store).run(rounded or {}, frozenset(once), frozenset(in_float))


@dataclass(frozen=True)
class _Rows:
    """Activations in integers: x ≈ Σ (part - zero) / levels · unit + least."""

    parts: tuple[tuple[str, int], ...]
    """uint8 tensors, and the number of levels of each."""
    zero: str
    unit: str
    """(…, 1) float32."""
    least: float = 0.0


class _Int8(Rewriter):
    def run(
        self, rounded: Mapping[str, Rounded], once: frozenset[str], in_float: frozenset[str]
    ) -> onnx.ModelProto:
        self.least = lower_bounds(self.model)
        for node in self.source_nodes:
            product = product_of(node, self.weights)
            if product is None or product.weight in in_float:
                self.nodes.append(node)
                continue
            known = rounded.get(product.weight)
            if known is None:
                known = round_to_nearest(product.kernel(self.array(product.weight)), WEIGHT_LEVELS)
            if product.weight not in once:
                rows = self.fine_rows(product.source)
            elif product.source in self.least:
                rows = self.bounded_rows(product.source, self.least[product.source])
            else:
                rows = self.rows(product.source)
            bias = node.input[2] if len(node.input) > 2 else ""
            out = node.output[0]
            made = self.product(product, known, rows, f"{out}:product" if bias else out)
            if bias:
                self.op("Add", made, bias, output=out)
        return self.finish()

    def product(self, product: Product, rounded: Rounded, rows: _Rows, out: str) -> str:
        """``x @ kernel`` in integers."""
        integers = self.constant(f"{product.weight}:int8", rounded.integers)
        parts = []
        for number, (part, levels) in enumerate(rows.parts):
            if number:
                # Each product gets a tensor of its own, which costs no byte of the file: where a user sets
                # session.x64quantprecision, ONNX Runtime 1.31 fails on one that two products share.
                shape = self.constant(f"{product.weight}:shape", np.array(rounded.integers.shape, np.int64))
                integers = self.op("Reshape", integers, shape, output=f"{out}:int8_{levels}")
            scale = self.constant(
                f"{product.weight}:scale_{levels}", (rounded.scale / levels).astype(np.float32)
            )
            total = self.op("MatMulInteger", part, integers, rows.zero, output=f"{out}:int32_{levels}")
            total = self.op("Cast", total, output=f"{out}:float_{levels}", to=self.onnx.TensorProto.FLOAT)
            parts.append(self.op("Mul", total, scale, output=f"{out}:columns_{levels}"))
        y = self.op("Add", *parts, output=f"{out}:sum") if len(parts) > 1 else parts[0]
        # The rows' scale is a separate product: when ONNX Runtime 1.31 fuses MatMulInteger with Cast and Mul, it takes
        # the product of both scales for one scale of the whole tensor, and all rows but the first are wrong.
        if not rows.least:
            return self.op("Mul", y, rows.unit, output=out)
        y = self.op("Mul", y, rows.unit, output=f"{out}:rows")
        shift = rows.least * rounded.values.sum(axis=0, dtype=np.float64)
        return self.op(
            "Add", y, self.constant(f"{product.weight}:least", shift.astype(np.float32)), output=out
        )

    # -- activations; made once for q, k and v

    def rows(self, x: str) -> _Rows:
        """Eight bits, symmetric about zero."""
        made, unit = f"{x}:uint8", f"{x}:row_max"
        if made not in self._made:
            self._made.add(made)
            levels = self.levels(x, self.op("Abs", x, output=f"{x}:abs"), LEVELS, unit)
            self.op("QuantizeLinear", levels, self.number("quantise:one", 1), self.zero(), output=made)
        return _Rows(((made, LEVELS),), self.zero(), unit)

    def fine_rows(self, x: str) -> _Rows:
        """The first eight bits and the next eight."""
        (coarse,), unit = self.rows(x).parts, f"{x}:row_max"
        made = f"{x}:uint8_fine"
        if made not in self._made:
            self._made.add(made)
            whole = self.op("Round", f"{x}:levels", output=f"{x}:whole")  # half to even, as QuantizeLinear
            rest = self.op("Sub", f"{x}:levels", whole, output=f"{x}:rest")
            step = self.number("quantise:finer", 1 / _FINER)
            self.op("QuantizeLinear", rest, step, self.zero(), output=made)
        return _Rows((coarse, (made, FINE_LEVELS)), self.zero(), unit)

    def bounded_rows(self, x: str, least: float) -> _Rows:
        """Eight bits, from the lower bound upwards."""
        zero = self.constant("quantise:least", np.array(0, np.uint8))
        made, unit = f"{x}:uint8_bounded", f"{x}:row_range"
        if made not in self._made:
            self._made.add(made)
            above = self.op("Sub", x, self.number(f"quantise:{least}", least), output=f"{x}:above")
            levels = self.levels(above, above, ALL_LEVELS, unit)
            self.op("QuantizeLinear", levels, self.number("quantise:one", 1), zero, output=made)
        return _Rows(((made, ALL_LEVELS),), zero, unit, least)

    def levels(self, x: str, size: str, count: int, unit: str) -> str:
        """Scales ``x`` so that each row's largest ``size``, stored as ``unit``, becomes ``count``."""
        axis = self.constant("quantise:axis", np.array([-1], np.int64))
        largest = self.op("ReduceMax", size, axis, output=f"{x}:largest", keepdims=1)
        self.op("Max", largest, self.number("quantise:tiny", _TINY), output=unit)
        factor = self.op("Div", self.number(f"quantise:{count}", count), unit, output=f"{x}:per_unit")
        return self.op("Mul", x, factor, output=f"{x}:levels")

    def number(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def zero(self) -> str:
        return self.constant("quantise:zero", np.array(_ZERO, np.uint8))
