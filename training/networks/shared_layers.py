"""Crops of several sizes through a Vision Transformer at once: only attention treats each size separately.

All other parts of a block (norms, the linear layers of attention and MLP) treat tokens one by one. The tokens of all
crops are concatenated into one large matrix product instead of one per size. The results equal those of one pass per
size, up to rounding. Source of the idea: DINOv2 (Oquab et al. 2023, §5, "nested tensors in self-attention").
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import vision_transformer
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from dinokit.runtime.torch import DinoVisionTransformer
from dinokit.training.networks.gradient_checkpointing import run_block

__all__ = [
    "Outputs",
    "block_on_packed",
    "can_share_layers",
    "cls_embeddings",
    "embed_sizes_together",
    "through_blocks_together",
]

# Newer versions of timm define it in timm.layers; all have it here.
_Attention = vision_transformer.Attention  # type: ignore[attr-defined]
_Shapes = Sequence[tuple[int, int]]  # (crops, tokens per crop) of each size


class Outputs(NamedTuple):
    """Outputs of a Vision Transformer for crops of several sizes."""

    tokens: list[Tensor]
    """Per size (M, tokens, D), of the last block, before the final norm."""
    attention: Tensor | None
    """Of the first size (M, heads, N) float32, of the last block from the CLS token to the patches, if requested:
    softmax over all tokens, so that a row sums to less than 1."""


def can_share_layers(backbone: nn.Module) -> bool:
    """Whether a backbone is a timm ViT with plain blocks and a CLS embedding; others need one pass per size.

    A subclass of timm's may embed otherwise: a distilled DeiT averages its CLS and its distillation token.
    """
    vit: Any = backbone
    return (
        type(backbone) in (VisionTransformer, DinoVisionTransformer)
        and vit.global_pool == "token"
        and isinstance(vit.fc_norm, nn.Identity)
        and all(type(block) is Block and _is_plain(block.attn) for block in vit.blocks)
    )


def _is_plain(attention: nn.Module) -> bool:
    parts: Any = attention
    return (
        type(attention) is _Attention
        and all(
            isinstance(getattr(parts, name, None) or nn.Identity(), nn.Identity)
            for name in ("q_norm", "k_norm", "norm", "gate")
        )
        and parts.attn_drop.p == 0.0
    )


def embed_sizes_together(
    backbone: nn.Module, sizes: Sequence[Tensor], *, attention: bool = False
) -> tuple[Tensor, Tensor | None]:
    """CLS embeddings of crops.

    Args:
        backbone: one that :func:`can_share_layers` accepts.
        sizes: normalised crops (M, 3, H, W) per size.
        attention: whether to return it.

    Returns:
        (sum of all M, D), in the order given, as ``backbone`` itself gives for each size; and
        :attr:`Outputs.attention`.
    """
    vit: Any = backbone
    patches = [vit.patch_embed(crops) for crops in sizes]
    outputs = through_blocks_together(vit, patches, attention=attention)
    return cls_embeddings(vit, outputs.tokens), outputs.attention


def through_blocks_together(vit: Any, patches: Sequence[Tensor], *, attention: bool = False) -> Outputs:
    """All blocks, over patch embeddings (M, rows, columns, D) of each size.

    Args:
        vit: one that :func:`can_share_layers` accepts.
        patches: per size.
        attention: whether to return it.
    """
    tokens = [vit.norm_pre(vit.patch_drop(vit._pos_embed(p))) for p in patches]
    shapes = [(len(t), t.shape[1]) for t in tokens]
    packed = torch.cat([t.flatten(0, 1) for t in tokens])  # (all tokens, D)
    maps = None
    for number, block in enumerate(vit.blocks, start=1):
        # With sharded weights, a block has it as a method that gathers them first (`sharding.py`).
        on_packed = getattr(block, "on_packed", None) or partial(block_on_packed, block)
        asked = attention and number == len(vit.blocks)
        packed, maps = run_block(vit, on_packed, packed, shapes, attention=asked)
    parts = torch.split(packed, [n_crops * n_tokens for n_crops, n_tokens in shapes])
    tokens = [part.view(*shape, -1) for part, shape in zip(parts, shapes, strict=True)]
    return Outputs(tokens, maps[:, :, vit.num_prefix_tokens :] if maps is not None else None)


def block_on_packed(
    block: Any, packed: Tensor, shapes: Sequence[tuple[int, int]], *, attention: bool = False
) -> tuple[Tensor, Tensor | None]:
    """timm's `Block.forward` over crops of several sizes.

    Args:
        block: of a ViT that :func:`can_share_layers` accepts.
        packed: (all tokens, D), crop by crop.
        shapes: (crops, tokens per crop) of each size.
        attention: whether to return it.

    Returns:
        (all tokens, D), and the attention of the CLS tokens of the first size, (crops, heads, tokens) float32, or None.
    """
    mixed, maps = _attend(block, packed, shapes, attention=attention)
    packed = packed + _each_crop(block.drop_path1, block.ls1(mixed), shapes)
    return packed + _each_crop(block.drop_path2, block.ls2(block.mlp(block.norm2(packed))), shapes), maps


def cls_embeddings(vit: Any, outputs: Sequence[Tensor]) -> Tensor:
    """Tokens (M, tokens, D) per size, before the final norm, to (sum of all M, D): norms the CLS tokens only."""
    cls = torch.cat([tokens[:, 0] for tokens in outputs])
    embeddings: Tensor = vit.head_drop(vit.norm(cls))
    return embeddings


def _attend(block: Any, packed: Tensor, shapes: _Shapes, *, attention: bool) -> tuple[Tensor, Tensor | None]:
    """timm's `Attention.forward`, its two linear layers over all tokens."""
    part = block.attn
    qkv = part.qkv(block.norm1(packed))
    mixed, maps = [], None
    for rows, (n_crops, n_tokens) in zip(torch.split(qkv, [c * t for c, t in shapes]), shapes, strict=True):
        heads = rows.view(n_crops, n_tokens, 3, part.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        if attention and maps is None:
            # Computed again, since the fused kernel does not return its probabilities.
            scores = (query[:, :, :1] * part.scale) @ key.transpose(-2, -1)
            maps = scores.float().softmax(dim=-1)[:, :, 0]
        if part.fused_attn:
            out = F.scaled_dot_product_attention(query, key, value)
        else:
            weights = (query * part.scale) @ key.transpose(-2, -1)
            out = weights.softmax(dim=-1) @ value
        mixed.append(out.transpose(1, 2).reshape(n_crops * n_tokens, -1))
    return part.proj_drop(part.proj(torch.cat(mixed))), maps


def _each_crop(drop_path: nn.Module, update: Tensor, shapes: _Shapes) -> Tensor:
    """Applies stochastic depth, which drops a block for whole crops, not for single tokens."""
    if isinstance(drop_path, nn.Identity):
        return update
    parts = torch.split(update, [n_crops * n_tokens for n_crops, n_tokens in shapes])
    crops = [drop_path(part.view(*shape, -1)) for part, shape in zip(parts, shapes, strict=True)]
    return torch.cat([part.flatten(0, 1) for part in crops])
