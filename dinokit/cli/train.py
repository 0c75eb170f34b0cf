"""`dinokit train`: trains a backbone on unlabelled pictures."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter, deque
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dinokit.cli._model_options import go_offline, offline_option
from dinokit.cli._pictures import silence_decoders
from dinokit.cli._progress import Progress, open_progress
from dinokit.wording import counted

if TYPE_CHECKING:
    from dinokit.training.adapt import Choice
    from dinokit.training.run.state import TrainingState

__all__ = ["train"]

_LISTED_WARNINGS = 20


@click.command()
@click.argument("photos", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    metavar="FOLDER",
    type=click.Path(path_type=Path),
    help="Run folder.  [required, except with --explain or --list]",
)
@click.option(
    "--recipe", default="default", show_default=True, help="Bundled recipe (see --list) or YAML file."
)
@click.option(
    "--channels",
    type=click.IntRange(1, 1000),
    help="Channels of the network. 1: grey pictures; other than 1 and 3: .npy and TIFF files with that many channels.",
)
@click.option("--set", "assignments", multiple=True, metavar="KEY=VALUE", help="Change a key of the recipe.")
@click.option(
    "--init-from",
    metavar="MODEL",
    help="Start from the weights of a run, of a facebookresearch/dino checkpoint, or of a model (a name from "
    "`dinokit models`, a folder, a Hub id).",
)
@click.option(
    "--distill-from",
    metavar="MODEL",
    multiple=True,
    help="Learn from a pretrained model of any architecture as the teacher, or from several (with --recipe distill). "
    "`hog` uses histograms of oriented gradients: shape only, no pretrained weights.",
)
@click.option(
    "--labelled",
    metavar="LABELLED",
    help="Labelled pictures for k-NN evaluation after each epoch: one subfolder per class, a CSV (path,label), shards "
    "or a dataset with labels.",
)
@click.option(
    "--labelled-queries",
    metavar="LABELLED",
    help="Pictures to classify by the --labelled ones; without it, each labelled picture is classified by the others.",
)
@click.option(
    "--device",
    help="cpu, cuda, mps …; same as --set device=…, which takes precedence.  [default: the recipe's, auto]",
)
@click.option(
    "--workers",
    type=click.IntRange(0),
    help="Processes that decode and crop; 0: the main process only.  [default: one per core, at most 16]",
)
@offline_option
@click.option(
    "--explain",
    is_flag=True,
    help="Check everything the run needs, print the complete recipe with the reasons for its values, and stop.",
)
@click.option(
    "--list",
    "list_",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda ctx, _param, on: _list_recipes(ctx) if on else None,
    help="List the bundled recipes and stop.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress, only warnings and the result.")
def train(
    photos: tuple[str, ...],
    output: Path | None,
    recipe: str,
    channels: int | None,
    assignments: tuple[str, ...],
    init_from: str | None,
    distill_from: tuple[str, ...],
    labelled: str | None,
    labelled_queries: str | None,
    device: str | None,
    workers: int | None,
    offline: bool,
    explain: bool,
    as_json: bool,
    quiet: bool,
) -> int:
    """Train a backbone on PHOTOS by DINO, without labels.

    PHOTOS are folders (flat or nested), files, quoted patterns, lists (.txt, .csv), archives (.tar, .zip), Parquet
    files, Hugging Face datasets, and addresses of these (https://, s3://, hf://). Sources without random access
    are copied once to DINOKIT_CACHE (by default ~/.cache/dinokit).

    The run folder gets recipe.yaml, metrics.jsonl, report.html with the curves, checkpoint/ and model/, which every
    other command takes as a model. Ctrl-C (for a run of one process also SIGTERM, or a terminal that closes)
    finishes the step and saves; the same command resumes an interrupted run. Only one training at a time may use a
    run folder.

    \b
    dinokit train photos/ -o runs/mine                                 for a GPU
    dinokit train photos/ -o runs/mine --recipe small                  for a CPU
    dinokit train photos/ -o runs/mine --recipe resnet50               a convolutional network
    dinokit train photos/ -o runs/mine --init-from dino_vits16         from pretrained weights
    dinokit train photos/ -o runs/mine --recipe distill --distill-from dinov2_vitb14
    dinokit train photos/ -o runs/mine --set epochs=50 --set batch_size=128
    dinokit train photos/ -o runs/mine --labelled classes/             k-NN accuracy during training
    dinokit train hf://datasets/USER/NAME::train -o runs/mine          a dataset on the Hub
    dinokit train bands/ -o runs/mine --recipe small --channels 5      .npy or TIFF files of 5 channels
    dinokit embed photos/ -m runs/mine
    """
    if offline:
        go_offline()
    from dinokit.training.observer import Observer
    from dinokit.training.preflight import check_ahead
    from dinokit.training.prepare import prepare_run
    from dinokit.training.recipe import load_recipe, with_overrides
    from dinokit.training.run.checkpoint import what_is_kept
    from dinokit.training.trainer import train as run_training
    from dinokit.training.views.bit_depth import bits_found

    class Console(_Console, Observer):
        """Defined here because this module must load without torch."""

    silence_decoders()
    if channels is not None:
        assignments = (*assignments, f"channels={channels}")
    where = {"device": device, "workers": workers}
    # First, so that --set takes precedence: these may come from environment variables.
    assignments = (*(f"{key}={value}" for key, value in where.items() if value is not None), *assignments)
    named = {
        "init_from": init_from,
        "distill_from": distill_from if len(distill_from) > 1 else next(iter(distill_from), None),
        "labelled": labelled,
        "labelled_queries": labelled_queries,
    }
    # In one call: --set may need a value given by an option.
    settings = with_overrides(
        load_recipe(recipe), assignments, **{key: value for key, value in named.items() if value is not None}
    )
    if explain:
        with ExitStack() as stack:
            console = Console(stack, quiet=quiet)
            prepared = prepare_run(photos, output, settings, warn=console.warned, tell=console.told)
            check_ahead(prepared, console.warned)
            _explain(prepared.recipe, prepared.choices)
            for counsel in prepared.advice():
                console.told(counsel)
            if bits := bits_found(prepared.pictures, prepared.recipe):
                console.told(bits)
        console.summary()
        return 0
    if output is None:
        raise click.UsageError("name a run folder: -o runs/mine")
    with ExitStack() as stack:
        console = Console(stack, quiet=quiet)
        try:
            state = run_training(photos, output, settings, observer=console)
        except KeyboardInterrupt:  # before the first step, or a second time
            click.echo(f"Interrupted. {what_is_kept(output / 'checkpoint')}.", err=True)
            return 130
    console.summary()
    whole = state.step >= state.n_steps
    if not state.processes.is_first:  # the first process reports for all
        return 0 if whole else 130
    if not whole and not (output / "model").is_dir():  # no picture was readable so far
        click.echo(f"Interrupted. {what_is_kept(output / 'checkpoint')}.", err=True)
        return 130
    if not whole:
        click.echo(
            f"Interrupted after step {state.step} of {state.n_steps}. Everything so far is in {output}; the same "
            "command resumes from there.",
            err=True,
        )
    model = output / "model"
    report = {"model": str(model), "step": state.step, "n_steps": state.n_steps, **_last_line(output)}
    click.echo(json.dumps(report) if as_json else str(model))
    if whole and not quiet:
        run = shlex.quote(str(output))
        click.echo(f"Next: dinokit embed PHOTOS -m {run}, or dinokit export {run} -o FOLDER", err=True)
    return 0 if whole else 130


def _last_line(run: Path) -> dict[str, Any]:
    """The final metrics of the run's log, also of a run that was already finished; empty without a log."""
    from dinokit.card.run_files import logged_metrics

    last: dict[str, Any] = next(iter(deque(logged_metrics(run), maxlen=1)), {})
    reported = ("loss", "teacher_entropy", "kl", "ibot_loss", "foreground_kl", "knn_teacher", "knn_student")
    return {key: last[key] for key in reported if key in last}


def _list_recipes(ctx: click.Context) -> None:
    from dinokit.training.recipe import bundled_recipes

    recipes = bundled_recipes()
    width = max(map(len, recipes))
    for name, path in recipes.items():
        first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        click.echo(f"{name:<{width}}  {first}")
    ctx.exit()


def _explain(recipe: Any, choices: list[Choice]) -> None:
    """Prints the recipe as YAML that ``--recipe`` accepts, with the reasons as comments."""
    from dataclasses import asdict

    import yaml

    from dinokit.training.views.normalisation import normalisation

    reasons = {choice.key: choice.reason for choice in choices}
    values = asdict(recipe)
    # "auto" is measured when the run begins; ImageNet's values are known now.
    known = {key: None if values[key] == "auto" else values[key] for key in ("mean", "std")}
    for (key, given), used in zip(known.items(), normalisation(replace(recipe, **known)), strict=True):
        if values[key] == "auto":
            reasons.setdefault(key, "measured before the first step")
        elif given is None:
            values[key] = used
            reasons.setdefault(key, "ImageNet's, by default")
    for key, value in values.items():
        plain = list(value) if isinstance(value, tuple) else value
        written = (
            yaml.safe_dump(plain, default_flow_style=True, width=math.inf).removesuffix("...\n").rstrip()
        )
        shown = f"{key}: {written}"
        click.echo(f"{shown:<39} # {reasons[key]}" if key in reasons else shown)


class _Console:
    """Prints on stderr how a run progresses: the methods that the command overrides of the trainer's Observer."""

    def __init__(self, stack: ExitStack, *, quiet: bool) -> None:
        self._stack, self._quiet = stack, quiet
        self._progress: Progress | None = None
        self._stepped = False
        self._warnings: Counter[str] = Counter()

    def started(self, state: TrainingState, n_images: int, choices: list[Choice]) -> None:
        recipe = state.recipe
        if not self._quiet:
            precision = str(state.dtype).removeprefix("torch.")
            click.echo(
                f"{recipe.arch} on {counted(n_images, 'picture')}: {counted(recipe.epochs, 'epoch')} of "
                f"{counted(state.steps_per_epoch, 'step')}, {counted(recipe.batch_size, 'picture')} per step, "
                f"{state.device}, {precision}",
                err=True,
            )
            for choice in choices:
                click.echo(f"  {choice.key} = {choice.value} ({choice.reason})", err=True)
            if state.step >= state.n_steps:
                click.echo(f"This run is finished: all {state.n_steps} steps are done.", err=True)
            elif state.step:
                click.echo(f"Resuming after step {state.step}.", err=True)
        left = (state.n_steps - state.step) * recipe.batch_size
        self._progress = self._stack.enter_context(open_progress(left, task="training", quiet=self._quiet))

    def stepped(self, state: TrainingState, n_images: int, metrics: dict[str, Any] | None) -> None:
        self._stepped = True
        note = None
        if metrics is not None:
            entropy = metrics["teacher_entropy"]
            entropy = "" if entropy is None else f"teacher entropy {entropy:.2f}, "
            note = (
                f"epoch {metrics['epoch']:.2f}, loss {metrics['loss']:.3f}, {entropy}"
                f"waiting for data {metrics['data_wait']:.0%}"
            )
            if "knn_teacher" in metrics and not self._quiet:
                from dinokit.card.record import name_of_average

                average = name_of_average(state.recipe.distill_from)
                click.echo(
                    f"k-NN after epoch {metrics['epoch']:.4g}: {average} "
                    f"{metrics['knn_teacher']:.1%}, "
                    f"student {metrics['knn_student']:.1%}",
                    err=True,
                )
        assert self._progress is not None
        self._progress.advance(state.recipe.batch_size, note)

    def told(self, message: str) -> None:
        if self._progress is not None and not self._stepped:
            self._progress.begin()  # k-NN before training took time that belongs to no step
        if not self._quiet:
            kept = message.startswith("k-NN")
            click.echo(message if kept else f"{message[:1].upper()}{message[1:]}", err=True)

    def warned(self, message: str) -> None:
        kind = message.partition(":")[0]  # many unreadable pictures must not hide that the run is collapsing
        self._warnings[kind] += 1
        if self._warnings[kind] <= _LISTED_WARNINGS:
            click.echo(f"Warning: {message}", err=True)

    def summary(self) -> None:
        """Prints how many warnings were not shown."""
        for kind, count in self._warnings.items():
            if count > _LISTED_WARNINGS:
                click.echo(f"Warning: and {count - _LISTED_WARNINGS} more: {kind}", err=True)
