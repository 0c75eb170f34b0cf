"""DICOM files: what a viewer shows first, and what is said of files that have no picture, or of a missing pydicom."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image
from small_models import picture

from dinokit import read_embeddings
from dinokit.cli import cli
from dinokit.errors import ImageError
from dinokit.pictures.bands import Bands, decode_bands
from dinokit.pictures.images import decode_image, decode_keeping_bits, find_images, open_image

pydicom = pytest.importorskip("pydicom")


def of_pydicom(name: str) -> Path:
    """One of the files that pydicom brings along for its own tests."""
    from pydicom.data import get_testdata_file

    return Path(str(get_testdata_file(name, download=False)))


def dicom(
    pixels: NDArray[Any], *, bits: int | None = None, kind: str = "MONOCHROME2", **elements: Any
) -> bytes:
    """A file of these stored numbers, (H, W), (H, W, 3) or frames of either."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = SecondaryCaptureImageStorage, generate_uid()
    colour = kind == "RGB"
    rows, columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    ds.Rows, ds.Columns = rows, columns
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 3 if colour else 1, kind
    if colour:
        ds.PlanarConfiguration = 0
    if pixels.size > rows * columns * ds.SamplesPerPixel:
        ds.NumberOfFrames = len(pixels)
    ds.BitsAllocated = pixels.dtype.itemsize * 8
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit, ds.PixelRepresentation = ds.BitsStored - 1, int(pixels.dtype.kind == "i")
    for name, value in elements.items():
        setattr(ds, name, value)
    if pixels.dtype.kind == "f":
        for name in ("BitsStored", "HighBit", "PixelRepresentation"):
            delattr(ds, name)
        ds.FloatPixelData = pixels.tobytes()
    else:
        data = pixels.tobytes()
        ds.PixelData = data + b"\0" * (len(data) % 2)
        ds["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


def grey(data: bytes) -> NDArray[np.float64]:
    """(H, W), the levels of 0…255, not rounded."""
    image, _ = decode_keeping_bits(data)
    if isinstance(image, Bands):
        assert image.channels == 1
        return np.asarray(image.planes[0]).astype(np.float64)
    pixels = np.asarray(image).astype(np.float64)
    assert (pixels == pixels[:, :, :1]).all()
    return pixels[:, :, 0]


RAMP = np.arange(-1000, 1000, 10, dtype=np.int16).reshape(10, 20)


def windowed(x: NDArray[Any], center: float, width: float) -> NDArray[np.float64]:
    """DICOM PS3.3, C.11.2.1.2.1, word for word, from 0 to 255."""
    y = ((x - (center - 0.5)) / (width - 1) + 0.5) * 255
    y = np.where(x <= center - 0.5 - (width - 1) / 2, 0.0, y)
    return np.where(x > center - 0.5 + (width - 1) / 2, 255.0, y)


def test_the_files_window_after_its_rescaling() -> None:
    """Stored numbers become Hounsfield units, and of these the window is what is seen."""
    data = dicom(
        (RAMP + 1024).astype(np.uint16), bits=12, RescaleSlope="2", RescaleIntercept="-1024", WindowCenter="40",
        WindowWidth="400",
    )  # fmt: skip
    measured = (RAMP.astype(np.float64) + 1024) * 2 - 1024
    np.testing.assert_allclose(grey(data), windowed(measured, 40, 400), atol=1e-3)


def test_the_first_of_several_windows() -> None:
    data = dicom(RAMP, WindowCenter=["100", "0"], WindowWidth=["200", "2000"])
    np.testing.assert_allclose(grey(data), windowed(RAMP, 100, 200), atol=1e-3)


def test_a_real_mr_slice_through_its_window() -> None:
    path = of_pydicom("MR_small.dcm")
    stored = pydicom.dcmread(path).pixel_array
    expected = windowed(stored.astype(np.float64), 600, 1600)
    np.testing.assert_allclose(grey(path.read_bytes()), expected, atol=1e-3)
    np.testing.assert_array_equal(np.asarray(open_image(path))[:, :, 0], np.rint(expected.astype(np.float32)))


def test_a_voi_table() -> None:
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor = [4, 100, 10]  # four numbers from 100 on, to 10 bits
    table.add_new(0x00283006, "US", [0, 300, 2000, 1023])  # 2000 are more than 10 bits
    stored = np.array([[0, 100, 101], [102, 103, 500]], np.uint16)
    data = dicom(stored, bits=12, VOILUTSequence=[table])
    expected = np.array([[0, 0, 300], [1023, 1023, 1023]]) * 255 / 1023
    np.testing.assert_allclose(grey(data), expected, atol=1e-3)


def test_without_a_window_from_the_least_to_the_greatest() -> None:
    np.testing.assert_allclose(grey(dicom(RAMP)), (RAMP + 1000) * (255 / 1990), atol=1e-3)
    twelve = (RAMP + 1000).astype(np.uint16)
    np.testing.assert_allclose(grey(dicom(twelve, bits=12)), twelve * (255 / 1990), atol=1e-3)


@pytest.mark.parametrize(("center", "width"), [(None, None), (None, "400"), ("40", None), ("40", "0")])
def test_a_window_without_a_number_is_none(center: str | None, width: str | None) -> None:
    np.testing.assert_array_equal(
        grey(dicom(RAMP, WindowCenter=center, WindowWidth=width)), grey(dicom(RAMP))
    )


def test_a_sigmoid() -> None:
    data = dicom(RAMP, WindowCenter="0", WindowWidth="500", VOILUTFunction="SIGMOID")
    np.testing.assert_allclose(grey(data), 255 / (1 + np.exp(-4 * RAMP.astype(float) / 500)), atol=1e-3)


def test_eight_bits_are_as_they_are() -> None:
    eight = np.arange(100, 200, dtype=np.uint8).reshape(10, 10)
    image, _ = decode_keeping_bits(dicom(eight))
    assert isinstance(image, Image.Image)
    np.testing.assert_array_equal(np.asarray(image)[:, :, 0], eight)
    np.testing.assert_array_equal(grey(dicom(eight, RescaleSlope="1", RescaleIntercept="0")), eight)
    turned = grey(dicom(eight, RescaleSlope="-1", RescaleIntercept="0"))
    assert turned[0, 0] == 255 and turned[-1, -1] == 0
    one = np.eye(8, dtype=np.uint8)
    np.testing.assert_array_equal(grey(dicom(one, bits=1)), one * 255)


def test_large_numbers_of_monochrome1_are_dark() -> None:
    turned = 255 - grey(dicom(RAMP))
    np.testing.assert_allclose(grey(dicom(RAMP, kind="MONOCHROME1")), turned, atol=1e-3)
    # The shape that such files must state turns nothing over again (PS3.3, C.11.6).
    stated = dicom(RAMP, kind="MONOCHROME1", PresentationLUTShape="INVERSE")
    np.testing.assert_allclose(grey(stated), turned, atol=1e-3)


@pytest.mark.parametrize("kind", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_stretches_nothing(kind: str) -> None:
    padded = RAMP.copy()
    padded[0, :5] = -2000
    plain, levels = grey(dicom(RAMP[1:], kind=kind)), grey(dicom(padded, kind=kind, PixelPaddingValue=-2000))
    assert (levels[0, :5] == 0).all()
    inside = RAMP.astype(np.float64)
    inside[0, :5] = np.nan
    expected = (inside - np.nanmin(inside)) * (255 / (np.nanmax(inside) - np.nanmin(inside)))
    if kind == "MONOCHROME1":
        expected = 255 - expected
    np.testing.assert_allclose(levels[1:], expected[1:], atol=1e-3)
    assert not np.allclose(levels[1:], plain, atol=1e-3)  # which begins at another number
    all_of_it = np.full((4, 4), -2000, np.int16)
    assert (grey(dicom(all_of_it, kind=kind, PixelPaddingValue=-2000)) == 0).all()
    ranged = grey(dicom(padded, kind=kind, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-900))
    assert (ranged[padded <= -900] == 0).all()


def test_of_several_frames_the_first() -> None:
    frames = np.stack([RAMP, -RAMP, RAMP * 0])
    np.testing.assert_array_equal(grey(dicom(frames)), grey(dicom(RAMP)))


def test_tables_of_enhanced_files() -> None:
    """These have a rescaling for all frames and a window for each."""
    from pydicom.dataset import Dataset

    values, window, shared, first, second = (Dataset() for _ in range(5))
    values.RescaleSlope, values.RescaleIntercept = "2", "-10"
    window.WindowCenter, window.WindowWidth = "50", "300"
    shared.PixelValueTransformationSequence = [values]
    first.FrameVOILUTSequence = [window]
    data = dicom(
        np.stack([RAMP, -RAMP]), SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=[first, second],
    )  # fmt: skip
    np.testing.assert_allclose(grey(data), windowed(RAMP.astype(np.float64) * 2 - 10, 50, 300), atol=1e-3)


def test_colours() -> None:
    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    np.testing.assert_array_equal(np.asarray(decode_image(dicom(colours, kind="RGB"))), colours)
    fine = colours.astype(np.uint16) * 256 + 13
    image, _ = decode_keeping_bits(dicom(fine, kind="RGB"))
    assert isinstance(image, Bands) and image.channels == 3
    for plane, channel in zip(image.planes, np.moveaxis(fine, 2, 0), strict=True):
        np.testing.assert_allclose(np.asarray(plane), channel / 257, atol=1e-4)


def test_stripes_are_the_same_however_they_are_stored() -> None:
    """pydicom's files of one picture, as colours, luma and chroma, JPEG, JPEG-LS, JPEG 2000, RLE, 8, 16 and 32 bits."""
    pytest.importorskip("imagecodecs")
    reference = np.asarray(open_image(of_pydicom("SC_rgb_rle.dcm"))).astype(int)
    assert (reference[5, 5], reference[95, 95]) == pytest.approx(np.array([[255, 0, 0], [255, 255, 255]]))
    names = (
        "SC_rgb_rle_16bit.dcm SC_rgb_rle_32bit.dcm SC_rgb_rle_2frame.dcm SC_ybr_full_422_uncompressed.dcm "
        "SC_rgb_jpeg_gdcm.dcm SC_rgb_jpeg_dcmtk.dcm SC_rgb_gdcm_KY.dcm SC_rgb_jls_lossy_line.dcm"
    )
    for name in names.split():
        pixels = np.asarray(open_image(of_pydicom(name))).astype(int)
        assert pixels.shape == reference.shape
        assert np.abs(pixels - reference).mean() < 2, name


def test_packed_slices_are_those_not_packed() -> None:
    pytest.importorskip("imagecodecs")
    plain = grey(of_pydicom("MR_small.dcm").read_bytes())
    for name in ["MR_small_RLE", "MR_small_bigendian", "MR_small_jp2klossless", "MR_small_jpeg_ls_lossless"]:
        np.testing.assert_array_equal(grey(of_pydicom(f"{name}.dcm").read_bytes()), plain)


def test_a_palette() -> None:
    path = of_pydicom("examples_palette.dcm")
    ds = pydicom.dcmread(path)
    tables = [
        np.frombuffer(ds[f"{name}PaletteColorLookupTableData"].value, np.uint16)
        for name in ("Red", "Green", "Blue")
    ]
    expected = np.stack([table[ds.pixel_array] for table in tables], axis=2) / 257
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.rint(expected))


def test_float_pixels() -> None:
    values = np.linspace(-3, 5, 24, dtype=np.float32).reshape(4, 6)
    np.testing.assert_allclose(grey(dicom(values)), (values + 3) * (255 / 8), atol=1e-3)
    values[1, 1] = np.nan
    with pytest.raises(ImageError, match="NaN or infinite"):
        decode_image(dicom(values))


def test_one_number_everywhere_is_black() -> None:
    assert (grey(dicom(np.full((4, 4), 700, np.int16))) == 0).all()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("test-SR.dcm", r"a DICOM file without a picture \(Comprehensive SR Storage\)"),
        ("rtplan.dcm", r"without a picture \(RT Plan Storage\)"),
        ("nested_priv_SQ.dcm", "without a picture"),
        ("image_dfl.dcm", "deflated as a whole"),
        ("MR_truncated.dcm", "damaged"),
        ("badVR.dcm", "damaged"),
        ("JPEG2000-embedded-sequence-delimiter.dcm", "cannot be decompressed"),
    ],
)
@pytest.mark.filterwarnings("ignore:Invalid value:UserWarning")
def test_what_is_said_of_files_that_cannot_be_seen(name: str, said: str) -> None:
    pytest.importorskip("imagecodecs")
    with pytest.raises(ImageError, match=said):
        decode_image(of_pydicom(name).read_bytes())


def test_what_is_said_of_other_transfer_syntaxes() -> None:
    data = dicom(RAMP)
    syntax = b"1.2.840.10008.1.2.1\0"
    assert data.count(syntax) == 1
    with pytest.raises(ImageError, match=r"compressed as MPEG-4.*which dinokit does not support"):
        at = data.index(syntax)
        video = b"1.2.840.10008.1.2.4.102\0"
        decode_image(data[: at - 2] + len(video).to_bytes(2, "little") + video + data[at + len(syntax) :])
    with pytest.raises(ImageError, match="does not state how its pixels are stored"):
        decode_image(data.replace(b"\x02\0\x10\0UI", b"\x02\0\x11\0UI"))


@pytest.mark.parametrize(
    ("syntax", "encode"),
    [
        ("1.2.840.10008.1.2.4.80", "jpegls"),
        ("1.2.840.10008.1.2.4.90", "jpeg2k"),
        ("1.2.840.10008.1.2.4.201", "htj2k"),
    ],
)
def test_packed_samples_are_as_they_come_out(syntax: str, encode: str) -> None:
    """Whatever the file says of the order of colours and of the bytes a sample takes, which was so before packing."""
    imagecodecs = pytest.importorskip("imagecodecs")
    if not hasattr(imagecodecs, f"{encode}_encode"):
        pytest.skip(f"this imagecodecs cannot write {encode}")
    from pydicom.encaps import encapsulate

    def packed(pixels: NDArray[Any], samples: NDArray[Any], **options: Any) -> NDArray[np.uint8]:
        ds = pydicom.dcmread(io.BytesIO(dicom(pixels, **options)))
        ds.file_meta.TransferSyntaxUID = syntax
        ds.PixelData = encapsulate([getattr(imagecodecs, f"{encode}_encode")(samples, level=0)])
        ds["PixelData"].VR = "OB"
        file = io.BytesIO()
        ds.save_as(file)
        return np.asarray(decode_image(file.getvalue()))

    colours = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    np.testing.assert_array_equal(packed(colours, colours, kind="RGB", PlanarConfiguration=1), colours)
    wide = colours[:, :, 0].astype(np.uint16)
    found = packed(wide, colours[:, :, 0].copy(), bits=8, WindowCenter="128", WindowWidth="256")
    np.testing.assert_array_equal(found[:, :, 0], colours[:, :, 0])


def test_twelve_bits_of_jpeg() -> None:
    """A scan of bones, by JPEG of 12 bits and by JPEG 2000."""
    pytest.importorskip("imagecodecs")
    jpeg, other = (grey(of_pydicom(name).read_bytes()) for name in ("JPGExtended.dcm", "JPEG2000.dcm"))
    assert jpeg.shape == other.shape
    assert np.corrcoef(jpeg.ravel(), other.ravel())[0, 1] > 0.95


def test_a_picture_larger_than_any_is_refused_before_it_is_unpacked() -> None:
    data = dicom(np.zeros((2, 2), np.uint8), Rows=65535, Columns=65535)
    with pytest.raises(ImageError, match="decompression bombs"):
        decode_image(data)


@pytest.mark.parametrize(
    ("name", "start", "offset"),
    [
        ("MR_small_jpeg_ls_lossless.dcm", b"\xff\xf7", 5),
        ("SC_rgb_jpeg_gdcm.dcm", b"\xff\xc3", 5),
        ("MR_small_jp2klossless.dcm", b"\xff\x4f\xff\x51", 10),
    ],
)
def test_a_packed_frame_larger_than_the_file_says_is_refused(name: str, start: bytes, offset: int) -> None:
    """A few bytes may claim gigabytes."""
    pytest.importorskip("imagecodecs")
    data = bytearray(of_pydicom(name).read_bytes())
    at = data.index(start, data.index(b"\xe0\x7f\x10\x00")) + offset
    assert data[at : at + 2] in (b"\0\x40", b"\0\x64")  # 64 or 100 pixels
    data[at : at + 2] = b"\xff\xf0"
    # JPEG 2000 of less than Pillow's limit is tried by Pillow, too, and is not what the file says.
    with pytest.raises(
        ImageError, match="damaged" if start == b"\xff\x4f\xff\x51" else "the compressed frame is"
    ):
        decode_image(bytes(data))


def test_tables_may_come_before_the_frame() -> None:
    """In which order a JPEG has its Huffman tables and the frame is free."""
    pytest.importorskip("imagecodecs")
    data = of_pydicom("SC_rgb_jpeg_gdcm.dcm").read_bytes()
    at = data.index(b"\xff\xc3")
    end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    assert data[end : end + 2] == b"\xff\xc4"
    after = end + 2 + int.from_bytes(data[end + 2 : end + 4], "big")
    turned = data[:at] + data[end:after] + data[at:end] + data[after:]
    np.testing.assert_array_equal(np.asarray(decode_image(turned)), np.asarray(decode_image(data)))


def test_cut_anywhere_a_file_gives_a_sentence() -> None:
    """No traceback of pydicom's reaches anybody."""
    data = of_pydicom("MR_small_jpeg_ls_lossless.dcm").read_bytes()
    for end in range(132, len(data) - 100, 97):
        with pytest.raises(ImageError) as said:
            decode_image(data[:end])
        assert str(said.value)


def test_without_pydicom_the_message_says_what_to_install(
    hide: Callable[[str], None], tmp_path: Path
) -> None:
    hide("pydicom")
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "IM_1.DCM").write_bytes(dicom(RAMP))
    picture().save(tmp_path / "scans" / "a.png")
    table = tmp_path / "t.parquet"
    result = CliRunner().invoke(cli, ["embed", str(tmp_path / "scans"), "-o", str(table), "--device", "cpu"])
    assert result.exit_code == 1
    assert "IM_1.DCM: a DICOM picture" in result.stderr and "pip install 'dinokit[dicom]'" in result.stderr
    assert read_embeddings(table).errors[1] is None


def test_without_imagecodecs_the_message_says_what_to_install(hide: Callable[[str], None]) -> None:
    from dinokit.pictures import dicom_codecs

    hide("imagecodecs")
    dicom_codecs.decoder_of.cache_clear()
    try:
        with pytest.raises(ImageError, match=r"JPEG-LS.*imagecodecs reads: pip install 'dinokit\[dicom\]'"):
            decode_image(of_pydicom("MR_small_jpeg_ls_lossless.dcm"))
        assert grey(of_pydicom("MR_small_jp2klossless.dcm").read_bytes()).max() == 255  # by Pillow
    finally:
        dicom_codecs.decoder_of.cache_clear()


def test_networks_of_other_channels_say_why_not() -> None:
    with pytest.raises(ImageError, match=r"a DICOM picture, which only models of 1 or 3 channels can read"):
        decode_bands(dicom(RAMP), 4)


def test_a_folder_of_slices_is_embedded(tmp_path: Path) -> None:
    (tmp_path / "scans").mkdir()
    for name in ("MR_small.dcm", "CT_small.dcm", "examples_rgb_color.dcm"):
        (tmp_path / "scans" / name).write_bytes(of_pydicom(name).read_bytes())
    assert len(find_images(tmp_path / "scans")) == 3
    table = tmp_path / "t.parquet"
    result = CliRunner().invoke(cli, ["embed", str(tmp_path / "scans"), "-o", str(table), "--device", "cpu"])
    assert result.exit_code == 0, result.stderr
    found = read_embeddings(table)
    assert found.embeddings.shape == (3, 192) and not any(found.errors)


def test_files_without_a_suffix_are_told_of(tmp_path: Path) -> None:
    """As scanners and archives name them: IM00001, or by a number with dots."""
    (tmp_path / "scans" / "A").mkdir(parents=True)
    (tmp_path / "scans" / "A" / "IM00001").write_bytes(dicom(RAMP))
    (tmp_path / "scans" / "A" / "1.2.840.7").write_bytes(dicom(RAMP + 1))
    command = ["embed", str(tmp_path / "scans"), "-o", str(tmp_path / "t.npy"), "--device", "cpu"]
    pattern = str(tmp_path / "scans" / "**" / "*")
    pipe = tmp_path / "scans" / "A" / "0-pipe"  # which nobody writes to
    if hasattr(os, "mkfifo"):
        os.mkfifo(pipe)
    result = CliRunner().invoke(cli, command)
    pipe.unlink(missing_ok=True)
    assert result.exit_code == 3 and "DICOM files without one" in result.stderr and pattern in result.stderr
    result = CliRunner().invoke(cli, [command[0], pattern, *command[2:]])
    assert result.exit_code == 0 and "2 embedded" in result.stderr


def test_odd_values_are_not_remarked_upon(tmp_path: Path) -> None:
    """Scanners write what the standard does not know, and pydicom warns of each."""
    (tmp_path / "scans").mkdir()
    odd = dicom(RAMP, NumberOfFrames="1", SpecificCharacterSet="ISO_IR 100").replace(
        b"ISO_IR 100", b"ISO-IR_999"
    )
    (tmp_path / "scans" / "a.dcm").write_bytes(odd.replace(b"IS\x02\0001 ", b"IS\x02\0001A"))
    (tmp_path / "scans" / "b.dcm").write_bytes(odd)
    command = [sys.executable, "-m", "dinokit", "embed", "scans", "-o", "t.parquet", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1 and "a.dcm: its data are damaged" in done.stderr and "1 embedded" in done.stderr
    )
    assert "Warning" not in done.stderr


def test_importing_dinokit_does_not_import_pydicom() -> None:
    code = "import sys, dinokit.pictures.images; print('pydicom' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
