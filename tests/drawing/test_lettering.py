"""Names of files on contact sheets: in any script, on one line, no wider than their place."""

from __future__ import annotations

import unicodedata
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, features

import dinokit.drawing.lettering
from dinokit.drawing.contact_sheet import contact_sheet
from dinokit.drawing.lettering import draw_text, fitting, font, font_for, wrapped

pytestmark = pytest.mark.skipif(not features.check("freetype2"), reason="this Pillow has no FreeType")


@pytest.fixture
def no_fonts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.drawing.lettering, "_FONTS", ())


def drawn(text: str, width: int = 300, keep: str = "start") -> np.ndarray:
    sheet = Image.new("L", (400, 30), 255)
    draw_text(ImageDraw.Draw(sheet), (4, 4), text, 13, "black", width, keep)  # type: ignore[arg-type]
    return np.asarray(sheet)


@pytest.mark.usefixtures("no_fonts")
def test_without_a_font_letters_lose_their_accents() -> None:
    own = font(13)
    assert fitting("Köln – é ß 東京.jpg", own, 999) == "Koln - e ss ??.jpg"
    np.testing.assert_array_equal(drawn("Köln.jpg"), drawn("Koln.jpg"))


def test_a_font_of_the_machine_draws_what_it_has() -> None:
    try:
        ImageFont.truetype("DejaVuSans.ttf", 13)
    except OSError:
        pytest.skip("DejaVu Sans is not installed")
    assert font_for("plain.jpg", 13) is font(13)
    chosen = font_for("Köln.jpg", 13)
    assert chosen is not font(13) and fitting("Köln.jpg", chosen, 999) == "Köln.jpg"
    # A missing letter is an empty box in Pillow's own font, the same for every letter.
    assert (drawn("ö") != drawn("ü")).any()


def test_names_of_macos_are_the_same_text() -> None:
    np.testing.assert_array_equal(drawn(unicodedata.normalize("NFD", "Köln")), drawn("Köln"))


def test_one_line_without_control_characters() -> None:
    assert fitting("a\nb\t c\x1b[31m", font(13), 999) == "a b c?[31m"


@pytest.mark.parametrize(("keep", "start", "end"), [("start", "a very", "..."), ("end", "...", "cat.jpg")])
@pytest.mark.usefixtures("no_fonts")
def test_what_is_too_long_is_cut(keep: str, start: str, end: str) -> None:
    cut = fitting("a very long folder/another folder/cat.jpg", font(13), 120, keep)  # type: ignore[arg-type]
    cut = cut.replace("…", "...")
    assert cut.startswith(start) and cut.endswith(end)
    ink = np.flatnonzero((drawn("a very long folder/another folder/cat.jpg", 120, keep) < 255).any(axis=0))
    assert ink.max() <= 4 + 120


def test_several_labels_share_a_row() -> None:
    tile = Image.new("RGB", (50, 50), "white")
    sheet = np.asarray(contact_sheet([(["", "b" * 200, ""], [tile] * 6)], ["x"] * 6, tile_px=50).convert("L"))
    ink = np.flatnonzero((sheet[40:58] < 200).any(axis=0))
    third = (sheet.shape[1] - 28 + 6) // 3
    assert ink.min() >= 14 + third and ink.max() <= 14 + 2 * third


def test_lines_are_parted_between_words() -> None:
    own = font(13)
    lines = wrapped("near-duplicates in another\nset at a similarity of 0.95", own, 120, most=9)
    assert " ".join(lines) == "near-duplicates in another set at a similarity of 0.95" and len(lines) > 2
    assert all(own.getlength(line) <= 120 for line in lines)
    assert all(
        own.getlength(f"{line} {after.split()[0]}") > 120 for line, after in pairwise(lines)
    )  # none could have held another word
    assert wrapped("one two three", own, 1, most=2) == ["one", "two three"]
    assert wrapped("", own, 100, most=3) == []
