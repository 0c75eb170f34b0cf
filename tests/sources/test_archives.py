"""Archives: their pictures in their own order, nothing unpacked, bombs and damage named."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import MEMBERS, PASSED_OVER, names, png, read_all, write_tar, write_zip

import dinokit.sources.archives
import dinokit.sources.pictures
import dinokit.sources.web
from dinokit.errors import ImageError, UsageError
from dinokit.pictures.images import decode_image, open_image
from dinokit.sources import (
    Picture,
    find_pictures,
    in_order,
    is_collection,
    label_of,
    search_pictures,
    state_of,
)

pytestmark = pytest.mark.usefixtures("here")


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
    with pytest.raises(ImageError, match=r"zzz\.png: .* has no picture with this name"):
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


def test_a_member_without_a_name() -> None:
    write_zip(Path("t.zip"), {"a.png": png(1), "b.png": png(2)})
    data = bytearray(Path("t.zip").read_bytes())
    entry = data.index(b"PK\1\2")
    data[entry + 28 : entry + 34] = struct.pack("<3H", 0, 0, 5)  # its name becomes a comment
    Path("t.zip").write_bytes(data)
    assert names(find_pictures("t.zip")) == ["t.zip::b.png"]


@pytest.mark.parametrize("kind", ["tar", "tar.gz"])
def test_hard_links_are_not_left_out_in_silence(kind: str) -> None:
    Path("a.png").write_bytes(png(1))
    os.link("a.png", "b.png")
    with tarfile.open(f"t.{kind}", "w" if kind == "tar" else "w:gz") as archive:
        for name in ("a.png", "b.png"):
            archive.add(name)
    found = search_pictures(f"t.{kind}")
    assert read_all(found.pictures) == [png(1)]
    assert found.problems == [
        f"t.{kind}: left out 1 hard link to other members; pack the archive again with tar --hard-dereference"
    ]


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
    assert search_pictures("t.tar").problems == ["t.tar: the archive contains no pictures"]


def test_an_archive_that_changed_under_us() -> None:
    write_tar(Path("t.tar.gz"), MEMBERS, "w:gz")
    pictures: list[Any] = list(find_pictures("t.tar.gz"))
    before = state_of(pictures[0])
    write_tar(Path("t.tar.gz"), dict(list(MEMBERS.items())[:1]), "w:gz")
    with pytest.raises(ImageError, match="no longer there"):
        pictures[2].read()
    assert before != state_of(find_pictures("t.tar.gz")[0])


def test_an_impossible_size_costs_no_other_archive() -> None:
    write_zip(Path("good.zip"), {"a.png": png(1)})
    info = tarfile.TarInfo("b.png")
    info.size = 2**63
    Path("bad.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with zipfile.ZipFile("bad.zip", "w") as archive:
        archive.writestr("b.png", b"")
        archive.getinfo("b.png").file_size = 2**63
    for bad in ("bad.tar", "bad.zip"):
        found = search_pictures(["good.zip", bad])
        assert names(found.pictures) == ["good.zip::a.png"]
        assert found.problems == [f"{bad} cannot be read as a {bad[4:]} archive (an impossible size)"]


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_labels_of_names_with_points(mode: str) -> None:
    kinds = ("cat", "dog", "horse")
    members = {}
    for number, kind in enumerate(kinds, 1):
        members[f"img.{number:04}.png"] = png(number)
        members[f"img.{number:04}.cls"] = kind.encode()
    members |= {"img.0004.png": png(4), "d/7.left.png": png(5), "d/7.right.png": png(6), "d/7.cls": b"both"}
    name = "a.tar" if mode == "w" else "a.tar.gz"
    write_tar(Path(name), members, mode)
    labels = {str(item): label_of(item) for item in find_pictures(name)}
    assert labels == {
        **{f"{name}::img.{number:04}.png": kind for number, kind in enumerate(kinds, 1)},
        f"{name}::img.0004.png": None,  # of three labels for its sample none is its own
        f"{name}::d/7.left.png": "both",
        f"{name}::d/7.right.png": "both",
    }


def test_a_folder_with_the_name_of_a_picture_is_none() -> None:
    with zipfile.ZipFile("x.zip", "w") as archive:
        archive.mkdir("holiday.jpg")
        archive.writestr("holiday.jpg/1.png", png(3))
    assert names(find_pictures("x.zip")) == ["x.zip::holiday.jpg/1.png"]
