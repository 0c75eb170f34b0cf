"""The foreground of a picture, estimated without labels or training, as a target for attention.

Photographers leave room around their subject: the border of a picture is mostly background, and regions whose colours
differ from the border are mostly not. From a few thousand pictures self-distillation alone does not learn to attend to
objects; with this target the last block's attention follows the object while the embedding learns as before.

Each side of the border has a colour distribution (mean and covariance). A cell's saliency is the distance of its colour
to all sides except the furthest, so that an object may touch one side and still be found.

Source: Zhang et al. 2015 (Minimum Barrier Salient Object Detection), §4.2, the backgroundness cue: four sides,
Mahalanobis distance in CIE-Lab, the largest left out; Selvaraju et al. 2021 (CAST): saliency found without labels as a
target for attention in self-supervised learning.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.training.recipe import Recipe
from dinokit.training.views.normalisation import normalisation

__all__ = ["Foreground", "attention_kl", "make_foreground", "border_contrast"]

_CELLS_A_PATCH = 4
"""Per side of a patch; colours are averaged over cells, so that noise and fine texture count less. In a patch of 16
pixels a cell has 4 x 4."""
_NOISE = 0.05
"""Minimum standard deviation of every colour, as a share of the range (5 of 100 for Lab's lightness): otherwise the
faintest shadow would stand out from a uniform border."""
_EVERYWHERE = 1e-3
"""Minimum saliency of each patch: a picture of one colour gets a uniform target instead of a division by 0."""

_RGB = 3
_XYZ = ((0.412453, 0.357580, 0.180423), (0.212671, 0.715160, 0.072169), (0.019334, 0.119193, 0.950227))
_WHITE = (0.950456, 1.0, 1.088754)  # D65


class Foreground(nn.Module):
    """KL divergence between the foreground of the student's global crops and its attention.

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
            target = border_contrast(pixels, (rows, attention.shape[-1] // rows)).flatten(1)
        return attention_kl(target, attention.flatten(0, 1))


def attention_kl(target: Tensor, attention: Tensor) -> Tensor:
    """KL divergence of each head's attention from the target. Every head is trained, since a user of one head's mask
    does not know which head to choose.

    Args:
        target: (M, N) float32, at least 0; normalised here to sum to 1.
        attention: (M, heads, N) float32, at least 0; normalised here over the patches. Attention to the CLS token and
            to registers is not constrained.

    Returns:
        Scalar in nats, the mean over M and heads; 0 if both are equal.
    """
    target = target + _EVERYWHERE
    target = (target / target.sum(dim=-1, keepdim=True)).unsqueeze(1)
    tiny = torch.finfo(attention.dtype).tiny
    distribution = attention / attention.sum(dim=-1, keepdim=True).clamp(min=tiny)
    kl: Tensor = (target * (target.log() - distribution.clamp(min=tiny).log())).sum(dim=-1).mean()
    return kl


def border_contrast(pixels: Tensor, grid: tuple[int, int]) -> Tensor:
    """Distance of the colours of each patch to those of the picture's border.

    Args:
        pixels: (M, C, H, W) float32 in 0 to 1. Three channels are red, green and blue, compared in CIE-Lab; others are
            compared directly.
        grid: rows and columns of patches.

    Returns:
        (M, rows, columns) float32, 0 to 3: the sum of the distances to three sides, each divided by the largest to that
        side.
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
    # Without the check, which would wait for the device: the noise keeps every matrix invertible.
    inverse: Tensor = torch.linalg.inv_ex(covariance + noise).inverse
    away = colours.flatten(2) - mean
    squares = (away * (inverse @ away)).sum(dim=1)
    return squares.clamp(min=0).sqrt().view(len(colours), *colours.shape[-2:])


def _lab(rgb: Tensor) -> Tensor:
    """(M, 3, H, W) sRGB in 0 to 1 to CIE-Lab (D65) divided by 100, so that L is 0 to 1."""
    rgb = rgb.clamp(0, 1)
    linear = torch.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    red, green, blue = linear.unbind(dim=1)
    # Scalar by scalar: a matrix would be copied to the device, and its product may be rounded to TensorFloat-32.
    x, y, z = (
        _cube_root((r * red + g * green + b * blue) / white)
        for (r, g, b), white in zip(_XYZ, _WHITE, strict=True)
    )
    return torch.stack([1.16 * y - 0.16, 5 * (x - y), 2 * (y - z)], dim=1)


def _cube_root(share: Tensor) -> Tensor:
    """Cube root of a share of the white; near black a straight line, as the CIE defines."""
    return torch.where(share > 0.008856, share.clamp(min=0.008856) ** (1 / 3), 7.787 * share + 16 / 116)


def make_foreground(recipe: Recipe, device: torch.device) -> Foreground | None:
    """The loss for the recipe's ``foreground_weight``; None if it is 0."""
    return Foreground(recipe, device) if recipe.foreground_weight else None
