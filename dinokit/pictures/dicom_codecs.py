"""Decompresses the pixels of DICOM files with Pillow and imagecodecs, within pydicom's decoders.

dinokit has its own decoders so that gdcm is never called, even if it is installed: on some damaged pictures it ends the
process, and one damaged picture must not cost the others.

This module is a plugin as pydicom's documentation describes them ("Pixel Data Decoder Plugins").
"""

from __future__ import annotations

import importlib.util
import struct
from functools import cache
from typing import Any

from pydicom import uid
from pydicom.pixels.decoders.base import Decoder, DecodeRunner

__all__ = ["DECODER_DEPENDENCIES", "decode_frame", "decoder_of", "is_available"]

# The function of imagecodecs for each. Its `jpeg8` is libjpeg-turbo, which also supports 12 bits and lossless JPEG.
_FUNCTIONS = {
    uid.JPEGExtended12Bit: "jpeg8_decode",
    uid.JPEGLossless: "jpeg8_decode",
    uid.JPEGLosslessSV1: "jpeg8_decode",
    uid.JPEGLSLossless: "jpegls_decode",
    uid.JPEGLSNearLossless: "jpegls_decode",
    uid.JPEG2000Lossless: "jpeg2k_decode",
    uid.JPEG2000: "jpeg2k_decode",
    uid.HTJ2KLossless: "jpeg2k_decode",
    uid.HTJ2KLosslessRPCL: "jpeg2k_decode",
    uid.HTJ2K: "jpeg2k_decode",
}
_WITH_PILLOW = (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit, uid.JPEG2000Lossless, uid.JPEG2000)

# For every kind of JPEG, and JPEG-LS; C4, C8 and CC are other markers.
_START_OF_FRAME = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}

DECODER_DEPENDENCIES = dict.fromkeys(_FUNCTIONS, ("imagecodecs",))


def is_available(syntax: str) -> bool:
    """Whether this module can decompress a transfer syntax, given what is installed."""
    return syntax in _FUNCTIONS and importlib.util.find_spec("imagecodecs") is not None


def decode_frame(src: bytes, runner: DecodeRunner) -> bytes:
    """The samples of one compressed frame, row by row, as pydicom's decoders expect them."""
    import imagecodecs

    function = _FUNCTIONS[runner.transfer_syntax]
    size = _size_of_jpeg2000(src) if function == "jpeg2k_decode" else _size_of_jpeg(src)
    if size != (runner.rows, runner.columns):  # before any memory is allocated for it
        raise ValueError(
            f"the compressed frame is {size} pixels, the file states {(runner.rows, runner.columns)}"
        )
    samples = getattr(imagecodecs, function)(src)
    # The file may state other values for both: it describes the samples before compression.
    runner.set_option("bits_allocated", samples.dtype.itemsize * 8)
    if samples.ndim == 3:
        runner.set_option("planar_configuration", 0)
    data: bytes = samples.tobytes()
    return data


def _size_of_jpeg2000(src: bytes) -> tuple[int, int]:
    """(height, width) that a frame states (ISO/IEC 15444-1, A.5.1): the end of its grid minus the start."""
    start = src.find(b"\xff\x4f\xff\x51")  # it may be inside boxes
    if start < 0:
        raise ValueError("the compressed frame has no start marker")
    right, bottom, left, top = struct.unpack_from(">4I", src, start + 8)
    return bottom - top, right - left


def _size_of_jpeg(src: bytes) -> tuple[int, int]:
    """(height, width) that a frame of JPEG (ISO/IEC 10918-1, B.2.2) or JPEG-LS states."""
    at = 2
    while at + 9 <= len(src):
        _, marker, length, _, height, width = struct.unpack_from(">BBHBHH", src, at)
        if marker in _START_OF_FRAME:
            return int(height), int(width)
        at += 2 + length
    raise ValueError("the compressed frame has no start marker")


@cache
def decoder_of(syntax: str) -> Any:
    """A pydicom ``Decoder`` for a compressed transfer syntax.

    Raises:
        KeyError: it is not supported.
    """
    known = uid.UID(syntax)
    plugins = []
    if known in _FUNCTIONS:
        plugins.append(("imagecodecs", (__name__, "decode_frame")))
    if known in _WITH_PILLOW:
        plugins.append(("pillow", ("pydicom.pixels.decoders.pillow", "_decode_frame")))
    if known == uid.RLELossless:
        plugins.append(("pydicom", ("pydicom.pixels.decoders.rle", "_decode_frame")))
    if not plugins:
        raise KeyError(syntax)
    decoder = Decoder(known)
    decoder.add_plugins(plugins)
    return decoder
