"""How strongly colours change: recipe keys color_jitter_strength and grey_probability, Pillow and batched alike."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from dinokit.errors import UsageError
from dinokit.training.recipe import Recipe, load_recipe, save_recipe, with_overrides
from dinokit.training.views.augment import DRAW_DTYPE, MultiCrop
from dinokit.training.views.batched_crops import draw_picture, join, make_crops

SMALL = Recipe(global_crop_px=32, local_crop_px=16, n_local_crops=3, batch_size=4)


def draws(recipe: Recipe, n: int = 1500, size: tuple[int, int] = (400, 300)) -> np.ndarray:
    """(n, V) records of the draws of n pictures."""
    rng = random.Random(3)
    crops = MultiCrop(recipe)
    return np.array([crops.draw(size, rng) for _ in range(n)], DRAW_DTYPE)


def made(recipe: Recipe, image: Image.Image, n: int, *, batched: bool) -> np.ndarray:
    """(n · V, 3, S, S) local crops of one picture by n seeds."""
    crops = MultiCrop(recipe)
    if batched:
        drawn = [draw_picture(image, crops, random.Random(i)) for i in range(n)]
        local = make_crops(join(drawn, []), 32, 16, torch.device("cpu"))[1]
        assert local is not None
        return local.permute(1, 0, 2, 3, 4).flatten(0, 1).numpy()
    stacks = [crops(image, random.Random(i))[1] for i in range(n)]
    return np.concatenate(stacks).transpose(0, 3, 1, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0, 2.0])
def test_factors_are_uniform_over_torchvisions_ranges(strength: float) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    most = (0.4, 0.4, 0.2, 0.1)
    reference = transforms.ColorJitter(*(strength * value for value in most))
    table = draws(with_overrides(SMALL, [f"color_jitter_strength={strength}"])).ravel()
    assert table["jitter"].mean() == pytest.approx(0.8, abs=0.03)
    factors = table["factors"][table["jitter"]]
    names = ("brightness", "contrast", "saturation", "hue")
    for name, column in zip(names, factors.T, strict=True):
        low, high = getattr(reference, name)
        share = (column - low) / (high - low)
        assert share.min() >= 0 and share.max() <= 1
        # Of a uniform distribution: mean 1/2, standard deviation 1/√12.
        assert share.mean() == pytest.approx(0.5, abs=0.02)
        assert share.std() == pytest.approx(12**-0.5, abs=0.01)


@pytest.mark.parametrize("probability", [0.0, 0.2, 0.7, 1.0])
def test_grey_comes_as_often_as_said(probability: float) -> None:
    grey = draws(with_overrides(SMALL, [f"grey_probability={probability}"]))["grey"]
    # 1500 draws a view: four standard deviations are at most 0.052.
    assert grey.mean(axis=0) == pytest.approx([probability] * 5, abs=0.052 if 0 < probability < 1 else 0)


def test_strengths_change_the_colours_only() -> None:
    plain = draws(SMALL, 50)
    for setting in ("color_jitter_strength=0", "color_jitter_strength=0.5", "grey_probability=0.9"):
        other = draws(with_overrides(SMALL, [setting]), 50)
        for name in ("box", "flip", "blur_px", "solarize", "order"):
            np.testing.assert_array_equal(plain[name], other[name])


@pytest.mark.parametrize("batched", [False, True])
def test_without_jitter_and_grey_colours_stay(batched: bool) -> None:
    # One colour everywhere: whatever is cut out and blurred is that colour.
    image = Image.new("RGB", (60, 50), (200, 40, 90))
    still = with_overrides(SMALL, ["color_jitter_strength=0", "grey_probability=0"])
    crops = made(still, image, 20, batched=batched)
    assert (crops == np.array([200, 40, 90], np.uint8)[:, None, None]).all()
    assert len(np.unique(made(SMALL, image, 20, batched=batched)[:, 0, 0, 0])) > 20


@pytest.mark.parametrize("batched", [False, True])
def test_the_spread_of_colours_follows_the_strength(batched: bool, photos: Path) -> None:
    image = Image.open(sorted(photos.glob("*.jpg"))[0]).convert("RGB")
    flat = Image.new("RGB", (60, 50), tuple(int(v) for v in np.asarray(image).mean(axis=(0, 1))))
    spreads = []
    for strength in (0.25, 0.5, 1.0):
        recipe = with_overrides(SMALL, [f"color_jitter_strength={strength}", "grey_probability=0"])
        spreads.append(made(recipe, flat, 60, batched=batched)[:, :, 0, 0].std(axis=0).mean())
    assert spreads[1] / spreads[0] == pytest.approx(2, rel=0.2)
    assert spreads[2] / spreads[1] == pytest.approx(2, rel=0.2)


@pytest.mark.parametrize("batched", [False, True])
def test_all_grey(batched: bool) -> None:
    image = Image.new("RGB", (60, 50), (200, 40, 90))
    crops = made(with_overrides(SMALL, ["grey_probability=1"]), image, 5, batched=batched)
    assert (crops == crops[:, :1]).all()


def test_the_recipe_keeps_and_checks_them(tmp_path: Path) -> None:
    recipe = with_overrides(Recipe(), ["color_jitter_strength=0.5", "grey_probability=0"])
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    with pytest.raises(UsageError, match=r"color_jitter_strength=3.0 must lie between 0"):
        with_overrides(Recipe(), ["color_jitter_strength=3"])
    with pytest.raises(UsageError, match=r"grey_probability=1.5 must lie between 0 and 1"):
        with_overrides(Recipe(), ["grey_probability=1.5"])
