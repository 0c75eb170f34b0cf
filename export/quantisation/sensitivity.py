"""How much each rounding changes the embeddings: one tensor is rounded at a time.

Small changes add up: the change by several roundings together is nearly the sum of their single changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs.graph import Rewriter, weight_values
from dinokit.export.quantisation.products import Product, lower_bounds, product_of
from dinokit.export.quantisation.quantize import ALL_LEVELS, FINE_LEVELS, LEVELS
from dinokit.export.quantisation.rounding import Rounded
from dinokit.export.verification.sessions import start_session
from dinokit.model_folder.contract import INPUT, POOLED

if TYPE_CHECKING:
    import onnx

__all__ = ["sensitivity_to_activations", "sensitivity_to_weights"]

Say = Callable[[str], None]


def sensitivity_to_weights(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    products: Sequence[Product],
    rounded: Mapping[str, Rounded],
    pixels: NDArray[np.float32],
    say: Say,
) -> dict[str, float]:
    """For each weight's name, the mean squared change of the embeddings when it alone is rounded.

    Args:
        model: float32.
        store: its large weights if they are outside.
        products: of the model, whose weights are measured.
        rounded: by weight name.
        pixels: (B, C, H, W) float32, as the model takes them.
        say: called with a description of each step.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    own = {p.weight: np.ascontiguousarray(weight_values(tensors[p.weight], store)) for p in products}
    session = start_session(_taking_weights(model, own), store)
    right = _embeddings(session, {INPUT: pixels, **own})
    changes: dict[str, float] = {}
    for product in products:
        if product.weight not in changes:
            say(f"rounding {product.weight} alone")
            values = np.ascontiguousarray(product.kernel(rounded[product.weight].values))
            found = _embeddings(session, {INPUT: pixels, **own, product.weight: values})
            changes[product.weight] = _change(found, right)
    return changes


def sensitivity_to_activations(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    products: Sequence[Product],
    pixels: NDArray[np.float32],
    say: Say,
) -> tuple[dict[str, float], float]:
    """For each source of products, the mean squared change of the embeddings when it alone has eight bits.

    Args:
        model: float32.
        store: its large weights if they are outside.
        products: of the model, whose sources are measured.
        pixels: (B, C, H, W) float32, as the model takes them; B > 1.
        say: called with a description of each step.

    Returns:
        The changes, and for comparison the variance of the embeddings between the pictures.
    """
    session = start_session(_TakingLevels(model, store).run(), store)
    bounds = lower_bounds(model)
    fine = {_levels_of(p.source): np.array(FINE_LEVELS, np.float32) for p in products}
    right = _embeddings(session, {INPUT: pixels, **fine})
    changes: dict[str, float] = {}
    for source in dict.fromkeys(product.source for product in products):
        say(f"eight bits for {source} alone")
        levels = np.array(ALL_LEVELS if source in bounds else LEVELS, np.float32)
        found = _embeddings(session, {INPUT: pixels, **fine, _levels_of(source): levels})
        changes[source] = _change(found, right)
    return changes, float(np.mean(np.square(right - right.mean(axis=0))))


def _embeddings(session: Any, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float64]:
    found: NDArray[np.float64] = session.run([POOLED], dict(inputs))[0].astype(np.float64)
    return found


def _change(found: NDArray[np.float64], right: NDArray[np.float64]) -> float:
    return float(np.mean(np.square(found - right)))


# -- graphs that take the roundings as inputs of each run, so that they are built once


def _taking_weights(model: onnx.ModelProto, weights: Mapping[str, NDArray[Any]]) -> onnx.ModelProto:
    import onnx

    taking = onnx.ModelProto()
    taking.CopyFrom(model)
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in weights]
    del taking.graph.initializer[:]
    taking.graph.initializer.extend(kept)
    taking.graph.input.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, values.shape)
        for name, values in weights.items()
    )
    return taking


def _levels_of(source: str) -> str:
    return f"{source}:levels"


class _TakingLevels(Rewriter):
    """Each source is rounded to a number of levels that is an input of its own, as ``quantize.py`` would."""

    def __init__(self, model: onnx.ModelProto, store: Mapping[str, NDArray[Any]] | None) -> None:
        super().__init__(model, None if store is None else dict(store))

    def run(self) -> onnx.ModelProto:
        bounds = lower_bounds(self.model)
        taking = self.onnx.ModelProto()
        taking.CopyFrom(self.model)
        for node in self.source_nodes:
            product = product_of(node, self.weights)
            if product is not None:
                x = product.source
                if x not in self._made:
                    self._made.add(x)
                    taking.graph.input.append(
                        self.onnx.helper.make_tensor_value_info(
                            _levels_of(x), self.onnx.TensorProto.FLOAT, []
                        )
                    )
                    self.in_levels(x, bounds.get(x, 0.0))
                node.input[0] = f"{x}:rounded"
            self.nodes.append(node)
        self.model = taking
        return self.finish()

    def in_levels(self, x: str, least: float) -> None:
        bound = self.constant(f"bound:{least}", np.array(least, np.float32))
        above = self.op("Sub", x, bound, output=f"{x}:above")
        axis = self.constant("axis", np.array([-1], np.int64))
        size = self.op("Abs", above, output=f"{x}:size")
        largest = self.op("ReduceMax", size, axis, output=f"{x}:largest", keepdims=1)
        tiny = self.constant("tiny", np.array(1e-12, np.float32))
        unit = self.op("Max", largest, tiny, output=f"{x}:unit")
        factor = self.op("Div", _levels_of(x), unit, output=f"{x}:factor")
        whole = self.op("Round", self.op("Mul", above, factor, output=f"{x}:scaled"), output=f"{x}:whole")
        self.op("Add", self.op("Div", whole, factor, output=f"{x}:back"), bound, output=f"{x}:rounded")
