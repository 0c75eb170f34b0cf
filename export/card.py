"""The section of a model card that says which ONNX files there are, how true and how fast.

Only a card that dinokit wrote gets it. Whether a person has edited one since, ``config.json`` tells: it keeps the
card's checksum.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dinokit.model_folder import CARD_FILE, CONFIG_FILE

__all__ = ["card_is_ours", "card_section", "mark_as_edited", "write_section"]

_BEGIN, _END = "<!-- dinokit export -->", "<!-- /dinokit export -->"


def card_is_ours(folder: Path) -> bool:
    """Whether README.md is as dinokit wrote it, or not there."""
    card = folder / CARD_FILE
    if not card.is_file():
        return True
    return _recorded(folder) == hashlib.sha256(card.read_bytes()).hexdigest()


def mark_as_edited(folder: Path) -> None:
    """Makes ``folder`` remember that its card, copied from elsewhere, is a person's."""
    _record(folder, "")


def write_section(folder: Path, report: Mapping[str, Any]) -> None:
    """Puts the section into README.md, in the place of the one of an earlier export, else at the end.

    Args:
        folder: whose card is dinokit's own.
        report: the content of export_report.json.
    """
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        before, after = f"{text.rstrip()}\n\n", "\n"
    card = f"{before}{_BEGIN}\n{card_section(report)}{_END}{after}".encode()
    (folder / CARD_FILE).write_bytes(card)
    _record(folder, hashlib.sha256(card).hexdigest())


def card_section(report: Mapping[str, Any]) -> str:
    """Markdown of the section.

    Args:
        report: the content of export_report.json.
    """
    rows = [
        "| file | size | largest difference | cosine: mean, 1st percentile, least | same k-NN label | images/s |",
        "|---|---|---|---|---|---|",
    ]
    rows += [_row(variant) for variant in report["variants"]]
    conditions = sorted({v["speed_of"] for v in report["variants"] if v["speed_of"]})
    speed = f" Images/s: {'; '.join(conditions)}." if conditions else ""
    sets = {
        f"{v['labels']['pictures']} pictures of {v['labels']['classes']} classes, k = {v['labels']['k']}"
        for v in report["variants"]
        if v["labels"]
    }
    labels = f" Same k-NN label as by torch's embeddings: {'; '.join(sorted(sets))}." if sets else ""
    lossy = [v["file"] for v in report["variants"] if not v["passed"]]
    warning = f" **Kept although below its gate: {', '.join(lossy)}.**" if lossy else ""
    return "\n".join(
        [
            "## ONNX files",
            "",
            *rows,
            "",
            f"Compared with torch in float32 on {len(report['photographs'])} photographs, at batch and picture sizes "
            f"that `export_report.json` lists with all numbers.{labels}{speed}{warning}",
            "",
        ]
    )


def _row(variant: Mapping[str, Any]) -> str:
    largest = variant["max_difference"]
    cosine = ", ".join(f"{variant[f'cosine_{part}']:.6f}" for part in ("mean", "p1", "min"))
    rate = variant["images_per_second"]
    cells = [
        f"`{variant['file']}`",
        f"{variant['bytes'] / 1e6:.1f} MB",
        "not finite" if largest is None else f"{largest:.1e}",
        cosine,
        f"{variant['labels']['equal']:.1%}" if variant["labels"] else "–",
        f"{rate:.0f}" if rate and rate >= 10 else f"{rate:.1f}" if rate else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _recorded(folder: Path) -> str | None:
    try:
        value = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["dinokit"]["card_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return value if isinstance(value, str) else None


def _record(folder: Path, sha256: str) -> None:
    file = folder / CONFIG_FILE
    values = json.loads(file.read_text(encoding="utf-8"))
    values["dinokit"]["card_sha256"] = sha256
    file.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())
