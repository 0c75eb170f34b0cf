"""`dinokit knn` and the labelled reference sets that it reads."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from small_models import config_for, picture, random_weights
from tinted import COLOURS, tinted, write_tinted

import dinokit.classifiers.knn
from dinokit import KNNClassifier, load_backbone
from dinokit.classifiers.labelled import find_labelled, is_table, read_labelled_table
from dinokit.cli import cli
from dinokit.cli._references import References, leave_one_out
from dinokit.errors import UsageError
from dinokit.model_folder.folder import write_model_folder

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder."""
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the same shape with other weights."""
    path = tmp_path_factory.mktemp("model") / "other"
    write_model_folder(path, config_for(), random_weights(seed=1))
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``ref/COLOUR/0…3.png`` and ``new/COLOUR.png``."""
    monkeypatch.chdir(tmp_path)
    write_tinted(4)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def knn(*args: str | Path) -> Result:
    return run("knn", *args)


def rows_of(path: str) -> list[dict[str, str]]:
    with Path(path).open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def write_label_csv(name: str = "labels.csv") -> None:
    Path(name).parent.mkdir(exist_ok=True)
    lines = [f"ref/{colour}/{i}.png,{colour}" for colour in COLOURS for i in range(4)]
    Path(name).write_text("\n".join(["path,label", *lines]) + "\n", encoding="utf-8-sig")


def test_labels_equal_the_classifier_in_python(model: str) -> None:
    result = knn("--reference", "ref", "new", "-o", "labels.csv", "-m", model, "-k", "5", "--nearest", "2")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "labels.csv\n"
    assert (
        "Leave-one-out accuracy of the reference set: 100.0 % (12 photographs, 3 classes; " in result.stderr
    )
    assert "always predicting 'blue' would reach 33.3 %)" in result.stderr
    assert "3 labelled, 0 left unlabelled, 0 failed" in result.stderr

    backbone = load_backbone(model)
    reference = find_labelled("ref")
    classifier = KNNClassifier(k=5).fit(backbone.embed(reference.paths), reference.labels)
    shares = classifier.predict_proba(backbone.embed("new"))
    similarities, neighbours = classifier.kneighbors(backbone.embed("new"))
    rows = rows_of("labels.csv")
    assert [row["path"] for row in rows] == [f"new/{colour}.png" for colour in COLOURS]
    for i, (row, colour) in enumerate(zip(rows, COLOURS, strict=True)):
        assert row["label"] == colour and row["error"] == ""
        assert float(row["probability"]) == pytest.approx(shares[i].max(), abs=1e-4)
        for j in range(2):
            assert row[f"nearest_{j + 1}"] == str(reference.paths[neighbours[i, j]])
            assert row[f"nearest_label_{j + 1}"] == colour
            assert float(row[f"similarity_{j + 1}"]) == pytest.approx(similarities[i, j], abs=1e-5)
    assert "nearest_3" not in rows[0]


def test_photographs_are_compared_once(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[int] = []
    search = dinokit.classifiers.knn.nearest
    for module in ("knn", "votes"):
        monkeypatch.setattr(
            f"dinokit.classifiers.{module}.nearest",
            lambda queries, *args, **named: compared.append(len(queries)) or search(queries, *args, **named),
        )
    assert knn("--reference", "ref", "new", "-m", model).exit_code == 0
    assert compared == [12, 3]  # the references with each other, which says what to expect; the photographs


def test_the_first_line_comes_before_the_photographs_are_labelled(model: str) -> None:
    result = knn("--reference", "ref", "new", "-m", model)
    assert result.stderr.index("more than the 12 references, so all 12 vote") < result.stderr.index("Leave-")
    assert result.stderr.index("Leave-one-out") < result.stderr.index("labelled,")
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["photo", "label", "probability", "nearest", "reference", "similarity"]
    assert lines[1].split()[:2] == ["new/blue.png", "blue"] and len(lines) == 4


def test_every_form_of_reference_gives_the_same_labels(model: str) -> None:
    write_label_csv("labels.csv")
    embedded = run("embed", "ref", "-o", "table.parquet", "-m", model)
    assert embedded.exit_code == 0, embedded.stderr
    assert run("embed", "ref", "-o", "table.csv", "-m", model).exit_code == 0
    assert run("embed", "new", "-o", "new.parquet", "-m", model).exit_code == 0
    results = []
    for reference in (
        ["ref"],
        ["labels.csv"],
        ["table.parquet"],
        ["table.csv"],
        ["table.parquet", "--labels", "labels.csv"],
    ):
        for photos in ("new", "new.parquet"):
            named = [] if "table" in reference[0] and photos == "new.parquet" else ["-m", model]
            result = knn("--reference", *reference, photos, *named, "-k", "5", "--json", "-q")
            assert result.exit_code == 0, result.stderr
            results.append(json.loads(result.stdout))
    for other in results[1:]:
        assert other["leave_one_out_accuracy"] == results[0]["leave_one_out_accuracy"]
        for one, two in zip(results[0]["rows"], other["rows"], strict=True):
            assert one["label"] == two["label"]
            np.testing.assert_allclose(one["similarities"], two["similarities"], atol=1e-5)


def test_two_tables_need_no_model(model: str) -> None:
    assert run("embed", "ref", "-o", "ref.parquet", "-m", model).exit_code == 0
    assert run("embed", "new", "-o", "new.npy", "-m", model).exit_code == 0
    result = knn("--reference", "ref.parquet", "new.npy", "-k", "3")
    assert result.exit_code == 0, result.stderr
    for option in (("-m", "starter"), ("--engine", "torch"), ("--image-size", "480"), ("-b", "7")):
        for rest in (("new.npy",), ("--check",)):
            result = knn("--reference", "ref.parquet", *rest, *option)
            assert result.exit_code == 2 and "has no effect on tables of embeddings" in result.stderr


def test_tables_of_other_models_or_sizes_are_refused(model: str, other_model: str) -> None:
    assert run("embed", "ref", "-o", "ref.parquet", "-m", model).exit_code == 0
    result = knn("--reference", "ref.parquet", "new", "-m", other_model)
    assert result.exit_code == 2
    assert "ref.parquet was made by another model (small from " in result.stderr
    assert "Choose the same model and size with -m MODEL" in result.stderr
    result = knn("--reference", "ref.parquet", "new", "-m", model, "--image-size", "48")
    assert result.exit_code == 2
    assert "another preprocessing (crop [32, 32] of 37 px) than the model" in result.stderr
    assert run("embed", "new", "-o", "new.parquet", "-m", other_model).exit_code == 0
    result = knn("--reference", "ref.parquet", "new.parquet")
    assert result.exit_code == 2 and "than new.parquet (small from" in result.stderr
    assert run("embed", "ref", "-o", "ref.npy", "-m", model).exit_code == 0
    Path("ref.npy.origin.json").unlink()
    result = knn("--reference", "ref.npy", "new", "-m", model)
    assert result.exit_code == 2 and "ref.npy does not record which model made it" in result.stderr


def test_doubtful_photographs_stay_unlabelled(model: str) -> None:
    result = knn(
        "--reference", "ref", "new", "-o", "all.jsonl", "-m", model, "--unknown-below", "1", "-k", "12"
    )
    assert result.exit_code == 0, result.stderr
    assert "0 labelled, 3 left unlabelled, 0 failed" in result.stderr
    rows = [json.loads(line) for line in Path("all.jsonl").read_text().splitlines()]
    assert [row["label"] for row in rows] == [None] * 3
    assert all(0 < row["probability"] < 1 and row["error"] is None for row in rows)
    assert knn("--reference", "ref", "new", "-o", "l.csv", "-m", model, "--unknown-below", "0").exit_code == 0
    assert [row["label"] for row in rows_of("l.csv")] == list(COLOURS)
    # "Below": one neighbour has all the votes, and 1 is not below 1.
    args = ("--reference", "ref", "new", "-m", model, "--unknown-below", "1", "-k", "1", "--json")
    assert json.loads(knn(*args).stdout)["labelled"] == 3


def test_broken_pictures_on_both_sides_are_listed(model: str) -> None:
    Path("ref/red/broken.png").write_text("no")
    Path("new/broken.png").write_text("no")
    args = ("--reference", "ref", "new", "missing.jpg", "-o", "labels.parquet", "-m", model, "--json")
    result = knn(*args)
    assert result.exit_code == 1
    assert "Failed: reference ref/red/broken.png: not a picture but text; left out" in result.stderr
    assert "Failed: new/broken.png: not a picture but text" in result.stderr
    summary = json.loads(result.stdout)
    assert (summary["photos"], summary["labelled"], summary["failed"]) == (5, 3, 2)
    assert summary["references"] == 12 and summary["reference_failures"][0]["path"] == "ref/red/broken.png"
    import pyarrow.parquet as pq

    table = pq.read_table("labels.parquet")
    assert table.column("path").to_pylist()[1] == "new/broken.png" and len(table) == 5
    assert table.column("label").to_pylist() == ["blue", None, "green", "red", None]
    assert table.column("error").to_pylist()[4] == "no such file"
    assert table.schema.metadata[b"dinokit.model"] == b"small"


def test_a_broken_reference_alone_is_1(model: str) -> None:
    Path("ref/red/broken.png").write_bytes(b"none")
    result = knn("--reference", "ref", "new", "-m", model, "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["labelled"], said["failed"]) == (1, 3, 0)
    assert [failure["path"] for failure in said["reference_failures"]] == ["ref/red/broken.png"]


def test_nothing_to_label(model: str) -> None:
    assert knn("--reference", "ref", "missing.jpg", "-m", model).exit_code == 3
    Path("text.jpg").write_text("no")
    assert knn("--reference", "ref", "text.jpg", "-m", model).exit_code == 3


def test_an_output_is_not_replaced_unasked(model: str) -> None:
    Path("labels.csv").write_text("mine")
    result = knn("--reference", "ref", "new", "-o", "labels.csv", "-m", model)
    assert (
        result.exit_code == 2
        and "labels.csv exists; choose another name, or give --overwrite" in result.stderr
    )
    assert Path("labels.csv").read_text() == "mine"
    assert knn("--reference", "ref", "new", "-o", "labels.csv", "-m", model, "--overwrite").exit_code == 0
    result = knn("--reference", "ref", "new", "-o", "labels.xlsx", "-m", model)
    assert result.exit_code == 2
    assert "the suffix '.xlsx' is not known; expected one of .csv, .jsonl, .parquet" in result.stderr


def test_an_empty_class_is_named_and_left_out(model: str) -> None:
    Path("ref/yellow").mkdir()
    picture().save("ref/loose.png")
    result = knn("--reference", "ref", "new", "-m", model)
    assert result.exit_code == 1
    assert (
        "ref/yellow: no pictures in this folder; it is empty; the class 'yellow' is left out" in result.stderr
    )
    assert "ref: files outside the folders of classes are left out, 1 file" in result.stderr


def test_one_class_is_not_enough(model: str) -> None:
    shutil.rmtree("ref/green")
    shutil.rmtree("ref/blue")
    result = knn("--reference", "ref", "new", "-m", model)
    assert result.exit_code == 2
    assert "ref has one class only, 'red', so every photograph would get that label" in result.stderr
    Path("ref/blue").mkdir()
    Path("ref/blue/broken.png").write_text("no")
    result = knn("--reference", "ref", "new", "-m", model)
    assert result.exit_code == 2 and "ref, without what cannot be read, has one class only" in result.stderr


def test_references_that_are_none() -> None:
    result = knn("--reference", "nowhere", "new")
    assert (
        result.exit_code == 2
        and "nowhere: no such file or folder; expected a folder with one subfolder" in result.stderr
    )
    result = knn("--reference", "new", "new")
    assert result.exit_code == 2
    assert (
        "new holds 3 files and no folders; expected one subfolder per class, for instance new/cat/1.jpg"
        in result.stderr
    )
    result = knn("--reference", "new/red.png", "new")
    assert result.exit_code == 2 and "new/red.png is not a reference set" in result.stderr
    result = knn("--reference", "ref", "--labels", "labels.csv", "new")
    assert result.exit_code == 2 and "give --reference labels.csv" in result.stderr
    Path("empty/a").mkdir(parents=True)
    with pytest.raises(UsageError, match="empty has 1 folder but no picture"):
        find_labelled("empty")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "lacks the columns path and label; it is empty, expected path,label"),
        ("path;label\na;b\n", "must be separated by commas"),
        ("Path,labels\na,b\n", "Rename 'Path' to 'path' and 'labels' to 'label'?"),
        ("path,kind\na,b\n", "lacks the column label; its first line has the columns 'path', 'kind'"),
        ("path,label\n", "names no picture with a label"),
        (
            "path,label\na,x\nb,y\na,z\n",
            "a is 'x' on line 2 and 'z' on line 4; expected one label per picture",
        ),
    ],
)
def test_a_csv_that_is_no_list_of_labels(text: str, message: str) -> None:
    Path("bad.csv").write_text(text)
    with pytest.raises(UsageError) as error:
        find_labelled("bad.csv")
    assert message in str(error.value)


def test_a_csv_in_another_encoding() -> None:
    Path("bad.csv").write_bytes("path,label\na.jpg,käse\n".encode("latin-1"))
    with pytest.raises(UsageError, match="is not UTF-8 text"):
        find_labelled("bad.csv")


def test_a_csv_is_relative_to_itself_and_gaps_are_reported() -> None:
    Path("lists").mkdir()
    Path("lists/l.csv").write_text("label,path,note\nx,../a.jpg,1\n,b.jpg,2\ny,,3\nx,../a.jpg,4\ny,c.jpg,5\n")
    found = find_labelled("lists/l.csv")
    assert found.paths == [Path("lists/../a.jpg"), Path("lists/c.jpg")] and found.labels == ["x", "y"]
    assert found.problems == [
        "lists/l.csv, line 3: no label; left out",
        "lists/l.csv, line 4: no path; left out",
        "lists/l.csv, line 5: ../a.jpg again; counted once",
    ]


def test_a_table_without_its_labels(model: str) -> None:
    assert run("embed", "new", "-o", "new.parquet", "-m", model).exit_code == 0
    Path("labels.csv").write_text("path,label\nnew/red.png,warm\nnew/blue.png,cold\n")
    table = read_labelled_table("new.parquet", "labels.csv")
    assert (table.paths, table.labels) == (["new/blue.png", "new/red.png"], ["cold", "warm"])
    assert table.problems == ["new/green.png: has no label in labels.csv; left out"]
    assert table.embeddings.shape == (2, 48)
    Path("labels.csv").write_text("path,label\nelsewhere.png,warm\n")
    with pytest.raises(
        UsageError, match=r"no row has both an embedding and a label. The table's first path is "
    ):
        read_labelled_table("new.parquet", "labels.csv")
    with pytest.raises(
        UsageError, match=r"^none\.csv: no such file; expected a CSV with the columns path and label"
    ):
        read_labelled_table("new.parquet", "none.csv")
    assert is_table("new.parquet") and not is_table("labels.csv") and not is_table("missing.parquet")


# -- the labels of the reference set itself


def left_out_votes(paths: list[str], labels: list[str], model: str, k: int) -> list[dict[str, float]]:
    """The truth: shares of the votes of the k others that are most similar, and the nearest; in plain numpy."""
    unit = load_backbone(model).embed(paths).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    found = []
    for i in range(len(paths)):
        near = np.argsort(-cosines[i])[:k]
        weights = np.exp(cosines[i, near] / 0.07)
        shares = dict.fromkeys(labels, 0.0)
        for j, weight in zip(near, weights / weights.sum(), strict=True):
            shares[labels[j]] += weight
        found.append(shares | {"nearest": near[0]})
    return found


def test_labels_that_the_neighbours_contradict_are_listed_worst_first(model: str) -> None:
    tinted("red", 200).save("ref/blue/wrong.png")
    tinted("green", 201).save("ref/red/0wrong.png")
    Image.blend(tinted("red", 202), tinted("green", 203), 0.45).save("ref/green/doubtful.png")
    folders = ("ref/red", "ref/green", "ref/blue")  # another order than by path
    assert run("embed", *folders, "-o", "ref.parquet", "-m", model).exit_code == 0
    labelled = find_labelled("ref")
    paths, labels = [str(path) for path in labelled.paths], labelled.labels
    expected = []
    for path, label, shares in zip(paths, labels, left_out_votes(paths, labels, model, 5), strict=True):
        near = paths[int(shares.pop("nearest"))]
        says = max(shares, key=lambda name: shares[name])
        if says != label:
            expected.append((shares[label], path, label, says, shares[says], near))
    expected.sort()
    assert len(expected) >= 3 and {"ref/blue/wrong.png", "ref/red/0wrong.png"} <= {row[1] for row in expected}
    assert len({row[0] for row in expected}) < len(expected), "the test needs equal probabilities"
    for number, reference in enumerate((["ref", "-m", model], ["ref.parquet"])):
        output = f"suspects{number}.csv"
        result = knn("--reference", *reference, "--check", "-k", "5", "-o", output)
        assert result.exit_code == 0 and result.stdout == f"{output}\n", result.stderr
        assert f"{len(expected)} of 15 labels differ from what the neighbours say" in result.stderr
        assert f"reference set: {100 * (1 - len(expected) / 15):.1f} % (15 photographs" in result.stderr
        rows = rows_of(output)
        assert list(rows[0]) == [
            "path",
            "label",
            "neighbours_say",
            "probability",
            "given_probability",
            "nearest",
        ]
        for row, (given, path, label, says, probability, near) in zip(rows, expected, strict=True):
            assert (row["path"], row["label"], row["neighbours_say"]) == (path, label, says)
            assert float(row["given_probability"]) == pytest.approx(given, abs=1e-4)
            assert float(row["probability"]) == pytest.approx(probability, abs=1e-4)
            assert row["nearest"] == near


def test_a_check_in_every_format(model: str) -> None:
    import pyarrow.parquet as pq

    args = ("--reference", "ref.parquet", "--check", "-k", "3")
    assert run("embed", "ref", "-o", "ref.parquet", "-m", model).exit_code == 0
    result = knn(*args, "-o", "none.parquet")
    assert result.exit_code == 0 and "0 of 12 labels differ" in result.stderr
    assert knn(*args, "-q").stdout == "" and pq.read_table("none.parquet").num_rows == 0
    tinted("red", 200).save("ref/blue/wrong.png")
    Path("ref/green/broken.png").write_text("no")
    args = ("--reference", "ref", "--check", "-k", "3", "-m", model)
    said = json.loads(knn(*args, "--json", "-q").stdout)
    assert (said["suspects"], said["references"], said["k"]) == (1, 13, 3)
    assert said["leave_one_out_accuracy"] == pytest.approx(12 / 13)
    assert [failure["path"] for failure in said["failures"]] == ["ref/green/broken.png"]
    (row,) = said["rows"]
    assert (row["path"], row["label"], row["neighbours_say"]) == ("ref/blue/wrong.png", "blue", "red")
    for name in ("s.parquet", "s.jsonl"):
        result = knn(*args, "-o", name)
        assert result.exit_code == 1 and "broken.png: not a picture but text; left out" in result.stderr
    table = pq.read_table("s.parquet")
    assert table.to_pylist() == [row] and table.schema.metadata[b"dinokit.model"] == b"small"
    assert json.loads(Path("s.jsonl").read_text()) == row
    lines = knn(*args, "-q").stdout.splitlines()
    assert lines[0].split()[:5] == ["photo", "label", "probability", "neighbours", "say"]
    assert lines[1].split() == ["ref/blue/wrong.png", "blue", "0.000", "red", "1.000", row["nearest"]]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "there is nothing to label; name PHOTOS, or give --check"),
        (("new", "--check"), "--check checks only the reference set; leave out new, or leave out --check"),
        (("--check", "--unknown-below", "0.5"), "--unknown-below applies to labelling PHOTOS"),
        (("--check", "--nearest", "2"), "--nearest applies to labelling PHOTOS"),
    ],
)
def test_a_check_and_photographs_exclude_each_other(args: tuple[str, ...], message: str) -> None:
    result = knn("--reference", "ref", *args)
    assert result.exit_code == 2 and message in result.stderr


# -- photographs that are references


def test_a_reference_has_no_vote_on_its_own_label(model: str) -> None:
    tinted("red", 200).save("ref/blue/wrong.png")
    shutil.copy("ref/blue/wrong.png", "new/copy.png")
    Path("new/link.png").symlink_to(Path("ref/blue/wrong.png").absolute())
    assert run("embed", "ref", "-o", "ref.parquet", "-m", model).exit_code == 0
    photos = ("./ref/blue/wrong.png", str(Path("ref/blue/1.png").absolute()), "new/link.png", "new/copy.png")
    results = []
    for reference in ("ref", "ref.parquet"):
        result = knn("--reference", reference, *photos, "-m", model, "-k", "1", "--json")
        assert result.exit_code == 0, result.stderr
        assert (
            "Note: 3 photographs are also references; each was labelled by the other references"
            in result.stderr
        )
        results.append(json.loads(result.stdout)["rows"])
    for rows in results:
        assert [row["label"] for row in rows] == [
            "red",
            "blue",
            "red",
            "blue",
        ]  # identical content still votes
        assert rows[3]["nearest"] == ["ref/blue/wrong.png"]
        assert all("wrong" not in row["nearest"][0] for row in rows[:3])
    # All that there are vote, but the picture itself; the others' neighbours do not change by it.
    args = (
        "--reference",
        "ref",
        "ref/blue/wrong.png",
        "new/red.png",
        "-m",
        model,
        "--nearest",
        "99",
        "--json",
    )
    rows = json.loads(knn(*args).stdout)["rows"]
    assert [len(row["nearest"]) for row in rows] == [12, 13] and "ref/blue/wrong.png" not in rows[0][
        "nearest"
    ]
    assert all(-1 <= similarity < 1 for similarity in rows[0]["similarities"])


def test_a_broken_photograph_shifts_no_vote(model: str) -> None:
    tinted("red", 200).save("ref/blue/wrong.png")
    Path("new/broken.png").write_text("no")
    photos = ("new/broken.png", "ref/blue/wrong.png")
    rows = json.loads(knn("--reference", "ref", *photos, "-m", model, "-k", "1", "--json").stdout)["rows"]
    assert [row["label"] for row in rows] == [None, "red"]
    assert rows[1]["nearest"] != ["ref/blue/wrong.png"]


def test_pictures_in_an_archive_are_told_by_archive_and_member(model: str) -> None:
    import tarfile

    with tarfile.open("ref.tar", "w") as archive:
        archive.add("ref")
    Path("link.tar").symlink_to(Path("ref.tar").absolute())
    result = knn("--reference", "ref.tar", "link.tar", "-m", model, "-k", "3", "-o", "l.csv")
    assert result.exit_code == 0, result.stderr
    assert "Note: 12 photographs are also references" in result.stderr
    for row in rows_of("l.csv"):
        assert row["nearest_1"].split("::")[1] != row["path"].split("::")[1]


def test_an_interruption_leaves_nothing_behind(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(Path("tmp").absolute()))

    def interrupted(*args: object, **kwargs: object) -> None:
        assert list(Path("tmp").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("dinokit.tables.run.embed_to_table", interrupted)
    result = knn("--reference", "ref", "new", "-o", "labels.csv", "-m", model)
    assert result.exit_code == 130 and "Interrupted." in result.stderr
    assert not list(Path("tmp").iterdir()) and not Path("labels.csv").exists()


def test_an_input_is_never_replaced(model: str) -> None:
    write_label_csv("labels.csv")
    before = Path("labels.csv").read_bytes()
    Path("link.csv").symlink_to("labels.csv")
    for output in ("labels.csv", "./labels.csv", "link.csv"):
        result = knn("--reference", "labels.csv", "new", "-m", model, "-o", output, "--overwrite")
        assert result.exit_code == 2 and "is also an input (labels.csv)" in result.stderr
    assert Path("labels.csv").read_bytes() == before
    assert run("embed", "ref", "-o", "t.csv", "-m", model).exit_code == 0
    before = Path("t.csv").read_bytes()
    for args in (
        ("select", "t.csv", "-n", "1", "-o", "t.csv"),
        ("duplicates", "t.csv", "-o", "t.csv"),
        ("atlas", "t.csv", "--table", "t.csv", "-o", "page.html"),
        ("classify", "t.csv", "-o", "t.csv"),
        ("embed", "t.csv", "-o", "t.csv", "-m", model),
        ("duplicates", "ref/red/0.png", "ref/red/1.png", "--sheet", "ref/red/0.png"),
        ("search", "ref/red/0.png", "--in", "t.csv", "--sheet", "ref/red/0.png"),
    ):
        result = run(*args, "--overwrite")
        assert result.exit_code == 2 and "is also an input" in result.stderr, (args, result.stderr)
    assert Path("t.csv").read_bytes() == before


def test_a_photograph_that_is_all_of_the_references_is_a_failure_of_its_own(model: str) -> None:
    photo = Path("ref/red/0.png")
    Path("two.csv").write_text(f"path,label\n{photo},a\n{photo.absolute()},b\n")
    result = knn("--reference", "two.csv", str(photo), "new", "-m", model, "--json")
    said = json.loads(result.stdout)
    assert result.exit_code == 1 and (said["failed"], said["labelled"]) == (1, 3)
    assert [failure["path"] for failure in said["failures"]] == [str(photo)]
    assert f"Failed: {photo}: every reference is this photograph itself" in result.stderr
    result = knn("--reference", "two.csv", "--check", "-m", model)
    assert result.exit_code == 3 and "no label can be checked" in result.stderr


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("option", ["--temperature", "--unknown-below"])
def test_numbers_are_finite(option: str, value: str) -> None:
    result = knn("--reference", "ref", "new", f"{option}={value}")
    assert result.exit_code == 2 and f"Invalid value for '{option}'" in result.stderr


def test_a_default_for_tables_is_not_for_folders(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_label_csv("labels.csv")
    monkeypatch.setenv("DINOKIT_KNN_LABELS", "labels.csv")
    assert knn("--reference", "ref", "new", "-m", model).exit_code == 0
    result = knn("--reference", "ref", "new", "-m", model, "--labels", "labels.csv")
    assert result.exit_code == 2 and "--labels needs a table" in result.stderr


def test_the_expected_accuracy_is_counted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    labels = [f"class {row % 3}" for row in range(50)]
    references = References(rows, [f"{row}.jpg" for row in range(50)], labels, {})
    for k in (5, 49, 50):
        classifier = KNNClassifier(k).fit(rows, labels)
        for at_once in (7, 4096):
            monkeypatch.setattr("dinokit.cli._references._JUDGED_AT_ONCE", at_once)
            found = leave_one_out(classifier, references, quiet=True)
            assert found == classifier.leave_one_out_score()
