"""A step leaves the device to work on its own: it reads no number from it, and sends none that it would wait for.

On torch's meta device, which has shapes and no numbers: whatever would wait for a GPU, or mix its tensors with those of
the CPU, is seen here without one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from pico_vit import PICO
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dinokit.training import trainer
from dinokit.training.adapt import adapt
from dinokit.training.devices.processes import Processes
from dinokit.training.distillation.frozen_teacher import FrozenTeachers, find_teachers, width_of
from dinokit.training.networks.network import build_network
from dinokit.training.recipe import load_recipe, with_overrides
from dinokit.training.run.state import TrainingState
from dinokit.training.views.data import Batch
from dinokit.training.views.step_pieces import Normalise, hidden_patches, teaching_weights

META = torch.device("meta")
SMALL = (
    "global_crop_px=64",
    "local_crop_px=32",
    "n_local_crops=2",
    "n_prototypes=64",
    "head_hidden_dim=32",
    "head_bottleneck_dim=16",
    "batch_size=4",
    "epochs=2",
    "precision=fp32",
)
aten = torch.ops.aten
COPIES = (aten._to_copy.default, aten.copy_.default)


class Waits(TorchDispatchMode):
    """Writes down what makes the host wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        tensors = [a for a in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
        on_device = [t for t in tensors if t.device == META]
        if func is aten._local_scalar_dense.default and on_device:
            self.found.append("a number is read")
            return 1.0
        if func in COPIES:
            target = kwargs.get("device") if func is COPIES[0] else args[0].device
            source = args[0].device if func is COPIES[0] else args[1].device
            if (target or source) != source and not kwargs.get("non_blocking", len(args) > 2 and args[2]):
                self.found.append(f"a copy from {source} to {target}")
        elif on_device and any(t.device != META and t.ndim for t in tensors):
            self.found.append(f"{func} of tensors on both")
        return func(*args, **kwargs)


class Sent(TorchFunctionMode):
    """Python's numbers that become tensors on the device go there by a copy that is not seen further down."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        made = func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and made.device == META:
            self.found.append("numbers are sent")
        return made


@contextlib.contextmanager
def waits() -> Iterator[list[str]]:
    with Waits() as below, Sent(below.found):
        yield below.found


def a_state(name: str, *settings: str) -> TrainingState:
    recipe = with_overrides(load_recipe(name), [f"arch={PICO}", *SMALL, *settings])
    models = find_teachers(recipe)
    recipe, _ = adapt(recipe, 100, teacher_dim=width_of(models) or None)
    state = TrainingState.create(
        recipe,
        build_network(recipe, is_student=True),
        build_network(recipe, is_student=False),
        steps_per_epoch=2,
        processes=Processes(META),
        frozen_teachers=FrozenTeachers(models, recipe, torch.device("cpu")).to(META) if models else None,
    )
    for group in state.optimizer.param_groups:
        if group.get("fused"):  # has no kernel for this device
            group.update(fused=False, foreach=True)
    return state


def a_batch(state: TrainingState) -> Batch:
    recipe = state.recipe

    def crops(n: int, side: int) -> Tensor:
        return torch.zeros(n, 4, 3, side, side, dtype=torch.uint8)

    masks = None
    if recipe.ibot_weight:
        masks = torch.from_numpy(np.random.default_rng(0).random((2, 4, 4, 4)) < 0.3)
    teaching = torch.ones(4, len(recipe.teachers)) if recipe.distill_pictures else None
    return Batch(crops(2, 64), crops(2, 32) if recipe.n_local_crops else None, [], masks, teaching)


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none for this device."""

    def nothing(*_args: Any, **_kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    monkeypatch.setattr(torch, "autocast", nothing)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("default", ()),
        ("default", ("koleo_weight=0.1", "clip_per_parameter=true")),
        ("default", ("foreground_weight=1",)),
        ("default", ("arch=resnet18", "optimizer=lars")),
        ("default", ("arch=xcit_nano_12_p16_224", "optimizer=sgd")),
        ("default", ("distill_from=starter", "loss=similarity", "n_prototypes=null", "queue_length=8")),
        ("default", ("distill_from=hog", "loss=similarity", "n_prototypes=null", "queue_length=8")),
        ("default", ("distill_from=hog", "loss=relations", "n_prototypes=null", "queue_length=8")),
        (
            "default",
            (
                "distill_from=[hog, hog]",
                "distill_pictures=['*a*', null]",
                "loss=relations",
                "n_prototypes=null",
            ),
        ),
        ("vits16_ibot", ()),
        ("vits16_ibot", ("gradient_checkpointing=true",)),
        ("default", ("arch=resnet18", "gradient_checkpointing=true")),
        ("vits16_moco", ("queue_length=8",)),
        ("vits16_byol", ()),
        ("vits16_swav", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_step_does_not_wait(recipe: str, settings: tuple[str, ...]) -> None:
    state = a_state(recipe, *settings)
    normalise = Normalise(state.recipe, META)
    batch = a_batch(state)

    with waits() as found:
        for _ in range(2):  # the second has a queue that is not empty, and ends the epoch
            crops = normalise(batch)
            result = trainer.training_step(
                state,
                crops,
                hidden=hidden_patches([batch], META),
                teaching=teaching_weights([batch], META),
            )

    assert found == []
    assert state.step == 2
    assert result.loss.device == META


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (lambda x: x.sum().item(), "a number is read"),
        (lambda x: x.new_tensor(2.0) if bool(x.sum() > 0) else x, "a number is read"),
        (lambda x: torch.tensor([1.0, 2.0], device=x.device) * x, "numbers are sent"),
        (lambda x: x.new_tensor([1.0, 2.0]) * x, "numbers are sent"),
        (lambda x: torch.zeros(2).to(x.device) + x, "a copy from cpu to meta"),
        (lambda x: torch.zeros(2, 2) @ x.outer(x), "aten.mm.default of tensors on both"),
        (lambda x: x[torch.tensor([0])], "aten.index.Tensor of tensors on both"),
    ],
)
def test_waiting_is_seen(wrong: Callable[[Tensor], Any], expected: str) -> None:
    with waits() as found:
        wrong(torch.zeros(2, device=META))
    assert expected in found
