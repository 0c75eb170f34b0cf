"""Results on the disk: asked before the work, whole or not at all, and never mapped into memory."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

from dinokit.cli import cli
from dinokit.errors import DinokitError, UsageError
from dinokit.files.outputs import atomic, atomic_folder, atomic_together, must_be_writable
from dinokit.tables.writers import write_array


def test_asking_leaves_nothing_behind(tmp_path: Path) -> None:
    must_be_writable(tmp_path / "a" / "b" / "c.csv")
    must_be_writable(tmp_path / "c.csv")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["deep/er/x.parquet", "deep/er/x.npy"])
def test_a_mistyped_source_leaves_no_folder(output: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["embed", str(tmp_path / "phtos"), "-o", str(tmp_path / output)])
    assert result.exit_code == 3 and "phtos: no such file or folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DinokitError, match=r"c\.csv cannot be written: .*choose another place"):
        must_be_writable(tmp_path / "file" / "c.csv")


@pytest.mark.parametrize("command", ["knn", "duplicates", "duplicates --sheet", "atlas", "search"])
def test_commands_ask_before_they_embed(
    command: str, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("it began to work")

    monkeypatch.setattr("dinokit.tables.run.embed_to_table", never)
    monkeypatch.setattr("dinokit.tables.embeddings.read_embeddings", never)
    monkeypatch.setattr("dinokit.neighbours.search.SearchIndex.read", never)
    (tmp_path / "file").write_text("")
    bad = str(tmp_path / "file" / "x")
    arguments = {
        "knn": ["knn", "--reference", str(photos), str(photos), "-o", f"{bad}.csv"],
        "duplicates": ["duplicates", str(photos), "-o", f"{bad}.csv"],
        "duplicates --sheet": ["duplicates", str(photos), "--sheet", f"{bad}.png"],
        "atlas": ["atlas", "table.parquet", "-o", f"{bad}.html"],
        "search": ["search", "a.jpg", "--in", "table.parquet", "--sheet", f"{bad}.png"],
    }
    result = CliRunner().invoke(cli, arguments[command])
    assert result.exit_code == 3 and "cannot be written" in result.stderr


def test_an_error_without_a_name_gets_one(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"No space left.*x\.csv") as caught, atomic(tmp_path / "x.csv") as file:
        file.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [1, 2, 3, 4])
@pytest.mark.parametrize("killed", [False, True])
def test_of_files_that_belong_together_the_last_never_vouches_for_others(
    step: int, killed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off at any of the renames; ``killed``: nothing is put back."""
    names = [tmp_path / name for name in ("t.npy", "t.paths", "t.origin")]
    for name in names:
        name.write_text("old")
    steps, rename = itertools.count(1), Path.replace

    def broken_off(self: Path, target: Path) -> Path:
        now = next(steps)
        if now == step or (killed and now > step):
            raise OSError(errno.EIO, "gone", str(self))
        return rename(self, target)

    monkeypatch.setattr(Path, "replace", broken_off)
    with pytest.raises(OSError, match="gone"), atomic_together(names) as files:
        for file in files:
            file.write_text("new")
    monkeypatch.undo()
    texts = [name.read_text() if name.exists() else None for name in names]
    if texts[2] is not None:
        assert texts == ["old"] * 3
    assert (texts[2] is None) == (step > 2 or (killed and step > 1))


@pytest.mark.parametrize("step", [0, 1, 2])
@pytest.mark.parametrize("done", [False, True])
def test_a_folder_that_is_broken_off_leaves_the_old_one_whole(
    step: int, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the new one is made (0), or just before or after the old one (1) or the new one (2) is renamed."""
    steps, rename = itertools.count(1), Path.replace

    def broken_off(self: Path, target: Path) -> Path:
        now = next(steps) == step
        if now and not done:
            raise KeyboardInterrupt
        rename(self, target)
        if now:
            raise KeyboardInterrupt
        return target

    folder = tmp_path / "f"
    folder.mkdir()
    (folder / "words").write_text("old")
    monkeypatch.setattr(Path, "replace", broken_off)
    with pytest.raises(KeyboardInterrupt), atomic_folder(folder) as new:
        new.mkdir()
        (new / "words").write_text("new")
        if step == 0:
            raise KeyboardInterrupt
    assert (folder / "words").read_text() == ("new" if (step, done) == (2, True) else "old")
    assert [*tmp_path.iterdir()] == [folder]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_an_array_in_parts_is_numpys_own_file(
    tmp_path: Path, dtype: type[np.floating[NDArray[np.uint8]]]
) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 3, 2)).astype(dtype)

    def parts() -> Iterator[NDArray[np.float32]]:
        yield rows[:4]
        # A file of its whole length from the start would be one of holes, which a full disk cannot fill.
        assert (tmp_path / "x.npy").stat().st_size < rows.nbytes
        yield rows[4:]

    write_array(tmp_path / "x.npy", parts(), rows.shape, rows.dtype)
    np.save(tmp_path / "y.npy", rows)
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes()


def test_full_folder_for_temporary_files(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was embedded for one command alone is not kept, so nothing is promised."""
    pytest.importorskip("onnxruntime")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dinokit.tables.run.write_embeddings", full)
    result = CliRunner().invoke(cli, ["duplicates", str(photos)])
    assert (
        result.exit_code == 3
        and "cannot take more temporary files (No space left on device)" in result.stderr
    )
    assert "TMPDIR" in result.stderr and "resumes from there" not in result.stderr


def test_two_who_write_one_file_have_a_temporary_one_each(tmp_path: Path) -> None:
    """As processes of two containers, which may have one number."""
    with atomic(tmp_path / "x.csv") as one, atomic(tmp_path / "x.csv") as other:
        assert one != other and one.parent == other.parent == tmp_path
        one.write_text("one")
        other.write_text("other")
    assert (tmp_path / "x.csv").read_text() == "one"  # the last to finish
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_a_link_stays_and_the_folder_behind_it_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "a").write_text("old")
    (tmp_path / "link").symlink_to(Path("disk") / "real")
    (tmp_path / "new").symlink_to(Path("disk") / "missing")
    for name in ("link", "new"):
        with atomic_folder(tmp_path / name) as folder:
            folder.mkdir()
            (folder / "a").write_text(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "new"]
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "real" / "a").read_text() == "link"
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["missing", "real"]


def test_an_empty_folder_stays_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's volume cannot be renamed, and who stands in a folder would find it gone."""
    monkeypatch.chdir(tmp_path)
    there = tmp_path.stat().st_ino
    with pytest.raises(OSError, match="full"), atomic_folder(Path()) as new:
        new.mkdir()
        (new / "half").touch()
        raise OSError("full")
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path) as new:
        (new / "onnx").mkdir(parents=True)
        (new / "config.json").write_text("{}")
        (new / "onnx" / "model.onnx").touch()
    assert tmp_path.stat().st_ino == there == Path().stat().st_ino
    assert sorted(path.name for path in Path().rglob("*")) == ["config.json", "model.onnx", "onnx"]
    monkeypatch.setattr(Path, "is_mount", lambda self: self == tmp_path)
    with pytest.raises(UsageError, match="is a mount point"), atomic_folder(tmp_path):
        raise AssertionError("the work must not begin")
    assert (tmp_path / "config.json").read_text() == "{}"
