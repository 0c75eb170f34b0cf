"""Compares two engines on real photographs at several image and batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ExportError, ModelError
from dinokit.export.graphs.embedder import CropEngine
from dinokit.model_folder.contract import ATTENTION, OUTPUTS, POOLED, TOKENS
from dinokit.pictures.bands import Bands
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime import Engine

__all__ = [
    "BATCH_SIZES",
    "Comparison",
    "Sample",
    "compare",
    "compare_engines",
    "cosines",
    "image_sizes",
    "reference_samples",
]

BATCH_SIZES = (1, 3, 8)


@dataclass(frozen=True)
class Sample:
    """A batch of photographs and the reference's outputs for it."""

    crops: NDArray[Any]
    """(B, H, W, C) uint8; float32 on the same scale for bands with more bits."""
    pixels: NDArray[np.float32]
    """(B, C, H, W), normalised."""
    right: dict[str, NDArray[np.float32]]
    """Values by output name, see :class:`dinokit.runtime.Engine`."""


@dataclass(frozen=True)
class Comparison:
    """How far two engines differ on one batch of one picture size. All differences are absolute.

    Outputs that are not compared are None: tokens and attention of an embedder, which does not return them, and
    attention if torch does not return it.
    """

    batch_size: int
    height: int
    width: int
    cls_max: float
    cls_mean: float
    tokens_max: float | None
    tokens_mean: float | None
    attention_max: float | None
    cosines: tuple[float, ...]
    """Per picture, between its two CLS embeddings."""
    finite: bool
    """Whether both engines returned only finite numbers."""
    relative_max: float
    """The largest difference of any output, relative to the reference's largest number in that output."""
    maps_cosine: float | None
    """The lower of the mean cosines of tokens and of attention heads; None if neither is compared."""

    @property
    def max_difference(self) -> float:
        """The largest difference of any output; infinite if a number is not finite."""
        if not self.finite:
            return float("inf")
        return max(self.cls_max, self.tokens_max or 0.0, self.attention_max or 0.0)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite become None, which JSON cannot represent otherwise."""
        values = {
            **{name: getattr(self, name) for name in self.__dataclass_fields__ if name != "cosines"},
            "cosine_mean": float(np.mean(self.cosines)),
            "cosine_min": min(self.cosines),
        }
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def compare_engines(
    reference: Engine,
    candidate: Engine | CropEngine,
    photographs: Sequence[Image.Image] | Sequence[Bands],
    preprocessing: Preprocessing,
    patch_size: int,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    sizes: Sequence[tuple[int, int]] | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Comparison, ...]:
    """Runs the same photographs through both engines: :func:`reference_samples`, then :func:`compare`."""
    samples = reference_samples(
        reference,
        photographs,
        preprocessing,
        sizes or image_sizes(preprocessing.crop_px, patch_size),
        batch_sizes=batch_sizes,
        progress=progress,
    )
    return compare(candidate, samples, progress=progress)


def reference_samples(
    reference: Engine,
    photographs: Sequence[Image.Image] | Sequence[Bands],
    preprocessing: Preprocessing,
    sizes: Iterable[tuple[int, int]],
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    progress: Callable[[str], None] | None = None,
) -> tuple[Sample, ...]:
    """The reference's outputs, computed once for all candidates.

    Args:
        reference: the engine whose outputs are correct.
        photographs: upright RGB pictures, or bands, at least one; larger batches repeat them mirrored.
        preprocessing: of the model.
        sizes: (height, width) of the crops, multiples of the patch size.
        batch_sizes: each is run at each size.
        progress: called with a description before each run.

    Returns:
        One sample for each size and batch size.
    """
    samples = []
    for height, width in sizes:
        transform = preprocessing.with_image_size((height, width))
        crops = np.stack([transform.crop(p) for p in _enough(photographs, max(batch_sizes))])
        pixels = transform.normalise(crops)
        for batch_size in batch_sizes:
            if progress:
                progress(f"torch: batch {batch_size} of {height}x{width} pixels")
            right = _run_reference(reference, pixels[:batch_size])
            samples.append(Sample(crops[:batch_size], pixels[:batch_size], right))
    return tuple(samples)


def _run_reference(reference: Engine, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """All outputs of this architecture: some have no attention, a few not even a feature map."""
    for names in (OUTPUTS, (TOKENS, POOLED)):
        try:
            return reference.run(pixels, names)
        except ModelError:
            continue
    return reference.run(pixels, (POOLED,))


def compare(
    candidate: Engine | CropEngine,
    samples: Iterable[Sample],
    *,
    progress: Callable[[str], None] | None = None,
) -> tuple[Comparison, ...]:
    """One comparison for each sample.

    Raises:
        ExportError: the candidate returns arrays of another shape.
        ModelError: it cannot run at all.
    """
    results = []
    for sample in samples:
        batch_size, _, height, width = sample.pixels.shape
        if progress:
            progress(f"comparing batch {batch_size} of {height}x{width} pixels")
        ours = (
            {POOLED: candidate.embed(sample.crops)}
            if isinstance(candidate, CropEngine)
            else candidate.run(sample.pixels, list(sample.right))
        )
        results.append(_compare(sample.right, ours, (height, width)))
    return tuple(results)


def image_sizes(own: tuple[int, int], patch_size: int) -> tuple[tuple[int, int], ...]:
    """Three (height, width): the model's own, one 1.5 times as large, and one that is not square."""
    rows, columns = own[0] // patch_size, own[1] // patch_size
    grids = (
        (rows, columns),
        (-(-rows * 3 // 2), -(-columns * 3 // 2)),
        (max(1, rows * 3 // 4), columns * 5 // 4 + 1),
    )
    return tuple((r * patch_size, c * patch_size) for r, c in grids)


def cosines(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float64]:
    """Cosines along the last axis of two (…, D) arrays, in float64; NaN where numbers are not finite."""
    left, right = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(left, axis=-1) * np.linalg.norm(right, axis=-1)
    found: NDArray[np.float64] = (left * right).sum(-1) / np.maximum(lengths, 1e-12)
    return found


def _enough(
    photographs: Sequence[Image.Image] | Sequence[Bands], count: int
) -> Iterable[Image.Image | Bands]:
    """``count`` pictures: the photographs, then their mirror images, then from the start."""
    mirror = Image.Transpose.FLIP_LEFT_RIGHT
    mirrored = [p.transpose(mirror) for p in photographs[: max(0, count - len(photographs))]]
    pictures = [*photographs, *mirrored]
    return (pictures[i % len(pictures)] for i in range(count))


def _compare(
    right: dict[str, NDArray[np.float32]], ours: dict[str, NDArray[np.float32]], size: tuple[int, int]
) -> Comparison:
    for name in ours:
        if right[name].shape != ours[name].shape:
            raise ExportError(f"{name} has shape {ours[name].shape}; torch returns {right[name].shape}")
    finite = all(bool(np.isfinite(x[name]).all()) for x in (right, ours) for name in ours)
    with np.errstate(invalid="ignore", over="ignore"):  # reported by ``finite``
        difference = {name: np.abs(right[name].astype(np.float64) - ours[name]) for name in ours}
        found = cosines(right[POOLED], ours[POOLED])
        scale = {name: max(float(np.abs(right[name]).max()), 1e-30) for name in ours}
        maps = [
            float(cosines(right[name], ours[name]).mean()) for name in (TOKENS, ATTENTION) if name in ours
        ]
    largest = {name: float(d.max()) for name, d in difference.items()}
    mean = {name: float(d.mean()) for name, d in difference.items()}
    return Comparison(
        batch_size=len(found),
        height=size[0],
        width=size[1],
        cls_max=largest[POOLED],
        cls_mean=mean[POOLED],
        tokens_max=largest.get(TOKENS),
        tokens_mean=mean.get(TOKENS),
        attention_max=largest.get(ATTENTION),
        cosines=tuple(found.tolist()),
        finite=finite,
        relative_max=max(largest[name] / scale[name] for name in ours),
        maps_cosine=min(maps) if maps else None,
    )
