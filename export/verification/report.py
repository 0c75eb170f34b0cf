"""The results of an export, the gates they must reach, and ``export_report.json``."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dinokit.errors import ExportError
from dinokit.export.verification.verify import Comparison

__all__ = ["GATES", "DataFile", "ExportReport", "Gate", "LabelAgreement", "VariantReport", "describe_machine"]

_PACKAGES = ("dinokit", "numpy", "onnx", "onnxruntime-gpu", "onnxruntime", "timm", "torch")


@dataclass(frozen=True)
class Gate:
    """The accuracy that a variant must reach; None sets no limit."""

    relative_difference: float | None = None
    """Largest difference of any output, relative to the largest number of that output, so that the scale of the
    features does not matter."""
    cosine_mean: float | None = None
    """Mean cosine between the embeddings and torch's, over all pictures of all comparisons."""
    maps_cosine_mean: float | None = None
    """Likewise for patch tokens and attention: errors of the last block in the patches do not show in CLS."""
    equal_labels: float | None = None
    """Share of the pictures of a labelled set that get the same k-NN label, if a set was given."""


GATES = {
    "fp32": Gate(relative_difference=1e-4),  # typical values are around 1e-6
    "fp16": Gate(cosine_mean=0.9999, maps_cosine_mean=0.999),
    "int8": Gate(cosine_mean=0.99, maps_cosine_mean=0.95, equal_labels=0.99),
}


@dataclass(frozen=True)
class LabelAgreement:
    """k-NN labels of a labelled set by torch's and the variant's embeddings; the other pictures label each one."""

    pictures: int
    classes: int
    k: int
    equal: float
    """Share of the pictures with the same label from both, 0 to 1."""
    accuracy_torch: float
    accuracy: float
    """Share of the pictures labelled correctly by the variant's embeddings."""
    cosine_mean: float
    cosine_p1: float
    cosine_min: float


@dataclass(frozen=True)
class DataFile:
    """The file with the weights beside an ONNX file."""

    file: str
    """Relative to the model folder."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class VariantReport:
    """One file and how far it differs from torch."""

    file: str
    """Relative to the model folder; just the name if the file is not in one."""
    precision: str
    target: str
    bytes: int
    """Including the file with its weights, if there is one."""
    sha256: str
    comparisons: tuple[Comparison, ...]
    """Empty if the file could not be run here; then ``unproven`` gives the reason."""
    labels: LabelAgreement | None = None
    images_per_second: float | None = None
    speed_of: str = ""
    """Input and hardware of ``images_per_second``, in words."""
    device: str = "cpu"
    """Where it was compared: ``cpu``, ``cuda:0``."""
    unproven: str = ""
    """Why it could not be run on this machine; empty if it was."""
    data: DataFile | None = None
    """The second file with its weights, if there is one."""
    held_out_cosine: float | None = None
    """Mean cosine with torch over the photographs that an int8 file's fixed activation ranges were not taken from; None
    for other files."""
    in_float: tuple[str, ...] = ()
    """Names of the weights kept in float32: in int8 files to reach the gate, in float16 files to prevent overflow."""
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )

    @property
    def max_difference(self) -> float:
        """The largest absolute difference in any comparison; infinite if a number is not finite.

        NaN if nothing was compared; so are the mean and the cosines.
        """
        return max((c.max_difference for c in self.comparisons), default=float("nan"))

    @property
    def mean_difference(self) -> float:
        """Of the CLS embedding, over all comparisons."""
        return float(np.mean([c.cls_mean for c in self.comparisons])) if self.comparisons else float("nan")

    @property
    def relative_difference(self) -> float:
        """The largest difference relative to its output's largest number; NaN if nothing was compared."""
        return max((c.relative_max for c in self.comparisons), default=float("nan"))

    @property
    def maps_cosine(self) -> float | None:
        """Mean over the comparisons of tokens and attention; None for a file with neither output."""
        found = [c.maps_cosine for c in self.comparisons if c.maps_cosine is not None]
        return float(np.mean(found)) if found else None

    @property
    def finite(self) -> bool:
        """Whether all outputs were finite."""
        return all(c.finite for c in self.comparisons)

    @property
    def cosines(self) -> tuple[float, float, float]:
        """Mean, first percentile and minimum over all pictures of all comparisons."""
        values = np.array([cosine for c in self.comparisons for cosine in c.cosines] or [float("nan")])
        return float(values.mean()), float(np.percentile(values, 1)), float(values.min())

    def failures(self) -> Iterator[str]:
        """What is below the gate and by how much, in words."""
        if not self.comparisons:
            yield f"is not verified: it cannot be run on this machine ({self.unproven})"
            return
        gate, cosine = GATES[self.precision], self.cosines[0]
        worst = max(self.comparisons, key=lambda c: (not c.finite, c.relative_max))
        where = f"at batch {worst.batch_size} of {worst.height}x{worst.width} pixels"
        if not self.finite:
            yield f"gave numbers that are not finite {where}"
            return
        if gate.relative_difference is not None and self.relative_difference > gate.relative_difference:
            yield (
                f"differs from torch by {self.relative_difference:.2e} of the output's largest number {where}, at most "
                f"{gate.relative_difference:.0e} is allowed"
            )
        if gate.cosine_mean is not None and cosine < gate.cosine_mean:
            yield (
                f"has a mean cosine of {cosine:.6f} with torch, at least {gate.cosine_mean} is needed "
                f"({gate.cosine_mean - cosine:.1e} too low)"
            )
        unseen = self.held_out_cosine
        if gate.cosine_mean is not None and unseen is not None and unseen < gate.cosine_mean:
            yield (
                f"has a mean cosine of {unseen:.6f} with torch on the photographs that its activation ranges were not "
                f"taken from, at least {gate.cosine_mean} is needed"
            )
        maps = self.maps_cosine
        if gate.maps_cosine_mean is not None and maps is not None and maps < gate.maps_cosine_mean:
            yield (
                f"has patch tokens or attention with a mean cosine of {maps:.6f} with torch's, at least "
                f"{gate.maps_cosine_mean} is needed"
            )
        if gate.equal_labels is not None and self.labels and self.labels.equal < gate.equal_labels:
            yield (
                f"gives {self.labels.equal:.1%} of {self.labels.pictures} pictures the k-NN label that torch gives, "
                f"at least {gate.equal_labels:.0%} is needed"
            )

    @property
    def passed(self) -> bool:
        """Whether it reaches its gate."""
        return not any(self.failures())

    @property
    def not_on_its_device(self) -> bool:
        """Whether it is a file for a GPU that was run on a CPU."""
        return self.target == "ort-cuda" and self.device == "cpu" and bool(self.comparisons)

    @property
    def remark(self) -> str:
        """What the comparison does not cover, in words; otherwise empty."""
        return "; ".join(self._remarks())

    def _remarks(self) -> Iterator[str]:
        half = self.precision == "fp16"
        if self.in_float:
            why = "their inputs or outputs come close to float16's largest number"
            why = why if half else "eight bits change the embeddings too much"
            yield f"these weights stay float32, since {why}: {', '.join(self.in_float)}"
        if self.not_on_its_device:
            rounded = ", which compute float16 in float32" if half else ""
            yield (
                f"compared on the CPU by ONNX Runtime's CPU kernels for the same operators{rounded}; the CUDA kernels "
                "were not run and their speed was not measured, since no GPU was available"
            )
        elif half and self.device == "cpu" and self.comparisons:
            yield (
                "compared on the CPU, which reads the float16 weights but computes in float32; a GPU also rounds what "
                "it computes"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON; None if nothing was compared."""
        mean, p1, least = self.cosines if self.comparisons else (None, None, None)
        measured = self.finite and bool(self.comparisons)
        return {
            "file": self.file,
            "precision": self.precision,
            "target": self.target,
            "bytes": self.bytes,
            "sha256": self.sha256,
            "data": asdict(self.data) if self.data else None,
            "device": self.device,
            "unproven": self.unproven,
            "in_float": list(self.in_float),
            "remark": self.remark,
            "passed": self.passed,
            "gate": asdict(GATES[self.precision]),
            "finite": self.finite,
            "max_difference": self.max_difference if measured else None,
            "mean_difference": self.mean_difference if measured else None,
            "relative_difference": self.relative_difference if measured else None,
            "maps_cosine_mean": self.maps_cosine if measured else None,
            "cosine_mean": mean,
            "cosine_p1": p1,
            "cosine_min": least,
            "held_out_cosine_mean": self.held_out_cosine if measured else None,
            "labels": asdict(self.labels) if self.labels else None,
            "images_per_second": self.images_per_second,
            "speed_of": self.speed_of,
            "date": self.date,
            "comparisons": [c.to_json() for c in self.comparisons],
        }


@dataclass(frozen=True)
class ExportReport:
    """All variants of an export, and the versions and machine that made them; saved as ``export_report.json``."""

    model: str
    weights_sha256: str
    photographs: tuple[str, ...]
    """Names of the picture files; in a batch that is larger, they come again mirrored."""
    variants: tuple[VariantReport, ...]
    kept: tuple[dict[str, Any], ...] = ()
    """Entries, as in the JSON, of files that an earlier export of the same weights left in the folder."""
    dropped: tuple[str, ...] = ()
    """ONNX files that were in the folder and are not any more: not made now, and not verified for these weights."""
    card: str = "none"
    """``written``, or ``kept`` if README.md was edited by hand."""
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    versions: dict[str, str] = field(default_factory=lambda: installed_versions())

    @property
    def passed(self) -> bool:
        """Whether every variant made now reaches its gate."""
        return all(variant.passed for variant in self.variants)

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "passed": self.passed,
            "model": self.model,
            "weights_sha256": self.weights_sha256,
            "photographs": list(self.photographs),
            "variants": [*(variant.to_json() for variant in self.variants), *self.kept],
            "card": self.card,
            "machine": self.machine,
            "versions": self.versions,
        }

    def check(self, *, allow_loss: bool = False) -> None:
        """Raises ExportError with the shortfall unless every variant reaches its gate.

        ``allow_loss`` accepts a loss of accuracy, but not numbers that are not finite.
        """
        failed = [v for v in self.variants if not v.passed and not (allow_loss and v.finite)]
        if not failed:
            return
        facts = "; ".join(f"{v.file} of {self.model!r} {' and '.join(v.failures())}" for v in failed)
        if all(v.unproven for v in failed):
            advice = "Export on a machine that can run it, or keep it unverified with --allow-loss (allow_loss=True)"
        elif all(v.finite for v in failed) and any(v.precision != "fp32" for v in failed):
            advice = "Leave that precision out, or keep the loss with --allow-loss (allow_loss=True)"
        else:
            advice = (
                "Check that the weights are finite, and report it with the versions of torch and onnxruntime"
            )
        raise ExportError(f"{facts}; nothing was written. {advice}")


def describe_machine() -> dict[str, Any]:
    """The hardware of the measurements, without the machine's name."""
    processor = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass  # not Linux, or the processor has no name
    return {
        "system": platform.system(),
        "machine": platform.machine(),
        "processor": processor,
        "cpu_count": os.cpu_count(),
    }


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages involved."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
