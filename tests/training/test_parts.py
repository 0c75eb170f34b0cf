"""The parts of DINO in closed form: loss, targets, teacher, schedules, clipping, head."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import torch.nn.functional as F
from torch import nn

from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training.monitoring.collapse import teacher_entropy
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.initialise import initialise
from dinokit.training.objectives.centering import Centering
from dinokit.training.objectives.koleo import koleo_loss
from dinokit.training.objectives.loss import dino_loss
from dinokit.training.objectives.teacher import update_teacher
from dinokit.training.optim import LARS, clip_gradients, parameter_groups
from dinokit.training.recipe import Recipe, with_overrides
from dinokit.training.schedules import cosine, teacher_temperature
from dinokit.training.trainer import TrainingState, build_network
from dinokit.training.views.augment import MultiCrop, random_crop_box


def test_a_uniform_student_costs_ln_k() -> None:
    targets = torch.softmax(torch.randn(2, 3, 50), dim=-1)
    assert float(dino_loss(torch.full((6, 3, 50), 0.7), targets)) == pytest.approx(math.log(50), abs=1e-5)


def test_the_loss_is_the_mean_over_pairs_of_different_views() -> None:
    # Written out pair by pair, as equation 3 of the paper has it.
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(5, 4, 11, generator=generator)
    targets = torch.softmax(torch.randn(2, 4, 11, generator=generator) * 5, dim=-1)
    terms = [F.cross_entropy(student[s] / 0.1, targets[t]) for t in range(2) for s in range(5) if s != t]
    assert len(terms) == 8
    assert float(dino_loss(student, targets, 0.1)) == pytest.approx(
        float(torch.stack(terms).mean()), rel=1e-6
    )


def test_only_global_crops_still_make_pairs() -> None:
    student = torch.randn(2, 3, 7)
    targets = torch.softmax(torch.randn(2, 3, 7), dim=-1)
    crossed = (
        F.cross_entropy(student[1] / 0.1, targets[0]) + F.cross_entropy(student[0] / 0.1, targets[1])
    ) / 2
    assert float(dino_loss(student, targets)) == pytest.approx(float(crossed), rel=1e-6)


def test_targets_subtract_the_centre_and_sharpen() -> None:
    centering = Centering(3)
    centering.center.copy_(torch.tensor([[1.0, 0.0, -1.0]]))
    targets = centering.targets(torch.tensor([[[1.0, 1.0, 1.0]]]), teacher_temp=0.5)
    expected = np.exp([0.0, 2.0, 4.0]) / np.exp([0.0, 2.0, 4.0]).sum()
    np.testing.assert_allclose(targets[0, 0].numpy(), expected, rtol=1e-6)


def test_the_centre_of_a_constant_batch_converges_to_it() -> None:
    centering, constant = Centering(4, center_momentum=0.9), torch.tensor([3.0, -1.0, 0.5, 2.0])
    for step in range(1, 101):
        centering.update_with(constant)
        if step == 1:
            torch.testing.assert_close(centering.center[0], 0.1 * constant)
    torch.testing.assert_close(centering.center[0], constant, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("statistics", [False, True])
@pytest.mark.parametrize(("momentum", "expected"), [(1.0, 2.0), (0.0, 5.0), (0.75, 2.75)])
def test_the_teacher_averages_parameters_and_if_asked_statistics(
    momentum: float, expected: float, statistics: bool
) -> None:
    student, teacher = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    for module, value in ((student, 5.0), (teacher, 2.0)):
        nn.init.constant_(module.weight, value)
        assert module.running_mean is not None
        module.running_mean.fill_(value)
    update_teacher(student, teacher, momentum, statistics=statistics)
    torch.testing.assert_close(teacher.weight.detach(), torch.full((3,), expected))
    assert teacher.running_mean is not None
    torch.testing.assert_close(teacher.running_mean, torch.full((3,), expected if statistics else 2.0))


def test_the_cosine_starts_at_the_base_and_warms_up_linearly() -> None:
    schedule = cosine(1.0, 0.1, 100, warmup_steps=11)
    np.testing.assert_allclose(schedule[:11], np.linspace(0, 1, 11))
    assert schedule[11] == 1.0
    np.testing.assert_allclose(schedule[11 + 89 // 2], 0.1 + 0.45 * (1 + math.cos(math.pi * 44 / 89)))
    assert (np.diff(schedule[11:]) < 0).all() and 0.1 < schedule[-1] < 0.11


def test_a_warm_up_longer_than_the_run_does_not_break_it() -> None:
    assert len(cosine(1.0, 0.0, 5, warmup_steps=50)) == 5
    assert len(teacher_temperature(0.04, 0.07, 2, 3, warmup_epochs=30)) == 6


def test_the_teacher_temperature_is_a_staircase() -> None:
    schedule = teacher_temperature(0.04, 0.07, 5, 2, warmup_epochs=3)
    np.testing.assert_allclose(schedule, np.repeat([0.04, 0.055, 0.07, 0.07, 0.07], 2))


def test_clipping_by_parameter_and_all_together() -> None:
    def gradients() -> list[nn.Parameter]:
        parameters = [
            nn.Parameter(torch.zeros(2)),
            nn.Parameter(torch.zeros(1)),
            nn.Parameter(torch.zeros(1)),
        ]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 4.0]), torch.tensor([0.5])
        return parameters

    each = gradients()
    assert float(clip_gradients(each, 1.0, per_parameter=True)) == pytest.approx(math.sqrt(25.25))
    torch.testing.assert_close(each[0].grad, torch.tensor([0.6, 0.8]), rtol=1e-5, atol=0)
    torch.testing.assert_close(each[1].grad, torch.tensor([0.5]))

    together = gradients()
    clip_gradients(together, 1.0, per_parameter=False)
    torch.testing.assert_close(
        together[0].grad, torch.tensor([3.0, 4.0]) / math.sqrt(25.25), rtol=1e-5, atol=0
    )

    untouched = gradients()
    clip_gradients(untouched, 0.0, per_parameter=True)
    torch.testing.assert_close(untouched[0].grad, torch.tensor([3.0, 4.0]))


def test_biases_and_vectors_do_not_decay_positions_do() -> None:
    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pos_embed = nn.Parameter(torch.zeros(1, 4, 3))
            self.linear = nn.Linear(3, 2)
            self.norm = nn.LayerNorm(3)
            self.fixed = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    model = Tiny()
    decayed, plain = sorted(parameter_groups(model), key=lambda group: not group["decays"])
    assert {id(p) for p in decayed["params"]} == {id(model.pos_embed), id(model.linear.weight)}
    assert {id(p) for p in plain["params"]} == {
        id(model.linear.bias),
        id(model.norm.weight),
        id(model.norm.bias),
    }
    assert decayed["decays"] and not plain["decays"] and plain["weight_decay"] == 0.0


def test_the_patch_embedding_can_learn_more_slowly() -> None:
    vit = create_vit("vit_tiny_patch16_224", {"img_size": 32, "depth": 1}, PosEmbedResize())
    groups = parameter_groups(vit, patch_embed_lr_mult=0.2)
    slow = {id(p) for group in groups if group["lr_mult"] == 0.2 for p in group["params"]}
    assert slow == {id(p) for p in vit.patch_embed.parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(vit.parameters()))
    assert {group["lr_mult"] for group in parameter_groups(vit)} == {1.0}


def test_how_a_backbone_starts() -> None:
    torch.manual_seed(0)
    vit = create_vit("vit_tiny_patch16_224", {"img_size": 64, "depth": 1}, PosEmbedResize())
    initialise(vit, "reference")
    weights = {name: value.detach() for name, value in vit.named_parameters()}
    for name in ("cls_token", "pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.mlp.fc1.weight"):
        assert 0.018 < float(weights[name].std()) < 0.022, name

    initialise(vit, "xavier")
    # A uniform distribution of bound b has a width of b / sqrt(3); Glorot's b is sqrt(6 / (in + out)).
    for name, fans in (
        ("blocks.0.attn.qkv.weight", 192 + 192),  # each third by itself
        ("blocks.0.mlp.fc1.weight", 192 + 768),
        ("patch_embed.proj.weight", 3 * 16 * 16 + 192),
    ):
        assert float(weights[name].std()) == pytest.approx(math.sqrt(2 / fans), rel=0.02), name
    positions = weights["pos_embed"][0, 1:].view(4, 4, 4, 48)  # row, column, kind, rate
    for row in range(4):
        for column in range(4):
            assert float(positions[row, column, 0, 0]) == pytest.approx(math.sin(row), abs=1e-6)
            assert float(positions[row, column, 3, 12]) == pytest.approx(math.cos(column / 10), abs=1e-6)
    assert float(weights["pos_embed"][0, 0].abs().max()) == 0.0


def test_logits_are_cosines_and_float32_whatever_the_autocast() -> None:
    head = ProjectionHead(8, 5, hidden_dim=16, bottleneck_dim=4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head(torch.randn(6, 8))
    assert logits.dtype == torch.float32
    assert float(logits.detach().abs().max()) <= 1 + 1e-6
    # The prototypes' length is fixed, their direction learns.
    assert not head.last_layer.weight_g.requires_grad and head.last_layer.weight_v.requires_grad
    free = ProjectionHead(8, 5, hidden_dim=16, bottleneck_dim=4, norm_last_layer=False)
    assert free.last_layer.weight_g.requires_grad


def test_the_entropy_is_ln_k_when_uniform_and_0_on_one_prototype() -> None:
    assert float(teacher_entropy(torch.full((2, 3, 64), 1 / 64))) == pytest.approx(math.log(64), rel=1e-6)
    assert float(teacher_entropy(F.one_hot(torch.tensor([[1, 2], [3, 0]]), 64).float())) == 0.0


def test_koleo_is_minus_the_mean_log_distance_to_the_nearest() -> None:
    # On the circle: 0 and 10 degrees are neighbours, 90 degrees is nearest to 10. Lengths do not matter.
    degrees = torch.tensor([0.0, 10.0, 90.0])
    view = torch.stack([torch.cos(torch.deg2rad(degrees)), torch.sin(torch.deg2rad(degrees))], dim=1)
    near, far = 2 * math.sin(math.radians(5)), 2 * math.sin(math.radians(40))
    expected = -(2 * math.log(near) + math.log(far)) / 3
    views = torch.stack([view, view * 3])
    assert float(koleo_loss(views)) == pytest.approx(2 * expected, rel=1e-5)

    points = view[None].clone().requires_grad_()
    koleo_loss(points).backward()
    moved = F.normalize(points.detach() - 0.01 * points.grad, dim=-1)[0]
    assert float((moved[0] - moved[1]).norm()) > near

    same = torch.ones(1, 2, 3, requires_grad=True)
    koleo_loss(same).backward()
    assert same.grad is not None and torch.isfinite(same.grad).all()


def test_no_crop_of_a_reduced_picture_is_enlarged() -> None:
    recipe = with_overrides(
        Recipe(),
        [
            "global_crop_px=64",
            "local_crop_px=32",
            "global_crops_scale=[0.7, 1.0]",
            "local_crops_scale=[0.1, 0.7]",
        ],
    )
    crop = MultiCrop(recipe)
    rng = random.Random(0)
    side = crop.least_px
    for view in (*crop.global_views, *crop.local_views):
        for _ in range(2000):
            left, top, right, bottom = random_crop_box((side, side), view.scale, rng)
            assert min(right - left, bottom - top) >= view.size_px[0] - 1  # a box has whole pixels
    # and not more than is needed: a picture a tenth smaller would not do
    smaller = int(side * 0.9)
    boxes = [random_crop_box((smaller, smaller), v.scale, rng) for v in crop.local_views for _ in range(2000)]
    assert (
        min(min(right - left, bottom - top) for left, top, right, bottom in boxes) < recipe.local_crop_px - 1
    )


def test_plain_attention_is_used_for_bfloat16_on_a_cpu_and_gives_the_same() -> None:
    recipe = with_overrides(
        Recipe(),
        ["arch=vit_tiny_patch16_224", "global_crop_px=32", "n_prototypes=16", "teacher_momentum=0.99"],
    )
    recipe = replace(recipe, teacher_temp=0.04, warmup_teacher_temp=0.04, warmup_epochs=0.0, device="cpu")

    def attention(precision: str) -> Any:
        ready = replace(recipe, precision=precision)
        networks = build_network(ready, is_student=True), build_network(ready, is_student=False)
        state = TrainingState.create(ready, *networks, steps_per_epoch=1)
        return state.student.backbone.blocks[0].attn, state.teacher.backbone.blocks[0].attn

    plain, fused = attention("bf16"), attention("fp32")
    assert not any(module.fused_attn for module in plain) and all(module.fused_attn for module in fused)
    fused[0].load_state_dict(plain[0].state_dict())
    tokens = torch.randn(2, 5, 192)
    torch.testing.assert_close(plain[0](tokens), fused[0](tokens), rtol=0, atol=1e-5)


def test_lars_does_not_scale_where_a_length_is_zero() -> None:
    """Otherwise weights that start at zero would stay there, and a gradient of zero would give NaN."""
    zero, still = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, still.grad = torch.ones(2, 2), torch.zeros(2, 2)
    LARS([zero, still], lr=0.5).step()
    torch.testing.assert_close(zero.detach(), torch.full((2, 2), -0.5))
    torch.testing.assert_close(still.detach(), torch.ones(2, 2))
