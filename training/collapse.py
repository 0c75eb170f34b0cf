"""What shows that a run learns or collapses: the teacher's entropy and its divergence from the student.

Source: Caron et al. 2021, Figure 7: cross-entropy = entropy of the teacher + KL(teacher ‖ student). Without
centering the entropy falls to 0, without sharpening it rises to ln K; in both cases the divergence falls to 0.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["teacher_entropy", "verdict"]


@torch.no_grad()
def teacher_entropy(targets: Tensor) -> Tensor:
    """Mean entropy of the teacher's targets (..., K), a scalar in nats between 0 and ln K."""
    entropy: Tensor = torch.special.entr(targets).sum(dim=-1).mean()
    return entropy


def verdict(entropy: float, kl: float, n_prototypes: int) -> str | None:
    """A sentence with the remedy when a run has collapsed, None when it looks sound.

    Args:
        entropy: mean entropy of the targets, nats.
        kl: mean divergence of the student from them, nats.
        n_prototypes: K.
    """
    uniform = math.log(n_prototypes)
    if kl > 0.02 * uniform:
        return None
    if entropy > 0.98 * uniform:
        return (
            f"uniform collapse: the teacher's entropy is {entropy:.2f} of ln K = {uniform:.2f} and the student "
            "agrees; lower teacher_temp and warmup_teacher_temp (0.02), or n_prototypes"
        )
    if entropy < 0.02 * uniform:
        return (
            f"collapse onto one prototype: the teacher's entropy is {entropy:.2f} and the student agrees; lower "
            "center_momentum, or raise teacher_temp"
        )
    return None
