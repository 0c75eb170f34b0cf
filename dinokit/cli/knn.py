"""`dinokit knn`: label photographs by their nearest labelled neighbours."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._embed_pictures import embed_pictures
from dinokit.cli._label_rows import LABEL_TYPES, failures_of, labels_as_lines, labels_as_text
from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    MODEL_SETTINGS,
    batch_size_option,
    go_offline,
    image_size_option,
    is_on_the_command_line,
    json_rows_option,
    model_options,
    must_not_be_given,
    offline_option,
    quiet_option,
    reduced_decoding_option,
    temperature_option,
    unknown_below_option,
)
from dinokit.cli._outputs import ROW_SUFFIXES, check_output, write_rows
from dinokit.cli._pictures import channels_of, silence_decoders
from dinokit.cli._queries import Queries, find_queries
from dinokit.cli._references import (
    NO_VOTERS,
    References,
    Vectors,
    as_vectors,
    expectation,
    fit,
    in_words,
    leave_one_out,
    left_without_voters,
    own_references,
    readable,
)
from dinokit.cli._suspects import check_labels
from dinokit.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.classifiers.knn import KNNClassifier
    from dinokit.classifiers.labelled import LabelledPictures, LabelledTable
    from dinokit.features.backbone import Backbone
    from dinokit.sources import Item

__all__ = ["knn"]


@click.command()
@click.argument("photos", nargs=-1)
@click.option(
    "--reference",
    required=True,
    metavar="LABELLED",
    help="A folder with one subfolder per class, a CSV with the columns path and label, a dataset with labels, or a "
    "table written by dinokit embed.",
)
@click.option(
    "--labels",
    metavar="CSV",
    help="Labels for a table given as --reference, with the columns path and label.  [default: the table's own column "
    "label, or else folder names]",
)
@click.option("--check", is_flag=True, help="List reference labels that are probably wrong; takes no PHOTOS.")
@click.option(
    "-o",
    "--output",
    help="Output file: .csv, .jsonl or .parquet.  [default: print a table]",
)
@click.option(
    "-k", type=click.IntRange(1), default=20, show_default=True, help="Number of neighbours that vote."
)
@temperature_option
@unknown_below_option
@click.option(
    "--nearest",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Number of nearest references to list, at most -k.",
)
@model_options
@image_size_option
@reduced_decoding_option
@batch_size_option
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@offline_option
@json_rows_option
@quiet_option
def knn(
    photos: tuple[str, ...],
    reference: str,
    labels: str | None,
    check: bool,
    output: str | None,
    k: int,
    temperature: float,
    unknown_below: float | None,
    nearest: int,
    model: str,
    revision: str | None,
    engine: str,
    device: str,
    image_size: int | tuple[int, int] | None,
    reduced_decoding: bool,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Label PHOTOS by the votes of the most similar photographs of a labelled reference set.

    PHOTOS are files, folders, quoted patterns and whatever else dinokit embed accepts (archives, lists, addresses),
    or one table written by dinokit embed. The first line printed is the leave-one-out accuracy of the reference set,
    an estimate of how accurate the labels will be.

    The result has one row per photograph, in order: label, probability (its share of the votes), the nearest
    references with their labels and similarities, and an error where a photograph cannot be read. A photograph
    that is itself a reference (has the same path) does not vote on its own label.

    With --check, each photograph of the reference set is labelled by the others. The result lists those whose given
    label differs from the predicted one, least probable given label first: these labels may be wrong.

    \b
    dinokit knn --reference labelled/ new/ -o labels.csv
    dinokit knn --reference labels.csv new/ -o new-labels.csv --unknown-below 0.6
    dinokit embed labelled/ -o labelled.parquet        # once, then as often as you like:
    dinokit knn --reference labelled.parquet new/*.jpg
    dinokit knn --reference labelled.parquet --check -o suspects.csv
    """
    from dinokit.classifiers.labelled import LabelledTable, is_table, must_have_classes, read_labelled_table
    from dinokit.classifiers.labelled_sources import find_labelled_items

    silence_decoders()
    _must_agree(photos, check=check)
    if output is not None:
        check_output(
            Path(output),
            ROW_SUFFIXES,
            "suspects.csv" if check else "labels.csv",
            overwrite=overwrite,
            inputs=(reference, labels, *photos),
        )
    if labels is not None and not is_table(reference) and not is_on_the_command_line("labels"):
        labels = None  # a default for tables
    if labels is not None and not is_table(reference):
        raise click.UsageError(
            f"--labels needs a table of embeddings as --reference, and {reference} is not one. "
            f"To use the pictures listed in {labels}, give --reference {labels}"
        )
    if offline:
        go_offline()
    needs_model = not is_table(reference) or not (check or any(map(is_table, photos)))
    if not needs_model:
        must_not_be_given(MODEL_SETTINGS, "has no effect on tables of embeddings; leave it out")
    channels = channels_of(model, revision) if needs_model else 3
    labelled = (
        read_labelled_table(reference, labels)
        if is_table(reference)
        else find_labelled_items(reference, channels=channels)
    )
    must_have_classes(labelled.labels, reference)
    problems = list(labelled.problems)
    queries = Queries(None) if check else find_queries(photos, channels)
    unmatched = queries.problems
    list_messages(unmatched + problems, "Warning: ")
    if not check:
        queries.must_be_there()

    tables = [(labelled.origin, reference)] if isinstance(labelled, LabelledTable) else []
    tables += [(queries.vectors.origin, photos[0])] if queries.vectors is not None else []
    what = "cls"
    backbone: Backbone | None = None
    if needs_model or not check:
        what, backbone = _model_for(
            tables,
            model,
            engine=engine,
            device=device,
            revision=revision,
            image_size=image_size,
            reduced_decoding=reduced_decoding,
        )

    def embed(which: Sequence[Item], task: str) -> Vectors:
        assert backbone is not None
        made = embed_pictures(which, backbone, what=what, task=task, batch_size=batch_size, quiet=quiet)
        return as_vectors(made)

    references = _references(labelled, reference, embed)
    classifier = fit(references, k, temperature, quiet=quiet)
    if check:
        return check_labels(classifier, references, output, as_json=as_json, problems=problems, quiet=quiet)
    expected = expectation(references, leave_one_out(classifier, references, quiet=quiet))
    if not quiet:
        click.echo(in_words(expected), err=True)

    vectors = queries.vectors if queries.vectors is not None else embed(queries.pictures, "embedding")
    own = own_references(vectors.paths, references)
    rows = _label(classifier, vectors, references, own, unknown_below, nearest)
    list_messages([f"{f['path']}: {f['error']}" for f in failures_of(rows)], "Failed: ")
    made = {"k": classifier.k, "temperature": temperature, "unknown_below": unknown_below}
    if output is not None:
        write_rows(
            Path(output), rows, labels_as_lines(rows, nearest), LABEL_TYPES, {**references.origin, **made}
        )
    summary = _summary(rows) | expected | made
    if not quiet:
        _report(summary, rows, own)
    if as_json:
        summary |= {
            "output": output,
            "problems": unmatched + problems,
            "failures": failures_of(rows),
            "reference_failures": references.failures,
        }
        click.echo(json.dumps(summary if output else {**summary, "rows": rows}))
    elif output is not None:
        echo_path(output)
    else:
        click.echo(labels_as_text(rows))
    if summary["failed"] == summary["photos"]:
        return 3
    return 1 if summary["failed"] or unmatched or problems or references.failures else 0


# -- before


def _must_agree(photos: Sequence[str], *, check: bool) -> None:
    if not check:
        if not photos:
            raise click.UsageError(
                "there is nothing to label; name PHOTOS, or give --check to check the labels of the reference set"
            )
        return
    if photos:
        raise click.UsageError(
            f"--check checks only the reference set; leave out {photos[0]}, or leave out --check to label it"
        )
    must_not_be_given(("unknown_below", "nearest"), "applies to labelling PHOTOS; leave it out with --check")


def _model_for(
    tables: Sequence[tuple[dict[str, Any], str]], model: str, *, reduced_decoding: bool, **options: Any
) -> tuple[str, Backbone | None]:
    """Which kind of vector is compared, and the model for pictures without one; None if two tables hold all vectors.

    Args:
        tables: origin and name of each; the other pictures are embedded in the same way.
        model: its name.
        reduced_decoding: requested by the user; a table may require it as well.
        options: further arguments of ``load_backbone``.

    Raises:
        UsageError: vectors of references and photographs are not comparable.
    """
    from dinokit.loading.load import load_backbone
    from dinokit.tables.origin import must_be_comparable, origin_of

    known = list(tables)
    as_there = known[0][0] if known else {}
    what = str(as_there.get("what", "cls"))
    backbone: Backbone | None = None
    if len(known) < 2:
        reduced = reduced_decoding or bool(as_there.get("reduced_decoding"))
        backbone = load_backbone(model, reduced_decoding=reduced, **options)
        known.append((origin_of(backbone, what=what), f"the model {model}"))
    if len(known) == 2:
        must_be_comparable(*known[0], *known[1])
    return what, backbone


def _references(
    labelled: LabelledPictures | LabelledTable, name: str, embed: Callable[[Sequence[Item], str], Vectors]
) -> References:
    """The vectors of the reference set; pictures that cannot be read are listed on stderr."""
    from dinokit.classifiers.labelled import LabelledTable, must_have_classes

    if isinstance(labelled, LabelledTable):
        return References(labelled.embeddings, labelled.paths, labelled.labels, labelled.origin)
    references = readable(embed(labelled.paths, "embedding references"), labelled.labels)
    failures = [f"reference {f['path']}: {f['error']}; left out" for f in references.failures]
    list_messages(failures, "Failed: ")
    must_have_classes(references.labels, f"{name}, without what cannot be read,")
    return references


def _label(
    classifier: KNNClassifier,
    vectors: Vectors,
    references: References,
    own: NDArray[np.intp],
    unknown_below: float | None,
    nearest: int,
) -> list[dict[str, Any]]:
    """A row per photograph, in order; ``own``: the references that are this photograph, (M, L), -1 for none."""
    import numpy as np

    rows: list[dict[str, Any]] = [
        {
            "path": path,
            "label": None,
            "probability": None,
            "nearest": [],
            "nearest_labels": [],
            "similarities": [],
            "error": error,
        }
        for path, error in zip(vectors.paths, vectors.errors, strict=True)
    ]
    alone = left_without_voters(own, len(references.paths))
    for i in np.flatnonzero(alone).tolist():
        rows[i]["error"] = rows[i]["error"] or NO_VOTERS
    fine = [i for i, row in enumerate(rows) if row["error"] is None]
    if not fine:
        return rows
    judged = classifier.judge(vectors.embeddings[fine], leave_out=own[fine])
    similarities, neighbours = judged.similarities, judged.neighbours
    for place, i in enumerate(fine):
        winner, probability = int(judged.winners[place]), float(judged.shares[place])
        unknown = unknown_below is not None and probability < unknown_below
        others = int(np.isfinite(similarities[place, :nearest]).sum())
        found = neighbours[place, :others]
        rows[i] |= {
            "label": None if unknown else str(classifier.classes_[winner]),
            "probability": round(probability, 6),
            "nearest": [references.paths[j] for j in found],
            "nearest_labels": [references.labels[j] for j in found],
            "similarities": [round(float(s), 6) for s in similarities[place, :others]],
        }
    return rows


# -- after


def _report(summary: dict[str, Any], rows: Sequence[dict[str, Any]], own: NDArray[np.intp]) -> None:
    """Prints what was done on stderr. ``own``: the references that are this photograph, (M, L), -1 for none."""
    labelled = zip(rows, own, strict=True)
    themselves = sum(row["error"] is None and (numbers >= 0).any() for row, numbers in labelled)
    if themselves:
        who = counted(themselves, "photograph is also a reference", "photographs are also references")
        click.echo(f"Note: {who}; each was labelled by the other references", err=True)
    click.echo(
        f"{summary['labelled']} labelled, {summary['unknown']} left unlabelled, {summary['failed']} failed",
        err=True,
    )


def _summary(rows: Sequence[dict[str, Any]]) -> dict[str, int]:
    failed = sum(row["error"] is not None for row in rows)
    labelled = sum(row["label"] is not None for row in rows)
    return {
        "photos": len(rows),
        "labelled": labelled,
        "unknown": len(rows) - labelled - failed,
        "failed": failed,
    }
