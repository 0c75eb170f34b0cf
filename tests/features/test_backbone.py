"""Backbone: shapes and kinds of input on an engine that can be checked by hand, numbers on the real engines."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fake_engine import EMBED_DIM, HEADS, PATCH, FakeEngine
from numpy.typing import NDArray
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import ImageError, ModelError, UsageError
from dinokit.features.backbone import Backbone
from dinokit.features.given_pictures import as_given
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import ATTENTION
from dinokit.pictures.images import open_image
from dinokit.pictures.preprocess import Preprocessing

GOLDEN = Path(__file__).parents[1] / "golden" / "features.npz"
FAKE_VIT = VitArchitecture(
    embed_dim=EMBED_DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=(32, 32)
)


def fake_backbone(preprocessing: Preprocessing | None = None) -> Backbone:
    config = config_for(FAKE_VIT, "fake")
    return Backbone(
        config, FakeEngine(), weights_sha256="0" * 64, source="a test", preprocessing=preprocessing
    )


def shapes_seen(backbone: Backbone) -> list[tuple[int, ...]]:
    engine = backbone._engine
    assert isinstance(engine, FakeEngine)
    return engine.shapes


def by_hand(backbone: Backbone, image: Any) -> NDArray[np.float64]:
    crop = backbone.preprocessing.crop(open_image(image)) / 255
    x = ((crop - backbone.preprocessing.mean) / backbone.preprocessing.std).reshape(-1, 3)
    return np.concatenate([x.mean(0), x.std(0)])


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i:02}.png" for i in range(11)]
    for i, path in enumerate(paths):
        picture(50 + i, 60 - i, seed=i).save(path)
    return paths


# -- what goes in


def test_one_picture_of_any_kind_gives_one_vector(files: list[Path]) -> None:
    backbone = fake_backbone()
    data = files[0].read_bytes()
    array = np.asarray(Image.open(io.BytesIO(data)))
    expected = by_hand(backbone, files[0])
    for source in (files[0], str(files[0]), data, io.BytesIO(data), array, Image.fromarray(array)):
        vector = backbone.embed(source)
        assert vector.shape == (EMBED_DIM,)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, expected, atol=1e-5, err_msg=type(source).__name__)
    grey = backbone.embed(array[:, :, 0])
    np.testing.assert_allclose(grey, by_hand(backbone, array[:, :, 0]), atol=1e-5)


def test_several_pictures_of_any_kind_give_rows_in_order(files: list[Path]) -> None:
    backbone = fake_backbone()
    expected = np.stack([by_hand(backbone, file) for file in files])
    folder = files[0].parent
    for several in (
        files,
        tuple(files),
        [str(file) for file in files],
        (file for file in files),
        [Image.open(file) for file in files],
        [file.read_bytes() for file in files],
        [files[0], *(np.asarray(Image.open(file)) for file in files[1:])],
        folder,
        str(folder),
        str(folder / "*.png"),
    ):
        np.testing.assert_allclose(backbone.embed(several), expected, atol=1e-5, err_msg=str(type(several)))
    np.testing.assert_allclose(backbone.embed(files[:1]), expected[:1], atol=1e-5)  # a list of one has N = 1


def test_an_empty_name_is_an_error_of_the_caller() -> None:
    with pytest.raises(UsageError, match=r"the path is empty \(''\); expected a file"):
        fake_backbone().embed("")
    with pytest.raises(ImageError, match="'': the path is empty"):
        fake_backbone().embed([""])


def test_arrays_and_tensors_with_a_batch_axis() -> None:
    torch = pytest.importorskip("torch")
    backbone = fake_backbone()
    batch = np.stack([np.asarray(picture(40, 50, seed=i)) for i in range(5)])
    expected = np.stack([by_hand(backbone, one) for one in batch])
    np.testing.assert_allclose(backbone.embed(batch, batch_size=2), expected, atol=1e-5)
    tensor = torch.from_numpy(batch).permute(0, 3, 1, 2)
    np.testing.assert_allclose(backbone.embed(tensor), expected, atol=1e-5)
    np.testing.assert_allclose(backbone.embed(tensor[0]), expected[0], atol=1e-5)


def test_the_same_object_twice_is_two_rows(files: list[Path]) -> None:
    with Image.open(files[0]) as lazy:  # decoded in threads, this would be a race
        rows = fake_backbone().embed([lazy, files[1], lazy, lazy], workers=4)
    np.testing.assert_array_equal(rows[0], rows[2])
    np.testing.assert_array_equal(rows[0], rows[3])
    assert np.abs(rows[0] - rows[1]).max() > 0.01


def test_nothing_gives_no_rows() -> None:
    backbone = fake_backbone()
    assert backbone.embed([]).shape == (0, EMBED_DIM)
    assert backbone.masks(iter(())).shape == (0, HEADS, 32, 32)
    assert backbone.masks([]).dtype == np.bool_


@pytest.mark.parametrize("batch_size", [1, 2, 3, 5, 11, 32])
@pytest.mark.parametrize("workers", [0, 1, "auto"])
def test_batches_have_one_shape_and_do_not_change_the_result(
    files: list[Path], batch_size: int, workers: Any
) -> None:
    backbone = fake_backbone()
    expected = np.stack([by_hand(backbone, file) for file in files])
    np.testing.assert_allclose(
        backbone.embed(files, batch_size=batch_size, workers=workers), expected, atol=1e-5
    )
    assert len(set(shapes_seen(backbone))) == 1
    computed = sum(shape[0] for shape in shapes_seen(backbone))
    assert computed - len(files) < len(shapes_seen(backbone))  # padding of less than one picture a batch

    stream = fake_backbone()  # of unknown length
    rows = stream.embed(iter(files), batch_size=batch_size, workers=workers)
    np.testing.assert_allclose(rows, expected, atol=1e-5)
    assert len(set(shapes_seen(stream))) == 1


def test_a_picture_that_cannot_be_read_is_named(files: list[Path], tmp_path: Path) -> None:
    backbone = fake_backbone()
    files[4].write_bytes(b"")
    with pytest.raises(ImageError, match=r"04\.png: the file is empty"):
        backbone.embed(tmp_path)
    with pytest.raises(ImageError, match=r"picture number 2: .* dtype float32"):
        backbone.embed([files[0], np.zeros((9, 9, 3), np.float32)])
    with pytest.raises(ImageError, match=r"picture number 1: .*: the file is empty"):
        backbone.embed([b""])
    with pytest.raises(ImageError, match="no such file"):
        backbone.embed("missing.jpg")
    with pytest.raises(UsageError, match="the pattern matches no file"):
        backbone.embed(str(tmp_path / "*.tiff"))
    with pytest.raises(ImageError, match="a int is not a picture"):
        backbone.embed(3)


@pytest.mark.parametrize(
    ("name", "value"), [("batch_size", 0), ("batch_size", 2.5), ("workers", -1), ("workers", "all")]
)
def test_impossible_options(files: list[Path], name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"{name}={value!r} is invalid"):
        fake_backbone().embed(files, **{name: value})


# -- what comes out


def test_maps_have_their_shapes(files: list[Path]) -> None:
    backbone = fake_backbone(Preprocessing(resize_px=60, crop_px=(24, 40)))
    assert backbone.image_size == (24, 40)
    assert backbone.grid == (3, 5)
    one, several = files[0], files[:3]
    assert backbone.patch_tokens(one).shape == (3, 5, EMBED_DIM)
    assert backbone.patch_tokens(several).shape == (3, 3, 5, EMBED_DIM)
    assert backbone.attention(one).shape == (HEADS, 3, 5)
    assert backbone.attention(several).shape == (3, HEADS, 3, 5)
    assert backbone.masks(one).shape == (HEADS, 24, 40)
    assert backbone.masks(several).shape == (3, HEADS, 24, 40)
    assert backbone.masks(one).dtype == np.bool_


def test_maps_lie_where_they_should() -> None:
    """A bright square in row 1, column 2 of the patches is found there and nowhere else."""
    array = np.zeros((32, 32, 3), np.uint8)
    array[8:16, 16:24] = 255
    backbone = fake_backbone(Preprocessing(resize_px=(32, 32), crop_px=(32, 32)))
    attention = backbone.attention(array)
    assert np.unravel_index(attention[0].argmax(), (4, 4)) == (1, 2)
    assert np.unravel_index(attention[1].argmax(), (4, 4)) == (2, 1)  # the second head looks backwards
    np.testing.assert_array_equal(backbone.masks(array, mass=0.3)[0], array[:, :, 0] == 255)
    assert np.unravel_index(backbone.patch_tokens(array)[:, :, 0].argmax(), (4, 4)) == (1, 2)


def test_transform_is_the_networks_input(files: list[Path]) -> None:
    backbone = fake_backbone()
    pixels = backbone.transform(files[0])
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, backbone.transform(Image.open(files[0])))
    np.testing.assert_allclose(pixels.reshape(3, -1).mean(1), backbone.embed(files[0])[:3], atol=1e-5)


def test_embed_crops_takes_other_sizes_and_refuses_wrong_ones() -> None:
    backbone = fake_backbone()
    assert backbone.embed_crops(np.zeros((2, 16, 40, 3), np.uint8)).shape == (2, EMBED_DIM)
    with pytest.raises(
        UsageError, match=r"float64 of shape \(2, 16, 40, 3\); expected uint8 or float32 \(B, H, W, 3\)"
    ):
        backbone.embed_crops(np.zeros((2, 16, 40, 3), np.float64))  # type: ignore[arg-type]
    with pytest.raises(
        UsageError, match="image width of 41 px is not a multiple of patch_size=8; use 40 or 48"
    ):
        backbone.embed_crops(np.zeros((2, 16, 41, 3), np.uint8))


def test_an_image_size_off_the_patches_is_refused() -> None:
    preprocessing = Preprocessing()
    assert fake_backbone(preprocessing.with_image_size(64)).image_size == (64, 64)
    with pytest.raises(
        UsageError, match="image height of 225 px is not a multiple of patch_size=8; use 224 or 232"
    ):
        fake_backbone(preprocessing.with_image_size(225))
    with pytest.raises(UsageError, match=r"image height of 5 px .* use 8$"):
        fake_backbone(preprocessing.with_image_size(5))


def test_what_it_says_of_itself() -> None:
    backbone = fake_backbone()
    assert (backbone.name, backbone.embed_dim, backbone.num_heads, backbone.patch_size) == ("fake", 6, 2, 8)
    assert (backbone.engine, backbone.device, backbone.precision) == ("fake", "cpu", "fp32")
    assert repr(backbone) == (
        "<Backbone fake (a test): 6 numbers per picture, 32x32 px in patches of 8, 2 heads; fake on cpu, fp32>"
    )
    with pytest.raises(
        UsageError, match=r'computes with fake, which has no torch module; use .*engine="torch"'
    ):
        _ = backbone.module


# -- the real engines against facebookresearch/dino


@pytest.fixture(scope="module")
def golden() -> dict[str, NDArray[Any]]:
    with np.load(GOLDEN, allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", params=["onnx", "torch"])
def engine(request: pytest.FixtureRequest, golden: dict[str, NDArray[Any]]) -> Any:
    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    if request.param == "onnx":
        pytest.importorskip("onnxruntime")
        from dinokit.runtime.onnx import OnnxEngine
        from dinokit.vit_graph import build_vit_graph

        return OnnxEngine(build_vit_graph(config_for().vit, weights).SerializeToString(), device="cpu")
    pytest.importorskip("torch")
    from dinokit.runtime.torch import TorchEngine

    return TorchEngine(config_for(), weights, device="cpu")


@pytest.mark.parametrize("size", ["32x32", "16x16", "48x32", "32x72", "96x64"])
def test_features_attention_and_masks_equal_the_reference(
    engine: Any, golden: dict[str, NDArray[Any]], size: str
) -> None:
    height, width = (int(side) for side in size.split("x"))
    as_they_are = Preprocessing(resize_px=(height, width), crop_px=(height, width))
    backbone = Backbone(
        config_for(), engine, weights_sha256="0" * 64, source="a test", preprocessing=as_they_are
    )
    images = golden[f"image.{size}"].transpose(0, 2, 3, 1)
    grid = (height // 8, width // 8)
    tokens, attention, masks = (golden[f"{name}.{size}"] for name in ("tokens", "attention", "mask60"))

    np.testing.assert_allclose(backbone.embed(images), golden[f"cls.{size}"], atol=1e-4)
    np.testing.assert_allclose(backbone.embed_crops(images), golden[f"cls.{size}"], atol=1e-4)
    np.testing.assert_allclose(backbone.embed(images[1]), golden[f"cls.{size}"][1], atol=1e-4)
    np.testing.assert_allclose(backbone.patch_tokens(images).reshape(2, -1, 48), tokens[:, 1:], atol=1e-4)
    np.testing.assert_allclose(backbone.attention(images).reshape(2, 3, -1), attention, atol=1e-5)
    expected = np.kron(masks.reshape(2, 3, *grid), np.ones((1, 1, 8, 8), bool))
    np.testing.assert_array_equal(backbone.masks(images, mass=0.6), expected)


def test_module_is_the_torch_engines(golden: dict[str, NDArray[Any]]) -> None:
    torch = pytest.importorskip("torch")
    from dinokit.runtime.torch import TorchEngine

    weights = {k.removeprefix("weights."): v for k, v in golden.items() if k.startswith("weights.")}
    backbone = Backbone(
        config_for(),
        TorchEngine(config_for(), weights, device="cpu"),
        weights_sha256="0" * 64,
        source="a test",
    )
    assert isinstance(backbone.module, torch.nn.Module)
    assert not backbone.module.training
    pixels = torch.from_numpy(backbone.transform(picture()))[None]
    with torch.no_grad():
        np.testing.assert_allclose(backbone.module(pixels)[0], backbone.embed(picture()), atol=1e-5)


def test_two_threads_see_their_own_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """While one thread is in the middle of a pass through a shared module, another makes a whole one."""
    pytest.importorskip("timm")
    from dinokit.runtime.torch import TorchEngine

    config = config_for()
    engine = TorchEngine(config, random_weights(), device="cpu")
    pixels = [
        config.preprocessing.normalise(np.asarray(picture(32, 32, seed=seed))[None]) for seed in range(2)
    ]
    alone = [engine.run(one, [ATTENTION])[ATTENTION] for one in pixels]
    assert np.abs(alone[0] - alone[1]).max() > 1e-4
    in_between: list[NDArray[np.float32]] = []
    forward = engine.module.forward_features

    def interrupted(values: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            other = threading.Thread(
                target=lambda: in_between.append(engine.run(pixels[1], [ATTENTION])[ATTENTION])
            )
            other.start()
            other.join()
        return forward(values)

    monkeypatch.setattr(engine.module, "forward_features", interrupted)
    np.testing.assert_array_equal(engine.run(pixels[0], [ATTENTION])[ATTENTION], alone[0])
    np.testing.assert_array_equal(in_between[0], alone[1])


@pytest.mark.parametrize("name", [3, None, ["starter"]])
def test_what_is_no_name_of_a_model(name: Any) -> None:
    with pytest.raises(UsageError, match="is not a model name; expected a string or path"):
        load_backbone(name)


def test_a_column_of_pyarrow_names_pictures(tmp_path: Path) -> None:
    for number in range(2):
        picture(seed=number).save(tmp_path / f"{number}.png")
    names = [str(tmp_path / f"{number}.png") for number in range(2)]
    for column in (pa.array(names), pa.chunked_array([names[:1], names[1:]])):
        assert as_given(column) == names


def test_a_set_has_no_order(files: list[Path]) -> None:
    with pytest.raises(UsageError, match="a set has no order"):
        fake_backbone().embed(set(files))


class BrokenEngine(FakeEngine):
    def run(self, *arguments: Any) -> dict[str, NDArray[np.float32]]:
        return {name: array * np.float32("nan") for name, array in super().run(*arguments).items()}


@pytest.mark.parametrize("method", ["embed", "patch_tokens", "attention", "masks"])
def test_numbers_that_are_not_finite_are_an_error(files: list[Path], method: str) -> None:
    broken = Backbone(config_for(FAKE_VIT, "fake"), BrokenEngine(), weights_sha256="0" * 64, source="a test")
    with pytest.raises(ModelError, match=r"fake \(a test\) computed values that are not finite in"):
        getattr(broken, method)(files)
