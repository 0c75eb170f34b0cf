"""`dinokit attention`: what a model looks at, drawn over the photographs."""

from __future__ import annotations

import json
import os
import re
import warnings
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._model_options import image_size_option, model_options, offline_option, quiet_option

if TYPE_CHECKING:
    from dinokit.backbone import Backbone
    from dinokit.overlays import AttentionRun

__all__ = ["attention"]

_LISTED = 20  # failures on stderr; all are in attention.json and --json


def _parse_heads(ctx: click.Context, param: click.Parameter, value: str) -> list[int] | None:
    if value == "all":
        return None
    if value == "none":
        return []
    if not re.fullmatch(r"\d{1,4}(,\d{1,4})*", value):
        raise click.BadParameter(f"{value!r}; expected all, none, or numbers from 0 with commas: 0,2,5")
    return [int(number) for number in value.split(",")]


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "-o", "--output", default="attention", show_default=True, help="The folder for them; new or empty."
)
@model_options
@image_size_option
@click.option(
    "--mass",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.6,
    show_default=True,
    help="Share of the attention that a mask holds.",
)
@click.option(
    "--heads",
    callback=_parse_heads,
    default="all",
    show_default=True,
    help="Heads to draw: all, none or 0,2,5.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "npy"]),
    default="png",
    show_default=True,
    help="Pictures, or the attention itself: all heads, (heads, h, w) float32.",
)
@click.option("-b", "--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace files of the same names in the folder.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON instead of the folder.")
@quiet_option
def attention(
    photos: tuple[str, ...],
    output: str,
    model: str,
    revision: str | None,
    engine: str,
    device: str,
    image_size: int | tuple[int, int] | None,
    mass: float,
    heads: list[int] | None,
    form: str,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Draw what the model attends to in PHOTOS, into a folder.

    PHOTOS are files, folders (searched with their subfolders), quoted patterns such as 'photos/**/*.jpg', and what
    else dinokit embed takes: archives, Parquet files, lists, addresses.

    For cat.jpg the folder OUTPUT/cat gets the picture as the model sees it, the attention of each head and
    their mean laid over it, and masks that hold the share --mass of the attention; contact-sheet.png shows
    all photographs. A larger --image-size gives finer maps. A picture that cannot be read is listed.

    \b
    dinokit attention photos/ -o out/
    dinokit attention cat.jpg -o out/ -m dino_vits16 --image-size 480
    dinokit attention photos/ -o maps/ --format npy
    """
    from dinokit.sources import is_there, search_pictures

    # Pillow warns of damaged EXIF and the like; what cannot be read is reported by us, the rest is fine.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    found = search_pictures(photos)
    pictures = found.pictures
    for problem in found.problems:
        click.echo(f"Warning: {problem}", err=True)
    if not any(is_there(picture) for picture in pictures):
        for picture in pictures[:_LISTED]:
            click.echo(f"Warning: {picture}: no such file or folder", err=True)
        click.echo("Error: there is nothing to draw; name photographs, or folders that hold some", err=True)
        return 3

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
    from dinokit.cli._progress import open_progress
    from dinokit.loading import load_backbone
    from dinokit.overlays import write_attention

    backbone = load_backbone(model, engine=engine, device=device, revision=revision, image_size=image_size)
    if not quiet:
        click.echo(_first_line(backbone), err=True)
    failures = 0
    with open_progress(len(pictures), task="drawing", quiet=quiet) as progress:

        def on_progress(done: int, failed: int) -> None:
            nonlocal failures
            failures += failed
            progress.advance(done, f"{failures} failed" if failures else None)

        run = write_attention(
            pictures,
            output,
            backbone,
            mass=mass,
            heads=heads,
            form=form,
            overwrite=overwrite,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    _report(run, len(pictures), quiet=quiet)
    click.echo(json.dumps(_as_json(run, backbone, found.problems)) if as_json else output)
    if run.interrupted:
        return 130
    if not run.written:
        return 3
    return 1 if run.failures or found.problems else 0


def _first_line(backbone: Backbone) -> str:
    (height, width), (rows, columns) = backbone.image_size, backbone.grid
    return (
        f"{backbone.name} ({backbone.source}): {backbone.num_heads} heads, {height}x{width} px in "
        f"{rows}x{columns} patches, {backbone.engine} on {backbone.device}"
    )


def _report(run: AttentionRun, total: int, *, quiet: bool) -> None:
    for failure in run.failures[:_LISTED]:
        click.echo(f"Failed: {failure.path}: {failure.error}", err=True)
    if len(run.failures) > _LISTED:
        click.echo(f"… and {len(run.failures) - _LISTED} more: see {run.folder}/attention.json", err=True)
    if run.interrupted:
        click.echo(f"Interrupted: {len(run.written)} of {total} are drawn and kept in {run.folder}", err=True)
    elif not quiet:
        failed = f", {len(run.failures)} failed" if run.failures else ""
        sheet = f" · see {run.folder / run.sheets[0]}" if run.sheets else ""
        click.echo(f"{len(run.written)} drawn{failed}{sheet}", err=True)


def _as_json(run: AttentionRun, backbone: Backbone, problems: list[str]) -> dict[str, Any]:
    return {
        "output": str(run.folder),
        "photos": run.written,
        "sheets": run.sheets,
        "failures": [{"path": failure.path, "error": failure.error} for failure in run.failures],
        "unmatched": problems,
        "interrupted": run.interrupted,
        "model": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "image_size": list(backbone.image_size),
        "grid": list(backbone.grid),
    }
