"""What an exported_folder graph takes: the bytes of a crop, pictures of one size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("timm")

import onnx
import torch
from export_models import CONFIG, WEIGHTS, make_folder, pixels, run, worst_cosine
from small_models import SMALL, picture

from dinokit import load_backbone
from dinokit.errors import UsageError
from dinokit.export import export_folder
from dinokit.export.graphs.embedder import to_embedder
from dinokit.export.graphs.fixed_size import fix_size
from dinokit.vit_graph import build_vit_graph


@pytest.fixture(scope="module")
def graph() -> onnx.ModelProto:
    return build_vit_graph(SMALL, WEIGHTS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


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
