"""Proof that two engines compute the same: real photographs through both, at several sizes and batch sizes."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from dinokit.errors import ModelError
from dinokit.preprocess import Preprocessing
from dinokit.runtime import OUTPUTS, Engine

__all__ = [
    "BATCH_SIZES",
    "TOLERANCE",
    "Comparison",
    "ExportError",
    "ParityReport",
    "compare_engines",
    "image_sizes",
]

TOLERANCE = 1e-4
"""Largest difference of any number that a float32 export may have; usual are some 1e-6."""

BATCH_SIZES = (1, 3, 8)
_PACKAGES = ("dinokit", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime", "timm", "torch")


class ExportError(ModelError):
    """The exported model does not compute what the original does."""


@dataclass(frozen=True)
class Comparison:
    """How far two engines are apart on one batch of one picture size. All differences are absolute."""

    batch_size: int
    height: int
    width: int
    cls_max: float
    cls_mean: float
    tokens_max: float
    tokens_mean: float
    cosine_min: float
    """Cosine between the two CLS embeddings of a picture, the worst of the batch."""
    cosine_mean: float
    attention_max: float
    finite: bool
    """Whether both engines gave only finite numbers."""

    @property
    def max_difference(self) -> float:
        """The largest difference of any output; infinite when numbers are not finite."""
        return max(self.cls_max, self.tokens_max, self.attention_max) if self.finite else float("inf")


@dataclass(frozen=True)
class ParityReport:
    """The comparisons of an export, and with what they were made; kept as ``export_report.json``."""

    model: str
    weights_sha256: str
    file: str
    """The exported file, relative to the model folder."""
    photographs: tuple[str, ...]
    """Names of the picture files; in a batch that is larger, they come again mirrored."""
    comparisons: tuple[Comparison, ...]
    tolerance: float = TOLERANCE
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @property
    def max_difference(self) -> float:
        """The largest difference of any number in any comparison."""
        return max(c.max_difference for c in self.comparisons)

    @property
    def passed(self) -> bool:
        """Whether every comparison is finite and within the tolerance."""
        return self.max_difference <= self.tolerance

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"passed": self.passed, "max_difference": self.max_difference, **asdict(self)}

    def check(self) -> None:
        """Raises ExportError, saying by how much and where, unless the report has passed."""
        if self.passed:
            return
        worst = max(self.comparisons, key=lambda c: c.max_difference)
        where = f"at batch {worst.batch_size} of {worst.height}x{worst.width} pixels"
        if not worst.finite:
            fact = f"gave numbers that are not finite {where}"
        else:
            fact = f"differs from torch by {worst.max_difference:.2e} {where}, at most {self.tolerance:.0e} is allowed"
        raise ExportError(
            f"{self.file} of {self.model!r} {fact}; nothing was written. "
            "Check that the weights are finite, and report it with the versions of torch and onnxruntime"
        )


def compare_engines(
    reference: Engine,
    candidate: Engine,
    photographs: Sequence[Image.Image],
    preprocessing: Preprocessing,
    patch_size: int,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    progress: Callable[[str], None] | None = None,
) -> tuple[Comparison, ...]:
    """Runs the same photographs through both engines.

    Args:
        reference: what is right.
        candidate: what is compared with it.
        photographs: upright RGB pictures, at least one.
        preprocessing: of the model; its size is the first that is compared.
        patch_size: pixels; decides the other sizes, see :func:`image_sizes`.
        batch_sizes: each is tried at each size.
        progress: told before each comparison what is done.

    Returns:
        One comparison for each size and batch size.
    """
    results = []
    for height, width in image_sizes(preprocessing.crop_px, patch_size):
        transform = preprocessing.with_image_size((height, width))
        crops = [transform.crop(picture) for picture in _enough(photographs, max(batch_sizes))]
        pixels = transform.normalise(np.stack(crops))
        for batch_size in batch_sizes:
            if progress:
                progress(f"comparing batch {batch_size} of {height}x{width} pixels")
            batch = pixels[:batch_size]
            results.append(_compare(reference.run(batch, OUTPUTS), candidate.run(batch, OUTPUTS), batch))
    return tuple(results)


def image_sizes(own: tuple[int, int], patch_size: int) -> tuple[tuple[int, int], ...]:
    """Three (height, width): the model's own, one half larger, and one that is not square."""
    rows, columns = own[0] // patch_size, own[1] // patch_size
    grids = (
        (rows, columns),
        (-(-rows * 3 // 2), -(-columns * 3 // 2)),
        (max(1, rows * 3 // 4), columns * 5 // 4 + 1),
    )
    return tuple((r * patch_size, c * patch_size) for r, c in grids)


def _enough(photographs: Sequence[Image.Image], count: int) -> Iterable[Image.Image]:
    """``count`` pictures: the photographs, then their mirror images, then from the start."""
    mirrored = [ImageOps.mirror(p) for p in photographs[: max(0, count - len(photographs))]]
    pictures = [*photographs, *mirrored]
    return (pictures[i % len(pictures)] for i in range(count))


def _compare(
    right: dict[str, NDArray[np.float32]], ours: dict[str, NDArray[np.float32]], batch: NDArray[np.float32]
) -> Comparison:
    for name in OUTPUTS:
        if right[name].shape != ours[name].shape:
            raise ExportError(f"{name} has shape {ours[name].shape}, torch gives {right[name].shape}")
    difference = {name: np.abs(right[name].astype(np.float64) - ours[name]) for name in OUTPUTS}
    a, b = (x["pooler_output"].astype(np.float64) for x in (right, ours))
    cosine = (a * b).sum(1) / np.maximum(np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1), 1e-12)
    return Comparison(
        batch_size=batch.shape[0],
        height=batch.shape[2],
        width=batch.shape[3],
        cls_max=float(difference["pooler_output"].max()),
        cls_mean=float(difference["pooler_output"].mean()),
        tokens_max=float(difference["last_hidden_state"].max()),
        tokens_mean=float(difference["last_hidden_state"].mean()),
        cosine_min=float(cosine.min()),
        cosine_mean=float(cosine.mean()),
        attention_max=float(difference["attention"].max()),
        finite=all(bool(np.isfinite(x[name]).all()) for x in (right, ours) for name in OUTPUTS),
    )


def describe_machine() -> dict[str, Any]:
    """What the numbers were made on, without the machine's name."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or a processor that gives no name
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor,
        "cpu_count": os.cpu_count(),
    }


def installed_versions() -> dict[str, str]:
    """Python and the packages that took part."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
