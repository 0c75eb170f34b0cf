"""Lists of one size in Parquet files, as versions of pyarrow before 26 can write and read them."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import backbone_of
from small_models import picture

import dinokit.tables.parquet
from dinokit.tables.embeddings import read_embeddings
from dinokit.tables.parquet import (
    for_parquet,
    from_parquet,
    parquet_file,
    shape_of_rows,
    vectors_in,
    write_parquet_file,
)
from dinokit.tables.patches import read_patches
from dinokit.tables.run import embed_to_table

VECTORS = pa.array([[1, 2, 3], None, [4, 5, 6], [7, 8, 9]], pa.list_(pa.float32(), 3))
WHOLE = pa.array([[1, 2], [3, 4]], pa.list_(pa.float32(), 2))
HALVES = [[[np.float16(number) for number in token] for token in row] if row else None for row in (
    [[1, 2], [3, 4], [5, 6]], None, [[7, 8], [9, 10], [11, 12]]
)]  # fmt: skip
TOKENS = pa.array(HALVES, pa.list_(pa.list_(pa.float16(), 2), 3))
COLUMNS = [
    VECTORS,
    VECTORS[1:2],
    VECTORS[1:3],
    VECTORS[:0],
    WHOLE,
    WHOLE[1:],
    TOKENS,
    TOKENS[1:],
    TOKENS[1:2],
]


def in_a_file(table: pa.Table) -> pa.Table:
    file = io.BytesIO()
    pq.write_table(table, file)
    return pq.read_table(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_what_is_written_comes_back(column: pa.Array) -> None:
    table = pa.table(
        {
            "path": pa.nulls(len(column), pa.string()),
            "v": column,
            "w": pa.chunked_array([column] * 2)[: len(column)],
        }
    )
    there = in_a_file(for_parquet(table))
    expected = column.to_pylist()
    assert there.column("v").to_pylist() == expected  # as others read it
    back = from_parquet(there)
    back.validate(full=True)
    assert back.equals(table) and back.schema.equals(table.schema, check_metadata=True)
    assert shape_of_rows(there.schema.field("v")) == shape_of_rows(table.schema.field("v"))


@pytest.mark.parametrize("column", COLUMNS, ids=str)
def test_a_file_has_no_lists_of_one_size_and_no_numbers_in_null_rows(column: pa.Array) -> None:
    table = for_parquet(pa.table({"v": column}))
    kind, part = table.schema.field("v").type, table.column("v").combine_chunks()
    while isinstance(kind, pa.DataType) and not pa.types.is_floating(kind):
        assert pa.types.is_list(kind)
        kind = kind.value_type
    assert len(part.values) == sum(len(row) for row in column.to_pylist() if row is not None)


def field(kind: pa.DataType, told: Any) -> pa.Field:
    return pa.field(
        "v", kind, metadata={"dinokit.shape": told if isinstance(told, str) else json.dumps(told)}
    )


@pytest.mark.parametrize("told", ["[3", "[" * 5000, 3, [], [0], [-3], [3.0], [True], ["3"], [3, 1], None])
def test_metadata_that_say_no_shape(told: Any) -> None:
    table = pa.table(
        [pa.array([[1, 2, 3]], pa.list_(pa.float32()))], pa.schema([field(pa.list_(pa.float32()), told)])
    )
    with pytest.raises(ValueError, match="its column 'v' holds list"):
        from_parquet(table)


def test_lists_of_something_else_are_not_vectors() -> None:
    texts = pa.array([["a", "b", "c"]])
    with pytest.raises(ValueError, match="its column 'v' holds list<item: string>"):
        from_parquet(pa.table([texts], pa.schema([field(texts.type, [3])])))


@pytest.mark.parametrize(
    ("rows", "shape", "says"),
    [
        ([[1.0, 2.0], [3.0]], [2], "does not have 2 numbers in each row"),
        ([[1.0, 2.0], [3.0, 4.0, 5.0], [6.0]], [2], "does not have 2 numbers in each row"),
        ([[1.0, None]], [2], "contains null numbers"),
        ([[[1.0, 2.0], [3.0]]], [2, 2], "does not have 2 times 2 numbers in each row"),
        ([[[1.0, 2.0], None]], [2, 2], "does not have 2 times 2 numbers in each row"),
        ([[[1.0, 2.0]]], [2, 2], "does not have 2 times 2 numbers in each row"),
    ],
)
def test_rows_that_are_not_as_the_file_says(rows: list[Any], shape: list[int], says: str) -> None:
    kind = pa.list_(pa.float32()) if len(shape) == 1 else pa.list_(pa.list_(pa.float32()))
    table = in_a_file(pa.table([pa.array(rows, kind)], pa.schema([field(kind, shape)])))
    with pytest.raises(ValueError, match=says):
        from_parquet(table)


def test_columns_of_others_stay() -> None:
    table = pa.table(
        {
            "v": pa.array([[1.0], [2.0, 3.0]]),
            "x": ["a", None],
            "y": pa.array([[1], [2]], pa.list_(pa.int8(), 1)),
        }
    )
    assert from_parquet(table) is table and for_parquet(table) is table


@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("ours", [True, False])
def test_vectors_are_read_piece_by_piece(
    ours: bool, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinokit.tables.parquet, "_ROWS_AT_ONCE", at_once)
    rows = [[float(i), i + 0.5] if i % 4 and ours else None if ours else [i, 1] for i in range(11)]
    table = pa.table({"embedding": pa.array(rows, pa.list_(pa.float32(), 2))})
    path = tmp_path / "t.parquet"
    pq.write_table(for_parquet(table) if ours else table, path, row_group_size=4)
    with parquet_file(path) as file:
        found = vectors_in(file)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[np.nan] * 2 if row is None else row for row in rows])


def test_a_file_without_vectors(tmp_path: Path) -> None:
    write_parquet_file(tmp_path / "t.parquet", pa.table({"embedding": TOKENS}))
    with parquet_file(tmp_path / "t.parquet") as file:
        with pytest.raises(ValueError, match="expected the same number of floats in each row"):
            vectors_in(file)
        with pytest.raises(KeyError, match="vectors"):
            vectors_in(file, "vectors")


def test_pyarrow_reads_in_this_thread_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread of its own that lets go of a buffer while Python ends aborts the process."""
    options: list[dict[str, Any]] = []

    def spied(name: str, option: str) -> Any:
        method = getattr(pq.ParquetFile, name)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            options.append({"name": name, "threads": kwargs.get(option, True)})
            return method(self, *args, **kwargs)

        return call

    for name in ("read", "read_row_group", "iter_batches"):
        monkeypatch.setattr(pq.ParquetFile, name, spied(name, "use_threads"))
    monkeypatch.setattr(pq.ParquetFile, "__init__", spied("__init__", "pre_buffer"))
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        picture(40 + i, 60 - i, seed=i).save(path)
    time.sleep(0.1)
    for what in ("cls", "patches"):
        output = tmp_path / f"{what}.parquet"
        embed_to_table(paths[:3], output, backbone_of(), what=what)
        assert embed_to_table(paths, output, backbone_of(), what=what, update=True).kept == 3
    read_embeddings(tmp_path / "cls.parquet")
    assert len(read_patches(tmp_path / "patches.parquet")[:]) == 4
    pq.write_table(pa.table({"path": ["a"], "embedding": [[1.0, 2.0]]}), tmp_path / "other.parquet")
    read_embeddings(tmp_path / "other.parquet")
    assert {option["name"] for option in options} == {"__init__", "read", "read_row_group", "iter_batches"}
    assert not any(option["threads"] for option in options)
