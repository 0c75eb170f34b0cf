"""Pictures of attention: the colours, the overlay, the sheet and the names of files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import picture

from dinokit.drawing.contact_sheet import contact_sheet
from dinokit.drawing.overlays import colour_table, mask_picture, overlay
from dinokit.drawing.picture_folder import file_names
from dinokit.errors import UsageError


def oklab(rgb: np.ndarray) -> np.ndarray:
    """sRGB uint8 to OKLab in the direction opposite to the code's: the inverse matrices, numerically."""
    x = rgb / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    to_lms = [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
    to_lab = [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
    return np.cbrt(linear @ np.transpose(to_lms)) @ np.transpose(to_lab)


def test_colours_rise_in_lightness_in_equal_steps() -> None:
    lab = oklab(colour_table())
    assert colour_table().shape == (256, 3)
    assert (np.diff(lab[::4, 0]) > 0).all()
    steps = np.linalg.norm(np.diff(lab[::8], axis=0), axis=1)  # of 8, or rounding to 8 bits shows
    assert steps.std() / steps.mean() < 0.03
    assert lab[0, 0] < 0.2 and lab[-1, 0] > 0.93


def test_overlay_of_full_opacity_is_the_map_in_colours() -> None:
    image = picture(24, 24)
    attention = np.array([[0.0, 0.1], [0.2, 0.3]], np.float32)
    drawn = np.asarray(overlay(image, attention, opacity=1))
    assert drawn.shape == (24, 24, 3)
    assert drawn[0, 0].tolist() == colour_table()[0].tolist()
    assert drawn[-1, -1].tolist() == colour_table()[255].tolist()
    # Row is y and column is x: the lower left cell (0.2) is brighter than the upper right (0.1).
    assert drawn[-1, 0].sum() > drawn[0, -1].sum()


def test_overlay_of_no_opacity_is_the_picture_and_between_it_is_blended() -> None:
    image = np.asarray(picture(40, 24))
    attention = np.random.default_rng(0).random((3, 5), np.float32)
    np.testing.assert_array_equal(overlay(image, attention, opacity=0), image)
    colours = np.asarray(overlay(image, attention, opacity=1), np.float64)
    blended = np.asarray(overlay(Image.fromarray(image), attention, opacity=0.25), np.float64)
    np.testing.assert_allclose(blended, 0.75 * image + 0.25 * colours, atol=1)


def test_limits_make_maps_comparable() -> None:
    image = np.zeros((8, 8, 3), np.uint8)
    half = overlay(image, np.full((2, 2), 0.5), opacity=1, limits=(0, 1))
    assert np.abs(np.asarray(half)[4, 4].astype(int) - colour_table()[128]).max() <= 3
    flat = overlay(image, np.full((2, 2), 0.5), opacity=1)
    assert np.asarray(flat)[4, 4].tolist() == colour_table()[0].tolist()
    above = overlay(image, np.full((2, 2), 9.0), opacity=1, limits=(0, 1))
    assert np.asarray(above)[4, 4].tolist() == colour_table()[255].tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": np.ones((3, 2, 2))}, r"shape \(3, 2, 2\); expected \(h, w\)"),
        ({"attention": np.array([[np.nan]])}, "not finite"),
        ({"opacity": 1.5}, "opacity=1.5 must lie between 0"),
        ({"limits": (1, 0)}, "in the wrong order"),
        (
            {"image": np.zeros((8, 12, 3), np.uint8)},
            r"the picture is 12x8 and the map 2x2.*preprocessing\.crop",
        ),
        ({"image": np.zeros((8, 8, 3))}, r"float64 of shape \(8, 8, 3\); expected a Pillow image or uint8"),
    ],
)
def test_impossible_overlays(arguments: dict[str, object], message: str) -> None:
    given = {"image": np.zeros((8, 8, 3), np.uint8), "attention": np.ones((2, 2)), **arguments}
    with pytest.raises(UsageError, match=message):
        overlay(given.pop("image"), given.pop("attention"), **given)  # type: ignore[arg-type]


def test_a_photograph_is_turned_upright_first() -> None:
    upright = picture(40, 24)
    lying = upright.transpose(Image.Transpose.ROTATE_90)
    lying.getexif()[0x0112] = 6  # to be turned back by viewers
    attention = np.random.default_rng(0).random((3, 5), np.float32)
    np.testing.assert_array_equal(overlay(lying, attention), overlay(upright, attention))


def test_masks_are_flat_squares() -> None:
    mask = np.array([[True, False, True]])
    np.testing.assert_array_equal(mask_picture(mask, (4, 12)), np.kron(mask * np.uint8(255), np.ones((4, 4))))


def test_a_sheet_has_every_picture_at_its_place() -> None:
    red, green, blue = (Image.new("RGB", (60, 30), c) for c in ("#ff0000", "#00ff00", "#0000ff"))
    sheet = contact_sheet([("one", [red, green]), ("two" * 200, [blue, red])], ["a", "b" * 99], tile_px=40)
    pixels = np.asarray(sheet).astype(int)
    places = {}
    for name, colour in {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}.items():
        found = np.argwhere((pixels == colour).all(-1))
        places[name] = (len(found), found.mean(0))
    assert [places[name][0] for name in ("red", "green", "blue")] == [1600, 800, 800]  # 40 x 20 each
    assert places["green"][1][0] < places["blue"][1][0] and places["green"][1][1] > places["blue"][1][1]
    with pytest.raises(UsageError, match="row 'x' has 1 pictures for 2 columns"):
        contact_sheet([("x", [red])], ["a", "b"])
    with pytest.raises(UsageError, match="at least one"):
        contact_sheet([], ["a"])


def test_a_long_title_takes_lines_and_moves_what_is_below() -> None:
    tile = Image.new("RGB", (160, 30), "#ff0000")

    def drawn(title: str) -> tuple[int, int]:
        """First row of the picture, and how many rows above it have letters of the title's colour."""
        pixels = np.asarray(contact_sheet([("", [tile, tile])], ["", ""], title=title, tile_px=160)).astype(
            int
        )
        top = int(np.argwhere((pixels == (255, 0, 0)).all(-1))[0, 0])
        return top, int((pixels[:top] < 128).any((1, 2)).sum())

    none, one, two = (
        drawn(""),
        drawn("near-duplicates"),
        drawn("near-duplicates in another set at a similarity of 0.95"),
    )
    assert none[1] == 0 and one[0] == none[0] + 26 and two[0] == one[0] + 20
    assert 1.5 * one[1] < two[1] < 2.5 * one[1]
    assert drawn("word " * 999)[0] == one[0] + 40  # three lines, then it is cut


def test_names_never_collide_and_never_leave_the_folder() -> None:
    paths = [
        "a/cat.jpg",
        "b/cat.png",
        "c/CAT.jpg",
        "cat-2.jpg",
        "../../etc/...",
        ".hidden.jpg",
        "x\\..\\y.jpg",
        "contact-sheet.png.jpg",
        "attention.json.png",
        "con.jpg",
        "n" * 300 + ".jpg",
        "日本" * 80 + ".jpg",
        "猫.jpg",
        "new\nline:*?.jpg",
        b"caf\xe9.jpg".decode("utf-8", "surrogateescape"),
    ]
    names = file_names(paths)
    assert names[:5] == ["cat", "cat-2", "CAT-3", "cat-2-2", "photo"]
    assert "猫" in names and "contact-sheet_png" in names and "attention_json" in names
    assert len({name.casefold() for name in names}) == len(paths)
    for name in names:
        assert Path(name).name == name and not name.startswith(".") and len(name.encode()) < 140
        assert not set(name) & set('/\\:*?"<>|\n\0') and name.casefold() != "con"
    assert len(set(file_names(["same.jpg"] * 5000))) == 5000
    assert file_names(["z.zip::a.jpg", "z.zip::d/b.png", "t.parquet::3"]) == ["a", "b", "t-3"]


def test_labels_of_narrow_pictures_have_room() -> None:
    narrow = Image.new("RGB", (20, 200), "red")
    sheet = contact_sheet([("a name", [narrow] * 2)], ["picture", "patches"], title="a title")
    assert sheet.width >= 2 * 120
    assert sheet.getpixel((14 + 120 + 6, sheet.height - 50)) == (255, 0, 0)
