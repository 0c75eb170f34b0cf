"""`foreground_weight`: what stands out of a picture, held to scikit-image and scipy, and attention taught by it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from pico_vit import PICO
from PIL import Image
from scipy.spatial.distance import mahalanobis
from scipy.stats import entropy
from skimage import data
from skimage.color import rgb2lab

from dinokit.errors import TrainingError, UsageError
from dinokit.runtime.torch import forward_with_attention
from dinokit.training import trainer
from dinokit.training.monitoring.report import write_report
from dinokit.training.networks.network import build_network
from dinokit.training.objectives.foreground import Foreground, attention_kl, border_contrast
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import train, training_step

CPU = torch.device("cpu")
SETTINGS = [
    f"arch={PICO}",
    "global_crop_px=64",
    "local_crop_px=32",
    "n_local_crops=1",
    "n_prototypes=16",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "teacher_momentum=0.9",
    "warmup_teacher_temp=0.05",
    "teacher_temp=0.05",
    "epochs=2",
    "batch_size=4",
    "warmup_epochs=0",
    "optimizer=sgd",  # AdamW and clipping would hide gradients of another scale
    "lr=0.01",
    "clip_grad=0",
    "freeze_last_layer_epochs=0",
    "drop_path_rate=0.0",
    "log_every_steps=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "tensorboard=false",
    "foreground_weight=0.7",
]


def recipe_of(*settings: str) -> Recipe:
    return with_overrides(load_recipe("default"), [*SETTINGS, *settings])


def pixels(picture: np.ndarray, size: tuple[int, int]) -> Any:
    """(1, C, H, W) float32 in 0 to 1."""
    small = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(small, np.float32) / 255).permute(2, 0, 1).unsqueeze(0)


# -- what stands out


def by_the_book(picture: np.ndarray, cell: int, cells_a_patch: int) -> np.ndarray:
    """(H, W, C) in colours that are compared: with loops, numpy and scipy."""
    height, width, n_channels = picture.shape
    cells = picture.reshape(height // cell, cell, width // cell, cell, n_channels).mean(axis=(1, 3))
    return _distances_to_three_sides(cells, cells_a_patch)


def _distances_to_three_sides(cells: np.ndarray, cells_a_patch: int) -> np.ndarray:
    n_channels = cells.shape[-1]
    shares = []
    for side in (cells[0], cells[-1], cells[:, 0], cells[:, -1]):
        spread = np.cov(side.T, bias=True).reshape(n_channels, n_channels) + 0.05**2 * np.eye(n_channels)
        inverse, middle = np.linalg.inv(spread), side.mean(axis=0)
        far = np.array([[mahalanobis(colour, middle, inverse) for colour in row] for row in cells])
        shares.append(far / far.max())
    out = np.sort(np.stack(shares), axis=0)[:3].sum(axis=0)
    rows, columns = (n // cells_a_patch for n in out.shape)
    mean: np.ndarray = out.reshape(rows, cells_a_patch, columns, cells_a_patch).mean(axis=(1, 3))
    return mean


@pytest.mark.parametrize("size", [(96, 96), (64, 112)])
@pytest.mark.parametrize("name", ["astronaut", "coffee", "rocket"])
def test_it_is_the_distance_to_the_colours_of_the_border_in_lab(name: str, size: tuple[int, int]) -> None:
    picture = pixels(getattr(data, name)(), size)
    cells = picture[0].permute(1, 2, 0).numpy().reshape(size[0] // 4, 4, size[1] // 4, 4, 3).mean(axis=(1, 3))
    expected = _distances_to_three_sides(rgb2lab(cells) / 100, 4)
    grid = (size[0] // 16, size[1] // 16)
    found = border_contrast(picture, grid)
    assert found.shape == (1, *grid) and expected.std() > 0.1
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-3)


@pytest.mark.parametrize("n_channels", [1, 2, 5])
def test_other_channels_are_compared_as_they_are(n_channels: int) -> None:
    picture = np.random.default_rng(0).random((32, 48, n_channels), np.float32)
    picture[8:24, 12:32] += 0.5
    found = border_contrast(torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0), (4, 6))
    np.testing.assert_allclose(found[0].numpy(), by_the_book(picture, 2, 4), atol=1e-4)


def test_patches_of_fewer_pixels_than_cells() -> None:
    picture = np.random.default_rng(0).random((6, 8, 2), np.float32)
    found = border_contrast(torch.from_numpy(picture).permute(2, 0, 1).unsqueeze(0), (3, 4))
    np.testing.assert_allclose(found[0].numpy(), by_the_book(picture, 1, 2), atol=1e-4)


def test_an_object_that_reaches_one_side_stands_out_all_the_same() -> None:
    picture = torch.full((1, 3, 96, 96), 0.9)
    picture[:, 0, 32:, 32:64] = 0.1  # cyan, from the lower side up
    found = border_contrast(picture, (6, 6))[0]
    on = torch.zeros(6, 6, dtype=torch.bool)
    on[2:, 2:4] = True
    assert found[on].min() > 5 * found[~on].max()


def test_of_an_even_picture_nothing_does() -> None:
    found = border_contrast(torch.full((2, 3, 64, 64), 0.4), (4, 4))
    assert found.abs().max() < 0.5 and found.isfinite().all()
    even = torch.full((2, 3, 16), 1 / 17)
    assert float(attention_kl(torch.zeros(2, 16), even)) == pytest.approx(0, abs=1e-6)


# -- the divergence


def test_it_is_the_kl_divergence_of_each_head() -> None:
    draw = np.random.default_rng(0)
    target, attention = draw.random((2, 6)), draw.random((2, 3, 6)) ** 4
    found = attention_kl(torch.from_numpy(target), torch.from_numpy(attention) * 0.3)
    expected = [entropy(target[i] + 1e-3, attention[i, h]) for i in range(2) for h in range(3)]
    assert float(found) == pytest.approx(np.mean(expected), rel=1e-6)
    assert np.std(expected) > 0.1
    same = torch.from_numpy(target + 1e-3)[:, None].expand(2, 3, 6)
    assert float(attention_kl(torch.from_numpy(target), same)) == pytest.approx(0, abs=1e-9)


def test_a_head_that_gives_the_patches_nothing_costs_much_and_not_infinity() -> None:
    attention = torch.full((1, 2, 4), 1e-30)
    attention[0, 0, 0] = 1.0
    attention[0, 1] = 0.0  # all to the CLS token
    attention.requires_grad_()
    cost = attention_kl(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), attention)
    cost.backward()  # type: ignore[no-untyped-call]
    assert 20 < float(cost.detach()) < 100
    assert attention.grad is not None and attention.grad.isfinite().all()


def test_the_normalisation_is_undone() -> None:
    recipe = recipe_of("mean=[0.1, 0.2, 0.3]", "std=[0.5, 0.4, 0.3]")
    picture = pixels(data.astronaut(), (64, 96))
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.4, 0.3)))
    crops = ((picture - mean) / std).expand(2, 3, 3, 64, 96)
    attention = torch.rand(2, 3, 2, 24, generator=torch.Generator().manual_seed(0))
    expected = attention_kl(
        border_contrast(picture, (4, 6)).flatten(1).expand(6, 24), attention.flatten(0, 1)
    )
    assert float(Foreground(recipe, CPU)(crops, attention)) == pytest.approx(float(expected), rel=1e-5)


# -- what the student looks at


def new_state(*settings: str) -> TrainingState:
    recipe = recipe_of(*settings)
    torch.manual_seed(0)
    networks = build_network(recipe, is_student=True), build_network(recipe, is_student=False)
    for _, weights in networks[0].named_parameters():  # as initialised, attention is nearly even
        with torch.no_grad():
            weights.add_(0.1 * torch.randn(weights.shape))
    return TrainingState.create(recipe, *networks, steps_per_epoch=2)


def crops_of(recipe: Recipe, n_images: int = 4) -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    crops = [torch.randn(2, n_images, 3, *recipe.global_crop_hw, generator=draw)]
    if recipe.n_local_crops:
        crops.append(torch.randn(1, n_images, 3, 32, 32, generator=draw))
    return crops


@pytest.mark.parametrize(
    "settings",
    [[], ["n_local_crops=0"], ["global_crop_px=[64, 96]"], ["arch=vit_small_patch14_reg4_dinov2"]],
    ids=["sizes", "one-size", "oblong", "registers"],
)
def test_it_is_the_attention_that_the_model_will_show(settings: list[str]) -> None:
    state = new_state(*settings)
    crops = crops_of(state.recipe, 2)
    found = state.forward(crops).attention
    _, expected = forward_with_attention(state.student.backbone, crops[0].flatten(0, 1))
    assert found.shape[:2] == (2, 2)
    torch.testing.assert_close(found.flatten(0, 1), expected, atol=1e-5, rtol=0)
    assert (expected.max() - expected.min()) > 0.01
    with torch.no_grad():
        assert state.teacher(crops[:1]).attention is None


def test_with_patches_hidden_it_is_that_of_what_the_student_sees() -> None:
    state = new_state("ibot_weight=1", "n_local_crops=0")
    crops = crops_of(state.recipe)
    nothing = HiddenPatches.of(torch.zeros(2, 4, 4, 4, dtype=torch.bool), CPU)
    some = HiddenPatches.of(torch.rand(2, 4, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.4, CPU)
    plain = state.forward(crops).attention
    torch.testing.assert_close(state.forward(crops, nothing).attention, plain, atol=1e-6, rtol=0)
    assert (state.forward(crops, some).attention - plain).abs().max() > 1e-3


# -- the step


@pytest.mark.parametrize("settings", [[], ["gradient_checkpointing=true"], ["n_local_crops=0"]])
def test_a_step_follows_the_gradient_of_both(settings: list[str]) -> None:
    state, again, without = (
        new_state(*settings),
        new_state(*settings),
        new_state("foreground_weight=0", *settings),
    )
    crops = crops_of(state.recipe)
    result, plain = training_step(state, crops), training_step(without, crops)
    assert plain.foreground_kl is None and float(result.loss) == float(plain.loss)

    # The part of its own, from timm's attention; the rest is what a step without it does.
    _, attention = forward_with_attention(again.student.backbone, crops[0].flatten(0, 1))
    colours = crops[0].flatten(0, 1) * torch.tensor([0.229, 0.224, 0.225]).view(-1, 1, 1)
    colours = colours + torch.tensor([0.485, 0.456, 0.406]).view(-1, 1, 1)
    kl = attention_kl(border_contrast(colours, (4, 4)).flatten(1), attention)
    (0.7 * kl).backward()
    assert result.foreground_kl is not None
    assert float(result.foreground_kl) == pytest.approx(float(kl.detach()), rel=1e-5)
    moved = 0.0
    parts = (state.student, without.student, again.student)
    for (name, both), (_, loss), (_, part) in zip(
        *(network.named_parameters() for network in parts), strict=True
    ):
        if not both.requires_grad:
            continue
        own = torch.zeros_like(both) if part.grad is None else part.grad
        moved = max(moved, float(own.abs().max()))
        scale = float((loss.grad + own).abs().max())
        torch.testing.assert_close(both.grad, loss.grad + own, atol=1e-4 * scale + 1e-6, rtol=0, msg=name)
    assert moved > 1e-4


def test_pieces_are_one_batch() -> None:
    whole, in_pieces = new_state(), new_state()
    crops = crops_of(whole.recipe)
    one = training_step(whole, crops)
    other = training_step(in_pieces, [c[:, :1] for c in crops], [c[:, 1:] for c in crops])
    assert one.foreground_kl is not None and other.foreground_kl is not None
    assert float(one.foreground_kl) == pytest.approx(float(other.foreground_kl), rel=1e-5)
    for (name, value), other_value in zip(
        whole.student.named_parameters(), in_pieces.student.parameters(), strict=True
    ):
        torch.testing.assert_close(value, other_value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_compiled_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounter

    plain, crops = new_state(), crops_of(recipe_of())
    counter, torch_compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: torch_compile(f, backend=counter, **more))
    torch._dynamo.reset()
    compiled = new_state("compile=true")
    for _ in range(2):
        one, other = training_step(plain, crops), training_step(compiled, crops)
        assert one.foreground_kl is not None and other.foreground_kl is not None
        assert float(one.foreground_kl) == pytest.approx(float(other.foreground_kl), rel=1e-4)
    torch._dynamo.reset()
    assert counter.frame_count == 2


# -- a run


def objects(folder: Path) -> Path:
    """Eight pictures of a bright disc somewhere on dull noise."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for number in range(8):
        picture = draw.integers(90, 130, (96, 96, 3)).astype(np.uint8)
        y, x = draw.integers(30, 66, 2)
        rows, columns = np.ogrid[:96, :96]
        picture[(rows - y) ** 2 + (columns - x) ** 2 < 18**2] = draw.integers(0, 255, 3)
        Image.fromarray(picture).save(folder / f"{number}.png")
    return folder


@pytest.mark.filterwarnings("ignore:step")  # verdicts on so small a run
def test_a_run_learns_where_to_look(tmp_path: Path) -> None:
    settings = [
        "global_crops_scale=[0.8, 1.0]",
        "epochs=30",
        "optimizer=adamw",
        "lr=0.1",
        "foreground_weight=5",
    ]
    run = tmp_path / "run"
    train([objects(tmp_path / "photos")], run, recipe_of(*settings, "crops=batched"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [line["foreground_kl"] for line in lines if "foreground_kl" in line]
    assert len(found) == 60
    assert np.mean(found[-10:]) < 0.6 * np.mean(found[:5])
    write_report(run)
    assert "Attention: KL from the foreground" in (run / "report.html").read_text(encoding="utf-8")


def test_one_that_is_not_finite_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = training_step

    def broken(*args: Any, **more: Any) -> Any:
        return replace(step(*args, **more), foreground_kl=torch.tensor(float("nan")))

    monkeypatch.setattr(trainer, "training_step", broken)
    with pytest.raises(TrainingError, match="the foreground_kl is nan at step 1"):
        train([objects(tmp_path / "photos")], tmp_path / "run", recipe_of())


@pytest.mark.parametrize("arch", ["vit_tiny_patch16_dinov3_qkvb", "vit_pe_core_tiny_patch16_384"])
def test_other_vits_are_refused(arch: str) -> None:
    with pytest.raises(UsageError, match=f"{arch} is not one. Use one such as vit_small_patch16_224"):
        build_network(recipe_of(f"arch={arch}"), is_student=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["arch=resnet50"], "attention of a ViT, and resnet50 is not a ViT; use a vit_"),
        (["foreground_weight=-1"], "foreground_weight=-1.0 must not be negative"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(*settings)
