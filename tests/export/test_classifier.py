"""A classifier as one ONNX file: plain ONNX Runtime gives scikit-learn's probabilities, and dinokit loads it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from export_models import CONFIG, make_folder, pixels
from export_models import run as run_onnx
from numpy.typing import NDArray
from small_models import SMALL, config_for, picture, random_weights

import dinokit.export.classifier
from dinokit import ImageClassifier, LinearClassifier, load_backbone, load_classifier
from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.estimator import NotFittedError
from dinokit.export import ExportError, export_classifier
from dinokit.model_folder.contract import CLASSIFIER_KEY, METADATA_KEY
from dinokit.model_folder.folder import write_model_folder

linear_model = pytest.importorskip("sklearn.linear_model")
pytest.importorskip("onnxruntime")
COUNT = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder without ONNX files."""
    return make_folder(tmp_path_factory.mktemp("model") / "small")


def labels(classes: int = 3) -> list[str]:
    return [("größe", "a", "b c")[number % classes] for number in range(COUNT)]


def crops() -> NDArray[np.uint8]:
    return np.stack([np.asarray(picture(32, 32, seed)) for seed in range(COUNT)])


def fitted(source: Path, what: str = "cls", classes: int = 3, **options: Any) -> LinearClassifier:
    vectors = load_backbone(source, **options).embed(crops(), what=what, batch_size=COUNT)
    return LinearClassifier(C=1.0).fit(vectors, labels(classes))


def scikit_learns(source: Path, what: str, classes: int = 3, **options: Any) -> NDArray[np.float64]:
    """The probabilities of scikit-learn's own classifier for the four pictures of ``pixels()``."""
    backbone = load_backbone(source, **options)
    vectors = backbone.embed(crops(), what=what, batch_size=COUNT).astype(np.float64)
    mean = vectors.mean(0)
    scale = np.sqrt(np.mean((vectors - mean) ** 2))
    own = linear_model.LogisticRegression(C=1.0, max_iter=1000).fit((vectors - mean) / scale, labels(classes))
    queries = backbone.embed_crops(crops()[:4], what=what)
    found: NDArray[np.float64] = own.predict_proba((queries - mean) / scale)
    return found


@pytest.mark.parametrize("what", ["cls", "mean", "cls+mean"])
@pytest.mark.parametrize("classes", [2, 3])
def test_plain_onnx_runtime_gives_scikit_learns_probabilities(
    folder: Path, tmp_path: Path, what: str, classes: int
) -> None:
    expected = scikit_learns(folder, what, classes)
    head = fitted(folder, what, classes)
    made = export_classifier(folder, head, tmp_path / "kinds.onnx", what=what, told={"C": 1.0})
    assert made.files == (tmp_path / "kinds.onnx",) and made.largest_difference < 1e-5
    assert made.classes == tuple(sorted(set(labels(classes))))
    assert list(tmp_path.iterdir()) == [tmp_path / "kinds.onnx"]
    model = onnx.load(tmp_path / "kinds.onnx")
    onnx.checker.check_model(model, full_check=True)
    names = [output.name for output in model.graph.output]
    assert names == ["last_hidden_state", "pooler_output", "attention", "probabilities"]
    assert [d.dim_param or d.dim_value for d in model.graph.output[3].type.tensor_type.shape.dim] == [
        "batch",
        classes,
    ]
    *_, found = run_onnx(model, pixels())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    told = json.loads({p.key: p.value for p in model.metadata_props}["dinokit_classifier"])
    assert told == {"C": 1.0, "classes": sorted(set(labels(classes))), "what": what}

    made = export_classifier(folder, head, tmp_path / "crops.onnx", what=what, target="embedder")
    model = onnx.load(tmp_path / "crops.onnx")
    assert [output.name for output in model.graph.output] == ["embedding", "probabilities"]
    _, found = run_onnx(model, crops()[:4], "image")
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_on_the_files_of_other_precisions(exported_folder: Path, tmp_path: Path, precision: str) -> None:
    head = fitted(exported_folder, precision=precision)
    made = export_classifier(exported_folder, head, tmp_path / "kinds.onnx", precision=precision)
    assert made.precision == precision
    whole = export_classifier(exported_folder, fitted(exported_folder), tmp_path / "whole.onnx")
    assert whole.precision == "fp32"
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("kinds", "whole")]
    assert sizes[0] < 0.75 * sizes[1]
    assert load_classifier(tmp_path / "kinds.onnx").backbone.precision == precision
    *_, found = run_onnx(onnx.load(tmp_path / "kinds.onnx"), pixels())
    np.testing.assert_allclose(found, scikit_learns(exported_folder, "cls", precision=precision), atol=1e-5)


def test_dinokit_loads_it(folder: Path, tmp_path: Path) -> None:
    head = fitted(folder)
    export_classifier(folder, head, tmp_path / "kinds.onnx", told={"references": COUNT})
    loaded = load_classifier(tmp_path / "kinds.onnx")
    assert isinstance(loaded, ImageClassifier) and "3 classes" in repr(loaded)
    assert loaded.classes_.tolist() == ["a", "b c", "größe"] and loaded.told["references"] == COUNT
    expected = head.predict_proba(load_backbone(folder).embed(crops()))
    np.testing.assert_allclose(loaded.predict_proba(crops()), expected, atol=1e-6)
    assert loaded.predict(crops()).tolist() == head.predict(load_backbone(folder).embed(crops())).tolist()
    one = loaded.predict_proba(crops()[0])
    assert one.shape == (3,) and loaded.predict(crops()[0]) == loaded.classes_[one.argmax()]
    assert type(loaded.predict(crops()[0])) is str
    assert loaded.predict_proba([]).shape == (0, 3) and loaded.predict([]).shape == (0,)
    # It is its network's file, too.
    as_model = load_backbone(tmp_path / "kinds.onnx")
    np.testing.assert_allclose(as_model.embed(crops()), load_backbone(folder).embed(crops()), atol=1e-6)
    assert as_model.weights_sha256 == load_backbone(folder).weights_sha256
    assert as_model.attention(crops()[0]).shape == load_backbone(folder).attention(crops()[0]).shape
    # And from it another classifier can be made.
    export_classifier(tmp_path / "kinds.onnx", head, tmp_path / "again.onnx")
    np.testing.assert_allclose(
        load_classifier(tmp_path / "again.onnx").predict_proba(crops()), expected, atol=1e-6
    )


def test_another_image_size_is_the_files_own(folder: Path, tmp_path: Path) -> None:
    head = fitted(folder, image_size=48)
    export_classifier(folder, head, tmp_path / "kinds.onnx", image_size=48)
    loaded = load_classifier(tmp_path / "kinds.onnx")
    assert loaded.backbone.image_size == (48, 48)
    expected = head.predict_proba(load_backbone(folder, image_size=48).embed(crops()))
    np.testing.assert_allclose(loaded.predict_proba(crops()), expected, atol=1e-6)


def test_weights_in_a_second_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = dinokit.export.classifier.write_onnx
    monkeypatch.setattr(dinokit.export.classifier, "write_onnx", lambda *args: real(*args, largest=0))
    head = fitted(folder)
    made = export_classifier(folder, head, tmp_path / "kinds.onnx")
    assert [file.name for file in made.files] == ["kinds.onnx", "kinds.onnx_data"]
    monkeypatch.setattr(dinokit.export.classifier, "write_onnx", real)
    expected = head.predict_proba(load_backbone(folder).embed(crops()))
    np.testing.assert_allclose(load_classifier(made.files[0]).predict_proba(crops()), expected, atol=1e-6)
    # From such a file, one file again.
    assert len(export_classifier(made.files[0], head, tmp_path / "one.onnx").files) == 1
    made.files[1].unlink()
    with pytest.raises(ModelError, match=r"second file.*, kinds\.onnx_data"):
        load_classifier(made.files[0])


def test_one_file_takes_the_place_of_two(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = dinokit.export.classifier.write_onnx
    head = fitted(folder)
    with monkeypatch.context() as changed:
        changed.setattr(dinokit.export.classifier, "write_onnx", lambda *args: real(*args, largest=0))
        export_classifier(folder, head, tmp_path / "kinds.onnx")
    export_classifier(folder, head, tmp_path / "kinds.onnx")
    assert [path.name for path in tmp_path.glob("kinds*")] == ["kinds.onnx"]


def test_a_file_that_gives_other_numbers_is_not_written(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = fitted(folder)
    real = dinokit.export.classifier.add_head

    def wrong(model: Any, store: Any, classifier: LinearClassifier, **options: Any) -> Any:
        other = LinearClassifier(C=1.0)
        other.__dict__.update(classifier.__dict__)
        other.intercept_ = classifier.intercept_ + np.array([0.01, 0, 0])
        return real(model, store, other, **options)

    (tmp_path / "kinds.onnx").write_text("as it was")
    monkeypatch.setattr(dinokit.export.classifier, "add_head", wrong)
    with pytest.raises(ExportError, match="differ from the classifier's by up to"):
        export_classifier(folder, head, tmp_path / "kinds.onnx")
    assert (tmp_path / "kinds.onnx").read_text() == "as it was" and len(list(tmp_path.iterdir())) == 1


def test_what_does_not_belong_together(folder: Path, tmp_path: Path) -> None:
    head = fitted(folder)
    file = tmp_path / "kinds.onnx"
    with pytest.raises(UsageError, match=r"takes 48 numbers, but .* gives 96 \(what='cls\+mean'\)"):
        export_classifier(folder, head, file, what="cls+mean")
    with pytest.raises(ModelError, match="do not belong together"):
        ImageClassifier(load_backbone(folder), head, what="cls+mean")
    with pytest.raises(UsageError, match=r"what='cls:2' needs others; fit it to vectors of what='cls'"):
        export_classifier(folder, head, file, what="cls:2")
    with pytest.raises(NotFittedError, match="not fitted"):
        export_classifier(folder, LinearClassifier(), file)
    with pytest.raises(UsageError, match="target='cuda' is not known"):
        export_classifier(folder, head, file, target="cuda")
    with pytest.raises(UsageError, match=r"expected \.onnx"):
        export_classifier(folder, head, tmp_path / "kinds.pt")
    with pytest.raises(UsageError, match=r"told=.* cannot be written as JSON"):
        export_classifier(folder, head, file, told={"accuracy": np.float32(0.5)})
    with pytest.raises(UsageError, match="image_size='64' is invalid"):
        export_classifier(folder, head, file, image_size="64")  # type: ignore[arg-type]
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "text").touch()
    for place, words in (("folder.onnx", "is a folder"), ("text/m.onnx", "cannot be written")):
        with pytest.raises(DinokitError, match=words):
            export_classifier(tmp_path / "no model", head, tmp_path / place)
    (tmp_path / "folder.onnx").rmdir()
    (tmp_path / "text").unlink()
    with pytest.raises(ModelError, match=r"precision='int8' needs onnx/model_int8\.onnx"):
        export_classifier(folder, head, file, precision="int8")
    assert not list(tmp_path.iterdir())


def test_what_is_no_classifier(folder: Path, tmp_path: Path) -> None:
    head = fitted(folder)
    file = tmp_path / "kinds.onnx"
    export_classifier(folder, head, file, target="embedder")
    with pytest.raises(ModelError, match=r"takes uint8 crops.*--target portable"):
        load_classifier(file)
    with pytest.raises(ModelError, match="does not exist"):
        load_classifier(tmp_path / "none.onnx")
    export_classifier(folder, head, file)
    model = onnx.load(file)

    def save(key: str, value: str | None) -> None:
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        kept = [(p.key, p.value) for p in model.metadata_props if p.key != key]
        del changed.metadata_props[:]
        for name, text in [*kept, *([(key, value)] if value is not None else [])]:
            changed.metadata_props.add(key=name, value=text)
        onnx.save(changed, file)

    save("dinokit_classifier", None)
    with pytest.raises(ModelError, match="contains no classifier"):
        load_classifier(file)
    for damaged in ("{", "[]", '{"classes": ["a"], "what": "cls"}', '{"classes": ["a", "b"]}'):
        save("dinokit_classifier", damaged)
        with pytest.raises(ModelError, match="are damaged"):
            load_classifier(file)
    save("dinokit_classifier", '{"classes": ["a", "b"], "what": "cls"}')
    with pytest.raises(ModelError, match="lacks the weights of its 2 classes"):
        load_classifier(file)
    save(METADATA_KEY, None)
    with pytest.raises(ModelError, match="does not describe its preprocessing"):
        load_classifier(file)
    assert CONFIG.embed_dim == 48  # what the messages above count on


def test_pictures_finer_than_8_bits_are_rounded_for_bytes(tmp_path: Path) -> None:
    config = config_for(replace(SMALL, in_chans=5))
    prepared = replace(config.preprocessing, mean=(0.5,) * 5, std=(0.25,) * 5)
    write_model_folder(
        tmp_path / "bands", replace(config, preprocessing=prepared), random_weights(config.vit)
    )
    rng = np.random.default_rng(0)
    vectors = load_backbone(tmp_path / "bands").embed_crops(
        rng.integers(0, 256, (COUNT, 32, 32, 5), np.uint8)
    )
    head = LinearClassifier(C=1.0).fit(vectors, labels())
    fine = tmp_path / "fine.npy"
    np.save(fine, rng.integers(0, 65536, (40, 50, 5), np.uint16))
    for target in ("portable", "embedder"):
        file = tmp_path / f"{target}.onnx"
        made = export_classifier(tmp_path / "bands", head, file, target=target, photos=fine)
        assert made.largest_difference < 1e-5


def test_a_classifier_of_truth_values_gives_truth_values(folder: Path, tmp_path: Path) -> None:
    vectors = load_backbone(folder).embed(crops())
    head = LinearClassifier(C=1.0).fit(vectors, np.arange(len(vectors)) % 2 == 0)
    file = export_classifier(folder, head, tmp_path / "yes.onnx", told={"class_type": "int"}).files[0]
    written = load_classifier(file)
    assert written.classes_.dtype == np.bool_ and written.classes_.tolist() == [False, True]
    assert written.predict(crops()).tolist() == head.predict(vectors).tolist()
    assert type(written.predict(crops()[0])) is bool


def test_a_classifier_of_numbers_gives_numbers(folder: Path, tmp_path: Path) -> None:
    backbone = load_backbone(folder)
    vectors = backbone.embed(crops())
    head = LinearClassifier(C=1.0).fit(vectors, np.arange(len(vectors)) % 2 + 5)
    model = ImageClassifier(backbone, head)
    one = model.predict(crops()[0])
    assert type(one) is int and one == model.predict(crops()[:1])[0]
    file = export_classifier(folder, head, tmp_path / "numbers.onnx").files[0]
    written = load_classifier(file)
    assert written.classes_.dtype == np.int64 and written.classes_.tolist() == [5, 6]
    assert written.predict(crops()).tolist() == model.predict(crops()).tolist()
    graph = onnx.load(str(file))
    told = next(p for p in graph.metadata_props if p.key == CLASSIFIER_KEY)
    assert json.loads(told.value)["classes"] == [
        "5",
        "6",
    ]  # names, for whoever reads the file without dinokit
    told.value = told.value.replace('"5"', '"five"')
    onnx.save(graph, str(file))
    with pytest.raises(ModelError, match="'dinokit_classifier' are damaged"):
        load_classifier(file)
