"""DINO's loss: cross-entropy between the teacher's and the student's view of one picture.

Source: Caron et al. 2021, §3.1, equation 3; facebookresearch/dino `main_dino.py`, `DINOLoss`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.training.objectives.parts import Loss

__all__ = ["CrossEntropy", "dino_loss"]


def dino_loss(student_logits: Tensor, targets: Tensor, student_temp: float = 0.1) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and *another* view of the student.

    The reference computes a log-softmax for each of the 2 · (2 + L) − 2 pairs. Cross-entropy is linear in the target,
    so the targets of a student crop can be summed first: one log-softmax per crop.

    Args:
        student_logits: (S, B, K) float32, the global crops first, in the teacher's order.
        targets: (T, B, K) float32 probabilities of the teacher for its T global crops, without gradient.
        student_temp: divides the student's logits.

    Returns:
        Scalar, in nats; ln K if the student is uniform.
    """
    n_student, n_images, _ = student_logits.shape
    n_teacher = targets.shape[0]
    log_probs = F.log_softmax(student_logits / student_temp, dim=-1)
    together = targets.sum(dim=0)
    # A global crop is not compared with itself.
    globals_ = torch.einsum("tbk,tbk->", together.unsqueeze(0) - targets, log_probs[:n_teacher])
    locals_ = torch.einsum("bk,sbk->", together, log_probs[n_teacher:])
    n_pairs = n_teacher * n_student - n_teacher
    return -(globals_ + locals_) / (n_pairs * n_images)


class CrossEntropy(Loss):
    """:func:`dino_loss` at one student temperature, as a part (`parts.py`)."""

    def __init__(self, student_temp: float) -> None:
        super().__init__()
        self.student_temp = student_temp

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """See :func:`dino_loss`."""
        return dino_loss(student_logits, targets, self.student_temp)
