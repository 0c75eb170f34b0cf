"""How the int8 files of a network are made: what is rounded how, and what stays float32, if anything must.

The weights are rounded so that what photographs make of them changes least (``rounding.py``). Their activations have
eight bits where that changes the embeddings least for the time it saves (``sensitivity.py``), sixteen elsewhere. If the
file is below its gate then, or barely above, first fewer activations have eight bits; after that, those weights stay
float32 that change the embeddings most per byte that rounding them saves, more of them each time, until the gate is met
with a margin.

Networks of convolutions go another way (``static_int8.py``): of them whole convolutions stay float32.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs.graph import weight_values
from dinokit.export.quantisation.calibration import second_moments
from dinokit.export.quantisation.products import Product, find_products, product_share
from dinokit.export.quantisation.rounding import Rounded, round_by_moments
from dinokit.export.quantisation.sensitivity import sensitivity_to_activations, sensitivity_to_weights
from dinokit.export.quantisation.static_int8 import (
    Learnt,
    find_convolutions,
    learn,
    sensitivity,
    to_static_int8,
)
from dinokit.export.verification.report import GATES, VariantReport

if TYPE_CHECKING:
    import onnx

__all__ = [
    "ACTIVATIONS",
    "CONVOLUTIONS",
    "Int8Plan",
    "Int8Plans",
    "has_margin",
    "in_integers",
    "is_convolutional",
]

_LEAST_PRODUCTS = 0.5
"""Of a network's weights, how many must stand in matrix products for these to be what is made int8."""
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Of the bytes of all product weights, how many stay float32, one after the other."""
_MOST_PIXELS = 8  # pictures for sensitivities: one run a weight
_USED_UP = 0.8
ACTIVATIONS = (5e-5, 1e-5)
"""The mean squared change of the embeddings that activations of eight bits may make, in variances between photographs,
one after the other. Rounding the weights alone changes the starter's by 3e-5. Of 1,000 of its k-NN labels 999 are those
of float32 with 1e-5, 998 with 5e-5 at a quarter more pictures a second, and 996 with 1e-4 (``benchmarks/int8.py``)."""
CONVOLUTIONS = (5e-4, 2e-4, 1e-4, 5e-5, 2e-5)
"""Likewise, what convolutions in integers may change, their weights' rounding included."""
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
    """Names of the weights, or of the convolutions, that stay float32."""
    network: onnx.ModelProto | None = None
    """Of a convolutional network, which is made as a whole (``static_int8.py``): the int8 graph for every size."""
    made: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Large weights of that graph which the float32 one does not have, where these are outside."""


def is_convolutional(graph: onnx.ModelProto) -> bool:
    """Whether most of a network's weights stand in convolutions, and so make it int8 in one piece."""
    return product_share(graph) < _LEAST_PRODUCTS and bool(find_convolutions(graph))


def has_margin(report: VariantReport) -> bool:
    """Whether at most four fifths of what the gate allows to be lost are lost."""
    gate = GATES[report.precision]

    def enough(value: float, least: float | None) -> bool:
        return least is None or value >= 1 - _USED_UP * (1 - least)

    labels = report.labels.equal if report.labels else 1.0
    cosine = min(report.cosines[0], 1.0 if report.held_out_cosine is None else report.held_out_cosine)
    return report.passed and enough(cosine, gate.cosine_mean) and enough(labels, gate.equal_labels)


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
        say("int8: looking at the layers' inputs")
        seen = pixels()
        if is_convolutional(graph):
            yield from _convolutional(graph, store, seen, say)
            return
        products = find_products(graph)
        if not products:
            yield Int8Plan()
            return
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
        sizes = {name: kernel.size for name, kernel in kernels.items()}
        yield from (Int8Plan(rounded, once, names) for names in _in_float(changes, sizes))


def _convolutional(
    graph: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    seen: NDArray[np.float32],
    say: Callable[[str], None],
) -> Iterator[Int8Plan]:
    """As many convolutions in integers as change the embeddings by at most so much, and then fewer."""

    def tell(step: str) -> None:
        say(f"int8: {step}")

    convolutions = find_convolutions(graph)
    learnt = learn(graph, store, convolutions, seen, tell)
    changes: dict[str, float] = {}
    if len(seen) > 1:
        for name, change in sensitivity(graph, store, convolutions, learnt, seen[:_MOST_PIXELS]):
            tell(f"{name} alone in integers")
            changes[name] = change
    ways = dict.fromkeys(in_integers(changes, learnt, allowed) for allowed in CONVOLUTIONS)
    # All in float32 would be another file; where nothing is near enough, the gate shall say so of all in integers.
    for names in [names for names in ways if names] or [tuple(changes)]:
        in_float = tuple(one.name for one in convolutions if one.name not in names)
        made: dict[str, NDArray[Any]] = {}
        both = None if store is None else ChainMap(made, dict(store))
        network = to_static_int8(graph, both, learnt, names)
        yield Int8Plan(in_float=in_float, network=network, made=made)


def in_integers(changes: Mapping[str, float], learnt: Learnt, allowed: float) -> tuple[str, ...]:
    """Which convolutions: those that change least for the work and the bytes that integers save."""
    chosen = []
    spent = 0.0
    for name in sorted(changes, key=lambda name: changes[name] / (learnt.work[name] + learnt.size[name])):
        spent += changes[name]
        if not spent <= allowed:
            break
        chosen.append(name)
    return tuple(chosen)


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


def _in_float(changes: Mapping[str, float], sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Which weights stay float32, for each share: those first that change most per number."""
    order = sorted(changes, key=lambda name: -changes[name] / sizes[name])
    whole = sum(sizes[name] for name in order)
    before = 0
    for share in _SHARES:
        size = count = 0
        while count < len(order) and size < share * whole:
            size += sizes[order[count]]
            count += 1
        if before < count < len(order):  # all in float32 would be another file
            before = count
            yield tuple(order[:count])
