"""What would stop a run before its first step, found without beginning one: for ``dinokit train --explain``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from dinokit.training.distillation.assignment import Teaching
from dinokit.training.distillation.frozen_teacher import FoundTeacher, FrozenTeachers
from dinokit.training.monitoring.evaluation import find_labelled_set
from dinokit.training.networks.initial_weights import begin_with
from dinokit.training.recipe import Recipe
from dinokit.training.run.state import TrainingState, build_network
from dinokit.training.views.pictures import Pictures

__all__ = ["check_ahead"]


def check_ahead(
    recipe: Recipe,
    pictures: Pictures,
    models: list[FoundTeacher],
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Builds the networks, and looks for all that the recipe names; nothing is written.

    Args:
        recipe: complete settings.
        pictures: to be trained on.
        models: the finished teachers, if there are any.
        warn: told what ``init_from`` has not got.

    Raises:
        UsageError, ModelError: what the run would say.
    """
    if recipe.distill_pictures is not None:
        Teaching(recipe).check(pictures)
    for source in (recipe.labelled, recipe.labelled_queries):
        if source is not None:
            find_labelled_set(source, channels=recipe.channels)
    # Here, whatever the device that the run will have, and before mean and std are measured, which change no shape.
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
        steps_per_epoch=max(1, len(pictures) // recipe.batch_size),
        frozen_teachers=FrozenTeachers(models, here, cpu) if models else None,
    )
    begin_with(state, recipe.init_from, warn)
