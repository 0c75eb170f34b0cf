"""Tables that pandas, polars, datasets or a spreadsheet wrote, changed or wrote anew."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from small_models import config_for, picture, random_weights

from dinokit.classifiers.labelled import find_labelled, is_table
from dinokit.cli import cli
from dinokit.errors import DinokitError, UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.tables.embeddings import EmbeddingTable, read_embeddings, table_of, write_embeddings

VECTORS = np.arange(33, dtype=np.float32).reshape(3, 11) / 7


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


# -- CSV


def csv_of(columns: dict[str, list[Any]], name: str = "t.csv") -> EmbeddingTable:
    lines = [",".join(columns), *(",".join(map(str, row)) for row in zip(*columns.values(), strict=True))]
    Path(name).write_text("\n".join(lines) + "\n")
    return read_embeddings(name)


NUMBERS = {f"e{i}": [float(v) for v in VECTORS[:, i]] for i in range(11)}
PATHS = {"path": ["a", "b", "c"]}


@pytest.mark.parametrize(
    "columns",
    [
        PATHS | NUMBERS | {"rating": [1, 2, 3]},
        {"index": [0, 1, 2]}
        | NUMBERS
        | {"width": [4, 5, 6], "height": [7, 8, 9], "label": ["x", "y", ""]}
        | PATHS,
        dict(sorted((PATHS | NUMBERS).items())),  # e0, e1, e10, e2 …
        dict(reversed((PATHS | NUMBERS).items())),
    ],
)
def test_columns_go_by_their_names(columns: dict[str, list[Any]]) -> None:
    table = csv_of(columns)
    np.testing.assert_array_equal(table.embeddings, VECTORS)
    assert table.paths == ["a", "b", "c"]
    if "label" in columns:
        assert table.labels == ["x", "y", None] and table.sizes == [(4, 7), (5, 8), (6, 9)]


def test_a_column_of_numbers_is_missing() -> None:
    with pytest.raises(DinokitError, match="it has 10 columns of numbers, but not e4"):
        csv_of({name: values for name, values in (PATHS | NUMBERS).items() if name != "e4"})


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('path,e0\na,1\n"b,2\nc,3\n', "unexpected end of data"),
        ('path,e0\na,1\n"b,2\n' + "c,3\n" * 50_000, "field larger than field limit"),
        ("path,e0,e1\na,1,2\nb,1\n", "line 3 has 2 values, and the first line 3 columns"),
    ],
)
def test_a_damaged_csv_is_refused(text: str, says: str) -> None:
    Path("t.csv").write_text(text)
    with pytest.raises(DinokitError, match=says):
        read_embeddings("t.csv")


def test_empty_lines_and_sizes_as_pandas_writes_them_beside_missing_ones() -> None:
    Path("t.csv").write_text("path,width,height,error,e0\na,512.0,384.0,,1\n\nb,,,broken,\n\n")
    table = read_embeddings("t.csv")
    assert table.sizes == [(512, 384), None] and table.errors == [None, "broken"]
    Path("t.jsonl").write_text('{"path": "a", "embedding": [1], "width": NaN, "height": NaN}\n\n')
    assert read_embeddings("t.jsonl").sizes == [None]


def test_an_open_quotation_mark_in_a_csv_of_labels() -> None:
    Path("l.csv").write_text('path,label\na/1.jpg,a\na/2.jpg,"a\nb/1.jpg,b\n')
    with pytest.raises(UsageError, match=r"l\.csv cannot be read as CSV \(unexpected end of data\)"):
        find_labelled("l.csv")


# -- columns of other kinds


def parquet_of(metadata: dict[bytes, bytes] | None = None, **columns: Any) -> EmbeddingTable:
    table = pa.table({"path": ["a", "b", "c"], "embedding": list(VECTORS.tolist())} | columns)
    pq.write_table(table.replace_schema_metadata(metadata), "t.parquet")
    return read_embeddings("t.parquet")


CLASSES = {
    b"huggingface": json.dumps(
        {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}}}
    ).encode()
}


@pytest.mark.parametrize(
    ("metadata", "labels", "expected"),
    [
        (None, [0, 1, 2], ["0", "1", "2"]),
        (None, [0.0, 1.0, None], ["0", "1", None]),
        (None, [0.5, float("nan"), 2.0], ["0.5", None, "2"]),
        (None, [False, True, None], ["False", "True", None]),
        (None, ["x", "", None], ["x", None, None]),
        (CLASSES, [0, 1, -1], ["cat", "dog", None]),
    ],
)
def test_labels_are_text(metadata: Any, labels: list[Any], expected: list[str | None]) -> None:
    assert parquet_of(metadata, label=labels).labels == expected


def test_numbered_classes_are_counted_and_judged() -> None:
    rows = np.repeat(np.eye(3, 11, dtype=np.float32), 20, axis=0)
    rows += 0.01 * np.random.default_rng(0).standard_normal(rows.shape).astype(np.float32)
    paths, labels = [f"{i}.jpg" for i in range(60)], [i // 20 for i in range(60)]
    columns: dict[str, Any] = {"path": paths, "embedding": rows.tolist(), "label": labels}
    pq.write_table(pa.table(columns), "t.parquet")
    done = run("eval", "--reference", "t.parquet", "--no-linear", "--json", "-q")
    figures = json.loads(done.stdout)
    assert done.exit_code == 0 and figures["classes"] == {"0": 20, "1": 20, "2": 20}
    assert figures["results"][0]["knn"][0]["top1"]["value"] == 1
    labels[7] = 2
    pq.write_table(pa.table(columns), "t.parquet")
    done = run("knn", "--reference", "t.parquet", "--check", "-o", "s.csv")
    assert done.exit_code == 0 and "7.jpg,2,0" in Path("s.csv").read_text()


def test_paths_are_text() -> None:
    assert parquet_of(path=[None, "b", "c"]).paths == ["", "b", "c"]
    assert parquet_of(path=[7, 8, 9]).paths == ["7", "8", "9"]
    assert parquet_of(path=[b"a", b"\xff", b"c"]).paths == ["a", "\udcff", "c"]
    for command in ("duplicates t.parquet", "search c --in t.parquet", "select t.parquet -n 2"):
        done = run(*command.split())
        assert done.exit_code in (0, 1) and not isinstance(done.exception, TypeError | AttributeError), (
            done.stderr
        )


# -- rows that cannot be compared


def test_a_row_of_infinity_is_left_out_as_one_without_a_vector() -> None:
    rows = (
        np.repeat(np.eye(2, 8, dtype=np.float32), 12, axis=0)
        + np.linspace(0, 0.1, 24, dtype=np.float32)[:, None]
    )
    rows[3, 2] = np.inf
    rows[15] = np.nan
    labels = ["a"] * 12 + ["b"] * 12
    for name in ("t", "q"):
        paths = [f"{name}/{i}.jpg" for i in range(24)]
        table = pa.table({"path": paths, "embedding": rows.tolist(), "label": labels})
        pq.write_table(table.replace_schema_metadata({"dinokit.weights_sha256": "0" * 64}), f"{name}.parquet")
    for command in (
        ["knn", "--check"],
        ["knn", "q.parquet"],
        ["eval", "--queries", "q.parquet", "--no-linear"],
    ):
        done = run(command[0], "--reference", "t.parquet", *command[1:])
        assert done.exit_code == 1, done.stderr  # of what was left out
        for name in ("/3.jpg", "/15.jpg"):
            assert f"{name}: it has no embedding in" in done.stderr


def test_a_row_without_an_embedding_is_reported_with_its_error() -> None:
    rows = np.repeat(np.eye(2, 11, dtype=np.float32), 3, axis=0)
    errors = ["the file is empty", *[None] * 5]
    for name in ("t", "q"):
        table = table_of(
            [f"{name}/{i}.jpg" for i in range(6)], rows, [(1, 1)] * 6, errors, ["a"] * 3 + ["b"] * 3
        )
        origin = {"weights_sha256": "0" * 64}
        write_embeddings(Path(f"{name}.parquet"), lambda table=table: iter([table]), 6, origin)  # type: ignore[misc]
    done = run("knn", "--reference", "t.parquet", "q.parquet")
    assert done.exit_code == 1, done.stderr
    assert "t/0.jpg: it has no embedding in t.parquet (the file is empty); left out" in done.stderr
    assert "q/0.jpg: it has no embedding in q.parquet (the file is empty)" in done.stderr


# -- vectors that are none


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"path": "a", "embedding": [[1, 2], [3, 4]]}', r"its vectors have the shape \(1, 2, 2\)"),
        ('{"path": "a", "embedding": []}', r"its vectors have the shape \(1, 0\)"),
        ('{"path": "a", "embedding": null}', r"its vectors have the shape \(1, 0\)"),
        ('{"path": "a", "embedding": ' + "[" * 100_000, "recursion"),
    ],
)
def test_lines_whose_vectors_are_none(line: str, says: str) -> None:
    Path("t.jsonl").write_text(line + "\n")
    with pytest.raises(DinokitError, match=f"is not a table of embeddings, or it is damaged .*{says}"):
        read_embeddings("t.jsonl")


def test_an_array_of_complex_numbers_is_refused() -> None:
    np.save("t.npy", np.ones((1, 2), complex))
    Path("t.npy.paths.csv").write_text("path\na\n")
    with pytest.raises(DinokitError, match="its numbers are complex128; expected floats"):
        read_embeddings("t.npy")


def test_rows_without_numbers_are_no_table_to_draw_a_map_of() -> None:
    column = pa.array([None, None], pa.list_(pa.float32()))
    pq.write_table(pa.table({"path": ["a", "b"], "embedding": column}), "t.parquet")
    for command in ("atlas t.parquet", "duplicates t.parquet"):
        done = run(*command.split())
        assert done.exit_code == 3 and "its vectors have the shape (2, 0)" in done.stderr


# -- numbers as text


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_any_float32_comes_back_from_text(suffix: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, (300, 11), np.uint64).astype(np.uint32)
    rows = bits.view(np.float32)
    rows[0] = [0, -0.0, 1, 100_000, 16_777_216, 1e-45, 1e-5, 0.1, 3.4e38, np.inf, -np.inf]
    rows[1:] = np.nan_to_num(rows[1:])
    rows[2] = -0.0
    names = [f'{row}, "ä"\n.jpg' for row in range(300)]
    errors = ["broken" if row == 7 else None for row in range(300)]
    table = table_of(names, rows, [None if error else (4, 3) for error in errors], errors)
    write_embeddings(Path(f"t{suffix}"), lambda: iter([table[:100], table[100:]]), 300, {"embed_dim": 11})
    read = read_embeddings(f"t{suffix}")
    rows[7] = np.nan
    np.testing.assert_array_equal(read.embeddings.view(np.uint32), rows.view(np.uint32))
    assert read.paths == names and read.errors == errors and read.sizes[6:8] == [(4, 3), None]


# -- the origin


def filtered_as_by_pandas(name: str) -> None:
    """Writes half of a table again with the metadata that pandas keeps (``DataFrame.attrs``)."""
    table = pq.read_table(name)
    kept = {b"PANDAS_ATTRS": table.schema.metadata[b"PANDAS_ATTRS"], b"pandas": b"{}"}
    half = table.slice(0, len(table) // 2).append_column("rating", pa.array([1] * (len(table) // 2)))
    pq.write_table(half.replace_schema_metadata(kept), name)


def test_pandas_keeps_the_origin_of_the_rows_that_it_selects() -> None:
    pandas = pytest.importorskip("pandas")
    origin = {
        "model": "small",
        "weights_sha256": "a" * 64,
        "preprocessing": {"crop_px": [32, 32]},
        "what": "mean",
    }
    whole = {"rows": 3, "failed": 0, "began": 1.5, "inputs_sha256": "b" * 64, "labels_sha256": "c" * 64}
    table = table_of(["a", "b", "c"], VECTORS, [(1, 1)] * 3, [None] * 3)
    write_embeddings(Path("t.parquet"), lambda: iter([table]), 3, origin | whole)
    frame = pandas.read_parquet("t.parquet")
    frame[frame["path"] != "b"].assign(rating=5).to_parquet("kept.parquet")
    read = read_embeddings("kept.parquet")
    assert read.paths == ["a", "c"] and read.origin == origin | {"revision": None}
    np.testing.assert_array_equal(read.embeddings, VECTORS[[0, 2]])


@pytest.mark.parametrize("attrs", ["{", "[]", '{"dinokit": 3}', '{"dinokit": {"what": 3}}', '{"other": 1}'])
def test_attributes_of_pandas_that_are_not_an_origin(attrs: str) -> None:
    assert parquet_of({b"PANDAS_ATTRS": attrs.encode()}).origin == {}


# -- .npy


def test_an_array_is_a_table_where_its_paths_lie_beside_it() -> None:
    np.save("a.npy", np.zeros((4, 4, 3), np.uint8))
    assert not is_table("a.npy")
    Path("a.npy.paths.csv").write_text("path\n")
    assert is_table("a.npy")


# -- --update


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    config = config_for()
    folder = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(folder, config, random_weights())
    return str(folder)


def without(column: str) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.drop_columns(column)


def with_a_null(table: pa.Table) -> pa.Table:
    column = table.schema.get_field_index("embedding")
    field, rows = table.schema.field(column), table.column(column).to_pylist()
    return table.set_column(column, field, pa.array([None, *rows[1:]], field.type))


@pytest.mark.parametrize("change", [without("error"), without("width"), with_a_null])
def test_update_of_a_table_that_was_written_anew(
    change: Callable[[pa.Table], pa.Table], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dinokit.tables.earlier_rows._MARGIN_S", -60
    )  # these pictures count as older than the run
    Path("photos").mkdir()
    for number in range(3):
        picture(seed=number).save(f"photos/{number}.png")
    assert run("embed", "photos", "-o", "t.parquet", "-m", model, "-q").exit_code == 0
    expected = read_embeddings("t.parquet").embeddings
    pq.write_table(change(pq.read_table("t.parquet")), "t.parquet")
    picture(seed=3).save("photos/3.png")
    done = run("embed", "photos", "-o", "t.parquet", "-m", model, "--update")
    assert done.exit_code == 0, done.stderr
    table = read_embeddings("t.parquet")
    assert len(table.paths) == 4 and table.errors == [None] * 4 and None not in table.sizes
    np.testing.assert_allclose(table.embeddings[:3], expected, atol=1e-6)
    assert np.isfinite(table.embeddings).all()


@pytest.mark.parametrize("options", [[], ["--update"]])
def test_a_table_that_pandas_filtered_is_searched_but_never_replaced(options: list[str], model: str) -> None:
    Path("photos").mkdir()
    for number in range(4):
        picture(seed=number).save(f"photos/{number}.png")
    assert run("embed", "photos", "-o", "t.parquet", "-m", model, "-q").exit_code == 0
    filtered_as_by_pandas("t.parquet")
    found = run("search", "photos/3.png", "--in", "t.parquet", "-k", "1", "--json", "-q")
    assert found.exit_code == 0, found.stderr  # embedded by the model that the table records
    before = Path("t.parquet").read_bytes()
    done = run("embed", "photos", "-o", "t.parquet", "-m", model, *options)
    assert done.exit_code == 2 and "t.parquet exists, not made by this command" in done.stderr
    assert Path("t.parquet").read_bytes() == before
