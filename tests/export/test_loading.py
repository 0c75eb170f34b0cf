"""Exported files, loaded again: right ones, damaged ones, those of other models."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

from export_models import CONFIG, make_folder, worst_cosine
from small_models import picture, random_weights

from dinokit import load_backbone
from dinokit.cli.embed import embed as embed_command
from dinokit.errors import DinokitError, ModelError, UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.tables.origin import read_origin


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_load_backbone_takes_the_file(exported_folder: Path, precision: str) -> None:
    backbone = load_backbone(exported_folder, device="cpu", precision=precision)
    assert (backbone.engine, backbone.precision) == ("onnx", precision)
    right = load_backbone(exported_folder, device="cpu")
    assert right.precision == "fp32"
    vector, wanted = backbone.embed(picture()), right.embed(picture())
    assert worst_cosine(vector[None], wanted[None]) > 0.99
    assert not np.array_equal(vector, wanted)
    lone = load_backbone(exported_folder / "onnx" / f"model_{precision}.onnx", device="cpu")
    assert lone.precision == precision
    assert np.array_equal(lone.embed(picture()), vector)


def test_a_file_that_is_not_there(folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"int8.*needs onnx/model_int8\.onnx, which its model folder does not have"
    ):
        load_backbone(folder, precision="int8")
    with pytest.raises(ModelError, match=r"engine='onnx': precision='fp16' needs onnx/model_fp16\.onnx"):
        load_backbone(folder, precision="fp16", engine="onnx")
    assert load_backbone(folder, precision="fp16", device="cpu").engine == "torch"
    with pytest.raises(UsageError, match="precision='int8' is not supported by the torch engine"):
        load_backbone(folder, precision="int8", engine="torch", device="cpu")


def test_a_file_that_is_another(exported_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported_folder, out)
    names = ("model_int8.onnx", "model_fp16.onnx", "model.onnx")
    shutil.copy(out / "onnx" / "model.onnx", out / "onnx" / "model_int8.onnx")
    with pytest.raises(
        ModelError, match=r"model_int8\.onnx does not belong to its folder: its precision differ"
    ):
        load_backbone(out, precision="int8")
    shutil.copy(exported_folder / "onnx" / "model_fp16.onnx", out / "onnx" / "model.onnx")
    with pytest.raises(ModelError, match="its precision differ"):
        load_backbone(out)
    with pytest.raises(UsageError, match=r"precision='fp32' does not match .*, which computes in 'int8'"):
        load_backbone(exported_folder / "onnx" / "model_int8.onnx", precision="fp32", device="cpu")
    with pytest.raises(ModelError, match=r"embedder\.onnx is an embedder: it takes uint8 crops"):
        load_backbone(exported_folder / "onnx" / "embedder.onnx", device="cpu")
    other = write_model_folder(tmp_path / "other", replace(CONFIG, name="other"), random_weights(seed=1)).path
    (other / "onnx").mkdir()
    for name in names:
        shutil.copy(exported_folder / "onnx" / name, other / "onnx" / name)
    with pytest.raises(ModelError, match="its weights_sha256 differ"):
        load_backbone(other, precision="fp16")


@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
@pytest.mark.parametrize("name", ["model_fp16.onnx", "model_int8.onnx"])
def test_a_damaged_file(exported_folder: Path, tmp_path: Path, name: str, damage: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported_folder, out)
    file = out / "onnx" / name
    content = file.read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 4000, np.uint8).tobytes()
    file.write_bytes({"truncated": content[: len(content) // 2], "noise": noise, "empty": b""}[damage])
    with pytest.raises(
        DinokitError, match=r"model_\w+\.onnx (is not an ONNX file|does not say|.* cannot be opened)"
    ):
        load_backbone(out, precision=name[6:10], device="cpu")


def test_embed_takes_a_precision(exported_folder: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    table = tmp_path / "t.parquet"
    arguments = [str(tmp_path / "p.png"), "-o", str(table), "-m", str(exported_folder), "--device", "cpu"]
    done = CliRunner().invoke(embed_command, [*arguments, "--precision", "int8"])
    assert done.exit_code == 0, done.output
    assert "onnx on cpu, int8" in done.stderr
    assert read_origin(table)["precision"] == "int8"
