"""How int8 is made: what the layers see, how weights are rounded, which activations and weights get more bits."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("timm")

import onnx
import torch
from export_models import CONFIG, WEIGHTS, make_folder, pixels, run
from small_models import SMALL, picture

from dinokit.export import ExportError, Gate, export_folder
from dinokit.export.quantisation.calibration import calibration_pixels, second_moments
from dinokit.export.quantisation.int8 import Int8Plans
from dinokit.export.quantisation.products import find_products
from dinokit.export.quantisation.quantize import WEIGHT_LEVELS, to_int8
from dinokit.export.quantisation.rounding import round_by_moments, round_to_nearest
from dinokit.export.quantisation.sensitivity import sensitivity_to_activations, sensitivity_to_weights
from dinokit.export.verification.report import GATES
from dinokit.runtime.torch import TorchEngine
from dinokit.vit_graph import build_vit_graph, split_vit_graph


def silent(step: str) -> None:
    """Nobody is told."""


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_vit_graph(SMALL, WEIGHTS)


# -- rounding


def loss(kernel: NDArray[Any], values: NDArray[Any], x: NDArray[Any]) -> float:
    return float(np.square(x @ (values - kernel)).mean())


def test_inputs_that_go_together_are_made_use_of() -> None:
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(8, 300))  # 300 numbers that are eight in truth, and a little noise
    seen, other = (rng.normal(size=(n, 8)) @ mix + rng.normal(0, 0.02, (n, 300)) for n in (600, 200))
    kernel = rng.normal(size=(300, 20)).astype(np.float32)
    made = round_by_moments(kernel, (seen.T @ seen).astype(np.float32), 90)
    nearest = round_to_nearest(kernel, 90)
    assert loss(kernel, made.values, other) < 0.1 * loss(kernel, nearest.values, other)
    assert np.array_equal(made.scale, nearest.scale)
    assert np.abs(made.integers).max() <= 90


def test_inputs_that_have_nothing_in_common_are_rounded_to_the_nearest() -> None:
    kernel = np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)
    kernel[:, 2] = 0
    nearest = np.rint(kernel / np.where(kernel.any(0), np.abs(kernel).max(0) / 90, 1))
    for moments in (np.diag(np.arange(1.0, 41.0)), np.zeros((40, 40)), np.full((40, 40), np.nan)):
        assert np.array_equal(round_by_moments(kernel, moments, 90).integers, nearest)


def test_the_best_of_all_ways_for_two_rows() -> None:
    """Against every pair of neighbouring integers, tried out."""
    rng = np.random.default_rng(3)
    kernel = rng.normal(size=(2, 50)).astype(np.float32)
    kernel = np.concatenate(
        [kernel, np.full((1, 50), 4, np.float32)]
    )  # it sets the scale, and is rounded exactly
    x = np.concatenate(
        [np.repeat(rng.normal(size=(500, 1)), 2, 1) + rng.normal(0, 0.3, (500, 2)), np.zeros((500, 1))], 1
    )
    made = round_by_moments(kernel, x.T @ x, 90)
    steps = kernel[:2] / made.scale
    ways = [np.stack([np.floor(steps[0]) + a, np.floor(steps[1]) + b]) for a in (0, 1) for b in (0, 1)]
    costs = np.stack([np.square(x[:, :2] @ (way - steps)).mean(0) for way in ways])
    ours = np.square(x[:, :2] @ (made.integers[:2] - steps)).mean(0)
    nearest = np.square(x[:, :2] @ (np.rint(steps) - steps)).mean(0)
    assert ours.mean() - costs.min(0).mean() < 0.25 * (nearest.mean() - costs.min(0).mean())


# -- what the layers see


def test_moments_are_those_of_torchs_layers() -> None:
    split, store = split_vit_graph(SMALL, WEIGHTS)
    products = find_products(split)
    seen: dict[str, NDArray[Any]] = {}
    module = TorchEngine(CONFIG, WEIGHTS, device="cpu", precision="fp32").module
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    for name in (f"blocks.{i}.{part}" for i in (0, 1) for part in parts):
        module.get_submodule(name).register_forward_pre_hook(
            lambda _, inputs, name=name: seen.update(
                {name: inputs[0].reshape(-1, inputs[0].shape[-1]).numpy()}
            )
        )
    batch = pixels(11)  # more than one batch of the calibration
    with torch.inference_mode():
        module.forward_features(torch.from_numpy(batch))
    sources = {p.weight.removesuffix(".weight"): p.source for p in products}
    found = dict(second_moments(split, store, products, batch))
    assert set(found) == set(sources.values())
    for name, rows in seen.items():
        moments = found[sources[name.replace("qkv", "q")]]
        np.testing.assert_allclose(moments, rows.T @ rows, rtol=1e-3, atol=1e-3 * np.abs(moments).max())


def test_few_photographs_are_looked_at_in_parts() -> None:
    photographs = [picture(120, 90, seed) for seed in range(2)]
    found = calibration_pixels(photographs, CONFIG.preprocessing)
    assert found.shape == (36, 3, 32, 32)
    whole = CONFIG.preprocessing.normalise(CONFIG.preprocessing.crop(photographs[1])[None])
    np.testing.assert_array_equal(found[1], whole[0])
    assert len({view.tobytes() for view in found}) == 36
    assert len(calibration_pixels([picture(seed=s) for s in range(8)], CONFIG.preprocessing)) == 72


# -- sensitivities


def test_sensitivities_by_hand() -> None:
    """Of two products one after the other, by numpy."""
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(12, 12)).astype(np.float32) for _ in range(2))
    x = rng.normal(size=(6, 12)).astype(np.float32)
    make = onnx.helper
    values = [
        make.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [None, 12])
        for n in ("pixel_values", "pooler_output")
    ]
    nodes = [
        make.make_node("MatMul", ["pixel_values", "a"], ["h"]),
        make.make_node("Gemm", ["h", "b"], ["pooler_output"], transB=1),
    ]
    tensors = [onnx.numpy_helper.from_array(v, n) for n, v in (("a", a), ("b", b))]
    model = make.make_model(
        make.make_graph(nodes, "g", values[:1], values[1:], tensors),
        opset_imports=[make.make_opsetid("", 20)],
        ir_version=9,
    )
    products = find_products(model)
    rounded = {"a": round_to_nearest(a, WEIGHT_LEVELS), "b": round_to_nearest(b.T, WEIGHT_LEVELS)}
    right = x @ a @ b.T
    found = sensitivity_to_weights(model, None, products, rounded, x, silent)
    assert found["a"] == pytest.approx(np.square(x @ rounded["a"].values @ b.T - right).mean(), rel=1e-3)
    assert found["b"] == pytest.approx(np.square(x @ a @ rounded["b"].values - right).mean(), rel=1e-3)

    def eight_bits(rows: NDArray[Any]) -> NDArray[Any]:
        unit = np.abs(rows).max(1, keepdims=True) / 90
        return np.rint(rows / unit) * unit

    changes, variance = sensitivity_to_activations(model, None, products, x, silent)
    assert changes["pixel_values"] == pytest.approx(
        np.square(eight_bits(x) @ a @ b.T - right).mean(), rel=0.05
    )
    assert changes["h"] == pytest.approx(np.square(eight_bits(x @ a) @ b.T - right).mean(), rel=0.05)
    assert variance == pytest.approx(right.var(axis=0).mean(), rel=1e-3)


# -- the plan


def plans_of(graph: onnx.ModelProto, count: int = 12) -> Int8Plans:
    return Int8Plans(graph, None, lambda: pixels(count))


def test_a_plan_is_nearer_than_rounding_each_number_for_itself(graph: onnx.ModelProto) -> None:
    plan = next(iter(plans_of(graph)))
    assert len(plan.rounded) == 1 + 6 * SMALL.depth
    other = np.concatenate([pixels(8, 32, 32)[:, :, ::-1, ::-1], pixels(8, 32, 32)[:, :, ::-1]])
    other = np.ascontiguousarray(other)
    right, nearest, ours = (
        run(model, other)[1] for model in (graph, to_int8(graph), to_int8(graph, rounded=plan.rounded))
    )
    assert np.square(ours - right).mean() < 0.8 * np.square(nearest - right).mean()


def test_eight_bits_where_they_cost_nothing(graph: onnx.ModelProto) -> None:
    counts = []
    for allowed in (0.0, 1e-3, 1.0):
        plans = Int8Plans(graph, None, lambda: pixels(12), activations=[allowed])
        counts.append(len(next(iter(plans)).once))
    assert counts[0] == 0 and counts[2] == 1 + 6 * SMALL.depth
    assert 0 < counts[1] < counts[2]


def test_plans_are_made_once_and_leave_more_in_float_each_time(graph: onnx.ModelProto) -> None:
    calls = []
    plans = Int8Plans(
        graph,
        None,
        lambda: (calls.append(1), pixels(12))[1],  # type: ignore[func-returns-value]
        activations=(1.0, 1e-3, 1e-3),
    )
    first, again = list(plans), list(plans)
    assert first == again and len(calls) == 1
    # First fewer activations of eight bits, then weights in float32 beside those.
    (whole, careful), floats = first[:2], first[2:]
    assert whole.in_float == careful.in_float == ()
    assert len(whole.once) == 1 + 6 * SMALL.depth and set(careful.once) < set(whole.once)
    assert floats and all(plan.once == careful.once for plan in floats)
    for fewer, more in itertools.pairwise(first[1:]):
        assert set(fewer.in_float) < set(more.in_float)


def test_float32_where_the_gate_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "small")
    (plain,) = export_folder(folder, tmp_path / "a", precision="int8").variants
    assert plain.in_float == ()
    lost = 1 - plain.cosines[0]
    monkeypatch.setitem(GATES, "int8", Gate(cosine_mean=1 - 0.9 * lost))
    (made,) = export_folder(folder, tmp_path / "b", precision="int8").variants
    assert made.in_float and made.passed
    assert 1 - made.cosines[0] < 0.8 * 0.9 * lost
    tensors = {t.name: t.data_type for t in onnx.load(tmp_path / "b" / made.file).graph.initializer}
    assert all(tensors[name] == onnx.TensorProto.FLOAT for name in made.in_float)
    assert not any(f"{name}:int8" in tensors for name in made.in_float)
    (told,) = json.loads((tmp_path / "b" / "export_report.json").read_text())["variants"]
    assert told["in_float"] == list(made.in_float)
    assert (
        f"since eight bits change the embeddings too much: {made.in_float[0]}"
        in (tmp_path / "b" / "README.md").read_text()
    )


def test_a_gate_that_cannot_be_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "small")
    monkeypatch.setitem(GATES, "int8", Gate(cosine_mean=1.0))
    with pytest.raises(ExportError, match=r"model_int8\.onnx of 'small' has a mean cosine"):
        export_folder(folder, tmp_path / "out", precision="int8")
    (kept,) = export_folder(folder, tmp_path / "out", precision="int8", allow_loss=True).variants
    assert kept.in_float == ()  # the smallest file: float32 did not help


@pytest.mark.slow
def test_the_starter_keeps_its_labels(shared_data: Path, tmp_path: Path) -> None:
    (variant,) = export_folder(
        "starter", tmp_path / "out", precision="int8", labelled=shared_data / "imagenette224" / "val"
    ).variants
    assert variant.passed and variant.labels is not None
    assert variant.labels.pictures == 1000 and variant.labels.equal >= 0.99
    assert variant.bytes < 0.28 * 22_016_971  # of the float32 file
