"""Pictures without labels: their order, and how they become batches of crops.

The order of an epoch and the crops of a picture follow from the seed, the epoch and the picture's number alone:
a resumed run gets the same crops as an uninterrupted one. Sources of pictures: ``pictures.py``.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dinokit.errors import ImageError
from dinokit.pictures.bands import decode_picture
from dinokit.runtime.cpu import usable_cpus
from dinokit.training.distillation.assignment import Teaching
from dinokit.training.objectives.masks import draw_masks
from dinokit.training.recipe import Recipe
from dinokit.training.views.augment import MultiCrop
from dinokit.training.views.batched_crops import PictureBatch, PictureViews, draw_picture, join, make_crops
from dinokit.training.views.pictures import Pictures

__all__ = ["Batch", "CropLoader"]


@dataclass(frozen=True)
class Batch:
    """Crops of B pictures, and the pictures that could not be read."""

    global_crops: Tensor
    """(2, B, C, G, G) uint8; of bands that are finer than 8 bits float32, on the same scale."""
    local_crops: Tensor | None
    """(L, B, C, S, S), likewise."""
    unreadable: list[str]
    """One line for each picture that was left out."""
    masks: Tensor | None = None
    """(2, B, rows, columns) bool on the CPU: patches of the global crops that are hidden from the student."""
    teaching: Tensor | None = None
    """(B, N) float32 on the CPU: how much each frozen teacher counts for a picture, where not all teach all."""

    @property
    def n_images(self) -> int:
        return self.global_crops.shape[1]

    def pin_memory(self) -> Batch:
        """Called by torch's DataLoader, which leaves objects without this as they are."""
        local = self.local_crops
        return replace(
            self,
            global_crops=self.global_crops.pin_memory(),
            local_crops=None if local is None else local.pin_memory(),
        )


class _Sample(NamedTuple):
    """What a worker returns for one picture."""

    views: Any
    """Its crops, or its pixels and drawn views."""
    masks: NDArray[np.bool_] | None
    """(2, rows, columns), True at hidden patches."""
    teaching: tuple[float, ...] | None
    """Weights of the frozen teachers, if not all teach all pictures."""


class _CropDataset(Dataset[Any]):
    """(epoch, index) to the sample of one picture, or to the reason why it cannot be read."""

    def __init__(self, pictures: Pictures, recipe: Recipe, *, batched: bool) -> None:
        self.pictures = pictures
        self.batched = batched
        self.multi_crop = MultiCrop(recipe)
        self.least_px = self.multi_crop.least_px if recipe.reduced_decoding else None
        self.seed = recipe.seed
        self.channels = recipe.channels
        self.masked = recipe if recipe.ibot_weight else None
        self.teaching = None if recipe.distill_pictures is None else Teaching(recipe)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        epoch, index = key
        rng = random.Random(f"{self.seed}/{epoch}/{index}")
        try:
            image = decode_picture(self.pictures.read(index), self.channels, least_px=self.least_px)
            if isinstance(image, Image.Image) and self.channels == 1:
                image = image.convert("L")
            views = draw_picture(image, self.multi_crop, rng) if self.batched else self.multi_crop(image, rng)
        except (ImageError, OSError) as error:
            return f"{self.pictures.name(index)}: {error}"
        # After the crops, so that these are the same with masks and without.
        masks = None if self.masked is None else draw_masks(self.masked, 2, rng)
        teaching = None if self.teaching is None else self.teaching.weights(self.pictures.name(index))
        return _Sample(views, masks, teaching)


class _Order(Sampler[list[tuple[int, int]]]):
    """Batches of (epoch, index) from ``first_step`` to the end of the run; each epoch shuffled by its number.

    A batch is cut into ``world_size · accumulate`` pieces of the same size; these are the ``accumulate`` pieces of
    each step that process ``rank`` computes.
    """

    def __init__(
        self, n_images: int, recipe: Recipe, first_step: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        self.n_images, self.recipe, self.first_step = n_images, recipe, first_step
        self.first_piece = rank * recipe.accumulate
        self.n_pieces = world_size * recipe.accumulate
        self.steps_per_epoch = n_images // recipe.batch_size

    def __len__(self) -> int:
        return (self.recipe.epochs * self.steps_per_epoch - self.first_step) * self.recipe.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        size = self.recipe.batch_size
        first_epoch, skip = divmod(self.first_step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.recipe.epochs):
            order = np.random.default_rng([self.recipe.seed, epoch]).permutation(self.n_images)
            for batch in range(skip, self.steps_per_epoch):
                pieces = order[batch * size : (batch + 1) * size].reshape(self.n_pieces, -1)
                for piece in pieces[self.first_piece : self.first_piece + self.recipe.accumulate]:
                    yield [(epoch, int(i)) for i in piece]
            skip = 0


def _collate(samples: list[Any]) -> Batch | PictureBatch | list[str]:
    readable = [s for s in samples if not isinstance(s, str)]
    unreadable = [s for s in samples if isinstance(s, str)]
    if not readable:
        return unreadable
    crops = [sample.views for sample in readable]
    masks = None
    if readable[0].masks is not None:  # (B, V, rows, columns) to (V, B, rows, columns)
        masks = torch.from_numpy(np.stack([sample.masks for sample in readable], axis=1))
    teaching = None
    if readable[0].teaching is not None:
        teaching = torch.tensor([sample.teaching for sample in readable])
    if isinstance(crops[0], PictureViews):
        return replace(join(crops, unreadable), masks=masks, teaching=teaching)

    def stack(which: int) -> Tensor:
        # (B, V, S, S, C) to (V, B, C, S, S)
        array = np.stack([crop[which] for crop in crops])
        return torch.from_numpy(np.ascontiguousarray(array.transpose(1, 0, 4, 2, 3)))

    return Batch(stack(0), stack(1) if crops[0][1] is not None else None, unreadable, masks, teaching)


def _start_worker(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; only the main one should handle it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _is_batched(recipe: Recipe, device: torch.device) -> bool:
    # On a CPU the matrix products take longer than Pillow (`benchmarks/crops.py`).
    return recipe.crops == "batched" or (recipe.crops == "auto" and device.type == "cuda")


class CropLoader:
    """Batches of crops from a given step to the end of the run, decoded by worker processes.

    The workers also make the crops, or the device makes them, a batch at a time: ``recipe.crops``.

    Args:
        pictures: the source.
        recipe: batch size, crops, seed, epochs, workers.
        first_step: 0, or the step at which a run resumes.
        device: of the training. With CUDA, batches are page-locked.
        rank, world_size: which process of how many; each gets its pieces of every batch.
    """

    def __init__(
        self,
        pictures: Pictures,
        recipe: Recipe,
        *,
        first_step: int = 0,
        device: torch.device | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.recipe = recipe
        self.device = device or torch.device("cpu")
        batched = _is_batched(recipe, self.device)
        # Draws are sent to the device in many small copies. Each waits for the work queued on its stream, which on the
        # training's stream would be the whole previous step.
        on_gpu = batched and self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
        cores = usable_cpus()
        # torchrun sets the number of processes here; it may differ from the recipe's.
        cores = max(1, cores // max(recipe.devices, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
        workers = min(cores, 16) if recipe.workers is None else recipe.workers
        self.loader: DataLoader[Any] = DataLoader(
            _CropDataset(pictures, recipe, batched=batched),
            batch_sampler=_Order(len(pictures), recipe, first_step, rank=rank, world_size=world_size),
            collate_fn=_collate,
            num_workers=workers,
            worker_init_fn=_start_worker if workers else None,
            pin_memory=self.device.type == "cuda",
            # Whole pictures take more memory than their crops.
            prefetch_factor=(2 if batched else 4) if workers else None,
            # Starting to iterate draws a seed; from torch's global generator, that would change the stochastic depth of
            # a resumed run.
            generator=torch.Generator(),
        )

    def __iter__(self) -> Iterator[Batch | list[str]]:
        """Batches; for a batch without readable pictures, the list of reasons.

        Crops are on the CPU if workers made them, otherwise on the device.
        """
        for batch in self.loader:
            if isinstance(batch, PictureBatch):
                crops = self._on_device(batch)
                yield Batch(*crops, batch.unreadable, batch.masks, batch.teaching)
            else:
                yield batch

    def _on_device(self, batch: PictureBatch) -> tuple[Tensor, Tensor | None]:
        sizes = (self.recipe.global_crop_hw, self.recipe.local_crop_hw)
        if self.stream is None:
            return make_crops(batch, *sizes, self.device)
        with torch.cuda.stream(self.stream):
            crops = make_crops(batch, *sizes, self.device)
        training = torch.cuda.current_stream(self.device)
        training.wait_stream(self.stream)
        for made in crops:
            # Its memory must not be reused for the next batch's crops while training still reads it.
            if made is not None:
                made.record_stream(training)
        return crops
