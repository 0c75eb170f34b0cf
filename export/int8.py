"""How the int8 files of a network are made: what is rounded how, and what stays float32, if anything must.

The weights are rounded so that what photographs make of them changes least (``rounding.py``). Their activations have
eight bits where that changes the embeddings least for the time it saves (``sensitivity.py``), sixteen elsewhere. If the
file is below its gate then, or barely above, first fewer activations have eight bits; after that, those weights stay
float32 that change the embeddings most per byte that rounding them saves, more of them each time, until the gate is met
with a margin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.export.calibration import second_moments
from dinokit.export.graphs import weight_values
from dinokit.export.products import Product, find_products
from dinokit.export.report import GATES, VariantReport
from dinokit.export.rounding import Rounded, round_by_moments
from dinokit.export.sensitivity import sensitivity_to_activations, sensitivity_to_weights

if TYPE_CHECKING:
    import onnx

__all__ = ["ACTIVATIONS", "Int8Plan", "Int8Plans", "has_margin"]

_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of the bytes of all product weights, how many stay float32, one after the other."""
_MOST_PIXELS = 8  # pictures for sensitivities: one run a weight
_USED_UP = 0.8
ACTIVATIONS = (5e-5, 1e-5)
"""The mean squared change of the embeddings that activations of eight bits may make, in variances between photographs,
one after the other. Rounding the weights alone changes the starter's by 2e-5. With 5e-5 as many of its k-NN labels are
those of float32 as with 1e-5, at more pictures a second; with 1e-4 fewer are (``benchmarks/int8.py``)."""
_LARGEST = 100_000_000
"""Numbers in product weights up to which activations are looked at, a run of the network for each; beyond, all have
sixteen bits."""


@dataclass(frozen=True)
class Int8Plan:
    """One way to make a network int8."""

    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    """By the weights' names; the others are rounded to the nearest."""
    once: tuple[str, ...] = ()
    """Names of the weights whose activations have eight bits; all others have sixteen."""
    in_float: tuple[str, ...] = ()
    """Names of the weights that stay float32."""


def has_margin(report: VariantReport) -> bool:
    """Whether at most four fifths of what the gate allows to be lost are lost."""
    gate = GATES[report.precision]

    def enough(value: float, least: float | None) -> bool:
        return least is None or value >= 1 - _USED_UP * (1 - least)

    labels = report.labels.equal if report.labels else 1.0
    return report.passed and enough(report.cosines[0], gate.cosine_mean) and enough(labels, gate.equal_labels)


class Int8Plans:
    """The plans in the order in which they are to be tried, the smallest and fastest first; each made when asked for.

    Args:
        graph: float32, every size.
        store: its large weights where they are outside.
        pixels: gives (B, C, H, W) float32, photographs as the graph takes them.
        say: told what is being done.
        activations: see :data:`ACTIVATIONS`.
    """

    def __init__(
        self,
        graph: onnx.ModelProto,
        store: Mapping[str, NDArray[Any]] | None,
        pixels: Callable[[], NDArray[np.float32]],
        say: Callable[[str], None] = lambda step: None,
        *,
        activations: Sequence[float] = ACTIVATIONS,
    ) -> None:
        self._made: list[Int8Plan] = []
        self._more = self._plans(graph, store, pixels, say, activations)

    def __iter__(self) -> Iterator[Int8Plan]:
        place = 0
        while True:
            if place == len(self._made):
                plan = next(self._more, None)
                if plan is None:
                    return
                self._made.append(plan)
            yield self._made[place]
            place += 1

    def _plans(
        self,
        graph: onnx.ModelProto,
        store: Mapping[str, NDArray[Any]] | None,
        pixels: Callable[[], NDArray[np.float32]],
        say: Callable[[str], None],
        activations: Sequence[float],
    ) -> Iterator[Int8Plan]:
        products = find_products(graph)
        if not products:
            yield Int8Plan()
            return
        say("int8: looking at the layers' inputs")
        seen = pixels()
        kernels = _kernels(graph, store, products)
        rounded: dict[str, Rounded] = {}
        for source, moments in second_moments(graph, store, products, seen):
            for product in products:
                if product.source == source and product.weight not in rounded:
                    say(f"int8: rounding {product.weight}")
                    rounded[product.weight] = round_by_moments(kernels[product.weight], moments)

        def tell(step: str) -> None:
            say(f"int8: {step}")

        few = seen[:_MOST_PIXELS]
        ways: list[tuple[str, ...]] = [()]
        if len(few) > 1 and sum(kernel.size for kernel in kernels.values()) <= _LARGEST:
            changes, variance = sensitivity_to_activations(graph, store, products, few, tell)
            ways = [_once(products, changes, kernels, allowed * variance) for allowed in activations]
        for once in dict.fromkeys(ways):
            yield Int8Plan(rounded, once)

        # Where weights have to stay float32, no digit of the activations is to be lost as well.
        once = ways[-1]
        changes = sensitivity_to_weights(graph, store, products, rounded, few, tell)
        yield from (Int8Plan(rounded, once, names) for names in _in_float(changes, kernels))


def _kernels(
    graph: onnx.ModelProto, store: Mapping[str, NDArray[Any]] | None, products: Sequence[Product]
) -> dict[str, NDArray[np.float32]]:
    tensors = {tensor.name: tensor for tensor in graph.graph.initializer}
    return {p.weight: p.kernel(weight_values(tensors[p.weight], store)) for p in products}


def _once(
    products: Sequence[Product],
    changes: Mapping[str, float],
    kernels: Mapping[str, NDArray[np.float32]],
    allowed: float,
) -> tuple[str, ...]:
    """Which weights' activations have eight bits: those that change least for the work that it saves."""
    work = dict.fromkeys(changes, 0)
    for product in products:
        work[product.source] += kernels[product.weight].size
    chosen: set[str] = set()
    spent = 0.0
    for source in sorted(changes, key=lambda name: changes[name] / work[name]):
        spent += changes[source]
        if not spent <= allowed:
            break
        chosen.add(source)
    return tuple(dict.fromkeys(p.weight for p in products if p.source in chosen))


def _in_float(
    changes: Mapping[str, float], kernels: Mapping[str, NDArray[np.float32]]
) -> Iterator[tuple[str, ...]]:
    """Which weights stay float32, for each share: those first that change most per byte."""
    order = sorted(changes, key=lambda name: -changes[name] / kernels[name].size)
    whole = sum(kernels[name].size for name in order)
    before = 0
    for share in _SHARES:
        size = count = 0
        while count < len(order) and size < share * whole:
            size += kernels[order[count]].size
            count += 1
        if before < count < len(order):  # all in float32 would be another file
            before = count
            yield tuple(order[:count])
