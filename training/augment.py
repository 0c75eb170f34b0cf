"""Multi-crop: two global and several local views of one picture.

Source: facebookresearch/dino `main_dino.py`, `DataAugmentationDINO`, with Pillow as there. Every random number
comes from the generator that is handed over, so a picture's views depend on nothing but its seed: not on the
number of workers, not on what was drawn before, not on whether the run was interrupted.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dinokit.training.recipe import Recipe

__all__ = ["MultiCrop", "View", "random_crop_box"]

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
        global_crops = np.stack([self._view(image, view, rng) for view in self.global_views])
        local_crops = [self._view(image, view, rng) for view in self.local_views]
        return global_crops, np.stack(local_crops) if local_crops else None

    def _view(self, image: Image.Image, view: View, rng: random.Random) -> NDArray[np.uint8]:
        # Crop first, then resize: the filter must not see pixels outside the box.
        crop = image.crop(random_crop_box(image.size, view.scale, rng))
        crop = crop.resize((view.size_px, view.size_px), Image.Resampling.BICUBIC)
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if rng.random() < 0.8:
            crop = _jitter(crop, rng)
        if rng.random() < 0.2:
            crop = crop.convert("L").convert("RGB")
        if rng.random() < view.blur:
            crop = crop.filter(ImageFilter.GaussianBlur(rng.uniform(*self.blur_radius_px)))
        if rng.random() < view.solarize:
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


def _jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    """torchvision's ColorJitter(0.4, 0.4, 0.2, 0.1): four changes in random order."""
    brightness = rng.uniform(1 - _BRIGHTNESS, 1 + _BRIGHTNESS)
    contrast = rng.uniform(1 - _CONTRAST, 1 + _CONTRAST)
    saturation = rng.uniform(1 - _SATURATION, 1 + _SATURATION)
    hue = rng.uniform(-_HUE, _HUE)
    steps: list[Callable[[Image.Image], Image.Image]] = [
        lambda im: ImageEnhance.Brightness(im).enhance(brightness),
        lambda im: ImageEnhance.Contrast(im).enhance(contrast),
        lambda im: ImageEnhance.Color(im).enhance(saturation),
        lambda im: _shift_hue(im, hue),
    ]
    rng.shuffle(steps)
    for step in steps:
        image = step(image)
    return image


def _shift_hue(image: Image.Image, turn: float) -> Image.Image:
    """Turns the hue by ``turn`` of the colour circle (-0.5 to 0.5), in Pillow's 8-bit HSV."""
    hue, saturation, value = image.convert("HSV").split()
    shift = int(turn * 255) % 256
    hue = hue.point([(level + shift) % 256 for level in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
