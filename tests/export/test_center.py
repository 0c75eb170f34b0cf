"""`dinokit export --center`: the mean embedding is taken off, and nothing else changes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import config_for, picture, random_weights

pytest.importorskip("torch")

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.export import export_folder
from dinokit.export.graphs.mean_embedding import mean_embedding
from dinokit.model_folder.folder import write_model_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model") / "m", config_for(), random_weights()).path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(7):
        picture(seed=i).save(folder / f"{i}.png")
    return folder


def test_the_embeddings_lose_their_mean_and_nothing_else(model: Path, pictures: Path, tmp_path: Path) -> None:
    export_folder(model, tmp_path / "out", center=pictures)
    before, after = load_backbone(model), load_backbone(tmp_path / "out")
    raw = before.embed(pictures)
    assert np.abs(raw.mean(axis=0)).max() > 0.1
    np.testing.assert_allclose(after.embed(pictures), raw - raw.mean(axis=0), atol=2e-5)
    other = picture(seed=99)
    np.testing.assert_allclose(after.embed(other), before.embed(other) - raw.mean(axis=0), atol=2e-5)
    np.testing.assert_allclose(after.attention(other), before.attention(other), atol=1e-6)
    np.testing.assert_allclose(
        after.patch_tokens(other), before.patch_tokens(other) - raw.mean(axis=0), atol=2e-5
    )
    # torch loads the same weights
    np.testing.assert_allclose(
        load_backbone(tmp_path / "out", engine="torch").embed(other), after.embed(other), atol=1e-4
    )


def test_the_folder_says_so(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"no picture")
    words = ["export", str(model), "-o", str(tmp_path / "out"), "--no-onnx"]
    words += ["--center", str(pictures), "--center", str(tmp_path / "photos")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert load_backbone(tmp_path / "out").config.source == "a test; mean embedding of 7 pictures taken off"


def test_twice_is_as_once(model: Path, pictures: Path, tmp_path: Path) -> None:
    export_folder(model, tmp_path / "once", center=pictures, onnx=False)
    export_folder(tmp_path / "once", tmp_path / "twice", center=[pictures], onnx=False)
    once, twice = (load_backbone(tmp_path / name).embed(picture(seed=3)) for name in ("once", "twice"))
    np.testing.assert_allclose(once, twice, atol=2e-5)


def test_what_cannot_be_centred(model: Path, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="none of the 1 pictures to center on"):
        export_folder(model, tmp_path / "out", center=tmp_path / "broken", onnx=False)
    with pytest.raises(UsageError, match=r"center=\[\] does not name any pictures"):
        export_folder(model, tmp_path / "out", center=[], onnx=False)
    assert not (tmp_path / "out").exists()


def test_a_convolutional_network_is_refused(pictures: Path, tmp_path: Path) -> None:
    from dinokit.training.recipe import load_recipe, with_overrides
    from dinokit.training.trainer import train

    settings = ["arch=resnet10t", "epochs=1", "batch_size=6", "n_local_crops=0", "global_crop_px=32"]
    settings += ["n_prototypes=8", "head_hidden_dim=8", "device=cpu", "workers=0", "tensorboard=false"]
    train([pictures], tmp_path / "run", with_overrides(load_recipe("resnet50"), settings))
    with pytest.raises(UsageError, match="only a Vision Transformer"):
        export_folder(tmp_path / "run", tmp_path / "out", center=pictures, onnx=False)


def test_of_very_many_pictures_some_are_taken_evenly(
    model: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.export.graphs.mean_embedding._MOST", 3)
    backbone = load_backbone(model)
    mean, count = mean_embedding(backbone, [pictures])
    right = backbone.embed([pictures / f"{i}.png" for i in (0, 3, 6)]).mean(axis=0)
    assert count == 3
    np.testing.assert_allclose(mean, right, atol=1e-5)
