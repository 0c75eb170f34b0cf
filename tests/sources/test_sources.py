"""Sources: folders, patterns and all kinds of names become one ordered list of pictures."""

from __future__ import annotations

import errno
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import MEMBERS, names, png, write_tar, write_zip

from dinokit.classifiers.labelled import find_labelled
from dinokit.errors import UsageError
from dinokit.pictures.images import open_image
from dinokit.sources import (
    find_pictures,
    picture_named,
    search_pictures,
)
from dinokit.sources.spread import evenly_spaced

pytestmark = pytest.mark.usefixtures("here")


def test_a_link_to_itself_costs_its_own_row_only() -> None:
    Path("l/below").mkdir(parents=True)
    Path("l/a.png").write_bytes(png(1))
    Path("l/self.png").symlink_to("self.png")
    Path("l/below/round.png").symlink_to("again.png")
    Path("l/below/again.png").symlink_to("round.png")
    Path("l/below/up").symlink_to("..")
    found = search_pictures("l")
    assert names(found.pictures) == ["l/a.png", "l/below/again.png", "l/below/round.png", "l/self.png"]
    assert found.problems == []
    Path("l/below/up").unlink()
    assert find_labelled("l").labels == ["below", "below"]


def test_a_folder_that_cannot_be_looked_into_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("l/open/a.png", "l/shut/b.png", "l/lost+found/c.png"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(png(1))
    scandir = os.scandir

    def shut(folder: str) -> Any:  # a test may run as root, who is let in everywhere
        if "shut" in folder:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), folder)
        if "stale" in folder:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), folder)
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", shut)
    found = search_pictures("l")
    assert names(found.pictures) == ["l/open/a.png"]
    assert found.problems == ["l/shut: the folder cannot be read (permission denied)"]
    assert search_pictures("l/shut").problems == found.problems
    with pytest.raises(UsageError, match="l/shut: the folder cannot be read"):
        find_pictures("l")
    labelled = find_labelled("l")
    assert (labelled.labels, labelled.problems) == (
        ["open"],
        ["l/shut: the folder cannot be read (permission denied); the class 'shut' is left out"],
    )
    Path("l/stale").mkdir()
    assert any(
        p.startswith("l/stale: the folder cannot be read (stale") for p in search_pictures("l").problems
    )


def test_folders_give_pictures_or_else_shards() -> None:
    Path("shards/deep").mkdir(parents=True)
    write_tar(Path("shards/b.tar"), {"1.png": png(1)})
    write_tar(Path("shards/deep/a.tar.gz"), {"2.png": png(2)}, "w:gz")
    write_zip(Path("shards/.hidden.zip"), {"3.png": png(3)})
    pq.write_table(pa.table({"number": [1]}), "shards/other.parquet")
    pq.write_table(pa.table({"image": pa.array([png(4)], pa.binary())}), "shards/c.parquet")
    assert names(find_pictures("shards")) == [
        "shards/b.tar::1.png",
        "shards/c.parquet::0",
        "shards/deep/a.tar.gz::2.png",
    ]
    assert names(find_pictures("shards/*.tar")) == ["shards/b.tar::1.png"]
    Path("shards/x.png").write_bytes(png(5))
    assert names(find_pictures("shards")) == ["shards/x.png"]
    Path("nothing").mkdir()
    pq.write_table(pa.table({"number": [1]}), "nothing/other.parquet")
    assert search_pictures("nothing").problems == [
        "nothing: no pictures in this folder, only 1 file with other suffixes"
    ]


def test_everything_at_once_keeps_the_order_of_the_arguments() -> None:
    Path("f").mkdir()
    for i in (2, 1):
        Path(f"f/{i}.png").write_bytes(png(i))
    write_tar(Path("t.tar"), MEMBERS)
    Path("l.txt").write_text("f/2.png\n")
    arguments = ["f/2.png", "t.tar", "gone.png", "f", "l.txt", "f/2.png"]
    found = search_pictures(arguments)
    assert names(found.pictures) == [
        "f/2.png",
        *(f"t.tar::{m}" for m in MEMBERS),
        "gone.png",
        "f/1.png",
        "f/2.png",
        "f/2.png",
        "f/2.png",
    ]
    assert found.problems == []
    pictures = found.pictures
    assert [str(p) for p in pictures[2:5]] == names(pictures)[2:5]
    assert str(pictures[-1]) == "f/2.png"
    assert [str(p) for p in pickle.loads(pickle.dumps(pictures[1:4]))] == names(pictures)[1:4]
    with pytest.raises(IndexError):
        pictures[len(pictures)]
    with pytest.raises(UsageError, match=r"gone\.png: no such file"):
        find_pictures(arguments)


def test_a_files_own_name_comes_first() -> None:
    Path("odd.tar::name.png").write_bytes(png(1))
    assert names(find_pictures("odd.tar::name.png")) == ["odd.tar::name.png"]
    assert open_image("odd.tar::name.png").size == (21, 16)
    assert picture_named("odd.tar::name.png") == Path("odd.tar::name.png")


def test_a_list_of_very_many_pictures_stays_small(tmp_path: Path) -> None:
    import tracemalloc

    with tarfile.open("t.tar", "w") as archive:
        for i in range(2000):
            archive.addfile(tarfile.TarInfo(f"{i:06}.png"), None)
    tracemalloc.start()
    pictures = find_pictures("t.tar")
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(pictures) == 2000
    assert kept < 2000 * 100 + 100_000
    assert peak < 2000 * 200 + 300_000


@pytest.mark.parametrize(
    ("count", "at_most", "expected"),
    [(0, 4, []), (1, 4, [0]), (3, 8, [0, 1, 2]), (100, 4, [0, 33, 66, 99]), (9, 2, [0, 8])],
)
def test_few_of_many_are_evenly_spaced_from_the_first_to_the_last(
    count: int, at_most: int, expected: list[int]
) -> None:
    assert evenly_spaced(count, at_most) == expected
