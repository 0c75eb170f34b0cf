"""Convolutional networks with random weights, and the pixels that they see."""

from __future__ import annotations

from typing import Any

import torch

from dinokit.pictures.preprocess import Preprocessing

PIXELS = Preprocessing(resize_px=40, crop_px=(36, 36))


def lively(module: Any, seed: int = 0) -> Any:
    """Random weights with which every part matters, BatchNorm's running statistics included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            noise = torch.rand(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif name.endswith("running_mean"):
                tensor.copy_(noise - 0.5)
            elif tensor.ndim == 1 and tensor.is_floating_point():
                tensor.copy_(0.3 * (noise - 0.5) + (1.0 if name.endswith("weight") else 0.0))
    return module.eval()
