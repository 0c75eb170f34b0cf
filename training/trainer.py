"""The training loop of DINO, to be read from top to bottom.

Source: Caron et al. 2021, Algorithm 1; facebookresearch/dino `main_dino.py`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from dinokit.errors import TrainingError
from dinokit.training.devices.pieces import as_many_pieces
from dinokit.training.interruption import finish_step_on_interrupt
from dinokit.training.monitoring.monitor import evaluation_due
from dinokit.training.monitoring.pace import Pace
from dinokit.training.monitoring.step_metrics import step_metrics, stop_unless_finite
from dinokit.training.networks.network import build_network, pictures_of_a_piece
from dinokit.training.observer import Observer, PythonWarnings
from dinokit.training.recipe import Recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.run_folder import MetricsLog
from dinokit.training.run.state import TrainingState
from dinokit.training.run.teacher_folder import is_behind, write_teacher
from dinokit.training.setup import ActiveRun, announce, restore, set_up
from dinokit.training.step import StepResult, pass_over, training_step
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.step_pieces import (
    Normalise,
    hidden_patches,
    pieces_of_steps,
    teaching_weights,
)

__all__ = ["Observer", "StepResult", "TrainingState", "build_network", "train", "training_step"]


def train(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    run: str | os.PathLike[str],
    recipe: Recipe,
    *,
    observer: Observer | None = None,
) -> TrainingState:
    """Pre-trains a backbone, or resumes the run that is in the folder.

    Two trainings in threads of one process draw from the same torch generator, so neither is exactly repeatable; give
    each its own process for that.

    Args:
        sources: pictures, see :func:`dinokit.training.views.pictures.collect_pictures`: one source, or several.
        run: folder for ``recipe.yaml``, ``checkpoint/``, ``metrics.jsonl`` and ``model/``.
        recipe: settings; what is None is filled in for the number of pictures.
        observer: receives what the run reports; by default warnings go to :mod:`warnings`, and the rest is silent.

    Returns:
        The state at the end, or where Ctrl-C, SIGTERM or SIGHUP stopped it (``state.step < state.n_steps``).

    Raises:
        UsageError: no pictures, an impossible recipe, or the folder holds another run or is in use by another training.
        TrainingError: the loss is not finite, nothing can be read or written, there is not enough memory, or a process
            that reads pictures was killed.
    """
    several = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    with ExitStack() as held:
        active = set_up(several, Path(run), recipe, observer or PythonWarnings(), held)
        restore(active)
        announce(active)
        interrupted = held.enter_context(
            finish_step_on_interrupt(active.observer.told, active.processes.world_size)
        )
        log = _begin_to_watch(active, held)
        _finish_saving(active)
        _loop(active, log, interrupted)
        return active.state


def _loop(active: ActiveRun, log: MetricsLog | None, interrupted: Callable[[], bool]) -> None:
    """Trains from ``state.step`` to the end of the run, or until it is interrupted."""
    state, recipe, processes, unreadable = active.state, active.recipe, active.processes, active.unreadable
    loader = CropLoader(
        active.pictures,
        recipe,
        first_step=state.step,
        device=state.device,
        rank=processes.rank,
        world_size=processes.world_size,
    )
    normalise = Normalise(recipe, state.device)
    least = pictures_of_a_piece(recipe, state.student) if processes.world_size == 1 else 1
    last_save = time.monotonic()
    pace = Pace()
    for readable, unreadable_lines in pieces_of_steps(loader, recipe.accumulate):
        # Crops: pieces with too few readable pictures are left out.
        pace.arrived()
        unreadable.add(unreadable_lines)
        batches = [batch for batch in readable if batch.n_images >= least]
        n_images = sum(batch.n_images for batch in batches) * processes.world_size

        # Schedules, teacher, student, loss, step, EMA.
        result: StepResult | None = None
        if batches:
            result = _train_on(batches, state, normalise)
            unreadable.step_trained()
            active.has_learned = True
        else:
            unreadable.step_skipped(state.step + 1, unreadable_lines, some_readable=bool(readable))
            pass_over(state)
            _stop_if_nothing_was_learned(active, least, unreadable_lines)
        pace.stepped(n_images)

        # Log. Reading the loss waits for the device, so not at every step.
        metrics = None
        log_due = state.step % recipe.log_every_steps == 0 or state.step == state.n_steps
        knn_due = evaluation_due(state)
        if result is not None and (log_due or knn_due):
            whole = state.gathered() if knn_due else state
            metrics = {**step_metrics(state, result), **pace.measure(), "unreadable": unreadable.seen}
            stop_unless_finite(metrics, active.folder, state.dtype)
            if active.monitor is not None and log is not None:
                with pace.paused():
                    metrics |= active.monitor.measure(whole, metrics)
                log.write(active.monitor.logged(metrics))
            del whole  # it may be a second pair of networks
        active.observer.stepped(state, n_images, metrics)

        # Save. All processes save at the same step.
        epoch_done = state.step % state.steps_per_epoch == 0
        due = epoch_done and state.epoch % recipe.save_every_epochs == 0
        late = 0 < recipe.save_every_minutes * 60 < time.monotonic() - last_save
        late, stop = processes.any(late, interrupted())
        # Before the first trained step there is no model to save.
        if active.has_learned and (due or late or stop or state.step == state.n_steps):
            if result is not None:
                stop_unless_finite(step_metrics(state, result), active.folder, state.dtype)
            with pace.paused():
                _save(active)
            last_save = time.monotonic()
        if stop:
            break
        pace.waiting()


def _begin_to_watch(active: ActiveRun, held: ExitStack) -> MetricsLog | None:
    """Opens the metrics in the first process, and for a new run measures the untrained network."""
    state, monitor = active.state, active.monitor
    whole = state if state.step else state.gathered()  # all processes gather together
    if monitor is None:
        return None
    log = held.enter_context(MetricsLog(active.folder / "metrics.jsonl", state.step))
    held.enter_context(monitor)
    untrained = monitor.begin(state, whole, active.saved_health)
    if untrained is not None:
        log.write(untrained)
        active.observer.told(f"k-NN before training: {untrained['knn_teacher']:.1%}")
    return log


def _train_on(batches: list[Batch], state: TrainingState, normalise: Normalise) -> StepResult:
    """One training step on the pieces of a batch."""
    if state.processes.world_size > 1:
        batches = as_many_pieces(batches, state.recipe.accumulate)
    return training_step(
        state,
        *(normalise(batch) for batch in batches),
        hidden=hidden_patches(batches, state.device),
        teaching=teaching_weights(batches, state.device),
    )


def _stop_if_nothing_was_learned(active: ActiveRun, least: int, unreadable: list[str]) -> None:
    state = active.state
    if state.step == state.n_steps and not active.has_learned:
        raise TrainingError(
            f"none of {state.n_steps} steps had {least} readable pictures, which BatchNorm needs; an unreadable one: "
            f"{unreadable[0]}. Check the pictures, or give more of them or a larger batch_size"
        )


def _save(active: ActiveRun) -> None:
    """Writes the checkpoint, the model folder and the report; called by all processes together."""
    state, recipe, n_images = active.state, active.recipe, len(active.pictures)
    contents = {**state.state_dict(), "n_images": n_images, "names": active.names}
    whole = state.gathered(contents)
    if active.monitor is not None:
        contents |= {"health": active.monitor.state_dict(), "unreadable": active.unreadable.seen}
        checkpoint.save_checkpoint(
            active.folder / "checkpoint", state.step, contents, keep=recipe.keep_checkpoints
        )
        model = write_teacher(active.folder, whole.teacher, recipe, state.step, state.n_steps, n_images)
        active.observer.saved(state, model)
        active.monitor.saved(whole)
    active.processes.wait()


def _finish_saving(active: ActiveRun) -> None:
    """Saves a finished run whose model folder is older than its checkpoint: it has no step left to save after."""
    state = active.state
    finished_and_behind = (
        state.step == state.n_steps and active.processes.is_first and is_behind(active.folder, state.step)
    )
    if any(active.processes.any(finished_and_behind)):
        _save(active)
