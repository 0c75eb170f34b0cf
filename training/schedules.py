"""Learning rate, weight decay, teacher momentum and teacher temperature over a run.

One value per optimiser step, as in facebookresearch/dino (`utils.py`, `cosine_scheduler`;
`main_dino.py`, `DINOLoss.__init__`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["cosine", "teacher_temperature"]

Schedule = NDArray[np.float64]


def cosine(base: float, final: float, n_steps: int, *, warmup_steps: int = 0, start: float = 0.0) -> Schedule:
    """Linear from ``start`` to ``base`` over the warm-up, then half a cosine from ``base`` towards ``final``.

    Args:
        base: value after the warm-up.
        final: value that the cosine approaches; the last step is one step before it, as in the reference.
        n_steps: length of the whole schedule.
        warmup_steps: length of its linear part, at most ``n_steps``.
        start: first value of the linear part.

    Returns:
        (n_steps,) float64.
    """
    warmup_steps = min(warmup_steps, n_steps)
    warmup = np.linspace(start, base, warmup_steps)
    rest = n_steps - warmup_steps
    progress = np.arange(rest) / max(rest, 1)
    return np.concatenate([warmup, final + 0.5 * (base - final) * (1 + np.cos(np.pi * progress))])


def teacher_temperature(
    warmup: float, final: float, n_epochs: int, steps_per_epoch: int, *, warmup_epochs: int = 0
) -> Schedule:
    """Linear from ``warmup`` to ``final`` over ``warmup_epochs``, then constant; one value per epoch.

    As in the reference, the temperature is constant within an epoch (a staircase).

    Returns:
        (n_epochs * steps_per_epoch,) float64.
    """
    warmup_epochs = min(warmup_epochs, n_epochs)
    per_epoch = np.concatenate(
        [np.linspace(warmup, final, warmup_epochs), np.full(n_epochs - warmup_epochs, final)]
    )
    return np.repeat(per_epoch, steps_per_epoch)
