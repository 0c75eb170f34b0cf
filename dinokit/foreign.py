"""Backbones that dinokit did not write: folders of timm and of transformers, and bare weight files.

Nothing is guessed: a folder is read when its own files say that it is a plain Vision Transformer (DINO v1,
or DINOv2 without registers), and refused with the reason otherwise. A folder keeps its own preprocessing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dinokit.architecture import PosEmbedResize, VitArchitecture
from dinokit.errors import ModelError
from dinokit.model_config import BackboneConfig, timm_arguments
from dinokit.preprocess import Preprocessing

__all__ = ["bare_weights_config", "config_from_timm", "config_from_transformers", "must_be_readable"]

Shapes = Mapping[str, tuple[int, ...]]

# timm's plain ViTs; others of its vit_* differ inside (pre-norm, QuickGELU, relative positions …).
_PLAIN_VIT = re.compile(r"vit_(tiny|small|base|large)_patch(8|14|16)_\d+$")
_TIMM_RESIZE = PosEmbedResize(offset=0.0, antialias=True)
_DINO_RESIZE = PosEmbedResize(offset=0.1, antialias=False)
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}


def bare_weights_config(shapes: Shapes, *, name: str, source: str) -> BackboneConfig:
    """A file of weights without a config: sizes from its shapes, the rest as facebookresearch/dino does it.

    Args:
        shapes: timm's names to shapes.
        name: for people.
        source: where it comes from.
    """
    vit = VitArchitecture.from_shapes(dict(shapes))
    architecture, model_args = timm_arguments(vit)
    side = vit.image_size[0]
    return BackboneConfig(
        name=name,
        vit=vit,
        timm_architecture=architecture,
        model_args=model_args,
        # eval_knn.py resizes to 256 before it crops 224
        preprocessing=Preprocessing(resize_px=round(side * 256 / 224), crop_px=(side, side)),
        licence="unknown",
        source=source,
    )


def must_be_readable(values: Mapping[str, Any], source: str) -> None:
    """Refuses by ``config.json`` alone, before any weights are fetched, what is no plain Vision Transformer."""
    if "architecture" in values:
        architecture, pool = str(values["architecture"]), values.get("global_pool", "token")
        if not _PLAIN_VIT.fullmatch(architecture) or pool != "token":
            raise ModelError(
                f"{source} is timm's {architecture!r} with global_pool={pool!r}; dinokit reads the plain ones, "
                "vit_tiny|small|base|large_patchN_SIZE with global_pool 'token', and the names that "
                "`dinokit models` lists"
            )
    elif "model_type" in values:
        kind = values["model_type"]
        if kind not in ("vit", "dinov2"):
            raise ModelError(
                f"{source} has model_type {kind!r}; dinokit reads 'vit' and 'dinov2', dinokit's own folders, and "
                "the names that `dinokit models` lists"
            )
        if values.get("hidden_act", "gelu") != "gelu" or values.get("use_swiglu_ffn"):
            raise ModelError(f"{source} has another activation than a DINO ViT (exact GELU)")
        eps = float(values.get("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6))
        if eps > 1e-6:
            raise ModelError(f"{source} has layer_norm_eps={eps}; a DINO ViT has 1e-6")
    else:
        raise ModelError(
            f"{source}: its config.json is neither dinokit's, timm's nor transformers'; dinokit cannot tell "
            "what it is"
        )


def config_from_timm(values: Mapping[str, Any], shapes: Shapes, *, source: str) -> BackboneConfig:
    """The backbone of a folder saved by timm.

    Args:
        values: its ``config.json``.
        shapes: names and shapes of its weights, without a classifier.
        source: folder or Hub id.

    Raises:
        ModelError: it is not one of timm's plain ViTs.
    """
    must_be_readable(values, source)
    cfg = values.get("pretrained_cfg", values)
    args = values.get("model_args") or {}
    vit = VitArchitecture.from_shapes(dict(shapes), num_heads=args.get("num_heads"))
    if str(cfg.get("tag", "")).startswith("dino"):
        vit = replace(
            vit, pos_embed_resize=_DINO_RESIZE
        )  # trained by facebookresearch/dino, whose rule this is
    else:
        vit = replace(vit, pos_embed_resize=_TIMM_RESIZE)
    _, model_args = timm_arguments(vit)
    return BackboneConfig(
        name=source.rsplit("/", 1)[-1],
        vit=vit,
        timm_architecture=str(values["architecture"]),
        model_args=model_args,
        preprocessing=_timm_preprocessing(cfg, source),
        licence=str(cfg.get("license") or "unknown"),
        source=source,
    )


def _timm_preprocessing(cfg: Mapping[str, Any], source: str) -> Preprocessing:
    try:
        _, height, width = cfg["input_size"]
        share, mode = float(cfg["crop_pct"]), cfg.get("crop_mode") or "center"
        # timm.data.create_transform: floor(size / crop_pct)
        short = math.floor(max(height, width) / share)
        if mode not in ("center", "squash"):
            raise ModelError(f"{source} crops by {mode!r}; dinokit knows 'center' and 'squash'")
        return Preprocessing(
            resize_px=short if mode == "center" else (math.floor(height / share), math.floor(width / share)),
            crop_px=(height, width),
            interpolation=cfg["interpolation"],
            mean=tuple(cfg["mean"]),
            std=tuple(cfg["std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{source}: its pretrained_cfg does not say the preprocessing whole ({error})"
        ) from error


def config_from_transformers(
    values: Mapping[str, Any], processor: Mapping[str, Any], shapes: Shapes, *, source: str
) -> BackboneConfig:
    """The backbone of a folder saved by transformers: ``model_type`` "vit" (facebook/dino-*) or "dinov2".

    Args:
        values: its ``config.json``.
        processor: its ``preprocessor_config.json``.
        shapes: timm's names to shapes, as :func:`dinokit.weights.transformers_to_timm` makes them.
        source: folder or Hub id.

    Raises:
        ModelError: it is another kind of model, or its numbers are not those of a DINO ViT.
    """
    must_be_readable(values, source)
    # facebook/dino-* say 1e-12 where the network was trained with 1e-6: dinokit computes as it was trained.
    vit = replace(
        VitArchitecture.from_shapes(dict(shapes), num_heads=values.get("num_attention_heads")),
        pos_embed_resize=_DINO_RESIZE,
    )
    architecture, model_args = timm_arguments(vit)
    return BackboneConfig(
        name=source.rsplit("/", 1)[-1],
        vit=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=_processor_preprocessing(processor, source),
        licence="unknown",
        source=source,
    )


def _processor_preprocessing(values: Mapping[str, Any], source: str) -> Preprocessing:
    switched_off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not values.get(key, True)]
    if switched_off:
        raise ModelError(f"{source}: its preprocessor_config.json switches off {switched_off}")
    crops = bool(values.get("do_center_crop", False))
    try:
        size = values["size"]
        if isinstance(size, int):  # the old form: the short side before a crop, else both sides
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        crop = values["crop_size"] if crops else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        squash = "shortest_edge" not in size
        return Preprocessing(
            resize_px=(int(size["height"]), int(size["width"])) if squash else int(size["shortest_edge"]),
            crop_px=(int(crop["height"]), int(crop["width"])),
            interpolation=_PIL_FILTERS[values.get("resample", 2)],
            mean=tuple(values["image_mean"]),
            std=tuple(values["image_std"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{source}: its preprocessor_config.json does not say the preprocessing whole ({error!r})"
        ) from error
