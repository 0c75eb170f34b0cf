"""The limit against decompression bombs, and the variable that moves it (read at the start: in processes here)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_models import picture

from dinokit.errors import ImageError
from dinokit.pictures.images import open_image
from dinokit.pictures.picture_limit import most_pixels


def embed(folder: Path, most: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dinokit", "embed", str(folder), "-o", str(folder / "t.csv"), "--overwrite"],
        env={**os.environ, "DINOKIT_MAX_PIXELS": most},
        capture_output=True,
        text=True,
    )


def test_the_variable_sets_the_limit_to_the_pixel(tmp_path: Path) -> None:
    picture(1000, 1001).save(tmp_path / "a.png")
    refused = embed(tmp_path, "1000998")
    assert refused.returncode == 3
    assert "allows (1,000,998); if you trust it, set the variable DINOKIT_MAX_PIXELS" in refused.stderr
    taken = embed(tmp_path, "1001000")
    assert taken.returncode == 0, taken.stderr


@pytest.mark.parametrize("most", ["many", "999999", "-5000000", "1e9"])
def test_what_is_no_number_is_refused(most: str, tmp_path: Path) -> None:
    picture(40, 41).save(tmp_path / "a.png")
    refused = embed(tmp_path, most)
    assert refused.returncode == 2
    assert (
        f"DINOKIT_MAX_PIXELS={most} is not a number of pixels; give an integer of at least 1000000"
        in refused.stderr
    )
    assert "Traceback" not in refused.stderr


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # at half of the limit
def test_pillows_own_number_is_kept_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(40, 41).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40 * 41 // 2 - 1)
    assert most_pixels() == 40 * 41 - 2
    with pytest.raises(ImageError, match=r"\(1,638\).*DINOKIT_MAX_PIXELS"):
        open_image(tmp_path / "a.png")
    for limit in (40 * 41 // 2, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        assert most_pixels() == (limit and 40 * 41)
        assert open_image(tmp_path / "a.png").size == (40, 41)


def test_an_import_neither_raises_nor_changes_pillow(tmp_path: Path) -> None:
    picture(40, 41).save(tmp_path / "a.png")
    program = """
import os, sys
from PIL import Image
own = Image.MAX_IMAGE_PIXELS
import dinokit.pictures.bands
from dinokit.pictures.images import open_image
assert Image.MAX_IMAGE_PIXELS == own
try:
    open_image(sys.argv[1])
except ValueError as error:
    print(error)
os.environ["DINOKIT_MAX_PIXELS"] = "3000000"
open_image(sys.argv[1])
print(Image.MAX_IMAGE_PIXELS)
"""
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "a.png")],
        env={**os.environ, "DINOKIT_MAX_PIXELS": "many"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[1:] == ["1500000"], done.stderr
    assert "DINOKIT_MAX_PIXELS=many is not a number of pixels" in done.stdout


def test_what_a_program_has_set_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DINOKIT_MAX_PIXELS", "3000000")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5_000_000)
    assert most_pixels() == 10_000_000
