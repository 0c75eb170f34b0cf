"""Which vector stands for a picture: the CLS token, the mean of the patches, or both; at length 1 on request.

``cls`` is the paper's embedding. ``mean`` averages the patches' tokens after the final norm; registers do not
count. ``cls+mean`` writes one after the other, (2 D), as the linear probe of Oquab et al. 2023 (DINOv2,
appendix B.3) does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from dinokit.contract import POOLED, TOKENS
from dinokit.errors import UsageError

__all__ = ["WHAT", "check_what", "outputs_for", "pool", "vector_length"]

WHAT = ("cls", "mean", "cls+mean")


def check_what(what: str) -> str:
    """``what`` itself. Raises UsageError when it is not one of ``WHAT``."""
    if what not in WHAT:
        raise UsageError(f"what={what!r} is not known; expected one of {', '.join(WHAT)}")
    return what


def vector_length(what: str, embed_dim: int) -> int:
    """Numbers of a vector of this kind by a model of width ``embed_dim``."""
    return embed_dim * len(check_what(what).split("+"))


def outputs_for(what: str) -> list[str]:
    """The engine's outputs that :func:`pool` needs."""
    names = {"cls": POOLED, "mean": TOKENS}
    return [names[part] for part in check_what(what).split("+")]


def pool(
    outputs: Mapping[str, NDArray[np.float32]], what: str, *, n_prefix: int, normalize: bool = False
) -> NDArray[np.float32]:
    """The vectors of a batch.

    Args:
        outputs: those of :func:`outputs_for`, float32: ``pooler_output`` (B, D), ``last_hidden_state`` (B, 1+R+N, D).
        what: one of ``WHAT``.
        n_prefix: 1 + R, the tokens before the patches'.
        normalize: divide each vector as a whole by its Euclidean length; zeros stay zeros.

    Returns:
        (B, D), or (B, 2 D) for ``cls+mean``, float32.
    """
    parts = []
    for part in what.split("+"):
        if part == "cls":
            parts.append(outputs[POOLED])
        else:
            patches = outputs[TOKENS][:, n_prefix:]
            parts.append(patches.mean(axis=1, dtype=np.float64).astype(np.float32))
    vectors = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if normalize:
        length = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
        vectors = (vectors / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
    return vectors
