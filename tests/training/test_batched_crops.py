"""Crops made a batch at once, held against Pillow and torchvision: resize, colours, whole views, distributions."""

from __future__ import annotations

import contextlib
import io
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter, ImageOps

torch = pytest.importorskip("torch")

from pico_vit import PICO

from dinokit.errors import UsageError
from dinokit.training import trainer
from dinokit.training.recipe import Recipe, with_overrides
from dinokit.training.views import batched_crops
from dinokit.training.views.augment import DRAW_DTYPE, Draw, MultiCrop, make_view
from dinokit.training.views.batched_colour import apply_colours
from dinokit.training.views.batched_crops import draw_picture, join, make_crops
from dinokit.training.views.data import Batch, CropLoader, _is_batched
from dinokit.training.views.pictures import collect_pictures
from dinokit.training.views.resample import _rows_first, crop_and_resize, resize_matrices

CPU = torch.device("cpu")
RECIPE = Recipe(
    global_crop_px=48, local_crop_px=16, n_local_crops=3, batch_size=4, epochs=2, workers=0, crops="batched"
)
NOTHING = Draw((0, 0, 32, 32), False, False, (1.0, 1.0, 1.0, 0.0), (0, 1, 2, 3), False, 0.0, False)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def photographs(photos: Path) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(photos.glob("*.jpg"))]


def resized(
    images: list[Image.Image],
    which: list[int],
    boxes: list[tuple[int, ...]],
    flips: list[bool],
    size_px: int,
    *,
    chunk_px: int = 1 << 18,
) -> np.ndarray:
    """(V, S, S, 3) of box i in image ``which[i]``."""
    flat = torch.from_numpy(np.concatenate([np.asarray(image).reshape(-1, 3) for image in images]))
    starts = np.cumsum([0, *(image.width * image.height for image in images[:-1])])
    crops = crop_and_resize(
        flat,
        starts[which],
        np.array([images[i].width for i in which]),
        np.array(boxes),
        np.array(flips),
        size_px,
        chunk_px=chunk_px,
    )
    return crops.permute(0, 2, 3, 1).numpy()


def random_boxes(images: list[Image.Image], n: int, rng: random.Random) -> tuple[list[int], list[Any]]:
    """Boxes of any shape, from one pixel to the whole picture."""
    which = [rng.randrange(len(images)) for _ in range(n)]
    boxes = []
    for i in which:
        left, right = sorted(rng.sample(range(images[i].width + 1), 2))
        top, bottom = sorted(rng.sample(range(images[i].height + 1), 2))
        boxes.append((left, top, right, bottom))
    return which, boxes


# ------------------------------------------------------------------------------------------------- resize


@pytest.mark.parametrize("size_px", [16, 96, 224])
def test_the_resize_equals_pillows(size_px: int, photos: Path) -> None:
    rng = random.Random(size_px)
    sizes = [(400, 300), (130, 700), (640, 90), (33, 47), (7, 5), (1, 1)]
    images = photographs(photos) + [noise(*size) for size in sizes]
    which, boxes = random_boxes(images, 60, rng)
    # Exactly the crop's size in one direction or both, and whole pictures.
    which += [len(photographs(photos))] * 4
    boxes += [(3, 5, 3 + size_px, 5 + size_px), (0, 0, size_px, 200), (9, 0, 300, size_px), (0, 0, 400, 300)]
    flips = [rng.random() < 0.5 for _ in which]
    ours = resized(images, which, boxes, flips, size_px)
    for crop, i, box, flip in zip(ours, which, boxes, flips, strict=True):
        theirs = images[i].crop(box).resize((size_px, size_px), Image.Resampling.BICUBIC)
        theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else theirs
        apart = np.abs(crop - np.asarray(theirs, np.float64))
        assert apart.mean() <= 0.05 and apart.max() <= 3, (images[i].size, box)


def test_a_crop_does_not_depend_on_the_others(photos: Path) -> None:
    images = [*photographs(photos), noise(90, 400), noise(500, 60)]
    which, boxes = random_boxes(images, 24, random.Random(1))
    flips = [i % 2 == 0 for i in which]
    together = resized(images, which, boxes, flips, 40, chunk_px=1 << 30)
    for chunk_px in (1, 20_000):
        np.testing.assert_array_equal(together, resized(images, which, boxes, flips, 40, chunk_px=chunk_px))
    alone = resized([images[which[5]]], [0], [boxes[5]], [flips[5]], 40)
    np.testing.assert_array_equal(together[5], alone[0])


def test_sums_of_weights_and_bytes_fit_float32_exactly() -> None:
    # Which is why the order of summation, and with it the batch, the padding and the device, change nothing.
    for size_px in (16, 96, 224):
        lengths = np.array([1, 2, 7, size_px - 1, size_px, size_px + 1, 3 * size_px, 20 * size_px])
        steps = resize_matrices(lengths, size_px, device=CPU).double() * 2**15
        assert torch.equal(steps, steps.round())
        assert (steps.abs().sum(dim=2) * 255).max() < 2**24
        torch.testing.assert_close(
            steps.sum(dim=2) / 2**15, torch.ones(8, size_px, dtype=torch.float64), atol=6e-4, rtol=0
        )
        for matrix, length in zip(steps, lengths, strict=True):
            assert not matrix[:, length:].any()


def test_pixels_outside_the_box_do_not_count() -> None:
    pixels = np.full((60, 80, 3), 255, np.uint8)
    pixels[10:40, 20:55] = 7
    boxes = [(20, 10, 55, 40), (20, 10, 21, 40), (54, 39, 55, 40)]
    assert (resized([Image.fromarray(pixels)], [0, 0, 0], boxes, [False] * 3, 24) == 7).all()


def test_which_direction_comes_first_is_pillows(photos: Path) -> None:
    # Pillow before 13 shrinks the columns first but for extreme pictures; tried with 12.3.
    widths, heights = np.array([30, 30, 2, 50]), np.array([100, 20, 900, 60])
    assert _rows_first(widths, heights, 32, pillow=12).tolist() == [False, False, True, False]
    assert _rows_first(widths, heights, 32, pillow=13).tolist() == [True, False, True, False]


# ------------------------------------------------------------------------------------------------- colours


def coloured(images: list[Image.Image], draws: list[Draw]) -> np.ndarray:
    crops = torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
    return apply_colours(crops.float().contiguous(), np.array(draws, DRAW_DTYPE)).permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def squares() -> list[Image.Image]:
    """Noise, few colours with much black and white, grey, and smooth ramps."""
    rng = np.random.default_rng(3)
    extremes = rng.choice(np.array([0, 1, 127, 128, 254, 255], np.uint8), (32, 32, 3))
    grey = np.repeat(rng.integers(0, 256, (32, 32, 1), dtype=np.uint8), 3, axis=2)
    y, x = np.mgrid[:32, :32]
    ramps = np.stack([x * 8, y * 8, (x + y) * 4], axis=2).astype(np.uint8)
    return [noise(32, 32, 1), Image.fromarray(extremes), Image.fromarray(grey), Image.fromarray(ramps)] * 6


@pytest.mark.parametrize("operation", ["brightness", "contrast", "saturation", "hue"])
def test_each_operation_of_the_jitter_equals_torchvision(squares: list[Image.Image], operation: str) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    position = ["brightness", "contrast", "saturation", "hue"].index(operation)
    rng = random.Random(position)
    draws, expected = [], []
    for image in squares:
        factors = [1.0, 1.0, 1.0, 0.0]
        factors[position] = rng.uniform(-0.5, 0.5) if operation == "hue" else rng.uniform(0.2, 2.0)
        draws.append(NOTHING._replace(jitter=True, factors=tuple(factors)))  # type: ignore[arg-type]
        changed = getattr(functional, f"adjust_{operation}")(image, factors[position])
        # At factor 1 nothing changes, but that 8-bit HSV is not inverted exactly.
        expected.append(functional.adjust_hue(changed, 0.0) if operation != "hue" else changed)
    np.testing.assert_array_equal(coloured(squares, draws), np.stack([np.asarray(e) for e in expected]))


def test_grey_and_solarize_equal_torchvision(squares: list[Image.Image]) -> None:
    functional = pytest.importorskip("torchvision.transforms.functional")
    draws = [NOTHING._replace(grey=i % 2 == 0, solarize=i % 3 == 0) for i in range(len(squares))]
    expected = []
    for image, draw in zip(squares, draws, strict=True):
        if draw.grey:
            image = functional.to_grayscale(image, num_output_channels=3)
        expected.append(ImageOps.solarize(image, 128) if draw.solarize else image)
    np.testing.assert_array_equal(coloured(squares, draws), np.stack([np.asarray(e) for e in expected]))


@pytest.mark.parametrize("radii", [(0.1, 2.0), (2.0, 6.0)])
def test_the_blur_equals_pillows(squares: list[Image.Image], radii: tuple[float, float]) -> None:
    rng = random.Random(0)
    draws = [NOTHING._replace(blur_px=rng.uniform(*radii)) for _ in squares]
    expected = [
        np.asarray(image.filter(ImageFilter.GaussianBlur(draw.blur_px)), np.float64)
        for image, draw in zip(squares, draws, strict=True)
    ]
    apart = np.abs(coloured(squares, draws) - np.stack(expected))
    assert apart.mean() <= 0.1 and apart.max() <= 3


# ------------------------------------------------------------------------------------------------- whole views


def test_views_equal_pillows_given_the_same_draws(photos: Path) -> None:
    images = [*photographs(photos), noise(120, 90), noise(60, 200)]
    crops = MultiCrop(RECIPE)
    batch = join([draw_picture(im, crops, random.Random(i)) for i, im in enumerate(images)], [])
    global_crops, local_crops = make_crops(batch, 48, 16, CPU)
    assert local_crops is not None and global_crops.dtype == local_crops.dtype == torch.uint8
    apart = []
    for i, image in enumerate(images):
        theirs = crops(image, random.Random(i))
        for ours, expected in zip((global_crops, local_crops), theirs, strict=True):
            here = ours[:, i].permute(0, 2, 3, 1).numpy()
            assert expected is not None and here.shape == expected.shape
            apart.append(np.abs(here.astype(int) - expected.astype(int)).ravel())
    # Where the resize is one level apart, a turn of the hue in 8 bits can make more of it.
    whole = np.concatenate(apart)
    assert whole.mean() <= 0.05 and (whole > 3).mean() <= 1e-3 and whole.max() <= 25


def test_the_distribution_of_views_is_torchvisions(photos: Path) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    functional = pytest.importorskip("torchvision.transforms.functional")
    image, n = photographs(photos)[0], 400

    def blur(picture: Image.Image) -> Image.Image:
        if random.random() >= 0.5:
            return picture
        return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    reference = transforms.Compose(
        [
            transforms.RandomResizedCrop(16, (0.05, 0.4), interpolation=Image.Resampling.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            transforms.RandomGrayscale(0.2),
            blur,
            functional.pil_to_tensor,
        ]
    )
    torch.manual_seed(0), random.seed(0)
    theirs = torch.stack([reference(image) for _ in range(n)]).float()
    recipe = replace(RECIPE, n_local_crops=4, local_crops_scale=(0.05, 0.4))
    drawn = [draw_picture(image, MultiCrop(recipe), random.Random(i)) for i in range(n // 4)]
    _, ours = make_crops(join(drawn, []), 48, 16, CPU)
    assert ours is not None
    ours = ours.flatten(0, 1).float()
    measures = {
        "brightness": lambda x: x.mean((1, 2, 3)),
        "contrast": lambda x: x.std((1, 2, 3)),
        "saturation": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
        "red over blue": lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
        "sharpness": lambda x: (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3)),
        "left over right": lambda x: (x[..., :8] - x[..., 8:]).mean((1, 2, 3)),
    }
    for name, measure in measures.items():
        a, b = np.sort(measure(ours).numpy()), np.sort(measure(theirs).numpy())
        both = np.concatenate([a, b])
        steps = [np.searchsorted(x, both, side="right") / n for x in (a, b)]
        # Kolmogorov and Smirnov: equal distributions exceed 0.138 once in a thousand draws of 400.
        assert np.abs(steps[0] - steps[1]).max() < 0.138, name


def test_a_large_picture_is_shrunk_in_the_worker(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, crops = photographs(photos)[0], MultiCrop(RECIPE)
    whole = draw_picture(image, crops, random.Random(4))
    monkeypatch.setattr(batched_crops, "_LARGEST_PX", 1000)
    shrunk = draw_picture(image, crops, random.Random(4))
    assert len(shrunk.pixels) == 2 * 48**2 + 3 * 16**2 < len(whole.pixels) == image.width * image.height
    for name in set(DRAW_DTYPE.names or ()) - {"box"}:
        np.testing.assert_array_equal(shrunk.draws[name], whole.draws[name])
    # Both kinds in one batch.
    both = make_crops(join([shrunk, whole], []), 48, 16, CPU)
    for made in both:
        assert made is not None
        assert (made[:, 0].float() - made[:, 1].float()).abs().mean() < 0.05
    for j, draw in enumerate(crops.draw(image.size, random.Random(4))[:2]):
        theirs = make_view(image, 48, draw)
        assert np.abs(both[0][j, 0].permute(1, 2, 0).numpy().astype(int) - theirs.astype(int)).mean() < 0.05


# ------------------------------------------------------------------------------------------------- batches, runs


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(10):
        buffer = io.BytesIO()
        noise(56 + 4 * i, 90 - 5 * i, i).save(buffer, "JPEG")
        path = tmp_path / "photos" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return tmp_path / "photos"


def batches(folder: Path, recipe: Recipe, first_step: int = 0) -> list[Batch]:
    found = list(CropLoader(collect_pictures([folder]), recipe, first_step=first_step))
    assert all(isinstance(batch, Batch) for batch in found)
    return found  # type: ignore[return-value]


def test_batches_have_the_shapes_of_pillows(folder: Path) -> None:
    for n_local in (3, 0):
        recipe = replace(RECIPE, n_local_crops=n_local)
        for ours, theirs in zip(
            batches(folder, recipe), batches(folder, replace(recipe, crops="pillow")), strict=True
        ):
            assert ours.n_images == 4
            for a, b in ((ours.global_crops, theirs.global_crops), (ours.local_crops, theirs.local_crops)):
                if b is None:
                    assert a is None and n_local == 0
                    continue
                assert a is not None and a.shape == b.shape and a.dtype == b.dtype
                assert (a.float() - b.float()).abs().mean() < 0.2


def test_workers_batch_size_and_going_on_do_not_change_the_crops(folder: Path) -> None:
    whole = batches(folder, RECIPE)
    rest = batches(folder, RECIPE, first_step=2)
    by_workers = batches(folder, replace(RECIPE, workers=2))
    by_two = batches(folder, replace(RECIPE, batch_size=2))
    for before, after in [*zip(whole[2:], rest, strict=True), *zip(whole, by_workers, strict=True)]:
        assert torch.equal(before.global_crops, after.global_crops)
        assert torch.equal(before.local_crops, after.local_crops)  # type: ignore[arg-type]
    pair = torch.cat([by_two[0].global_crops, by_two[1].global_crops], dim=1)
    assert torch.equal(pair, whole[0].global_crops)


def test_an_unreadable_picture_is_left_out_and_named(folder: Path) -> None:
    (folder / "2.jpg").write_bytes(b"no picture")
    (batch,) = batches(folder, replace(RECIPE, batch_size=10, epochs=1))
    assert batch.n_images == 9 and batch.global_crops.shape[1] == 9
    assert len(batch.unreadable) == 1 and "2.jpg" in batch.unreadable[0]


def test_the_recipe_says_how_crops_are_made() -> None:
    cuda = torch.device("cuda", 0)
    assert _is_batched(Recipe(), cuda) and not _is_batched(Recipe(), CPU)
    assert not _is_batched(Recipe(crops="pillow"), cuda) and _is_batched(Recipe(crops="batched"), CPU)
    with pytest.raises(UsageError, match="crops='gpu' is not known; use one of auto, pillow, batched"):
        with_overrides(Recipe(), ["crops=gpu"])


def test_a_run_on_batched_crops_goes_on_bit_for_bit(tmp_path: Path, folder: Path) -> None:
    recipe = with_overrides(
        RECIPE,
        [
            f"arch={PICO}",
            "n_prototypes=16",
            "head_hidden_dim=16",
            "head_bottleneck_dim=8",
            "precision=fp32",
            "device=cpu",
            "warmup_epochs=0",
        ],
    )

    class Killed(Exception):
        pass

    class KilledAfterThree(trainer.Observer):
        def stepped(self, state: trainer.TrainingState, *_: Any) -> None:
            if state.step == 3:
                raise Killed

    whole = trainer.train([folder], tmp_path / "whole", recipe)
    with pytest.raises(Killed):
        trainer.train([folder], tmp_path / "cut", recipe, observer=KilledAfterThree())
    resumed = trainer.train([folder], tmp_path / "cut", recipe)
    assert whole.step == resumed.step == 4
    there = resumed.student.state_dict()
    assert all(torch.equal(value, there[name]) for name, value in whole.student.state_dict().items())


class _Stream:
    """Stands for a CUDA stream, and writes down what is asked of it."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def wait_stream(self, other: _Stream) -> None:
        self.said.append(f"{self.name} waits for {other.name}")


def test_the_training_waits_for_crops_made_beside_it_and_keeps_their_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []

    @contextlib.contextmanager
    def within(stream: _Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append(f"{stream.name} left")

    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: _Stream("training", said))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda crops, stream: said.append(f"{len(crops)} views kept")
    )
    plain = next(iter(CropLoader(collect_pictures([folder]), RECIPE)))
    loader = CropLoader(collect_pictures([folder]), RECIPE)
    loader.stream = _Stream("crops", said)  # type: ignore[assignment]
    batch = next(iter(loader))

    order = ["on crops", "crops left", "training waits for crops", "2 views kept", "3 views kept"]
    assert said == order
    assert isinstance(batch, Batch) and isinstance(plain, Batch)
    assert torch.equal(batch.global_crops, plain.global_crops)


@pytest.mark.gpu
def test_cuda_makes_the_crops_of_the_cpu(photos: Path) -> None:
    images = [*photographs(photos), noise(120, 90)]
    batch = join([draw_picture(im, MultiCrop(RECIPE), random.Random(i)) for i, im in enumerate(images)], [])
    for ours, theirs in zip(
        make_crops(batch, 48, 16, torch.device("cuda")), make_crops(batch, 48, 16, CPU), strict=True
    ):
        assert ours is not None and theirs is not None
        apart = (ours.cpu().float() - theirs.float()).abs()
        assert apart.mean() < 1e-3 and apart.max() <= 3
