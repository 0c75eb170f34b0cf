"""Read `.npy` and `.npz` files as numpy does, with one kind of error for all damage."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

__all__ = ["load_npy"]


def load_npy(file: Path | IO[bytes], *, mmap_mode: Literal["r"] | None = None) -> Any:
    """``np.load`` without pickle.

    The header of an array is in Python syntax, so for damaged ones numpy also raises errors of Python's parser.

    Raises:
        ValueError: the file is damaged, or contains Python objects.
        OSError: it cannot be read.
    """
    try:
        return np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except (SyntaxError, tokenize.TokenError, EOFError) as error:
        raise ValueError(f"the header of the array is damaged ({error})") from error
