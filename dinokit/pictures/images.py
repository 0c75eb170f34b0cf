"""Open any picture as one upright RGB picture.

A photograph gives the same pixels however its camera stored them: EXIF orientation, CMYK, palette, 16 bits, alpha.
Levels finer than 8 bits are rounded, or kept on request (``sixteen_bits.py``). Reading the bytes is in
``picture_bytes.py``, the reasons for what cannot be read are in ``file_kinds.py``, finding pictures in
``image_files.py``.
"""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from dinokit.errors import ImageError
from dinokit.pictures.dicom_files import DICOM_HEAD, is_dicom, read_dicom
from dinokit.pictures.file_kinds import (
    is_heic,
    must_be_developed,
    register_heif,
    what_it_is_instead,
    why_unreadable,
)
from dinokit.pictures.image_files import find_images
from dinokit.pictures.picture_bytes import naming, open_encoded
from dinokit.pictures.picture_limit import apply_variable
from dinokit.pictures.planes import Bands
from dinokit.pictures.sixteen_bits import (
    grey_levels,
    has_finer_levels,
    is_deep,
    levels_beyond_8_bits,
    mend_planes,
)

__all__ = [
    "Extent",
    "decode_image",
    "decode_keeping_bits",
    "find_images",
    "is_tensor",
    "open_image",
    "open_stored",
]


class Extent(NamedTuple):
    """Where the full picture lies within an image that was downscaled while being decoded."""

    size: tuple[int, int]
    """(width, height) of the full upright picture."""
    box: tuple[float, float, float, float]
    """Where it lies in the image: (left, top, right, bottom). If the downscaling does not divide a side, that side
    ends within the image's last pixel."""


def open_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """Any picture as one upright RGB Pillow image, fully decoded.

    Args:
        source: a path, an address (``https://…``, ``s3://…``), a picture in an archive (``a.tar::1.jpg``), a
            Pillow image, the bytes of an image file, a binary file object, a uint8 array (H, W, 3),
            (H, W, 4) with alpha, (H, W) or (H, W, 1) grey, or a torch tensor. Tensors follow torchvision: uint8,
            channels first, (3, H, W) or (1, H, W); other layouts are refused, not guessed. A ``.npy`` file holds an
            array (H, W, 3), (3, H, W) or (H, W) of one of the types in ``band_files.py``, scaled to 8 bits. Of a
            DICOM file, what a viewer shows first (``dicom_files.py``).
        least_px: a JPEG may be decoded at a half, a quarter or an eighth of its size as long as neither side falls
            below this, which is several times faster. None decodes all pixels.

    In this order: the first frame is decoded, 16-bit grey is scaled to 8 bits (divided by 257), transparent
    pixels are composited over white, everything else is converted as Pillow does, EXIF orientation is applied.
    Grey pictures of 32-bit integers or floats keep their values if these lie in 0…255; floats in 0…1 and
    integers in 0…65535 are scaled; anything else is stretched from its minimum to its maximum.

    Raises:
        ImageError: the picture cannot be read; the message names it and says why.
    """
    with naming(source):
        return decode_image(source, least_px=least_px)


def decode_image(source: Any, *, least_px: int | None = None) -> Image.Image:
    """As :func:`open_image`, but the ImageError contains only the reason, without the picture's name."""
    image, _ = _Decoder(least_px, keep_bits=False).decode(source)
    assert isinstance(image, Image.Image)
    return image


def decode_keeping_bits(source: Any, *, least_px: int | None = None) -> tuple[Image.Image | Bands, Extent]:
    """As :func:`decode_image`, with the extent of the full picture, whatever size it was decoded at.

    A picture finer than 8 bits becomes :class:`Bands` of one or three channels, float32 on the same scale of 0…255.
    Also takes arrays and tensors of uint16, and :class:`Bands`."""
    return _Decoder(least_px, keep_bits=True).decode(source)


def is_tensor(source: object) -> bool:
    """Whether this is a torch tensor; does not import torch."""
    torch = sys.modules.get("torch")
    kind = getattr(torch, "Tensor", None)
    return kind is not None and isinstance(source, kind)


# What phones and cameras write is tried first: importing all of Pillow's plugins takes longer than a decode.
_COMMON_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM")
# Page descriptions: Pillow would start another program (Ghostscript) on a file of unknown origin.
_REFUSED_FORMATS = frozenset({"EPS", "WMF"})


def open_stored(file: IO[bytes]) -> Image.Image:
    """The picture in a file as Pillow opens it, before it is decoded. Raises ImageError if it is not a picture."""
    head = file.read(DICOM_HEAD)
    file.seek(0)
    if not head:
        raise ImageError("the file is empty (0 bytes)")
    try:
        try:
            return Image.open(file, formats=_COMMON_FORMATS)
        except UnidentifiedImageError:
            Image.init()
            file.seek(0)
            others = [name for name in Image.ID if name not in _REFUSED_FORMATS]
            try:
                return Image.open(file, formats=others)
            except UnidentifiedImageError:
                # After Pillow's own formats, because an AVIF may call itself what a HEIC does.
                if not (is_heic(head) and register_heif()):
                    raise
                file.seek(0)
                return Image.open(file, formats=("HEIF",))
    except UnidentifiedImageError as error:
        raise ImageError(what_it_is_instead(head)) from error


@dataclass(frozen=True)
class _Decoder:
    """Decodes one picture of any kind."""

    least_px: int | None
    """See :func:`open_image`."""
    keep_bits: bool
    """See :func:`decode_keeping_bits`."""

    def decode(self, source: Any) -> tuple[Image.Image | Bands, Extent]:
        apply_variable()  # outside of the try: a wrong variable is not the picture's fault
        try:
            if isinstance(source, Image.Image):
                return _whole(self._upright(source, None))
            if isinstance(source, np.ndarray):
                return _whole(self._of_array(source))
            if is_tensor(source):
                return _whole(self._of_tensor(source))
            if isinstance(source, Bands) and self.keep_bits:
                return _whole(source)
            file = open_encoded(source)
            if file is not None:
                with file:
                    return self._of_file(file)
        except ImageError:
            raise
        # Pillow's decoders raise nearly anything on damaged data: OSError, SyntaxError, struct.error, ValueError,
        # IndexError, … and MemoryError on absurd sizes. All of these mean that this one picture cannot be read.
        except Exception as error:
            raise ImageError(why_unreadable(error)) from error
        raise ImageError(
            f"a {type(source).__name__} is not a picture; expected a path, a Pillow image, bytes, a file object, "
            "a uint8 array (H, W, 3) or a uint8 torch tensor (3, H, W)"
        )

    # -- files

    def _of_file(self, file: IO[bytes]) -> tuple[Image.Image | Bands, Extent]:
        from dinokit.pictures.band_files import is_npy, is_tiff, read_npy

        head = file.read(DICOM_HEAD)
        file.seek(0)
        if is_npy(head):
            return _whole(self._of_numbers(read_npy(file.read())))
        if is_dicom(head):
            return _whole(self._of_levels(read_dicom(file)))
        try:
            return self._by_pillow(file)
        except (ImageError, ValueError) as error:
            if not (is_tiff(head) and _is_unknown_to_pillow(error)):
                raise
        return _whole(self._by_tifffile(file))

    def _by_pillow(self, file: IO[bytes]) -> tuple[Image.Image | Bands, Extent]:
        with open_stored(file) as image:
            must_be_developed(getattr(image, "tag_v2", {}))
            stored = image.size
            if self.least_px is not None:  # only JPEG can, the other formats ignore it
                image.draft(None, (self.least_px, self.least_px))
            reduced = image.size != stored
            upright = self._upright(image, file)
            # Pillow may have rotated a TIFF while loading it, so the size of an image at full size is known only now.
            return (upright, _extent(stored, image)) if reduced else _whole(upright)

    def _by_tifffile(self, file: IO[bytes]) -> Image.Image | Bands:
        """For what Pillow cannot read: three channels not declared as RGB, RGB as floats, floats of 16 bits."""
        from dinokit.pictures.band_files import has_tiff, read_tiff

        if not has_tiff():
            raise ImageError(
                "Pillow cannot read this TIFF (unsupported or damaged); tifffile may be able to: "
                "pip install 'dinokit[tiff]'"
            )
        file.seek(0)
        array = read_tiff(file.read(), None)
        channels = array.shape[2]
        if channels not in (1, 3):
            raise ImageError(
                f"it has {channels} channels; expected 1 or 3, as a photograph has. Use a model of {channels} channels"
            )
        return self._of_numbers(array)

    # -- arrays

    def _of_numbers(self, array: NDArray[Any]) -> Image.Image | Bands:
        """From (H, W), or one or three channels, first or last, of any of the types in ``band_files.py``."""
        from dinokit.pictures.band_files import in_levels, with_channels_last

        if array.ndim == 3 and array.size and array.shape[2] == 1:
            return self._of_levels(in_levels(array))
        # One row of RGB is (1, W, 3), as in arrays of 8 bits; not a grey picture that is 3 pixels wide.
        grey = array.ndim == 2 or (array.ndim == 3 and array.shape[0] == 1 and array.shape[2] != 3)
        return self._of_levels(in_levels(with_channels_last(array, 1 if grey else 3)))

    def _of_levels(self, levels: NDArray[np.uint8] | NDArray[np.float32]) -> Image.Image | Bands:
        """From (H, W), (H, W, 1) or (H, W, 3) on a scale of 0…255."""
        levels = levels if levels.ndim == 3 else levels[:, :, None]
        if levels.dtype != np.uint8:
            if self.keep_bits and has_finer_levels(levels):
                return Bands.of(levels)
            levels = np.rint(levels).astype(np.uint8)
        pixels = levels[:, :, 0] if levels.shape[2] == 1 else levels
        return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)))

    def _of_array(self, array: NDArray[Any]) -> Image.Image | Bands:
        if self.keep_bits and array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
            return self._of_numbers(array)
        if array.dtype != np.uint8:
            expected = "uint8 (0…255) or uint16 (0…65535)" if self.keep_bits else "uint8 (0…255)"
            raise ImageError(
                f"the array has dtype {array.dtype}, expected {expected}; convert it first, "
                "for floats in 0…1 with (255 * array).round().astype('uint8')"
            )
        if 0 in array.shape:
            raise ImageError(f"the array is empty, its shape is {array.shape}")
        if array.ndim == 3 and array.shape[2] == 1:
            array = array[:, :, 0]
        if array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4)):
            return _to_rgb(Image.fromarray(np.ascontiguousarray(array)))
        hint = (
            "; it looks channels-first, use array.transpose(1, 2, 0)"
            if array.shape[:1] in ((1,), (3,), (4,))
            else ""
        )
        raise ImageError(
            f"the array has shape {array.shape}, expected (H, W, 3), (H, W, 4), (H, W, 1) or (H, W){hint}"
        )

    def _of_tensor(self, tensor: Any) -> Image.Image | Bands:
        shape = tuple(tensor.shape)
        if str(tensor.dtype) != "torch.uint8" and not (
            self.keep_bits and str(tensor.dtype) == "torch.uint16"
        ):
            raise ImageError(
                f"the tensor has dtype {tensor.dtype}, expected torch.uint8 (0…255); a float tensor could "
                "already be normalised. For floats in 0…1: (255 * tensor).round().to(torch.uint8)"
            )
        if 0 in shape:
            raise ImageError(f"the tensor is empty, its shape is {shape}")
        if len(shape) != 3 or shape[0] not in (1, 3) or shape[2] in (1, 3):
            raise ImageError(
                f"the tensor has shape {shape}, expected (3, H, W) or (1, H, W){_layout_hint(shape)}"
            )
        array = np.asarray(tensor.detach().cpu().permute(1, 2, 0).contiguous())
        return self._of_array(array[:, :, 0] if shape[0] == 1 else array)

    # -- Pillow images

    def _upright(self, image: Image.Image, file: IO[bytes] | None) -> Image.Image | Bands:
        """Decodes an image to RGB, or to bands if finer levels are to be kept; ``file`` is the image's file, if any."""
        mend_planes(image)
        levels = None
        if self.keep_bits:
            levels = levels_beyond_8_bits(image, file)
        else:
            image.load()
        # Known only now: Pillow rotates TIFFs while loading, and PNG may have its EXIF after the pixels.
        orientation = _orientation(image)
        if levels is not None:
            bands = Bands.of(levels)
            return bands if orientation is None else bands.transpose(orientation.transpose)
        # A file that only we have open: copying its pixels would take a third as long as decoding them.
        plain = file is not None and image.format in _COMMON_FORMATS and image.mode == "RGB"
        rgb = image if plain and not image.has_transparency_data else _to_rgb(image)
        if orientation is None:
            return rgb
        upright = rgb.transpose(orientation.transpose)
        upright.info = {}  # Pillow keeps the EXIF; if passed in again, the picture would be rotated again
        return upright


def _is_unknown_to_pillow(error: Exception) -> bool:
    """Whether a file may be intact, but of a kind that Pillow cannot read."""
    return isinstance(error.__cause__, UnidentifiedImageError) or "unknown raw mode" in str(error)


def _layout_hint(shape: tuple[int, ...]) -> str:
    if len(shape) != 3 or shape[2] not in (1, 3):
        return ""
    if shape[0] in (1, 3):
        return "; its layout is ambiguous, pass it as a numpy array (H, W, 3)"
    return "; it looks channels-last, use tensor.permute(2, 0, 1)"


# --------------------------------------------------------------------------------------------- orientation


class _Orientation(NamedTuple):
    """How a picture is stored that is not upright."""

    transpose: Image.Transpose
    """What makes it upright."""
    sides: tuple[int, int, int, int]
    """Which stored side (0 left, 1 top, 2 right, 3 bottom) becomes the upright left, top, right, bottom."""


_ORIENTATION_TAG = 0x0112
# EXIF 2.32, table "Orientation".
_ORIENTATIONS = {
    2: _Orientation(Image.Transpose.FLIP_LEFT_RIGHT, (2, 1, 0, 3)),
    3: _Orientation(Image.Transpose.ROTATE_180, (2, 3, 0, 1)),
    4: _Orientation(Image.Transpose.FLIP_TOP_BOTTOM, (0, 3, 2, 1)),
    5: _Orientation(Image.Transpose.TRANSPOSE, (1, 0, 3, 2)),
    6: _Orientation(Image.Transpose.ROTATE_270, (3, 0, 1, 2)),
    7: _Orientation(Image.Transpose.TRANSVERSE, (3, 2, 1, 0)),
    8: _Orientation(Image.Transpose.ROTATE_90, (1, 2, 3, 0)),
}


def _orientation(image: Image.Image) -> _Orientation | None:
    """By the EXIF of a loaded image; None if it is upright."""
    with contextlib.suppress(Exception):  # damaged EXIF must not cost a picture whose pixels are fine
        return _ORIENTATIONS.get(int(image.getexif().get(_ORIENTATION_TAG, 1)))
    return None


def _whole(image: Image.Image | Bands) -> tuple[Image.Image | Bands, Extent]:
    return image, Extent(image.size, (0, 0, *image.size))


def _extent(stored: tuple[int, int], image: Image.Image) -> Extent:
    """For an image that was downscaled from ``stored`` (width, height) and is not upright yet."""
    scale = round(stored[0] / image.width)  # 2, 4 or 8; Pillow rounds the number of pixels up
    beyond = (0.0, 0.0, image.width - stored[0] / scale, image.height - stored[1] / scale)
    orientation = _orientation(image)
    sides = orientation.sides if orientation else (0, 1, 2, 3)
    left, top, right, bottom = (beyond[side] for side in sides)
    lying = sides[0] % 2 == 1
    width, height = image.size[::-1] if lying else image.size
    return Extent(stored[::-1] if lying else stored, (left, top, width - right, height - bottom))


# --------------------------------------------------------------------------------------------- colours

# Colours premultiplied by alpha, and the mode in which they are not.
_PREMULTIPLIED = {"La": "LA", "RGBa": "RGBA"}


def _to_rgb(image: Image.Image) -> Image.Image:
    mode = image.mode
    if is_deep(mode):  # Pillow's own convert("L") clips 16 bits at 255
        return Image.fromarray(np.rint(grey_levels(image)).astype(np.uint8)).convert("RGB")
    if mode in _PREMULTIPLIED:
        image = image.convert(_PREMULTIPLIED[mode])
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if mode == "RGB":
        # A new object of class Image, which shares nothing lazy or mutable with the caller's.
        return image.copy() if type(image) is Image.Image else image.convert("RGB")
    try:
        return image.convert("RGB")
    except ValueError as error:
        raise ImageError(f"its colour mode {mode} cannot be converted to RGB; save it as RGB") from error
