"""Training on grey and coloured pictures of 16 bits: colours that are not rounded, numbers measured, a whole run."""

from __future__ import annotations

import colorsys
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")

from small_recipe import SMALL_RECIPE

from dinokit import load_backbone
from dinokit.errors import UsageError
from dinokit.export.verification.synthetic import made_up_bands
from dinokit.pictures.bands import Bands
from dinokit.training import trainer
from dinokit.training.recipe import load_recipe, with_overrides
from dinokit.training.views.augment import DRAW_DTYPE, Draw, MultiCrop
from dinokit.training.views.batched_colour import apply_colours
from dinokit.training.views.batched_crops import draw_picture, join, make_crops
from dinokit.training.views.bit_depth import bits_found
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.normalisation import measure
from dinokit.training.views.pictures import collect_pictures

CPU = torch.device("cpu")
GREY = replace(SMALL_RECIPE, channels=1, mean=None, std=None)
COLOUR = replace(SMALL_RECIPE, channels=3, mean=None, std=None)
NOTHING = Draw((0, 0, 32, 32), False, False, (1.0, 1.0, 1.0, 0.0), (0, 1, 2, 3), False, 0.0, False)


def levels(channels: int, seed: int = 0, *, white: float = 255.0) -> NDArray[np.float32]:
    """(70, 90, C) on a scale of 0…255, finer than 8 bits, none brighter than ``white``."""
    noise = np.random.default_rng(seed).uniform(0, 1, (70, 90, channels))
    array = made_up_bands(channels, seed).resize((90, 70)).array * 0.98 + noise * 4
    return (array.astype(np.float64) / array.max() * white).astype(np.float32)


def changed(array: NDArray[np.float32], draw: Draw) -> NDArray[np.float64]:
    crop = torch.from_numpy(array.transpose(2, 0, 1)[None].copy())
    made = apply_colours(crop, np.array([draw], DRAW_DTYPE), whole=False)
    found: NDArray[np.float64] = made[0].permute(1, 2, 0).numpy().astype(np.float64)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """12 bits stored in 16, as cameras of microscopes do."""
    path = tmp_path / "cells"
    path.mkdir()
    for number in range(6):
        values = np.rint(levels(1, number)[:, :, 0] / 255 * 4095).astype(np.uint16)
        Image.fromarray(values).save(path / f"{number}.{'png' if number % 2 else 'tif'}")
    return path


# ------------------------------------------------------------------------------------------- colours


def test_brightness_and_contrast_are_computed_and_not_rounded() -> None:
    for channels in (1, 3):
        array = levels(channels, white=16)
        exact = array.astype(np.float64)
        brighter = changed(array, NOTHING._replace(jitter=True, factors=(1.37, 1.0, 1.0, 0.0)))
        np.testing.assert_allclose(brighter, exact * 1.37, atol=1e-4)
        luma = exact @ [0.299, 0.587, 0.114] if channels == 3 else exact[:, :, 0]
        mean = luma.mean()
        contrast = changed(array, NOTHING._replace(jitter=True, factors=(1.0, 0.63, 1.0, 0.0)))
        np.testing.assert_allclose(contrast, mean + 0.63 * (exact - mean), atol=1e-3)
        if channels == 3:
            pale = changed(array, NOTHING._replace(jitter=True, factors=(1.0, 1.0, 0.3, 0.0)))
            np.testing.assert_allclose(pale, luma[:, :, None] * 0.7 + exact * 0.3, atol=1e-3)
            grey = changed(array, NOTHING._replace(grey=True))
            np.testing.assert_allclose(grey, np.repeat(luma[:, :, None], 3, axis=2), atol=1e-3)
    light = levels(1)
    solarized = changed(light, NOTHING._replace(solarize=True))
    np.testing.assert_allclose(solarized, np.where(light < 128, light, 255 - light), atol=1e-5)


@pytest.mark.parametrize("turn", [0.07, -0.1, 0.5])
def test_the_hue_is_turned_as_the_standard_library_turns_it(turn: float) -> None:
    array = levels(3, white=16)[:12, :12]
    array[0, 0] = 5.3  # of no colour
    found = changed(array, NOTHING._replace(jitter=True, factors=(1.0, 1.0, 1.0, turn)))
    for row, made in zip(array.reshape(-1, 3).astype(float), found.reshape(-1, 3), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*row)
        np.testing.assert_allclose(made, colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value), atol=1e-4)


def test_the_blur_is_not_rounded() -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    array = levels(1, white=16)
    found = changed(array, NOTHING._replace(blur_px=1.5))[8:-8, 8:-8, 0]
    truth = ndimage.gaussian_filter(array[:, :, 0].astype(np.float64), 1.5)[8:-8, 8:-8]
    assert np.abs(found - truth).max() < 0.1 and (np.abs(found - np.rint(found)) > 0.01).mean() > 0.9


@pytest.mark.parametrize("recipe", [GREY, COLOUR], ids=["grey", "colour"])
def test_16_bits_are_changed_as_8_bits_are(recipe: Any) -> None:
    """The same draws: a picture and its 8 bits are alike, with either way to make crops."""
    fine = levels(recipe.channels)
    coarse = np.rint(fine).astype(np.uint8)
    image = Image.fromarray(coarse[:, :, 0] if recipe.channels == 1 else coarse)
    views = MultiCrop(replace(recipe, n_local_crops=4))
    for seed in range(8):
        eight = views(image, random.Random(seed))
        ours = views(Bands.of(fine), random.Random(seed))
        batch = join([draw_picture(Bands.of(fine), views, random.Random(seed))], [])
        for one, other, device in zip(eight, ours, make_crops(batch, 32, 16, CPU), strict=True):
            assert one is not None and other is not None and device is not None
            assert other.dtype == np.float32 and other.shape == one.shape
            apart = np.abs(one - other)
            # Steps of 8 bits each round; the hue of Pillow has 256 steps; solarise may tip a value at 128.
            assert np.median(apart) < 1.5 and (apart > 8).mean() < 0.03
            same = np.abs(device[:, 0].permute(0, 2, 3, 1).numpy().astype(np.float64) - other)
            assert same.mean() <= 0.03 and np.percentile(same, 99) <= 0.2


# ------------------------------------------------------------------------------------------- a run


@pytest.mark.parametrize("crops", ["pillow", "batched"])
def test_batches_hold_what_is_in_the_files(crops: str, folder: Path) -> None:
    (batch,) = CropLoader(collect_pictures([folder]), replace(GREY, batch_size=6, crops=crops))
    assert isinstance(batch, Batch) and not batch.unreadable
    assert batch.global_crops.shape == (2, 6, 1, 32, 32) and batch.global_crops.dtype == torch.float32
    assert len(torch.unique(batch.global_crops)) > 5000  # 8 bits would leave 17 levels
    # With photographs of 8 bits beside them.
    for number in range(6):
        Image.fromarray(np.rint(levels(3, number)).astype(np.uint8)).save(folder / f"{number}.jpg")
    for recipe, channels in ((GREY, 1), (COLOUR, 3)):
        (batch,) = CropLoader(collect_pictures([folder]), replace(recipe, batch_size=12, crops=crops))
        assert isinstance(batch, Batch) and not batch.unreadable
        assert batch.global_crops.shape == (2, 12, channels, 32, 32)
        assert sorted(batch.global_crops.amax(dim=(0, 2, 3, 4)) > 40) == [False] * 6 + [True] * 6


def test_what_is_measured_keeps_its_digits(tmp_path: Path) -> None:
    rng, arrays = np.random.default_rng(0), []
    for number in range(4):
        array = rng.normal(900, 20, (37, 37)).clip(0).astype(np.uint16)  # a deviation of 0.0003 of white
        Image.fromarray(array).save(tmp_path / f"{number}.png")
        arrays.append(array[2:34, 2:34] / 65535)
    for channels in (1, 3):
        mean, std, count = measure(collect_pictures([tmp_path]), 32, channels)
        assert count == 4 and len(mean) == channels
        assert mean == pytest.approx([np.mean(arrays)] * channels, rel=1e-4)
        assert std == pytest.approx([np.std(arrays)] * channels, rel=1e-3)
        settings = [f"channels={channels}", f"mean={list(mean)}", f"std={list(std)}"]
        assert with_overrides(GREY, settings).std == std
    Image.fromarray(np.full((37, 37), 77, np.uint8)).save(tmp_path / "flat.png")
    with pytest.raises(UsageError, match="nearly one value everywhere"):
        measure(collect_pictures([tmp_path / "flat.png"]), 32, 1)


def test_what_is_said_before_a_run(folder: Path, photos: Path, tmp_path: Path) -> None:
    found = collect_pictures([folder])
    said = bits_found(found, GREY)
    assert said is not None and said.startswith(
        "6 of 6 sampled pictures have more than 8 bits, which are kept. 99 %"
    )
    share = max(np.percentile(np.asarray(Image.open(path)), 99) for path in folder.iterdir()) / 65535
    assert f"below {share:.2%} of white" in said and "--set mean=auto --set std=auto" in said
    given = bits_found(found, replace(GREY, mean=(0.03,), std=(0.01,)))
    assert given == "6 of 6 sampled pictures have more than 8 bits, which are kept"
    assert bits_found(collect_pictures([photos]), GREY) is None
    assert bits_found(found, replace(GREY, channels=5)) is None
    (tmp_path / "broken.png").write_bytes(b"no picture")
    assert bits_found(collect_pictures([tmp_path / "broken.png"]), GREY) is None

    from click.testing import CliRunner

    from dinokit.cli import cli

    shown = CliRunner().invoke(
        cli, ["train", str(folder), "--recipe", "smoke", "--channels", "1", "--explain"]
    )
    assert shown.exit_code == 0 and "6 of 6 sampled pictures have more than 8 bits" in shown.stderr


class Told(trainer.Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def told(self, message: str) -> None:
        self.messages.append(message)


def test_from_16_bits_to_vectors(folder: Path, tmp_path: Path) -> None:
    observer = Told()
    recipe = replace(GREY, mean="auto", std="auto")
    trainer.train([folder], tmp_path / "run", recipe, observer=observer)
    heard = "\n".join(observer.messages)
    assert heard.count("6 of 6 sampled pictures have more than 8 bits") == 1 and "mean=auto" not in heard
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert isinstance(saved.mean, tuple) and saved.mean[0] < 0.07
    vectors = []
    for engine in ("onnx", "torch"):
        backbone = load_backbone(tmp_path / "run", engine=engine, device="cpu")
        pixels = backbone.transform(folder / "1.png")
        assert abs(pixels.mean()) < 1.5 and 0.3 < pixels.std() < 2  # as numbers of the usual size
        vectors.append(backbone.embed(folder))
    assert vectors[0].shape == (6, 48)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
