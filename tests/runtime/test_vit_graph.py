"""The written ONNX graph against facebookresearch/dino's own numbers, plain torch and timm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.contract import OUTPUTS
from dinokit.model_folder.weights import expected_shapes
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import OPSET, build_vit_graph, can_write

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "features.npz", allow_pickle=False)
SIZES = [name.removeprefix("image.") for name in GOLDEN if name.startswith("image.")]
WEIGHTS = {name.removeprefix("weights."): GOLDEN[name] for name in GOLDEN if name.startswith("weights.")}
VIT = VitArchitecture.from_shapes({name: w.shape for name, w in WEIGHTS.items()}, num_heads=3)
TOLERANCE = 1e-5  # the issue asks for 1e-4; usual is 2e-6


def engine(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]]) -> OnnxEngine:
    return OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")


def random_weights(vit: VitArchitecture) -> dict[str, NDArray[np.float32]]:
    """Large enough that every part matters: a wrong position embedding or head shows in the output."""
    rng = np.random.default_rng(0)
    shapes = expected_shapes(vit)
    assert shapes is not None
    return {
        name: rng.normal(float(name.endswith("norm.weight")), 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


@pytest.fixture(scope="module")
def golden_engine() -> OnnxEngine:
    return engine(VIT, WEIGHTS)


@pytest.mark.parametrize("size", SIZES)
def test_agrees_with_the_reference(golden_engine: OnnxEngine, size: str) -> None:
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    unit = GOLDEN[f"image.{size}"].astype(np.float32) / np.float32(255)
    pixels = (unit - mean[:, None, None]) / std[:, None, None]
    found = golden_engine.run(pixels, OUTPUTS)
    for output, golden in zip(OUTPUTS, ("tokens", "cls", "attention"), strict=True):
        right = GOLDEN[f"{golden}.{size}"]
        assert found[output].shape == right.shape
        assert found[output].dtype == np.float32
        assert np.abs(found[output] - right).max() <= TOLERANCE


# -- other shapes and rules, against the same network in plain torch


def plain_vit(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]], pixels: NDArray[Any]) -> Any:
    """The forward pass of facebookresearch/dino's `vision_transformer.py`, written down in functions."""
    import torch
    import torch.nn.functional as F

    w = {name: torch.from_numpy(array) for name, array in weights.items()}
    dim, heads, p = vit.embed_dim, vit.num_heads, vit.patch_size
    norm = lambda name, x: F.layer_norm(  # noqa: E731
        x, (dim,), w[f"{name}.weight"], w[f"{name}.bias"], vit.layer_norm_eps
    )
    linear = lambda name, x: F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])  # noqa: E731

    image = torch.from_numpy(pixels)
    planes = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=p)
    grid = planes.shape[-2:]
    x = torch.cat([w["cls_token"].expand(len(image), -1, -1), planes.flatten(2).transpose(1, 2)], 1)
    positions = w["pos_embed"][:, 1:]
    if tuple(grid) != vit.grid:
        rule = vit.pos_embed_resize
        by: dict[str, Any] = {"size": tuple(grid)}
        if rule.offset:
            by = {"scale_factor": tuple((g + rule.offset) / t for g, t in zip(grid, vit.grid, strict=True))}
        square = positions.reshape(1, *vit.grid, dim).permute(0, 3, 1, 2)
        resized = F.interpolate(square, mode="bicubic", antialias=rule.antialias, **by)
        positions = resized.flatten(2).transpose(1, 2)
    x = x + torch.cat([w["pos_embed"][:, :1], positions], 1)
    for i in range(vit.depth):
        name = f"blocks.{i}"
        qkv = linear(f"{name}.attn.qkv", norm(f"{name}.norm1", x))
        q, k, v = qkv.reshape(*x.shape[:2], 3, heads, dim // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-2, -1) * (dim // heads) ** -0.5).softmax(-1)
        x = x + linear(f"{name}.attn.proj", (attention @ v).transpose(1, 2).reshape(x.shape))
        x = x + linear(f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", norm(f"{name}.norm2", x))))
    x = norm("norm", x)
    return {"last_hidden_state": x, "pooler_output": x[:, 0], "attention": attention[:, :, 0, 1:]}


SQUARE = VitArchitecture(embed_dim=24, depth=3, num_heads=2, patch_size=4, image_size=(20, 20), mlp_ratio=2.0)
OBLONG = replace(SQUARE, image_size=(12, 28), num_heads=4, depth=1)
RULES = [PosEmbedResize(offset, antialias) for offset in (0.1, 0.0) for antialias in (False, True)]


@pytest.mark.parametrize("vit", [SQUARE, OBLONG], ids=["square", "oblong"])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_agrees_with_plain_torch_at_any_size(vit: VitArchitecture, rule: PosEmbedResize) -> None:
    vit = replace(vit, pos_embed_resize=rule)
    weights = random_weights(vit)
    ort = engine(vit, weights)
    rng = np.random.default_rng(1)
    # The trained size; as many patches as it, arranged otherwise; smaller, larger, one row, and mixtures.
    for height, width in (vit.image_size, (4, 100), (8, 8), (52, 44), (4, 4), (60, 12)):
        pixels = rng.normal(size=(2, 3, height, width)).astype(np.float32)
        right, found = plain_vit(vit, weights, pixels), ort.run(pixels, OUTPUTS)
        for output in OUTPUTS:
            assert np.abs(found[output] - right[output].numpy()).max() <= 2e-5, (output, height, width)


def test_agrees_with_timm_as_it_comes() -> None:
    """timm's own network and rule of resizing, without anything of dinokit's in between."""
    import timm
    import torch

    args = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, dynamic_img_size=True, **args).eval()
    module.load_state_dict({name: torch.from_numpy(array) for name, array in WEIGHTS.items()})
    ort = engine(replace(VIT, pos_embed_resize=PosEmbedResize(0.0, antialias=True)), WEIGHTS)
    pixels = np.random.default_rng(2).normal(size=(2, 3, 48, 24)).astype(np.float32)
    with torch.inference_mode():
        right = module.forward_features(torch.from_numpy(pixels)).numpy()
    assert np.abs(ort.run(pixels, ["last_hidden_state"])["last_hidden_state"] - right).max() <= TOLERANCE


def test_the_batch_changes_nothing(golden_engine: OnnxEngine) -> None:
    pixels = np.random.default_rng(3).normal(size=(5, 3, 40, 24)).astype(np.float32)
    together = golden_engine.run(pixels, ["pooler_output"])["pooler_output"]
    alone = [golden_engine.run(pixels[i : i + 1], ["pooler_output"])["pooler_output"][0] for i in range(5)]
    assert np.abs(together - np.stack(alone)).max() <= TOLERANCE


def test_half_precision_weights_are_computed_in_single() -> None:
    half = {name: array.astype(np.float16) for name, array in WEIGHTS.items()}
    single = {name: array.astype(np.float32) for name, array in half.items()}
    pixels = np.random.default_rng(4).normal(size=(1, 3, 32, 32)).astype(np.float32)
    found, right = (engine(VIT, w).run(pixels, OUTPUTS) for w in (half, single))
    for output in OUTPUTS:
        assert np.array_equal(found[output], right[output])


# -- the file itself


def test_the_file_is_valid_standard_onnx() -> None:
    model = build_vit_graph(VIT, WEIGHTS, metadata={"dinokit": '{"name": "x"}', "more": "ü"})
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    assert {p.key: p.value for p in model.metadata_props} == {"dinokit": '{"name": "x"}', "more": "ü"}

    dims = {
        info.name: [d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim]
        for info in (*inferred.graph.input, *inferred.graph.output)
    }
    assert dims == {
        "pixel_values": ["batch", 3, "height", "width"],
        "last_hidden_state": ["batch", "tokens", 48],
        "pooler_output": ["batch", 48],
        "attention": ["batch", 3, "patches"],
    }
    # The widths are inferred through the whole graph, not only declared at its end.
    widths = {info.name: info.type.tensor_type.shape.dim[-1].dim_value for info in inferred.graph.value_info}
    assert widths["blocks.1/Gelu"] == 192
    assert widths["blocks.1/Softmax"] == 0


def test_weights_are_stored_once_and_as_they_are_used() -> None:
    model = build_vit_graph(VIT, WEIGHTS)
    stored = {i.name: onnx.numpy_helper.to_array(i) for i in model.graph.initializer}
    assert np.array_equal(stored["blocks.0.mlp.fc1.weight"], WEIGHTS["blocks.0.mlp.fc1.weight"].T)
    floats = sum(array.size for array in stored.values() if array.dtype == np.float32)
    # The CLS token's position is added to the token, which saves its own entry.
    small = sum(stored[name].size for name in stored if name.startswith("floats:"))
    assert floats - small == sum(array.size for array in WEIGHTS.values()) - VIT.embed_dim
    constants = {name for node in model.graph.node for name in node.input}
    assert constants >= set(stored)  # nothing is stored that no operator reads


# -- refusals


def test_what_cannot_be_written_is_named() -> None:
    assert can_write(VIT)
    others = {
        "the feed-forward network 'kan'": replace(VIT, ffn="kan"),
        "the position embedding 'relative'": replace(VIT, position="relative"),
        "rotated heads of width 6,": replace(VIT, embed_dim=18, position="rope"),
    }
    for words, vit in others.items():
        assert not can_write(vit)
        with pytest.raises(ModelError, match=words):
            build_vit_graph(vit, WEIGHTS)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(ModelError, match=r"lacks 1 tensor: norm\.bias"):
        build_vit_graph(VIT, {name: array for name, array in WEIGHTS.items() if name != "norm.bias"})
    with pytest.raises(ModelError, match=r"unexpected tensor: head\.weight"):
        build_vit_graph(VIT, {**WEIGHTS, "head.weight": np.zeros((10, 48), np.float32)})
    with pytest.raises(ModelError, match=r"pos_embed is \(1, 17, 48\), expected \(1, 26, 48\)"):
        build_vit_graph(replace(VIT, image_size=(40, 40)), WEIGHTS)
