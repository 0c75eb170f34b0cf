"""How the teacher's outputs become targets: one interchangeable part of a method.

DINO's own is `centering.py`; :func:`make_targets` selects one by the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.oriented_gradients import HOG
from dinokit.training.objectives.centering import Centering
from dinokit.training.objectives.parts import Targets
from dinokit.training.recipe import Recipe

__all__ = ["Directions", "Sinkhorn", "make_targets"]


class Sinkhorn(Targets):
    """Probabilities that use all prototypes equally often in a batch, by the Sinkhorn-Knopp algorithm.

    One iteration is a softmax over the batch. Source: Caron et al. 2020 (SwAV), Algorithm 1; in DINO's ablations
    Caron et al. 2021, Tables 7 and 15; three iterations as in both and in DINOv2.

    Args:
        processes: of the run; the batch is that of all of them. Each piece of an accumulated batch is separate.
        n_iterations: rescalings of prototypes and views.
    """

    are_probabilities = True

    def __init__(self, processes: Processes, n_iterations: int = 3) -> None:
        super().__init__()
        self.processes = processes
        self.n_iterations = n_iterations

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """Each row sums to 1; over the batch each of the K columns holds as much as the others.

        In logarithms: at low temperatures whole rows and columns would underflow.
        """
        log_shares = teacher_logits.float().flatten(0, 1) / teacher_temp
        for _ in range(self.n_iterations):
            log_shares = log_shares - self._log_sum_over_views(log_shares)
            log_shares = torch.log_softmax(log_shares, dim=1)
        return log_shares.exp().view_as(teacher_logits)

    def _log_sum_over_views(self, log_shares: Tensor) -> Tensor:
        """(M, K) of this process to the logarithm of each column's sum over all processes (K)."""
        # A process without rows (a small batch may have no hidden patches) must still take part in the sums.
        rows = log_shares if len(log_shares) else log_shares.new_full((1, log_shares.shape[1]), -1e30)
        greatest = self.processes.max(rows.amax(dim=0))
        return greatest + self.processes.sum((log_shares - greatest).exp().sum(dim=0)).log()

    def update_with(self, batch_mean: Tensor) -> None:
        """Nothing is kept from one batch to the next."""


class Directions(Targets):
    """The teacher's outputs, L2-normalised: BYOL predicts them and MoCo compares with them.

    Source: Grill et al. 2020 (BYOL), equation 2; He et al. 2020 (MoCo), §3.3. With ``center_momentum`` the running
    mean is subtracted first (Caron et al. 2021, Table 14, rows 2 and 9).

    Args:
        n_prototypes: K, here the width of the projection.
        center_momentum: None for no centre.
        widths: of the parts of the outputs, which add up to K, if they come from several teachers: each part is
            L2-normalised, so that all have equal weight.
        centred: per part, whether the running mean is subtracted; by default from all.
    """

    are_probabilities = False

    def __init__(
        self,
        n_prototypes: int,
        center_momentum: float | None = None,
        widths: Sequence[int] | None = None,
        centred: Sequence[bool] | None = None,
    ) -> None:
        super().__init__()
        self.widths = tuple(widths or (n_prototypes,))
        self.centred = tuple(centred or (True,) * len(self.widths))
        self.centering = None if center_momentum is None else Centering(n_prototypes, center_momentum)

    @torch.no_grad()
    def targets(self, teacher_logits: Tensor, teacher_temp: float) -> Tensor:
        """L2-normalised rows; the temperature is not used."""
        parts = _split(teacher_logits.float(), self.widths)
        if self.centering is not None:
            centers = _split(self.centering.center, self.widths)
            parts = [
                part - center if centred else part
                for part, center, centred in zip(parts, centers, self.centred, strict=True)
            ]
        return torch.cat([F.normalize(part, dim=-1) for part in parts], dim=-1) / math.sqrt(len(parts))

    def update_with(self, batch_mean: Tensor) -> None:
        """Moves the centre, if there is one."""
        if self.centering is not None:
            self.centering.update_with(batch_mean)


def _split(outputs: Tensor, widths: Sequence[int]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = outputs.split(list(widths), dim=-1)  # type: ignore[no-untyped-call]
    return parts


def make_targets(recipe: Recipe, processes: Processes, widths: Sequence[int] | None = None) -> Targets:
    """The part that the recipe's ``loss``, ``target_normalisation`` and ``center_momentum`` name.

    Args:
        recipe, processes: of the run.
        widths: of the embeddings of each frozen teacher, if the run has any.
    """
    assert recipe.n_prototypes is not None
    centred = recipe.target_normalisation == "centering"
    made: Targets
    if recipe.loss != "cross_entropy":
        # Histograms have no negative values, so the cosine of any two is near 1 and useless without a centre.
        parts = [centred or name == HOG for name in recipe.teachers] or [centred]
        made = Directions(recipe.n_prototypes, recipe.center_momentum if any(parts) else None, widths, parts)
    elif recipe.target_normalisation == "sinkhorn":
        made = Sinkhorn(processes)
    else:
        # Without centring the centre stays at its initial 0.
        made = Centering(recipe.n_prototypes, recipe.center_momentum if centred else 1.0)
    return made.to(processes.device)
