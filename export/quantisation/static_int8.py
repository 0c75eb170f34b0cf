"""int8 for convolutional networks: a quarter of the bytes, and integer convolutions on CPUs.

ONNX Runtime computes a convolution in integers if its input, weight and output are quantised, each written as
QuantizeLinear and DequantizeLinear around it, which any runtime can also compute in float32. A weight has one scale per
channel and is rounded so that real activations change least (``rounding.py``, with patches instead of tokens); an
activation has one scale for the whole tensor, taken from photographs in advance ("static"). Convolutions for which that
is too coarse (``int8.py``) stay float32, weights included: ONNX Runtime would convert int8 weights again at each run.

In numbers, with x (B, I, H, W), W (O, I, h, w) and the bias b (O,)::

    w_o = max |W_o| / 64                   Q = W / w, rounded by rounding.py                    int8, -64 … 64
    s   = (max x - min x) / 255            0 is exactly a level; also for outputs         uint8
    b as int32 in steps of s · w_o

So 2 · 255 · 64 < 2^15, as every processor needs it (``rounding.py``).

A Vision Transformer needs another method: its tokens differ so much that each needs its own scale (``quantize.py``).
Here too a picture's vector does not depend on its batch, since the scales are fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dinokit.export.graphs.graph import Rewriter, Store, weight_values
from dinokit.export.quantisation.calibration import watch
from dinokit.export.quantisation.rounding import Rounded, round_by_moments
from dinokit.export.verification.sessions import start_session
from dinokit.model_folder.contract import INPUT, POOLED

if TYPE_CHECKING:
    import onnx

__all__ = [
    "WEIGHT_LEVELS",
    "Convolution",
    "find_convolutions",
    "learn",
    "patches",
    "sensitivity",
    "to_static_int8",
]

_BATCH = 8
_MOST_BYTES = 2**30  # of moments at a time; a larger network is run several times
WEIGHT_LEVELS = 64
"""Levels of int8 weights on either side of zero."""
_LEVELS = 255  # of uint8 activations
_TINY = 1e-30
_MOST_STEPS = 2**30
"""Of a bias in int32: as many are left for the sum of the products."""
_ACTIVATIONS = ("Relu", "Clip")
"""Activations that ONNX Runtime computes inside an integer convolution, through its output's range."""

Range = tuple[float, float]
"""The least and the greatest value of a tensor; 0 lies between them."""


@dataclass(frozen=True)
class Convolution:
    """One Conv with a constant weight, of two dimensions."""

    name: str
    """Its node's."""
    source: str
    weight: str
    result: str
    """The quantised result: its output, or that of the activation that is its only consumer."""
    group: int
    pads: tuple[int, int, int, int]
    """Above, left, below, right."""
    strides: tuple[int, int]
    dilations: tuple[int, int]


@dataclass(frozen=True)
class Learnt:
    """Measurements of a network's convolutions over photographs."""

    rounded: Mapping[str, Rounded]
    """By weight name; kernels (I / group · h · w, O)."""
    ranges: Mapping[str, Range]
    """Of their sources and results."""
    work: Mapping[str, float]
    """Each one's share of all multiplications, by their nodes' names."""
    size: Mapping[str, float]
    """The same for weights."""


def find_convolutions(model: onnx.ModelProto) -> list[Convolution]:
    """All convolutions of a graph, in the order in which they are computed."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    takers: dict[str, list[onnx.NodeProto]] = {value.name: [] for value in model.graph.output}
    outputs = frozenset(takers)
    for node in model.graph.node:
        for name in node.input:
            takers.setdefault(name, []).append(node)
    found = []
    for node in model.graph.node:
        if node.op_type != "Conv" or any(name not in weights for name in node.input[1:]):
            continue
        dims = weights[node.input[1]].dims
        options: dict[str, Any] = {a.name: list(a.ints) or a.s or a.i for a in node.attribute}
        if len(dims) != 4 or options.get("auto_pad", b"NOTSET") != b"NOTSET":
            continue
        out = node.output[0]
        behind = takers.get(out, [])
        fused = len(behind) == 1 and behind[0].op_type in _ACTIVATIONS and out not in outputs
        found.append(
            Convolution(
                node.name,
                node.input[0],
                node.input[1],
                behind[0].output[0] if fused else out,
                int(options.get("group", 1)),
                tuple(options.get("pads", [0] * 4)),
                tuple(options.get("strides", [1] * 2)),
                tuple(options.get("dilations", [1] * 2)),
            )
        )
    return found


# -- measurements over photographs


def learn(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    convolutions: Sequence[Convolution],
    pixels: NDArray[np.float32],
    say: Callable[[str], None],
) -> Learnt:
    """Runs the photographs: ranges of all activations, and weights rounded by the moments of their patches.

    Args:
        model: float32.
        store: its large weights if they are outside.
        convolutions: of the model.
        pixels: (B, C, H, W) float32, as the model takes them.
        say: called with a description of each step.
    """
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    kernels = {one.weight: weight_values(tensors[one.weight], store) for one in convolutions}
    ranges: dict[str, Range] = {}
    rounded: dict[str, Rounded] = {}
    work: dict[str, int] = {}
    for some in _groups(convolutions, kernels):
        names = list(dict.fromkeys(name for one in some for name in (one.source, one.result)))
        asked = [name for name in names if name != INPUT]
        session = watch(model, store, asked)
        moments: dict[str, list[NDArray[np.float32]]] = {}
        for start in range(0, len(pixels), _BATCH):
            batch = pixels[start : start + _BATCH]
            seen = dict(zip(asked, session.run(asked, {INPUT: batch}), strict=True)) | {INPUT: batch}
            for name in names:
                low, high = ranges.get(name, (0.0, 0.0))
                ranges[name] = min(low, float(seen[name].min())), max(high, float(seen[name].max()))
            for one in some:
                work[one.name] = kernels[one.weight].size * int(np.prod(seen[one.result].shape[2:]))
                new = [rows.T @ rows for rows in patches(seen[one.source], one, kernels[one.weight].shape)]
                before = moments.get(one.weight)
                moments[one.weight] = [a + b for a, b in zip(before, new, strict=True)] if before else new
        for weight, found in moments.items():
            say(f"rounding {weight}")
            rounded[weight] = _round(kernels[weight], found)
    size = {one.name: kernels[one.weight].size for one in convolutions}
    return Learnt(rounded, ranges, _shares(work), _shares(size))


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    whole = max(1, sum(counts.values()))
    return {name: count / whole for name, count in counts.items()}


def _groups(
    convolutions: Sequence[Convolution], kernels: Mapping[str, NDArray[np.float32]]
) -> Iterator[list[Convolution]]:
    """Groups whose moments fit in memory together; convolutions that share a weight are in one group."""
    of_weight: dict[str, list[Convolution]] = {}
    for one in convolutions:
        of_weight.setdefault(one.weight, []).append(one)
    group: list[Convolution] = []
    size = 0
    for weight, sharing in of_weight.items():
        needed = 4 * sharing[0].group * (kernels[weight].size // len(kernels[weight])) ** 2
        if group and size + needed > _MOST_BYTES:
            yield group
            group, size = [], 0
        group += sharing
        size += needed
    if group:
        yield group


def patches(
    x: NDArray[np.float32], one: Convolution, shape: tuple[int, ...]
) -> Iterator[NDArray[np.float32]]:
    """For each group, the patches that its kernels are multiplied with: (positions, I / group · h · w)."""
    _, inputs, height, width = shape
    above, left, below, right = one.pads
    x = np.pad(x, ((0, 0), (0, 0), (above, below), (left, right)))
    down, across = one.dilations
    window = ((height - 1) * down + 1, (width - 1) * across + 1)
    views = sliding_window_view(x, window, axis=(2, 3))[
        :, :, :: one.strides[0], :: one.strides[1], ::down, ::across
    ]
    for group in range(one.group):
        mine = views[:, group * inputs : (group + 1) * inputs]
        yield np.ascontiguousarray(mine.transpose(0, 2, 3, 1, 4, 5)).reshape(-1, inputs * height * width)


def _round(kernel: NDArray[np.float32], moments: Sequence[NDArray[np.float32]]) -> Rounded:
    groups = np.split(kernel.reshape(len(kernel), -1).T, len(moments), axis=1)
    parts = [round_by_moments(part, seen, WEIGHT_LEVELS) for part, seen in zip(groups, moments, strict=True)]
    return Rounded(
        np.concatenate([part.integers for part in parts], axis=1), np.concatenate([p.scale for p in parts])
    )


def sensitivity(
    model: onnx.ModelProto,
    store: Mapping[str, NDArray[Any]] | None,
    convolutions: Sequence[Convolution],
    learnt: Learnt,
    pixels: NDArray[np.float32],
) -> Iterator[tuple[str, float]]:
    """For each convolution's name, the mean squared change of the embeddings when it alone is in integers, in variances
    of the embeddings between the pictures.

    Args:
        model, store, convolutions, pixels: as :func:`learn` takes them; B > 1.
        learnt: its result.
    """

    def embeddings(*in_integers: str) -> NDArray[np.float64]:
        own = None if store is None else dict(store)
        session = start_session(to_static_int8(model, own, learnt, in_integers), own)
        found: NDArray[np.float64] = session.run([POOLED], {INPUT: pixels})[0].astype(np.float64)
        return found

    right = embeddings()
    variance = max(float(np.mean(np.square(right - right.mean(axis=0)))), _TINY)
    for one in convolutions:
        yield one.name, float(np.mean(np.square(embeddings(one.name) - right))) / variance


# -- the graph


def to_static_int8(
    model: onnx.ModelProto, store: Store | None, learnt: Learnt, in_integers: Collection[str]
) -> onnx.ModelProto:
    """The same network with convolutions in integers.

    Args:
        model: float32, for any size; not modified.
        store: its large weights if they are outside; new ones are added.
        learnt: as :func:`learn` gives it.
        in_integers: names of these convolutions; the others stay float32.

    Returns:
        A new model with the same float32 inputs and outputs; standard operators only.
    """
    return _StaticInt8(model, store).run(learnt, frozenset(in_integers))


class _StaticInt8(Rewriter):
    def run(self, learnt: Learnt, in_integers: frozenset[str]) -> onnx.ModelProto:
        self.learnt = learnt
        known = {one.name: one for one in find_convolutions(self.model)}
        results = {known[name].result for name in in_integers}
        for node in self.source_nodes:
            out = node.output[0]
            if node.name in in_integers:
                self.to_integers(node, known[node.name], results)
            if out in results:
                node.output[0] = f"{out}:float"
            self.nodes.append(node)
            if out in results:
                self.in_levels(f"{out}:float", out, out)
        return self.finish()

    def to_integers(self, node: onnx.NodeProto, one: Convolution, results: set[str]) -> None:
        step, _ = _scale(self.learnt.ranges[one.source])
        rounded = self.learnt.rounded[one.weight]
        node.input[0] = self.source(one, results)
        if len(node.input) < 3:
            node.input[1] = self.kernel(node.name, one.weight, one.weight, rounded)
            return
        bias = self.array(node.input[2])
        coarser = _with_room_for(bias / step, rounded)
        # Another convolution with this weight may have another bias.
        stem = one.weight if coarser is rounded else node.name
        node.input[1] = self.kernel(node.name, one.weight, stem, coarser)
        node.input[2] = self.bias(node.name, bias, coarser.scale.astype(np.float64) * step)

    def kernel(self, name: str, weight: str, stem: str, rounded: Rounded) -> str:
        integers = rounded.integers.T.reshape(self.weights[weight].dims)
        values = self.constant(f"{stem}:int8", integers)
        scale = self.constant(f"{stem}:scale", rounded.scale)
        return self.op("DequantizeLinear", values, scale, output=f"{name}:weight", axis=0)

    def bias(self, name: str, bias: NDArray[np.float32], steps: NDArray[np.float64]) -> str:
        whole = np.rint(bias / steps).astype(np.int32)
        integers = self.constant(f"{name}:bias_int32", whole)
        scale = self.constant(f"{name}:bias_scale", steps.astype(np.float32))
        return self.op("DequantizeLinear", integers, scale, output=f"{name}:bias", axis=0)

    def source(self, one: Convolution, results: set[str]) -> str:
        """The convolution's quantised input; other consumers of the tensor get it unchanged."""
        if one.source in results:
            return one.source
        rounded = f"{one.source}:rounded"
        if rounded not in self._made:
            self._made.add(rounded)
            self.in_levels(one.source, rounded, one.source)
        return rounded

    def in_levels(self, x: str, out: str, ranged: str) -> None:
        """Writes ``out``: ``x`` rounded to the levels of the tensor ``ranged``."""
        step, zero = _scale(self.learnt.ranges[ranged])
        scale = self.constant(f"{ranged}:scale", np.array(step, np.float32))
        middle = self.constant(f"{ranged}:zero", np.array(zero, np.uint8))
        self.op("QuantizeLinear", x, scale, middle, output=f"{ranged}:uint8")
        self.op("DequantizeLinear", f"{ranged}:uint8", scale, middle, output=out)


def _with_room_for(bias: NDArray[np.floating[Any]], rounded: Rounded) -> Rounded:
    """A kernel with coarser steps in the channels whose bias would exceed int32; ``bias``: in steps of the input.

    Training leaves channels with nearly no weights and an ordinary bias.
    """
    least = (np.abs(bias) / _MOST_STEPS).astype(np.float32)
    if (least <= rounded.scale).all():
        return rounded
    scale = np.maximum(rounded.scale, least)
    return Rounded(np.rint(rounded.values / scale).astype(np.int8), scale)


def _scale(limits: Range) -> tuple[float, int]:
    """The step of uint8 levels, and the level that represents 0."""
    low, high = limits
    step = float(np.float32((high - low) / _LEVELS)) or 1.0
    return step, int(np.rint(-low / step).clip(0, _LEVELS))
