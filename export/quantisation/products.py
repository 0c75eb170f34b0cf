"""The products of a graph that can be computed in integers: activations times a weight matrix, MatMul or Gemm."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

__all__ = ["Product", "find_products", "lower_bounds", "product_of", "product_share"]

_FLOAT = 1  # onnx.TensorProto.FLOAT
_LEAST = {"Gelu": -0.1701}  # -0.16997, and -0.17004 with tanh


@dataclass(frozen=True)
class Product:
    """One product ``x @ kernel`` with x (…, K) and kernel (K, N); a Gemm adds its bias to it."""

    source: str
    """Name of x."""
    weight: str
    """Name of the tensor that holds the kernel."""
    transposed: bool
    """Whether that tensor is (N, K)."""

    def kernel(self, values: NDArray[Any]) -> NDArray[np.float32]:
        """(K, N), from the tensor's values; also the inverse."""
        return values.T if self.transposed else values


def product_of(node: onnx.NodeProto, weights: Mapping[str, onnx.TensorProto]) -> Product | None:
    """The product that a node computes; None for other nodes, such as attention, whose factors are both computed.

    Args:
        node: any.
        weights: the graph's constants by name.
    """
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] in weights:
        return None
    tensor = weights.get(node.input[1])
    if tensor is None or len(tensor.dims) != 2 or tensor.data_type != _FLOAT:
        return None
    if node.op_type == "MatMul":
        return Product(node.input[0], node.input[1], transposed=False)
    options = {attribute.name: attribute for attribute in node.attribute}
    factors = [options[name].f for name in ("alpha", "beta") if name in options]
    if ("transA" in options and options["transA"].i) or any(factor != 1.0 for factor in factors):
        return None  # linear layers are not exported so
    return Product(node.input[0], node.input[1], transposed="transB" in options and bool(options["transB"].i))


def find_products(model: onnx.ModelProto) -> list[Product]:
    """All of a graph, in the order in which they are computed."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    found = (product_of(node, weights) for node in model.graph.node)
    return [product for product in found if product is not None]


def product_share(model: onnx.ModelProto) -> float:
    """The share of a graph's weights that are in products, by count of numbers; 0 to 1."""
    sizes = {
        tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) > 1
    }
    used = {product.weight for product in find_products(model)}
    return float(sum(size for name, size in sizes.items() if name in used) / max(1, sum(sizes.values())))


def lower_bounds(model: onnx.ModelProto) -> dict[str, float]:
    """Tensors with a lower bound near zero, and that bound: activations after a GELU."""
    return {node.output[0]: _LEAST[node.op_type] for node in model.graph.node if node.op_type in _LEAST}
