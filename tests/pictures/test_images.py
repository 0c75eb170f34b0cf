"""open_image and find_images on pictures as people have them."""

from __future__ import annotations

import glob
import io
import os
import pickle
import struct
import subprocess
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps

import dinokit.pictures.picture_bytes
from dinokit.errors import ImageError, UsageError
from dinokit.pictures.image_files import glob_files, search_images
from dinokit.pictures.images import decode_image, decode_keeping_bits, find_images, open_image
from dinokit.sources import is_collection, search_pictures

Pixels = NDArray[np.uint8]


def photo(height: int = 48, width: int = 64) -> Pixels:
    """A picture without any symmetry: smooth, with a bright corner."""
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 / width, y * 255 / height, 255 - (x + y) * 255 / (width + height)], -1)
    rgb[: height // 4, : width // 4] = (250, 240, 10)
    return rgb.astype(np.uint8)


def pixels(source: object) -> Pixels:
    image = open_image(source)
    assert image.mode == "RGB"
    return np.asarray(image)


# How the rows are stored for each orientation, so that a viewer following EXIF 2.32 shows the picture upright.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),  # "row 0 is the right side": the camera lay on its side
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: np.rot90(a, -1),
}


def with_orientation(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
def test_every_exif_orientation_is_the_upright_picture(tmp_path: Path, kind: str, orientation: int) -> None:
    upright = photo()
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    file = tmp_path / f"photo.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    stored.save(file, exif=with_orientation(orientation), **options)
    np.testing.assert_array_equal(pixels(file), upright)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_jpeg_agrees_with_pillow(tmp_path: Path, orientation: int) -> None:
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](photo())))
    file = tmp_path / "photo.jpg"
    stored.save(file, exif=with_orientation(orientation), quality=95)
    with Image.open(file) as image:
        truth = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        as_object = pixels(image)
    np.testing.assert_array_equal(pixels(file), truth)
    np.testing.assert_array_equal(as_object, truth)
    # And upright indeed: JPEG's error is small beside that of a wrong turn.
    assert np.abs(truth.astype(int) - photo()).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_cost_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "photo.jpg"
    Image.fromarray(photo()).save(file, exif=b"Exif\0\0MM\0*\xff\xff\xff\xff", quality=95)
    assert pixels(file).shape == (48, 64, 3)


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
@pytest.mark.parametrize("kind", ["png", "tiff"])
def test_16_bit_grey_is_scaled_not_clipped(tmp_path: Path, mode: str, kind: str) -> None:
    grey = photo()[:, :, 0]
    wide = grey.astype(np.uint16) * 257
    if mode == "I;16B" and kind == "png":
        pytest.skip("PNG has one byte order")
    image = Image.fromarray(wide) if mode == "I;16" else Image.fromarray(wide.astype(">u2"))
    file = tmp_path / f"grey.{kind}"
    image.save(file)
    np.testing.assert_array_equal(pixels(file), np.repeat(grey[:, :, None], 3, 2))


def test_16_bit_grey_is_rounded_to_the_nearest() -> None:
    values = np.array([[0, 128, 129, 257, 65406, 65407, 65535]], np.uint16)
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(Image.fromarray(values))[:, :, 0], expected)


def test_16_bit_pgm(tmp_path: Path) -> None:
    file = tmp_path / "dark.pgm"  # its greatest value is small: the file's range counts, not the picture's
    values = np.array([[0, 100, 200]], ">u2")
    file.write_bytes(b"P5 3 1 65535\n" + values.tobytes())
    np.testing.assert_array_equal(pixels(file)[0, :, 0], [0, 0, 1])


def test_32_bit_grey() -> None:
    def first_row(array: object) -> list[int]:
        return pixels(Image.fromarray(np.asarray(array)))[0, :, 0].tolist()

    assert first_row(np.array([[0, 100, 255]], np.int32)) == [0, 100, 255]
    assert first_row(np.array([[0, 257, 65535]], np.int32)) == [0, 1, 255]
    assert first_row(np.array([[-10, 0, 10]], np.int32)) == [0, 128, 255]
    assert first_row(np.array([[0, 0.5, 1]], np.float32)) == [0, 128, 255]
    assert first_row(np.array([[0, 99.6, 200]], np.float32)) == [0, 100, 200]
    assert first_row(np.array([[1e6, 1.5e6, 2e6]], np.float32)) == [0, 128, 255]
    assert first_row(np.array([[-7, -7]], np.float32)) == [0, 0]
    with pytest.raises(ImageError, match="not numbers"):
        first_row(np.array([[0, np.nan]], np.float32))


def over_white(rgba: Pixels) -> NDArray[np.float64]:
    alpha = rgba[:, :, 3:] / 255
    return rgba[:, :, :3] * alpha + 255 * (1 - alpha)


def test_alpha_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.linspace(0, 255, 64).astype(np.uint8)[None, :, None].repeat(48, 0)
    rgba = np.concatenate([photo(), alpha], 2)
    for name, image in {
        "rgba.png": Image.fromarray(rgba),
        "rgba.webp": Image.fromarray(rgba),
        "premultiplied.tiff": Image.fromarray(rgba),
    }.items():
        options = {"lossless": True, "exact": True} if name.endswith("webp") else {}
        image.save(tmp_path / name, **options)
        assert np.abs(pixels(tmp_path / name) - over_white(rgba)).max() <= 1, name
    assert np.abs(pixels(rgba) - over_white(rgba)).max() <= 1
    grey = Image.fromarray(photo()).convert("LA")
    grey.putalpha(Image.fromarray(alpha[:, :, 0]))
    grey.save(tmp_path / "la.png")
    assert np.abs(pixels(tmp_path / "la.png") - over_white(np.asarray(grey.convert("RGBA")))).max() <= 1


def test_opaque_alpha_changes_nothing() -> None:
    rgba = np.concatenate([photo(), np.full((48, 64, 1), 255, np.uint8)], 2)
    np.testing.assert_array_equal(pixels(Image.fromarray(rgba)), photo())


def test_transparent_colour_of_palette_grey_and_rgb_is_white(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 0)
    palette.save(tmp_path / "p.png", transparency=0)
    palette.save(tmp_path / "p.gif", transparency=0)
    for name in ("p.png", "p.gif"):
        assert pixels(tmp_path / name)[0, :2].tolist() == [[255, 255, 255], [200, 100, 50]]
    Image.fromarray(np.array([[7, 9]], np.uint8)).save(tmp_path / "l.png", transparency=7)
    assert pixels(tmp_path / "l.png")[0].tolist() == [[255, 255, 255], [9, 9, 9]]
    rgb = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    rgb.save(tmp_path / "rgb.png", transparency=(1, 2, 3))
    assert pixels(tmp_path / "rgb.png")[0].tolist() == [[255, 255, 255], [4, 5, 6]]


def test_palette_grey_and_one_bit(tmp_path: Path) -> None:
    grey = photo()[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "l.png")
    np.testing.assert_array_equal(pixels(tmp_path / "l.png"), np.repeat(grey[:, :, None], 3, 2))
    few = (photo() // 86 * 85).astype(np.uint8)  # 27 colours: a palette holds them exactly
    Image.fromarray(few).quantize(colors=64, dither=Image.Dither.NONE, method=Image.Quantize.FASTOCTREE)
    exact = Image.fromarray(few).convert("P", palette=Image.Palette.ADAPTIVE, colors=64)
    exact.save(tmp_path / "p.png")
    assert np.abs(pixels(tmp_path / "p.png").astype(int) - few).max() <= 2
    bits = Image.fromarray(grey > 128)
    bits.save(tmp_path / "bits.png")
    assert set(np.unique(pixels(tmp_path / "bits.png"))) == {0, 255}


@pytest.mark.parametrize("kind", ["jpg", "tiff"])
def test_cmyk(tmp_path: Path, kind: str) -> None:
    # Pillow writes CMYK JPEG as Adobe does, inverted; read naively a red picture turns out cyan or black.
    file = tmp_path / f"red.{kind}"
    Image.new("RGB", (32, 32), (220, 30, 40)).convert("CMYK").save(
        file, **({"quality": 95} if kind == "jpg" else {})
    )
    if kind == "jpg":
        assert b"Adobe" in file.read_bytes()
    np.testing.assert_allclose(pixels(file).mean((0, 1)), (220, 30, 40), atol=3)


def test_ycbcr_and_bmp_and_16_bit_rgb(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "p.bmp")
    np.testing.assert_array_equal(pixels(tmp_path / "p.bmp"), photo())
    assert np.abs(pixels(Image.fromarray(photo()).convert("YCbCr")).astype(int) - photo()).max() <= 3
    (tmp_path / "rgb16.png").write_bytes(
        png(
            2,
            1,
            bit_depth=16,
            colour=2,
            data=struct.pack(">6H", *[257 * v for v in (1, 2, 3, 200, 100, 255)]),
        )
    )
    assert pixels(tmp_path / "rgb16.png")[0].tolist() == [[1, 2, 3], [200, 100, 255]]


def test_animations_give_their_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "green")]
    for name, options in {"a.gif": {}, "a.webp": {"lossless": True}, "a.png": {}}.items():
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=50, **options)
        assert pixels(tmp_path / name)[5, 5].tolist() == [255, 0, 0], name


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000)])
def test_extreme_shapes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (1, 2, 3)).save(tmp_path / "p.png")
    assert pixels(tmp_path / "p.png").shape == (size[1], size[0], 3)


def test_odd_names(tmp_path: Path) -> None:
    for name in ("two words.png", "größe – 写真.png", "#%20.png", "[0].png"):
        Image.fromarray(photo()).save(tmp_path / name)
        np.testing.assert_array_equal(pixels(tmp_path / name), photo())
        assert find_images(str(tmp_path / name)) == [tmp_path / name]


def test_all_kinds_of_source_agree(tmp_path: Path) -> None:
    file = tmp_path / "p.png"
    Image.fromarray(photo()).save(file)
    data = file.read_bytes()
    with file.open("rb") as stream, Image.open(file) as lazy:
        sources = [
            str(file),
            file,
            data,
            bytearray(data),
            memoryview(data),
            io.BytesIO(data),
            stream,
            lazy,
            photo(),
        ]
        for source in sources:
            np.testing.assert_array_equal(pixels(source), photo(), err_msg=type(source).__name__)
    np.testing.assert_array_equal(pixels(photo()[:, :, 0])[:, :, 1], photo()[:, :, 0])
    np.testing.assert_array_equal(pixels(photo()[::-1])[::-1], photo())


def test_the_callers_image_is_not_changed() -> None:
    image = Image.fromarray(photo())
    opened = open_image(image)
    opened.putpixel((0, 0), (9, 9, 9))
    assert image.getpixel((0, 0)) == (250, 240, 10)


@pytest.mark.parametrize("kind", ["jpeg", "png", "bmp", "ppm"])
def test_the_pixels_of_a_file_are_not_copied_and_need_it_no_more(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"a.{kind}"
    Image.fromarray(photo()).save(path)
    expected = np.asarray(Image.open(path))
    with monkeypatch.context() as patched:
        patched.delattr(Image.Image, "copy")  # which Pillow's convert calls, too
        image = open_image(path)
    path.unlink()
    np.testing.assert_array_equal(np.asarray(pickle.loads(pickle.dumps(image))), expected)


def test_a_file_that_the_caller_opened_stays_the_callers(tmp_path: Path) -> None:
    Image.fromarray(photo()).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as theirs:
        open_image(theirs).paste("red", (0, 0, 64, 48))
        np.testing.assert_array_equal(np.asarray(theirs), photo())


def test_torch_tensors_are_channels_first() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(photo()).permute(2, 0, 1)
    np.testing.assert_array_equal(pixels(tensor), photo())
    np.testing.assert_array_equal(pixels(tensor[:1])[:, :, 2], photo()[:, :, 0])
    with pytest.raises(ImageError, match=r"channels-last, use tensor\.permute\(2, 0, 1\)"):
        open_image(torch.from_numpy(photo()))
    with pytest.raises(ImageError, match="its layout is ambiguous"):
        open_image(torch.zeros(3, 10, 3, dtype=torch.uint8))
    with pytest.raises(ImageError, match=r"dtype torch\.float32, expected torch\.uint8"):
        open_image(torch.zeros(3, 10, 10))


def test_arrays_of_other_kinds_are_refused() -> None:
    with pytest.raises(ImageError, match="dtype float64, expected uint8"):
        open_image(photo() / 255)
    with pytest.raises(ImageError, match=r"channels-first, use array\.transpose\(1, 2, 0\)"):
        open_image(photo().transpose(2, 0, 1))
    with pytest.raises(ImageError, match=r"shape \(2, 48, 64, 3\), expected \(H, W, 3\)"):
        open_image(photo()[None].repeat(2, 0))
    with pytest.raises(ImageError, match="is empty"):
        open_image(photo()[:0])
    with pytest.raises(ImageError, match="a int is not a picture; expected a path"):
        open_image(7)


# -- pictures that cannot be read


def png(width: int, height: int, *, bit_depth: int = 8, colour: int = 2, data: bytes = b"") -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" + data))
        + chunk(b"IEND", b"")
    )


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(buffer, kind)
    return buffer.getvalue()


BAD_FILES = {
    "empty.jpg": (b"", "the file is empty"),
    "text.jpg": ("Dies ist kein Bild, sondern Text: größer".encode(), "not a picture but text"),
    "page.jpg": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "drawing.png": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
    "paper.jpg": (b"%PDF-1.7\n", "PDF"),
    "pointer.jpg": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    "phone.heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 80, "HEIC"),
    "junk.png": (bytes(range(200, 256)) * 10, "not a picture in a format that Pillow reads"),
    "cut.jpg": (encoded("JPEG")[:3000], "truncated"),
    "cut.png": (encoded("PNG")[:3000], "truncated"),
    "cut.gif": (encoded("GIF")[:1500], "truncated"),
    "cut.webp": (encoded("WEBP")[:600], "damaged|truncated"),
    "cut.tiff": (encoded("TIFF")[:6000], "damaged|truncated"),
    "head.jpg": (encoded("JPEG")[:20], "damaged|truncated|not a picture"),
    "bomb.png": (png(60000, 60000), "safety|limit against decompression bombs"),
    "page.eps": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        "not a picture of pixels but PostScript",
    ),
    "comic.cbz": (b"PK\x03\x04\x14\0" + bytes(40), r"a zip archive; rename it to end in \.zip"),
    "all.tar.bz2": (b"BZh91AY&SY" + bytes(40), r"a compressed file.*\.tar\.gz"),
    "film.mp4": (b"\0\0\0\x20ftypisom" + bytes(40), "a video; save its frames"),
    "raw.cr3": (b"\0\0\0\x18ftypcrx " + bytes(40), "a raw photograph"),
    "new.jxl": (b"\xff\x0a" + bytes(range(200, 240)), "a JPEG XL picture"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_give_a_human_reason(tmp_path: Path, name: str) -> None:
    content, reason = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name) + ": ")
    assert " object at 0x" not in str(caught.value)
    assert "\n" not in str(caught.value)
    if content:
        with pytest.raises(ImageError, match=reason):
            open_image(content)


@pytest.mark.skipif(os.name == "nt", reason="makes links and pipes")
def test_bad_paths_give_a_human_reason(tmp_path: Path) -> None:
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nowhere.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, reason in {
        "missing.jpg": "no such file",
        ".": "this is a folder",
        "dangling.jpg": "the link points to a missing file",
        "pipe.jpg": "not a regular file",
        "x" * 300 + ".jpg": "cannot be opened",
        "nul\0.jpg": "not a valid file name",
    }.items():
        with pytest.raises(ImageError, match=reason):
            open_image(tmp_path / name)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root reads everything")
def test_locked_file(tmp_path: Path) -> None:
    (tmp_path / "locked.png").write_bytes(encoded("PNG"))
    (tmp_path / "locked.png").chmod(0)
    with pytest.raises(ImageError, match="permission denied"):
        open_image(tmp_path / "locked.png")


def test_decode_image_leaves_the_name_out(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"^no such file$"):
        decode_image(tmp_path / "missing.jpg")


def test_pillows_settings_are_left_alone(tmp_path: Path) -> None:
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    (tmp_path / "cut.jpg").write_bytes(encoded("JPEG")[:3000])
    with pytest.raises(ImageError):
        open_image(tmp_path / "cut.jpg")
    assert (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS) == before == (False, before[1])


# -- finding


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"")


def test_folders_are_searched_in_the_order_of_path_bytes(tmp_path: Path) -> None:
    names = ["b.jpg", "B.JPG", "a/2.png", "a/10.png", "a-b/x.webp", "é.jpg", "z/deep/er/y.tif"]
    touch(*(tmp_path / name for name in names))
    touch(tmp_path / "notes.txt", tmp_path / ".hidden.jpg", tmp_path / ".cache" / "x.jpg")
    expected = sorted(names, key=lambda name: name.encode())
    assert [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)] == expected
    assert expected[1:3] == ["a-b/x.webp", "a/10.png"]  # bytes of the whole path, not folder by folder


def test_the_order_of_the_arguments_stays_and_nothing_is_dropped(tmp_path: Path) -> None:
    a, b, text = tmp_path / "f" / "a.jpg", tmp_path / "f" / "b.jpg", tmp_path / "notes.txt"
    touch(a, b, text)
    assert find_images([b, tmp_path / "f", text, b]) == [b, a, b, text, b]


def test_patterns(tmp_path: Path) -> None:
    files = [tmp_path / n for n in ("a.jpg", "b.jpg", "b.png", "sub/c.jpg", "[x].jpg")]
    touch(*files)
    assert find_images(str(tmp_path / "?.jpg")) == [files[0], files[1]]
    assert find_images(str(tmp_path / "b.*")) == [files[1], files[2]]
    assert find_images(str(tmp_path / "**" / "*.jpg")) == [files[4], files[0], files[1], files[3]]
    assert find_images(str(tmp_path / "[x].jpg")) == [files[4]]  # a file's own name comes before the pattern
    assert find_images(str(tmp_path / "s*")) == [files[3]]
    assert len(find_images(str(tmp_path / "**"))) == 5
    assert is_collection(str(tmp_path / "?.jpg"))
    assert not is_collection(str(tmp_path / "[x].jpg"))


def test_link_loops_end_and_links_are_followed(tmp_path: Path) -> None:
    touch(tmp_path / "one" / "a.jpg", tmp_path / "two" / "b.jpg")
    (tmp_path / "one" / "up").symlink_to(tmp_path)
    (tmp_path / "one" / "self").symlink_to(tmp_path / "one")
    (tmp_path / "three").symlink_to(tmp_path / "two")
    found = [p.relative_to(tmp_path).as_posix() for p in find_images(tmp_path)]
    assert found == ["one/a.jpg", "three/b.jpg", "two/b.jpg"]


def test_link_loops_end_in_patterns_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    touch(Path("one/a.jpg"), Path("one/in/b.jpg"), Path("c.jpg"))
    Path("one", "up").symlink_to(tmp_path)
    Path("one", "self").symlink_to(tmp_path / "one")  # glob would try both in every order, for ever
    every = ["c.jpg", "one/a.jpg", "one/in/b.jpg"]
    assert [str(path) for path in find_images("**/*.jpg")] == every
    assert [str(path) for path in find_images(str(tmp_path / "**" / "*.jpg"))] == [
        str(tmp_path / n) for n in every
    ]
    assert [str(path) for path in find_images("one/**/**/b*")] == ["one/in/b.jpg"]


def test_patterns_match_what_glob_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = (
        "a.jpg",
        ".b.jpg",
        "x/a.jpg",
        "x/[1]/a.jpg",
        "x/y/z/a.jpg",
        ".h/a.jpg",
        "x/.h/a.jpg",
        "x/.h/y/.a.jpg",
    )
    touch(*map(Path, names))
    for pattern in (
        "**",
        "**/a.jpg",
        "x/**/*.jpg",
        "x/**/[[]1]/*",
        "**/.h/*",
        "**/.*/**/*.jpg",
        ".h/**",
        "?/**/z/**",
    ):
        for place in ("", f"{tmp_path}/", "./", "*/"):
            expected = {path for path in glob.glob(place + pattern, recursive=True) if Path(path).is_file()}  # noqa: PTH207
            assert glob_files(place + pattern) == sorted(expected), place + pattern


def test_folders_deeper_than_pythons_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep, depth = tmp_path / "d", 1100
    monkeypatch.chdir(tmp_path)
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    touch(Path("a.jpg"))
    try:
        monkeypatch.undo()
        assert [path.name for path in find_images(deep)] == ["a.jpg"]
        assert find_images(str(deep / "**" / "*.jpg")) == find_images(deep)
    finally:  # pytest's own clean-up is recursive
        subprocess.run(["rm", "-rf", str(deep)], check=True)


def test_raw_photographs_are_left_out_but_not_in_silence(tmp_path: Path) -> None:
    touch(*(tmp_path / "both" / name for name in ("a.CR2", "a.jpg", "b.nef", "sub/c.dng", "d.nef")))
    touch(tmp_path / "pairs" / "a.NEF", tmp_path / "pairs" / "a.JPG", tmp_path / "raw" / "a.arw")
    said = (
        "left out 3 raw photographs (.dng, .nef) without a developed picture of the same name; develop them"
    )
    for search in (search_images, search_pictures):
        found: Any = search(tmp_path / "both")
        assert [said in problem for problem in found.problems] == [True]
        assert search(tmp_path / "pairs").problems == []
        assert "left out 1 raw photograph (.arw)" in search(tmp_path / "raw").problems[0]
    assert search_pictures(tmp_path / "both", channels=5).problems == [
        f"{tmp_path}/both: no .npy or TIFF files in this folder, as pictures of many channels are; only 5 files with "
        "other suffixes"
    ]


def test_a_raw_photograph_is_not_its_thumbnail_or_mosaic(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    thumbnail, mosaic = np.zeros((12, 16, 3), np.uint8), np.full((120, 160), 700, np.uint16)
    with tifffile.TiffWriter(tmp_path / "a.nef") as file:
        file.write(thumbnail, photometric="rgb", subfiletype=1, subifds=1)
        file.write(mosaic, photometric="cfa")
    tifffile.imwrite(tmp_path / "b.tif", mosaic, photometric="cfa")
    dng_version = (50706, 1, 4, (1, 4, 0, 0), True)
    tifffile.imwrite(
        tmp_path / "c.dng", mosaic[:, :, None].repeat(3, 2), photometric=34892, extratags=[dng_version]
    )
    (tmp_path / "d.raf").write_bytes(b"FUJIFILMCCD-RAW 0201")
    for file in tmp_path.iterdir():
        with pytest.raises(ImageError, match="a raw photograph"):
            open_image(file)
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as file:
        file.write(np.zeros((64, 64, 3), np.uint8), photometric="rgb", subifds=1)
        file.write(np.zeros((32, 32, 3), np.uint8), photometric="rgb", subfiletype=1)
    assert open_image(tmp_path / "pyramid.tif").size == (64, 64)


def test_what_matches_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "texts" / "a.txt", tmp_path / "ok.jpg")
    inputs = [
        tmp_path / "empty",
        tmp_path / "texts",
        tmp_path / "*.tiff",
        tmp_path / "no.jpg",
        tmp_path / "ok.jpg",
    ]
    with pytest.raises(UsageError) as caught:
        find_images([str(i) for i in inputs])
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        "no pictures in this folder; it is empty",
        "no pictures in this folder, only 1 file with other suffixes",
        "the pattern matches no file",
        "no such file",
    ]
    found = search_images([str(i) for i in inputs])
    assert found.paths == [tmp_path / "no.jpg", tmp_path / "ok.jpg"]  # the missing file keeps its place
    assert len(found.problems) == 3


def test_a_jpeg_may_come_smaller_but_not_too_small(tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    gradient = np.linspace(0, 255, 400, dtype=np.uint8)[None, :, None].repeat(300, 0).repeat(3, 2)
    Image.fromarray(gradient).save(path, quality=95)
    for least_px, size in (
        (None, (400, 300)),
        (151, (400, 300)),
        (150, (200, 150)),
        (75, (100, 75)),
        (1, (50, 38)),
    ):
        assert open_image(path, least_px=least_px).size == size
    small, whole = open_image(path, least_px=150), open_image(path).resize((200, 150), Image.Resampling.BOX)
    assert np.abs(np.asarray(small, float) - np.asarray(whole, float)).mean() < 1.5
    Image.fromarray(gradient).save(tmp_path / "photo.png")
    assert open_image(tmp_path / "photo.png", least_px=1).size == (400, 300)


def test_a_turned_jpeg_is_turned_when_it_comes_smaller(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (400, 200)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg", least_px=100).size == (100, 200)


def test_a_picture_that_was_turned_is_not_turned_again() -> None:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    Image.fromarray(np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)).save(stream, "PNG", exif=exif)
    upright = open_image(stream.getvalue())
    assert upright.size == (6, 8)
    np.testing.assert_array_equal(np.asarray(open_image(upright)), np.asarray(upright))


def test_a_file_that_was_read_to_its_end_is_read_again() -> None:
    """As Pillow does: a service may have looked into an upload before."""
    data = io.BytesIO()
    Image.fromarray(photo()).save(data, "PNG")
    expected = np.asarray(open_image(data.getvalue()))
    for _ in range(2):  # the first stands at the end from writing
        np.testing.assert_array_equal(np.asarray(open_image(data)), expected)
    assert dinokit.pictures.picture_bytes.encoded(data) == data.getvalue()
    data.seek(0)
    with pytest.raises(ImageError, match="empty"):
        open_image(io.BytesIO())
    with pytest.raises(ImageError, match="opened as text; open it with mode 'rb'"):
        open_image(io.StringIO("text"))


def test_a_file_is_read_from_where_it_stands() -> None:
    data = io.BytesIO()
    data.write(b"a header of its own")
    Image.fromarray(photo()).save(data, "PNG")
    data.seek(19)
    assert open_image(data).size == photo().shape[1::-1]


def test_grey_arrays_may_have_a_channel_axis() -> None:
    grey = photo()[:, :, 0]
    np.testing.assert_array_equal(pixels(grey[:, :, None]), pixels(grey))
    with pytest.raises(ImageError, match=r"expected \(H, W, 3\), \(H, W, 4\), \(H, W, 1\) or \(H, W\)"):
        open_image(photo()[:, :, :2])


@pytest.mark.parametrize(("mode", "premultiplied"), [("LA", "La"), ("RGBA", "RGBa")])
def test_colours_premultiplied_with_alpha_are_the_same_picture(mode: str, premultiplied: str) -> None:
    image = Image.fromarray(np.concatenate([photo(), photo()[:, :, 1:2]], axis=2)).convert(mode)
    stored = image.convert(premultiplied)
    assert stored.mode == premultiplied
    # What Porter and Duff's "over" makes of it on white, from the premultiplied numbers themselves.
    numbers = np.asarray(stored).astype(int)
    truth = (numbers[:, :, :-1] + 255 - numbers[:, :, -1:]).repeat(3 if mode == "LA" else 1, axis=2)
    assert np.abs(pixels(stored) - truth).max() <= 1
    np.testing.assert_allclose(pixels(stored).astype(int), pixels(image), atol=2)


def test_an_empty_name_is_no_folder() -> None:
    with pytest.raises(ImageError, match=r"^'': the path is empty$"):
        open_image("")


def test_one_row_of_colours_is_no_narrow_grey_picture() -> None:
    row = np.random.default_rng(0).integers(0, 256, (1, 30, 3), np.uint8)
    file = io.BytesIO()
    np.save(file, row)
    np.testing.assert_array_equal(pixels(file.getvalue()), row)
    deep, _ = decode_keeping_bits(row.astype(np.uint16) * 257 + 1)
    assert (deep.size, deep.channels) == ((30, 1), 3)


def test_numbers_of_16_bits_in_either_byte_order() -> None:
    levels = np.random.default_rng(0).integers(0, 60000, (20, 30, 3))
    little, big = (decode_keeping_bits(levels.astype(kind))[0] for kind in ("<u2", ">u2"))
    np.testing.assert_array_equal(little.array, big.array)


def test_a_single_number_is_no_picture() -> None:
    with pytest.raises(ImageError, match=r"the array has shape \(\), expected \(H, W, 3\)"):
        open_image(np.array(5, np.uint8))


def test_a_subclass_of_a_tensor_is_a_tensor() -> None:
    torch = pytest.importorskip("torch")

    class Subclass(torch.Tensor):  # as torchvision's tv_tensors are
        pass

    tensor = torch.arange(3 * 8 * 9, dtype=torch.uint8).reshape(3, 8, 9)
    np.testing.assert_array_equal(pixels(tensor.as_subclass(Subclass)), pixels(tensor))
