"""gradient_checkpointing: the same training, bit for bit, with fewer activations kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from small_recipe import SMALL_RECIPE
from stop_after import StopAfter
from torch import nn
from two_processes import RESNET, Case, assert_same_training, new_state, of_two, recipe_of, train

from dinokit.errors import UsageError
from dinokit.training.devices.processes import Processes
from dinokit.training.networks.gradient_checkpointing import checkpoint_blocks
from dinokit.training.networks.network import build_network
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.run import checkpoint
from dinokit.training.trainer import train as train_run

ALONE = Processes(torch.device("cpu"))
ON = "gradient_checkpointing=true"

# Each runs its blocks in another place: shared_layers, timm's own ViT, patch_tokens, timm's own ResNet.
CASES = {
    "all-sizes": Case(("ibot_weight=1",)),
    "one-size": Case(("n_local_crops=0", "precision=bf16")),
    "rotary": Case(("arch=vit_tiny_patch16_dinov3_qkvb", "ibot_weight=0.7")),
    "resnet": Case(RESNET, pieces=((4, 3), (3, 2))),
}


def with_drop_path(case: Case, *settings: str) -> Case:
    """Half of the blocks are left out in the end, so that other random numbers would be other weights."""
    return Case((*case.settings, "drop_path_rate=0.5", *settings), pieces=case.pieces)


def tensors(state: dict[str, Any], name: str = "") -> dict[str, Any]:
    """All of a checkpoint: weights, buffers, the optimiser's sums, random numbers."""
    found: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            found |= tensors(value, f"{name}{key}.")
        elif isinstance(value, torch.Tensor):
            found[f"{name}{key}"] = value
    return found


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    expected, found = tensors(one), tensors(other)
    assert expected.keys() == found.keys()
    assert [name for name, value in expected.items() if not torch.equal(value, found[name])] == []


@pytest.mark.parametrize("name", CASES)
def test_weights_and_buffers_are_the_same(name: str) -> None:
    plain = train(with_drop_path(CASES[name]), ALONE, until=2)
    assert_equal(plain, train(with_drop_path(CASES[name], ON), ALONE, until=2))
    if name == "resnet":
        assert any("running_var" in key for key in plain["student"])


def bytes_kept(network: Any, recipe: Any) -> int:
    """For the way back, beside the weights."""
    crops = [torch.randn(2, 4, 3, *recipe.global_crop_hw)]
    crops += [torch.randn(1, 4, 3, *recipe.local_crop_hw)] if recipe.n_local_crops else []
    masks = torch.tensor([[True, False], [False, True]]).expand(2, 4, 2, 2)
    hidden = HiddenPatches.of(masks, ALONE.device) if recipe.ibot_weight else None
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(crops, hidden)
    assert output.logits.requires_grad
    return sum(n for storage, n in kept.items() if storage not in weights)


@pytest.mark.parametrize("name", CASES)
def test_less_is_kept(name: str) -> None:
    recipe = recipe_of(Case(("arch=vit_tiny_patch16_224", *CASES[name].settings, "precision=fp32", ON)))
    student = build_network(recipe, is_student=True)
    fewer = bytes_kept(student, recipe)
    student.backbone.set_grad_checkpointing(False)
    # Of a ViT's block its input instead of some twenty tensors of that size. Most of this ResNet's are its stem's.
    assert 0 < fewer < bytes_kept(student, recipe) * (0.8 if name == "resnet" else 0.25)


def test_every_block_is_its_own_piece() -> None:
    """At no moment are the activations of two blocks there: a second is computed again after the first is done."""
    state = new_state(recipe_of(Case((ON,))), ALONE)
    blocks: Any = state.student.backbone.blocks
    order: list[str] = []
    for number, block in enumerate(blocks[:3]):
        block.norm1.register_forward_hook(lambda *_, number=number: order.append(f"forward {number}"))
        block.norm1.weight.register_hook(lambda _, number=number: order.append(f"backward {number}"))
    crops = [torch.randn(2, 3, 3, 32, 32), torch.randn(1, 3, 3, 16, 16)]
    state.student(crops).logits.square().sum().backward()
    there = [f"forward {number}" for number in range(3)]
    back = [f"{way} {number}" for number in (2, 1, 0) for way in ("forward", "backward")]
    assert order == there + back


# -- several processes


OF_PROCESSES = [("ddp", "all-sizes"), ("ddp", "resnet"), *(("fsdp", name) for name in CASES)]


def of_a_process(rank: int, folder: str) -> None:
    found: dict[str, Any] = {}
    for strategy, name in OF_PROCESSES:
        processes = Processes(torch.device("cpu"), rank=rank, world_size=2, strategy=strategy)
        found[f"{strategy} {name}"] = train(of_processes(CASES[name]), processes, until=2)
    torch.save(found, f"{folder}/{rank}.pt")


def of_processes(case: Case, *settings: str) -> Case:
    """Without stochastic depth, which draws other numbers in each process."""
    pieces = ((4,), (3,)) if "arch=resnet10t" in case.settings else ((2, 1), (1, 2))
    return Case((*case.settings, "precision=fp32", ON, *settings), pieces=pieces)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Any:
    if torch.__version__.startswith("2.6."):
        pytest.skip("torch 2.6 cannot shard on CPUs")
    return of_two(of_a_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_that_keeps_all(name: str, two: Any) -> None:
    alone = train(of_processes(CASES[name], "gradient_checkpointing=false"), ALONE, until=2)
    for strategy, of_this in OF_PROCESSES:
        if of_this == name:
            assert_same_training(alone, two[0][f"{strategy} {name}"], atol=1e-5, what=f"{strategy} {name}")


# -- as a user


@pytest.mark.parametrize("begun_with", [False, True])
def test_a_run_goes_on_with_or_without_it(begun_with: bool, tmp_path: Path, photos: Path) -> None:
    recipe = replace(SMALL_RECIPE, drop_path_rate=0.5, epochs=2)
    train_run([photos], tmp_path / "whole", recipe)
    run = tmp_path / "run"
    train_run([photos], run, replace(recipe, gradient_checkpointing=begun_with), observer=StopAfter(2))
    state = train_run([photos], run, replace(recipe, gradient_checkpointing=not begun_with))
    assert state.student.backbone.grad_checkpointing is not begun_with
    assert state.teacher.backbone.grad_checkpointing is False
    (whole, _), (resumed, _) = (
        checkpoint.load_newest(tmp_path / of / "checkpoint") for of in ("whole", "run")
    )
    assert whole is not None and resumed is not None
    assert_equal(whole, resumed)


@pytest.mark.parametrize("arch", ["vgg11", "pit_ti_224"])
def test_a_network_without_it_is_refused_at_once(arch: str, tmp_path: Path, photos: Path) -> None:
    recipe = replace(SMALL_RECIPE, arch=arch, gradient_checkpointing=True, drop_path_rate=0.0)
    size = {"global_crop_px": 224, "local_crop_px": 224} if arch == "pit_ti_224" else {"local_crop_px": 32}
    with pytest.raises(
        UsageError, match=rf"gradient_checkpointing=true is not supported by timm for {arch}.* or resnet50"
    ):
        train_run([photos], tmp_path / "run", replace(recipe, **size))


def test_what_is_no_network_of_timm_is_refused() -> None:
    with pytest.raises(
        UsageError, match="by timm for mine, whose Linear has no working set_grad_checkpointing"
    ):
        checkpoint_blocks(nn.Linear(2, 2), "mine")


def test_compiled_passes_keep_less_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    plain = train(CASES["all-sizes"], ALONE, until=2)
    counter, torch_compile = CompileCounterWithBackend("eager"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: torch_compile(f, backend=counter, **more))
    torch._dynamo.reset()
    found = train(
        replace(CASES["all-sizes"], settings=(*CASES["all-sizes"].settings, ON, "compile=true")),
        ALONE,
        until=2,
    )
    torch._dynamo.reset()
    assert_same_training(plain, found, atol=1e-5)
    assert counter.frame_count == 2  # student and teacher
    checkpointed = sum("tag_activation_checkpoint" in str(graph.graph) for graph in counter.graphs)
    assert checkpointed == 1
