"""`find_duplicates` and `dinokit duplicates`."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from small_models import config_for, picture, random_weights

from dinokit import find_duplicates, find_duplicates_against, load_backbone
from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.neighbours.duplicates import count_tiles
from dinokit.pictures.images import open_image
from dinokit.sources import find_pictures
from dinokit.tables.embeddings import table_of

pytest.importorskip("onnxruntime")


def components(embeddings: NDArray[np.float32], threshold: float) -> list[list[int]]:
    """The truth: all cosines in float64, and scipy's components of the graph."""
    scipy = pytest.importorskip("scipy.sparse.csgraph")
    fine = np.flatnonzero(np.isfinite(embeddings).all(axis=1))
    unit = embeddings[fine].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    _, labels = scipy.connected_components(unit @ unit.T >= threshold, directed=False)
    groups = [fine[labels == label].tolist() for label in np.unique(labels)]
    return sorted(group for group in groups if len(group) > 1)


def clustered(count: int, seed: int = 0) -> NDArray[np.float32]:
    """Points near few centres and chains between them, in random order and of any length."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(count // 8, 16))
    points = centres[rng.integers(0, len(centres), count)] + rng.normal(0, 0.25, (count, 16))
    lengths = rng.uniform(0.2, 5, (count, 1))
    return (points * lengths).astype(np.float32)


# -- in Python


@pytest.mark.parametrize("side", [7, 64, 1024])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.95, 0.97])
def test_groups_are_the_components_of_all_pairs(
    threshold: float, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.neighbours.duplicates._SIDE", side)
    embeddings = clustered(230)
    embeddings[[4, 77]] = np.nan
    ticks: list[int] = []
    groups = find_duplicates(embeddings, threshold, on_progress=ticks.append)
    expected = components(embeddings, threshold)
    assert expected, "the test needs groups"
    assert [group.rows for group in groups] == expected
    assert sum(ticks) == count_tiles(228)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for group in groups:
        np.testing.assert_allclose(group.similarities, unit[group.rows] @ unit[group.rows[0]], atol=1e-6)


def test_a_chain_is_one_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.neighbours.duplicates._SIDE", 8)
    angles = np.linspace(0, 2, 41)
    order = np.random.default_rng(0).permutation(41)
    embeddings = np.stack([np.cos(angles), np.sin(angles)], axis=1)[order]
    (group,) = find_duplicates(embeddings, 0.998)  # a step of 0.05 has the cosine 0.99875
    assert sorted(group.rows) == list(range(41)) and min(group.similarities) < 0.5
    assert find_duplicates(embeddings, 0.999) == []


def test_identical_rows_reach_a_threshold_of_1() -> None:
    embeddings = np.random.default_rng(1).normal(size=(300, 33)).astype(np.float32)
    embeddings[150:] = 3 * embeddings[:150]
    groups = find_duplicates(embeddings, 1.0)
    assert [group.rows for group in groups] == [[row, row + 150] for row in range(150)]
    assert all(group.similarities == pytest.approx([1, 1]) for group in groups)


def test_which_one_to_keep() -> None:
    embeddings = np.repeat(np.eye(2, dtype=np.float32), 3, axis=0)
    assert [group.rows for group in find_duplicates(embeddings)] == [[0, 1, 2], [3, 4, 5]]
    kept = find_duplicates(embeddings, quality=[1, 5, 5, 0, 0, 2])
    assert [group.rows for group in kept] == [[1, 0, 2], [5, 3, 4]]
    two = [[9, 1], [9, 2], [3, 8], [0, 0], [0, 1], [0, 1]]
    assert [group.rows for group in find_duplicates(embeddings, quality=two)] == [[1, 0, 2], [4, 3, 5]]
    # Quality is that of all rows, those without an embedding among them.
    failed_first = np.concatenate([np.full((1, 2), np.nan, np.float32), embeddings])
    kept = find_duplicates(failed_first, quality=[9, 1, 5, 4, 0, 0, 2])
    assert [group.rows for group in kept] == [[2, 1, 3], [6, 4, 5]]


@pytest.mark.parametrize("side", [7, 1024])
@pytest.mark.parametrize("threshold", [0.9, 0.97])
def test_pairs_between_two_sets_are_the_most_similar_of_all(
    threshold: float, side: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.neighbours.duplicates._SIDE", side)
    monkeypatch.setattr("dinokit.neighbours.nearest._REFERENCES", 32)
    both = clustered(330)
    ours, others = both[:130], both[130:]
    others[150] = 2 * others[20]  # equally similar: the first is named
    ours[5] = others[20]
    ours[[4, 77]] = others[9] = np.nan
    ticks: list[int] = []
    pairs = find_duplicates_against(ours, others, threshold, on_progress=ticks.append)
    one, two = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (ours.astype(float), others.astype(float))
    )
    cosines = np.nan_to_num(one @ two.T, nan=-2)
    cosines[:, 150] -= 1e-9
    expected = [row for row in range(130) if cosines[row].max() >= threshold]
    assert 10 < len(expected) < 128, "the test needs some with and some without"
    assert [pair.row for pair in pairs] == expected and 5 in expected
    assert [pair.other for pair in pairs] == cosines[expected].argmax(axis=1).tolist()
    np.testing.assert_allclose([pair.similarity for pair in pairs], cosines[expected].max(axis=1), atol=1e-6)
    assert sum(ticks) == 128 and max(pair.similarity for pair in pairs) <= 1


def test_pairs_of_identical_rows_and_of_nothing() -> None:
    rows = np.random.default_rng(1).normal(size=(300, 33)).astype(np.float32)
    pairs = find_duplicates_against(rows[::-1], 5 * rows, 1.0)
    assert [(pair.row, pair.other) for pair in pairs] == [(row, 299 - row) for row in range(300)]
    nothing = np.full((3, 33), np.nan)
    assert find_duplicates_against(rows, nothing) == [] and find_duplicates_against(nothing, rows) == []
    with pytest.raises(
        UsageError, match="the embeddings have 33 columns and against has 2; expected two sets of"
    ):
        find_duplicates_against(rows, np.eye(2))
    with pytest.raises(UsageError, match=r"against of shape \(3,\) cannot be compared"):
        find_duplicates_against(rows, np.ones(3))
    with pytest.raises(UsageError, match="threshold=2 must be above -1"):
        find_duplicates_against(rows, rows, 2)


def test_what_cannot_be() -> None:
    for threshold in (1.1, -1, float("nan")):
        with pytest.raises(UsageError, match="must be above -1 and at most 1, for instance"):
            find_duplicates(np.eye(3), threshold)
    with pytest.raises(UsageError, match=r"quality has shape \(2,\); expected \(3,\) or \(3, Q\)"):
        find_duplicates(np.eye(3), quality=[1, 2])
    with pytest.raises(UsageError, match="quality contains NaN"):
        find_duplicates(np.eye(3), quality=[1, 2, np.nan])
    with pytest.raises(
        UsageError, match=r"the embeddings of shape \(3,\) cannot be compared; expected \(N, D\)"
    ):
        find_duplicates(np.ones(3))
    assert find_duplicates(np.empty((0, 4))) == [] and find_duplicates(np.full((3, 4), np.nan)) == []


# -- at the command line


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pictures of which two have copies: one twice as large, one saved again with loss."""
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for i in range(5):
        picture(64, 64, seed=i).save(f"photos/{i}.png")
    picture(64, 64, seed=1).resize((128, 128), Image.Resampling.BICUBIC).save("photos/large.png")
    picture(64, 64, seed=3).save("photos/0again.jpg", quality=90)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def duplicates(*args: str | Path) -> Result:
    return run("duplicates", *args)


def test_pictures_and_their_table_have_the_same_duplicates(model: str) -> None:
    before = sorted((path.name, path.stat().st_size) for path in Path("photos").iterdir())
    assert run("embed", "photos", "-o", "t.parquet", "-m", model).exit_code == 0
    rows = []
    for source in (["photos", "-m", model], ["t.parquet"]):
        result = duplicates(*source, "--json", "--threshold", "0.97")
        assert result.exit_code == 0, result.stderr
        said = json.loads(result.stdout)
        assert (said["compared"], said["groups"], said["duplicates"]) == (7, 2, 2)
        assert "Nothing was deleted" in result.stderr
        rows.append(said["rows"])
    assert rows[0] == rows[1]
    # Largest first: by pixels, then by bytes of the file (a PNG of noise is larger than its JPEG).
    assert [(row["group"], row["keep"], row["path"]) for row in rows[0]] == [
        (1, True, "photos/3.png"),
        (1, False, "photos/0again.jpg"),
        (2, True, "photos/large.png"),
        (2, False, "photos/1.png"),
    ]
    names = ["photos/3.png", "photos/0again.jpg", "photos/large.png", "photos/1.png"]
    unit = load_backbone(model).embed(names)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    expected = [1, unit[0] @ unit[1], 1, unit[2] @ unit[3]]
    np.testing.assert_allclose([row["similarity"] for row in rows[0]], expected, atol=1e-5)
    assert before == sorted((path.name, path.stat().st_size) for path in Path("photos").iterdir())


def test_a_file_that_is_named_twice_is_no_duplicate_of_itself(model: str) -> None:
    Path("link.png").symlink_to(Path("photos/2.png").absolute())
    named = ("photos", str(Path("photos").absolute()), "./photos/4.png", "link.png")
    assert run("embed", *named, "-o", "t.parquet", "-m", model).exit_code == 0
    once = json.loads(duplicates("photos", "-m", model, "--json", "--threshold", "0.97").stdout)
    for source in ((*named, "-m", model), ("t.parquet",)):
        result = duplicates(*source, "--json", "--threshold", "0.97")
        assert result.exit_code == 0, result.stderr
        assert (
            "7 compared, 9 that are named twice counted once; groups of near-duplicates: 2" in result.stderr
        )
        said = json.loads(result.stdout)
        assert (said["photos"], said["compared"], said["named_again"], said["left_out"]) == (16, 7, 9, 0)
        assert said["rows"] == once["rows"]


def write_new_photographs() -> None:
    """``new/``: a copy of one of ``photos/``, one saved again with loss, two alike that are in none."""
    Path("new").mkdir()
    shutil.copy("photos/2.png", "new/a.png")
    picture(64, 64, seed=4).save("new/b.jpg", quality=90)
    for name in "cd":
        picture(64, 64, seed=50).save(f"new/{name}.png")


def test_against_another_set_pictures_and_tables_find_the_same(model: str) -> None:
    write_new_photographs()
    for name in ("new", "photos"):
        assert run("embed", name, "-o", f"{name}.parquet", "-m", model).exit_code == 0
    found = []
    for ours in ("new", "new.parquet"):
        for others in ("photos", "photos.parquet"):
            both = ours.endswith("parquet") and others.endswith("parquet")
            result = duplicates(
                *(ours, "--against", others, *(() if both else ("-m", model))),
                *("--json", "--threshold", "0.97"),
            )
            assert result.exit_code == 0, result.stderr
            assert "4 compared with 7; with a near-duplicate among these: 2. Nothing was" in result.stderr
            said = json.loads(result.stdout)
            assert (said["against"], said["others"], said["duplicates"]) == (others, 7, 2)
            found.append([{k: v for k, v in row.items() if k != "similarity"} for row in said["rows"]])
            assert [row["similarity"] for row in said["rows"]] == pytest.approx([1, 0.98], abs=0.02)
    assert found == 4 * [
        [
            {"path": "new/a.png", "against": "photos/2.png", "row": 0, "against_row": 3},
            {"path": "new/b.jpg", "against": "photos/4.png", "row": 1, "against_row": 5},
        ]
    ]


def test_pictures_are_embedded_as_the_table_they_are_compared_with(model: str) -> None:
    write_new_photographs()
    assert run("embed", "photos", "-o", "mean.parquet", "-m", model, "--what", "cls+mean").exit_code == 0
    assert run("embed", "new", "-o", "new.parquet", "-m", model, "--what", "cls+mean").exit_code == 0
    said = [
        json.loads(duplicates(*ours, "--against", "mean.parquet", "--json").stdout)["rows"]
        for ours in (("new", "-m", model), ("new.parquet",))
    ]
    assert said[0] == said[1] and said[0][0]["against"] == "photos/2.png"
    assert run("embed", "new", "-o", "cls.parquet", "-m", model).exit_code == 0
    result = duplicates("cls.parquet", "--against", "mean.parquet")
    assert result.exit_code == 2 and "cls.parquet holds other vectors (cls) than" in result.stderr


def test_against_another_set_csv_sheet_and_screen(model: str) -> None:
    write_new_photographs()
    args = ("new", "--against", "photos", "-m", model, "--threshold", "0.97")
    result = duplicates(*args, "-o", "out/d.csv", "--sheet", "out/d.png")
    assert result.exit_code == 0 and result.stdout == "out/d.csv\nout/d.png\n", result.stderr
    with Path("out/d.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["path", "similarity", "against"]
    assert [(row["path"], row["against"]) for row in rows] == [
        ("new/a.png", "photos/2.png"),
        ("new/b.jpg", "photos/4.png"),
    ]
    with Image.open("out/d.png") as sheet:
        assert sheet.width > 2 * 160 and sheet.height > 2 * 160
    lines = [line.split() for line in duplicates(*args, "-q").stdout.splitlines()]
    assert lines[:2] == [["photo", "similarity", "near-duplicate"], ["new/a.png", "1.0000", "photos/2.png"]]
    result = duplicates("new/c.png", *args[1:], "--sheet", "none.png")
    assert result.exit_code == 0 and result.stdout == "" and "none.png is not written" in result.stderr
    # A picture that is in both sets is found: that is what a leak is.
    said = json.loads(duplicates("photos/0.png", *args[1:], "--json").stdout)
    assert [(row["path"], row["against"]) for row in said["rows"]] == [("photos/0.png", "photos/0.png")]


def test_against_what_cannot_be(model: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("model") / "other"
    write_model_folder(other, config_for(), random_weights(seed=1))
    Path("empty").mkdir()
    Path("bad.png").write_text("no")
    assert run("embed", "photos", "-o", "t.parquet", "-m", model).exit_code == 0
    assert run("embed", "photos", "-o", "other.parquet", "-m", other).exit_code == 0
    for args, code, message in [
        (("t.parquet", "--against", "other.parquet"), 2, "t.parquet was made by another model (small from"),
        (
            ("photos", "--against", "t.parquet", "-m", other),
            2,
            "t.parquet was made by another model (small from",
        ),
        (
            ("t.parquet", "--against", "photos", "-m", other),
            2,
            "t.parquet was made by another model (small from",
        ),
        (("photos", "--against", "t.parquet", "--keep", "first"), 2, "--keep chooses within a group"),
        (("photos", "--against", "empty", "-m", model), 3, "there is nothing to compare; name photographs"),
        (("photos", "--against", "gone.jpg", "-m", model), 3, "gone.jpg: no such file or folder"),
        (("photos", "--against", "bad.png", "-m", model), 3, "no photograph has an embedding"),
    ]:
        result = duplicates(*args)
        assert result.exit_code == code and message in result.stderr, (args, result.stderr)
    result = duplicates("photos", "bad.png", "--against", "t.parquet", "-m", model, "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["left_out"] == 1


def test_keep_the_first(model: str) -> None:
    result = duplicates("photos", "-m", model, "--keep", "first", "--threshold", "0.97", "-q")
    assert result.stderr == ""
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines == [
        ["group", "keep", "similarity", "pixels", "path"],
        ["1", "keep", "1.0000", "64x64", "photos/0again.jpg"],
        ["1", lines[2][1], "64x64", "photos/3.png"],
        ["2", "keep", "1.0000", "64x64", "photos/1.png"],
        ["2", lines[4][1], "128x128", "photos/large.png"],
    ]


def test_csv_and_sheet(model: str) -> None:
    args = ("photos", "-m", model, "--threshold", "0.97", "-o", "out/d.csv", "--sheet", "out/d.png")
    result = duplicates(*args)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out/d.csv\nout/d.png\n"
    with Path("out/d.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    assert list(rows[0]) == ["group", "keep", "similarity", "width", "height", "path"]
    assert [(row["group"], row["keep"], row["width"]) for row in rows] == [
        ("1", "yes", "64"),
        ("1", "no", "64"),
        ("2", "yes", "128"),
        ("2", "no", "64"),
    ]
    with Image.open("out/d.png") as sheet:
        assert sheet.width > 2 * 160 and sheet.height > 2 * 160
    assert sorted(path.name for path in Path("out").iterdir()) == ["d.csv", "d.png"]
    result = duplicates(*args)
    assert result.exit_code == 2 and "out/d.csv exists; choose another name" in result.stderr
    assert duplicates(*args, "--overwrite").exit_code == 0


def test_no_duplicates(model: str) -> None:
    shutil.rmtree("photos")
    Path("photos").mkdir()
    for i in range(3):
        picture(seed=i).save(f"photos/{i}.png")
    result = duplicates("photos", "-m", model, "--threshold", "1", "--sheet", "d.png")
    assert result.exit_code == 0 and result.stdout == ""
    assert "groups of near-duplicates: 0" in result.stderr and "d.png is not written" in result.stderr
    assert duplicates("photos", "-m", model, "--threshold", "1", "-o", "d.csv").exit_code == 0
    assert Path("d.csv").read_text() == "group,keep,similarity,width,height,path\n"


def test_what_cannot_be_read_is_listed_and_counted(model: str) -> None:
    Path("photos/broken.png").write_text("no")
    result = duplicates("photos", "missing.jpg", "-m", model, "--json")
    assert result.exit_code == 1
    assert "Failed: photos/broken.png: not a picture but text" in result.stderr
    assert "Failed: missing.jpg: no such file" in result.stderr
    said = json.loads(result.stdout)
    assert (said["photos"], said["compared"], said["left_out"]) == (9, 7, 2)
    assert [failure["path"] for failure in said["failures"]] == ["photos/broken.png", "missing.jpg"]
    # In a table they were reported when it was made: counted here, and no failure.
    assert run("embed", "photos", "-o", "t.csv", "-m", model).exit_code == 1
    result = duplicates("t.csv")
    assert result.exit_code == 0 and "7 compared, 1 left out that have no embedding" in result.stderr


def test_a_folder_without_pictures_is_1(model: str) -> None:
    Path("empty").mkdir()
    result = duplicates("photos", "empty", "-m", model, "--json")
    said = json.loads(result.stdout)
    assert (result.exit_code, said["compared"], said["failures"]) == (1, 7, [])
    assert len(said["problems"]) == 1 and "empty" in said["problems"][0]


def test_a_table_without_rows() -> None:
    pq.write_table(table_of([], np.zeros((0, 4), np.float32), [], []), "none.parquet")
    result = duplicates("none.parquet")
    assert result.exit_code == 3 and "Error: there is nothing to compare" in result.stderr
    assert find_duplicates(np.zeros((0, 4)), quality=np.zeros((0, 2))) == []


def test_a_threshold_far_too_low_is_noticed(model: str) -> None:
    result = duplicates("photos", "-m", model, "--threshold", "-0.9")
    assert result.exit_code == 0
    assert "one group holds 7 of 7 photographs; threshold -0.9 is probably too low" in result.stderr


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("empty",), 3, "there is nothing to compare; name photographs"),
        (("missing.jpg",), 3, "missing.jpg: no such file or folder"),
        (("text.png",), 3, "no photograph has an embedding"),
        (("photos", "--threshold", "1.5"), 2, "1.5 is not in the range"),
        (("photos", "--keep", "best"), 2, "'best' is not one of 'largest', 'first'"),
        (("photos", "-o", "d.xlsx"), 2, "the suffix '.xlsx' is not known; expected .csv"),
        (("photos", "--sheet", "d.pdf"), 2, "the suffix '.pdf' is not known"),
        (("t.parquet", "photos"), 2, "t.parquet is a table of embeddings; expected one table alone"),
        (("bad.parquet",), 3, "bad.parquet is not a table of embeddings, or it is damaged"),
    ],
)
def test_nothing_to_do_and_wrong_usage(model: str, args: tuple[str, ...], code: int, message: str) -> None:
    Path("empty").mkdir()
    Path("text.png").write_text("no")
    Path("bad.parquet").write_bytes(b"PAR1 but no more")
    assert run("embed", "photos/0.png", "-o", "t.parquet", "-m", model).exit_code == 0
    result = duplicates(*args, "-m", model)
    assert result.exit_code == code and message in result.stderr, result.stderr


def test_an_interruption_leaves_nothing_behind(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(Path("tmp").absolute()))

    def interrupted(*args: object, **kwargs: object) -> None:
        assert list(Path("tmp").iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr("dinokit.tables.run.embed_to_table", interrupted)
    result = duplicates("photos", "-m", model, "-o", "d.csv")
    assert result.exit_code == 130 and "Interrupted." in result.stderr
    assert not list(Path("tmp").iterdir()) and not Path("d.csv").exists()


# -- what the default threshold finds


def saved_again(image: Image.Image, quality: int, scale: float = 1.0) -> Image.Image:
    size = (round(image.width * scale), round(image.height * scale))
    file = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.slow
def test_the_default_threshold_parts_copies_from_other_photographs(shared_data: Path) -> None:
    """The starter, on 290 phone photographs of clothes."""
    backbone = load_backbone("starter")
    paths = find_pictures(shared_data / "clothing" / "val")
    originals = backbone.embed(paths)
    assert find_duplicates(originals) == []  # no two of these photographs are the same
    images = [open_image(path) for path in paths[::3]]
    count = len(originals)
    makers: dict[str, tuple[Callable[[Image.Image], Image.Image], float]] = {
        "saved again": (lambda image: saved_again(image, 75), 0.99),
        "saved with loss": (lambda image: saved_again(image, 30), 0.97),
        "half as large": (lambda image: saved_again(image, 60, 0.5), 0.95),
        "a tenth brighter": (lambda image: ImageEnhance.Brightness(image).enhance(1.1), 0.95),
    }
    for name, (make, least) in makers.items():
        copies = backbone.embed([make(image) for image in images])
        groups = find_duplicates(np.concatenate([originals, copies]))
        right = {(3 * place, count + place) for place in range(len(copies))}
        found = {tuple(group.rows) for group in groups}
        assert found <= right, "another photograph was taken for a copy"
        assert len(found) >= least * len(right), (name, len(found), len(right))
