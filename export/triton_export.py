"""From any model to Triton's model repository: the files of an earlier export, or new ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinokit.export.onnx import export_folder, proven_earlier
from dinokit.export.triton import (
    must_be_a_repository,
    must_have_room,
    must_suit_tensorrt,
    write_triton_repository,
)
from dinokit.export.variants import Variant, plan_variants
from dinokit.export.verification.report import ExportReport
from dinokit.loading.locate import locate
from dinokit.loading.zoo import STARTER, ZOO
from dinokit.model_folder.folder import ModelFolder, find_model_folder, is_model_folder, read_model_folder

__all__ = ["TritonExport", "export_to_triton"]


@dataclass(frozen=True)
class TritonExport:
    """What :func:`export_to_triton` wrote."""

    models: tuple[Path, ...]
    """The models' folders in the repository."""
    files: tuple[str, ...]
    """The ONNX files they were made from."""
    report: ExportReport | None
    """The report of the export; None if no file was exported again."""
    reused: Path | None
    """The model folder whose files were used as they are; None if they were exported."""


def export_to_triton(
    source: str,
    output: Path | None,
    repository: Path,
    *,
    max_batch_size: int = 64,
    tensorrt: bool = False,
    precision: str | Sequence[str] | None = None,
    target: str | Sequence[str] = "embedder",
    image_size: int | tuple[int, int] | None = None,
    allow_loss: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    progress: Callable[[str], None] | None = None,
    **changes: Any,
) -> TritonExport:
    """Exports a model and writes one Triton model for each ONNX file.

    Files of an earlier export are used as they are if ``source`` is a model folder that has them all, each proven,
    and nothing else is asked for. The repository is checked first, since an export takes minutes.

    Args:
        source: as for :func:`dinokit.export.export_folder`.
        output: the model folder to write; None: it is temporary.
        repository: as for :func:`dinokit.export.write_triton_repository`.
        max_batch_size: likewise.
        tensorrt: likewise.
        precision: this and all the others as for :func:`dinokit.export.export_folder`.
        target: likewise.
        image_size: likewise.
        allow_loss: likewise.
        revision: likewise.
        overwrite: likewise.
        name: likewise.
        progress: likewise.
        **changes: the other arguments of :func:`dinokit.export.export_folder`.

    Raises:
        DinokitError: as these two functions.
    """
    must_be_a_repository(repository)
    planned = plan_variants(
        precision, target, (image_size, image_size) if isinstance(image_size, int) else image_size
    )
    for variant in planned if tensorrt else ():
        must_suit_tensorrt(variant)
    files = tuple(variant.file for variant in planned)
    must_have_room(repository, name or _future_name(source, revision, output), files)

    def write(folder: Path) -> tuple[Path, ...]:
        return write_triton_repository(
            folder, repository, files, max_batch_size=max_batch_size, tensorrt=tensorrt
        )

    if output is None and not (revision or name or any(changes.values())):
        there = _with_proven_files(source, planned, allow_loss=allow_loss)
        if there is not None:
            return TritonExport(write(there), files, report=None, reused=there)
    with tempfile.TemporaryDirectory(prefix="dinokit-") as elsewhere:
        folder = output or Path(elsewhere) / "model"
        report = export_folder(
            source,
            folder,
            precision=precision,
            target=target,
            image_size=image_size,
            allow_loss=allow_loss,
            revision=revision,
            overwrite=overwrite,
            name=name,
            progress=progress,
            **changes,
        )
        if progress:
            progress("writing Triton's models")
        return TritonExport(write(folder), files, report, reused=None)


def _with_proven_files(source: str, planned: Sequence[Variant], *, allow_loss: bool) -> Path | None:
    """The model folder that ``source`` names, or that a run has, if an earlier export left all these files there."""
    if source == STARTER or source in ZOO:
        return None
    found = find_model_folder(Path(source).expanduser())
    if found is None:
        return None
    model: ModelFolder = read_model_folder(found)
    return model.path if proven_earlier(model, planned, allow_loss=allow_loss) else None


def _future_name(source: str, revision: str | None, output: Path | None) -> str:
    """The name the export will give the model: the one in ``output`` if it holds the same weights, else its own."""
    found = locate(source, revision=revision)
    if output is not None and is_model_folder(output):
        there = read_model_folder(output)
        if there.weights_sha256 == found.weights_sha256:
            return there.config.name
    return found.config.name
