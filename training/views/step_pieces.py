"""From the crop loader to the arguments of a training step: pieces of a batch, normalised on the device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from dinokit.training.devices.transfer import sent
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.recipe import Recipe
from dinokit.training.views.data import Batch
from dinokit.training.views.normalisation import normalisation

__all__ = ["Normalise", "hidden_patches", "pieces_of_steps", "teaching_weights"]


def pieces_of_steps(
    loader: Iterable[Batch | list[str]], accumulate: int
) -> Iterator[tuple[list[Batch], list[str]]]:
    """Groups the loader's batches into steps.

    Yields:
        The pieces of one step, and one line for each of its pictures that could not be read.
    """
    pieces = iter(loader)
    while group := list(itertools.islice(pieces, accumulate)):
        batches = [piece for piece in group if isinstance(piece, Batch)]
        unreadable = [
            line for piece in group for line in (piece.unreadable if isinstance(piece, Batch) else piece)
        ]
        yield batches, unreadable


class Normalise:
    """Crops of 0…255 to normalised float32 on the device, global crops first."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        # Copied to the device only once: a copy from pageable memory waits for all work queued on the device.
        self.mean, self.std = (
            torch.tensor(v, device=device).view(-1, 1, 1) * 255 for v in normalisation(recipe)
        )

    def __call__(self, batch: Batch) -> list[Tensor]:
        device = self.mean.device
        crops = [c for c in (batch.global_crops, batch.local_crops) if c is not None]
        return [(sent(c, device).float() - self.mean) / self.std for c in crops]


def hidden_patches(batches: Sequence[Batch], device: torch.device) -> list[HiddenPatches] | None:
    """One per piece; None if no patches are hidden."""
    return [HiddenPatches.of(batch.masks, device) for batch in batches if batch.masks is not None] or None


def teaching_weights(batches: Sequence[Batch], device: torch.device) -> list[Tensor] | None:
    """(B, N) per piece; None if every frozen teacher teaches every picture."""
    return [sent(batch.teaching, device) for batch in batches if batch.teaching is not None] or None
