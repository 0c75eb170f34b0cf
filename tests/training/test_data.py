"""Pictures to batches of crops: sources, order, randomness, and what cannot be read."""

from __future__ import annotations

import io
import itertools
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
import pyarrow as pa
import pyarrow.parquet as pq

from dinokit.errors import UsageError
from dinokit.training.recipe import Recipe
from dinokit.training.views.augment import DRAW_DTYPE, MultiCrop, random_crop_box
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.pictures import collect_pictures

RECIPE = Recipe(
    global_crop_px=32, local_crop_px=16, n_local_crops=3, patch_size=16, batch_size=4, epochs=3, workers=0
)


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        path = tmp_path / "photos" / f"sub {i % 2}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(i))
    return tmp_path / "photos"


def batches(folder: Path, recipe: Recipe = RECIPE, first_step: int = 0) -> list[Batch]:
    loader = CropLoader(collect_pictures([folder]), recipe, first_step=first_step)
    found = list(loader)
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


def test_shapes_and_number_of_batches(folder: Path) -> None:
    found = batches(folder)
    assert len(found) == 3 * 2  # 10 pictures, batches of 4, the rest of each epoch is left out
    assert found[0].global_crops.shape == (2, 4, 3, 32, 32) and found[0].global_crops.dtype == torch.uint8
    assert found[0].local_crops is not None and found[0].local_crops.shape == (3, 4, 3, 16, 16)


def test_a_run_that_goes_on_sees_what_it_would_have_seen(folder: Path) -> None:
    whole, rest = batches(folder), batches(folder, first_step=3)
    assert len(rest) == 3
    for before, after in zip(whole[3:], rest, strict=True):
        assert torch.equal(before.global_crops, after.global_crops)
        assert torch.equal(before.local_crops, after.local_crops)  # type: ignore[arg-type]


def test_workers_do_not_change_the_crops(folder: Path) -> None:
    from dataclasses import replace

    for alone, shared in zip(batches(folder), batches(folder, replace(RECIPE, workers=2)), strict=True):
        assert torch.equal(alone.global_crops, shared.global_crops)


def test_epochs_have_different_orders_and_crops(folder: Path) -> None:
    loader = CropLoader(collect_pictures([folder]), RECIPE).loader
    order = [[index for _, index in batch] for batch in loader.batch_sampler]  # type: ignore[union-attr]
    first, second = order[0] + order[1], order[2] + order[3]
    assert first != second and len(set(first)) == len(set(second)) == 8
    again, later = (loader.dataset[(epoch, 3)] for epoch in (0, 1))
    assert not np.array_equal(again[0], later[0])


def test_an_unreadable_picture_is_left_out_and_named(folder: Path) -> None:
    (folder / "sub 0" / "2.jpg").write_bytes(jpeg(2)[:300])
    from dataclasses import replace

    (batch,) = batches(folder, replace(RECIPE, batch_size=10, epochs=1))
    assert batch.n_images == 9
    assert len(batch.unreadable) == 1 and "2.jpg" in batch.unreadable[0]


def test_tar_and_parquet_give_the_same_pictures_as_files(tmp_path: Path) -> None:
    encoded = [jpeg(i) for i in range(5)]
    with tarfile.open(tmp_path / "000000.tar", "w") as tar:
        for i, data in enumerate(encoded):
            for name, content in ((f"{i:06}.jpg", data), (f"{i:06}.cls", b"3")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    pq.write_table(pa.table({"image": encoded, "label": list(range(5))}), tmp_path / "plain.parquet")
    rows = [{"bytes": data, "path": None} for data in encoded]
    pq.write_table(pa.table({"image": rows}), tmp_path / "hf.parquet")
    for name in ("000000.tar", "plain.parquet", "hf.parquet"):
        pictures = collect_pictures([tmp_path / name])
        assert [pictures.read(i) for i in range(len(pictures))] == encoded, name
    together = collect_pictures([tmp_path / "000000.tar", tmp_path / "plain.parquet"])
    assert [together.read(i) for i in range(10)] == encoded * 2
    assert together.name(7).endswith("plain.parquet::2")
    assert len(collect_pictures([tmp_path])) == 15  # a folder of shards


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        collect_pictures([tmp_path / "empty"])
    pq.write_table(pa.table({"number": [1]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="no column of pictures"):
        collect_pictures([tmp_path / "other.parquet"])
    (tmp_path / "broken.tar").write_bytes(b"no tar at all")
    with pytest.raises(UsageError, match="uncompressed tar"):
        collect_pictures([tmp_path / "broken.tar"])


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (30, 900), (1, 1)])
def test_boxes_lie_inside_and_have_the_stated_share(size: tuple[int, int]) -> None:
    rng, (width, height) = random.Random(0), size
    shares, aspects = [], []
    for _ in range(500):
        left, top, right, bottom = random_crop_box(size, (0.25, 0.6), rng)
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
        shares.append((right - left) * (bottom - top) / (width * height))
        aspects.append((right - left) / (bottom - top))
    if min(size) > 100:
        assert 0.24 < min(shares) < 0.27 and 0.58 < max(shares) < 0.61
        assert 0.74 < min(aspects) < 0.78 and 1.28 < max(aspects) < 1.35


def test_boxes_have_the_distribution_of_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    rng, size = random.Random(1), (400, 300)
    blank = torch.zeros(3, 300, 400)
    torch.manual_seed(1)
    theirs = np.array(
        [transforms.RandomResizedCrop.get_params(blank, (0.05, 0.4), (3 / 4, 4 / 3)) for _ in range(4000)]
    )
    boxes = np.array([random_crop_box(size, (0.05, 0.4), rng) for _ in range(4000)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.06)


def test_the_jitter_equals_torchvision_in_any_order() -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    from dinokit.training.views.augment import Draw, make_view

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24, 3), dtype=np.uint8))
    factors = (1.3, 0.7, 1.1, 0.07)
    steps = [
        functional.adjust_brightness,
        functional.adjust_contrast,
        functional.adjust_saturation,
        functional.adjust_hue,
    ]
    for order in itertools.permutations(range(4)):
        expected = image
        for step in order:
            expected = steps[step](expected, factors[step])
        draw = Draw((0, 0, 24, 24), False, True, factors, order, False, 0.0, False)  # type: ignore[arg-type]
        np.testing.assert_array_equal(make_view(image, 24, draw), np.asarray(expected))


def test_draws_have_the_probabilities_and_ranges_of_the_reference() -> None:
    rng, recipe = random.Random(2), Recipe(blur_radius_px=(0.1, 2.0))
    draws = [MultiCrop(recipe).draw((400, 300), rng)[:3] for _ in range(4000)]
    blurs, solarizes = (1.0, 0.1, 0.5), (0.0, 0.2, 0.0)
    for view, blur, solarize in zip(range(3), blurs, solarizes, strict=True):
        table = np.array([draw[view] for draw in draws], DRAW_DTYPE)
        # 4000 draws: four standard deviations are at most 0.032.
        assert table["flip"].mean() == pytest.approx(0.5, abs=0.032)
        assert table["jitter"].mean() == pytest.approx(0.8, abs=0.032)
        assert table["grey"].mean() == pytest.approx(0.2, abs=0.032)
        assert (table["blur_px"] > 0).mean() == pytest.approx(blur, abs=0.032 if blur < 1 else 0)
        assert table["solarize"].mean() == pytest.approx(solarize, abs=0.032 if solarize else 0)
        jittered = table[table["jitter"]]
        ranges = ((0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1))
        for factor, (low, high) in zip(jittered["factors"].T, ranges, strict=True):
            assert distance((factor - low) / (high - low), np.random.default_rng(0).random(20_000)) < 0.04
        blurred = table["blur_px"][table["blur_px"] > 0]
        assert distance((blurred - 0.1) / 1.9, np.random.default_rng(0).random(20_000)) < 0.1
        _, counts = np.unique(jittered["order"], axis=0, return_counts=True)
        assert len(counts) == 24 and counts.min() > 90 and counts.max() < 180  # 133 expected


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Kolmogorov and Smirnov's: the largest difference of the two cumulative distributions."""
    values = np.sort(np.concatenate([a, b]))
    cumulative = [np.searchsorted(np.sort(x), values, side="right") / len(x) for x in (a, b)]
    return float(np.abs(cumulative[0] - cumulative[1]).max())


def test_draws_stay_what_they_are_from_version_to_version() -> None:
    # A run must go on with the crops it began with.
    first = MultiCrop(RECIPE).draw((56, 40), random.Random("0/1/3"))[0]
    assert first[:3] == ((19, 0, 47, 37), True, True) and first[4:6] == ((0, 3, 2, 1), False)
    assert first.factors == pytest.approx((0.61244094, 0.67721505, 1.17228953, -0.03279814))
    assert (first.blur_px, first.solarize) == (pytest.approx(1.48777274), False)


def test_views_depend_on_the_seed_alone() -> None:
    image = Image.open(io.BytesIO(jpeg(1))).convert("RGB")
    crops = MultiCrop(RECIPE)
    first, again, other = (crops(image, random.Random(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
