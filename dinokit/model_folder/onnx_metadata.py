"""Reads the metadata of an ONNX file without reading its weights and without the onnx package.

An ONNX file is one protobuf message (``ModelProto``); the graph is one field of it and is skipped, so that
a file of any size is described at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

from dinokit.errors import ModelError
from dinokit.files.git_lfs import must_not_be_a_pointer

__all__ = ["read_onnx_metadata"]

# Field numbers of onnx.proto: ModelProto.metadata_props, StringStringEntryProto.key and .value.
_METADATA_PROPS, _KEY, _VALUE = 14, 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_onnx_metadata(path: str | Path) -> dict[str, str]:
    """The custom metadata of an ONNX file.

    Raises:
        ModelError: the file is missing, empty, or not an ONNX file.
    """
    path = Path(path)
    found = {}
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for number, start, end in _fields(data, 0, len(data)):
                if number == _METADATA_PROPS:
                    entry = {n: data[a:b].decode("utf-8") for n, a, b in _fields(data, start, end)}
                    found[entry.get(_KEY, "")] = entry.get(_VALUE, "")
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist; expected an ONNX file") from error
    except (OSError, ValueError, IndexError) as error:  # mmap refuses an empty file with ValueError
        must_not_be_a_pointer(path)
        raise ModelError(f"{path} is not an ONNX file ({error})") from error
    return found


def _fields(data: mmap.mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(number, start, end) of each length-delimited field between two positions."""
    while position < end:
        tag, position = _varint(data, position)
        number, kind = tag >> 3, tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
        elif kind == _BYTES:
            length, position = _varint(data, position)
            if position + length > end:
                raise ValueError("it is truncated")
            yield number, position, position + length
            position += length
        elif kind in (_FIXED64, _FIXED32):
            position += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"a protobuf message cannot have a field of kind {kind}")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    """A varint: seven bits per byte, the lowest first; the high bit means that more follow."""
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is longer than 64 bits")
