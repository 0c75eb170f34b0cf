"""The recipe of runs that end in a second, as an object and as options; what a run's weights are."""

from __future__ import annotations

from typing import Any

from pico_vit import PICO

from dinokit.training.recipe import Recipe, with_overrides
from dinokit.training.trainer import TrainingState

TINY = [
    f"arch={PICO}",
    "global_crop_px=32",
    "local_crop_px=16",
    "n_local_crops=1",
    "n_prototypes=16",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "epochs=2",
    "batch_size=2",
    "warmup_epochs=1",
    "drop_path_rate=0.2",
    "log_every_steps=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
]
RECIPE = with_overrides(Recipe(), TINY)


def weights(state: TrainingState) -> dict[str, Any]:
    return {
        **state.teacher.state_dict(),
        **{f"student.{k}": v for k, v in state.student.state_dict().items()},
    }


def tiny_options() -> list[str]:
    return [part for assignment in TINY for part in ("--set", assignment)]
