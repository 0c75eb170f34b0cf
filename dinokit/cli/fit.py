"""`dinokit fit`: a linear classifier for labelled photographs and its network, as one ONNX file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    DEFAULT_MODEL,
    FiniteRange,
    batch_size_option,
    device_option,
    go_offline,
    image_size_option,
    must_not_be_given,
    offline_option,
    quiet_option,
    reduced_decoding_option,
)
from dinokit.cli._outputs import check_output
from dinokit.cli._pictures import channels_of, silence_decoders
from dinokit.cli._progress import open_progress

if TYPE_CHECKING:
    from dinokit.classifiers.labelled import LabelledPictures, LabelledTable
    from dinokit.classifiers.linear_classifier import LinearClassifier
    from dinokit.cli._references import References
    from dinokit.features.backbone import Backbone
    from dinokit.loading.load import PrecisionName

__all__ = ["fit"]

_COMPARED = 8  # labelled photographs on which the written file is compared with the classifier


@click.command()
@click.argument("labelled")
@click.option("-o", "--output", default="classifier.onnx", show_default=True, help="The ONNX file.")
@click.option("-m", "--model", default=DEFAULT_MODEL, show_default=True, help="Model name, path or Hub id.")
@click.option("--revision", help="Branch, tag or commit of a model on the Hub.")
@click.option(
    "--what",
    type=click.Choice(["cls", "mean", "cls+mean"]),
    help="Vector to classify: the CLS token, the mean of the patch tokens, or both.  [default: cls, or that of the "
    "table]",
)
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "int8"]),
    default="auto",
    show_default=True,
    help="fp16 and int8 use the model folder's file of that precision (dinokit export --precision).",
)
@click.option(
    "--target",
    type=click.Choice(["portable", "embedder"]),
    show_default="portable; embedder for --triton",
    help="portable takes normalised pixels and runs in dinokit classify; embedder takes uint8 crops, for servers.",
)
@click.option(
    "--triton",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Also write the file, with its class names, into a model repository of NVIDIA's Triton Inference Server.",
)
@click.option(
    "-C",
    "strength",
    type=FiniteRange(0, min_open=True),
    help="Inverse strength of the L2 penalty, as in scikit-learn.  [default: chosen on a held-out fifth]",
)
@click.option(
    "--no-estimate",
    is_flag=True,
    help="Skip the accuracy estimate, which takes five times as long as the fit.",
)
@image_size_option
@reduced_decoding_option
@device_option
@batch_size_option
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed for the held-out split."
)
@click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON instead of the file's path.")
@quiet_option
def fit(
    labelled: str,
    output: str,
    model: str,
    revision: str | None,
    what: str | None,
    precision: PrecisionName,
    target: str | None,
    triton: Path | None,
    strength: float | None,
    no_estimate: bool,
    image_size: int | tuple[int, int] | None,
    reduced_decoding: bool,
    device: str,
    batch_size: int,
    seed: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Fit a classifier to LABELLED photographs, and write it with its network as one ONNX file.

    The network is not changed: a linear classifier is fitted to its embeddings (logistic regression by scikit-learn).
    Its accuracy is estimated first, by five-fold cross-validation.

    LABELLED is a folder with one subfolder per class, a CSV with the columns path and label, a dataset with
    labels (Parquet, .tar with .cls, hf://datasets/USER/NAME::train), or a table with labels that dinokit embed wrote
    with the same model.

    The file has an output "probabilities" beside the network's own outputs, and the class names in its metadata. It is
    kept only if plain ONNX Runtime reproduces the classifier's probabilities. Running it needs neither torch nor
    scikit-learn, but only dinokit classify, or ONNX Runtime in any language. The file is also a model:
    dinokit embed -m kinds.onnx.

    \b
    dinokit fit labelled/ -o kinds.onnx
    dinokit classify new/ -m kinds.onnx -o labels.csv
    dinokit fit labels.csv -o kinds.onnx -m dino_vits16 --what cls+mean
    dinokit fit labelled/ -o kinds.onnx -m shoes/ --precision int8
    dinokit fit labelled.parquet -o kinds.onnx -m shoes/            # already embedded
    dinokit fit labelled/ -o server.onnx --target embedder          # uint8 crops in, probabilities out
    dinokit fit labelled/ -o kinds.onnx --triton /srv/models        # the same, as Triton's model "kinds"
    """
    from dinokit.classifiers.labelled import LabelledTable, is_table, must_have_classes, read_labelled_table
    from dinokit.classifiers.labelled_sources import find_labelled_items
    from dinokit.classifiers.linear_classifier import STRENGTHS, must_have_sklearn
    from dinokit.export.classifier import export_classifier
    from dinokit.export.triton import must_be_free, write_triton_classifier
    from dinokit.loading.load import load_backbone

    silence_decoders()
    must_have_sklearn()
    check_output(Path(output), (".onnx",), "classifier.onnx", overwrite=overwrite, inputs=(labelled, model))
    target = target or ("embedder" if triton else "portable")
    if triton:
        must_be_free(triton, Path(output))
    if offline:
        go_offline()
    found = (
        read_labelled_table(labelled)
        if is_table(labelled)
        else find_labelled_items(labelled, channels=channels_of(model, revision))
    )
    must_have_classes(found.labels, labelled)
    list_messages(found.problems, "Warning: ")
    backbone = load_backbone(
        model,
        engine="onnx",
        device=device,
        precision=precision,
        revision=revision,
        image_size=image_size,
        reduced_decoding=reduced_decoding,
    )
    if isinstance(found, LabelledTable):
        must_not_be_given(
            ("reduced_decoding", "batch_size"),
            "applies to pictures, and a table already has their embeddings; leave it out",
        )
        references, what = _from_table(found, labelled, backbone, what)
        shown = None
    else:
        what = what or "cls"
        references = _embedded(found, labelled, backbone, what, batch_size=batch_size, quiet=quiet)
        shown = _some(references, found.paths)

    strengths = STRENGTHS if strength is None else (strength,)
    expected = None if no_estimate else _expect(references, strengths, seed, quiet=quiet)
    classifier = _fitted(references, strength, seed, _fits(strengths), quiet=quiet)
    made = export_classifier(
        model,
        classifier,
        output,
        what=what,
        precision=precision,
        target=target,
        image_size=image_size,
        revision=backbone.revision,
        photos=shown,
        told={
            "references": len(references.labels),
            "C": classifier.C_,
            "accuracy_by_folds": None if expected is None else expected["accuracy"],
        },
    )
    if not quiet:
        click.echo(
            f"The file reproduces the classifier's probabilities on {made.pictures} photographs (largest difference "
            f"{made.largest_difference:.1e})",
            err=True,
        )
    served = write_triton_classifier(output, triton) if triton else None
    if served:
        click.echo(f"Wrote {served}", err=True)
    if as_json:
        summary = {
            "output": [str(file) for file in made.files],
            "triton": None if served is None else str(served),
            "classes": dict(sorted(Counter(references.labels).items())),
            "references": len(references.labels),
            "what": what,
            "precision": made.precision,
            "target": made.target,
            "C": classifier.C_,
            "converged": classifier.converged_,
            "expected": expected,
            "largest_difference": made.largest_difference,
            "problems": found.problems,
            "failures": references.failures,
        }
        click.echo(json.dumps(summary))
    else:
        echo_path(output)
    return 1 if references.failures or found.problems else 0


def _embedded(
    found: LabelledPictures, name: str, backbone: Backbone, what: str, *, batch_size: int, quiet: bool
) -> References:
    """Embeds labelled pictures; those that cannot be read are listed on stderr."""
    from dinokit.classifiers.labelled import must_have_classes
    from dinokit.cli._embed_pictures import embed_pictures
    from dinokit.cli._references import as_vectors, readable

    table = embed_pictures(found.paths, backbone, what=what, batch_size=batch_size, quiet=quiet)
    references = readable(as_vectors(table), found.labels)
    list_messages([f"{f['path']}: {f['error']}; left out" for f in references.failures], "Failed: ")
    must_have_classes(references.labels, f"{name}, without what cannot be read,")
    return references


def _from_table(
    found: LabelledTable, name: str, backbone: Backbone, what: str | None
) -> tuple[References, str]:
    """A table's vectors, and their kind (``--what``)."""
    from dinokit.cli._references import References
    from dinokit.export.classifier import must_be_of_the_last_block
    from dinokit.tables.origin import must_be_as_embedded, must_be_comparable, origin_of

    must_be_as_embedded(found.origin, name)
    what = must_be_of_the_last_block(what or str(found.origin.get("what") or "cls"))
    must_be_comparable(found.origin, name, origin_of(backbone, what=what), f"the model {backbone.name}")
    return References(found.embeddings, found.paths, found.labels, found.origin), what


def _fitted(
    references: References, strength: float | None, seed: int, fits: int, *, quiet: bool
) -> LinearClassifier:
    """The classifier; ``fits``: how many it takes, for the progress bar."""
    from dinokit.classifiers.linear_classifier import LinearClassifier

    classifier = LinearClassifier(C=strength, seed=seed)
    with open_progress(fits, task="fitting", unit="fits", quiet=quiet) as progress:
        classifier.fit(references.embeddings, references.labels, on_progress=progress.advance)
    if not classifier.converged_:
        click.echo(
            "Note: the fit stopped before it had converged; the classifier may be a little worse", err=True
        )
    return classifier


def _fits(strengths: Sequence[float]) -> int:
    return len(strengths) + 1 if len(strengths) > 1 else 1


def _expect(references: References, strengths: Sequence[float], seed: int, *, quiet: bool) -> dict[str, Any]:
    """The accuracy to expect of the classifier on pictures like these; also printed on stderr."""
    from dinokit.classifiers.linear_probe import FOLDS, linear_probe
    from dinokit.cli._references import most_frequent

    fits = FOLDS * _fits(strengths)
    with open_progress(fits, task="estimating accuracy", unit="fits", quiet=quiet) as progress:
        score = linear_probe(
            references.embeddings,
            references.labels,
            strengths=strengths,
            seed=seed,
            on_progress=progress.advance,
        )
    most, share = most_frequent(references.labels)
    if not quiet:
        click.echo(
            f"Expected accuracy: {100 * score.top1.value:.1f} % (95 % interval: {100 * score.top1.low:.1f} to "
            f"{100 * score.top1.high:.1f}), by {score.folds}-fold cross-validation on {len(references.labels)} "
            f"photographs; {len(set(references.labels))} classes, always predicting {most!r} would reach "
            f"{100 * share:.1f} %",
            err=True,
        )
    return {
        "accuracy": score.top1.value,
        "low": score.top1.low,
        "high": score.top1.high,
        "folds": score.folds,
        "most_frequent_class": most,
        "most_frequent_share": share,
    }


def _some(references: References, items: Sequence[Any]) -> list[Path] | None:
    """Photographs to verify the file on, spread over all; None, meaning dinokit's own, if they are not files."""
    failed = {failure["path"] for failure in references.failures}
    files = [item for item in items if isinstance(item, Path) and str(item) not in failed]
    step = max(1, len(files) // _COMPARED)
    return files[::step][:_COMPARED] or None
