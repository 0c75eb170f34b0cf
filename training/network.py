"""Student and teacher: a backbone with a projection head, run over crops of several sizes.

Source: facebookresearch/dino `utils.py`, `MultiCropWrapper`: one pass of the backbone for each size, one pass
of the head over all crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Network", "NetworkOutput"]


class NetworkOutput(NamedTuple):
    """What a network makes of S views of B pictures."""

    logits: Tensor
    """(S, B, K) float32, over the prototypes."""
    embeddings: Tensor
    """(S, B, D), the backbone's CLS embeddings, before the head."""


class Network(nn.Module):
    """A backbone and its projection head.

    Args:
        backbone: (B, 3, H, W) to the CLS embedding (B, D); a timm model without classifier.
        head: (B, D) to logits (B, K).
    """

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, crops: Sequence[Tensor]) -> NetworkOutput:
        """
        Args:
            crops: one tensor (V, B, 3, H, W) for each size, V views of the same B pictures.

        Returns:
            Logits and embeddings of all S views, in the order given.
        """
        n_images = crops[0].shape[1]
        embeddings = torch.cat([self.backbone(views.flatten(0, 1)) for views in crops])
        logits: Tensor = self.head(embeddings)
        return NetworkOutput(
            logits.view(-1, n_images, logits.shape[-1]), embeddings.view(-1, n_images, embeddings.shape[-1])
        )
