"""`dinokit knn --check`: labels of the reference set that its neighbours contradict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._label_rows import SUSPECT_TYPES, suspects_as_text
from dinokit.cli._messages import NothingToDoError, echo_path, list_messages
from dinokit.cli._outputs import write_rows
from dinokit.cli._references import (
    NO_VOTERS,
    References,
    expectation,
    in_words,
    left_without_voters,
    own_references,
)

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
    """Writes or prints the references to which the others give another label."""
    rows, alone = _suspects(classifier, references)
    count = len(references.labels) - len(alone)
    if not count:
        raise NothingToDoError(f"no label can be checked: {NO_VOTERS}; add other photographs")
    list_messages([f"reference {f['path']}: {f['error']}" for f in alone], "Failed: ")
    failures = [*references.failures, *alone]
    made = {"k": classifier.k, "temperature": classifier.temperature}
    if output is not None:
        lines = [list(SUSPECT_TYPES), *(list(row.values()) for row in rows)]
        write_rows(Path(output), rows, lines, SUSPECT_TYPES, {**references.origin, **made})
    expected = expectation(references, (count - len(rows)) / count)
    if not quiet:
        click.echo(in_words(expected), err=True)
        click.echo(f"{len(rows)} of {count} labels differ from what the neighbours say", err=True)
    if as_json:
        summary = {
            "suspects": len(rows),
            **expected,
            **made,
            "output": output,
            "problems": problems,
            "failures": failures,
        }
        click.echo(json.dumps(summary if output else {**summary, "rows": rows}))
    elif output is not None:
        echo_path(output)
    elif rows:
        click.echo(suspects_as_text(rows))
    return 1 if problems or failures else 0


def _suspects(
    classifier: KNNClassifier, references: References
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """A row per reference to which the others give another label, the least probable given label first.

    Second: the references that no other reference can label.
    """
    import numpy as np

    itself = np.arange(len(references.paths))  # whatever its path
    own = np.column_stack([itself, own_references(references.paths, references)])
    without = left_without_voters(own, len(references.paths))
    alone = [{"path": references.paths[number], "error": NO_VOTERS} for number in np.flatnonzero(without)]
    kept = np.flatnonzero(~without)
    if not len(kept):
        return [], alone
    given = classifier.classes_.searchsorted(np.asarray(references.labels))[kept]
    judged = classifier.judge(references.embeddings[kept], leave_out=own[kept], given=given)
    assert judged.given_shares is not None
    wrong = np.flatnonzero(judged.winners != given)
    rows = [
        {
            "path": references.paths[kept[place]],
            "label": references.labels[kept[place]],
            "neighbours_say": str(classifier.classes_[judged.winners[place]]),
            "probability": round(float(judged.shares[place]), 6),
            "given_probability": round(float(judged.given_shares[place]), 6),
            "nearest": references.paths[near],
        }
        for place, near in zip(wrong, judged.neighbours[wrong, 0], strict=True)
    ]
    return sorted(rows, key=lambda row: (row["given_probability"], row["path"])), alone
