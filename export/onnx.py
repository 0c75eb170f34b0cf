"""From any model dinokit can load to a model folder with ONNX files, each proven against torch."""

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
from dinokit.export.variants import Variant, plan_variants
from dinokit.export.verification.proof import (
    check_int8,
    checked_image_size,
    collect_truth,
    open_photographs,
    write_and_prove,
)
from dinokit.export.verification.report import ExportReport
from dinokit.files.checksums import sha256_of
from dinokit.files.outputs import atomic_folder
from dinokit.loading.load import load_backbone
from dinokit.loading.locate import Located, locate
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import METADATA_KEY, contract_of, differences
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
    """Writes a model folder with ONNX files, after each gave the numbers of torch on photographs.

    The folder is built beside ``output`` and takes its place at the end; when anything fails, ``output`` is as
    it was before. ONNX files that an earlier export of the same weights left there stay, unless made anew; they get
    the name and the licence that the folder gets.

    Args:
        source: a run folder (then its ``model/``), a model folder, a known name, a Hub id, or a file of weights:
            whatever :func:`dinokit.load_backbone` takes, but for a lone ONNX file.
        output: the folder to write; may be ``source``. In an existing model folder, the files that are not the
            model's (a README.md that a person has edited, for instance) are kept.
        precision: of ``fp32``, ``fp16`` and ``int8``, in a sequence or with commas between; None: ``fp32``, and
            ``fp16`` for ``ort-cuda``, which has no ``int8``.
        target: of ``portable`` (pixels in, all outputs), ``ort-cuda`` (the same, by ONNX Runtime's own operators for
            CUDA: :mod:`dinokit.export.graphs.fused`) and ``embedder`` (bytes of a crop in, embedding out).
        image_size: makes graphs for this one size, pixels or (height, width), beside those for every size.
        external_data: put the weights into a second file beside each graph, ``….onnx_data``, as is always done from
            2 GiB on.
        photos: files, folders or patterns of photographs to compare on; by default a few that come with dinokit, or for
            other than 1 or 3 channels made up.
        labelled: a folder a class, or a CSV: its pictures' k-NN labels are compared too.
        allow_loss: keep files whose accuracy is below the gate (:data:`dinokit.export.verification.report.GATES`).
        revision: branch, tag or commit of a source on the Hub.
        overwrite: replace a model folder at ``output`` that holds other weights.
        name: what the model is called in the folder; None: as an earlier export of the same weights to ``output`` was
            told, else as it was, a run by the name of its folder.
        trained_by: one line that says how the weights came to be, as `dinokit info` and the card show it; None: as for
            ``name``, else what the source says of itself, and of the runs that it went on from.
        licence: of the weights, as the Hub spells it (``apache-2.0``, ``cc-by-4.0``); None: as for ``name``.
        weights_dtype: ``float32`` or ``float16``, in which the weights are stored (they are computed with in float32);
            None: as they are.
        center: pictures whose mean embedding is taken off all embeddings, inside the weights
            (:mod:`dinokit.export.graphs.mean_embedding`); of a Vision Transformer only. Best
            what the model was trained on.
        own_size: pixels or (height, width) that the folder's model sees unless told otherwise, by dinokit, timm and
            transformers alike (:mod:`dinokit.export.graphs.own_size`); of a Vision Transformer only. None: as it was.
        onnx: False writes no ONNX file: the folder alone, whose graph is made when it is loaded. torch is not needed
            then, and of the other arguments those about ONNX files must be left out.
        progress: told what is being done, in a few words, at each step.

    Returns:
        The report, which also stands in the folder as ``export_report.json``.

    Raises:
        ModelError: ``source`` cannot be read or written as ONNX; ExportError, its subclass: a file is below
            its gate.
        UsageError: an argument that cannot be, or ``output`` is another model's folder or no model folder at
            all.
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
        raise UsageError(f"center={center!r} names no pictures; name some, or leave it out")
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
    names, photographs = open_photographs(photos, channels) if onnx else ((), [])

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
        if not onnx:
            kept = tuple(_keep_others(output, work, written, set()))
            report = ExportReport(
                written.config.name, written.weights_sha256, _earlier_photographs(output), (), kept
            )
            return _write_report(work, report)
        from dinokit.runtime.torch import TorchEngine

        weights = written.load_weights()
        say("starting torch")
        reference = TorchEngine(written.config, weights, device="cpu", precision="fp32")
        say("writing the ONNX graph")
        graph, store = network_graph(written.config, weights, reference.module)
        check_int8(variants, graph, names)
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
        report = ExportReport(written.config.name, written.weights_sha256, names, measured)
        report.check(allow_loss=allow_loss)
        made = {variant.file for variant in variants}
        report = replace(report, kept=tuple(_keep_others(output, work, written, made)))
        _tell_transformers_js(work, report)
        return _write_report(work, report)


# -- what is at the output already


def _check_output(output: Path) -> None:
    """UsageError where a folder of something else would be destroyed."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not is_model_folder(output):
        raise UsageError(
            f"{output} exists and is not a model folder; choose another place, or an empty folder"
        )


def _check_same_model(output: Path, new: ModelFolder, source: str | Path, *, overwrite: bool) -> None:
    """UsageError where another model's folder would be replaced."""
    if overwrite or not is_model_folder(output):
        return
    try:
        there = read_model_folder(output).weights_sha256
    except ModelError:
        there = "damaged"
    if there != new.weights_sha256:
        raise UsageError(
            f"{output} holds other weights than what {source} gives (another model's, or stored, centred or sized in "
            "another way); choose another place, or replace it with --overwrite (overwrite=True)"
        )


def proven_earlier(model: ModelFolder, variants: Sequence[Variant], *, allow_loss: bool = False) -> bool:
    """Whether a folder has all these files as an earlier export of its weights left them, and none below its gate."""
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
    """``export_report.json``; empty where there is none, or a damaged one."""
    try:
        values = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _earlier_photographs(output: Path) -> tuple[str, ...]:
    """On which the files that stay were compared."""
    names = _earlier_report(output).get("photographs")
    return tuple(map(str, names)) if isinstance(names, list) else ()


def _entries(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those of its ``variants`` that name an ONNX file of a model folder."""
    listed = report.get("variants")
    for entry in listed if isinstance(listed, list) else []:
        name = entry.get("file") if isinstance(entry, dict) else None
        if isinstance(name, str) and _ONNX_NAME.fullmatch(name):
            yield entry


def _keep_others(output: Path, work: Path, new: ModelFolder, made: set[str]) -> Iterator[dict[str, Any]]:
    """Copies the ONNX files of an earlier export that are still right; gives their entries in its report."""
    for entry in _entries(_earlier_report(output)):
        name = str(entry["file"])
        if name in made or not _is_still_right(output, entry, new):
            continue
        (work / name).parent.mkdir(exist_ok=True)
        shutil.copy2(output / name, work / name)
        if data := _data_of(entry):
            shutil.copy2(output / data[0], work / data[0])
        before = (work / name).stat().st_size
        if _tell_anew(work / name, new.config):
            grown = (work / name).stat().st_size - before
            size = entry.get("bytes")  # the second file's are in it
            entry = {
                **entry,
                "sha256": sha256_of(work / name),
                "bytes": size + grown if type(size) is int else size,
            }
        yield entry


def _is_still_right(folder: Path, entry: Mapping[str, Any], model: ModelFolder) -> bool:
    """Whether a file is the one that was proven, and of these weights."""
    name, data = str(entry["file"]), _data_of(entry)
    if not _is_the_same(folder / name, entry.get("sha256")):
        return False
    if data and not _is_the_same(folder / data[0], data[1]):
        return False
    try:
        wrong = set(differences(contract_of(folder / name), model.config, model.weights_sha256))
    except ModelError:  # it says nothing of itself that could be read
        return False
    if re.search(r"_\d+x\d+\.onnx$", name):  # one for another size has another preprocessing
        wrong.discard("preprocessing")
    return not wrong


def _tell_anew(file: Path, config: BackboneConfig) -> bool:
    """Writes the folder's name and licence into a file that has others, and says whether it had.

    Only its metadata change: the graph and the weights are those that were proven.
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
    """Name and checksum of the second file that an earlier export wrote for this one."""
    data = entry.get("data")
    if not isinstance(data, dict):
        return None
    name = f"{entry['file']}_data"
    return (name, data.get("sha256")) if data.get("file") == name else (name, None)


def _is_the_same(file: Path, sha256: Any) -> bool:
    return file.is_file() and sha256_of(file) == sha256


@contextmanager
def _built_beside(output: Path) -> Iterator[Path]:
    """A hidden folder beside ``output`` that replaces it when the block ends well and vanishes when it does not.

    It starts with what must survive from an existing ``output``: all but the weights and what is made from them.
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
    """The model folder's own files, which are to stand at ``output``; ``remark`` says what was done to the weights, if
    anything was."""
    assert located.load_weights is not None  # export_folder has looked
    origin = _folder_of(located)
    record = read_record(origin, located.weights_sha256) if origin else None
    card = origin / CARD_FILE if origin else None
    # A card that a person edited stays: the output's own, else the source's.
    edited = (work.exists() and not card_is_ours(work)) or (origin and not card_is_ours(origin))
    stored = _stored_dtype(located.weights_path)
    weights, dtype_here = located.load_weights(), dtype or stored
    is_source = origin is not None and origin.resolve() == output
    there = None if is_source else _same_weights(output, weights, dtype_here)
    if there is not None:  # told in an earlier export of this model, by options that need not be given again
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
        # Weights that are only stored otherwise, or centred, were trained in the same way.
        record=record if remark or dtype not in (None, stored) else None,
        dtype=dtype_here,
    )
    carry_over(origin, folder.path)
    if edited:
        mark_as_edited(folder.path)
    return folder


def _same_weights(output: Path, weights: Mapping[str, NDArray[Any]], dtype: str) -> BackboneConfig | None:
    """What the model folder at ``output`` says of itself, where it holds these very weights."""
    try:
        there = read_model_folder(output)
        stored = there.load_weights()
    except (ModelError, OSError):  # none is there, or a damaged one
        return None
    with np.errstate(over="ignore"):  # what float16 cannot hold is told when it is written
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
    """The model folder that a source is, if it is one."""
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
    """Transformers.js fetches a second file only for those that config.json names."""
    entries = report.to_json()["variants"]
    split = {Path(entry["file"]).name: True for entry in entries if entry.get("data")}
    if split:
        file = work / CONFIG_FILE
        values = json.loads(file.read_text(encoding="utf-8"))
        values["transformers.js_config"] = {"use_external_data_format": split}
        file.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _write_report(folder: Path, report: ExportReport) -> ExportReport:
    """export_report.json, and the section of a card that no person has edited."""
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
