"""Copies to the device that the host does not wait for."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["sent"]


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device. The caller need not keep the source until the copy is done.

    CUDA copies asynchronously only from page-locked memory, which torch does not reuse until the copy is done. Apple's
    GPUs copy asynchronously from any memory, even if it has been freed meanwhile (pytorch#139550), so there the copy is
    blocking.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # the same tensor if it is pinned
    return tensor.to(device, non_blocking=device.type != "mps")
