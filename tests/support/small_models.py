"""Small random Vision Transformers and pictures for tests."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig, timm_arguments
from dinokit.model_folder.weights import expected_shapes
from dinokit.pictures.preprocess import Preprocessing

SMALL = VitArchitecture(embed_dim=48, depth=2, num_heads=3, patch_size=8, image_size=(32, 32))
TINY = VitArchitecture(embed_dim=192, depth=12, num_heads=3, patch_size=16, image_size=(224, 224))


def random_weights(vit: VitArchitecture = SMALL, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights of a size that lets every part matter: attention is not flat, norms are not the identity."""
    rng = np.random.default_rng(seed)
    shapes = expected_shapes(vit)
    assert shapes is not None
    out = {}
    for name, shape in shapes.items():
        spread = 0.5 if len(shape) == 1 else 1.5 / np.sqrt(np.prod(shape[1:]))
        middle = 1.0 if name.endswith(("norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        out[name] = (middle + rng.normal(0, spread, shape)).astype(np.float32)
    return out


def config_for(vit: VitArchitecture = SMALL, name: str = "small") -> BackboneConfig:
    """A config as training writes it."""
    architecture, model_args = timm_arguments(vit)
    side = vit.image_size[0]
    return BackboneConfig(
        name=name,
        architecture=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=Preprocessing(resize_px=round(side * 256 / 224), crop_px=(side, side)),
        source="a test",
    )


def picture(width: int = 90, height: int = 70, seed: int = 0) -> Image.Image:
    """A smooth picture with some noise, like a photograph more than like static."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    noisy = smooth + rng.integers(-20, 21, smooth.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
