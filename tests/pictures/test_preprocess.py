"""Preprocessing against torchvision, pixel for pixel."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from small_models import picture

import dinokit.pictures.preprocess
from dinokit.errors import ModelError
from dinokit.pictures.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

# (width, height): larger, smaller, odd, equal to the resize or the crop, long and thin both ways, one pixel.
SIZES = [
    (640, 480), (480, 640), (481, 333), (333, 481), (257, 256), (256, 257), (256, 256), (224, 224), (225, 223),
    (1000, 301), (301, 1000), (100, 75), (75, 100), (13, 7), (1, 1), (2, 3), (20, 1100), (1100, 20), (1, 40),
    (1999, 1333),
]  # fmt: skip


def noise(width: int, height: int) -> Image.Image:
    """The hardest content: neighbouring pixels have nothing to do with each other."""
    values = np.random.default_rng(width * 10007 + height).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(values)


def torchvision_crop(
    image: Image.Image, resize: int | tuple[int, int], crop: tuple[int, int], filter_: str
) -> np.ndarray:
    v2 = pytest.importorskip("torchvision.transforms.v2")
    interpolation = {"bicubic": v2.InterpolationMode.BICUBIC, "bilinear": v2.InterpolationMode.BILINEAR}[
        filter_
    ]
    return np.asarray(
        v2.Compose([v2.Resize(resize, interpolation=interpolation), v2.CenterCrop(crop)])(image)
    )


@pytest.mark.parametrize("size", SIZES, ids=lambda s: f"{s[0]}x{s[1]}")
def test_crop_equals_torchvision(size: tuple[int, int]) -> None:
    image = noise(*size)
    np.testing.assert_array_equal(
        Preprocessing().crop(image), torchvision_crop(image, 256, (224, 224), "bicubic")
    )


@pytest.mark.parametrize(
    ("resize", "crop", "interpolation"),
    [
        (256, (256, 256), "bicubic"),
        (147, (96, 128), "bilinear"),
        ((256, 200), (224, 192), "bicubic"),
        ((37, 41), (32, 40), "bilinear"),
    ],
)
def test_other_sizes_equal_torchvision(
    resize: int | tuple[int, int], crop: tuple[int, int], interpolation: str
) -> None:
    preprocessing = Preprocessing(resize_px=resize, crop_px=crop, interpolation=interpolation)
    for size in [(640, 480), (333, 481), (50, 47), (3, 200)]:
        image = noise(*size)
        np.testing.assert_array_equal(
            preprocessing.crop(image), torchvision_crop(image, resize, crop, interpolation)
        )


@pytest.mark.parametrize("size", [(20, 1100), (1100, 20), (37, 9001), (4, 1500), (640, 480)], ids=str)
def test_the_window_of_a_long_thin_picture_is_that_of_the_whole(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = noise(*size)
    whole = Preprocessing().crop(image)
    monkeypatch.setattr(dinokit.pictures.preprocess, "_MOST_RESIZED_PIXELS", 0)
    difference = np.abs(Preprocessing().crop(image).astype(int) - whole)
    assert difference.max() <= 1  # a box in float32 flips a rounding now and then
    assert (difference > 0).mean() < 1e-3


def test_very_long_and_thin_pictures_need_no_memory() -> None:
    # Resized whole, this would be 256 x 15 million pixels: 15 GB.
    picture = Image.new("RGB", (1, 60_000), (10, 200, 30))
    crop = Preprocessing().crop(picture)
    assert crop.shape == (224, 224, 3)
    assert (crop == (10, 200, 30)).all()


def test_normalise_is_the_formula() -> None:
    crops = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    expected = (crops / 255 - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    planes = Preprocessing().normalise(crops)
    assert planes.dtype == np.float32
    assert planes.flags.c_contiguous
    np.testing.assert_allclose(planes, expected.transpose(0, 3, 1, 2), atol=1e-6)


def test_with_image_size_keeps_the_share() -> None:
    assert Preprocessing().with_image_size(448) == Preprocessing(resize_px=512, crop_px=(448, 448))
    oblong = Preprocessing().with_image_size((96, 448))
    assert oblong == Preprocessing(resize_px=(109, 512), crop_px=(96, 448))
    assert oblong.with_image_size((48, 224)) == Preprocessing(resize_px=(54, 256), crop_px=(48, 224))
    squash = Preprocessing(resize_px=(256, 256), crop_px=(224, 224))
    assert squash.with_image_size(112) == Preprocessing(resize_px=(128, 128), crop_px=(112, 112))


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ModelError, match=r"resize_px=200 is smaller than crop_px=\(224, 224\)"):
        Preprocessing(resize_px=200)
    with pytest.raises(ModelError, match="smaller than crop_px"):
        Preprocessing(resize_px=(300, 100), crop_px=(224, 224))
    with pytest.raises(ModelError, match="interpolation='nearest' is not known"):
        Preprocessing(interpolation="nearest")


def test_json_round_trip() -> None:
    for preprocessing in (
        Preprocessing(),
        Preprocessing(resize_px=(9, 8), crop_px=(8, 8), interpolation="bilinear"),
    ):
        assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    with pytest.raises(ModelError, match="unknown keys"):
        Preprocessing.from_json({"sharpen": 1})


SEEN_BY_TIMM = [
    Preprocessing(),
    Preprocessing(resize_px=110, crop_px=(96, 96)).with_image_size(832),  # 832 / (832 / 953) is below 953
    Preprocessing(resize_px=(80, 80), crop_px=(64, 64)),
    Preprocessing().with_image_size((96, 448)),
    Preprocessing(resize_px=80, crop_px=(64, 64)).with_image_size((64, 128)),
]


@pytest.mark.parametrize("preprocessing", SEEN_BY_TIMM, ids=lambda p: f"{p.resize_px} {p.crop_px}")
def test_timm_makes_the_same_picture(preprocessing: Preprocessing) -> None:
    data = pytest.importorskip("timm.data")
    assert preprocessing.timm_agrees
    cfg = preprocessing.to_pretrained_cfg()
    transform = data.create_transform(
        tuple(cfg["input_size"]),
        **{key: cfg[key] for key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    for size in ((640, 400), (300, 1000)):
        photo = picture(*size)
        seen = preprocessing.normalise(preprocessing.crop(photo)[None])[0]
        np.testing.assert_allclose(transform(photo).numpy(), seen, atol=1e-5)


def test_what_timm_cannot_be_told() -> None:
    assert not Preprocessing(resize_px=(80, 90), crop_px=(64, 64)).timm_agrees
    assert not Preprocessing(resize_px=160, crop_px=(64, 128)).timm_agrees


def test_a_crop_that_is_not_square_keeps_the_lesser_share() -> None:
    """One number for the short side has to cover both sides of the crop."""
    wide = Preprocessing(resize_px=256, crop_px=(128, 224))
    assert wide.with_image_size(112) == Preprocessing(resize_px=128, crop_px=(112, 112))


def test_what_timm_says_of_pixels_comes_back_and_unknown_crops_are_refused() -> None:
    for made in (Preprocessing(), Preprocessing((64, 96), (64, 96)), Preprocessing(248, (224, 224))):
        assert Preprocessing.from_pretrained_cfg(made.to_pretrained_cfg()) == made
    cfg = Preprocessing().to_pretrained_cfg()
    assert Preprocessing.from_pretrained_cfg({**cfg, "crop_pct": 0.5}, image_size=(32, 32)).resize_px == 64
    with pytest.raises(ModelError, match="the crop mode 'border'; dinokit supports 'center' and 'squash'"):
        Preprocessing.from_pretrained_cfg({**cfg, "crop_mode": "border"})
