"""What can be exported_folder: weights of facebookresearch, known names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("timm")

import torch
from export_models import WEIGHTS
from small_models import SMALL, random_weights

from dinokit import load_backbone
from dinokit.errors import UsageError
from dinokit.export import export_folder


def test_weights_of_facebookresearch(tmp_path: Path) -> None:
    state = {f"backbone.{name}": torch.from_numpy(array) for name, array in WEIGHTS.items()}
    vit = replace(SMALL, embed_dim=192, num_heads=3)
    state = {name: torch.from_numpy(array) for name, array in random_weights(vit).items()}
    torch.save(state, tmp_path / "dino.pth")
    report = export_folder(tmp_path / "dino.pth", tmp_path / "out", precision="fp32,int8")
    assert report.passed
    loaded = load_backbone(tmp_path / "out", device="cpu", precision="int8")
    assert loaded.embed_dim == 192
    again = export_folder(tmp_path / "dino.pth", tmp_path / "out")  # the same weights: no --overwrite needed
    assert [v["file"] for v in again.to_json()["variants"]] == ["onnx/model.onnx", "onnx/model_int8.onnx"]


def test_a_known_name(tmp_path: Path) -> None:
    report = export_folder("starter", tmp_path / "out", precision="int8")
    assert report.model == "starter"
    assert report.variants[0].cosines[0] > 0.999
    with pytest.raises(UsageError, match="starterr"):
        export_folder("starterr", tmp_path / "out2")
