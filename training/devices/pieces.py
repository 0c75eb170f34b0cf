"""The same number of pieces in every process: BatchNorm, Sinkhorn and FSDP communicate once per piece."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dinokit.errors import TrainingError
from dinokit.training.views.data import Batch

__all__ = ["as_many_pieces"]


def as_many_pieces(batches: Sequence[Batch], wanted: int) -> list[Batch]:
    """Halves the largest piece until there are enough; a piece without readable pictures is missing.

    Gradients, centre and loss stay those of the whole batch, since each piece is weighted by its pictures.

    Args:
        batches: pieces of this process, at least one.
        wanted: number of pieces in every process.

    Raises:
        TrainingError: there are fewer pictures than pieces.
    """
    pieces = list(batches)
    while len(pieces) < wanted:
        largest = max(range(len(pieces)), key=lambda i: pieces[i].n_images)
        half = pieces[largest].n_images // 2
        if not half:
            raise TrainingError(
                f"this process can read {len(pieces)} pictures of a step, and accumulate={wanted} needs one per piece; "
                "remove the unreadable pictures, or lower accumulate"
            )
        cut = pieces[largest]
        pieces[largest : largest + 1] = [_part(cut, slice(None, half)), _part(cut, slice(half, None))]
    return pieces


def _part(batch: Batch, pictures: slice) -> Batch:
    def of(views: Tensor | None) -> Tensor | None:
        return None if views is None else views[:, pictures]

    teaching = None if batch.teaching is None else batch.teaching[pictures]
    return Batch(batch.global_crops[:, pictures], of(batch.local_crops), [], of(batch.masks), teaching)
