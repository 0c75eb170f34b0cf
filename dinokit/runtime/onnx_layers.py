"""An ONNX engine with the tokens of inner blocks: its graph is written again when a run first asks for some."""

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

    Then an engine with these further outputs takes the other one's place, so that the weights are held once. Each
    requested output stays: alternating between two lists of layers costs two waits, not one each time.

    Args:
        engine: runs as long as no inner block is requested.
        write: makes an engine of the same network and device with further outputs, named to it.
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
        # Of several threads one writes; those that run keep the engine they have until they are done.
        with self._lock:
            missing = [name for name in outputs if block_of(name) is not None and name not in self._blocks]
            if missing:
                blocks = (*self._blocks, *missing)
                self._engine = self._write(blocks)
                self._blocks = blocks
                return_freed_memory()  # of the engine before
            return self._engine
