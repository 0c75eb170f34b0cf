"""Mean and standard deviation of the pixels: ImageNet's, the user's, or measured on the pictures.

They are saved in the model folder's preprocessing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.pictures.bands import is_photographic
from dinokit.pictures.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from dinokit.training.monitoring.evaluation import read_crop
from dinokit.training.recipe import LEAST_STD, Recipe, height_and_width
from dinokit.training.run.run_folder import recipe_of
from dinokit.training.views.pictures import Pictures

__all__ = ["measure", "measured", "normalisation", "preprocessing_of"]

Values = tuple[float, ...]

_MOST_PICTURES = 2000
_DIGITS = 4
_LEAST_STD_OF_8_BITS = 1e-3  # a quarter of one of 256 levels
_CROP_SHARE = 224 / 256


def normalisation(recipe: Recipe) -> tuple[Values, Values]:
    """(mean, std), a number in 0…1 for each channel; for one channel ImageNet's average over its three.

    ImageNet has no values for other numbers of channels; ``adapt`` sets them to auto.
    """
    assert "auto" not in (recipe.mean, recipe.std), "a run measures these before it begins"
    mean = _imagenet(IMAGENET_MEAN, recipe.channels) if recipe.mean is None else recipe.mean
    std = _imagenet(IMAGENET_STD, recipe.channels) if recipe.std is None else recipe.std
    assert isinstance(mean, tuple) and isinstance(std, tuple)  # auto is the only text that a recipe takes
    return mean, std


def _imagenet(values: Values, channels: int) -> Values:
    if channels == len(values):
        return values
    return (round(sum(values) / len(values), _DIGITS),) * channels


def preprocessing_of(size: tuple[int, int], mean: Values, std: Values) -> Preprocessing:
    """The preprocessing for evaluation of a network trained at ``size`` (H, W).

    For a square: the short side is resized to 256/224 of it and the centre cropped, as facebookresearch/dino evaluates.
    Otherwise the whole picture is resized to this size: a wide centre crop would lose most of it.
    """
    height, width = size
    if height == width:
        return Preprocessing(round(height / _CROP_SHARE), size, mean=mean, std=std)
    return Preprocessing(size, size, mean=mean, std=std)


def measured(
    recipe: Recipe, pictures: Pictures, *, run: Path, tell: Callable[[str], None] = lambda _: None
) -> Recipe:
    """The recipe with measured numbers instead of ``auto``.

    Args:
        recipe: complete but for these.
        pictures: of the run.
        run: its folder; a resumed run keeps its first values.
        tell: called with the measured values.

    Raises:
        UsageError: none of the pictures can be read, or they are all of one colour.
    """
    wanted = [key for key in ("mean", "std") if getattr(recipe, key) == "auto"]
    if not wanted:
        return recipe
    if (before := recipe_of(run)) is not None:
        return replace(recipe, **{key: getattr(before, key) for key in wanted})
    mean, std, count = measure(pictures, recipe.image_hw, recipe.channels)
    found: dict[str, Any] = {"mean": mean, "std": std}
    told = ", ".join(f"{key} {list(found[key])}" for key in wanted)
    tell(f"measured on {count:,} of {len(pictures):,} pictures: {told}")
    return replace(recipe, **{key: found[key] for key in wanted})


def measure(
    pictures: Pictures, size_px: int | tuple[int, int], channels: int, *, limit: int = _MOST_PICTURES
) -> tuple[Values, Values, int]:
    """Mean and standard deviation over the pixels of pictures, as the network sees them in evaluation.

    Args:
        pictures: unreadable ones are skipped.
        size_px: (H, W) of the crop, or one number for both; the deviation falls when a picture is made smaller.
        channels: 3, 1 for grey, or those of :class:`~dinokit.pictures.bands.Bands`.
        limit: largest number of pictures; the choice is random, but always the same.

    Returns:
        Mean and standard deviation of each channel in 0…1, rounded to 4 decimals (to 6 significant digits for bands and
        for more than 8 bits, which may be dark), and the number of pictures read.

    Raises:
        UsageError: none of the pictures can be read, or a channel has one value everywhere.
    """
    see = preprocessing_of(height_and_width(size_px), (0.0,) * channels, (1.0,) * channels)
    chosen = np.sort(np.random.default_rng(0).permutation(len(pictures))[:limit])

    def moments(index: int) -> tuple[NDArray[np.float64], bool] | str:
        crop = read_crop(pictures, int(index), see)
        if isinstance(crop, str):
            return crop
        pixels = crop.reshape(-1, channels).astype(np.float64) / 255
        return np.stack([pixels.mean(axis=0), (pixels**2).mean(axis=0)]), crop.dtype != np.uint8

    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(moments, chosen))
    read = [item for item in found if not isinstance(item, str)]
    if not read:
        first = next(item for item in found if isinstance(item, str))
        raise UsageError(
            f"mean and std cannot be measured: none of {len(found)} pictures can be read; {first}"
        )
    mean, squares = np.mean([both for both, _ in read], axis=0)
    std = np.sqrt(np.maximum(squares - mean**2, 0))
    of_8_bits = is_photographic(channels) and not any(finer for _, finer in read)
    rounded = _rounded if of_8_bits else _rounded_of_bands
    if std.min() < (_LEAST_STD_OF_8_BITS if of_8_bits else LEAST_STD):
        raise UsageError(
            f"std=auto found {list(rounded(std))} on {len(read)} pictures: a channel has nearly "
            "one value everywhere, so there is nothing to learn from it. Check the pictures, or give std as numbers"
        )
    return rounded(mean), rounded(std), len(read)


def _rounded(values: NDArray[np.float64]) -> Values:
    return tuple(round(float(v), _DIGITS) for v in values)


def _rounded_of_bands(values: NDArray[np.float64]) -> Values:
    return tuple(float(f"{v:.6g}") for v in values)
