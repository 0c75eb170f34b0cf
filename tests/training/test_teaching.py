"""`distill_pictures`: each frozen teacher teaches pictures of its own; against plain means, then whole runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from pico_vit import PICO
from small_models import config_for, picture, random_weights

from dinokit.cli import cli as main
from dinokit.errors import UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.training.devices.pieces import as_many_pieces
from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.assignment import Teaching, weigh
from dinokit.training.objectives.losses import Relations
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.trainer import train
from dinokit.training.views.data import CropLoader
from dinokit.training.views.pictures import collect_pictures

SMALL = [
    f"arch={PICO}",
    "global_crop_px=32",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "queue_length=16",
    "batch_size=4",
    "warmup_epochs=0",
    "loss=relations",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "log_every_steps=1",
    "tensorboard=false",
]
ALONE = Processes(torch.device("cpu"))


def recipe_of(teachers: str, pictures: str | None, *settings: str) -> Recipe:
    own = [] if pictures is None else [f"distill_pictures={pictures}"]
    return with_overrides(load_recipe("distill"), [*SMALL, f"distill_from={teachers}", *own, *settings])


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return write_model_folder(folder, config_for(), random_weights()).path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four of plants and four of cars."""
    folder = tmp_path_factory.mktemp("photos")
    for name in ("plants", "cars"):
        (folder / name).mkdir()
        for i in range(4):
            picture(seed=i + 10 * (name == "cars")).save(folder / name / f"{i}.png")
    return folder


# -- who teaches


def test_those_that_teach_a_picture_count_alike_and_the_others_not() -> None:
    teaching = Teaching(recipe_of("[a, b, b, c]", '[null, "*/plants/*", "*/plants/*", "*.jpg"]'))
    assert teaching.weights("x/cars/1.png") == (4, 0, 0, 0)
    assert teaching.weights("x/plants/1.png") == pytest.approx((4 / 3, 4 / 3, 4 / 3, 0))
    assert teaching.weights("x/cars/1.jpg") == (2, 0, 0, 2)
    assert teaching.weights("x/plants/1.jpg") == (1, 1, 1, 1)
    assert teaching.weights("plants/1.png")[1] > 0  # where the names begin there
    assert teaching.weights("implants/1.png")[1] == 0
    assert teaching.weights("x/plants/1.JPG")[3] == 0  # a name is what it is on every system


def test_a_pattern_is_written_with_slashes_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sep", "\\")
    teaching = Teaching(recipe_of("[a, b]", '[null, "*/plants/*"]'))
    assert teaching.weights("x\\plants\\1.png") == (1, 1)


def test_a_picture_that_none_teaches_is_named(photos: Path) -> None:
    teaching = Teaching(recipe_of("[a, b]", '["*/plants/*", "*/plants/1*"]'))
    with pytest.raises(UsageError, match=r"leaves .*cars/0\.png without a teacher"):
        teaching.check(collect_pictures([photos]))


def test_a_pattern_that_fits_no_picture_is_named(photos: Path) -> None:
    teaching = Teaching(recipe_of("[a, b, c]", '[null, "*/cars/*", "*/plant/*"]'))
    with pytest.raises(UsageError, match=r"'\*/plant/\*' for c matches none of 8 pictures; .*cars/0\.png"):
        teaching.check(collect_pictures([photos]))
    Teaching(recipe_of("[a, b, c]", '[null, "*/cars/*", "*/plants/3*"]')).check(collect_pictures([photos]))


# -- what it makes of the targets


def teachers_directions(*shape: int, widths: list[int], seed: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(*shape, width, generator=g), dim=-1) for width in widths]


def side_by_side(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(parts, dim=-1) / len(parts) ** 0.5


def test_the_target_is_the_mean_of_the_cosines_of_those_that_teach() -> None:
    """A picture of each kind, against the loss of those teachers alone."""
    widths = [3, 2, 4]
    who = [[0, 1, 2], [1], [0, 2]]
    weights = torch.tensor([[1.0, 1, 1], [0, 3, 0], [1.5, 0, 1.5]])
    earlier = teachers_directions(1, 5, widths=widths, seed=1)
    targets = teachers_directions(2, 3, widths=widths, seed=2)
    student, earlier_student = (
        torch.randn(2, n, 6, generator=torch.Generator().manual_seed(seed)) for n, seed in ((3, 3), (5, 4))
    )

    def cost(taught_by: list[int], b: slice, weights: torch.Tensor | None = None) -> float:
        kept = side_by_side([earlier[i] for i in taught_by])
        loss = Relations(kept.shape[-1], 6, 0.2, 0.1, 8, ALONE, same_view=True)
        loss(earlier_student, kept)
        loss.remember(kept)
        asked = side_by_side([targets[i][:, b] for i in taught_by])
        if weights is not None:
            asked = weigh(asked, weights[b], [widths[i] for i in taught_by])
        return float(loss(student[:, b], asked))

    everyone = who[0]
    weighed = [cost(everyone, slice(b, b + 1), weights) for b in range(3)]
    alone = [cost(who[b], slice(b, b + 1)) for b in range(3)]
    assert weighed == pytest.approx(alone, rel=1e-5)
    assert len({round(c, 3) for c in weighed}) == 3
    assert cost(everyone, slice(0, 3), weights) == pytest.approx(sum(weighed) / 3, rel=1e-5)


def test_products_with_plain_targets_are_weighted_means() -> None:
    widths = [3, 2]
    ours, theirs = (teachers_directions(1, 4, widths=widths, seed=seed) for seed in (1, 2))
    weights = torch.tensor([[1.0, 1], [2, 0], [0, 2], [1, 1]])
    found = weigh(side_by_side(ours), weights, widths)[0] @ side_by_side(theirs)[0].T
    first, second = (o[0] @ t[0].T for o, t in zip(ours, theirs, strict=True))
    torch.testing.assert_close(found[0], (first[0] + second[0]) / 2)
    torch.testing.assert_close(found[1], first[1])
    torch.testing.assert_close(found[2], second[2])


# -- how it comes to the step


@pytest.mark.parametrize("crops", ["pillow", "batched"])
def test_weights_come_with_the_pictures_that_can_be_read(photos: Path, tmp_path: Path, crops: str) -> None:
    (tmp_path / "cars").mkdir()
    (tmp_path / "cars" / "broken.png").write_bytes(b"no picture")
    recipe = recipe_of("[a, b]", '[null, "*/plants/*"]', f"crops={crops}", "batch_size=9", "epochs=1")
    pictures = collect_pictures([photos, tmp_path])
    loader = CropLoader(pictures, recipe)
    (batch,) = loader
    assert len(batch.unreadable) == 1 and batch.n_images == 8
    assert batch.teaching is not None and batch.teaching.dtype == torch.float32
    (numbers,) = loader.loader.batch_sampler
    names = [pictures.name(number) for _, number in numbers]
    expected = [[1, 1] if "plants" in name else [2, 0] for name in names if "broken" not in name]
    assert batch.teaching.tolist() == expected
    first, second = as_many_pieces([batch], 2)
    assert torch.equal(torch.cat([first.teaching, second.teaching]), batch.teaching)


def losses_of(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_taught_by_all_is_as_without(teacher: Path, photos: Path, tmp_path: Path) -> None:
    both = f"[{teacher}, hog]"
    plain = train([photos], tmp_path / "plain", recipe_of(both, None, "epochs=3"))
    named = train([photos], tmp_path / "named", recipe_of(both, "['*.png', null]", "epochs=3"))
    ours, theirs = named.student.state_dict(), plain.student.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    train([photos], tmp_path / "own", recipe_of(both, "[null, '*/cars/*']", "epochs=3"))
    assert (
        losses_of(tmp_path / "own")[1] != losses_of(tmp_path / "plain")[1]
    )  # at the first the queue is empty


def test_pieces_give_the_whole_batch(teacher: Path, photos: Path, tmp_path: Path) -> None:
    own = (f"[{teacher}, hog]", "[null, '*/cars/*']", "epochs=3", "batch_size=8")
    whole = train([photos], tmp_path / "whole", recipe_of(*own))
    cut = train([photos], tmp_path / "cut", recipe_of(*own, "accumulate=4"))
    assert losses_of(tmp_path / "cut") == pytest.approx(losses_of(tmp_path / "whole"), rel=1e-4)
    # What others are compared with has each teacher's part, whoever taught it.
    kept = whole.loss.queue
    assert int(whole.loss.n_queued) >= len(kept)
    torch.testing.assert_close(cut.loss.queue, kept)
    for part in kept.split(whole.frozen_teachers.widths, dim=1):
        torch.testing.assert_close(part.norm(dim=1), torch.full((len(kept),), 0.5**0.5))


# -- what cannot be


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["distill_pictures=[null]"], "names pictures for 1 teachers, and distill_from has 2"),
        (["distill_pictures=[null, 3]"], r"must be a list with a pattern of picture names, or null"),
        (["distill_pictures='*/plants/*'"], r"must be a list with a pattern"),
        (
            ["distill_pictures=[null, null]", "loss=info_nce"],
            "with loss=info_nce the student predicts all",
        ),
        (["distill_pictures=[null, null]", "loss=similarity"], "use loss=relations"),
    ],
)
def test_recipes_that_cannot_be(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of("[a, b]", None, *settings)


def test_without_teachers_it_says_what_is_missing() -> None:
    with pytest.raises(UsageError, match="names pictures for 2 teachers, and distill_from has 0"):
        with_overrides(load_recipe("distill"), ["loss=relations", "distill_pictures=[null, null]"])


def test_the_command(teacher: Path, photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = ["train", str(photos), "-o", str(run), "--recipe", "distill", "--distill-from", str(teacher)]
    words += [
        "--distill-from",
        "hog",
        *(word for setting in [*SMALL, "epochs=1"] for word in ("--set", setting)),
    ]
    wrong = CliRunner().invoke(main, [*words, "--set", "distill_pictures=[null, '*/plant/*']"])
    assert wrong.exit_code == 2 and "matches none of 8 pictures" in wrong.output
    assert not run.exists()
    own = f"distill_pictures=[null, '{photos.as_posix()}/plants/*']"
    done = CliRunner().invoke(main, [*words, "--set", own])
    assert done.exit_code == 0, done.output
    record = (run / "model" / "training.json").read_text()
    assert json.loads(record)["runs"][-1]["recipe"]["distill_pictures"] == [None, "*/plants/*"]
    assert photos.as_posix() not in record  # no path of the machine
    assert "distill_pictures" in (run / "model" / "README.md").read_text(encoding="utf-8")
