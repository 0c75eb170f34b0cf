"""float16: what is stored and computed in it, and what is not."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("timm")

import onnx
from export_models import WEIGHTS, pixels, run, worst_cosine
from small_models import SMALL

from dinokit.export.half import to_half
from dinokit.vit_graph import build_vit_graph


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_vit_graph(SMALL, WEIGHTS)


def test_half_has_float16_weights_and_float32_ends(graph: onnx.ModelProto) -> None:
    half = to_half(graph)
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    matrices = [name for name in kinds if ".weight" in name and "norm" not in name]
    assert len(matrices) == 1 + SMALL.depth * 6
    assert all(kinds[name] == onnx.TensorProto.FLOAT16 for name in matrices)
    ends = [*half.graph.input, *half.graph.output]
    assert {v.type.tensor_type.elem_type for v in ends} == {onnx.TensorProto.FLOAT}
    assert len(half.SerializeToString()) < 0.62 * len(graph.SerializeToString())


def test_softmax_and_norms_stay_in_float32(graph: onnx.ModelProto) -> None:
    half = onnx.shape_inference.infer_shapes(to_half(graph), strict_mode=True, data_prop=True)
    kinds = {v.name: v.type.tensor_type.elem_type for v in [*half.graph.value_info, *half.graph.output]}
    by_op: dict[str, set[int]] = {}
    for node in half.graph.node:
        by_op.setdefault(node.op_type, set()).add(kinds[node.output[0]])
    assert by_op["Softmax"] == by_op["LayerNormalization"] == by_op["Resize"] == {onnx.TensorProto.FLOAT}
    assert by_op["MatMul"] == by_op["Gelu"] == {onnx.TensorProto.FLOAT16}
    # The residual stream too: a norm gets it as it is. (Numbers would not show it on every processor: ONNX Runtime
    # computes float16 in float32 where it has no kernel.)
    makers = {output: node.op_type for node in half.graph.node for output in node.output}
    streams = [makers[n.input[0]] for n in half.graph.node if n.op_type == "LayerNormalization"]
    assert len(streams) == 2 * SMALL.depth + 1 and set(streams) == {"Add", "Concat"}


@pytest.mark.parametrize("size", [(32, 32), (48, 64), (24, 40)])
def test_half_is_close(graph: onnx.ModelProto, size: tuple[int, int]) -> None:
    right, ours = run(graph, pixels(3, *size)), run(to_half(graph), pixels(3, *size))
    assert worst_cosine(right[1], ours[1]) > 1 - 1e-5
    for a, b in zip(right, ours, strict=True):
        assert b.dtype == np.float32
        assert np.abs(a - b).max() < 0.02
    assert np.abs(right[1] - ours[1]).max() > 1e-6  # it is another precision


def test_a_large_residual_does_not_overflow_half() -> None:
    weights = dict(WEIGHTS)
    bias = weights["blocks.0.mlp.fc2.bias"].copy()
    bias[7] = 60000.0  # finite in float16; twice as much is not
    weights["blocks.0.mlp.fc2.bias"] = bias
    weights["blocks.1.mlp.fc2.bias"] = bias
    graph = build_vit_graph(SMALL, weights)
    right, ours = run(graph, pixels()), run(to_half(graph), pixels())
    assert np.isfinite(ours[0]).all()
    assert worst_cosine(right[1], ours[1]) > 0.9999


def test_weights_that_float16_cannot_hold_stay_float32() -> None:
    weights = dict(WEIGHTS)
    kernel = weights["blocks.0.mlp.fc1.weight"].copy()
    kernel[0, 0] = 1e5
    weights["blocks.0.mlp.fc1.weight"] = kernel
    half = to_half(build_vit_graph(SMALL, weights))
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    assert kinds["blocks.0.mlp.fc1.weight"] == onnx.TensorProto.FLOAT
    assert all(np.isfinite(output).all() for output in run(half, pixels()))
