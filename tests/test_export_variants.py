"""The variants of an export: float16, int8, embedder, one size; their gates, their reports, their loading."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray

pytest.importorskip("timm")

import onnx
import onnxruntime as ort
import timm
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from small_models import SMALL, config_for, picture, random_weights

import dinokit.export.proof as proof
import dinokit.runtime.onnx as runtime_onnx
from dinokit import load_backbone
from dinokit.cli.embed import embed as embed_command
from dinokit.cli.export import export as export_command
from dinokit.embeddings import read_origin
from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.export import ExportError, ExportReport, VariantReport, export_folder, export_onnx
from dinokit.export.card import card_is_ours
from dinokit.export.embedder import to_embedder
from dinokit.export.fixed_size import fix_size
from dinokit.export.half import to_half
from dinokit.export.quantize import to_int8
from dinokit.export.report import GATES, LabelAgreement
from dinokit.export.variants import Variant, plan_variants
from dinokit.export.verify import Comparison, cosines
from dinokit.model_folder import write_model_folder
from dinokit.runtime import OUTPUTS
from dinokit.vit_graph import build_vit_graph

CONFIG = config_for()
WEIGHTS = random_weights()


def run(model: onnx.ModelProto, pixels: NDArray[Any], name: str = "pixel_values") -> list[NDArray[Any]]:
    """Plain ONNX Runtime, none of dinokit."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(None, {name: pixels})
    return outputs


def pixels(count: int = 4, height: int = 32, width: int = 32) -> NDArray[np.float32]:
    crops = np.stack([np.asarray(picture(width, height, seed)) for seed in range(count)])
    return CONFIG.preprocessing.normalise(crops)


def worst_cosine(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return float(cosines(a, b).min())


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_vit_graph(SMALL, WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "small", CONFIG, WEIGHTS).path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all three precisions and the embedders; read only."""
    there = tmp_path_factory.mktemp("exported")
    source = write_model_folder(there / "source", CONFIG, WEIGHTS).path
    export_folder(source, there / "out", precision="fp32,fp16,int8", target="portable,embedder")
    return there / "out"


# -- float16


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


# -- int8


def test_int8_is_small_and_close(graph: onnx.ModelProto) -> None:
    int8 = to_int8(graph)
    kinds = {t.name: t.data_type for t in int8.graph.initializer}
    assert sum(kind == onnx.TensorProto.INT8 for kind in kinds.values()) == 1 + SMALL.depth * 6
    assert not [name for name in kinds if name.endswith("fc1.weight")]
    domains = {node.domain for node in int8.graph.node}
    assert domains == {""}  # standard operators only
    for size in ((32, 32), (48, 64)):
        right, ours = run(graph, pixels(3, *size)), run(int8, pixels(3, *size))
        assert 0.995 < worst_cosine(right[1], ours[1]) < 1 - 1e-7


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


def test_vnni_is_read_from_the_processor(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    for flags, has in (("fpu avx512_vnni sse", True), ("avx_vnni", True), ("fpu avx2 avx512f", False)):
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none\n")
        assert runtime_onnx._has_vnni(file) is has
    file.write_text("processor : 0\n")
    assert not runtime_onnx._has_vnni(file)
    assert not runtime_onnx._has_vnni(tmp_path / "none")


def test_int8_by_hand() -> None:
    """One product against the formula of the module, in numpy."""
    rng = np.random.default_rng(0)
    x, w = rng.normal(0, 3, (2, 5, 16)).astype(np.float32), rng.normal(0, 1, (16, 8)).astype(np.float32)
    w[:, 3] = 0
    x[1, 2] = 0
    make = onnx.helper
    model = make.make_model(
        make.make_graph(
            [make.make_node("MatMul", ["x", "w"], ["y"])],
            "g",
            [make.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 5, 16])],
            [make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [2, 5, 8])],
            [onnx.numpy_helper.from_array(w, "w")],
        ),
        opset_imports=[make.make_opsetid("", 20)],
        ir_version=9,
    )
    column = np.abs(w).max(0) / 127
    column[3] = 1
    row = np.maximum(np.abs(x).max(-1, keepdims=True), 1e-12)
    right = (np.rint(x / row * 127) @ np.rint(w / column)) * (column / 127) * row
    (found,) = run(to_int8(model), x, "x")
    assert np.abs(found - right).max() < 1e-4
    assert np.abs(found - x @ w).max() < 0.3
    assert not found[..., 3].any() and not found[1, 2].any()


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


# -- embedder and fixed size


def test_an_embedder_takes_bytes(graph: onnx.ModelProto) -> None:
    crops = np.stack([np.asarray(picture(48, 32, seed)) for seed in range(3)])
    embedder = to_embedder(graph, CONFIG.preprocessing)
    (found,) = run(embedder, crops, "image")
    # torchvision's ToTensor and Normalize, in torch
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    normalised = (torch.from_numpy(crops).permute(0, 3, 1, 2) / 255 - mean) / std
    right = run(graph, normalised.numpy())[1]
    assert np.abs(found - right).max() < 1e-4
    (image,), (embedding,) = embedder.graph.input, embedder.graph.output
    assert [d.dim_param or d.dim_value for d in image.type.tensor_type.shape.dim] == [
        "batch",
        "height",
        "width",
        3,
    ]
    assert embedding.name == "embedding"


@pytest.mark.parametrize("size", [(32, 32), (48, 24)])
def test_a_fixed_size_leaves_no_resize(graph: onnx.ModelProto, size: tuple[int, int]) -> None:
    fixed = fix_size(graph, *size)
    kinds = {node.op_type for node in fixed.graph.node}
    assert not kinds & {"Resize", "Div", "Equal", "ReduceMin"}
    for count in (1, 4):
        for a, b in zip(run(graph, pixels(count, *size)), run(fixed, pixels(count, *size)), strict=True):
            assert np.abs(a - b).max() < 1e-5
    dims = [d.dim_param or d.dim_value for d in fixed.graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", 3, *size]


def test_one_size_through_the_whole_export(folder: Path, tmp_path: Path) -> None:
    report = export_folder(folder, tmp_path / "out", precision="fp16", image_size=(48, 24))
    (variant,) = report.variants
    assert variant.file == "onnx/model_fp16_48x24.onnx"
    assert {(c.height, c.width) for c in variant.comparisons} == {(48, 24)}
    alone = load_backbone(tmp_path / "out" / variant.file, device="cpu")
    assert (alone.image_size, alone.precision) == ((48, 24), "fp16")
    wanted = load_backbone(folder, device="cpu", image_size=(48, 24)).embed(picture())
    assert worst_cosine(alone.embed(picture())[None], wanted[None]) > 0.9999
    with pytest.raises(UsageError, match=r"50x24 is not a multiple of patch_size=8; use 48 or 56 for 50"):
        export_folder(folder, tmp_path / "out", image_size=(50, 24))


# -- what is asked for


def test_the_names_of_the_files() -> None:
    plan = plan_variants("int8, FP32", ["embedder", "portable"], None)
    assert [v.file for v in plan] == [
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "onnx/embedder.onnx",
        "onnx/embedder_int8.onnx",
    ]
    assert Variant("fp16", "portable", (224, 320)).file == "onnx/model_fp16_224x320.onnx"


@pytest.mark.parametrize(
    ("precision", "target", "words"),
    [
        (
            "fp61",
            "portable",
            r"precision 'fp61' is not known; expected of fp32, fp16, int8; did you mean 'fp16'",
        ),
        ("fp32", "portabel", r"target 'portabel' is not known.*did you mean 'portable'"),
        (",", "portable", "no precision was named"),
    ],
)
def test_a_typo(folder: Path, tmp_path: Path, precision: str, target: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_folder(folder, tmp_path / "out", precision=precision, target=target)
    assert not (tmp_path / "out").exists()


# -- the gates


def report_of(
    precision: str, cosine: float, *, finite: bool = True, equal: float | None = None
) -> VariantReport:
    c = Comparison(2, 32, 40, 0.5, 0.1, 0.5, 0.1, 0.0, (cosine, cosine), finite)
    labels = None if equal is None else LabelAgreement(200, 10, 20, equal, 0.9, 0.9, 1.0, 1.0, 1.0)
    return VariantReport(f"onnx/{precision}", precision, "portable", 1, "0", (c,), labels)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            report_of("fp32", 1.0),
            r"differs from torch by 5\.00e-01 at batch 2 of 32x40 pixels, at most 1e-04",
        ),
        (
            report_of("fp16", 0.9998),
            r"cosine of 0\.999800 with torch, at least 0\.9999 is needed \(1\.0e-04 too low",
        ),
        (report_of("int8", 0.98), r"mean cosine of 0\.980000"),
        (
            report_of("int8", 0.995, equal=0.985),
            r"gives 98\.5% of 200 pictures the k-NN label .* at least 99%",
        ),
        (report_of("int8", 1.0, finite=False), "not finite at batch 2 of 32x40"),
    ],
)
def test_below_the_gate(variant: VariantReport, words: str) -> None:
    report = ExportReport("m", "0", (), (variant,))
    assert not report.passed
    with pytest.raises(ExportError, match=words):
        report.check()
    if variant.finite:
        report.check(allow_loss=True)
    else:
        with pytest.raises(ExportError, match=words):
            report.check(allow_loss=True)


def test_at_the_gate() -> None:
    good = (report_of("fp16", 0.99995), report_of("int8", 0.9901, equal=0.99))
    ExportReport("m", "0", (), good).check()
    assert set(GATES) == {"fp32", "fp16", "int8"}


def spoil(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The variant of this precision gets a final norm with wrong weights."""
    right = proof.build

    def wrong(variant: Variant, graph: onnx.ModelProto, *rest: Any) -> onnx.ModelProto:
        model = right(variant, graph, *rest)
        if variant.precision == precision:
            tensor = next(t for t in model.graph.initializer if t.name == "norm.bias")
            noise = np.random.default_rng(0).normal(0, 0.3, SMALL.embed_dim).astype(np.float32)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + noise, "norm.bias")
            )
        return model

    monkeypatch.setattr(proof, "build", wrong)


def test_a_failed_variant_leaves_nothing_unless_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "int8")
    done = CliRunner().invoke(
        export_command, [str(folder), "-o", str(tmp_path / "o"), "--precision", "fp32,int8"]
    )
    assert isinstance(done.exception, ExportError)
    assert "onnx/model_int8.onnx of 'small' has a mean cosine" in str(done.exception)
    assert "--allow-loss" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]

    done = CliRunner().invoke(
        export_command, [str(folder), "-o", str(tmp_path / "o"), "--precision", "fp32,int8", "--allow-loss"]
    )
    assert done.exit_code == 0, done.output
    assert "Warning: onnx/model_int8.onnx has a mean cosine" in done.stderr
    assert "Kept although below its gate: onnx/model_int8.onnx" in (tmp_path / "o" / "README.md").read_text()
    values = json.loads((tmp_path / "o" / "export_report.json").read_text())
    assert [v["passed"] for v in values["variants"]] == [True, False]


def labelled_set(root: Path) -> Path:
    for label, seeds in (("a", range(6)), ("b", range(50, 56))):
        (root / label).mkdir(parents=True)
        for seed in seeds:
            picture(seed=seed).save(root / label / f"{seed}.png")
    return root


def test_labels_are_compared(folder: Path, tmp_path: Path) -> None:
    root = labelled_set(tmp_path / "set")
    (root / "a" / "broken.png").write_bytes(b"no picture")
    report = export_folder(folder, tmp_path / "out", precision="fp16", labelled=root)
    (variant,) = report.variants
    assert variant.labels is not None
    assert (variant.labels.pictures, variant.labels.classes, variant.labels.k) == (12, 2, 11)
    assert variant.labels.equal == 1.0
    assert variant.labels.accuracy == variant.labels.accuracy_torch
    assert (
        0.9999 < variant.labels.cosine_min <= variant.labels.cosine_p1 <= variant.labels.cosine_mean <= 1.0001
    )
    shutil.rmtree(root / "b")
    with pytest.raises(UsageError, match="at least two classes are"):
        export_folder(folder, tmp_path / "out", labelled=root)


# -- the report, the card, files of before


def test_the_report_and_the_card(exported: Path) -> None:
    values = json.loads((exported / "export_report.json").read_text())
    assert values["passed"] is True
    for variant in values["variants"]:
        file = exported / variant["file"]
        assert variant["bytes"] == file.stat().st_size
        assert len(variant["comparisons"]) == 9
        assert (variant["comparisons"][0]["attention_max"] is None) == (variant["target"] == "embedder")
        assert variant["cosine_min"] <= variant["cosine_p1"] <= variant["cosine_mean"]
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        says = json.loads({p.key: p.value for p in model.metadata_props}["dinokit"])
        assert (says["precision"], says["target"]) == (variant["precision"], variant["target"])
        assert says["licence"] == "apache-2.0" and says["written_by"].startswith("dinokit ")
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm")
    assert card.count("<!-- dinokit export -->") == card.count("## ONNX files") == 1
    assert all(f"| `{v['file']}` | {v['bytes'] / 1e6:.1f} MB |" in card for v in values["variants"])
    assert card_is_ours(exported)


def test_files_of_an_earlier_export_stay(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    before = (out / "onnx" / "model_int8.onnx").read_bytes()
    (out / "onnx" / "embedder.onnx").write_bytes(b"damaged")
    report = export_folder(out, out, precision="fp16")
    assert (out / "onnx" / "model_int8.onnx").read_bytes() == before
    names = [v["file"] for v in report.to_json()["variants"]]
    assert names == [
        "onnx/model_fp16.onnx",
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "onnx/embedder_fp16.onnx",
        "onnx/embedder_int8.onnx",
    ]
    assert sorted(p.name for p in (out / "onnx").iterdir()) == sorted(Path(name).name for name in names)
    card = (out / "README.md").read_text()
    assert card.count("## ONNX files") == 1 and "`onnx/embedder.onnx`" not in card


def test_a_card_that_a_person_edited_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("mine\n")
    report = export_folder(folder, tmp_path / "out")
    assert report.card == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"
    assert export_folder(tmp_path / "out", tmp_path / "out").card == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"


# -- loading


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_load_backbone_takes_the_file(exported: Path, precision: str) -> None:
    backbone = load_backbone(exported, device="cpu", precision=precision)
    assert (backbone.engine, backbone.precision) == ("onnx", precision)
    right = load_backbone(exported, device="cpu")
    assert right.precision == "fp32"
    vector, wanted = backbone.embed(picture()), right.embed(picture())
    assert worst_cosine(vector[None], wanted[None]) > 0.99
    assert not np.array_equal(vector, wanted)
    lone = load_backbone(exported / "onnx" / f"model_{precision}.onnx", device="cpu")
    assert lone.precision == precision
    assert np.array_equal(lone.embed(picture()), vector)


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"int8.*needs onnx/model_int8\.onnx in its model folder, and it has none"
    ):
        load_backbone(folder, precision="int8")
    with pytest.raises(ModelError, match=r"engine='onnx': precision='fp16' needs onnx/model_fp16\.onnx"):
        load_backbone(folder, precision="fp16", engine="onnx")
    assert load_backbone(folder, precision="fp16", device="cpu").engine == "torch"
    with pytest.raises(UsageError, match="precision='int8' is not one the torch engine knows"):
        load_backbone(folder, precision="int8", engine="torch", device="cpu")


def test_a_file_that_is_another(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    names = ("model_int8.onnx", "model_fp16.onnx", "model.onnx")
    shutil.copy(out / "onnx" / "model.onnx", out / "onnx" / "model_int8.onnx")
    with pytest.raises(
        ModelError, match=r"model_int8\.onnx does not belong to its folder: its precision differ"
    ):
        load_backbone(out, precision="int8")
    shutil.copy(exported / "onnx" / "model_fp16.onnx", out / "onnx" / "model.onnx")
    with pytest.raises(ModelError, match="its precision differ"):
        load_backbone(out)
    with pytest.raises(UsageError, match=r"precision='fp32' is not to be had .* computes in 'int8'"):
        load_backbone(exported / "onnx" / "model_int8.onnx", precision="fp32", device="cpu")
    with pytest.raises(ModelError, match=r"embedder\.onnx is an embedder: it takes uint8 crops"):
        load_backbone(exported / "onnx" / "embedder.onnx", device="cpu")
    other = write_model_folder(tmp_path / "other", replace(CONFIG, name="other"), random_weights(seed=1)).path
    (other / "onnx").mkdir()
    for name in names:
        shutil.copy(exported / "onnx" / name, other / "onnx" / name)
    with pytest.raises(ModelError, match="its weights_sha256 differ"):
        load_backbone(other, precision="fp16")


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
@pytest.mark.parametrize("name", ["model_fp16.onnx", "model_int8.onnx"])
def test_a_damaged_file(exported: Path, tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported, out)
    file = out / "onnx" / name
    content = file.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "noise": noise, "empty": b""}[damage])
    with pytest.raises(
        DinokitError, match=r"model_\w+\.onnx (is not an ONNX file|does not say|.* cannot be opened)"
    ):
        load_backbone(out, precision=name[6:10], device="cpu")


def test_embed_takes_a_precision(exported: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    table = tmp_path / "t.parquet"
    arguments = [str(tmp_path / "p.png"), "-o", str(table), "-m", str(exported), "--device", "cpu"]
    done = CliRunner().invoke(embed_command, [*arguments, "--precision", "int8"])
    assert done.exit_code == 0, done.output
    assert "onnx on cpu, int8" in done.stderr
    assert read_origin(table)["precision"] == "int8"


# -- sources


def test_weights_of_facebookresearch(tmp_path: Path) -> None:
    state = {f"backbone.{name}": torch.from_numpy(array) for name, array in WEIGHTS.items()}
    vit = replace(SMALL, embed_dim=192, num_heads=3)
    state = {name: torch.from_numpy(array) for name, array in random_weights(vit).items()}
    torch.save(state, tmp_path / "dino.pth")
    report = export_folder(tmp_path / "dino.pth", tmp_path / "out", precision="fp32,int8")
    assert report.passed
    loaded = load_backbone(tmp_path / "out", device="cpu", precision="int8")
    assert loaded.embed_dim == 192
    again = export_folder(tmp_path / "dino.pth", tmp_path / "out")  # the same weights: no --force needed
    assert [v["file"] for v in again.to_json()["variants"]] == ["onnx/model.onnx", "onnx/model_int8.onnx"]


def test_a_known_name(tmp_path: Path) -> None:
    report = export_folder("starter", tmp_path / "out", precision="int8")
    assert report.model == "starter"
    assert report.variants[0].cosines[0] > 0.999
    with pytest.raises(UsageError, match="starterr"):
        export_folder("starterr", tmp_path / "out2")


def small_timm(name: str = "vit_tiny_patch16_224", **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, **more}
    module: torch.nn.Module = timm.create_model(name, pretrained=False, **arguments)
    return module


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_module_in_memory(tmp_path: Path, precision: str) -> None:
    module = small_timm(num_classes=5).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    file = tmp_path / "new" / "m.onnx"
    report = export_onnx(module, file, precision=precision, name="mine", licence="mit")
    assert report.passed
    assert [path.name for path in file.parent.iterdir()] == ["m.onnx"]
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    backbone = load_backbone(file, device="cpu")
    assert (backbone.name, backbone.precision, backbone.config.licence) == ("mine", precision, "mit")
    crop = backbone.preprocessing.crop(picture())
    pixel_values = torch.from_numpy(backbone.preprocessing.normalise(crop[None]))
    with torch.inference_mode():
        right = module.eval().forward_features(pixel_values)[:, 0].numpy()  # type: ignore[operator]
    assert worst_cosine(right, backbone.embed(picture())[None]) > (1 - 1e-9 if precision == "fp32" else 0.99)


def test_more_than_one_file_holds() -> None:
    ghost = np.broadcast_to(np.float32(0), (2**15, 2**15))  # 4 GiB without memory behind them
    with pytest.raises(
        ModelError, match=r"take 4\.0 GiB as float32, and an export writes files of less than 2 GiB"
    ):
        proof.must_fit_one_file({"w": ghost})


def test_what_is_no_vision_transformer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a Linear is no Vision Transformer of timm"):
        export_onnx(torch.nn.Linear(3, 3), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"should end in \.onnx"):
        export_onnx(small_timm(), tmp_path / "m.bin")
    with pytest.raises(UsageError, match="one file has one precision"):
        export_onnx(small_timm(), tmp_path / "m.onnx", precision="fp32,fp16")
    assert not list(tmp_path.iterdir())


def test_the_outputs_have_names(exported: Path) -> None:
    for name in ("model.onnx", "model_fp16.onnx", "model_int8.onnx"):
        model = onnx.load(exported / "onnx" / name, load_external_data=False)
        assert tuple(value.name for value in model.graph.output) == OUTPUTS


def test_help_shows_examples() -> None:
    done = CliRunner().invoke(export_command, ["--help"])
    assert "--precision fp32,fp16,int8 --labelled" in done.output
    assert done.exit_code == 0
