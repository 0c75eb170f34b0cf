"""The numbers of one step as they are logged, and the check that they are finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from dinokit.errors import TrainingError
from dinokit.training.run import checkpoint
from dinokit.training.run.state import TrainingState
from dinokit.training.step import StepResult

__all__ = ["step_metrics", "stop_unless_finite"]


def step_metrics(state: TrainingState, result: StepResult) -> dict[str, Any]:
    """Plain numbers of the step just done. Reading them waits for the device."""
    done = state.step - 1
    loss = float(result.loss)
    entropy = None if result.teacher_entropy is None else float(result.teacher_entropy)
    return {
        "step": state.step,
        "epoch": round(state.step / state.steps_per_epoch, 4),
        "loss": loss,
        "teacher_entropy": entropy,
        "kl": None if entropy is None else loss - entropy,
        **({} if result.ibot_loss is None else {"ibot_loss": float(result.ibot_loss)}),
        **({} if result.foreground_kl is None else {"foreground_kl": float(result.foreground_kl)}),
        # Not finite at a step that float16's scaler skips, and JSON has no such numbers.
        "grad_norm": norm if math.isfinite(norm := float(result.grad_norm)) else None,
        "lr": float(state.schedules.lr[done]),
        "weight_decay": float(state.schedules.weight_decay[done]),
        "teacher_momentum": float(state.schedules.teacher_momentum[done])
        if state.recipe.teacher == "momentum"
        else None,
        # Directions have no temperature; a loss that compares similarities has its own constant one.
        "teacher_temp": float(state.schedules.teacher_temp[done])
        if state.targets.are_probabilities
        else state.loss.teacher_temp,
    }


def stop_unless_finite(metrics: dict[str, Any], run: Path, dtype: torch.dtype) -> None:
    """Raises TrainingError if a loss or the gradient is NaN or infinite; names the last good checkpoint.

    A loss belongs to the weights before the step. A gradient that is not finite has ruined those after it, which would
    be the ones saved; in float16 the scaler skips such a step.
    """
    watched = ("loss", "ibot_loss", "foreground_kl")
    wrong = [f"the {key} is {metrics[key]}" for key in watched if not math.isfinite(metrics.get(key, 0.0))]
    if dtype != torch.float16 and metrics.get("grad_norm", 0.0) is None:
        wrong.append("the gradient is not finite")
    if wrong:
        kept = checkpoint.checkpoints(run / "checkpoint")
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        finer = "" if dtype == torch.float32 else " or train with --set precision=fp32"
        raise TrainingError(
            f"{wrong[0]} at step {metrics['step']} (learning rate {metrics.get('lr', 'unknown')}); {last}. Lower "
            f"lr{finer}: changed settings are another run, which needs another -o"
        )
