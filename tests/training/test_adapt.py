"""What a recipe leaves open, filled in for the number of pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("torch")

from dinokit.errors import UsageError
from dinokit.training.adapt import Choice, adapt, advice, slow_average
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


@pytest.mark.parametrize(
    ("n_images", "prototypes", "momentum", "temperature"),
    [
        (300, 2**11, 0.99, 0.04),
        (10_000, 2**11, 0.99, 0.04),
        (100_000, 2**14, 0.993, 0.055),  # half-way, in the logarithm
        (1_000_000, 2**16, 0.996, 0.07),  # the reference's
        (50_000_000, 2**16, 0.996, 0.07),
    ],
)
def test_prototypes_momentum_and_temperature_grow_with_the_number_of_pictures(
    n_images: int, prototypes: int, momentum: float, temperature: float
) -> None:
    adapted, _ = adapt(Recipe(), n_images)
    assert adapted.n_prototypes == prototypes
    assert (adapted.teacher_momentum, adapted.teacher_temp) == (momentum, temperature)
    assert adapted.warmup_teacher_temp == 0.04


def test_pictures_of_other_channels_are_measured_for_their_mean() -> None:
    several, choices = adapt(replace(Recipe(), channels=5), 300)
    assert (several.mean, several.std) == ("auto", "auto")
    assert "measured on the pictures" in {choice.key: choice.reason for choice in choices}["std"]
    assert adapt(Recipe(), 300)[0].mean != "auto"


def momenta_of(start: float, steps: int) -> np.ndarray:
    """A cosine from ``start`` to 1, by its formula."""
    return 1 - (1 - start) * (np.cos(np.pi * np.arange(steps) / steps) + 1) / 2


def test_it_is_told_when_the_average_stays_where_it_began() -> None:
    told = slow_average(Recipe(), momenta_of(0.99, 100))
    assert (
        told is not None
        and "100 steps are few" in told
        and "60% of the random weights that the teacher starts with will be left" in told
    )
    # What it advises leaves a hundredth, and nothing is said any more.
    advised = float(told.split("teacher_momentum=")[1])
    assert 0.002 < np.prod(momenta_of(advised, 100)) < 0.02
    assert slow_average(Recipe(), momenta_of(advised, 100)) is None
    assert slow_average(Recipe(), momenta_of(0.996, 100_000)) is None
    distilled = slow_average(Recipe(distill_from="starter", loss="relations"), momenta_of(0.99, 100))
    assert distilled is not None and "the moving average starts with" in distilled
    assert (
        slow_average(Recipe(init_from="starter"), momenta_of(0.99, 100)) is None
    )  # which is no bad beginning
    assert slow_average(Recipe(teacher="student"), momenta_of(0.99, 100)) is None
    fewest = slow_average(Recipe(), momenta_of(0.99, 1))
    assert fewest is not None and "teacher_momentum=0.5" in fewest
    fastest = slow_average(Recipe(teacher_momentum=0.5), momenta_of(0.5, 1))
    assert fastest is not None and fastest.endswith("Use a smaller batch_size or more epochs")


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


@pytest.mark.parametrize(("epochs", "rate"), [(9, 0.9), (10, 1.0), (12, 1.2), (19, 1.9), (20, 10.0)])
def test_no_run_is_most_of_it_warm_up(epochs: int, rate: float) -> None:
    adapted, choices = adapt(Recipe(epochs=epochs, warmup_epochs=10), 2000)
    assert adapted.warmup_epochs == rate
    if 10 <= epochs < 20:
        assert any(
            choice.reason.startswith(f"10 are more than half of the run's {epochs}: ") for choice in choices
        )


def test_a_temperature_rises_where_it_changes_whoever_gave_it() -> None:
    def temperatures(n_images: int = 100, **given: float) -> tuple[float | None, ...]:
        adapted, choices = adapt(Recipe(**given), n_images)
        reasons = {choice.key: choice.reason for choice in choices}
        unchanging = adapted.warmup_teacher_temp == adapted.teacher_temp
        assert (reasons["warmup_teacher_temp_epochs"] == "the temperature does not change") == unchanging
        return adapted.warmup_teacher_temp, adapted.teacher_temp, adapted.warmup_teacher_temp_epochs

    assert temperatures() == (0.04, 0.04, 0)
    assert temperatures(teacher_temp=0.07) == (0.04, 0.07, 30)
    assert temperatures(teacher_temp=0.03) == (0.03, 0.03, 0)
    assert temperatures(warmup_teacher_temp=0.02) == (0.02, 0.04, 30)
    assert temperatures(1_000_000, warmup_teacher_temp=0.07) == (0.07, 0.07, 0)
    # A rise that is given and too long for the run, between temperatures that are filled in.
    assert (
        adapt(Recipe(epochs=5, warmup_teacher_temp_epochs=30), 1_000_000)[0].warmup_teacher_temp_epochs == 2
    )


def test_prototypes_that_would_never_move_are_set_free() -> None:
    adapted, choices = adapt(Recipe(epochs=1), 2000)
    assert adapted.freeze_last_layer_epochs == 0
    assert (
        Choice("freeze_last_layer_epochs", 0, "1 epoch of the run's 1 would never train the prototypes")
        in choices
    )
    assert adapt(Recipe(epochs=2), 2000)[0].freeze_last_layer_epochs == 1
    headless = Recipe(epochs=1, loss="relations", distill_from="hog")
    assert adapt(headless, 2000)[0].freeze_last_layer_epochs == 1


def test_what_was_chosen_stays_when_a_run_goes_on() -> None:
    recipe = Recipe(batch_size=64, accumulate=4, epochs=1)
    began, _ = adapt(recipe, 30)
    assert (began.batch_size, began.freeze_last_layer_epochs) == (28, 0)
    # By a version of other rules.
    began = replace(began, warmup_epochs=0.3, freeze_last_layer_epochs=1)
    on, choices = adapt(replace(recipe, accumulate=2), 30, began=began)
    assert on == replace(began, accumulate=2)
    assert {c.key: c.value for c in choices if c.reason == "as the run began"} == {
        "batch_size": 28,
        "warmup_epochs": 0.3,
        "freeze_last_layer_epochs": 1,
    }
    assert adapt(recipe, 30)[0].accumulate == 4
    whole, _ = adapt(replace(recipe, accumulate=1), 30)
    with pytest.raises(
        UsageError, match=r"batch_size=30 is not .* = 4; it can be divided into 3 or 5 equal pieces"
    ):
        adapt(recipe, 30, began=whole)
    # Fewer pictures are another run.
    assert adapt(replace(recipe, accumulate=1), 20, began=whole)[0].batch_size == 20
    taught = adapt(Recipe(distill_from="hog", loss="relations"), 30, teacher_dim=6, began=whole)[0]
    assert taught.n_prototypes == 6


def test_a_teacher_that_counts_several_times_is_named_once() -> None:
    recipe = Recipe(distill_from=("runs/a", "runs/b", "runs/b", "hog", "runs/b"), loss="relations")
    _, made = adapt(recipe, 5000, teacher_dim=6)
    (reason,) = (choice.reason for choice in made if choice.key == "n_prototypes")
    assert reason.endswith("embeddings of runs/a, runs/b (3 times) and hog")


def test_a_vit_from_scratch_on_few_pictures_is_advised_against() -> None:
    vit = Recipe(arch="vit_small_patch16_224")
    assert "learns little from so few pictures (9,999)" in (advice(vit, 9_999) or "")
    assert advice(vit, 10_000) is None
    assert advice(replace(vit, arch="resnet50"), 100) is None
    assert advice(replace(vit, init_from="dino_vits16"), 100) is None
