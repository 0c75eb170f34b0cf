"""int8: the products in integers, in numbers; ONNX Runtime runs them, torch or numpy says what is right."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("timm")

import onnx
import onnxruntime as ort
import torch
from export_models import WEIGHTS, pixels, run, worst_cosine
from onnx import numpy_helper
from onnxruntime.quantization import QuantType, quantize_dynamic
from small_models import SMALL

from dinokit.export.quantisation.quantize import to_int8
from dinokit.export.verification.verify import cosines
from dinokit.vit_graph import build_vit_graph


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_vit_graph(SMALL, WEIGHTS)


def test_int8_is_small_and_close(graph: onnx.ModelProto) -> None:
    int8 = to_int8(graph)
    kinds = {t.name: t.data_type for t in int8.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in kinds.values()) == 1 + SMALL.depth * 6
    assert not [name for name in kinds if name.endswith("fc1.weight")]
    domains = {node.domain for node in int8.graph.node}
    assert domains == {""}  # standard operators only
    for size in ((32, 32), (48, 64)):
        right, ours = run(graph, pixels(3, *size)), run(int8, pixels(3, *size))
        assert 0.999 < worst_cosine(right[1], ours[1]) < 1 - 1e-8


def test_int8_is_closer_than_onnxruntimes_own(graph: onnx.ModelProto, tmp_path: Path) -> None:
    onnx.save(graph, tmp_path / "m.onnx")
    quantize_dynamic(
        tmp_path / "m.onnx",
        tmp_path / "q.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        op_types_to_quantize=["MatMul"],
    )
    inputs = pixels(16)
    right = run(graph, inputs)[1]
    theirs, ours = run(onnx.load(tmp_path / "q.onnx"), inputs)[1], run(to_int8(graph), inputs)[1]
    assert 1 - cosines(right, ours).mean() < 1 - cosines(right, theirs).mean()


def test_int8_does_not_depend_on_the_rest_of_the_batch(graph: onnx.ModelProto) -> None:
    inputs = pixels(5)
    inputs[3] *= 50  # a neighbour that would take the whole range for itself
    together = run(to_int8(graph), inputs)[1]
    for i in (0, 4):
        alone = run(to_int8(graph), inputs[i : i + 1])[1]
        assert np.abs(alone[0] - together[i]).max() < 1e-5


def one_product(w: NDArray[np.float32], *, gelu: bool = False) -> onnx.ModelProto:
    """x @ w, or gelu(x) @ w."""
    make = onnx.helper
    nodes = [make.make_node("Gelu", ["x"], ["g"])] if gelu else []
    return make.make_model(
        make.make_graph(
            [*nodes, make.make_node("MatMul", ["g" if gelu else "x", "w"], ["y"])],
            "g",
            [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 5, 16])],
            [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 5, 8])],
            [onnx.numpy_helper.from_array(w, "w")],
        ),
        opset_imports=[make.make_opsetid("", 20)],
        ir_version=9,
    )


@pytest.mark.parametrize("once", [(), ("w",)])
def test_int8_by_hand(once: tuple[str, ...]) -> None:
    """One product against the formula of the module, in numpy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 3, (2, 5, 16)).astype(np.float32), rng.normal(0, 1, (16, 8)).astype(np.float32)
    w[:, 3] = 0
    x[1, 2] = 0
    column = np.abs(w).max(0) / 90
    column[3] = 1
    row = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12)
    levels = x / row * 90
    coarse = np.rint(levels)
    fine = 0 if once else np.rint((levels - coarse) * 180) / 180
    kernel = np.rint(w / column)
    right = (coarse + fine) @ kernel * (column / 90) * row
    (found,) = run(to_int8(one_product(w), once=once), x, "x")
    assert np.abs(found - right).max() < 1e-4
    by_weights_alone = np.abs(x @ (kernel * column - w)).max()
    assert np.abs(found - x @ w).max() < (0.3 if once else 1.02 * by_weights_alone)
    assert not found[..., 3].any() and not found[1, 2].any()


def test_once_after_a_gelu_by_hand() -> None:
    """All 181 levels are for what a GELU gives, which is never below -0.17; torch says what is right."""
    rng = np.random.default_rng(2)
    x, w = rng.normal(0, 1, (2, 5, 16)).astype(np.float32), rng.normal(0, 1, (16, 8)).astype(np.float32)
    x[0, 0] = -50  # nothing but zeros after the GELU
    gelu = torch.nn.functional.gelu(torch.from_numpy(x)).numpy()
    column = np.abs(w).max(0) / 90
    kernel = np.rint(w / column) * column
    row = (gelu + 0.1701).max(-1, keepdims=True)
    right = (np.rint((gelu + 0.1701) / row * 181) / 181 * row - 0.1701) @ kernel
    (found,) = run(to_int8(one_product(w, gelu=True), once=["w"]), x, "x")
    assert np.abs(found - right).max() < 1e-4
    (symmetric,) = run(to_int8(one_product(w), once=["w"]), gelu, "x")
    assert np.square(found - gelu @ kernel).mean() < 0.4 * np.square(symmetric - gelu @ kernel).mean()


@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("once", [(), ("w",)])
def test_no_processor_saturates(gelu: bool, once: tuple[str, ...]) -> None:
    """x86 without VNNI adds two products of uint8 and int8 in 16 bits."""
    rng = np.random.default_rng(4)
    x, w = (rng.choice([-9, 0.1, 9], shape).astype(np.float32) for shape in ((2, 5, 16), (16, 8)))
    int8 = to_int8(one_product(w, gelu=gelu), once=once)
    products = [node for node in int8.graph.node if node.op_type == "MatMulInteger"]
    weights = next(numpy_helper.to_array(t) for t in int8.graph.initializer if t.name == "w:int8")
    for node in products:
        int8.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.input[0]))
    _, *activations = run(int8, x, "x")
    assert len(activations) == (1 if once else 2)
    for levels in activations:
        assert levels.dtype == np.uint8 and levels.max() > 90
        assert 2 * int(levels.max()) * int(np.abs(weights).max()) < 2**15


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) < (1, 31),
    reason="with this option ONNX Runtime 1.20 aborts; those between are untried",
)
def test_it_also_runs_with_the_option_that_others_need(graph: onnx.ModelProto) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    made = to_int8(graph).SerializeToString()
    session = ort.InferenceSession(made, options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixel_values": pixels()})
    np.testing.assert_allclose(found[1], run(to_int8(graph), pixels())[1], atol=1e-5)


def test_a_weight_may_stay_float32(graph: onnx.ModelProto) -> None:
    name = "blocks.1.mlp.fc2.weight"
    int8 = to_int8(graph, in_float=[name])
    kinds = {t.name: t.data_type for t in int8.graph.initializer}
    assert kinds[name] == onnx.TensorProto.FLOAT
    assert sum(kind == onnx.TensorProto.INT8 for kind in kinds.values()) == SMALL.depth * 6


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_with_bias(transposed: int) -> None:
    rng = np.random.default_rng(1)
    x, w = rng.normal(size=(4, 16)).astype(np.float32), rng.normal(size=(16, 8)).astype(np.float32)
    b = rng.normal(size=8).astype(np.float32)
    make, numbers = onnx.helper, onnx.numpy_helper.from_array
    model = make.make_model(
        make.make_graph(
            [make.make_node("Gemm", ["x", "w", "b"], ["y"], transB=transposed)],
            "g",
            [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 16])],
            [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 8])],
            [numbers(np.ascontiguousarray(w.T) if transposed else w, "w"), numbers(b, "b")],
        ),
        opset_imports=[make.make_opsetid("", 20)],
        ir_version=9,
    )
    int8 = to_int8(model)
    assert "Gemm" not in {node.op_type for node in int8.graph.node}
    assert np.abs(run(int8, x, "x")[0] - (x @ w + b)).max() < 0.1
