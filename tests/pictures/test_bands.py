"""Pictures of n channels: read, resized like grey pictures, found in folders, embedded by both engines."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from small_models import SMALL, config_for, random_weights

from dinokit import load_backbone, read_embeddings
from dinokit.errors import ImageError, MissingExtraError, UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.bands import Bands, decode_bands, must_read, open_picture
from dinokit.pictures.display import picture_to_show
from dinokit.pictures.preprocess import Preprocessing, picture_of
from dinokit.sources import find_pictures, search_pictures

N = 5
SEE = Preprocessing(36, (32, 32), mean=(0.4,) * N, std=(0.2,) * N)


def levels(height: int = 44, width: int = 60, channels: int = N, seed: int = 0) -> NDArray[np.uint8]:
    """(H, W, C), each channel another picture, smooth with some noise."""
    rng = np.random.default_rng(seed)
    planes = [
        np.asarray(
            Image.fromarray(rng.uniform(20, 235, (5, 6)).astype(np.float32)).resize(
                (width, height), Image.Resampling.BICUBIC
            )
        )
        for _ in range(channels)
    ]
    return (
        (np.stack(planes, axis=2) + rng.normal(0, 6, (height, width, channels))).clip(0, 255).astype(np.uint8)
    )


def saved(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


# ------------------------------------------------------------------------------------------- resizing


@pytest.mark.parametrize("preprocessing", [SEE, replace(SEE, resize_px=(40, 33), interpolation="bilinear")])
def test_each_channel_is_resized_as_pillow_resizes_a_grey_picture(preprocessing: Preprocessing) -> None:
    eight = levels()
    sixteen = eight.astype(np.uint16) * 257 + 100
    for array, scale in ((eight, 1.0), (sixteen, 255 / 65535)):
        crop = preprocessing.crop(decode_bands(array, N))
        assert crop.shape == (32, 32, N) and crop.dtype == (np.uint8 if array is eight else np.float32)
        for band in range(N):
            plane = array[:, :, band]
            grey = Image.fromarray(
                plane if array is eight else (plane * np.float32(scale)).astype(np.float32)
            )
            if isinstance(preprocessing.resize_px, int):
                size, method = (36 * 60 // 44, 36), Image.Resampling.BICUBIC
            else:
                size, method = (33, 40), Image.Resampling.BILINEAR
            left, top = round((size[0] - 32) / 2), round((size[1] - 32) / 2)
            truth = grey.resize(size, method).crop((left, top, left + 32, top + 32))
            np.testing.assert_array_equal(crop[:, :, band], np.asarray(truth))


def test_a_long_thin_picture_is_resized_near_its_crop_only() -> None:
    array = np.repeat(levels(1, 1)[:1, :1], 60_000, axis=1)
    crop = replace(SEE, resize_px=256, crop_px=(224, 224)).crop(decode_bands(array, N))
    assert (crop == array[0, 0]).all()


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [(np.float32, "-9999"), (np.float16, "-1e300"), (np.int16, "-32768"), (np.uint16, "65535")],
)
def test_values_without_data_are_black(dtype: Any, nodata: str, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = np.ones((9, 8, 5), dtype)
    with np.errstate(over="ignore"):
        array[2:5, :, 1] = np.float64(nodata)
    extra = [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(
        tmp_path / "a.tif", array, photometric="minisblack", planarconfig="contig", extratags=extra
    )
    seen = open_picture(tmp_path / "a.tif", 5)
    assert isinstance(seen, Bands)
    black = seen.array == 0
    assert black[2:5, :, 1].all() and black.sum() == 24


def test_pixels_are_normalised_channel_by_channel() -> None:
    mean, std = tuple(np.linspace(0.1, 0.5, N)), tuple(np.linspace(0.1, 0.3, N))
    crops = np.stack([levels(32, 32), levels(32, 32, seed=1)])
    pixels = replace(SEE, mean=mean, std=std).normalise(crops.astype(np.float32) + 0.25)
    truth = ((crops + 0.25) / 255 - mean) / std
    np.testing.assert_allclose(pixels, truth.transpose(0, 3, 1, 2), atol=1e-5)


# ------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "made", [np.uint8, np.uint16, np.int16, np.float16, np.float32, np.float64, ">u2", ">f4"], ids=str
)
def test_numbers_of_every_type_are_scaled_alike(made: Any) -> None:
    array, dtype = levels(), np.dtype(made)
    most = np.iinfo(dtype).max if dtype.kind in "ui" else 1
    values = (array / 255 * most).astype(dtype)
    found = decode_bands(values, N).array
    step = (
        0
        if dtype == np.uint8
        else 255 / 32767
        if dtype.kind in "ui"
        else 0.2
        if dtype.itemsize == 2
        else 1e-4
    )
    np.testing.assert_allclose(found, array, atol=step)
    assert found.dtype == (np.uint8 if dtype == np.uint8 else np.float32)


def test_the_channels_may_come_first_or_last() -> None:
    array = levels()
    for one in (
        array,
        array.transpose(2, 0, 1),
        saved(array),
        saved(array.transpose(2, 0, 1)),
        Bands.of(array),
    ):
        np.testing.assert_array_equal(decode_bands(one, N).array, array)
    mask = levels() > 99
    np.testing.assert_array_equal(decode_bands(mask, N).array, mask * np.uint8(255))


def test_pillow_reads_two_and_four_channels() -> None:
    rgba = levels(channels=4)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned to the right
    Image.fromarray(rgba, "RGBA").save(stream, "PNG", exif=exif)
    np.testing.assert_array_equal(decode_bands(stream.getvalue(), 4).array, np.rot90(rgba, -1))
    grey = levels(channels=2)
    np.testing.assert_array_equal(decode_bands(Image.fromarray(grey, "LA"), 2).array, grey)


@pytest.mark.parametrize("layout", ["samples", "planes", "pages", "shaped", "packed"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_tiff_in_every_layout(layout: str, dtype: Any, tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    array = levels()
    values = (
        array
        if dtype == np.uint8
        else array.astype(np.uint16) * 257
        if dtype == np.uint16
        else array / np.float32(255)
    )
    first = np.ascontiguousarray(values.transpose(2, 0, 1))
    file = tmp_path / "a.tif"
    if layout == "planes":
        tifffile.imwrite(file, first, planarconfig="separate", photometric="minisblack")
    elif layout == "pages":
        tifffile.imwrite(file, first, photometric="minisblack")
    elif layout == "shaped":
        tifffile.imwrite(file, values)
    else:
        pack = "zlib" if layout == "packed" else None
        tifffile.imwrite(file, values, planarconfig="contig", photometric="minisblack", compression=pack)
    np.testing.assert_allclose(decode_bands(file, N).array, array, atol=1e-4)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (
            levels(channels=4),
            r"its shape is \(44, 60, 4\); the model has 5 channels, so expected \(H, W, 5\) or \(5, H, W\)",
        ),
        (levels()[:, :, 0], r"its shape is \(44, 60\)"),
        (levels()[:5, :, :], r"\(5, 60, 5\) could be \(H, W, 5\) or \(5, H, W\)"),
        (levels()[:0], "it is empty"),
        (levels().astype(np.int64), "values are int64, which does not define what is white"),
        (levels().astype(np.int16) - 300, "int16 and begin at -[0-9]+; expected 0"),
        (levels() / np.float32(100), r"floats lie in .*; expected 0 \(black\) to 1 \(white\)"),
        (np.where(levels() > 99, np.nan, 0.5), "NaN or infinite"),
    ],
    ids=["channels", "grey", "both ways", "empty", "int64", "negative", "floats", "nan"],
)
def test_what_is_refused_is_explained(array: NDArray[Any], words: str) -> None:
    with pytest.raises(ImageError, match=words):
        open_picture(array, N)


def test_damaged_files_are_explained(tmp_path: Path) -> None:
    objects = saved(np.array([{}, "a"], dtype=object))
    for data, words in (
        (objects, "contains Python objects, which are not loaded"),
        (saved(levels())[:-100], "its data are damaged"),
        (saved(np.array(["a"])), "its elements are not real numbers"),
        (b"", "the file is empty"),
        (b"hello, this is some text", "not a picture but text"),
        (b"II*\0" + bytes(60), "damaged|without a picture"),
    ):
        (tmp_path / "a.npy").write_bytes(data)
        with pytest.raises(ImageError, match=words) as error:
            open_picture(tmp_path / "a.npy", N)
        assert str(tmp_path / "a.npy") in str(error.value)
    stream = io.BytesIO()
    Image.fromarray(levels(channels=3)).save(stream, "JPEG")
    with pytest.raises(ImageError, match=r"it has 3 channels \(R, G, B\); the model expects 5"):
        open_picture(stream.getvalue(), N)
    with pytest.raises(ImageError, match="it has 4 channels; the model expects 5"):
        open_picture(Bands.of(levels(channels=4)), N)


def test_a_damaged_tiff_is_reported_once(tmp_path: Path) -> None:
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", levels(), photometric="minisblack", planarconfig="contig")
    data = bytearray((tmp_path / "a.tif").read_bytes())
    data[12:14] = b"\xff\xff"  # the type of the first tag
    (tmp_path / "a.tif").write_bytes(data)
    program = (
        "import sys\nfrom dinokit.pictures.bands import open_picture\n"
        "try:\n    open_picture(sys.argv[1], 5)\nexcept Exception as error:\n    print(error)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "a.tif")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "a.tif: its data are damaged" in done.stdout or "its shape is" in done.stdout
    assert done.stderr == ""


def test_a_tiff_of_absurd_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tifffile = pytest.importorskip("tifffile")
    stream = io.BytesIO()
    tifffile.imwrite(stream, levels(), planarconfig="contig", photometric="minisblack")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ImageError, match="more than the limit against decompression bombs"):
        decode_bands(stream.getvalue(), N)


def test_without_tifffile_the_pip_line_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from dinokit.pictures import band_files

    monkeypatch.setattr(band_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dinokit\[tiff\]'"):
        open_picture(b"II*\0" + bytes(60), N)
    with pytest.raises(MissingExtraError, match="needs tifffile, which is not installed"):
        must_read(["a.npy", "b.TIF"])
    must_read(["a.npy", "b.jpg"])


def test_tensors_have_the_channels_first() -> None:
    torch = pytest.importorskip("torch")
    array = levels()
    found = decode_bands(torch.from_numpy(array.transpose(2, 0, 1).copy()), N)
    np.testing.assert_array_equal(found.array, array)
    with pytest.raises(ImageError, match=r"the tensor has shape \(44, 60, 5\); expected \(5, H, W\)"):
        decode_bands(torch.from_numpy(array), N)


# ------------------------------------------------------------------------------------------- photographs


def test_an_array_in_a_file_is_a_photograph_if_it_is_named(tmp_path: Path) -> None:
    colours, grey = levels(channels=3), levels(channels=1)[:, :, 0]
    for number, array in enumerate(
        (colours, colours.transpose(2, 0, 1), colours.astype(np.uint16) * 257, colours / np.float32(255))
    ):
        np.save(tmp_path / f"{number}.npy", array)
        image = open_picture(tmp_path / f"{number}.npy", 3)
        assert isinstance(image, Image.Image) and image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), colours)
    np.save(tmp_path / "grey.npy", grey)
    np.testing.assert_array_equal(np.asarray(open_picture(tmp_path / "grey.npy", 1))[:, :, 1], grey)
    with pytest.raises(ImageError, match=r"its shape is \(44, 60, 5\); the model has 3 channels"):
        np.save(tmp_path / "5.npy", levels())
        open_picture(tmp_path / "5.npy", 3)


def test_which_files_of_a_folder_are_pictures_depends_on_the_channels(tmp_path: Path) -> None:
    for name in ("a.npy", "b.tif", "c.TIFF", "preview.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    assert [p.name for p in map(Path, map(str, find_pictures(tmp_path, channels=5)))] == [
        "a.npy",
        "b.tif",
        "c.TIFF",
    ]
    assert [Path(str(p)).name for p in find_pictures(tmp_path)] == ["b.tif", "c.TIFF", "preview.png"]
    assert [Path(str(p)).name for p in find_pictures(tmp_path / "*.npy")] == ["a.npy"]
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("a.npy", "b.tif", "preview.png"):
            tar.add(tmp_path / name, name)
    shard = str(tmp_path / "a.tar")
    assert [str(p) for p in find_pictures(shard, channels=5)] == [f"{shard}::a.npy", f"{shard}::b.tif"]
    assert [str(p) for p in find_pictures(shard)] == [f"{shard}::b.tif", f"{shard}::preview.png"]
    assert str(find_pictures(f"{shard}::a.npy")[0]) == f"{shard}::a.npy"  # it was named


def test_a_folder_of_arrays_alone_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "a.npy").write_bytes(b"x")
    (problem,) = search_pictures(tmp_path).problems
    assert "no pictures in this folder, but .npy files" in problem and "'" in problem and "*.npy" in problem
    (tmp_path / "a.npy").rename(tmp_path / "a.jpg")
    (problem,) = search_pictures(tmp_path, channels=5).problems
    assert "no .npy or TIFF files in this folder" in problem


def test_channels_that_are_no_colours_are_shown_by_their_mean() -> None:
    array = levels().astype(np.float32) / 9 + 3  # dark, as pictures of 16 bits may be
    shown = np.asarray(picture_of(array)).astype(np.float64)
    mean = array.mean(axis=2)
    truth = (mean - mean.min()) / (mean.max() - mean.min()) * 255
    assert np.abs(shown - truth[:, :, None]).max() <= 0.51
    assert np.asarray(picture_of(np.full((4, 4, 5), 7, np.uint8))).max() == 0


def test_contact_sheets_show_pictures_of_any_channels(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", levels())
    np.testing.assert_array_equal(picture_to_show(tmp_path / "a.npy"), picture_of(levels()))
    tifffile = pytest.importorskip("tifffile")
    first = np.ascontiguousarray(levels().transpose(2, 0, 1))
    tifffile.imwrite(tmp_path / "a.tif", first, planarconfig="separate", photometric="minisblack")
    np.testing.assert_array_equal(picture_to_show(tmp_path / "a.tif"), picture_of(levels()))
    colours = levels(channels=3)
    np.testing.assert_array_equal(picture_to_show(colours), colours)
    (tmp_path / "b.npy").write_text("no picture")
    with pytest.raises(ImageError, match="not a picture but text"):
        picture_to_show(tmp_path / "b.npy")


# ------------------------------------------------------------------------------------------- a model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vit = replace(SMALL, in_chans=N)
    config = replace(config_for(vit), preprocessing=SEE)
    return write_model_folder(tmp_path_factory.mktemp("model") / "bands", config, random_weights(vit)).path


@pytest.fixture
def bands(tmp_path: Path) -> Path:
    folder = tmp_path / "bands"
    folder.mkdir()
    np.save(folder / "0.npy", levels())
    np.save(folder / "1.npy", (levels(seed=1) / 255).astype(np.float32).transpose(2, 0, 1))
    np.save(folder / "2.npy", levels(seed=2).astype(np.uint16) * 257)
    Image.new("RGB", (9, 9)).save(folder / "preview.png")
    return folder


def test_no_timm_adapts_the_first_layer(model: Path) -> None:
    """timm before 1.0.31 takes every first layer for one of 3 channels and replaces this one by random weights."""
    assert (
        json.loads((model / "config.json").read_text(encoding="utf-8"))["pretrained_cfg"]["first_conv"]
        is None
    )


def test_both_engines_embed_every_form_alike(model: Path, bands: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    array = levels()
    forms = [
        array,
        array.transpose(2, 0, 1),
        bands / "0.npy",
        (bands / "0.npy").read_bytes(),
        Bands.of(array),
    ]
    forms += [torch.from_numpy(array.transpose(2, 0, 1).copy())]
    vectors = []
    for engine in ("onnx", "torch"):
        backbone = load_backbone(model, engine=engine, device="cpu")
        same = backbone.embed(forms)
        np.testing.assert_allclose(same, np.repeat(same[:1], len(forms), axis=0), atol=1e-5)
        np.testing.assert_allclose(backbone.embed(array), same[0], atol=1e-5)
        several = backbone.embed(bands)
        assert several.shape == (3, 48)
        both = np.stack([array, levels(seed=2)]).astype(np.uint16) * 257
        np.testing.assert_allclose(backbone.embed(both)[1], several[2], atol=1e-5)
        assert backbone.transform(bands / "1.npy").shape == (N, 32, 32)
        assert backbone.masks(array).shape == (3, 32, 32)
        vectors.append(several)
    np.testing.assert_allclose(*vectors, atol=1e-4)
    # The truth: timm's network on pixels that Pillow made of grey pictures.
    import timm
    from safetensors.torch import load_file

    backbone = load_backbone(model, engine="torch", device="cpu")
    planes = [
        Image.fromarray(array[:, :, band])
        .resize((36 * 60 // 44, 36), Image.Resampling.BICUBIC)
        .crop((8, 2, 40, 34))
        for band in range(N)
    ]
    pixels = (np.stack([np.asarray(plane, np.float32) for plane in planes]) / 255 - 0.4) / 0.2
    network = timm.create_model(
        backbone.config.timm_architecture, num_classes=0, **backbone.config.model_args, pretrained=False
    )
    network.load_state_dict(load_file(model / "timm.safetensors"))
    with torch.no_grad():
        truth = network.eval()(torch.from_numpy(pixels)[None])[0].numpy()
    np.testing.assert_allclose(vectors[0][0], truth, atol=1e-4)


def test_transformers_builds_the_same_network(model: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    backbone = load_backbone(model, engine="onnx", device="cpu")
    network = transformers.AutoModel.from_pretrained(model)
    assert network.config.num_channels == N
    with torch.no_grad():
        found = network(torch.from_numpy(backbone.transform(levels())[None])).pooler_output[0].numpy()
    np.testing.assert_allclose(found, backbone.embed(levels()), atol=1e-4)


def test_the_commands_of_the_shell(model: Path, bands: Path, tmp_path: Path) -> None:
    from click.testing import CliRunner

    from dinokit.cli import cli

    def run(*arguments: object) -> Any:
        return CliRunner().invoke(cli, [str(argument) for argument in arguments])

    table = tmp_path / "table.parquet"
    done = run("embed", bands, "-m", model, "-o", table, "-q")
    assert done.exit_code == 0, done.output
    read = read_embeddings(table)
    assert [Path(path).name for path in read.paths] == ["0.npy", "1.npy", "2.npy"]
    assert read.sizes == [(60, 44)] * 3
    np.testing.assert_allclose(read.embeddings, load_backbone(model).embed(bands), atol=1e-5)

    # What is named and has other channels keeps its row, with the reason.
    mixed = run("embed", bands / "preview.png", bands / "0.npy", "-m", model, "-o", tmp_path / "b.csv")
    assert mixed.exit_code == 1 and "it has 3 channels (R, G, B); the model expects 5" in mixed.output

    for command in ("attention", "pca"):
        drawn = run(command, bands, "-m", model, "-o", tmp_path / command, "-q")
        assert drawn.exit_code == 0, drawn.output
        assert (tmp_path / command / "contact-sheet.png").is_file()

    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(2):
            np.save(tmp_path / "classes" / name / f"{number}.npy", levels(seed=5 + number))
    classes = tmp_path / "classes"
    labelled = run("knn", "--reference", classes, bands, "-m", model, "-o", tmp_path / "labels.csv", "-q")
    assert labelled.exit_code == 0 and labelled.output.count("left out") == 0, labelled.output
    assert len((tmp_path / "labels.csv").read_text().splitlines()) == 1 + 3
    judged = run("eval", "--reference", classes, "-m", model, "--no-linear")
    assert judged.exit_code == 0, judged.output
    assert "raw 16x16 pixels" in judged.stdout
    two = run("eval", "--reference", classes, "-m", model, "-m", "starter")
    assert two.exit_code == 2 and "take pictures with different numbers of channels" in two.output
    alike = run("duplicates", classes, "-m", model, "--sheet", tmp_path / "alike.png", "--json")
    assert json.loads(alike.stdout)["groups"] == 2, alike.output  # 0.npy twice, 1.npy twice
    found = run("search", bands / "0.npy", "--in", table, "--sheet", tmp_path / "found.png")
    assert found.exit_code == 0 and (tmp_path / "found.png").is_file(), found.output
    drawn = run("card", model, "-o", tmp_path / "card", "--photos", bands, "--neighbours", classes)
    assert drawn.exit_code == 0, drawn.output
    assert {file.name for file in (tmp_path / "card" / "figures").glob("*.png")} == {
        "attention.png",
        "neighbours.png",
    }

    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (50, 50)).save(photos / "a.png")
    none = run("embed", photos, "-m", model, "-o", tmp_path / "c.csv")
    assert none.exit_code == 3 and "no .npy or TIFF files in this folder" in none.output
    other = run("embed", bands, "-m", "starter", "-o", tmp_path / "d.csv", "-q")
    assert other.exit_code == 0 and len(read_embeddings(tmp_path / "d.csv").paths) == 1  # the preview


def test_crops_of_other_kinds_are_refused(model: Path) -> None:
    backbone = load_backbone(model)
    made = backbone.embed_crops(np.stack([SEE.crop(decode_bands(levels(), N))]).astype(np.float32))
    np.testing.assert_allclose(made[0], backbone.embed(levels()), atol=1e-5)
    with pytest.raises(UsageError, match=r"expected uint8 or float32 \(B, H, W, 5\)"):
        backbone.embed_crops(np.zeros((1, 32, 32, 5)))
    with pytest.raises(UsageError, match=r"expected uint8 or float32 \(B, H, W, 3\)"):
        load_backbone("starter").embed_crops(np.zeros((1, 96, 96, 3)))


@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_a_buffer_may_be_used_again(kind: str, model: Path) -> None:
    torch = pytest.importorskip("torch")
    """As ``rasterio.read(out=buffer)`` does: the network sees what it held when it was handed over."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (12, N, 40, 50), np.uint8)
    buffer = np.empty_like(pictures[0])

    def one_after_another() -> Iterator[Any]:
        for picture in pictures:
            buffer[:] = picture
            yield torch.from_numpy(buffer) if kind == "tensor" else buffer

    backbone = load_backbone(model)
    alone = backbone.embed([torch.from_numpy(picture) for picture in pictures])
    np.testing.assert_allclose(backbone.embed(one_after_another(), workers=2), alone, atol=1e-6)


def test_bfloat16_tensors_are_read() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.linspace(0, 1, 5 * 6 * 7).reshape(5, 6, 7).bfloat16()
    np.testing.assert_array_equal(decode_bands(tensor, 5).array, decode_bands(tensor.float(), 5).array)
