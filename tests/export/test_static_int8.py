"""int8 of convolutional networks: torch says what the numbers are, ONNX Runtime that the convolutions are integers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

import onnx
import onnxruntime
from lively_networks import PIXELS, lively
from torch.nn import functional

from dinokit import load_backbone
from dinokit.errors import ExportError, UsageError
from dinokit.export import export_onnx
from dinokit.export.quantisation.int8 import Int8Plans, in_integers, is_convolutional
from dinokit.export.quantisation.static_int8 import (
    WEIGHT_LEVELS,
    Convolution,
    Learnt,
    find_convolutions,
    learn,
    patches,
    sensitivity,
    to_static_int8,
)
from dinokit.export.traced import trace_graph
from dinokit.export.verification.proof import open_photographs
from dinokit.runtime.timm_networks import describe_network


def quiet(step: str) -> None:
    """What is being done is told to nobody."""


class Two(torch.nn.Module):
    """A convolution with all options and an activation, and one without either whose output goes two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Conv2d(3, 8, (3, 5), stride=(2, 1), padding=(1, 4), dilation=(1, 2))
        self.second = torch.nn.Conv2d(8, 6, 3, groups=2, bias=False)

    def forward_features(self, x: Any) -> Any:
        x = functional.relu(self.first(x))
        y = self.second(x)
        return y + functional.silu(y)

    def forward_head(self, x: Any, pre_logits: bool = False) -> Any:
        return x.mean(dim=(2, 3))


@pytest.fixture(scope="module")
def two() -> Two:
    torch.manual_seed(0)  # how the weights were drawn decides which plans there are
    module: Two = lively(Two())
    return module


@pytest.fixture(scope="module")
def graph(two: Two) -> onnx.ModelProto:
    known = describe_network(two, (36, 36))
    model, store = trace_graph(two, replace(known, stride=2))
    for tensor in model.graph.initializer:  # all inside
        if tensor.name in store:
            tensor.CopyFrom(onnx.numpy_helper.from_array(store[tensor.name], tensor.name))
    return model


def pixels(count: int, side: int = 36, seed: int = 0) -> NDArray[np.float32]:
    """Neighbours alike, as in photographs."""
    rng = np.random.default_rng(seed)
    rough = torch.from_numpy(rng.normal(size=(count, 3, side // 4, side // 4)))
    return functional.interpolate(rough, (side, side), mode="bilinear").numpy().astype(np.float32)


def run(model: onnx.ModelProto, inputs: NDArray[np.float32], file: Path | None = None) -> NDArray[np.float32]:
    options = onnxruntime.SessionOptions()
    if file:
        options.optimized_model_filepath = str(file)
        options.log_severity_level = 3  # that a file so written is for this machine
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: NDArray[np.float32] = session.run(["pooler_output"], {"pixel_values": inputs})[0]
    return found


@pytest.fixture(scope="module")
def learnt(graph: onnx.ModelProto) -> Learnt:
    return learn(graph, None, find_convolutions(graph), pixels(20), quiet)


def test_all_of_a_convolution_is_found(graph: onnx.ModelProto) -> None:
    first, second = find_convolutions(graph)
    assert (first.source, first.group, first.pads) == ("pixel_values", 1, (1, 4, 1, 4))
    assert (first.strides, first.dilations) == ((2, 1), (1, 2))
    assert second.source == first.result and second.group == 2
    outputs = {node.op_type: node.output[0] for node in graph.graph.node if node.op_type in ("Relu", "Conv")}
    assert first.result == outputs["Relu"] and second.result == outputs["Conv"]  # the last one


def levels(x: Any, low: float, high: float) -> Any:
    """uint8 levels by the definition in ONNX."""
    step = np.float32((high - low) / 255)
    zero = round(-low / float(step))
    return torch.fake_quantize_per_tensor_affine(x, float(step), zero, 0, 255)


def test_it_computes_what_torch_computes_from_the_same_integers(
    two: Two, graph: onnx.ModelProto, learnt: Learnt
) -> None:
    names = [one.name for one in find_convolutions(graph)]
    x = torch.from_numpy(pixels(3, seed=1)).clamp(-1.5, 1.5)
    first, second = find_convolutions(graph)
    kernels = [
        torch.from_numpy(
            np.ascontiguousarray(learnt.rounded[one.weight].values.T).reshape(layer.weight.shape)
        )
        for one, layer in ((first, two.first), (second, two.second))
    ]
    with torch.inference_mode():
        y = levels(x, *learnt.ranges[first.source])
        y = functional.relu(functional.conv2d(y, kernels[0], two.first.bias, (2, 1), (1, 4), dilation=(1, 2)))
        y = levels(y, *learnt.ranges[first.result])
        y = levels(functional.conv2d(y, kernels[1], groups=2), *learnt.ranges[second.result])
        right = (y + functional.silu(y)).mean(dim=(2, 3)).numpy()
        plain = two.forward_head(two.forward_features(x)).numpy()
    found = run(to_static_int8(graph, None, learnt, names), x.numpy())
    off = np.abs(found - right).max()
    assert off < 0.2 * np.abs(plain - right).max()  # a level here and there


def test_each_weight_is_rounded_for_its_patches(two: Two, graph: onnx.ModelProto, learnt: Learnt) -> None:
    first, second = find_convolutions(graph)
    seen = torch.from_numpy(pixels(20))
    with torch.inference_mode():
        inner = functional.relu(two.first(seen))
        for layer, one, x in ((two.first, first, seen), (two.second, second, inner)):
            known = learnt.rounded[one.weight]
            assert np.abs(known.integers).max() == WEIGHT_LEVELS
            assert 2 * 255 * WEIGHT_LEVELS < 2**15  # or x86 without VNNI saturates
            ours = torch.from_numpy(np.ascontiguousarray(known.values.T).reshape(layer.weight.shape))
            flat = layer.weight.reshape(len(layer.weight), -1)
            scale = flat.abs().amax(1, keepdim=True) / WEIGHT_LEVELS
            nearest = ((flat / scale).round() * scale).reshape(layer.weight.shape)
            options = (None, layer.stride, layer.padding, layer.dilation, layer.groups)
            right = functional.conv2d(x, layer.weight, *options)
            errors = [(functional.conv2d(x, k, *options) - right).square().mean() for k in (ours, nearest)]
            assert errors[0] < 0.7 * errors[1]
    low, high = learnt.ranges["pixel_values"]
    assert (low, high) == (seen.min().item(), seen.max().item())
    low, high = learnt.ranges[first.result]
    assert low == 0 and high == pytest.approx(inner.max().item(), rel=1e-5)
    size = [two.first.weight.numel(), two.second.weight.numel()]
    positions = [inner.shape[2] * inner.shape[3], (inner.shape[2] - 2) * (inner.shape[3] - 2)]
    work = np.multiply(size, positions)
    assert list(learnt.size.values()) == pytest.approx(np.divide(size, sum(size)))
    assert list(learnt.work.values()) == pytest.approx(work / work.sum())


def test_patches_are_those_of_torch() -> None:
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 6, 9, 11)).astype(np.float32))
    one = Convolution("c", "x", "w", "y", 2, (0, 3, 1, 2), (2, 1), (1, 2))
    found = list(patches(x.numpy(), one, (8, 3, 3, 2)))
    padded = functional.pad(x, (3, 2, 0, 1))  # left, right, above, below
    for rows, part in zip(found, padded.split(3, dim=1), strict=True):
        right = functional.unfold(part, (3, 2), dilation=(1, 2), stride=(2, 1))
        np.testing.assert_array_equal(rows, right.transpose(1, 2).reshape(-1, 18).numpy())


def test_onnxruntime_takes_them_for_integer_convolutions(
    graph: onnx.ModelProto, learnt: Learnt, tmp_path: Path
) -> None:
    names = [one.name for one in find_convolutions(graph)]
    made = to_static_int8(graph, None, learnt, names)
    assert {node.domain for node in made.graph.node} == {""}
    run(made, pixels(1), tmp_path / "o.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") == 2 and "Conv" not in kinds and "Relu" not in kinds
    run(to_static_int8(graph, None, learnt, names[1:]), pixels(1), tmp_path / "o.onnx")
    kinds = [node.op_type for node in onnx.load(tmp_path / "o.onnx").graph.node]
    assert kinds.count("QLinearConv") == 1


def test_a_picture_does_not_depend_on_the_rest_of_the_batch(graph: onnx.ModelProto, learnt: Learnt) -> None:
    made = to_static_int8(graph, None, learnt, [one.name for one in find_convolutions(graph)])
    inputs = pixels(5, seed=2)
    inputs[3] *= 50
    together = run(made, inputs)
    for i in (0, 4):
        np.testing.assert_allclose(run(made, inputs[i : i + 1])[0], together[i], atol=1e-6)


def test_nothing_in_integers_is_the_network_itself(graph: onnx.ModelProto, learnt: Learnt) -> None:
    made = to_static_int8(graph, None, learnt, [])
    np.testing.assert_array_equal(run(made, pixels(2)), run(graph, pixels(2)))


def test_what_changes_most_for_what_it_saves_stays_float32(graph: onnx.ModelProto, learnt: Learnt) -> None:
    convolutions = find_convolutions(graph)
    changes = dict(sensitivity(graph, None, convolutions, learnt, pixels(8)))
    assert list(changes) == [one.name for one in convolutions] and min(changes.values()) > 0
    right = run(graph, pixels(8)).astype(np.float64)
    for name, change in changes.items():
        found = run(to_static_int8(graph, None, learnt, [name]), pixels(8))
        assert change == pytest.approx(np.square(found - right).mean() / right.var(axis=0).mean(), rel=1e-3)
    shares = dict.fromkeys("abc", 1 / 3)
    known = Learnt({}, {}, shares | {"c": 4 / 3}, shares)
    for allowed, chosen in ((0.5, ""), (1, "a"), (2.9, "a"), (5, "ac"), (7, "acb")):
        assert in_integers({"a": 1.0, "b": 2.0, "c": 4.0}, known, allowed) == tuple(chosen)


@pytest.fixture(scope="module")
def small() -> torch.nn.Module:
    torch.manual_seed(5)
    module: torch.nn.Module = lively(
        timm.create_model("resnet10t", num_classes=0, channels=(16, 24, 32, 48), stem_width=8)
    )
    return module


@pytest.mark.parametrize("network", ["small", "mobilenetv2_035", "mobilenetv3_small_050"])
def test_networks_are_exported(
    network: str, small: torch.nn.Module, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "dinokit.export.quantisation.int8.CONVOLUTIONS", (1e9,)
    )  # random weights tell pictures hardly apart
    torch.manual_seed(3)  # weights that were not drawn well are below the gate
    module = small if network == "small" else lively(timm.create_model(network, num_classes=0))
    full = export_onnx(module, tmp_path / "m.onnx", preprocessing=PIXELS)
    report = export_onnx(module, tmp_path / "m8.onnx", preprocessing=PIXELS, precision="int8")
    assert report.passed and not report.in_float
    assert report.bytes < 0.4 * full.bytes
    ours = load_backbone(tmp_path / "m8.onnx", device="cpu", image_size=(50, 61))
    theirs = load_backbone(tmp_path / "m.onnx", device="cpu", image_size=(50, 61))
    a, b = (backbone.embed(photos / "chelsea.jpg") for backbone in (ours, theirs))
    assert 0.95 < a @ b / np.linalg.norm(a) / np.linalg.norm(b) < 1 - 1e-9


@pytest.mark.parametrize(
    "options", [{"image_size": (40, 52)}, {"target": "embedder"}, {"external_data": True}]
)
def test_its_weights_stay_int8_in_other_files(
    small: torch.nn.Module, tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = export_onnx(small, tmp_path / "m8.onnx", preprocessing=PIXELS, precision="int8")
    other = export_onnx(small, tmp_path / "o8.onnx", preprocessing=PIXELS, precision="int8", **options)
    assert other.passed and other.cosines[0] > 0.999
    assert other.bytes < 1.2 * whole.bytes


def test_what_is_computed_in_float32_is_told(
    small: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.export.quantisation.int8.CONVOLUTIONS", (1e9, 1e-4, 1e-5, 1e-6))
    monkeypatch.setattr("dinokit.export.verification.proof.has_margin", lambda report: bool(report.in_float))
    report = export_onnx(small, tmp_path / "m8.onnx", preprocessing=PIXELS, precision="int8")
    assert report.in_float and all("Conv" in name for name in report.in_float)
    kinds = [t.data_type for t in onnx.load(tmp_path / "m8.onnx").graph.initializer if len(t.dims) == 4]
    assert kinds.count(onnx.TensorProto.FLOAT) == len(report.in_float) < len(kinds)


def test_plans_are_made_one_after_the_other(graph: onnx.ModelProto) -> None:
    assert is_convolutional(graph)
    told: list[str] = []
    plans = list(Int8Plans(graph, None, lambda: pixels(20), told.append))
    assert len(plans) > 1 and all(plan.network is not None for plan in plans)
    assert [len(plan.in_float) for plan in plans] == sorted(len(plan.in_float) for plan in plans)
    assert any("rounding" in step for step in told) and any("alone in integers" in step for step in told)


def test_a_file_in_float32_is_never_called_int8(
    graph: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.export.quantisation.int8.CONVOLUTIONS", (1e-12, 1e-13))
    (plan,) = Int8Plans(graph, None, lambda: pixels(20))
    assert plan.in_float == ()


def test_pictures_that_nobody_took_are_no_measure(tmp_path: Path) -> None:
    bands = replace(PIXELS, mean=(0.4,) * 5, std=(0.2,) * 5)
    module = lively(
        timm.create_model("resnet10t", num_classes=0, in_chans=5, channels=(16, 24, 32, 48), stem_width=8)
    )
    with pytest.raises(UsageError, match=r"name some of yours with --photos"):
        export_onnx(module, tmp_path / "m8.onnx", preprocessing=bands, precision="int8")
    rng = np.random.default_rng(0)
    for i in range(3):
        np.save(tmp_path / f"{i}.npy", rng.integers(0, 256, (60, 60, 5), np.uint8))
    report = export_onnx(module, tmp_path / "m8.onnx", preprocessing=bands, precision="int8", photos=tmp_path)
    assert report.passed


def test_a_channel_of_tiny_weights_keeps_its_bias(two: Two, graph: onnx.ModelProto) -> None:
    """Such channels are common after training; their bias is 10^13 of the steps of their products."""
    pruned = onnx.ModelProto()
    pruned.CopyFrom(graph)
    conv = next(node for node in pruned.graph.node if node.op_type == "Conv")
    for tensor in pruned.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name == conv.input[1]:
            values[2] *= 1e-12
        elif tensor.name == conv.input[2]:
            values[2] = 1.5
        else:
            continue
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    learnt = learn(pruned, None, find_convolutions(pruned), pixels(20), quiet)
    changed = dict(sensitivity(pruned, None, find_convolutions(pruned), learnt, pixels(8)))
    assert changed[conv.name] < 1e-3  # 0.15 where the bias is cut off


def test_some_photographs_are_held_out(
    small: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exceeds the ranges of the calibration is seen, and refused."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(20):
        levels = rng.integers(100, 156, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(levels).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i:02}.png")
    seen = open_photographs(folder)
    assert len(seen.compared) == 8 and len(seen.further()) == 8 and seen.held_out == 4
    assert (seen.names[0], seen.names[-1]) == ("00.png", "19.png")

    # Those held out are harsh, and the ranges of all others do not reach so far.
    for name in seen.names[: seen.held_out]:
        harsh = rng.integers(0, 2, (8, 8, 3)).astype(np.uint8) * 255
        Image.fromarray(harsh).resize((64, 64), Image.Resampling.NEAREST).save(folder / name)
    monkeypatch.setattr("dinokit.export.quantisation.int8.CONVOLUTIONS", (1e9,))
    with pytest.raises(ExportError, match=r"photographs that its activation ranges were not taken from"):
        export_onnx(small, tmp_path / "m8.onnx", preprocessing=PIXELS, precision="int8", photos=folder)


def test_one_photograph_is_too_few(small: torch.nn.Module, tmp_path: Path, photos: Path) -> None:
    with pytest.raises(UsageError, match=r"verified on others, but --photos .* names only chelsea\.jpg"):
        export_onnx(
            small,
            tmp_path / "m8.onnx",
            preprocessing=PIXELS,
            precision="int8",
            photos=photos / "chelsea.jpg",
        )
