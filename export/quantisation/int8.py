"""Plans for the int8 files of a network: how each tensor is rounded, and which weights stay float32.

Weights are rounded so that the layers' outputs over photographs change least (``rounding.py``). Activations have eight
bits where that changes the embeddings least for the time it saves (``sensitivity.py``), sixteen elsewhere. If the file
is then below its gate, or barely above, the next plans give fewer activations eight bits; after that, the weights that
change the embeddings most per saved byte stay float32, more of them in each plan, until the gate is met with a margin.

Convolutional networks are quantised differently (``static_int8.py``): whole convolutions stay float32.
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
from dinokit.export.quantisation.quantize import WEIGHT_LEVELS
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
"""Share of a network's weights that must be in matrix products for these to be quantised, instead of convolutions."""
_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Shares of the bytes of all product weights that stay float32, one plan after the other."""
_MOST_PIXELS = 8  # pictures for sensitivities, which take one run per weight
_USED_UP = 0.8
"""Largest share of the loss that a gate allows, for a file to have a margin."""
ACTIVATIONS = (1e-4, 1e-5)
"""Allowed mean squared change of the embeddings by activations of eight bits, in variances between photographs, one
plan after the other. Rounding the weights alone changes the starter's by 5e-5. Of 1,000 of its k-NN labels, 997 are
those of float32 with 1e-5, and 996 with 1e-4 at 1.3 times as many pictures per second (``benchmarks/int8.py``)."""
CONVOLUTIONS = (5e-4, 2e-4, 1e-4, 5e-5, 2e-5)
"""The same for integer convolutions, including the rounding of their weights."""
_LARGEST = 100_000_000
"""Largest number of product weights for which activations are measured, one run of the network each; in larger
networks all have sixteen bits."""


@dataclass(frozen=True)
class Int8Plan:
    """One way to make a network int8."""

    rounded: Mapping[str, Rounded] = field(default_factory=dict)
    """By weight name; the others are rounded to the nearest integer."""
    once: tuple[str, ...] = ()
    """Names of the weights whose activations have eight bits; all others have sixteen."""
    in_float: tuple[str, ...] = ()
    """Names of the weights, or of the convolutions, that stay float32."""
    network: onnx.ModelProto | None = None
    """For a convolutional network (``static_int8.py``): the whole int8 graph, for every size."""
    made: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """New large weights of that graph, if the weights are outside."""


def is_convolutional(graph: onnx.ModelProto) -> bool:
    """Whether most of a network's weights are in convolutions, so that it is quantised as a whole."""
    return product_share(graph) < _LEAST_PRODUCTS and bool(find_convolutions(graph))


def has_margin(report: VariantReport) -> bool:
    """Whether at most four fifths of the loss that the gate allows are used up."""
    gate = GATES[report.precision]

    def enough(value: float, least: float | None) -> bool:
        return least is None or value >= 1 - _USED_UP * (1 - least)

    labels = report.labels.equal if report.labels else 1.0
    cosine = min(report.cosines[0], 1.0 if report.held_out_cosine is None else report.held_out_cosine)
    return report.passed and enough(cosine, gate.cosine_mean) and enough(labels, gate.equal_labels)


class Int8Plans:
    """The plans in the order in which to try them, the smallest and fastest first; each is made when requested.

    Args:
        graph: float32, every size.
        store: its large weights if they are outside.
        pixels: returns (B, C, H, W) float32, photographs as the graph takes them.
        say: called with a description of each step.
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
        say("int8: running the photographs")
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
                    rounded[product.weight] = round_by_moments(
                        kernels[product.weight], moments, WEIGHT_LEVELS
                    )

        def tell(step: str) -> None:
            say(f"int8: {step}")

        few = seen[:_MOST_PIXELS]
        ways: list[tuple[str, ...]] = [()]
        if len(few) > 1 and sum(kernel.size for kernel in kernels.values()) <= _LARGEST:
            changes, variance = sensitivity_to_activations(graph, store, products, few, tell)
            ways = [_once(products, changes, kernels, allowed * variance) for allowed in activations]
        for once in dict.fromkeys(ways):
            yield Int8Plan(rounded, once)

        # If weights have to stay float32, the activations keep as many digits as possible.
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
    """As many integer convolutions as each allowed change of the embeddings permits, then fewer."""

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
    # A plan with all in float32 would be an fp32 file; if no convolution is accurate enough, the gate must judge all.
    for names in [names for names in ways if names] or [tuple(changes)]:
        in_float = tuple(one.name for one in convolutions if one.name not in names)
        made: dict[str, NDArray[Any]] = {}
        both = None if store is None else ChainMap(made, dict(store))
        network = to_static_int8(graph, both, learnt, names)
        yield Int8Plan(in_float=in_float, network=network, made=made)


def in_integers(changes: Mapping[str, float], learnt: Learnt, allowed: float) -> tuple[str, ...]:
    """The convolutions that change the embeddings least for the work and the bytes that integers save."""
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
    """The weights whose activations get eight bits: those that change least for the work that it saves."""
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
    """The weights that stay float32, for each share: first those that change most per number."""
    order = sorted(changes, key=lambda name: -changes[name] / sizes[name])
    whole = sum(sizes[name] for name in order)
    before = 0
    for share in _SHARES:
        size = count = 0
        while count < len(order) and size < share * whole:
            size += sizes[order[count]]
            count += 1
        if before < count < len(order):  # all in float32 would be an fp32 file
            before = count
            yield tuple(order[:count])
