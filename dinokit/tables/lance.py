"""Tables of embeddings as Lance datasets, for an embedded vector database (extra ``[lance]``).

A folder ``NAME.lance`` with the columns of ``embeddings.py``; the origin is in the schema's metadata, as in Parquet.
Every tool that reads Lance can search it: ``lance.dataset("photos.lance").to_table(nearest={"column": "embedding",
"q": vector, "k": 10})``. An index built on it is lost when dinokit writes it again (``--update``).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import DinokitError, MissingExtraError, UsageError
from dinokit.files.outputs import atomic_folder

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "LANCE_SUFFIX",
    "check_lance_output",
    "is_lance",
    "must_have_lance",
    "read_lance",
    "read_lance_metadata",
    "write_lance",
]

LANCE_SUFFIX = ".lance"


def must_have_lance() -> None:
    """Raises MissingExtraError if the package is not installed."""
    if importlib.util.find_spec("lance") is None:
        raise MissingExtraError("A Lance dataset (.lance)", extra="lance", package="pylance")


def write_lance(output: Path, parts: Callable[[], Iterator[pa.Table]], metadata: Mapping[str, str]) -> None:
    """Writes a dataset that comes in parts, one in memory at a time. The folder appears whole or not at all.

    Raises:
        UsageError: the name is taken by something that is not a Lance dataset.
    """
    must_have_lance()
    import lance
    import pyarrow as pa

    check_lance_output(output)
    tables = parts()
    first = next(tables)
    schema = first.schema.with_metadata(dict(metadata))

    def batches() -> Iterator[pa.RecordBatch]:
        for table in itertools.chain([first], tables):
            yield from table.replace_schema_metadata(dict(metadata)).to_batches()

    with atomic_folder(output) as folder:
        lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(folder))


def check_lance_output(output: Path) -> None:
    """Raises UsageError if the name is taken by something that is not a Lance dataset."""
    if os.path.lexists(output) and not is_lance(output):
        raise UsageError(
            f"{output} exists and is not a Lance dataset, so it is left alone; choose another name"
        )


def is_lance(path: str | os.PathLike[str]) -> bool:
    """Whether a folder looks like a Lance dataset."""
    return Path(path, "_versions").is_dir()


def read_lance(path: Path) -> pa.Table:
    """Reads a whole dataset.

    Raises:
        MissingExtraError: the package is not installed.
        DinokitError: it cannot be read.
    """
    return _opened(path).to_table()


def read_lance_metadata(path: Path) -> dict[str, str]:
    """The metadata of its schema; ``{}`` if there are none, or no such dataset."""
    try:
        metadata = _opened(path).schema.metadata or {}
    except MissingExtraError:
        raise
    except DinokitError:
        return {}
    return {key.decode(): value.decode() for key, value in metadata.items()}


def _opened(path: Path) -> Any:
    must_have_lance()
    import lance

    try:
        return lance.dataset(str(path))
    except Exception as error:  # Lance raises ValueError, OSError and its own errors
        raise DinokitError(f"{path} cannot be read as a Lance dataset ({error})") from error
