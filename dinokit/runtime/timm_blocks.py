"""The tokens of blocks inside a network of timm, in one pass.

By timm's ``forward_intermediates`` and not by hooks: several threads may run one module at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError

__all__ = ["forward_with_blocks", "maps_of_blocks", "number_of_blocks"]


def forward_with_blocks(
    module: nn.Module, pixel_values: Tensor, blocks: Mapping[str, tuple[int, bool]], *, whole: bool
) -> tuple[Tensor | None, dict[str, Tensor]]:
    """All tokens of some blocks of a Vision Transformer, in one pass.

    Args:
        module: timm's.
        pixel_values: (B, C, H, W).
        blocks: name to the block's index and whether its tokens go through the final norm.
        whole: continue to the last block, even if none of ``blocks`` needs it.

    Returns:
        (B, 1 + R + N, D) after the final norm, None unless ``whole``; and the same of each of ``blocks``, by name.
    """
    vit: Any = module
    indices = sorted({index for index, _ in blocks.values()})
    last, parts = vit.forward_intermediates(
        pixel_values, indices, return_prefix_tokens=True, stop_early=not whole, output_fmt="NLC"
    )
    raw = {
        index: torch.cat([prefix, patches], dim=1)
        for index, (patches, prefix) in zip(indices, parts, strict=True)
    }
    found = {name: vit.norm(raw[index]) if norm else raw[index] for name, (index, norm) in blocks.items()}
    return last if whole else None, found


def number_of_blocks(module: nn.Module) -> int | None:
    """Of a network whose blocks all give a map of one size; None of others, such as a ResNet with its stages.

    It is timm's own word, ``feature_info``: what ``forward_intermediates`` counts are blocks here and stages there.
    """
    blocks, info = getattr(module, "blocks", None), getattr(module, "feature_info", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not hasattr(module, "forward_intermediates"):
        return None
    try:
        names = [one["module"] for one in info]  # type: ignore[union-attr]
        sizes = {(one["num_chs"], one["reduction"]) for one in info}  # type: ignore[union-attr]
    except (KeyError, TypeError):
        return None
    same = len(sizes) == 1 and names == [f"blocks.{index}" for index in range(len(blocks))]
    return len(blocks) if same else None


def maps_of_blocks(
    module: nn.Module, pixels: Tensor, blocks: Mapping[str, tuple[int, bool]]
) -> dict[str, Tensor]:
    """The feature maps of some blocks of a network, by timm's ``forward_intermediates``.

    Args:
        module: one with :func:`number_of_blocks`.
        pixels: (B, C, H, W).
        blocks: name to the block's index and whether its map goes through the network's ``norm``.

    Returns:
        (B, h·w, D) each, row by row, without class tokens.

    Raises:
        UsageError: the norm is requested, and the network has none for such tokens.
    """
    if any(norm for _, norm in blocks.values()) and not isinstance(getattr(module, "norm", None), nn.Module):
        raise UsageError(f"a {type(module).__name__} has no final norm for its inner blocks; use norm=False")
    network: Any = module
    indices = sorted({index for index, _ in blocks.values()})
    maps = network.forward_intermediates(pixels, indices, intermediates_only=True)  # (B, D, h, w) each
    raw = dict(zip(indices, (one.flatten(2).transpose(1, 2) for one in maps), strict=True))
    return {name: network.norm(raw[index]) if norm else raw[index] for name, (index, norm) in blocks.items()}
