"""What facebookresearch/dino published besides Vision Transformers: ResNet-50 and XCiT, recognised by their weights.

Its ResNets are torchvision's, whose names timm shares. Its XCiTs are facebookresearch/xcit's; timm has another name for
the position encoding, and separate matrices for queries, keys and values of the class attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dinokit.model_folder.architecture import TimmArchitecture
from dinokit.model_folder.weight_names import thirds

__all__ = ["network_of", "to_timm_names"]

Weights = dict[str, NDArray[np.float32]]

_RESNETS: dict[tuple[bool, tuple[int, ...]], str] = {  # (has bottlenecks, blocks of each stage): timm's name
    (False, (2, 2, 2, 2)): "resnet18",
    (False, (3, 4, 6, 3)): "resnet34",
    (True, (3, 4, 6, 3)): "resnet50",
    (True, (3, 4, 23, 3)): "resnet101",
    (True, (3, 8, 36, 3)): "resnet152",
}
_XCITS = {(384, 12): "xcit_small_12", (512, 24): "xcit_medium_24"}  # (width, blocks)
_SIZE = (224, 224)


def network_of(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, TimmArchitecture] | None:
    """timm's name and the sizes of a network, by the shapes of its weights under timm's names.

    Returns:
        None if they are neither a plain ResNet's nor those of an XCiT published with DINO.
    """
    return _resnet(shapes) or _xcit(shapes)


def to_timm_names(weights: Weights) -> Weights | None:
    """The weights of a ResNet or XCiT under timm's names, without classifier and BatchNorm's counts of batches.

    Returns:
        None for weights of another family.
    """
    if "layer4.0.conv1.weight" not in weights and "cls_attn_blocks.0.norm1.weight" not in weights:
        return None
    renamed: Weights = {}
    for name, array in weights.items():
        if name.endswith("num_batches_tracked") or name.startswith(("fc.", "head.")):
            continue
        if name.startswith("cls_attn_blocks.") and ".attn.qkv." in name:
            for part, piece in zip("qkv", thirds(name, array), strict=True):
                renamed[name.replace(".qkv.", f".{part}.")] = piece
        else:
            renamed[name.replace("pos_embeder.", "pos_embed.")] = array
    return renamed


def _resnet(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, TimmArchitecture] | None:
    if shapes.get("conv1.weight", ())[2:] != (7, 7) or shapes.get("layer1.0.conv2.weight") != (64, 64, 3, 3):
        return None
    blocks = tuple(
        len({name.split(".")[1] for name in shapes if name.startswith(f"layer{i}.")}) for i in range(1, 5)
    )
    bottleneck = "layer1.0.conv3.weight" in shapes
    name = _RESNETS.get((bottleneck, blocks))
    if name is None:
        return None
    last = shapes.get(f"layer4.0.conv{3 if bottleneck else 2}.weight", ())
    if len(last) != 4:
        return None
    width = last[0]
    return name, TimmArchitecture(
        embed_dim=width,
        stride=32,
        image_size=_SIZE,
        token_dim=width,
        in_chans=shapes["conv1.weight"][1],
        first_conv="conv1",
        classifier="fc",
    )


def _xcit(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, TimmArchitecture] | None:
    if "cls_attn_blocks.0.norm1.weight" not in shapes or "norm.weight" not in shapes:
        return None
    width = next(iter(shapes["norm.weight"]), 0)
    depth = len({name.split(".")[1] for name in shapes if name.startswith("blocks.")})
    name = _XCITS.get((width, depth))
    if name is None:
        return None
    patch = 16 if "patch_embed.proj.6.0.weight" in shapes else 8  # a convolution for each halving
    return f"{name}_p{patch}_224", TimmArchitecture(
        embed_dim=width,
        stride=patch,
        image_size=_SIZE,
        token_dim=width,
        num_prefix_tokens=1,
        first_conv="patch_embed.proj.0.0",
        classifier="head",
    )
