"""Large JPEGs decoded at a part of their size: where, how far from the whole, and what a table says of it."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import time
from pathlib import Path
from typing import Any

import fake_engine
import numpy as np
import pytest
from click.testing import CliRunner, Result
from fake_engine import FakeEngine
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import SearchIndex, load_backbone, read_embeddings
from dinokit.cli import cli
from dinokit.errors import UsageError
from dinokit.features.backbone import Backbone
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.bands import Bands, decode_picture_with_extent
from dinokit.pictures.images import Extent, open_image
from dinokit.pictures.preprocess import Preprocessing
from dinokit.tables.origin import differing_space, origin_of
from dinokit.tables.run import Interrupted, embed_to_table, parts_folder

PREPROCESSING = Preprocessing(resize_px=37, crop_px=(32, 32))  # as the model's own; least_px is 74


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, list(args))


def backbone_of(*, reduced: bool, engine: Any = None) -> Backbone:
    return fake_engine.backbone_of(engine, reduced_decoding=reduced)


def jpeg(width: int, height: int, *, seed: int = 0, orientation: int | None = None) -> bytes:
    """Smooth as a large photograph is, with a little noise."""
    file, exif = io.BytesIO(), Image.Exif()
    if orientation is not None:
        exif[0x0112] = orientation
    small = picture(24, 18, seed=seed)
    small.resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=92, exif=exif)
    return file.getvalue()


def large_photos(count: int, folder: str = "photos") -> list[Path]:
    Path(folder).mkdir(exist_ok=True)
    paths = [Path(folder) / f"{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        path.write_bytes(jpeg(641 + i, 479, seed=i))
    return paths


# -- which size


@pytest.mark.parametrize(
    ("short", "reduced"),
    [(73, 73), (147, 147), (148, 74), (295, 148), (296, 74), (591, 148), (592, 74), (5000, 625)],
)
def test_what_is_left_is_twice_the_resize_or_more(short: int, reduced: int) -> None:
    assert PREPROCESSING.least_px == 74
    image, extent = decode_picture_with_extent(jpeg(short + 8, short), 3, least_px=PREPROCESSING.least_px)
    assert min(image.size) == reduced and extent.size == (short + 8, short)


def test_both_sides_of_a_squashed_picture_are_large_enough() -> None:
    assert Preprocessing(resize_px=(32, 64), crop_px=(32, 64)).least_px == 128
    assert Preprocessing().with_image_size(448).least_px == 2 * Preprocessing().least_px == 1024


@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_size_is_that_of_the_upright_picture(orientation: int) -> None:
    data = jpeg(641, 479, orientation=orientation)
    image, extent = decode_picture_with_extent(data, 3, least_px=74)
    whole = open_image(data)
    assert extent.size == whole.size and image.size == tuple(-(-side // 4) for side in whole.size)


def test_other_pictures_come_whole() -> None:
    file = io.BytesIO()
    picture(400, 300).save(file, "PNG")
    for source in (file.getvalue(), picture(400, 300), np.asarray(picture(400, 300))):
        image, extent = decode_picture_with_extent(source, 3, least_px=74)
        assert image.size == extent.size == (400, 300)
    bands = Bands.of(np.zeros((300, 400, 5), np.uint8))
    five = Preprocessing(resize_px=37, crop_px=(32, 32), mean=(0.5,) * 5, std=(0.2,) * 5)
    np.testing.assert_array_equal(five.crop(bands, Extent(bands.size, (0, 0, 400, 300))), five.crop(bands))


# -- what becomes of it


@pytest.mark.parametrize("size", [(641, 479), (1003, 475), (479, 1003)])
@pytest.mark.parametrize("orientation", [None, *range(2, 9)])
@pytest.mark.parametrize("resize_px", [37, (34, 40)])
def test_the_same_part_is_cut_and_hardly_differs(
    size: tuple[int, int], orientation: int | None, resize_px: Any
) -> None:
    preprocessing = Preprocessing(resize_px=resize_px, crop_px=(32, 32))
    data = jpeg(*size, orientation=orientation)
    image, extent = decode_picture_with_extent(data, 3, least_px=preprocessing.least_px)
    assert image.size != extent.size
    whole = preprocessing.crop(open_image(data)).astype(int)
    difference = np.abs(preprocessing.crop(image, extent) - whole)
    assert difference.mean() < 1.5, difference.mean()
    # A crop that lay a pixel off would differ by more.
    off = np.abs(np.roll(whole, 1, axis=1) - whole)[:, 1:]
    assert difference.mean() < off.mean() / 2


def test_every_way_into_a_backbone_decodes_alike() -> None:
    data = jpeg(641, 479)
    Path("a.jpg").write_bytes(data)
    exact, reduced = backbone_of(reduced=False), backbone_of(reduced=True)
    vector = reduced.embed("a.jpg")
    assert 0 < np.abs(vector - exact.embed("a.jpg")).max() < 0.05
    assert (exact.least_px, reduced.least_px) == (None, 74)
    for images in (Path("a.jpg"), data, io.BytesIO(data)):
        np.testing.assert_array_equal(reduced.embed(images), vector)
    for several in (["a.jpg", data, io.BytesIO(data)], "*.jpg"):
        np.testing.assert_array_equal(reduced.embed(several), [vector] * (3 if several != "*.jpg" else 1))
    pixels = reduced.transform("a.jpg")
    image, extent = decode_picture_with_extent(data, 3, least_px=74)
    np.testing.assert_array_equal(
        pixels, reduced.preprocessing.normalise(reduced.preprocessing.crop(image, extent)[None])[0]
    )
    # A picture that somebody opened is theirs: it is taken whole, and not reduced under their hands.
    with Image.open("a.jpg") as opened:
        np.testing.assert_array_equal(reduced.embed(opened), exact.embed("a.jpg"))
        assert opened.size == (641, 479)


def test_it_is_loaded_pickled_and_off_by_default(model: str) -> None:
    assert load_backbone(model, device="cpu").reduced_decoding is False
    backbone = load_backbone(model, device="cpu", reduced_decoding=True)
    assert backbone.reduced_decoding is True
    assert pickle.loads(pickle.dumps(backbone)).reduced_decoding is True


# -- what a table says


def test_a_table_says_so_and_keeps_the_photographs_sizes(model: str) -> None:
    paths = large_photos(2)
    result = run("embed", "photos", "-m", model, "-o", "t.parquet", "--reduced-decoding")
    assert result.exit_code == 0, result.stderr
    assert "large JPEGs decoded reduced" in result.stderr
    table = read_embeddings("t.parquet")
    assert table.origin["reduced_decoding"] is True
    assert table.sizes == [(641, 479), (642, 479)]
    expected = load_backbone(model, device="cpu", reduced_decoding=True).embed(paths)
    np.testing.assert_allclose(table.embeddings, expected, atol=1e-5)
    assert run("embed", "photos", "-m", model, "-o", "e.parquet").exit_code == 0
    whole = read_embeddings("e.parquet")
    assert whole.origin["reduced_decoding"] is False
    assert not np.array_equal(table.embeddings, whole.embeddings)


def test_one_table_holds_one_kind_only() -> None:
    paths = large_photos(3)
    time.sleep(0.1)  # what changed within a twentieth of a second of the start counts as changed
    embed_to_table(paths[:2], "t.parquet", backbone_of(reduced=False))
    for update, pictures in ((False, paths[:2]), (True, paths)):
        with pytest.raises(
            UsageError, match=r"reduced_decoding=False; now .*reduced_decoding=True.*--overwrite"
        ):
            embed_to_table(pictures, "t.parquet", backbone_of(reduced=True), update=update)
    assert embed_to_table(paths, "t.parquet", backbone_of(reduced=False), update=True).kept == 2
    # A table from before there was the choice is of whole pictures.
    before = {k: v for k, v in origin_of(backbone_of(reduced=False)).items() if k != "reduced_decoding"}
    from dinokit.tables.parts import other_vectors

    assert other_vectors(before, origin_of(backbone_of(reduced=False))) == ""
    assert "reduced_decoding" in other_vectors(before, origin_of(backbone_of(reduced=True)))
    assert differing_space(before, origin_of(backbone_of(reduced=True))) == []  # but they may be compared


class Stopped(FakeEngine):
    def run(self, *args: Any) -> Any:
        if len(self.shapes) == 1:
            raise KeyboardInterrupt
        return super().run(*args)


def test_an_interrupted_run_is_not_continued_with_the_other() -> None:
    paths = large_photos(3)
    with pytest.raises(Interrupted):
        embed_to_table(paths, "t.parquet", backbone_of(reduced=True, engine=Stopped()), batch_size=1)
    assert parts_folder(Path("t.parquet")).is_dir()
    with pytest.raises(
        UsageError, match=r"interrupted run.*reduced_decoding=True; now .*reduced_decoding=False"
    ):
        embed_to_table(paths, "t.parquet", backbone_of(reduced=False), batch_size=1)
    assert embed_to_table(paths, "t.parquet", backbone_of(reduced=True), batch_size=1).resumed


def test_search_and_knn_make_photographs_as_the_table_was(model: str) -> None:
    for label in ("cat", "dog"):
        large_photos(2, f"labelled-{label}")
        Path("labelled").mkdir(exist_ok=True)
        Path(f"labelled-{label}").rename(f"labelled/{label}")
    assert run("embed", "labelled", "-m", model, "-o", "t.parquet", "--reduced-decoding").exit_code == 0
    index = SearchIndex.read("t.parquet")
    assert index.load_backbone(device="cpu").reduced_decoding is True
    shutil.copy("labelled/cat/0.jpg", "new.jpg")
    result = run("knn", "--reference", "t.parquet", "new.jpg", "-m", model, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["rows"][0]["similarities"][0] == pytest.approx(1, abs=1e-6)
    for sides in (("new.jpg", "--against", "t.parquet"), ("t.parquet", "--against", "new.jpg")):
        result = run("duplicates", *sides, "-m", model, "--json", "--threshold", "0.9999999")
        assert json.loads(result.stdout)["rows"][0]["similarity"] == pytest.approx(1, abs=1e-6), result.stderr
    # Tables of both kinds may be compared.
    assert run("embed", "labelled", "-m", model, "-o", "e.parquet").exit_code == 0
    assert run("knn", "--reference", "e.parquet", "t.parquet").exit_code == 0
    result = run("duplicates", "labelled", "-m", model, "--reduced-decoding", "--json")
    assert result.exit_code == 0, result.stderr
