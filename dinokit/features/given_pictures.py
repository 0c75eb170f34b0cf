"""Turns what users pass to a backbone, one picture or several of any kind, into crops of its input size, in order.

::

    one_or_several = as_given(images)
    cropper = Cropper(preprocessing, least_px)
    cropper.crop(picture)                              # (H, W, C)
    cropper.ahead(several, workers=4, ahead=64)        # such crops, decoded in threads
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError, UsageError
from dinokit.features.batching import map_ahead
from dinokit.pictures.bands import Bands, decode_picture_with_extent
from dinokit.pictures.images import Extent, is_tensor
from dinokit.pictures.picture_bytes import naming
from dinokit.sources import Picture, find_pictures, in_order, is_collection

if TYPE_CHECKING:
    from dinokit.pictures.preprocess import Preprocessing

__all__ = ["Cropper", "as_given", "as_iterable", "is_single"]


def as_given(images: Any) -> Any:
    """``images``; arrays of names or objects, as pandas, pyarrow and scikit-learn pass them, become lists.

    Raises:
        UsageError: a data frame, a set, an array of names with several axes, or an empty name.
    """
    if isinstance(images, Mapping) or hasattr(images, "columns"):  # iterating would give its keys
        raise UsageError(
            f"a {type(images).__name__} is not a list of pictures; expected its column of them, such as "
            'images["path"]'
        )
    if isinstance(images, set | frozenset):
        raise UsageError(
            f"a {type(images).__name__} has no order, so its vectors could not be told apart; use a list"
        )
    if isinstance(images, str) and not images:
        raise UsageError("the path is empty (''); expected a file, a folder, an address …")
    if hasattr(images, "to_pylist"):  # a column of pyarrow, whose own values are not strings
        return images.to_pylist()
    if not isinstance(images, np.ndarray) or images.dtype.kind not in "OUT":
        return images
    if images.ndim != 1:
        raise UsageError(
            f"an array of {images.dtype} of shape {images.shape}; expected (N,) paths or pictures"
        )
    return images.tolist()


def is_single(images: Any) -> bool:
    """Whether it is one picture, not several."""
    if isinstance(images, str | os.PathLike):
        return not is_collection(images)
    if isinstance(images, np.ndarray) or is_tensor(images):
        return bool(images.ndim != 4)
    if isinstance(images, Image.Image | Bands | bytes | bytearray | memoryview) or hasattr(images, "read"):
        return True
    # Not iterable: let open_image say what it is.
    return not isinstance(images, Iterable)


def as_iterable(images: Any, channels: int) -> Iterable[Any]:
    """Several pictures; the name of a folder, pattern or archive becomes its pictures."""
    return find_pictures(images, channels=channels) if isinstance(images, str | os.PathLike) else images


@dataclass(frozen=True)
class Cropper:
    """Opens pictures and crops them to the input of a network. It does not hold the network and can be pickled."""

    preprocessing: Preprocessing
    least_px: int | None
    """The least short side to which large JPEGs may be downscaled while decoding; None: decoded at full size."""

    def crop(self, image: Any, index: int | None = None) -> NDArray[Any]:
        """(H, W, C) uint8, or float32 in 0…255 if finer. ``index``: its position from 0, for error messages."""
        return self.preprocessing.crop(*self._open(image, index))

    def network_input(self, image: Any) -> NDArray[np.float32]:
        """(C, H, W) float32, normalised."""
        pixels: NDArray[np.float32] = self.preprocessing.normalise(self.crop(image)[None])[0]
        return pixels

    def ahead(self, images: Iterable[Any], *, workers: int, ahead: int) -> Iterator[NDArray[Any]]:
        """:meth:`crop` of each, in order; ``workers`` threads work up to ``ahead`` pictures ahead."""
        # Opened pictures may be large, so only enough of them to keep the threads busy are queued.
        places = threading.Semaphore(workers + 1)
        return map_ahead(_call, self._tasks(images, places), workers=workers, ahead=ahead)

    def _tasks(
        self, images: Iterable[Any], places: threading.Semaphore
    ) -> Iterator[Callable[[], NDArray[Any]]]:
        """The task of a thread for each picture. Runs in the calling thread."""
        for index, image in enumerate(in_order(images)):
            if isinstance(image, str | os.PathLike | bytes | Picture):
                yield functools.partial(self.crop, image, index)
            else:
                # Pillow images and file objects are not thread-safe, and the same one may occur twice.
                places.acquire()
                yield functools.partial(self._crop_opened, places, *self._open(image, index))

    def _crop_opened(
        self, places: threading.Semaphore, picture: Image.Image | Bands, extent: Extent
    ) -> NDArray[Any]:
        try:
            return self.preprocessing.crop(picture, extent)
        finally:
            places.release()

    def _open(self, image: Any, index: int | None) -> tuple[Image.Image | Bands, Extent]:
        """The picture and its extent."""
        try:
            with naming(image):
                return decode_picture_with_extent(image, self.preprocessing.channels, least_px=self.least_px)
        except ImageError as error:
            if index is None or isinstance(image, str | os.PathLike | Picture):
                raise
            raise ImageError(f"picture number {index + 1}: {error}") from error


def _call(task: Callable[[], NDArray[Any]]) -> NDArray[Any]:
    return task()
