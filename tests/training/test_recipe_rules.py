"""Values that no key of a recipe may have, and files that are not recipes."""

from __future__ import annotations

import errno
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dinokit.errors import UsageError
from dinokit.training.recipe import Recipe, load_recipe, save_recipe, with_overrides

FLOATS = [
    field.name for field in fields(Recipe) if "float" in str(field.type) and "tuple" not in str(field.type)
]


@pytest.mark.parametrize("key", FLOATS)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_no_number_of_a_recipe_is_nan_or_infinite(key: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{key}={value} must be finite, not nan or infinite"):
        with_overrides(Recipe(), [f"{key}={value}"])


@pytest.mark.parametrize("key", ["blur_radius_px", "global_crops_scale", "mean"])
def test_nor_is_one_of_several(key: str) -> None:
    with pytest.raises(UsageError, match=f"{key}=.* must be finite, not nan"):
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


def test_a_thousand_workers_are_the_most() -> None:
    assert with_overrides(Recipe(), ["workers=1000"]).workers == 1000
    with pytest.raises(UsageError, match="workers=100000 would start as many processes"):
        with_overrides(Recipe(), ["workers=100000"])


def test_keys_by_name_are_read_as_the_strings_are(tmp_path: Path) -> None:
    recipe = with_overrides(Recipe(), ["epochs=7"], epochs=3, global_crops_scale=[0.5, 1], init_from=tmp_path)
    assert (recipe.epochs, recipe.global_crops_scale, recipe.init_from) == (3, (0.5, 1.0), str(tmp_path))
    with pytest.raises(UsageError, match="epochs='many' must be a whole number"):
        with_overrides(Recipe(), [], epochs="many")
    with pytest.raises(UsageError, match="did you mean 'epochs'"):
        with_overrides(Recipe(), [], epoch=3)


def test_a_recipe_made_in_python_is_that_of_its_file(tmp_path: Path) -> None:
    recipe = Recipe(
        epochs=np.int64(3),
        lr=np.float32(0.5),
        warmup_epochs=1,
        global_crops_scale=["5e-1", 1],
        mean=["5e-1", 0.4, np.float64(0.25)],
        global_crop_px=[224, 224],
        image_size_px=[224, 448],
        init_from=tmp_path,
        labelled=tmp_path,
        distill_from=[tmp_path, "hog"],
        distill_pictures=[None, "a*"],
        loss="relations",
    )
    assert (recipe.global_crops_scale, recipe.mean) == ((0.5, 1.0), (0.5, 0.4, 0.25))
    assert (recipe.global_crop_px, recipe.image_size_px) == (224, (224, 448))
    assert recipe.distill_from == (str(tmp_path), "hog") and recipe.labelled == str(tmp_path)
    save_recipe(recipe, tmp_path / "mine.yaml")
    assert load_recipe(tmp_path / "mine.yaml") == recipe == replace(recipe)
    for wrong in ({"epochs": 1.5}, {"epochs": None}, {"lr": True}, {"global_crop_px": [1.5, 2]}):
        with pytest.raises(UsageError, match=r"^Recipe: "):
            replace(recipe, **wrong)


@pytest.mark.parametrize("key", ["global_crops_scale", "blur_radius_px", "mean", "std"])
def test_numbers_without_a_point_in_lists(key: str) -> None:
    values = ["4e-1", "5e-1"] if "crops" in key or "blur" in key else ["4e-1", "5e-1", "5e-1"]
    recipe = with_overrides(Recipe(), [f"{key}=[{', '.join(values)}]"])
    assert getattr(recipe, key) == tuple(map(float, values))
    with pytest.raises(UsageError, match=f"{key}=.*'many'"):
        with_overrides(Recipe(), [f"{key}=[{', '.join(values[1:])}, many]"])


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes("arch: vit_größe\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"mine\.yaml is not UTF-8 text"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "epochs: 3\nlr: 1\nepochs: 4\n",
            "mine.yaml cannot be used: the key epochs is given 2 times; keep one",
        ),
        ("licence: 2026-02-30\n", "it is not valid YAML: day is out of range for month"),
        ("epochs:\t3\n", r"it is not valid YAML: found character '\\t' .* \(line 1\)"),
        ("epochs: \0\n", "it is not valid YAML: unacceptable character"),
        ("epochs: " + "[" * 3000, "it is nested too deeply"),
        ("- epochs\n", "expected flat `key: value` lines, not a list"),
        (f"lr: 1{'0' * 400}\n", "lr=10+ must be a number"),
        ("compile: 1\n", "compile=1 must be true or false"),
        ("arch: 50\n", "arch=50 must be text"),
    ],
)
def test_a_file_that_is_not_a_recipe_is_refused_in_words(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "null\n", "{}\n"])
def test_an_empty_file_is_the_default_recipe(tmp_path: Path, text: str) -> None:
    (tmp_path / "mine.yaml").write_text(text)
    assert load_recipe(tmp_path / "mine.yaml") == Recipe()


def test_where_no_recipe_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_recipe(Recipe(), tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match=r"is a folder; for the recipe of that run name .*/recipe\.yaml"):
        load_recipe(tmp_path)

    def refuse(*_: Any, **__: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(UsageError, match=r"recipe\.yaml cannot be read: Permission denied"):
        load_recipe(tmp_path / "recipe.yaml")


def test_values_out_of_all_proportion_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"seed=18446744073709551616 must be below 2\^63"):
        with_overrides(Recipe(), ["seed=18446744073709551616"])
    with pytest.raises(UsageError, match="can be divided into 2 or 4 equal pieces"):
        with_overrides(Recipe(), ["batch_size=10000000000000000000", "accumulate=3"])
    with pytest.raises(UsageError, match="the value is not valid YAML"):
        with_overrides(Recipe(), ["licence=2026-02-30"])


def test_a_key_in_capitals_suggests_the_one_in_small_letters() -> None:
    with pytest.raises(UsageError, match=r"unknown key 'EPOCHS'; did you mean 'epochs'\?"):
        with_overrides(Recipe(), ["EPOCHS=3"])
