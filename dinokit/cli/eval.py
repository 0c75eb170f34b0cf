"""`dinokit eval`: how good models are on labelled pictures."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._defaults import SeveralModels
from dinokit.cli._messages import list_messages
from dinokit.cli._model_options import (
    DEFAULT_MODEL,
    batch_size_option,
    device_option,
    engine_option,
    go_offline,
    image_size_option,
    must_not_be_given,
    offline_option,
    quiet_option,
    temperature_option,
)
from dinokit.cli._pictures import silence_decoders
from dinokit.cli._progress import open_progress
from dinokit.cli._vector_kind import what_option
from dinokit.wording import counted

if TYPE_CHECKING:
    from dinokit.classifiers.model_comparison import LabelledFeatures
    from dinokit.features.backbone import Backbone
    from dinokit.sources import Item
    from dinokit.tables.embeddings import EmbeddingTable

__all__ = ["eval"]


def _parse_ks(ctx: click.Context, param: click.Parameter, value: Any) -> list[int]:
    try:
        ks = [int(part) for part in str(value).split(",")]
    except ValueError:
        ks = []
    if not ks or min(ks) < 1:
        raise click.BadParameter(f"{value!r}; expected numbers from 1, separated by commas: 10,20,100")
    return ks


@click.command()
@click.option(
    "--reference",
    required=True,
    metavar="LABELLED",
    help="Labelled pictures to learn from: one subfolder per class, a CSV with the columns path and label, a dataset "
    "with labels, or a table written by dinokit embed.",
)
@click.option(
    "--queries",
    metavar="LABELLED",
    help="Labelled pictures to evaluate on.  [default: each reference, by the others (leave one out)]",
)
@click.option(
    "-m",
    "--model",
    cls=SeveralModels,
    multiple=True,
    default=(DEFAULT_MODEL,),
    show_default=True,
    help="Model name, path or Hub id; repeat to compare models.",
)
@click.option(
    "-k",
    "ks",
    callback=_parse_ks,
    metavar="N,N…",
    default="10,20,100",
    show_default=True,
    help="Numbers of neighbours, separated by commas.",
)
@temperature_option
@click.option("--no-linear", is_flag=True, help="Skip the linear probe, the slowest part.")
@click.option("--no-pixels", is_flag=True, help="Skip the baseline of raw pixels.")
@what_option()
@image_size_option
@engine_option
@device_option
@batch_size_option
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed for the probe's held-out split.",
)
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
@quiet_option
def evaluate(
    reference: str,
    queries: str | None,
    model: tuple[str, ...],
    ks: list[int],
    temperature: float,
    no_linear: bool,
    no_pixels: bool,
    what: str,
    image_size: int | tuple[int, int] | None,
    engine: str,
    device: str,
    batch_size: int,
    seed: int,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Measure how well a model's features separate labelled pictures, with the protocols of papers.

    These are weighted k-NN (top-1 and top-5) and, if scikit-learn is installed, a linear probe: logistic regression
    whose penalty is chosen on a fifth of the references. Nothing else is trained. Without --queries, k-NN is
    leave-one-out and the probe uses five-fold cross-validation.

    ± is half the width of the 95 % interval. Raw pixels are the baseline that features must beat. The last column
    compares each row with the first, picture by picture: the difference in percentage points, and the p-value of the
    exact McNemar test, which can distinguish models whose intervals (±) overlap. An interrupted evaluation keeps
    nothing, so embed large sets into tables first (dinokit embed).

    LABELLED may be a folder with one subfolder per class, a CSV with the columns path and label, Parquet, Arrow or a
    Hugging Face dataset with labels (hf://datasets/USER/NAME::train), .tar shards with a .cls beside each picture, or
    tables written by dinokit embed, which need no model.

    \b
    dinokit eval --reference labelled/
    dinokit eval --reference train/ --queries val/ -m starter -m dino_vits16 -m runs/shoes
    dinokit eval --reference data::train --queries data::test --json > scores.json
    dinokit eval --reference train/ --queries val/ -m dino_vits16 --what cls:4   # the DINO paper's protocol for ViT-S
    """
    from dinokit.classifiers.model_comparison import compare_models
    from dinokit.cli._eval_text import comparison_as_text

    silence_decoders()
    if offline:
        go_offline()
    judged = (
        _from_tables(reference, queries)
        if _are_tables(reference, queries)
        else _from_pictures(
            reference,
            queries,
            list(dict.fromkeys(model)),  # a model that is named twice is judged once
            pixels=not no_pixels,
            quiet=quiet,
            what=what,
            batch_size=batch_size,
            load={"image_size": image_size, "engine": engine, "device": device},
        )
    )
    _warn(judged)
    comparison = compare_models(
        judged,
        ks=ks,
        temperature=temperature,
        linear=not no_linear and _can_probe(),
        seed=seed,
        open_progress=functools.partial(open_progress, quiet=quiet),
    )
    if any(score.linear is not None and not score.linear.converged for score in comparison.scores):
        click.echo(
            "Note: a linear probe stopped before it had converged; its accuracy may be a little low", err=True
        )
    click.echo(json.dumps(comparison.to_json()) if as_json else comparison_as_text(comparison))
    return 1 if judged.failures or judged.problems else 0


eval = evaluate  # under its name as a command; the builtin is not used here


def _are_tables(reference: str, queries: str | None) -> bool:
    """Whether the sources are tables of embeddings. Raises click.UsageError if only one of them is."""
    from dinokit.classifiers.labelled import is_table

    tables = [is_table(source) for source in (reference, queries) if source is not None]
    if any(tables) and not all(tables):
        table, pictures = (reference, queries) if tables[0] else (queries, reference)
        raise click.UsageError(
            f"{table} is a table of embeddings and {pictures} holds pictures; expected two tables or two sets of "
            "pictures; embed the pictures first: dinokit embed"
        )
    return all(tables)


def _from_tables(reference: str, queries: str | None) -> LabelledFeatures:
    from dinokit.classifiers.model_comparison import features_of_tables

    must_not_be_given(
        ("model", "what", "image_size", "engine", "device", "batch_size"),
        "has no effect on tables of embeddings; leave it out, or give the pictures themselves",
    )
    return features_of_tables(reference, queries)


def _from_pictures(
    reference: str,
    queries: str | None,
    models: Sequence[str],
    *,
    pixels: bool,
    quiet: bool,
    what: str,
    batch_size: int,
    load: dict[str, Any],
) -> LabelledFeatures:
    from dinokit.classifiers.model_comparison import features_of_pictures
    from dinokit.cli._embed_pictures import embed_pictures

    def embed(items: Sequence[Item], backbone: Backbone, name: str) -> EmbeddingTable:
        if not quiet:
            height, width = backbone.image_size
            click.echo(
                f"{backbone.name} ({backbone.source}): {height}x{width} px, {backbone.engine} on {backbone.device}",
                err=True,
            )
        task = f"embedding by {name}"
        return embed_pictures(items, backbone, what=what, task=task, batch_size=batch_size, quiet=quiet)

    return features_of_pictures(
        reference,
        queries,
        models,
        embed=embed,
        open_progress=functools.partial(open_progress, quiet=quiet),
        pixels=pixels,
        **load,
    )


def _warn(judged: LabelledFeatures) -> None:
    """Prints what is wrong with the pictures and their labels on stderr."""
    list_messages(judged.problems, "Warning: ")
    list_messages([f"{f['path']}: {f['error']}; left out" for f in judged.failures], "Failed: ")
    if judged.shared:
        click.echo(
            f"Warning: {counted(judged.shared, 'query is', 'queries are')} among the references too, so the "
            "accuracies are too high: such a query finds itself",
            err=True,
        )
    unlabelled = judged.unlabelled()
    if unlabelled:
        names = sorted(unlabelled)
        count = sum(unlabelled.values())
        click.echo(
            f"Warning: {counted(count, 'query has a label', 'queries have labels')} that no reference has, "
            f"{', '.join(map(repr, names[:3]))}{' …' if names[3:] else ''}, and can only be wrong",
            err=True,
        )


def _can_probe() -> bool:
    """Whether the linear probe can be fitted; if not, a note is printed on stderr."""
    from dinokit.classifiers.linear_classifier import have_sklearn

    if have_sklearn():
        return True
    click.echo(
        "Note: the linear probe is left out; it needs scikit-learn: pip install scikit-learn", err=True
    )
    return False
