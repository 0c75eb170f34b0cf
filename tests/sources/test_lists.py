"""Lists of pictures: text, CSV, standard input, tables of dinokit."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import MEMBERS, find_pictures_tolerant, names, png, read_all, write_tar

from dinokit.errors import ImageError, UsageError
from dinokit.pictures.images import decode_image, open_image
from dinokit.sources import find_pictures, is_there, label_of, search_pictures, state_of
from dinokit.sources.names import text_of

pytestmark = pytest.mark.usefixtures("here")


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
    for encoding in ("utf-8", "utf-16"):  # PowerShell writes UTF-16
        Path(name).write_text(text, encoding)
        assert names(find_pictures(name)) == ["a.png", "b, c.png"]


def test_a_table_of_dinokit_names_its_pictures_again() -> None:
    Path("a.png").write_bytes(png(1))
    pq.write_table(pa.table({"path": ["a.png", "a.png"], "width": [1, 2]}), "t.parquet")
    assert names(find_pictures("t.parquet")) == ["a.png", "a.png"]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("l.txt", b"", r"l\.txt does not name any picture"),
        (
            "l.txt",
            b"some prose\nof a README\n",
            r"none of its 2 lines names a file; the first is 'some prose'",
        ),
        ("l.txt", b"\x89PNG\r\n\x1a\n", "not a list of paths but another kind of file"),
        ("l.txt", b"\n<!DOCTYPE html>\n<html>", "a web page"),
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


def test_spaces_around_a_name_that_has_them() -> None:
    for name in (" leading.png", "plain.png"):
        Path(name).write_bytes(png(1))
    Path("l.txt").write_text(" leading.png\n  plain.png \n")
    assert names(find_pictures("l.txt")) == [" leading.png", "plain.png"]


@pytest.mark.parametrize("data", [png(1), b"\xff\xd8\xff\xe0\0\x10JFIF\0", b"RIFF\x10\0\0\0WEBP"])
def test_a_picture_is_no_list(data: bytes) -> None:
    command = [sys.executable, "-m", "dinokit", "embed", "-", "-o", "o.npy"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 3
    assert b"standard input is not a list of paths but another kind of file" in done.stderr
    assert done.stderr.count(b"\n") < 4


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
def test_a_closed_standard_input() -> None:
    command = ["sh", "-c", f"{sys.executable} -m dinokit embed - -o o.npy <&-"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 3 and "standard input is closed" in done.stderr
    assert "Traceback" not in done.stderr


def test_labels_of_a_list_go_with_its_pictures() -> None:
    Path("b.png").write_bytes(png(2))
    write_tar(Path("a.tar"), {"1.png": png(1)})
    write_tar(Path("z.tar.gz"), {"3.png": png(3)}, "w:gz")
    listed = ["b.png", "a.tar::1.png", "z.tar.gz::3.png", "gone.png"]
    rows = "".join(f"{name},{label}\n" for name, label in zip(listed, ("x", "y", "", "z"), strict=True))
    Path("l.csv").write_text("path,label\n" + rows)
    pq.write_table(pa.table({"path": listed, "label": ["x", "y", None, "z"]}), "l.parquet")
    Path("capitals.csv").write_text("Path, Label\n" + rows)
    for name in ("l.csv", "l.parquet", "capitals.csv"):
        found = search_pictures(name).pictures
        assert found.labelled and names(found) == listed
        assert [label_of(item) for item in found] == ["x", "y", None, "z"]
        assert [is_there(item) for item in found] == [True, True, True, False]
        assert [item.in_order for item in found] == [False, False, True, False]  # type: ignore[union-attr]
        sent = pickle.loads(pickle.dumps(found[:3]))
        assert [item.read() for item in sent] == [png(2), png(1), png(3)]
        assert [state_of(item) for item in found] == [
            state_of(item) for item in search_pictures(listed).pictures
        ]
        with pytest.raises(ImageError, match="no such file"):
            found[3].read()  # type: ignore[union-attr]
        with pytest.raises(UsageError, match=r"gone\.png: no such file"):
            find_pictures(name)
    Path("n.csv").write_text("path,label\nb.png,\n")
    assert not search_pictures("n.csv").pictures.labelled


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="names there are Unicode")
def test_a_name_that_is_not_utf8_can_be_given_back_as_tables_show_it() -> None:
    Path("p").mkdir()
    file = os.fsdecode(b"p/bad\xff\xfe.png")
    Path(file).write_bytes(png(1))
    write_tar(Path(os.fsdecode(b"p/bad\xe9.tar")), {"2.png": png(2)})
    shown = [text_of(file), r"p/bad\xe9.tar::2.png"]
    assert shown[0] == r"p/bad\xff\xfe.png"
    Path("l.txt").write_text("\n".join(shown))
    assert read_all(find_pictures("l.txt")) == read_all(find_pictures(shown)) == [png(1), png(2)]
    assert [open_image(name).size for name in shown] == [(21, 16), (22, 16)]
    literal = Path(r"p/bad\xff\xfe.png")  # a file that is called so comes first
    literal.write_bytes(png(3))
    assert read_all(find_pictures("l.txt"))[0] == png(3)
    assert open_image(shown[0]).size == (23, 16)
