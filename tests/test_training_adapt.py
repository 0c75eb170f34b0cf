"""What a recipe leaves open, filled in for the number of pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from dinokit.errors import UsageError
from dinokit.training.adapt import adapt, slow_average
from dinokit.training.recipe import Recipe


def test_a_batch_of_few_pictures_still_comes_in_equal_pieces() -> None:
    recipe = Recipe(batch_size=64, accumulate=4)
    adapted, choices = adapt(recipe, 11)
    assert adapted.batch_size == 8
    reasons = {choice.key: choice.reason for choice in choices}
    assert reasons["batch_size"] == "the set has only 11 pictures, in 4 equal pieces"
    assert adapt(recipe, 64)[0].batch_size == 64
    assert adapt(Recipe(batch_size=64), 11)[0].batch_size == 11
    with pytest.raises(UsageError, match="batch_size=3 is not a multiple of"):
        adapt(recipe, 3)


def momenta_of(start: float, steps: int) -> np.ndarray:
    """A cosine from ``start`` to 1, by its formula."""
    return 1 - (1 - start) * (np.cos(np.pi * np.arange(steps) / steps) + 1) / 2


def test_it_is_told_when_the_average_stays_where_it_began() -> None:
    told = slow_average(Recipe(), momenta_of(0.99, 100))
    assert (
        told is not None and "100 steps are few" in told and "teacher begins with, 60% will be left" in told
    )
    # What it advises leaves a hundredth, and nothing is said any more.
    advised = float(told.split("teacher_momentum=")[1])
    assert np.prod(momenta_of(advised, 100)) < 0.02
    assert slow_average(Recipe(), momenta_of(advised, 100)) is None
    assert slow_average(Recipe(), momenta_of(0.996, 100_000)) is None
    distilled = slow_average(Recipe(distill_from="starter", loss="relations"), momenta_of(0.99, 100))
    assert distilled is not None and "the moving average begins with" in distilled
    assert (
        slow_average(Recipe(init_from="starter"), momenta_of(0.99, 100)) is None
    )  # which is no bad beginning
    assert slow_average(Recipe(teacher="student"), momenta_of(0.99, 100)) is None
    fewest = slow_average(Recipe(), momenta_of(0.99, 1))
    assert fewest is not None and "teacher_momentum=0.5" in fewest


@pytest.mark.parametrize(("epochs", "rate", "temperature"), [(1, 0.1, 0), (5, 0.5, 2), (9, 0.9, 3)])
def test_a_long_recipe_that_is_tried_for_a_few_epochs_still_gets_there(
    epochs: int, rate: float, temperature: int
) -> None:
    long = Recipe(
        warmup_epochs=10, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30
    )
    adapted, choices = adapt(replace(long, epochs=epochs), 2000)
    assert (adapted.warmup_epochs, adapted.warmup_teacher_temp_epochs) == (rate, temperature)
    reasons = {choice.key: choice.reason for choice in choices}
    assert reasons["warmup_epochs"].startswith(f"10 are more than the run's {epochs}: ")
    assert reasons["warmup_teacher_temp_epochs"].startswith(f"30 are more than the run's {epochs}: ")
    again, choices = adapt(adapted, 2000)  # as it goes on from its own recipe.yaml
    assert again == adapted and not {"warmup_epochs", "warmup_teacher_temp_epochs"} & {c.key for c in choices}
    # A run that is long enough, or a temperature that does not change, is left as it is.
    assert adapt(replace(long, epochs=30), 2000)[0].warmup_teacher_temp_epochs == 30
    steady = replace(long, epochs=epochs, warmup_teacher_temp=0.07)
    assert adapt(steady, 2000)[0].warmup_teacher_temp_epochs == 30
    left_open = adapt(replace(long, epochs=epochs, warmup_epochs=None), 2000)[0]
    assert left_open.warmup_epochs == rate


def test_a_teacher_that_counts_several_times_is_named_once() -> None:
    recipe = Recipe(distill_from=("runs/a", "runs/b", "runs/b", "hog", "runs/b"), loss="relations")
    _, made = adapt(recipe, 5000, teacher_dim=6)
    (reason,) = (choice.reason for choice in made if choice.key == "n_prototypes")
    assert reason.endswith("embeddings of runs/a, runs/b (3 times) and hog")
