"""Optimisers, parameter groups and gradient clipping, as in facebookresearch/dino (`utils.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError
from dinokit.training.devices.sharding import add_up, is_sharded, local

__all__ = ["LARS", "OPTIMIZERS", "clip_gradients", "make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module, *, patch_embed_lr_mult: float = 1.0) -> list[dict[str, Any]]:
    """Two groups: weights with decay, and biases and other vectors without (``decays``).

    With ``patch_embed_lr_mult`` other than 1 the patch embedding has two of its own; ``lr_mult`` is the factor of
    each group's learning rate.

    ``cls_token`` and ``pos_embed`` have three dimensions and therefore decay, as in the reference
    (`get_params_groups`). Frozen parameters are in neither group.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr_mult = patch_embed_lr_mult if "patch_embed." in name else 1.0
            decays = not (name.endswith(".bias") or parameter.ndim == 1)
            groups.setdefault((lr_mult, decays), []).append(parameter)
    return [
        {"params": parameters, "lr_mult": lr_mult, "decays": decays, "weight_decay": 0.0}
        for (lr_mult, decays), parameters in groups.items()
    ]


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) with momentum; vectors get neither decay nor scaling.

    Args:
        params: parameters or groups.
        lr, weight_decay, momentum: as in SGD.
        eta: trust coefficient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        eta: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "eta": eta})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update. ``closure`` is not supported, as nothing here needs a second evaluation."""
        if closure is not None:
            raise ValueError("LARS.step takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return None

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        here, step = local(parameter), local(parameter.grad)
        if parameter.ndim != 1:
            step = step.add(here, alpha=group["weight_decay"])
            lengths = torch.stack(torch._foreach_norm([here, step]))
            length, step_length = _of_the_whole(lengths) if is_sharded(parameter) else lengths
            trust = group["eta"] * length / step_length
            usable = (length > 0) & (step_length > 0)
            step = step * torch.where(usable, trust, torch.ones_like(trust))
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        velocity = local(state["momentum"])
        velocity.mul_(group["momentum"]).add_(step)
        here.add_(velocity, alpha=-group["lr"])


def _of_the_whole(norms: Tensor) -> Tensor:
    """Norms of whole tensors from those of this process's parts."""
    return add_up(norms.square()).sqrt()


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def _sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lars": LARS,
}
"""Learning rate and weight decay are set at every step, from the schedules."""


def make_optimizer(name: str, model: nn.Module, *, patch_embed_lr_mult: float = 1.0) -> torch.optim.Optimizer:
    """An optimiser of :data:`OPTIMIZERS` over the groups of :func:`parameter_groups`."""
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer={name!r} is not known; use one of {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[name](parameter_groups(model, patch_embed_lr_mult=patch_embed_lr_mult))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, per_parameter: bool) -> Tensor:
    """Scales gradients down to ``max_norm`` and returns their total norm before clipping.

    If weights are sharded over processes, norms are those of whole gradients, and all processes call this together.

    Args:
        parameters: those with ``grad`` None are skipped.
        max_norm: 0 turns clipping off.
        per_parameter: the reference's way (`clip_gradients`): each parameter's gradient is clipped by
            its own norm; otherwise all gradients are clipped by their total norm.

    Returns:
        Scalar tensor on the parameters' device; only reading it waits for the device.
    """
    whole = [p.grad for p in parameters if p.grad is not None]
    if not whole:
        return torch.zeros(())
    grads = [local(grad) for grad in whole]
    norms = torch.stack(torch._foreach_norm(grads))
    if is_sharded(whole[0]):
        norms = _of_the_whole(norms)
    total: Tensor = torch.linalg.vector_norm(norms)
    if max_norm > 0:
        measured = norms if per_parameter else total.expand_as(norms)
        factors = (max_norm / (measured + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))
    return total
