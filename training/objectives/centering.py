"""Centering and sharpening: how the teacher's logits become targets that do not collapse.

Source: Caron et al. 2021, §3.1, equation 4; facebookresearch/dino `main_dino.py`, `DINOLoss`. Centering alone
drives the targets to the uniform distribution, sharpening alone to a single prototype; together they balance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dinokit.training.objectives.parts import Targets

__all__ = ["Centering"]


class Centering(Targets):
    """Keeps the running mean of the teacher's logits, the centre.

    Args:
        n_prototypes: K.
        center_momentum: share of the old centre kept at an update.
    """

    center: Tensor
    are_probabilities = True

    def __init__(self, n_prototypes: int, center_momentum: float = 0.9) -> None:
        super().__init__()
        self.center_momentum = center_momentum
        self.register_buffer("center", torch.zeros(1, n_prototypes))

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """(T, B, K) float32 logits to probabilities ``softmax((logits − centre) / teacher_temp)``."""
        return torch.softmax((teacher_logits.float() - self.center) / teacher_temp, dim=-1)

    @torch.no_grad()
    def update_with(self, batch_mean: Tensor) -> None:
        """Moves the centre towards the mean teacher output (K) of a whole batch, after its loss."""
        self.center.lerp_(batch_mean[None], 1.0 - self.center_momentum)
