"""The vector of a picture: CLS tokens, the mean of the patches, or both; L2-normalised on request.

``cls`` is the paper's embedding, the last block's CLS token after the final norm. ``mean`` averages that block's
patches; registers do not count. ``cls+mean`` concatenates them, (2 D): facebookresearch/dino's linear evaluation of a
ViT-B uses it, and that of Oquab et al. 2023 (DINOv2, appendix B.3). ``cls:4`` concatenates the CLS tokens of the last
four blocks, each after the final norm, the last block's last, (4 D): the paper's linear evaluation of a ViT-S uses it
(``eval_linear.py``, ``--n_last_blocks 4``; section 5.1). ``cls:4+mean`` is all of these, (5 D).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import POOLED, TOKENS, block_output

__all__ = ["WHAT", "check_what", "has_inner_blocks", "outputs_for", "pool", "vector_length"]

WHAT = ("cls", "mean", "cls+mean")
"""Available from every network and file that has a feature map; the others need a ViT's inner blocks."""
_INNER = re.compile(r"cls:([1-9]\d{0,3})(\+mean)?")


def check_what(what: str) -> str:
    """``what`` itself. Raises UsageError if there is no such vector."""
    found = _INNER.fullmatch(what) if isinstance(what, str) else None
    if found is None and what not in WHAT:
        raise UsageError(
            f"what={what!r} is not known; expected one of {', '.join(WHAT)}, or cls:4 or cls:4+mean with the CLS "
            "tokens of the last 4 blocks"
        )
    if found and int(found[1]) == 1:  # one spelling each: tables are compared by it
        raise UsageError(f"what={what!r} is the same as what={what.replace(':1', '')!r}; use that")
    return what


def has_inner_blocks(what: str) -> bool:
    """Whether it uses blocks before the last."""
    return _last_blocks(what) > 1


def vector_length(what: str, embed_dim: int) -> int:
    """The length of such a vector for a model of width ``embed_dim``."""
    return embed_dim * (_last_blocks(check_what(what)) + what.endswith("mean"))


def outputs_for(what: str, config: BackboneConfig) -> list[str]:
    """The outputs of the engine that :func:`pool` concatenates, in order.

    Raises:
        UsageError: there is no such vector, or the network has no such blocks.
    """
    count = _last_blocks(check_what(what))
    inner: list[str] = []
    if count > 1:
        if not isinstance(config.architecture, VitArchitecture):
            raise UsageError(
                f"{config.name} is not a Vision Transformer of the DINO family and has no CLS tokens of inner blocks "
                f"for what={what!r}; use what='cls', its embedding"
            )
        depth = config.vit.depth
        if count > depth:
            raise UsageError(
                f"{config.name} has {depth} blocks, too few for what={what!r}; at most cls:{depth}"
            )
        inner = [block_output(index, norm=True) for index in range(depth - count, depth - 1)]
    return [*inner, *([POOLED] if count else []), *([TOKENS] if what.endswith("mean") else [])]


def pool(
    outputs: Mapping[str, NDArray[np.float32]],
    parts: Sequence[str],
    *,
    n_prefix: int,
    normalize: bool = False,
) -> NDArray[np.float32]:
    """The vectors of a batch.

    Args:
        outputs: of an engine, float32: ``pooler_output`` (B, D), ``last_hidden_state`` and those of inner blocks
            (B, 1+R+N, D).
        parts: which of them, in the order of :func:`outputs_for`.
        n_prefix: 1 + R, the tokens before the patches'.
        normalize: divide each vector as a whole by its Euclidean length; zeros stay zeros.

    Returns:
        (B, D · parts) float32.
    """
    vectors = [_part(name, outputs[name], n_prefix) for name in parts]
    both = vectors[0] if len(vectors) == 1 else np.concatenate(vectors, axis=1)
    if normalize:
        length = np.linalg.norm(both.astype(np.float64), axis=1, keepdims=True)
        both = (both / np.maximum(length, np.finfo(np.float32).tiny)).astype(np.float32)
    return both


def _part(name: str, output: NDArray[np.float32], n_prefix: int) -> NDArray[np.float32]:
    if name == POOLED:
        return output
    if name == TOKENS:
        mean: NDArray[np.float64] = output[:, n_prefix:].mean(axis=1, dtype=np.float64)
        return mean.astype(np.float32)
    cls: NDArray[np.float32] = output[:, 0]
    return cls


def _last_blocks(what: str) -> int:
    """Of how many blocks the CLS token is in it."""
    if found := _INNER.fullmatch(what):
        return int(found[1])
    return int(what != "mean")
