"""`dinokit atlas`: layout, clusters, thumbnails, the page, and the command from end to end."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tarfile
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray
from PIL import Image
from small_models import picture

import dinokit
from dinokit.atlas.clusters import cluster
from dinokit.atlas.layout import lay_out, principal_components, repulsion
from dinokit.atlas.make import make_atlas
from dinokit.atlas.thumbnails import check_size, make_sheets
from dinokit.cli import cli
from dinokit.errors import DinokitError, UsageError
from dinokit.neighbours.nearest import nearest, normalised
from dinokit.tables.embeddings import table_of, write_embeddings


def groups(per_group: int, count: int, *, seed: int = 0, dim: int = 32) -> NDArray[np.float32]:
    """``count`` groups of vectors that lie far apart, one after the other."""
    rng = np.random.default_rng(seed)
    middles = np.repeat(rng.normal(size=(count, dim)), per_group, axis=0)
    return (middles + 0.15 * rng.normal(size=middles.shape)).astype(np.float32)


# -- layout


@pytest.mark.parametrize("spread", [1e-4, 1.0, 8.0])
def test_repulsion_is_the_gradient_of_the_normaliser(spread: float) -> None:
    places = spread * np.random.default_rng(1).normal(size=(40, 2))

    def log_z(y: NDArray[np.float64]) -> float:
        apart = ((y[:, None] - y) ** 2).sum(axis=-1)
        return float(np.log((1 / (1 + apart)).sum() - len(y)))

    force, total = repulsion(places, exact=True)
    assert np.log(total) == pytest.approx(log_z(places), rel=1e-9)
    for i, axis in [(0, 0), (3, 1), (39, 0)]:
        step = np.zeros_like(places)
        step[i, axis] = 1e-5 * spread
        slope = (log_z(places + step) - log_z(places - step)) / (2e-5 * spread)
        # van der Maaten and Hinton 2008, equation 5, the half without p: 4 sum q² Z (y_i - y_j) / Z
        assert -4 * force[i, axis] / total == pytest.approx(slope, rel=1e-4, abs=1e-6 / spread)


@pytest.mark.parametrize("spread", [1e-4, 0.1, 2.0, 15.0])
def test_repulsion_on_the_grid_equals_the_sum_over_pairs(spread: float) -> None:
    places = spread * np.random.default_rng(2).normal(size=(1500, 2))
    (exact, total), (grid, grid_total) = repulsion(places, exact=True), repulsion(places, exact=False)
    # An error of the gradient of a few percent in some points moves no point visibly; it averages out over steps.
    assert np.linalg.norm(grid - exact) <= 0.025 * np.linalg.norm(exact)
    assert grid_total == pytest.approx(total, rel=2e-3)
    np.testing.assert_allclose(grid.sum(axis=0), 0, atol=1e-6 * np.abs(grid).sum())  # actio = reactio


def test_layout_keeps_neighbours_nearly_as_well_as_scikit_learn() -> None:
    manifold = pytest.importorskip("sklearn.manifold")
    from sklearn.neighbors import NearestNeighbors

    def kept(places: NDArray[Any], near: NDArray[np.intp]) -> float:
        found = NearestNeighbors(n_neighbors=10).fit(places).kneighbors(return_distance=False)
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, near[:, :10], strict=True)]))

    shares = []
    # On one sheet either may end in a worse place than usual, by how a processor rounds: the mean of ten is judged.
    for seed in range(3, 13):
        # A curved sheet in 20 dimensions: there is something to unroll, and no clear groups that make it easy.
        rng = np.random.default_rng(seed)
        sheet = rng.uniform(-1, 1, size=(250, 2))
        angle, height = 3 * sheet[:, 0], sheet[:, 1]
        bent = np.stack([np.sin(angle), np.cos(angle), height, height**2], axis=1)
        noise = rng.normal(size=(4, 20)), 0.02 * rng.normal(size=(250, 20))
        rows = normalised((bent @ noise[0] + noise[1]).astype(np.float32))
        near = nearest(rows, rows, 15, leave_out=True)[1]
        theirs = manifold.TSNE(perplexity=30, init="pca", random_state=0, max_iter=400).fit_transform(rows)
        flat = lay_out(rows, near, "pca")
        shares.append([kept(places, near) for places in (lay_out(rows, near), theirs, flat)])
    ours, scikit_learns, pca = np.mean(shares, axis=0)
    assert ours > 0.5  # chance: 0.04
    assert ours >= scikit_learns - 0.05
    assert ours > pca + 0.1


def test_layout_parts_groups_and_is_the_same_each_time() -> None:
    rows = normalised(groups(110, 3))  # above the number of points that are summed pair by pair
    near = nearest(rows, rows, 15, leave_out=True)[1]
    done: list[int] = []
    places = lay_out(rows, near, on_progress=done.append)
    assert places.shape == (330, 2) and sum(done) == 100
    assert np.abs(places).max() == pytest.approx(1)
    np.testing.assert_array_equal(places, lay_out(rows, near))
    middles = places.reshape(3, 110, 2).mean(axis=1)
    radii = np.linalg.norm(places.reshape(3, 110, 2) - middles[:, None], axis=-1).max(axis=1)
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert np.linalg.norm(middles[a] - middles[b]) > radii[a] + radii[b]


def test_principal_components_equal_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows = groups(20, 4)
    expected = decomposition.PCA(5, svd_solver="full").fit_transform(rows.astype(np.float64))
    ours = principal_components(rows, 5)
    np.testing.assert_allclose(np.abs(ours), np.abs(expected), atol=1e-4)
    assert principal_components(rows[:, :3], 5).shape == (80, 5)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_a_handful_of_photographs_and_copies_have_places(count: int) -> None:
    for rows in (normalised(groups(count, 1)), np.ones((count, 8), np.float32) / np.sqrt(np.float32(8))):
        near = nearest(rows, rows, count - 1, leave_out=True)[1] if count > 1 else np.empty((1, 0), np.intp)
        places = lay_out(rows, near)
        assert places.shape == (count, 2) and np.isfinite(places).all()
        assert len(np.unique(places, axis=0)) == count  # copies lie beside each other


def test_layouts_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normalised(groups(10, 3))
    near = nearest(rows, rows, 5, leave_out=True)[1]
    with pytest.raises(UsageError, match=r"'sne' is not known; expected one of builtin, pca, umap, tsne"):
        lay_out(rows, near, "sne")
    for name, package in {"umap": "umap-learn", "tsne": "openTSNE"}.items():
        for module in ("umap", "openTSNE", "sklearn.manifold"):
            monkeypatch.setitem(__import__("sys").modules, module, None)
        with pytest.raises(DinokitError, match=f"pip install {package}, or use --layout builtin"):
            lay_out(rows, near, name)


# -- clusters


def test_clusters_find_groups_and_their_number() -> None:
    sizes = [40, 25, 60, 10, 30]
    truth = np.repeat(np.arange(5), sizes)
    rows = np.random.default_rng(4).normal(size=(5, 10))[truth]
    rows = rows + 0.1 * np.random.default_rng(5).normal(size=rows.shape)
    found = cluster(rows)
    np.testing.assert_array_equal(np.bincount(found), sorted(sizes, reverse=True))
    assert len(set(zip(truth, found, strict=True))) == 5
    np.testing.assert_array_equal(found, cluster(rows))


@pytest.mark.parametrize("count", [20, 40, 100])
def test_rows_without_groups_are_not_cut_into_the_most_that_are_tried(count: int) -> None:
    # Each row pulls its centre towards itself, the more the fewer rows share it.
    sizes = np.bincount(cluster(np.random.default_rng(1).normal(size=(count, 30))))
    assert len(sizes) <= 6 and sizes.min() >= 3


def test_k_means_is_as_good_as_scikit_learn() -> None:
    sklearn_cluster = pytest.importorskip("sklearn.cluster")
    rows = np.random.default_rng(6).normal(size=(300, 6)) ** 3
    for count in (2, 5, 9):
        labels = cluster(rows, count)
        inertia = sum(((rows[labels == c] - rows[labels == c].mean(axis=0)) ** 2).sum() for c in range(count))
        expected = sklearn_cluster.KMeans(count, n_init=10, random_state=0).fit(rows).inertia_
        assert inertia <= 1.1 * expected


@pytest.mark.parametrize(("count", "rows", "expected"), [(None, 3, 1), (1, 9, 1), (3, 3, 3), (24, 5, 5)])
def test_clusters_of_few_rows(count: int | None, rows: int, expected: int) -> None:
    labels = cluster(np.random.default_rng(7).normal(size=(rows, 4)), count)
    assert len(np.unique(labels)) == expected
    assert set(cluster(np.ones((20, 4)), count)) == {0}  # copies cannot be parted


def test_clusters_out_of_range() -> None:
    with pytest.raises(UsageError, match="clusters=25 must lie between 1 and 24; leave it out"):
        cluster(np.ones((30, 2)), 25)


# -- thumbnails


def sheet(uri: str) -> Image.Image:
    head, _, text = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return Image.open(io.BytesIO(base64.b64decode(text)))


def test_thumbnails_are_whole_upright_and_where_they_belong(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90° clockwise to be seen upright
    Image.new("RGB", (400, 100), "red").save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGB", (300, 200), "blue").save(tmp_path / "wide.png")
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    Image.new("RGB", (5, 5), "lime").save(os.fsencode(tmp_path) + b"/caf\xe9.png")
    paths = ["turned.jpg", "gone.jpg", "wide.png", "broken.jpg", r"caf\xe9.png"]
    done: list[tuple[int, int]] = []
    made = make_sheets(paths, 60, roots=[tmp_path], on_progress=lambda *now: done.append(now))
    assert made.cell_px == 64 and made.columns == 32
    assert made.sizes == [(15, 60), (0, 0), (60, 40), (0, 0), (60, 60)]
    assert [path for path, _ in made.problems] == ["gone.jpg", "broken.jpg"]
    assert made.problems[0][1] == "no such file"
    assert done == [(1, 0), (1, 1), (1, 0), (1, 1), (1, 0)]
    pixels = np.asarray(sheet(made.uris[0]).convert("RGB")).astype(int)
    assert pixels.shape == (64, 5 * 64, 3)
    for place, (w, h), colour in [
        (0, (15, 60), (255, 0, 0)),
        (2, (60, 40), (0, 0, 255)),
        (4, (60, 60), (0, 255, 0)),
    ]:
        inside = pixels[1 : h - 1, place * 64 + 1 : place * 64 + w - 1]
        assert np.abs(inside - colour).mean() < 8, place


def test_thumbnails_of_pictures_in_an_archive(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "1.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "1.png", "in/1.png")
    made = make_sheets(["shard.tar::in/1.png", "shard.tar::2.png", "none.tar::1.png"], 32, roots=[tmp_path])
    assert made.sizes == [(32, 24), (0, 0), (0, 0)]
    assert [path for path, _ in made.problems] == ["shard.tar::2.png", "none.tar::1.png"]


def test_many_thumbnails_go_on_several_sheets_within_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.atlas.thumbnails._SHEET_PX", 64)
    for i in range(6):
        noise = np.random.default_rng(i).integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(tmp_path / f"{i}.png")
    paths = [f"{i}.png" for i in range(6)]
    made = make_sheets(paths, 32, roots=[tmp_path])
    assert made.columns == 2 and [sheet(uri).size for uri in made.uris] == [(64, 64), (64, 32)]
    monkeypatch.setattr("dinokit.atlas.thumbnails.MOST_BYTES", 6000)
    small = make_sheets(paths, 32, roots=[tmp_path])
    assert all(len(uri) * 3 / 4 < 3100 for uri in small.uris)  # noise at full quality has twice that
    assert sum(map(len, made.uris)) > sum(map(len, small.uris))


def test_too_many_thumbnails_are_refused_before_any_work() -> None:
    check_size(10_000, 64)
    with pytest.raises(
        UsageError, match=r"20000 thumbnails of 64 px .* holds 19531 .* smaller --thumbnail-px"
    ):
        check_size(20_000, 64)


# -- the page


class Elements(HTMLParser):
    """What a browser's parser would see: each element's attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.within = False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append((tag, ""))
        self.within = True

    def handle_endtag(self, tag: str) -> None:
        self.within = False

    def handle_data(self, data: str) -> None:
        if self.within:
            self.texts[-1] = (self.texts[-1][0], self.texts[-1][1] + data)

    def text_of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    def attributes_of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def content(page: str) -> dict[str, Any]:
    loaded = json.loads(Elements(page).text_of("script")[0])
    assert isinstance(loaded, dict)
    return loaded


def unpacked(text: str, kind: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text), kind)


EVIL = [
    "</script><script>alert(1)</script>.jpg",
    "<img src=x onerror=alert(2)>.jpg",
    "<!--<script>.jpg",
    "{{script}}{{data}}.jpg",
    "quote\"'&amp;\u2028.jpg",
]


def test_file_names_that_look_like_html_stay_names() -> None:
    atlas = make_atlas(groups(5, 1), EVIL, title="<script>alert(3)</script>{{data}}")
    seen = Elements(atlas.page)
    assert [a.get("type") for a in seen.attributes_of("script")] == ["application/json", None]
    assert not seen.attributes_of("img")
    assert content(atlas.page)["paths"] == EVIL
    assert seen.text_of("title")[0] == "<script>alert(3)</script>{{data}}"
    assert "alert(" not in seen.text_of("script")[1]  # the page's own script
    assert "innerHTML" not in atlas.page and "insertAdjacentHTML" not in atlas.page


def test_the_page_can_reach_nothing_and_runs_its_own_script_only() -> None:
    page = make_atlas(groups(5, 1), EVIL).page
    seen = Elements(page)
    (policy,) = [
        a["content"] for a in seen.attributes_of("meta") if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'" and rules["img-src"] == "data:"
    for tag, rule, text in [
        ("script", "script-src", seen.text_of("script")[1]),
        ("style", "style-src", seen.text_of("style")[0]),
    ]:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'", tag
    assert not [a for _, a in seen.elements if any(name.startswith("on") or name == "style" for name in a)]
    for _, attributes in seen.elements:
        for name in ("src", "href", "action"):
            assert (attributes.get(name) or "data:,").startswith("data:")
    assert not re.search(r"https?://|//cdn|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", page)
    assert "{{" not in page.replace(json.dumps(EVIL[3])[1:-1], "")


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not there to run the page's functions")
@pytest.mark.parametrize("spacing", [0.002, 0.05, 0.4, 2.0])  # of thousands of photographs … of two
@pytest.mark.parametrize(("width", "height"), [(1600, 900), (700, 1100), (320, 240)])
@pytest.mark.parametrize("px", [64, 256])
def test_the_whole_map_leaves_room_for_the_outermost_photographs(
    spacing: float, width: int, height: int, px: int
) -> None:
    page = (Path(dinokit.__file__).parent / "atlas" / "page.js").read_text(encoding="utf-8")
    names = ("wholeScale", "scaleToFit", "wantedThumbnail", "largestPhoto")
    taken = [re.search(rf"^function {name}\(.*?^\}}", page, re.M | re.S) for name in names]
    taken += re.finditer(r"^const (EDGE|PHOTO_SHARE|CHOSEN_SHARE) = .*$", page, re.M)
    functions = "\n".join(found[0] for found in taken if found)
    code = f"""
        const data = {{thumbnails: {{px: {px}}}}}, state = {{view: {{}}}}, spacing = {spacing};
        const bounds = {{left: -1, right: 1, top: -0.7, bottom: 0.7}};
        const size = () => ({{width: {width}, height: {height}}});
        {functions}
        state.view.scale = wholeScale();
        console.log(JSON.stringify([state.view.scale, wantedThumbnail()]));
    """
    scale, photo = json.loads(subprocess.run(["node", "-e", code], capture_output=True, check=True).stdout)
    assert scale > 0
    space = [(width - 2 * scale) / 2, (height - 1.4 * scale) / 2]  # beside the outermost ones' middles
    chosen = 1.15 * photo / 2 + 4  # half of the photograph when it is chosen, with its frame
    assert min(space) >= chosen
    # and no more than that, or than a little of the window
    assert min(space) <= chosen + 5 or min(space[0] / width, space[1] / height) <= 0.0401


def test_the_page_holds_exact_neighbours_places_and_groups(tmp_path: Path) -> None:
    rows = groups(10, 4, seed=8)
    rows[[7, 21]] = np.nan
    paths = [f"set/{'abcd'[i // 10]}/{i}.jpg" for i in range(40)]
    atlas = make_atlas(rows, paths, neighbours=5, clusters=4)
    assert (atlas.photos, atlas.left_out, atlas.sampled_from, len(atlas.clusters)) == (38, 2, 38, 4)
    page = content(atlas.page)
    kept = [i for i in range(40) if i not in (7, 21)]
    assert page["paths"] == [paths[i] for i in kept]
    assert "2 without an embedding left out" in page["summary"]
    lengths = np.linalg.norm(rows[kept].astype(np.float64), axis=1)
    cosines = rows[kept].astype(np.float64) @ rows[kept].T / np.outer(lengths, lengths)
    np.fill_diagonal(cosines, -2)
    expected = np.argsort(-cosines, axis=1)[:, :5]
    np.testing.assert_array_equal(unpacked(page["neighbours"], "<u2").reshape(38, 5), expected)
    np.testing.assert_allclose(
        unpacked(page["similarities"], "<f4").reshape(38, 5),
        np.take_along_axis(cosines, expected, 1),
        atol=1e-6,
    )
    assert unpacked(page["places"], "<u2").shape == (76,)
    clusters, folders = page["groupings"]
    assert clusters["title"] == "Clusters" and len(clusters["labels"]) == 4
    assert folders["labels"] == ["b", "d", "a", "c"]  # largest first: a and c lost a row
    of = unpacked(folders["of"], "<u1")
    assert [folders["labels"][g] for g in of] == ["abcd"[i // 10] for i in kept]
    assert all(of[photo] == group for group, photo in enumerate(folders["samples"]))


def test_colours_by_the_labels_of_the_table() -> None:
    paths = [f"{i}.jpg" for i in range(60)]
    labels = [None if i < 3 else f"kind {i % 4}" for i in range(60)]
    page = content(make_atlas(groups(20, 3), paths, labels=labels).page)
    _, grouping = page["groupings"]
    assert (grouping["title"], grouping["other"]) == ("Labels", 4)
    assert grouping["labels"] == ["kind 3", "kind 0", "kind 1", "kind 2", "no label"]
    of = unpacked(grouping["of"], "<u1")
    assert [grouping["labels"][group] for group in of] == [label or "no label" for label in labels]
    many = make_atlas(groups(20, 3), paths, labels=[f"kind {i % 20:02}" for i in range(60)])
    assert content(many.page)["groupings"][1]["labels"][-1] == "8 other labels"
    assert len(content(make_atlas(groups(20, 3), paths, labels=[None] * 60).page)["groupings"]) == 1
    with pytest.raises(UsageError, match="59 labels for 60 embeddings"):
        make_atlas(groups(20, 3), paths, labels=labels[1:])


def test_many_folders_share_a_last_colour() -> None:
    paths = [f"{i % 20:02}/{i}.jpg" for i in range(60)]
    folders = content(make_atlas(groups(20, 3), paths).page)["groupings"][1]
    assert folders["labels"] == [f"{i:02}" for i in range(12)] + ["8 other folders"]
    assert folders["other"] == 12


def test_of_too_many_photographs_an_even_choice_is_shown() -> None:
    atlas = make_atlas(groups(10, 3), [f"{i}.jpg" for i in range(30)], max_photos=10)
    assert content(atlas.page)["paths"] == [f"{i}.jpg" for i in range(0, 30, 3)]
    assert "10 photographs of 30, evenly chosen" in content(atlas.page)["summary"]
    assert atlas.sampled_from == 30


def test_what_cannot_be_asked_for() -> None:
    rows, paths = groups(3, 1), ["a", "b", "c"]
    with pytest.raises(UsageError, match=r"shape \(3, 32\) and 2 paths do not fit; expected \(N, D\) and N"):
        make_atlas(rows, paths[:2])
    with pytest.raises(UsageError, match="thumbnail_px=8 must lie between 16 and 256"):
        make_atlas(rows, paths, thumbnail_px=8)
    with pytest.raises(DinokitError, match="no row of the table has an embedding"):
        make_atlas(np.full_like(rows, np.nan), paths)


# -- the command


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten photographs in two folders and their table, with one row that failed."""
    monkeypatch.chdir(tmp_path)
    paths = [f"photos/{'ab'[i % 2]}/{i}.png" for i in range(10)]
    for i, path in enumerate(paths):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        picture(50 + i, 40, seed=i).save(path)
    errors = [None] * 9 + ["its data are damaged"]
    table = table_of(paths, groups(5, 2), [(50, 40)] * 9 + [None], errors)
    write_embeddings(Path("e.parquet"), lambda: iter([table]), 10, {"model": "starter", "embed_dim": 32})
    return tmp_path


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, ["atlas", *args])


def test_a_table_becomes_a_page(here: Path) -> None:
    result = run("e.parquet", "-o", "sub/map.html")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "sub/map.html\n"
    assert re.search(
        r"^9 photographs in \d clusters, 1 row without an embedding left out; 0\.\d MB$", result.stderr, re.M
    )
    assert [p.name for p in Path("sub").iterdir()] == ["map.html"]
    page = content(Path("sub/map.html").read_text(encoding="utf-8"))
    assert page["title"] == "e.parquet" and "Embeddings of starter." in page["origin"]
    assert len(page["thumbnails"]["sheets"]) == 1
    again = run("e.parquet", "-o", "again.html", "-q")
    assert again.stderr == ""
    assert Path("again.html").read_bytes() == Path("sub/map.html").read_bytes()


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_places_and_clusters_as_a_table(here: Path, suffix: str) -> None:
    name = f"sub/places.{suffix}"
    result = run("e.parquet", "-o", "map.html", "--table", name, "--clusters", "2", "--json")
    assert result.exit_code == 0, result.stderr
    said = json.loads(result.stdout)
    assert (said["output"], said["table"], said["places"]) == ("map.html", "e.parquet", name)
    if suffix == "csv":
        with Path(name).open(newline="", encoding="utf-8") as stream:
            rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    elif suffix == "jsonl":
        rows = [json.loads(line) for line in Path(name).read_text(encoding="utf-8").splitlines()]
    else:
        table = pq.read_table(name)
        rows = table.to_pylist()
        assert table.schema.metadata[b"dinokit.model"] == b"starter"
    assert list(rows[0]) == ["path", "x", "y", "cluster", "cluster_name"]
    page = content(Path("map.html").read_text(encoding="utf-8"))
    assert [row["path"] for row in rows] == page["paths"]  # without the row that failed
    places = unpacked(page["places"], "<u2").reshape(-1, 2) / 32767.5 - 1
    np.testing.assert_allclose([(float(row["x"]), float(row["y"])) for row in rows], places, atol=2e-5)
    grouping = page["groupings"][0]
    of = unpacked(grouping["of"], "u1")
    assert [int(row["cluster"]) - 1 for row in rows] == of.tolist() and set(of) == {0, 1}
    assert [row["cluster_name"] for row in rows] == [grouping["labels"][group] for group in of]
    again = run("e.parquet", "-o", "other.html", "--table", name)
    assert again.exit_code == 2 and "exists; choose another name, or give --overwrite" in again.stderr
    assert not Path("other.html").exists()
    both = run("e.parquet", "-o", "map.html", "--table", name, "--overwrite")
    assert both.stdout == f"map.html\n{name}\n"


def test_photographs_that_are_gone_are_grey_and_listed(here: Path) -> None:
    Path("photos/a/4.png").unlink()
    result = run("e.parquet", "--json")
    assert result.exit_code == 1
    assert "Failed: photos/a/4.png: no such file" in result.stderr
    summary = json.loads(result.stdout)
    assert summary["photos"] == 9 and summary["left_out"] == 1 and summary["output"] == "atlas.html"
    assert summary["failures"] == [{"path": "photos/a/4.png", "error": "no such file"}]
    sizes = unpacked(content(Path("atlas.html").read_text(encoding="utf-8"))["thumbnails"]["sizes"], "<u2")
    assert list(np.flatnonzero(sizes.reshape(-1, 2)[:, 0] == 0)) == [4]


def test_relative_paths_begin_here_or_beside_the_table_or_at_root(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = here / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert run("../e.parquet", "-o", "beside.html").exit_code == 0
    Path("../e.parquet").rename("e.parquet")
    lost = run("e.parquet", "-o", "lost.html")
    assert lost.exit_code == 1
    assert (
        "none of the photographs could be read, so all are grey. Run this where the table was made"
        in lost.stderr
    )
    assert run("e.parquet", "-o", "root.html", "--root", "..").exit_code == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["e.parquet", "-o", "map.png"],
            "map.png: the suffix '.png' is not known; expected one of .html, .htm",
        ),
        (["e.parquet", "-o", ""], ".: the suffix '' is not known; expected one of .html, .htm"),
        (["e.parquet", "-o", "e.html"], "e.html exists; choose another name, or give --overwrite"),
        (["e.parquet", "--table", "c.txt"], "c.txt: the suffix '.txt' is not known; expected one of .csv"),
        (["photos"], "photos is a folder; expected a table"),
        (["none.parquet"], "none.parquet: no such file; expected a table written by dinokit embed"),
        (["e.parquet", "--root", "nowhere"], "--root nowhere: no such folder"),
        (["e.parquet", "--clusters", "99"], "99 is not in the range 1<=x<=24"),
        (["e.parquet", "--layout", "tsn"], "'tsn' is not one of"),
    ],
)
def test_wrong_usage(here: Path, args: list[str], message: str) -> None:
    Path("e.html").write_text("mine")
    result = run(*args)
    assert result.exit_code == 2
    assert message in result.stderr.replace("\n", " ")
    assert Path("e.html").read_text() == "mine" and not Path("atlas.html").exists()


def test_a_table_without_embeddings_or_damaged(here: Path) -> None:
    Path("bad.parquet").write_bytes(b"PAR1 no PAR1")
    result = run("bad.parquet")
    assert result.exit_code == 3 and "is not a table of embeddings, or it is damaged" in result.stderr
    table = table_of(["a.png"], np.full((1, 4), np.nan, np.float32), [None], ["gone"])
    write_embeddings(Path("none.parquet"), lambda: iter([table]), 1, {"embed_dim": 4})
    result = run("none.parquet")
    assert result.exit_code == 3 and "there is nothing to draw a map of" in result.stderr


def test_the_files_of_the_page_are_installed() -> None:
    import tomllib

    settings = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools = settings["tool"]["setuptools"]
    assert "dinokit.atlas" in setuptools["packages"]
    assert setuptools["package-data"]["dinokit.atlas"] == ["page.*"]


def test_one_photograph_is_one(tmp_path: Path, photos: Path) -> None:
    table = table_of([photos / "coffee.jpg"], groups(1, 1), [(600, 400)], [None])
    write_embeddings(tmp_path / "one.parquet", lambda: iter([table]), 1, {"embed_dim": 32})
    result = CliRunner().invoke(
        cli, ["atlas", str(tmp_path / "one.parquet"), "-o", str(tmp_path / "one.html")]
    )
    assert result.exit_code == 0 and result.stderr.startswith("1 photograph in 1 cluster; ")
