"""The teacher's attention on a few fixed pictures over the course of a run, kept as small files.

In a distillation the attention is that of the student's moving average, not of the frozen teacher.

``run/attention/step-0000001200.jpg`` shows the pictures side by side at that step, ``photos.jpg`` without attention.
JPEG, since the report contains them at every save: a fifth of the size of PNG for photographs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from dinokit.drawing.overlays import overlay
from dinokit.files.outputs import atomic
from dinokit.pictures.preprocess import Preprocessing, picture_of
from dinokit.runtime.timm_networks import evaluation_mode
from dinokit.runtime.torch import forward_with_attention, gives_attention
from dinokit.training.monitoring.evaluation import read_crop
from dinokit.training.monitoring.snapshot_files import photos_file, snapshots
from dinokit.training.views.pictures import Pictures

__all__ = ["Snapshots"]

_PHOTOS = 4
_TILE_PX = 144
_KEPT = 12


class Snapshots:
    """Draws the mean attention of the teacher's last block.

    Args:
        run: the run folder.
        pictures: of the run; four of them, evenly spaced, are shown, the same ones at every start.
        preprocessing: that of the model folder.
    """

    def __init__(self, run: Path, pictures: Pictures, preprocessing: Preprocessing) -> None:
        self.run, self.pictures, self.preprocessing = run, pictures, preprocessing
        self._crops: NDArray[Any] | None = None

    def take(self, teacher: nn.Module, step: int, device: torch.device) -> None:
        """Adds the snapshot of a step; beyond twelve, one between two others is removed.

        Networks without such attention (convolutional ones) get none.

        Args:
            teacher: the backbone; it runs in evaluation mode, and its mode is restored.
            step: number of steps done.
            device: the teacher's.

        Raises:
            OSError: the files cannot be written.
        """
        if not gives_attention(teacher):
            return
        folder = self.run / "attention"
        if self._crops is None:
            self._crops = self._read()
        if not len(self._crops):
            return
        maps = self._attention(teacher, device)
        folder.mkdir(exist_ok=True)
        _write(photos_file(self.run), [picture_of(crop) for crop in self._crops])
        # From 0, not from each map's minimum: flat attention must look flat.
        drawn = [
            overlay(picture_of(crop), one, limits=(0.0, float(one.max())))
            for crop, one in zip(self._crops, maps, strict=True)
        ]
        _write(folder / f"step-{step:010d}.jpg", drawn)
        kept = snapshots(self.run)
        while len(kept) > _KEPT:
            steps = list(kept)
            # The first and the last stay; of the others, the one whose neighbours are nearest to each other is removed.
            least = min(range(1, len(steps) - 1), key=lambda i: steps[i + 1] - steps[i - 1])
            kept.pop(steps[least]).unlink(missing_ok=True)

    def _read(self) -> NDArray[Any]:
        count, crops = len(self.pictures), []
        wanted = min(_PHOTOS, count)
        for number in range(wanted):
            middle = (2 * number + 1) * count // (2 * wanted)
            for index in range(middle, min(middle + 5, count)):  # skips a few unreadable ones
                crop = read_crop(self.pictures, index, self.preprocessing)
                if not isinstance(crop, str):
                    crops.append(crop)
                    break
        shape = (0, *self.preprocessing.crop_px, self.preprocessing.channels)
        return np.stack(crops) if crops else np.zeros(shape, np.uint8)

    def _attention(self, teacher: nn.Module, device: torch.device) -> NDArray[np.float32]:
        """(photos, rows, columns), the mean over the heads."""
        assert self._crops is not None
        pixels = torch.from_numpy(self.preprocessing.normalise(self._crops)).to(device)
        with evaluation_mode(teacher), torch.no_grad():
            _, attention = forward_with_attention(teacher, pixels)
        height, width = self.preprocessing.crop_px
        # (B, heads, N) to (B, rows, columns): patches are square, so the grid has the crop's proportions.
        rows = round((attention.shape[-1] * height / width) ** 0.5)
        grid = attention.float().mean(dim=1).view(len(pixels), rows, -1)
        maps: NDArray[np.float32] = grid.cpu().numpy()
        return maps


def _write(path: Path, tiles: list[Image.Image]) -> None:
    width = round(_TILE_PX * tiles[0].width / tiles[0].height)  # the same for all
    sheet = Image.new("RGB", (width * len(tiles), _TILE_PX))
    for number, tile in enumerate(tiles):
        sheet.paste(tile.resize((width, _TILE_PX), Image.Resampling.BICUBIC), (width * number, 0))
    with atomic(path) as partial:
        sheet.save(partial, "JPEG", quality=85)
