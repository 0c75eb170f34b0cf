"""What the measures of a run say in words: whether it collapses, and what to change.

Source: Caron et al. 2021, Figure 7: cross-entropy = entropy of the teacher + KL(teacher ‖ student). Without
centering the entropy falls to 0, without sharpening it rises to ln K; in both cases the divergence falls to 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["CHANCE", "ENOUGH_PICTURES", "Signs", "verdicts"]

CHANCE = 0.97
"""Share of ln K above which a loss is no better than a guess."""
PATIENCE = 20
"""Logged steps in a row at chance before the verdict."""
ENOUGH_PICTURES = 256
"""Embeddings below which an effective rank reflects their number more than their quality."""


@dataclass(frozen=True)
class Signs:
    """The measures that verdicts are based on."""

    n_prototypes: int
    """K."""
    loss: float
    teacher_entropy: float | None
    """Nats, 0 to ln K; None if the targets are not probabilities."""
    prototypes_used: float
    """Share of the K prototypes that were recently the strongest for some view, 0 to 1."""
    views_seen: int
    """The teacher's views so far."""
    effective_rank: float | None
    n_embeddings: int
    """The number of embeddings that it was measured over."""
    n_dimensions: int
    """Their width D."""
    progress: float
    """How much of the run is done, 0 to 1."""
    steps_at_chance: int
    """Logged steps in a row, after the warm-up, whose loss was above ``CHANCE`` · ln K."""


def verdicts(signs: Signs) -> dict[str, str]:
    """The problems found: kind → a sentence with the remedy. Empty if the run looks sound.

    The kinds are ``uniform``, ``one-prototype``, ``few-prototypes``, ``low-rank`` and ``loss-at-chance``. The limits
    are rules of thumb: in a few runs of small networks they lay well between the runs that learned and those whose
    targets drifted towards uniform.
    """
    found = {} if signs.teacher_entropy is None else _of_the_targets(signs, signs.teacher_entropy)
    possible = min(signs.n_embeddings, signs.n_dimensions)
    if (
        signs.effective_rank is not None
        and signs.n_embeddings >= ENOUGH_PICTURES
        and signs.progress > 0.1
        and signs.effective_rank < 0.1 * possible
    ):
        sharper = (
            "" if signs.teacher_entropy is None else "lower teacher_temp, "
        )  # directions have no temperature
        found["low-rank"] = (
            f"low effective rank: the embeddings use {signs.effective_rank:.0f} of {possible} dimensions, so pictures "
            f"will be hard to tell apart; {sharper}use milder crops or koleo_weight=0.1"
        )
    return found


def _of_the_targets(signs: Signs, entropy: float) -> dict[str, str]:
    ln_k = math.log(signs.n_prototypes)
    agree = signs.loss - entropy <= 0.02 * ln_k  # at the start the student does not agree yet: no alarm
    found: dict[str, str] = {}

    if agree and entropy > 0.98 * ln_k:
        found["uniform"] = (
            f"entropy = ln K, uniform collapse: the teacher's entropy is {entropy:.2f} of "
            f"ln K = {ln_k:.2f} and the student agrees; lower teacher_temp and warmup_teacher_temp (0.02), or "
            "n_prototypes"
        )
    n_used = round(signs.prototypes_used * signs.n_prototypes)
    seen_enough = signs.views_seen >= 4 * signs.n_prototypes
    few = n_used <= max(2, 0.01 * signs.n_prototypes) and signs.n_prototypes > 8
    if agree and entropy < 0.02 * ln_k and (n_used <= 2 or few):
        found["one-prototype"] = (
            f"entropy → 0, one dimension dominates: the teacher's entropy is {entropy:.2f}, "
            f"only {n_used} of {signs.n_prototypes} prototypes are the strongest for any view, and the student agrees; "
            "lower center_momentum so that the centre follows, or raise teacher_temp"
        )
    elif few and seen_enough:
        # Flat targets become sharper by their temperature; sharp ones spread by a centre that follows.
        spread = "teacher_temp" if entropy > 0.5 * ln_k else "center_momentum"
        found["few-prototypes"] = (
            f"only {n_used} of {signs.n_prototypes} prototypes were the strongest for any of the last "
            f"{4 * signs.n_prototypes} views; lower n_prototypes or {spread}, or check that the pictures differ"
        )
    if signs.steps_at_chance >= PATIENCE and "uniform" not in found:
        found["loss-at-chance"] = (
            f"the loss stays at chance: for {signs.steps_at_chance} logged steps it has been above {CHANCE:.0%} of "
            f"ln K = {ln_k:.2f}, the loss of a guess (now {signs.loss:.2f}); lower teacher_temp and "
            "warmup_teacher_temp, or change lr"
        )
    return found
