"""What a run begins with: another run, a checkpoint of facebookresearch/dino, a model."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from golden_runs import GOLDEN, golden_network, golden_recipe, reference_state

torch = pytest.importorskip("torch")

from dinokit.errors import ModelError, UsageError
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import describe_any, resize_position_embedding
from dinokit.training.adapt import adapt
from dinokit.training.networks.initial_weights import begin_with, licence_at_start
from dinokit.training.networks.network import build_network
from dinokit.training.recipe import Recipe, load_recipe, save_recipe, with_overrides
from dinokit.training.run.checkpoint import save_checkpoint
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import training_step


@pytest.fixture
def golden() -> Any:
    return np.load(GOLDEN / "steps_adamw.npz", allow_pickle=False)


def golden_state(golden: Any) -> TrainingState:
    config = json.loads(str(golden["config"]))
    recipe = golden_recipe(config)
    networks = (golden_network(config, recipe.norm_last_layer), golden_network(config, True))
    return TrainingState.create(recipe, *networks, steps_per_epoch=5)


def save_reference_checkpoint(golden: Any, path: Path, *, center: bool = True) -> dict[str, Any]:
    """As main_dino.py saves it: the student wrapped for distributed training, options, learning rates of numpy."""
    student, teacher = reference_state(golden, "student"), reference_state(golden, "teacher")
    content = {
        "student": {f"module.{name}": value for name, value in student.items()},
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-4), "params": [0]}]},
        "epoch": 4,
        "args": argparse.Namespace(arch="vit_tiny", patch_size=8),
        "fp16_scaler": {},
    }
    if center:
        content["dino_loss"] = {"center": torch.from_numpy(golden["center"][-1].copy())[None]}
    torch.save(content, path)
    return {"student": student, "teacher": teacher}


def assert_same(module: Any, expected: dict[str, Any]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


def test_a_checkpoint_of_the_reference_gives_student_teacher_heads_and_centre(
    tmp_path: Path, golden: Any
) -> None:
    theirs = save_reference_checkpoint(golden, tmp_path / "checkpoint.pth")
    state, warnings = golden_state(golden), []
    begin_with(state, str(tmp_path / "checkpoint.pth"), warnings.append)
    assert_same(state.student, theirs["student"])
    assert_same(state.teacher, theirs["teacher"])
    np.testing.assert_array_equal(state.targets.center[0].numpy(), golden["center"][-1])
    assert not warnings and state.step == 0
    assert not any(p.requires_grad for p in state.teacher.parameters())


def test_a_checkpoint_without_a_centre_says_so(tmp_path: Path, golden: Any) -> None:
    save_reference_checkpoint(golden, tmp_path / "checkpoint.pth", center=False)
    state, warnings = golden_state(golden), []
    begin_with(state, str(tmp_path / "checkpoint.pth"), warnings.append)
    assert len(warnings) == 1 and "no centre" in warnings[0]
    assert not state.targets.center.any()


def test_a_checkpoint_of_another_shape_is_refused_by_name(tmp_path: Path, golden: Any) -> None:
    save_reference_checkpoint(golden, tmp_path / "checkpoint.pth")
    state = small_state()
    said = (
        r"is a checkpoint of another shape: .* of the student is .*Use its settings: --set n_prototypes=64 --set "
        r"head_hidden_dim=64 --set head_bottleneck_dim=16 --set patch_size=8 and its arch, whose embeddings have width "
        r"48$"
    )
    with pytest.raises(UsageError, match=said):
        begin_with(state, str(tmp_path / "checkpoint.pth"))
    with pytest.raises(UsageError, match=r"Use its settings: --set patch_size=8 and its arch, whose .* 48$"):
        begin_with(small_state("loss=relations"), str(tmp_path / "checkpoint.pth"))


def test_a_checkpoint_of_the_references_xcit_is_read_under_timms_names(tmp_path: Path) -> None:
    xcit = ("arch=xcit_nano_12_p16_224", "global_crop_px=64", "local_crop_px=32")
    first = small_state(*xcit)

    def theirs(network: Any) -> dict[str, Any]:
        """facebookresearch/xcit: one matrix for queries, keys and values of the class attention."""
        state, found = network.state_dict(), {}
        for name, value in state.items():
            if "cls_attn_blocks" in name and ".attn.q." in name:
                parts = [state[name.replace(".q.", f".{part}.")] for part in "qkv"]
                found[name.replace(".q.", ".qkv.")] = torch.cat(parts)
            elif "cls_attn_blocks" not in name or not (".attn.k." in name or ".attn.v." in name):
                found[name.replace("pos_embed.", "pos_embeder.")] = value.clone()
        return {f"module.{name}": value for name, value in found.items()}

    content = {"student": theirs(first.student), "teacher": theirs(first.teacher)}
    torch.save({**content, "dino_loss": {"center": torch.full((1, 8), 0.5)}}, tmp_path / "xcit.pth")
    torch.manual_seed(1)
    state, warnings = begun_with(tmp_path / "xcit.pth", *xcit)
    assert not warnings
    assert_same(state.student, dict(first.student.state_dict()))
    assert_same(state.teacher, dict(first.teacher.state_dict()))


# -- a model: its backbone only


def small_recipe(*settings: str) -> Recipe:
    small = ["n_prototypes=8", "head_hidden_dim=16", "head_bottleneck_dim=8", "teacher_momentum=0.9"]
    small += ["teacher_temp=0.04", "warmup_teacher_temp=0.04", "device=cpu", "precision=fp32"]
    sizes = ["arch=vit_tiny_patch16_224", "global_crop_px=96", "local_crop_px=32"]
    return with_overrides(load_recipe("default"), [*sizes, *small, *settings])


def small_state(*settings: str) -> TrainingState:
    recipe = small_recipe(*settings)
    networks = (build_network(recipe, is_student=True), build_network(recipe, is_student=False))
    return TrainingState.create(recipe, *networks, steps_per_epoch=5)


def test_a_model_gives_its_backbone_to_both_and_leaves_the_heads_new(starter_weights: dict[str, Any]) -> None:
    state, warnings = small_state(), []
    head = {name: value.clone() for name, value in state.student.head.state_dict().items()}
    begin_with(state, "starter", warnings.append)
    for network in (state.student, state.teacher):
        assert_same(network.backbone, starter_weights)
        assert_same(network.head, head)
    assert not warnings


def test_a_new_head_that_moves_at_once_is_warned_of() -> None:
    state, warnings = small_state("freeze_last_layer_epochs=0"), []
    begin_with(state, "starter", warnings.append)
    assert len(warnings) == 1 and "freeze_last_layer_epochs=1" in warnings[0]


def test_a_frozen_backbone_lets_the_head_learn_alone() -> None:
    sizes = ("global_crop_px=32", "local_crop_px=16", "n_local_crops=1", "warmup_epochs=0", "epochs=2")
    frozen = ("freeze_backbone_epochs=1", "freeze_last_layer_epochs=2")  # not the same number
    recipe = small_recipe(*sizes, *frozen, "init_from=starter", "clip_grad=1e-3")
    networks = (build_network(recipe, is_student=True), build_network(recipe, is_student=False))
    state, warnings = TrainingState.create(recipe, *networks, steps_per_epoch=1), []
    begin_with(state, "starter", warnings.append)
    assert not warnings
    crops = [torch.randn(n, 2, 3, side, side) for n, side in ((2, 32), (1, 16))]

    def moved() -> set[str]:
        before = {name: value.clone() for name, value in state.student.state_dict().items()}
        training_step(state, crops)
        after = state.student.state_dict()
        return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}

    assert moved() == {"head"}
    assert moved() == {"backbone", "head"}


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (("freeze_backbone_epochs=1",), "is not trained yet"),
        (("freeze_backbone_epochs=2", "epochs=2", "init_from=starter"), "leaves none of epochs=2"),
        (("freeze_backbone_epochs=-1", "init_from=starter"), "must not be negative"),
        (
            ("freeze_backbone_epochs=1", "init_from=starter", "loss=relations"),
            "relations has no head, so nothing would",
        ),
    ],
)
def test_a_backbone_that_must_not_stay_frozen(settings: tuple[str, ...], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        small_recipe(*settings)


def test_the_licence_is_that_of_what_the_run_begins_with(tmp_path: Path) -> None:
    assert licence_at_start(small_recipe("init_from=starter"), None) == "apache-2.0"
    assert licence_at_start(small_recipe(), tmp_path) is None
    assert licence_at_start(small_recipe("init_from=nowhere"), tmp_path) is None  # said where it is loaded
    save_recipe(small_recipe("licence=cc0-1.0"), tmp_path / "recipe.yaml")
    assert (
        licence_at_start(small_recipe("init_from=starter"), tmp_path) == "apache-2.0"
    )  # killed before a save
    save_checkpoint(tmp_path / "checkpoint", 1, {"step": 1})
    assert licence_at_start(small_recipe(f"init_from={tmp_path}"), None) == "cc0-1.0"
    # A run that goes on keeps its own, also where its beginning is gone by now.
    assert licence_at_start(small_recipe("init_from=nowhere"), tmp_path) == "cc0-1.0"
    # What is given counts.
    given, _ = adapt(small_recipe("init_from=starter", "licence=mit"), 10, licence="apache-2.0")
    taken, _ = adapt(small_recipe("init_from=starter"), 10, licence="apache-2.0")
    assert (given.licence, taken.licence) == ("mit", "apache-2.0")


def test_positions_follow_the_size_of_the_crops(starter_weights: dict[str, Any]) -> None:
    """At another size the network computes what the model computes there (its own rule of resizing)."""
    from dinokit import load_backbone

    state = small_state("global_crop_px=64")
    begin_with(state, "starter")
    assert state.student.backbone.pos_embed.shape == (1, 1 + 16, 192)
    pictures = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    model: Any = load_backbone("starter", engine="torch").module
    state.student.eval()
    with torch.no_grad():
        expected = model.eval()(pictures)
        torch.testing.assert_close(state.student.backbone(pictures), expected, atol=1e-5, rtol=0)


def test_positions_of_an_oblong_model_keep_their_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """4 x 16 patches are as many as 8 x 8, as which they would be resized."""
    oblong = small_state("global_crop_px=[64, 256]").student.backbone
    config = argparse.Namespace(
        architecture=describe_any(oblong, (64, 256)), timm_architecture="vit_tiny_patch16_224", patch_size=16
    )
    weights = {name: tensor.numpy() for name, tensor in oblong.state_dict().items()}
    located = argparse.Namespace(config=config, load_weights=lambda: dict(weights))
    monkeypatch.setattr("dinokit.training.networks.initial_weights.locate", lambda source: located)
    torch.manual_seed(1)
    same, square = small_state("global_crop_px=[64, 256]"), small_state("global_crop_px=128")
    for state in (same, square):
        begin_with(state, "oblong")
    theirs = torch.from_numpy(weights["pos_embed"])
    assert torch.equal(same.student.backbone.pos_embed, theirs)
    resized = resize_position_embedding(theirs, (8, 8), (4, 16), 1, PosEmbedResize())
    torch.testing.assert_close(square.student.backbone.pos_embed.detach(), resized, atol=0, rtol=0)


def test_positions_of_a_run_follow_the_size_of_the_crops(tmp_path: Path) -> None:
    first = saved_run(tmp_path, "global_crop_px=[64, 256]")
    save_recipe(small_recipe("global_crop_px=[64, 256]"), tmp_path / "recipe.yaml")
    for size, grid in (("128", (8, 8)), ("[64, 256]", (4, 16)), ("96", (6, 6))):
        state, warnings = begun_with(tmp_path, f"global_crop_px={size}")
        assert not warnings
        for ours, theirs in ((state.student, first.student), (state.teacher, first.teacher)):
            expected = dict(theirs.state_dict())
            expected["backbone.pos_embed"] = resize_position_embedding(
                expected["backbone.pos_embed"], grid, (4, 16), 1, PosEmbedResize()
            )
            assert_same(ours, expected)


def test_positions_that_cannot_be_resized_are_not_rearranged(tmp_path: Path) -> None:
    eva = ("arch=eva02_tiny_patch14_224", "patch_size=14", "local_crop_px=28")
    saved_run(tmp_path, *eva, "global_crop_px=[56, 224]")
    save_recipe(small_recipe(*eva, "global_crop_px=[56, 224]"), tmp_path / "recipe.yaml")
    begun_with(tmp_path, *eva, "global_crop_px=[56, 224]")
    with pytest.raises(UsageError, match=r"56 x 224 pixels, not 112 x 112.*image_size_px='\[56, 224\]'$"):
        begun_with(tmp_path, *eva, "global_crop_px=112")


def test_what_is_no_model_is_said_so(tmp_path: Path) -> None:
    state = small_state()
    with pytest.raises(
        UsageError, match=r"init_from=dino_vits17 is not a run, checkpoint or model.*dino_vits16"
    ):
        begin_with(state, "dino_vits17")
    (tmp_path / "broken.pth").write_bytes(b"not a checkpoint")
    with pytest.raises(ModelError, match="cannot be opened as weights only"):
        begin_with(state, str(tmp_path / "broken.pth"))
    (tmp_path / "checkpoint").mkdir()
    with pytest.raises(UsageError, match="has no checkpoint"):
        begin_with(state, str(tmp_path))


def test_another_shape_is_said_with_the_settings_that_fit(tmp_path: Path) -> None:
    wide = small_state("arch=vit_small_patch16_224", "initialisation=xavier")
    with pytest.raises(
        UsageError, match=r"tensors in all\). Use its settings: --set arch=vit_tiny_patch16_224$"
    ):
        begin_with(wide, "starter")
    saved_run(tmp_path)
    said = r"tensors in all\). Use its settings: --set n_prototypes=8 --set head_hidden_dim=16$"
    save_recipe(small_recipe(), tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match=said):
        begin_with(small_state("n_prototypes=24", "head_hidden_dim=24"), str(tmp_path))


def test_only_what_can_be_followed_is_said_of_another_shape(tmp_path: Path) -> None:
    saved_run(tmp_path)
    save_recipe(small_recipe(), tmp_path / "recipe.yaml")
    taught = ("patch_size=8", "n_prototypes=24", "head_hidden_dim=24", "distill_from=hog")
    for loss, said in (
        ("relations", "--set patch_size=16$"),
        ("similarity", "--set patch_size=16 --set head_hidden_dim=16$"),
    ):
        with pytest.raises(UsageError, match=rf"Use its settings: {said}"):
            begin_with(small_state(*taught, f"loss={loss}"), str(tmp_path))


@pytest.fixture(scope="module")
def starter_weights() -> dict[str, Any]:
    from dinokit.loading.locate import locate

    load = locate("starter").load_weights
    assert load is not None
    return {name: torch.from_numpy(array) for name, array in load().items()}


# -- a run of another method: networks are taken, what one of the two has not got starts anew


def saved_run(folder: Path, *settings: str) -> TrainingState:
    """A run's folder with one checkpoint, whose every tensor differs from a new one."""
    state = small_state(*settings)
    parts = [state.student, state.teacher, state.targets]
    if state.masked_patches is not None:
        parts.append(state.masked_patches)
    with torch.no_grad():
        for part in parts:
            for tensor in part.state_dict().values():
                tensor += 0.25 if tensor.is_floating_point() else 1
    save_checkpoint(folder / "checkpoint", 0, state.state_dict())
    return state


def begun_with(folder: Path, *settings: str) -> tuple[TrainingState, list[str]]:
    state, warnings = small_state(*settings), []
    begin_with(state, str(folder), warnings.append)
    return state, warnings


def test_a_run_of_the_same_method_goes_on_with_its_centre(tmp_path: Path) -> None:
    first = saved_run(tmp_path, "ibot_weight=1")
    state, warnings = begun_with(tmp_path, "ibot_weight=0.5")
    assert not warnings
    assert_same(state.student, first.student.state_dict())
    assert_same(state.teacher, first.teacher.state_dict())
    assert state.masked_patches is not None and first.masked_patches is not None
    for ours, theirs in ((state.targets, first.targets), (state.masked_patches, first.masked_patches)):
        assert_same(ours, theirs.state_dict())
        assert all(bool((buffer == 0.25).all()) for buffer in ours.buffers())


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            [],
            ["target_normalisation=sinkhorn"],
            "the centre of .* is left out: the targets of this recipe do not use one",
        ),
        (
            ["target_normalisation=sinkhorn"],
            [],
            "has no centre of the kind that this recipe needs; it starts at 0",
        ),
        ([], ["loss=squared_error"], "has no centre of the kind that this recipe needs; it starts at 0"),
    ],
)
def test_a_run_whose_targets_were_made_otherwise_gives_its_networks_and_says_so(
    tmp_path: Path, before: list[str], now: list[str], message: str
) -> None:
    first = saved_run(tmp_path, *before)
    state, warnings = begun_with(tmp_path, *now)
    assert len(warnings) == 1 and re.search(message, warnings[0]), warnings
    assert_same(state.student, first.student.state_dict())
    assert_same(state.teacher, first.teacher.state_dict())
    assert not any(bool(buffer.any()) for buffer in state.targets.buffers())


@pytest.mark.parametrize("part", ["mask_token", "patch_head.", "predictor."])
def test_parts_that_one_of_two_runs_has_not_got_start_anew_or_are_left_out(tmp_path: Path, part: str) -> None:
    more = {
        "mask_token": ["ibot_weight=1"],
        "patch_head.": ["ibot_weight=1", "ibot_separate_head=true"],
        "predictor.": ["predictor=true"],
    }[part]
    words = {"mask_token": "mask token", "patch_head.": "head for patches", "predictor.": "predictor"}[part]
    plain = saved_run(tmp_path / "plain")
    state, warnings = begun_with(tmp_path / "plain", *more)
    assert any(f"has no {words}; a new one starts" in warning for warning in warnings), warnings
    theirs = plain.student.state_dict()
    for name, value in state.student.state_dict().items():
        assert name.startswith(part) or name == "mask_token" or torch.equal(value, theirs[name]), name
    if part == "patch_head.":  # student and teacher begin with the same
        assert_same(state.teacher.patch_head, state.student.patch_head.state_dict())

    first = saved_run(tmp_path / "more", *more)
    state, warnings = begun_with(tmp_path / "more")
    assert any(f"the {words} of {tmp_path / 'more'} is left out" in warning for warning in warnings), warnings
    theirs = first.student.state_dict()
    assert_same(state.student, {name: theirs[name] for name in state.student.state_dict()})


@pytest.mark.parametrize("separate", [False, True])
def test_a_checkpoint_of_ibot_gives_all_that_it_has(tmp_path: Path, separate: bool) -> None:
    """As main_ibot.py saves it: one MLP, and two last layers that may be one."""
    first = saved_run(tmp_path, "ibot_weight=1")

    def theirs(network: Any) -> dict[str, Any]:
        names = {"mask_token": "backbone.masked_embed"}
        found = {names.get(name, name): value.clone() for name, value in network.state_dict().items()}
        for name in ("weight_g", "weight_v"):
            found[f"head.last_layer2.{name}"] = found[f"head.last_layer.{name}"] * (1.5 if separate else 1.0)
        return {f"module.{name}": value for name, value in found.items()}

    content = {
        "student": theirs(first.student),
        "teacher": theirs(first.teacher),
        "ibot_loss": {"center": torch.full((1, 8), 0.5), "center2": torch.full((1, 1, 8), 0.75)},
    }
    torch.save(content, tmp_path / "ibot.pth")
    state, warnings = begun_with(
        tmp_path / "ibot.pth", "ibot_weight=1", f"ibot_separate_head={str(separate).lower()}"
    )
    assert not warnings and state.masked_patches is not None
    assert bool((state.targets.center == 0.5).all())
    assert bool((state.masked_patches.targets.center == 0.75).all())
    for ours, saved in ((state.student, first.student), (state.teacher, first.teacher)):
        expected = dict(saved.state_dict())
        if separate:
            head = {name: value for name, value in expected.items() if name.startswith("head.")}
            expected |= {
                f"patch_{name}": value * (1.5 if "last_layer" in name else 1.0)
                for name, value in head.items()
            }
        assert_same(ours, expected)

    # DINO takes what it knows, and says what it leaves out.
    state, warnings = begun_with(tmp_path / "ibot.pth")
    assert [warning.split(" of ")[0] for warning in warnings] == [
        "the mask token",
        *(["the head for patches"] if separate else []),
    ]
