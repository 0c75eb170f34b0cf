"""Backbones that dinokit did not write: folders of timm and transformers, and files of weights.

Nothing is guessed: a folder is read if its files state that it is a Vision Transformer of DINO v1, DINOv2 or DINOv3,
and otherwise refused with the reason. A folder keeps its own preprocessing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dinokit.errors import ModelError
from dinokit.loading.zoo import DINOV2_EVAL, DINOV3_EVAL, DINOV3_LICENCE, DINOV3_SATELLITE_EVAL
from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.config import BackboneConfig, one_line, timm_arguments
from dinokit.model_folder.reference_networks import network_of
from dinokit.model_folder.weight_names import some_of
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph.rope import ROPE_THETA
from dinokit.wording import counted

__all__ = [
    "bare_weights_config",
    "config_from_timm",
    "config_from_transformers",
    "licence_of",
    "must_be_readable",
    "readable_in_timm",
]

Shapes = Mapping[str, tuple[int, ...]]

# timm's plain ViTs; other vit_* have different parts (pre-norm, QuickGELU, relative positions …).
_PLAIN_VIT = re.compile(r"vit_(tiny|small|base|large)_patch(8|14|16)_\d+$")
_DINOV2_VIT = re.compile(r"vit_(small|base|large|giant)_patch14_(reg4_)?dinov2")
_DINOV3_VIT = re.compile(r"vit_(tiny|small|small_plus|base|large|huge_plus|7b)_patch16_dinov3(_qkvb)?")
_TIMM_RESIZE = PosEmbedResize(offset=0.0, antialias=True)
_PIL_FILTERS = {2: "bilinear", 3: "bicubic"}
_BIT_PROCESSORS = ("BitImageProcessor", "BitImageProcessorFast", "BitImageProcessorPil")
"""transformers' classes (DINOv2's) that crop, and resize with 3, where their file does not say; the others do not."""

# Arguments of timm's networks that are read off the weights, or that change nothing at inference …
_SIZE_ARGS = {
    "img_size",
    "patch_size",
    "in_chans",
    "embed_dim",
    "depth",
    "num_heads",
    "mlp_ratio",
    "qkv_bias",
    "init_values",
    "reg_tokens",
    "num_reg_tokens",
    "no_embed_class",
    "num_classes",
    "dynamic_img_size",
    "strict_img_size",
    "weight_init",
    "fix_init",
}
# … and those that must be as a DINO ViT has them.
_PLAIN_ARGS = {
    "class_token": True,
    "pos_embed": "learn",
    "pre_norm": False,
    "final_norm": True,
    "act_layer": "gelu",
}

# Values of transformers' DINOv3ViTConfig that all published networks share.
_DINOV3_VALUES = {
    "layer_norm_eps": 1e-5,
    "rope_theta": ROPE_THETA,
    "key_bias": False,
    "proj_bias": True,
    "mlp_bias": True,
}


def bare_weights_config(shapes: Shapes, *, name: str, source: str) -> BackboneConfig:
    """The configuration of a file of weights: sizes from its shapes, the rest as in its original repository.

    Args:
        shapes: timm's names to shapes.
        name: of the model.
        source: the file's path.

    Raises:
        ModelError: it is not a network that dinokit reads; the message lists its entries.
    """
    if network := network_of(shapes):
        timm_name, known = network  # evaluated as the ViTs are: with the default preprocessing
        return BackboneConfig(one_line(name), known, timm_name, licence="unknown", source=one_line(source))
    vit = _vit_of(shapes, source)
    architecture, model_args = timm_arguments(vit)
    return BackboneConfig(
        name=one_line(name),
        architecture=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=_reference_preprocessing(vit, name),
        licence="unknown",
        source=one_line(source),
    )


def _vit_of(
    shapes: Shapes, source: str, *, num_heads: Any = None, image_size: tuple[int, int] | None = None
) -> VitArchitecture:
    """As :meth:`VitArchitecture.from_shapes`; errors name the source of the weights and their entries."""
    if not (num_heads is None or (type(num_heads) is int and num_heads >= 1)):
        raise ModelError(f"{source}: its config.json is damaged: it has {num_heads!r} attention heads")
    try:
        return VitArchitecture.from_shapes(dict(shapes), num_heads=num_heads, image_size=image_size)
    except ModelError as error:
        raise ModelError(
            f"{source}: {error}. It holds {counted(len(shapes), 'entry', 'entries')}: {some_of(sorted(shapes))}"
        ) from error


def _reference_preprocessing(vit: VitArchitecture, name: str) -> Preprocessing:
    if vit.position == "rope":
        # Only the file name shows a model for satellite pictures: dinov3_…_sat493m-….pth
        return DINOV3_SATELLITE_EVAL if "sat493m" in name else DINOV3_EVAL
    if vit.layer_scale and vit.image_size == (518, 518):  # DINOv2: trained on at 518, evaluated at 224
        return DINOV2_EVAL
    side = vit.image_size[0]  # DINO v1: eval_knn.py resizes to 256 before it crops 224
    return Preprocessing(resize_px=round(side * 256 / 224), crop_px=(side, side))


def _name_of(source: str) -> str:
    """The last part of a folder's path or of a Hub id; for ``.`` and a closing slash, too."""
    return one_line(os.path.basename(os.path.abspath(source)))  # noqa: PTH100, PTH119  # Path keeps ".."


def licence_of(values: Mapping[str, Any]) -> str:
    """The licence that a ``config.json`` of timm or transformers names or implies, or "unknown"."""
    if values.get("model_type") == "dinov3_vit":  # its licence also covers derived weights
        return DINOV3_LICENCE
    cfg = values.get("pretrained_cfg", values)
    return one_line(str((cfg.get("license") if isinstance(cfg, Mapping) else None) or "unknown"))


# -- what can be read


def must_be_readable(values: Mapping[str, Any], source: str) -> None:
    """Raises ModelError, before weights are fetched, if ``config.json`` is not a DINO Vision Transformer's."""
    if "architecture" in values:
        _must_be_timms(values, source)
    elif "model_type" in values:
        _must_be_transformers(values, source)
    else:
        raise ModelError(
            f"{source}: its config.json is neither dinokit's, timm's nor transformers'; dinokit cannot "
            "read it"
        )


def readable_in_timm(name: str) -> bool:
    """Whether dinokit reads timm's networks of this name, which may end in a tag (``….dino``)."""
    architecture = name.partition(".")[0]
    return any(kind.fullmatch(architecture) for kind in (_PLAIN_VIT, _DINOV2_VIT, _DINOV3_VIT))


def _must_be_timms(values: Mapping[str, Any], source: str) -> None:
    architecture, pool = str(values["architecture"]), values.get("global_pool", "token")
    args = values.get("model_args")
    _must_be_represented(args if isinstance(args, Mapping) else {}, architecture, source)
    if _DINOV3_VIT.fullmatch(architecture):
        return  # timm pools the patches by default; upstream's features, and dinokit's, are the CLS token
    known = _PLAIN_VIT.fullmatch(architecture) or _DINOV2_VIT.fullmatch(architecture)
    if not known or pool != "token":
        raise ModelError(
            f"{source} is timm's {architecture!r} with global_pool={pool!r}; dinokit reads plain ones, "
            "vit_tiny|small|base|large_patchN_SIZE with global_pool 'token', vit_*_dinov2 and vit_*_dinov3, "
            "and the names that `dinokit models` lists"
        )


def _must_be_represented(args: Mapping[str, Any], architecture: str, source: str) -> None:
    """Refuses arguments of ``timm.create_model`` that change what the same weights compute."""
    plain = _PLAIN_ARGS | ({} if _DINOV3_VIT.fullmatch(architecture) else {"global_pool": "token"})
    odd = {
        key: value
        for key, value in args.items()
        if not (value is None or key in _SIZE_ARGS or key.endswith(("drop_rate", "drop_path_rate")))
        and not (key in plain and value == plain[key])
        and not (key == "global_pool" and "global_pool" not in plain)
    }
    if odd:
        listed = ", ".join(f"{key}={value!r}" for key, value in odd.items())
        raise ModelError(
            f"{source}: its model_args have {listed}; dinokit reads the sizes of a network there, and nothing that "
            "changes what it computes. Export it to ONNX where timm is installed (dinokit.export.export_onnx)"
        )


def _must_be_transformers(values: Mapping[str, Any], source: str) -> None:
    kind = values["model_type"]
    if kind not in ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit"):
        raise ModelError(
            f"{source} has model_type {kind!r}; dinokit reads 'vit', 'dinov2', 'dinov2_with_registers' and "
            "'dinov3_vit', dinokit's own folders, and the names that `dinokit models` lists"
        )
    dinov3 = kind == "dinov3_vit"
    activation = "silu" if dinov3 and values.get("use_gated_mlp") else "gelu"
    if values.get("hidden_act", "gelu") != activation:
        raise ModelError(
            f"{source} has a different activation from a DINO ViT's: {values.get('hidden_act', 'gelu')!r}, "
            f"expected {activation!r} ({'SwiGLU' if activation == 'silu' else 'exact GELU'})"
        )
    if dinov3:
        odd = {k: values[k] for k, right in _DINOV3_VALUES.items() if values.get(k, right) != right}
        if values.get("query_bias", True) != values.get("value_bias", True):
            odd["query_bias"] = values.get("query_bias", True)
        if odd:
            listed = ", ".join(f"{key}={value}" for key, value in odd.items())
            raise ModelError(f"{source} is not a DINOv3 as published; it has {listed}")
        return
    eps = values.get("layer_norm_eps", 1e-12 if kind == "vit" else 1e-6)
    if not isinstance(eps, int | float) or eps > 1e-6:
        raise ModelError(f"{source} has layer_norm_eps={eps}; a DINO ViT has 1e-6")


# -- timm


def config_from_timm(values: Mapping[str, Any], shapes: Shapes, *, source: str) -> BackboneConfig:
    """The backbone of a folder saved by timm.

    Args:
        values: its ``config.json``.
        shapes: names and shapes of its weights, without a classifier.
        source: folder or Hub id.

    Raises:
        ModelError: it is not one of timm's ViTs that dinokit reads.
    """
    must_be_readable(values, source)
    cfg = values.get("pretrained_cfg", values)
    args = values.get("model_args")
    args = args if isinstance(args, Mapping) else {}
    size = _image_size(args.get("img_size"), source)
    if size is None and isinstance(cfg, Mapping) and cfg.get("fixed_input_size"):
        size = _fitting(cfg.get("input_size"), shapes)
    vit = _vit_of(shapes, source, num_heads=args.get("num_heads"), image_size=size)
    preprocessing = _timm_preprocessing(cfg, source)
    if vit.position == "rope":
        vit = _published_at(vit, preprocessing.crop_px)
    elif not str(cfg.get("tag", "")).startswith(("dino", "lvd142m")):
        vit = replace(vit, pos_embed_resize=_TIMM_RESIZE)
    # else trained by facebookresearch's dino or dinov2, whose rule from_shapes has taken
    _, model_args = timm_arguments(vit)
    return BackboneConfig(
        name=_name_of(source),
        architecture=vit,
        timm_architecture=str(values["architecture"]),
        model_args=model_args,
        preprocessing=preprocessing,
        licence=licence_of(values),
        source=one_line(source),
    )


def _image_size(size: Any, source: str) -> tuple[int, int] | None:
    """(H, W) from a side or a pair of sides of a ``config.json``, None if it has neither."""
    if size is None:
        return None
    sides = size if isinstance(size, list | tuple) else (size, size)
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise ModelError(
            f"{source}: its config.json is damaged: the image size is {size!r}; expected pixels, or two"
        )
    return sides[0], sides[1]


def _fitting(input_size: Any, shapes: Shapes) -> tuple[int, int] | None:
    """(H, W) of timm's ``input_size`` (C, H, W), by which timm builds where ``fixed_input_size`` is set.

    None where the weights have another number of patches: timm then resizes the position embedding as it loads them,
    dinokit whenever it is used.
    """
    try:
        _, height, width = input_size
        patch = shapes["patch_embed.proj.weight"][-1]
        n_patches = (height // patch) * (width // patch)
        n_positions = shapes["pos_embed"][1] - ("reg_token" not in shapes)
    except (KeyError, IndexError, TypeError, ValueError, ZeroDivisionError):
        return None
    return (height, width) if n_patches == n_positions else None


def _published_at(vit: VitArchitecture, image_size: tuple[int, int]) -> VitArchitecture:
    """Sets the image size of rotated positions, which the weights do not determine, to the folder's."""
    fits = not any(side % vit.patch_size for side in image_size)
    return replace(vit, image_size=image_size) if fits else vit


def _timm_preprocessing(cfg: Any, source: str) -> Preprocessing:
    try:
        return Preprocessing.from_pretrained_cfg(cfg)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error.__cause__


def _preprocessing(plain: Mapping[str, Any], source: str) -> Preprocessing:
    try:
        return Preprocessing.from_json(plain)
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


# -- transformers


def config_from_transformers(
    values: Mapping[str, Any], processor: Mapping[str, Any], shapes: Shapes, *, source: str
) -> BackboneConfig:
    """The backbone of a folder saved by transformers.

    Its ``model_type`` is "vit" (facebook/dino-*), "dinov2", "dinov2_with_registers" or "dinov3_vit". A learned
    position embedding is resized as the original repositories do it, not as transformers does.

    Args:
        values: its ``config.json``.
        processor: its ``preprocessor_config.json``.
        shapes: timm's names to shapes, as :func:`dinokit.model_folder.weights.transformers_to_timm` makes them.
        source: folder or Hub id.

    Raises:
        ModelError: it is another kind of model, or its numbers are not those of a DINO ViT.
    """
    must_be_readable(values, source)
    # facebook/dino-* state 1e-12, but the networks were trained with 1e-6, which dinokit uses.
    size = None if values["model_type"] == "dinov3_vit" else _image_size(values.get("image_size"), source)
    vit = _vit_of(shapes, source, num_heads=values.get("num_attention_heads"), image_size=size)
    _must_be_the_weights(values, vit, source)
    preprocessing = _processor_preprocessing(processor, source)
    if vit.position == "rope":
        vit = _published_at(vit, preprocessing.crop_px)
    architecture, model_args = timm_arguments(vit)
    return BackboneConfig(
        name=_name_of(source),
        architecture=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=preprocessing,
        licence=licence_of(values),
        source=one_line(source),
    )


def _must_be_the_weights(values: Mapping[str, Any], vit: VitArchitecture, source: str) -> None:
    """Raises ModelError if ``config.json`` describes another network than the weights."""
    sizes = {"num_hidden_layers": vit.depth, "hidden_size": vit.embed_dim, "patch_size": vit.patch_size}
    wrong = [
        f"{key} is {values[key]!r} there and {right} in the weights"
        for key, right in sizes.items()
        if values.get(key) is not None and values[key] not in (right, [right, right])
    ]
    if wrong:
        raise ModelError(
            f"{source}: its config.json is of another network: {'; '.join(wrong)}; fetch both files again"
        )


def _processor_preprocessing(values: Mapping[str, Any], source: str) -> Preprocessing:
    switched_off = [key for key in ("do_resize", "do_rescale", "do_normalize") if not values.get(key, True)]
    if switched_off:
        raise ModelError(f"{source}: its preprocessor_config.json switches off {switched_off}")
    is_bit = values.get("image_processor_type") in _BIT_PROCESSORS
    crops = bool(values.get("do_center_crop", is_bit))
    try:
        size = values["size"]
        if isinstance(size, int):  # the old form: the short side before a crop, else both sides
            size = {"shortest_edge": size} if crops else {"height": size, "width": size}
        crop = values["crop_size"] if crops else size
        crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
        squash = "shortest_edge" not in size
        plain = {
            "resize_px": (size["height"], size["width"]) if squash else size["shortest_edge"],
            "crop_px": (crop["height"], crop["width"]),
            "interpolation": _PIL_FILTERS[values.get("resample", 3 if is_bit else 2)],
            "mean": values["image_mean"],
            "std": values["image_std"],
        }
    except (KeyError, TypeError) as error:
        raise ModelError(
            f"{source}: its preprocessor_config.json does not describe the whole preprocessing ({error!r})"
        ) from error
    odd = {key: values[key] for key in ("rescale_offset", "offset") if values.get(key)}
    if isinstance(size, Mapping) and size.get("longest_edge") is not None:
        odd["longest_edge"] = size["longest_edge"]
    factor = values.get("rescale_factor")
    if factor is not None and not (isinstance(factor, int | float) and abs(factor - 1 / 255) <= 1e-6):
        odd["rescale_factor"] = factor
    if odd:
        listed = ", ".join(f"{key}={value!r}" for key, value in odd.items())
        raise ModelError(
            f"{source}: its preprocessor_config.json has {listed}; dinokit supports a resize by the short side or to "
            "(height, width), and pixels divided by 255"
        )
    return _preprocessing(plain, source)
