"""From a training run or model folder to a model folder with ``onnx/model.onnx``, proven equal to torch."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dinokit.errors import ModelError, UsageError
from dinokit.export.verify import ParityReport, compare_engines
from dinokit.model_folder import (
    ModelFolder,
    contract,
    is_model_folder,
    read_model_folder,
    write_model_folder,
)
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import build_vit_graph

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["ONNX_FILE", "REPORT_FILE", "export_folder"]

ONNX_FILE = "onnx/model.onnx"
REPORT_FILE = "export_report.json"
_MOST_PHOTOGRAPHS = 8  # the largest batch that is compared
_REBUILT = {"timm.safetensors", "model.safetensors", "onnx", REPORT_FILE}


def export_folder(
    source: str | Path,
    output: str | Path,
    *,
    photos: str | Path | Sequence[str | Path] | None = None,
    force: bool = False,
    progress: Callable[[str], None] | None = None,
) -> ParityReport:
    """Writes a model folder with ONNX, after torch and ONNX Runtime gave the same numbers on photographs.

    The folder is built beside ``output`` and takes its place at the end; when anything fails, ``output`` is as
    it was before.

    Args:
        source: a model folder, or a run folder (then its ``model/``).
        output: the folder to write; may be ``source``. In an existing model folder, the files that are not the
            model's (a README.md that a person has edited, for instance) are kept.
        photos: files, folders or patterns of photographs to compare on; by default a few that come with dinokit.
        force: replace a model folder at ``output`` that holds other weights.
        progress: told what is being done, in a few words, at each step.

    Returns:
        The report, which also stands in the folder as ``export_report.json``.

    Raises:
        ModelError: ``source`` is no whole model folder or cannot be written as ONNX; ExportError, its subclass:
            the two engines differ by more than ``verify.TOLERANCE``.
        UsageError: ``output`` is another model's folder or no model folder at all.
        MissingExtraError: torch or timm is not installed.
    """
    from dinokit.runtime.torch import TorchEngine  # MissingExtraError here, before anything is done

    say = progress or (lambda step: None)
    say("reading the model")
    folder = read_model_folder(_model_folder_of(Path(source)))
    output = Path(output).resolve()
    _check_output(output, folder, force=force)
    names, photographs = _open_photographs(photos)

    with _built_beside(output) as work:
        weights = folder.load_weights()
        written = _write_model(work, folder)
        say("writing the ONNX graph")
        file = _write_onnx(written)
        say("starting both engines")
        comparisons = compare_engines(
            TorchEngine(folder.config, weights, device="cpu", precision="fp32"),
            OnnxEngine(file, device="cpu"),
            photographs,
            folder.config.preprocessing,
            folder.config.patch_size,
            progress=progress,
        )
        report = ParityReport(folder.config.name, written.weights_sha256, ONNX_FILE, names, comparisons)
        report.check()
        text = json.dumps(report.to_json(), indent=2, ensure_ascii=False)
        (work / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report


def _model_folder_of(source: Path) -> Path:
    """``source``, or the model folder in it when it is a run folder."""
    if not source.is_dir():
        raise UsageError(
            f"{source} is not a folder; expected a run folder of `dinokit train` or a model folder"
        )
    if not is_model_folder(source) and (source / "model").is_dir():
        return source / "model"
    return source


def _check_output(output: Path, folder: ModelFolder, *, force: bool) -> None:
    """UsageError where writing would destroy something."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_model_folder(output):
        raise UsageError(f"{output} exists and is not a model folder; choose another place or remove it")
    try:
        there = read_model_folder(output).weights_sha256
    except ModelError:
        there = "damaged"
    if there != folder.weights_sha256 and not force:
        raise UsageError(
            f"{output} holds another model than {folder.path}; "
            "choose another place, or replace it with --force (force=True)"
        )


def _open_photographs(
    photos: str | Path | Sequence[str | Path] | None,
) -> tuple[tuple[str, ...], list[Image.Image]]:
    """Names and pictures, at most as many as the largest batch takes."""
    import dinokit
    from dinokit.images import find_images, open_image

    if photos is None:
        photos = Path(dinokit.__file__).parent / "models" / "photos"
    paths = find_images(photos)[:_MOST_PHOTOGRAPHS]
    return tuple(path.name for path in paths), [open_image(path) for path in paths]


@contextmanager
def _built_beside(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that replaces it when the block ends well and vanishes when it does not.

    It starts with what must survive from an existing ``output``: all but the weights and what is made from them.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    work = output.parent / f".{output.name}.export-{secrets.token_hex(4)}"
    try:
        if output.exists():
            shutil.copytree(
                output, work, symlinks=True, ignore=lambda at, _: _REBUILT if Path(at) == output else set()
            )
        yield work
        _replace(work, output)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace(work: Path, output: Path) -> None:
    # A folder with files cannot be replaced in one step: the old one steps aside, and back if the second fails.
    aside = work.with_name(work.name + ".old")
    if output.exists():
        output.replace(aside)
    try:
        work.replace(output)
    except OSError:
        if aside.exists():
            aside.replace(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _write_model(work: Path, folder: ModelFolder) -> ModelFolder:
    """The model folder's own files, the weights in the precision they are stored in."""
    card = folder.path / "README.md"
    return write_model_folder(
        work,
        folder.config,
        folder.load_weights(),
        card=card.read_text(encoding="utf-8") if card.is_file() else None,
        dtype=_stored_dtype(folder.path / "timm.safetensors"),
    )


def _stored_dtype(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return "float16" if kinds == {"F16"} else "float32"


def _write_onnx(folder: ModelFolder) -> Path:
    """``onnx/model.onnx`` in the folder, checked by onnx itself."""
    import onnx

    metadata = {"dinokit": json.dumps(contract(folder.config, folder.weights_sha256))}
    model = build_vit_graph(folder.config.vit, folder.load_weights(), metadata=metadata)
    onnx.checker.check_model(model, full_check=True)
    file = folder.path / ONNX_FILE
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(model.SerializeToString())
    return file
