"""Finds what would stop a run before its first step, without starting it: for ``dinokit train --explain``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dinokit.errors import DeviceError
from dinokit.runtime.torch import pick_device
from dinokit.training.distillation.frozen_teacher import FrozenTeachers
from dinokit.training.monitoring.evaluation import find_labelled_set
from dinokit.training.networks.initial_weights import begin_with
from dinokit.training.networks.network import build_network
from dinokit.training.prepare import PreparedRun
from dinokit.training.run.failures import failures_in_words
from dinokit.training.run.state import TrainingState

__all__ = ["check_ahead"]


def check_ahead(
    prepared: PreparedRun,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Builds the networks and looks up everything that the recipe names; writes nothing.

    Args:
        prepared: from :func:`dinokit.training.prepare.prepare_run`.
        warn: called with the parts that ``init_from`` lacks, and if this machine lacks the device: a run may be
            prepared on another machine than it is trained on.

    Raises:
        UsageError, ModelError, TrainingError: what the run would raise.
    """
    with failures_in_words(None, prepared.recipe):
        _check_ahead(prepared, warn)


def _check_ahead(prepared: PreparedRun, warn: Callable[[str], None]) -> None:
    recipe, models = prepared.recipe, prepared.models
    try:
        pick_device(recipe.device)
    except DeviceError as error:
        warn(str(error))
    for source in (recipe.labelled, recipe.labelled_queries):
        if source is not None:
            find_labelled_set(source, channels=recipe.channels)
    # On the CPU, whatever the run's device, and without measuring mean and std, which change no shape.
    mean, std = (None if values == "auto" else values for values in (recipe.mean, recipe.std))
    some = (0.5,) * recipe.channels
    here = replace(
        recipe,
        mean=mean or some,
        std=std or some,
        device="cpu",
        precision="fp32",
        compile=False,
        strategy="ddp",
    )
    student = build_network(here, is_student=True)
    if recipe.init_from is None:
        return
    cpu = torch.device("cpu")
    state = TrainingState.create(
        here,
        student,
        build_network(here, is_student=False),
        steps_per_epoch=max(1, len(prepared.pictures) // recipe.batch_size),
        frozen_teachers=FrozenTeachers(models, here, cpu) if models else None,
    )
    begin_with(state, recipe.init_from, warn)
