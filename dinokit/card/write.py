"""Writing cards: dinokit replaces what it wrote itself and keeps what a person changed.

``config.json`` records the card's checksum; a README.md with a different one was edited by hand. A card supplied as
text (`write_model_folder(card=…)`) is kept too, except for its section about ONNX files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from dinokit.card.facts import FIGURES_FILE, CardSettings, read_facts, read_figures
from dinokit.card.measured import MEASURED_FILE, add_measured, read_measured
from dinokit.card.onnx_section import BEGIN, END, marked_section
from dinokit.card.record import read_record
from dinokit.card.text import render_card
from dinokit.files.json_files import read_json
from dinokit.files.outputs import atomic
from dinokit.model_folder.folder import CARD_FILE, CONFIG_FILE, RECORD_FILE, ModelFolder, read_model_folder

__all__ = [
    "Outcome",
    "card_is_ours",
    "carry_over",
    "drop_stale",
    "first_card",
    "keep_measured",
    "keep_record",
    "mark_as_edited",
    "replace_file",
    "why_kept",
    "write_card",
    "write_card_elsewhere",
]

Outcome = Literal["written", "section", "kept"]
"""What was done with a card. ``section``: only its section about ONNX files was written, since the card was supplied as
text. ``kept``: it was edited by hand, and nothing was changed."""

# Identifies the short card of early versions of dinokit, which is rewritten.
_SHORT_CARD = 'load_backbone("path/or/hub-id")  # of this folder'


def write_card(
    folder: str | Path,
    *,
    report: Mapping[str, Any] | None = None,
    settings: CardSettings | None = None,
    overwrite: bool = False,
) -> Outcome:
    """Writes the README.md of a model folder from the files in it; one edited by hand is kept.

    Args:
        folder: the model folder.
        report: the content of ``export_report.json``, if that is not written yet.
        settings: settings of the card; by default those in the existing card.
        overwrite: also replace a card that was edited by hand.

    Raises:
        ModelError: the folder is incomplete.
    """
    path = Path(folder)
    text = _read(path)
    ours = card_is_ours(path)
    if not ours and not overwrite:
        return "kept"
    drop_stale(path)
    facts = read_facts(read_model_folder(path), report=report, settings=settings or CardSettings.of(text))
    if text and not overwrite and CardSettings.of(text) is None and _SHORT_CARD not in text:
        _put(path, _with_section(text, facts.report))
        return "section"
    _put(path, render_card(facts))
    return "written"


def write_card_elsewhere(
    model: ModelFolder, target: Path, *, settings: CardSettings | None = None, overwrite: bool = False
) -> Outcome:
    """Writes the card of ``model`` to another folder, with the figures there.

    Returns:
        ``written``, or ``kept``: a README.md exists and ``overwrite`` was not given.
    """
    if (target / CARD_FILE).exists() and not overwrite:
        return "kept"
    facts = read_facts(model, settings=settings)
    target.mkdir(parents=True, exist_ok=True)
    replace_file(
        target / CARD_FILE, render_card(replace(facts, figures=read_figures(target, model.weights_sha256)))
    )
    return "written"


def keep_measured(model: ModelFolder, scores: str | Path) -> None:
    """Adds the output of `dinokit eval --json` to ``evaluation.json`` (:func:`dinokit.card.measured.add_measured`)."""
    values = add_measured(model, scores)
    replace_file(model.path / MEASURED_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def keep_record(model: ModelFolder, record: Mapping[str, Any]) -> None:
    """Writes ``training.json``: how the weights of ``model`` were trained."""
    values = {**record, "weights_sha256": model.weights_sha256}
    replace_file(model.path / RECORD_FILE, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def first_card(folder: ModelFolder, earlier: Path) -> None:
    """Writes the card of a new folder, unless an edited one was carried over from ``earlier``."""
    drop_stale(folder.path)
    if (folder.path / CARD_FILE).exists():
        mark_as_edited(folder.path)
        return
    settings = CardSettings.of(_read(earlier)) if card_is_ours(earlier) else None
    _put(folder.path, render_card(read_facts(folder, settings=settings)))


def carry_over(origin: Path | None, folder: Path) -> None:
    """Copies training record, evaluation and figures from a model folder of the same weights.

    Those in ``folder`` that belong to other weights are removed.
    """
    drop_stale(folder)
    if origin is None or origin.resolve() == folder.resolve() or not (folder / CONFIG_FILE).is_file():
        return
    sha256 = read_model_folder(folder).weights_sha256
    if read_record(origin, sha256) is not None:
        shutil.copyfile(origin / RECORD_FILE, folder / RECORD_FILE)
    if read_measured(origin, sha256):
        shutil.copyfile(origin / MEASURED_FILE, folder / MEASURED_FILE)
    listed = {} if (folder / FIGURES_FILE).exists() else _figures(origin)
    if listed and all(entry.get("weights_sha256") == sha256 for entry in listed.values()):
        for name in (FIGURES_FILE, *(str(entry["file"]) for entry in listed.values())):
            if (origin / name).is_file():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(origin / name, folder / name)


def drop_stale(folder: Path) -> None:
    """Removes record, evaluation and figures of other weights; figures only if the card that shows them is ours."""
    weights_of = {name: _weights_of(folder / name) for name in (RECORD_FILE, MEASURED_FILE)}
    if not any(weights_of.values()) and not (folder / FIGURES_FILE).is_file():
        return
    sha256 = read_model_folder(folder).weights_sha256
    for name, weights in weights_of.items():
        if weights is not None and weights != sha256:
            (folder / name).unlink()
    listed = _figures(folder)
    fresh = {kind: entry for kind, entry in listed.items() if entry.get("weights_sha256") == sha256}
    if len(fresh) == len(listed) or not card_is_ours(folder):
        return
    for kind in set(listed) - set(fresh):
        (folder / str(listed[kind]["file"])).unlink(missing_ok=True)
    if fresh:
        replace_file(folder / FIGURES_FILE, json.dumps(fresh, indent=2, ensure_ascii=False) + "\n")
        return
    (folder / FIGURES_FILE).unlink()
    with contextlib.suppress(OSError):  # it contains files of the user
        (folder / FIGURES_FILE).parent.rmdir()


def _weights_of(file: Path) -> str | None:
    try:
        return str(read_json(file)["weights_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- who wrote the card


def card_is_ours(folder: Path) -> bool:
    """Whether README.md is missing, or unchanged since dinokit wrote it."""
    card = folder / CARD_FILE
    if not card.is_file():
        return True
    return _recorded(folder) == hashlib.sha256(card.read_bytes()).hexdigest()


def why_kept(folder: Path) -> str:
    """Why README.md is kept, as the words between "README.md" and "and is kept".

    The card of the bundled model was written by hand, so a copy of it is kept though nobody edited it.
    """
    from dinokit.loading.locate import starter_path

    cards = [path / CARD_FILE for path in (folder, starter_path())]
    same = all(card.is_file() for card in cards) and cards[0].read_bytes() == cards[1].read_bytes()
    return "is its authors' own text" if same else "was edited by hand"


def mark_as_edited(folder: Path) -> None:
    """Records in ``folder`` that its card, copied from elsewhere, was edited by hand."""
    _record(folder, "")


def _recorded(folder: Path) -> str | None:
    try:
        value = read_json(folder / CONFIG_FILE)["dinokit"]["card_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def _record(folder: Path, sha256: str) -> None:
    file = folder / CONFIG_FILE
    values = read_json(file)
    values["dinokit"]["card_sha256"] = sha256
    replace_file(file, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


# -- files


def _read(folder: Path) -> str:
    try:
        return (folder / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def _put(folder: Path, text: str) -> None:
    replace_file(folder / CARD_FILE, text)
    _record(folder, hashlib.sha256(text.encode()).hexdigest())


def replace_file(file: Path, text: str) -> None:
    """Writes a file atomically, with \\n line ends on every system."""
    with atomic(file) as temporary:
        temporary.write_bytes(text.encode())


def _with_section(text: str, report: Mapping[str, Any] | None) -> str:
    """The card with its section about ONNX files replaced, or appended if it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    has_section = bool(begin and end)
    if report is None:
        return f"{before.rstrip()}\n\n{after.lstrip()}".rstrip() + "\n" if has_section else text
    if not has_section:
        before, after = f"{text.rstrip()}\n\n", "\n"
    return f"{before}{marked_section(report)}{after}"


def _figures(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        values = read_json(folder / FIGURES_FILE)
    except (OSError, ValueError):
        return {}
    entries = values.items() if isinstance(values, dict) else ()
    return {
        kind: entry
        for kind, entry in entries
        if isinstance(entry, dict) and str(entry.get("file")) == f"figures/{kind}.png"
    }
