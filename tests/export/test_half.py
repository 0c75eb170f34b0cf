"""float16: what is stored and computed in it, and what is not."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("timm")

import onnx
from export_models import WEIGHTS, pixels, run, worst_cosine
from small_models import SMALL, random_weights

from dinokit.export.graphs.half import to_half, weights_in_float
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


def large_inside(graph_of: str) -> onnx.ModelProto:
    """A network in which one kind of tensor is larger than float16 holds, and its outputs are as usual."""
    weights = dict(WEIGHTS)
    if graph_of == "hidden":  # before GELU: 2e5, and the next product makes 20 of it
        weights["blocks.0.mlp.fc1.bias"] = weights["blocks.0.mlp.fc1.bias"] + np.float32(2e5)
        weights["blocks.0.mlp.fc2.weight"] = weights["blocks.0.mlp.fc2.weight"] * np.float32(1e-4)
    elif graph_of == "branch":  # what the MLP gives; the residual stream may
        weights["blocks.0.mlp.fc1.weight"] = weights["blocks.0.mlp.fc1.weight"] * np.float32(100)
        weights["blocks.0.mlp.fc2.weight"] = weights["blocks.0.mlp.fc2.weight"] * np.float32(1e5)
    return build_vit_graph(SMALL, weights)


def true_half(model: onnx.ModelProto, pixel_values: np.ndarray) -> list[np.ndarray]:
    """In real float16, by onnx's own reference implementation: ONNX Runtime computes float16 in float32 on a CPU."""
    from onnx.reference import ReferenceEvaluator

    return list(ReferenceEvaluator(model).run(None, {"pixel_values": pixel_values}))


@pytest.mark.parametrize("where", ["hidden", "branch"])
@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_what_photographs_make_too_large_for_float16_stays_float32(where: str) -> None:
    graph = large_inside(where)
    right = run(graph, pixels())
    assert np.isfinite(right[1]).all()
    blind, ours = to_half(graph), to_half(graph, pixels=pixels())
    assert not np.isfinite(true_half(blind, pixels())[1]).all()
    assert np.isfinite(run(blind, pixels())[1]).all()  # which is why the CPU's numbers prove nothing here
    found = true_half(ours, pixels())
    assert worst_cosine(right[1], found[1]) > 0.9999
    assert weights_in_float(blind) == ()
    # Nothing else is left in float32 than what meets those values.
    assert set(weights_in_float(ours)) <= {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"}
    assert "blocks.0.mlp.fc2.weight" in weights_in_float(ours)


def test_photographs_change_nothing_where_all_fits(graph: onnx.ModelProto) -> None:
    assert to_half(graph, pixels=pixels()).SerializeToString() == to_half(graph).SerializeToString()


def test_room_is_left_for_other_photographs() -> None:
    weights = dict(WEIGHTS)
    weights["blocks.0.mlp.fc1.bias"] = weights["blocks.0.mlp.fc1.bias"] + np.float32(
        2e4
    )  # below 65504, not a quarter
    # So small that what the next product gives is no reason to leave it float32.
    weights["blocks.0.mlp.fc2.weight"] = weights["blocks.0.mlp.fc2.weight"] * np.float32(1e-3)
    graph = build_vit_graph(SMALL, weights)
    assert "blocks.0.mlp.fc2.weight" in weights_in_float(to_half(graph, pixels=pixels()))


@pytest.mark.parametrize(("scale", "kind"), [(1e-5, onnx.TensorProto.FLOAT), (0.1, onnx.TensorProto.FLOAT16)])
def test_a_layer_scale_below_float16s_normal_range_keeps_its_digits(scale: float, kind: int) -> None:
    vit = replace(SMALL, layer_scale=True)
    weights = random_weights(vit)
    weights |= {n: np.full_like(w, scale) for n, w in weights.items() if n.endswith(".gamma")}
    kinds = {t.name: t.data_type for t in to_half(build_vit_graph(vit, weights)).graph.initializer}
    assert {k for name, k in kinds.items() if ".gamma" in name} == {kind}
