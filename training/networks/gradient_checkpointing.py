"""Gradient checkpointing: a block's activations are recomputed in the backward pass instead of kept.

Only the input of each block of the student is kept. The block runs again when its gradients are computed, so the
activations of one block are in memory at a time: one more pass of the student for less memory. The results are the
same: stochastic depth draws the same numbers as in the first pass, and autocast is restored. The teacher has no
backward pass and keeps nothing in any case.

timm's networks support it by `set_grad_checkpointing`; where this package runs a Vision Transformer's blocks step by
step, `run_block` does what timm's own pass would.

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
    """Turns on recomputation of the blocks of a timm network, in place.

    Args:
        backbone: of a student.
        name: the recipe's ``arch``, for the error.

    Raises:
        UsageError: timm does not support it for this network.
    """
    network: Any = backbone
    try:
        network.set_grad_checkpointing(True)
    except (AttributeError, AssertionError) as error:  # timm asserts if it has no support
        raise UsageError(
            f"gradient_checkpointing=true is not supported by timm for {name}, whose {type(backbone).__name__} has no "
            "working set_grad_checkpointing; use gradient_checkpointing=false with a larger accumulate, or a "
            "network that has it, such as vit_small_patch16_224 or resnet50"
        ) from error


def run_block(network: Any, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """``function(*args, **named)``, a pass through one block, recomputed in the backward pass if
    :func:`checkpoint_blocks` was called."""
    if getattr(network, "grad_checkpointing", False) and torch.is_grad_enabled():
        return checkpoint(function, *args, use_reentrant=False, **named)
    return function(*args, **named)


@contextlib.contextmanager
def keep_buffers(network: nn.Module, *, enabled: bool) -> Iterator[None]:
    """Around a backward pass: undoes the changes that recomputed passes make to buffers.

    Otherwise BatchNorm's running statistics would be updated twice per step. Its output depends on the batch alone, so
    the recomputed result is the same whatever they are.
    """
    buffers = list(network.buffers()) if enabled else []
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
