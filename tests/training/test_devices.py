"""What only GPUs and several processes need, as far as it can be seen without them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import timm
from PIL import Image
from two_processes import RESNET, Case, train

from dinokit.runtime import timm_networks
from dinokit.training import trainer
from dinokit.training.devices.processes import Processes
from dinokit.training.devices.transfer import sent
from dinokit.training.monitoring.step_metrics import step_metrics
from dinokit.training.recipe import Recipe
from dinokit.training.run.state import _compile_each_pass_whole, _dtype
from dinokit.training.views.data import CropLoader
from dinokit.training.views.pictures import collect_pictures

ALONE = Processes(torch.device("cpu"))


def test_a_checkpoint_that_lies_otherwise_in_memory_goes_on_the_same() -> None:
    """As weights in parts are saved: contiguous, where a convolution's have their channels last. A fused step goes
    through weight and moments by their places in memory."""
    case = Case((*RESNET, "optimizer=adamw", "lr=0.01"))
    saved = train(case, ALONE, until=2)
    packed = copy.deepcopy(saved)
    kernels = 0
    for values in packed["optimizer"]["state"].values():
        for key, value in values.items():
            values[key] = value.contiguous()
            kernels += values[key].stride() != value.stride()
    assert kernels
    right, found = (train(case, ALONE, saved=state) for state in (saved, packed))
    for name, value in right["student"].items():
        assert torch.equal(found["student"][name], value), name


@pytest.mark.parametrize(("capability", "dtype"), [((7, 5), "float32"), ((8, 0), "bfloat16")])
def test_bfloat16_is_chosen_where_a_gpu_has_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: str
) -> None:
    asked = []

    def capability_of(device: Any) -> tuple[int, int]:
        asked.append(device)
        return capability

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    monkeypatch.setattr(torch.version, "hip", None)
    device = torch.device("cuda:1")
    assert _dtype("auto", device) == getattr(torch, dtype)
    assert asked == [device]  # not another one that happens to be current
    assert _dtype("bf16", device) == torch.bfloat16
    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert _dtype("auto", device) == torch.bfloat16


@pytest.mark.parametrize(("kind", "waits", "pinned"), [("cuda", False, True), ("mps", True, False)])
def test_what_is_sent_is_waited_for_where_it_must_be(
    monkeypatch: pytest.MonkeyPatch, kind: str, waits: bool, pinned: bool
) -> None:
    done: list[Any] = []

    def to(tensor: Any, device: Any, *, non_blocking: bool) -> Any:
        done.append((device.type, non_blocking))
        return tensor

    def pin_memory(tensor: Any) -> Any:
        done.append("pinned")
        return tensor

    monkeypatch.setattr(torch.Tensor, "to", to)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    sent(torch.zeros(2), torch.device(kind))
    assert done == [*(["pinned"] if pinned else []), (kind, not waits)]


def test_a_run_on_another_gpu_leaves_the_first_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[Any] = []
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dinokit.training.devices.processes.pick_device", torch.device)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert Processes.start("cuda:1").device == torch.device("cuda:1")
    Processes.start("cpu")
    assert chosen == [torch.device("cuda:1")]


def test_processes_share_the_cores_however_they_were_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "1.png")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(24)), raising=False)  # torch asks, too
    monkeypatch.setattr("dinokit.training.views.data.usable_cpus", lambda: 24)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def workers(**settings: Any) -> int:
        recipe = Recipe(global_crop_px=32, local_crop_px=16, batch_size=8, epochs=1, **settings)
        loader: Any = CropLoader(collect_pictures([tmp_path]), recipe).loader
        return int(loader.num_workers)

    assert (workers(), workers(devices=4), workers(workers=3)) == (16, 6, 3)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")  # torchrun's
    assert (workers(), workers(devices=4)) == (3, 3)


def test_a_norm_that_is_not_finite_is_no_number_of_json() -> None:
    from two_processes import new_state, recipe_of

    state = new_state(recipe_of(Case()), ALONE)
    state.step = 1
    one = torch.tensor(1.0)
    for norm, expected in ((1.5, 1.5), (float("inf"), None), (float("nan"), None)):
        result = trainer.StepResult(one, one, torch.tensor(norm))
        assert step_metrics(state, result)["grad_norm"] == expected


def test_memory_that_is_not_enough_says_nothing_of_a_networks_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = timm.create_model("resnet10t", num_classes=0)
    shape = timm_networks.describe_network(module, (64, 64))
    assert shape.size_multiple == 1
    calls = []
    features = timm_networks.features

    def scarce(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return features(*args, **kwargs)

    monkeypatch.setattr(timm_networks, "features", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        timm_networks.describe_network(module, (64, 64))


FAILS = """
import subprocess, sys, torch
from dinokit.training.devices.processes import Processes
here = Processes(torch.device("cpu"))
here._started = [subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(3600)"],
                 stdout=subprocess.PIPE, text=True)]
here._started[0].stdout.readline()
here.end_with_this_one()
print("still there:", here._started[0].poll(), flush=True)
raise SystemExit("the disk is full")
"""


def test_no_process_waits_for_one_that_failed() -> None:
    """The other one holds this one's stderr open: only its end lets the call return."""
    done = subprocess.run([sys.executable, "-c", FAILS], capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (1, "still there: None\n", "the disk is full\n")


@pytest.mark.parametrize(
    ("version", "cut"), [("2.6.0+cu124", False), ("2.14.1", True), ("3.0.0a0+git1", True)]
)
def test_compiled_passes_are_cut_where_torch_can(version: str, cut: bool) -> None:
    from torch._dynamo import config

    with config.patch(optimize_ddp=True):
        _compile_each_pass_whole(version)
        assert config.optimize_ddp is cut
