"""Parquet files of pictures, read in pieces."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import names, png, read_all

from dinokit.errors import ImageError, UsageError
from dinokit.pictures.images import decode_image, open_image
from dinokit.sources import (
    Picture,
    find_pictures,
    in_order,
    label_of,
    search_pictures,
)

pytestmark = pytest.mark.usefixtures("here")


def struct_column(rows: list[tuple[bytes | None, str | None]]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([{"bytes": data, "path": path} for data, path in rows], kind)


def test_parquet_with_bytes_and_with_hugging_faces_struct() -> None:
    data = [png(i) for i in range(60)]
    pq.write_table(pa.table({"label": range(60), "image": pa.array(data, pa.binary())}), "b.parquet")
    column = struct_column([(d, f"{i}.png") for i, d in enumerate(data)])
    features = {"info": {"features": {"photo": {"_type": "Image"}, "label": {"_type": "Value"}}}}
    table = pa.table({"photo": column, "label": range(60)})
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, "s.parquet", row_group_size=7)
    jumps = (9, 0, 40, 20, 19, 59, 3, 3, 58)
    for file in ("b.parquet", "s.parquet"):
        pictures = find_pictures(file)
        assert names(pictures) == [f"{file}::{i}" for i in range(60)]
        assert read_all(pictures) == data
        order: list[Any] = [pictures[i] for i in jumps]
        assert [item.read() for item in order] == [data[i] for i in jumps]
        assert [item.read() for item in pickle.loads(pickle.dumps(order))] == [item.read() for item in order]
        assert open_image(f"{file}::7").size == (27, 16)
    with pytest.raises(ImageError, match="no picture with this name"):
        open_image("s.parquet::60")


def test_rows_without_a_picture_are_rows_that_fail() -> None:
    Path("beside.png").write_bytes(png(2))
    rows = [(png(1), None), (None, None), (None, "beside.png"), (None, "gone.png"), (b"text", None)]
    table = pa.table({"image": struct_column(rows)})
    pq.write_table(table, "s.parquet")
    first, null, beside, gone, text = in_order(find_pictures("s.parquet"))
    assert decode_image(first).size == (21, 16)
    assert decode_image(beside).size == (22, 16)
    for item, message in ((null, "no picture \\(null\\)"), (gone, "only a path, gone.png"), (text, "text")):
        with pytest.raises(ImageError, match=message):
            decode_image(item)


def test_a_parquet_without_pictures_names_its_columns() -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), "t.parquet")
    with pytest.raises(
        UsageError, match=r"no column of pictures; its columns are a .int64., b .string.\. Expected"
    ):
        find_pictures("t.parquet")


def test_columns_of_the_same_name_and_repeated_pictures() -> None:
    encoded = pa.array([png(1), png(2), png(1)])
    pq.write_table(
        pa.Table.from_arrays([encoded, pa.array([1, 2, 3])], names=["image", "image"]), "t.parquet"
    )
    assert read_all(find_pictures("t.parquet")) == encoded.to_pylist()
    pq.write_table(pa.table({"image": encoded.dictionary_encode()}), "t.parquet")
    assert read_all(find_pictures("t.parquet")) == encoded.to_pylist()


def test_parquet_is_read_in_pieces(tmp_path: Path) -> None:
    """One row group of 16 megabytes costs a few of them (a page, a thousand rows of a usual writer), not all."""
    import tracemalloc  # Arrow reads a Python file into Python's memory

    rng = np.random.default_rng(0)
    pa_column = pa.array([rng.bytes(2048) for _ in range(8 * 1024)], pa.binary())
    pq.write_table(pa.table({"image": pa_column}), "t.parquet", use_dictionary=False, compression="none")
    del pa_column
    before, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    for item in find_pictures("t.parquet"):
        assert isinstance(item, Picture)
        assert len(item.read()) == 2048
        most = max(most, pa.total_allocated_bytes() - before)
    most += tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 8 * 2**20


# -- as other libraries write tables


def _writes_views() -> bool:
    views = [pa.array(["x"], pa.string_view()), pa.array([b"x"], pa.binary_view())]
    try:
        pq.write_table(pa.table(views, names=["text", "bytes"]), pa.BufferOutputStream())
    except pa.ArrowNotImplementedError:
        return False
    return True


needs_views = pytest.mark.skipif(not _writes_views(), reason="an old pyarrow cannot write views to Parquet")


@needs_views
@pytest.mark.parametrize(
    "labels",
    [
        pa.array(["cat", None, "dog"]).dictionary_encode(),
        pa.array(["cat", None, "dog"], pa.string_view()),
    ],
    ids=["categories", "views"],
)
def test_columns_of_text_of_every_kind(labels: pa.Array) -> None:
    for name in ("1.png", "2.png", "3.png"):
        Path(name).write_bytes(png(int(name[0])))
    paths = pa.array(["1.png", "2.png", "3.png"])
    for column in (paths, paths.dictionary_encode(), paths.cast(pa.string_view())):
        pq.write_table(pa.table({"path": column, "label": labels}), "l.parquet")
        found = search_pictures("l.parquet").pictures
        assert names(found) == ["1.png", "2.png", "3.png"]
        assert [label_of(item) for item in found] == ["cat", None, "dog"]


@needs_views
def test_pictures_as_views_and_labels_of_every_kind_whatever_the_capitals() -> None:
    pictures = pa.array([png(1), png(2)], pa.binary_view())
    kinds = [([True, False], ["True", "False"]), ([1.0, 2.5], ["1", "2.5"]), ([3, None], ["3", None])]
    for values, expected in kinds:
        pq.write_table(pa.table({"Image": pictures, " Label": pa.array(values)}), "t.parquet")
        found = find_pictures("t.parquet")
        assert read_all(found) == [png(1), png(2)]
        assert [label_of(item) for item in found] == expected
