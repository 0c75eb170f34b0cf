"""Crops of many pictures cut and resized at once: rows × picture × columns, as batched matrix products.

Pillow's bicubic (a = -0.5, antialiased) is linear in the rows and in the columns, so a crop of any box is
``rows @ box @ columns`` with two matrices that follow from the box's size alone; a flip reverses the columns. As
Pillow does (`src/libImaging/Resample.c`), only pixels inside the box count, and the result of the first product is
rounded to 0…255, as is that of the second.

The matrices hold multiples of 2^-15. Products with 8-bit pixels, and all their sums, then fit float32's 24 bits: the
result is exact in any order of summation, so a crop does not depend on the rest of its batch. (If the caller has
allowed TF32, CUDA rounds the matrices again, to 11 bits.)
"""

from __future__ import annotations

import math

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinokit.training.recipe import height_and_width

__all__ = ["crop_and_resize", "exact_dtype", "on_grid", "resize_matrices", "round_to_bytes"]

_STEPS = 2.0**15
_SUPPORT = 2.0  # a cubic reaches two samples to either side


def crop_and_resize(
    pixels: Tensor,
    starts: NDArray[np.int64],
    widths: NDArray[np.int64],
    boxes: NDArray[np.int64],
    flips: NDArray[np.bool_],
    size_px: int | tuple[int, int],
    *,
    chunk_px: int,
) -> Tensor:
    """Cuts and resizes V boxes out of pictures of any size.

    Args:
        pixels: (T, C) uint8, the rows of all pictures concatenated; or float32, for which nothing is rounded.
        starts: (V,) index in ``pixels`` at which the picture of each box begins.
        widths: (V,) width of that picture in pixels.
        boxes: (V, 4) left, top, right, bottom, inside the picture.
        flips: (V,) bool, mirror left to right.
        size_px: (H, W) of the crops, or one number for both.
        chunk_px: about how many pixels are processed at once; bounds the memory.

    Returns:
        (V, C, H, W) float32 on the device of ``pixels``; whole numbers 0 to 255 if these are uint8.
    """
    device = pixels.device
    size = height_and_width(size_px)
    lefts, tops, rights, bottoms = boxes.T
    table = np.stack([starts, widths, lefts, tops, rights - lefts, bottoms - tops, flips.astype(np.int64)])
    crops = torch.empty(table.shape[1], pixels.shape[1], *size, device=device)
    rows_first = _rows_first(table[4], table[5], size)
    for is_rows_first in (False, True):
        # Boxes of similar size share a chunk, so that little is padded.
        members = np.flatnonzero(rows_first == is_rows_first)
        members = members[np.argsort(table[4, members] * table[5, members], kind="stable")]
        for begin, end in _chunks(table[5, members], table[4, members], chunk_px):
            here = members[begin:end]
            crops[torch.from_numpy(here).to(device)] = _resize_chunk(
                pixels, table[:, here], size, rows_first=is_rows_first
            )
    return crops


def _resize_chunk(
    pixels: Tensor, table: NDArray[np.int64], size: tuple[int, int], *, rows_first: bool
) -> Tensor:
    """(n, C, H, W) of n boxes: start, width, left, top, box's width and height, flip in the rows of ``table``."""
    device = pixels.device
    start, width, left, top, box_w, box_h, flip = torch.from_numpy(table).to(device)[:, :, None]
    max_w, max_h = int(table[4].max()), int(table[5].max())
    # A smaller box is padded by its edge; the matrices are 0 there.
    xs = torch.minimum(torch.arange(max_w, device=device), box_w - 1) + left  # (n, w)
    ys = torch.minimum(torch.arange(max_h, device=device), box_h - 1) + top
    ys = ys * width + start
    columns = resize_matrices(table[4], size[1], device=device)  # (n, W, w)
    columns = torch.where(flip[:, :, None] > 0, columns.flip(1), columns)
    rows = resize_matrices(table[5], size[0], device=device)  # (n, H, h)

    outer, inner, first, second = (xs, ys, rows, columns) if rows_first else (ys, xs, columns, rows)
    window = pixels[outer[:, :, None] + inner[:, None, :]].permute(0, 3, 1, 2).float()  # (n, C, outer, inner)
    n, channels, n_outer, n_inner = window.shape
    finish = round_to_bytes if pixels.dtype == torch.uint8 else lambda values: values
    once = torch.bmm(window.reshape(n, channels * n_outer, n_inner), first.transpose(1, 2))
    once = finish(once).view(n, channels, n_outer, -1)
    twice = finish(torch.matmul(second[:, None], once))
    return twice.transpose(2, 3) if rows_first else twice


# The order of the two matters, as the result of the first is rounded.
_PILLOW_MAJOR = int(PIL.__version__.split(".")[0])


def _rows_first(
    widths: NDArray[np.int64],
    heights: NDArray[np.int64],
    size_px: int | tuple[int, int],
    *,
    pillow: int = _PILLOW_MAJOR,
) -> NDArray[np.bool_]:
    """Whether Pillow shrinks the rows of such a box before its columns."""
    height, width = height_and_width(size_px)
    if pillow >= 13:  # undocumented; found by trying boxes and crops of all shapes
        return (heights > height) & (heights - height > 2 * (widths - width))
    return (heights > height) & (heights > 100 * widths)


def resize_matrices(lengths: NDArray[np.int64], size_px: int, *, device: torch.device) -> Tensor:
    """Pillow's bicubic weights for making ``size_px`` samples of ``lengths``.

    Args:
        lengths: (n,) numbers of input samples, at least 1.
        size_px: S, number of output samples.
        device: of the matrices.

    Returns:
        (n, S, N) float32 with N the largest of ``lengths``, multiples of 2^-15; 0 beyond each matrix's own length. Rows
        sum to 1 up to that rounding.
    """
    length = torch.from_numpy(lengths).to(device)[:, None]
    longest = int(lengths.max())
    scale = length.to(exact_dtype(device)) / size_px
    stretch = scale.clamp(min=1)
    centre = (torch.arange(size_px, device=device) + 0.5) * scale  # (n, S)
    first = (centre - _SUPPORT * stretch + 0.5).long().clamp(min=0)
    n_taps = 2 * math.ceil(_SUPPORT * max(longest / size_px, 1.0)) + 1
    taps = first[:, :, None] + torch.arange(n_taps, device=device)  # (n, S, K)
    weights = _cubic((taps - centre[:, :, None] + 0.5) / stretch[:, :, None])
    weights = torch.where(taps < length[:, :, None], weights, 0)
    weights = weights / weights.sum(dim=2, keepdim=True)
    # Taps past the end have weight 0, and land in separate columns that are cut off.
    matrices = torch.zeros(*centre.shape, longest + n_taps, device=device)
    return matrices.scatter_(2, taps, on_grid(weights))[:, :, :longest]


def on_grid(weights: Tensor) -> Tensor:
    """Rounded to multiples of 2^-15, float32: sums of their products with bytes are exact."""
    return (weights * _STEPS).round().div(_STEPS).float()


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution with a = -0.5."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0))


def round_to_bytes(values: Tensor) -> Tensor:
    """Rounds half up and clamps to 0…255, in place; stays float."""
    return values.add_(0.5).floor_().clamp_(0, 255)


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64; Apple's devices have only float32, in which one value in thousands may differ by a level."""
    return torch.float32 if device.type == "mps" else torch.float64


def _chunks(heights: NDArray[np.int64], widths: NDArray[np.int64], chunk_px: int) -> list[tuple[int, int]]:
    """(begin, end) of chunks that, padded to their largest height and width, have at most ``chunk_px``, or one box."""
    found: list[tuple[int, int]] = []
    begin, height, width = 0, 0, 0
    for i, (h, w) in enumerate(zip(heights.tolist(), widths.tolist(), strict=True)):
        height, width = max(height, h), max(width, w)
        if i > begin and (i + 1 - begin) * height * width > chunk_px:
            found.append((begin, i))
            begin, height, width = i, h, w
    return [*found, (begin, len(heights))] if len(heights) else []
