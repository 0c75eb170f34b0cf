"""BatchNorm over two processes: what torch's in one makes of the whole batch, there, back and in its buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from timm.layers.norm_act import BatchNormAct2d
from torch import nn
from two_processes import N_PROCESSES, RESNET, Case, assert_same_training, of_two, train

from dinokit.errors import UsageError
from dinokit.training.devices.processes import Processes
from dinokit.training.devices.shared_batch_norm import share_statistics

SHARES = (3, 2)  # pictures of each process
CHANNELS = 5


def norm_1d() -> Any:
    return nn.BatchNorm1d(CHANNELS)


def norm_2d() -> Any:
    return nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=0.3)


def norm_with_activation() -> Any:
    return BatchNormAct2d(CHANNELS, act_layer=nn.GELU)


def norm_without_weights() -> Any:
    return nn.BatchNorm1d(CHANNELS, affine=False, momentum=None)


def norm_without_buffers() -> Any:
    return nn.BatchNorm2d(CHANNELS, track_running_stats=False)


NORMS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "1d": (norm_1d, ()),
    "1d-sequence": (norm_1d, (4,)),
    "2d": (norm_2d, (3, 2)),
    "activation": (norm_with_activation, (3, 2)),
    "no-weights": (norm_without_weights, ()),
    "no-buffers": (norm_without_buffers, (3, 2)),
}


def made(name: str) -> tuple[Any, Any, Any]:
    """A norm with random weights, a batch far from 0, and a gradient of its output."""
    make, shape = NORMS[name]
    norm, draw = make(), torch.Generator().manual_seed(1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0, 0.5, generator=draw)
    # A mean of 30 spreads: sums of squares in float32 would lose three digits.
    x = torch.randn(sum(SHARES), CHANNELS, *shape, generator=draw) * 0.5 + 15
    return norm, x, torch.randn(x.shape, generator=draw)


def run(norm: Any, x: Any, dy: Any) -> dict[str, Any]:
    """Two steps, so that buffers are moved from where they were moved to; the second's results."""
    norm.train()
    for scale in (1.0, 2.0):
        x = (x * scale).detach().requires_grad_()
        norm.zero_grad()
        y = norm(x)
        y.backward(dy)
    found = {"y": y.detach(), "dx": x.grad}
    found |= {f"d_{name}": p.grad for name, p in norm.named_parameters()}
    return found | {name: buffer.clone() for name, buffer in norm.named_buffers()}


def normalise_in_a_process(rank: int, folder: str) -> None:
    found: dict[str, Any] = {}
    for name in NORMS:
        norm, x, dy = made(name)
        before = copy.deepcopy(norm).state_dict()
        share_statistics(norm)
        assert list(norm.state_dict()) == list(before)
        found[name] = run(norm, x.split(SHARES)[rank], dy.split(SHARES)[rank])
    norm, x, dy = made("2d")
    share_statistics(norm)
    found["bf16"] = run(norm, x.bfloat16().split(SHARES)[rank], dy.bfloat16().split(SHARES)[rank])
    norm.eval()
    found["evaluation"] = norm(x[: rank + 1]).detach()  # no collective: each may have its own pictures
    with torch.no_grad():
        found["no-gradient"] = norm.train()(x.split(SHARES)[rank].to(memory_format=torch.channels_last))
    with pytest.raises(ValueError, match="at least 2 values per channel in training, and the batch has 1"):
        one_value = torch.zeros(1 - rank, CHANNELS)
        norm_of_one = norm_1d()
        share_statistics(norm_of_one)
        norm_of_one(one_value)
    torch.save(found, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    return of_two(normalise_in_a_process, tmp_path_factory.mktemp("processes"))


@pytest.mark.parametrize("name", NORMS)
def test_two_processes_are_one_batch(name: str, two: list[dict[str, Any]]) -> None:
    norm, x, dy = made(name)
    expected = run(norm.double(), x.double(), dy.double())
    here = [process[name] for process in two]
    assert here[0].keys() == here[1].keys() == expected.keys()
    for key, value in expected.items():
        if key in ("y", "dx"):
            found = torch.cat([process[key] for process in here])
        elif key.startswith("d_"):  # summed over the processes by whoever averages gradients
            found = here[0][key] + here[1][key]
        else:  # both know the buffers
            torch.testing.assert_close(here[0][key], here[1][key], rtol=0, atol=0)
            found = here[0][key]
        torch.testing.assert_close(found.double(), value.double(), rtol=1e-5, atol=3e-5, msg=f"{name}.{key}")


def test_statistics_are_float32_where_the_values_are_not(two: list[dict[str, Any]]) -> None:
    norm, x, dy = made("2d")
    expected = run(norm.double(), x.bfloat16().double(), dy.bfloat16().double())
    found = [process["bf16"] for process in two]
    assert all(process["y"].dtype == process["dx"].dtype == torch.bfloat16 for process in found)
    for key in ("running_mean", "running_var"):
        assert found[0][key].dtype == torch.float32
        torch.testing.assert_close(found[0][key].double(), expected[key], rtol=1e-5, atol=1e-5)
    y = torch.cat([process["y"] for process in found]).double()
    torch.testing.assert_close(y, expected["y"], rtol=2**-8, atol=2e-3)
    torch.testing.assert_close(
        found[0]["d_weight"] + found[1]["d_weight"], expected["d_weight"].float(), rtol=1e-4, atol=1e-4
    )


def test_evaluation_asks_no_other_process(two: list[dict[str, Any]]) -> None:
    first, second = (process["evaluation"] for process in two)
    assert len(first) == 1 and len(second) == 2
    torch.testing.assert_close(second[:1], first)
    assert two[0]["no-gradient"].is_contiguous(memory_format=torch.channels_last)


def test_the_classes_stay_what_they_are() -> None:
    network = nn.Sequential(norm_1d(), nn.Sequential(norm_2d(), norm_with_activation()))
    names, tensors = list(network.state_dict()), list(network.parameters())
    share_statistics(network)
    share_statistics(network)  # once more does no harm
    assert list(network.state_dict()) == names
    assert all(now is before for now, before in zip(network.parameters(), tensors, strict=True))
    assert isinstance(network[0], nn.BatchNorm1d) and isinstance(network[1][1], BatchNormAct2d)
    assert isinstance(network[1][1].act, nn.GELU)


def test_a_kind_that_is_not_known_is_refused() -> None:
    with pytest.raises(UsageError, match="1 is a BatchNorm3d, whose statistics cannot be shared"):
        share_statistics(nn.Sequential(norm_1d(), nn.BatchNorm3d(2)))


# -- in training

CASES = {
    "resnet": Case(RESNET, pieces=((4,), (3,))),
    "vit": Case(("head_batch_norm=true", "predictor=true", "lr=0.001"), pieces=((1,), (4,))),
}


def train_in_a_process(rank: int, folder: str) -> None:
    processes = Processes(torch.device("cpu"), rank=rank, world_size=N_PROCESSES)
    torch.save({name: train(case, processes) for name, case in CASES.items()}, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return of_two(train_in_a_process, tmp_path_factory.mktemp("training"))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one(name: str, trained: list[Any]) -> None:
    one = train(CASES[name], Processes(torch.device("cpu")))
    assert_same_training(one, trained[0][name], atol=1e-5, what=name)
    statistics = {key for key in one["teacher"] if key.endswith("running_var")}
    assert statistics  # they are compared, too
    for part in ("student", "teacher"):  # and both processes have them
        for key, value in trained[0][name][part].items():
            torch.testing.assert_close(trained[1][name][part][key], value, rtol=0, atol=0)
