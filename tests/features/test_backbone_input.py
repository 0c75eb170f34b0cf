"""What Backbone takes from pandas, numpy and scikit-learn, and how it reaches another process."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import EMBED_DIM, HEADS, PATCH, FakeEngine
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import ModelError, UsageError
from dinokit.features.backbone import Backbone
from dinokit.features.given_pictures import Cropper
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.preprocess import Preprocessing

VIT = VitArchitecture(embed_dim=EMBED_DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=(32, 32))


@pytest.fixture
def fake() -> Backbone:
    return Backbone(config_for(VIT, "fake"), FakeEngine(), weights_sha256="0" * 64, source="a test")


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, name in enumerate(names):
        picture(40, 50, seed=i).save(name)
    return names


def test_arrays_of_names_and_of_pictures_are_lists(fake: Backbone, paths: list[str]) -> None:
    expected = fake.embed(paths)
    np.testing.assert_array_equal(fake.embed(np.array(paths)), expected)
    np.testing.assert_array_equal(fake.embed(np.array(paths, object)), expected)
    with pytest.raises(UsageError, match=r"shape \(3, 1\); expected \(N,\)"):
        fake.embed(np.array(paths)[:, None])


def test_tables_are_asked_for_their_column(fake: Backbone, paths: list[str]) -> None:
    with pytest.raises(UsageError, match=r'a dict is not a list of pictures; .*images\["path"\]'):
        fake.embed({"path": paths})
    pandas = pytest.importorskip("pandas")
    with pytest.raises(UsageError, match="a DataFrame is not a list of pictures"):
        fake.embed(pandas.DataFrame({"path": paths}))


def test_numpys_whole_numbers_are_numbers(fake: Backbone, paths: list[str]) -> None:
    size, workers = np.int64(2), np.int32(1)
    made = fake.embed(paths, batch_size=size, workers=workers)  # type: ignore[arg-type]
    np.testing.assert_array_equal(made, fake.embed(paths))
    with pytest.raises(UsageError, match="batch_size='2' is invalid"):
        fake.embed(paths, batch_size="2")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="workers=True is invalid"):
        fake.embed(paths, workers=True)


def test_no_crops_are_an_error_of_the_caller(fake: Backbone) -> None:
    with pytest.raises(UsageError, match=r"shape \(0, 32, 32, 3\)"):
        fake.embed_crops(np.zeros((0, 32, 32, 3), np.uint8))


# -- pickling


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    write_model_folder(tmp_path / "model", config_for(), random_weights())
    return "model"


def test_a_pickle_is_small_and_gives_the_same_vectors_elsewhere(
    folder: str, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    backbone = load_backbone(folder, device="cpu", image_size=(32, 48))
    data = pickle.dumps(backbone)
    assert len(data) < 2000
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the name was a relative one
    again = pickle.loads(data)
    assert again.image_size == (32, 48)
    np.testing.assert_array_equal(again.embed(paths), backbone.embed(paths))
    np.testing.assert_array_equal(copy.deepcopy(backbone).embed(paths), backbone.embed(paths))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        np.testing.assert_array_equal(pool.map(backbone.embed, paths), backbone.embed(paths))


def test_a_pickle_of_other_weights_is_refused(folder: str) -> None:
    pytest.importorskip("onnxruntime")
    data = pickle.dumps(load_backbone(folder, device="cpu"))
    write_model_folder(Path(folder), config_for(), random_weights(seed=1))
    with pytest.raises(ModelError, match="has other weights than the backbone that was pickled"):
        pickle.loads(data)


def test_what_nobody_can_load_again_cannot_be_pickled(fake: Backbone) -> None:
    with pytest.raises(TypeError, match="was not made by load_backbone"):
        pickle.dumps(fake)


def test_a_torch_module_goes_as_it_is(folder: str, paths: list[str]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    backbone = load_backbone(folder, engine="torch", device="cpu")
    with torch.no_grad():
        backbone.module.norm.bias += 1  # trained since
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(backbone)).embed(paths), backbone.embed(paths))


def test_few_opened_pictures_wait_for_the_threads() -> None:
    opened, most = 0, 0

    class Counting(Preprocessing):
        def crop(self, *args: Any) -> Any:
            nonlocal opened
            time.sleep(0.01)
            opened -= 1
            return super().crop(*args)

    def pictures() -> Iterator[Image.Image]:
        nonlocal opened, most
        for _ in range(30):
            opened += 1
            most = max(most, opened)
            yield Image.new("RGB", (40, 40))

    cropper = Cropper(Counting(resize_px=36, crop_px=(32, 32)), None)
    assert len(list(cropper.ahead(pictures(), workers=2, ahead=64))) == 30
    assert most <= 4  # two in the threads, one that waits, one that has been drawn
