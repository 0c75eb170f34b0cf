"""Weights beside the graph: written whole, checked by path, kept, pushed, fetched and loaded together."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections import ChainMap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import onnx
import onnxruntime as ort
from hub_server import HubServer
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.cli.export import export as export_command
from dinokit.errors import ModelError
from dinokit.export import export_folder, plan_push
from dinokit.export.graphs.external_data import write_onnx
from dinokit.export.graphs.fixed_size import fix_size
from dinokit.export.graphs.fused import to_fused
from dinokit.export.graphs.graph import check_graph
from dinokit.export.graphs.half import to_half
from dinokit.export.quantisation.quantize import to_int8
from dinokit.export.variants import Variant, build
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.contract import DATA_DIGEST_KEY, DATA_KEY, OUTPUTS, missing_data_file
from dinokit.model_folder.folder import write_model_folder
from dinokit.model_folder.onnx_metadata import read_onnx_metadata
from dinokit.model_folder.weights import expected_shapes
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import build_vit_graph, split_vit_graph

VARIANTS = {"precision": "fp16,int8", "target": "portable,ort-cuda,embedder"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "small", config_for(), random_weights()).path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All variants, each in two files, in ``split``, and each in one in ``whole``; read only."""
    there = tmp_path_factory.mktemp("exported")
    source = write_model_folder(there / "source", config_for(), random_weights()).path
    export_folder(source, there / "split", **VARIANTS, external_data=True)
    export_folder(source, there / "whole", **VARIANTS)
    return there


def test_every_variant_is_the_same_network_in_two_files(exported: Path) -> None:
    entries = json.loads((exported / "split" / "export_report.json").read_text())["variants"]
    assert len(entries) == 5
    crops = np.stack([np.asarray(picture(32, 32, seed)) for seed in range(2)])
    pixels = config_for().preprocessing.normalise(crops)
    for entry in entries:
        file, one = exported / "split" / entry["file"], exported / "whole" / entry["file"]
        data = exported / "split" / entry["data"]["file"]
        assert data == file.with_name(f"{file.name}_data")
        assert entry["bytes"] == file.stat().st_size + data.stat().st_size
        assert data.stat().st_size > one.stat().st_size / 2
        onnx.checker.check_model(str(file), full_check=True)
        inside, outside = onnx.load(one), onnx.load(file)  # onnx's own reader of external data
        pairs = [
            {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
            for model in (inside, outside)
        ]
        assert pairs[0].keys() == pairs[1].keys()
        for name, array in pairs[0].items():
            assert array.dtype == pairs[1][name].dtype
            np.testing.assert_array_equal(pairs[1][name], array, err_msg=f"{file.name} {name}")
        feed = {"image": crops} if "embedder" in file.name else {"pixel_values": pixels}
        options = ort.SessionOptions()
        options.log_severity_level = 4
        found, right = (
            ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(None, feed)
            for path in (file, one)
        )
        for a, b in zip(found, right, strict=True):
            np.testing.assert_array_equal(a, b)
    config = json.loads((exported / "split" / "config.json").read_text())
    named = config["transformers.js_config"]["use_external_data_format"]
    assert named == {Path(entry["file"]).name: True for entry in entries}
    assert "transformers.js_config" not in json.loads((exported / "whole" / "config.json").read_text())
    assert load_backbone(exported / "split", device="cpu", precision="int8").embed(picture()).shape == (48,)


def test_the_size_decides(tmp_path: Path) -> None:
    graph, store = split_vit_graph(SMALL, random_weights())
    whole = build_vit_graph(SMALL, random_weights()).SerializeToString()
    assert write_onnx(graph, tmp_path / "a.onnx", store, largest=len(whole) + 1) == (tmp_path / "a.onnx",)
    assert (tmp_path / "a.onnx").read_bytes() == whole  # as if it had never been apart
    assert missing_data_file(tmp_path / "a.onnx") is None
    limit = sum(array.nbytes for array in store.values())
    assert write_onnx(graph, tmp_path / "b.onnx", store, largest=limit) == (
        tmp_path / "b.onnx",
        tmp_path / "b.onnx_data",
    )
    assert read_onnx_metadata(tmp_path / "b.onnx")[DATA_KEY] == "b.onnx_data"
    check_graph(tmp_path / "b.onnx")
    (tmp_path / "b.onnx_data").write_bytes(b"cut short")
    with pytest.raises(ModelError, match=r"b\.onnx cannot be opened by ONNX Runtime"):
        OnnxEngine(tmp_path / "b.onnx", device="cpu")


def test_the_passes_leave_the_weights_of_other_variants_alone() -> None:
    graph, store = split_vit_graph(SMALL, random_weights())
    before = {name: array.copy() for name, array in store.items()}
    for change in (to_half, to_int8, to_fused):
        made = dict(store)
        change(graph, made)
        assert set(made) >= set(store)
        for name, array in before.items():
            np.testing.assert_array_equal(made[name], array)
    assert not any(t.raw_data and t.external_data for t in fix_size(graph, 32, 40, store).graph.initializer)


def test_a_failed_export_leaves_neither_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = random_weights()
    broken["norm.bias"] = broken["norm.bias"] * np.float32("nan")
    write_model_folder(folder, config_for(), random_weights(seed=3))
    right = split_vit_graph
    monkeypatch.setattr(
        "dinokit.export.traced.split_vit_graph", lambda vit, weights, **more: right(vit, broken, **more)
    )
    with pytest.raises(ModelError, match="not finite"):
        export_folder(folder, tmp_path / "out", external_data=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_files_of_an_earlier_export_stay_in_pairs(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported / "split", out)
    onnx_folder = out / "onnx"
    (onnx_folder / "model_fp16.onnx_data").write_bytes(b"damaged")
    (onnx_folder / "embedder_fp16.onnx_data").unlink()
    kept = (onnx_folder / "model_int8.onnx_data").read_bytes()
    report = export_folder(out, out, precision="fp16", target="ort-cuda")  # again, in one file now
    names = sorted(path.name for path in onnx_folder.iterdir())
    assert names == [
        "embedder_int8.onnx",
        "embedder_int8.onnx_data",
        "model_cuda_fp16.onnx",
        "model_int8.onnx",
        "model_int8.onnx_data",
    ]
    assert (onnx_folder / "model_int8.onnx_data").read_bytes() == kept
    told = json.loads((out / "config.json").read_text())["transformers.js_config"]["use_external_data_format"]
    assert told == {"embedder_int8.onnx": True, "model_int8.onnx": True}
    assert {v["file"] for v in report.to_json()["variants"]} == {
        f"onnx/{n}" for n in names if n.endswith("x")
    }


def test_the_switch(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(export_command, [str(folder), "-o", str(tmp_path / "out"), "--external-data"])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir()) == [
        "model.onnx",
        "model.onnx_data",
    ]


@pytest.mark.slow  # and 8 GB of memory
def test_really_more_than_two_gibibytes(tmp_path: Path) -> None:
    """DINOv2 giant's first 20 blocks: the usual file and the one for CUDA, both in two files; float16 fits one."""
    model = ZOO["dinov2_vitg14_reg"].config
    vit = replace(model.vit, depth=20)
    config = replace(model, architecture=vit)
    shapes = expected_shapes(vit)
    assert shapes is not None
    rng = np.random.default_rng(0)
    weights = {
        name: rng.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()
    }
    pixels = rng.standard_normal((1, 3, 56, 70), np.float32)
    graph, store = split_vit_graph(vit, weights)
    del weights
    found = []
    for variant, count in ((Variant(), 2), (Variant("fp32", "ort-cuda"), 2), (Variant("fp16"), 1)):
        made = ChainMap({}, dict(store))
        network = build(variant, graph, config, config.preprocessing, "0" * 64, made)
        files = write_onnx(network, tmp_path / Path(variant.file).name, made)
        del network, made
        assert len(files) == count
        check_graph(files[0])
        found.append(OnnxEngine(files[0], device="cpu").run(pixels, OUTPUTS))
        for file in files:
            file.unlink()
    for name in OUTPUTS:
        assert np.isfinite(found[0][name]).all()
        np.testing.assert_allclose(found[1][name], found[0][name], atol=1e-4)
        np.testing.assert_allclose(found[2][name], found[0][name], atol=0.05)


# -- the half of a pair


def test_a_file_without_its_weights(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported / "split", out)
    (out / "onnx" / "model_fp16.onnx_data").unlink()
    words = r"model_fp16\.onnx .*weights.* model_fp16\.onnx_data, which is (not|missing)"
    with pytest.raises(ModelError, match=words):
        load_backbone(out, precision="fp16", device="cpu")
    with pytest.raises(ModelError, match=words):
        load_backbone(out / "onnx" / "model_fp16.onnx", device="cpu")
    with pytest.raises(ModelError, match=words):
        plan_push(out, "me/small")


def test_weights_of_another_model(exported: Path, tmp_path: Path) -> None:
    """Of the same size and name, as two checkpoints of one run have them."""
    out = tmp_path / "out"
    shutil.copytree(exported / "split", out)
    file, data = (out / "onnx" / name for name in ("model_fp16.onnx", "model_fp16.onnx_data"))
    whole = data.read_bytes()
    assert missing_data_file(file) is None
    weights, digest = whole[:-32], whole[-32:]
    assert hashlib.sha256(weights).digest() == digest
    assert read_onnx_metadata(file)[DATA_DIGEST_KEY] == digest.hex()
    words = (
        r"model_fp16\.onnx_data beside .*model_fp16\.onnx has the weights of another model, or is incomplete"
    )
    for other in (weights + hashlib.sha256(b"another").digest(), whole[:-4096], b""):
        data.write_bytes(other)
        with pytest.raises(ModelError, match=words):
            load_backbone(out, precision="fp16", device="cpu")
        with pytest.raises(ModelError, match=words):
            plan_push(out, "me/small")


def test_weights_elsewhere_are_not_looked_for(tmp_path: Path) -> None:
    graph, store = split_vit_graph(SMALL, random_weights(), metadata={DATA_KEY: "../secret"})
    file = tmp_path / "m.onnx"
    write_onnx(graph, file, store)
    with pytest.raises(
        ModelError, match=r"has its weights in '\.\./secret'; expected the name of a file beside"
    ):
        missing_data_file(file)


# -- the Hub

LOAD = """
import sys
sys.modules["torch"] = None
from dinokit import load_backbone
from PIL import Image
print(load_backbone("me/small", device="cpu", precision="fp16").embed(Image.open(sys.argv[1]))[:4].tolist())
"""


def test_both_are_pushed_and_fetched(exported: Path, tmp_path: Path) -> None:
    plan = plan_push(exported / "split", "me/small")
    assert {"onnx/model_fp16.onnx", "onnx/model_fp16.onnx_data", "onnx/model_int8.onnx_data"} <= set(
        plan.files
    )
    picture().save(tmp_path / "p.png")
    with HubServer() as hub:
        hub.add("me/small", exported / "split")
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path / "p.png")],
            env=hub.environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    right = load_backbone(exported / "split", device="cpu", precision="fp16").embed(tmp_path / "p.png")
    np.testing.assert_allclose(json.loads(done.stdout), right[:4], rtol=1e-6)
    fetched = {path.name for path in (tmp_path / "cache").rglob("*.onnx*")}
    assert fetched == {"model_fp16.onnx", "model_fp16.onnx_data"}  # and nothing else
