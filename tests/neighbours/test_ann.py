"""The approximate index: exact similarities, nearly all neighbours, and no other table's."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from dinokit import SearchIndex, read_embeddings
from dinokit.cli import cli
from dinokit.errors import DinokitError, MissingExtraError, UsageError
from dinokit.neighbours.ann import _best
from dinokit.neighbours.nearest import nearest, normalised
from dinokit.tables.embeddings import table_of, write_embeddings

ORIGIN = {"model": "test", "weights_sha256": "0" * 64, "embed_dim": 16, "what": "cls", "rows": 600}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def faiss() -> Any:
    return pytest.importorskip("faiss", reason="faiss is not installed: pip install 'dinokit[ann]'")


def write(name: str = "e.parquet", seed: int = 0, count: int = 600) -> np.ndarray[Any, Any]:
    """A table whose every tenth row has failed."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(count, 16)).astype(np.float32)
    errors = ["broken" if i % 10 == 3 else None for i in range(count)]
    table = table_of([f"{i}.jpg" for i in range(count)], vectors, [None] * count, errors)
    write_embeddings(Path(name), lambda: iter([table]), count, ORIGIN)
    return vectors


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, list(args))


def test_what_is_found_is_exact_and_nearly_all_of_it(faiss: Any) -> None:
    vectors = write()
    result = run("index", "e.parquet", "--json")
    assert result.exit_code == 0, result.stderr
    info = json.loads(result.stdout)
    assert info["output"] == "e.parquet.ann" and info["rows"] == 540 and info["recall_at_10"] > 0.97
    assert "540 vectors in" in result.stderr and "% of the ten nearest" in result.stderr
    exact, near = SearchIndex.read("e.parquet"), SearchIndex.read("e.parquet", index="e.parquet.ann")
    queries = vectors[:100] + 0.1
    (_, rows), (found, numbers) = exact.search(queries, 10), near.search(queries, 10)
    same = np.mean([len(set(a) & set(b)) / 10 for a, b in zip(rows.tolist(), numbers.tolist(), strict=True)])
    assert same > 0.97 and not (numbers % 10 == 3).any()
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    cosines = (queries / np.linalg.norm(queries, axis=1, keepdims=True)) @ unit.T
    np.testing.assert_allclose(found, np.take_along_axis(cosines, numbers, axis=1), atol=1e-5)
    assert (np.diff(found, axis=1) <= 0).all()
    # A row does not find itself, and what is wanted in full is compared with all.
    assert near.search_rows(5, 3)[1].tolist() == exact.search_rows(5, 3)[1].tolist()
    assert near.search(queries[0], 540)[1].tolist() == exact.search(queries[0], 540)[1].tolist()
    # faiss itself opens it.
    assert faiss.read_index("e.parquet.ann/index.faiss").ntotal == 540


def test_the_command(faiss: Any) -> None:
    write()
    assert run("index", "e.parquet", "-o", "i", "-q").stdout == "i\n"
    args = ("search", "7.jpg", "--in", "e.parquet", "-k", "3", "--json")
    exact, near = json.loads(run(*args).stdout), json.loads(run(*args, "--index", "i").stdout)
    assert near["queries"] == exact["queries"] and near["index"] == "i" and exact["index"] is None
    again = run("index", "e.parquet", "-o", "i")
    assert again.exit_code == 2 and "give --overwrite" in again.stderr
    assert run("index", "e.parquet", "-o", "i", "--overwrite").exit_code == 0
    assert [path.name for path in Path().glob(".i*")] == []


def test_an_index_of_another_state_is_refused(faiss: Any) -> None:
    write()
    run("index", "e.parquet", "-q")
    write("other.parquet")  # the same vectors and paths: the same table in another file
    assert run("search", "7.jpg", "--in", "other.parquet", "--index", "e.parquet.ann").exit_code == 0
    write(seed=1)
    result = run("search", "7.jpg", "--in", "e.parquet", "--index", "e.parquet.ann")
    assert result.exit_code == 2 and "is not an index of e.parquet as it is now" in result.stderr
    assert "dinokit index e.parquet -o e.parquet.ann --overwrite" in result.stderr
    write()
    read = read_embeddings("e.parquet")
    paths = ["renamed.jpg", *read.paths[1:]]
    with pytest.raises(UsageError, match="as it is now"):
        SearchIndex(read.embeddings, paths, read.origin, index="e.parquet.ann")
    assert len(SearchIndex(read.embeddings, read.paths, read.origin, index="e.parquet.ann")) == 540
    write(count=601)
    with pytest.raises(UsageError, match="as it is now"):
        SearchIndex.read("e.parquet", index="e.parquet.ann")


def test_what_is_no_index(faiss: Any) -> None:
    write()
    with pytest.raises(UsageError, match=r"nowhere is not an index"):
        SearchIndex.read("e.parquet", index="nowhere")
    Path("mine").mkdir()
    result = run("index", "e.parquet", "-o", "mine", "--overwrite")
    assert result.exit_code == 2 and "left alone" in result.stderr and Path("mine").is_dir()
    run("index", "e.parquet", "-q")
    Path("e.parquet.ann/index.faiss").write_bytes(b"nonsense")
    with pytest.raises(DinokitError, match=r"index\.faiss cannot be read; build the index again"):
        SearchIndex.read("e.parquet", index="e.parquet.ann")
    Path("e.parquet.ann/index.json").write_text("{}")
    with pytest.raises(DinokitError, match=r"index\.json cannot be read"):
        SearchIndex.read("e.parquet", index="e.parquet.ann")
    assert run("index", "nowhere.parquet").exit_code == 2


def test_overwrite_replaces_an_index_and_nothing_else(faiss: Any) -> None:
    write()
    run("index", "e.parquet", "-q")
    info = Path("e.parquet.ann/index.json").read_text()
    for text, extra in (("[1, 2]", None), ('{"format": 1}', None), (info, "notes.txt")):
        folder = Path("mine")
        folder.mkdir()
        (folder / "index.json").write_text(text)
        if extra:
            (folder / extra).write_text("mine")
        result = run("index", "e.parquet", "-o", "mine", "--overwrite")
        assert (
            result.exit_code == 2
            and "is not an index without other files, so it is left alone" in result.stderr
        )
        assert (folder / "index.json").read_text() == text
        shutil.rmtree(folder)
    assert run("index", "e.parquet", "--overwrite").exit_code == 0


def test_a_full_disk_is_an_error(faiss: Any) -> None:
    resource = pytest.importorskip("resource")
    write()
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); from dinokit.cli import main; main()"
    )
    assert resource.RLIMIT_FSIZE is not None
    process = subprocess.run(
        [sys.executable, "-c", code, "index", "e.parquet", "-q"], capture_output=True, text=True
    )
    assert process.returncode == 3 and "e.parquet.ann cannot be written (File too large)" in process.stderr
    assert [path.name for path in Path().iterdir()] == ["e.parquet"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems know no such names")
def test_a_name_that_is_no_utf_8(faiss: Any) -> None:
    write()
    name = os.fsdecode(b"\xff.ann")
    assert run("index", "e.parquet", "-o", name, "-q").exit_code == 0
    assert run("search", "7.jpg", "--in", "e.parquet", "--index", name).exit_code == 0


def test_an_index_of_another_format_is_refused(faiss: Any) -> None:
    write()
    run("index", "e.parquet", "-q")
    file = Path("e.parquet.ann/index.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 2, "of later": 1}))
    with pytest.raises(DinokitError, match=r"is an index of format 2, and dinokit .* reads format 1"):
        SearchIndex.read("e.parquet", index="e.parquet.ann")


def test_the_index_of_another_table_is_not_to_be_replaced(faiss: Any) -> None:
    write()
    write("the other.parquet", seed=1)
    run("index", "e.parquet", "-q")
    result = run("search", "7.jpg", "--in", "the other.parquet", "--index", "e.parquet.ann")
    assert result.exit_code == 2 and "--overwrite" not in result.stderr
    assert "(dinokit index 'the other.parquet') and search with 'the other.parquet'.ann" in result.stderr
    run("index", "the other.parquet", "-q")
    write("the other.parquet", seed=2)
    result = run("search", "7.jpg", "--in", "the other.parquet", "--index", "the other.parquet.ann")
    advice = "dinokit index 'the other.parquet' -o 'the other.parquet.ann' --overwrite"
    assert result.exit_code == 2 and advice in result.stderr


@pytest.mark.parametrize("rows", [600, None])
def test_the_bar_counts_to_its_end(faiss: Any, monkeypatch: pytest.MonkeyPatch, rows: int | None) -> None:
    """Also for a table that does not say how many rows it has, or has some without an embedding."""
    totals: list[int] = []
    monkeypatch.setattr("dinokit.cli._progress._Lines.expect", lambda self, total: totals.append(total))
    monkeypatch.setitem(ORIGIN, "rows", rows)
    write()
    assert run("index", "e.parquet").exit_code == 0
    assert totals == [540]


def test_without_faiss_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    write()
    result = run("index", "e.parquet")
    assert result.exit_code == 3 and "needs faiss-cpu" in result.stderr and "dinokit[ann]" in result.stderr
    with pytest.raises(MissingExtraError, match="faiss-cpu"):
        SearchIndex.read("e.parquet", index="e.parquet.ann")


def test_of_many_copies_any_count_as_found(faiss: Any) -> None:
    vectors = np.tile(np.random.default_rng(1).standard_normal((20, 16)).astype(np.float32), (40, 1))
    table = table_of([f"{i}.jpg" for i in range(800)], vectors, [None] * 800, [None] * 800)
    write_embeddings(Path("e.parquet"), lambda: iter([table]), 800, ORIGIN)
    info = json.loads(run("index", "e.parquet", "--json").stdout)
    assert 0 <= info["recall_at_10"] <= 1


def test_where_the_graph_proposes_too_few_all_are_compared() -> None:
    unit = normalised(np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32))
    proposed = np.full((2, 8), -1)
    proposed[0], proposed[1, :2] = np.arange(8), (48, 49)  # of the second two of three are wanted
    similarities, numbers = _best(unit[:2], unit, proposed, 3)
    exact = nearest(unit[:2], unit[:8], 3)[1][0], nearest(unit[:2], unit, 3)[1][1]
    np.testing.assert_array_equal(numbers, exact)
    np.testing.assert_allclose(similarities, np.einsum("qd,qkd->qk", unit[:2], unit[numbers]), atol=1e-6)
