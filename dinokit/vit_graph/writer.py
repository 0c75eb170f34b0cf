"""Collects the operators and weights of one ONNX graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit._version import __version__

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "GraphWriter"]

OPSET = 20  # the first with Gelu; 18 added antialiased Resize and Split into equal parts
_IR_VERSION = 9  # that of opset 20: older runtimes reject newer ones

_PARTS = ("weight", "bias")


class GraphWriter:
    """Collects the operators and weights of one graph. Every method returns the name of its result.

    Args:
        checkpoint: the weights that :meth:`layer_norm` and :meth:`linear` look up by their names.
    """

    def __init__(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        from onnx import ModelProto, helper

        self._helper = helper
        self.checkpoint = checkpoint
        # Everything is added to the model in place: protobuf copies its arguments, and the weights of a large network
        # should be in memory once.
        self._model = ModelProto()
        self._weights: dict[str, NDArray[Any]] = {}
        self._constants: set[str] = set()
        self._scope: list[str] = []
        self._counts: dict[str, int] = {}

    # -- operators

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefixes the names of the operators added within, for viewers such as Netron."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def op(self, kind: str, *inputs: str, output: str | None = None, **attributes: Any) -> str:
        """Adds one standard operator with one output. An input "" omits an optional one."""
        name = self._name(kind)
        result = output or name
        self._node(kind, inputs, [result], name, attributes)
        return result

    def halves(self, x: str) -> tuple[str, str]:
        """The first and the second half of the last axis."""
        name = self._name("Split")
        first, second = f"{name}.first", f"{name}.second"
        self._node("Split", [x], [first, second], name, {"axis": -1, "num_outputs": 2})
        return first, second

    def layer_norm(self, name: str, x: str, *, epsilon: float, output: str | None = None) -> str:
        """The checkpoint's layer normalisation ``name``, over the last axis."""
        scale, bias = (self.weight(f"{name}.{part}", self.checkpoint[f"{name}.{part}"]) for part in _PARTS)
        return self.op("LayerNormalization", x, scale, bias, output=output, axis=-1, epsilon=epsilon)

    def linear(self, name: str, x: str) -> str:
        """The checkpoint's linear layer ``name``, whose matrix is stored there as (out, in)."""
        kernel, bias = (self.checkpoint[f"{name}.{part}"] for part in _PARTS)
        return self.affine(name, kernel.T, bias, x)

    def affine(self, name: str, kernel: NDArray[Any], bias: NDArray[Any] | None, x: str) -> str:
        """``x @ kernel + bias`` with kernel (in, out), stored under ``name``."""
        product = self.op("MatMul", x, self.weight(f"{name}.weight", kernel))
        return product if bias is None else self.op("Add", product, self.weight(f"{name}.bias", bias))

    def _name(self, kind: str) -> str:
        name = "/".join([*self._scope, kind])
        count = self._counts[name] = self._counts.get(name, -1) + 1
        return f"{name}_{count}" if count else name

    def _node(
        self,
        kind: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        name: str,
        attributes: Mapping[str, Any],
    ) -> None:
        node = self._helper.make_node(kind, inputs, outputs, name=name, **attributes)
        self._model.graph.node.append(node)

    # -- weights and constants

    def weight(self, name: str, values: NDArray[Any]) -> str:
        """Adds a float32 weight."""
        self._weights.setdefault(name, values)
        return name

    def ints(self, *values: int) -> str:
        """A 1-D int64 constant (shapes, axes); equal ones are shared."""
        return self._constant("ints:" + ",".join(map(str, values)), np.array(values, np.int64))

    def scalar(self, value: int) -> str:
        """A 0-D int64 constant: an index that removes its axis."""
        return self._constant(f"scalar:{value}", np.array(value, np.int64))

    def floats(self, *values: float) -> str:
        """A 1-D float32 constant; equal ones are shared."""
        return self._constant("floats:" + ",".join(map(repr, values)), np.array(values, np.float32))

    def _constant(self, name: str, values: NDArray[Any]) -> str:
        if name not in self._constants:
            self._constants.add(name)
            self._initializer(name, values).raw_data = stored(values).tobytes()
        return name

    def _initializer(self, name: str, values: NDArray[Any]) -> onnx.TensorProto:
        from onnx import TensorProto

        kind = TensorProto.INT64 if values.dtype == np.int64 else TensorProto.FLOAT
        tensor: onnx.TensorProto = self._model.graph.initializer.add(
            name=name, dims=values.shape, data_type=kind
        )
        return tensor

    # -- the complete model

    @property
    def size(self) -> int:
        """Size of the weights as float32, bytes."""
        return sum(4 * values.size for values in self._weights.values())

    def finish(
        self,
        inputs: Mapping[str, Sequence[str | int]],
        outputs: Mapping[str, Sequence[str | int]],
        metadata: Mapping[str, str],
        *,
        store: Callable[[onnx.TensorProto, NDArray[Any]], None],
    ) -> onnx.ModelProto:
        """The complete model, given its float32 inputs and outputs with their dimensions.

        Args:
            inputs: name to dimensions; a dynamic dimension is a name.
            outputs: likewise.
            metadata: texts for ``metadata_props``.
            store: called with each weight, writes its values into the tensor or elsewhere.
        """
        from onnx import TensorProto

        model = self._model
        while self._weights:  # freed one by one: transposed or scaled weights are copies
            name = next(iter(self._weights))
            values = self._weights.pop(name)
            store(self._initializer(name, values), values)
        model.ir_version = _IR_VERSION
        model.producer_name, model.producer_version = "dinokit", __version__
        model.opset_import.append(self._helper.make_opsetid("", OPSET))
        model.graph.name = "vision_transformer"
        for listed, tensors in ((model.graph.input, inputs), (model.graph.output, outputs)):
            for name, dims in tensors.items():
                listed.append(self._helper.make_tensor_value_info(name, TensorProto.FLOAT, dims))
        for key, value in metadata.items():
            model.metadata_props.add(key=key, value=value)
        return model


def stored(values: NDArray[Any]) -> NDArray[Any]:
    """The values as ONNX stores them: in C order, little-endian, float32 unless int64."""
    dtype = np.dtype(np.int64 if values.dtype == np.int64 else np.float32).newbyteorder("<")
    return np.ascontiguousarray(values, dtype).reshape(values.shape)
