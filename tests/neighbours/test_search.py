"""`SearchIndex` and `dinokit search`."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import SearchIndex, load_backbone
from dinokit.cli import cli
from dinokit.errors import ModelError, UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.tables.embeddings import read_embeddings

pytest.importorskip("onnxruntime")


def vectors(count: int, dim: int = 24, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, dim)) * rng.uniform(0.1, 9, (count, 1))).astype(np.float32)


def cosines(queries: NDArray[np.float32], others: NDArray[np.float32]) -> NDArray[np.float64]:
    """The truth: all of them, in float64."""
    one, two = queries.astype(np.float64), others.astype(np.float64)
    lengths = np.linalg.norm(one, axis=1)[:, None] * np.linalg.norm(two, axis=1)
    similarities: NDArray[np.float64] = one @ two.T / lengths
    return similarities


# -- in Python


def test_the_nearest_are_those_of_all_cosines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.neighbours.nearest._REFERENCES", 64)  # several blocks
    table, queries = vectors(500), vectors(7, seed=1)
    index = SearchIndex(table)
    similarities, rows = index.search(queries, k=9)
    truth = cosines(queries, table)
    expected = np.argsort(-truth, axis=1)[:, :9]
    np.testing.assert_array_equal(rows, expected)
    np.testing.assert_allclose(similarities, np.take_along_axis(truth, expected, axis=1), atol=1e-6)
    one, its_rows = index.search(queries[3], k=9)
    np.testing.assert_array_equal(its_rows, expected[3])
    assert one.shape == (9,)
    assert len(index) == 500 and index.dim == 24 and index.left_out == 0


def test_vectors_made_in_the_same_program(model: str) -> None:
    backbone = load_backbone(model)
    pictures = [picture(seed=number) for number in range(4)]
    index = SearchIndex(backbone.embed(pictures))
    assert index.search_images(pictures, k=1, backbone=backbone)[1][:, 0].tolist() == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="does not record which model made it"):
        index.search_images(pictures)
    with pytest.raises(UsageError, match=r"expected \(24,\) or \(M, 24\)"):
        SearchIndex(vectors(4)).search_images(pictures, backbone=backbone)


def test_no_rows_and_rows_that_are_no_numbers() -> None:
    index = SearchIndex(vectors(9))
    similarities, rows = index.search_rows([], k=4)
    assert similarities.shape == rows.shape == (0, 4)
    with pytest.raises(UsageError, match="rows are float64; expected whole numbers"):
        index.search_rows([1.7])


def test_rows_without_an_embedding_are_never_found_and_keep_their_numbers() -> None:
    table = vectors(40)
    table[[0, 7, 39]] = np.nan
    table[8, 2] = np.inf
    index = SearchIndex(table)
    assert (len(index), index.left_out) == (36, 4)
    similarities, rows = index.search(vectors(2, seed=3), k=100)
    assert similarities.shape == (2, 36)
    fine = np.setdiff1d(np.arange(40), [0, 7, 8, 39])
    truth = cosines(vectors(2, seed=3), table[fine])
    np.testing.assert_array_equal(rows, fine[np.argsort(-truth, axis=1)])
    assert index.has_embedding(1) and not index.has_embedding(7) and not index.has_embedding(40)
    with pytest.raises(UsageError, match="row 7 has no embedding in the table, whose rows are 0 to 39"):
        index.search_rows(7)
    with pytest.raises(UsageError, match="there is no row 40"):
        index.search_rows([1, 40])
    with pytest.raises(UsageError, match="none of its 3 rows has an embedding"):
        SearchIndex(np.full((3, 4), np.nan))


def test_a_row_finds_others_than_itself() -> None:
    table = vectors(60)
    table[[3, 20, 41, 50]] = table[3]  # copies: itself is not always the first of them
    table[11] = np.nan
    index = SearchIndex(table)
    truth = cosines(table, table)
    truth[:, 11] = -2
    np.fill_diagonal(truth, -2)
    asked = [0, 12, 59, 30]
    similarities, rows = index.search_rows(asked, k=5)
    np.testing.assert_array_equal(rows, np.argsort(-truth[asked], axis=1)[:, :5])
    np.testing.assert_allclose(similarities, -np.sort(-truth[asked], axis=1)[:, :5], atol=1e-6)
    for row, others in {3: [20, 41], 41: [3, 20], 50: [3, 20]}.items():
        similarities, rows = index.search_rows(row, k=2)
        assert rows.tolist() == others and similarities == pytest.approx([1, 1])
    _, all_rows = index.search_rows(50, k=1000)
    assert sorted([*all_rows.tolist(), 50, 11]) == list(range(60))
    assert SearchIndex(table[:1]).search_rows(0, k=3)[1].shape == (0,)


@pytest.mark.parametrize("k", [0, -1, 2.5, True])
def test_an_impossible_k(k: int) -> None:
    with pytest.raises(UsageError, match="is invalid; use a whole number, 1 or more"):
        SearchIndex(vectors(4)).search(vectors(1)[0], k=k)


def test_shapes_that_do_not_fit() -> None:
    index = SearchIndex(vectors(4))
    with pytest.raises(UsageError, match=r"the queries have shape \(2, 7\); expected \(24,\) or \(M, 24\)"):
        index.search(np.ones((2, 7)))
    with pytest.raises(UsageError, match="not finite; leave out pictures that failed"):
        index.search(np.full(24, np.nan))
    with pytest.raises(UsageError, match=r"shape \(4,\); expected \(N, D\)"):
        SearchIndex(np.ones(4))
    with pytest.raises(UsageError, match="4 embeddings and 1 paths; expected a path for each row"):
        SearchIndex(vectors(4), ["a"])


# -- at the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "other"
    write_model_folder(path, config_for(), random_weights(seed=1))
    return str(path)


@pytest.fixture(scope="module")
def made(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``photos/0…5.png`` and a broken one, in every format of table."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "photos").mkdir()
    for i in range(6):
        picture(60, 50, seed=i).save(folder / f"photos/{i}.png")
    (folder / "photos/broken.png").write_text("no")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for suffix in ("parquet", "npy", "csv", "jsonl"):
            assert run("embed", "photos", "-o", f"table.{suffix}", "-m", model).exit_code == 1
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def search(*args: str | Path) -> Result:
    return run("search", *args)


def test_pictures_and_rows_in_every_format(here: Path, model: str) -> None:
    picture(70, 50, seed=4).resize((61, 49)).save("new.jpg")
    table = read_embeddings("table.parquet")
    backbone = load_backbone(model)
    truth = cosines(backbone.embed(["new.jpg", "photos/2.png"]), table.embeddings[:6])
    truth[1, 2] = -2  # a row does not find itself
    for suffix in ("parquet", "npy", "csv", "jsonl"):
        result = search("new.jpg", "photos/2.png", "--in", f"table.{suffix}", "-k", "3", "--json")
        assert result.exit_code == 0, result.stderr
        assert result.stderr == f"table.{suffix}: 6 pictures by small, 1 without an embedding are left out\n"
        said = json.loads(result.stdout)
        assert (said["rows"], said["left_out"], said["k"], said["model"]) == (7, 1, 3, "small")
        assert [(q["query"], q["row"]) for q in said["queries"]] == [("new.jpg", None), ("photos/2.png", 2)]
        for query, row in zip(said["queries"], truth, strict=True):
            expected = np.argsort(-row)[:3]
            assert [found["row"] for found in query["found"]] == expected.tolist()
            assert [found["path"] for found in query["found"]] == [f"photos/{i}.png" for i in expected]
            np.testing.assert_allclose([f["similarity"] for f in query["found"]], row[expected], atol=1e-5)


def test_python_says_the_same(here: Path, model: str) -> None:
    picture(70, 50, seed=4).save("new.png")
    index = SearchIndex.read("table.parquet")
    said = json.loads(search("new.png", "--in", "table.parquet", "-k", "2", "--json").stdout)
    found = said["queries"][0]["found"]
    for backbone in (None, load_backbone(model)):
        similarities, rows = index.search_images("new.png", k=2, backbone=backbone)
        assert rows.tolist() == [one["row"] for one in found]
        np.testing.assert_allclose(similarities, [one["similarity"] for one in found], atol=1e-5)
    assert index.search_images(["new.png", "photos/1.png"])[1].shape == (2, 6)
    assert index.row_of("photos/3.png") == index.row_of(here / "photos/3.png") == 3
    assert index.row_of("./photos/../photos/3.png") == 3 and index.row_of("new.png") is None


def test_the_table_on_the_screen(here: Path) -> None:
    result = search("photos/1.png", "photos/5.png", "--in", "table.parquet", "-k", "2", "-q")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["query", "rank", "similarity", "path"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["photos/1.png", "1"],
        ["photos/1.png", "2"],
        ["photos/5.png", "1"],
        ["photos/5.png", "2"],
    ]
    assert result.stderr == ""


def test_vectors_of_another_kind_and_size_are_made_again(here: Path, model: str) -> None:
    args = ("-m", model, "--what", "cls+mean", "--image-size", "48", "--normalize")
    assert run("embed", "photos", "-o", "both.parquet", *args).exit_code == 1
    shutil.copy("photos/3.png", "copy.png")
    said = json.loads(search("copy.png", "--in", "both.parquet", "-k", "1", "--json").stdout)
    (found,) = said["queries"][0]["found"]
    assert found["path"] == "photos/3.png" and found["similarity"] == pytest.approx(1, abs=1e-5)


def test_another_model_is_refused(here: Path, model: str, other_model: str) -> None:
    picture(seed=9).save("new.png")
    result = search("new.png", "--in", "table.parquet", "-m", other_model)
    assert result.exit_code == 2
    assert "table.parquet was made by another model (small from" in result.stderr
    assert "cannot be compared. Choose the same model and size with -m MODEL" in result.stderr
    other = load_backbone(model, image_size=48)
    with pytest.raises(UsageError, match=r"another preprocessing \(crop \[32, 32\] of 37 px\)"):
        SearchIndex.read("table.parquet").search_images("new.png", backbone=other)
    Path("table.npy.origin.json").unlink()
    result = search("new.png", "--in", "table.npy", "-m", model)
    assert result.exit_code == 2 and "table.npy does not record which model made it" in result.stderr
    assert search("photos/1.png", "--in", "table.npy").exit_code == 0  # a row needs no model


def test_a_model_that_was_moved(here: Path, model: str, tmp_path: Path) -> None:
    shutil.copytree(model, "first")
    assert run("embed", "photos", "-o", "moved.parquet", "-m", "first").exit_code == 1
    shutil.move("first", "second")
    picture(seed=9).save("new.png")
    result = search("new.png", "--in", "moved.parquet")
    assert result.exit_code == 3, result.stderr
    assert "moved.parquet was made by small from " in result.stderr
    assert "cannot be loaded now" in result.stderr and "name its new location with -m MODEL" in result.stderr
    with pytest.raises(ModelError, match="If the model was moved"):
        SearchIndex.read("moved.parquet").load_backbone()
    assert search("new.png", "--in", "moved.parquet", "-m", "second").exit_code == 0


def test_a_default_model_does_not_displace_the_tables_own(
    here: Path, other_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DINOKIT_MODEL", other_model)
    picture(seed=9).save("new.png")
    result = search("new.png", "--in", "table.parquet", "-k", "1")
    assert result.exit_code == 0, result.stderr
    monkeypatch.setenv("DINOKIT_SEARCH_MODEL", other_model)  # that one is meant
    result = search("new.png", "--in", "table.parquet", "-k", "1")
    assert result.exit_code == 2 and "was made by another model" in result.stderr


def test_what_cannot_be_looked_for_is_listed_and_the_rest_is_done(here: Path) -> None:
    Path("text.png").write_text("no")
    args = ("photos/0.png", "text.png", "3.png", "photos/broken.png", "none/*.png", "photos/55.png")
    result = search(*args, "--in", "table.parquet", "-k", "1", "--json")
    assert result.exit_code == 1
    assert "Failed: text.png: not a picture but text" in result.stderr
    assert (
        "Failed: 3.png: no such file, and no row of table.parquet has this path. Did you mean photos/3.png?"
        in result.stderr
    )
    assert (
        "Failed: photos/55.png: no such file" in result.stderr
        and "Did you mean photos/5.png?" in result.stderr
    )
    assert "Failed: photos/broken.png: it has no embedding in table.parquet (row 6)" in result.stderr
    assert "Warning: none/*.png: the pattern matches no file" in result.stderr
    said = json.loads(result.stdout)
    assert [bool(query["found"]) for query in said["queries"]] == [True, False, False, False, False]
    assert len(said["problems"]) == 1
    assert [failure["path"] for failure in said["failures"]] == [
        "text.png",
        "3.png",
        "photos/broken.png",
        "photos/55.png",
    ]
    result = search("text.png", "--in", "table.parquet", "--sheet", "s.png")
    assert result.exit_code == 3 and result.stdout == "" and not Path("s.png").exists()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("photos/0.png",), "Missing option '--in'"),
        (("photos/0.png", "--in", "missing.parquet"), "missing.parquet: no such file"),
        (("photos/0.png", "--in", "photos"), "photos is a folder; expected a table"),
        (("photos/0.png", "--in", "table.parquet", "-k", "0"), "0 is not in the range x>=1"),
        (("photos/0.png", "--in", "table.parquet", "--sheet", "s.gif"), "the suffix '.gif' is not known"),
        (("photos/0.png", "--in", "table.parquet", "--sheet", "old.png"), "old.png exists; choose another"),
    ],
)
def test_wrong_usage(here: Path, args: tuple[str, ...], message: str) -> None:
    Path("old.png").write_text("mine")
    result = search(*args)
    assert result.exit_code == 2 and message in result.stderr
    assert Path("old.png").read_text() == "mine"


def test_the_sheet_shows_query_and_neighbours(here: Path) -> None:
    plain = {"red": (200, 30, 30), "blue": (30, 40, 200)}
    for name, colour in plain.items():
        Image.new("RGB", (80, 40), colour).save(f"photos/{name}.png")
    assert run("embed", "photos", "-o", "t.parquet", "-m", read_source("table.parquet")).exit_code == 1
    Path("photos/0.png").unlink()  # a grey square with the reason; the rest is drawn
    result = search("photos/red.png", "photos/1.png", "--in", "t.parquet", "-k", "7", "--sheet", "out/s.png")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out/s.png\n"
    with Image.open("out/s.png") as image:
        sheet = np.asarray(image.convert("RGB")).astype(int)
    for colour in plain.values():
        # Twice or more each 160 x 80 pixels of it, but for the frame: as the query or among what it found.
        assert (np.abs(sheet - colour).sum(axis=2) < 12).sum() > 1.8 * 160 * 80 - 4000
    assert (np.abs(sheet - 0xDD).sum(axis=2) == 0).sum() > 160 * 100  # the one that is gone
    assert (sheet == (11, 138, 143)).all(axis=2).sum() > 2 * 1000  # the frames of the queries
    assert [path.name for path in Path("out").iterdir()] == ["s.png"]
    assert search("photos/1.png", "--in", "t.parquet", "--sheet", "out/s.png", "--overwrite").exit_code == 0


def read_source(table: str) -> str:
    return str(read_embeddings(table).origin["source"])


def test_no_cosine_is_above_one() -> None:
    table = vectors(200, dim=192)
    similarities, _ = SearchIndex(table).search(table, k=1)
    assert similarities.max() <= 1 and similarities.min() > 1 - 1e-6


def test_rows_are_found_by_several_threads_from_the_first_call_on() -> None:
    paths = [Path(f"p/{number}.jpg") for number in range(30_000)]  # as Path, too
    index = SearchIndex(vectors(30_000, dim=2), paths)
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(index.row_of, ["p/29999.jpg"] * 8))
    assert rows == [29_999] * 8
    assert repr(index) == "<SearchIndex of the table: 30000 rows of 2 numbers, 0 left out>"
