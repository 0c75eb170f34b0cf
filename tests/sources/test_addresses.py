"""Addresses: what fsspec knows, and single pictures on the web."""

from __future__ import annotations

import contextlib
import http.server
import io
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import MEMBERS, names, png, read_all, write_tar, write_zip

import dinokit.sources.archives
import dinokit.sources.pictures
import dinokit.sources.storage
import dinokit.sources.web
from dinokit.classifiers.labelled_sources import find_labelled_items
from dinokit.errors import ImageError, MissingExtraError, UsageError
from dinokit.pictures.images import open_image
from dinokit.sources import (
    find_pictures,
    is_collection,
    search_pictures,
    state_of,
)
from dinokit.sources.storage import state_from, time_from

pytestmark = pytest.mark.usefixtures("here")


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


def test_labels_of_shards_behind_an_address(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    opened = type(memory).open

    class Watched(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            asked.append(self.tell())
            return super().read(size)

    def watched(self: Any, path: str, mode: str = "rb", **how: Any) -> Any:
        return Watched(opened(self, path, mode, **how).read())

    for kind, mode in (("tar", "w"), ("tar.gz", "w:gz")):
        write_tar(
            Path("w"),
            {"1.png": png(1), "1.cls": b"boot\n", "d/2.x.cls": b"7", "d/2.png": png(2), "3.png": png(3)},
            mode,
        )
        memory.pipe(f"/s/w.{kind}", Path("w").read_bytes())
        with monkeypatch.context() as patch:
            patch.setattr(type(memory), "open", watched)
            found = find_labelled_items(f"memory://s/w.{kind}")
        assert [str(item) for item in found.paths] == [
            f"memory://s/w.{kind}::{name}" for name in ("1.png", "d/2.png")
        ]
        assert found.labels == ["boot", "7"]
        # Each label is read where the walk over the archive comes by, none by a request of its own.
        assert asked and asked == sorted(asked)
        asked.clear()


def test_what_is_wrong_with_an_address_is_said(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.pipe("/e/readme", b"")
    assert search_pictures("memory://e").problems == ["memory://e: no pictures found"]
    memory.pipe("/e/1.png", png(1))
    assert find_pictures("MEMORY://e/1.png")[0].read() == png(1)  # type: ignore[union-attr]
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


def test_what_lies_elsewhere_names_nothing_here(memory: Any, tmp_path: Path) -> None:
    secret = tmp_path / "secret.png"
    secret.write_bytes(png(7))
    memory.pipe("/ds/a/1.png", png(1))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    paths = ["a/1.png", str(secret), "../ds/a/1.png", f"file://{secret}", "a/2.png"]
    table = pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths], kind)})
    pq.write_table(table, "t.parquet")
    memory.pipe("/ds/t.parquet", Path("t.parquet").read_bytes())
    read, *others = find_pictures("memory://ds/t.parquet")
    assert read.read() == png(1)  # type: ignore[union-attr]
    for item, why in zip(
        others, ["a table behind an address must not name such files"] * 3 + ["no such file"], strict=True
    ):
        with pytest.raises(ImageError, match=why):
            item.read()  # type: ignore[union-attr]
    # A table on this machine is its owner's, and may.
    Path("a").mkdir()
    Path("a/1.png").write_bytes(png(2))
    assert [item.read() for item in list(find_pictures("t.parquet"))[:2]] == [png(2), png(7)]  # type: ignore[union-attr]

    for line in (f"file://{secret}", f"LOCAL://{secret}"):
        memory.pipe("/ds/l.csv", f"path\nmemory://ds/a/1.png\n{line}\n".encode())
        (problem,) = search_pictures("memory://ds/l.csv").problems
        assert f"names {line}, a file on this machine" in problem
    Path("l.txt").write_text("reference://x.jpg::memory://ds/refs.json\n")
    with pytest.raises(ImageError, match="reference:// is not followed"):
        find_pictures("l.txt")[0].read()  # type: ignore[union-attr]


def test_passwords_in_addresses_are_not_shown(memory: Any) -> None:
    for name in ("https://me:pa@ss@localhost:1/a.tar", "ftp://me:pass@localhost:1/a.tar"):
        (problem,) = search_pictures(name).problems
        assert "pass" not in problem.replace("password", "") and "me:" not in problem and "ss@" not in problem
        assert "://…@localhost:1/a.tar" in problem


def test_temporary_failures_of_a_file_system_are_retried(
    memory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dinokit.sources.storage, "_PAUSE_S", 0)
    write_tar(Path("x.tar"), MEMBERS, "w")
    memory.pipe("/x.tar", Path("x.tar").read_bytes())
    memory.pipe("/1.png", png(1))
    calls: list[str] = []

    def failing_twice(method: str, error: Exception) -> None:
        original, failures = getattr(type(memory), method), [error, error]

        def call(self: Any, *args: Any, **how: Any) -> Any:
            calls.append(method)
            if failures:
                raise failures.pop()
            return original(self, *args, **how)

        monkeypatch.setattr(type(memory), method, call)

    failing_twice("open", ConnectionError("reset"))
    pictures = find_pictures("memory://x.tar")
    failing_twice("cat_file", RuntimeError("busy"))
    assert read_all(pictures)[0] == next(iter(MEMBERS.values()))
    failing_twice("open", ConnectionError("reset"))
    assert read_all(find_pictures("memory://1.png")) == [png(1)]
    assert calls.count("cat_file") == 2 + len(MEMBERS)

    class RefusedError(Exception):  # as aiohttp reports a status
        status = 403

    for lasting in (PermissionError("denied"), RefusedError("forbidden"), ConnectionError("retried already")):
        monkeypatch.setattr(dinokit.sources.storage, "_LATE_S", -1 if "retried" in str(lasting) else 10)
        calls.clear()
        failing_twice("open", lasting)
        with pytest.raises(UsageError, match="cannot be read"):
            find_pictures("memory://x.tar")
        assert calls == ["open"]


def test_a_server_that_sends_whole_files_only(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(Path("x.tar"), MEMBERS, "w")
    memory.pipe("/x.tar", Path("x.tar").read_bytes())
    monkeypatch.setattr(type(memory), "cat_file", lambda *_, **how: Path("x.tar").read_bytes())
    with pytest.raises(ImageError, match="the server sends whole files only"):
        find_pictures("memory://x.tar")[0].read()  # type: ignore[union-attr]
    with pytest.raises(UsageError, match=r"^memory://no.tar: no such file or folder$"):
        find_pictures("memory://no.tar")


def test_what_web_servers_tell_of_a_file() -> None:
    told = {"size": 10240, "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert time_from(told) == 1445412480.0
    assert time_from({"Last-Modified": "yesterday"}) is None
    assert state_from(told) != state_from({**told, "Last-Modified": "Wed, 21 Oct 2015 07:28:01 GMT"})
    assert state_from({"size": None}) == "unknown"


class Site(http.server.BaseHTTPRequestHandler):
    """/ok.png and /größe 1.png are pictures; /busy fails twice, /cut ends early twice, /cut-always always; /away leads
    to a local file, /round to itself; /drip never ends."""

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
        elif path in ("/cut.png", "/cut-always.png"):
            Site.tries += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(png(1))))
            self.end_headers()
            self.wfile.write(png(1) if path == "/cut.png" and Site.tries == 3 else png(1)[:-5])
        elif path == "/drip.png":
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):  # until the client leaves
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.01)
        elif path == "/round.png":
            self.send_response(302)
            self.send_header("Location", "/round.png")
            self.end_headers()
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
        ("http://[bad/x.png", "not a valid address"),
    ):
        with pytest.raises(ImageError, match=message):
            open_image(bad)


@pytest.mark.parametrize("scheme", ["http", "foo"])
def test_messages_name_an_address_once_and_without_its_password(scheme: str) -> None:
    with pytest.raises(ImageError, match=f"^{scheme}://…@127.0.0.1/x.png: ") as raised:
        open_image(f"{scheme}://user:secret@127.0.0.1/x.png")
    assert "secret" not in str(raised.value) and str(raised.value).count("127.0.0.1") == 1


def test_an_archive_behind_a_query_is_not_taken_for_a_picture(site: str) -> None:
    for name in ("a.tar", "a.parquet", "l.csv"):
        found = search_pictures(f"{site}/{name}?download=true")
        assert not found.pictures and "leave the query out, or download the file" in found.problems[0]
    assert len(find_pictures(f"{site}/ok.png?archive=a.tar")) == 1


def test_a_download_that_ends_early_is_tried_again(site: str) -> None:
    assert read_all(find_pictures(f"{site}/cut.png")) == [png(1)]
    with pytest.raises(ImageError, match=r"it cannot be fetched .*5 more expected"):
        open_image(f"{site}/cut-always.png")


def test_a_server_that_drips_is_not_waited_for(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.sources.web, "_TIMEOUT_S", 0.5)
    with pytest.raises(ImageError, match=r"the server is too slow: .* bytes in"):
        open_image(f"{site}/drip.png")


def test_a_redirect_loop_is_one_line(site: str) -> None:
    with pytest.raises(ImageError, match="the server answers 302") as raised:
        open_image(f"{site}/round.png")
    assert "\n" not in str(raised.value)


def test_the_web_sends_no_more_than_a_picture_may_have(site: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.sources.web, "MOST_BYTES", 100)
    monkeypatch.setattr(dinokit.sources.pictures, "MOST_BYTES", 100)
    with pytest.raises(ImageError, match="more than 100 bytes"):
        open_image(f"{site}/ok.png")
