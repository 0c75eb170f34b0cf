"""How many pixels a picture may have: Pillow's limit against decompression bombs, and the variable that raises it.

A file of a few kilobytes can claim a picture that fills all memory. Pillow refuses more than twice
``PIL.Image.MAX_IMAGE_PIXELS``, some 179 million pixels. Scans and panoramas may have more; users who trust them set
``DINOKIT_MAX_PIXELS=1000000000``. It is read when the first picture is opened; the commands read it before they start.
"""

from __future__ import annotations

import os

from PIL import Image

from dinokit.errors import UsageError

__all__ = ["HOW_TO_RAISE", "apply_variable", "most_pixels"]

_VARIABLE = "DINOKIT_MAX_PIXELS"
_PILLOWS_OWN = Image.MAX_IMAGE_PIXELS
_LEAST = 1_000_000  # Pillow applies the limit to what is resized for the network, too

HOW_TO_RAISE = (
    f"if you trust it, set the variable {_VARIABLE} to that many (in Python, PIL.Image.MAX_IMAGE_PIXELS to half), or "
    "make it smaller"
)
"""The advice in messages about what exceeds the limit."""


def most_pixels() -> int | None:
    """The most pixels a picture may have; None without a limit (``PIL.Image.MAX_IMAGE_PIXELS = None``)."""
    apply_variable()
    return None if Image.MAX_IMAGE_PIXELS is None else 2 * Image.MAX_IMAGE_PIXELS


def apply_variable() -> None:
    """Sets Pillow's limit from the variable, unless the program has set another one.

    Raises:
        UsageError: the variable is not a number of pixels, or too small.
    """
    text = os.environ.get(_VARIABLE, "").strip()
    if not text or Image.MAX_IMAGE_PIXELS != _PILLOWS_OWN:
        return
    try:
        most = int(text)
        if most < _LEAST:
            raise ValueError
    except ValueError:
        raise UsageError(
            f"{_VARIABLE}={text} is not a number of pixels; give an integer of at least {_LEAST}, or unset it"
        ) from None
    Image.MAX_IMAGE_PIXELS = -(-most // 2)
