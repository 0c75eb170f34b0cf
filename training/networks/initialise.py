"""Initialisation of a student's backbone.

``reference`` is facebookresearch/dino's: a normal distribution with standard deviation 0.02 for all weights, made for
long runs of wider networks. In one short run of a ViT-Ti the position embedding and the blocks' updates stayed small
compared with the patch embedding, which is the reason for an alternative, not a proof that it is better. ``xavier`` is
MoCo v3's: weights that preserve the variance, and position embeddings that start as sines and cosines.

For other networks the reference uses the initialisation of torchvision and XCiT, which is timm's with one difference:
timm's residual branches of a ResNet or RegNet start with a scale of 0, torchvision's with 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.regnet import RegNet
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from dinokit.errors import UsageError

__all__ = ["INITIALISATIONS", "initialise"]

INITIALISATIONS = ("reference", "xavier")


@torch.no_grad()
def initialise(backbone: nn.Module, how: str) -> None:
    """Sets the starting weights of a timm backbone that timm has initialised.

    Args:
        backbone: changed in place.
        how: one of :data:`INITIALISATIONS`.

    Raises:
        UsageError: ``xavier`` for a network that is not a Vision Transformer.
    """
    if not isinstance(backbone, VisionTransformer | Eva):
        if how != "reference":
            raise UsageError(
                f"initialisation={how} is for Vision Transformers, and {type(backbone).__name__} is not one; use "
                "initialisation=reference"
            )
        _open_branches(backbone)
        return
    vit: Any = backbone
    # timm initialises the CLS token near 0 (1e-6); the reference draws it like the position embedding.
    if vit.cls_token is not None:
        nn.init.trunc_normal_(vit.cls_token, std=0.02)
    if how == "xavier":
        _set_weights(vit)
        _set_positions(vit)


def _open_branches(network: nn.Module) -> None:
    """Sets the scales of residual branches to 1.

    Source: torchvision `resnet.py`, ``zero_init_residual=False``, the default that facebookresearch/dino uses.
    """
    if isinstance(network, ResNet | RegNet):
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d) and not part.weight.any():
                nn.init.ones_(part.weight)


def _set_weights(vit: Any) -> None:
    """Source: Chen et al. 2021 (MoCo v3), facebookresearch/moco-v3 `vits.py`."""
    for name, module in vit.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        if name.endswith(".qkv"):  # three matrices in one
            bound = math.sqrt(6 / (module.out_features / 3 + module.in_features))
            nn.init.uniform_(module.weight, -bound, bound)
        else:
            nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    patches = vit.patch_embed.proj
    inputs = patches.weight[0].numel()
    bound = math.sqrt(6 / (inputs + patches.out_channels))
    nn.init.uniform_(patches.weight, -bound, bound)
    if patches.bias is not None:
        nn.init.zeros_(patches.bias)


def _set_positions(vit: Any) -> None:
    """2-D sines and cosines: a quarter of the width each for sine and cosine of row and column.

    Source: as above, `build_2d_sincos_position_embedding`; here they are only the initial values and are trained.
    """
    if vit.pos_embed is None:  # rotary positions, which are not learned
        return
    rows, columns = vit.patch_embed.grid_size
    quarter = vit.embed_dim // 4
    rates = 10_000.0 ** (-torch.arange(quarter) / quarter)
    row_angles = (torch.arange(rows)[:, None] * rates).repeat_interleave(columns, dim=0)
    column_angles = (torch.arange(columns)[:, None] * rates).repeat(rows, 1)
    table = torch.cat([row_angles.sin(), row_angles.cos(), column_angles.sin(), column_angles.cos()], dim=1)
    vit.pos_embed.zero_()
    vit.pos_embed[0, -rows * columns :, : 4 * quarter] = table
