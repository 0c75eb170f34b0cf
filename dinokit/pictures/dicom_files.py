"""Pictures from DICOM files, as a medical viewer first shows them; read with pydicom.

The first frame goes through the file's own tables (DICOM PS3.4, N.2): stored values become measured ones (for example
Hounsfield units), these go through the file's first window, and the result is scaled from black to white:

=====================  =========================================================================================
grey, with a window    the first window, or VOI table, in the file
grey, without one      8 bits as they are; anything else from its minimum to its maximum, padding ignored
palette                its colours
RGB, YBR               the colours; 16 bits are kept as in any other file
=====================  =========================================================================================

MONOCHROME1, in which large values are dark, is inverted. Padding is black. Data about the patient are not read.
"""

from __future__ import annotations

import importlib.util
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError
from dinokit.pictures.picture_limit import most_pixels

__all__ = ["DICOM_HEAD", "is_dicom", "read_dicom"]

DICOM_HEAD = 132
"""How many of its first bytes identify a DICOM file."""
_EXTRA = "pip install 'dinokit[dicom]'"
_COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
# Deflated Explicit VR Little Endian: a file deflated as a whole could inflate to a thousand times its size.
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_FAR = 1e30


def is_dicom(head: bytes) -> bool:
    """Whether a file that begins with these (at least ``DICOM_HEAD``) bytes is DICOM (PS3.10, 7.1)."""
    return head[128:132] == b"DICM"


def read_dicom(file: IO[bytes]) -> NDArray[np.uint8] | NDArray[np.float32]:
    """The picture of a DICOM file, (H, W) grey or (H, W, 3), on a scale of 0…255: see above.

    Args:
        file: at its beginning; can seek.

    Raises:
        ImageError: pydicom is not installed, the file contains no picture, or dinokit does not support its encoding.
        Exception: whatever pydicom and the decoders raise on damaged data; ``images.py`` puts it into words.
    """
    if importlib.util.find_spec("pydicom") is None:
        raise ImageError(f"a DICOM picture, which pydicom reads: {_EXTRA}; or convert it to PNG")
    from pydicom import dcmread

    start = file.read(1 << 16)
    file.seek(0)
    if _DEFLATED in start:
        raise ImageError(
            "a DICOM file that is deflated as a whole; inflate it first, for example with dcmconv"
        )
    header = dcmread(file, stop_before_pixels=True)
    file.seek(0)
    _must_be_a_picture(header)
    _take_tables_of_first_frame(header)
    stored = _first_frame(file, header.file_meta.TransferSyntaxUID)
    kind = str(header.PhotometricInterpretation)
    if kind.startswith("MONOCHROME") and stored.ndim == 2:
        return _grey(header, stored)
    if kind == "PALETTE COLOR" and stored.ndim == 2:
        from pydicom.pixels import apply_color_lut

        colours = apply_color_lut(stored, header)[:, :, :3]
        return _between(colours, 0, np.iinfo(colours.dtype).max)
    if kind in _COLOURS and stored.ndim == 3 and stored.shape[2] == 3:
        return _between(stored, 0, 2 ** int(header.BitsStored) - 1)
    raise ImageError(
        f"its pixels are {kind} with shape {stored.shape}; expected grey, a palette, RGB or YBR_FULL"
    )


def _must_be_a_picture(header: Any) -> None:
    if "Rows" not in header or "PhotometricInterpretation" not in header:
        kind = header.get("SOPClassUID", "")
        known = getattr(kind, "keyword", "")
        raise ImageError(f"a DICOM file without a picture{f' ({kind.name})' if known else ''}")
    if not getattr(header.file_meta, "TransferSyntaxUID", ""):
        raise ImageError("a DICOM file that does not state how its pixels are stored (no transfer syntax)")
    n_pixels = int(header.Rows) * int(header.Columns)
    limit = most_pixels()
    if limit is not None and n_pixels > limit:
        raise Image.DecompressionBombError


def _take_tables_of_first_frame(header: Any) -> None:
    """An enhanced file has a window and a rescaling for all its frames, or for each frame (PS3.3, C.7.6.16)."""
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for tables in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for group in (header.get(groups) or [])[:1]:
                for table in (group.get(tables) or [])[:1]:
                    header.update({element.tag: element for element in table})


def _first_frame(file: IO[bytes], syntax: Any) -> NDArray[Any]:
    """(H, W) or (H, W, samples), the stored values; YBR is converted to RGB."""
    from pydicom import dcmread
    from pydicom.pixels import pixel_array

    frame: NDArray[Any]
    try:
        if syntax.is_encapsulated:
            frame = _decoder(syntax).as_array(dcmread(file), index=0)[0]
        else:
            frame = pixel_array(file, index=0)
    except RuntimeError as error:  # no decoder, or none that could
        text = " ".join(str(error).split())
        if "missing dependencies" in text:
            raise ImageError(
                f"its pixels are compressed as {syntax.name}, which imagecodecs reads: {_EXTRA}"
            ) from error
        raise ImageError(f"its pixels cannot be decompressed ({text})") from error
    except AttributeError as error:
        raise ImageError(f"a DICOM file without a picture ({error})") from error
    return frame


def _decoder(syntax: Any) -> Any:
    from dinokit.pictures.dicom_codecs import decoder_of

    try:
        return decoder_of(syntax)
    except KeyError as error:
        raise ImageError(
            f"its pixels are compressed as {syntax.name}, which dinokit does not support"
        ) from error


def _grey(header: Any, stored: NDArray[Any]) -> NDArray[np.uint8] | NDArray[np.float32]:
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    padding = _padding(header, stored)
    measured = apply_modality_lut(stored, header)
    window = _window(header)
    if window is not None:
        levels = _between(apply_voi_lut(measured, header), *window)
    elif stored.dtype == np.uint8 and np.array_equal(measured, stored):
        levels = _between(stored, 0, 2 ** int(header.BitsStored) - 1)
    else:
        shown = measured if padding is None or padding.all() else measured[~padding]
        levels = _between(measured, shown.min(), shown.max())
    if header.PhotometricInterpretation == "MONOCHROME1":
        levels = levels.dtype.type(255) - levels
    if padding is not None:
        levels[padding] = 0
    return levels


def _padding(header: Any, stored: NDArray[Any]) -> NDArray[np.bool_] | None:
    """Where pixels are padding, such as around the circle that a CT measures (PS3.3, C.7.5.1.1.2); None: nowhere."""
    value = header.get("PixelPaddingValue")
    if not isinstance(value, int):
        return None
    limit = header.get("PixelPaddingRangeLimit")
    low, high = sorted((value, limit if isinstance(limit, int) else value))
    padding: NDArray[np.bool_] = (stored >= low) & (stored <= high)
    return padding if padding.any() else None


def _window(header: Any) -> tuple[float, float] | None:
    """Black and white on the output scale of the file's window or VOI table; None if it has neither."""
    from pydicom.pixels import apply_windowing

    if header.get("VOILUTSequence"):  # it has precedence over a window, as in pydicom
        return 0.0, 2.0 ** int(header.VOILUTSequence[0].LUTDescriptor[2]) - 1
    if None in (header.get("WindowCenter"), header.get("WindowWidth")):
        return None
    try:
        with np.errstate(over="ignore"):  # of a sigmoid
            black, white = apply_windowing(np.array([-_FAR, _FAR]), header)
    except ValueError:  # a width of 0; the picture is shown without it
        return None
    return float(black), float(white)


def _between(values: NDArray[Any], black: float, white: float) -> NDArray[np.uint8] | NDArray[np.float32]:
    """Scales to levels of 0…255; 8 bits that are such levels already are unchanged."""
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    if not np.isfinite(values).all():
        raise ImageError("it has pixels that are not numbers (NaN or infinite)")
    if black == white:
        return np.zeros(values.shape, np.uint8)
    share = (values.astype(np.float64) - float(black)) / (float(white) - float(black))
    return (np.clip(share, 0, 1) * 255).astype(np.float32)
