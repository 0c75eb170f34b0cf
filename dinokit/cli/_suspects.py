"""`dinokit knn --check`: labels of the reference set that its neighbours contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._label_rows import SUSPECT_TYPES, suspects_as_text
from dinokit.cli._outputs import write_rows
from dinokit.cli._references import References, expectation, in_words, own_references

if TYPE_CHECKING:
    from dinokit.classifiers.knn import KNNClassifier

__all__ = ["check_labels"]


def check_labels(
    classifier: KNNClassifier,
    references: References,
    output: str | None,
    *,
    as_json: bool,
    problems: list[str],
    quiet: bool,
) -> int:
    """Writes or prints the references for which the others say another label."""
    rows = _suspects(classifier, references)
    count = len(references.labels)
    made = {"k": classifier.k, "temperature": classifier.temperature}
    if output is not None:
        lines = [list(SUSPECT_TYPES), *(list(row.values()) for row in rows)]
        write_rows(Path(output), rows, lines, SUSPECT_TYPES, {**references.origin, **made})
    expected = expectation(references, (count - len(rows)) / count)
    if not quiet:
        click.echo(in_words(expected), err=True)
        click.echo(f"{len(rows)} of {count} labels are not what the neighbours say", err=True)
    if as_json:
        summary = {
            "suspects": len(rows),
            **expected,
            **made,
            "output": output,
            "problems": problems,
            "reference_failures": references.failures,
        }
        click.echo(json.dumps(summary if output else {**summary, "rows": rows}))
    elif output is not None:
        click.echo(output)
    elif rows:
        click.echo(suspects_as_text(rows))
    return 1 if problems or references.failures else 0


def _suspects(classifier: KNNClassifier, references: References) -> list[dict[str, Any]]:
    """A row for each reference for which the others say another label, the least probable given label first."""
    import numpy as np

    itself = np.arange(len(references.paths))  # whatever its path
    own = np.column_stack([itself, own_references(references.paths, references)])
    given = classifier.classes_.searchsorted(np.asarray(references.labels))
    judged = classifier.judge(references.embeddings, leave_out=own, given=given)
    assert judged.given_shares is not None
    numbers = np.flatnonzero(judged.winners != given)
    rows = [
        {
            "path": references.paths[number],
            "label": references.labels[number],
            "neighbours_say": str(classifier.classes_[judged.winners[number]]),
            "probability": round(float(judged.shares[number]), 6),
            "given_probability": round(float(judged.given_shares[number]), 6),
            "nearest": references.paths[near],
        }
        for number, near in zip(numbers, judged.neighbours[numbers, 0], strict=True)
    ]
    return sorted(rows, key=lambda row: (row["given_probability"], row["path"]))
