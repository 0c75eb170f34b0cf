"""The target ort-cuda: ONNX Runtime's fused operators compute what torch does, are proven, and are found again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

pytest.importorskip("timm")
pytest.importorskip("transformers")

import onnx
import onnxruntime as ort
import torch
from small_generations import TRANSFORMERS, lively, pixels, transformers_model, transformers_outputs
from small_models import SMALL, config_for, picture, random_weights

import dinokit.export.verification.proof as proof
import dinokit.runtime.onnx as runtime_onnx
from dinokit import load_backbone
from dinokit.cli.export import export as export_command
from dinokit.errors import ModelError, UsageError
from dinokit.export import ExportError, export_folder
from dinokit.export.graphs.fixed_size import fix_size
from dinokit.export.graphs.fused import DOMAIN, to_fused
from dinokit.export.graphs.half import to_half
from dinokit.export.variants import plan_variants
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import OUTPUTS
from dinokit.model_folder.folder import write_model_folder
from dinokit.model_folder.weight_names import transformers_to_timm
from dinokit.model_folder.weights import read_safetensors
from dinokit.runtime.onnx import OnnxEngine
from dinokit.runtime.torch import describe
from dinokit.vit_graph import build_vit_graph

TOLERANCE = 2e-5


def run(model: onnx.ModelProto, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    """Plain ONNX Runtime, none of dinokit."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip(OUTPUTS, session.run(list(OUTPUTS), {"pixel_values": images}), strict=True))


def fused_operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.domain == DOMAIN)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "small", config_for(), random_weights()).path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the usual file, both for CUDA and the usual one in float16; read only."""
    there = tmp_path_factory.mktemp("exported")
    source = write_model_folder(there / "source", config_for(), random_weights()).path
    export_folder(source, there / "out", precision="fp32,fp16", target="portable,ort-cuda")
    return there / "out"


# -- the graph


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_the_same_numbers_as_transformers(name: str, tmp_path: Path) -> None:
    """DINOv2 and DINOv3, queries and keys turned by their place, gated or not, with biases or without."""
    model = transformers_model(name)
    model.save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    vit = VitArchitecture.from_shapes({k: tuple(w.shape) for k, w in weights.items()}, num_heads=3)
    graph = build_vit_graph(vit, weights)
    fused = to_fused(graph)
    onnx.checker.check_model(fused, full_check=True)
    assert fused_operators(fused) == {"MultiHeadAttention": 2, "SkipLayerNormalization": 4}
    sides = [(model.config.image_size, model.config.image_size)]
    if name in ("dinov2 reg", "dinov3"):  # the others follow the size in another way in transformers
        sides.append((5 * model.config.patch_size, 7 * model.config.patch_size))
    for height, width in sides:
        images = pixels(height, width, batch=3)
        right, ours = transformers_outputs(model, images), run(fused, images)
        for output in OUTPUTS:
            np.testing.assert_allclose(ours[output], right[output], atol=TOLERANCE, rtol=0, err_msg=output)
    sized = run(to_fused(fix_size(graph, height, width)), images)
    for output in OUTPUTS:
        np.testing.assert_allclose(sized[output], right[output], atol=TOLERANCE, rtol=0)


def test_the_same_numbers_as_timm() -> None:
    """DINO v1's shape: no layer scale, so the bias of a layer goes into the norm after it."""
    import timm

    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    module = lively(timm.create_model("vit_tiny_patch16_224", num_classes=0, **sizes))
    weights = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    fused = to_fused(build_vit_graph(describe(module), weights))
    by_kind = {node.op_type: node for node in fused.graph.node if node.domain == DOMAIN}
    assert len(by_kind["MultiHeadAttention"].input) == 3  # the last block, whose attention is shown
    assert len(by_kind["SkipLayerNormalization"].input) == 5
    first = next(node for node in fused.graph.node if node.op_type == "MultiHeadAttention")
    assert len(first.input) == 4
    images = pixels(32, 32)
    with torch.inference_mode():
        right = module.forward_features(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(fused, images)["last_hidden_state"], right, atol=TOLERANCE, rtol=0)


def test_attention_is_one_row_of_one_block() -> None:
    fused = to_fused(build_vit_graph(SMALL, random_weights()))
    (softmax,) = [node for node in fused.graph.node if node.op_type == "Softmax"]
    fused.graph.output.append(onnx.ValueInfoProto(name=softmax.output[0]))
    session = ort.InferenceSession(fused.SerializeToString(), providers=["CPUExecutionProvider"])
    (probabilities,) = session.run([softmax.output[0]], {"pixel_values": pixels(32, 32)})
    assert probabilities.shape == (2, 3, 1, 17)
    np.testing.assert_allclose(probabilities.sum(-1), 1, atol=1e-6)


def test_float16_attention_with_float32_residuals() -> None:
    graph = build_vit_graph(SMALL, random_weights())
    half = to_half(to_fused(graph))
    kinds = {t.name: t.data_type for t in half.graph.initializer}
    makers = {name: node for node in half.graph.node for name in node.output}
    float16 = onnx.TensorProto.FLOAT16
    for node in half.graph.node:
        if node.op_type == "MultiHeadAttention":
            sources = [makers[name] for name in node.input[:3]]
            assert {source.op_type for source in sources} <= {"MatMul", "Add"}  # computed in float16 already
            assert all(kinds[name] == float16 for name in node.input[3:])
        if node.op_type == "SkipLayerNormalization":
            assert all(kinds[name] == onnx.TensorProto.FLOAT for name in node.input[2:])
            cast = makers[node.input[1]]
            assert (cast.op_type, cast.attribute[0].i) == ("Cast", onnx.TensorProto.FLOAT)
    images = pixels(40, 24, batch=3)
    right, ours = run(graph, images), run(half, images)
    for output in OUTPUTS:
        assert 1e-6 < np.abs(right[output] - ours[output]).max() < 0.02


def test_a_graph_of_another_maker_is_refused() -> None:
    make = onnx.helper
    softmax = make.make_node("Softmax", ["x"], ["y"], axis=-1)
    values = [make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 3]) for name in "xy"]
    model = make.make_model(
        make.make_graph([softmax], "g", values[:1], values[1:]), opset_imports=[make.make_opsetid("", 20)]
    )
    with pytest.raises(ModelError, match=r"no attention that could be fused .* Use target 'portable'"):
        to_fused(model)


# -- what is asked for


def test_the_names_of_the_files() -> None:
    assert [v.file for v in plan_variants(None, "portable,ort-cuda", None)] == [
        "onnx/model.onnx",
        "onnx/model_cuda_fp16.onnx",
    ]
    assert [v.file for v in plan_variants("fp32,fp16,int8", "ort-cuda", (32, 48))] == [
        "onnx/model_cuda_32x48.onnx",
        "onnx/model_cuda_fp16_32x48.onnx",
    ]
    with pytest.raises(UsageError, match="'ort-cuda' cannot be int8, which is for CPUs"):
        plan_variants("int8", "portable,ort-cuda", None)


# -- the proof


def test_it_is_compared_on_the_cpu_and_that_is_said(exported: Path) -> None:
    values = json.loads((exported / "export_report.json").read_text())
    by_file = {v["file"]: v for v in values["variants"]}
    assert values["passed"] and len(by_file) == 4
    for name, limit in (("model_cuda", 1e-5), ("model_cuda_fp16", 0.02)):
        entry = by_file[f"onnx/{name}.onnx"]
        assert entry["device"] == "cpu" and len(entry["comparisons"]) == 9
        assert 0 < entry["max_difference"] < limit
        assert all(c["attention_max"] is not None for c in entry["comparisons"])
        assert entry["images_per_second"] is None  # of a CPU, it would mean nothing
        assert "the CUDA kernels were not run and their speed was not measured" in entry["remark"]
    assert by_file["onnx/model.onnx"]["remark"] == ""
    card = (exported / "README.md").read_text()
    assert "`onnx/model_cuda_fp16.onnx`: compared on the CPU" in card
    assert card.count("Compared with torch in float32 on") == 1


def test_the_command_says_so(folder: Path, tmp_path: Path) -> None:
    arguments = [str(folder), "-o", str(tmp_path / "out"), "--target", "ort-cuda"]
    done = CliRunner().invoke(export_command, arguments)
    assert done.exit_code == 0, done.output
    assert "onnx/model_cuda_fp16.onnx: compared on the CPU by ONNX Runtime's CPU kernels" in done.stderr
    assert [path.name for path in (tmp_path / "out" / "onnx").iterdir()] == ["model_cuda_fp16.onnx"]


def test_what_cannot_run_here_is_not_proven(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = proof.OnnxEngine

    def without_kernels(file: Path, **options: Any) -> OnnxEngine:
        if "cuda" in file.name:
            raise ModelError("no kernel for MultiHeadAttention")
        return right(file, **options)

    monkeypatch.setattr(proof, "OnnxEngine", without_kernels)
    arguments = [str(folder), "-o", str(tmp_path / "out"), "--target", "portable,ort-cuda"]
    done = CliRunner().invoke(export_command, arguments)
    assert isinstance(done.exception, ExportError)
    assert "model_cuda_fp16.onnx of 'small' is not verified: it cannot be run" in str(done.exception)
    assert "keep it unverified with --allow-loss" in str(done.exception)
    assert not (tmp_path / "out").exists()

    done = CliRunner().invoke(export_command, [*arguments, "--allow-loss"])
    assert done.exit_code == 0, done.output
    assert "Warning: onnx/model_cuda_fp16.onnx is not verified: it" in done.stderr
    report = json.loads((tmp_path / "out" / "export_report.json").read_text())
    entry = report["variants"][1]
    assert (entry["passed"], entry["comparisons"], entry["cosine_mean"]) == (False, [], None)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`onnx/model_cuda_fp16.onnx` was **not compared**: no kernel for MultiHeadAttention" in card


# -- loading


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda", "fp16", "model_cuda_fp16.onnx"),
        ("cuda:0", "auto", "model_cuda.onnx"),
        ("auto", "fp16", "model_cuda_fp16.onnx"),
        ("auto on a CPU", "fp16", "model_fp16.onnx"),
        ("tensorrt", "fp16", "model_fp16.onnx"),
        ("cpu", "fp16", "model_fp16.onnx"),
        ("cpu", "auto", "model.onnx"),
    ],
)
def test_cuda_takes_the_file_for_it(
    exported: Path, monkeypatch: pytest.MonkeyPatch, device: str, precision: str, expected: str
) -> None:
    asked: list[tuple[Path, str]] = []
    right = runtime_onnx.OnnxEngine

    def on_cpu(file: Path, *, device: str, **options: Any) -> OnnxEngine:
        asked.append((file, device))
        return right(file, device="cpu", **options)

    monkeypatch.setattr(runtime_onnx, "OnnxEngine", on_cpu)
    there = device != "auto on a CPU"
    monkeypatch.setattr(runtime_onnx, "cuda_loads", lambda: there)
    device = device.split()[0]
    load_backbone(exported, device=device, precision=precision)
    assert [(file.name, on) for file, on in asked] == [(expected, device)]


def test_the_file_alone_runs_on_a_cpu(exported: Path) -> None:
    usual = load_backbone(exported, device="cpu")
    lone = load_backbone(exported / "onnx" / "model_cuda.onnx", device="cpu")
    assert np.abs(lone.embed(picture()) - usual.embed(picture())).max() <= TOLERANCE
    assert np.abs(lone.attention(picture()) - usual.attention(picture())).max() <= TOLERANCE
    half = load_backbone(exported / "onnx" / "model_cuda_fp16.onnx", device="cpu")
    assert half.precision == "fp16"


def test_a_file_of_other_weights_is_refused(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime_onnx, "cuda_loads", lambda: True)
    other = write_model_folder(
        tmp_path / "other", replace(config_for(), name="other"), random_weights(seed=1)
    ).path
    (other / "onnx").mkdir()
    file = other / "onnx" / "model_cuda_fp16.onnx"
    file.write_bytes((exported / "onnx" / file.name).read_bytes())
    with pytest.raises(
        ModelError, match=r"model_cuda_fp16\.onnx does not belong to its folder: its weights_sha256"
    ):
        load_backbone(other, precision="fp16")
