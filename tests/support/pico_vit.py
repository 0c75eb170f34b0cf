"""A Vision Transformer so small that a test of training takes no time; timm knows it once this is imported.

Little that is tested of training depends on the width or depth of the network, and ViT-Ti takes ten times as long.
Commands that a test starts as processes of their own do not know it.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

PICO = "vit_pico_patch16_224"


@register_model
def vit_pico_patch16_224(pretrained: bool = False, **arguments: Any) -> VisionTransformer:
    """3 blocks of width 48 with 3 heads."""
    assert not pretrained
    sizes = {"patch_size": 16, "embed_dim": 48, "depth": 3, "num_heads": 3}
    of_timm = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
    kept = {name: value for name, value in arguments.items() if name not in of_timm}
    return VisionTransformer(**{**sizes, **kept})
