"""`select_typical`, `select_diverse` and `dinokit select`."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from small_models import config_for, random_weights

from dinokit import select_diverse, select_typical
from dinokit.cli import cli
from dinokit.cli._progress import counting_steps, open_progress
from dinokit.errors import UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.neighbours import selection
from dinokit.neighbours.k_means import k_means
from dinokit.neighbours.selection import Selection
from dinokit.sources import find_pictures
from dinokit.tables.embeddings import read_embeddings


def points(count: int, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, 6)) * rng.uniform(0.2, 5, (count, 1))).astype(np.float32)


def cosines(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float64]:
    a, b = one.astype(np.float64), other.astype(np.float64)
    return (a / np.linalg.norm(a, axis=1, keepdims=True)) @ (b / np.linalg.norm(b, axis=1, keepdims=True)).T


# -- in Python


def test_each_choice_is_the_least_like_those_before_it() -> None:
    """By the definition, in float64, over all pairs."""
    vectors = points(60)
    found = select_diverse(vectors, 12)
    similar = cosines(vectors, vectors)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert found.rows[0] == int((unit @ unit.mean(axis=0)).argmax()) and np.isnan(found.similarities[0])
    for place in range(1, 12):
        rest = [row for row in range(60) if row not in found.rows[:place]]
        to_chosen = {row: similar[row, found.rows[:place]].max() for row in rest}
        assert found.rows[place] == min(to_chosen, key=lambda row: to_chosen[row])
        assert found.similarities[place] == pytest.approx(to_chosen[found.rows[place]], abs=1e-6)
    rest = [row for row in range(60) if row not in found.rows]
    assert found.farthest == pytest.approx(similar[np.ix_(rest, found.rows)].max(axis=1).min(), abs=1e-6)
    assert select_diverse(vectors, 5).rows == found.rows[:5]
    assert select_diverse(vectors * 7, 12).rows == found.rows  # length says nothing


def test_it_is_at_most_twice_as_far_as_the_best_choice() -> None:
    """Gonzalez' bound, for angles, over every choice of three of twelve."""
    from itertools import combinations

    vectors = points(12, seed=3)
    angles = np.arccos(np.clip(cosines(vectors, vectors), -1, 1))
    best = min(angles[:, list(rows)].min(axis=1).max() for rows in combinations(range(12), 3))
    assert np.arccos(select_diverse(vectors, 3).farthest) <= 2 * best + 1e-6


def test_what_one_has_is_not_chosen_again() -> None:
    vectors, having = points(40), points(9, seed=1)
    having[4] = np.nan
    found = select_diverse(vectors, 3, having=having)
    to_having = cosines(vectors, np.delete(having, 4, axis=0)).max(axis=1)
    assert found.rows[0] == int(to_having.argmin())
    assert found.similarities[0] == pytest.approx(to_having.min(), abs=1e-6)
    assert select_diverse(vectors, 1, having=vectors[:-1]).rows == [39]


def blobs(sizes: list[int], seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Groups of these sizes, far apart, in random order and of any length; and which row is of which."""
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    vectors = np.eye(len(sizes) + 2)[groups] + rng.normal(0, 0.05, (len(groups), len(sizes) + 2))
    return (vectors * rng.uniform(0.2, 5, (len(groups), 1))).astype(np.float32), groups


@pytest.mark.parametrize("seed", range(5))
def test_typical_ones_are_the_middles_of_the_groups_the_largest_first(seed: int) -> None:
    sizes = [40, 10, 25, 15]
    vectors, groups = blobs(sizes, seed)
    told: list[tuple[int, int]] = []
    found = select_typical(vectors, 4, on_progress=lambda done, steps: told.append((done, steps)))
    assert groups[found.rows].tolist() == [0, 2, 3, 1]
    steps = told[0][1]
    assert {of for _, of in told} == {steps} and told[-1][0] == steps and told == sorted(told)
    for row in found.rows:
        rows = np.flatnonzero(groups == groups[row])
        unit = vectors[rows] / np.linalg.norm(vectors[rows], axis=1, keepdims=True)
        assert row == rows[(unit @ unit.mean(axis=0)).argmax()]
    similar = cosines(vectors, vectors)
    assert found.similarities[2] == pytest.approx(similar[found.rows[2], found.rows[:2]].max(), abs=1e-6)
    rest = [row for row in range(90) if row not in found.rows]
    assert found.farthest == pytest.approx(similar[np.ix_(rest, found.rows)].max(axis=1).min(), abs=1e-6)
    assert select_typical(vectors, 4).rows == found.rows


def test_starts_from_some_of_the_rows_find_the_same_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_FEWEST_DRAWN", 30)
    monkeypatch.setattr(selection, "_DRAWN_PER_GROUP", 10)
    vectors, groups = blobs([40, 10, 25, 15])
    assert groups[select_typical(vectors, 4).rows].tolist() == [0, 2, 3, 1]


@pytest.mark.parametrize("select", [select_typical, select_diverse])
@pytest.mark.parametrize("held", [0, 6])
def test_similarities_in_blocks_are_those_of_all_pairs(
    select: Callable[..., Selection], held: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, having = points(50), points(6, seed=1)[:held]
    found = select(vectors, 12, having=having if held else None)
    monkeypatch.setattr(selection, "_BLOCK", 60)  # five rows
    in_blocks = select(vectors, 12, having=having if held else None)
    assert in_blocks.rows == found.rows
    assert in_blocks.similarities == pytest.approx(found.similarities, abs=1e-6, nan_ok=True)
    assert in_blocks.farthest == pytest.approx(found.farthest, abs=1e-6)
    before = np.concatenate([having, vectors[found.rows]])
    for place, row in enumerate(found.rows):
        earlier = cosines(vectors[[row]], before[: held + place])
        expected = earlier.max() if earlier.size else np.nan
        assert found.similarities[place] == pytest.approx(expected, abs=1e-6, nan_ok=True)
    others = np.delete(vectors, found.rows, axis=0)
    assert found.farthest == pytest.approx(cosines(others, before).max(axis=1).min(), abs=1e-6)


def test_typical_ones_of_what_one_lacks() -> None:
    vectors, groups = blobs([40, 10, 25, 15])
    labelled = np.concatenate([vectors[groups == 0][:1], vectors[groups == 3][:1], np.full((1, 6), np.nan)])
    assert set(groups[select_typical(vectors, 2, having=labelled).rows].tolist()) == {1, 2}


def test_means_of_directions_are_directions() -> None:
    rows = points(60)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    groups, centres = k_means(
        rows, rows[:4], lambda centres: (rows @ centres.T).argmax(axis=1), rounds=9, directions=True
    )
    means = np.stack([rows[groups == group].mean(axis=0) for group in range(4)])
    np.testing.assert_allclose(centres, means / np.linalg.norm(means, axis=1, keepdims=True), atol=1e-6)


def test_equal_rows_are_few_groups_and_are_chosen_all_the_same() -> None:
    vectors = np.repeat(np.eye(3, dtype=np.float32), 5, axis=0)
    found = select_typical(vectors, 7)
    assert len(set(found.rows)) == 7 and {row // 5 for row in found.rows[:3]} == {0, 1, 2}


@pytest.mark.parametrize("select", [select_diverse, select_typical])
def test_rows_without_a_vector_are_never_chosen(select: Callable[..., Selection]) -> None:
    vectors = points(8)
    vectors[2], vectors[5] = np.nan, 0
    told: list[tuple[int, int]] = []
    found = select(vectors, 100, on_progress=lambda done, steps: told.append((done, steps)))
    assert sorted(found.rows) == [0, 1, 3, 4, 6, 7] and told[-1][0] == told[-1][1]
    assert found.farthest == 1.0


@pytest.mark.parametrize(
    ("vectors", "options", "message"),
    [
        (np.zeros((3, 2)), {"count": 1}, "no row is finite and nonzero"),
        (np.ones(3), {"count": 1}, r"shape \(3,\); expected \(N, D\)"),
        (np.ones((3, 2)), {"count": 0}, "count=0 is invalid"),
        (np.ones((3, 2)), {"count": 1, "having": np.ones((3, 4))}, r"expected \(M, 2\)"),
    ],
)
def test_what_cannot_be(vectors: NDArray[np.float32], options: dict[str, int], message: str) -> None:
    for select in (select_diverse, select_typical):
        with pytest.raises(UsageError, match=message):
            select(vectors, **options)


def test_documentation_says_what_was_measured() -> None:
    root = Path(__file__).parents[2]
    file = root / "benchmarks" / "results" / "selection_starter.json"
    measured = json.loads(file.read_text(encoding="utf-8"))["results"]
    text = (root / "docs" / "api.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) ± ([\d.]+) \|$", text, re.MULTILINE)
    keys = ("labels", "typical", "diverse", "chance", "chance_deviation")
    assert [tuple(map(float, row)) for row in rows] == [
        tuple(found[key] for key in keys) for found in measured
    ]
    assert len(rows) == 8


# -- the command


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten dark pictures nearly alike, and two that are like nothing else."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("p").mkdir()
    for number in range(10):
        pixels = (30 + rng.normal(0, 2, (32, 32, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(f"p/dark{number}.png")
    Image.new("RGB", (32, 32), (255, 40, 0)).save("p/red.png")
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), np.uint8)).save("p/noise.png")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("model") / "m"
    write_model_folder(folder, config_for(), random_weights())
    return str(folder)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["select", *args])


def test_the_odd_ones_are_among_the_first(model: str) -> None:
    result = run("p", "-n", "3", "-m", model, "--by", "diverse")
    assert result.exit_code == 0, result.stderr
    chosen = result.stdout.splitlines()
    assert chosen[0].startswith("p/dark") and {*chosen[1:]} == {"p/red.png", "p/noise.png"}
    assert "3 of 12 photographs chosen; each of the others has a similarity of at least" in result.stderr
    share = run("p", "-n", "20%", "-m", model, "-q", "--by", "diverse")  # 2.4 of 12, rounded up
    assert share.stdout.splitlines() == chosen and share.stderr == ""
    everything = run("p", "-n", "12", "-m", model, "--sheet", "all.png")
    assert "12 of 12 photographs chosen\n" in everything.stderr  # and no others, of which nothing is said
    typical = run("p", "-n", "1", "-m", model, "-q").stdout
    assert typical.startswith("p/dark")


def test_progress_counts_the_steps_whose_number_is_learnt_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.cli._progress._SECONDS_BETWEEN_LINES", 0.0)
    stream = io.StringIO()
    with open_progress(3, task="choosing", unit="steps", stream=stream) as progress:
        tell = counting_steps(progress)
        for done in (4, 9, 20):
            tell(done, 20)
    lines = [line.split(" steps")[0] for line in stream.getvalue().splitlines()]
    assert lines == [f"choosing: {done} of 20" for done in (4, 9, 20)]


def test_lists_that_other_commands_read(model: str) -> None:
    Path("p/broken.png").write_bytes(b"no")
    result = run("p", "-n", "2", "-m", model, "-o", "out/chosen.txt", "--sheet", "sheet.png")
    assert result.exit_code == 1 and "Failed: p/broken.png" in result.stderr
    assert result.stdout == "out/chosen.txt\nsheet.png\n"
    with Image.open("sheet.png") as sheet:
        assert sheet.width > 200
    names = Path("out/chosen.txt").read_text().splitlines()
    assert [str(item) for item in find_pictures("out/chosen.txt")] == names and len(names) == 2
    told = json.loads(run("p", "-n", "2", "-m", model, "-o", "chosen.csv", "--json", "-q").stdout)
    assert (told["chosen"], told["usable"], told["photos"], len(told["failures"])) == (2, 12, 13, 1)
    with Path("chosen.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["path"] for row in rows] == names and rows[0]["similarity"] == ""
    assert [str(item) for item in find_pictures("chosen.csv")] == names


def test_a_list_from_a_table_of_another_folder_is_read_here(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CliRunner().invoke(cli, ["embed", "p", "-m", model, "-o", "t.parquet", "-q"]).exit_code == 0
    (Path() / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    table = str(Path("..") / "t.parquet")
    assert run(table, "-n", "3", "-q", "-o", "chosen.txt").exit_code == 0
    names = Path("chosen.txt").read_text().splitlines()
    assert all(Path(name).is_file() for name in names) and len(names) == 3
    assert run(table, "-n", "3", "-q").stdout.splitlines() == names
    monkeypatch.chdir("..")
    assert all(name.startswith("p") for name in run("t.parquet", "-n", "3", "-q").stdout.splitlines())


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_a_name_of_two_lines(model: str, end: str) -> None:
    Path("p/red.png").rename(f"p/re{end}d.png")
    assert run("p", "-n", "3", "-m", model, "-o", "chosen.txt", "-q").exit_code == 0
    assert f"p/re{end}d.png" in [str(item) for item in find_pictures("chosen.txt")]
    assert len(find_pictures("chosen.txt")) == 3


def test_from_a_table_beside_what_one_has(model: str) -> None:
    assert CliRunner().invoke(cli, ["embed", "p", "-m", model, "-o", "t.parquet", "-q"]).exit_code == 0
    vectors = read_embeddings("t.parquet")
    chosen = {}
    for by, choose in (("typical", select_typical), ("diverse", select_diverse)):
        chosen[by] = run("t.parquet", "-n", "6", "--by", by, "-q").stdout.splitlines()
        assert chosen[by] == [vectors.paths[row] for row in choose(vectors.embeddings, 6).rows]
    assert chosen["typical"] != chosen["diverse"]
    table = run("t.parquet", "-n", "3", "--json", "-q")
    rows = json.loads(table.stdout)["rows"]
    assert [row["path"] for row in rows] == run("p", "-n", "3", "-m", model, "-q").stdout.splitlines()
    shutil.copytree("p", "labelled", ignore=shutil.ignore_patterns("red.png"))
    result = run("t.parquet", "-n", "1", "--having", "labelled", "-m", model, "-q")
    assert (result.exit_code, result.stdout) == (0, "p/red.png\n")
    both = run("t.parquet", "-n", "20", "--having", "t.parquet")
    assert "12 of 12 photographs chosen, fewer than the 20 requested" in both.stderr


@pytest.mark.parametrize(
    ("args", "message", "code"),
    [
        (["p"], "Missing option '-n'", 2),
        (["p", "-n", "0"], "'0'; expected a number from 1, or a share such as 5%", 2),
        (["p", "-n", "120%"], "'120%'; expected a number", 2),
        (["p", "-n", "3", "-o", "x.parquet"], "expected one of .txt, .csv", 2),
        (["p", "-n", "3", "--sheet", "x.gif"], "the suffix '.gif' is not known", 2),
        (["nowhere", "-n", "3"], "there is nothing to choose from", 3),
    ],
)
def test_mistakes(model: str, args: list[str], message: str, code: int) -> None:
    result = run(*args, "-m", model)
    assert result.exit_code == code and message in result.stderr, result.stderr


@pytest.mark.parametrize(("share", "chosen"), [("7%", 7), ("14%", 14), ("28%", 28), ("7.1%", 8)])
def test_a_share_of_a_hundred(share: str, chosen: int) -> None:
    vectors = np.random.default_rng(0).standard_normal((100, 8)).astype(np.float32)
    pq.write_table(
        pa.table({"path": [f"{i}.jpg" for i in range(100)], "embedding": vectors.tolist()}), "h.parquet"
    )
    assert len(run("h.parquet", "-n", share, "-q").stdout.splitlines()) == chosen
