"""FSDP: weights, gradients and optimiser state shared out over the processes, for networks too large for one GPU.

Each process keeps a part of every weight. Before a block of the network runs, the others' parts of its weights are
fetched, and after it they are let go; of gradients each process gets the sum for its own part. What is computed is what
every process with the whole network would compute.

torch's `fully_shard` does it; weights become DTensors, of which each process holds its part. Checkpoints hold whole
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
    "is_shared_out",
    "load_whole",
    "load_whole_optimizer",
    "local",
    "outline",
    "share_out",
    "whole_optimizer_state",
    "whole_state",
]

# Shares of a backbone's weights: a list of blocks with less is no use to fetch one by one, such as a stem;
_SMALL = 0.01
# a part that is no list of blocks, with more, is fetched by itself.
_LARGE = 0.1


def share_out(network: Network, processes: Processes) -> None:
    """Leaves each process its part of the weights, in place, on its device.

    Args:
        network: with the same weights in all processes; before the optimiser sees it.
        processes: of this run, more than one.

    Raises:
        UsageError: this torch cannot average gradients on these devices.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # What the network returns are views, and nobody changes them in place.
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
        for block in blocks:  # which are not called, since all sizes go through them at once
            block.on_packed = MethodType(block_on_packed, block)
            register_fsdp_forward_method(block, "on_packed")
    fully_shard(network, mesh=mesh)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        # The rest of the network is kept for the way back, and a teacher has none.
        network.register_forward_hook(lambda module, *_: module.reshard())


def _blocks(backbone: nn.Module) -> Iterator[nn.Module]:
    """What is fetched at once: items of lists (a ViT's blocks, a ResNet's), other parts with many of the weights."""
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
    """On CPUs some versions of torch add gradients up where they are to be averaged (pytorch issue 162338)."""
    from torch.distributed.fsdp import fully_shard

    if processes.device.type != "cpu":
        return
    # Its weights do not matter, and are not drawn: the run's random numbers stay what they are.
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


def is_shared_out(tensor: Tensor) -> bool:
    """Whether this process has a part of the tensor only."""
    return hasattr(tensor, "to_local")  # without loading the class that has it


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out, without gradient; any other tensor itself."""
    if not is_shared_out(tensor):
        return tensor
    with torch.no_grad():
        part: Tensor = tensor.to_local()  # type: ignore[attr-defined]
    return part


def add_up(tensor: Tensor) -> Tensor:
    """Adds a tensor up over those who share weights out, in place; called by all of them together."""
    torch.distributed.all_reduce(tensor)
    return tensor


def _whole(tensor: Any) -> Tensor:
    """The tensor of which all processes have a part; called by all of them together."""
    full: Tensor = tensor.full_tensor() if is_shared_out(tensor) else tensor
    return full


def _like(tensor: Tensor, other: Any) -> Tensor:
    """A whole tensor shared out as another of its shape is, if that is."""
    if is_shared_out(tensor) or not is_shared_out(other) or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(other.device, other.dtype), other.device_mesh, other.placements)


def _beside(moment: Tensor, weight: Tensor) -> Tensor:
    """What an optimiser keeps of a weight, lying in memory as the weight does: a fused step goes through both by their
    places. Weights of convolutions have their channels last, but not where they are shared out."""
    moment = _like(moment, weight)
    if is_shared_out(weight) or moment.shape != weight.shape or moment.stride() == weight.stride():
        return moment
    return torch.empty_like(weight, dtype=moment.dtype, device=moment.device).copy_(moment)


# -- what is saved


@torch.no_grad()
def whole_state(module: nn.Module, *, wanted: bool) -> dict[str, Tensor]:
    """``state_dict()`` with whole tensors on the CPU; called by all processes together.

    Args:
        module: shared out or not.
        wanted: in this process; where it is not, nothing is kept.
    """
    found = {}
    for name, tensor in module.state_dict().items():
        full = _whole(tensor)
        if wanted:
            found[name] = full.cpu()
    return found


@torch.no_grad()
def load_whole(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """``load_state_dict`` of whole tensors into a module that may be shared out; called by all processes together.

    Raises:
        RuntimeError: names or shapes are others.
    """
    here = module.state_dict()
    module.load_state_dict({name: _like(tensor, here.get(name)) for name, tensor in state.items()})


@torch.no_grad()
def whole_optimizer_state(optimizer: torch.optim.Optimizer, *, wanted: bool) -> dict[str, Any]:
    """``state_dict()`` of an optimiser with whole tensors on the CPU; as :func:`whole_state`."""
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


# -- whole networks, to look at


def outline(network: Network) -> Network:
    """A copy of a network without its weights, which takes next to no memory; before :func:`share_out`."""
    empty = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in network.parameters()}
    return copy.deepcopy(network, memo=dict(empty))


def fill_outline(empty: Network, weights: Mapping[str, Tensor], device: torch.device) -> Network:
    """The network that :func:`outline` was taken of, with these weights, on a device."""
    network = copy.deepcopy(empty)
    network.load_state_dict(weights, assign=True)
    return network.to(device)
