"""Multi-crop: two global and several local views of one picture.

Source: facebookresearch/dino `main_dino.py`, `DataAugmentationDINO`, with Pillow as there. A view is drawn first
(`draw_view`: box, flip, colours, blur, all as numbers) and made afterwards, here with Pillow or for a whole batch at
once (`batched_crops.py`). Every random number comes from the given generator, so a picture's views
depend on its seed alone: not on the number of workers, earlier draws, interruptions or how the crops are made.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinokit.pictures.bands import Bands
from dinokit.training.recipe import Recipe, height_and_width
from dinokit.training.views.batched_colour import apply_colours

__all__ = [
    "DRAW_DTYPE",
    "Draw",
    "MultiCrop",
    "View",
    "channels_last",
    "draw_view",
    "make_view",
    "random_crop_box",
]

_ASPECT = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
_JITTER = (0.4, 0.4, 0.2, 0.1)  # brightness, contrast, saturation, hue


@dataclass(frozen=True)
class View:
    """How one kind of view is made."""

    size_px: tuple[int, int]
    """(H, W)"""
    scale: tuple[float, float]
    """Range of the share of the picture's area."""
    blur: float
    """Probability of a Gaussian blur."""
    solarize: float = 0.0
    """Probability of inverting all values from 128."""
    jitter: float = 1.0
    """Strength of the colour jitter: 1 is the reference's, 0 leaves the colours as they are."""
    grey: float = 0.2
    """Probability of being made grey."""


class Draw(NamedTuple):
    """One view of one picture, as numbers, in the order in which they are applied. Saturation, hue and grey apply to
    pictures of three channels only, since other channels are not colours."""

    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of the crop in pixels of the picture."""
    flip: bool
    """Mirrored left to right."""
    jitter: bool
    """Whether ``factors`` are applied."""
    factors: tuple[float, float, float, float]
    """Brightness, contrast, saturation (1 changes nothing) and the turn of the hue (-0.5 to 0.5)."""
    order: tuple[int, int, int, int]
    """In which order these four are applied, as positions in ``factors``."""
    grey: bool
    """Made grey."""
    blur_px: float
    """Radius of the Gaussian blur; 0 for none."""
    solarize: bool
    """Values from 128 inverted."""


DRAW_DTYPE = np.dtype(
    [
        ("box", np.int32, 4),
        ("flip", np.bool_),
        ("jitter", np.bool_),
        ("factors", np.float64, 4),
        ("order", np.uint8, 4),
        ("grey", np.bool_),
        ("blur_px", np.float64),
        ("solarize", np.bool_),
    ]
)
"""The fields of :class:`Draw` as one numpy record: ``np.array(draws, dtype=DRAW_DTYPE)``."""
assert DRAW_DTYPE.names == Draw._fields


class MultiCrop:
    """Makes the views of one picture.

    ``views(image, rng)`` returns (2, G, G, C) and (L, S, S, C) uint8.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.blur_radius_px = recipe.blur_radius_px
        jitter, grey = recipe.color_jitter_strength, recipe.grey_probability
        large = View(recipe.global_crop_hw, recipe.global_crops_scale, blur=1.0, jitter=jitter, grey=grey)
        small = View(recipe.local_crop_hw, recipe.local_crops_scale, blur=0.5, jitter=jitter, grey=grey)
        first, second, local = large, replace(large, blur=0.1, solarize=0.2), small
        self.global_views = [first, second]
        self.local_views = [local] * recipe.n_local_crops

    @property
    def least_px(self) -> int:
        """Shortest side of a picture at which no crop is enlarged."""
        views = self.global_views + self.local_views
        # The least box has the least area at the widest aspect ratio.
        return math.ceil(
            max(math.sqrt(math.prod(v.size_px)) / math.sqrt(v.scale[0] * _ASPECT[0]) for v in views)
        )

    def draw(self, size: tuple[int, int], rng: random.Random) -> list[Draw]:
        """Draws the views of a picture of ``size`` (width, height): the global ones, then the local ones."""
        views = self.global_views + self.local_views
        return [draw_view(size, view, self.blur_radius_px, rng) for view in views]

    def __call__(
        self, image: Image.Image | Bands, rng: random.Random
    ) -> tuple[NDArray[Any], NDArray[Any] | None]:
        """
        Args:
            image: upright, RGB or L, or bands, which photographs of more than 8 bits are as well.
            rng: source of all randomness.

        Returns:
            Global crops (2, G, G, C) and local crops (L, S, S, C), uint8; of bands that are finer than 8 bits float32,
            on the same scale. None when L is 0.
        """
        views = self.global_views + self.local_views
        draws = self.draw(image.size, rng)
        crops = [make_view(image, view.size_px, draw) for view, draw in zip(views, draws, strict=True)]
        return np.stack(crops[:2]), np.stack(crops[2:]) if self.local_views else None


def draw_view(
    size: tuple[int, int], view: View, blur_radius_px: tuple[float, float], rng: random.Random
) -> Draw:
    """Draws one view.

    Args:
        size: (width, height) of the picture, PIL's order.
        view: the kind of view.
        blur_radius_px: range of the blur's radius.
        rng: source of all randomness.
    """
    height, width = view.size_px
    box = random_crop_box(size, view.scale, rng, aspect=width / height)
    flip = rng.random() < 0.5
    jitter = rng.random() < 0.8
    factors, order = (1.0, 1.0, 1.0, 0.0), [0, 1, 2, 3]
    if jitter:  # torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1): four changes in random order
        brightness, contrast, saturation, hue = (view.jitter * most for most in _JITTER)
        factors = (
            rng.uniform(1 - brightness, 1 + brightness),
            rng.uniform(1 - contrast, 1 + contrast),
            rng.uniform(1 - saturation, 1 + saturation),
            rng.uniform(-hue, hue),
        )
        rng.shuffle(order)
        # Drawn even at strength 0, so that every strength cuts its crops in the same places. Factors that change
        # nothing are not applied: turning the hue by 0 changes some pixels by a grey level.
        jitter = view.jitter > 0
    grey = rng.random() < view.grey
    blur_px = rng.uniform(*blur_radius_px) if rng.random() < view.blur else 0.0
    solarize = rng.random() < view.solarize
    return Draw(box, flip, jitter, factors, (order[0], order[1], order[2], order[3]), grey, blur_px, solarize)


def make_view(image: Image.Image | Bands, size_px: int | tuple[int, int], draw: Draw) -> NDArray[Any]:
    """Makes one view with Pillow.

    Args:
        image: upright, RGB or L, or bands.
        size_px: (H, W) of the view, or one number for both.
        draw: the view, in pixels of ``image``.

    Returns:
        (H, W, C) uint8, C = 3 for RGB and 1 for L; for bands with the dtype of ``Bands.array``.
    """
    # Crop first, then resize: the filter must not see pixels outside the box.
    height, width = height_and_width(size_px)
    crop = image.crop(draw.box).resize((width, height), Image.Resampling.BICUBIC)
    if draw.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if isinstance(crop, Bands):
        return colour_bands(crop.array, draw)
    if draw.jitter:
        crop = _jitter(crop, draw)
    if draw.grey and crop.mode == "RGB":
        crop = crop.convert("L").convert("RGB")
    if draw.blur_px:
        crop = crop.filter(ImageFilter.GaussianBlur(draw.blur_px))
    if draw.solarize:
        crop = ImageOps.solarize(crop, 128)
    return channels_last(crop)


def channels_last(image: Image.Image | Bands) -> NDArray[Any]:
    """(H, W, C) of a picture, 0…255."""
    if isinstance(image, Bands):
        return image.array
    pixels = np.asarray(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def colour_bands(pixels: NDArray[Any], draw: Draw) -> NDArray[Any]:
    """Applies a view except its box and flip to (H, W, C). Pillow cannot: it has at most four channels, and only 8 bits
    per colour."""
    crop = torch.from_numpy(pixels.transpose(2, 0, 1)[None].astype(np.float32))
    made = apply_colours(crop, np.array([draw], DRAW_DTYPE), whole=pixels.dtype == np.uint8)
    return made[0].permute(1, 2, 0).numpy().astype(pixels.dtype)


def random_crop_box(
    size: tuple[int, int], scale: tuple[float, float], rng: random.Random, *, aspect: float = 1.0
) -> tuple[int, int, int, int]:
    """A random box inside a picture, as torchvision's RandomResizedCrop draws it.

    Args:
        size: (width, height) of the picture, PIL's order.
        scale: range of the box's share of the area.
        rng: source of randomness.
        aspect: width over height of the resized crop; the box's is drawn from 3/4 to 4/3 of it.

    Returns:
        (left, top, right, bottom). After ten draws that do not fit, the largest centred box whose aspect ratio
        is allowed.
    """
    width, height = size
    narrow, wide = _ASPECT[0] * aspect, _ASPECT[1] * aspect
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        drawn = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        w, h = round(math.sqrt(area * drawn)), round(math.sqrt(area / drawn))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * wide)))
    h = min(height, max(1, round(width / narrow)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _jitter(image: Image.Image, draw: Draw) -> Image.Image:
    brightness, contrast, saturation, hue = draw.factors
    for step in draw.order:
        if step == 0:
            image = ImageEnhance.Brightness(image).enhance(brightness)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(contrast)
        elif image.mode != "RGB":
            continue
        elif step == 2:
            image = ImageEnhance.Color(image).enhance(saturation)
        else:
            image = _shift_hue(image, hue)
    return image


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue by ``turn`` of the colour circle (-0.5 to 0.5), in Pillow's 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255) % 256
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
