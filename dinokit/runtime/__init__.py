"""The engines that run a network, ONNX Runtime and torch, behind one small protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # dinokit doctor imports this package where numpy is missing
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Engine"]


@runtime_checkable
class Engine(Protocol):
    """Runs one network; its input and its outputs are those of :mod:`dinokit.model_folder.contract`."""

    @property
    def name(self) -> str:
        """``onnx`` or ``torch``."""

    @property
    def device(self) -> str:
        """Where it runs: ``cpu``, ``cuda:0``."""

    @property
    def precision(self) -> str:
        """The precision it computes in: ``fp32``."""

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """Computes the requested outputs of normalised pictures (B, 3, H, W), H and W multiples of the patch."""
