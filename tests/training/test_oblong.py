"""Crops that are no squares: drawn, made by both ways, trained on, and embedded by what comes out."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")

from pico_vit import PICO
from small_recipe import SMALL_RECIPE

from dinokit import load_backbone
from dinokit.errors import UsageError
from dinokit.pictures.images import open_image
from dinokit.training import trainer
from dinokit.training.recipe import Recipe, load_recipe, save_recipe, with_overrides
from dinokit.training.views.augment import MultiCrop, make_view, random_crop_box
from dinokit.training.views.batched_crops import draw_picture, join, make_crops
from dinokit.training.views.normalisation import preprocessing_of
from dinokit.training.views.resample import crop_and_resize

CPU = torch.device("cpu")
OBLONG = replace(SMALL_RECIPE, global_crop_px=(32, 64), local_crop_px=(16, 32), batch_size=2)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_boxes_have_torchvisions_distribution_around_the_crops_proportions() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    rng, blank = random.Random(1), torch.zeros(3, 300, 500)
    torch.manual_seed(1)
    ratio = (2 * 3 / 4, 2 * 4 / 3)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(blank, (0.1, 0.5), ratio) for _ in range(3000)]
    )
    boxes = np.array([random_crop_box((500, 300), (0.1, 0.5), rng, aspect=2.0) for _ in range(3000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0.06)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.06)
    # Where no box fits, torchvision's largest centred one.
    tall = torch.zeros(3, 900, 20)
    top, left, height, width = transforms.RandomResizedCrop.get_params(tall, (0.9, 1.0), ratio)
    assert random_crop_box((20, 900), (0.9, 1.0), rng, aspect=2.0) == (left, top, left + width, top + height)


@pytest.mark.parametrize("size", [(32, 64), (48, 20), (16, 100)])
def test_the_batched_resize_equals_pillows(size: tuple[int, int]) -> None:
    rng = random.Random(0)
    images = [
        noise(*shape, seed) for seed, shape in enumerate([(300, 200), (90, 400), (33, 47), (7, 5), (1, 1)])
    ]
    flat = torch.from_numpy(np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]))
    starts = np.cumsum([0, *(image.width * image.height for image in images[:-1])])
    which = [rng.randrange(len(images)) for _ in range(60)]
    boxes = []
    for i in which:
        left, right = sorted(rng.sample(range(images[i].width + 1), 2))
        top, bottom = sorted(rng.sample(range(images[i].height + 1), 2))
        boxes.append((left, top, right, bottom))
    flips = np.array([rng.random() < 0.5 for _ in which])
    widths = np.array([images[i].width for i in which])
    made = crop_and_resize(flat, starts[which], widths, np.array(boxes), flips, size, chunk_px=1 << 16)
    for crop, i, box, flip in zip(made, which, boxes, flips, strict=True):
        theirs = images[i].crop(box).resize(size[::-1], Image.Resampling.BICUBIC)
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else theirs
        apart = np.abs(crop.permute(1, 2, 0).numpy() - np.asarray(theirs, np.float64))
        assert apart.mean() <= 0.05 and apart.max() <= 3, (images[i].size, box)


def test_views_equal_pillows_given_the_same_draws() -> None:
    views = MultiCrop(OBLONG)
    whole = []
    for seed in range(12):
        image = noise(120, 90, seed)
        batch = join([draw_picture(image, views, random.Random(seed))], [])
        made = make_crops(batch, OBLONG.global_crop_px, OBLONG.local_crop_px, CPU)
        for ours, theirs, shape in zip(
            made, views(image, random.Random(seed)), [(32, 64), (16, 32)], strict=True
        ):
            assert ours is not None and theirs is not None
            here = ours[:, 0].permute(0, 2, 3, 1).numpy()
            assert here.shape == theirs.shape == (2, *shape, 3)
            whole.append(np.abs(here.astype(int) - theirs.astype(int)).ravel())
    apart = np.concatenate(whole)
    assert apart.mean() <= 0.05 and (apart > 3).mean() <= 1e-3


def test_a_large_picture_is_shrunk_in_the_worker() -> None:
    image, views = noise(900, 700), MultiCrop(OBLONG)  # more pixels than are handed on
    shrunk = draw_picture(image, views, random.Random(2))
    assert len(shrunk.pixels) == 2 * 32 * 64 + 2 * 16 * 32
    made, _ = make_crops(join([shrunk], []), (32, 64), (16, 32), CPU)
    for ours, draw in zip(made[:, 0], views.draw(image.size, random.Random(2)), strict=False):
        theirs = make_view(image, (32, 64), draw)
        assert np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs.astype(int)).mean() < 0.05


def test_no_crop_is_enlarged_from_the_least_size() -> None:
    recipe = replace(OBLONG, global_crops_scale=(0.3, 1.0), local_crops_scale=(0.05, 0.3))
    views = MultiCrop(recipe)
    side, rng = views.least_px, random.Random(0)
    for _ in range(200):
        for view, draw in zip(
            views.global_views + views.local_views, views.draw((side, side), rng), strict=True
        ):
            left, top, right, bottom = draw.box
            # A box that fits within a square is seldom the widest one; a pixel is lost to rounding.
            assert right - left >= view.size_px[1] - 1 and bottom - top >= view.size_px[0] - 1


def test_the_recipe_reads_one_number_or_two(tmp_path: Path) -> None:
    recipe = with_overrides(
        Recipe(), ["global_crop_px=[128, 256]", "local_crop_px=[64, 64]", "image_size_px=null"]
    )
    assert recipe.global_crop_px == (128, 256) and recipe.local_crop_px == 64
    assert recipe.image_hw == recipe.global_crop_hw == (128, 256) and recipe.local_crop_hw == (64, 64)
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe
    for setting, words in (
        (
            "global_crop_px=[128, 250]",
            r"=\[128, 250\] is not a multiple of patch_size=16; use 240 or 256",
        ),
        ("local_crop_px=[64]", r"must be one whole number, or two: \[height, width\]"),
        ("global_crop_px=[0, 64]", "must be at least 1"),
        ("global_crop_px=wide", "must be a whole number"),
    ):
        with pytest.raises(UsageError, match=words):
            with_overrides(Recipe(), [setting])


def test_how_the_finished_model_sees_a_picture() -> None:
    square = preprocessing_of((224, 224), (0.5,) * 3, (0.5,) * 3)
    assert square.resize_px == 256 and square.crop_px == (224, 224)
    picture = noise(200, 100)
    oblong = preprocessing_of((32, 64), (0.5,) * 3, (0.5,) * 3)
    whole = picture.resize((64, 32), Image.Resampling.BICUBIC)  # nothing is cut off
    np.testing.assert_array_equal(oblong.crop(picture), np.asarray(whole))


@pytest.mark.parametrize("crops", ["pillow", "batched"])
def test_from_pictures_to_embeddings(crops: str, tmp_path: Path, photos: Path) -> None:
    recipe = replace(OBLONG, crops=crops)
    trainer.train([photos], tmp_path / "run", recipe)
    photo = sorted(photos.glob("*.jpg"))[0]
    vectors = []
    for engine in ("onnx", "torch"):
        backbone = load_backbone(tmp_path / "run" / "model", engine=engine)
        assert backbone.image_size == (32, 64) and backbone.grid == (2, 4)
        vectors.append(backbone.embed(photo))
        assert backbone.attention(photo).shape == (3, 2, 4)
        assert backbone.patch_tokens(photo).shape == (2, 4, 48)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)
    # By timm alone.
    timm = pytest.importorskip("timm")
    from safetensors.torch import load_file

    network = timm.create_model(PICO, img_size=(32, 64), num_classes=0, pretrained=False)
    network.load_state_dict(load_file(tmp_path / "run" / "model" / "timm.safetensors"))
    resized = open_image(photo).resize((64, 32), Image.Resampling.BICUBIC)
    pixels = (np.asarray(resized, np.float64) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        truth = network.eval()(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float())
    np.testing.assert_allclose(vectors[1], truth[0].numpy(), atol=1e-4)
