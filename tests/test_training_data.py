"""Pictures to batches of crops: sources, order, randomness, and what cannot be read."""

from __future__ import annotations

import io
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
from dinokit.training.augment import MultiCrop, random_crop_box
from dinokit.training.data import Batch, CropLoader, find_pictures
from dinokit.training.recipe import Recipe

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
    loader = CropLoader(find_pictures([folder]), recipe, first_step=first_step)
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
    loader = CropLoader(find_pictures([folder]), RECIPE).loader
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
        pictures = find_pictures([tmp_path / name])
        assert [pictures.read(i) for i in range(len(pictures))] == encoded, name
    together = find_pictures([tmp_path / "000000.tar", tmp_path / "plain.parquet"])
    assert [together.read(i) for i in range(10)] == encoded * 2
    assert together.name(7).endswith("plain.parquet::row 2")
    assert len(find_pictures([tmp_path])) == 15  # a folder of shards


def test_sources_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty"):
        find_pictures([tmp_path / "empty"])
    pq.write_table(pa.table({"picture": [b"x"]}), tmp_path / "other.parquet")
    with pytest.raises(UsageError, match="no column 'image'"):
        find_pictures([tmp_path / "other.parquet"])
    (tmp_path / "broken.tar").write_bytes(b"no tar at all")
    with pytest.raises(UsageError, match="uncompressed tar"):
        find_pictures([tmp_path / "broken.tar"])


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


def test_each_operation_of_the_jitter_equals_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    from dinokit.training import augment

    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8))

    class Fixed(random.Random):
        """Draws 1.3, 0.7, 1.1 and 0.07 and keeps the order of the operations."""

        draws = iter((1.3, 0.7, 1.1, 0.07))

        def uniform(self, a: float, b: float) -> float:
            value = next(self.draws)
            assert a <= value <= b
            return value

        def shuffle(self, x: object) -> None:  # type: ignore[override]
            pass

    expected = functional.adjust_brightness(image, 1.3)
    expected = functional.adjust_contrast(expected, 0.7)
    expected = functional.adjust_saturation(expected, 1.1)
    expected = functional.adjust_hue(expected, 0.07)
    np.testing.assert_array_equal(np.asarray(augment._jitter(image, Fixed())), np.asarray(expected))


def test_views_depend_on_the_seed_alone() -> None:
    image = Image.open(io.BytesIO(jpeg(1))).convert("RGB")
    crops = MultiCrop(RECIPE)
    first, again, other = (crops(image, random.Random(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first[0], again[0])
    assert not np.array_equal(first[0], other[0])
