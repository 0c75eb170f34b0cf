"""Published models by name: ``dino_vits16`` and others, with their sizes, preprocessing and licence.

Weights come from timm's repositories on the Hugging Face Hub, which need no account. The preprocessing is that of the
original repositories, not timm's (DINO v1: 256 → 224; timm: 248 → 224).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.config import BackboneConfig, timm_arguments
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import can_write

__all__ = [
    "DINOV2_EVAL",
    "DINOV3_EVAL",
    "DINOV3_LICENCE",
    "DINOV3_LICENCE_URL",
    "DINOV3_SATELLITE_EVAL",
    "DINO_EVAL",
    "STARTER",
    "ZOO",
    "ZooModel",
]

DINOV3_LICENCE = "dinov3-license"
"""The Hub's identifier of the licence of DINOv3's weights."""

DINOV3_LICENCE_URL = "https://ai.meta.com/resources/models-and-libraries/dinov3-license/"

STARTER = "starter"
"""The bundled model."""


@dataclass(frozen=True)
class ZooModel:
    """One published backbone."""

    name: str
    repo: str
    """Hub repository; its ``model.safetensors`` holds the weights under timm's names."""
    timm_architecture: str
    vit: VitArchitecture
    preprocessing: Preprocessing
    licence: str
    params: int
    """Number of weights."""
    knn_top1: float | None
    """Published k-NN top-1 on ImageNet, percent; None if none is published."""
    knn_source: str = ""
    model_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    filename: str = "model.safetensors"

    @property
    def embed_dim(self) -> int:
        """Width of the embedding."""
        return self.vit.embed_dim

    @property
    def engines(self) -> tuple[str, ...]:
        """The engines that can run it: ONNX only if its graph can be written from the weights."""
        return ("onnx", "torch") if can_write(self.vit) else ("torch",)

    @property
    def config(self) -> BackboneConfig:
        """The configuration that a model folder would have."""
        return BackboneConfig(
            name=self.name,
            architecture=self.vit,
            timm_architecture=self.timm_architecture,
            model_args=self.model_args,
            preprocessing=self.preprocessing,
            licence=self.licence,
            source=self.repo,
        )


DINO_EVAL = Preprocessing()  # eval_knn.py: Resize(256, bicubic), CenterCrop(224)
DINOV2_EVAL = Preprocessing()  # data/transforms.py: the same
# README, "Image transforms": squashed to 256 x 256 by torchvision's default filter.
DINOV3_EVAL = Preprocessing(resize_px=(256, 256), crop_px=(256, 256), interpolation="bilinear")
# README as well, for the models trained on SAT-493M.
DINOV3_SATELLITE_EVAL = replace(DINOV3_EVAL, mean=(0.430, 0.411, 0.296), std=(0.213, 0.156, 0.143))

_SIZES = {  # name: (timm's name, width, blocks, heads)
    "s": ("small", 384, 12, 6),
    "b": ("base", 768, 12, 12),
    "l": ("large", 1024, 24, 16),
    "g": ("giant", 1536, 40, 24),
}


def _dino(size: str, patch: int, params: int, knn: float) -> ZooModel:
    timm_size, dim, depth, heads = _SIZES[size]
    vit = VitArchitecture(dim, depth, heads, patch, (224, 224))
    architecture, model_args = timm_arguments(vit)
    return ZooModel(
        name=f"dino_vit{size}{patch}",
        repo=f"timm/vit_{timm_size}_patch{patch}_224.dino",
        timm_architecture=architecture,
        model_args=model_args,
        vit=vit,
        preprocessing=DINO_EVAL,
        licence="apache-2.0",
        params=params,
        knn_top1=knn,
        knn_source="facebookresearch/dino, README (20-NN)",
    )


def _dinov2(size: str, params: int, knn: float, *, registers: bool = False) -> ZooModel:
    timm_size, dim, depth, heads = _SIZES[size]
    swiglu = size == "g"
    architecture = f"vit_{timm_size}_patch14_{'reg4_' if registers else ''}dinov2"
    return ZooModel(
        name=f"dinov2_vit{size}14{'_reg' if registers else ''}",
        repo=f"timm/{architecture}.lvd142m",
        timm_architecture=architecture,
        model_args={"img_size": [518, 518]},
        vit=VitArchitecture(
            dim,
            depth,
            heads,
            14,
            (518, 518),
            mlp_ratio=16 / 3 if swiglu else 4.0,  # of the packed first layer, as timm counts
            num_register_tokens=4 if registers else 0,
            layer_scale=True,
            ffn="swiglu" if swiglu else "mlp",
            # hubconf.py: interpolate_antialias=True and interpolate_offset=0.0 for the models with registers
            pos_embed_resize=PosEmbedResize(0.0, True) if registers else PosEmbedResize(0.1, False),
        ),
        preprocessing=DINOV2_EVAL,
        licence="apache-2.0",
        params=params,
        knn_top1=knn,
        knn_source="facebookresearch/dinov2, README",
    )


def _dinov3(
    name: str,
    timm_size: str,
    dim: int,
    depth: int,
    heads: int,
    params: int,
    swiglu: float | None = None,
    *,
    satellite: bool = False,
) -> ZooModel:
    architecture = f"vit_{timm_size}_patch16_dinov3"
    return ZooModel(
        name=f"dinov3_{name}{'_sat493m' if satellite else ''}",
        repo=f"timm/{architecture}.{'sat493m' if satellite else 'lvd1689m'}",
        timm_architecture=architecture,
        vit=VitArchitecture(
            dim,
            depth,
            heads,
            16,
            (256, 256),
            mlp_ratio=swiglu or 4.0,
            num_register_tokens=4,
            layer_norm_eps=1e-5,
            qkv_bias=False,
            layer_scale=True,
            ffn="swiglu" if swiglu else "mlp",
            position="rope",
            pos_embed_resize=PosEmbedResize(0.0, True),
        ),
        preprocessing=DINOV3_SATELLITE_EVAL if satellite else DINOV3_EVAL,
        licence=DINOV3_LICENCE,
        params=params,
        knn_top1=None,
    )


_MODELS = (
    _dino("s", 16, 21_665_664, 74.5),
    _dino("s", 8, 21_670_272, 78.3),
    _dino("b", 16, 85_798_656, 76.1),
    _dino("b", 8, 85_807_872, 77.4),
    _dinov2("s", 22_056_192, 79.0),
    _dinov2("b", 86_579_712, 82.1),
    _dinov2("l", 304_367_616, 83.5),
    _dinov2("g", 1_136_479_232, 83.5),
    _dinov2("s", 22_057_344, 79.1, registers=True),
    _dinov2("b", 86_582_016, 82.0, registers=True),
    _dinov2("l", 304_370_688, 83.8, registers=True),
    _dinov2("g", 1_136_483_840, 83.7, registers=True),
    _dinov3("vits16", "small", 384, 12, 6, 21_586_944),
    _dinov3("vits16plus", "small_plus", 384, 12, 6, 28_683_264, swiglu=4.0),
    _dinov3("vitb16", "base", 768, 12, 12, 85_641_216),
    _dinov3("vitl16", "large", 1024, 24, 16, 303_079_424),
    _dinov3("vith16plus", "huge_plus", 1280, 32, 20, 840_509_440, swiglu=4.0),
    _dinov3("vit7b16", "7b", 4096, 40, 32, 6_716_030_976, swiglu=2.0),
    _dinov3("vitl16", "large", 1024, 24, 16, 303_079_424, satellite=True),
    _dinov3("vit7b16", "7b", 4096, 40, 32, 6_716_030_976, swiglu=2.0, satellite=True),
)

ZOO: dict[str, ZooModel] = {model.name: model for model in _MODELS}
"""Models by name, ordered by family and size."""
