"""What a recipe leaves open, filled in for the number of pictures."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from dinokit.errors import UsageError
from dinokit.training.adapt import adapt
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
