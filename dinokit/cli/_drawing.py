"""Options and steps that `dinokit attention` and `dinokit pca` share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import click

from dinokit.cli._messages import echo_path, list_messages
from dinokit.cli._model_options import (
    go_offline,
    image_size_option,
    model_options,
    offline_option,
    quiet_option,
    with_values,
)
from dinokit.cli._pictures import nothing_found, search_for, silence_decoders

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.sources import PictureList
    from dinokit.tables.run import Failure

__all__ = ["DrawingOptions", "DrawnRun", "draw", "drawing_options"]


@dataclass(frozen=True)
class DrawingOptions:
    """The values of the shared options."""

    photos: tuple[str, ...]
    output: str
    model: str
    revision: str | None
    engine: str
    device: str
    image_size: int | tuple[int, int] | None
    form: str
    batch_size: int
    overwrite: bool
    offline: bool
    as_json: bool
    quiet: bool


class DrawnRun(Protocol):
    """The result of ``write_attention`` or ``write_pca``."""

    @property
    def folder(self) -> Path: ...
    @property
    def written(self) -> list[Any]: ...
    @property
    def sheets(self) -> list[str]: ...
    @property
    def failures(self) -> list[Failure]: ...
    @property
    def interrupted(self) -> bool: ...


def drawing_options(
    output: str, form_help: str, *own: Callable[[Any], Any]
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Adds the shared options, and passes their values to the function as ``DrawingOptions``, its first argument.

    Args:
        output: the default folder.
        form_help: the help of ``--format``.
        own: options of the command, listed in the middle of ``--help``.
    """
    options = (
        click.argument("photos", nargs=-1, required=True),
        click.option(
            "-o",
            "--output",
            default=output,
            show_default=True,
            help="Output folder; new or empty.",
        ),
        model_options,
        image_size_option,
        *own,
        click.option(
            "--format",
            "form",
            type=click.Choice(["png", "npy"]),
            default="png",
            show_default=True,
            help=form_help,
        ),
        click.option("-b", "--batch-size", type=click.IntRange(1), default=4, show_default=True),
        click.option("--overwrite", is_flag=True, help="Replace files of the same names in the folder."),
        offline_option,
        click.option(
            "--json", "as_json", is_flag=True, help="Print a summary as JSON instead of the folder."
        ),
        quiet_option,
    )
    return with_values(DrawingOptions, options)


def draw(
    options: DrawingOptions,
    write: Callable[..., DrawnRun],
    *,
    task: str,
    index: str,
    first_line: Callable[[Backbone], str],
    report: Callable[[Any, int], Sequence[str]],
    further: Callable[[Any], dict[str, Any]] = lambda _: {},
) -> int:
    """Finds the photographs, loads the model, draws, reports.

    Args:
        options: from the command line.
        write: ``write_attention`` or ``write_pca`` with its own arguments bound:
            (pictures, folder, backbone, …) to a run.
        task: for the progress bar.
        index: the JSON file in the folder.
        first_line: describes the model.
        report: sentences for stderr, from a run and the number of photographs.
        further: values to add to --json, from a run.

    Returns:
        the exit code.
    """
    from dinokit.drawing.picture_folder import check_folder

    check_folder(Path(options.output), options.overwrite)  # before a model is downloaded
    silence_decoders()
    if options.offline:
        go_offline()

    found, backbone = search_for(
        options.photos,
        options.model,
        engine=options.engine,
        device=options.device,
        revision=options.revision,
        image_size=options.image_size,
    )
    pictures: PictureList = found.pictures
    list_messages(found.problems, "Warning: ")
    if backbone is None:
        raise nothing_found("draw", pictures)

    from dinokit.cli._progress import counting_failures, open_progress

    if not options.quiet:
        click.echo(first_line(backbone), err=True)
    with open_progress(len(pictures), task=task, quiet=options.quiet) as progress:
        run = write(
            pictures,
            options.output,
            backbone,
            form=options.form,
            overwrite=options.overwrite,
            batch_size=options.batch_size,
            on_progress=counting_failures(progress),
        )
    failed = [f"{failure.path}: {failure.error}" for failure in run.failures]
    list_messages(failed, "Failed: ", see=str(run.folder / index))
    if run.interrupted or not options.quiet:
        for sentence in report(run, len(pictures)):
            click.echo(sentence, err=True)
    if options.as_json:
        click.echo(json.dumps(_as_json(run, backbone, found.problems, further(run))))
    else:
        echo_path(options.output)
    if run.interrupted:
        return 130
    if not run.written:
        return 3
    return 1 if run.failures or found.problems else 0


def _as_json(
    run: DrawnRun, backbone: Backbone, problems: list[str], further: dict[str, Any]
) -> dict[str, Any]:
    return {
        "output": str(run.folder),
        "photos": run.written,
        "sheets": run.sheets,
        **further,
        "problems": problems,
        "failures": [failure.to_json() for failure in run.failures],
        "interrupted": run.interrupted,
        "model": backbone.name,
        "weights_sha256": backbone.weights_sha256,
        "image_size": list(backbone.image_size),
        "grid": list(backbone.grid),
    }
