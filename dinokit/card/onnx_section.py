"""The section of a card on its ONNX files: size, accuracy and speed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["BEGIN", "END", "MADE_UP", "compared_on", "marked_section", "onnx_section"]

BEGIN, END = "<!-- dinokit export -->", "<!-- /dinokit export -->"
MADE_UP = "made up"  # prefix of the names of synthetic pictures


def marked_section(report: Mapping[str, Any]) -> str:
    """The section between the comments by which a later export finds it."""
    return f"{BEGIN}\n{onnx_section(report)}{END}"


def onnx_section(report: Mapping[str, Any]) -> str:
    """Markdown of the section.

    Args:
        report: the content of export_report.json.
    """
    rows = [
        "| file | size | largest difference | cosine: mean, 1st percentile, minimum | same k-NN label | images/s |",
        "|---|---|---|---|---|---|",
    ]
    rows += [_row(variant) for variant in report["variants"]]
    conditions = sorted({v["speed_of"] for v in report["variants"] if v["speed_of"]})
    speed = f" Images/s: {'; '.join(conditions)}{_machine(report)}." if conditions else ""
    sets = {
        f"{v['labels']['pictures']} pictures of {v['labels']['classes']} classes, k = {v['labels']['k']}"
        for v in report["variants"]
        if v["labels"]
    }
    labels = f" Same k-NN label as with torch's embeddings: {'; '.join(sorted(sets))}." if sets else ""
    lossy = [v["file"] for v in report["variants"] if not v["passed"]]
    warning = f" **Kept although below the accuracy gate: {', '.join(lossy)}.**" if lossy else ""
    compared = (
        f"Compared with torch in float32 on {compared_on(report['photographs'])}; `export_report.json` lists the batch "
        f"and picture sizes and all results.{labels}{speed}{warning}"
    )
    return "\n".join(["## ONNX files", "", *rows, "", " ".join([compared, *_remarks(report)]), ""])


def compared_on(names: Sequence[str]) -> str:
    """``8 photographs``, or ``8 made-up pictures``: the export makes them for networks of many channels."""
    made_up = any(name.startswith(MADE_UP) for name in names)
    return f"{len(names)} {'made-up pictures' if made_up else 'photographs'}"


def _remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """What the comparison does not show: each remark once, with the files it applies to."""
    by_remark: dict[str, list[str]] = {}
    for variant in report["variants"]:
        if variant.get("remark"):
            by_remark.setdefault(variant["remark"], []).append(f"`{variant['file']}`")
    for remark, files in by_remark.items():
        yield f"{', '.join(files)}: {remark}."
    for variant in report["variants"]:
        if variant.get("unproven"):
            yield f"`{variant['file']}` was **not compared**: {variant['unproven']}."


def _row(variant: Mapping[str, Any]) -> str:
    largest = variant["max_difference"]
    proven = variant["cosine_mean"] is not None
    parts = ("mean", "p1", "min")
    cosine = ", ".join(f"{variant[f'cosine_{part}']:.6f}" for part in parts) if proven else "–"
    rate = variant["images_per_second"]
    cells = [
        f"`{variant['file']}`",
        f"{variant['bytes'] / 1e6:.1f} MB",
        f"{largest:.1e}" if largest is not None else "not finite" if proven else "not compared",
        cosine,
        f"{variant['labels']['equal']:.1%}" if variant["labels"] else "–",
        f"{rate:.0f}" if rate and rate >= 10 else f"{rate:.1f}" if rate else "–",
    ]
    return f"| {' | '.join(cells)} |"


def _machine(report: Mapping[str, Any]) -> str:
    """`` (AMD EPYC 7B13, 2 processors)``, unless the sentences about speed already name it."""
    machine = report.get("machine") or {}
    name = " ".join(str(machine.get("processor") or "").split())
    said = any(name and name in str(variant["speed_of"]) for variant in report["variants"])
    return f" ({name}, {machine.get('cpu_count')} processors)" if name and not said else ""
