"""Grey networks, pictures of 16 bits, and mean and standard deviation of one's own: from picture to embedding."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from pico_vit import PICO
from small_recipe import SMALL_RECIPE

from dinokit import load_backbone
from dinokit.errors import UsageError
from dinokit.pictures.bands import open_picture
from dinokit.pictures.images import open_image
from dinokit.pictures.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dinokit.training import trainer
from dinokit.training.recipe import Recipe, load_recipe, save_recipe, with_overrides
from dinokit.training.views.augment import MultiCrop
from dinokit.training.views.batched_crops import draw_picture, join, make_crops
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.normalisation import measure, measured, normalisation
from dinokit.training.views.pictures import TrainingPictures, collect_pictures

GREY = replace(SMALL_RECIPE, channels=1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Grey and coloured pictures, of 8 and 16 bits."""
    path = tmp_path / "photos"
    path.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        levels = rng.integers(0, 2**16, (40, 50 + number), dtype=np.uint16)
        Image.fromarray(levels).save(path / f"{number}.png")
        Image.fromarray(levels).save(path / f"{number}.tif")
        Image.fromarray((levels // 257).astype(np.uint8)).save(path / f"{number}-grey.png")
        colours = rng.integers(0, 256, (45, 40, 3), dtype=np.uint8)
        Image.fromarray(colours).save(path / f"{number}-colour.png")
    return path


# ------------------------------------------------------------------------------------------- pixels


def test_a_grey_network_sees_the_luma() -> None:
    see = Preprocessing(32, (32, 32), mean=(0.4,), std=(0.2,))
    colours = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    crop = see.crop(Image.fromarray(colours))
    assert crop.shape == (32, 32, 1) and crop.dtype == np.uint8
    luma = colours @ np.array([0.299, 0.587, 0.114])  # ITU-R 601
    assert np.abs(crop[:, :, 0] - luma).max() <= 0.51
    pixels = see.normalise(crop[None])
    assert pixels.shape == (1, 1, 32, 32)
    np.testing.assert_allclose(pixels[0, 0], (crop[:, :, 0] / 255 - 0.4) / 0.2, rtol=1e-5, atol=1e-6)


def test_grey_pictures_keep_their_values() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(4).reshape(32, 32)
    see = Preprocessing(32, (32, 32), mean=(0.5,), std=(0.5,))
    for image in (Image.fromarray(levels), Image.fromarray(levels).convert("RGB")):
        np.testing.assert_array_equal(see.crop(image)[:, :, 0], levels)


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_mean_the_same_in_training_and_in_embedding(suffix: str, channels: int, folder: Path) -> None:
    levels = np.asarray(Image.open(folder / f"0.{suffix}")).astype(np.float64)
    shown = np.asarray(open_image(folder / f"0.{suffix}"))
    assert np.abs(shown[:, :, 0] - levels / 257).max() <= 0.5  # scaled, and neither clipped nor cut
    # A crop of the whole picture without any change is that picture.
    recipe = replace(
        GREY,
        channels=channels,
        mean=None,
        color_jitter_strength=0,
        grey_probability=0,
        global_crops_scale=(1.0, 1.0),
        blur_radius_px=(0.0, 0.0),
        global_crop_px=32,
    )
    pictures = TrainingPictures([folder / f"0.{suffix}"])
    (batch,) = CropLoader(pictures, replace(recipe, batch_size=1))
    assert isinstance(batch, Batch) and batch.global_crops.shape == (2, 1, channels, 32, 32)
    # Every crop is near the mean of the picture, which a clipped one would not be.
    assert abs(batch.global_crops[0].float().mean() - levels.mean() / 257) < 8


def test_training_and_embedding_see_the_same_pixels(folder: Path) -> None:
    from dinokit.training.monitoring.evaluation import read_crop

    see = Preprocessing(32, (32, 32), mean=(0.5,), std=(0.5,))
    pictures = collect_pictures([folder])
    for index in range(len(pictures)):
        crop = read_crop(pictures, index, see)
        assert not isinstance(crop, str)
        np.testing.assert_array_equal(crop, see.crop(open_picture(pictures.read(index), channels=1)))
        if crop.dtype == np.uint8:  # without more than 8 bits, it is what Pillow makes of it
            np.testing.assert_array_equal(crop, see.crop(open_image(pictures.read(index))))
        assert crop.std() > 10  # no picture is flat, black or white


# ------------------------------------------------------------------------------------------- crops


@pytest.mark.parametrize("crops", ["pillow", "batched"])
def test_grey_crops_are_those_of_a_grey_picture_in_three_channels(crops: str) -> None:
    """What colour operations leave of a picture without colours: brightness, contrast, blur, solarise."""
    levels = np.random.default_rng(2).integers(0, 256, (60, 80), dtype=np.uint8)
    grey, colour = Image.fromarray(levels), Image.fromarray(levels).convert("RGB")
    recipe = replace(GREY, n_local_crops=4)
    views = MultiCrop(recipe)
    for seed in range(12):
        if crops == "pillow":
            ours, theirs = (views(image, random.Random(seed)) for image in (grey, colour))
        else:
            made = [
                make_crops(
                    join([draw_picture(image, views, random.Random(seed))], []), 32, 16, torch.device("cpu")
                )
                for image in (grey, colour)
            ]
            ours, theirs = ([part[:, 0].permute(0, 2, 3, 1).numpy() for part in parts] for parts in made)  # type: ignore[union-attr,misc]
        for one, other in zip(ours, theirs, strict=True):
            assert one is not None and other is not None and one.shape[3] == 1
            # Hue and saturation do nothing to grey, but that 8-bit HSV and back may cost a level.
            assert np.abs(one.astype(int) - other[..., :1].astype(int)).max() <= 2


def test_batched_grey_crops_equal_pillows() -> None:
    levels = np.random.default_rng(3).integers(0, 256, (70, 90), dtype=np.uint8)
    image, views = Image.fromarray(levels), MultiCrop(replace(GREY, n_local_crops=4))
    for seed in range(10):
        batch = join([draw_picture(image, views, random.Random(seed))], [])
        made = make_crops(batch, 32, 16, torch.device("cpu"))
        for ours, theirs in zip(made, views(image, random.Random(seed)), strict=True):
            assert ours is not None and theirs is not None
            here = ours[:, 0].permute(0, 2, 3, 1).numpy()
            apart = np.abs(here.astype(int) - theirs.astype(int))
            assert here.shape == theirs.shape and apart.mean() <= 0.05 and apart.max() <= 4


def test_channels_change_no_box() -> None:
    colour = replace(GREY, channels=3)
    one, other = (MultiCrop(recipe).draw((90, 70), random.Random(5)) for recipe in (GREY, colour))
    assert one == other


# ------------------------------------------------------------------------------------------- mean and std


def test_imagenets_numbers_are_the_default() -> None:
    assert normalisation(Recipe()) == (IMAGENET_MEAN, IMAGENET_STD)
    mean, std = normalisation(Recipe(channels=1))
    assert mean == pytest.approx([np.mean(IMAGENET_MEAN)], abs=1e-4)
    assert std == pytest.approx([np.mean(IMAGENET_STD)], abs=1e-4)


@pytest.mark.parametrize("channels", [1, 3])
def test_measured_numbers_are_those_of_the_pixels(channels: int, tmp_path: Path) -> None:
    rng, arrays = np.random.default_rng(4), []
    for number in range(5):
        # Exactly the size that the crop is taken from, so that nothing is resized.
        pixels = (rng.normal((90, 120, 60), (20, 10, 30), (37, 37, 3)) + number).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        arrays.append(pixels)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    mean, std, count = measure(collect_pictures([tmp_path]), 32, channels)
    middle = np.stack(arrays)[:, 2:34, 2:34]
    if channels == 1:
        middle = np.stack([np.asarray(Image.fromarray(m).convert("L")) for m in middle])[..., None]
    flat = middle.reshape(-1, channels) / 255
    assert count == 5
    assert mean == pytest.approx(flat.mean(axis=0), abs=1e-4)
    assert std == pytest.approx(flat.std(axis=0), abs=1e-4)
    limited = measure(collect_pictures([tmp_path]), 32, channels, limit=2)
    assert limited[2] in (1, 2) and limited == measure(collect_pictures([tmp_path]), 32, channels, limit=2)


def test_what_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="none of 1 pictures can be read"):
        measure(collect_pictures([tmp_path]), 32, 3)
    Image.new("RGB", (40, 40), (9, 9, 9)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match="nearly one value everywhere"):
        measure(collect_pictures([tmp_path]), 32, 3)


def test_the_recipe_checks_channels_and_numbers(tmp_path: Path) -> None:
    recipe = with_overrides(Recipe(), ["channels=1", "mean=0.3", "std=[0.2]"])
    assert recipe.mean == (0.3,) and recipe.std == (0.2,)
    auto = with_overrides(Recipe(), ["mean=auto", "std=[0.2, 0.2, 0.3]"])
    assert auto.mean == "auto"
    for one in (recipe, auto):
        save_recipe(one, tmp_path / "recipe.yaml")
        assert load_recipe(tmp_path / "recipe.yaml") == one
    for setting, words in (
        (
            "channels=0",
            r"channels=0 must be 3 \(colour\), 1 \(grey\), or the number in the .npy or TIFF files",
        ),
        (
            "mean=[0.5]",
            r"mean has 1 numbers and channels=3; give one per channel, in 0…1: \[0.5, 0.45, 0.4\]",
        ),
        ("mean=[123, 116, 103]", "must lie between 0 and 1: .* by 255"),
        ("std=[0, 0, 0]", "must lie between 1e-05 and 1"),
        ("mean=own", "must be a list with a number for each channel"),
    ):
        with pytest.raises(UsageError, match=words):
            with_overrides(Recipe(), [setting])


# ------------------------------------------------------------------------------------------- whole runs


class Told(trainer.Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def told(self, message: str) -> None:
        self.messages.append(message)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """A finished run of one channel with measured numbers, and labelled pictures to judge by."""
    folder = tmp_path_factory.mktemp("grey")
    observer = Told()
    recipe = with_overrides(GREY, ["mean=auto", "std=auto"])
    trainer.train([photos], folder / "run", recipe, observer=observer)
    assert sum(message.startswith("measured on ") for message in observer.messages) == 1
    return folder / "run"


def test_a_grey_run_becomes_a_folder_that_both_engines_read(run: Path, photos: Path, tmp_path: Path) -> None:
    saved = load_recipe(run / "recipe.yaml")
    assert isinstance(saved.mean, tuple) and len(saved.mean) == 1
    photo = sorted(photos.glob("*.jpg"))[0]
    colour = open_image(photo)
    grey = colour.convert("L")
    grey.save(tmp_path / "grey.png")
    levels = np.asarray(grey).astype(np.uint16) * 257
    Image.fromarray(levels).save(tmp_path / "grey16.png")
    vectors: list[Any] = []
    for engine in ("onnx", "torch"):
        backbone = load_backbone(run / "model", engine=engine)
        assert backbone.preprocessing.mean == saved.mean and backbone.preprocessing.std == saved.std
        assert backbone.transform(photo).shape == (1, 32, 32)
        same = backbone.embed([photo, grey, tmp_path / "grey.png", tmp_path / "grey16.png"])
        # The luma is the same whichever way the picture comes.
        np.testing.assert_allclose(same, np.repeat(same[:1], 4, axis=0), atol=1e-5)
        vectors.append(same)
        assert backbone.attention(photo).shape[1:] == (2, 2)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    # What the network makes of it, by timm alone.
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    network = timm.create_model(PICO, in_chans=1, img_size=32, num_classes=0, pretrained=False)
    network.load_state_dict(load_file(run / "model" / "timm.safetensors"))
    resized = Image.fromarray(np.asarray(grey)).resize(_short_side(grey.size, 37), Image.Resampling.BICUBIC)
    left, top = round((resized.width - 32) / 2), round((resized.height - 32) / 2)
    pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float32) / 255
    pixels = (pixels - saved.mean[0]) / saved.std[0]  # type: ignore[index]
    with torch.no_grad():
        truth = network.eval()(torch.from_numpy(pixels.astype(np.float32))[None, None])
    np.testing.assert_allclose(vectors[1][0], truth[0].numpy(), atol=1e-4)


def _short_side(size: tuple[int, int], px: int) -> tuple[int, int]:
    width, height = size
    return (px, int(px * height / width)) if width <= height else (int(px * width / height), px)


def test_a_run_that_goes_on_keeps_its_numbers(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dinokit.training.views import normalisation as module

    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    recipe = measured(with_overrides(GREY, ["mean=auto", "std=auto"]), TrainingPictures([]), run=run)
    assert recipe.mean == load_recipe(run / "recipe.yaml").mean


def test_the_shell_commands_work_with_a_grey_model(run: Path, photos: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from dinokit.cli import cli

    for arguments in (
        ["embed", str(photos), "-m", str(run), "-o", str(tmp_path / "table.parquet"), "-q"],
        ["attention", str(photos), "-m", str(run), "-o", str(tmp_path / "attention"), "-q"],
        ["pca", str(photos), "-m", str(run), "-o", str(tmp_path / "pca"), "-q"],
    ):
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output


def test_the_option_of_the_command(photos: Path) -> None:
    from click.testing import CliRunner

    from dinokit.cli import cli

    result = CliRunner().invoke(
        cli, ["train", str(photos), "--recipe", "smoke", "--channels", "1", "--explain"]
    )
    assert result.exit_code == 0 and "channels: 1" in result.output.splitlines()
    wrong = CliRunner().invoke(cli, ["train", str(photos), "--channels", "0", "--explain"])
    assert wrong.exit_code == 2 and "0 is not in the range 1<=x<=1000" in wrong.output


def test_a_network_of_timm_with_one_channel(tmp_path: Path, photos: Path) -> None:
    recipe = with_overrides(GREY, ["arch=resnet18", "local_crop_px=32"])
    trainer.train([photos], tmp_path / "run", recipe)
    backbone = load_backbone(tmp_path / "run" / "model", engine="torch")
    assert backbone.embed(sorted(photos.glob("*.jpg"))[0]).shape == (512,)
