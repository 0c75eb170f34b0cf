"""FSDP: weights, gradients and optimiser state sharded over the processes, for networks too large for one GPU.

Each process keeps a shard of every weight. A block's weights are gathered before it runs and freed after it; each
process receives the gradients of its own shard, averaged over all. The results are those of the whole network in every
process.

torch's `fully_shard` does this; weights become DTensors, of which each process holds its shard. Checkpoints hold whole
tensors, so that a run can resume with another number of processes, or with the whole network in each.

Source: Rajbhandari et al. 2020 (ZeRO, stage 3); Zhao et al. 2023 (PyTorch FSDP); torch's documentation of
`torch.distributed.fsdp.fully_shard`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.training.devices.processes import Processes
from dinokit.training.networks.network import Network
from dinokit.training.networks.shared_layers import block_on_packed, can_share_layers

__all__ = [
    "add_up",
    "fill_outline",
    "is_sharded",
    "load_whole",
    "load_whole_optimizer",
    "local",
    "outline",
    "shard",
    "whole_optimizer_state",
    "whole_state",
]

_SMALL = 0.01
"""Share of a backbone's weights below which a list of blocks, such as a stem, is not gathered block by block."""
_LARGE = 0.1
"""Share of a backbone's weights above which a part that is not a list of blocks is gathered by itself."""


def shard(network: Network, processes: Processes) -> None:
    """Shards a network in place: each process keeps its shard of the weights, on its device.

    Args:
        network: with the same weights in all processes; before the optimiser sees it.
        processes: of this run, more than one.

    Raises:
        UsageError: this torch cannot average gradients on these devices.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # The network returns views, and no caller changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view", category=UserWarning)
    mesh = init_device_mesh(processes.device.type, (processes.world_size,))
    _must_average(processes, mesh)
    shares_layers = can_share_layers(network.backbone)
    parts = [*_blocks(network.backbone), network.head, network.predictor, network.patch_head]
    for part in parts:
        if part is not None and any(True for _ in part.parameters()):
            fully_shard(part, mesh=mesh)
    if shares_layers:
        blocks: Any = network.backbone.blocks
        for block in blocks:  # their forward is not called, since all sizes go through a block at once
            block.on_packed = MethodType(block_on_packed, block)
            register_fsdp_forward_method(block, "on_packed")
    fully_shard(network, mesh=mesh)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        # FSDP keeps the root's weights gathered for the backward pass, and a teacher has none.
        network.register_forward_hook(lambda module, *_: module.reshard())


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """Parts to gather one at a time: items of lists (blocks of a ViT or ResNet), and other parts with many weights."""
    n_weights = _count(backbone)
    for part in backbone.children():
        if _is_list(part) and _count(part) > _SMALL * n_weights:
            yield from _items(part)
        elif _count(part) > _LARGE * n_weights:
            yield part


def _items(blocks: nn.Module) -> Iterator[nn.Module]:
    for block in blocks.children():
        if _is_list(block):
            yield from _items(block)
        elif _count(block):
            yield block


def _is_list(module: nn.Module) -> bool:
    return type(module) in (nn.Sequential, nn.ModuleList)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _must_average(processes: Processes, mesh: Any) -> None:
    """Some versions of torch sum gradients on CPUs instead of averaging them (pytorch issue 162338)."""
    from torch.distributed.fsdp import fully_shard

    if processes.device.type != "cpu":
        return
    # Its weights do not matter; on the meta device they draw none of the run's random numbers.
    probe = nn.Linear(1, processes.world_size, bias=False, device="meta").to_empty(device="cpu")
    fully_shard(probe, mesh=mesh)
    try:
        probe(torch.ones(1, 1)).sum().backward()
        found: float | None = float(local(probe.weight.grad))  # type: ignore[arg-type]
    except (RuntimeError, AttributeError):  # torch 2.6 asks the CPU for a stream's events
        found = None
    if found != 1.0:
        raise UsageError(
            f"torch {torch.__version__} cannot average gradients of strategy=fsdp on CPUs; use strategy=ddp, "
            "device=cuda, or a newer torch"
        )


# -- tensors


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process has only a shard of the tensor."""
    return hasattr(tensor, "to_local")  # without importing DTensor


def local(tensor: Tensor) -> Tensor:
    """This process's shard of a sharded tensor, without gradient; any other tensor itself."""
    if not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def add_up(tensor: Tensor) -> Tensor:
    """Sums a tensor over the processes that share the weights, in place; called by all of them together."""
    torch.distributed.all_reduce(tensor)
    return tensor


def _whole(tensor: Any) -> Tensor:
    """The whole of a sharded tensor; called by all processes together."""
    full: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return full


def _like(tensor: Tensor, other: Any) -> Tensor:
    """A whole tensor sharded as another of its shape, if that one is sharded."""
    if is_sharded(tensor) or not is_sharded(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device, other.dtype), other.device_mesh, other.placements)


def _beside(moment: Tensor, weight: Tensor) -> Tensor:
    """An optimiser's moment with the memory layout of its weight, since a fused step walks both in memory order.
    Weights of convolutions are channels-last, unless they are sharded."""
    moment = _like(moment, weight)
    if is_sharded(weight) or moment.shape != weight.shape or moment.stride() == weight.stride():
        return moment
    return torch.empty_like(weight, dtype=moment.dtype, device=moment.device).copy_(moment)


# -- what is saved


@torch.no_grad()
def whole_state(module: nn.Module, *, wanted: bool) -> dict[str, Tensor]:
    """``state_dict()`` with whole tensors on the CPU; called by all processes together.

    Args:
        module: sharded or not.
        wanted: whether this process keeps the tensors.
    """
    found = {}
    for name, tensor in module.state_dict().items():
        full = _whole(tensor)
        if wanted:
            found[name] = full.cpu()
    return found


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a module that may be sharded; called by all processes together.

    Raises:
        RuntimeError: names or shapes differ.
    """
    here = module.state_dict()
    module.load_state_dict({name: _like(tensor, here.get(name)) for name, tensor in state.items()})


@torch.no_grad()
def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, wanted: bool) -> dict[str, Any]:
    """``state_dict()`` of an optimiser with whole tensors on the CPU, see :func:`whole_state`."""
    state = optimizer.state_dict()
    numbers = {}
    for index, values in state["state"].items():
        found = {key: _whole(v) if isinstance(v, Tensor) else v for key, v in values.items()}
        if wanted:
            numbers[index] = {key: v.cpu() if isinstance(v, Tensor) else v for key, v in found.items()}
    return {**state, "state": numbers}


@torch.no_grad()
def load_whole_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """The inverse of :func:`whole_optimizer_state`."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = {
        index: {k: _beside(v, parameters[index]) if isinstance(v, Tensor) else v for k, v in values.items()}
        for index, values in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": numbers})


# -- whole networks, for monitoring


def outline(network: Network) -> Network:
    """A copy of a network without its weights, which takes almost no memory; called before :func:`shard`."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo=dict(empty))


def fill_outline(empty: Network, weights: Mapping[str, Tensor], device: torch.device) -> Network:
    """The network of an :func:`outline` with the given weights, on a device."""
    network = copy.deepcopy(empty)
    network.load_state_dict(weights, assign=True)
    return network.to(device)
