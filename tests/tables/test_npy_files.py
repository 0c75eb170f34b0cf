"""Damaged arrays, as a table of embeddings, patch tokens and a picture."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest

from dinokit import read_embeddings, read_patches
from dinokit.errors import DinokitError, ImageError
from dinokit.files.npy_files import load_npy
from dinokit.pictures.band_files import read_npy


def damaged(old: bytes, new: bytes) -> bytes:
    """Of a (3, 4) array whose header has other characters."""
    stream = io.BytesIO()
    np.save(stream, np.zeros((3, 4), np.float32))
    assert old in stream.getvalue()
    return stream.getvalue().replace(old, new)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"(3, 4)", b"(3, 4("),  # numpy hands on what Python's tokenizer says
        (b"'shape'", b"'''hape"),
        (b"False", b"Fal\n  e"),
        (b"<f4", b"<x4"),
    ],
)
def test_a_damaged_header_is_a_damaged_file(old: bytes, new: bytes, tmp_path: Path) -> None:
    data = damaged(old, new)
    with pytest.raises(ValueError):
        load_npy(io.BytesIO(data))
    with pytest.raises(ImageError, match="its data are damaged") as raised:
        read_npy(data)
    assert len(str(raised.value)) < 200 and "\n" not in str(raised.value)  # though numpy quotes the header
    file = tmp_path / "t.npy"
    file.write_bytes(data)
    (tmp_path / "t.npy.paths.csv").write_text("path,error\na,\nb,\nc,\n")
    with pytest.raises(DinokitError, match=r"t\.npy"):
        read_embeddings(file)
    with pytest.raises(DinokitError, match=r"t\.npy"):
        read_patches(file)


def test_an_empty_file_and_objects_are_refused_alike() -> None:
    objects = io.BytesIO()
    np.save(objects, np.array([{}], object))
    for data in (b"", objects.getvalue()):
        with pytest.raises(ValueError):
            load_npy(io.BytesIO(data))
