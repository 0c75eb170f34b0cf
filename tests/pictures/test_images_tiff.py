"""TIFF as scanners, GDAL and microscopes write it: white that is zero, no data, kinds that Pillow does not read."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from dinokit.errors import ImageError
from dinokit.pictures.bands import Bands, open_picture
from dinokit.pictures.images import open_image

tifffile = pytest.importorskip("tifffile")

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (20, 30, 3), np.uint8)


def tiff(array: NDArray[Any], **options: Any) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, array, **options)
    return file.getvalue()


def levels(source: Any) -> NDArray[np.float64]:
    """(H, W, 3) as a network of 3 channels sees it."""
    seen = open_picture(source, 3)
    return np.asarray(seen.array if isinstance(seen, Bands) else seen, np.float64)


@pytest.mark.parametrize("compression", [None, "zlib"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_white_may_be_zero(kind: str, compression: str | None) -> None:
    numbers = RNG.integers(0, 65536, (20, 30)).astype(np.uint16)
    made, white = {
        "uint8": (COLOURS[:, :, 0], 255),
        "uint16": (numbers, 65535),
        "float32": ((numbers / 65535).astype(np.float32), 1),
    }[kind]
    inverted = tiff((white - made).astype(made.dtype), photometric="miniswhite", compression=compression)
    expected = made / white * 255
    assert np.abs(levels(inverted)[:, :, 0] - expected).max() < 1e-4
    assert np.abs(np.asarray(open_image(inverted), np.float64)[:, :, 1] - expected).max() <= 0.501


@pytest.mark.parametrize("nodata", ["-9999", "-9999 ", "nan", "-3.40282346638528859811704183484516925e+38"])
def test_pixels_without_data_take_no_part(nodata: str) -> None:
    heights = RNG.uniform(200, 455, (20, 30)).astype(np.float32)
    heights[5, 0], heights[5, 1] = 200, 455
    expected = (heights.astype(np.float64) - 200) * (255 / 255)
    heights[:4] = np.float32(nodata)
    seen = levels(tiff(heights, extratags=[(42113, "s", 0, nodata, True)]))[:, :, 0]
    assert not seen[:4].any()
    assert np.abs(seen[4:] - expected[4:]).max() < 1e-3


def test_nor_do_those_of_16_bits_and_a_picture_may_have_none_at_all() -> None:
    numbers = RNG.integers(0, 60000, (20, 30)).astype(np.uint16)
    numbers[:4] = 65535
    seen = levels(tiff(numbers, extratags=[(42113, "s", 0, "65535", True)]))[:, :, 0]
    assert not seen[:4].any() and np.abs(seen[4:] - numbers[4:] / 257).max() < 1e-4
    for other in ("-9999", "", "none"):  # which no pixel has
        seen = levels(tiff(numbers, extratags=[(42113, "s", 0, other, True)]))[:, :, 0]
        assert np.abs(seen - numbers / 257).max() < 1e-4
    empty = tiff(np.full((9, 9), -1, np.float32), extratags=[(42113, "s", 0, "-1", True)])
    assert not levels(empty).any()


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_unsigned_integers_of_32_bits_are_not_negative(compression: str | None) -> None:
    numbers = np.linspace(0, 2**32 - 1, 600).reshape(20, 30).astype(np.uint32)
    seen = levels(tiff(numbers, byteorder="<", compression=compression))[:, :, 0]
    assert np.abs(seen - np.linspace(0, 255, 600).reshape(20, 30)).max() < 1e-3
    numbers[3] = 2**32 - 1
    seen = levels(tiff(numbers // 2 + 2**31, byteorder="<", extratags=[(42113, "s", 0, "4294967295", True)]))[
        :, :, 0
    ]
    assert not seen[3].any() and seen[-1, -2] > 254


def test_a_transparent_level_of_16_bits_is_white() -> None:
    numbers = RNG.integers(1, 65536, (20, 30)).astype(np.uint16)
    numbers[:4] = 0
    file = io.BytesIO()
    Image.fromarray(numbers).save(file, "PNG", transparency=0)
    seen = levels(file.getvalue())[:, :, 0]
    assert (seen[:4] == 255).all() and np.abs(seen[4:] - numbers[4:] / 257).max() < 1e-4
    assert (np.asarray(open_image(file.getvalue()))[:4] == 255).all()


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_three_bands_that_are_not_called_colours(kind: str, planes: str) -> None:
    """As GDAL writes three bands unless told otherwise, and colours as floats."""
    numbers = RNG.integers(0, 65536, (20, 30, 3)).astype(np.uint16)
    made, white = {
        "uint8": (COLOURS, 255),
        "uint16": (numbers, 65535),
        "float32": ((numbers / 65535).astype(np.float32), 1),
    }[kind]
    photometric = "rgb" if kind == "float32" else "minisblack"
    array = np.ascontiguousarray(made.transpose(2, 0, 1)) if planes == "separate" else made
    data = tiff(array, photometric=photometric, planarconfig=planes)
    assert np.abs(levels(data) - made / white * 255).max() < 1e-3


def test_what_is_no_photograph_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    data = tiff(
        RNG.integers(0, 65536, (5, 20, 30), np.uint16), photometric="minisblack", planarconfig="separate"
    )
    with pytest.raises(ImageError, match="it has 5 channels; expected 1 or 3"):
        open_image(data)
    half = tiff(RNG.uniform(0, 1, (20, 30)).astype(np.float16))
    assert open_image(half).size == (30, 20)
    monkeypatch.setattr("dinokit.pictures.band_files.has_tiff", lambda: False)
    with pytest.raises(ImageError, match=r"Pillow cannot read this TIFF.*pip install 'dinokit\[tiff\]'"):
        open_image(half)
    with pytest.raises(ImageError, match=r"truncated|damaged"):
        open_image(tiff(COLOURS, photometric="rgb")[:-300])
