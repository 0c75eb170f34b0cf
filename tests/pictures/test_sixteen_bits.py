"""Pictures of 16 bits for models of 1 and 3 channels: all bits are read, and reach the network."""

from __future__ import annotations

import io
import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_models import SMALL, config_for, random_weights

from dinokit import load_backbone, read_embeddings
from dinokit.classifiers.evaluation import raw_pixels
from dinokit.errors import ImageError, ModelError
from dinokit.loading.locate import locate
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.bands import Bands, decode_picture, open_picture
from dinokit.pictures.display import picture_to_show
from dinokit.pictures.images import open_image
from dinokit.pictures.preprocess import Preprocessing, picture_of

H, W = 44, 60
SEE = Preprocessing(36, (32, 32), mean=(0.4,) * 3, std=(0.2,) * 3)


def numbers(channels: int = 1, *, bits: int = 16, seed: int = 0) -> NDArray[np.uint16]:
    """(H, W) or (H, W, C): smooth, with noise in the low bits."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.uniform(0.1, 0.9, (4, 5)).astype(np.float32)).resize(
        (W, H), Image.Resampling.BICUBIC
    )
    waves = np.asarray(small, np.float64)[:, :, None] * np.linspace(1, 0.5, channels)
    made = ((waves + rng.normal(0, 0.02, waves.shape)).clip(0, 1) * (2**bits - 1)).astype(np.uint16)
    return made[:, :, 0] if channels == 1 else made


def png(array: NDArray[np.uint16], *, before: bytes = b"") -> bytes:
    """A PNG of 48 bits by the specification alone, each row filtered in another of the five ways."""
    height, width = array.shape[:2]
    lines, previous = b"", np.zeros(6 * width, np.int64)
    for number, row in enumerate(array.astype(">u2")):
        line = np.frombuffer(row.tobytes(), np.uint8).astype(np.int64)
        left, corner = (np.concatenate([np.zeros(6, np.int64), x[:-6]]) for x in (line, previous))
        guess = left + previous - corner
        to_left, up, to_corner = (np.abs(guess - x) for x in (left, previous, corner))
        nearer = np.where(up <= to_corner, previous, corner)
        paeth = np.where((to_left <= up) & (to_left <= to_corner), left, nearer)
        by = (0, left, previous, (left + previous) // 2, paeth)[number % 5]
        lines += bytes([number % 5]) + ((line - by) % 256).astype(np.uint8).tobytes()
        previous = line

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def saved(array: NDArray[Any], kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    if kind == "npy":
        np.save(stream, array)
    elif kind == "tiff":
        pytest.importorskip("tifffile").imwrite(stream, array, **options)
    elif kind == "PPM":  # which Pillow 10 only reads
        stream.write(b"P5 %d %d 65535\n" % array.shape[::-1] + array.astype(">u2").tobytes())
    else:
        Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def resized(levels: NDArray[Any]) -> NDArray[np.float64]:
    """(32, 32, C) of (H, W, C): torch's antialiased bicubic, which knows nothing of Pillow, and the centre crop."""
    torch = pytest.importorskip("torch")
    planes = torch.from_numpy(levels.astype(np.float64).transpose(2, 0, 1))[None]
    large = torch.nn.functional.interpolate(planes, (36, 36 * W // H), mode="bicubic", antialias=True)
    cut: NDArray[np.float64] = large[0].permute(1, 2, 0).numpy()[2:34, 8:40]
    return cut


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "kind", ["PNG", "TIFF", "big-endian", "packed", "PPM", "JPEG2000", "npy", "array", "tensor"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_of_16_bits_is_read_whole(kind: str, channels: int) -> None:
    array = numbers(bits=12)  # a camera's, in the low bits
    source: Any = array
    if kind == "big-endian":
        source = saved(array, "tiff", byteorder=">", photometric="minisblack")
    elif kind == "packed":
        source = saved(array, "tiff", compression="zlib", predictor=2, photometric="minisblack")
    elif kind == "tensor":
        source = pytest.importorskip("torch").from_numpy(array[None].copy())
    elif kind != "array":
        source = saved(array, kind)
    found = decode_picture(source, channels)
    assert isinstance(found, Bands) and found.channels == channels
    np.testing.assert_allclose(found.array, np.repeat(array[:, :, None] / 257, channels, axis=2), atol=1e-5)
    assert open_image(source).mode == "RGB" if kind not in ("array", "tensor") else True  # as ever


@pytest.mark.parametrize("kind", ["png", "II", "MM", "packed", "strips", "tiles", "planes", "MM planes"])
def test_colours_of_48_bits_are_read_whole(kind: str, tmp_path: Path) -> None:
    array = numbers(3)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    rgb: dict[str, Any] = {"photometric": "rgb"}
    separate = rgb | {"planarconfig": "separate"}
    data = {
        "png": lambda: png(array),
        "II": lambda: saved(array, "tiff", **rgb),
        "MM": lambda: saved(array, "tiff", byteorder=">", **rgb),
        "packed": lambda: saved(array, "tiff", compression="zlib", predictor=2, rowsperstrip=5, **rgb),
        "strips": lambda: saved(array, "tiff", rowsperstrip=5, **rgb),
        "tiles": lambda: saved(array, "tiff", tile=(16, 16), **rgb),
        "planes": lambda: saved(first, "tiff", **separate),
        "MM planes": lambda: saved(first, "tiff", byteorder=">", **separate),
    }[kind]()
    (tmp_path / "a").write_bytes(data)
    for source in (data, tmp_path / "a", io.BytesIO(data)):
        found = decode_picture(source, 3)
        assert isinstance(found, Bands)
        np.testing.assert_allclose(found.array, array / 257, atol=1e-4)
    # In grey as Pillow makes it, without its rounding.
    (grey,) = decode_picture(data, 1).planes  # type: ignore[union-attr]
    np.testing.assert_allclose(grey, array / 257 @ [0.299, 0.587, 0.114], atol=0.01)
    # And the 8 bits that everybody else is given are no other picture.
    assert np.abs(np.asarray(open_image(data)) - array / 257).max() <= 1


def test_arrays_may_have_their_channels_first_or_last() -> None:
    torch = pytest.importorskip("torch")
    array = numbers(3)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    for source in (
        array,
        first,
        torch.from_numpy(first),
        saved(first, "npy"),
        saved(array / np.float64(65535), "npy"),
    ):
        np.testing.assert_allclose(decode_picture(source, 3).array, array / 257, atol=1e-4)  # type: ignore[union-attr]
    for wrong in (numbers(5), array.astype(np.float32), array.astype(np.int16)):
        with pytest.raises(ImageError, match=r"shape is \(44, 60, 5\)|expected uint8 \(0…255\) or uint16"):
            open_picture(wrong, 3)


def test_floats_keep_their_scale() -> None:
    share = (numbers() / np.float32(65535)).astype(np.float32)
    for values, levels in ((share, share * 255), (share * 200, share * 200)):
        found = decode_picture(saved(values, "TIFF"), 1)
        np.testing.assert_allclose(found.array[:, :, 0], levels, atol=1e-4)  # type: ignore[union-attr]
    stretched = decode_picture(saved(share * 4000 - 500, "TIFF"), 1).array  # type: ignore[union-attr]
    assert stretched.min() == 0 and stretched.max() == 255 and len(np.unique(stretched)) > 256
    with pytest.raises(ImageError, match="NaN or infinite"):
        decode_picture(saved(np.where(share > 0.5, np.float32(np.nan), share), "TIFF"), 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_8_bits_stored_in_16_are_the_picture_they_were(channels: int) -> None:
    """Rounded after the resize like every picture of 8 bits: the same numbers as before, to the last bit."""
    eight = (numbers(channels) >> 8).astype(np.uint8)
    wide = eight.astype(np.uint16) * 257
    forms = [
        wide,
        saved(wide, "npy"),
        saved(wide, "tiff", photometric="rgb" if channels == 3 else "minisblack"),
    ]
    forms += [png(wide)] if channels == 3 else [saved(wide, "PNG"), saved(eight.astype(np.float32), "TIFF")]
    truth = SEE.crop(decode_picture(eight, 3))
    for form in forms:
        found = decode_picture(form, 3)
        assert isinstance(found, Image.Image)
        np.testing.assert_array_equal(SEE.crop(found), truth)


def test_pictures_lie_upright() -> None:
    array, turned = numbers(), Image.Exif()
    turned[0x0112] = 6
    found = decode_picture(saved(array, "PNG", exif=turned), 1)
    np.testing.assert_allclose(found.array[:, :, 0], np.rot90(array, -1) / 257, atol=1e-5)  # type: ignore[union-attr]
    colours = numbers(3)
    data = saved(colours, "tiff", photometric="rgb", extratags=[(274, 3, 1, 6, True)])
    found = decode_picture(data, 3)
    np.testing.assert_allclose(found.array, np.rot90(colours, -1) / 257, atol=1e-4)  # type: ignore[union-attr]


def test_what_has_alpha_stays_8_bits() -> None:
    name, key = b"tRNS", struct.pack(">HHH", 1, 2, 3)
    transparent = struct.pack(">I", 6) + name + key + struct.pack(">I", zlib.crc32(name + key))
    found = decode_picture(png(numbers(3), before=transparent), 3)
    assert isinstance(found, Image.Image) and found.mode == "RGB"


def test_packed_planes_of_colour_stay_8_bits() -> None:
    """Pillow unpacks these in one way only; what it gives is the high bytes, as for everybody else."""
    array = numbers(3)
    first = np.ascontiguousarray(array.transpose(2, 0, 1))
    data = saved(first, "tiff", photometric="rgb", planarconfig="separate", compression="zlib")
    found = decode_picture(data, 3)
    assert isinstance(found, Image.Image)
    np.testing.assert_array_equal(found, array >> 8)


def test_a_damaged_file_says_so() -> None:
    for data in (png(numbers(3))[:-2000], saved(numbers(), "PNG")[:-2000]):
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            decode_picture(data, 3)


# ------------------------------------------------------------------------------------------- the network's input


@pytest.mark.parametrize("bits", [12, 16])
def test_the_crop_is_what_torch_makes_of_the_floats(bits: int) -> None:
    grey, colours = numbers(bits=bits), numbers(3, bits=bits)
    for array, data in ((grey[:, :, None], saved(grey, "PNG")), (colours, png(colours))):
        crop = SEE.crop(decode_picture(data, 3))
        assert crop.dtype == np.float32 and crop.shape == (32, 32, 3)
        np.testing.assert_allclose(crop, np.broadcast_to(resized(array / 257), crop.shape), atol=2e-3)


def test_pictures_that_8_bits_cannot_tell_apart_have_embeddings_of_their_own(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    import timm
    from safetensors.torch import load_file

    for channels in (1, 3):
        vit = replace(SMALL, in_chans=channels)
        # 12 bits in 16 at the usual size: the folder's mean and deviation say so.
        see = replace(SEE, mean=(0.02,) * channels, std=(0.01,) * channels)
        config = replace(config_for(vit), preprocessing=see)
        model = write_model_folder(tmp_path / str(channels), config, random_weights(vit)).path
        array = numbers(bits=12)
        dark, other = saved(array, "PNG"), saved(array // 257 * 257 + 100, "PNG")
        coarse = np.asarray(open_image(dark)) // 1
        vectors = []
        for engine in ("onnx", "torch"):
            backbone = load_backbone(model, engine=engine, device="cpu")
            found = backbone.embed([dark, array, other, Image.fromarray(array), coarse])
            np.testing.assert_allclose(found[0], found[1], atol=1e-5)
            np.testing.assert_allclose(found[0], found[3], atol=1e-5)
            assert np.abs(found[0] - found[2]).max() > 0.01 and np.abs(found[0] - found[4]).max() > 0.01
            vectors.append(found[0])
        np.testing.assert_allclose(*vectors, atol=1e-4)
        pixels = (np.repeat(resized(array[:, :, None] / 257), channels, axis=2) / 255 - 0.02) / 0.01
        network = timm.create_model(
            backbone.config.timm_architecture, num_classes=0, **backbone.config.model_args, pretrained=False
        )
        network.load_state_dict(load_file(model / "timm.safetensors"))
        with torch.no_grad():
            truth = network.eval()(torch.from_numpy(pixels.transpose(2, 0, 1).astype(np.float32))[None])[
                0
            ].numpy()
        np.testing.assert_allclose(vectors[0], truth, atol=1e-4)


def test_a_pretrained_model_sees_12_bits_in_16_as_it_sees_photographs(tmp_path: Path) -> None:
    located, white = locate("starter"), 4095 / 65535
    see = located.config.preprocessing.with_white(white)
    assert located.load_weights is not None
    config = replace(located.config, preprocessing=see)
    folder = write_model_folder(tmp_path / "starter-12-bits", config, located.load_weights()).path
    dark = numbers(3, bits=12)
    light = Bands.of((dark / 4095 * 255).astype(np.float32))  # the same photograph with its white at white
    truth = load_backbone("starter").embed(light)
    for engine in ("onnx", "torch"):
        backbone = load_backbone(folder, engine=engine)
        assert backbone.preprocessing == see
        np.testing.assert_allclose(backbone.embed(dark), truth, atol=1e-3 * np.abs(truth).max())
    told = json.loads((folder / "preprocessor_config.json").read_text())
    assert told["image_mean"] == pytest.approx([white * m for m in located.config.preprocessing.mean])
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ModelError, match=r"must be above 0 and at most 1"):
            see.with_white(wrong)


def test_a_batch_may_hold_8_and_16_bits_and_each_is_as_it_is_alone() -> None:
    backbone = load_backbone("starter")
    several = [numbers(3), (numbers(3, seed=1) >> 8).astype(np.uint8), numbers(seed=2)]
    together = backbone.embed(several)
    for one, vector in zip(several, together, strict=True):
        np.testing.assert_allclose(backbone.embed(one), vector, atol=1e-5)
    stacked = np.stack([numbers(3), numbers(3, seed=1)])
    np.testing.assert_allclose(backbone.embed(stacked)[0], together[0], atol=1e-5)


def test_the_floor_of_raw_pixels_is_that_of_the_same_picture_in_colour(tmp_path: Path) -> None:
    array = numbers()
    Image.fromarray(array).save(tmp_path / "a.png")
    truth = np.asarray(
        Image.fromarray((array / 257).astype(np.float32)).resize((16, 16), Image.Resampling.BICUBIC)
    )
    for channels in (1, 3):
        (found,), errors = raw_pixels([tmp_path / "a.png"], channels=channels)
        assert errors == [None]
        flat = np.repeat(truth[:, :, None], 3, axis=2).reshape(-1) / 255
        np.testing.assert_allclose(found, flat - flat.mean(), atol=1e-5)


# ------------------------------------------------------------------------------------------- shown


def test_dark_pictures_are_shown_so_that_one_sees_something() -> None:
    dark = numbers(bits=12) / 257
    shown = np.asarray(picture_of(dark.astype(np.float32)[:, :, None])).astype(np.float64)
    truth = (dark - dark.min()) / (dark.max() - dark.min()) * 255
    assert np.abs(shown - truth[:, :, None]).max() <= 0.51
    np.testing.assert_array_equal(picture_to_show(saved(numbers(bits=12), "PNG")), shown)
    # What is bright enough is shown as it is, and nothing of 8 bits is touched.
    light = numbers() / np.float32(257)
    assert np.abs(np.asarray(picture_of(light[:, :, None]))[:, :, 0] - light).max() <= 0.51
    eight = (numbers(3) >> 11).astype(np.uint8)
    np.testing.assert_array_equal(picture_of(eight), eight)
    np.testing.assert_array_equal(picture_to_show(eight), eight)


def test_the_commands_of_the_shell(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from dinokit.cli import cli

    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        Image.fromarray(numbers(bits=12, seed=number)).save(folder / f"{number}.png")
    (folder / "2.png").write_bytes(png(numbers(3)))
    done = CliRunner().invoke(cli, ["embed", str(folder), "-o", str(tmp_path / "table.parquet"), "-q"])
    assert done.exit_code == 0, done.output
    table = read_embeddings(tmp_path / "table.parquet")
    assert table.sizes == [(W, H)] * 3
    np.testing.assert_allclose(table.embeddings, load_backbone("starter").embed(folder), atol=1e-5)
    for command in ("attention", "pca"):
        done = CliRunner().invoke(cli, [command, str(folder), "-o", str(tmp_path / command), "-q"])
        assert done.exit_code == 0, done.output


def test_the_least_step_of_16_bits_is_seen() -> None:
    array = np.full((H, W), 100 * 257, np.uint16)
    assert not isinstance(decode_picture(saved(array, "PNG"), 1), Bands)  # 8 bits stored in 16
    array[7, 9] += 1
    found = decode_picture(saved(array, "PNG"), 1)
    assert isinstance(found, Bands)
    np.testing.assert_allclose(found.array[[7, 0], [9, 0], 0], [100 + 1 / 257, 100], atol=1e-5)
