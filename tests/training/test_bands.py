"""Training on pictures of n channels: crops and colours, mean and deviation, a whole run, weights of three channels."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")

from small_recipe import SMALL_RECIPE

from dinokit import load_backbone
from dinokit.errors import MissingExtraError, UsageError
from dinokit.export.verification.synthetic import made_up_bands
from dinokit.pictures.bands import Bands
from dinokit.training import trainer
from dinokit.training.adapt import adapt
from dinokit.training.networks.first_layer import spread_over_channels
from dinokit.training.networks.network import build_backbone
from dinokit.training.recipe import load_recipe, with_overrides
from dinokit.training.views.augment import MultiCrop, make_view
from dinokit.training.views.batched_crops import draw_picture, join, make_crops
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.normalisation import measure
from dinokit.training.views.pictures import collect_pictures

N = 5
BANDS = replace(SMALL_RECIPE, channels=N, mean=(0.5,) * N, std=(0.2,) * N)
CPU = torch.device("cpu")


def bands(seed: int = 0, channels: int = N) -> Bands:
    return made_up_bands(channels, seed).resize((90, 70))


def finer(picture: Bands) -> Bands:
    """The same picture as float32."""
    return Bands.of(picture.array.astype(np.float32))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of 8 and 16 bits and floats, and what is none for a network of five channels."""
    path = tmp_path / "bands"
    path.mkdir()
    for number in range(2):
        array = bands(number).array
        np.save(path / f"{number}.npy", array)
        np.save(path / f"{number}-16.npy", (array.astype(np.uint16) * 257).transpose(2, 0, 1))
        np.save(path / f"{number}-float.npy", array / np.float32(255))
    Image.new("RGB", (40, 40)).save(path / "preview.png")
    return path


# ------------------------------------------------------------------------------------------- crops


def test_each_channel_is_changed_as_pillow_changes_a_grey_picture() -> None:
    """Flip, crop, brightness, contrast, blur and solarise are drawn once and done to every channel."""
    picture, views = bands(), MultiCrop(replace(BANDS, n_local_crops=4))
    apart: list[NDArray[np.int64]] = []
    for seed in range(12):
        draws = views.draw(picture.size, random.Random(seed))
        sizes = [view.size_px for view in views.global_views + views.local_views]
        for draw, size in zip(draws, sizes, strict=True):
            made = make_view(picture, size, draw)
            assert made.shape == (*size, N) and made.dtype == np.uint8
            for band, plane in enumerate(picture.planes):
                truth = make_view(plane, size, draw)[:, :, 0]
                apart.append(np.abs(made[:, :, band].astype(int) - truth.astype(int)).ravel())
    # As the batched crops of photographs are: Pillow's blur rounds its weights in a way of its own.
    found = np.concatenate(apart)
    assert found.mean() <= 0.05 and found.max() <= 4


def test_finer_bands_are_changed_alike_and_not_rounded() -> None:
    picture, views = bands(), MultiCrop(replace(BANDS, n_local_crops=4))
    for seed in range(12):
        eight, fine = (views(one, random.Random(seed)) for one in (picture, finer(picture)))
        for one, other in zip(eight, fine, strict=True):
            assert one is not None and other is not None and other.dtype == np.float32
            apart = np.abs(one - other)
            # Each of up to eight steps rounds or cuts by a level; a solarised value may lie on either side of 128.
            assert np.median(apart) < 1.5 and (apart > 6).mean() < 0.02
    assert (other % 1 != 0).mean() > 0.5


@pytest.mark.parametrize("kind", ["8 bits", "finer"])
def test_batched_crops_equal_those_of_pillow(kind: str) -> None:
    picture, views = bands(), MultiCrop(replace(BANDS, n_local_crops=4))
    picture = picture if kind == "8 bits" else finer(picture)
    for seed in range(8):
        batch = join([draw_picture(picture, views, random.Random(seed))], [])
        made = make_crops(batch, 32, 16, CPU)
        for ours, theirs in zip(made, views(picture, random.Random(seed)), strict=True):
            assert ours is not None and theirs is not None
            here = ours[:, 0].permute(0, 2, 3, 1).numpy()
            apart = np.abs(here.astype(np.float64) - theirs)
            assert here.shape == theirs.shape and here.dtype == theirs.dtype
            if kind == "8 bits":
                assert apart.mean() <= 0.05 and apart.max() <= 4
            else:  # no rounding but that of the weights; solarise may tip a value at 128
                assert apart.mean() <= 0.02 and np.percentile(apart, 99) <= 0.1


def test_large_finer_pictures_are_shrunk_without_rounding() -> None:
    picture = finer(made_up_bands(2, 3).resize((1100, 900)))
    views = MultiCrop(replace(BANDS, channels=2, mean=None, std=None, global_crops_scale=(0.9, 1.0)))
    drawn = draw_picture(picture, views, random.Random(0))
    assert drawn.pixels.dtype == np.float32 and len(drawn.pixels) == 2 * 32 * 32 + 2 * 16 * 16
    ours, _ = make_crops(join([drawn], []), 32, 16, CPU)
    theirs, _ = views(picture, random.Random(0))
    np.testing.assert_allclose(ours[:, 0].permute(0, 2, 3, 1).numpy(), theirs, atol=0.05)


def test_channels_change_no_box() -> None:
    other = MultiCrop(replace(BANDS, channels=3, mean=None, std=None))
    assert MultiCrop(BANDS).draw((90, 70), random.Random(5)) == other.draw((90, 70), random.Random(5))


@pytest.mark.parametrize("crops", ["pillow", "batched"])
def test_a_batch_may_hold_pictures_of_every_type(crops: str, folder: Path) -> None:
    pictures = collect_pictures([folder], channels=N)
    assert len(pictures) == 6
    (batch,) = CropLoader(pictures, replace(BANDS, batch_size=6, crops=crops))
    assert isinstance(batch, Batch) and not batch.unreadable
    assert batch.global_crops.shape == (2, 6, N, 32, 32) and batch.global_crops.dtype == torch.float32
    assert 20 < batch.global_crops.mean() < 235  # nothing is black, whatever its type


# ------------------------------------------------------------------------------------------- mean and deviation


def test_dark_pictures_of_16_bits_keep_their_digits(tmp_path: Path) -> None:
    rng, arrays = np.random.default_rng(0), []
    for number in range(4):
        array = rng.normal((900, 1400), (20, 60), (37, 37, 2)).astype(np.uint16)
        np.save(tmp_path / f"{number}.npy", array)
        arrays.append(array[2:34, 2:34] / 65535)
    mean, std, count = measure(collect_pictures([tmp_path], channels=2), 32, 2)
    flat = np.stack(arrays).reshape(-1, 2)
    assert count == 4
    assert mean == pytest.approx(flat.mean(axis=0), rel=1e-5)
    assert std == pytest.approx(flat.std(axis=0), rel=1e-4)
    assert with_overrides(BANDS, ["channels=2", f"mean={list(mean)}", f"std={list(std)}"]).std == std


def test_imagenet_has_no_mean_for_five_channels() -> None:
    recipe, choices = adapt(replace(BANDS, mean=None, std=None), 100)
    assert recipe.mean == recipe.std == "auto" and recipe.grey_probability == 0
    told = {choice.key: choice.reason for choice in choices}
    assert told["mean"] == "ImageNet has no values for 5 channels: measured on the pictures"
    assert "no grey, hue or saturation" in told["grey_probability"]
    photographs, choices = adapt(replace(BANDS, channels=1, mean=None, std=None), 100)
    assert photographs.mean is None and photographs.grey_probability == 0.2


def test_what_finds_no_picture_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"no \.npy or TIFF files in this folder"):
        collect_pictures([tmp_path], channels=N)
    from dinokit.pictures import band_files

    (tmp_path / "a.tif").write_bytes(b"x")
    monkeypatch.setattr(band_files.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dinokit\[tiff\]'"):
        collect_pictures([tmp_path], channels=N)


# ------------------------------------------------------------------------------------------- weights of three channels


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_224", "resnet18"])
def test_channels_that_are_all_alike_are_seen_as_the_grey_picture_was(arch: str) -> None:
    sizes = replace(BANDS, arch=arch, local_crop_px=32)
    three, _ = build_backbone(replace(sizes, channels=3, mean=None, std=None), is_student=False)
    grey = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    for n in (1, 2, N):
        ours, _ = build_backbone(replace(sizes, channels=n, mean=None, std=None), is_student=False)
        told: list[str] = []
        ours.load_state_dict(spread_over_channels(ours, three.state_dict(), told.append))
        assert len(told) == 1 and f"has 3 channels and needs {n}" in told[0]
        with torch.no_grad():
            made, truth = ours.eval()(grey.expand(-1, n, -1, -1)), three.eval()(grey.expand(-1, 3, -1, -1))
        np.testing.assert_allclose(made, truth, atol=1e-4)
    untouched = three.state_dict()
    assert all(value is untouched[name] for name, value in spread_over_channels(three, untouched).items())


# ------------------------------------------------------------------------------------------- whole runs


class Told(trainer.Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def told(self, message: str) -> None:
        self.messages.append(message)

    warned = told


def test_from_a_folder_of_arrays_to_vectors(folder: Path, tmp_path: Path, photos: Path) -> None:
    # A run on photographs, whose weights the other begins with.
    colour = replace(BANDS, channels=3, mean=None, std=None)
    trainer.train([photos], tmp_path / "colour", colour)
    observer = Told()
    recipe = replace(BANDS, mean=None, std=None, init_from=str(tmp_path / "colour"))
    for name in ("cat", "dog"):
        (tmp_path / "classes" / name).mkdir(parents=True)
        for number in range(2):
            np.save(tmp_path / "classes" / name / f"{number}.npy", bands(number).array)
    recipe = replace(recipe, labelled=str(tmp_path / "classes"))
    trainer.train([folder], tmp_path / "run", recipe, observer=observer)
    heard = "\n".join(observer.messages)
    assert "measured on 6 of 6 pictures" in heard
    assert heard.count("has 3 channels and needs 5") == 1
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert isinstance(saved.mean, tuple) and len(saved.mean) == N
    assert '"knn_teacher"' in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert (tmp_path / "run" / "attention" / "photos.jpg").is_file()

    vectors: list[NDArray[Any]] = []
    for engine in ("onnx", "torch"):
        backbone = load_backbone(tmp_path / "run", engine=engine, device="cpu")
        assert backbone.preprocessing.mean == saved.mean
        assert backbone.config.model_args["in_chans"] == N
        vectors.append(backbone.embed(folder))
    assert vectors[0].shape == (6, 48)
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-4)


def test_an_export_of_five_channels_is_proven_on_pictures_that_were_made_up(tmp_path: Path) -> None:
    from small_models import SMALL, config_for, random_weights

    from dinokit.export import export_folder
    from dinokit.model_folder.folder import write_model_folder
    from dinokit.pictures.preprocess import Preprocessing

    vit = replace(SMALL, in_chans=N)
    see = Preprocessing(36, (32, 32), mean=(0.4,) * N, std=(0.2,) * N)
    model = write_model_folder(
        tmp_path / "model", replace(config_for(vit), preprocessing=see), random_weights(vit)
    )
    report = export_folder(model.path, tmp_path / "made", target="portable,embedder")
    assert report.photographs[0] == "made up, seed 0" and len(report.photographs) == 8
    assert all(variant.passed for variant in report.variants)
    card = (tmp_path / "made" / "README.md").read_text(encoding="utf-8")
    assert "on 8 made-up pictures" in card and "of 5 channels" in card
    # The pictures are unlike each other, and so are their channels.
    arrays = np.stack([made_up_bands(N, seed).array for seed in range(4)]).astype(np.float64)
    assert arrays.std() > 30 and np.abs(np.corrcoef(arrays[0].reshape(-1, N).T) - np.eye(N)).max() < 0.999
    assert np.abs(arrays[0] - arrays[1]).mean() > 10
    # Pictures of one's own.
    np.save(tmp_path / "a.npy", bands().array)
    report = export_folder(model.path, tmp_path / "made", photos=tmp_path / "a.npy")
    assert report.photographs == ("a.npy",)
    session = load_backbone(tmp_path / "made", engine="onnx")
    np.testing.assert_allclose(
        session.embed(bands().array),
        load_backbone(model.path, engine="torch").embed(bands().array),
        atol=1e-4,
    )
