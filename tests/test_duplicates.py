"""`find_duplicates` and `dinokit duplicates`."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image, ImageEnhance
from small_models import config_for, picture, random_weights

from dinokit import find_duplicates, load_backbone
from dinokit.cli import cli
from dinokit.duplicates import count_tiles
from dinokit.errors import UsageError
from dinokit.images import open_image
from dinokit.model_folder import write_model_folder
from dinokit.sources import find_pictures

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
    monkeypatch.setattr("dinokit.duplicates._SIDE", side)
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
    monkeypatch.setattr("dinokit.duplicates._SIDE", 8)
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


def test_what_cannot_be() -> None:
    for threshold in (1.1, -1, float("nan")):
        with pytest.raises(UsageError, match="must be above -1 and at most 1, for instance"):
            find_duplicates(np.eye(3), threshold)
    with pytest.raises(UsageError, match=r"quality has shape \(2,\); expected \(3,\) or \(3, Q\)"):
        find_duplicates(np.eye(3), quality=[1, 2])
    with pytest.raises(UsageError, match="quality holds NaN"):
        find_duplicates(np.eye(3), quality=[1, 2, np.nan])
    with pytest.raises(UsageError, match=r"shape \(3,\); expected \(N, D\)"):
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
    for source in (["photos", "-m", model], ["t.parquet", "-m", "no/such/model"]):
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
        (("t.parquet", "photos"), 2, "t.parquet is a table of embeddings; expected it alone"),
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

    monkeypatch.setattr("dinokit.embedding_run.embed_to_table", interrupted)
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
