"""Weights in one safetensors file, or in several, as large models on the Hub are stored.

``model.safetensors.index.json`` names the file of each tensor::

    {"metadata": {"total_size": …}, "weight_map": {"blocks.0.norm1.weight": "model-00001-of-00002.safetensors", …}}
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.files.checksums import sha256_of
from dinokit.files.json_files import read_json
from dinokit.model_folder.weight_names import some_of
from dinokit.model_folder.weights import read_safetensors

__all__ = ["INDEX_SUFFIX", "WeightFiles", "find_weight_files", "identity_of", "unchanged"]

INDEX_SUFFIX = ".safetensors.index.json"
_MOST_NAMED = 4


@dataclass(frozen=True)
class WeightFiles:
    """The files with the weights of one model."""

    path: Path
    """The file, or the index of several."""
    parts: dict[str, Path]
    """Of an index: each file by its name there, sorted. Empty for one file."""
    tensors: dict[str, str]
    """Of an index: the file of each tensor."""

    def read(self) -> dict[str, NDArray[np.float32]]:
        """All tensors under the names in the files, float32.

        Raises:
            ModelError: a file is damaged, or its tensors differ from those in the index.
        """
        if not self.parts:
            return read_safetensors(self.path)
        weights: dict[str, NDArray[np.float32]] = {}
        for name, path in self.parts.items():
            found = read_safetensors(path)
            expected = {tensor for tensor, file in self.tensors.items() if file == name}
            if found.keys() != expected:
                problems = [
                    f"{what} {some_of(sorted(tensors), _MOST_NAMED)}"
                    for what, tensors in (
                        ("lacks", expected - found.keys()),
                        ("has beyond it", found.keys() - expected),
                    )
                    if tensors
                ]
                raise ModelError(
                    f"{path} does not match {self.path.name}: it {' and '.join(problems)}; fetch all files of "
                    "the model again"
                )
            weights.update(found)
        return weights

    def sha256(self) -> str:
        """Of the file, hexadecimal; of several, what ``sha256sum model-*.safetensors | sha256sum`` prints."""
        if not self.parts:
            return sha256_of(self.path)
        lines = "".join(f"{sha256_of(path)}  {name}\n" for name, path in self.parts.items())
        return hashlib.sha256(lines.encode()).hexdigest()


def identity_of(path: Path) -> tuple[int, ...] | None:
    """Numbers that change if the file is replaced or rewritten; None if there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """Raises ModelError at its end if a file was replaced: weights and sha256 may be those of two models."""
    before = [identity_of(path) for path in paths]
    yield
    for path, identity in zip(paths, before, strict=True):
        if identity_of(path) != identity:
            raise ModelError(f"{path} was replaced while it was read; load the model again")


def find_weight_files(name: str, find: Callable[[str], Path | None], source: str) -> WeightFiles | None:
    """The file ``name``, or the several that ``name.index.json`` lists; None if there is neither.

    Args:
        name: ``model.safetensors``.
        find: gives the path of a file by its name, or None; may fetch it.
        source: the folder or repository, for messages.

    Raises:
        ModelError: the index cannot be read, or files that it lists are missing.
    """
    path = find(name)
    if path is not None:
        return WeightFiles(path, {}, {})
    index = find(f"{name}.index.json")
    if index is None:
        return None
    tensors = _read_index(index)
    files = {part: find(part) for part in sorted(set(tensors.values()))}
    if missing := [part for part, there in files.items() if there is None]:
        named = some_of(missing, _MOST_NAMED)
        raise ModelError(
            f"{source} lacks {len(missing)} of the {len(files)} files that {index.name} lists: {named}; fetch them too"
        )
    return WeightFiles(index, {part: there for part, there in files.items() if there is not None}, tensors)


def _read_index(path: Path) -> dict[str, str]:
    """The file of each tensor. Files must be beside the index."""
    try:
        tensors = read_json(path)["weight_map"]
        if not isinstance(tensors, dict) or not tensors:
            raise TypeError("weight_map is not a table of tensors")
        odd = [str(file) for file in tensors.values() if not _is_a_plain_name(file)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} is not an index of safetensors files ({type(error).__name__}: {error}); fetch it again"
        ) from error
    if odd:
        raise ModelError(
            f"{path} names {some_of(sorted(set(odd)), _MOST_NAMED)}; expected names of .safetensors files beside it"
        )
    return dict(tensors)


def _is_a_plain_name(file: object) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(".safetensors")
        and not file.startswith(".")
        and not {"/", "\\", ":", "\0"}.intersection(file)
    )
