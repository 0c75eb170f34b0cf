"""What stands out in a picture, as a teacher of attention that nobody had to train.

Photographers leave room around what they photograph: what lies along the border of a picture is mostly background, and
what has other colours than the border is mostly not. In a few thousand pictures self-distillation does not find out by
itself what to look at; told so, the last block's attention holds to the object, and the embedding learns beside it.

Each side of the border says how its colours are spread (mean and covariance). How far a cell's colour is from all four,
but for the side that it is furthest from, is how much it stands out: an object may reach one side and still be found.

Source: Zhang et al. 2015 (Minimum Barrier Salient Object Detection), §4.2, the backgroundness cue: four sides,
Mahalanobis distance in CIE-Lab, the largest left out; Selvaraju et al. 2021 (CAST): saliency that was found without
labels as a target of attention in self-supervised learning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.training.recipe import Recipe
from dinokit.training.views.normalisation import normalisation

__all__ = ["Foreground", "attention_kl", "make_foreground", "stands_out"]

_CELLS_A_PATCH = 4
"""A side; colours are those of cells, so that noise and fine texture count less. Of a patch of 16 pixels 4 each."""
_NOISE = 0.05
"""Standard deviation that every colour has at least, in parts of the whole range (of Lab's lightness 5 of 100): of an
even border the least shadow would stand out otherwise."""
_EVERYWHERE = 1e-3
"""What each patch has at least, so that of a picture of one colour nothing stands out, and not a division by 0."""

_RGB = 3
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)  # D65


class Foreground(nn.Module):
    """How far the student's attention is from what stands out in its global crops.

    Args:
        recipe: complete settings, whose normalisation of the pixels is undone.
        device: where it computes.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, device=device) for values in normalisation(recipe))
        self.register_buffer("mean", mean.view(-1, 1, 1), persistent=False)
        self.register_buffer("std", std.view(-1, 1, 1), persistent=False)

    mean: Tensor
    std: Tensor

    def forward(self, crops: Tensor, attention: Tensor) -> Tensor:
        """
        Args:
            crops: (V, B, C, H, W) float, normalised.
            attention: (V, B, heads, N), of the CLS token to the patches, which lie in a grid of H to W.

        Returns:
            Scalar: :func:`attention_kl` in nats, the mean over the crops. Gradients go to ``attention`` alone.
        """
        height, width = crops.shape[-2:]
        rows = round((attention.shape[-1] * height / width) ** 0.5)
        with torch.no_grad(), torch.autocast(crops.device.type, enabled=False):
            pixels = crops.flatten(0, 1).float() * self.std + self.mean
            target = stands_out(pixels, (rows, attention.shape[-1] // rows)).flatten(1)
        return attention_kl(target, attention.flatten(0, 1))


def attention_kl(target: Tensor, attention: Tensor) -> Tensor:
    """KL divergence of each head's attention from what it should be: who asks for one head's mask does not know which.

    Args:
        target: (M, N) float32, at least 0; only its shares count.
        attention: (M, heads, N) float32, at least 0; of what a head gives to the patches, the share of each. What it
            gives to the CLS token and to registers is its own affair.

    Returns:
        Scalar in nats, the mean over M and heads: 0 where they are the same.
    """
    target = target + _EVERYWHERE
    target = (target / target.sum(dim=-1, keepdim=True)).unsqueeze(1)
    tiny = torch.finfo(attention.dtype).tiny
    looks = attention / attention.sum(dim=-1, keepdim=True).clamp(min=tiny)
    kl: Tensor = (target * (target.log() - looks.clamp(min=tiny).log())).sum(dim=-1).mean()
    return kl


def stands_out(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """How far the colours of each patch are from those of the picture's border.

    Args:
        pixels: (M, C, H, W) float32 in 0 to 1. Three channels are taken for red, green and blue, and compared in
            CIE-Lab; others as they are.
        grid: rows and columns of patches.

    Returns:
        (M, rows, columns) float32, 0 to 3: the distances to three sides, each in parts of the largest to that side.
    """
    rows, columns = grid
    height, width = pixels.shape[-2:]
    fine = (min(height, rows * _CELLS_A_PATCH), min(width, columns * _CELLS_A_PATCH))
    colours = F.interpolate(pixels, fine, mode="area")
    if colours.shape[1] == _RGB:
        colours = _lab(colours)
    sides = (colours[:, :, 0], colours[:, :, -1], colours[:, :, :, 0], colours[:, :, :, -1])
    distances = torch.stack([_distances(colours, side) for side in sides])
    largest = distances.amax(dim=(2, 3), keepdim=True)
    shares = distances / largest.clamp(min=torch.finfo(distances.dtype).tiny)
    out = shares.sum(dim=0) - shares.amax(dim=0)
    return F.interpolate(out[:, None], grid, mode="area")[:, 0]


def _distances(colours: Tensor, side: Tensor) -> Tensor:
    """Mahalanobis distances (M, H, W) of colours (M, C, H, W) to those of a side (M, C, n)."""
    mean = side.mean(dim=2, keepdim=True)
    around = side - mean
    covariance = around @ around.transpose(1, 2) / side.shape[2]
    noise = torch.eye(len(covariance[0]), device=side.device) * _NOISE**2
    # Without a check, which would wait for the device: with the noise none is singular.
    inverse: Tensor = torch.linalg.inv_ex(covariance + noise).inverse
    away = colours.flatten(2) - mean
    squares = (away * (inverse @ away)).sum(dim=1)
    return squares.clamp(min=0).sqrt().view(len(colours), *colours.shape[-2:])


def _lab(rgb: Tensor) -> Tensor:
    """(M, 3, H, W) sRGB in 0 to 1 to CIE-Lab (D65) divided by 100, so that L is 0 to 1."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(dim=1)
    # Number by number: a matrix would have to be sent to the device, and its product may be rounded to TensorFloat-32.
    x, y, z = (
        _cube_root((r * red + g * green + b * blue) / white)
        for (r, g, b), white in zip(_XYZ, _WHITE, strict=True)
    )
    return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], dim=1)


def _cube_root(share: Tensor) -> Tensor:
    """Of the white's share; near black a straight line instead, as the CIE has it."""
    return torch.where(share > 0.008856, share.clamp(min=0.008856) ** (1 / 3), 7.787 * share + 16 / 116)


def make_foreground(recipe: Recipe, device: torch.device) -> Foreground | None:
    """The part that the recipe's ``foreground_weight`` asks for."""
    return Foreground(recipe, device) if recipe.foreground_weight else None
