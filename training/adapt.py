"""Fills in what a recipe leaves open, from the number of pictures, with reasons.

The reference's values are made for ImageNet's 1.3 million pictures. With few pictures, many prototypes, a warm
teacher or a slow one lead to collapse or to nothing learned (issues #43, #61, #225, #246, #273 of
facebookresearch/dino); the rules of thumb below are interpolated between what is known to work at 10,000
pictures and the reference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.card.record import name_of_average
from dinokit.model_folder.architecture import is_vit_name
from dinokit.pictures.bands import is_photographic
from dinokit.training.recipe import Recipe
from dinokit.wording import counted

__all__ = ["Choice", "adapt", "advice", "slow_average"]

_FEW, _MANY = 10_000, 1_000_000
_MOST_LEFT = 0.1
"""Share of the random initialisation in the final model below which there is no warning."""
_RATE_RISE = "10 epochs as in the reference, at most a tenth of the run"
_TEMPERATURE_RISE = "30 epochs as in the reference's best runs, at most 30 % of the run"


@dataclass(frozen=True)
class Choice:
    """One setting that was filled in."""

    key: str
    value: Any
    reason: str


def advice(recipe: Recipe, n_images: int) -> str | None:
    """A hint if a ViT would train from scratch on few pictures; otherwise None.

    A Vision Transformer has to learn from data what a convolution has built in. On small sets the published
    runs of ViTs stay far behind those of a ResNet-18 (Imagenette, k-NN: 61 % against 89 %, lightly's benchmark).
    """
    if n_images >= _FEW or recipe.init_from or recipe.distill_from or not is_vit_name(recipe.arch):
        return None
    return (
        f"a Vision Transformer with random initial weights learns little from so few pictures ({n_images:,}); "
        "start from a pretrained one (--init-from dino_vits16 with --set arch=vit_small_patch16_224), or train a "
        "convolutional network (--recipe resnet50)"
    )


def slow_average(recipe: Recipe, momenta: NDArray[np.float64]) -> str | None:
    """A warning if the run is too short for the EMA to forget its random initialisation; otherwise None.

    Args:
        recipe: complete settings.
        momenta: teacher momentum at each step of the run.
    """
    left = float(np.prod(momenta))
    if recipe.teacher != "momentum" or recipe.init_from is not None or left < _MOST_LEFT:
        return None
    # With a cosine to 1, the mean of 1 - momentum is half its first value.
    enough = math.floor(max(0.5, 1 + 2 * math.log(_MOST_LEFT / 10) / len(momenta)) * 100) / 100
    faster = recipe.teacher_momentum is None or enough < recipe.teacher_momentum
    return (
        f"{len(momenta)} steps are few: {left:.0%} of the random weights that the "
        f"{name_of_average(recipe.distill_from)} starts with will be left in the final model. Use a smaller batch_size"
        + (f", more epochs, or --set teacher_momentum={enough}" if faster else " or more epochs")
    )


def adapt(
    recipe: Recipe,
    n_images: int,
    *,
    teacher_dim: int | None = None,
    licence: str | None = None,
    began: Recipe | None = None,
) -> tuple[Recipe, list[Choice]]:
    """Returns the recipe with every ``None`` filled in, and the choices made.

    Args:
        recipe: settings; what is not None stays, if the run is long enough for it and the set large enough.
        n_images: pictures per epoch.
        teacher_dim: total width of the frozen teachers' embeddings, which the head predicts; None without
            ``distill_from``.
        licence: of the initial weights, if it is known.
        began: for a run that resumes, the recipe it began with: its choices stay, even if a key that may change
            (``accumulate``) or a later version of these rules would lead to others.
    """
    # 0 at ten thousand pictures or fewer, 1 at a million or more, linear in the logarithm.
    size = math.log(min(max(n_images, _FEW), _MANY) / _FEW) / math.log(_MANY / _FEW)
    final_temp = recipe.teacher_temp or round(0.04 + 0.03 * size, 3)
    first_temp = recipe.warmup_teacher_temp or min(0.04, final_temp)
    pictures = "1 picture" if n_images == 1 else f"{n_images:,} pictures"
    if teacher_dim is None:
        prototypes = 2 ** round(11 + 5 * size)
        reason = f"{pictures}: 2048 prototypes for few pictures, 65536 for a million"
    else:
        prototypes, reason = teacher_dim, f"the width of the embeddings of {_each_once(recipe.teachers)}"
    candidates = [
        Choice("n_prototypes", prototypes, reason),
        Choice(
            "teacher_momentum",
            round(0.99 + 0.006 * size, 4),
            f"{pictures}: few steps, so the {name_of_average(recipe.distill_from)} must follow faster than with the "
            "reference's 0.996",
        ),
        Choice(
            "warmup_teacher_temp",
            first_temp,
            "the reference's value" if first_temp == 0.04 else "the reference's 0.04 is above teacher_temp",
        ),
        Choice(
            "teacher_temp",
            final_temp,
            f"{pictures}: above 0.04 only with many pictures (0.07 in the reference's best runs)",
        ),
        Choice(
            "warmup_teacher_temp_epochs",
            0 if first_temp == final_temp else _temperature_rise(recipe),
            "the temperature does not change" if first_temp == final_temp else _TEMPERATURE_RISE,
        ),
        Choice(
            "warmup_epochs",
            _rate_rise(recipe),
            _RATE_RISE,
        ),
    ]
    if licence is not None:
        reason = (
            f"that of {recipe.init_from}, its initial weights" if recipe.init_from else "as the run began"
        )
        candidates.append(Choice("licence", licence, reason))
    if not is_photographic(recipe.channels):
        reason = f"ImageNet has no values for {recipe.channels} channels: measured on the pictures"
        candidates += [Choice("mean", "auto", reason), Choice("std", "auto", reason)]
    made = [c for c in candidates if getattr(recipe, c.key) is None]
    made += _shorter_rises(recipe, temperature_changes=first_temp != final_temp)
    frozen = recipe.freeze_last_layer_epochs
    if frozen >= recipe.epochs and recipe.loss != "relations":  # which has no prototypes
        reason = f"{counted(frozen, 'epoch')} of the run's {recipe.epochs} would never train the prototypes"
        made.append(Choice("freeze_last_layer_epochs", 0, reason))
    if recipe.grey_probability and not is_photographic(recipe.channels):
        reason = f"{recipe.channels} channels are not colours: no grey, hue or saturation; other changes apply to all"
        made.append(Choice("grey_probability", 0.0, reason))
    if n_images < recipe.batch_size:
        pieces = recipe.accumulate * recipe.devices * recipe.num_nodes
        reason = f"the set has only {pictures}" + (f", in {pieces} equal pieces" if pieces > 1 else "")
        # Fewer pictures than pieces cannot be divided: the recipe refuses that.
        made.append(Choice("batch_size", n_images // pieces * pieces or n_images, reason))
    if began is not None:
        made = [_as_it_began(choice, began, n_images, teacher_dim) for choice in made]
    return replace(recipe, **{c.key: c.value for c in made}), made


def _as_it_began(choice: Choice, began: Recipe, n_images: int, teacher_dim: int | None) -> Choice:
    value = getattr(began, choice.key)
    if value == choice.value:
        return choice
    # Other teachers or fewer pictures force another run, which is reported.
    if (choice.key == "n_prototypes" and teacher_dim is not None) or (
        choice.key == "batch_size" and value > n_images
    ):
        return choice
    return Choice(choice.key, value, "as the run began")


def _each_once(teachers: Sequence[str]) -> str:
    """``runs/a, runs/b (3 times) and hog (2 times)``: naming a teacher several times is its weight."""
    named = [name if count == 1 else f"{name} ({count} times)" for name, count in Counter(teachers).items()]
    return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)


def _rate_rise(recipe: Recipe) -> float:
    return min(10, round(recipe.epochs / 10, 1))


def _temperature_rise(recipe: Recipe) -> int:
    return min(30, round(recipe.epochs * 0.3))


def _shorter_rises(recipe: Recipe, *, temperature_changes: bool) -> list[Choice]:
    """Shorter warm-ups: a recipe for hundreds of epochs, run for a few, would end during its warm-up or soon after."""
    made = []
    rate, temperature = recipe.warmup_epochs, recipe.warmup_teacher_temp_epochs
    if rate is not None and rate > recipe.epochs / 2:
        whole = "the run's" if rate > recipe.epochs else "half of the run's"
        reason = f"{rate:g} are more than {whole} {recipe.epochs}: {_RATE_RISE}"
        made.append(Choice("warmup_epochs", _rate_rise(recipe), reason))
    if temperature is not None and temperature > recipe.epochs and temperature_changes:
        reason = f"{temperature} are more than the run's {recipe.epochs}: {_TEMPERATURE_RISE}"
        made.append(Choice("warmup_teacher_temp_epochs", _temperature_rise(recipe), reason))
    return made
