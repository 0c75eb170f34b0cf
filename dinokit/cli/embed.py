"""`dinokit embed`: turn photographs into a table of embeddings."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    DEFAULT_MODEL,
    default_yields,
    go_offline,
    image_size_option,
    is_on_the_command_line,
    model_options,
    offline_option,
    origin_in_words,
    quiet_option,
    reduced_decoding_option,
)
from dinokit.cli._outputs import must_not_be_an_input
from dinokit.cli._pictures import nothing_found, search_for, silence_decoders
from dinokit.cli._tables import visible
from dinokit.cli._vector_kind import what_option
from dinokit.errors import UsageError
from dinokit.wording import counted

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.sources import Item
    from dinokit.tables.run import Interrupted, RunSummary
    from dinokit.tables.share import Share

__all__ = ["embed"]

_STRONGER_MODEL = "dino_vits16"


def _parse_share(ctx: click.Context, param: click.Parameter, value: str | None) -> Share | None:
    from dinokit.tables.share import Share

    try:
        return None if value is None else Share.parse(value)
    except UsageError as error:
        raise click.BadParameter(str(error)) from error


def _parse_batch_size(ctx: click.Context, param: click.Parameter, value: object) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    text = str(value)  # a number when it comes from the file of defaults
    if not re.fullmatch(r"[1-9]\d{0,6}", text):
        raise click.BadParameter(f"{text!r}; expected a number from 1, or auto")
    return int(text)


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    default="embeddings.parquet",
    show_default=True,
    help="The table. Its suffix sets the format: .parquet, .npy, .csv, .jsonl or .lance.",
)
@model_options
@click.option(
    "--precision",
    type=click.Choice(["auto", "fp32", "fp16", "bf16", "int8"]),
    default="auto",
    show_default=True,
    help="auto: float32; fp16, int8: the model folder's ONNX file of that precision. bf16, and fp16 without such a "
    "file, need torch.",
)
@image_size_option
@reduced_decoding_option
@what_option("patches", help="patches: the patch tokens themselves.")
@click.option(
    "--dtype",
    type=click.Choice(["float16", "float32"]),
    help="Data type of the tokens with --what patches.  [default: float16]",
)
@click.option("--normalize", is_flag=True, help="L2-normalise each vector.")
@click.option(
    "-b",
    "--batch-size",
    callback=_parse_batch_size,
    metavar="N|auto",
    default="32",
    show_default=True,
    help="Pictures per batch; auto halves the batch when memory runs out.",
)
@click.option(
    "--workers", type=click.IntRange(0), help="Decoding threads.  [default: one per core, at most 8]"
)
@click.option(
    "--max-failures", type=click.IntRange(0), help="Stop when more than this many pictures cannot be read."
)
@click.option("--update", is_flag=True, help="If the table exists, embed only new and changed pictures.")
@click.option("--overwrite", is_flag=True, help="Embed everything again and replace the table.")
@click.option(
    "--share",
    callback=_parse_share,
    metavar="K/N",
    help="Embed only the K-th of N shares. N such commands, on machines that share a disk, make the table together.",
)
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print a summary as JSON instead of the output's path.")
@quiet_option
def embed(
    photos: tuple[str, ...],
    output: str,
    model: str,
    revision: str | None,
    engine: str,
    device: str,
    precision: str,
    image_size: int | tuple[int, int] | None,
    reduced_decoding: bool,
    what: str,
    dtype: str | None,
    normalize: bool,
    batch_size: int | Literal["auto"],
    workers: int | None,
    max_failures: int | None,
    update: bool,
    overwrite: bool,
    share: Share | None,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Embed PHOTOS into a table, one row per picture, in order.

    PHOTOS are files, folders (searched with their subfolders, in the order of their paths), quoted patterns
    such as 'photos/**/*.jpg', .tar, .tar.gz and .zip archives, Parquet files with pictures or paths, Hugging Face
    datasets (folders of save_to_disk, hf://datasets/USER/NAME, one split as NAME::train), lists of paths
    (.txt, .csv, or - for standard input) and addresses (https://, s3://, gs://, hf://).

    A picture that cannot be read keeps its row: the embedding is empty, and the column "error" gives the reason.
    After an interruption, the same command resumes. --update adds new pictures to an existing table, embeds changed
    pictures and labels again and drops pictures that are gone; a picture counts as changed by the time of its file
    or archive. The labels of a dataset become a column "label".

    For a model whose input has neither 1 nor 3 channels, folders and archives are searched for .npy and TIFF files
    (uint8, uint16 or floats in 0…1; channels first or last).

    --what patches writes the tokens of all patches, as .npy of shape (pictures, rows, columns, numbers) or as
    .parquet. That takes 14 kB per picture with the starter and 150 kB with dino_vits16.

    \b
    dinokit embed photos/ -o embeddings.parquet
    dinokit embed photos/ -o embeddings.parquet --update
    dinokit embed DCIM/ -o camera.parquet --reduced-decoding
    dinokit embed a.jpg b.png -o vectors.npy -m dino_vits16
    dinokit embed 'shards/*.tar' -o shards.parquet --what cls+mean --normalize
    dinokit embed photos/ -o for_a_linear_classifier.parquet --what cls:4
    dinokit embed hf://datasets/ylecun/mnist::test -o mnist.parquet
    dinokit embed photos/ -o patches.npy --what patches
    dinokit embed photos/ -o embeddings.parquet --share "$SLURM_ARRAY_TASK_ID/8"
    find photos -name '*.jpg' -mtime -1 -print0 | dinokit embed - -o today.csv
    """
    from dinokit.files.outputs import must_be_writable
    from dinokit.tables.formats import check_output

    silence_decoders()
    check_output(output)
    must_not_be_an_input(output, photos)
    must_be_writable(output)
    if what != "patches" and not is_on_the_command_line("dtype"):
        dtype = None  # a default for patches
    if what == "patches" and not is_on_the_command_line("normalize"):
        normalize = False  # a default for vectors
    _check_patches(output, what, dtype, normalize)
    update, overwrite = (
        update and not default_yields("update", "overwrite"),
        overwrite and not default_yields("overwrite", "update", "share"),
    )
    if update and overwrite:
        raise click.UsageError(
            "--update keeps the rows of the table and --overwrite does not; give only one"
            + origin_in_words("update", "overwrite")
        )
    if share and overwrite:
        raise click.UsageError(
            f"--overwrite with --share would discard the work of the other shares; remove {output} and "
            f"{output}.parts once, before the shares start" + origin_in_words("share", "overwrite")
        )
    if offline:
        go_offline()

    found, backbone = search_for(
        photos,
        model,
        engine=engine,
        device=device,
        precision=precision,
        revision=revision,
        image_size=image_size,
        reduced_decoding=reduced_decoding,
    )
    list_messages(found.problems, "Warning: ")
    pictures = found.pictures
    if backbone is None:
        raise nothing_found("embed", pictures)
    if not quiet:
        click.echo(_first_line(backbone, model, what), err=True)
    summary = _run(
        pictures,
        output,
        backbone,
        quiet=quiet,
        what=what,
        dtype=dtype,
        normalize=normalize,
        batch_size=batch_size,
        workers="auto" if workers is None else workers,
        max_failures=max_failures,
        update=update,
        overwrite=overwrite,
        share=share,
    )
    if isinstance(summary, KeyboardInterrupt):
        click.echo(_how_to_resume(summary, share, overwrite=overwrite), err=True)
        return 130

    _report(summary, share, quiet=quiet)
    if as_json:
        click.echo(json.dumps(_as_json(summary, backbone, what, found.problems, share)))
    elif summary.written:
        echo_path(output)
    if summary.rows and not summary.embedded:
        return 3
    return 1 if summary.failed or found.problems else 0


def _check_patches(output: str, what: str, dtype: str | None, normalize: bool) -> None:
    from dinokit.tables.patches import check_patch_output

    if what != "patches":
        if dtype is not None:
            raise click.UsageError("--dtype is for --what patches; vectors are float32")
        return
    check_patch_output(output)
    if normalize:
        raise click.UsageError(
            "--normalize is for one vector per picture; --what patches writes the tokens as they are"
        )


def _numbers(backbone: Backbone, what: str) -> str:
    from dinokit.features.pooling import vector_length

    if what != "patches":
        return str(vector_length(what, backbone.embed_dim))
    return "x".join(map(str, backbone.patch_shape))


def _first_line(backbone: Backbone, model: str, what: str) -> str:
    height, width = backbone.image_size
    line = (
        f"{backbone.name} ({backbone.source}): {_numbers(backbone, what)} numbers per picture, "
        f"{height}x{width} px, {backbone.engine} on {backbone.device}, {backbone.precision}"
        + (", large JPEGs decoded reduced" if backbone.reduced_decoding else "")
    )
    return f"{line} · for stronger features: -m {_STRONGER_MODEL}" if model == DEFAULT_MODEL else line


def _run(
    pictures: Sequence[Item], output: str, backbone: Backbone, *, quiet: bool, **options: Any
) -> RunSummary | Interrupted:
    from dinokit.cli._progress import counting_failures, open_progress
    from dinokit.tables.run import Interrupted, embed_to_table

    with open_progress(len(pictures), task="embedding", quiet=quiet) as progress:
        try:
            return embed_to_table(
                pictures,
                output,
                backbone,
                on_planned=progress.expect,
                on_progress=counting_failures(progress),
                **options,
            )
        except Interrupted as interrupted:
            return interrupted


def _how_to_resume(interrupted: Interrupted, share: Share | None, *, overwrite: bool) -> str:
    if not interrupted.done:
        return f"Interrupted before the first of {interrupted.rows} pictures was done; nothing was kept."
    line = (
        f"Interrupted: {interrupted.done} of {interrupted.rows} pictures are done and kept in "
        f"{interrupted.parts}. The same command resumes from there"
    )
    if share:
        return f"{line}."
    if overwrite:
        return f"{line}; to start over, remove that folder first."
    return f"{line}; with --overwrite it starts over."


def _report(summary: RunSummary, share: Share | None, *, quiet: bool) -> None:
    list_messages(
        [f"{failure.path}: {failure.error}" for failure in summary.failures],
        "Failed: ",
        count=summary.failed if summary.failures else 0,
        see="the column 'error'",
    )
    if quiet:
        return
    if summary.already_done:
        failed = f"; {summary.failed} of its pictures failed" if summary.failed else ""
        click.echo(f"{summary.output} already exists, from the same pictures and model{failed}", err=True)
        return
    computed = summary.rows - summary.resumed - summary.kept
    rate = f" · {computed / summary.seconds:.1f} images/s" if summary.seconds and computed else ""
    kept = f", {summary.kept} of them kept from the existing table" if summary.kept else ""
    by_others = " or by other shares" if share and summary.written else ""
    resumed = f", {summary.resumed} of them earlier{by_others}" if summary.resumed else ""
    failed = f", {summary.failed} failed" if summary.failed else ""
    click.echo(f"{summary.embedded} embedded{kept}{resumed}{failed}{rate}", err=True)
    if summary.unlike is not None:
        click.echo(
            f"Note: no row of the old {summary.output} is of one of these pictures; its first was of "
            f"{visible(summary.unlike)}. Rows are matched by the names under which the pictures are given",
            err=True,
        )
    if share and not summary.written:
        left = (
            f"{counted(summary.waiting, 'picture')} left to the other shares, the last of which writes {summary.output}"
            if summary.waiting
            else f"another share is writing {summary.output}"
        )
        click.echo(
            f"Share {share} is done; {left}. The same command without --share does the rest.", err=True
        )


def _as_json(
    summary: RunSummary, backbone: Backbone, what: str, problems: list[str], share: Share | None
) -> dict[str, Any]:
    from dinokit.features.pooling import vector_length

    patches = what == "patches"
    return {
        "output": str(summary.output),
        "rows": summary.rows,
        "embedded": summary.embedded,
        "failed": summary.failed,
        "resumed": summary.resumed,
        "kept": summary.kept,
        "already_done": summary.already_done,
        **({"share": str(share), "written": summary.written, "waiting": summary.waiting} if share else {}),
        "seconds": round(summary.seconds, 3),
        "model": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "embed_dim": backbone.patch_shape[2] if patches else vector_length(what, backbone.embed_dim),
        **({"grid": list(backbone.grid)} if patches else {}),
        "what": what,
        "engine": backbone.engine,
        "device": backbone.device,
        "problems": problems,
        "failures": [failure.to_json() for failure in summary.failures],
    }
