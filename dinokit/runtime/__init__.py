"""The engines that run a network, ONNX Runtime and torch, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["OUTPUTS", "Engine"]

OUTPUTS = ("last_hidden_state", "pooler_output", "attention")


@runtime_checkable
class Engine(Protocol):
    """Runs one Vision Transformer.

    The outputs, all float32, for a batch of B pictures with N patches, R register tokens, width D:

    - ``last_hidden_state`` (B, 1 + R + N, D): all tokens after the final norm, CLS first, patches row by row;
    - ``pooler_output`` (B, D): the CLS token of it, the embedding of the picture;
    - ``attention`` (B, heads, N): how the last block's CLS token attends to the patches. Probabilities over
      all tokens, of which the patches' are kept, so that a row sums to a little less than 1.
    """

    @property
    def name(self) -> str:
        """``onnx`` or ``torch``."""

    @property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda:0``."""

    @property
    def precision(self) -> str:
        """What it computes in: ``fp32``."""

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """The asked-for outputs of normalised pictures (B, 3, H, W), H and W multiples of the patch."""
