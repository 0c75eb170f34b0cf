"""Measures the health of a run on two small windows of the teacher's latest outputs.

A hook reads the teacher's outputs, so the training step does not know of it. The windows are part of the
checkpoint: a resumed run writes the same numbers as an uninterrupted one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.training.monitoring.collapse import alignment, effective_rank, uniformity
from dinokit.training.monitoring.verdicts import CHANCE, Signs, verdicts

__all__ = ["Health"]

_PICTURES = 512  # embeddings kept; their effective rank takes milliseconds


class Health:
    """Signs of learning and of collapse. With several processes, only this process's share of the pictures counts.

    Args:
        n_prototypes: K.
    """

    def __init__(self, n_prototypes: int) -> None:
        self.n_prototypes = n_prototypes
        self.views_seen = 0
        self.pictures_seen = 0
        self.steps_at_chance = 0
        self._last_chosen: Tensor | None = None  # (K,) int64: how many views had been seen; -1 for never
        self._embeddings: Tensor | None = None  # (512, S, D) float32, a ring

    def watch(self, teacher: nn.Module, centering: nn.Module) -> None:
        """Observes every forward pass of the teacher from now on; ``centering.center`` (1, K) is subtracted first."""

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            center = getattr(centering, "center", None)
            self.observe(
                output.logits if center is None else output.logits.float() - center, output.embeddings
            )

        teacher.register_forward_hook(after)

    @torch.no_grad()
    def observe(self, logits: Tensor, embeddings: Tensor) -> None:
        """Adds the teacher's outputs for B pictures to the windows, without waiting for the device.

        Args:
            logits: (S, B, K), centred. Without a head (``loss=relations``) they are the embeddings, of any width, and
                no prototype is chosen.
            embeddings: (S, B, D), before the head.
        """
        n_views, n_images, width = embeddings.shape
        self.views_seen += n_views * n_images
        if logits.shape[-1] == self.n_prototypes:
            self._chosen(logits.argmax(dim=-1).flatten())

        ring = self._embeddings
        if ring is None or ring.shape[1:] != (n_views, width) or ring.device != embeddings.device:
            if ring is None or ring.shape[1:] != (n_views, width):
                self.pictures_seen = 0
                ring = embeddings.new_zeros((_PICTURES, n_views, width), dtype=torch.float32)
            self._embeddings = ring = ring.to(embeddings.device)
        newest = embeddings[:, -_PICTURES:].float().transpose(0, 1)
        first = self.pictures_seen + n_images - len(newest)
        place = torch.arange(first, first + len(newest), device=ring.device) % _PICTURES
        ring[place] = newest
        self.pictures_seen += n_images

    def _chosen(self, strongest: Tensor) -> None:
        """Records the strongest prototype of each view (S·B), int64."""
        if self._last_chosen is None or self._last_chosen.device != strongest.device:
            before = self._last_chosen
            self._last_chosen = torch.full(
                (self.n_prototypes,), -1, dtype=torch.int64, device=strongest.device
            )
            if before is not None:  # from a checkpoint
                self._last_chosen.copy_(before)
        self._last_chosen.index_fill_(0, strongest, self.views_seen)

    def measure(
        self, *, loss: float, entropy: float | None, progress: float, warming_up: bool = False
    ) -> dict[str, Any]:
        """The numbers and verdicts of this moment, as plain values for a line of metrics.jsonl.

        Args:
            loss: of the step, nats.
            entropy: of the teacher's targets, nats; None if they are not probabilities: then only the
                embeddings are judged.
            progress: share of the run that is done.
            warming_up: the learning rate still rises; a loss at chance does not count yet.

        Returns:
            ``loss_over_ln_k``, ``prototypes_used`` (share of the prototypes that were the strongest for some view
            among the last 4K), ``effective_rank``, ``alignment`` and ``uniformity`` of the teacher's embeddings of
            the last 512 pictures (None where there is nothing to measure, or no prototype), ``verdicts`` (kind →
            sentence).
        """
        has_prototypes = entropy is not None
        ln_k = math.log(self.n_prototypes)
        at_chance = has_prototypes and loss > CHANCE * ln_k and not warming_up
        self.steps_at_chance = self.steps_at_chance + 1 if at_chance else 0
        used, held = self._prototypes_used(), self._held()
        rank = effective_rank(held[:, 0]) if len(held) else None
        signs = Signs(
            n_prototypes=self.n_prototypes,
            loss=loss,
            teacher_entropy=entropy,
            prototypes_used=used,
            views_seen=self.views_seen,
            effective_rank=rank,
            n_embeddings=len(held),
            n_dimensions=held.shape[-1],
            progress=progress,
            steps_at_chance=self.steps_at_chance,
        )
        return {
            "loss_over_ln_k": _rounded(loss / ln_k) if ln_k and has_prototypes else None,
            "prototypes_used": _rounded(used) if has_prototypes else None,
            "effective_rank": _rounded(rank),
            "alignment": _rounded(alignment(held[:, 0], held[:, 1]))
            if len(held) and held.shape[1] > 1
            else None,
            "uniformity": _rounded(uniformity(held[:, 0])),
            "verdicts": verdicts(signs) if self.n_prototypes > 1 else {},
        }

    def _prototypes_used(self) -> float:
        if self._last_chosen is None:
            return 0.0
        recent = self._last_chosen > max(self.views_seen - 4 * self.n_prototypes, -1)
        return float(recent.float().mean())

    def _held(self) -> Tensor:
        """(M, S, D) float32 on the CPU."""
        if self._embeddings is None:
            return torch.zeros(0, 1, 1)
        return self._embeddings[: self.pictures_seen].cpu()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values that restore the windows."""
        return {
            "views_seen": self.views_seen,
            "pictures_seen": self.pictures_seen,
            "steps_at_chance": self.steps_at_chance,
            "last_chosen": self._last_chosen,
            "embeddings": self._embeddings,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`; a window of another shape is left empty."""
        last_chosen = state["last_chosen"]  # None where nothing is chosen
        if last_chosen is not None and len(last_chosen) != self.n_prototypes:
            return
        self.views_seen = int(state["views_seen"])
        self.pictures_seen = int(state["pictures_seen"])
        self.steps_at_chance = int(state["steps_at_chance"])
        self._last_chosen, self._embeddings = last_chosen, state["embeddings"]


def _rounded(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, 5)
