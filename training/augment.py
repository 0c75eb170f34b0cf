"""Multi-crop: two global and several local views of one picture.

Source: facebookresearch/dino `main_dino.py`, `DataAugmentationDINO`, with Pillow as there. A view is drawn first
(`draw_view`: box, flip, colours, blur, all as numbers) and made afterwards, here with Pillow or for a whole batch at
once (`batched_crops.py`). Every random number comes from the generator that is handed over, so a picture's views
depend on nothing but its seed: not on the number of workers, not on what was drawn before, not on whether the run
was interrupted, not on how the crops are made.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinokit.training.recipe import Recipe

__all__ = ["DRAW_DTYPE", "Draw", "MultiCrop", "View", "draw_view", "make_view", "random_crop_box"]

_ASPECT = (3 / 4, 4 / 3)  # torchvision's RandomResizedCrop
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = 0.4, 0.4, 0.2, 0.1


@dataclass(frozen=True)
class View:
    """How one kind of view is made."""

    size_px: int
    scale: tuple[float, float]
    blur: float
    """Probability of a Gaussian blur."""
    solarize: float = 0.0
    """Probability of inverting all values from 128."""


class Draw(NamedTuple):
    """One view of one picture, as numbers. What is done to it, in this order:"""

    box: tuple[int, int, int, int]
    """(left, top, right, bottom) of the crop in pixels of the picture."""
    flip: bool
    """Mirrored left to right."""
    jitter: bool
    """Whether the colours change at all."""
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

    ``views(image, rng)`` returns (2, G, G, 3) and (L, S, S, 3) uint8.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.blur_radius_px = recipe.blur_radius_px
        first = View(recipe.global_crop_px, recipe.global_crops_scale, blur=1.0)
        second = View(recipe.global_crop_px, recipe.global_crops_scale, blur=0.1, solarize=0.2)
        local = View(recipe.local_crop_px, recipe.local_crops_scale, blur=0.5)
        self.global_views = [first, second]
        self.local_views = [local] * recipe.n_local_crops

    @property
    def least_px(self) -> int:
        """Shortest side of a picture from which no crop has to be enlarged."""
        views = self.global_views + self.local_views
        # The least box has the least area at the widest aspect ratio.
        return math.ceil(max(v.size_px / math.sqrt(v.scale[0] * _ASPECT[0]) for v in views))

    def draw(self, size: tuple[int, int], rng: random.Random) -> list[Draw]:
        """Draws the views of a picture of ``size`` (width, height): the global ones, then the local ones."""
        views = self.global_views + self.local_views
        return [draw_view(size, view, self.blur_radius_px, rng) for view in views]

    def __call__(
        self, image: Image.Image, rng: random.Random
    ) -> tuple[NDArray[np.uint8], NDArray[np.uint8] | None]:
        """
        Args:
            image: upright RGB.
            rng: source of all randomness.

        Returns:
            Global crops (2, G, G, 3) and local crops (L, S, S, 3), uint8; None when L is 0.
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
    box = random_crop_box(size, view.scale, rng)
    flip = rng.random() < 0.5
    jitter = rng.random() < 0.8
    factors, order = (1.0, 1.0, 1.0, 0.0), [0, 1, 2, 3]
    if jitter:  # torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1): four changes in random order
        factors = (
            rng.uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS),
            rng.uniform(1 - _CONTRAST, 1 + _CONTRAST),
            rng.uniform(1 - _SATURATION, 1 + _SATURATION),
            rng.uniform(-_HUE, _HUE),
        )
        rng.shuffle(order)
    grey = rng.random() < 0.2
    blur_px = rng.uniform(*blur_radius_px) if rng.random() < view.blur else 0.0
    solarize = rng.random() < view.solarize
    return Draw(box, flip, jitter, factors, (order[0], order[1], order[2], order[3]), grey, blur_px, solarize)


def make_view(image: Image.Image, size_px: int, draw: Draw) -> NDArray[np.uint8]:
    """Makes one view with Pillow.

    Args:
        image: upright RGB.
        size_px: side of the view.
        draw: what to do, in pixels of ``image``.

    Returns:
        (size_px, size_px, 3) uint8.
    """
    # Crop first, then resize: the filter must not see pixels outside the box.
    crop = image.crop(draw.box).resize((size_px, size_px), Image.Resampling.BICUBIC)
    if draw.flip:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw.jitter:
        crop = _jitter(crop, draw)
    if draw.grey:
        crop = crop.convert("L").convert("RGB")
    if draw.blur_px:
        crop = crop.filter(ImageFilter.GaussianBlur(draw.blur_px))
    if draw.solarize:
        crop = ImageOps.solarize(crop, 128)
    return np.asarray(crop)


def random_crop_box(
    size: tuple[int, int], scale: tuple[float, float], rng: random.Random
) -> tuple[int, int, int, int]:
    """A random box inside a picture, as torchvision's RandomResizedCrop draws it.

    Args:
        size: (width, height) of the picture, PIL's order.
        scale: range of the box's share of the area; its aspect ratio is drawn from 3/4 to 4/3.
        rng: source of randomness.

    Returns:
        (left, top, right, bottom). After ten draws that do not fit, the largest centred box whose aspect ratio
        is allowed.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(_ASPECT[0]), math.log(_ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w = min(width, max(1, round(height * _ASPECT[1])))
    h = min(height, max(1, round(width / _ASPECT[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _jitter(image: Image.Image, draw: Draw) -> Image.Image:
    brightness, contrast, saturation, hue = draw.factors
    for step in draw.order:
        if step == 0:
            image = ImageEnhance.Brightness(image).enhance(brightness)
        elif step == 1:
            image = ImageEnhance.Contrast(image).enhance(contrast)
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
