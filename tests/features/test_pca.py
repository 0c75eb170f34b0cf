"""Patch features as colours: the arithmetic against scikit-learn and scikit-image, and `dinokit pca` to the files."""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_engine import EMBED_DIM, PATCH, FakeEngine
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.drawing.pca_pictures import write_pca
from dinokit.errors import UsageError
from dinokit.features.backbone import Backbone
from dinokit.features.pca import fit_patch_pca, otsu_threshold, pca_colours
from dinokit.model_folder.architecture import TimmArchitecture
from dinokit.model_folder.folder import write_model_folder

pytest.importorskip("onnxruntime")


def some_tokens(seed: int = 0) -> np.ndarray:
    """(4, 6, 5, 16) float32 with unequal variances around a mean that is not 0."""
    rng = np.random.default_rng(seed)
    return (3 + rng.normal(size=(4, 6, 5, 16)) @ np.diag(np.linspace(4, 0.5, 16))).astype(np.float32)


def test_cells_of_another_width_than_the_embedding(tmp_path: Path) -> None:
    """As in MobileNet, whose embedding is wider than its feature map: the tokens would be read in wrong pieces."""
    known = TimmArchitecture(
        9, PATCH, (32, 32), token_dim=EMBED_DIM, num_prefix_tokens=1, size_multiple=PATCH
    )
    config = dataclasses.replace(config_for(), architecture=known)
    backbone = Backbone(config, FakeEngine(), weights_sha256="0" * 64, source="a test")
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        picture(40, 50, seed=i).save(path)
    write_pca(paths, tmp_path / "out", backbone, form="npy")
    expected = fit_patch_pca(backbone.patch_tokens(paths)).scores(backbone.patch_tokens(paths))
    found = np.stack([np.load(tmp_path / "out" / f"{i}.npy") for i in range(3)])
    np.testing.assert_allclose(found, expected, atol=1e-5)


# -- the arithmetic


def test_components_equal_scikit_learns() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    tokens = some_tokens()
    theirs = decomposition.PCA(3, svd_solver="full").fit(tokens.reshape(-1, 16).astype(np.float64))
    ours = fit_patch_pca(tokens)
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-6)
    np.testing.assert_allclose(ours.components, theirs.components_, atol=1e-5)  # signs too
    np.testing.assert_allclose(ours.explained, theirs.explained_variance_ratio_, rtol=1e-5)
    scores = theirs.transform(tokens.reshape(-1, 16)).reshape(4, 6, 5, 3)
    np.testing.assert_allclose(ours.scores(tokens), scores, atol=1e-4)
    low, high = np.percentile(scores.reshape(-1, 3), (1, 99), axis=0)
    expected = 255 * ((scores - low) / (high - low)).clip(0, 1)
    assert np.abs(ours.colours(tokens) - expected).max() <= 0.51


def test_parts_do_not_change_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_patch_pca(some_tokens(), foreground=True)
    monkeypatch.setattr("dinokit.features.pca._CHUNK_BYTES", 8 * 16 * 7)
    parts = fit_patch_pca(some_tokens(), foreground=True)
    np.testing.assert_allclose(parts.components, whole.components, atol=1e-5)
    np.testing.assert_allclose(parts.low, whole.low, atol=1e-4)
    assert (parts.colours(some_tokens()) == whole.colours(some_tokens())).mean() > 0.99


def test_the_sign_does_not_depend_on_the_order_of_pictures() -> None:
    tokens = some_tokens()
    np.testing.assert_allclose(
        fit_patch_pca(tokens).components, fit_patch_pca(tokens[::-1].copy()).components, atol=1e-5
    )
    assert (
        np.abs(fit_patch_pca(tokens).components).argmax(1) == fit_patch_pca(tokens).components.argmax(1)
    ).all()


def test_one_picture_and_several() -> None:
    tokens = some_tokens()
    torch = pytest.importorskip("torch")
    for other in (torch.from_numpy(tokens), tokens.tolist()):
        np.testing.assert_array_equal(pca_colours(other), pca_colours(tokens))
    assert pca_colours(tokens).shape == (4, 6, 5, 3) and pca_colours(tokens).dtype == np.uint8
    np.testing.assert_array_equal(pca_colours(tokens[1]), pca_colours(tokens[1:2])[0])


def test_equal_tokens_are_black_and_no_error() -> None:
    for foreground in (False, True):
        assert not pca_colours(np.ones((2, 3, 3, 8), np.float32), foreground=foreground).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_the_foreground_is_what_fills_less_of_the_border(sign: int) -> None:
    rng = np.random.default_rng(1)
    inside = np.zeros((3, 8, 8), bool)
    inside[:, 2:7, 3:8] = True  # touches one border
    direction = np.zeros(16)
    direction[0] = 10 * sign
    tokens = (rng.normal(size=(3, 8, 8, 16)) + inside[..., None] * direction).astype(np.float32)
    pca = fit_patch_pca(tokens, foreground=True)
    assert pca.foreground is not None
    np.testing.assert_array_equal(pca.foreground.of(tokens), inside)
    colours = pca.colours(tokens)
    assert not colours[~inside].any() and colours[inside].any(axis=-1).mean() > 0.9
    # The components are those of the foreground, in which the first direction plays no part any more.
    alone = tokens[inside].astype(np.float64)
    alone -= alone.mean(0)
    np.testing.assert_allclose(
        np.abs(pca.components), np.abs(np.linalg.svd(alone, full_matrices=False)[2][:3]), atol=1e-3
    )


def test_otsu_equals_scikit_image() -> None:
    filters = pytest.importorskip("skimage.filters")
    rng = np.random.default_rng(0)
    for shift in (3.0, 6.0):
        values = np.concatenate([rng.normal(size=900), shift + rng.normal(size=400)])
        theirs = filters.threshold_otsu(values, nbins=20_000)
        assert np.mean((values > otsu_threshold(values)) != (values > theirs)) < 0.002
    assert otsu_threshold(np.array([0.0, 0, 1, 10, 11, 10])) == 5.5
    assert otsu_threshold(np.full(5, -3.0)) < -3.0


def test_errors_say_what_is_expected() -> None:
    with pytest.raises(UsageError, match=r"shape \(5, 16\); expected \(h, w, D\) or \(N, h, w, D\)"):
        pca_colours(np.zeros((5, 16), np.float32))
    with pytest.raises(UsageError, match=r"percentiles=\(99, 1\) are invalid"):
        pca_colours(some_tokens(), percentiles=(99, 1))
    broken = some_tokens()
    broken[1, 2, 3, 4] = np.nan
    with pytest.raises(UsageError, match="some tokens are not finite"):
        pca_colours(broken)


# -- the command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder: 32 px, patches of 8."""
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["a/cat.png", "b/cat.png", "b/dog.png"]):
        Path(name).parent.mkdir(exist_ok=True)
        picture(90 + i, 70, seed=i).save(name)


PHOTOS = ["a/cat.png", "b/cat.png", "b/dog.png"]


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["pca", *map(str, args)])


def test_pictures_equal_the_python_call(model: str) -> None:
    result = run("a", "b", "-o", "out", "-m", model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out\n"
    assert "32x32 px in 4x4 patches, onnx on cpu" in result.stderr
    assert "3 drawn; components hold" in result.stderr and "see out/contact-sheet.png" in result.stderr
    names = ["cat.png", "cat-2.png", "dog.png"]
    assert {p.name for p in Path("out").iterdir()} == {*names, "contact-sheet.png", "pca.json"}
    colours = pca_colours(load_backbone(model).patch_tokens(PHOTOS))
    for name, own in zip(names, colours, strict=True):
        drawn = np.asarray(Image.open(f"out/{name}"))
        assert drawn.shape == (32, 32, 3)
        # One grey level: the network rounds differently in batches of other sizes.
        assert np.abs(drawn.astype(int) - np.kron(own, np.ones((8, 8, 1)))).max() <= 1


def test_numbers_at_another_size(model: str) -> None:
    result = run(
        "a", "b", "-o", "out", "-m", model, "--format", "npy", "--image-size", "48x64", "--foreground"
    )
    assert result.exit_code == 0, result.stderr
    tokens = load_backbone(model, image_size=(48, 64)).patch_tokens(PHOTOS)
    expected = fit_patch_pca(tokens, foreground=True)
    scores = np.load("out/cat-2.npy")
    assert scores.shape == (6, 8, 3) and scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected.scores(tokens[1]), atol=1e-3)
    with np.load("out/pca.npz") as saved:
        np.testing.assert_allclose((tokens[1] - saved["mean"]) @ saved["components"].T, scores, atol=1e-3)
        assert set(saved) >= {
            "low",
            "high",
            "foreground_mean",
            "foreground_direction",
            "foreground_threshold",
        }
    assert {p.name for p in Path("out").iterdir()} == {
        "cat.npy",
        "cat-2.npy",
        "dog.npy",
        "pca.npz",
        "pca.json",
    }


def test_pictures_in_an_archive(model: str) -> None:
    with zipfile.ZipFile("photos.zip", "w") as archive:
        for name in PHOTOS:
            archive.write(name)
    result = run("photos.zip", "-o", "out", "-m", model, "--json")
    assert result.exit_code == 0, result.stderr
    assert [photo["path"] for photo in json.loads(result.stdout)["photos"]] == [
        f"photos.zip::{name}" for name in PHOTOS
    ]


def test_a_broken_picture_costs_the_others_nothing(model: str) -> None:
    Path("a/a-broken.jpg").write_bytes(b"no picture")
    result = run("a", "missing.jpg", "b", "nothing*.jpg", "-o", "out", "-m", model, "--json", "-b", "2")
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert [photo["path"] for photo in summary["photos"]] == PHOTOS
    assert [f["path"] for f in summary["failures"]] == ["a/a-broken.jpg", "missing.jpg"]
    assert summary["problems"] == ["nothing*.jpg: the pattern matches no file"]
    assert "Failed: missing.jpg: no such file" in result.stderr
    index = json.loads(Path("out/pca.json").read_text())
    assert index["photos"] == summary["photos"] and index["failures"] == summary["failures"]
    assert index["origin"]["weights_sha256"] == summary["weights_sha256"]
    assert index["explained"] == summary["explained"] and 0 < sum(index["explained"]) <= 1


def test_nothing_to_draw(model: str) -> None:
    Path("text.jpg").write_text("no")
    assert run("text.jpg", "-o", "out", "-m", model).exit_code == 3
    assert run("a", "-o", "out", "-m", model).exit_code == 0  # what failed is in nobody's way
    result = run("missing.jpg", "-m", model)
    assert result.exit_code == 3 and "there is nothing to draw" in result.stderr
    assert not Path("pca").exists()


def test_a_folder_with_something_in_it_is_left_alone(model: str) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    result = run("a", "-o", "out", "-m", model)
    assert result.exit_code == 2
    assert "out is not empty; choose another folder, or give --overwrite" in result.stderr
    assert run("a", "-o", "out", "-m", model, "--overwrite").exit_code == 0
    assert Path("out/mine.txt").read_text() == "keep"


def test_sizes_that_do_not_fit(model: str) -> None:
    result = run("a", "-o", "out", "-m", model, "--image-size", "33")
    assert result.exit_code == 2 and "not a multiple of patch_size=8; use" in result.stderr
    assert not Path("out").exists()


def test_many_photographs_need_several_sheets(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.drawing.pca_pictures._ON_A_SHEET", 2)
    result = run("a", "b", "-o", "out", "-m", model, "--json")
    assert json.loads(result.stdout)["sheets"] == ["contact-sheet.png", "contact-sheet-2.png"]


def test_an_interruption_draws_what_was_read(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(model)
    whole, calls = backbone.patch_tokens, []

    def patch_tokens(*args: object, **kwargs: object) -> np.ndarray:
        calls.append(args)
        if len(calls) in (3, 4):
            raise KeyboardInterrupt
        return whole(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "patch_tokens", patch_tokens)
    monkeypatch.setattr("dinokit.loading.load.load_backbone", lambda *a, **k: backbone)
    result = run("a", "b", "-o", "out", "-m", model, "-b", "1")
    assert result.exit_code == 130
    assert "Interrupted: 2 of 3 were read and are drawn in out" in result.stderr
    assert Path("out/contact-sheet.png").is_file() and Path("out/cat-2.png").is_file()
    at_once = run("a", "b", "-o", "none", "-m", model)
    assert at_once.exit_code == 130 and "nothing was drawn" in at_once.stderr


def test_python_arguments_are_checked(model: str) -> None:
    backbone = load_backbone(model)
    with pytest.raises(UsageError, match="form='jpg' is not known; expected png"):
        write_pca([Path("a/cat.png")], "out", backbone, form="jpg")
    assert not Path("out").exists()
