"""HEIC photographs: read where pillow-heif is installed, and said what is missing where it is not."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image, ImageFile, features
from small_models import picture

from dinokit import read_embeddings
from dinokit.cli import cli
from dinokit.errors import ImageError
from dinokit.pictures.images import decode_image, open_image

HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 80
AVIF = b"\0\0\0\x18ftypavif\0\0\0\0mif1avif" + b"\0" * 80


class StandIn(ImageFile.ImageFile):
    """A plugin for Pillow that sees a grey picture in every HEIC file."""

    format = "HEIF"

    def _open(self) -> None:
        self._mode, self._size = "RGB", (20, 10)

    def load(self) -> Any:
        self.im = Image.new("RGB", (20, 10), (70, 80, 90)).im
        return self.im.pixel_access(False)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """pillow-heif as far as dinokit knows it; counts how often it was registered."""
    registered: list[int] = []

    def register_heif_opener() -> None:
        registered.append(1)
        Image.register_open("HEIF", StandIn, lambda head: head[4:12] == b"ftypheic")

    module = ModuleType("pillow_heif")
    module.__spec__ = ModuleSpec("pillow_heif", None)
    module.register_heif_opener = register_heif_opener  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    before, ids = Image.OPEN.get("HEIF"), list(Image.ID)
    yield registered
    Image.ID[:] = ids
    Image.OPEN.pop("HEIF", None)
    if before is not None:
        Image.OPEN["HEIF"] = before


def test_without_pillow_heif_the_message_says_what_to_install(
    hide: Callable[[str], None], tmp_path: Path
) -> None:
    hide("pillow_heif")
    if "HEIF" in Image.ID:
        pytest.skip("another test registered pillow-heif for this process")
    with pytest.raises(ImageError, match=r"HEIC picture.*pip install 'dinokit\[heif\]'"):
        decode_image(HEIC)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "IMG_1.HEIC").write_bytes(HEIC)
    picture().save(tmp_path / "photos" / "a.png")
    table = tmp_path / "t.parquet"
    result = CliRunner().invoke(cli, ["embed", str(tmp_path / "photos"), "-o", str(table), "--device", "cpu"])
    assert result.exit_code == 1
    assert "IMG_1.HEIC: a HEIC picture" in result.stderr and "pip install 'dinokit[heif]'" in result.stderr
    assert read_embeddings(table).errors[1] is None


def test_pillow_heif_is_registered_at_the_first_heic(stand_in: list[int], tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    picture().save(tmp_path / "a.webp")
    for name in ("a.png", "a.webp"):
        open_image(tmp_path / name)
    with pytest.raises(ImageError, match="not a picture"):
        decode_image(bytes(range(200, 256)))
    assert not stand_in
    (tmp_path / "phone.heic").write_bytes(HEIC)
    for _ in range(2):
        pixels = np.asarray(open_image(tmp_path / "phone.heic"))
        assert pixels.shape == (10, 20, 3) and (pixels == (70, 80, 90)).all()
    assert len(stand_in) == 1  # later ones find Pillow knowing them


def test_a_damaged_heic_is_said_to_be_one(stand_in: list[int]) -> None:
    with pytest.raises(ImageError, match="a HEIC picture whose beginning is damaged"):
        decode_image(HEIC.replace(b"ftypheic", b"ftypheix"))
    assert stand_in


def test_avif_of_a_pillow_that_cannot_read_it(monkeypatch: pytest.MonkeyPatch) -> None:
    Image.init()
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "AVIF"])
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(ImageError, match=r"an AVIF picture.*pip install -U pillow"):
        decode_image(AVIF)


def test_importing_dinokit_does_not_import_pillow_heif() -> None:
    code = "import sys, dinokit.pictures.images; print('pillow_heif' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("orientation", [1, 6])
def test_real_heic_files(orientation: int) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = picture(120, 80)
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=95, exif=exif.tobytes())
    pixels = np.asarray(open_image(file.getvalue())).astype(int)
    upright = np.asarray(image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_270))
    assert pixels.shape == upright.shape
    assert np.abs(pixels - upright).mean() < 8
    with pytest.raises(ImageError, match=r"damaged|truncated"):
        decode_image(file.getvalue()[:400])
