"""A picture of separate channels, perhaps finer than 8 bits, which Pillow's own images cannot represent."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError

__all__ = ["Bands"]

# ITU-R 601 in 16-bit fixed point, as Pillow converts RGB to grey (`src/libImaging/Convert.c`).
_LUMA = np.array([19595, 38470, 7471], np.float32) / np.float32(65536)


class Bands:
    """A picture of n channels as n grey Pillow images of one size, mode L (0…255) or F (0…255, not rounded).

    It has those methods of a Pillow image that keep channels separate, and is immutable.
    """

    __slots__ = ("planes",)

    def __init__(self, planes: Iterable[Image.Image]) -> None:
        self.planes = tuple(planes)

    @classmethod
    def of(cls, array: NDArray[np.uint8] | NDArray[np.float32]) -> Bands:
        """From an array (H, W, C), uint8 or float32, both 0…255. Copied: the caller may reuse the array."""
        return cls(Image.fromarray(np.array(array[:, :, band], order="C")) for band in range(array.shape[2]))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height), as Pillow has it."""
        return self.planes[0].size

    @property
    def width(self) -> int:
        """Pixels."""
        return self.planes[0].width

    @property
    def height(self) -> int:
        """Pixels."""
        return self.planes[0].height

    @property
    def channels(self) -> int:
        """n."""
        return len(self.planes)

    @property
    def array(self) -> NDArray[np.uint8] | NDArray[np.float32]:
        """(H, W, n) uint8, or float32, on a scale of 0…255."""
        return np.stack([np.asarray(plane) for plane in self.planes], axis=2)

    def crop(self, box: tuple[int, int, int, int]) -> Bands:
        """As ``Image.crop``: (left, top, right, bottom)."""
        return Bands(plane.crop(box) for plane in self.planes)

    def resize(
        self,
        size: tuple[int, int],
        resample: Image.Resampling = Image.Resampling.BICUBIC,
        box: tuple[float, float, float, float] | None = None,
    ) -> Bands:
        """As ``Image.resize``: ``size`` is (width, height)."""
        return Bands(plane.resize(size, resample, box) for plane in self.planes)

    def transpose(self, method: Image.Transpose) -> Bands:
        """As ``Image.transpose``."""
        return Bands(plane.transpose(method) for plane in self.planes)

    def for_photographs(self, channels: int) -> Bands:
        """For a network of 1 or 3 channels: grey is repeated, RGB is converted to grey (ITU-R 601).

        Raises:
            ImageError: it has neither one channel nor three, or ``channels`` is neither 1 nor 3.
        """
        if self.channels == channels:
            return self
        if (self.channels, channels) == (1, 3):
            return Bands(self.planes * 3)
        if (self.channels, channels) != (3, 1):
            raise ImageError(f"it has {self.channels} channels; the model expects {channels}")
        grey = self.array.astype(np.float32) @ _LUMA
        if self.planes[0].mode == "L":
            return Bands.of(np.rint(grey).astype(np.uint8)[:, :, None])
        return Bands.of(grey[:, :, None])

    def __repr__(self) -> str:
        return f"<Bands {self.width}x{self.height}, {self.channels} channels, mode {self.planes[0].mode}>"
