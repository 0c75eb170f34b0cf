"""Patches hidden from the student: which they are, what they cost; a run with them is as exact as one without."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from pico_vit import PICO
from safetensors import safe_open
from stop_after import StopAfter
from torch import nn
from two_processes import run_command, train_command

from dinokit.errors import TrainingError, UsageError
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training import trainer
from dinokit.training.devices.processes import Processes
from dinokit.training.networks.head import ProjectionHead
from dinokit.training.networks.network import Network, build_network
from dinokit.training.objectives.masked_patches import MaskedPatches, masked_patch_loss
from dinokit.training.objectives.masks import HiddenPatches, _find_block, block_mask, draw_masks
from dinokit.training.objectives.targets import Sinkhorn, make_targets
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import train, training_step
from dinokit.training.views.data import CropLoader
from dinokit.training.views.pictures import collect_pictures

CPU = torch.device("cpu")
ALONE = Processes(CPU)
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
    "epochs=3",
    "batch_size=4",
    "warmup_epochs=0",
    # AdamW and clipping would hide gradients of another scale.
    "optimizer=sgd",
    "lr=0.01",
    "clip_grad=0",
    "freeze_last_layer_epochs=0",
    # Stochastic depth would draw other numbers for other pieces.
    "drop_path_rate=0.0",
    "log_every_steps=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "tensorboard=false",
    "ibot_weight=0.7",
]


def recipe_of(*settings: str) -> Recipe:
    return with_overrides(load_recipe("default"), [*SETTINGS, *settings])


def random_numbers(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masks_of(n_views: int, n_images: int, seed: int = 0, **changes: Any) -> Any:
    """(V, B, 4, 4) bool."""
    rng = random.Random(seed)
    recipe = replace(recipe_of(), **changes)
    return torch.from_numpy(np.stack([draw_masks(recipe, n_views, rng) for _ in range(n_images)], axis=1))


# -- which patches


def test_blocks_are_those_of_beit() -> None:
    rng = random.Random(0)
    empty = np.zeros((14, 14), np.bool_)
    found = [_find_block(empty, 16, 60, rng) for _ in range(4000)]
    blocks = [block.shape for block in found if block is not None]
    assert len(blocks) > 3990
    areas = np.array([h * w for h, w in blocks])
    # Sides are rounded to whole patches: half a patch more or less on each side.
    assert min((h + 0.5) * (w + 0.5) for h, w in blocks) > 16 and max(areas) <= 60
    for h, w in blocks:
        assert h < 14 and w < 14
        assert (h - 0.5) / (w + 0.5) < 1 / 0.3 and (h + 0.5) / (w - 0.5) > 0.3
    assert abs(areas.mean() - (16 + 60) / 2) < 1.0  # drawn evenly
    # As often tall as wide, and anywhere.
    assert abs(np.mean([h > w for h, w in blocks]) - np.mean([h < w for h, w in blocks])) < 0.03
    covered = np.zeros((14, 14))
    for seed in range(3000):
        covered += block_mask(14, 14, 40, random.Random(seed))
    np.testing.assert_allclose(covered, covered[::-1], atol=250)
    np.testing.assert_allclose(covered, covered.T, atol=250)


@pytest.mark.parametrize(("grid", "least"), [((14, 14), 16), ((4, 4), 1), ((12, 6), 4)])
def test_a_block_is_at_least_a_ninth_of_the_smaller_square(grid: tuple[int, int], least: int) -> None:
    ranges: list[tuple[float, float]] = []

    class Recorded(random.Random):
        def uniform(self, a: float, b: float) -> float:
            ranges.append((a, b))
            return super().uniform(a, b)

    block_mask(*grid, 7.5, Recorded(0))
    assert ranges[0] == (least, 7.5)
    assert ranges[1] == pytest.approx((math.log(0.3), math.log(1 / 0.3)))


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (2, 2), (6, 20)])
def test_never_more_patches_are_hidden_than_asked_for(grid: tuple[int, int]) -> None:
    rng = random.Random(0)
    for _ in range(300):
        wanted = rng.uniform(0, 0.6) * grid[0] * grid[1]
        mask = block_mask(*grid, wanted, rng)
        assert mask.shape == grid and mask.dtype == np.bool_ and mask.sum() <= wanted
    assert not block_mask(*grid, 0, rng).any()


def test_half_of_the_crops_hide_a_tenth_to_a_half_in_blocks() -> None:
    recipe = replace(Recipe(), ibot_weight=1.0, n_prototypes=8)
    rng = random.Random(0)
    masks = np.concatenate([draw_masks(recipe, 2, rng) for _ in range(1500)])
    assert masks.shape == (3000, 14, 14)
    shares = masks.mean(axis=(1, 2))
    masked = masks[shares > 0]
    assert abs(len(masked) / 3000 - 0.5) < 0.03
    assert shares.max() <= 0.5
    # What is asked for is even from 0.1 to 0.5; the last block rarely fits exactly, so a little less is hidden.
    assert 0.27 < masked.mean() < 0.3
    assert np.std(masked.mean(axis=(1, 2))) == pytest.approx(0.4 / math.sqrt(12), rel=0.05)
    # In a scattered mask the neighbour of a hidden patch is hidden as often as any other.
    together = masked[:, :, :-1] & masked[:, :, 1:]
    assert together.sum() / masked[:, :, :-1].sum() > 0.75


def test_where_patches_are_hidden_and_what_each_counts() -> None:
    masks = masks_of(2, 5)
    hidden = HiddenPatches.of(masks, CPU)
    assert hidden.mask.shape == (10, 16)
    expected = [
        (crop * 16 + patch, 1 / int(mask.sum()))
        for crop, mask in enumerate(masks.reshape(10, 16))
        for patch in range(16)
        if mask[patch]
    ]
    assert hidden.positions.tolist() == [place for place, _ in expected] and len(expected) > 3
    np.testing.assert_allclose(hidden.weights, [weight for _, weight in expected], rtol=1e-6)


def test_masks_follow_from_the_picture_and_leave_the_crops_alone(photos: Path) -> None:
    pictures = collect_pictures([photos])
    recipe = recipe_of("batch_size=4", "epochs=2")

    def batches(first_step: int = 0, **changes: Any) -> list[Any]:
        return list(CropLoader(pictures, replace(recipe, **changes), first_step=first_step, device=CPU))

    whole = batches()
    masks = torch.cat([batch.masks for batch in whole], dim=1)
    assert masks.shape[0] == 2 and masks.shape[2:] == (4, 4) and masks.any() and not masks.all()
    assert not torch.equal(whole[0].masks, whole[1].masks)
    for batch, again in zip(whole[1:], batches(first_step=1), strict=True):  # a run that goes on
        assert torch.equal(batch.masks, again.masks)
    pieces = batches(accumulate=2)
    assert torch.equal(torch.cat([piece.masks for piece in pieces], dim=1), masks)
    on_device = batches(crops="batched")
    assert torch.equal(torch.cat([batch.masks for batch in on_device], dim=1), masks)
    for batch, without in zip(whole, batches(ibot_weight=0.0), strict=True):
        assert without.masks is None
        assert torch.equal(batch.global_crops, without.global_crops)
        assert torch.equal(batch.local_crops, without.local_crops)


def test_a_picture_that_cannot_be_read_takes_its_mask_with_it(tmp_path: Path, photos: Path) -> None:
    for path in sorted(photos.glob("*.jpg"))[:3]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "0.jpg").write_bytes(b"no picture")
    pictures = collect_pictures([tmp_path])
    (batch,) = CropLoader(pictures, recipe_of("epochs=1"), device=CPU)
    assert len(batch.unreadable) == 1 and batch.global_crops.shape[1] == 3 and batch.masks.shape[1] == 3


# -- the loss


def cost_by_hand(
    student: np.ndarray,
    teacher: np.ndarray,
    masks: np.ndarray,
    center: np.ndarray,
    teacher_temp: float,
    student_temp: float,
) -> float:
    """The paper's sum over masked patches, of all patches' logits (crops, N, K), in float64."""
    crops = []
    for s, t, mask in zip(student.astype(np.float64), teacher.astype(np.float64), masks, strict=True):
        cost = 0.0
        for i in np.flatnonzero(mask):
            p = np.exp((t[i] - center) / teacher_temp)
            q = np.exp(s[i] / student_temp)
            cost -= float(np.sum(p / p.sum() * np.log(q / q.sum())))
        crops.append(cost / max(int(mask.sum()), 1))
    return float(np.mean(crops))


def part(center_momentum: float = 0.9, n_prototypes: int = 6) -> MaskedPatches:
    recipe = replace(recipe_of(), n_prototypes=n_prototypes, center_momentum=center_momentum)
    return MaskedPatches(make_targets(recipe, ALONE), n_prototypes, 0.1, ALONE)


def test_the_loss_is_the_papers_sum() -> None:
    masks = masks_of(2, 4)
    hidden = HiddenPatches.of(masks, CPU)
    student, teacher = random_numbers(8, 16, 6) * 0.3, random_numbers(8, 16, 6, seed=1) * 0.3
    module, center = part(), random_numbers(1, 6, seed=2) * 0.1
    module.targets.center.copy_(center)
    found = module(
        student.flatten(0, 1)[hidden.positions],
        teacher.flatten(0, 1)[hidden.positions],
        hidden,
        teacher_temp=0.07,
    )
    expected = cost_by_hand(
        student.numpy(), teacher.numpy(), masks.reshape(8, 16).numpy(), center[0].numpy(), 0.07, 0.1
    )
    assert float(found) == pytest.approx(expected, rel=1e-5)
    assert float(module.finish_step()) == pytest.approx(expected, rel=1e-5)
    assert float(module.targets.center.sub(center).abs().max()) > 0


def test_a_guess_costs_ln_k_in_each_crop_with_hidden_patches() -> None:
    masks = torch.zeros(2, 3, 4, 4, dtype=torch.bool)
    masks[0, 1, 1:3, 2:] = masks[1, 2, 0, 0] = True
    hidden = HiddenPatches.of(masks, CPU)
    targets = torch.softmax(random_numbers(5, 6), dim=-1)
    assert float(masked_patch_loss(torch.zeros(5, 6), targets, hidden)) == pytest.approx(2 / 6 * math.log(6))


def test_the_centre_moves_by_the_hidden_patches_of_all_pieces() -> None:
    pieces = [masks_of(2, 3, seed=1), torch.zeros(2, 1, 4, 4, dtype=torch.bool), masks_of(2, 2, seed=2)]
    module, seen, losses = part(center_momentum=0.75), [], []
    for number, masks in enumerate(pieces):
        hidden = HiddenPatches.of(masks, CPU)
        logits = random_numbers(len(hidden.positions), 6, seed=number)
        losses.append(float(module(logits, logits, hidden, 0.05)) * len(hidden.mask))
        seen.append(logits)
    assert losses[1] == 0.0 and not module.targets.center.any()  # not before all are seen
    assert float(module.finish_step()) == pytest.approx(sum(losses) / 12, rel=1e-5)
    torch.testing.assert_close(module.targets.center, 0.25 * torch.cat(seen).mean(dim=0, keepdim=True))


@pytest.mark.parametrize("settings", [[], ["target_normalisation=sinkhorn"]])
def test_a_batch_with_nothing_hidden_moves_nothing(settings: list[str]) -> None:
    recipe = recipe_of(*settings)
    module = MaskedPatches(make_targets(recipe, ALONE), 16, 0.1, ALONE)
    for buffer in module.buffers():
        buffer.fill_(0.5)
    hidden = HiddenPatches.of(torch.zeros(2, 2, 4, 4, dtype=torch.bool), CPU)
    logits = torch.zeros(0, 16, requires_grad=True)
    loss = module(logits, torch.zeros(0, 16), hidden, 0.05)
    loss.backward()
    assert float(loss.detach()) == 0.0 == float(module.finish_step())
    assert all(bool((buffer == 0.5).all()) for buffer in module.buffers())


def test_sinkhorn_spreads_the_hidden_patches_over_the_prototypes() -> None:
    module = MaskedPatches(Sinkhorn(ALONE, 30), 4, 0.1, ALONE)
    targets: list[Any] = []
    make = module.targets.targets
    module.targets.targets = lambda *a: targets.append(make(*a)) or targets[-1]  # type: ignore[method-assign]
    hidden = HiddenPatches.of(torch.ones(2, 3, 4, 4, dtype=torch.bool), CPU)
    module(random_numbers(96, 4), random_numbers(96, 4, seed=1), hidden, 0.5)
    torch.testing.assert_close(targets[0][0].mean(dim=0), torch.full((4,), 0.25), atol=1e-4, rtol=0)


# -- the network


def small_network(
    *, masked: bool = True, separate: bool = False, arch: str = "vit_tiny_patch16_224", **more: Any
) -> Network:
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
    backbone = create_vit(arch, {**sizes, **more}, PosEmbedResize())
    with torch.no_grad():  # attention that is not flat, so that places count
        for name, weights in backbone.named_parameters():
            if weights.ndim == 2 and ("qkv" in name or "q_proj" in name or "k_proj" in name):
                weights.mul_(40)
    heads = [ProjectionHead(24, 6, hidden_dim=32, bottleneck_dim=16) for _ in range(2)]
    token = nn.Parameter(random_numbers(1, 24, seed=5)) if masked else None
    return Network(backbone, heads[0], patch_head=heads[1] if separate else None, mask_token=token)


# Learned positions; rotary ones (DINOv3's, EVA-02's with a mean over patches, learned frequencies, both kinds at once);
# what no layers are shared in.
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "registers": {"init_values": 0.5, "reg_tokens": 2},
    "normed queries": {"qk_norm": True},
    "mean": {"global_pool": "avg"},
    "dinov3": {"arch": "vit_tiny_patch16_dinov3_qkvb", "global_pool": "token", "init_values": 0.5},
    "eva02": {"arch": "eva02_tiny_patch14_224"},
    "mixed": {"arch": "vit_small_patch16_rope_mixed_224", "init_values": 0.5},
    "both": {"arch": "vit_small_patch16_rope_ape_224", "init_values": 0.5},
}


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [True, False])
def test_what_the_network_makes_of_hidden_patches_is_what_timm_makes(
    masked: bool, kind: str, separate: bool
) -> None:
    network = small_network(masked=masked, separate=separate, **KINDS[kind])
    masks = masks_of(2, 3)
    hidden = HiddenPatches.of(masks, CPU)
    large, small = random_numbers(2, 3, 3, 32, 32), random_numbers(1, 3, 3, 16, 24, seed=1)
    output = network([large, small], hidden)

    vit: Any = network.backbone
    where = masks.flatten(0, 1)

    def put_tokens(_module: Any, _args: Any, patches: Any) -> Any:
        patches = patches.clone()
        patches[where] = network.mask_token
        return patches

    hook = vit.patch_embed.register_forward_hook(put_tokens) if masked else None
    tokens = vit.forward_features(large.flatten(0, 1))
    if hook is not None:
        hook.remove()
    n_prefix = vit.num_prefix_tokens
    patches = vit.fc_norm(tokens[:, n_prefix:][where.flatten(1)])
    head: Any = network.patch_head if separate else network.head
    torch.testing.assert_close(output.patch_logits, head(patches), atol=1e-5, rtol=0)
    pooled = tokens[:, 0] if vit.global_pool == "token" else vit.fc_norm(tokens[:, n_prefix:].mean(dim=1))
    embeddings = torch.cat([pooled, vit(small.flatten(0, 1))]).view(3, 3, 24)
    torch.testing.assert_close(output.embeddings, embeddings, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        output.logits, network.head(embeddings.flatten(0, 1)).view(3, 3, 6), atol=1e-5, rtol=0
    )
    if not masked:
        torch.testing.assert_close(output.logits, network([large, small]).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["dinov3", "mixed"])
def test_rotary_positions_are_those_of_each_sizes_own_grid(kind: str) -> None:
    """A local crop's corner lies where the crop ends, and its angles reach as far as its own grid."""
    network = small_network(**KINDS[kind])
    vit: Any = network.backbone
    grids: list[Any] = []
    get = vit.rope.get_embed
    vit.rope.get_embed = lambda shape: grids.append(tuple(shape)) or get(shape=shape)
    crops = [random_numbers(2, 3, 3, 32, 32), random_numbers(1, 3, 3, 16, 24)]
    network(crops, HiddenPatches.of(masks_of(2, 3), CPU))
    assert grids == [(4, 4), (2, 3)]


@pytest.mark.parametrize("kind", ["plain", "dinov3"])
def test_the_student_cannot_see_what_is_hidden_and_the_teacher_can(kind: str) -> None:
    masks = torch.zeros(1, 2, 4, 4, dtype=torch.bool)
    masks[0, :, 1:3, :2] = True
    hidden = HiddenPatches.of(masks, CPU)
    crops = random_numbers(1, 2, 3, 32, 32)
    other = crops.clone()
    other[..., 8:24, :16] += 1.0  # the hidden patches alone
    for masked in (True, False):
        network = small_network(masked=masked, **KINDS[kind])
        one, two = network([crops], hidden), network([other], hidden)
        assert torch.equal(one.patch_logits, two.patch_logits) == masked
        assert torch.equal(one.logits, two.logits) == masked


def test_a_student_knows_where_a_rotary_patch_was() -> None:
    """Two hidden patches look the same but for their place."""
    masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0, 0] = masks[0, 0, 3, 2] = True
    crops = random_numbers(1, 1, 3, 32, 32)
    output = small_network(**KINDS["dinov3"])([crops], HiddenPatches.of(masks, CPU))
    assert output.patch_logits is not None
    one, two = output.patch_logits.detach()
    assert float((one - two).abs().max()) > 1e-3


def test_a_network_of_another_kind_is_refused() -> None:
    with pytest.raises(UsageError, match="deit_tiny_distilled_patch16_224 is a VisionTransformerDistilled"):
        build_network(recipe_of("arch=deit_tiny_distilled_patch16_224", "n_prototypes=4"), is_student=True)


# -- the step


def new_state(*settings: str) -> TrainingState:
    recipe = recipe_of(*settings)
    torch.manual_seed(0)
    networks = build_network(recipe, is_student=True), build_network(recipe, is_student=False)
    return TrainingState.create(recipe, *networks, steps_per_epoch=2)


def crops_of(n_images: int) -> list[Any]:
    return [random_numbers(2, n_images, 3, 64, 64), random_numbers(1, n_images, 3, 32, 32, seed=1)]


@pytest.mark.parametrize("settings", [[], ["ibot_separate_head=true"]])
def test_a_step_follows_the_gradient_of_both_losses(settings: list[str]) -> None:
    state, again = new_state(*settings), new_state(*settings)
    masks, crops = masks_of(2, 4), crops_of(4)
    hidden = HiddenPatches.of(masks, CPU)
    result = training_step(state, crops, hidden=[hidden])

    with torch.no_grad():
        teacher = again.teacher(crops[:1], hidden)
    student = again.forward(crops, hidden)
    targets = torch.softmax(teacher.logits / 0.05, dim=-1)  # both centres begin at 0
    names = F.log_softmax(student.logits / 0.1, dim=-1)
    pairs = [(s, t) for s in range(3) for t in range(2) if s != t]
    cls = torch.stack([-(targets[t] * names[s]).sum(dim=-1).mean() for s, t in pairs]).mean()
    words = torch.softmax(teacher.patch_logits / 0.05, dim=-1)
    costs = -(words * F.log_softmax(student.patch_logits / 0.1, dim=-1)).sum(dim=-1)
    by_crop = costs.split(masks.flatten(2).sum(dim=-1).flatten().tolist())
    patches = torch.stack([c.mean() if len(c) else c.sum() for c in by_crop]).mean()
    (cls + 0.7 * patches).backward()
    assert float(result.loss) == pytest.approx(float(cls.detach()), rel=1e-5)
    assert result.ibot_loss is not None
    assert float(result.ibot_loss) == pytest.approx(float(patches.detach()), rel=1e-5)
    for (name, ours), theirs in zip(
        state.student.named_parameters(), again.student.parameters(), strict=True
    ):
        if ours.requires_grad:
            scale = float(theirs.grad.abs().max())
            torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4 * scale + 1e-6, rtol=0, msg=name)
    assert state.student.mask_token.grad.abs().max() > 0 and state.student.mask_token.any()
    torch.testing.assert_close(
        state.masked_patches.targets.center, 0.1 * teacher.patch_logits.mean(dim=0, keepdim=True)
    )


def test_the_teacher_has_no_mask_token_and_follows_in_all_else() -> None:
    state = new_state("ibot_separate_head=true")
    assert state.teacher.mask_token is None and "mask_token" in state.student.state_dict()
    before = {name: value.clone() for name, value in state.teacher.named_parameters()}
    training_step(state, crops_of(4), hidden=[HiddenPatches.of(masks_of(2, 4), CPU)])
    students = dict(state.student.named_parameters())
    assert any(name.startswith("patch_head.") for name in before)
    momentum = float(state.schedules.teacher_momentum[0])
    for name, value in state.teacher.named_parameters():
        expected = momentum * before[name] + (1 - momentum) * students[name].detach()
        torch.testing.assert_close(value, expected, msg=name)


def test_all_prototypes_stay_still_during_the_first_epochs() -> None:
    state = new_state("ibot_separate_head=true", "freeze_last_layer_epochs=1")
    heads: list[Any] = [state.student.head, state.student.patch_head]
    before = [head.last_layer.weight_v.detach().clone() for head in heads]
    training_step(state, crops_of(4), hidden=[HiddenPatches.of(masks_of(2, 4), CPU)])
    assert all(torch.equal(head.last_layer.weight_v, was) for head, was in zip(heads, before, strict=True))


def test_without_weight_nothing_is_there_and_nothing_changes() -> None:
    state = new_state("ibot_weight=0", "ibot_mask_probability=1.0", "ibot_separate_head=true")
    plain = new_state("ibot_weight=0")
    assert state.masked_patches is None
    assert state.student.mask_token is None and state.student.patch_head is None
    names = set(state.student.state_dict())
    assert all(name.startswith(("backbone.", "head.")) for name in names)
    for each in (state, plain):
        result = training_step(each, crops_of(4))
        assert result.ibot_loss is None
    for name, value in plain.student.state_dict().items():
        assert torch.equal(state.student.state_dict()[name], value), name


# -- torch.compile


def losses_of_steps(kind: str, *settings: str) -> Any:
    """(4, 2): both losses of four steps with other patches hidden in each, and none in the second."""
    recipe = recipe_of("n_prototypes=6", "lr=0.1", *settings)
    networks = small_network(**KINDS[kind]), small_network(masked=False, **KINDS[kind])
    state = TrainingState.create(recipe, *networks, steps_per_epoch=2)
    crops = [random_numbers(2, 3, 3, 32, 32), random_numbers(1, 3, 3, 16, 16, seed=1)]
    found = []
    for step in range(4):
        masks = masks_of(2, 3, seed=step, ibot_mask_probability=0.7)
        masks &= step != 1
        result = training_step(state, crops, hidden=[HiddenPatches.of(masks, CPU)])
        assert result.ibot_loss is not None
        found.append(torch.stack([result.loss, result.ibot_loss]))
    return torch.stack(found).detach()


@pytest.mark.parametrize("kind", ["plain", "dinov3"])
def test_what_is_compiled_is_compiled_once_however_many_patches_are_hidden(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._dynamo.testing import CompileCounter

    plain = losses_of_steps(kind)
    counter, torch_compile = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: torch_compile(f, backend=counter, **more))
    torch._dynamo.reset()
    compiled = losses_of_steps(kind, "compile=true")
    torch._dynamo.reset()
    assert counter.frame_count == 2 and counter.op_count > 50  # student and teacher
    torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=0)
    assert len(set(plain[:, 1].tolist())) == 4 and plain[1, 1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "dinov3"])
def test_compiled_steps_have_the_same_losses(kind: str) -> None:
    """With torch's own compiler, which needs one for C++ on a CPU and takes a minute or more."""
    torch._dynamo.reset()
    compiled = losses_of_steps(kind, "compile=true")
    torch._dynamo.reset()
    torch.testing.assert_close(compiled, losses_of_steps(kind), atol=1e-5, rtol=0)


# -- runs


@pytest.fixture
def four_photos(tmp_path: Path, photos: Path) -> Path:
    """Four pictures: a step an epoch."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def saved(run: Path) -> dict[str, Any]:
    state, warnings = checkpoint.load_newest(run / "checkpoint")
    assert state is not None and not warnings
    return state


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], *, atol: float) -> None:
    assert one["step"] == other["step"] > 0
    assert "mask_token" in one["student"] and one["masked_patches"]["targets.center"].any()
    for where in ("student", "teacher", "targets", "masked_patches"):
        assert one[where].keys() == other[where].keys()
        for name, value in one[where].items():
            torch.testing.assert_close(other[where][name], value, rtol=0, atol=atol, msg=f"{where}.{name}")


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_pieces_gives_the_weights_of_the_whole(
    tmp_path: Path, four_photos: Path, accumulate: int
) -> None:
    train([four_photos], tmp_path / "whole", recipe_of())
    train([four_photos], tmp_path / "pieces", replace(recipe_of(), accumulate=accumulate))
    assert_same_weights(saved(tmp_path / "whole"), saved(tmp_path / "pieces"), atol=1e-5)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(tmp_path: Path, four_photos: Path) -> None:
    more = ("arch=vit_tiny_patch16_224", "ibot_separate_head=true")
    train([four_photos], tmp_path / "one", recipe_of(*more))
    settings = (*SETTINGS, *more, "devices=2")
    done = run_command(train_command([four_photos], tmp_path / "two", settings))
    assert done.returncode == 0, done.stderr
    assert_same_weights(saved(tmp_path / "one"), saved(tmp_path / "two"), atol=1e-5)
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("one", "two")]
    losses = [[json.loads(line)["ibot_loss"] for line in run] for run in lines]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)


def test_an_interrupted_run_goes_on_to_the_same_weights_and_its_model_has_no_mask_token(
    tmp_path: Path, four_photos: Path
) -> None:
    recipe = recipe_of("epochs=4", "drop_path_rate=0.2", "optimizer=adamw")
    train([four_photos], tmp_path / "whole", recipe)
    train([four_photos], tmp_path / "cut", recipe, observer=StopAfter(2))
    assert saved(tmp_path / "cut")["step"] == 2
    train([four_photos], tmp_path / "cut", recipe)
    assert_same_weights(saved(tmp_path / "whole"), saved(tmp_path / "cut"), atol=0)

    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(0 <= line["ibot_loss"] < 10 for line in lines)
    assert "Loss of hidden patches" in (tmp_path / "cut" / "report.html").read_text(encoding="utf-8")
    with safe_open(tmp_path / "cut" / "model" / "timm.safetensors", "np") as file:
        names = set(file.keys())
    vit = create_vit(PICO, {"img_size": 64}, PosEmbedResize())
    assert names == set(vit.state_dict())
    with safe_open(tmp_path / "cut" / "model" / "model.safetensors", "np") as file:
        # transformers' class has one, whatever the training: nothing learned goes into it.
        assert not file.get_tensor("embeddings.mask_token").any()


def test_a_loss_of_hidden_patches_that_is_not_finite_stops_the_run(
    tmp_path: Path, four_photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = training_step

    def broken(*args: Any, **more: Any) -> Any:
        return replace(step(*args, **more), ibot_loss=torch.tensor(float("nan")))

    monkeypatch.setattr(trainer, "training_step", broken)
    with pytest.raises(TrainingError, match="the ibot_loss is nan at step 1"):
        train([four_photos], tmp_path / "run", recipe_of())


# -- the recipe


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["arch=resnet50"], "hides patches, and resnet50 has no patches; use a vit_"),
        (
            ["loss=squared_error", "target_normalisation=none"],
            "assigns prototypes to patches, and loss=squared_error",
        ),
        (["predictor=true"], "predictor=true predicts .* use predictor=false with ibot_weight=0.7"),
        (["head_batch_norm=true"], "statistics over crops and patches together"),
        (
            ["ibot_mask_ratio=[0.5, 0.1]"],
            r"two increasing shares of the patches, above 0 and below 1, for instance \[0.1",
        ),
        (["ibot_mask_ratio=[0.1, 1.0]"], "below 1"),
        (["ibot_mask_probability=0"], "above 0 and at most 1; ibot_weight=0 hides nothing"),
        (["global_crop_px=16", "local_crop_px=16"], "a global crop has 1 x 1 patches"),
        (["ibot_weight=-1"], "ibot_weight=-1.0 must not be negative"),
    ],
)
def test_what_does_not_go_together_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_of(*settings)


def test_the_papers_recipe_hides_patches_and_the_others_do_not() -> None:
    assert load_recipe("vits16_ibot").ibot_weight == 1.0
    assert load_recipe("vits16_best").ibot_weight == load_recipe("default").ibot_weight == 0.0
