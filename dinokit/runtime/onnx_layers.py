"""An ONNX engine with the tokens of inner blocks: its graph is written again when a run first requests some."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from dinokit.model_folder.contract import block_of
from dinokit.runtime.cpu import return_freed_memory
from dinokit.runtime.onnx import OnnxEngine

__all__ = ["OnnxEngineWithLayers"]


class OnnxEngineWithLayers:
    """Runs the given engine until a :func:`dinokit.model_folder.contract.block_output` is requested.

    Then an engine that also has these outputs replaces it, so that memory holds the weights once. Outputs are added and
    never removed: alternating between two lists of layers writes the graph twice, not each time.

    Args:
        engine: used until an inner block is requested.
        write: makes an engine of the same network and device with the named further outputs.
    """

    name = "onnx"

    def __init__(self, engine: OnnxEngine, write: Callable[[Sequence[str]], OnnxEngine]) -> None:
        self._engine, self._write = engine, write
        self._blocks: tuple[str, ...] = ()
        self._lock = threading.Lock()

    @property
    def device(self) -> str:
        """See :class:`dinokit.runtime.Engine`."""
        return self._engine.device

    @property
    def precision(self) -> str:
        """See :class:`dinokit.runtime.Engine`."""
        return self._engine.precision

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """See :class:`dinokit.runtime.Engine`. Raises what ``write`` raises if it cannot produce these outputs."""
        return self._with(outputs).run(pixel_values, outputs)

    def _with(self, outputs: Sequence[str]) -> OnnxEngine:
        # One thread writes; runs in progress keep their engine until they are done.
        with self._lock:
            missing = [name for name in outputs if block_of(name) is not None and name not in self._blocks]
            if missing:
                blocks = (*self._blocks, *missing)
                self._engine = self._write(blocks)
                self._blocks = blocks
                return_freed_memory()  # of the engine before
            return self._engine
