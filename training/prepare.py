"""What a run needs to know before it builds its networks: pictures, frozen teachers, the complete recipe."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dinokit.training.adapt import Choice, adapt, advice, slow_average
from dinokit.training.distillation.assignment import Teaching
from dinokit.training.distillation.frozen_teacher import FoundTeacher, find_teachers, width_of
from dinokit.training.networks.initial_weights import licence_at_start
from dinokit.training.recipe import Recipe
from dinokit.training.run.run_folder import recipe_of
from dinokit.training.run.state import make_schedules
from dinokit.training.views.pictures import TrainingPictures, collect_pictures

__all__ = ["PreparedRun", "prepare_run"]


@dataclass(frozen=True)
class PreparedRun:
    """The inputs of a run, found and checked; nothing is written yet."""

    recipe: Recipe
    """Complete, except that ``mean`` and ``std`` may still be "auto"."""
    choices: list[Choice]
    """The values that were filled in, with the reasons."""
    pictures: TrainingPictures
    models: list[FoundTeacher]
    """The frozen teachers of a distillation, if any."""

    def advice(self) -> list[str]:
        """Warnings and hints to show before the first step of a new run."""
        n_images = len(self.pictures)
        momenta = make_schedules(self.recipe, n_images // self.recipe.batch_size).teacher_momentum
        counsels = (advice(self.recipe, n_images), slow_average(self.recipe, momenta))
        return [counsel for counsel in counsels if counsel is not None]


def prepare_run(
    sources: Sequence[str | os.PathLike[str]],
    run: Path | None,
    recipe: Recipe,
    *,
    warn: Callable[[str], None],
    tell: Callable[[str], None],
) -> PreparedRun:
    """Finds the pictures and the teachers, and completes the recipe.

    Args:
        sources: see :func:`dinokit.training.views.pictures.collect_pictures`.
        run: the run folder, which may hold an interrupted run; None if there is none yet.
        recipe: settings; what is None is filled in for the number of pictures.
        warn: called with each problem of a source, such as a damaged archive.
        tell: called before something is copied, which may take long.

    Raises:
        UsageError: no pictures, or an impossible recipe.
    """
    pictures = collect_pictures(sources, channels=recipe.channels, run=run, warn=warn, tell=tell)
    models = find_teachers(recipe)
    complete, choices = adapt(
        recipe,
        len(pictures),
        teacher_dim=width_of(models) or None,
        licence=licence_at_start(recipe, run),
        began=None if run is None else recipe_of(run),
    )
    if complete.distill_pictures is not None:
        Teaching(complete).check(pictures)
    return PreparedRun(complete, choices, pictures, models)
