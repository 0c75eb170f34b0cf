"""Archives and pictures for the tests of sources."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path
from typing import Any

from small_models import picture

from dinokit.sources import (
    Picture,
    PictureList,
    in_order,
    search_pictures,
)


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


def find_pictures_tolerant(*inputs: str) -> PictureList:
    found = search_pictures(inputs)
    assert not found.problems
    return found.pictures
