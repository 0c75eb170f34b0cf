"""`dinokit card`: the README.md of a model folder, and the figures in it."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._messages import list_messages
from dinokit.cli._model_options import (
    default_yields,
    image_size_option,
    is_on_the_command_line,
    origin_in_words,
    quiet_option,
)
from dinokit.cli._pictures import silence_decoders

if TYPE_CHECKING:
    from dinokit.card import DrawnFigure
    from dinokit.card.write import Outcome
    from dinokit.features.backbone import Backbone
    from dinokit.model_folder.folder import ModelFolder

__all__ = ["card"]

_OF_FIGURES = ("photos", "neighbours", "image_size")  # options


@click.command()
@click.argument("folder", metavar="FOLDER")
@click.option(
    "--photos",
    metavar="PATH",
    multiple=True,
    help="Photographs for the attention figure, six at most; may be given several times. "
    "Default: the four bundled with dinokit.",
)
@click.option(
    "--neighbours",
    metavar="PATH",
    multiple=True,
    help="Photographs for a figure of nearest neighbours: a folder, or any other input of dinokit embed.",
)
@click.option("--no-figures", is_flag=True, help="Draw no figures; existing ones stay in the card.")
@image_size_option
@click.option("--device", default="auto", show_default=True, help="Device that computes the figures.")
@click.option(
    "--run",
    metavar="RUN",
    type=click.Path(path_type=Path),
    help="Training run that these weights come from, if the folder has no training record.",
)
@click.option(
    "--measured",
    metavar="JSON",
    multiple=True,
    type=click.Path(path_type=Path),
    help="Output of `dinokit eval --json` for this model; may be given several times.",
)
@click.option("--repo", metavar="USER/NAME", help="Hub repository that the code in the card names.")
@click.option(
    "--dataset",
    metavar="ID",
    multiple=True,
    help="Data set on the Hub that the model was trained on; may be given several times.",
)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Write the card to this folder instead.",
)
@click.option("--overwrite-card", is_flag=True, help="Also replace a README.md that was edited by hand.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@quiet_option
def card(
    folder: str,
    photos: tuple[str, ...],
    neighbours: tuple[str, ...],
    no_figures: bool,
    image_size: int | tuple[int, int] | None,
    device: str,
    run: Path | None,
    measured: tuple[Path, ...],
    repo: str | None,
    dataset: tuple[str, ...],
    output: Path | None,
    overwrite_card: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Write the README.md of a model FOLDER (or of a run's model/) and draw its figures with the model.

    The card describes the folder: sizes, licence, training (training.json), measured accuracy (evaluation.json),
    accuracy and speed of the ONNX files (export_report.json), and code for every library that can load the model.
    figures/attention.png shows what the model looks at; figures/neighbours.png, with --neighbours, what it finds
    similar. These photographs become part of the folder and are public once it is pushed.

    A README.md that was edited by hand is kept.

    \b
    dinokit card shoes/
    dinokit card shoes/ --neighbours photos/ --repo me/shoes
    dinokit card runs/shoes --photos a.jpg --photos b.jpg --image-size 480
    dinokit card shoes/ --no-figures --run runs/shoes
    dinokit eval --reference train/ --queries val/ -m shoes/ --json > scores.json
    dinokit card shoes/ --measured scores.json
    """
    from dinokit.card import keep_measured
    from dinokit.errors import UsageError

    if no_figures and default_yields("no_figures", *_OF_FIGURES):
        no_figures = False
    if no_figures and is_on_the_command_line("no_figures"):  # defaults for figures do not contradict it
        asked = any(map(is_on_the_command_line, _OF_FIGURES))
    else:
        asked = bool(photos or neighbours or image_size)
    if no_figures and asked:
        raise UsageError(
            "--no-figures contradicts --photos, --neighbours and --image-size; leave one out"
            + origin_in_words("no_figures", *_OF_FIGURES)
        )
    silence_decoders()
    model = _model_folder(folder, output)
    _check_names(repo, dataset)
    if run is not None:
        _keep_record(model, run)
    for scores in measured:
        keep_measured(model, scores)
    target = model.path if output is None else output
    drawn: list[DrawnFigure] = []
    if not no_figures:
        drawn = _draw(model, target, photos, neighbours, image_size, device, quiet=quiet)
    outcome = _write(model, target, repo, dataset, overwrite=overwrite_card)
    failures = [failure for figure in drawn for failure in figure.failures]
    _report(target, outcome, drawn, failures, quiet=quiet)
    if as_json:
        click.echo(json.dumps(_as_json(target, outcome, drawn, failures), indent=2))
    elif outcome == "written":
        click.echo(target / "README.md")
    if outcome == "kept":
        return 1 if drawn else 3
    return 1 if failures else 0


def _model_folder(name: str, output: Path | None) -> ModelFolder:
    from dinokit.errors import UsageError
    from dinokit.loading.locate import starter_path
    from dinokit.loading.zoo import STARTER, ZOO
    from dinokit.model_folder.folder import find_model_folder, read_model_folder

    path = Path(name).expanduser()
    if name == STARTER and not path.exists():
        if output is None:
            raise UsageError(
                f"{name} is bundled with dinokit, and its card is not replaced; give -o FOLDER to write one elsewhere"
            )
        path = starter_path()
    if found := find_model_folder(path):
        return read_model_folder(found)
    if name in ZOO or not path.exists():
        what = "is a model on the Hub" if name in ZOO else "does not exist"
        raise UsageError(
            f"{name} {what}; a card belongs to a model folder. Write one with `dinokit export {name} -o FOLDER`"
        )
    raise UsageError(
        f"{name} is not a model folder (it has no config.json of dinokit); `dinokit export {name} -o FOLDER` writes one"
    )


def _check_names(repo: str | None, datasets: tuple[str, ...]) -> None:
    from dinokit.loading.hub import check_repository_name

    if repo is not None:
        check_repository_name(repo, option="--repo")
    for dataset in datasets:
        check_repository_name(dataset, option="--dataset", needs_owner=False)


def _keep_record(model: ModelFolder, run: Path) -> None:
    from dinokit.card import keep_record, make_record, record_of_run

    keep_record(model, make_record(record_of_run(run)))


def _draw(
    model: ModelFolder,
    target: Path,
    photos: tuple[str, ...],
    neighbours: tuple[str, ...],
    image_size: int | tuple[int, int] | None,
    device: str,
    *,
    quiet: bool,
) -> list[DrawnFigure]:
    from dinokit.card import draw_attention
    from dinokit.errors import UsageError
    from dinokit.loading.load import load_backbone
    from dinokit.pictures.bands import is_photographic

    channels = model.config.preprocessing.channels
    options = (("--photos", photos), ("--neighbours", neighbours))
    found = [_found(option, paths, channels) for option, paths in options]
    backbone = load_backbone(model.path, device=device)
    drawn = []
    if backbone.config.num_heads and not photos and not is_photographic(channels):
        click.echo(
            f"Note: attention is not drawn, since dinokit has no pictures with {channels} channels. "
            "Name yours: --photos bands/",
            err=True,
        )
    elif backbone.config.num_heads:
        fine = load_backbone(model.path, device=device, image_size=image_size) if image_size else backbone
        drawn.append(draw_attention(target, fine, found[0] if photos else None))
    elif photos or image_size:
        raise UsageError(
            f"{backbone.name} has no attention to draw, since it is not a Vision Transformer; leave out --photos and "
            "--image-size"
        )
    if neighbours:
        drawn.append(_draw_neighbours(backbone, target, found[1], quiet=quiet))
    return drawn


def _found(option: str, paths: tuple[str, ...], channels: int) -> list[Any]:
    from dinokit.errors import UsageError
    from dinokit.sources import is_there, search_pictures

    if not paths:
        return []
    search = search_pictures(paths, channels=channels)
    for problem in search.problems:
        click.echo(f"Warning: {problem}", err=True)
    pictures = list(search.pictures)
    if not any(is_there(picture) for picture in pictures):
        raise UsageError(
            f"{option} {' '.join(paths)}: no photographs found; name files, or folders that contain some"
        )
    return pictures


def _draw_neighbours(backbone: Backbone, target: Path, pictures: list[Any], *, quiet: bool) -> DrawnFigure:
    from dinokit.card import draw_neighbours
    from dinokit.cli._embed_pictures import embed_pictures

    table = embed_pictures(pictures, backbone, quiet=quiet)
    figure = draw_neighbours(
        target, backbone, pictures, table.embeddings, labels=_classes([str(picture) for picture in pictures])
    )
    failed = [(path, error) for path, error in zip(table.paths, table.errors, strict=True) if error]
    return replace(figure, failures=(*figure.failures, *failed))


def _classes(paths: list[str]) -> list[str] | None:
    """The names of the pictures' folders, if there are several with at least two pictures each (one per class)."""
    names = [Path(path).parent.name for path in paths]
    counts = Counter(names)
    return names if len(counts) >= 2 and min(counts.values()) >= 2 else None


def _write(
    model: ModelFolder, target: Path, repo: str | None, datasets: tuple[str, ...], *, overwrite: bool
) -> Outcome:
    from dinokit.card import CardSettings, write_card, write_card_elsewhere

    readme = model.path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    before = CardSettings.of(text) or CardSettings()
    settings = replace(before, repo=repo or before.repo, datasets=datasets or before.datasets)
    if target != model.path:
        return write_card_elsewhere(model, target, settings=settings, overwrite=overwrite)
    return write_card(model.path, settings=settings, overwrite=overwrite)


def _report(
    target: Path, outcome: Outcome, drawn: list[DrawnFigure], failures: list[tuple[str, str]], *, quiet: bool
) -> None:
    from dinokit.card import why_kept

    list_messages([f"{path}: {error}" for path, error in failures], "Failed: ", see="--json")
    for figure in drawn:
        if figure.left_out:
            click.echo(f"Left out: {figure.left_out} photographs that do not fit in {figure.file}", err=True)
    if outcome == "kept":
        click.echo(
            f"{target / 'README.md'} {why_kept(target)} and is kept; --overwrite-card replaces it.",
            err=True,
        )
    elif outcome == "section":
        click.echo(
            f"{target / 'README.md'} was supplied as text; only its section about ONNX files was updated. "
            "--overwrite-card rewrites all of it.",
            err=True,
        )
    if outcome != "written" and drawn:
        links = " ".join(f"![](figures/{figure.file.name})" for figure in drawn)
        click.echo(f"To show the figures in it: {links}", err=True)
    elif outcome != "kept" and not quiet:
        figures = f" with {' and '.join(figure.file.name for figure in drawn)}" if drawn else ""
        click.echo(f"Wrote {target / 'README.md'}{figures}", err=True)


def _as_json(
    target: Path, outcome: Outcome, drawn: list[DrawnFigure], failures: list[tuple[str, str]]
) -> dict[str, Any]:
    return {
        "card": str(target / "README.md"),
        "card_is": outcome,
        "figures": [
            {**figure.entry, "file": str(figure.file), "bytes": figure.file.stat().st_size}
            for figure in drawn
        ],
        "failures": [{"path": path, "error": error} for path, error in failures],
    }
