"""Sources: lists, archives, Parquet and addresses become one ordered list of pictures with stable names."""

from __future__ import annotations

import gzip
import http.server
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_models import picture

import dinokit.sources.archives
import dinokit.sources.pictures
import dinokit.sources.web
from dinokit.errors import ImageError, MissingExtraError, UsageError
from dinokit.images import decode_image, open_image
from dinokit.sources import (
    Picture,
    PictureList,
    find_pictures,
    in_order,
    is_collection,
    picture_named,
    search_pictures,
    state_of,
)

pytestmark = pytest.mark.usefixtures("here")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(20 + seed, 16, seed=seed).save(file, "PNG")
    return file.getvalue()


MEMBERS = {"b/2.png": png(2), "a/1.png": png(1), "c.PNG": png(3)}
PASSED_OVER = {
    "b/2.json": b"{}",
    "b/2.cls": b"7",
    "._b.png": b"apple",
    ".hidden/x.png": b"hidden",
    "__MACOSX/c.png": b"apple",
}


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w") -> None:
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> None:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def names(pictures: PictureList) -> list[str]:
    return [str(item) for item in pictures]


def read_all(pictures: PictureList) -> list[bytes]:
    return [item.read() if isinstance(item, Picture) else item.read_bytes() for item in in_order(pictures)]


# -- archives


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.TGZ", "x.zip", "stored.zip"])
def test_archives_give_their_pictures_in_their_own_order(name: str) -> None:
    members = {**PASSED_OVER, **MEMBERS}
    if name.endswith("zip"):
        write_zip(Path(name), members, zipfile.ZIP_STORED if "stored" in name else zipfile.ZIP_DEFLATED)
    else:
        write_tar(Path(name), members, "w:gz" if name.lower().endswith("gz") else "w")
    pictures = find_pictures(name)
    assert names(pictures) == [f"{name}::{member}" for member in MEMBERS]
    assert read_all(pictures) == list(MEMBERS.values())
    assert is_collection(name)
    # Out of order, several times, from other processes and by name: always the same bytes.
    for index in (2, 0, 1, 1, 2):
        item = pictures[index]
        assert isinstance(item, Picture)
        assert item.read() == list(MEMBERS.values())[index]
        assert pickle.loads(pickle.dumps(item)).read() == item.read()
    one = f"{name}::a/1.png"
    assert not is_collection(one)
    assert read_all(find_pictures(one)) == [MEMBERS["a/1.png"]]
    assert open_image(one).size == (21, 16)
    with pytest.raises(ImageError, match=r"zzz\.png: .* has no picture of this name"):
        open_image(f"{name}::zzz.png")


def test_reading_from_many_threads_gives_each_its_own(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    members = {f"{i}.png": png(i % 40) + bytes([i % 256]) for i in range(200)}
    write_tar(Path("x.tar.gz"), members, "w:gz")
    write_zip(Path("x.zip"), members)
    write_tar(Path("x.tar"), members)
    pa_table = pa.table({"image": pa.array(list(members.values()), pa.binary())})
    pq.write_table(pa_table, "x.parquet", row_group_size=37)
    for source in ("x.tar.gz", "x.zip", "x.tar", "x.parquet"):
        pictures: list[Any] = list(find_pictures(source))
        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(lambda item: item.read(), pictures[:40])) == list(members.values())[:40]


def test_nothing_is_unpacked_whatever_a_member_is_called(tmp_path: Path) -> None:
    members = {"../../evil.png": png(1), "/etc/evil.png": png(2)}
    write_tar(Path("t.tar"), members)
    write_zip(Path("t.zip"), members)
    with tarfile.open("t.tar", "a") as archive:  # links out of the archive
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        device = tarfile.TarInfo("device.png")
        device.type = tarfile.CHRTYPE
        archive.addfile(device)
    pictures = find_pictures(["t.tar", "t.zip"])
    assert names(pictures) == [f"{a}::{m}" for a in ("t.tar", "t.zip") for m in members]
    assert read_all(pictures) == [png(1), png(2)] * 2
    assert {p.name for p in tmp_path.iterdir()} == {"t.tar", "t.zip"}


def test_huge_members_and_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.sources.archives, "MOST_BYTES", 10_000)
    big = bytes(20_000)
    write_tar(Path("t.tar"), {"big.png": big, "ok.png": png(1)})
    write_tar(Path("t.tgz"), {"big.png": big, "ok.png": png(1)}, "w:gz")
    write_zip(Path("t.zip"), {"big.png": big, "ok.png": png(1)})
    for source in ("t.tar", "t.tgz", "t.zip"):
        big_one, fine = in_order(find_pictures(source))
        with pytest.raises(ImageError, match="refused: 20,000 bytes are more than the 10,000"):
            decode_image(big_one)
        assert decode_image(fine).size == (21, 16)

    monkeypatch.setattr(dinokit.sources.archives, "MOST_BYTES", 10**9)
    monkeypatch.setattr(dinokit.sources.archives, "_EXPANSION_ALLOWED", 1000)
    write_zip(Path("bomb.zip"), {"bomb.png": bytes(10_000_000)})
    with pytest.raises(ImageError, match="refused as a decompression bomb"):
        decode_image(find_pictures("bomb.zip")[0])
    with gzip.open("bomb.tar.gz", "wb") as file, tarfile.open(fileobj=file, mode="w|") as archive:
        info = tarfile.TarInfo("bomb.png")
        info.size = 10_000_000
        archive.addfile(info, io.BytesIO(bytes(10_000_000)))
    found = search_pictures("bomb.tar.gz")
    assert "refused as a decompression bomb" in found.problems[0]


def test_a_zip_that_lies_about_a_size_gets_no_more_than_it_said() -> None:
    write_zip(Path("t.zip"), {"a.png": bytes(5_000_000)})
    data = bytearray(Path("t.zip").read_bytes())
    directory = data.rindex(b"PK\1\2")
    struct.pack_into("<I", data, directory + 24, 100)  # the size it claims to unpack to
    Path("t.zip").write_bytes(data)
    with pytest.raises(ImageError, match="size or checksum differ"):
        decode_image(find_pictures("t.zip")[0])


def test_other_packings_of_zip_are_named() -> None:
    write_zip(Path("t.zip"), {"a.png": png(1)}, zipfile.ZIP_LZMA)
    with pytest.raises(ImageError, match="method 14; only stored and deflate"):
        decode_image(find_pictures("t.zip")[0])
    write_zip(Path("e.zip"), {"a.png": png(1)})
    data = bytearray(Path("e.zip").read_bytes())
    data[data.rindex(b"PK\1\2") + 8] |= 1
    Path("e.zip").write_bytes(data)
    with pytest.raises(ImageError, match="it is encrypted"):
        decode_image(find_pictures("e.zip")[0])


def test_damaged_archives_give_what_can_be_read() -> None:
    members = {f"{i}.png": np.random.default_rng(i).bytes(3000) for i in range(8)}
    for name, mode in (("t.tar", "w"), ("t.tar.gz", "w:gz")):
        write_tar(Path(name), members, mode)
        data = Path(name).read_bytes()
        Path(name).write_bytes(data[: len(data) // 2])
        found = search_pictures(name)
        assert 2 <= len(found.pictures) <= 5
        assert "damaged after" in found.problems[0], found.problems
        first: Any = found.pictures[0]
        assert first.read() == members["0.png"]
    damaged = bytearray()
    write_zip(Path("t.zip"), members)
    damaged += Path("t.zip").read_bytes()
    damaged[200:300] = bytes(100)
    Path("t.zip").write_bytes(damaged)
    with pytest.raises(ImageError, match="damaged"):
        find_pictures("t.zip")[0].read()  # type: ignore[union-attr]
    assert find_pictures("t.zip")[1].read() == members["1.png"]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["t.tar", "t.tar.gz", "t.zip", "t.parquet"])
def test_what_is_no_archive_is_said_and_costs_nobody_else(name: str) -> None:
    Path(name).write_bytes(b"this is something else entirely " * 40)
    Path("a.png").write_bytes(png(1))
    found = search_pictures([name, "a.png"])
    assert names(found.pictures) == ["a.png"]
    assert found.problems[0].startswith(f"{name} cannot be read as ")
    with pytest.raises(UsageError, match="cannot be read as"):
        find_pictures(name)


def test_an_archive_without_pictures_is_said() -> None:
    write_tar(Path("t.tar"), {"a.txt": b"text"})
    assert search_pictures("t.tar").problems == ["t.tar: no pictures in this archive"]


def test_an_archive_that_changed_under_us() -> None:
    write_tar(Path("t.tar.gz"), MEMBERS, "w:gz")
    pictures: list[Any] = list(find_pictures("t.tar.gz"))
    before = state_of(pictures[0])
    write_tar(Path("t.tar.gz"), dict(list(MEMBERS.items())[:1]), "w:gz")
    with pytest.raises(ImageError, match="no longer there"):
        pictures[2].read()
    assert before != state_of(find_pictures("t.tar.gz")[0])


# -- folders, patterns, and what is in them


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
        "nothing: no pictures in this folder, only 1 files with other suffixes"
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


# -- lists


def test_text_lists_are_relative_to_themselves_or_to_here() -> None:
    Path("lists/p").mkdir(parents=True)
    Path("q").mkdir()
    Path("lists/p/1.png").write_bytes(png(1))
    Path("q/2.png").write_bytes(png(2))
    write_tar(Path("q/t.tar"), MEMBERS)
    Path("lists/l.txt").write_bytes(
        b"\xef\xbb\xbfp/1.png\r\n\r\nq/2.png\r\nmissing.png\r\nq/t.tar::a/1.png\nhttps://example.org/x.jpg\n"
    )
    pictures = find_pictures_tolerant("lists/l.txt")
    assert names(pictures) == [
        "lists/p/1.png",
        "q/2.png",
        "lists/missing.png",
        "q/t.tar::a/1.png",
        "https://example.org/x.jpg",
    ]
    assert open_image(pictures[3]).size == (21, 16)


def find_pictures_tolerant(*inputs: str) -> PictureList:
    found = search_pictures(inputs)
    assert not found.problems
    return found.pictures


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("l.csv", 'label,Path\ncat,a.png\ndog,"b, c.png"\n'),
        ("l.csv", 'image,label\na.png,1\n"b, c.png",2\n,3\n'),
        ("l.tsv", "label\tfile\n1\ta.png\n2\tb, c.png\n"),
        ("l.csv", 'file_name\r\na.png\r\n"b, c.png"\r\n'),
        ("l.lst", "a.png\0b, c.png\0"),
    ],
)
def test_columns_of_paths(name: str, text: str) -> None:
    for i, file in enumerate(("a.png", "b, c.png")):
        Path(file).write_bytes(png(i))
    Path(name).write_text(text)
    assert names(find_pictures(name)) == ["a.png", "b, c.png"]


def test_a_table_of_dinokit_names_its_pictures_again() -> None:
    Path("a.png").write_bytes(png(1))
    pq.write_table(pa.table({"path": ["a.png", "a.png"], "width": [1, 2]}), "t.parquet")
    assert names(find_pictures("t.parquet")) == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.txt", b"", r"l\.txt names no picture"),
        ("l.txt", b"some prose\nof a README\n", r"none of its 2 lines is a file; the first is 'some prose'"),
        ("l.txt", b"\x89PNG\r\n\x1a\n", "not a list of paths but a file of another kind"),
        ("l.csv", b"", "is empty; expected a first line"),
        ("l.csv", b"path;label\na.png;1\n", "separated by commas"),
        ("l.csv", b"paths,label\na.png,1\n", r"no column of paths.*Rename one to 'path'\?"),
        ("l.csv", b"path\n\xff\xfe.png\n", "is not UTF-8 text"),
        ("l.csv", b'path\n"a.png\n', "cannot be read as CSV"),
    ],
)
def test_lists_that_are_none(name: str, data: bytes, message: str) -> None:
    Path(name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        find_pictures(name)


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_standard_input(separator: str) -> None:
    Path("a b.png").write_bytes(png(1))
    Path("größe.png").write_bytes(png(2))
    code = "from dinokit.sources import find_pictures; print([str(p) for p in find_pictures('-')])"
    listed = separator.join(["a b.png", "größe.png", "a b.png"]).encode()
    done = subprocess.run([sys.executable, "-c", code], input=listed, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "['a b.png', 'größe.png', 'a b.png']"


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_names_that_are_not_utf8_survive_every_list(tmp_path: Path) -> None:
    try:
        Path(os.fsdecode(b"caf\xe9.png")).write_bytes(png(1))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    Path("l.txt").write_bytes(b"caf\xe9.png\n")
    for source in ("l.txt", ".", "*.png"):
        (item,) = find_pictures(source)
        assert decode_image(item).size == (21, 16)


# -- Parquet


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
    with pytest.raises(ImageError, match="no picture of this name"):
        open_image("s.parquet::60")


def test_rows_without_a_picture_are_rows_that_fail() -> None:
    Path("beside.png").write_bytes(png(2))
    rows = [(png(1), None), (None, None), (None, "beside.png"), (None, "gone.png"), (b"text", None)]
    table = pa.table({"image": struct_column(rows)})
    pq.write_table(table, "s.parquet")
    first, null, beside, gone, text = in_order(find_pictures("s.parquet"))
    assert decode_image(first).size == (21, 16)
    assert decode_image(beside).size == (22, 16)
    for item, message in ((null, "no picture \\(null\\)"), (gone, "a path only, gone.png"), (text, "text")):
        with pytest.raises(ImageError, match=message):
            decode_image(item)


def test_a_parquet_without_pictures_names_its_columns() -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), "t.parquet")
    with pytest.raises(UsageError, match=r"no column of pictures; its columns are a, b\. Expected 'image'"):
        find_pictures("t.parquet")


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


# -- addresses


@pytest.fixture
def memory() -> Iterator[Any]:
    fsspec = pytest.importorskip("fsspec")
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield filesystem
    filesystem.store.clear()


def test_any_file_system_of_fsspec(memory: Any, tmp_path: Path) -> None:
    for name, data in {"/p/b.png": png(2), "/p/a/1.png": png(1), "/p/.x/3.png": b"", "/p/n.txt": b""}.items():
        memory.pipe(name, data)
    pictures = find_pictures(["memory://p", "memory://p/*.png"])
    assert names(pictures) == ["memory:///p/a/1.png", "memory:///p/b.png", "memory:///p/b.png"]
    assert read_all(pictures) == [png(1), png(2), png(2)]
    assert is_collection("memory://p")
    assert not is_collection("memory://p/b.png")
    assert open_image("memory://p/b.png").size == (22, 16)
    before = [state_of(item) for item in pictures]
    assert before == [state_of(item) for item in find_pictures(["memory://p", "memory://p/*.png"])]
    memory.pipe("/p/b.png", png(5))
    assert [a == b for a, b in zip(before, map(state_of, find_pictures("memory://p")), strict=False)] == [
        True,
        False,
    ]
    for kind, write, mode in (
        ("tar", write_tar, "w"),
        ("tar.gz", write_tar, "w:gz"),
        ("zip", write_zip, None),
    ):
        write(Path(f"x.{kind}"), MEMBERS, *([mode] if mode else []))  # type: ignore[operator]
        memory.pipe(f"/s/x.{kind}", Path(f"x.{kind}").read_bytes())
        remote = find_pictures(f"memory://s/x.{kind}")
        assert names(remote) == [f"memory://s/x.{kind}::{m}" for m in MEMBERS]
        assert read_all(remote) == list(MEMBERS.values())
        assert open_image(f"memory://s/x.{kind}::a/1.png").size == (21, 16)
    chained = find_pictures("zip://*.PNG::memory://s/x.zip")
    assert names(chained) == ["zip://c.PNG::memory://s/x.zip"]
    assert read_all(chained) == read_all(find_pictures(names(chained)[0])) == [MEMBERS["c.PNG"]]
    assert open_image(names(chained)[0]).size == (23, 16)
    assert len(find_pictures("memory://s")) == 9  # a folder of shards
    pq.write_table(pa.table({"image": pa.array([png(1)], pa.binary())}), "x.parquet")
    memory.pipe("/x.parquet", Path("x.parquet").read_bytes())
    assert read_all(find_pictures("memory://x.parquet")) == [png(1)]
    memory.pipe("/p/l.txt", b"a/1.png\n/p/b.png\nmemory://p/b.png\n")
    assert names(find_pictures("memory://p/l.txt"))[::2] == ["memory://p/a/1.png", "memory://p/b.png"]


def test_what_is_wrong_with_an_address_is_said(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/e/readme", b"")
    assert search_pictures("memory://e").problems == ["memory://e: no pictures there"]
    assert "xyz:// are not known" in search_pictures("xyz://bucket/").problems[0]
    with pytest.raises(ImageError, match=r"memory://gone\.png: no such file"):
        open_image("memory://gone.png")
    assert search_pictures("memory://gone.tar").problems[0].startswith("memory://gone.tar")

    import fsspec.core

    def without_s3fs(address: str) -> Any:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", without_s3fs)
    message = r"needs s3fs, which is not installed. Install it with: pip install 'dinokit\[remote\]'"
    with pytest.raises(UsageError, match=message):
        find_pictures("s3://bucket/photos/")
    with pytest.raises(ImageError, match=message):
        open_image("s3://bucket/a.jpg")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(ImageError, match="needs fsspec, which is not installed"):
        open_image("gs://bucket/b.jpg")
    assert issubclass(MissingExtraError, ImportError)


class Site(http.server.BaseHTTPRequestHandler):
    """/ok.png and /größe 1.png are pictures; /busy fails twice; /away leads to a local file."""

    tries = 0

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        if path in ("/ok.png", "/gr%C3%B6%C3%9Fe%201.png") or (path == "/busy.png" and Site.tries == 2):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(png(1))
        elif path == "/busy.png":
            Site.tries += 1
            self.send_error(503)
        elif path == "/away.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dinokit.sources.web, "_PAUSE_S", 0.01)
    Site.tries = 0
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_on_the_web(site: str) -> None:
    good = [f"{site}/ok.png", f"{site}/ok.png?size=large&x=1", f"{site}/größe 1.png", f"{site}/busy.png"]
    pictures = find_pictures(good)
    assert names(pictures) == good
    assert read_all(pictures) == [png(1)] * 4
    assert not is_collection(good[1])
    assert open_image(good[0]).size == (21, 16)
    for bad, message in (
        (f"{site}/gone.jpg", r"gone\.jpg: the server answers 404"),
        (f"{site}/away.png", "the server answers 302"),
        ("http://127.0.0.1:1/x.png", "it cannot be fetched"),
        ("http://user:secret@127.0.0.1/x.png", "user name or password are not fetched"),
        ("http://[bad/x.png", "not a possible address"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(bad)


def test_the_web_sends_no_more_than_a_picture_may_have(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.sources.web, "MOST_BYTES", 100)
    monkeypatch.setattr(dinokit.sources.pictures, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="more than the 100 bytes"):
        open_image(f"{site}/ok.png")


# -- memory


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
