"""The common part of the passes that rewrite an ONNX graph: read one model, write another.

A pass goes through the nodes of the old graph in order and adds nodes to the new one. Weights that nothing uses any
more are removed at the end.

Large weights may be kept beside the graph, in a :data:`Store`: protobuf, which copies and serialises a graph many times
on the way, is limited to 2 GiB. New weights of a pass are added to the store.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError

if TYPE_CHECKING:
    import onnx

__all__ = ["Rewriter", "Store", "check_graph", "weight_values"]

Store = MutableMapping[str, NDArray[Any]]
"""The values of the tensors that are outside a graph (``data_location`` EXTERNAL), by name."""

_SMALLEST = 1024  # bytes; smaller tensors stay in the graph, where shape inference can read them


def check_graph(model: onnx.ModelProto | Path) -> None:
    """Runs onnx's own checker with strict shape inference: every runtime should accept what passes it.

    Args:
        model: in memory, its weights inside; or a file, whose weights may be beside it.

    Raises:
        ModelError: with the checker's reason.
    """
    import onnx

    try:
        onnx.checker.check_model(str(model) if isinstance(model, Path) else model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"the ONNX graph that was written is not valid: {first}") from error


def weight_values(tensor: onnx.TensorProto, store: Mapping[str, NDArray[Any]] | None) -> NDArray[Any]:
    """The values of a weight, from the graph or the store."""
    import onnx

    if tensor.data_location == tensor.EXTERNAL:
        assert store is not None
        return store[tensor.name]
    values: NDArray[Any] = onnx.numpy_helper.to_array(tensor)
    return values


class Rewriter:
    """Builds a model from another one, which is not modified.

    Args:
        model: the old one.
        store: its large weights if they are outside; the new ones are added. None: everything is inside.

    Attributes:
        source_nodes: copies of the old nodes, in order, which may be changed.
        nodes: the new nodes.
        weights: names of the old constants.
        outputs: names of the graph's outputs.
    """

    def __init__(self, model: onnx.ModelProto, store: Store | None = None) -> None:
        import onnx

        self.onnx = onnx
        self.model = model
        self.store = store
        self.nodes: list[onnx.NodeProto] = []
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self._constants: dict[str, onnx.TensorProto] = {}
        self._made: set[str] = set()

    @property
    def source_nodes(self) -> Iterator[onnx.NodeProto]:
        """See above."""
        for node in self.model.graph.node:
            copy = self.onnx.NodeProto()
            copy.CopyFrom(node)
            yield copy

    def float_tensors(self) -> set[str]:
        """Names of all float32 tensors: inputs, weights and what is computed."""
        graph = self.onnx.shape_inference.infer_shapes(self.model, strict_mode=True).graph
        values = [*graph.input, *graph.value_info, *graph.output]
        kind = self.onnx.TensorProto.FLOAT
        computed = {value.name for value in values if value.type.tensor_type.elem_type == kind}
        return computed | {name for name, tensor in self.weights.items() if tensor.data_type == kind}

    def array(self, name: str) -> NDArray[Any]:
        """The values of a weight."""
        return weight_values(self.weights[name], self.store)

    def constant(self, name: str, values: NDArray[Any]) -> str:
        """Adds a constant, once."""
        if name not in self._constants:
            # Not ascontiguousarray, which turns a scalar into an array of one element.
            self._constants[name] = self._tensor(name, np.asarray(values, order="C"))
        return name

    def _tensor(self, name: str, values: NDArray[Any]) -> onnx.TensorProto:
        if self.store is None or values.nbytes < _SMALLEST:
            return self.onnx.numpy_helper.from_array(values, name)
        self.store[name] = values
        kind = self.onnx.helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = self.onnx.TensorProto(name=name, dims=values.shape, data_type=kind)
        tensor.data_location = tensor.EXTERNAL
        tensor.external_data.add(key="location", value="in memory")
        return tensor

    def op(self, kind: str, *inputs: str, output: str, **attributes: Any) -> str:
        """Adds an operator with one output, which is also its name."""
        node = self.onnx.helper.make_node(kind, inputs, [output], name=output, **attributes)
        self.nodes.append(node)
        return output

    def once(self, kind: str, source: str, output: str, **attributes: Any) -> str:
        """Adds an operator unless its output exists already."""
        if output not in self._made:
            self._made.add(output)
            self.op(kind, source, output=output, **attributes)
        return output

    def finish(self) -> onnx.ModelProto:
        """The new model, checked; if weights are outside, it can only be checked once they are in a file."""
        new = self.onnx.ModelProto()
        new.CopyFrom(self.model)
        del new.graph.node[:]
        del new.graph.initializer[:]
        del new.graph.value_info[:]  # shapes and types of the old graph
        new.graph.node.extend(self.nodes)
        used = {name for node in self.nodes for name in node.input}
        new.graph.initializer.extend(t for name, t in self.weights.items() if name in used)
        new.graph.initializer.extend(t for name, t in self._constants.items() if name in used)
        if self.store is None:
            check_graph(new)
        return new
