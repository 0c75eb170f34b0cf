"""The parts of a method that can be exchanged: what each offers to the training step.

Caron et al. 2021, Table 7, takes DINO apart in this way; SwAV, BYOL and MoCo are other choices of the same parts.
Besides these two, a method has a rule by which the teacher follows (`teacher.py`), and it may have a predictor
(`predictor.py`). What a part keeps from one step to the next is a buffer, saved with the run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["Loss", "Targets"]


class Targets(nn.Module, ABC):
    """How the teacher's outputs become targets."""

    are_probabilities: bool
    """Whether a target sums to 1, so that it has an entropy, and the loss is in nats."""

    @abstractmethod
    def targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """(T, B, K) float32 outputs of the teacher to (T, B, K) targets, without gradient."""

    @abstractmethod
    def update_with(self, batch_mean: Tensor) -> None:
        """Called once per step, after the loss, with the mean (K) of the teacher's outputs over the whole batch."""


class Loss(nn.Module, ABC):
    """The loss of the student."""

    remembers: bool = False
    """Whether targets of earlier steps are used, so that :meth:`remember` is to be called."""
    teacher_temp: float | None = None
    """Temperature for the teacher's similarities; None if the loss does not use them."""

    @abstractmethod
    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """(S, B, K) of the student, global crops first, and (T, B, K) targets to a scalar mean over the pictures."""

    def remember(self, targets: Tensor) -> None:
        """Called once per step, after the loss, with the targets (T, B, K) of this process's share of the batch."""
