"""The table of embeddings: formats, bad pictures, batches, interruption and continuation."""

from __future__ import annotations

import csv
import errno
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_engine import EMBED_DIM, FakeEngine, InterruptedEngine, backbone_of
from numpy.typing import NDArray
from small_models import picture

import dinokit.tables.shards
import dinokit.tables.writers
from dinokit._version import __version__
from dinokit.errors import DinokitError, ImageError, UsageError
from dinokit.tables.embeddings import read_embeddings, table_of
from dinokit.tables.formats import FILE_SUFFIXES as SUFFIXES
from dinokit.tables.formats import check_suffix
from dinokit.tables.origin import read_origin
from dinokit.tables.patches import read_patches
from dinokit.tables.run import Interrupted, Share, embed_to_table, parts_folder, plan, run_shard


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "photos"
    folder.mkdir()
    paths = [folder / f"{i:02}.png" for i in range(23)]
    for i, path in enumerate(paths):
        picture(40 + i, 60 - i, seed=i).save(path)
    return paths


BAD = {3: (b"", "the file is empty"), 7: (b"plain text", "text"), 22: (None, "no such file")}


@pytest.fixture
def mixed(files: list[Path]) -> list[Path]:
    """23 inputs of which three cannot be read: one alone, one beside good ones, the last one missing."""
    for index, (content, _) in BAD.items():
        files[index].unlink() if content is None else files[index].write_bytes(content)
    return files


def expected_vectors(paths: list[Path]) -> NDArray[np.float32]:
    backbone = backbone_of()
    rows = [
        np.full(EMBED_DIM, np.nan) if index in BAD else backbone.embed(path)
        for index, path in enumerate(paths)
    ]
    return np.stack(rows).astype(np.float32)


# -- the formats


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_comes_back_bit_for_bit(mixed: list[Path], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / "out" / f"table{suffix}"
    backbone = backbone_of()
    summary = embed_to_table(mixed, output, backbone, batch_size=4, shard_size=10)
    assert (summary.rows, summary.embedded, summary.failed) == (23, 20, 3)

    vectors, paths, origin = read_embeddings(output)
    assert paths == [str(path) for path in mixed]
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors, expected_vectors(mixed), atol=1e-6)
    embed_to_table(mixed, tmp_path / "again.parquet", backbone, batch_size=4, shard_size=10)
    np.testing.assert_array_equal(vectors, read_embeddings(tmp_path / "again.parquet").embeddings)

    assert origin["model"] == "fake"
    assert origin["weights_sha256"] == "a" * 64
    assert origin["preprocessing"] == backbone.preprocessing.to_json()
    assert origin["dinokit_version"] == __version__
    assert origin["revision"] is None
    assert (origin["embed_dim"], origin["rows"], origin["failed"]) == (EMBED_DIM, 23, 3)
    # Nothing but the table: no parts, no temporary files.
    expected = {output.name} | ({f"{output.name}.origin.json"} if suffix != ".parquet" else set())
    expected |= {f"{output.name}.paths.csv"} if suffix == ".npy" else set()
    assert {p.name for p in output.parent.iterdir()} == expected


def test_the_parquet_table(mixed: list[Path], tmp_path: Path) -> None:
    embed_to_table(mixed, tmp_path / "t.parquet", backbone_of(), batch_size=4, shard_size=10)
    table = pq.read_table(tmp_path / "t.parquet")
    table.validate(full=True)
    assert table.schema.remove_metadata() == pa.schema(
        [
            ("path", pa.string()),
            ("embedding", pa.list_(pa.float32())),  # see parquet.py: not of one size
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("error", pa.string()),
        ]
    )
    metadata = table.schema.metadata
    assert metadata[b"dinokit.model"] == b"fake"
    assert metadata[b"dinokit.weights_sha256"] == b"a" * 64
    assert json.loads(metadata[b"dinokit.preprocessing"])["crop_px"] == [32, 32]
    for index, row in enumerate(table.to_pylist()):
        assert row["path"] == str(mixed[index])
        if index in BAD:
            assert BAD[index][1] in row["error"]
            assert str(mixed[index]) not in row["error"]
            assert row["embedding"] is row["width"] is row["height"] is None
        else:
            assert row["error"] is None
            assert (row["width"], row["height"]) == (40 + index, 60 - index)
            assert len(row["embedding"]) == EMBED_DIM


def test_csv_jsonl_and_npy_as_others_read_them(mixed: list[Path], tmp_path: Path) -> None:
    for suffix in (".csv", ".jsonl", ".npy"):
        embed_to_table(mixed, tmp_path / f"t{suffix}", backbone_of())
    expected = expected_vectors(mixed)

    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["path", "width", "height", "error", *(f"e{i}" for i in range(EMBED_DIM))]
    assert (rows[0]["width"], rows[0]["error"], rows[3]["width"], rows[3]["e0"]) == ("40", "", "", "")
    assert "empty" in rows[3]["error"]
    np.testing.assert_allclose([float(rows[5][f"e{i}"]) for i in range(EMBED_DIM)], expected[5], atol=1e-6)

    lines = [json.loads(line) for line in (tmp_path / "t.jsonl").read_text(encoding="utf-8").splitlines()]
    assert list(lines[0]) == ["path", "embedding", "width", "height", "error"]
    assert lines[3]["embedding"] is None
    assert lines[0]["error"] is None
    np.testing.assert_allclose(lines[5]["embedding"], expected[5], atol=1e-6)

    array = np.load(tmp_path / "t.npy", allow_pickle=False)
    assert np.isnan(array[[3, 7, 22]]).all()
    np.testing.assert_allclose(array, expected, atol=1e-6)
    with (tmp_path / "t.npy.paths.csv").open(newline="", encoding="utf-8") as stream:
        assert [row["path"] for row in csv.DictReader(stream)] == [str(path) for path in mixed]


def test_when_every_picture_failed_there_is_still_a_table(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        output = tmp_path / f"t{suffix}"
        summary = embed_to_table([Path("missing.jpg")], output, backbone_of())
        assert (summary.embedded, summary.failed) == (0, 1)
        vectors, paths, _ = read_embeddings(output)
        assert vectors.shape == (1, EMBED_DIM)
        assert np.isnan(vectors).all()
        assert paths == ["missing.jpg"]


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_a_name_that_is_not_utf8_is_written_visibly(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9.png")
    table = table_of([name, 'größe, "2"\n.png'], np.zeros((2, 3), np.float32), [(1, 1)] * 2, [None] * 2)
    assert table.column("path").to_pylist() == ["caf\\xe9.png", 'größe, "2"\n.png']


def test_unknown_suffixes_name_the_known_ones() -> None:
    with pytest.raises(
        UsageError,
        match=r"'\.parqet' is not known; expected one of \.parquet, \.npy, \.csv, \.jsonl, \.lance\. "
        r"Did you mean a\.parquet",
    ):
        check_suffix("a.parqet")
    for name in ("noname", "-"):
        with pytest.raises(UsageError, match=f"^{name}: a table's name ends in its format; expected one of"):
            check_suffix(name)
    with pytest.raises(UsageError, match=r"a\.jpg: the suffix '\.jpg' is not known; expected .*\.lance$"):
        check_suffix("a.jpg")
    with pytest.raises(UsageError, match=r"Did you mean a\.jsonl"):
        check_suffix("a.json")


def test_reading_something_else(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        read_embeddings(tmp_path / "none.parquet")
    for suffix in SUFFIXES:
        (tmp_path / f"junk{suffix}").write_bytes(b"junk")
        with pytest.raises(DinokitError, match="is not a table of embeddings"):
            read_embeddings(tmp_path / f"junk{suffix}")
        assert read_origin(tmp_path / f"junk{suffix}") == {}
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(DinokitError, match="allow_pickle=False"):
        read_embeddings(tmp_path / "pickled.npy")


@pytest.mark.parametrize(
    "damage",
    [b"dinokit.rows={", b"dinokit.rows=[3]", b"dinokit.began=null", b"dinokit.preprocessing=3", b"\xff=\xff"],
)
def test_a_table_whose_origin_is_damaged_has_none(files: list[Path], tmp_path: Path, damage: bytes) -> None:
    output = tmp_path / "t.parquet"
    embed_to_table(files[:3], output, backbone_of())
    table = pq.read_table(output)
    key, value = damage.split(b"=", 1)
    assert not key.startswith(b"dinokit.") or key in table.schema.metadata
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, key: value}), output)
    assert read_origin(output) == {}
    assert read_embeddings(output).origin == {} and len(read_embeddings(output).embeddings) == 3
    with pytest.raises(UsageError, match="not made by this command"):
        embed_to_table(files[:3], output, backbone_of())
    embed_to_table(files[:3], output, backbone_of(), overwrite=True)
    assert read_origin(output)["rows"] == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": "3"}', '{"what": 3}'])
def test_an_origin_beside_the_table_too(files: list[Path], tmp_path: Path, text: str) -> None:
    embed_to_table(files[:3], tmp_path / "t.npy", backbone_of())
    (tmp_path / "t.npy.origin.json").write_text(text)
    assert read_origin(tmp_path / "t.npy") == {} == read_embeddings(tmp_path / "t.npy").origin


# -- shards and batches


def test_shards_are_runs_of_the_inputs_in_order(files: list[Path], tmp_path: Path) -> None:
    shards = plan(files, tmp_path / "parts", batch_size=4, shard_size=10)
    assert [len(shard.paths) for shard in shards] == [10, 10, 3]
    assert [path for shard in shards for path in shard.paths] == files
    assert {shard.batch_size for shard in shards} == {4}
    assert pickle.loads(pickle.dumps(shards)) == shards  # other runners send them to other processes
    assert len(plan([Path("x")] * 5000, tmp_path)) == 20
    assert len(plan([Path("x")] * 3_000_000, tmp_path)) == 1000
    assert plan(files[:1], tmp_path)[0].batch_size == 1  # one picture is not padded to 32


def test_run_shard_stands_alone(mixed: list[Path], tmp_path: Path) -> None:
    shards = plan(mixed, tmp_path / "parts", batch_size=4, shard_size=10)
    failures = [
        failure for shard in reversed(shards) for failure in run_shard(shard, backbone_of(), workers=0)
    ]
    assert sorted(failure.path for failure in failures) == [str(mixed[index]) for index in BAD]
    tables = [pq.read_table(shard.part) for shard in shards]
    assert pa.concat_tables(tables).column("path").to_pylist() == [str(path) for path in mixed]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 32])
def test_batches_have_one_shape_and_do_not_change_the_table(
    mixed: list[Path], tmp_path: Path, batch_size: int
) -> None:
    backbone = backbone_of()
    embed_to_table(mixed, tmp_path / "t.parquet", backbone, batch_size=batch_size, shard_size=10)
    engine = backbone._engine
    assert isinstance(engine, FakeEngine)
    assert len(set(engine.shapes)) == 1
    np.testing.assert_allclose(
        read_embeddings(tmp_path / "t.parquet").embeddings, expected_vectors(mixed), atol=1e-6
    )


def test_decoding_runs_only_a_little_ahead(files: list[Path], tmp_path: Path, monkeypatch: Any) -> None:
    """Memory must not grow with the number of inputs: few pictures are decoded before they are wanted."""
    decoded: list[Path] = []
    lead: list[int] = []
    original = dinokit.tables.shards.decode_picture_with_extent

    def counting(path: Path, channels: int, *, least_px: int | None) -> Any:
        decoded.append(path)
        return original(path, channels, least_px=least_px)

    class Watching(FakeEngine):
        def run(self, pixel_values: NDArray[np.float32], outputs: Any) -> dict[str, NDArray[np.float32]]:
            result = super().run(pixel_values, outputs)
            lead.append(len(decoded) - sum(shape[0] for shape in self.shapes))
            return result

    monkeypatch.setattr(dinokit.tables.shards, "decode_picture_with_extent", counting)
    embed_to_table(files * 8, tmp_path / "t.parquet", backbone_of(Watching()), batch_size=4, workers=4)
    assert len(decoded) == len(files) * 8
    assert max(lead) <= 8  # two batches


def test_progress_adds_up(mixed: list[Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    embed_to_table(
        mixed,
        tmp_path / "t.csv",
        backbone_of(),
        batch_size=4,
        shard_size=10,
        on_progress=lambda d, f: calls.append((d, f)),
    )
    assert np.sum(calls, axis=0).tolist() == [23, 3]


def test_too_many_failures(mixed: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    with pytest.raises(
        ImageError, match=r"2 of the first 10 pictures cannot be read, more than the 1 allowed; .*03\.png"
    ):
        embed_to_table(mixed, output, backbone_of(), shard_size=10, max_failures=1)
    assert not output.exists()
    assert embed_to_table(mixed, output, backbone_of(), shard_size=10, max_failures=3).failed == 3


@pytest.mark.parametrize("given", [str, Path])
def test_a_folder_by_its_name_is_searched(files: list[Path], tmp_path: Path, given: type) -> None:
    done = embed_to_table(given(files[0].parent), tmp_path / "t.csv", backbone_of())
    assert (done.rows, done.embedded) == (23, 23)
    assert read_embeddings(tmp_path / "t.csv").paths == list(map(str, files))


@pytest.mark.parametrize("given", [iter, lambda paths: np.array(paths, object)])
def test_a_generator_and_a_column_of_paths(files: list[Path], tmp_path: Path, given: Any) -> None:
    assert embed_to_table(given(files), tmp_path / "t.csv", backbone_of()).embedded == 23
    table = read_embeddings(tmp_path / "t.csv")
    assert table.paths == list(map(str, files))
    assert repr(table) == f"<EmbeddingTable 23 rows of {EMBED_DIM} numbers by fake, 0 failed>"


def test_what_has_no_name_is_refused(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"an? Image has no name; .*Backbone\.embed"):
        embed_to_table([picture(9, 9)], tmp_path / "t.csv", backbone_of())  # type: ignore[list-item]
    with pytest.raises(UsageError, match="nowhere"):
        embed_to_table(str(tmp_path / "nowhere"), tmp_path / "t.csv", backbone_of())
    assert not list(tmp_path.glob("t.csv*"))


# -- interruption


def interrupt(files: list[Path], output: Path, at: int, **options: Any) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        embed_to_table(
            files, output, backbone_of(InterruptedEngine(at)), batch_size=5, shard_size=10, **options
        )
    return caught.value


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_the_same_call_goes_on_and_gives_the_same_table(
    mixed: list[Path], tmp_path: Path, suffix: str
) -> None:
    output = tmp_path / f"t{suffix}"
    interrupted = interrupt(mixed, output, at=3)
    assert (interrupted.done, interrupted.rows) == (15, 23)
    assert not output.exists()
    parts = parts_folder(output)
    assert sorted(p.name for p in parts.iterdir()) == [
        ".lock",
        "000000.parquet",
        "000001.begun.npz",
        "manifest.json",
    ]
    assert len(pq.read_table(parts / "000000.parquet")) == 10  # what is on disk is valid

    engine = FakeEngine()
    # Another batch size may go on: it changes nothing that is kept.
    summary = embed_to_table(mixed, output, backbone_of(engine), batch_size=3, shard_size=10)
    assert summary.resumed == 15
    assert (summary.embedded, summary.failed, len(summary.failures)) == (20, 3, 3)
    assert sum(shape[0] for shape in engine.shapes) <= 8 + 5
    assert not parts.exists()
    np.testing.assert_allclose(read_embeddings(output).embeddings, expected_vectors(mixed), atol=1e-6)


def test_nothing_is_left_when_no_part_was_done(files: list[Path], tmp_path: Path) -> None:
    assert interrupt(files, tmp_path / "t.csv", at=0).done == 0
    assert [p.name for p in tmp_path.iterdir()] == ["photos"]


def test_an_interruption_while_the_table_is_written(
    files: list[Path], tmp_path: Path, monkeypatch: Any
) -> None:
    output = tmp_path / "t.npy"

    def ctrl_c(table: Any) -> Any:
        assert list(tmp_path.glob(".t.npy.*.tmp"))  # the array has been begun
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(dinokit.tables.writers, "vectors_of", ctrl_c)
        with pytest.raises(Interrupted) as caught:
            embed_to_table(files, output, backbone_of())
    assert caught.value.done == 23
    assert not output.exists()
    assert not list(tmp_path.glob("*.tmp"))
    assert embed_to_table(files, output, backbone_of()).resumed == 23


@pytest.mark.parametrize("suffix", [".npy", ".csv", ".jsonl"])
@pytest.mark.parametrize("options", [{"update": True}, {"overwrite": True}])
def test_a_write_that_breaks_off_is_not_taken_for_done(
    files: list[Path], tmp_path: Path, monkeypatch: Any, suffix: str, options: dict[str, bool]
) -> None:
    """As on a full disk: the old table stays whole with its own origin, and the same call finishes the new one."""
    output = tmp_path / f"t{suffix}"
    embed_to_table(files, output, backbone_of())
    before = {path: path.read_bytes() for path in tmp_path.glob("t.*")}
    picture(77, 55, seed=99).save(files[0])
    with monkeypatch.context() as patch:
        patch.setattr(dinokit.tables.writers, "vectors_of", full_disk)
        with pytest.raises(DinokitError, match=rf"t\{suffix} cannot be written \(No space left"):
            embed_to_table(files, output, backbone_of(), **options)
    assert {path: path.read_bytes() for path in tmp_path.glob("t.*") if path.is_file()} == before
    summary = embed_to_table(files, output, backbone_of(), **options)
    assert not summary.already_done and summary.resumed == len(files)
    embed_to_table(files, tmp_path / "fresh.npy", backbone_of())
    fresh = read_embeddings(tmp_path / "fresh.npy").embeddings
    np.testing.assert_allclose(read_embeddings(output).embeddings, fresh, atol=1e-6)


def full_disk(*_: object) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_changed_inputs_or_model_are_refused(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    with pytest.raises(
        UsageError, match=r"interrupted run for .*, made by another model .*weights_sha256.*--overwrite"
    ):
        embed_to_table(files, output, backbone_of(sha="b" * 64), shard_size=10)
    others = tmp_path / "others"
    others.mkdir()
    picture(99, 99).save(others / "x.png")
    with pytest.raises(
        UsageError, match=r"made from other inputs.*remove the folder .*t\.parquet\.parts.*--overwrite"
    ):
        embed_to_table([others / "x.png"], output, backbone_of(), shard_size=10)
    summary = embed_to_table(files, output, backbone_of(), shard_size=10, overwrite=True)
    assert (summary.resumed, summary.embedded) == (0, 23)
    assert not parts_folder(output).exists()


@pytest.mark.parametrize("what", ["cls", "patches"])
def test_an_interrupted_run_goes_on_when_pictures_came_and_went(
    files: list[Path], tmp_path: Path, what: str
) -> None:
    """What it has of the pictures that are still there and the same is taken over; the rest is computed."""
    time.sleep(0.08)  # files are known not to have changed since
    output = tmp_path / "t.parquet"
    assert interrupt(files, output, at=3, what=what).done == 15  # a shard of 10, and 5 of the next
    picture(99, 99).save(files[3])  # the same name, another picture
    new = tmp_path / "new.png"
    picture(98, 98).save(new)
    now = [new, *files[:8], *files[9:14], *files[18:]]  # of the 15 one is changed and two are gone
    engine = FakeEngine()
    summary = embed_to_table(now, output, backbone_of(engine), what=what, batch_size=5, shard_size=10)
    assert (summary.resumed, summary.embedded, summary.failed) == (12, 19, 0)
    assert not parts_folder(output).exists()
    fresh = tmp_path / "fresh.parquet"
    embed_to_table(now, fresh, backbone_of(), what=what)
    read = read_patches if what == "patches" else read_embeddings
    ours, theirs = read(output), read(fresh)
    assert ours.paths == theirs.paths and ours.sizes == theirs.sizes
    vectors = (table[:] if what == "patches" else table.embeddings for table in (ours, theirs))
    np.testing.assert_allclose(*vectors, atol=1e-3 if what == "patches" else 1e-6)


def test_it_may_be_interrupted_and_changed_again_and_again(files: list[Path], tmp_path: Path) -> None:
    time.sleep(0.08)  # files are known not to have changed since
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    interrupt(files[1:], output, at=1)  # has 14 of the 15, and 3 more of the 6 that its second shard lacks
    assert parts_folder(output).exists()
    interrupt(files[2:], output, at=0)  # nothing new: what is there stays all the same
    done = embed_to_table(files[2:], output, backbone_of(), batch_size=5, shard_size=10)
    assert (done.resumed, done.embedded) == (16, 21)
    assert not parts_folder(output).exists()


def test_what_is_there_stays_when_nothing_new_was_done(files: list[Path], tmp_path: Path) -> None:
    time.sleep(0.08)
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    new = [tmp_path / f"new{i}.png" for i in range(10)]  # a whole shard, the first one
    for i, path in enumerate(new):
        picture(50, 50, seed=i).save(path)
    assert interrupt([*new, *files], output, at=0).done == 0
    done = embed_to_table([*new, *files], output, backbone_of(), batch_size=5, shard_size=10)
    assert (done.resumed, done.embedded) == (15, 33)


def test_a_run_that_was_killed_before_it_had_anything_is_in_nobodys_way(
    files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    for part in parts_folder(output).glob("0*"):
        part.unlink()
    other = tmp_path / "other.png"
    picture(50, 50).save(other)
    assert embed_to_table([other], output, backbone_of()).embedded == 1
    assert not parts_folder(output).exists()


def test_an_interrupted_update_goes_on_when_pictures_came(files: list[Path], tmp_path: Path) -> None:
    time.sleep(0.08)  # files are known not to have changed since
    output = tmp_path / "t.parquet"
    embed_to_table(files[:5], output, backbone_of())
    interrupt(files[:15], output, at=1, update=True)
    summary = embed_to_table(files, output, backbone_of(), update=True, shard_size=10)
    assert (summary.kept, summary.resumed, summary.embedded) == (
        0,
        10,
        23,
    )  # the five were in its first shard
    assert read_embeddings(output).paths == list(map(str, files))


def test_shares_do_not_take_over_what_others_may_be_at(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    with pytest.raises(UsageError, match="made from other inputs"):
        embed_to_table(files[1:], output, backbone_of(), shard_size=10, share=Share(1, 2))


def test_damaged_parts_of_other_pictures_are_computed_again(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    for part in parts_folder(output).glob("0*"):
        part.write_bytes(b"PAR1 damaged")
    assert embed_to_table(files[1:], output, backbone_of(), shard_size=10).resumed == 0
    assert read_embeddings(output).paths == list(map(str, files[1:]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_table_that_is_there(mixed: list[Path], tmp_path: Path, suffix: str) -> None:
    output = tmp_path / f"t{suffix}"
    embed_to_table(mixed, output, backbone_of())
    before = output.read_bytes()
    again = embed_to_table(mixed, output, backbone_of(InterruptedEngine(0)))  # computes nothing
    assert again.already_done
    assert (again.embedded, again.failed) == (20, 3)
    assert output.read_bytes() == before
    with pytest.raises(UsageError, match=r"exists, made by another model .* --overwrite"):
        embed_to_table(mixed, output, backbone_of(sha="b" * 64))
    with pytest.raises(UsageError, match="exists, made from other inputs"):
        embed_to_table(mixed[:5], output, backbone_of())
    assert output.read_bytes() == before
    assert embed_to_table(mixed[:5], output, backbone_of(), overwrite=True).rows == 5


def test_a_strangers_file_is_never_replaced(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.csv"
    output.write_text("my,own,table\n")
    with pytest.raises(
        UsageError,
        match=r"t\.csv exists, not made by this command; choose another output, or give --overwrite",
    ):
        embed_to_table(files, output, backbone_of())
    assert output.read_text() == "my,own,table\n"


def test_no_inputs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no pictures"):
        embed_to_table([], tmp_path / "t.csv", backbone_of())
