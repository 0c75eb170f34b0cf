"""The written graph of DINOv2 and DINOv3 against transformers' and timm's own networks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from small_generations import (
    TIMM,
    TRANSFORMERS,
    pixels,
    timm_model,
    transformers_model,
    transformers_outputs,
)

from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import PosEmbedResize, VitArchitecture
from dinokit.model_folder.contract import OUTPUTS
from dinokit.model_folder.weight_names import transformers_to_timm
from dinokit.model_folder.weights import expected_shapes, read_safetensors
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import OPSET, build_vit_graph, can_write

torch = pytest.importorskip("torch")
pytest.importorskip("timm")
pytest.importorskip("transformers")

TOLERANCE = 2e-5  # the issue asks for 1e-4; tokens after the norm are of size 1, usual is 3e-6


def sizes(patch: int) -> list[tuple[int, int]]:
    """The trained size (4 x 4 patches); as many otherwise arranged; smaller, larger, one row, one patch."""
    grids = [(4, 4), (2, 8), (3, 2), (9, 5), (1, 6), (1, 1), (16, 16)]
    return [(rows * patch, columns * patch) for rows, columns in grids]


def arrays(module: Any) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in module.state_dict().items()}


def described(weights: dict[str, Any], **changes: Any) -> VitArchitecture:
    shapes = {name: array.shape for name, array in weights.items()}
    return replace(VitArchitecture.from_shapes(shapes, num_heads=3), **changes)


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_agrees_with_transformers(name: str, tmp_path: Path) -> None:
    model = transformers_model(name)
    model.save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    # Transformers' own rule for DINOv2 without registers; a loaded folder keeps facebookresearch/dinov2's.
    rule = PosEmbedResize(0.0, antialias="reg" in name)
    patch = model.config.patch_size
    vit = described(weights, pos_embed_resize=rule, image_size=(4 * patch, 4 * patch))
    engine = OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")
    for height, width in sizes(patch):
        images = pixels(height, width)
        right, found = transformers_outputs(model, images), engine.run(images, OUTPUTS)
        for output in OUTPUTS:
            assert found[output].shape == right[output].shape
            assert np.abs(found[output] - right[output]).max() <= TOLERANCE, (output, height, width)


@pytest.mark.parametrize("name", sorted(TIMM))
def test_agrees_with_timm(name: str) -> None:
    module = timm_model(name)
    weights = arrays(module)
    patch = TIMM[name]["patch_size"]
    vit = described(weights, image_size=(4 * patch, 4 * patch), pos_embed_resize=PosEmbedResize(0.0, True))
    engine = OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")
    for height, width in sizes(patch):
        images = pixels(height, width)
        with torch.inference_mode():
            right = module.forward_features(torch.from_numpy(images)).numpy()
        found = engine.run(images, ["last_hidden_state"])["last_hidden_state"]
        assert found.shape == right.shape
        assert np.abs(found - right).max() <= TOLERANCE, (height, width)


@pytest.mark.parametrize("name", ["dinov2 giant reg", "dinov3 gated"])
def test_the_batch_changes_nothing(name: str, tmp_path: Path) -> None:
    transformers_model(name).save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    vit = described(weights)
    engine = OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")
    images = pixels(5 * vit.patch_size, 3 * vit.patch_size, batch=4)
    together = engine.run(images, OUTPUTS)
    for index in range(4):
        alone = engine.run(images[index : index + 1], OUTPUTS)
        for output in OUTPUTS:
            assert np.abs(together[output][index] - alone[output][0]).max() <= 1e-5


@pytest.mark.parametrize("name", ["dinov2 giant reg", "dinov3 gated"])
def test_the_file_is_valid_standard_onnx(name: str, tmp_path: Path) -> None:
    transformers_model(name).save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    vit = described(weights)
    model = build_vit_graph(vit, weights)
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)]
    assert {node.domain for node in model.graph.node} == {""}
    assert not {node.op_type for node in model.graph.node} & {"If", "Loop", "Scan"}
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    read = {name for node in model.graph.node for name in node.input}
    assert read >= {tensor.name for tensor in model.graph.initializer}  # nothing is stored that nobody reads
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


def test_a_picture_that_is_no_multiple_of_the_patch_is_an_error(tmp_path: Path) -> None:
    from dinokit.errors import ModelError

    transformers_model("dinov3").save_pretrained(tmp_path)
    weights = transformers_to_timm(read_safetensors(tmp_path / "model.safetensors"))
    engine = OnnxEngine(build_vit_graph(described(weights), weights).SerializeToString(), device="cpu")
    with pytest.raises(ModelError, match="multiples of the patch"):
        engine.run(pixels(33, 32), OUTPUTS)


# -- every published name


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_known_name_can_be_written_from_timms_weights(name: str) -> None:
    """Names and shapes of timm's own module, nothing more and nothing less; no memory is needed for that."""
    import timm

    known = ZOO[name]
    assert can_write(known.vit)
    with torch.device("meta"):
        module = timm.create_model(known.timm_architecture, num_classes=0, **known.model_args)
    expected = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    assert expected_shapes(known.vit) == expected
    found = VitArchitecture.from_shapes(expected)
    assert found == known.vit
    assert json.loads(json.dumps(found.to_json()))["position"] == known.vit.position
