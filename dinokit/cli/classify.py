"""`dinokit classify`: label photographs with a classifier written by `dinokit fit`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._label_rows import (
    CLASS_TYPES,
    classes_as_lines,
    classes_as_text,
    failures_of,
)
from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    batch_size_option,
    device_option,
    go_offline,
    json_rows_option,
    must_not_be_given,
    offline_option,
    quiet_option,
    reduced_decoding_option,
    unknown_below_option,
)
from dinokit.cli._outputs import ROW_SUFFIXES, check_output, write_rows
from dinokit.cli._pictures import silence_decoders
from dinokit.cli._queries import find_queries
from dinokit.cli._references import Vectors, as_vectors

if TYPE_CHECKING:
    from dinokit.classifiers.image_classifier import ImageClassifier

__all__ = ["classify"]


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "-m",
    "--model",
    "classifier",
    default="classifier.onnx",
    show_default=True,
    metavar="FILE",
    help="ONNX file written by dinokit fit.",
)
@click.option("-o", "--output", help="Output file: .csv, .jsonl or .parquet.  [default: print a table]")
@click.option(
    "--top",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of most probable labels to list.",
)
@unknown_below_option
@reduced_decoding_option
@device_option
@batch_size_option
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@offline_option
@json_rows_option
@quiet_option
def classify(
    photos: tuple[str, ...],
    classifier: str,
    output: str | None,
    top: int,
    unknown_below: float | None,
    reduced_decoding: bool,
    device: str,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Label PHOTOS with a classifier written by dinokit fit.

    PHOTOS are files, folders, quoted patterns and whatever else dinokit embed accepts (archives, lists, addresses),
    or one table that dinokit embed wrote with the same model.

    The result has one row per photograph, in order: label, its probability, the most probable labels with their
    probabilities, and an error where a photograph cannot be read.

    \b
    dinokit fit labelled/ -o kinds.onnx
    dinokit classify new/ -m kinds.onnx -o labels.csv
    dinokit classify new/*.jpg -m kinds.onnx --unknown-below 0.6
    """
    from dinokit.classifiers.image_classifier import load_classifier
    from dinokit.cli._embed_pictures import embed_pictures

    silence_decoders()
    if output is not None:
        check_output(
            Path(output), ROW_SUFFIXES, "labels.csv", overwrite=overwrite, inputs=(classifier, *photos)
        )
    if offline:
        go_offline()
    loaded = load_classifier(classifier, device=device, reduced_decoding=reduced_decoding)
    queries = find_queries(photos, loaded.backbone.preprocessing.channels)
    problems = queries.problems
    list_messages(problems, "Warning: ")
    queries.must_be_there()
    if queries.vectors is not None:
        vectors = queries.vectors
        must_not_be_given(
            ("reduced_decoding", "batch_size"),
            "applies to pictures, and a table already has their embeddings; leave it out",
        )
        _must_fit(vectors.origin, photos[0], loaded, classifier)
    else:
        made = embed_pictures(
            queries.pictures, loaded.backbone, what=loaded.what, batch_size=batch_size, quiet=quiet
        )
        vectors = as_vectors(made)

    rows = _label(loaded, vectors, unknown_below, top)
    failures = failures_of(rows)
    list_messages([f"{f['path']}: {f['error']}" for f in failures], "Failed: ")
    if output is not None:
        origin = {**vectors.origin, "classifier": classifier, "unknown_below": unknown_below}
        write_rows(Path(output), rows, classes_as_lines(rows, top), CLASS_TYPES, origin)
    failed = len(failures)
    counts = Counter(row["label"] for row in rows if row["label"] is not None)
    labelled = sum(counts.values())
    if not quiet:
        click.echo(
            f"{labelled} labelled, {len(rows) - labelled - failed} left unlabelled, {failed} failed", err=True
        )
    if as_json:
        summary = {
            "photos": len(rows),
            "labelled": labelled,
            "unknown": len(rows) - labelled - failed,
            "failed": failed,
            "labels": dict(sorted(counts.items())),
            "unknown_below": unknown_below,
            "output": output,
            "problems": problems,
            "failures": failures,
        }
        click.echo(json.dumps(summary if output else {**summary, "rows": rows}))
    elif output is not None:
        echo_path(output)
    else:
        click.echo(classes_as_text(rows))
    if failed == len(rows):
        return 3
    return 1 if failed or problems else 0


def _must_fit(origin: Mapping[str, Any], name: str, loaded: ImageClassifier, file: str) -> None:
    """Raises UsageError if a table holds other vectors than those that the classifier accepts."""
    from dinokit.tables.origin import must_be_as_embedded, must_be_comparable, origin_of

    must_be_as_embedded(origin, name)
    must_be_comparable(origin, name, origin_of(loaded.backbone, what=loaded.what), f"the classifier {file}")


def _label(
    loaded: ImageClassifier, vectors: Vectors, unknown_below: float | None, top: int
) -> list[dict[str, Any]]:
    """A row per photograph, in order."""
    import numpy as np

    rows: list[dict[str, Any]] = [
        {
            "path": path,
            "label": None,
            "probability": None,
            "labels": [],
            "probabilities": [],
            "error": error,
        }
        for path, error in zip(vectors.paths, vectors.errors, strict=True)
    ]
    fine = [place for place, row in enumerate(rows) if row["error"] is None]
    if not fine:
        return rows
    shares = loaded.head.predict_proba(vectors.embeddings[fine])
    best = np.argsort(-shares, axis=1, kind="stable")[:, :top]
    for place, share, order in zip(fine, shares, best, strict=True):
        labels = [str(loaded.classes_[number]) for number in order]
        probabilities = [round(float(share[number]), 6) for number in order]
        unknown = unknown_below is not None and share[order[0]] < unknown_below
        rows[place] |= {
            "label": None if unknown else labels[0],
            "probability": probabilities[0],
            "labels": labels,
            "probabilities": probabilities,
        }
    return rows
