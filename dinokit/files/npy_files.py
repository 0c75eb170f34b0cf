"""`.npy` and `.npz` files as numpy reads them, and one kind of error for whatever may be damaged in one."""

from __future__ import annotations

import tokenize
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

__all__ = ["load_npy"]


def load_npy(file: Path | IO[bytes], *, mmap_mode: Literal["r"] | None = None) -> Any:
    """``np.load`` without pickle.

    The header of an array is Python's notation, so of damaged ones numpy also hands on what Python's parser says.

    Raises:
        ValueError: it is damaged, or holds Python objects.
        OSError: it cannot be read.
    """
    try:
        return np.load(file, mmap_mode=mmap_mode, allow_pickle=False)
    except (SyntaxError, tokenize.TokenError, EOFError) as error:
        raise ValueError(f"the header of the array is damaged ({error})") from error
