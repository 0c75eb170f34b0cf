"""Tensors on their way to the device, which nothing waits for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. It need not be kept until it is there.

    CUDA copies from page-locked memory only while the host goes on, and torch gives such memory to nobody else until
    the copy is done. Apple's GPUs copy from any, also from memory that was given back meanwhile (pytorch#139550), so
    there it is waited for.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # itself where it is
    return tensor.to(device, non_blocking=device.type != "mps")
