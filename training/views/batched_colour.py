"""Colour jitter, greyscale, blur and solarise of many crops at once, each with parameters of its own.

The same arithmetic as Pillow's on 8-bit pixels, step by step with its rounding (`src/libImaging/Blend.c`, `Convert.c`,
`BoxBlur.c`), so that training sees the same crops either way. Pixels finer than 8 bits are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinokit.training.views.resample import exact_dtype, on_grid, round_to_bytes

__all__ = ["apply_colours"]

_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4)  # positions in Draw.factors


def apply_colours(crops: Tensor, draws: NDArray[Any], *, whole: bool = True) -> Tensor:
    """Applies all of a view except its box and flip.

    Args:
        crops: (V, C, H, W) float32, 0 to 255; changed in place. With another number of channels than three,
            saturation, hue and grey change nothing, and contrast is about the mean of each channel.
        draws: (V,) records of ``DRAW_DTYPE``.
        whole: values are whole numbers, as Pillow's are, and stay whole; otherwise nothing is rounded.

    Returns:
        ``crops``.
    """
    jitter, factors = draws["jitter"], draws["factors"]
    in_colour = crops.shape[1] == 3
    blend, blur = partial(_blend, whole=whole), partial(_blur, whole=whole)
    shift_hue = _shift_hue if whole else _turn_hue
    for step in draws["order"].T:  # the first change of each crop, then the second, …
        factor = np.take_along_axis(factors, step[:, None].astype(np.int64), axis=1)[:, 0]
        blended = step != _HUE if in_colour else step < _SATURATION
        _change(crops, jitter & blended, blend, factor, step)
        if in_colour:
            _change(crops, jitter & (step == _HUE), shift_hue, factor)
    if in_colour:
        _change(crops, draws["grey"], partial(_make_grey, whole=whole))
    _change(crops, draws["blur_px"] > 0, blur, draws["blur_px"])
    _change(crops, draws["solarize"], _solarize)
    return crops


def _change(
    crops: Tensor, chosen: NDArray[np.bool_], change: Callable[..., Tensor], *parameters: NDArray[Any]
) -> None:
    """Replaces the chosen crops by ``change(crops, *parameters)``."""
    which = np.flatnonzero(chosen)
    if len(which):
        at = torch.from_numpy(which).to(crops.device)
        crops[at] = change(crops[at], *[parameter[which] for parameter in parameters])


def _per_crop(values: NDArray[Any], device: torch.device) -> Tensor:
    """(V,) numbers as (V, 1, 1, 1) float32: Pillow's C code has floats where Python has doubles."""
    return torch.from_numpy(values.astype(np.float32)).to(device)[:, None, None, None]


def _blend(x: Tensor, factor: NDArray[np.float64], step: NDArray[np.uint8], *, whole: bool) -> Tensor:
    """Brightness, contrast or saturation: away from black, from the mean grey or from the grey picture."""
    grey = _grey(x, whole=whole)
    count = grey.shape[2] * grey.shape[3]
    if whole:  # in whole numbers, since the sum may not fit float32
        total = grey.to(torch.int32).sum(dim=(2, 3), keepdim=True)
        mean = torch.div(2 * total + count, 2 * count, rounding_mode="floor").to(x.dtype)
    else:
        mean = grey.mean(dim=(2, 3), keepdim=True)
    kind = _per_crop(step, x.device)
    origin = torch.where(kind == _SATURATION, grey, torch.where(kind == _CONTRAST, mean, 0))
    # Multiplied and added in two steps, as in C: fused, some values would fall on the other side of a whole number.
    made = ((x - origin) * _per_crop(factor, x.device)).add_(origin).clamp_(0, 255)
    return made.floor_() if whole else made


def _grey(x: Tensor, *, whole: bool) -> Tensor:
    """Luma (V, 1, H, W) by ITU-R 601, in Pillow's 16-bit fixed point; whole numbers are exact in float32, and rounded.

    Channels that are not colours stay as they are, (V, C, H, W).
    """
    if x.shape[1] != 3:
        return x
    red, green, blue = x.unbind(1)
    luma = red * 19595 + green * 38470 + blue * 7471
    return (((luma + 32768) / 65536).floor_() if whole else luma / 65536)[:, None]


def _make_grey(x: Tensor, *, whole: bool) -> Tensor:
    return _grey(x, whole=whole).expand_as(x)


def _solarize(x: Tensor) -> Tensor:
    return torch.where(x < 128, x, 255 - x)


def _shift_hue(x: Tensor, turn: NDArray[np.float64]) -> Tensor:
    """Turns the hue by ``turn`` of the colour circle, in Pillow's 8-bit HSV."""
    exact = exact_dtype(x.device)
    red, green, blue = x.unbind(1)
    value, lowest = x.amax(dim=1), x.amin(dim=1)
    spread = value - lowest
    some = spread.clamp(min=1)
    to_red, to_green, to_blue = (((value - c) / some).to(exact) for c in (red, green, blue))
    sextant = torch.where(
        red == value,
        (to_blue - to_green).float().to(exact),
        torch.where(green == value, 2 + to_red - to_blue, 4 + to_green - to_red).float().to(exact),
    )
    circle = (sextant / 6 + 1).remainder(1).float()  # of one colour: (0 - 0) / 6, as hue 0
    hue = (circle.to(exact) * 255).long()
    hue = torch.where(spread == 0, 0, hue)
    saturation = ((spread / value.clamp(min=1)).to(exact) * 255).floor()

    shift = torch.from_numpy((turn * 255).astype(np.int64)).to(x.device)
    hue = (hue + shift[:, None, None]).remainder(256)
    shares = _shares_of_hue(x.device)[hue].permute(0, 3, 1, 2)  # (V, 3, S, S)
    saturation = (saturation / 255).float().to(exact)[:, None]
    return (value[:, None] * (1 - saturation * shares) + 0.5).floor_().float()


def _turn_hue(x: Tensor, turn: NDArray[np.float64]) -> Tensor:
    """:func:`_shift_hue` for real numbers: hue, saturation and value are not quantised.

    Each colour is ``value - spread · share``, where the share follows from its distance on the circle of six sextants.
    """
    red, green, blue = x.unbind(1)
    value = x.amax(dim=1)
    spread = value - x.amin(dim=1)
    some = torch.where(spread > 0, spread, 1)
    sextant = torch.where(
        red == value,
        (green - blue) / some,
        torch.where(green == value, 2 + (blue - red) / some, 4 + (red - green) / some),
    )
    begins = torch.tensor([5.0, 3.0, 1.0], device=x.device)[None, :, None, None]
    place = (begins + sextant[:, None] + 6 * _per_crop(turn, x.device)).remainder(6)
    share = torch.minimum(place, 4 - place).clamp_(0, 1)
    return value[:, None] - spread[:, None] * share


@cache
def _shares_of_hue(device: torch.device) -> Tensor:
    """(256, 3): the share of the saturation that R, G and B lose at each hue; 0 keeps the value, 1 gives grey."""
    levels = np.arange(256) * 6.0 / 255.0
    sector = np.floor(levels)
    up = (levels - sector).astype(np.float32).astype(np.float64)
    none, all_, down = np.zeros(256), np.ones(256), 1 - up
    by_sector = [
        (none, down, all_),
        (up, none, all_),
        (all_, none, down),
        (all_, up, none),
        (down, all_, none),
        (none, all_, up),
    ]
    table = np.empty((256, 3))
    for level in range(256):
        for channel in range(3):
            table[level, channel] = by_sector[int(sector[level]) % 6][channel][level]
    return torch.from_numpy(table).to(device, exact_dtype(device))


def _blur(x: Tensor, radius_px: NDArray[np.float64], *, whole: bool) -> Tensor:
    """Pillow's Gaussian blur: three box blurs along the rows, then three along the columns, rounded after each if
    ``whole``."""
    radius = _box_radius(radius_px)
    boxes = {size: _box_matrices(radius, size, x.device) for size in {*x.shape[2:]}}
    for _ in range(2):
        n, channels, height, width = x.shape
        lines = x.reshape(n, channels * height, width)
        for _ in range(3):
            lines = torch.bmm(lines, boxes[width])
            lines = round_to_bytes(lines) if whole else lines
        x = lines.view(n, channels, height, width).transpose(2, 3)
    return x


def _box_radius(radius_px: NDArray[np.float64]) -> NDArray[np.float64]:
    """Radius of a box blur that, applied three times, has the Gaussian's variance (Gwosdek et al. 2011)."""
    variance = radius_px**2 / 3
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    radius: NDArray[np.float64] = whole + part / (6 * (variance - (whole + 1) ** 2))
    return radius


def _box_matrices(radius: NDArray[np.float64], size: int, device: torch.device) -> Tensor:
    """(n, S, S) float32: ``lines @ box`` averages over ``radius`` on both sides, with the edge repeated."""
    reach = np.arange(-int(radius.max()) - 1, int(radius.max()) + 2)
    # Samples within the whole part of the radius count in full, the next one by the fraction.
    kernel = np.clip(radius[:, None] + 1 - np.abs(reach), 0, 1) / (2 * radius[:, None] + 1)
    weights = on_grid(torch.from_numpy(kernel)).to(device)  # (n, T)
    from_ = (torch.arange(size)[:, None] + torch.from_numpy(reach)).clamp(0, size - 1).to(device)  # (S, T)
    n = len(radius)
    box = torch.zeros(n, size, size, device=device)
    # Several taps may fall on the edge; they are multiples of 2^-15, so any order of summation gives the same result.
    box.scatter_add_(2, from_.expand(n, -1, -1), weights[:, None].expand(-1, size, -1))
    return box.transpose(1, 2)
