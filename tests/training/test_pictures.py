"""Sources of training: every kind gives the same pictures, by number, in any order, to any process."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
fsspec = pytest.importorskip("fsspec")
import pyarrow as pa
import pyarrow.parquet as pq

from dinokit.errors import ImageError, UsageError
from dinokit.sources import copies, storage
from dinokit.training.recipe import Recipe
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.pictures import Pictures, collect_pictures

RECIPE = Recipe(
    global_crop_px=32, local_crop_px=16, n_local_crops=2, patch_size=16, batch_size=6, epochs=2, workers=0
)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (30 + seed, 44, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


ENCODED = [png(seed) for seed in range(6)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def remote() -> Iterator[str]:
    filesystem = fsspec.filesystem("memory")
    filesystem.store.clear()
    yield "memory://shards"
    filesystem.store.clear()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def tar_of(encoded: list[bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for number, data in enumerate(encoded):
            for name, content in ((f"{number:06}.png", data), (f"{number:06}.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def make(kind: str, folder: Path) -> str:
    """A source of this kind that gives ``ENCODED``."""
    files = folder / "files"
    files.mkdir(parents=True, exist_ok=True)
    for number, data in enumerate(ENCODED):
        (files / f"{number}.png").write_bytes(data)
    names = [f"files/{number}.png" for number in range(6)]
    table: dict[str, object] | None = None
    if kind == "folder":
        return str(files)
    if kind == "pattern":
        return str(files / "*.png")
    if kind == "txt":
        (folder / "list.txt").write_text("\n".join(names))
        return str(folder / "list.txt")
    if kind == "csv":
        (folder / "list.csv").write_text("label,path\n" + "".join(f"x,{name}\n" for name in names))
        return str(folder / "list.csv")
    if kind == "tar":
        (folder / "a.tar").write_bytes(tar_of(ENCODED))
        return str(folder / "a.tar")
    if kind == "zip":
        with zipfile.ZipFile(folder / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for number, data in enumerate(ENCODED):
                archive.writestr(f"{number}.png", data)
        return str(folder / "a.zip")
    if kind == "arrow":
        saved = folder / "saved"
        saved.mkdir()
        rows = pa.table({"image": [{"bytes": data, "path": None} for data in ENCODED]})
        with pa.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), rows.schema) as writer:
            writer.write_table(rows, max_chunksize=4)
        (saved / "dataset_info.json").write_text("{}")
        (saved / "state.json").write_text(
            json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]})
        )
        return str(saved)
    if kind == "parquet":
        table = {"image": ENCODED}
    elif kind == "parquet of structs":
        table = {"image": [{"bytes": data, "path": "gone.png"} for data in ENCODED]}
    elif kind == "parquet with files beside":
        table = {"image": [{"bytes": None, "path": name} for name in names]}
    elif kind == "parquet of paths":
        table = {"path": names}
    assert table is not None, kind
    if kind == "parquet with files beside":
        image = pa.array(table["image"], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        pq.write_table(pa.table({"image": image}), folder / "a.parquet")
    else:
        pq.write_table(pa.table(table), folder / "a.parquet", row_group_size=4)
    return str(folder / "a.parquet")


KINDS = [
    "folder",
    "pattern",
    "txt",
    "csv",
    "tar",
    "zip",
    "arrow",
    "parquet",
    "parquet of structs",
    "parquet with files beside",
    "parquet of paths",
]


def contents(pictures: Pictures, order: list[int]) -> list[bytes]:
    found = [pictures.read(index) for index in order]
    return [item.read_bytes() if isinstance(item, Path) else item for item in found]


def crops(pictures: Pictures, recipe: Recipe = RECIPE) -> list[Batch]:
    found = list(CropLoader(pictures, recipe))
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_gives_its_pictures_in_any_order_and_process(kind: str, tmp_path: Path) -> None:
    pictures = collect_pictures([make(kind, tmp_path)])
    order = [5, 0, 3, 3, 1, 4, 2]
    assert contents(pictures, order) == [ENCODED[index] for index in order]
    # What a spawned worker gets.
    assert contents(pickle.loads(pickle.dumps(pictures)), order) == [ENCODED[index] for index in order]


@pytest.mark.parametrize("kind", ["zip", "parquet", "arrow", "csv"])
def test_workers_give_the_same_crops(kind: str, tmp_path: Path) -> None:
    pictures = collect_pictures([make(kind, tmp_path)])
    alone, shared = crops(pictures), crops(pictures, replace(RECIPE, workers=2))
    assert len(alone) == len(shared) == 2
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one.global_crops, other.global_crops) and not one.unreadable


def test_sources_one_after_the_other(tmp_path: Path) -> None:
    sources = [make(kind, tmp_path) for kind in ("zip", "parquet", "folder")]
    pictures = collect_pictures([*sources, sources[0]])
    assert contents(pictures, list(range(24))) == ENCODED * 4
    assert [pictures.name(index).removeprefix(f"{tmp_path}/") for index in (1, 7, 13)] == [
        "a.zip::1.png",
        "a.parquet::1",
        "files/1.png",
    ]


# ------------------------------------------------------------------------------------------- what cannot be read


@pytest.mark.parametrize("kind", ["txt", "tar", "zip", "arrow", "parquet"])
def test_a_corrupt_picture_is_left_out_and_named(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(globals(), "ENCODED", [*ENCODED[:2], ENCODED[2][:60], *ENCODED[3:]])
    pictures = collect_pictures([make(kind, tmp_path)])
    (batch,) = crops(pictures, replace(RECIPE, epochs=1))
    assert batch.n_images == 5 and len(batch.unreadable) == 1
    assert batch.unreadable[0].startswith(f"{pictures.name(2)}: ")


def test_a_missing_file_of_a_list_is_a_corrupt_picture(tmp_path: Path) -> None:
    source = make("csv", tmp_path)
    (tmp_path / "files" / "4.png").unlink()
    (batch,) = crops(collect_pictures([source]), replace(RECIPE, epochs=1))
    assert batch.n_images == 5
    assert batch.unreadable == [f"{tmp_path / 'files' / '4.png'}: no such file"]


def test_a_row_without_picture(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [ENCODED[0], None]}), tmp_path / "a.parquet")
    pictures = collect_pictures([tmp_path / "a.parquet"])
    with pytest.raises(ImageError, match="has no picture"):
        pictures.read(1)


def test_each_source_that_gives_nothing_is_named(tmp_path: Path) -> None:
    good = make("tar", tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.zip").write_bytes(b"no archive")
    with pytest.raises(UsageError) as caught:
        collect_pictures([good, tmp_path / "empty", "gone/a.jpg", tmp_path / "notes.zip", "none/*.jpg"])
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    for line, words in zip(
        lines,
        ["empty: no pictures", "gone/a.jpg: no such file", "notes.zip cannot be read", "matches no file"],
        strict=True,
    ):
        assert words in line


def test_an_archive_that_breaks_off_gives_what_came_before(tmp_path: Path) -> None:
    whole = tar_of(ENCODED)
    (tmp_path / "a.tar").write_bytes(whole[: len(whole) // 2])
    warned: list[str] = []
    pictures = collect_pictures([tmp_path / "a.tar"], warn=warned.append)
    assert 0 < len(pictures) < 6 and contents(pictures, [0]) == ENCODED[:1]
    assert len(warned) == 1 and "a.tar: the archive is damaged" in warned[0]


def test_what_can_only_be_read_forwards_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("1.png")
        info.size = len(ENCODED[0])
        tar.addfile(info, io.BytesIO(ENCODED[0]))
    with pytest.raises(UsageError, match=r"a.tar.gz is compressed, .* Unpack it to a plain .tar"):
        collect_pictures([tmp_path / "a.tar.gz"])


# ------------------------------------------------------------------------------------------- copies


@pytest.mark.parametrize("kind", ["tar", "zip", "parquet", "parquet of structs"])
def test_what_lies_behind_an_address_is_copied_once(
    kind: str, tmp_path: Path, remote: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = Path(make(kind, tmp_path))
    address = f"{remote}/{local.name}"
    filesystem = fsspec.filesystem("memory")
    filesystem.pipe(address, local.read_bytes())
    told: list[str] = []
    pictures = collect_pictures([address], tell=told.append)
    assert len(told) == 1 and told[0].startswith(f"copying {address}")
    assert pictures.name(3).startswith(f"{address}::")
    # Nobody asks for it again: neither this start nor another.
    monkeypatch.setattr(filesystem.__class__, "cat_file", None)
    again = collect_pictures([address], tell=told.append)
    assert len(told) == 1
    for found in (pictures, pickle.loads(pickle.dumps(again))):
        assert contents(found, [4, 0, 5]) == [ENCODED[4], ENCODED[0], ENCODED[5]]


def test_a_folder_behind_an_address(tmp_path: Path, remote: str) -> None:
    filesystem = fsspec.filesystem("memory")
    for name, part in (("b.tar", ENCODED[3:]), ("a.tar", ENCODED[:3])):
        filesystem.pipe(f"{remote}/{name}", tar_of(part))
    assert contents(collect_pictures([remote]), list(range(6))) == ENCODED
    assert contents(collect_pictures([f"{remote}/b*.tar"]), [0]) == [ENCODED[3]]


def test_shards_behind_http(tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    for kind in ("tar", "parquet"):
        make(kind, tmp_path)
    handler = functools.partial(QuietHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        root = f"http://127.0.0.1:{server.server_port}"
        pictures = collect_pictures([f"{root}/a.tar", f"{root}/a.parquet", f"{root}/files/3.png"])
        assert contents(pictures, [0, 5, 7, 12]) == [ENCODED[0], ENCODED[5], ENCODED[1], ENCODED[3]]
        with pytest.raises(UsageError, match=r"/gone.tar cannot be read"):
            collect_pictures([f"{root}/gone.tar"])
        server.shutdown()
    # The shards are here now; only the single picture is asked for again.
    assert contents(pictures, [3, 6]) == [ENCODED[3], ENCODED[0]]


def test_a_damaged_parquet_does_not_cost_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    shutil.move(make("parquet", tmp_path), folder / "a.parquet")
    data = bytearray((folder / "a.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (folder / "b.parquet").write_bytes(data)
    warned: list[str] = []
    assert contents(collect_pictures([folder], warn=warned.append), list(range(6))) == ENCODED
    assert len(warned) == 1 and warned[0].startswith(f"{folder / 'b.parquet'} cannot be read")


def test_a_changed_table_gets_a_new_copy_and_the_old_one_goes(tmp_path: Path, cache: Path) -> None:
    source = Path(make("parquet", tmp_path))
    assert contents(collect_pictures([source]), [0]) == [ENCODED[0]]
    pq.write_table(pa.table({"image": ENCODED[::-1] * 2}), source)
    pictures = collect_pictures([source])
    assert len(pictures) == 12 and contents(pictures, [0, 11]) == [ENCODED[5], ENCODED[0]]
    assert len(list(cache.rglob("*.arrow"))) == 1 and not list(cache.rglob("partial*"))


def test_tables_of_the_same_name_have_copies_of_their_own(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder, encoded in (("a", ENCODED[:2]), ("b", ENCODED[3:])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        pq.write_table(pa.table({"image": encoded}), "x.parquet")
        assert contents(collect_pictures(["x.parquet"]), [0]) == encoded[:1]
    assert len(list(cache.rglob("*.arrow"))) == 2


def test_a_copy_that_breaks_off_leaves_nothing(
    tmp_path: Path, remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.filesystem("memory").pipe(f"{remote}/a.tar", tar_of(ENCODED))
    monkeypatch.setattr(copies, "_blocks", lambda file: iter([b"x" * 100]))
    with pytest.raises(UsageError, match=r"a.tar ended after 100 of [\d,]+ bytes; try again"):
        collect_pictures([f"{remote}/a.tar"])
    assert not list(cache.rglob("*.tar")) and not list(cache.rglob("partial*"))


def test_reading_is_tried_again_from_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "_PAUSE_S", 0)

    class Shaky(io.BytesIO):
        failures = 2

        def read(self, size: int | None = -1) -> bytes:
            data = super().read(4)
            if self.failures:
                self.failures -= 1
                raise ConnectionError("reset")
            return data

    source = Shaky(b"abcdefgh")
    assert copies._block(source, 0) + copies._block(source, 4) == b"abcdefgh"
    source.failures = 3
    with pytest.raises(ConnectionError):
        copies._block(source, 0)


def test_what_a_killed_process_left_is_removed(remote: str, cache: Path) -> None:
    fsspec.filesystem("memory").pipe(f"{remote}/a.tar", tar_of(ENCODED))
    collect_pictures([f"{remote}/a.tar"])
    (copy,) = cache.rglob("*.tar")
    old, new = (
        copy.with_name("partial-1-old"),
        copy.with_name("partial-2-new"),
    )  # new: where nothing can be locked
    old.write_bytes(b"x")
    new.write_bytes(b"x")
    os.utime(old, (0, 0))
    copy.unlink()
    collect_pictures([f"{remote}/a.tar"])
    assert copy.exists() and new.exists() and not old.exists()


def test_no_room_for_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("parquet", tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(
        UsageError, match=r"needs a copy of .* MB in .*cache, where 0.0 MB are free.*DINOKIT_CACHE"
    ):
        collect_pictures([source])


def test_a_folder_of_copies_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make("parquet", tmp_path)
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UsageError, match=r"a.parquet cannot be copied to .*DINOKIT_CACHE"):
        collect_pictures([source])


@pytest.mark.parametrize("state", ["size=6", "unknown"])
def test_two_copies_where_nothing_can_be_locked(
    cache: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Another process writes the same one meanwhile; each is whole when it takes its name."""

    def kept(write: Callable[[IO[bytes]], None]) -> Path:
        return copies._kept("a.tar", "a.tar", state, ".tar", 6, write, None)

    def other(target: IO[bytes]) -> None:
        target.write(b"abcdef")

    def first(target: IO[bytes]) -> None:
        target.write(b"abc")
        assert kept(other).read_bytes() == b"abcdef"
        target.write(b"def")

    monkeypatch.setattr(copies, "held", lambda path, *, wait: contextlib.nullcontext())
    assert kept(first).read_bytes() == b"abcdef"
    assert [path.suffix for path in cache.rglob("*") if path.is_file()] == [".tar"]
    # Of what nothing is known about, nobody can say whether the copy is still that.
    newer = kept(lambda target: target.write(b"newer!") and None)
    assert newer.read_bytes() == (b"newer!" if state == "unknown" else b"abcdef")
