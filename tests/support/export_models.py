"""What tests of the export share: a small model, its folder, and plain ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from small_models import config_for, picture, random_weights

from dinokit.export.verification.verify import cosines
from dinokit.model_folder.folder import write_model_folder

CONFIG = config_for()
WEIGHTS = random_weights()


def run(model: onnx.ModelProto, pixels: NDArray[Any], name: str = "pixel_values") -> list[NDArray[Any]]:
    """Plain ONNX Runtime, none of dinokit."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {name: pixels})
    return outputs


def pixels(count: int = 4, height: int = 32, width: int = 32) -> NDArray[np.float32]:
    """What the small model takes."""
    crops = np.stack([np.asarray(picture(width, height, seed)) for seed in range(count)])
    return CONFIG.preprocessing.normalise(crops)


def worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Of the rows of two arrays."""
    return float(cosines(a, b).min())


def make_folder(path: Path) -> Path:
    """The small model's folder, without ONNX files."""
    return write_model_folder(path, CONFIG, WEIGHTS).path


def small_timm(name: str = "vit_tiny_patch16_224", **more: Any) -> Any:
    """A module of timm as small as the small model, with random weights that are the same each time."""
    import timm
    import torch

    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **more}
    return timm.create_model(name, pretrained=False, **arguments)
