"""`dinokit pca`: patch features of photographs as colours."""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._model_options import image_size_option, model_options, offline_option, quiet_option

if TYPE_CHECKING:
    from dinokit.backbone import Backbone
    from dinokit.pca_pictures import PcaRun

__all__ = ["pca"]

_LISTED = 20  # failures on stderr; all are in pca.json and --json


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option("-o", "--output", default="pca", show_default=True, help="The folder for them; new or empty.")
@model_options
@image_size_option
@click.option(
    "--foreground",
    is_flag=True,
    help="Leave the background black: colours of what the first component separates from the borders.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["png", "npy"]),
    default="png",
    show_default=True,
    help="Pictures, or the components themselves: (h, w, 3) float32.",
)
@click.option("-b", "--batch-size", type=click.IntRange(1), default=4, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace files of the same names in the folder.")
@offline_option
@click.option("--json", "as_json", is_flag=True, help="Print what was written as JSON instead of the folder.")
@quiet_option
def pca(
    photos: tuple[str, ...],
    output: str,
    model: str,
    revision: str | None,
    engine: str,
    device: str,
    image_size: int | tuple[int, int] | None,
    foreground: bool,
    form: str,
    batch_size: int,
    overwrite: bool,
    offline: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Draw the patch features of PHOTOS as colours, into a folder.

    The first three principal components of all patches of all PHOTOS are red, green and blue: what the model
    takes for alike has like colours, within a photograph and between them. PHOTOS are files, folders, quoted
    patterns and archives.

    OUTPUT/cat.png is drawn for cat.jpg, contact-sheet.png shows all. A larger --image-size gives finer maps. A
    picture that cannot be read is listed. --foreground is for photographs of one kind of thing, and for models
    that tell it from its surroundings: the starter does so now and then.

    \b
    dinokit pca photos/ -o out/
    dinokit pca photos/ -o out/ -m dino_vits16 --image-size 480 --foreground
    dinokit pca photos/ -o components/ --format npy
    """
    from dinokit.sources import is_there, search_pictures

    # Pillow warns of damaged EXIF and the like; what cannot be read is reported by us, the rest is fine.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    found = search_pictures(photos)
    for problem in found.problems:
        click.echo(f"Warning: {problem}", err=True)
    if not any(is_there(picture) for picture in found.pictures):
        for picture in found.pictures:
            click.echo(f"Warning: {picture}: no such file or folder", err=True)
        click.echo("Error: there is nothing to draw; name photographs, or folders that hold some", err=True)
        return 3

    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
    from dinokit.cli._progress import open_progress
    from dinokit.loading import load_backbone
    from dinokit.pca_pictures import write_pca

    backbone = load_backbone(model, engine=engine, device=device, revision=revision, image_size=image_size)
    if not quiet:
        click.echo(_first_line(backbone), err=True)
    failures = 0
    with open_progress(len(found.pictures), task="reading", quiet=quiet) as progress:

        def on_progress(done: int, failed: int) -> None:
            nonlocal failures
            failures += failed
            progress.advance(done, f"{failures} failed" if failures else None)

        run = write_pca(
            found.pictures,
            output,
            backbone,
            foreground=foreground,
            form=form,
            overwrite=overwrite,
            batch_size=batch_size,
            on_progress=on_progress,
        )
    _report(run, len(found.pictures), quiet=quiet)
    click.echo(json.dumps(_as_json(run, backbone, found.problems)) if as_json else output)
    if run.interrupted:
        return 130
    if not run.written:
        return 3
    return 1 if run.failures or found.problems else 0


def _first_line(backbone: Backbone) -> str:
    (height, width), (rows, columns) = backbone.image_size, backbone.grid
    return (
        f"{backbone.name} ({backbone.source}): {height}x{width} px in {rows}x{columns} patches, "
        f"{backbone.engine} on {backbone.device}"
    )


def _report(run: PcaRun, total: int, *, quiet: bool) -> None:
    for failure in run.failures[:_LISTED]:
        click.echo(f"Failed: {failure.path}: {failure.error}", err=True)
    if len(run.failures) > _LISTED:
        click.echo(f"… and {len(run.failures) - _LISTED} more: see {run.folder}/pca.json", err=True)
    if run.interrupted and not run.written:
        click.echo("Interrupted before a photograph was read; nothing is drawn", err=True)
    elif run.interrupted:
        click.echo(
            f"Interrupted: {len(run.written)} of {total} were read and are drawn in {run.folder}, "
            "with the components of these alone",
            err=True,
        )
    elif not quiet and run.pca is not None:
        failed = f", {len(run.failures)} failed" if run.failures else ""
        held = " + ".join(f"{100 * share:.0f}" for share in run.pca.explained)
        sheet = f" · see {run.folder / run.sheets[0]}" if run.sheets else ""
        click.echo(
            f"{len(run.written)} drawn{failed}; components hold {held} % of the variance{sheet}", err=True
        )


def _as_json(run: PcaRun, backbone: Backbone, problems: list[str]) -> dict[str, Any]:
    return {
        "output": str(run.folder),
        "photos": run.written,
        "sheets": run.sheets,
        "explained": None if run.pca is None else run.pca.explained.tolist(),
        "failures": [{"path": failure.path, "error": failure.error} for failure in run.failures],
        "unmatched": problems,
        "interrupted": run.interrupted,
        "model": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "image_size": list(backbone.image_size),
        "grid": list(backbone.grid),
    }
