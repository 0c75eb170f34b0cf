"""`dinokit eval`: the figures of others' code, and the command from end to end."""

from __future__ import annotations

import builtins
import io
import json
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from PIL import Image
from small_models import config_for, picture, random_weights

import dinokit.classifiers.linear_classifier
import dinokit.classifiers.linear_probe
from dinokit.classifiers.evaluation import compare, knn_scores, proportion_of, raw_pixels
from dinokit.classifiers.labelled_sources import find_labelled_items
from dinokit.classifiers.linear_probe import linear_probe
from dinokit.cli import cli
from dinokit.errors import DinokitError, UsageError
from dinokit.model_folder.folder import write_model_folder

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "knn.npz"))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- figures


def test_knn_equals_facebook_researchs_figures_at_every_k() -> None:
    ks = [5, 10, 20, 100]
    scores = knn_scores(
        GOLDEN["train"], GOLDEN["train_labels"], GOLDEN["query"], GOLDEN["query_labels"], ks=ks
    )
    assert [score.k for score in scores] == ks
    for score in scores:
        found = [100 * score.top1.value, 100 * score.top5.value]
        np.testing.assert_allclose(found, GOLDEN[f"top1_top5.k{score.k}"], atol=1e-9)


def test_leave_one_out_by_hand() -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 1]] + 0.01 * np.arange(16).reshape(4, 4)
    score = knn_scores(vectors, ["a", "a", "b", "c"], ks=[1])[0]
    assert score.top1.value == 0.5 and score.top1.count == 4  # b and c have nobody of their own
    # Five labels are all there are, but one without a vote is not found.
    assert score.top5.value == 0.5


def test_labels_that_no_reference_has_are_wrong_and_few_references_all_vote() -> None:
    vectors = np.eye(3, dtype=np.float32)
    (score,) = knn_scores(vectors, ["a", "b", "b"], vectors, ["a", "zebra", "b"], ks=[100])
    assert score.top1.value == pytest.approx(2 / 3) and score.top5.value == pytest.approx(2 / 3)
    with pytest.raises(UsageError, match=r"ks=\[\] is invalid"):
        knn_scores(vectors, ["a", "b", "b"], ks=[])
    with pytest.raises(UsageError, match=r"shape \(3, 2\) and 3 labels; expected \(M, 3\) and M"):
        knn_scores(vectors, ["a", "b", "b"], vectors[:, :2], ["a", "b", "b"])


def test_intervals_equal_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for right, count in ((0, 10), (7, 10), (290, 290), (98, 290)):
        truth = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
        share = proportion_of(right, count)
        np.testing.assert_allclose([share.value, share.low, share.high], [right / count, *truth], atol=1e-12)
    with pytest.raises(UsageError, match="no pictures to judge by"):
        proportion_of(0, 0)


@pytest.mark.parametrize(
    ("one", "other"), [(0, 0), (0, 1), (5, 5), (50, 35), (3, 14), (2862, 696), (0, 3000)]
)
def test_pairs_equal_scipys_binomial_test(one: int, other: int) -> None:
    binomtest = pytest.importorskip("scipy.stats").binomtest
    both, neither = 40, 7
    first = np.repeat([True, True, False, False], [both, one, other, neither])
    second = np.repeat([True, False, True, False], [both, one, other, neither])
    mixed = np.random.default_rng(0).permutation(len(first))
    found = compare(first[mixed], second[mixed])
    assert (found.only_first, found.only_second) == (one, other)
    expected = binomtest(one, one + other).pvalue if one + other else 1.0
    assert found.p == pytest.approx(expected, rel=1e-9)


def clouds(count: int, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, count)
    centres = np.random.default_rng(9).normal(0, 1, (3, 8))
    return (centres[labels] + rng.normal(0, 1, (count, 8))).astype(np.float32), np.array(["x", "y", "z"])[
        labels
    ]


def test_the_probe_is_scikit_learns_with_the_chosen_strength() -> None:
    linear_model = pytest.importorskip("sklearn.linear_model")
    (vectors, labels), (queries, truth) = clouds(120, 0), clouds(200, 1)
    score = linear_probe(vectors, labels, queries, truth)
    assert (
        score.converged
        and score.folds == 0
        and score.strength in dinokit.classifiers.linear_classifier.STRENGTHS
    )
    mean, rms = vectors.mean(0), np.sqrt(np.mean((vectors - vectors.mean(0)) ** 2))
    own = linear_model.LogisticRegression(C=score.strength, max_iter=1000)
    own.fit((vectors - mean) / rms, labels)
    assert score.top1.value == pytest.approx(own.score((queries - mean) / rms, truth), abs=0.011)
    # Neither the scale nor the origin of the features matters.
    assert linear_probe(1000 * vectors + 7, labels, 1000 * queries + 7, truth).top1 == score.top1
    folds = linear_probe(vectors, labels)
    assert folds.folds == 5 and folds.top1.count == 120
    assert abs(folds.top1.value - score.top1.value) < 0.12


def test_the_strength_is_chosen_where_it_was_not_fitted() -> None:
    """On noise only always predicting the frequent label beats chance; on clouds the opposite holds."""
    pytest.importorskip("sklearn")
    rng = np.random.default_rng(0)
    steps: list[int] = []
    vectors, labels = rng.normal(size=(100, 200)).astype(np.float32), np.repeat(["a", "b"], [80, 20])
    score = linear_probe(vectors, labels, vectors, labels, strengths=(1e2, 1e-6), on_progress=steps.append)
    assert len(steps) == 3 and score.strength == 1e-6 and score.top1.value == 0.8
    clear, which = clouds(120, 0)
    assert linear_probe(5 * clear, which, clear, which, strengths=(1e-6, 1.0)).strength == 1.0
    held = dinokit.classifiers.linear_classifier._held_out(np.array([0] * 10 + [1] + [2, 2]), rng)
    assert held[:10].sum() == 2 and not held[10] and held[11:].sum() == 1
    parts = dinokit.classifiers.linear_probe._parts(np.array([0] * 10 + [1] * 5), 5, rng)
    assert all(
        np.bincount(parts[part], minlength=5).tolist() == [n] * 5
        for part, n in ((slice(10), 2), (slice(10, 15), 1))
    )


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinokit.classifiers.linear_classifier, "have_sklearn", lambda: False)
    with pytest.raises(DinokitError, match="pip install scikit-learn"):
        linear_probe(np.eye(2), ["a", "b"])


def test_raw_pixels_are_pillows() -> None:
    picture(50, 40).save("a.png")
    Path("b.png").write_bytes(b"broken")
    vectors, errors = raw_pixels([Path("a.png"), Path("b.png")])
    with Image.open("a.png") as image:
        small = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BICUBIC), np.float64) / 255
    np.testing.assert_allclose(vectors[0], (small - small.mean()).reshape(-1), atol=1e-6)
    assert np.isnan(vectors[1]).all() and errors[0] is None and errors[1] is not None


# -- labelled pictures


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(24, 20, seed=seed).save(file, "PNG")
    return file.getvalue()


def write_tar(path: str, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.endswith("gz") else "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_every_source_of_labels() -> None:
    beside = {"1.png": png(1), "1.cls": b"7\n", "d/2.cls": b"boot", "d/2.x.png": png(2), "3.png": png(3)}
    for shard in ("w.tar", "w.tar.gz", "w.tgz"):
        write_tar(shard, beside)
        found = find_labelled_items(shard)
        assert [str(item) for item in found.paths] == [f"{shard}::1.png", f"{shard}::d/2.x.png"]
        assert found.labels == ["7", "boot"]
        assert found.problems == [f"{shard}: 1 pictures have no label and are left out"]
        second = pickle.loads(pickle.dumps(found.paths[1]))  # workers get it so
        assert (second.label, second.read()) == ("boot", png(2))
    write_tar("f.tar", {"cat/1.png": png(1), "dog/2.png": png(2)})
    assert find_labelled_items("f.tar").labels == ["cat", "dog"]
    pq.write_table(pa.table({"image": [png(1), png(2)], "label": ["cat", "dog"]}), "t.parquet")
    assert find_labelled_items("t.parquet").labels == ["cat", "dog"]
    for name in ("shoes/boot/1.png", "shoes/clog/2.png"):
        Path(name).parent.mkdir(parents=True)
        Path(name).write_bytes(png(1))
    assert find_labelled_items("shoes").labels == ["boot", "clog"]
    Path("l.csv").write_text("path,label\nshoes/boot/1.png,b\n")
    assert find_labelled_items("l.csv").labels == ["b"]
    Path("l.tsv").write_text("label\tpath\nb\tshoes/boot/1.png\n\tshoes/clog/2.png\n")
    pq.write_table(
        pa.table({"path": ["shoes/boot/1.png", None, "shoes/clog/2.png"], "label": [7, 8, None]}), "p.parquet"
    )
    for listed, label in (("l.tsv", "b"), ("p.parquet", "7")):
        found = find_labelled_items(listed)
        assert ([str(path) for path in found.paths], found.labels) == (["shoes/boot/1.png"], [label])
        assert found.problems == [f"{listed}: 1 pictures have no label and are left out"]
    write_tar("n.tar", {"1.png": png(1)})
    with pytest.raises(UsageError, match=r"n\.tar: none of its 1 pictures has a label"):
        find_labelled_items("n.tar")
    with pytest.raises(UsageError, match="nowhere: no such file or folder"):
        find_labelled_items("nowhere")


# -- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = [tmp_path_factory.mktemp("model") / name for name in ("one", "two")]
    for seed, folder in enumerate(folders):
        write_model_folder(folder, config_for(name=folder.name), random_weights(seed=seed))
    return list(map(str, folders))


def shapes(folder: str, count: int, seed: int) -> None:
    """Two classes that even a random network tells apart: dark and bright."""
    rng = np.random.default_rng(seed)
    for label, level in (("dark", 40), ("bright", 200)):
        Path(folder, label).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = (level + rng.normal(0, 25, (32, 32, 3))).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(Path(folder, label, f"{number}.png"))


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, list(args))


def test_models_side_by_side(models: list[str]) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("sklearn")
    shapes("train", 12, 0)
    shapes("val", 4, 1)
    Path("val/dark/9.png").write_bytes(b"broken")
    args = (
        "eval",
        "--reference",
        "train",
        "--queries",
        "val",
        "-m",
        models[0],
        "-m",
        models[1],
        "-k",
        "3,20",
    )
    result = run(*args)
    assert result.exit_code == 1, result.stderr  # the broken one is listed
    assert "val/dark/9.png: " in result.stderr and "left out" in result.stderr
    first, header, *rows = result.stdout.splitlines()
    assert first == "8 pictures judged by 24; 2 classes, always predicting 'bright' reaches 50.0 %"
    assert header.split("  ")[0] == "top-1, %" and "k-NN 3" in header and "linear" in header
    assert [row.split("  ")[0] for row in rows] == [*models, "raw 16x16 pixels"]
    found = json.loads(run(*args, "--json", "-q").stdout)
    assert found["judged"] == 8 and found["references"] == 24 and found["protocol"] == "queries"
    assert len(found["failures"]) == 1 and found["classes"] == {"bright": 12, "dark": 12}
    one, two, pixels = found["results"]
    assert [len(one["weights_sha256"]), one["embed_dim"], pixels["embed_dim"]] == [64, 48, 768]
    assert one["weights_sha256"] != two["weights_sha256"] and one["knn"][0]["k"] == 3
    assert f"{100 * one['knn'][1]['top1']['value']:.1f} ±" in rows[0]
    assert one["linear"]["top1"]["count"] == 8 and one["linear"]["folds"] == 0
    assert one["knn"][1]["against_first"] is None and header.endswith(f"  k-NN 20 against {models[0]}")
    for row, result in zip(rows[1:], (two, pixels), strict=True):
        paired = result["knn"][1]["against_first"]
        more = result["knn"][1]["top1"]["value"] - one["knn"][1]["top1"]["value"]
        assert paired["only_second"] - paired["only_first"] == round(8 * more)
        assert row.endswith(f"  {100 * more:+.1f}, p {paired['p']:.2g}")

    # The same from tables, without a model.
    for split in ("train", "val"):
        run("embed", split, "-m", models[0], "-o", f"{split}.parquet", "-q")
    tables = json.loads(
        run("eval", "--reference", "train.parquet", "--queries", "val.parquet", "-k", "3,20", "--json").stdout
    )
    assert tables["results"][0]["knn"] == one["knn"] and tables["results"][0]["linear"] == one["linear"]
    assert tables["results"][0]["features"] == "one"
    mixed = run("eval", "--reference", "train.parquet", "--queries", "val")
    assert mixed.exit_code == 2 and "expected two tables or two sets" in mixed.stderr
    alone = run("eval", "--reference", "train.parquet", "--no-linear", "-q")
    assert alone.exit_code == 0 and "24 pictures, each judged by the others" in alone.stdout
    assert "linear" not in alone.stdout

    # Vectors of two blocks: k-NN of the class KNNClassifier tells the same.
    two_blocks = json.loads(
        run(*args[:7], "-k", "3", "--what", "cls:2", "--no-linear", "--no-pixels", "--json").stdout
    )["results"][0]
    assert (two_blocks["what"], two_blocks["embed_dim"]) == ("cls:2", 96)
    backbone = dinokit.load_backbone(models[0])
    pictures = {split: sorted(Path(split).rglob("*.png")) for split in ("train", "val")}
    pictures["val"].remove(Path("val/dark/9.png"))
    vectors = {split: backbone.embed(paths, what="cls:2") for split, paths in pictures.items()}
    labels = {split: [path.parent.name for path in paths] for split, paths in pictures.items()}
    knn = dinokit.KNNClassifier(k=3).fit(vectors["train"], labels["train"])
    right = sum(a == b for a, b in zip(knn.predict(vectors["val"]), labels["val"], strict=True))
    assert two_blocks["knn"][0]["top1"]["value"] == right / 8


def test_queries_that_are_references_too(models: list[str]) -> None:
    pytest.importorskip("onnxruntime")
    shapes("train", 6, 0)
    shapes("val", 2, 1)
    Path("val/dark/again.png").symlink_to(Path("train/dark/0.png").resolve())
    args = ("--no-linear", "--no-pixels", "-m", models[0], "-m", models[0])
    mixed = run("eval", "--reference", "train", "--queries", "val", *args)
    assert mixed.exit_code == 0, mixed.stderr
    assert "Warning: 1 query is among the references too, so the accuracies are too high" in mixed.stderr
    assert len(mixed.stdout.splitlines()) == 3  # a model that is named twice is judged once
    told = json.loads(run("eval", "--reference", "train", "--queries", "val", *args, "--json", "-q").stdout)
    assert told["queries_among_references"] == 1
    for reference, queries in (("train", "train"), ("train", "../" + Path.cwd().name + "/train")):
        itself = run("eval", "--reference", reference, "--queries", queries, *args)
        assert itself.exit_code == 2 and "leave out --queries, and each reference is judged" in itself.stderr
    run("embed", "train", "-m", models[0], "-o", "t.parquet", "-q")
    tables = run("eval", "--reference", "t.parquet", "--queries", "t.parquet")
    assert tables.exit_code == 2 and "each would find itself" in tables.stderr
    assert "Warning" not in run("eval", "--reference", "t.parquet", "--no-linear").stderr


def test_wrong_usage_and_no_scikit_learn(models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    shapes("train", 3, 0)
    for args, message in (
        (("--reference", "nowhere"), "nowhere: no such file or folder"),
        (("--reference", "train", "-m", "strater"), "strater"),
        (("--reference", "train", "-k", "ten"), "expected numbers from 1, separated by commas"),
        (("--reference", "train", "--seed", "-1"), "-1 is not in the range x>=0"),
        (("--reference", "train/dark"), "no folders; expected one subfolder per class"),
    ):
        result = run("eval", *args)
        assert result.exit_code in (2, 3) and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr
    monkeypatch.setattr(dinokit.classifiers.linear_classifier, "have_sklearn", lambda: False)
    result = run("eval", "--reference", "train", "-m", models[0], "--no-pixels")
    assert result.exit_code == 0 and "the linear probe is left out; it needs scikit-learn" in result.stderr
    assert "linear" not in result.stdout and "raw" not in result.stdout
    assert builtins.eval("1") == 1  # the command's name hides nothing elsewhere


def write_classes(name: str, labels: list[str], seed: int = 0) -> None:
    vectors = np.random.default_rng(seed).standard_normal((len(labels), 8)).astype(np.float32)
    paths = [f"{name}/{i}.jpg" for i in range(len(labels))]
    table = pa.table({"path": paths, "embedding": vectors.tolist(), "label": labels})
    pq.write_table(table.replace_schema_metadata({"dinokit.weights_sha256": "0" * 64}), name)


def test_labels_that_no_reference_has_are_told() -> None:
    write_classes("r.parquet", ["a", "b"] * 10)
    write_classes("q.parquet", ["a", "A", "B", "B"], seed=1)
    done = run("eval", "--reference", "r.parquet", "--queries", "q.parquet", "--no-linear")
    assert done.exit_code == 0
    assert (
        "Warning: 3 queries have labels that no reference has, 'A', 'B', and can only be wrong" in done.stderr
    )


def test_figures_are_json_where_nothing_can_be_fitted() -> None:
    pytest.importorskip("sklearn")
    write_classes("two.parquet", ["a", "b"])
    done = run("eval", "--reference", "two.parquet", "--json", "-q")

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    figures = json.loads(done.stdout, parse_constant=refuse)
    assert figures["results"][0]["linear"]["C"] is None


@pytest.mark.parametrize(
    "options",
    [("-m", "starter"), ("--what", "mean"), ("--image-size", "32"), ("-b", "7"), ("--engine", "torch")],
)
def test_options_of_models_are_refused_for_tables(options: tuple[str, ...]) -> None:
    write_classes("r.parquet", ["a", "b"] * 10)
    done = run("eval", "--reference", "r.parquet", *options)
    assert done.exit_code == 2 and "has no effect on tables of embeddings" in done.stderr


def test_queries_that_are_not_finite() -> None:
    vectors = np.eye(4, dtype=np.float32)
    with pytest.raises(UsageError, match="the queries contain infinity, first in row 1"):
        knn_scores(vectors, list("aabb"), np.array([[1, 0, 0, 0], [np.inf, 0, 0, 0]]), ["a", "b"])
