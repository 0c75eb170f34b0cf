"""The facts about a model folder for its card, read from its files."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dinokit.card.measured import read_measured
from dinokit.card.onnx_section import onnx_section
from dinokit.card.record import method_of, read_record
from dinokit.files.json_files import read_json
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import TIMM_FILE, TRANSFORMERS_FILE, BackboneConfig
from dinokit.model_folder.folder import CONFIG_FILE, ONNX_FILE, ModelFolder
from dinokit.model_folder.weights import safetensors_shapes
from dinokit.pictures.bands import is_photographic

__all__ = [
    "FIGURES_FILE",
    "HUB_MODELS",
    "REPORT_FILE",
    "CardFacts",
    "CardSettings",
    "read_facts",
    "read_figures",
]

REPORT_FILE = "export_report.json"
FIGURES_FILE = "figures/figures.json"

HUB_MODELS = re.compile(r"(?:timm|facebook|onnx-community|Xenova)/[\w.-]+")
"""Owners on the Hub whose weights dinokit reads; a source of this form is a repository, not a local path."""
# Files of facebookresearch without their suffix: dino_deitsmall16_pretrain, dinov3_vits16_pretrain_lvd1689m-08c60483.
_PUBLISHED = re.compile(r"dino(?:v[23])?_\w+_pretrain[\w-]*")

# The first line below the metadata of a card that dinokit wrote completely: its settings.
_MARK = re.compile(r"^<!-- dinokit card (\{.*\}) -->$", re.MULTILINE)


@dataclass(frozen=True)
class CardSettings:
    """Settings given by the user, not known from the folder; stored in a comment in the card."""

    repo: str | None = None
    """Repository on the Hub, ``user/name``, that the snippets name."""
    datasets: tuple[str, ...] = ()
    """Ids of data sets on the Hub that the weights were trained on."""

    def mark(self) -> str:
        """The comment that :meth:`of` reads back."""
        values = {"repo": self.repo, "datasets": list(self.datasets)}
        return f"<!-- dinokit card {json.dumps({key: value for key, value in values.items() if value})} -->"

    @classmethod
    def of(cls, card: str) -> CardSettings | None:
        """The settings in a card; None if dinokit did not write all of it."""
        found = _MARK.search(card)
        try:
            values = json.loads(found[1]) if found else None
        except ValueError:
            return None
        if not isinstance(values, dict):
            return None
        repo, datasets = values.get("repo"), values.get("datasets", [])
        if not isinstance(repo, str | None) or not isinstance(datasets, list):
            return None
        return cls(repo, tuple(str(name) for name in datasets))


@dataclass(frozen=True)
class CardFacts:
    """Facts about a model folder, checked as far as the card relies on them."""

    config: BackboneConfig
    weights_sha256: str
    params: int
    """Numbers in ``timm.safetensors``."""
    stored_as: str
    """``float32`` or ``float16``."""
    weights_bytes: int
    files: frozenset[str]
    """Paths in the folder, with forward slashes."""
    model_type: str | None
    """transformers' name of the architecture in config.json, if any."""
    record: Mapping[str, Any] | None = None
    """How these weights were trained (``training.json``)."""
    measured: Sequence[Mapping[str, Any]] = ()
    """Scores of these weights, by set (``evaluation.json``)."""
    report: Mapping[str, Any] | None = None
    """``export_report.json`` of these weights."""
    figures: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Figures made with these weights, by kind: ``attention``, ``neighbours``."""
    settings: CardSettings = CardSettings()

    @property
    def repo(self) -> str:
        """Repository name in the snippets."""
        if self.settings.repo or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", self.config.name, re.ASCII):
            return self.settings.repo or self.config.name
        return f"user/{re.sub(r'[^A-Za-z0-9._-]+', '-', self.config.name).strip('-.') or 'model'}"

    @property
    def method(self) -> str | None:
        """The self-supervised method, if known: from dinokit's record, or DINO for published names."""
        if self.record is not None:
            return method_of(self.record["runs"][-1]["recipe"])
        name, source = self.config.name, self.config.source
        if name in ZOO or _PUBLISHED.fullmatch(name) or "dinokit train" in source:
            return "DINO"
        # A local folder may have any name, such as dinosaurs.
        on_hub = source if HUB_MODELS.fullmatch(source) else ""
        return "DINO" if re.search(r"dino(?!kit)", f"{on_hub} {self.config.timm_architecture}") else None

    @property
    def at_own_size(self) -> bool:
        """Whether the crop has the size that the position embedding was made for.

        At other sizes it is resized, for which timm and transformers have their own rules.
        """
        vit = self.config.architecture
        if not isinstance(vit, VitArchitecture) or vit.position == "rope":
            return True
        return tuple(vit.image_size) == tuple(self.config.image_size)

    @property
    def for_timm(self) -> bool:
        """Whether timm gives the same numbers for this folder."""
        prepare = self.config.preprocessing
        # For other channels, the card's own code prepares the pixels instead of timm's transforms.
        same_pixels = prepare.timm_agrees or not is_photographic(prepare.channels)
        return bool(self.config.timm_architecture) and self.at_own_size and same_pixels

    @property
    def for_transformers(self) -> bool:
        """Whether transformers gives the same numbers."""
        return TRANSFORMERS_FILE in self.files and self.model_type is not None and self.at_own_size

    @property
    def for_onnxruntime(self) -> bool:
        """Whether there is a graph for plain ONNX Runtime."""
        return ONNX_FILE in self.files

    @property
    def for_transformers_js(self) -> bool:
        """Whether Transformers.js knows the architecture, finds a graph and can read the pictures."""
        reads = is_photographic(self.config.preprocessing.channels)
        return self.for_onnxruntime and self.model_type in _JS_TYPES and reads


# Architectures whose output Transformers.js returns unchanged.
_JS_TYPES = {"dinov2", "dinov2_with_registers", "dinov3_vit", "vit"}


def read_facts(
    folder: ModelFolder, *, report: Mapping[str, Any] | None = None, settings: CardSettings | None = None
) -> CardFacts:
    """Reads the facts for the card of a folder.

    Args:
        folder: read and checked.
        report: the content of ``export_report.json``, if that is not written yet.
        settings: about the card itself.

    Files that are unreadable or belong to other weights are ignored.
    """
    path, sha256 = folder.path, folder.weights_sha256
    shapes = safetensors_shapes(path / TIMM_FILE)
    params = sum(math.prod(shape) for shape in shapes.values())
    size = (path / TIMM_FILE).stat().st_size
    report = _whole(_of_weights(report if report is not None else _json(path / REPORT_FILE), sha256))
    model_type = (_json(path / CONFIG_FILE) or {}).get("model_type")
    return CardFacts(
        config=folder.config,
        weights_sha256=sha256,
        params=params,
        stored_as="float16" if size < 3 * params else "float32",
        weights_bytes=size,
        files=frozenset(
            item.relative_to(path).as_posix()
            for item in path.rglob("*")
            if item.is_file() or item.is_symlink()
        ),
        model_type=model_type if isinstance(model_type, str) else None,
        record=read_record(path, sha256),
        measured=read_measured(path, sha256),
        report=report,
        figures=read_figures(path, sha256),
        settings=settings or CardSettings(),
    )


def read_figures(path: Path, sha256: str) -> dict[str, Mapping[str, Any]]:
    """The figures in a folder that were made with these weights, by kind, as listed in figures.json."""
    listed = _json(path / FIGURES_FILE) or {}
    return {
        kind: entry
        for kind, entry in listed.items()
        if isinstance(entry, dict)
        and _of_weights(entry, sha256)
        and (path / str(entry.get("file"))).is_file()
    }


def _of_weights(values: Mapping[str, Any] | None, sha256: str) -> Mapping[str, Any] | None:
    return values if values is not None and values.get("weights_sha256") == sha256 else None


def _whole(report: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The report, if it is complete enough for a section; else None."""
    try:
        if report is not None:
            onnx_section(report)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None
    return report


def _json(file: Path) -> dict[str, Any] | None:
    try:
        values = read_json(file)
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None
