"""All crops of a batch made at once on the training device, instead of one by one with Pillow in the workers.

A worker decodes, draws the views (`augment.py`, the same draws from the same generator) and passes the pixels on
unchanged; the device cuts, resizes (`resample.py`) and colours them (`batched_colour.py`). The pictures of a batch are
concatenated in memory, each with its own size, without padding.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dinokit.pictures.bands import Bands
from dinokit.training.devices.transfer import sent
from dinokit.training.recipe import height_and_width
from dinokit.training.views.augment import DRAW_DTYPE, Draw, MultiCrop, channels_last
from dinokit.training.views.batched_colour import apply_colours
from dinokit.training.views.resample import crop_and_resize

__all__ = ["PictureBatch", "PictureViews", "draw_picture", "join", "make_crops"]

_LARGEST_PX = 2**19  # a picture of 724×724: 1.5 MB
# Pixels processed at once: on an accelerator few kernels (some hundred MB), on a CPU what fits the cache.
_CHUNK_PX, _CHUNK_PX_CPU = 2**23, 2**17


@dataclass(frozen=True)
class PictureViews:
    """One picture and its V drawn views."""

    pixels: NDArray[Any]
    """(T, C), row by row: uint8, or float32 for bands finer than 8 bits."""
    starts: NDArray[np.int64]
    """(V,) index in ``pixels`` at which the source of each view begins: 0, unless the picture was large."""
    widths: NDArray[np.int64]
    """(V,) width of that source in pixels."""
    draws: NDArray[Any]
    """(V,) of ``DRAW_DTYPE``, boxes in pixels of the source."""


@dataclass(frozen=True)
class PictureBatch:
    """B pictures with V views each, and the pictures that could not be read."""

    pixels: Tensor
    """(T, C), all pictures concatenated: uint8, or float32 if one of them is."""
    starts: NDArray[np.int64]
    """(B, V)"""
    widths: NDArray[np.int64]
    """(B, V)"""
    draws: NDArray[Any]
    """(B, V) of ``DRAW_DTYPE``."""
    unreadable: list[str]
    """One line for each picture that was left out."""
    masks: Tensor | None = None
    """(2, B, rows, columns) bool: patches of the global crops that are hidden from the student."""
    teaching: Tensor | None = None
    """(B, N) float32: how much each frozen teacher counts for a picture, where not all teach all."""

    def pin_memory(self) -> PictureBatch:
        """Called by torch's DataLoader."""
        return replace(self, pixels=self.pixels.pin_memory())


def draw_picture(image: Image.Image | Bands, multi_crop: MultiCrop, rng: random.Random) -> PictureViews:
    """Draws the views of a picture.

    Args:
        image: upright, RGB or L, or bands.
        multi_crop: the kinds of views.
        rng: source of all randomness.
    """
    draws = multi_crop.draw(image.size, rng)
    sizes_px = [view.size_px for view in multi_crop.global_views + multi_crop.local_views]
    n_pixels = image.width * image.height
    if n_pixels > max(_LARGEST_PX, sum(math.prod(size) for size in sizes_px)):
        return _shrunk(image, draws, sizes_px)
    n_views = len(draws)
    return PictureViews(
        _rows(image),
        np.zeros(n_views, np.int64),
        np.full(n_views, image.width, np.int64),
        np.array(draws, DRAW_DTYPE),
    )


def _rows(image: Image.Image | Bands) -> NDArray[Any]:
    """(H · W, C)."""
    pixels = channels_last(image)
    return pixels.reshape(-1, pixels.shape[2])


def _shrunk(image: Image.Image | Bands, draws: list[Draw], sizes_px: list[tuple[int, int]]) -> PictureViews:
    """The boxes of a large picture, resized by Pillow: whole photographs of 36 MB from sixteen workers would fill the
    memory.

    Each box becomes a separate source, which the device uses whole.
    """
    parts = [
        _rows(image.crop(draw.box).resize((width, height), Image.Resampling.BICUBIC))
        for draw, (height, width) in zip(draws, sizes_px, strict=True)
    ]
    whole = [
        draw._replace(box=(0, 0, width, height))
        for draw, (height, width) in zip(draws, sizes_px, strict=True)
    ]
    return PictureViews(
        np.concatenate(parts),
        np.cumsum([0, *(len(part) for part in parts[:-1])], dtype=np.int64),
        np.array([width for _, width in sizes_px], np.int64),
        np.array(whole, DRAW_DTYPE),
    )


def join(pictures: Sequence[PictureViews], unreadable: list[str]) -> PictureBatch:
    """Puts at least one picture into a batch."""
    begins = np.cumsum([0, *(len(p.pixels) for p in pictures[:-1])], dtype=np.int64)
    return PictureBatch(
        torch.from_numpy(np.concatenate([p.pixels for p in pictures])),
        np.stack([p.starts for p in pictures]) + begins[:, None],
        np.stack([p.widths for p in pictures]),
        np.stack([p.draws for p in pictures]),
        unreadable,
    )


def make_crops(
    batch: PictureBatch,
    global_crop_px: int | tuple[int, int],
    local_crop_px: int | tuple[int, int],
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """Makes all crops of a batch; a picture's crops do not depend on the other pictures.

    If a batch has bands of 8 bits and finer ones, all are computed without rounding.

    Returns:
        Global crops (2, B, C, G, G) and local crops (L, B, C, S, S), of the pixels' dtype on the device; None when L
        is 0.
    """
    pixels = sent(batch.pixels, device)
    chunk_px = _CHUNK_PX_CPU if device.type == "cpu" else _CHUNK_PX

    def views(which: slice, size_px: int | tuple[int, int]) -> Tensor:
        height, width = height_and_width(size_px)
        draws = np.ascontiguousarray(batch.draws[:, which].T)  # (V, B)
        n_views, n_images = draws.shape
        draws = draws.reshape(-1)
        crops = crop_and_resize(
            pixels,
            batch.starts[:, which].T.reshape(-1),
            batch.widths[:, which].T.reshape(-1),
            draws["box"].astype(np.int64),
            draws["flip"],
            (height, width),
            chunk_px=chunk_px,
        )
        at_once = max(chunk_px // (height * width), 1)
        for first in range(0, len(draws), at_once):
            apply_colours(
                crops[first : first + at_once],
                draws[first : first + at_once],
                whole=pixels.dtype == torch.uint8,
            )
        return crops.to(pixels.dtype).view(n_views, n_images, -1, height, width)

    # Autocast would round the products to bfloat16.
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        global_crops = views(slice(0, 2), global_crop_px)
        has_local = batch.draws.shape[1] > 2
        return global_crops, views(slice(2, None), local_crop_px) if has_local else None
