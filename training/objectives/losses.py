"""The losses of the student: one interchangeable part of a method.

DINO's own is `loss.py`. The others are those that Caron et al. 2021 compare with (Tables 7 and 14). As there, all pairs
of a teacher's view and *another* view of the student count, so that each works with and without local crops. A frozen
teacher (`frozen_teacher.py`) is compared on the same view as the student, if both see it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.training.devices.processes import Processes
from dinokit.training.objectives.loss import CrossEntropy
from dinokit.training.objectives.parts import Loss
from dinokit.training.recipe import Recipe

__all__ = ["InfoNCE", "Relations", "Similarity", "SquaredError", "make_loss"]

_NEVER = -1e30
"""A logit whose softmax share is 0 whatever the others are; with −∞ the gradients of an empty queue would be NaN."""


class SquaredError(Loss):
    """Squared distance between directions: 2 − 2 · cosine, 0 to 4.

    Source: Grill et al. 2020 (BYOL), equation 2; of a frozen teacher's embeddings, the plainest distillation.

    Args:
        same_view: see :func:`_mean_over_pairs`.
    """

    def __init__(self, *, same_view: bool = False) -> None:
        super().__init__()
        self.same_view = same_view

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            student_logits: (S, B, K).
            targets: (T, B, K), rows of length 1.
        """
        student = F.normalize(student_logits.float(), dim=-1)
        costs = 2 - 2 * torch.einsum("sbk,tbk->stb", student, targets)
        return _mean_over_pairs(costs, same_view=self.same_view)


class _ByEarlierTargets(Loss):
    """Keeps the targets of earlier pictures in a queue, for losses that compare with them.

    Args:
        n_prototypes: K, here the width of the targets.
        queue_length: number of targets kept.
        processes: of the run; the targets of all of them are queued.
        same_view: see :func:`_mean_over_pairs`.
    """

    remembers = True
    queue: Tensor
    n_queued: Tensor

    def __init__(
        self, n_prototypes: int, queue_length: int, processes: Processes, *, same_view: bool = False
    ) -> None:
        super().__init__()
        self.processes = processes
        self.same_view = same_view
        self.register_buffer("queue", torch.zeros(queue_length, n_prototypes))
        self.register_buffer("n_queued", torch.zeros((), dtype=torch.int64))

    def _logits(self, directions: Tensor, queue: Tensor, temperature: float) -> Tensor:
        """(…, K) L2-normalised to cosines with a queue over the temperature (…, Q); :data:`_NEVER` where it is not
        filled yet."""
        unfilled = torch.arange(len(queue), device=queue.device) >= self.n_queued
        # Divided before the product and filled in place: (…, Q) is the largest tensor of these losses.
        return ((directions / temperature) @ queue.T).masked_fill_(unfilled, _NEVER)

    @torch.no_grad()
    def remember(self, targets: Tensor) -> None:
        """The first view's targets enter the queue, and the oldest leave it."""
        keys = self.processes.gather_here(targets[0].contiguous())[-len(self.queue) :]
        self._enter(self.queue, keys)
        self.n_queued += len(keys)

    def _enter(self, queue: Tensor, entries: Tensor) -> None:
        """Replaces the oldest entries."""
        # The count stays on the device: reading it would make every step wait for the one before.
        places = (self.n_queued + torch.arange(len(entries), device=entries.device)) % len(queue)
        queue[places] = entries


class InfoNCE(_ByEarlierTargets):
    """The right target among those of earlier pictures, by cross-entropy over cosines.

    Source: He et al. 2020 (MoCo), equation 1 and Algorithm 1; Chen et al. 2020 (MoCo v2): a queue of 65,536 at
    temperature 0.2.

    Args:
        n_prototypes, queue_length, processes, same_view: the queue's.
        temperature: divides the cosines.
    """

    def __init__(
        self,
        n_prototypes: int,
        temperature: float,
        queue_length: int,
        processes: Processes,
        *,
        same_view: bool = False,
    ) -> None:
        super().__init__(n_prototypes, queue_length, processes, same_view=same_view)
        self.temperature = temperature

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
        wrong = torch.logsumexp(self._logits(student, self.queue, self.temperature), dim=-1).unsqueeze(1)
        costs = torch.logaddexp(right, wrong.expand_as(right)) - right
        return _mean_over_pairs(costs, same_view=self.same_view)


class Similarity(_ByEarlierTargets):
    """Makes a picture as similar to earlier ones for the student as it is for the teacher.

    Student and teacher compare the picture with the teacher's targets of earlier pictures and of the picture itself, as
    probabilities; the loss is the cross-entropy between them. It transfers neighbourhoods, which k-NN relies on.

    Source: Fang et al. 2021 (SEED), equations 2 to 6.

    Args:
        n_prototypes, queue_length, processes, same_view: the queue's.
        student_temp, teacher_temp: divide the cosines (SEED: 0.2 and 0.01).
    """

    teacher_temp: float

    def __init__(
        self,
        n_prototypes: int,
        student_temp: float,
        teacher_temp: float,
        queue_length: int,
        processes: Processes,
        *,
        same_view: bool = False,
    ) -> None:
        super().__init__(n_prototypes, queue_length, processes, same_view=same_view)
        self.student_temp = student_temp
        self.teacher_temp = teacher_temp

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            student_logits: (S, B, K).
            targets: (T, B, K), rows of length 1.

        Returns:
            Scalar, in nats; 0 while the queue is empty, since there is nothing to compare with.
        """
        student = F.normalize(student_logits.float(), dim=-1)
        # The teacher's cosine with itself is 1; the student is compared with the teacher's view of the same picture.
        itself = torch.full_like(targets[..., :1], 1 / self.teacher_temp)
        shares = torch.softmax(
            torch.cat([itself, self._logits(targets, self.queue, self.teacher_temp)], dim=-1), dim=-1
        )
        own = torch.einsum("sbk,tbk->stb", student, targets) / self.student_temp
        earlier = self._logits(student, self.queue, self.student_temp)
        total = torch.logaddexp(own, torch.logsumexp(earlier, dim=-1).unsqueeze(1).expand_as(own))
        # Cross-entropy is linear in the shares: Σ share · (total − similarity).
        pull = torch.einsum("tbq,sbq->stb", shares[..., 1:], earlier)
        costs = total - shares[..., 0] * own - pull
        return _mean_over_pairs(costs, same_view=self.same_view)


class Relations(Similarity):
    """Makes the similarities between the student's embeddings equal the teacher's; there is no head.

    The student compares a picture with its own embeddings of earlier pictures, the teacher with its own, both as
    probabilities; the loss is the cross-entropy between them. :class:`Similarity` instead lets a head predict the
    teacher's embedding: the head may learn what the cosine of two student embeddings does not show, and k-NN and search
    use that cosine.

    Source: Abbasi Koohpayegani et al. 2020 (CompRess), §3, the variant with a queue of the student's own; Park et al.
    2019 (Relational Knowledge Distillation), §3.

    Args:
        n_prototypes: K, the width of the targets.
        embed_dim: D, the width of the student's embedding.
        student_temp, teacher_temp: divide the cosines.
        queue_length, processes, same_view: the queues'.
    """

    own: Tensor

    def __init__(
        self,
        n_prototypes: int,
        embed_dim: int,
        student_temp: float,
        teacher_temp: float,
        queue_length: int,
        processes: Processes,
        *,
        same_view: bool = False,
    ) -> None:
        super().__init__(
            n_prototypes, student_temp, teacher_temp, queue_length, processes, same_view=same_view
        )
        self.register_buffer("own", torch.zeros(queue_length, embed_dim))
        self._seen: list[Tensor] = []

    def forward(self, student_logits: Tensor, targets: Tensor) -> Tensor:
        """
        Args:
            student_logits: (S, B, D), the embeddings.
            targets: (T, B, K), rows of length 1.

        Returns:
            Scalar, in nats; 0 while the queues are empty, since there is nothing to compare with.
        """
        student = F.normalize(student_logits.float(), dim=-1)
        self._seen.append(student[0].detach())
        shares = torch.softmax(self._logits(targets, self.queue, self.teacher_temp), dim=-1)
        earlier = self._logits(student, self.own, self.student_temp)
        pull = torch.einsum("tbq,sbq->stb", shares, earlier)
        costs = torch.where(self.n_queued > 0, torch.logsumexp(earlier, dim=-1).unsqueeze(1) - pull, 0.0)
        return _mean_over_pairs(costs, same_view=self.same_view)

    @torch.no_grad()
    def remember(self, targets: Tensor) -> None:
        """The first view's targets and the student's embeddings of the same view enter, and the oldest leave."""
        own = self.processes.gather_here(torch.cat(self._seen))[-len(self.own) :]
        self._seen.clear()
        self._enter(self.own, own)
        super().remember(targets)


def _mean_over_pairs(costs: Tensor, *, same_view: bool) -> Tensor:
    """(S, T, B) costs to their mean over pairs of views.

    With a moving average as the teacher, a global crop is not compared with itself. With ``same_view`` it is compared
    only with itself. Local crops are compared with all views of the teacher in either case.
    """
    n_student, n_teacher, n_images = costs.shape
    itself = torch.eye(n_student, n_teacher, dtype=torch.bool, device=costs.device)
    if same_view:
        itself[:n_teacher] = ~itself[:n_teacher]
    n_pairs = n_student * n_teacher - (n_teacher * (n_teacher - 1) if same_view else n_teacher)
    return costs.masked_fill(itself.unsqueeze(-1), 0.0).sum() / (n_pairs * n_images)


def make_loss(recipe: Recipe, processes: Processes, embed_dim: int | None = None) -> Loss:
    """The loss that the recipe names; ``embed_dim`` is the student's, needed for relations."""
    assert recipe.n_prototypes is not None
    same_view = recipe.distill_from is not None
    made: Loss
    if recipe.loss == "squared_error":
        made = SquaredError(same_view=same_view)
    elif recipe.loss == "info_nce":
        made = InfoNCE(
            recipe.n_prototypes, recipe.student_temp, recipe.queue_length, processes, same_view=same_view
        )
    elif recipe.loss == "similarity":
        assert recipe.teacher_temp is not None
        made = Similarity(
            recipe.n_prototypes,
            recipe.student_temp,
            recipe.teacher_temp,
            recipe.queue_length,
            processes,
            same_view=same_view,
        )
    elif recipe.loss == "relations":
        assert recipe.teacher_temp is not None and embed_dim is not None
        made = Relations(
            recipe.n_prototypes,
            embed_dim,
            recipe.student_temp,
            recipe.teacher_temp,
            recipe.queue_length,
            processes,
            same_view=same_view,
        )
    else:
        made = CrossEntropy(recipe.student_temp)
    return made.to(processes.device)
