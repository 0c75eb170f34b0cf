"""Exports any model that dinokit can load to a model folder with ONNX files, each verified against torch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.card import card_is_ours, carry_over, mark_as_edited, read_record, write_card
from dinokit.errors import ModelError, UsageError
from dinokit.export.graphs.mean_embedding import subtract_mean
from dinokit.export.graphs.own_size import with_own_size
from dinokit.export.origin import with_origin
from dinokit.export.traced import check_variants, network_graph
from dinokit.export.variants import Variant, differences_in_folder, plan_variants
from dinokit.export.verification.proof import (
    check_int8,
    checked_image_size,
    collect_truth,
    open_photographs,
    write_and_prove,
)
from dinokit.export.verification.report import ExportReport
from dinokit.files.checksums import sha256_of
from dinokit.files.json_files import read_json
from dinokit.files.outputs import atomic_folder
from dinokit.loading.load import load_backbone
from dinokit.loading.locate import Located, locate
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import METADATA_KEY, contract_of
from dinokit.model_folder.folder import (
    CARD_FILE,
    CONFIG_FILE,
    ModelFolder,
    is_model_folder,
    read_model_folder,
    write_model_folder,
)
from dinokit.vit_graph.storage import LARGEST_FILE

__all__ = ["REPORT_FILE", "export_folder", "proven_earlier"]

REPORT_FILE = "export_report.json"
_REBUILT = {"timm.safetensors", "model.safetensors", "onnx", REPORT_FILE}
_ONNX_NAME = re.compile(r"onnx/\w+\.onnx")


def export_folder(
    source: str | Path,
    output: str | Path,
    *,
    precision: str | Sequence[str] | None = None,
    target: str | Sequence[str] = "portable",
    image_size: int | tuple[int, int] | None = None,
    external_data: bool = False,
    photos: str | Path | Sequence[str | Path] | None = None,
    labelled: str | Path | None = None,
    allow_loss: bool = False,
    revision: str | None = None,
    overwrite: bool = False,
    name: str | None = None,
    trained_by: str | None = None,
    licence: str | None = None,
    weights_dtype: str | None = None,
    center: str | Path | Sequence[str | Path] | None = None,
    own_size: int | tuple[int, int] | None = None,
    onnx: bool = True,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a model folder with ONNX files, after comparing each with torch on photographs.

    The folder is built beside ``output`` and replaces it at the end; if anything fails, ``output`` is unchanged. ONNX
    files from an earlier export of the same weights stay unless they are exported again; they get the folder's new name
    and licence.

    Args:
        source: a run folder (then its ``model/``), a model folder, a known name, a Hub id, or a file of weights:
            anything :func:`dinokit.load_backbone` takes, except a lone ONNX file.
        output: the folder to write; may be ``source``. Files in an existing model folder that are not part of the model
            are kept, such as a README.md that was edited by hand.
        precision: any of ``fp32``, ``fp16`` and ``int8``, as a sequence or comma-separated; None: ``fp32``, and
            ``fp16`` for ``ort-cuda``, which has no ``int8``.
        target: any of ``portable`` (pixels in, all outputs), ``ort-cuda`` (the same with ONNX Runtime's own operators
            for CUDA: :mod:`dinokit.export.graphs.fused`) and ``embedder`` (uint8 crops in, embedding out).
        image_size: also write graphs for this one size, pixels or (height, width).
        external_data: store the weights in a second file beside each graph, ``….onnx_data``; always done from 2 GiB.
        photos: files, folders or patterns of photographs to compare on: at most eight, and eight more to calibrate
            int8, evenly over all; default: those bundled with dinokit, or synthetic pictures if the model does not take
            1 or 3 channels.
        labelled: one subfolder per class, or a CSV; the pictures' k-NN labels are compared too.
        allow_loss: keep files whose accuracy is below the gate (:data:`dinokit.export.verification.report.GATES`).
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace a model folder at ``output`` that holds other weights.
        name: name of the model in the folder; None: the name in ``output`` if it holds the same weights, else the
            source's; for a run, the name of its folder.
        trained_by: one line on how the weights were made, for `dinokit info` and the card; None: as for ``name``, else
            what the source records, including the runs it started from.
        licence: licence of the weights, by its identifier on the Hub (``apache-2.0``, ``cc-by-4.0``); None: as for
            ``name``.
        weights_dtype: type of the stored weights, ``float32`` or ``float16`` (computation is in float32); None:
            unchanged.
        center: pictures whose mean embedding is subtracted from all embeddings, inside the weights
            (:mod:`dinokit.export.graphs.mean_embedding`); best the training pictures. Vision Transformers only.
        own_size: default input size of the model in dinokit, timm and transformers, pixels or (height, width)
            (:mod:`dinokit.export.graphs.own_size`). Vision Transformers only. None: unchanged.
        onnx: False writes no ONNX files; dinokit then builds the graph when it loads the model. This needs no torch and
            allows none of the arguments about ONNX files.
        progress: called with a short description of each step.

    Returns:
        The report, which is also saved in the folder as ``export_report.json``.

    Raises:
        ModelError: ``source`` cannot be read or written as ONNX.
        ExportError: a file is below its gate (a subclass of ModelError).
        UsageError: an argument is invalid, or ``output`` is another model's folder or not a model folder.
        MissingExtraError: torch or timm is not installed.
    """
    if not onnx and (precision or image_size or external_data or photos or labelled or target != "portable"):
        raise UsageError(
            "a folder without ONNX files has no precision, target, image size or comparison; leave these out, or "
            "leave out --no-onnx (onnx=False)"
        )
    if weights_dtype not in (None, "float32", "float16"):
        raise UsageError(f"weights dtype {weights_dtype!r} is not known; expected float32 or float16")
    if center is not None and not isinstance(center, str | Path) and not center:
        raise UsageError(f"center={center!r} does not name any pictures; name some, or leave it out")
    if onnx:
        import dinokit.runtime.torch  # noqa: F401 - MissingExtraError here, before anything is done

    say = progress or (lambda step: None)
    say("reading the model")
    located = locate(source, revision=revision)
    if located.load_weights is None:
        raise UsageError(
            f"{source} is an ONNX file, which is what an export writes; name the model folder, run or weights it "
            "comes from"
        )
    output = Path(output).resolve()
    _check_output(output)
    remark = ""
    if own_size is not None:
        located, remark = with_own_size(located, own_size)
    size = checked_image_size(image_size, located.config)
    variants = plan_variants(precision, target, size) if onnx else ()
    check_variants(variants, located.config)
    if center is not None:
        backbone = load_backbone(source, revision=revision, image_size=own_size)
        located, centred = subtract_mean(
            located, backbone, [center] if isinstance(center, str | Path) else center, say
        )
        remark += centred
    channels = located.config.preprocessing.channels
    photographs = open_photographs(photos, channels) if onnx else None

    with _built_beside(output) as work:
        written = _write_model(
            work,
            located,
            output,
            name=name,
            trained_by=trained_by,
            licence=licence,
            dtype=weights_dtype,
            remark=remark,
        )
        _check_same_model(output, written, source, overwrite=overwrite)
        if photographs is None:
            names = _earlier_photographs(output)
            report = ExportReport(written.config.name, written.weights_sha256, names, ())
            return _write_report(work, _with_others(report, output, work, written))
        from dinokit.runtime.torch import TorchEngine

        weights = written.load_weights()
        say("starting torch")
        reference = TorchEngine(written.config, weights, device="cpu", precision="fp32")
        say("writing the ONNX graph")
        graph, store = network_graph(written.config, weights, reference.module)
        check_int8(variants, graph, photographs)
        truth = collect_truth(reference, written.config, size, photographs, labelled, say)
        (work / "onnx").mkdir(exist_ok=True)
        measured = write_and_prove(
            variants,
            graph,
            written.config,
            written.weights_sha256,
            truth,
            lambda variant: work / variant.file,
            say,
            store=store,
            largest=0 if external_data else LARGEST_FILE,
        )
        report = ExportReport(written.config.name, written.weights_sha256, photographs.names, measured)
        report.check(allow_loss=allow_loss)
        report = _with_others(report, output, work, written)
        _tell_transformers_js(work, report)
        return _write_report(work, report)


# -- existing output


def _check_output(output: Path) -> None:
    """Raises UsageError if the export would destroy an unrelated folder."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_model_folder(output):
        raise UsageError(f"{output} exists and is not a model folder; choose another folder, or an empty one")


def _check_same_model(output: Path, new: ModelFolder, source: str | Path, *, overwrite: bool) -> None:
    """Raises UsageError if the export would replace another model."""
    if overwrite or not is_model_folder(output):
        return
    try:
        there = read_model_folder(output).weights_sha256
    except ModelError:
        there = "damaged"
    if there != new.weights_sha256:
        raise UsageError(
            f"{output} holds other weights than {source} would give (another model's, or another dtype, centring or "
            "default size); choose another folder, or replace it with --overwrite (overwrite=True)"
        )


def proven_earlier(model: ModelFolder, variants: Sequence[Variant], *, allow_loss: bool = False) -> bool:
    """Whether a folder has all these files from an earlier export, unchanged, and none below its gate."""
    entries = {str(entry["file"]): entry for entry in _entries(_earlier_report(model.path))}
    return all(
        (entry := entries.get(variant.file)) is not None
        and (entry.get("passed") is True or allow_loss)
        and _is_still_right(model.path, entry, model)
        and (says := contract_of(model.path / variant.file))["name"] == model.config.name
        and says["licence"] == model.config.licence
        for variant in variants
    )


def _earlier_report(folder: Path) -> dict[str, Any]:
    """``export_report.json``; empty if missing or damaged."""
    try:
        values = read_json(folder / REPORT_FILE)
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _earlier_photographs(output: Path) -> tuple[str, ...]:
    """Names of the photographs on which the kept files were compared."""
    names = _earlier_report(output).get("photographs")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _entries(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The ``variants`` that name an ONNX file in a model folder."""
    listed = report.get("variants")
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("file") if isinstance(entry, dict) else None
        if isinstance(name, str) and _ONNX_NAME.fullmatch(name):
            yield entry


def _with_others(report: ExportReport, output: Path, work: Path, new: ModelFolder) -> ExportReport:
    """The report with the ONNX files of an earlier export: those kept, which are copied, and those dropped."""
    made = {variant.file for variant in report.variants}
    kept = tuple(_keep_others(output, work, new, made))
    there = {f"onnx/{file.name}" for file in output.glob("onnx/*.onnx")}
    return replace(report, kept=kept, dropped=tuple(sorted(there - made - {entry["file"] for entry in kept})))


def _keep_others(output: Path, work: Path, new: ModelFolder, made: set[str]) -> Iterator[dict[str, Any]]:
    """Copies the ONNX files of an earlier export that are still valid; yields their entries in its report."""
    for entry in _entries(_earlier_report(output)):
        name = str(entry["file"])
        if name in made or not _is_still_right(output, entry, new):
            continue
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copy2(output / name, work / name)
        if data := _data_of(entry):
            shutil.copy2(output / data[0], work / data[0])
        before = (work / name).stat().st_size
        if _rename(work / name, new.config):
            grown = (work / name).stat().st_size - before
            size = entry.get("bytes")  # includes the second file
            entry = {
                **entry,
                "sha256": sha256_of(work / name),
                "bytes": size + grown if type(size) is int else size,
            }
        yield entry


def _is_still_right(folder: Path, entry: Mapping[str, Any], model: ModelFolder) -> bool:
    """Whether a file is unchanged since it was verified, and belongs to these weights."""
    name, data = str(entry["file"]), _data_of(entry)
    if not _is_the_same(folder / name, entry.get("sha256")):
        return False
    if data and not _is_the_same(folder / data[0], data[1]):
        return False
    try:
        return not differences_in_folder(folder / name, contract_of(folder / name), model)
    except ModelError:  # it has no readable metadata
        return False


def _rename(file: Path, config: BackboneConfig) -> bool:
    """Writes the folder's name and licence into a file with different ones; returns whether it changed.

    Only the metadata change: graph and weights stay as verified.
    """
    says = contract_of(file)
    told = {"name": config.name, "licence": config.licence}
    if told.items() <= says.items():
        return False
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps(says | told)
    file.write_bytes(model.SerializeToString())
    return True


def _data_of(entry: Mapping[str, Any]) -> tuple[str, Any] | None:
    """Name and checksum of the weight file that an earlier export wrote beside this one."""
    data = entry.get("data")
    if not isinstance(data, dict):
        return None
    name = f"{entry['file']}_data"
    return (name, data.get("sha256")) if data.get("file") == name else (name, None)


def _is_the_same(file: Path, sha256: Any) -> bool:
    return file.is_file() and sha256_of(file) == sha256


@contextmanager
def _built_beside(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that replaces it if the block succeeds and is removed if it fails.

    It starts with a copy of an existing ``output`` without the weights and the files made from them.
    """
    with atomic_folder(output) as work:
        if output.exists():
            shutil.copytree(
                output, work, symlinks=True, ignore=lambda at, _: _REBUILT if Path(at) == output else set()
            )
        yield work


# -- what is written


def _write_model(
    work: Path,
    located: Located,
    output: Path,
    *,
    name: str | None,
    trained_by: str | None,
    licence: str | None,
    dtype: str | None,
    remark: str,
) -> ModelFolder:
    """Writes the model folder's own files, for ``output``; ``remark``: what was done to the weights, if anything."""
    assert located.load_weights is not None  # export_folder has looked
    origin = _folder_of(located)
    record = read_record(origin, located.weights_sha256) if origin else None
    card = origin / CARD_FILE if origin else None
    # A card that was edited by hand is kept: the output's, else the source's.
    edited = (work.exists() and not card_is_ours(work)) or (origin and not card_is_ours(origin))
    stored = _stored_dtype(located.weights_path)
    weights, dtype_here = located.load_weights(), dtype or stored
    is_source = origin is not None and origin.resolve() == output
    there = None if is_source else _same_weights(output, weights, dtype_here)
    if there is not None:  # set by an earlier export of this model, so that the options need not be repeated
        name = there.name if name is None else name
        licence = there.licence if licence is None else licence
        if trained_by is None:
            trained_by = there.source.removesuffix(remark) or None
    config = with_origin(located.config, record, name=name, trained_by=trained_by, licence=licence)
    folder = write_model_folder(
        work,
        replace(config, source=config.source + remark),
        weights,
        card=_text_of(card) if card and card.is_file() else None,
        # Weights that were only centred or stored in another dtype have the same training record.
        record=record if remark or dtype not in (None, stored) else None,
        dtype=dtype_here,
    )
    carry_over(origin, folder.path)
    if edited:
        mark_as_edited(folder.path)
    return folder


def _same_weights(output: Path, weights: Mapping[str, NDArray[Any]], dtype: str) -> BackboneConfig | None:
    """The config of the model folder at ``output`` if it holds exactly these weights."""
    try:
        there = read_model_folder(output)
        stored = there.load_weights()
    except (ModelError, OSError):  # missing or damaged
        return None
    with np.errstate(over="ignore"):  # overflow of float16 is reported when the weights are written
        same = stored.keys() == weights.keys() and all(
            np.array_equal(stored[name], values.astype(dtype)) for name, values in weights.items()
        )
    return there.config if same else None


def _text_of(card: Path) -> str:
    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{card} is not valid UTF-8 ({error.reason}), which the Hub requires; save it as UTF-8"
        ) from error


def _folder_of(located: Located) -> Path | None:
    """The model folder of a source, if it is one."""
    path = located.weights_path
    return path.parent if path and path.name == "timm.safetensors" and is_model_folder(path.parent) else None


def _stored_dtype(file: Path | None) -> str:
    if file is None or file.suffix != ".safetensors":
        return "float32"
    from safetensors import safe_open

    with safe_open(file, framework="numpy") as tensors:
        kinds = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}  # noqa: SIM118
    return "float16" if kinds == {"F16"} else "float32"


def _tell_transformers_js(work: Path, report: ExportReport) -> None:
    """Transformers.js fetches a weight file only for the graphs named in config.json."""
    entries = report.to_json()["variants"]
    split = {Path(entry["file"]).name: True for entry in entries if entry.get("data")}
    if split:
        file = work / CONFIG_FILE
        values = read_json(file)
        values["transformers.js_config"] = {"use_external_data_format": split}
        file.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write_report(folder: Path, report: ExportReport) -> ExportReport:
    """Writes export_report.json, and the card unless it was edited by hand."""
    report = replace(report, card="written" if card_is_ours(folder) else "kept")
    values = report.to_json()
    told = bool(values["variants"])
    if report.card == "written":
        write_card(folder, report=values if told else None)
    if not told:
        return report
    text = json.dumps(values, indent=2, ensure_ascii=False)
    (folder / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    return report
