"""DinoEmbedder in scikit-learn's hands: pipelines, clone, joblib, data frames."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import DinoEmbedder, KNNClassifier, load_backbone
from dinokit.errors import UsageError
from dinokit.model_folder.folder import write_model_folder

pytest.importorskip("onnxruntime")
sklearn_base = pytest.importorskip("sklearn.base")
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """Crops of two smooth pictures, six of each, as files."""
    folder = tmp_path_factory.mktemp("labelled")
    paths, labels = [], []
    for i in range(12):
        name = "ab"[i % 2]
        whole = picture(120, 100, seed=i % 2)
        whole.crop((i, i // 2, 90 + i, 70 + i // 2)).save(folder / f"{name}{i}.png")
        paths.append(str(folder / f"{name}{i}.png"))
        labels.append(name)
    return paths, labels


def test_a_pipeline_fits_and_labels(model: str, labelled: tuple[list[str], list[str]]) -> None:
    paths, labels = labelled
    classifier = make_pipeline(DinoEmbedder(model), KNNClassifier(k=3))
    assert classifier.fit(paths, labels).predict(paths).tolist() == labels
    assert classifier.score(np.array(paths), labels) == 1.0
    by_hand = cross_val_score(KNNClassifier(k=3), load_backbone(model).embed(paths), labels, cv=2)
    np.testing.assert_array_equal(cross_val_score(classifier, paths, labels, cv=2), by_hand)


def test_with_the_starter(photos: Path) -> None:
    paths = sorted(photos.glob("*.jpg"))
    classifier = make_pipeline(DinoEmbedder("starter"), KNNClassifier()).fit(paths, [p.stem for p in paths])
    assert classifier.predict([photos / "coffee.jpg"]).tolist() == ["coffee"]


def test_vectors_equal_the_backbones_in_every_form(model: str, labelled: tuple[list[str], list[str]]) -> None:
    pandas = pytest.importorskip("pandas")
    paths = labelled[0][:4]
    images = [Image.open(path).convert("RGB") for path in paths]
    expected = load_backbone(model).embed(paths)
    embedder = DinoEmbedder(model, batch_size=3)  # no fit: there is nothing to learn
    several = np.stack([np.asarray(image) for image in images])
    forms = {
        "list": paths,
        "tuple": tuple(map(Path, paths)),
        "array of text": np.array(paths),
        "array of objects": np.array(paths, dtype=object),
        "column": np.array(paths)[:, None],
        "series": pandas.Series(paths),
        "frame": pandas.DataFrame({"photo": paths}),
        "images": images,
        "generator": (image for image in images),
        "array": several,
    }
    for name, form in forms.items():
        vectors = embedder.transform(form)
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(vectors, expected, atol=1e-5, err_msg=name)
    folder = Path(paths[0]).parent
    np.testing.assert_allclose(embedder.transform(str(folder)), load_backbone(model).embed(folder), atol=1e-5)
    unit = DinoEmbedder(model, normalize=True).fit_transform(paths)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-6)


def test_another_vector_than_the_class_tokens(model: str, labelled: tuple[list[str], list[str]]) -> None:
    paths = labelled[0][:3]
    embedder = DinoEmbedder(model, what="cls+mean")
    cls, tokens = load_backbone(model).embed(paths), load_backbone(model).patch_tokens(paths)
    expected = np.concatenate([cls, tokens.mean(axis=(1, 2))], axis=1)
    np.testing.assert_allclose(embedder.fit_transform(paths), expected, atol=1e-5)
    assert len(embedder.get_feature_names_out()) == 96
    with pytest.raises(UsageError, match="everything"):
        DinoEmbedder(model, what="everything").fit()


def test_the_transform_for_torch_users(model: str, labelled: tuple[list[str], list[str]]) -> None:
    """``backbone.transform`` in the processes of a DataLoader: with the module, the vectors of ``embed``."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    paths = labelled[0][:4]
    backbone = load_backbone(model, engine="torch", device="cpu")
    transform = pickle.loads(pickle.dumps(backbone.transform))  # what a started process gets
    np.testing.assert_array_equal(transform(paths[0]), backbone.transform(paths[0]))
    batches = torch.utils.data.DataLoader([transform(path) for path in paths], batch_size=3)
    with torch.no_grad():
        vectors = torch.cat([backbone.module(batch) for batch in batches])
    np.testing.assert_allclose(vectors.numpy(), backbone.embed(paths), atol=1e-5)


def test_the_module_can_be_fine_tuned(model: str, labelled: tuple[list[str], list[str]]) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("timm")
    paths = labelled[0][:4]
    backbone = load_backbone(model, engine="torch", device="cpu")
    before = backbone.embed(paths)
    optimizer = torch.optim.SGD(backbone.module.parameters(), lr=0.01)
    pixels = torch.from_numpy(np.stack([backbone.transform(path) for path in paths]))
    backbone.module(pixels).square().mean().backward()
    assert all(parameter.grad is not None for parameter in backbone.module.parameters())
    optimizer.step()
    after = backbone.embed(paths)  # by the same module
    assert np.square(after).mean() < np.square(before).mean()


def test_one_picture_is_not_several(model: str, labelled: tuple[list[str], list[str]]) -> None:
    path = labelled[0][0]
    embedder = DinoEmbedder(model)
    image = Image.open(path)
    for one in (path, Path(path), image, np.asarray(image), Path(path).read_bytes()):
        with pytest.raises(UsageError, match=r"is one picture, not several; expected a list .*\[picture\]"):
            embedder.transform(one)
    with image, pytest.raises(UsageError, match="a int does not contain pictures"):
        embedder.transform(3)
    with pytest.raises(UsageError, match=r"shape \(2, 2\); expected \(N,\), or one column"):
        embedder.transform(np.array([["a", "b"], ["c", "d"]]))


def test_clone_and_parameters(model: str, labelled: tuple[list[str], list[str]]) -> None:
    embedder = DinoEmbedder(model, batch_size=5, image_size=(32, 48)).fit()
    copy = sklearn_base.clone(embedder)
    assert copy.get_params() == embedder.get_params() and not hasattr(copy, "_loaded")
    assert copy.get_params()["batch_size"] == 5
    first = embedder.backbone
    assert embedder.backbone is first  # loaded once
    assert embedder.set_params(image_size=32).backbone is not first  # and again when it is another
    assert embedder.backbone.image_size == (32, 32)
    with pytest.raises(ValueError, match="Invalid parameter"):
        embedder.set_params(size=32)
    assert repr(DinoEmbedder("dino_vits16")) == "DinoEmbedder(model='dino_vits16')"


def test_what_is_wrong_is_said_when_fitting() -> None:
    with pytest.raises(UsageError, match=r"'startr' is not a model.*Did you mean starter"):
        DinoEmbedder("startr").fit()
    DinoEmbedder(batch_size="auto").fit()
    with pytest.raises(UsageError, match="batch_size=0"):
        DinoEmbedder(batch_size=0).fit()


def test_threads_that_begin_at_once_load_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = DinoEmbedder(model)
    loads = []

    def slowly(*args: object, **named: object) -> object:
        loads.append(args)
        time.sleep(0.2)
        return object()

    monkeypatch.setattr("dinokit.loading.load.load_backbone", slowly)
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda _: embedder.backbone, range(4)))
    assert len(loads) == 1
    assert all(backbone is got[0] for backbone in got)


@pytest.mark.parametrize("how", ["pickle", "joblib"])
def test_pickled_without_the_model(
    how: str, tmp_path: Path, model: str, labelled: tuple[list[str], list[str]]
) -> None:
    paths, labels = labelled
    classifier = make_pipeline(DinoEmbedder(model), KNNClassifier(k=3)).fit(paths, labels)
    if how == "pickle":
        data = pickle.dumps(classifier)
        again = pickle.loads(data)
        size = len(data)
    else:
        joblib = pytest.importorskip("joblib")
        joblib.dump(classifier, tmp_path / "classifier.joblib")
        size = (tmp_path / "classifier.joblib").stat().st_size
        again = joblib.load(tmp_path / "classifier.joblib")
    assert size < 12 * 48 * 4 + 5000  # the references and some names: no weights (240 kB), no session
    assert not hasattr(again[0], "_loaded") and hasattr(classifier[0], "_loaded")
    assert again.predict(paths).tolist() == labels


def test_a_grid_search_embeds_once_with_memory(
    tmp_path: Path, model: str, labelled: tuple[list[str], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, labels = labelled
    calls = []
    whole = DinoEmbedder.transform

    def transform(self: DinoEmbedder, X: object) -> np.ndarray:
        calls.append(X)
        return whole(self, X)

    monkeypatch.setattr(DinoEmbedder, "transform", transform)
    pipeline = make_pipeline(DinoEmbedder(model), KNNClassifier(), memory=str(tmp_path / "cache"))
    search = GridSearchCV(pipeline, {"knnclassifier__k": [1, 3, 6]}, cv=2, refit=False)
    search.fit(paths, labels)
    # Two training folds, once each; the scoring of each of the three values embeds its test fold.
    assert len(calls) == 2 + 2 * 3


def test_names_of_the_columns_and_data_frames(model: str, labelled: tuple[list[str], list[str]]) -> None:
    pandas = pytest.importorskip("pandas")
    compose = pytest.importorskip("sklearn.compose")
    paths = labelled[0][:3]
    embedder = DinoEmbedder(model)
    names = embedder.get_feature_names_out()
    assert names.shape == (48,) and names[0] == "dinoembedder0" and names[47] == "dinoembedder47"
    frame = DinoEmbedder(model).set_output(transform="pandas").fit_transform(paths)
    assert list(frame.columns) == list(names) and frame.shape == (3, 48)
    table = pandas.DataFrame({"photo": paths, "price": [1.0, 2.0, 3.0]})
    both = compose.make_column_transformer((embedder, ["photo"]), ("passthrough", ["price"]))
    joined = both.fit_transform(table)
    np.testing.assert_allclose(joined[:, :48], embedder.transform(paths), atol=1e-6)
    assert joined[:, 48].tolist() == [1.0, 2.0, 3.0]
    assert list(both.get_feature_names_out())[-2:] == ["dinoembedder__dinoembedder47", "passthrough__price"]


def test_file_objects_and_torch_tensors(model: str, labelled: tuple[list[str], list[str]]) -> None:
    torch = pytest.importorskip("torch")
    paths = labelled[0][:2]
    embedder = DinoEmbedder(model)
    expected = embedder.transform(paths)
    files = [io.BytesIO(Path(path).read_bytes()) for path in paths]
    np.testing.assert_allclose(embedder.transform(files), expected, atol=1e-6)
    arrays = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    np.testing.assert_allclose(embedder.transform(tensor), expected, atol=1e-6)


def test_without_scikit_learn(model: str, labelled: tuple[list[str], list[str]]) -> None:
    code = f"""
import sys
import time
from concurrent.futures import ThreadPoolExecutor
sys.modules["sklearn"] = None
import pickle
from dinokit import *
embedder = DinoEmbedder({model!r}, batch_size=2)
vectors = embedder.fit_transform({labelled[0][:3]!r})
again = pickle.loads(pickle.dumps(embedder))
assert (again.transform({labelled[0][:3]!r}) == vectors).all() and again.get_params() == embedder.get_params()
print(vectors.shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "(3, 48)\n", done.stderr
