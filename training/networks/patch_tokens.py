"""Patch tokens of a Vision Transformer beside its embeddings, and the mask token in place of hidden patches.

timm's ViTs with learned positions (`VisionTransformer`) and with rotary ones (`Eva`: DINOv3, EVA-02, RoPE-ViT) are run
step by step, as in their own `forward_features`: patches can only be hidden after they are embedded and before their
positions are added. The student must know the position of a hidden patch: learned positions are added to the mask
token, rotary ones rotate its queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from dinokit.runtime.torch import DinoVisionTransformer
from dinokit.training.networks.gradient_checkpointing import run_block
from dinokit.training.networks.shared_layers import cls_embeddings, through_blocks_together

__all__ = ["can_hide_patches", "embed_with_patches", "final_norm"]


def can_hide_patches(backbone: nn.Module) -> bool:
    """Whether a backbone is a ViT whose steps are known here; a subclass of timm's may have different ones."""
    return type(backbone) in (VisionTransformer, DinoVisionTransformer, Eva)


def embed_with_patches(
    backbone: nn.Module,
    sizes: Sequence[Tensor],
    mask: Tensor,
    mask_token: Tensor | None,
    *,
    together: bool,
    attention: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Embeddings of crops, and all patch tokens of the first size.

    Shapes depend on the crops, not on the number of hidden patches, so that `torch.compile` gets the same shapes at
    each step.

    Args:
        backbone: one that :func:`can_hide_patches` accepts.
        sizes: normalised crops (M, C, H, W) per size; ``mask`` is for the first size.
        mask: (M, N) bool, True at hidden patches.
        mask_token: (1, D), replaces hidden patches; None to leave them unchanged.
        together: all sizes through the linear layers at once; needs `shared_layers.can_share_layers`.
        attention: whether to return it; needs ``together``.

    Returns:
        (sum of all M, D), as ``backbone`` itself gives for each size, in the order given; (M · N, D) of the first
        size, before :func:`final_norm`; and of the first size :attr:`shared_layers.Outputs.attention`.
    """
    vit: Any = backbone
    patches = [vit.patch_embed(crops) for crops in sizes]  # (M, rows, columns, D)
    if mask_token is not None:
        hidden = mask.view(*patches[0].shape[:-1], 1)
        patches[0] = torch.where(hidden, mask_token.to(patches[0].dtype), patches[0])
    maps = None
    if together:
        outputs, maps = through_blocks_together(vit, patches, attention=attention)
        embeddings = cls_embeddings(vit, outputs)
    else:
        outputs = [_through_blocks(vit, of_size) for of_size in patches]
        embeddings = torch.cat([vit.forward_head(vit.norm(tokens)) for tokens in outputs])
    return embeddings, outputs[0][:, vit.num_prefix_tokens :].flatten(0, 1), maps


def final_norm(backbone: nn.Module, tokens: Tensor) -> Tensor:
    """Patch tokens (M, D) with the embedding's norm: if timm averages the patches, its norm comes after the mean."""
    vit: Any = backbone
    normed: Tensor = vit.fc_norm(vit.norm(tokens))
    return normed


def _through_blocks(vit: Any, patches: Tensor) -> Tensor:
    """Patch embeddings (M, rows, columns, D) of one size to the last block's tokens (M, tokens, D), before the norm."""
    if not isinstance(vit, Eva):
        tokens: Tensor = vit.norm_pre(vit.patch_drop(vit._pos_embed(patches)))
        for block in vit.blocks:
            tokens = run_block(vit, block, tokens)
        return tokens
    # The angles are for this size's grid: one table for all blocks, or with learned frequencies one per block.
    angles: Any
    tokens, angles = vit._pos_embed(patches)
    tokens = vit.norm_pre(tokens)
    for number, block in enumerate(vit.blocks):
        of_block = angles[number] if getattr(vit, "rope_mixed", False) else angles
        tokens = run_block(vit, block, tokens, rope=of_block)
    return tokens
