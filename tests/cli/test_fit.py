"""`dinokit fit` and `dinokit classify`, as a user runs them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from small_models import config_for, random_weights
from tinted import COLOURS, write_tinted

import dinokit.classifiers.linear_classifier
from dinokit import LinearClassifier, load_backbone, load_classifier
from dinokit.classifiers.labelled import find_labelled
from dinokit.cli import cli
from dinokit.errors import ModelError
from dinokit.model_folder.folder import write_model_folder

pytest.importorskip("onnxruntime")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder."""
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ref/COLOUR/0…4.png`` and ``new/COLOUR.png``."""
    monkeypatch.chdir(tmp_path)
    write_tinted(5)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def fit(model: str, *args: str) -> Result:
    return run("fit", "ref", "-m", model, "-o", "kinds.onnx", "-C", "1", *args)


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def test_labels_equal_the_classifier_in_python(model: str) -> None:
    result = fit(model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "kinds.onnx\n"
    assert (
        "Expected accuracy: 100.0 % (95 % interval: 79.6 to 100.0), by 5-fold cross-validation"
        in result.stderr
    )
    assert "3 classes, always predicting 'blue' would reach 33.3 %" in result.stderr
    assert "reproduces the classifier's probabilities on 8 photographs" in result.stderr

    result = run("classify", "new", "-m", "kinds.onnx", "-o", "labels.csv", "--top", "2")
    assert result.exit_code == 0 and result.stdout == "labels.csv\n"
    assert "3 labelled, 0 left unlabelled, 0 failed" in result.stderr
    backbone, reference = load_backbone(model), find_labelled("ref")
    own = LinearClassifier(C=1.0).fit(backbone.embed(reference.paths), reference.labels)
    shares = own.predict_proba(backbone.embed("new"))
    rows = rows_of("labels.csv")
    assert [row["path"] for row in rows] == [f"new/{colour}.png" for colour in COLOURS]
    for row, share, colour in zip(rows, shares, COLOURS, strict=True):
        assert row["label"] == row["label_1"] == colour and row["error"] == ""
        order = np.argsort(-share)
        assert row["label_2"] == own.classes_[order[1]] and "label_3" not in row
        assert float(row["probability"]) == pytest.approx(share.max(), abs=1e-4)
        assert float(row["probability_2"]) == pytest.approx(share[order[1]], abs=1e-4)


def test_tables_and_rows_for_programs(model: str) -> None:
    assert fit(model, "--no-estimate").exit_code == 0
    Path("new/broken.png").write_bytes(b"no picture")
    result = run("classify", "new", "gone", "-m", "kinds.onnx", "--json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert (told["photos"], told["labelled"], told["failed"]) == (5, 3, 2)
    assert told["labels"] == {"blue": 1, "green": 1, "red": 1}
    assert [row["path"] for row in told["rows"] if row["error"]] == ["new/broken.png", "gone"]
    assert "Failed: new/broken.png" in result.stderr

    result = run("classify", "new", "-m", "kinds.onnx", "-o", "labels.parquet", "--unknown-below", "1")
    assert result.exit_code == 1 and "0 labelled, 3 left unlabelled, 1 failed" in result.stderr
    table = pq.read_table("labels.parquet")
    assert table.column("label").to_pylist() == [None] * 4
    assert table.column("labels").to_pylist()[0] is not None
    assert table.schema.metadata[b"dinokit.classifier"] == b"kinds.onnx"
    assert b"dinokit.weights_sha256" in table.schema.metadata

    shown = run("classify", "new", "-m", "kinds.onnx").stdout.splitlines()
    assert shown[0].split() == ["photo", "label", "probability", "next", "probability"]
    assert "broken" in shown[2] and "(" in shown[2]
    assert run("classify", "new/broken.png", "-m", "kinds.onnx").exit_code == 3


def test_a_table_of_the_same_model(model: str) -> None:
    assert fit(model, "--no-estimate").exit_code == 0
    assert run("embed", "new", "-m", model, "-o", "same.parquet").exit_code == 0
    direct, table = (
        json.loads(run("classify", source, "-m", "kinds.onnx", "--json").stdout)
        for source in ("new", "same.parquet")
    )
    assert table["labels"] == direct["labels"]
    for one, other in zip(direct["rows"], table["rows"], strict=True):
        np.testing.assert_allclose(one["probabilities"], other["probabilities"], atol=2e-6)
    assert run("embed", "new", "-m", model, "--what", "mean", "-o", "mean.parquet").exit_code == 0
    result = run("classify", "mean.parquet", "-m", "kinds.onnx")
    assert (
        result.exit_code == 2 and "holds other vectors (mean) than the classifier kinds.onnx" in result.stderr
    )
    assert run("embed", "new", "-m", "starter", "-o", "other.parquet").exit_code == 0
    result = run("classify", "other.parquet", "-m", "kinds.onnx")
    assert result.exit_code == 2 and "by another model" in result.stderr
    result = run("classify", "same.parquet", "new", "-m", "kinds.onnx")
    assert result.exit_code == 2 and "expected one table alone" in result.stderr
    for option in ("--reduced-decoding", "-b7"):
        result = run("classify", "same.parquet", "-m", "kinds.onnx", option)
        assert result.exit_code == 2 and "applies to pictures, and a table already has" in result.stderr


def test_fitted_to_a_table(model: str) -> None:
    assert fit(model, "--no-estimate", "--what", "mean").exit_code == 0
    assert run("embed", "ref", "-m", model, "-o", "ref.parquet", "--what", "mean").exit_code == 0
    table = ["fit", "ref.parquet", "-o", "table.onnx", "-C", "1", "--no-estimate"]
    refused = run(*table, "-m", model, "-b", "7")
    assert refused.exit_code == 2 and "--batch-size applies to pictures" in refused.stderr
    result = run(*table, "-m", model, "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["what"] == "mean", result.stderr
    direct, other = (load_classifier(name) for name in ("kinds.onnx", "table.onnx"))
    np.testing.assert_allclose(direct.predict_proba("new"), other.predict_proba("new"), atol=1e-4)
    for args, text in (
        (["-m", "starter"], "by another model"),
        (["-m", model, "--what", "cls"], "holds other vectors (mean)"),
        (["-m", model, "--image-size", "48"], "another preprocessing"),
    ):
        result = run(*table, *args, "--overwrite")
        assert result.exit_code == 2 and text in result.stderr, result.stderr


def test_vectors_of_length_1_are_refused(model: str) -> None:
    """k-NN looks at directions only, a linear classifier does not."""
    assert fit(model, "--no-estimate").exit_code == 0
    for folder, table in (("ref", "ref.parquet"), ("new", "new.parquet")):
        assert run("embed", folder, "-m", model, "-o", table, "--normalize").exit_code == 0
    for args in (
        ["fit", "ref.parquet", "-m", model, "-o", "a.onnx", "-C", "1"],
        ["classify", "new.parquet", "-m", "kinds.onnx"],
    ):
        result = run(*args)
        assert result.exit_code == 2 and "embed its pictures again without --normalize" in result.stderr


def test_a_file_has_no_inner_blocks(model: str) -> None:
    assert run("embed", "ref", "-m", model, "-o", "ref.parquet", "--what", "cls:2+mean").exit_code == 0
    result = run("fit", "ref.parquet", "-m", model, "-o", "a.onnx", "-C", "1")
    assert (
        result.exit_code == 2
        and "fit it to vectors of what='cls+mean', or use ImageClassifier" in result.stderr
    )
    assert not Path("a.onnx").exists()
    assert run("fit", "ref", "-m", model, "-o", "a.onnx", "--what", "cls:2").exit_code == 2


def test_what_is_said_of_the_fit(model: str) -> None:
    Path("ref/red/broken.png").write_bytes(b"no picture")
    result = run("fit", "ref", "-m", model, "-o", "kinds.onnx", "--what", "cls+mean", "--json", "--seed", "3")
    assert result.exit_code == 1 and "Failed: ref/red/broken.png" in result.stderr
    told = json.loads(result.stdout)
    assert told["classes"] == {"blue": 5, "green": 5, "red": 5} and told["what"] == "cls+mean"
    assert told["output"] == ["kinds.onnx"] and told["expected"]["folds"] == 5
    assert told["C"] in dinokit.classifiers.linear_classifier.STRENGTHS and told["largest_difference"] < 1e-4
    assert [failure["path"] for failure in told["failures"]] == ["ref/red/broken.png"]
    in_file = load_classifier("kinds.onnx").told
    assert in_file["references"] == 15 and in_file["C"] == told["C"]
    assert in_file["accuracy_by_folds"] == told["expected"]["accuracy"]

    facts = json.loads(run("info", "kinds.onnx", "--json").stdout)
    assert facts["classifier"]["classes"] == list(COLOURS) and facts["classifier"]["what"] == "cls+mean"
    assert "blue, green, red" in run("info", "kinds.onnx").stdout
    assert "classifier" not in json.loads(run("info", model, "--json").stdout)


def test_wrong_usage(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fit(model, "--no-estimate").exit_code == 0
    for args, text in (
        (["fit", "ref", "-m", model, "-o", "kinds.onnx"], "kinds.onnx exists"),
        (["fit", "ref", "-m", model, "-o", "kinds.pt"], "expected .onnx"),
        (["fit", "nowhere", "-m", model, "-o", "a.onnx"], "no such file or folder"),
        (["fit", "new", "-m", model, "-o", "a.onnx"], "expected one subfolder per class"),
        (["fit", "ref", "-m", model, "-o", "a.onnx", "-C", "0"], "-C"),
        (["fit", "ref", "-m", model, "-o", "a.onnx", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["classify", "new", "-m", "kinds.onnx", "-o", "labels.txt"], "the suffix '.txt' is not known"),
        (["classify"], "Missing argument 'PHOTOS...'"),
    ):
        result = run(*args)
        assert result.exit_code == 2 and text in result.stderr, result.stderr
    for args, text in (
        (
            ["classify", "new", "-m", "none.onnx"],
            "none.onnx does not exist; expected a file written by `dinokit fit`",
        ),
        (["classify", "new", "-m", "new/red.png"], "is not an ONNX file"),
        (["classify", "gone.jpg", "-m", "kinds.onnx"], "there is nothing to label"),
        (["fit", "ref", "-m", model, "-o", "a.onnx", "--precision", "int8"], "dinokit export"),
    ):
        result = run(*args)
        assert result.exit_code == 3 and text in result.stderr, result.stderr
        assert not result.stdout
    monkeypatch.setattr(dinokit.classifiers.linear_classifier, "have_sklearn", lambda: False)
    result = run("fit", "ref", "-m", model, "-o", "a.onnx")
    assert result.exit_code == 3 and "pip install scikit-learn" in result.stderr
    assert not Path("a.onnx").exists()


def test_labelling_needs_neither_torch_nor_scikit_learn(model: str) -> None:
    assert fit(model, "--no-estimate").exit_code == 0
    code = (
        "import sys\n"
        "for name in ('torch', 'timm', 'sklearn', 'scipy'): sys.modules[name] = None\n"
        "from dinokit.cli import main\n"
        "main(['classify', 'new', '-m', 'kinds.onnx', '-o', 'labels.csv'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["label"] for row in rows_of("labels.csv")] == list(COLOURS)


def test_a_model_without_classifier_is_told_from_nothing(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "folder", config_for(), random_weights())
    write_model_folder(tmp_path / "run" / "model", config_for(), random_weights())
    for name in (str(tmp_path / "folder"), str(tmp_path / "run"), "starter", "dino_vits16"):
        with pytest.raises(ModelError, match=r"is a model without a classifier; make one with: dinokit fit"):
            load_classifier(name)
    for name, what in (("none.onnx", "does not exist"), ("", "is a folder")):
        with pytest.raises(ModelError, match=f"{what}; expected a file written by `dinokit fit`"):
            load_classifier(tmp_path / name)


def test_for_triton(model: str, tmp_path: Path) -> None:
    (tmp_path / "models" / "kinds").mkdir(parents=True)
    result = fit(model, "--triton", "models")
    assert result.exit_code == 2 and "was not written by dinokit" in result.stderr
    assert not Path("kinds.onnx").exists()  # refused before any work
    (tmp_path / "models" / "kinds").rmdir()
    result = fit(model, "--triton", "models", "--json")
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["target"] == "embedder" and summary["triton"] == str(tmp_path / "models" / "kinds")
    assert Path("models/kinds/labels.txt").read_text().split() == sorted(COLOURS)
