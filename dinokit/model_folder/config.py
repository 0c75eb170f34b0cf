"""``config.json`` of a model folder: one file that dinokit, timm and transformers each read."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dinokit._version import __version__
from dinokit.errors import ModelError
from dinokit.model_folder.architecture import (
    Architecture,
    TimmArchitecture,
    VitArchitecture,
    architecture_from_json,
)
from dinokit.pictures.preprocess import Preprocessing

__all__ = [
    "FORMAT_VERSION",
    "TIMM_FILE",
    "TRANSFORMERS_FILE",
    "BackboneConfig",
    "is_one_line",
    "one_line",
    "timm_arguments",
]

FORMAT_VERSION = 1
"""Incremented when an older dinokit would misread a new folder."""

TIMM_FILE = "timm.safetensors"
# What config.json names for timm, which looks for .safetensors in its place. A name that ends in .safetensors itself
# is read as a pickle by timm before 1.0.29.
_NAMED_FOR_TIMM = "timm.bin"
TRANSFORMERS_FILE = "model.safetensors"

# The derived keys whose disagreement would make two loaders build two different networks.
_DERIVED = (
    "architecture",
    "model_args",
    "model_type",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "mlp_ratio",
    "patch_size",
    "image_size",
    "layer_norm_eps",
    "layerscale_value",
    "qkv_bias",
)
_DERIVED_PIXELS = (
    "input_size",
    "interpolation",
    "crop_pct",
    "crop_mode",
    "mean",
    "std",
    "hf_hub_filename",
)


@dataclass(frozen=True)
class BackboneConfig:
    """Everything in a model folder's ``config.json`` about its backbone."""

    name: str
    """Short name for people, e.g. ``starter``."""
    architecture: Architecture
    """A DINO Vision Transformer, or the sizes of another network of timm."""
    timm_architecture: str
    """timm's name for it, e.g. ``vit_tiny_patch16_224``."""
    model_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of ``timm.create_model`` beside ``num_classes=0``: the sizes, explicitly, as JSON values."""
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    licence: str = "apache-2.0"
    """Identifier as the Hugging Face Hub writes it."""
    source: str = ""
    """Where the weights come from: a training run or a Hub id."""
    written_by: str = f"dinokit {__version__}"

    def __post_init__(self) -> None:
        # num_classes would be given twice by transformers' TimmWrapperModel (a TypeError there).
        args = {key: value for key, value in self.model_args.items() if key != "num_classes"}
        try:
            plain = json.loads(json.dumps(args))  # tuples become lists, as after reading the file
        except TypeError as error:
            raise ModelError(f"model_args must be plain JSON values: {error}") from error
        object.__setattr__(self, "model_args", plain)

    @property
    def vit(self) -> VitArchitecture:
        """The architecture, if it is a DINO Vision Transformer.

        Raises:
            ModelError: it is another network.
        """
        if not isinstance(self.architecture, VitArchitecture):
            raise ModelError(f"{self.name} is not a DINO Vision Transformer but {self._what}")
        return self.architecture

    @property
    def _what(self) -> str:
        return f"timm's {self.timm_architecture}" if self.timm_architecture else "another network of timm"

    @property
    def embed_dim(self) -> int:
        """Width D of the embedding."""
        return self.architecture.embed_dim

    @property
    def token_dim(self) -> int | None:
        """Width of a token of ``last_hidden_state``; None if the network has no such output."""
        known = self.architecture
        return known.embed_dim if isinstance(known, VitArchitecture) else known.token_dim

    @property
    def num_heads(self) -> int:
        """Attention heads of the last block; 0 for a network that has no attention to show."""
        return self.architecture.num_heads if isinstance(self.architecture, VitArchitecture) else 0

    @property
    def patch_size(self) -> int:
        """Side of a patch, or of the area that a cell of the feature map covers, pixels."""
        known = self.architecture
        return known.patch_size if isinstance(known, VitArchitecture) else known.stride

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens before those of the patches: CLS and registers, or none."""
        return self.architecture.num_prefix_tokens

    @property
    def num_register_tokens(self) -> int:
        """Register tokens between CLS and patches."""
        return self.architecture.num_register_tokens if isinstance(self.architecture, VitArchitecture) else 0

    @property
    def size_multiple(self) -> int | None:
        """Sides of a picture must be multiples of this; None: the network takes one size only."""
        known = self.architecture
        return known.patch_size if isinstance(known, VitArchitecture) else known.size_multiple

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) in pixels of the crop that the network sees by default."""
        return self.preprocessing.crop_px

    @property
    def has_transformers_twin(self) -> bool:
        """Whether transformers' ``Dinov2Model`` can be exactly this network.

        It needs a square position embedding and a whole-numbered MLP ratio.
        """
        if not isinstance(self.architecture, VitArchitecture):
            return False
        height, width = self.vit.image_size
        return self.vit.is_dino_v1 and height == width and float(self.vit.mlp_ratio).is_integer()

    # -- config.json

    def to_json(self) -> dict[str, Any]:
        """The content of ``config.json``: keys of transformers, of timm, and the section ``dinokit``."""
        section = {
            "format_version": FORMAT_VERSION,
            "backbone": self.name,
            "patch_size": self.patch_size,
            "embed_dim": self.embed_dim,
            "num_heads": self.num_heads,
            "num_register_tokens": self.num_register_tokens,
            "architecture": self.architecture.to_json(),
            "preprocessing": self.preprocessing.to_json(),
            "licence": self.licence,
            "source": self.source,
            "written_by": self.written_by,
        }
        out = {**self._transformers_keys(), **self._timm_keys(), "dinokit": section}
        plain: dict[str, Any] = json.loads(json.dumps(out))
        return plain

    def _transformers_keys(self) -> dict[str, Any]:
        if not self.has_transformers_twin:
            return {}
        vit = self.vit
        return {
            "architectures": ["Dinov2Model"],
            "model_type": "dinov2",
            "dtype": "float32",
            "hidden_size": vit.embed_dim,
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.num_heads,
            "mlp_ratio": int(vit.mlp_ratio),
            "hidden_act": "gelu",
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "drop_path_rate": 0.0,
            "initializer_range": 0.02,
            "layer_norm_eps": vit.layer_norm_eps,
            "image_size": vit.image_size[0],
            "patch_size": vit.patch_size,
            "num_channels": vit.in_chans,
            "qkv_bias": vit.qkv_bias,
            "layerscale_value": 1.0,
            "use_mask_token": True,
            "use_swiglu_ffn": False,
        }

    def _timm_keys(self) -> dict[str, Any]:
        known = self.architecture
        if isinstance(known, TimmArchitecture):  # how it pools is timm's own affair
            pool, first_conv, classifier = {}, known.first_conv or None, known.classifier or None
        else:
            pool, first_conv, classifier = {"global_pool": "token"}, "patch_embed.proj", "head"
        return {
            "architecture": self.timm_architecture,
            "num_classes": 0,
            "num_features": self.embed_dim,
            **pool,
            "model_args": dict(self.model_args),
            "pretrained_cfg": {
                **self.preprocessing.to_pretrained_cfg(),
                "num_classes": 0,
                "pool_size": None,
                # Before 1.0.31 timm takes the weights for those of 3 channels and would replace them by random ones.
                "first_conv": first_conv if self.architecture.in_chans == 3 else None,
                "classifier": classifier,
                "license": self.licence,
                "custom_load": False,
                "hf_hub_filename": _NAMED_FOR_TIMM,
            },
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> BackboneConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            ModelError: it is not a dinokit folder's config, it is of a newer format, it is incomplete, or its
                keys for timm or transformers contradict the section ``dinokit``.
        """
        section = values.get("dinokit")
        if not isinstance(section, Mapping):
            raise ModelError('config.json has no section "dinokit": dinokit did not write it')
        version = section.get("format_version")
        if not isinstance(version, int) or version < 1:
            raise ModelError(
                f"format_version={version!r} is not a valid format number; the section is damaged"
            )
        if version > FORMAT_VERSION:
            raise ModelError(
                f"the folder has format_version {version} ({section.get('written_by', 'a newer dinokit')}); "
                f"this dinokit {__version__} reads up to {FORMAT_VERSION}. Update dinokit."
            )
        needed = {
            "backbone": str,
            "architecture": Mapping,
            "preprocessing": Mapping,
            "licence": str,
            "source": str,
            "written_by": str,
        }
        bad = [key for key, kind in needed.items() if not isinstance(section.get(key), kind)]
        outer = {"architecture": str, "model_args": Mapping}
        bad_outer = [key for key, kind in outer.items() if not isinstance(values.get(key), kind)]
        if bad or bad_outer:
            listed = [f"dinokit.{key}" for key in bad] + bad_outer
            raise ModelError(f"config.json is incomplete: {', '.join(listed)} missing or of the wrong type")
        texts = {f"dinokit.{key}": section[key] for key, kind in needed.items() if kind is str}
        texts["architecture"] = values["architecture"]
        if odd := [f"{key} is {text!r}" for key, text in texts.items() if not is_one_line(text)]:
            raise ModelError(f"config.json is damaged: {'; '.join(odd)}; expected one line of text")
        config = cls(
            name=section["backbone"],
            architecture=architecture_from_json(section["architecture"]),
            timm_architecture=values["architecture"],
            model_args=values["model_args"],
            preprocessing=Preprocessing.from_json(section["preprocessing"]),
            licence=section["licence"],
            source=section["source"],
            written_by=section["written_by"],
        )
        config._refuse_contradictions(values)
        return config

    def _refuse_contradictions(self, values: Mapping[str, Any]) -> None:
        """An edit in one place only would make two loaders build two different networks."""
        derived = self.to_json()
        pixels = values.get("pretrained_cfg")
        pixels = dict(pixels) if isinstance(pixels, Mapping) else {}
        if pixels.get("hf_hub_filename") == TIMM_FILE:  # as the first folders have it
            pixels["hf_hub_filename"] = _NAMED_FOR_TIMM
        pairs = [(key, values.get(key), derived.get(key)) for key in _DERIVED]
        pairs += [
            (f"pretrained_cfg.{key}", pixels.get(key), derived["pretrained_cfg"][key])
            for key in _DERIVED_PIXELS
        ]
        flat = ("patch_size", "embed_dim", "num_heads", "num_register_tokens")
        pairs += [(f"dinokit.{key}", values["dinokit"].get(key), derived["dinokit"][key]) for key in flat]
        if isinstance(self.architecture, VitArchitecture):
            # model_args may omit what timm's name implies. The torch engine builds the network from them.
            sizes = ("patch_size", "embed_dim", "depth", "num_heads", "in_chans")
            pairs += [
                (f"model_args.{key}", self.model_args[key], getattr(self.architecture, key))
                for key in sizes
                if key in self.model_args
            ]
        wrong = [f"{key} is {found!r}, expected {right!r}" for key, found, right in pairs if found != right]
        if wrong:
            raise ModelError(
                "config.json contradicts itself (its sections dinokit.architecture and dinokit.preprocessing count): "
                + "; ".join(wrong)
            )


def is_one_line(text: str) -> bool:
    """Whether a text contains nothing that ends a line or controls a terminal.

    A model's texts are written to cards, other programs' configurations and the screen. A folder's name may contain
    no-break spaces and joined emoji, which str.isprintable would reject.
    """
    return not any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def one_line(text: str) -> str:
    """Replaces line ends and control characters by spaces: a path may contain them, a model folder's texts may not."""
    return "".join(character if is_one_line(character) else " " for character in text)


def timm_arguments(vit: VitArchitecture) -> tuple[str, dict[str, Any]]:
    """timm's name for a DINO ViT, and the arguments that make it exactly this one.

    Every size is explicit; the name adds only what no JSON value can express, such as the class of the feed-forward
    network.
    """
    args: dict[str, Any] = {
        "img_size": list(vit.image_size),
        "patch_size": vit.patch_size,
        "in_chans": vit.in_chans,
        "embed_dim": vit.embed_dim,
        "depth": vit.depth,
        "num_heads": vit.num_heads,
        "mlp_ratio": vit.mlp_ratio,
        "qkv_bias": vit.qkv_bias,
    }
    gated = vit.ffn == "swiglu"
    if vit.position == "rope":
        args |= {"num_reg_tokens": vit.num_register_tokens, "init_values": 1.0 if vit.layer_scale else None}
        # timm's class defaults to the mean of the patches; an embedding here is the CLS token.
        args["global_pool"] = "token"
        return (
            f"vit_{'small_plus' if gated else 'small'}_patch16_dinov3{'_qkvb' if vit.qkv_bias else ''}",
            args,
        )
    if vit.num_register_tokens or gated:
        args |= {"reg_tokens": vit.num_register_tokens, "init_values": 1.0 if vit.layer_scale else None}
        registers = "reg4_" if vit.num_register_tokens else ""
        return f"vit_{'giant' if gated else 'small'}_patch14_{registers}dinov2", args
    size = {192: "tiny", 384: "small", 768: "base", 1024: "large"}.get(vit.embed_dim, "tiny")
    patch = 8 if vit.patch_size == 8 and size in ("small", "base") else 16
    if vit.layer_scale:
        args["init_values"] = 1.0
    return f"vit_{size}_patch{patch}_224", args
