"""ONNX files and their contract: which belong to a folder, which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx_folder import add_onnx
from small_models import SMALL, config_for, random_weights

from dinokit import load_backbone
from dinokit.errors import ModelError
from dinokit.model_folder.contract import METADATA_KEY
from dinokit.model_folder.folder import ModelFolder, write_model_folder
from dinokit.model_folder.onnx_metadata import read_onnx_metadata
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import build_vit_graph


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return write_model_folder(tmp_path / "model", config_for(), random_weights())


def test_the_contract_is_what_onnx_itself_reads(folder: ModelFolder) -> None:
    import onnx

    path = add_onnx(folder)
    truth = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert read_onnx_metadata(path) == truth
    assert METADATA_KEY in truth


def test_fields_of_every_kind_are_stepped_over(tmp_path: Path) -> None:
    """A message as the protobuf encoding defines it: varint, fixed 64, fixed 32, bytes, then the metadata."""
    others = b"\x08\x96\x01" + b"\x11" + b"\x72" * 8 + b"\x1d" + b"\x72" * 4 + b"\x3a\x03\x72\x72\x72"
    entry = b"\x0a\x01k" + b"\x12\x02vv"
    (tmp_path / "m.onnx").write_bytes(others + b"\x72" + bytes([len(entry)]) + entry)
    assert read_onnx_metadata(tmp_path / "m.onnx") == {"k": "vv"}


@pytest.mark.parametrize(
    "changes",
    [
        {"weights_sha256": "0" * 64},
        {"preprocessing": Preprocessing(resize_px=48, crop_px=(32, 32)).to_json()},
        {"architecture": {**SMALL.to_json(), "layer_norm_eps": 1e-5}},
    ],
)
def test_an_onnx_file_of_another_folder_is_refused(folder: ModelFolder, changes: dict[str, Any]) -> None:
    add_onnx(folder, **changes)
    with pytest.raises(ModelError, match=f"does not belong to its folder: its {next(iter(changes))} differ"):
        load_backbone(folder.path, engine="onnx")


def test_words_in_the_contract_may_differ(folder: ModelFolder) -> None:
    add_onnx(folder, name="other", licence="mit", written_by="dinokit 0.0.1")
    assert load_backbone(folder.path, device="cpu").engine == "onnx"


def test_an_onnx_file_that_says_nothing(folder: ModelFolder, tmp_path: Path) -> None:
    path = tmp_path / "silent.onnx"
    path.write_bytes(build_vit_graph(SMALL, random_weights()).SerializeToString())
    with pytest.raises(ModelError, match="does not describe its preprocessing"):
        load_backbone(path)
    for says, message in (
        ("{", "is not readable"),
        ("[]", "is not readable"),
        ('{"name": "x"}', "lacks arch"),
    ):
        path.write_bytes(
            build_vit_graph(SMALL, random_weights(), metadata={METADATA_KEY: says}).SerializeToString()
        )
        with pytest.raises(ModelError, match=message):
            load_backbone(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 99}, r"has format_version 99 .*Update dinokit"),
        ({"format_version": True}, "format_version is True, which is not a valid format number"),
        ({"preprocessing": {}}, r"lacks preprocessing\.resize_px"),
        ({"preprocessing": {"resize_px": 36, "crop_px": [32, 32]}}, r"lacks preprocessing\.interpolation"),
        ({"name": "a\nb"}, "name is 'a\\\\nb', expected one line"),
        ({"licence": "\x1b[31m"}, "licence is .* expected one line"),
    ],
)
def test_a_lone_file_that_would_be_misunderstood(
    folder: ModelFolder, changes: dict[str, Any], message: str
) -> None:
    path = add_onnx(folder, **changes)
    with pytest.raises(ModelError, match=message):
        load_backbone(path)


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\xff" * 40, b"\x3a\xff\xff\x7f"])
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx (is not an ONNX file|does not say)"):
        load_backbone(tmp_path / "m.onnx")


def test_torch_cannot_run_a_lone_onnx_file(folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match="is an ONNX file: the torch engine needs the model folder"):
        load_backbone(add_onnx(folder), engine="torch")
    with pytest.raises(ModelError, match=r"needs the model folder.*precision='fp16' needs another file"):
        load_backbone(add_onnx(folder), precision="fp16")
