"""What the student is judged by: one part of a method, to be exchanged for another.

DINO's own is `loss.py`. The others are those that Caron et al. 2021 compare with (Tables 7 and 14): all pairs of a
teacher's view and *another* view of the student, as there, so that each works with and without local crops.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.training.loss import CrossEntropy
from dinokit.training.parts import Loss
from dinokit.training.processes import Processes
from dinokit.training.recipe import Recipe

__all__ = ["InfoNCE", "SquaredError", "make_loss"]


class SquaredError(Loss):
    """Squared distance between directions: 2 − 2 · cosine, 0 to 4.

    Source: Grill et al. 2020 (BYOL), equation 2.
    """

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            student_logits: (S, B, K).
            targets: (T, B, K), rows of length 1.
        """
        student = F.normalize(student_logits.float(), dim=-1)
        return _mean_over_pairs(2 - 2 * torch.einsum("sbk,tbk->stb", student, targets))


class InfoNCE(Loss):
    """The right target among those of earlier pictures, by cross-entropy over cosines.

    Source: He et al. 2020 (MoCo), equation 1 and Algorithm 1; Chen et al. 2020 (MoCo v2): a queue of 65,536 at
    temperature 0.2.

    Args:
        n_prototypes: K, here the width of the projection.
        temperature: divides the cosines.
        queue_length: how many targets of earlier batches are the wrong ones.
        processes: of the run; the targets of all of them are queued.
    """

    queue: Tensor
    n_queued: Tensor

    def __init__(
        self, n_prototypes: int, temperature: float, queue_length: int, processes: Processes
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.processes = processes
        self.register_buffer("queue", torch.zeros(queue_length, n_prototypes))
        self.register_buffer("n_queued", torch.zeros((), dtype=torch.int64))

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            student_logits: (S, B, K).
            targets: (T, B, K), rows of length 1.

        Returns:
            Scalar, in nats; 0 while the queue is empty, since there is nothing to be mistaken for.
        """
        student = F.normalize(student_logits.float(), dim=-1)
        right = torch.einsum("sbk,tbk->stb", student, targets) / self.temperature
        wrong = student @ self.queue.T / self.temperature
        # Places that were never filled do not count.
        empty = torch.arange(len(self.queue), device=wrong.device) >= self.n_queued
        wrong = torch.logsumexp(wrong.masked_fill(empty, float("-inf")), dim=-1).unsqueeze(1)
        return _mean_over_pairs(torch.logaddexp(right, wrong.expand_as(right)) - right)

    @torch.no_grad()
    def remember(self, targets: Tensor) -> None:
        """The first view's targets enter the queue, and the oldest leave it."""
        keys = self.processes.gather_here(targets[0].contiguous())[-len(self.queue) :]
        first = int(self.n_queued) % len(self.queue)
        places = torch.arange(first, first + len(keys), device=keys.device) % len(self.queue)
        self.queue[places] = keys
        self.n_queued += len(keys)


def _mean_over_pairs(costs: Tensor) -> Tensor:
    """(S, T, B) costs to their mean, a global crop not compared with itself."""
    n_student, n_teacher, n_images = costs.shape
    same = torch.eye(n_student, n_teacher, dtype=torch.bool, device=costs.device).unsqueeze(-1)
    return costs.masked_fill(same, 0.0).sum() / ((n_student * n_teacher - n_teacher) * n_images)


def make_loss(recipe: Recipe, processes: Processes) -> Loss:
    """The part that the recipe's ``loss`` names."""
    assert recipe.n_prototypes is not None
    made: Loss
    if recipe.loss == "squared_error":
        made = SquaredError()
    elif recipe.loss == "info_nce":
        made = InfoNCE(recipe.n_prototypes, recipe.student_temp, recipe.queue_length, processes)
    else:
        made = CrossEntropy(recipe.student_temp)
    return made.to(processes.device)
