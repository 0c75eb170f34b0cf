"""What no recipe may be: values that cannot be, whatever the key, and files that are no text."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from dinokit.errors import UsageError
from dinokit.training.recipe import Recipe, load_recipe, with_overrides

FLOATS = [
    field.name for field in fields(Recipe) if "float" in str(field.type) and "tuple" not in str(field.type)
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_number_of_a_recipe_is_nan_or_infinite(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}={value} must be a number that is not nan or infinite"):
        with_overrides(Recipe(), [f"{key}={value}"])


@pytest.mark.parametrize("key", ["blur_radius_px", "global_crops_scale", "mean"])
def test_nor_is_one_of_several(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key}=.* must be a number that is not nan"):
        with_overrides(Recipe(), [f"{key}=[0.1, .nan]"])


@pytest.mark.parametrize(
    "key",
    [
        "lr",
        "min_lr",
        "weight_decay",
        "weight_decay_end",
        "clip_grad",
        "koleo_weight",
        "patch_embed_lr_mult",
        "warmup_epochs",
        "warmup_teacher_temp_epochs",
        "save_every_minutes",
        "workers",
        "seed",
        "n_local_crops",
    ],
)
def test_what_is_counted_or_weighed_is_not_negative(key: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}=-1(\.0)? must not be negative"):
        with_overrides(Recipe(), [f"{key}=-1"])
    assert getattr(with_overrides(Recipe(), [f"{key}=0"]), key) == 0


def test_keys_by_name_are_read_as_the_strings_are(tmp_path: Path) -> None:
    recipe = with_overrides(Recipe(), ["epochs=7"], epochs=3, global_crops_scale=[0.5, 1], init_from=tmp_path)
    assert (recipe.epochs, recipe.global_crops_scale, recipe.init_from) == (3, (0.5, 1.0), str(tmp_path))
    with pytest.raises(UsageError, match="epochs='many' must be of type int"):
        with_overrides(Recipe(), [], epochs="many")
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        with_overrides(Recipe(), [], epoch=3)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("arch: vit_größe\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"mine\.yaml is no text in UTF-8"):
        load_recipe(tmp_path / "mine.yaml")
