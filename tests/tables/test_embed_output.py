"""What `dinokit embed` writes: kinds of vectors, reading tables back, updates, sources from end to end."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeEngine, backbone_of
from numpy.typing import NDArray
from onnx_folder import add_onnx
from small_models import config_for, picture, random_weights

import dinokit
from dinokit import load_backbone, read_embeddings
from dinokit.cli import cli
from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.model_folder.folder import read_model_folder, write_model_folder
from dinokit.sources import find_pictures, search_pictures
from dinokit.tables.arrow import int_column, text_column, vector_column, vectors_of
from dinokit.tables.earlier_rows import EarlierRows, ParquetRows
from dinokit.tables.formats import FILE_SUFFIXES as SUFFIXES
from dinokit.tables.origin import differing_space, must_be_comparable, origin_of, read_origin
from dinokit.tables.run import Interrupted, embed_to_table, parts_folder


class CountingEngine(FakeEngine):
    """Counts the pictures it was shown, padding included; stops as if by Ctrl-C when told to."""

    stop_at = 10**9

    @property
    def count(self) -> int:
        return sum(shape[0] for shape in self.shapes)

    def run(self, pixel_values: NDArray[np.float32], outputs: Any) -> dict[str, NDArray[np.float32]]:
        if len(self.shapes) == self.stop_at:
            raise KeyboardInterrupt
        return super().run(pixel_values, outputs)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


def run(*args: str, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, list(args), input=stdin)


def photos(count: int, folder: str = "photos", start: int = 0) -> list[Path]:
    Path(folder).mkdir(exist_ok=True)
    paths = [Path(folder) / f"{i:03}.png" for i in range(start, start + count)]
    for i, path in enumerate(paths, start):
        picture(30 + i, 40, seed=i).save(path)
    return paths


def settle() -> None:
    """Lets the clock of the file system pass, so that what was written before counts as unchanged."""
    time.sleep(0.08)


# -- which vectors


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_kinds_of_vectors_equal_the_tokens_of_timms_module(model: str, engine: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    pictures = [picture(50 + i, 60, seed=i) for i in range(3)]
    reference = load_backbone(model, engine="torch", device="cpu")
    pixels = torch.from_numpy(np.stack([reference.transform(p) for p in pictures]))
    with torch.no_grad():
        tokens = reference.module.forward_features(pixels)
    cls, mean = tokens[:, 0], tokens[:, 1:].mean(dim=1)
    both = torch.cat([cls, mean], dim=1)
    backbone = load_backbone(model, engine=engine, device="cpu")
    for what, expected in {"cls": cls, "mean": mean, "cls+mean": both}.items():
        got = backbone.embed(pictures, what=what)
        np.testing.assert_allclose(got, expected.numpy(), atol=2e-5)
        unit = torch.nn.functional.normalize(expected, dim=1).numpy()
        got = backbone.embed(pictures, what=what, normalize=True)
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, unit, atol=1e-5)
        assert backbone.embed(pictures[0], what=what).shape == (expected.shape[1],)
        assert backbone.embed([], what=what).shape == (0, expected.shape[1])


def test_registers_are_no_patches() -> None:
    from dinokit.features.pooling import pool

    tokens = np.arange(2 * 7 * 3, dtype=np.float32).reshape(2, 7, 3)  # CLS, two registers, four patches
    outputs = {"pooler_output": tokens[:, 0], "last_hidden_state": tokens}
    got = pool(outputs, ["pooler_output", "last_hidden_state"], n_prefix=3)
    np.testing.assert_allclose(got, np.concatenate([tokens[:, 0], tokens[:, 3:].mean(1)], 1))
    zeros = {"pooler_output": np.zeros((1, 3), np.float32)}
    zeros = pool(zeros, ["pooler_output"], n_prefix=1, normalize=True)
    np.testing.assert_array_equal(zeros, np.zeros((1, 3)))


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="what=None is not known"):
        backbone_of().embed(picture(), what=None)
    with pytest.raises(UsageError, match=r"what='patch' is not known; expected one of cls, mean, cls\+mean"):
        backbone_of().embed(picture(), what="patch")
    result = run("embed", "x", "--what", "patch")
    assert (
        result.exit_code == 2
        and "expected one of cls, mean" in result.stderr
        and "; or patches" in result.stderr
    )
    for what in ("cls:0", "cls:", "cls:2+cls", "mean:2", "cls:-1", "cls:4+patches"):
        with pytest.raises(UsageError, match="is not known"):
            backbone_of().embed(picture(), what=what)
    with pytest.raises(UsageError, match=r"what='cls:1\+mean' is the same as what='cls\+mean'; use that"):
        backbone_of().embed(picture(), what="cls:1+mean")


# -- CLS tokens of inner blocks


def test_last_blocks_are_those_of_timms_module(model: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    pictures = [picture(50 + i, 60, seed=i) for i in range(3)]
    reference = load_backbone(model, engine="torch", device="cpu")
    pixels = torch.from_numpy(np.stack([reference.transform(p) for p in pictures]))
    depth = len(reference.module.blocks)
    with torch.no_grad():
        layers = reference.module.get_intermediate_layers(
            pixels, n=depth, return_prefix_tokens=True, norm=True
        )
    cls = [prefix[:, 0] for _, prefix in layers]
    mean = layers[-1][0].mean(dim=1)
    for engine in ("onnx", "torch"):
        backbone = load_backbone(model, engine=engine, device="cpu")
        for what, parts in {
            "cls:2": cls[-2:],
            f"cls:{depth}": cls,
            "cls:2+mean": [*cls[-2:], mean],
        }.items():
            expected = torch.cat(parts, dim=1).numpy()
            got = backbone.embed(pictures, what=what)
            np.testing.assert_allclose(got, expected, atol=2e-5)
            assert backbone.embed([], what=what).shape == (0, expected.shape[1])
        unit = backbone.embed(pictures, what="cls:2", normalize=True)
        np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
        with pytest.raises(
            UsageError, match=f"has {depth} blocks, too few for what='cls:99'; at most cls:{depth}"
        ):
            backbone.embed([], what="cls:99")


def test_a_table_of_last_blocks_finds_its_pictures(model: str) -> None:
    paths = photos(4)
    result = run("embed", "photos", "-m", model, "-o", "t.parquet", "--what", "cls:2")
    assert result.exit_code == 0, result.stderr
    assert ": 96 numbers per picture" in result.stderr
    table = read_embeddings("t.parquet")
    assert (table.origin["what"], table.embeddings.shape) == ("cls:2", (4, 96))
    shutil.copy(paths[2], "query.png")
    found = run("search", "query.png", "--in", "t.parquet", "-m", model, "-k", "1", "--json")
    (nearest,) = json.loads(found.stdout)["queries"][0]["found"]
    assert nearest["path"] == str(paths[2]) and nearest["similarity"] == pytest.approx(1, abs=1e-5)
    other = run("embed", "photos", "-m", model, "-o", "t.parquet", "--what", "cls")
    assert other.exit_code == 2 and "cls:2" in other.stderr


def test_a_file_with_the_last_block_only_says_so(model: str) -> None:
    photos(2)
    lone = shutil.copy(add_onnx(read_model_folder(model)), "lone.onnx")
    result = run("embed", "photos", "-m", lone, "-o", "t.parquet", "--what", "cls:2")
    assert result.exit_code == 2
    assert "the last block's tokens only" in result.stderr
    assert not list(Path.cwd().glob("t.parquet*"))
    deep = run("embed", "photos", "-m", model, "-o", "t.parquet", "--what", "cls:99")
    assert deep.exit_code == 2 and "too few for what='cls:99'" in deep.stderr


def test_the_table_says_which_vectors_it_holds(model: str) -> None:
    paths = photos(3)
    result = run("embed", "photos", "-m", model, "-o", "t.npy", "--what", "cls+mean", "--normalize")
    assert result.exit_code == 0, result.stderr
    assert ": 96 numbers per picture" in result.stderr
    table = read_embeddings("t.npy")
    assert table.embeddings.shape == (3, 96)
    assert (table.origin["what"], table.origin["normalize"], table.origin["embed_dim"]) == (
        "cls+mean",
        True,
        96,
    )
    expected = load_backbone(model, device="cpu").embed(paths, what="cls+mean", normalize=True)
    np.testing.assert_allclose(table.embeddings, expected, atol=1e-5)
    run("embed", "photos", "-m", model, "-o", "t.parquet", "--normalize")
    assert read_embeddings("t.parquet").origin["normalize"] is True
    assert read_embeddings("t.parquet").origin["what"] == "cls"


def test_tables_of_other_vectors_are_not_mixed(model: str) -> None:
    backbone = backbone_of()
    cls, mean = origin_of(backbone), origin_of(backbone, what="mean")
    assert differing_space(cls, mean) == ["what"]
    assert differing_space(cls, origin_of(backbone, normalize=True)) == []  # cosines are the same
    before = {key: value for key, value in cls.items() if key not in ("what", "normalize")}
    assert differing_space(before, cls) == []  # tables from before there was a choice
    with pytest.raises(UsageError, match=r"a holds other vectors \(cls\) than b \(mean\), by the same model"):
        must_be_comparable(cls, "a", mean, "b")
    Path("labelled").mkdir()
    for label in ("cat", "dog"):
        photos(2, f"labelled/{label}")
    assert run("embed", "labelled", "-m", model, "-o", "l.parquet", "--what", "mean").exit_code == 0
    assert run("embed", "labelled", "-m", model, "-o", "q.parquet", "--what", "cls").exit_code == 0
    result = run("knn", "--reference", "l.parquet", "q.parquet")
    assert result.exit_code == 2
    assert "l.parquet holds other vectors (mean) than q.parquet (cls)" in result.stderr
    # Photographs are embedded as the table was.
    shutil.copy("labelled/cat/000.png", "new.png")
    result = run("knn", "--reference", "l.parquet", "new.png", "-m", model, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"][0]["similarities"][0] == pytest.approx(1, abs=1e-5)
    # Nor do they stand in one table, or in the parts of an interrupted run.
    paths = photos(3)
    embed_to_table(paths, "t.parquet", backbone)
    for options in ({"what": "mean"}, {"normalize": True}):
        message = r"made with other vectors \(what=cls, normalize=False; now what=[^,]*, normalize=[^,]*\).*--overwrite"
        with pytest.raises(UsageError, match=message):
            embed_to_table(paths, "t.parquet", backbone, **options)
        with pytest.raises(UsageError, match=message):
            embed_to_table(photos(4), "t.parquet", backbone, update=True, **options)


def test_a_table_in_another_precision_is_not_by_another_model() -> None:
    engine = FakeEngine()
    embed_to_table(photos(3), "t.parquet", backbone_of(engine))
    engine.precision = "bf16"
    with pytest.raises(
        UsageError,
        match=r"made with other vectors \(what=cls, normalize=False, precision=fp32; "
        r"now what=cls, normalize=False, precision=bf16\)",
    ):
        embed_to_table(photos(3), "t.parquet", backbone_of(engine))


def test_labels_of_pictures_in_archives_are_their_folders_there(model: str) -> None:
    for label in ("cat", "dog"):
        Path(f"shards/{label}").mkdir(parents=True)
        photos(2, f"shards/{label}")
    for shard_name in ("1.tar", "2.tar"):
        with tarfile.open(shard_name, "w") as archive:
            archive.add("shards/cat", "cat")
            archive.add("shards/dog", "dog")
    assert run("embed", "1.tar", "2.tar", "-m", model, "-o", "l.parquet").exit_code == 0
    result = run("knn", "--reference", "l.parquet", "1.tar", "-m", model, "--json", "-k", "1")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["classes"] == {"cat": 4, "dog": 4}
    assert [row["path"] for row in summary["rows"]] == [str(item) for item in find_pictures("1.tar")]


# -- reading


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_read_embeddings_gives_all_columns(suffix: str) -> None:
    paths: list[Any] = [*photos(3), Path("gone.png")]
    embed_to_table(paths, f"t{suffix}", backbone_of())
    table = dinokit.read_embeddings(f"t{suffix}")
    assert len(table) == 4
    assert table.paths == [str(path) for path in paths]
    assert table.sizes == [(30, 40), (31, 40), (32, 40), None]
    assert table.errors == [None, None, None, "no such file"]
    assert table.embeddings.dtype == np.float32
    np.testing.assert_allclose(table.embeddings[:3], backbone_of().embed(paths[:3]), atol=1e-6)
    assert np.isnan(table.embeddings[3]).all()
    assert table.origin["model"] == "fake"
    vectors, names, origin = table
    assert vectors is table.embeddings
    assert (names, origin) == (table.paths, table.origin)
    with pytest.raises(AttributeError):
        table.paths = []  # type: ignore[misc]


def test_tables_that_others_wrote() -> None:
    kind = pa.list_(pa.float32(), 2)
    pq.write_table(pa.table({"path": ["a"], "embedding": pa.array([[1.0, 2.0]], kind)}), "t.parquet")
    table = read_embeddings("t.parquet")
    assert (table.errors, table.sizes, table.origin) == ([None], [None], {})
    np.testing.assert_array_equal(table.embeddings, [[1, 2]])


@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float64(), 2)]
)
def test_vectors_as_pandas_and_datasets_write_them(kind: Any) -> None:
    rows = [[1.0, 2.0], None, [3.0, 4.0]]
    try:
        pq.write_table(pa.table({"path": ["a", "b", "c"], "embedding": pa.array(rows, kind)}), "t.parquet")
    except pa.ArrowNotImplementedError:
        pytest.skip("pyarrow 16 does not write lists of fixed size beside missing ones")
    table = read_embeddings("t.parquet")
    np.testing.assert_array_equal(table.embeddings, [[1, 2], [np.nan, np.nan], [3, 4]])
    chunked = pa.chunked_array([pa.array([[9.0, 9.0], *rows], kind).slice(1), pa.array(rows, kind)])
    np.testing.assert_array_equal(
        vectors_of(pa.table({"embedding": chunked}))[2:5:2], [[3, 4], [np.nan, np.nan]]
    )


def write(name: str, data: bytes) -> str:
    Path(name).write_bytes(data)
    return name


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.csv", b"", "it is empty"),
        ("a.csv", b"path;e0\na;1\n", "'path;e0'; expected the columns path and e0"),
        ("a.csv", b"file,e0\na,1\n", "expected the columns path and e0"),
        ("a.jsonl", b"[1]\n", "is not a table of embeddings"),
        ("a.jsonl", b'{"embedding": [1]}\n', "it has no 'path'"),
        ("a.npy", b"", "is not a table of embeddings"),
    ],
)
def test_tables_that_are_none(name: str, data: bytes, says: str) -> None:
    with pytest.raises(DinokitError, match=says):
        read_embeddings(write(name, data))


def test_parquet_that_is_no_table() -> None:
    uneven = pa.table({"path": ["a", "b"], "embedding": [[1.0, 2.0], [1.0]]})
    pq.write_table(uneven, "u.parquet")
    with pytest.raises(DinokitError, match="has 2 numbers in its first row, but not in row 1"):
        read_embeddings("u.parquet")
    pq.write_table(pa.table({"path": ["a"], "embedding": [["x"]]}), "t.parquet")
    with pytest.raises(DinokitError, match="expected the same number of floats in each row"):
        read_embeddings("t.parquet")
    pq.write_table(uneven.drop_columns("path").slice(0, 1), "n.parquet")
    with pytest.raises(DinokitError, match="1 vectors and 0 paths; expected a column 'path'"):
        read_embeddings("n.parquet")


def test_a_csv_that_excel_saved() -> None:
    assert read_embeddings(write("a.csv", "\ufeffpath,e0\nä.jpg,1\n".encode())).paths == ["ä.jpg"]


def test_a_folder_of_photographs_is_no_table() -> None:
    Path("photos").mkdir()
    with pytest.raises(
        UsageError, match=r"photos is a folder; .*dinokit embed photos -o embeddings\.parquet"
    ):
        read_embeddings("photos")


def test_arrow_columns_equal_pyarrows_own() -> None:
    texts = ["größe", None, "", 'a,\n"b"', None]
    assert text_column(texts).equals(pa.array(texts, pa.string()))
    assert int_column([1, None, -3]).equals(pa.array([1, None, -3], pa.int32()))
    assert text_column([]).equals(pa.array([], pa.string()))
    rng = np.random.default_rng(0)
    rows: list[Any] = [None if i % 5 == 2 else rng.random(3).astype(np.float32).tolist() for i in range(23)]
    theirs = pa.array(rows, pa.list_(pa.float32(), 3))
    filled = np.array([[0, 0, 0] if row is None else row for row in rows], np.float32)
    ours = vector_column(filled, [row is None for row in rows])
    assert ours.equals(theirs)
    ours.validate(full=True)
    expected = np.array([[np.nan] * 3 if row is None else row for row in rows], np.float32)
    chunked = pa.table({"embedding": pa.chunked_array([theirs[:4], theirs[4:9].slice(1), theirs[9:]])})
    np.testing.assert_array_equal(vectors_of(chunked), np.delete(expected, 4, axis=0))
    np.testing.assert_array_equal(vectors_of(chunked.slice(7, 9)), np.delete(expected, 4, axis=0)[7:16])
    whole = pa.table({"embedding": pa.array([[1.0], [2.0]], pa.list_(pa.float32(), 1))})
    np.testing.assert_array_equal(vectors_of(whole.slice(1)), [[2]])


# -- update


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_update_embeds_only_what_is_new(suffix: str) -> None:
    output = f"t{suffix}"
    old = photos(12)
    Path("photos/bad.png").write_bytes(b"")
    settle()
    embed_to_table(find_pictures("photos"), output, backbone_of(), shard_size=5, batch_size=3)
    before = read_embeddings(output)
    time.sleep(0.02)

    photos(2, start=20)
    old[3].unlink()
    picture(99, 99, seed=9).save(old[5])
    engine = CountingEngine()
    pictures = find_pictures("photos")
    with pytest.raises(UsageError, match=r"from other inputs.*give --update \(update=True\)"):
        embed_to_table(pictures, output, backbone_of())
    summary = embed_to_table(pictures, output, backbone_of(engine), shard_size=5, batch_size=3, update=True)
    assert (summary.rows, summary.kept, summary.failed) == (14, 10, 1)
    assert engine.count == 4  # two new, one changed, and the place of the one that cannot be read
    after = read_embeddings(output)
    assert after.paths == [str(path) for path in pictures]
    fine = [i for i, error in enumerate(after.errors) if error is None]
    np.testing.assert_allclose(
        after.embeddings[fine], backbone_of().embed([pictures[i] for i in fine]), atol=1e-6
    )
    assert after.sizes[after.paths.index(str(old[5]))] == (99, 99)
    kept = after.paths.index(str(old[7]))
    np.testing.assert_array_equal(after.embeddings[kept], before.embeddings[before.paths.index(str(old[7]))])
    assert after.origin["failed"] == 1
    assert not parts_folder(Path(output)).exists()

    Path("photos/bad.png").unlink()
    settle()
    embed_to_table(find_pictures("photos"), output, backbone_of(), overwrite=True)
    photos(1, start=40)
    summary = embed_to_table(find_pictures("photos"), output, backbone_of(CountingEngine()), update=True)
    assert (summary.rows, summary.kept, summary.failed) == (14, 13, 0)
    again = embed_to_table(find_pictures("photos"), output, backbone_of(CountingEngine()), update=True)
    assert again.already_done


def test_the_second_of_two_embeds_leaves_the_parts_of_the_first_alone() -> None:
    paths = photos(6)
    embed_to_table(paths, "t.parquet", backbone_of())

    class Meanwhile(FakeEngine):
        def run(self, pixel_values: NDArray[np.float32], outputs: Any) -> dict[str, NDArray[np.float32]]:
            if len(self.shapes) == 2:
                code = (
                    "import sys; sys.path.insert(0, sys.argv[1]); from fake_engine import backbone_of; "
                    "from dinokit.sources import find_pictures; from dinokit.tables.run import embed_to_table; "
                    "print(embed_to_table(sorted(find_pictures('photos')), 't.parquet', backbone_of()).already_done)"
                )
                tests = str(Path(__file__).parents[1] / "support")
                done = subprocess.run([sys.executable, "-c", code, tests], capture_output=True, text=True)
                assert done.stdout == "True\n", done.stderr
            return super().run(pixel_values, outputs)

    embed_to_table(paths, "t.parquet", backbone_of(Meanwhile()), shard_size=2, batch_size=2, overwrite=True)
    assert len(read_embeddings("t.parquet")) == 6 and not parts_folder(Path("t.parquet")).exists()


@pytest.mark.parametrize("there", [True, False])
def test_an_interrupted_overwrite_is_resumed_by_the_same_call(there: bool) -> None:
    paths, parts = photos(6), parts_folder(Path("t.parquet"))
    if there:
        embed_to_table(paths, "t.parquet", backbone_of(sha="b" * 64))
    engine = CountingEngine()
    engine.stop_at = 2
    options: dict[str, Any] = {"shard_size": 2, "batch_size": 2, "overwrite": True}
    with pytest.raises(Interrupted):
        embed_to_table(paths, "t.parquet", backbone_of(engine), **options)
    begun = parts_folder(Path("t.parquet")) / "manifest.json"
    text = begun.read_text()
    if there:
        # The old table's own call finds it done, and another's call says what to do; neither costs the parts.
        assert embed_to_table(paths, "t.parquet", backbone_of(sha="b" * 64)).already_done
        with pytest.raises(UsageError, match="give --overwrite"):
            embed_to_table(paths, "t.parquet", backbone_of())
    assert embed_to_table(paths, "t.parquet", backbone_of(), **options).resumed == 4
    # Parts of a run that has ended, as when it is killed before its last step, are resumed by none.
    parts.mkdir()
    begun.write_text(text)
    assert embed_to_table(paths, "t.parquet", backbone_of(), **options).resumed == 0
    parts.mkdir()
    begun.write_text(text)
    assert embed_to_table(paths, "t.parquet", backbone_of()).already_done and not parts.exists()


def test_an_interrupted_overwrite_of_other_pictures_starts_over() -> None:
    paths = photos(6)
    engine = CountingEngine()
    engine.stop_at = 2
    options: dict[str, Any] = {"shard_size": 2, "batch_size": 2, "overwrite": True}
    with pytest.raises(Interrupted):
        embed_to_table(paths, "t.parquet", backbone_of(engine), **options)
    picture(99, 99).save(paths[0])
    assert embed_to_table(paths, "t.parquet", backbone_of(), **options).resumed == 0


def with_labels(labels: dict[str, str]) -> Any:
    Path("list.csv").write_text("path,label\n" + "".join(f"{path},{text}\n" for path, text in labels.items()))
    return find_pictures(["list.csv"])


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_changed_labels_are_noticed_and_taken_by_update(suffix: str) -> None:
    labels = {str(path): "cat" for path in photos(4)}
    output = f"t{suffix}"
    time.sleep(0.1)
    embed_to_table(with_labels(labels), output, backbone_of())
    assert embed_to_table(with_labels(labels), output, backbone_of()).already_done
    labels["photos/001.png"] = "dog"
    with pytest.raises(UsageError, match=r"made with other labels .*--update"):
        embed_to_table(with_labels(labels), output, backbone_of())
    engine = CountingEngine()
    summary = embed_to_table(with_labels(labels), output, backbone_of(engine), update=True)
    assert (summary.kept, engine.count) == (4, 0)
    assert read_embeddings(output).labels == ["cat", "dog", "cat", "cat"]


def test_a_table_without_a_checksum_of_its_labels_is_done_if_they_are_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As tables were written before."""
    labels = {str(path): "cat" for path in photos(4)}
    for output, what in (("t.csv", "cls"), ("t.parquet", "patches")):
        with monkeypatch.context() as patch:
            patch.setattr("dinokit.tables.run.labels_in_origin", lambda pictures: {})
            embed_to_table(with_labels(labels), output, backbone_of(), what=what)
        assert "labels_sha256" not in read_origin(output)
        assert embed_to_table(with_labels(labels), output, backbone_of(), what=what).already_done
        with pytest.raises(UsageError, match="other labels"):
            embed_to_table(with_labels(labels | {"photos/001.png": "dog"}), output, backbone_of(), what=what)


def test_a_resumed_run_does_not_mix_old_and_new_labels() -> None:
    labels = {str(path): "cat" for path in photos(6)}
    engine = CountingEngine()
    engine.stop_at = 2
    time.sleep(0.1)
    with pytest.raises(Interrupted):
        embed_to_table(with_labels(labels), "t.parquet", backbone_of(engine), shard_size=2, batch_size=2)
    labels = dict.fromkeys(labels, "dog")
    summary = embed_to_table(with_labels(labels), "t.parquet", backbone_of(), shard_size=2, batch_size=2)
    assert summary.resumed == 4
    assert read_embeddings("t.parquet").labels == ["dog"] * 6


def test_a_folder_in_the_place_of_the_table_is_refused_before_the_work(model: str) -> None:
    Path("dir.parquet").mkdir()
    engine = CountingEngine()
    for options in ({}, {"overwrite": True}):
        with pytest.raises(UsageError, match=r"dir\.parquet is a folder; expected the name of a table"):
            embed_to_table(photos(1), "dir.parquet", backbone_of(engine), **options)
    assert not engine.shapes
    result = run("embed", "photos", "-m", "no model", "-o", "dir.parquet", "--overwrite")
    assert result.exit_code == 2 and "dir.parquet is a folder" in result.stderr


def test_update_notices_an_older_file_in_the_place_of_another() -> None:
    paths = photos(3)
    picture(77, 77, seed=5).save("older.png")
    os.utime("older.png", (1e9, 1e9))
    settle()
    embed_to_table(paths, "t.parquet", backbone_of())
    Path("older.png").replace(paths[1])
    summary = embed_to_table(paths, "t.parquet", backbone_of(), update=True)
    assert summary.kept == (2 if os.name != "nt" else 3)
    assert read_embeddings("t.parquet").sizes[1] == (77, 77)


def test_update_tells_of_a_table_that_knows_none_of_the_pictures(model: str) -> None:
    photos(2)
    assert run("embed", "photos", "-m", model, "-o", "t.parquet").exit_code == 0
    time.sleep(0.08)
    same = run("embed", "photos", "./photos/001.png", "-m", model, "-o", "t.parquet", "--update")
    assert same.exit_code == 0 and "Note: no row" not in same.stderr
    other = run("embed", str(Path("photos").absolute()), "-m", model, "-o", "t.parquet", "--update")
    assert other.exit_code == 0
    assert "no row of the old t.parquet is of one of these pictures; its first was of photos/" in other.stderr


def test_update_tries_again_what_failed() -> None:
    paths = [*photos(2), Path("photos/late.png")]
    settle()
    assert embed_to_table(paths, "t.csv", backbone_of()).failed == 1
    picture().save("photos/late.png")
    summary = embed_to_table(paths, "t.csv", backbone_of(), update=True)
    assert (summary.kept, summary.embedded, summary.failed) == (2, 3, 0)


def test_update_tries_again_where_no_file_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed may have lacked memory, or a codec that is installed by now."""
    paths = photos(3)
    settle()
    read = dinokit.tables.shards.decode_picture_with_extent

    def none_of_the_second(item: Any, *args: Any, **named: Any) -> Any:
        return read(b"" if item == paths[1] else item, *args, **named)

    with monkeypatch.context() as patch:
        patch.setattr("dinokit.tables.shards.decode_picture_with_extent", none_of_the_second)
        assert embed_to_table(paths, "t.parquet", backbone_of()).failed == 1
    summary = embed_to_table(paths, "t.parquet", backbone_of(), update=True)
    assert (summary.kept, summary.embedded, summary.failed) == (2, 3, 0)


def test_update_in_another_order_and_from_archives() -> None:
    paths = photos(6)
    for name in ("a.tar", "b.tar"):
        with tarfile.open(name, "w") as archive:
            archive.add("photos")
    settle()
    embed_to_table(find_pictures(["photos", "a.tar", "b.tar"]), "t.parquet", backbone_of(), shard_size=4)
    time.sleep(0.02)
    with tarfile.open("b.tar", "a") as archive:
        archive.add("photos/001.png", "new.png")
    engine = CountingEngine()
    pictures = find_pictures(["b.tar", *reversed(paths), "a.tar"])
    summary = embed_to_table(pictures, "t.parquet", backbone_of(engine), shard_size=4, update=True)
    assert (summary.rows, summary.kept) == (19, 12)  # of b.tar nothing is known any more
    assert engine.count <= 9
    table = read_embeddings("t.parquet")
    assert table.paths == [str(item) for item in pictures]
    np.testing.assert_allclose(table.embeddings, backbone_of().embed(pictures), atol=1e-6)


def test_an_interrupted_update_keeps_the_old_table_and_goes_on() -> None:
    photos(10)
    settle()
    embed_to_table(find_pictures("photos"), "t.parquet", backbone_of(), shard_size=5)
    before = Path("t.parquet").read_bytes()
    time.sleep(0.02)
    photos(10, start=30)
    engine = CountingEngine()
    engine.stop_at = 1
    pictures = find_pictures("photos")
    with pytest.raises(Interrupted) as caught:
        embed_to_table(pictures, "t.parquet", backbone_of(engine), shard_size=5, batch_size=5, update=True)
    assert caught.value.done == 15
    assert Path("t.parquet").read_bytes() == before
    summary = embed_to_table(pictures, "t.parquet", backbone_of(), shard_size=5, update=True)
    assert (summary.resumed, summary.rows) == (15, 20)
    np.testing.assert_allclose(
        read_embeddings("t.parquet").embeddings, backbone_of().embed(pictures), atol=1e-6
    )


def test_update_refuses_tables_of_others() -> None:
    paths = photos(2)
    embed_to_table(paths[:1], "t.parquet", backbone_of())
    with pytest.raises(UsageError, match=r"by another model .* cannot be kept with new ones.*--overwrite"):
        embed_to_table(paths, "t.parquet", backbone_of(sha="b" * 64), update=True)
    Path("s.csv").write_text("my,own\n")
    with pytest.raises(UsageError, match=r"s\.csv exists, not made by this command"):
        embed_to_table(paths, "s.csv", backbone_of(), update=True)
    assert Path("s.csv").read_text() == "my,own\n"
    # Where nothing is there, update is an ordinary run.
    assert embed_to_table(paths, "n.parquet", backbone_of(), update=True).embedded == 2


def test_update_from_the_shell(model: str) -> None:
    photos(3)
    settle()
    arguments = ("embed", "photos", "-m", model, "-o", "t.parquet", "--update")
    assert run(*arguments).exit_code == 0
    photos(1, start=8)
    settle()
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert "4 embedded, 3 of them kept from the existing table" in result.stderr
    photos(1, start=9)
    assert json.loads(run(*arguments, "--json").stdout)["kept"] == 4
    assert run(*arguments, "--overwrite").exit_code == 2


# -- batches that fit


class TightEngine(FakeEngine):
    """Has memory for so many pictures at a time, and says so as one of the engines would."""

    def __init__(self, fits: int, error: BaseException) -> None:
        super().__init__()
        self.fits, self.error, self.refused = fits, error, 0

    def run(self, pixel_values: NDArray[np.float32], outputs: Any) -> dict[str, NDArray[np.float32]]:
        if len(pixel_values) > self.fits:
            self.refused += 1
            raise ModelError("the model could not run") from self.error
        return super().run(pixel_values, outputs)


OUT_OF_MEMORY = [
    MemoryError(),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[ONNXRuntimeError] : 1 : FAIL : bfc_arena.cc Failed to allocate memory for requested buffer"
    ),
    RuntimeError("std::bad_alloc"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda e: type(e).__name__ + str(e)[:8])
def test_auto_halves_the_batch_and_goes_on(error: BaseException) -> None:
    paths = photos(50)
    expected = backbone_of().embed(paths)
    engine = TightEngine(5, error)
    summary = embed_to_table(paths, "t.parquet", backbone_of(engine), batch_size="auto")
    assert (summary.embedded, summary.failed) == (50, 0)
    np.testing.assert_allclose(read_embeddings("t.parquet").embeddings, expected, atol=1e-6)
    assert max(shape[0] for shape in engine.shapes) in (3, 4, 5)  # kept for all batches that follow
    assert engine.refused <= 3
    np.testing.assert_allclose(
        backbone_of(TightEngine(5, error)).embed(paths, batch_size="auto"), expected, atol=1e-6
    )
    assert backbone_of(TightEngine(5, error)).masks(paths[:9], batch_size="auto").shape[0] == 9


def test_what_does_not_fit_alone_or_is_another_error_is_an_error() -> None:
    paths = photos(9)
    for engine, size in (
        (TightEngine(0, MemoryError()), "auto"),
        (TightEngine(5, ValueError("other")), "auto"),
        (TightEngine(5, MemoryError()), 9),  # a number that was asked for is a number
    ):
        choice: Any = size
        with pytest.raises(ModelError, match="could not run"):
            embed_to_table(paths, "t.parquet", backbone_of(engine), batch_size=choice, overwrite=True)


def test_batch_size_on_the_command_line(model: str) -> None:
    photos(3)
    assert run("embed", "photos", "-m", model, "-b", "auto", "-o", "a.csv").exit_code == 0
    assert run("embed", "photos", "-m", model, "-b", "2", "-o", "b.csv").exit_code == 0
    np.testing.assert_allclose(
        read_embeddings("a.csv").embeddings, read_embeddings("b.csv").embeddings, atol=1e-5
    )
    for wrong in ("0", "-1", "much", "1.5"):
        result = run("embed", "photos", "-m", model, "-b", wrong)
        assert result.exit_code == 2
        assert "expected a number from 1, or auto" in result.stderr


# -- sources, from the shell


def shard(name: str, count: int) -> None:
    with tarfile.open(name, "w:gz") as archive:
        for i in range(count):
            file = io.BytesIO()
            picture(30 + i % 50, 40, seed=i).save(file, "PNG")
            info = tarfile.TarInfo(f"{i:04}.png")
            info.size = file.tell()
            file.seek(0)
            archive.addfile(info, file)


def test_every_source_gives_the_same_vectors_in_the_order_of_the_arguments(model: str) -> None:
    paths = photos(5)
    with tarfile.open("a.tar", "w") as archive:
        archive.add("photos")
    Path("l.csv").write_text("path,label\n" + "".join(f"{path},x\n" for path in paths))
    data = [path.read_bytes() for path in paths]
    pq.write_table(pa.table({"image": pa.array([*data, b"", None], pa.binary())}), "p.parquet")
    listed = b"\n".join(os.fsencode(path) for path in paths)
    result = run("embed", "photos", "a.tar", "l.csv", "p.parquet", "-", "-m", model, "-b", "4", stdin=listed)
    assert result.exit_code == 1, result.stderr
    assert "Failed: p.parquet::5: the file is empty (0 bytes)" in result.stderr
    assert "Failed: p.parquet::6: this row of the table has no picture (null)" in result.stderr
    table = read_embeddings("embeddings.parquet")
    plain = [str(path) for path in paths]
    rows = [f"p.parquet::{i}" for i in range(7)]
    assert table.paths == [*plain, *(f"a.tar::{p}" for p in plain), *plain, *rows, *plain]
    expected = load_backbone(model, device="cpu").embed(paths)
    good = [i for i, error in enumerate(table.errors) if error is None]
    np.testing.assert_allclose(table.embeddings[good], np.concatenate([expected] * 5), atol=1e-5)
    # And the same in Python, from the same names.
    backbone = load_backbone(model, device="cpu")
    for source in ("photos", "a.tar", "l.csv"):
        np.testing.assert_allclose(backbone.embed(source), expected, atol=1e-5)
    np.testing.assert_allclose(backbone.embed(table.paths[:10])[5:], expected, atol=1e-5)
    np.testing.assert_allclose(backbone.embed("a.tar::photos/002.png"), expected[2], atol=1e-5)


def test_nothing_in_the_sources_is_3(model: str) -> None:
    with tarfile.open("empty.tar", "w"):
        pass
    Path("junk.zip").write_bytes(b"junk")
    result = run("embed", "empty.tar", "junk.zip", "-", "-m", model, stdin=b"")
    assert result.exit_code == 3
    assert "Warning: empty.tar: the archive contains no pictures" in result.stderr
    assert "Warning: junk.zip cannot be read as a zip archive" in result.stderr
    assert "Warning: standard input does not name any picture" in result.stderr
    assert "nothing to embed" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="sends SIGKILL")
def test_after_kill_9_the_same_command_repeats_no_finished_part(model: str) -> None:
    source = "b.tar.gz"
    shard(source, 700)
    arguments = ["embed", source, "-m", model, "-o", "o.parquet", "--workers", "1", "-b", "8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dinokit", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    first = Path("o.parquet.parts/000000.parquet")
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    assert first.exists()
    assert not Path("o.parquet").exists()
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["resumed"] >= 256
    table = read_embeddings("o.parquet")
    assert table.paths == [str(item) for item in search_pictures(source).pictures]
    some = [0, 255, 256, 511, 699]
    expected = load_backbone(model, device="cpu").embed([picture(30 + i % 50, 40, seed=i) for i in some])
    np.testing.assert_allclose(table.embeddings[some], expected, atol=1e-5)


def test_what_changed_while_the_run_began_is_not_taken_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """File systems stamp by a coarser clock: what was changed just after may say just before."""
    paths = photos(3)
    settle()
    embed_to_table(paths, "t.parquet", backbone_of())
    began = read_embeddings("t.parquet").origin["began"]
    changed = dict(zip(paths, (began - 1, began - 0.01, began + 1), strict=True))
    monkeypatch.setattr("dinokit.tables.earlier_rows.changed_at", changed.__getitem__)
    assert EarlierRows.of_table(Path("t.parquet")).known(paths).places == [0]


def test_rows_behind_a_file_of_other_columns_keep_their_numbers() -> None:
    embed_to_table(photos(2), "t.parquet", backbone_of())
    pq.write_table(pa.table({"path": ["a", "b", "c"]}), "other.parquet")
    rows = ParquetRows([Path("other.parquet"), Path("t.parquet")])
    assert list(rows.numbers().values()) == [3, 4]
    np.testing.assert_array_equal(rows.fetch([3, 4])[0], read_embeddings("t.parquet").embeddings)
