"""The training loop of DINO, to be read from top to bottom.

Source: Caron et al. 2021, Algorithm 1; facebookresearch/dino `main_dino.py`.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dinokit.errors import TrainingError, UsageError
from dinokit.training.devices.pieces import as_many_pieces
from dinokit.training.devices.processes import Processes
from dinokit.training.devices.transfer import sent
from dinokit.training.distillation.frozen_teacher import FrozenTeachers
from dinokit.training.interruption import finish_step_on_interrupt
from dinokit.training.monitoring.monitor import Monitor, evaluation_due
from dinokit.training.monitoring.pace import Pace
from dinokit.training.networks.initial_weights import begin_with
from dinokit.training.networks.network import pictures_of_a_piece
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.observer import Observer, PythonWarnings
from dinokit.training.prepare import prepare_run
from dinokit.training.recipe import Recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.failures import failures_in_words
from dinokit.training.run.run_folder import MetricsLog, claim_run_folder
from dinokit.training.run.state import TrainingState, build_network
from dinokit.training.run.teacher_folder import is_behind, write_teacher
from dinokit.training.step import StepResult, pass_over, training_step
from dinokit.training.views.bit_depth import bits_found
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.normalisation import measured, normalisation
from dinokit.training.views.pictures import digest_of_names

__all__ = ["Observer", "StepResult", "TrainingState", "build_network", "train", "training_step"]


_GIVE_UP = 16  # pictures in a row that cannot be read


def train(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    run: str | os.PathLike[str],
    recipe: Recipe,
    *,
    observer: Observer | None = None,
) -> TrainingState:
    """Pre-trains a backbone, or goes on with the run that is in the folder.

    Two at once in threads of one process draw from one generator of torch, so neither can be repeated exactly: for that
    give each a process.

    Args:
        sources: pictures, see :func:`dinokit.training.views.pictures.collect_pictures`: one source, or several.
        run: folder for ``recipe.yaml``, ``checkpoint/``, ``metrics.jsonl`` and ``model/``.
        recipe: settings; what is None is filled in for the number of pictures.
        observer: told what happens; by default warnings are Python's, and all else is silent.

    Returns:
        The state at the end, or where Ctrl-C or SIGTERM stopped it (``state.step < state.n_steps``).

    Raises:
        UsageError: no pictures, an impossible recipe, or a folder that holds another run, or in which another training
            is at work.
        TrainingError: the loss is not finite, nothing can be read or written, memory is not enough, or a process that
            reads pictures was killed.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    with ExitStack() as held:
        return _train(several, Path(run), recipe, observer or PythonWarnings(), held)


def _train(
    sources: Sequence[str | os.PathLike[str]],
    run: Path,
    recipe: Recipe,
    observer: Observer,
    held: ExitStack,
) -> TrainingState:
    """The body of :func:`train`; ``held`` gives the run folder back, whatever happens."""
    prepared = prepare_run(sources, run, recipe, warn=observer.warned, tell=observer.told)
    pictures, models = prepared.pictures, prepared.models
    recipe = measured(prepared.recipe, pictures, run=run, tell=observer.told)
    monitor: Monitor | None = None
    if Processes.will_be_first():
        monitor = Monitor(run, recipe, pictures, observer.warned)
        held.enter_context(claim_run_folder(run, recipe))
    held.enter_context(failures_in_words(run, recipe))
    processes = Processes.start(recipe.device, recipe.devices, recipe.num_nodes, strategy=recipe.strategy)
    held.push(lambda error, *_: processes.end_with_this_one() if error else None)
    _check_shares(recipe, processes)
    if not processes.is_first:
        observer, monitor = Observer(), None

    # Networks, and the state of an earlier start if there is one.
    torch.manual_seed(recipe.seed)
    state = TrainingState.create(
        recipe,
        build_network(recipe, is_student=True),
        build_network(recipe, is_student=False),
        steps_per_epoch=len(pictures) // recipe.batch_size,
        processes=processes,
        frozen_teachers=FrozenTeachers(models, recipe, processes.device) if models else None,
    )
    if not processes.is_first:  # stochastic depth of its own
        torch.manual_seed(recipe.seed + processes.rank)
    names = digest_of_names(pictures)
    saved, damaged = checkpoint.load_newest(run / "checkpoint")
    for message in damaged:
        observer.warned(message)
    if saved is not None:
        if saved["n_images"] != len(pictures):
            raise UsageError(
                f"{run} holds a run on {saved['n_images']} pictures, and there are {len(pictures)} now. Give the same "
                "ones to go on with it, or another -o with --init-from to train its weights on the new ones"
            )
        if saved.get("names", names) != names:
            observer.warned(
                f"{run} was begun with pictures of other names, or in another order; it goes on with those given now. "
                "For an exact resume give the same ones"
            )
        state.load_state_dict(saved)
    elif recipe.init_from is not None:
        begin_with(state, recipe.init_from, observer.warned)
    if state.step == 0:
        for counsel in prepared.advice():
            observer.told(counsel)
    if state.step == 0 and processes.is_first and (found := bits_found(pictures, recipe)) is not None:
        observer.told(found)
    observer.started(state, len(pictures), prepared.choices)

    def save() -> None:
        contents = {**state.state_dict(), "n_images": len(pictures), "names": names}
        whole = state.gathered(contents)
        if monitor is not None:
            contents |= {"health": monitor.state_dict(), "unreadable": unreadable_seen}
            checkpoint.save_checkpoint(run / "checkpoint", state.step, contents, keep=recipe.keep_checkpoints)
            model = write_teacher(run, whole.teacher, recipe, state.step, state.n_steps, len(pictures))
            observer.saved(state, model)
            monitor.saved(whole)
        processes.wait()

    loader = CropLoader(
        pictures,
        recipe,
        first_step=state.step,
        device=state.device,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    normalise = _Normalise(recipe, state.device)
    least = pictures_of_a_piece(recipe, state.student) if processes.world_size == 1 else 1
    unreadable_seen, in_a_row = saved.get("unreadable", 0) if saved else 0, 0
    learned = saved is not None
    listed: set[str] = set()
    last_save = time.monotonic()
    with ExitStack() as stack:
        interrupted = stack.enter_context(finish_step_on_interrupt(observer.told, processes.world_size))
        whole = state if state.step else state.gathered()
        if monitor is not None:
            log = stack.enter_context(MetricsLog(run / "metrics.jsonl", state.step))
            stack.enter_context(monitor)
            untrained = monitor.begin(state, whole, saved.get("health") if saved else None)
            if untrained is not None:
                log.write(untrained)
                observer.told(f"k-NN before training: {untrained['knn_teacher']:.1%}")
        del whole
        # A finished run has no step left after which it would save again.
        if any(
            processes.any(state.step == state.n_steps and processes.is_first and is_behind(run, state.step))
        ):
            save()
        pace = Pace()
        for readable, unreadable in _steps(loader, recipe.accumulate):
            pace.arrived()
            unreadable_seen += len(unreadable)
            for line in unreadable:
                if line not in listed:  # it comes again in every epoch
                    listed.add(line)
                    observer.warned(f"left out, cannot be read: {line}")
            result: StepResult | None = None
            batches = [batch for batch in readable if batch.n_images >= least]
            n_images = sum(batch.n_images for batch in batches) * processes.world_size
            if batches:
                in_a_row = 0
                if processes.world_size > 1:
                    batches = as_many_pieces(batches, recipe.accumulate)
                crops = [normalise(batch) for batch in batches]
                result = training_step(
                    state,
                    *crops,
                    hidden=_hidden(batches, state.device),
                    teaching=_teaching(batches, state.device),
                )
                learned = True
            else:
                # A few bad pictures may meet in one small batch; where nothing can be read any more, it is the disk.
                in_a_row = 0 if readable else in_a_row + len(unreadable)
                if processes.world_size > 1 or in_a_row >= min(_GIVE_UP, state.n_steps * recipe.batch_size):
                    raise TrainingError(
                        f"none of {in_a_row} pictures, up to those of step {state.step + 1}, can be read; the first: "
                        f"{unreadable[0]}. Look at them, then run the same command again: it goes on from the last "
                        "save"
                    )
                pass_over(state)
                if state.step == state.n_steps and not learned:
                    raise TrainingError(
                        f"none of {state.n_steps} steps had {least} pictures that can be read, which BatchNorm needs; "
                        f"one that cannot: {unreadable[0]}. Look at them, or give more pictures or a larger batch_size"
                    )
            pace.stepped(n_images)

            # Log. Reading the loss waits for the device, so not at every step.
            metrics = None
            log_due = state.step % recipe.log_every_steps == 0 or state.step == state.n_steps
            knn_due = evaluation_due(state)
            if result is not None and (log_due or knn_due):
                whole = state.gathered() if knn_due else state
                metrics = {**_metrics(state, result), **pace.measure(), "unreadable": unreadable_seen}
                _stop_unless_finite(metrics, run, state.dtype)
                if monitor is not None:
                    with pace.paused():
                        metrics |= monitor.measure(whole, metrics)
                    log.write(monitor.logged(metrics))
                del whole  # it may be a second pair of networks
            observer.stepped(state, n_images, metrics)

            # Save.
            epoch_done = state.step % state.steps_per_epoch == 0
            due = epoch_done and state.epoch % recipe.save_every_epochs == 0
            late = 0 < recipe.save_every_minutes * 60 < time.monotonic() - last_save
            late, stop = processes.any(late, interrupted())
            # What has learned nothing yet is no model.
            if learned and (due or late or stop or state.step == state.n_steps):
                if result is not None:
                    _stop_unless_finite(_metrics(state, result), run, state.dtype)
                with pace.paused():
                    save()
                last_save = time.monotonic()
            if stop:
                break
            pace.waiting()
    return state


def _check_shares(recipe: Recipe, processes: Processes) -> None:
    """The recipe checked this for the processes it names; a launcher may have started others."""
    pieces = recipe.accumulate * processes.world_size
    if recipe.batch_size % pieces:
        raise UsageError(
            f"batch_size={recipe.batch_size} cannot be shared out over {processes.world_size} processes with "
            f"accumulate={recipe.accumulate}; use a multiple of {pieces}"
        )


def _steps(loader: Iterable[Batch | list[str]], accumulate: int) -> Iterator[tuple[list[Batch], list[str]]]:
    """The pieces of each step, and a line for each of its pictures that could not be read."""
    pieces = iter(loader)
    while group := list(itertools.islice(pieces, accumulate)):
        batches = [piece for piece in group if isinstance(piece, Batch)]
        unreadable = [
            line for piece in group for line in (piece.unreadable if isinstance(piece, Batch) else piece)
        ]
        yield batches, unreadable


class _Normalise:
    """Crops of 0…255 to normalised float32 on the device, global crops first."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        # Taken to the device once: a copy from ordinary memory waits for all that the device has yet to do.
        self.mean, self.std = (
            torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in normalisation(recipe)
        )

    def __call__(self, batch: Batch) -> list[Tensor]:
        device = self.mean.device
        crops = [c for c in (batch.global_crops, batch.local_crops) if c is not None]
        return [(sent(c, device).float() - self.mean) / self.std for c in crops]


def _hidden(batches: Sequence[Batch], device: torch.device) -> list[HiddenPatches] | None:
    """Of each piece, where patches are hidden."""
    return [HiddenPatches.of(batch.masks, device) for batch in batches if batch.masks is not None] or None


def _teaching(batches: Sequence[Batch], device: torch.device) -> list[Tensor] | None:
    """Of each piece, where not every teacher teaches all."""
    return [sent(batch.teaching, device) for batch in batches if batch.teaching is not None] or None


def _metrics(state: TrainingState, result: StepResult) -> dict[str, Any]:
    """Plain numbers of the step that was just done."""
    done = state.step - 1
    loss = float(result.loss)
    entropy = None if result.teacher_entropy is None else float(result.teacher_entropy)
    return {
        "step": state.step,
        "epoch": round(state.step / state.steps_per_epoch, 4),
        "loss": loss,
        "teacher_entropy": entropy,
        "kl": None if entropy is None else loss - entropy,
        **({} if result.ibot_loss is None else {"ibot_loss": float(result.ibot_loss)}),
        **({} if result.foreground_kl is None else {"foreground_kl": float(result.foreground_kl)}),
        # Not finite at a step that float16's scaler passes over; JSON has no such numbers.
        "grad_norm": norm if math.isfinite(norm := float(result.grad_norm)) else None,
        "lr": float(state.schedules.lr[done]),
        "weight_decay": float(state.schedules.weight_decay[done]),
        "teacher_momentum": float(state.schedules.teacher_momentum[done])
        if state.recipe.teacher == "momentum"
        else None,
        # Directions have none; a loss that compares similarities has one of its own, which does not change.
        "teacher_temp": float(state.schedules.teacher_temp[done])
        if state.targets.are_probabilities
        else state.loss.teacher_temp,
    }


def _stop_unless_finite(metrics: dict[str, Any], run: Path, dtype: torch.dtype) -> None:
    watched = ("loss", "ibot_loss", "foreground_kl")
    wrong = [key for key in watched if not math.isfinite(metrics.get(key, 0.0))]
    if wrong:
        kept = checkpoint.checkpoints(run / "checkpoint")
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        finer = "" if dtype == torch.float32 else " or train with --set precision=fp32"
        raise TrainingError(
            f"the {wrong[0]} is {metrics[wrong[0]]} at step {metrics['step']} (learning rate "
            f"{metrics.get('lr', 'unknown')}); {last}. Lower lr{finer}: changed settings are another run, which needs "
            "another -o"
        )
