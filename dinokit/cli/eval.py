"""`dinokit eval`: how good models are on labelled pictures."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
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
from dinokit.cli._pictures import resolved, silence_decoders
from dinokit.cli._progress import open_progress
from dinokit.cli._vector_kind import what_option
from dinokit.wording import counted

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from dinokit.classifiers.evaluation import KNNScore, Proportion
    from dinokit.classifiers.labelled import LabelledPictures, LabelledTable
    from dinokit.classifiers.linear_probe import ProbeScore
    from dinokit.sources import Item

__all__ = ["eval"]


@dataclass(frozen=True)
class _Features:
    """Vectors of references and queries by one model; rows of failed pictures are NaN."""

    name: str
    references: NDArray[np.float32]
    queries: NDArray[np.float32] | None
    told: dict[str, Any]


@dataclass(frozen=True)
class _Scores:
    features: _Features
    knn: list[KNNScore]
    linear: ProbeScore | None


def _parse_ks(ctx: click.Context, param: click.Parameter, value: Any) -> list[int]:
    try:
        ks = [int(part) for part in str(value).split(",")]
    except ValueError:
        ks = []
    if not ks or min(ks) < 1:
        raise click.BadParameter(f"{value!r}; expected numbers from 1 with commas: 10,20,100")
    return ks


@click.command()
@click.option(
    "--reference",
    required=True,
    metavar="LABELLED",
    help="Labelled pictures to learn from: one subfolder per class, a CSV with the columns path and label, a dataset "
    "with labels, or a table of dinokit embed.",
)
@click.option(
    "--queries",
    metavar="LABELLED",
    help="Labelled pictures to evaluate on.  [default: each reference, by the others]",
)
@click.option(
    "-m",
    "--model",
    cls=SeveralModels,
    multiple=True,
    default=(DEFAULT_MODEL,),
    show_default=True,
    help="A name, a path or a Hub id; several times to compare.",
)
@click.option(
    "-k", "ks", callback=_parse_ks, default="10,20,100", show_default=True, help="Numbers of neighbours."
)
@temperature_option
@click.option("--no-linear", is_flag=True, help="Leave out the linear probe, which takes longest.")
@click.option("--no-pixels", is_flag=True, help="Leave out the row of raw pixels.")
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
    help="Seed for what the probe holds out.",
)
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
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
    """Measure how well a model's features tell labelled pictures apart, as papers do.

    Weighted k-NN (top-1 and top-5), and a linear probe where scikit-learn is installed: logistic regression whose
    penalty is chosen on a fifth of the references. Nothing else is trained. Without --queries, k-NN is leave-one-out
    and the probe uses five-fold cross-validation. ± is half the width of the 95 %
    interval. The row of raw pixels is the floor that features must beat. The last column compares each with the first,
    picture by picture: the difference in percentage points, and the p-value of the exact McNemar test, which can
    separate models whose intervals (±) overlap. An interrupted evaluation keeps nothing, so embed large sets into
    tables first (dinokit embed).

    LABELLED may be a folder with one subfolder per class, a CSV with the columns path and label, Parquet, Arrow or a
    Hugging Face dataset with labels (hf://datasets/USER/NAME::train), .tar shards with a .cls beside each picture, or
    tables of dinokit embed, which need no model.

    \b
    dinokit eval --reference labelled/
    dinokit eval --reference train/ --queries val/ -m starter -m dino_vits16 -m runs/shoes
    dinokit eval --reference data::train --queries data::test --json > scores.json
    dinokit eval --reference train/ --queries val/ -m dino_vits16 --what cls:4   # as the paper judges a ViT-S
    """
    from dinokit.classifiers.labelled import is_table

    silence_decoders()
    if offline:
        go_offline()
    tables = [is_table(source) for source in (reference, queries) if source is not None]
    if all(tables):
        must_not_be_given(
            ("model", "what", "image_size", "engine", "device", "batch_size"),
            "has no effect where tables of embeddings are judged; leave it out, or name the pictures themselves",
        )
        prepared = _from_tables(reference, queries)
    elif any(tables):
        which, other = (reference, queries) if tables[0] else (queries, reference)
        raise click.UsageError(
            f"{which} is a table of embeddings and {other} holds pictures; expected two of a kind. Embed the pictures "
            "first: dinokit embed"
        )
    else:
        prepared = _from_pictures(
            reference,
            queries,
            list(dict.fromkeys(model)),  # one that is named twice is judged once
            pixels=not no_pixels,
            quiet=quiet,
            what=what,
            batch_size=batch_size,
            load={"image_size": image_size, "engine": engine, "device": device},
        )
    list_messages(prepared.problems, "Warning: ")
    list_messages(
        [f"{failure['path']}: {failure['error']}; left out" for failure in prepared.failures], "Failed: "
    )

    if prepared.shared:
        click.echo(
            f"Warning: {counted(prepared.shared, 'query is', 'queries are')} among the references too, and found "
            "again there: the figures are too high",
            err=True,
        )

    truth = Counter(prepared.truth or ())
    unknown = sorted(truth.keys() - set(prepared.labels))
    if unknown:
        count = sum(truth[label] for label in unknown)
        click.echo(
            f"Warning: {counted(count, 'query has a label', 'queries have labels')} that no reference has, "
            f"{', '.join(map(repr, unknown[:3]))}{' …' if unknown[3:] else ''}, and can only be wrong",
            err=True,
        )

    linear = not no_linear
    if linear:
        from dinokit.classifiers.linear_classifier import have_sklearn

        if not have_sklearn():
            linear = False
            click.echo(
                "Note: the linear probe is left out; it needs scikit-learn: pip install scikit-learn",
                err=True,
            )
    scores = [
        _score(features, prepared, ks, temperature, linear=linear, seed=seed, quiet=quiet)
        for features in prepared.features
    ]
    if any(score.linear is not None and not score.linear.converged for score in scores):
        click.echo(
            "Note: a linear probe stopped before it had converged; its figure may be a little low", err=True
        )
    figures = _as_json(scores, prepared, reference, queries, temperature)
    click.echo(json.dumps(figures) if as_json else _as_text(scores, figures))
    return 1 if prepared.failures or prepared.problems else 0


eval = evaluate  # under its name as a command; the builtin is not used here


# -- what is judged


@dataclass(frozen=True)
class _Prepared:
    """Features of all models over the same pictures, and the pictures' labels."""

    features: list[_Features]
    labels: list[str]
    truth: list[str] | None
    problems: list[str]
    failures: list[dict[str, str]]
    shared: int = 0
    """Queries that are references too, by their paths."""


def _count_shared(references: Sequence[object], queries: Sequence[object] | None) -> int:
    """How many queries are references too. Raises click.UsageError when all are: each would find itself."""
    if queries is None:
        return 0
    theirs = {resolved(str(name)) for name in references} - {""}  # tables of others may lack names
    shared = sum(resolved(str(name)) in theirs for name in queries)
    if queries and shared == len(queries):
        raise click.UsageError(
            "the queries are the references, so that each would find itself; leave out --queries, and each is judged "
            "by the others"
        )
    return shared


def _from_tables(reference: str, queries: str | None) -> _Prepared:
    from dinokit.classifiers.labelled import must_be_comparable, must_have_classes, read_labelled_table

    references = read_labelled_table(reference)
    others: LabelledTable | None = None
    if queries is not None:
        others = read_labelled_table(queries)
        must_be_comparable(references.origin, reference, others.origin, queries)
    must_have_classes(references.labels, reference)
    features = _Features(
        str(references.origin.get("model") or reference),
        references.embeddings,
        others.embeddings if others else None,
        _told(references.origin),
    )
    problems = references.problems + (others.problems if others else [])
    shared = _count_shared(references.paths, others.paths if others else None)
    return _Prepared([features], references.labels, others.labels if others else None, problems, [], shared)


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
) -> _Prepared:
    from dinokit.classifiers.evaluation import RAW_PIXELS, raw_pixels
    from dinokit.classifiers.labelled import must_have_classes
    from dinokit.classifiers.labelled_sources import find_labelled_items
    from dinokit.cli._embed_pictures import embed_pictures
    from dinokit.cli._pictures import channels_of
    from dinokit.loading.load import load_backbone
    from dinokit.pictures.bands import is_photographic

    seen = {name: channels_of(name) for name in models}
    channels = seen[models[0]]
    if len({3 if is_photographic(number) else number for number in seen.values()}) > 1:
        raise click.UsageError(
            f"these models see pictures of different channels ({', '.join(f'{n}: {c}' for n, c in seen.items())}); "
            "judge them one by one"
        )
    sets: list[LabelledPictures] = [
        find_labelled_items(source, channels=channels) for source in (reference, queries) if source
    ]
    must_have_classes(sets[0].labels, reference)
    shared = _count_shared(sets[0].paths, sets[1].paths if queries else None)
    items: list[Item] = [item for found in sets for item in found.paths]
    cut = len(sets[0].paths)
    errors: list[str | None] = [None] * len(items)
    made: list[tuple[str, NDArray[np.float32], dict[str, Any]]] = []

    def add(
        name: str, vectors: NDArray[np.float32], failed: Sequence[str | None], told: dict[str, Any]
    ) -> None:
        made.append((name, vectors, told))
        for place, error in enumerate(failed):
            errors[place] = errors[place] or error

    # All are loaded before the first picture is embedded: a misspelt name costs no hour.
    backbones = [load_backbone(name, **load) for name in models]
    for name, backbone in zip(models, backbones, strict=True):
        if not quiet:
            height, width = backbone.image_size
            click.echo(
                f"{backbone.name} ({backbone.source}): {height}x{width} px, {backbone.engine} on {backbone.device}",
                err=True,
            )
        table = embed_pictures(
            items, backbone, what=what, task=f"embedding by {name}", batch_size=batch_size, quiet=quiet
        )
        add(name, table.embeddings, table.errors, _told(table.origin))
    if pixels:
        with open_progress(len(items), task="raw pixels", quiet=quiet) as progress:
            vectors, failed = raw_pixels(items, channels=channels, on_progress=progress.advance)
        add(RAW_PIXELS, vectors, failed, {})
    kept = [place for place, error in enumerate(errors) if error is None]
    first = [place for place in kept if place < cut]
    second = [place for place in kept if place >= cut]
    labels = [sets[0].labels[place] for place in first]
    must_have_classes(labels, f"{reference}, without what cannot be read,")
    if queries is not None and not second:
        raise click.UsageError(f"no picture of {queries} can be read; there is nothing to judge")
    return _Prepared(
        [_Features(name, v[first], v[second] if queries else None, told) for name, v, told in made],
        labels,
        [sets[1].labels[place - cut] for place in second] if queries else None,
        [problem for found in sets for problem in found.problems],
        [
            {"path": str(item), "error": error}
            for item, error in zip(items, errors, strict=True)
            if error is not None
        ],
        shared,
    )


def _told(origin: Mapping[str, Any]) -> dict[str, Any]:
    """Which vectors they are, for --json."""
    return {key: origin.get(key) for key in ("model", "source", "weights_sha256", "what", "preprocessing")}


# -- figures


def _score(
    features: _Features,
    prepared: _Prepared,
    ks: Sequence[int],
    temperature: float,
    *,
    linear: bool,
    seed: int,
    quiet: bool,
) -> _Scores:
    from dinokit.classifiers.evaluation import knn_scores

    labels, truth = prepared.labels, prepared.truth
    knn = knn_scores(features.references, labels, features.queries, truth, ks=ks, temperature=temperature)
    if not linear:
        return _Scores(features, knn, None)
    from dinokit.classifiers.linear_classifier import STRENGTHS
    from dinokit.classifiers.linear_probe import FOLDS, linear_probe

    fits = (len(STRENGTHS) + 1) * (FOLDS if truth is None else 1)
    with open_progress(fits, task=f"linear probe of {features.name}", unit="fits", quiet=quiet) as progress:
        probe = linear_probe(
            features.references, labels, features.queries, truth, seed=seed, on_progress=progress.advance
        )
    return _Scores(features, knn, probe)


def _as_json(
    scores: Sequence[_Scores],
    prepared: _Prepared,
    reference: str,
    queries: str | None,
    temperature: float,
) -> dict[str, Any]:
    from dinokit import __version__
    from dinokit.classifiers.evaluation import compare, proportion_of

    judged = prepared.labels if prepared.truth is None else prepared.truth
    most, _ = Counter(sorted(prepared.labels)).most_common(1)[0]
    always = proportion_of(sum(label == most for label in judged), len(judged))
    return {
        "dinokit": __version__,
        "reference": reference,
        "queries": queries,
        "protocol": "leave one out" if prepared.truth is None else "queries",
        "references": len(prepared.labels),
        "judged": len(judged),
        "queries_among_references": prepared.shared,
        "classes": dict(sorted(Counter(prepared.labels).items())),
        "temperature": temperature,
        "most_frequent_class": {"label": most, **asdict(always)},
        "results": [
            {
                "features": score.features.name,
                **score.features.told,
                "embed_dim": int(score.features.references.shape[1]),
                "knn": [
                    {
                        "k": found.k,
                        "top1": asdict(found.top1),
                        "top5": asdict(found.top5),
                        "against_first": asdict(compare(first.right, found.right)) if place else None,
                    }
                    for first, found in zip(scores[0].knn, score.knn, strict=True)
                ],
                "linear": None
                if score.linear is None
                else {
                    "top1": asdict(score.linear.top1),
                    "C": score.linear.strength if math.isfinite(score.linear.strength) else None,
                    "folds": score.linear.folds,
                    "converged": score.linear.converged,
                },
            }
            for place, score in enumerate(scores)
        ],
        "unlabelled": sorted(set(judged) - set(prepared.labels)),
        "problems": prepared.problems,
        "failures": prepared.failures,
    }


def _as_text(scores: Sequence[_Scores], figures: dict[str, Any]) -> str:
    ks = [found.k for found in scores[0].knn]
    middle = min(range(len(ks)), key=lambda place: abs(ks[place] - 20))  # the paper's k, or the nearest to it
    linear = scores[0].linear is not None
    header = [
        "top-1, %",
        *(f"k-NN {k}" for k in ks),
        *(["linear"] if linear else []),
        f"top-5 (k-NN {ks[middle]})",
        *([f"k-NN {ks[middle]} against {scores[0].features.name}"] if len(scores) > 1 else []),
    ]
    lines = [header]
    for place, score in enumerate(scores):
        cells = [score.features.name, *(_percent(found.top1) for found in score.knn)]
        if linear:
            assert score.linear is not None  # of all or of none
            cells.append(_percent(score.linear.top1))
        cells.append(_percent(score.knn[middle].top5))
        if len(scores) > 1:
            cells.append(_difference(scores[0].knn[middle], score.knn[middle]) if place else "")
        lines.append(cells)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = "\n".join(
        "  ".join(
            [f"{line[0]:<{widths[0]}}", *(f"{t:>{w}}" for t, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )
    always, judged = figures["most_frequent_class"], figures["judged"]
    if figures["queries"] is None:
        how = f"{judged} pictures, each judged by the others"
    else:
        how = f"{counted(judged, 'picture')} judged by {figures['references']}"
    return (
        f"{how}; {len(figures['classes'])} classes, always saying {always['label']!r} reaches "
        f"{100 * always['value']:.1f} %\n{table}"
    )


def _difference(first: KNNScore, other: KNNScore) -> str:
    from dinokit.classifiers.evaluation import compare

    paired = compare(first.right, other.right)
    return f"{100 * (other.top1.value - first.top1.value):+.1f}, p {paired.p:.2g}"


def _percent(share: Proportion) -> str:
    return f"{100 * share.value:.1f} ±{50 * (share.high - share.low):.1f}"
