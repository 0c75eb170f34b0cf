"""Translates the names of a backbone's weights: timm's, which dinokit uses, transformers' and facebookresearch's.

timm's names are facebookresearch/dino's own: ``cls_token``, ``pos_embed``, ``patch_embed.proj``,
``blocks.N.norm1 / attn.qkv / attn.proj / norm2 / mlp.fc1 / mlp.fc2`` and ``norm``. DINOv2 adds ``reg_token`` and
``ls1.gamma``; DINOv3, another class in timm, has ``gamma_1``, ``attn.q_bias``, ``attn.v_bias`` and, where the
feed-forward network is gated, ``mlp.fc1_g`` and ``mlp.fc1_x``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.wording import counted

__all__ = [
    "dinov2_to_timm",
    "dinov3_to_timm",
    "reference_to_timm",
    "some_of",
    "thirds",
    "timm_to_transformers",
    "transformers_to_timm",
    "without_chunks",
]

Arrays = dict[str, NDArray[Any]]

# -- transformers

# Outside the blocks: timm ↔ transformers, the same in `dinov2` and `vit`.
_OUTER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
_DINOV3_OUTER = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.bias",
    "norm.weight": "norm.weight",
    "norm.bias": "norm.bias",
}
_REGISTERS = {"reg_token": "embeddings.register_tokens"}

# Inside a block. timm's `attn.qkv` is joined from `attn.query`, `attn.key` and `attn.value` afterwards.
_QKV = ("query", "key", "value")
_ATTENTION = {f"attn.{part}": f"attention.attention.{part}" for part in _QKV} | {
    "attn.proj": "attention.output.dense"
}
_NORMS = {"norm1": "norm1", "norm2": "norm2"}
_LAYER_SCALES = {"ls1": "layer_scale1", "ls2": "layer_scale2"}
_DINOV2_BLOCK = _ATTENTION | _NORMS | {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
_SWIGLU = {"mlp.fc1": "mlp.weights_in", "mlp.fc2": "mlp.weights_out"}
_VIT_BLOCK = _ATTENTION | {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINOV3_BLOCK = (
    {f"attn.{part}": f"attention.{part[0]}_proj" for part in _QKV}
    | {"attn.proj": "attention.o_proj", "mlp.fc2": "mlp.down_proj"}
    | _NORMS
    | _LAYER_SCALES
)
_MLP_UP = {"mlp.fc1": "mlp.up_proj"}
_GATED_UP = {"mlp.fc1_g": "mlp.gate_proj", "mlp.fc1_x": "mlp.up_proj"}

# A model with a task head saves its backbone under a prefix; DINOv3's blocks may be under "model.".
_PREFIX = re.compile(r"^((vit|dinov2|dinov2_with_registers|dinov3_vit|model)\.)+")
_BLOCK = re.compile(r"^(?:encoder\.)?layer\.(\d+)\.(.+)\.(weight|bias|lambda1)$")


def timm_to_transformers(weights: Mapping[str, NDArray[Any]], vit: VitArchitecture) -> Arrays:
    """A DINO v1 ViT under the names of transformers' ``Dinov2Model``.

    Layer scale 1 and a mask token of 0 make it exactly the same network, and the pooled output is the CLS token
    itself (with ``model_type`` "vit" it would pass through a random layer).

    Raises:
        ModelError: the network is not a DINO v1 ViT.
    """
    if not vit.is_dino_v1:
        raise ModelError("only the plain ViT of DINO v1 can be written as one of transformers' models")
    out: Arrays = {theirs: weights[ours] for ours, theirs in _OUTER.items()}
    out["embeddings.mask_token"] = np.zeros((1, vit.embed_dim), np.float32)
    for index in range(vit.depth):
        ours, theirs = f"blocks.{index}.", f"encoder.layer.{index}."
        for kind in ("weight", "bias"):
            qkv = np.split(weights[f"{ours}attn.qkv.{kind}"], 3)
            parts = dict(zip((f"attn.{part}" for part in _QKV), qkv, strict=True))
            for left, right in _DINOV2_BLOCK.items():
                found = parts[left] if left in parts else weights[f"{ours}{left}.{kind}"]
                out[f"{theirs}{right}.{kind}"] = found
        for scale in _LAYER_SCALES.values():
            out[f"{theirs}{scale}.lambda1"] = np.ones(vit.embed_dim, np.float32)
    return out


def transformers_to_timm(weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """timm's names for a ViT saved by transformers.

    Reads the ``model_type`` "dinov2" (as this module writes it, or facebook/dinov2-*), "dinov2_with_registers",
    "dinov3_vit" and "vit" (facebook/dino-*). Omits the pooler, which is a random layer in DINO's files, the mask
    token, which is for training only, and a plain ViT's layer scale if it is 1 everywhere. With registers, the CLS
    token's position is added to the token, as in timm.

    Raises:
        ModelError: a Vision Transformer of these kinds has no such key, or query, key or value is missing.
    """
    names = {_PREFIX.sub("", name): name for name in weights}
    dinov3 = any(name.endswith("attention.q_proj.weight") for name in names)
    if dinov3:
        gated = any(".mlp.gate_proj." in name for name in names)
        outer, block = _DINOV3_OUTER | _REGISTERS, [_DINOV3_BLOCK, _GATED_UP if gated else _MLP_UP]
    else:
        outer, block = _OUTER | _REGISTERS, [_DINOV2_BLOCK, _SWIGLU, _VIT_BLOCK, _LAYER_SCALES]
    outer = {theirs: ours for ours, theirs in outer.items()}
    inner = {theirs: ours for table in block for ours, theirs in table.items()}

    out: Arrays = {}
    unknown = []
    for name, full_name in names.items():
        match = _BLOCK.match(name)
        if name in outer:
            out[outer[name]] = weights[full_name]
        elif match and match[2] in inner:
            kind = "gamma" if match[3] == "lambda1" else match[3]
            out[f"blocks.{match[1]}.{inner[match[2]]}.{kind}"] = weights[full_name]
        elif not name.startswith("pooler.") and name != "embeddings.mask_token":
            unknown.append(full_name)
    if unknown:
        raise ModelError(
            f"found {counted(len(unknown), 'tensor')} that a DINO Vision Transformer does not have: "
            f"{some_of(sorted(unknown))}"
        )
    out = _join_qkv(out, key_bias=not dinov3)
    if dinov3:
        return _eva_names(out)
    return _cls_with_its_position(out) if "reg_token" in out else _without_scales_of_one(out)


def _join_qkv(weights: Arrays, *, key_bias: bool) -> Arrays:
    """Joins ``attn.query``, ``attn.key`` and ``attn.value`` into ``attn.qkv``."""
    out: Arrays = {}
    split: dict[str, Arrays] = {}
    for name, array in weights.items():
        if match := re.fullmatch(r"(.+\.attn)\.(query|key|value)\.(weight|bias)", name):
            split.setdefault(f"{match[1]}.qkv.{match[3]}", {})[match[2]] = array
        else:
            out[name] = array
    for key, parts in split.items():
        if key.endswith(".bias") and not key_bias and set(parts) == {"query", "value"}:
            parts["key"] = np.zeros_like(parts["query"])
        if len(parts) != 3:
            raise ModelError(f"{key} cannot be joined: {sorted(set(_QKV) - set(parts))} is missing")
        if len({part.shape for part in parts.values()}) != 1:
            shapes = ", ".join(f"{name} {parts[name].shape}" for name in _QKV)
            raise ModelError(f"{key} cannot be joined: its parts have different shapes: {shapes}")
        out[key] = np.concatenate([parts[name] for name in _QKV])
    return out


def _cls_with_its_position(weights: Arrays) -> Arrays:
    """Adds the position of CLS to its token: with registers, timm's position embedding has no entry for it."""
    cls, positions = weights.get("cls_token"), weights.get("pos_embed")
    if (
        cls is None
        or positions is None
        or cls.ndim != 3
        or positions.ndim != 3
        or cls.shape[2] != positions.shape[2]
    ):
        found = [
            f"{name} {a.shape}" for name, a in (("cls_token", cls), ("pos_embed", positions)) if a is not None
        ]
        raise ModelError(
            "these weights have register tokens, so a DINO Vision Transformer has cls_token (1, 1, D) and pos_embed "
            f"(1, 1 + N, D) beside them, but they have {' and '.join(found) or 'neither'}"
        )
    return weights | {"cls_token": cls + positions[:, :1], "pos_embed": positions[:, 1:]}


def _without_scales_of_one(weights: Arrays) -> Arrays:
    """Omits layer scales that are all 1, which a DINO v1 ViT has only under Dinov2Model's names."""
    scales = {name for name in weights if name.endswith(".gamma")}
    if all((weights[name] == 1).all() for name in scales):
        return {name: array for name, array in weights.items() if name not in scales}
    return weights


# -- facebookresearch


def reference_to_timm(weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """timm's names for a backbone of facebookresearch's dino, dinov2 or dinov3, or of timm already.

    Raises:
        ModelError: as :func:`without_chunks` and :func:`dinov3_to_timm` do.
    """
    weights = without_chunks(weights)
    return dinov3_to_timm(weights) if "storage_tokens" in weights else dinov2_to_timm(weights)


def without_chunks(weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """``blocks.3.norm1`` for ``blocks.0.3.norm1``: training code groups the blocks into chunks.

    Source: facebookresearch/dinov2, ``BlockChunk`` of ``vision_transformer.py``.

    Raises:
        ModelError: a block is in two chunks.
    """
    out: Arrays = {}
    for full_name, array in weights.items():
        name = _CHUNK.sub(r"blocks.\1.", full_name)
        if name in out:
            raise ModelError(
                f"two entries are both {name} once their chunk prefixes are removed, one of them {full_name}"
            )
        out[name] = array
    return out


_CHUNK = re.compile(r"^blocks\.\d+\.(\d+)\.")


def dinov2_to_timm(weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """timm's names for a backbone of facebookresearch/dinov2; timm's own names are kept.

    Omits the mask token, which is for training only. With registers, the position of CLS is added to its token, as
    in timm.
    """
    out = {name: array for name, array in weights.items() if name != "mask_token"}
    if "register_tokens" in out:
        out["reg_token"] = out.pop("register_tokens")
        out = _cls_with_its_position(out)
    swiglu = {"mlp.w12": "mlp.fc1", "mlp.w3": "mlp.fc2"}
    return {re.sub(r"mlp\.w(12|3)(?=\.)", lambda found: swiglu[found[0]], k): v for k, v in out.items()}


_TRAINING_ONLY = re.compile(r"mask_token|rope_embed\.periods|local_cls_norm\..*|.*\.attn\.qkv\.bias_mask")


def dinov3_to_timm(weights: Mapping[str, NDArray[Any]]) -> Arrays:
    """timm's names for a backbone of facebookresearch/dinov3.

    Tensors for training only are omitted, and so are the rotation's periods, which follow from the width of a
    head (they are stored in bfloat16; the difference is a rounding).

    Raises:
        ModelError: keys have a bias, which DINOv3 does not have.
    """
    parts = {"mlp.w1.": "mlp.fc1_g.", "mlp.w2.": "mlp.fc1_x.", "mlp.w3.": "mlp.fc2."}
    out: Arrays = {}
    masks = {name: array for name, array in weights.items() if name.endswith(".bias_mask")}
    for name, array in weights.items():
        if _TRAINING_ONLY.fullmatch(name):
            continue
        if (mask := masks.get(f"{name}_mask")) is not None:
            array = np.where(mask == 0, 0, array)
        name = re.sub(r"mlp\.w[123]\.", lambda found: parts[found[0]], name)
        out["reg_token" if name == "storage_tokens" else name] = array
    return _eva_names(out)


def _eva_names(weights: Arrays) -> Arrays:
    """The names of timm's class for DINOv3, ``Eva``, from those of its other Vision Transformers."""
    out: Arrays = {}
    for name, array in weights.items():
        if name.endswith(".attn.qkv.bias"):
            query, key, value = thirds(name, array)
            if key.any():
                raise ModelError(
                    f"{name} has a bias for keys, which DINOv3 does not have and dinokit cannot store"
                )
            stem = name.removesuffix("qkv.bias")
            out |= {f"{stem}q_bias": query, f"{stem}v_bias": value}
        else:
            out[re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name)] = array
    return out


def thirds(name: str, array: NDArray[Any]) -> list[NDArray[Any]]:
    """Queries, keys and values of one matrix or bias. Raises ModelError if it cannot be split into three."""
    if array.ndim == 0 or len(array) % 3:
        raise ModelError(
            f"{name} has the shape {array.shape}; expected queries, keys and values of the same length in it"
        )
    return np.split(array, 3)


def some_of(names: Iterable[str], most: int = 6) -> str:
    """Names for a message: the first ones, and how many more there are."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
