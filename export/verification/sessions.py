"""Plain sessions of ONNX Runtime on the CPU, for graphs that are only run to inspect them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

__all__ = ["start_session"]


def start_session(model: onnx.ModelProto, store: Mapping[str, NDArray[Any]] | None) -> Any:
    """An ``onnxruntime.InferenceSession``.

    Args:
        model: any.
        store: its large weights if they are outside; entries that the model does not have are ignored.
    """
    import onnxruntime as ort

    from dinokit.runtime.onnx import session_options

    options = session_options()
    outside = [t.name for t in model.graph.initializer if t.data_location == t.EXTERNAL]
    if outside and store is not None:
        values = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(store[name])) for name in outside]
        options.add_external_initializers(outside, values)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
