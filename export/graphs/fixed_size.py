"""A graph for one picture size: for TensorRT, CUDA graphs and processors that need every shape in advance.

Whatever follows from the size alone (the resized position embedding, the shapes of all reshapes) is computed now and
becomes a constant, so the graph has no resize and hardly any shape arithmetic left. The batch stays free.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.export.graphs.graph import Rewriter, Store

if TYPE_CHECKING:
    import onnx

__all__ = ["fix_size"]

_WEIGHTS_STAY = "DequantizeLinear"  # folding it would turn int8 weights into float32


def fix_size(
    model: onnx.ModelProto,
    height: int,
    width: int,
    store: Store | None = None,
    sizes: Mapping[str, int] = MappingProxyType({}),
) -> onnx.ModelProto:
    """The same network for pictures of one size.

    Args:
        model: its first input is (B, C, H, W), H and W free; float32.
        height: pixels, a multiple of the patch.
        width: likewise.
        store: the model's large weights if they are outside.
        sizes: of the outputs' free dimensions, by name (:func:`dinokit.model_folder.contract.free_sizes`).

    Returns:
        A new model whose input is (B, C, height, width).
    """
    sized = type(model)()
    sized.CopyFrom(model)
    dims = sized.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value, dims[3].dim_value = height, width
    for value in sized.graph.output:
        for dim in list(value.type.tensor_type.shape.dim)[1:]:
            if (name := dim.dim_param) in sizes:
                dim.dim_value = sizes[name]
            elif name:
                dim.ClearField("dim_param")
    return _Fixed(sized, store).run()


class _Fixed(Rewriter):
    def run(self) -> onnx.ModelProto:
        shapes = self.static_shapes()
        computed: list[onnx.NodeProto] = []  # depend on constants only
        for node in self.source_nodes:
            if (shape := _shape_of(node, shapes)) is not None:
                self.constant(node.output[0], np.array(shape, np.int64))
                self.weights[node.output[0]] = self._constants.pop(node.output[0])
            elif node.op_type != _WEIGHTS_STAY and all(not n or n in self.weights for n in node.input):
                computed.append(node)
                for name in node.output:
                    self.weights[name] = self.onnx.TensorProto()  # its value comes below
            else:
                self.nodes.append(node)
        used = {name for node in self.nodes for name in node.input} | self.outputs
        wanted = sorted({name for node in computed for name in node.output} & used)
        for name, values in zip(wanted, self.compute(computed, wanted), strict=True):
            self.weights[name] = self.onnx.numpy_helper.from_array(np.ascontiguousarray(values), name)
        return self.finish()

    def static_shapes(self) -> dict[str, list[int | None]]:
        graph = self.onnx.shape_inference.infer_shapes(self.model, strict_mode=True, data_prop=True).graph
        values = [*graph.input, *graph.value_info]
        shapes: dict[str, list[int | None]] = {
            v.name: [d.dim_value or None for d in v.type.tensor_type.shape.dim] for v in values
        }
        return shapes | {name: list(tensor.dims) for name, tensor in self.weights.items()}

    def compute(self, nodes: list[onnx.NodeProto], wanted: list[str]) -> list[NDArray[Any]]:
        """The values of tensors that depend on constants only, computed by ONNX Runtime."""
        if not wanted:
            return []
        from dinokit.export.verification.sessions import start_session

        made = {name for node in nodes for name in node.output}
        used = {name for node in nodes for name in node.input} - made - {""}
        part = self.onnx.ModelProto()
        part.CopyFrom(self.model)
        graph = part.graph
        for listed in (graph.node, graph.initializer, graph.value_info, graph.input, graph.output):
            del listed[:]
        graph.node.extend(nodes)
        inside = self.onnx.numpy_helper.from_array
        graph.initializer.extend(inside(self.array(name), name) for name in sorted(used))
        graph.output.extend(self.onnx.ValueInfoProto(name=name) for name in wanted)
        inferred = self.onnx.shape_inference.infer_shapes(part, data_prop=True).graph
        types = {v.name: v for v in [*inferred.value_info, *inferred.output]}
        del graph.output[:]
        graph.output.extend(types[name] for name in wanted)
        values: list[NDArray[Any]] = start_session(part, None).run(wanted, {})
        return values


def _shape_of(node: onnx.NodeProto, shapes: dict[str, list[int | None]]) -> list[int] | None:
    """The result of a Shape operator, if it is known."""
    if node.op_type != "Shape" or node.input[0] not in shapes:
        return None
    limits = {attribute.name: attribute.i for attribute in node.attribute}
    dims = shapes[node.input[0]][limits.get("start", 0) : limits.get("end")]
    known = [dim for dim in dims if dim is not None]
    return known if len(known) == len(dims) else None
