"""Everything before the first step: inputs, run folder, processes, networks, and the state of an earlier start."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dinokit.errors import UsageError
from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.frozen_teacher import FrozenTeachers
from dinokit.training.monitoring.monitor import Monitor
from dinokit.training.networks.initial_weights import begin_with
from dinokit.training.networks.network import build_network
from dinokit.training.observer import Observer
from dinokit.training.prepare import PreparedRun, prepare_run
from dinokit.training.recipe import Recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.failures import failures_in_words
from dinokit.training.run.run_folder import claim_run_folder
from dinokit.training.run.state import TrainingState
from dinokit.training.views.bit_depth import bits_found
from dinokit.training.views.normalisation import measured
from dinokit.training.views.pictures import TrainingPictures, digest_of_names
from dinokit.training.views.unreadable import UnreadablePictures

__all__ = ["ActiveRun", "announce", "restore", "set_up"]


@dataclass
class ActiveRun:
    """A run that is set up: its folder is claimed, its processes are joined, its networks are on the device."""

    folder: Path
    recipe: Recipe
    """Complete."""
    prepared: PreparedRun
    names: str
    """Digest of the pictures' names and their order."""
    state: TrainingState
    observer: Observer
    """Silent in all processes but the first."""
    monitor: Monitor | None
    """In the first process only."""
    unreadable: UnreadablePictures
    saved_health: dict[str, Any] | None = None
    """The monitor's part of the checkpoint that the run resumes from."""
    has_learned: bool = False
    """Whether any step so far has trained, in this start or an earlier one."""

    @property
    def pictures(self) -> TrainingPictures:
        return self.prepared.pictures

    @property
    def processes(self) -> Processes:
        return self.state.processes


def set_up(
    sources: Sequence[str | os.PathLike[str]],
    folder: Path,
    recipe: Recipe,
    observer: Observer,
    held: ExitStack,
) -> ActiveRun:
    """Finds the inputs, claims the run folder, starts the processes and builds the networks.

    Args:
        sources, recipe, observer: see :func:`dinokit.training.trainer.train`.
        folder: the run folder.
        held: releases the folder and ends the processes on exit; turns errors from outside into TrainingError.
    """
    prepared = prepare_run(sources, folder, recipe, warn=observer.warned, tell=observer.told)
    pictures, models = prepared.pictures, prepared.models
    recipe = measured(prepared.recipe, pictures, run=folder, tell=observer.told)
    monitor: Monitor | None = None
    if Processes.will_be_first():
        monitor = Monitor(folder, recipe, pictures, observer.warned)
        held.enter_context(claim_run_folder(folder, recipe))
    held.enter_context(failures_in_words(folder, recipe))

    processes = Processes.start(recipe.device, recipe.devices, recipe.num_nodes, strategy=recipe.strategy)
    held.push(lambda error, *_: processes.end_with_this_one() if error else None)
    _check_shares(recipe, processes)
    if not processes.is_first:
        observer, monitor = Observer(), None

    torch.manual_seed(recipe.seed)
    state = TrainingState.create(
        recipe,
        build_network(recipe, is_student=True),
        build_network(recipe, is_student=False),
        steps_per_epoch=len(pictures) // recipe.batch_size,
        processes=processes,
        frozen_teachers=FrozenTeachers(models, recipe, processes.device) if models else None,
    )
    if not processes.is_first:  # each process draws its own stochastic depth
        torch.manual_seed(recipe.seed + processes.rank)
    unreadable = UnreadablePictures(
        n_pictures=state.n_steps * recipe.batch_size,
        is_alone=processes.world_size == 1,
        warn=observer.warned,
    )
    names = digest_of_names(pictures)
    return ActiveRun(folder, recipe, prepared, names, state, observer, monitor, unreadable)


def restore(active: ActiveRun) -> None:
    """Loads the newest checkpoint, or the weights of ``init_from`` if there is no checkpoint.

    Raises:
        UsageError: the checkpoint is of a run on other pictures, or with another frozen teacher.
    """
    folder, n_images = active.folder, len(active.pictures)
    saved, damaged = checkpoint.load_newest(folder / "checkpoint")
    for message in damaged:
        active.observer.warned(message)
    if saved is None:
        if active.recipe.init_from is not None:
            begin_with(active.state, active.recipe.init_from, active.observer.warned)
        return
    if saved["n_images"] != n_images:
        raise UsageError(
            f"{folder} holds a run on {saved['n_images']} pictures, but {n_images} are given now. Give the same "
            "pictures to resume it, or choose another -o and --init-from to train its weights on the new ones"
        )
    if saved.get("names", active.names) != active.names:
        active.observer.warned(
            f"{folder} was begun with pictures of other names, or in another order; it resumes with those given now. "
            "For an exact resume give the same ones"
        )
    active.state.load_state_dict(saved)
    active.unreadable.seen = saved.get("unreadable", 0)
    active.saved_health = saved.get("health")
    active.has_learned = True


def announce(active: ActiveRun) -> None:
    """Reports the start to the observer, and for a new run what is worth knowing before its first step."""
    state, observer = active.state, active.observer
    if state.step == 0:
        for counsel in active.prepared.advice():
            observer.told(counsel)
        if active.processes.is_first and (found := bits_found(active.pictures, active.recipe)) is not None:
            observer.told(found)
    observer.started(state, len(active.pictures), active.prepared.choices)


def _check_shares(recipe: Recipe, processes: Processes) -> None:
    """The recipe was checked for the number of processes that it names; a launcher may have started another number."""
    pieces = recipe.accumulate * processes.world_size
    if recipe.batch_size % pieces:
        raise UsageError(
            f"batch_size={recipe.batch_size} cannot be divided over {processes.world_size} processes with "
            f"accumulate={recipe.accumulate}; use a multiple of {pieces}"
        )
