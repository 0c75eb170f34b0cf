"""Gradient checkpointing: a block's activations are computed again on the way back, and not kept for it.

Of each block of the student its input is kept alone. When its gradients are computed it runs a second time, so that the
activations of one block are there at once instead of those of all: one more pass of the student for less memory. What
is computed stays the same: stochastic depth draws the numbers of the first pass, and autocast is as it was then. The
teacher, which has no way back, keeps nothing in any case.

timm's networks do it themselves once they are told to (`set_grad_checkpointing`); where this package runs a Vision
Transformer's blocks step by step, `run_block` does what timm's own pass would.

Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", §4; `torch.utils.checkpoint` without
reentrance.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dinokit.errors import UsageError

__all__ = ["checkpoint_blocks", "keep_buffers", "run_block"]


def checkpoint_blocks(backbone: nn.Module, name: str) -> None:
    """Lets the blocks of a timm network be computed again on the way back, in place.

    Args:
        backbone: of a student.
        name: as the recipe has it, for the error.

    Raises:
        UsageError: timm has it not written for this network.
    """
    network: Any = backbone
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts where it has none
        raise UsageError(
            f"gradient_checkpointing=true is not written for {name} in timm, whose {type(backbone).__name__} has no "
            "set_grad_checkpointing that does it; use gradient_checkpointing=false with a larger accumulate, or a "
            "network that has it, such as vit_small_patch16_224 or resnet50"
        ) from error


def run_block(network: Any, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``function(*args, **named)``, a pass through one block, computed again on the way back where the network is told
    to by :func:`checkpoint_blocks`."""
    if getattr(network, "grad_checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **named)
    return function(*args, **named)


@contextlib.contextmanager
def keep_buffers(network: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Around a backward pass: what passes that are computed again do to buffers is undone.

    BatchNorm's running statistics would move twice a step. Its output follows from the batch alone, so what is computed
    again is the same whatever they are.
    """
    buffers = list(network.buffers()) if enabled else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
