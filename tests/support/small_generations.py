"""Small random DINOv2 and DINOv3 networks of timm and transformers themselves, and how they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}

TRANSFORMERS = {  # name: (model class, config class, its keywords)
    "dinov2": ("Dinov2Model", "Dinov2Config", {"image_size": 28, "patch_size": 7}),
    "dinov2 giant": (
        "Dinov2Model",
        "Dinov2Config",
        {"image_size": 28, "patch_size": 7, "use_swiglu_ffn": True},
    ),
    "dinov2 without biases": (
        "Dinov2Model",
        "Dinov2Config",
        {"image_size": 28, "patch_size": 7, "qkv_bias": False},
    ),
    "dinov2 reg": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"image_size": 28, "patch_size": 7, "num_register_tokens": 4},
    ),
    "dinov2 giant reg": (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {"image_size": 28, "patch_size": 7, "num_register_tokens": 3, "use_swiglu_ffn": True},
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"image_size": 32, "patch_size": 8, "intermediate_size": 192, "num_register_tokens": 4},
    ),
    "dinov3 gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 96,
            "num_register_tokens": 2,
            "use_gated_mlp": True,
            "hidden_act": "silu",
        },
    ),
    "dinov3 without biases": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            "image_size": 32,
            "patch_size": 8,
            "intermediate_size": 192,
            "num_register_tokens": 4,
            "query_bias": False,
            "value_bias": False,
        },
    ),
}

_SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
TIMM = {  # timm's name: its keywords
    "vit_small_patch14_dinov2": {**_SMALL, "img_size": 28, "patch_size": 7, "dynamic_img_size": True},
    "vit_giant_patch14_dinov2": {**_SMALL, "img_size": 28, "patch_size": 7, "dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {**_SMALL, "img_size": 28, "patch_size": 7, "dynamic_img_size": True},
    "vit_giant_patch14_reg4_dinov2": {**_SMALL, "img_size": 28, "patch_size": 7, "dynamic_img_size": True},
    "vit_small_patch16_dinov3": {**_SMALL, "img_size": 32, "patch_size": 8},
    "vit_small_patch16_dinov3_qkvb": {**_SMALL, "img_size": 32, "patch_size": 8},
    "vit_small_plus_patch16_dinov3": {**_SMALL, "img_size": 32, "patch_size": 8},
    "vit_huge_plus_patch16_dinov3_qkvb": {**_SMALL, "img_size": 32, "patch_size": 8, "mlp_ratio": 2.0},
}


def transformers_model(name: str) -> Any:
    """One of :data:`TRANSFORMERS`, random and lively, with attention that can be seen."""
    import transformers

    model, config, keywords = TRANSFORMERS[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**SIZES, **keywords))
    made.set_attn_implementation("eager")
    return lively(made)


def timm_model(name: str) -> Any:
    """One of :data:`TIMM`, random and lively."""
    import timm

    return lively(timm.create_model(name, num_classes=0, **TIMM[name]))


def lively(module: Any, seed: int = 0) -> Any:
    """The module with weights of a size that lets every part matter: no layer scale of 1e-5, no flat attention."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            shape = parameter.shape
            spread = 0.5 if len(shape) == 1 else 1.5 / float(np.prod(shape[1:])) ** 0.5
            middle = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(middle + spread * torch.randn(shape, generator=generator))
    return module.eval()


def pixels(height: int, width: int, batch: int = 2) -> NDArray[np.float32]:
    """Normalised pictures, random."""
    return (
        np.random.default_rng(height * 1000 + width).normal(size=(batch, 3, height, width)).astype(np.float32)
    )


def transformers_outputs(model: Any, images: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """What the graph should give, from transformers' own outputs."""
    import torch

    with torch.inference_mode():
        found = model(torch.from_numpy(images), output_attentions=True)
    n_prefix = 1 + getattr(model.config, "num_register_tokens", 0)
    return {
        "last_hidden_state": found.last_hidden_state.numpy(),
        "pooler_output": found.last_hidden_state[:, 0].numpy(),
        "attention": found.attentions[-1][:, :, 0, n_prefix:].numpy(),
    }
