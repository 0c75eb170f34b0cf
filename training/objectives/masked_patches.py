"""iBOT's loss: the student predicts the teacher's prototypes of patches that are hidden from it.

Source: Zhou et al. 2022 (iBOT), §3.2, equation 2, and bytedance/ibot `main_ibot.py`, `iBOTLoss`; Oquab et al. 2023
(DINOv2), §4. Student and teacher see the same global crop, the student with patches hidden (`masks.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dinokit.training.devices.processes import Processes
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.objectives.parts import Targets
from dinokit.training.objectives.targets import make_targets
from dinokit.training.recipe import Recipe

__all__ = ["MaskedPatches", "make_masked_patches", "masked_patch_loss"]


def masked_patch_loss(
    student_logits: Tensor, targets: Tensor, hidden: HiddenPatches, student_temp: float = 0.1
) -> Tensor:
    """Cross-entropy at the hidden patches: their mean in a crop, and the mean of that over all crops.

    A crop with no hidden patch counts as 0, as in iBOT and DINOv2: with half of the crops left whole, a guess costs
    half of ln K.

    Args:
        student_logits: (M, K) float32, of the hidden patches.
        targets: (M, K) float32 probabilities of the teacher for the same, without gradient.
        hidden: where they are.
        student_temp: divides the student's logits.

    Returns:
        Scalar, in nats.
    """
    costs = -(targets * F.log_softmax(student_logits / student_temp, dim=-1)).sum(dim=-1)
    return (costs * hidden.weights).sum() / len(hidden.mask)


class MaskedPatches(nn.Module):
    """The loss on hidden patches, with targets that have a separate centre.

    The centre follows the teacher's logits at the hidden patches, as in DINOv2. iBOT's code uses those of all patches,
    which must then all go through the head.

    Args:
        targets: how the teacher's logits become probabilities.
        n_prototypes: K.
        student_temp: divides the student's logits.
        processes: of the run.
    """

    def __init__(
        self, targets: Targets, n_prototypes: int, student_temp: float, processes: Processes
    ) -> None:
        super().__init__()
        self.targets = targets
        self.n_prototypes = n_prototypes
        self.student_temp = student_temp
        self.processes = processes
        self._sums = self._nothing()

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, hidden: HiddenPatches, teacher_temp: float
    ) -> Tensor:
        """The loss of one piece of the batch (:func:`masked_patch_loss`); adds up what :meth:`finish_step` needs.

        Args:
            student_logits, teacher_logits: (M, K), of the hidden patches.
            hidden: where they are.
            teacher_temp: divides the teacher's logits, centred.
        """
        teacher_logits = teacher_logits.detach().float()
        targets = self.targets.targets(teacher_logits[None], teacher_temp)[0]
        loss = masked_patch_loss(student_logits, targets, hidden, self.student_temp)
        n_crops = len(hidden.mask)
        # Filled in on the device: numbers sent there would wait for it.
        counts = [loss.new_full((1,), n) for n in (n_crops, len(teacher_logits))]
        self._sums += torch.cat([loss.detach()[None] * n_crops, *counts, teacher_logits.sum(dim=0)])
        return loss

    def finish_step(self) -> Tensor:
        """Called once per step, after all pieces: updates the centre and returns the loss of the whole batch."""
        sums = self.processes.sum(self._sums)
        loss, n_crops, n_hidden = sums[0], sums[1], sums[2]
        before = [buffer.clone() for buffer in self.targets.buffers()]
        self.targets.update_with(sums[3:] / n_hidden.clamp(min=1))
        # A small batch may have no hidden patches, and then the centre stays. A condition on the host would wait for
        # the device; torch.where does not.
        for now, was in zip(self.targets.buffers(), before, strict=True):
            now.copy_(torch.where(n_hidden > 0, now, was))
        self._sums = self._nothing()
        return loss / n_crops

    def _nothing(self) -> Tensor:
        """Sums over a batch: loss, crops, hidden patches, the teacher's logits (K)."""
        return torch.zeros(3 + self.n_prototypes, device=self.processes.device)


def make_masked_patches(recipe: Recipe, processes: Processes) -> MaskedPatches | None:
    """The loss for the recipe's ``ibot_weight``, with targets of the same kind as the CLS token's; None if it is 0."""
    if not recipe.ibot_weight:
        return None
    assert recipe.n_prototypes is not None
    return MaskedPatches(make_targets(recipe, processes), recipe.n_prototypes, recipe.student_temp, processes)
