"""`--distill-from hog`: the descriptor equals scikit-image's, beside other teachers and alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from pico_vit import PICO
from PIL import Image
from skimage import data
from skimage.feature import hog

from dinokit.cli import cli as main
from dinokit.errors import ModelError, UsageError
from dinokit.training.adapt import adapt
from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.frozen_teacher import (
    FrozenTeacher,
    FrozenTeachers,
    find_teachers,
    width_of,
)
from dinokit.training.distillation.oriented_gradients import OrientedGradients, oriented_gradients
from dinokit.training.objectives.targets import make_targets
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run import checkpoint

CPU = torch.device("cpu")
SMALL = [
    f"arch={PICO}",
    "global_crop_px=32",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "queue_length=16",
    "batch_size=2",
    "warmup_epochs=0",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "log_every_steps=1",
    "tensorboard=false",
]


def recipe_of(teachers: str, *settings: str) -> Recipe:
    return with_overrides(load_recipe("distill"), [*SMALL, f"distill_from={teachers}", *settings])


def grey(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32 in 0 to 1."""
    small = Image.fromarray(picture).convert("L").resize(size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(small, np.float32) / 255


# -- the descriptor


@pytest.mark.parametrize("size", [(96, 96), (48, 72), (240, 96)])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "coins"])
def test_it_is_scikit_images_where_6_divides_the_sides(name: str, size: tuple[int, int]) -> None:
    picture = grey(getattr(data, name)(), size)
    expected = hog(
        picture,
        orientations=9,
        pixels_per_cell=(size[0] // 6, size[1] // 6),
        cells_per_block=(2, 2),
        block_norm="L2-Hys",
    )
    found = oriented_gradients(torch.from_numpy(picture).unsqueeze(0)).squeeze(0).numpy()
    assert found.shape == (OrientedGradients.embed_dim,)
    assert expected.std() > 0.05
    np.testing.assert_allclose(found, np.sqrt(expected), atol=2e-5)


def test_it_says_the_same_at_another_size() -> None:
    def of(name: str, side: int) -> torch.Tensor:
        return oriented_gradients(torch.from_numpy(grey(getattr(data, name)(), (side, side))).unsqueeze(0))

    itself = of("astronaut", 96)
    assert (of("astronaut", 80) - itself).norm() < 0.4 * (of("coffee", 80) - itself).norm()


def test_an_even_picture_has_none() -> None:
    assert oriented_gradients(torch.full((2, 32, 48), 0.5)).abs().max() == 0


@pytest.mark.parametrize("size", [(5, 40), (1, 1), (2, 3)])
def test_pictures_of_fewer_pixels_than_cells(size: tuple[int, int]) -> None:
    found = oriented_gradients(torch.rand(2, *size, generator=torch.Generator().manual_seed(0)))
    assert found.shape == (2, 900)
    assert found.isfinite().all()


def test_the_students_normalisation_is_undone_and_colour_is_not_seen() -> None:
    recipe = recipe_of("hog", "mean=[0.1, 0.2, 0.3]", "std=[0.5, 0.4, 0.3]")
    pixels = torch.from_numpy(np.array(Image.fromarray(data.astronaut()).resize((96, 96)))).float() / 255
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    crops = ((pixels.permute(2, 0, 1) - mean) / std).expand(2, 3, 3, 96, 96)
    found = OrientedGradients(recipe, CPU)(crops)
    assert found.shape == (2, 3, 900)
    luma = pixels @ torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(found[1, 2], oriented_gradients(luma.unsqueeze(0))[0], atol=2e-3, rtol=0)
    as_grey = ((luma.expand(3, 96, 96) - mean) / std).expand(1, 1, 3, 96, 96)
    torch.testing.assert_close(OrientedGradients(recipe, CPU)(as_grey)[0, 0], found[0, 0], atol=2e-3, rtol=0)


def test_of_bands_it_sees_the_mean() -> None:
    recipe = recipe_of("hog", "channels=5")
    crops = torch.randn(1, 2, 5, 36, 36, generator=torch.Generator().manual_seed(0))
    teacher = OrientedGradients(recipe, CPU)
    torch.testing.assert_close(
        teacher(crops), teacher(crops.flip(2)), atol=2e-3, rtol=0
    )  # all have the same mean and std
    assert (teacher(crops) - teacher(crops[:, :, :1].expand_as(crops))).abs().max() > 0.1


# -- in the teacher's place


def test_beside_a_model_that_is_named_twice_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    found = find_teachers(recipe_of("[starter, hog, starter]"))
    assert width_of(found) == 192 + 900 + 192
    recipe, _ = adapt(recipe_of("[starter, hog, starter]"), 10, teacher_dim=width_of(found))
    teachers = FrozenTeachers(found, recipe, CPU)
    asked = []
    whole = FrozenTeacher.forward

    def counted(self: FrozenTeacher, crops: torch.Tensor) -> torch.Tensor:
        asked.append(crops.shape)
        return whole(self, crops)

    monkeypatch.setattr(FrozenTeacher, "forward", counted)
    crops = torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    embeddings = teachers(crops)
    assert len(asked) == 1
    first, second, third = embeddings.split(teachers.widths, dim=-1)
    assert torch.equal(first, third)
    assert torch.equal(second, OrientedGradients(recipe, CPU)(crops))
    # The cosine of two targets is the mean of the three: the model's counts twice.
    flat = make_targets(recipe, Processes(CPU), teachers.widths).targets(embeddings, 0.1).flatten(0, 1)
    model, edges = (torch.nn.functional.normalize(part, dim=-1).flatten(0, 1) for part in (first, second))
    torch.testing.assert_close(
        flat @ flat.T, (2 * model @ model.T + edges @ edges.T) / 3, atol=1e-5, rtol=1e-5
    )


def test_the_mean_is_taken_off_the_histograms_and_off_no_model_that_is_not_asked_for() -> None:
    """Nowhere below 0, any two of them would be alike; a model's embeddings are compared as k-NN compares them."""
    recipe, _ = adapt(recipe_of("[starter, hog, starter]"), 10, teacher_dim=192 + 900 + 192)
    teachers = FrozenTeachers(find_teachers(recipe), recipe, CPU)
    embeddings = teachers(torch.randn(2, 3, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    targets = make_targets(recipe, Processes(CPU), teachers.widths)
    mean = embeddings.flatten(0, 1).mean(dim=0)
    targets.update_with(mean / (1 - recipe.center_momentum))
    model, edges, again = targets.targets(embeddings, 0.1).split(teachers.widths, dim=-1)
    around = embeddings[..., 192:-192] - mean[192:-192]
    unit = torch.nn.functional.normalize
    torch.testing.assert_close(edges * 3**0.5, unit(around, dim=-1), atol=1e-4, rtol=0)
    torch.testing.assert_close(model * 3**0.5, unit(embeddings[..., :192], dim=-1))
    assert torch.equal(model, again)
    all_centred = make_targets(
        replace(recipe, target_normalisation="centering"), Processes(CPU), teachers.widths
    )
    all_centred.update_with(mean / (1 - recipe.center_momentum))
    assert (all_centred.targets(embeddings, 0.1)[..., :192] - model).abs().max() > 1e-3


def test_the_command_trains_by_it_alone_and_goes_on(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, name in enumerate(("astronaut", "coffee", "coins", "rocket")):
        Image.fromarray(getattr(data, name)()).convert("RGB").resize((64, 48)).save(photos / f"{i}.png")
    words = [
        "train",
        str(photos),
        "--recipe",
        "distill",
        "--distill-from",
        "hog",
        "-o",
        str(tmp_path / "run"),
    ]
    settings = [word for setting in SMALL for word in ("--set", setting)]
    explained = CliRunner().invoke(main, [*words, *settings, "--set", "epochs=1", "--explain"])
    assert explained.exit_code == 0, explained.output
    assert "n_prototypes: 900" in explained.output
    assert "the width of the embeddings of hog" in explained.output
    done = CliRunner().invoke(main, [*words, *settings, "--set", "epochs=2"])
    assert done.exit_code == 0, done.output
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(losses) == 4
    assert losses[0] == 0 < losses[-1]  # the queue was empty
    newest, _ = checkpoint.load_newest(tmp_path / "run" / "checkpoint")
    assert newest is not None and newest["frozen_teachers"] == "hog"
    record = json.loads((tmp_path / "run" / "model" / "training.json").read_text())
    assert record["runs"][-1]["recipe"]["distill_from"] == "hog"
    assert "hog" in (tmp_path / "run" / "model" / "README.md").read_text(encoding="utf-8")


def test_a_model_folder_of_that_name_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hog").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_teachers(recipe_of("hog")) == ["hog"]
    with pytest.raises(ModelError, match=r"\./hog is neither"):
        find_teachers(recipe_of("./hog"))


def test_the_width_of_the_head_is_its_own() -> None:
    with pytest.raises(UsageError, match="have width 900"):
        find_teachers(recipe_of("hog", "n_prototypes=64"))
    with pytest.raises(UsageError, match="or hog"):
        find_teachers(replace(load_recipe("distill"), distill_from=None))
