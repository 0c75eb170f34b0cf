"""Optimisers, parameter groups and gradient clipping, as facebookresearch/dino has them (`utils.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dinokit.errors import UsageError

__all__ = ["LARS", "OPTIMIZERS", "clip_gradients", "make_optimizer", "parameter_groups"]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups: weights that decay, and biases and other vectors that do not.

    ``cls_token`` and ``pos_embed`` have three dimensions and therefore decay, as in the reference
    (`get_params_groups`). Parameters without gradient are in neither.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (plain if name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


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
        step = parameter.grad
        assert step is not None
        if parameter.ndim != 1:
            step = step.add(parameter, alpha=group["weight_decay"])
            length, step_length = torch.norm(parameter), torch.norm(step)
            trust = group["eta"] * length / step_length
            usable = (length > 0) & (step_length > 0)
            step = step * torch.where(usable, trust, torch.ones_like(trust))
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        velocity: Tensor = state["momentum"]
        velocity.mul_(group["momentum"]).add_(step)
        parameter.add_(velocity, alpha=-group["lr"])


def _adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0, fused=True)


def _sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]]], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "sgd": _sgd,
    "lars": LARS,
}
"""Learning rate and weight decay are set anew at every step, from the schedules."""


def make_optimizer(name: str, model: nn.Module) -> torch.optim.Optimizer:
    """An optimiser of :data:`OPTIMIZERS` over the two groups of :func:`parameter_groups`."""
    if name not in OPTIMIZERS:
        raise UsageError(f"optimizer={name!r} is not known; use one of {sorted(OPTIMIZERS)}")
    return OPTIMIZERS[name](parameter_groups(model))


@torch.no_grad()
def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, *, per_parameter: bool) -> Tensor:
    """Scales gradients down to ``max_norm`` and returns the norm of all of them together, before that.

    Args:
        parameters: those with ``grad`` None are passed over.
        max_norm: 0 turns clipping off.
        per_parameter: the reference's way (`clip_gradients`): each parameter's gradient has a norm of its own;
            otherwise the norm of all gradients together is clipped.

    Returns:
        Scalar tensor on the parameters' device; reading it is the only thing that would wait for the device.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return torch.zeros(())
    norms = torch.stack(torch._foreach_norm(grads))
    total: Tensor = torch.linalg.vector_norm(norms)
    if max_norm > 0:
        measured = norms if per_parameter else total.expand_as(norms)
        factors = (max_norm / (measured + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(factors.unbind()))
    return total
