"""Histograms of oriented gradients as a teacher without training: shape only, no colour.

The picture is converted to grey, its gradients are counted by direction in a grid of cells, and blocks of neighbouring
cells are normalised for contrast. This describes shape and position, which features trained on few pictures capture
least: they learn colour and texture first.

The grid divides the crop, whatever its size in pixels, so the descriptor is comparable across sizes.

Source: Dalal and Triggs 2005, §6 (the descriptor, R-HOG, L2-Hys); Wei et al. 2022 (MaskFeat): as targets of a
Vision Transformer; Arandjelović and Zisserman 2012, §3: the square root, so that the cosine of two is Hellinger's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.training.recipe import Recipe
from dinokit.training.views.normalisation import normalisation

__all__ = ["HOG", "OrientedGradients", "oriented_gradients"]

HOG = "hog"
"""Its name in ``distill_from``. Write ``./hog`` for a model folder of that name."""

_N_CELLS = 6
"""Cells per side of the grid: in a crop of 96 pixels each cell has 16."""
_N_DIRECTIONS = 9
"""Bins of 20 degrees; opposite gradients share a bin, so that light on dark equals dark on light."""
_BLOCK = 2
"""Cells per side of a block, which is normalised for contrast."""
_MOST = 0.2
"""Upper limit of one direction's share of a block, so that one strong edge does not dominate (L2-Hys)."""
_LEAST_CONTRAST = 1e-5
"""Avoids a division by 0 in a uniform block, whose result is 0."""
_GREY = (0.299, 0.587, 0.114)
"""Weights of red, green and blue (ITU-R 601), as in Pillow."""


class OrientedGradients(nn.Module):
    """(T, B, C, H, W) crops as the student gets them to their descriptors (T, B, 900).

    Args:
        recipe: complete settings of the student, whose normalisation of the pixels is undone.
        device: where it computes.
    """

    embed_dim = (_N_CELLS - _BLOCK + 1) ** 2 * _BLOCK**2 * _N_DIRECTIONS
    sha256 = HOG
    """Identifies a teacher in a checkpoint; without weights it is the name."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        super().__init__()
        mean, std = (torch.tensor(values, device=device) for values in normalisation(recipe))
        parts = _GREY if recipe.channels == len(_GREY) else (1 / recipe.channels,) * recipe.channels
        grey = torch.tensor(parts, device=device)
        self.register_buffer("weights", grey * std, persistent=False)
        self.register_buffer("shift", (grey * mean).sum(), persistent=False)

    weights: Tensor
    shift: Tensor

    @torch.no_grad()
    def forward(self, crops: Tensor) -> Tensor:
        """
        Args:
            crops: (T, B, C, H, W) float, normalised as the student's.

        Returns:
            (T, B, 900) float32 in 0 to 1, see :func:`oriented_gradients`.
        """
        # Channel by channel, since autocast would round a matrix product to bfloat16.
        grey = (crops.flatten(0, 1).float() * self.weights.view(-1, 1, 1)).sum(dim=1) + self.shift
        return oriented_gradients(grey).view(*crops.shape[:2], -1)


def oriented_gradients(grey: Tensor) -> Tensor:
    """(N, H, W) float32 in 0 to 1 to (N, 900): 5 x 5 blocks of 2 x 2 cells of 9 directions, square roots of L2-Hys.

    If 6 divides a side, all cells have the same number of pixels; otherwise neighbours share a row or column.
    """
    across, down = torch.zeros_like(grey), torch.zeros_like(grey)
    across[:, :, 1:-1] = grey[:, :, 2:] - grey[:, :, :-2]
    down[:, 1:-1] = grey[:, 2:] - grey[:, :-2]
    degrees = torch.rad2deg(torch.atan2(down, across)) % 180
    direction = (degrees * (_N_DIRECTIONS / 180)).long().clamp_(max=_N_DIRECTIONS - 1)
    votes = grey.new_zeros(len(grey), _N_DIRECTIONS, *grey.shape[-2:])
    votes.scatter_(1, direction.unsqueeze(1), torch.hypot(across, down).unsqueeze(1))
    cells = F.adaptive_avg_pool2d(votes, _N_CELLS)
    blocks = cells.unfold(2, _BLOCK, 1).unfold(3, _BLOCK, 1)  # (N, 9, 5, 5, 2, 2)
    blocks = blocks.permute(0, 2, 3, 4, 5, 1).flatten(1, 2).flatten(2)  # (N, 25, 36)
    blocks = _to_length_1(_to_length_1(blocks).clamp(max=_MOST))
    return blocks.sqrt().flatten(1)


def _to_length_1(blocks: Tensor) -> Tensor:
    return blocks / (blocks.square().sum(dim=-1, keepdim=True) + _LEAST_CONTRAST**2).sqrt()
