"""Which patches of the student's global crops are hidden from it: blocks of them, as in BEiT.

Source: Bao et al. 2021 (BEiT), Algorithm 1; Zhou et al. 2022 (iBOT) and bytedance/ibot `loader.py`: a global crop
keeps all its patches with probability 0.5; otherwise a share drawn uniformly from 0.1 to 0.5 is hidden. DINOv2 hides as
many on average, but in exactly half of a batch's crops, with shares spread evenly over the batch. Here, as in iBOT,
each crop is drawn independently, so that a picture's masks follow from (seed, epoch, picture), as its crops do, however
the batch is divided.
"""

from __future__ import annotations

import math
import random
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dinokit.training.devices.transfer import sent
from dinokit.training.recipe import Recipe

__all__ = ["HiddenPatches", "block_mask", "draw_masks"]

_ASPECT = 0.3  # of a block, height to width: from this to its inverse (BEiT)
_ATTEMPTS = 10  # to place one block


def block_mask(rows: int, columns: int, n_hidden: float, rng: random.Random) -> NDArray[np.bool_]:
    """Hides about ``n_hidden`` patches, never more, in blocks that may overlap.

    A block's area is drawn uniformly from ``(min(rows, columns) // 3)²`` (16 of 14 × 14 patches, BEiT's minimum) to the
    number of patches still to hide, and the logarithm of its aspect ratio uniformly from ln 0.3 to −ln 0.3. It is
    smaller than the grid in both directions. If no block fits, fewer patches are hidden than requested.

    Args:
        rows, columns: the grid of patches.
        n_hidden: number of patches to hide.
        rng: source of all randomness.

    Returns:
        (rows, columns), True where a patch is hidden.
    """
    hidden = np.zeros((rows, columns), np.bool_)
    least = (min(rows, columns) // 3) ** 2
    left = n_hidden
    while left > 0 and (block := _find_block(hidden, least, left, rng)) is not None:
        left -= block.size - np.count_nonzero(block)
        block[:] = True
    return hidden


def _find_block(
    hidden: NDArray[np.bool_], least: int, most: float, rng: random.Random
) -> NDArray[np.bool_] | None:
    """A view of a block with at least one patch to hide, and at most ``most``; None if none was found."""
    rows, columns = hidden.shape
    for _ in range(_ATTEMPTS):
        area = rng.uniform(least, most)
        aspect = math.exp(rng.uniform(math.log(_ASPECT), -math.log(_ASPECT)))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if height >= rows or width >= columns:
            continue
        top, begin = rng.randint(0, rows - height), rng.randint(0, columns - width)
        block = hidden[top : top + height, begin : begin + width]
        if 0 < block.size - np.count_nonzero(block) <= most:
            return block
    return None


def draw_masks(recipe: Recipe, n_views: int, rng: random.Random) -> NDArray[np.bool_]:
    """Masks of one picture's global crops: (n_views, rows, columns), all False for a crop without hidden patches."""
    rows, columns = (side // recipe.patch_size for side in recipe.global_crop_hw)
    masks = []
    for _ in range(n_views):
        # Both are drawn in any case: the second crop's mask does not depend on whether the first has one.
        share = rng.uniform(*recipe.ibot_mask_ratio)
        has_mask = rng.random() < recipe.ibot_mask_probability
        masks.append(block_mask(rows, columns, share * rows * columns if has_mask else 0, rng))
    return np.stack(masks)


class HiddenPatches(NamedTuple):
    """The masks of a batch as network and loss use them. Positions are computed on the CPU: their number differs from
    batch to batch, so computing them on the device would make the host wait for it."""

    mask: Tensor
    """(V · B, N) bool, of V views of B pictures with N patches each."""
    positions: Tensor
    """(M,) int64, indices of the hidden patches among all V · B · N."""
    weights: Tensor
    """(M,) float32, 1 / (number of hidden patches in the same crop)."""

    @classmethod
    def of(cls, masks: Tensor, device: torch.device) -> HiddenPatches:
        """From (V, B, rows, columns) bool on the CPU."""
        mask = masks.flatten(2).flatten(0, 1)
        weights = (1 / mask.sum(dim=1, keepdim=True)).expand(mask.shape)[mask]
        positions = mask.flatten().nonzero().flatten()
        return cls(*(sent(t, device) for t in (mask, positions, weights)))
