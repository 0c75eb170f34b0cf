"""Folders that timm or transformers saved."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import SMALL, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import ModelError
from dinokit.loading.foreign import config_from_timm, config_from_transformers
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.pictures.preprocess import Preprocessing

has_torch = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is not installed")


TIMM_CONFIG = {
    "architecture": "vit_tiny_patch16_224",
    "num_classes": 0,
    "global_pool": "token",
    "model_args": {"num_heads": 3, "img_size": 32},
    "pretrained_cfg": {
        "tag": "dino",
        "input_size": [3, 224, 224],
        "interpolation": "bicubic",
        "crop_pct": 0.9,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "license": "apache-2.0",
    },
}
DINO_VIT_CONFIG = {
    "model_type": "vit",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "num_attention_heads": 3,
}
DINO_VIT_PROCESSOR = {
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "resample": 2,
    "size": 224,
}
SHAPES = {name: array.shape for name, array in random_weights().items()}


@needs_torch
def test_a_folder_that_timm_saved(tmp_path: Path) -> None:
    """timm itself saves it, and its transform and forward pass are the truth."""
    import timm
    import torch

    torch.manual_seed(0)
    args = {"num_classes": 0, "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    input_size = {"input_size": (3, 32, 32)}  # timm 1.0.20 records neither it nor the arguments by itself
    module = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=input_size, **args).eval()
    timm.models.save_for_hf(module, tmp_path, model_args=args, safe_serialization=True)
    backbone = load_backbone(tmp_path, device="cpu")
    saved = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=saved), is_training=False
    )
    with torch.inference_mode():
        truth = module(transform(picture(300, 200))[None]).numpy()[0]
    assert backbone.engine == "onnx"
    assert backbone.config.vit.pos_embed_resize == PosEmbedResize(0.0, True)
    np.testing.assert_allclose(backbone.embed(picture(300, 200)), truth, atol=1e-4)


def test_timm_keeps_its_own_crop() -> None:
    config = config_from_timm(TIMM_CONFIG, SHAPES, source="timm/vit_tiny_patch16_224.dino")
    assert config.preprocessing == Preprocessing(resize_px=248)
    assert config.vit.num_heads == 3
    assert config.vit.pos_embed_resize == PosEmbedResize(0.1, False)
    assert (config.name, config.licence) == ("vit_tiny_patch16_224.dino", "apache-2.0")


def changed(values: dict[str, Any], **changes: Any) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(json.dumps(values))
    for key, value in changes.items():
        place = out["pretrained_cfg"] if key in out.get("pretrained_cfg", {}) or key == "crop_mode" else out
        place[key] = value
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "resnet50"}, "is timm's 'resnet50'"),
        ({"architecture": "vit_base_patch16_clip_quickgelu_224"}, "quickgelu"),
        ({"global_pool": "avg"}, "global_pool='avg'"),
        ({"crop_mode": "border"}, "the crop mode 'border'"),
        ({"crop_pct": None}, "does not describe the whole preprocessing"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos' is not known"),
        ({"crop_pct": 0}, "does not describe the whole preprocessing"),
        ({"mean": [0.5, [], 0.5]}, r"x: the preprocessing is damaged: mean is \[0\.5, \[\], 0\.5\]"),
    ],
)
def test_timm_folders_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_timm(changed(TIMM_CONFIG, **changes), SHAPES, source="x")


@pytest.mark.parametrize("args", [None, 3, [], {"num_heads": None}])
def test_without_its_arguments_the_heads_are_of_the_usual_width(args: Any) -> None:
    # 48 is no multiple of 64.
    with pytest.raises(ModelError, match="number of heads cannot be inferred from the weights"):
        config_from_timm({**TIMM_CONFIG, "model_args": args}, SHAPES, source="x")


@needs_torch
def test_a_folder_that_transformers_saved(tmp_path: Path) -> None:
    """model_type "vit" as facebook/dino-*: its hidden states are the truth, its pooler is noise."""
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    model = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=3,
            intermediate_size=192,
            image_size=32,
            patch_size=8,
            layer_norm_eps=1e-6,
        )
    ).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**DINO_VIT_PROCESSOR, "size": 32}))
    backbone = load_backbone(tmp_path, device="cpu")
    assert backbone.preprocessing == Preprocessing((32, 32), (32, 32), "bilinear")
    prepare = backbone.preprocessing
    pixels = prepare.normalise(prepare.crop(picture())[None])
    with torch.inference_mode():
        truth = model(torch.from_numpy(pixels)).last_hidden_state[0, 0].numpy()
    np.testing.assert_allclose(backbone.embed(picture()), truth, atol=1e-5)


def test_the_config_of_facebook_dino() -> None:
    config = config_from_transformers(
        DINO_VIT_CONFIG, DINO_VIT_PROCESSOR, SHAPES, source="facebook/dino-vits16"
    )
    assert config.name == "dino-vits16"
    assert config.vit == SMALL  # layer_norm_eps 1e-6, as it was trained
    assert config.preprocessing == Preprocessing((224, 224), (224, 224), "bilinear")


def test_processors_of_dinov2_and_of_the_old_form() -> None:
    bit = {
        **DINO_VIT_PROCESSOR,
        "size": {"shortest_edge": 256},
        "do_center_crop": True,
        "crop_size": {"height": 224, "width": 224},
        "resample": 3,
    }
    old = {**bit, "size": 256, "crop_size": 224}
    for processor in (bit, old):
        config = config_from_transformers(DINO_VIT_CONFIG, processor, SHAPES, source="x")
        assert config.preprocessing == Preprocessing()


@pytest.mark.parametrize(
    ("changes", "processor", "message"),
    [
        ({"model_type": "swin"}, {}, "has model_type 'swin'"),
        ({"hidden_act": "gelu_new"}, {}, "a different activation"),
        ({"layer_norm_eps": 1e-5}, {}, "layer_norm_eps=1e-05"),
        ({}, {"do_resize": False}, r"switches off \['do_resize'\]"),
        ({}, {"size": {"longest_edge": 9}}, "does not describe the whole preprocessing"),
        ({}, {"resample": 0}, "does not describe the whole preprocessing"),
        ({}, {"size": 3.5}, "does not describe the whole preprocessing"),
        ({}, {"size": {"height": 224, "width": 224, "longest_edge": 300}}, "has longest_edge=300"),
        ({}, {"rescale_factor": 1 / 127.5}, r"has rescale_factor=0\.0078.*pixels divided by 255"),
        ({}, {"rescale_offset": True}, "has rescale_offset=True"),
        ({"num_hidden_layers": 12}, {}, "num_hidden_layers is 12 there and 2 in the weights"),
        ({"hidden_size": 768, "patch_size": 16}, {}, "hidden_size is 768 .* patch_size is 16 there and 8"),
        (
            {},
            {"image_std": [0.5, 0.5, "x"]},
            r"x: the preprocessing is damaged: std is \[0\.5, 0\.5, 'x'\], expected",
        ),
        ({}, {"image_std": [0.5, 0.5, 0]}, "each std must be above 0"),
        ({}, {"image_mean": [1e300, 0, 0]}, "are invalid for pixels"),
        ({}, {"size": {"height": 10**12, "width": 10**12}}, "each side must be 1 to 65536 pixels"),
        ({"layer_norm_eps": "small"}, {}, "layer_norm_eps=small"),
        ({"num_attention_heads": "6"}, {}, "it has '6' attention heads"),
        ({"num_attention_heads": True}, {}, "it has True attention heads"),
    ],
)
def test_transformers_folders_that_are_refused(
    changes: dict[str, Any], processor: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_transformers(
            DINO_VIT_CONFIG | changes, DINO_VIT_PROCESSOR | processor, SHAPES, source="x"
        )


def test_what_a_config_and_a_processor_may_say_too() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 48, "patch_size": [8, 8]}
    usual = {
        "rescale_factor": 0.00392156862745098,
        "size": {"height": 224, "width": 224, "longest_edge": None},
    }
    config = config_from_transformers(DINO_VIT_CONFIG | sizes, DINO_VIT_PROCESSOR | usual, SHAPES, source="x")
    assert config.preprocessing.resize_px == (224, 224)


def test_a_path_of_two_lines_is_written_in_one() -> None:
    config = config_from_timm(TIMM_CONFIG, SHAPES, source="my\nmodels/vi\tt")
    assert (config.name, config.source) == ("vi t", "my models/vi t")


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DINO_VIT_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"has no model\.safetensors; pickled weights are not loaded"):
        load_backbone(tmp_path)


@needs_torch
@pytest.mark.parametrize("fixed", [False, True])
def test_an_oblong_network_of_timm_is_not_taken_for_a_square_one(tmp_path: Path, fixed: bool) -> None:
    """2 x 8 patches are as many as 4 x 4."""
    import timm
    import torch

    torch.manual_seed(0)
    args = {"img_size": [16, 64], "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    module = timm.create_model("vit_tiny_patch16_224", num_classes=0, **args).eval()
    torch.nn.init.normal_(module.pos_embed)
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
    config = changed(TIMM_CONFIG, input_size=[3, 16, 64], crop_pct=1.0, crop_mode="squash")
    config["model_args"] = {"num_heads": 3} if fixed else args
    config["pretrained_cfg"]["fixed_input_size"] = fixed
    (tmp_path / "config.json").write_text(json.dumps(config))
    backbone = load_backbone(tmp_path, device="cpu")
    assert backbone.config.vit.image_size == (16, 64)
    crop = np.asarray(picture(64, 16))
    with torch.inference_mode():
        truth = module(torch.from_numpy(backbone.preprocessing.normalise(crop[None]))).numpy()
    np.testing.assert_allclose(backbone.embed_crops(crop[None]), truth, atol=1e-4)


@needs_torch
def test_an_oblong_network_of_transformers_is_not_taken_for_a_square_one(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
    model = transformers.ViTModel(
        transformers.ViTConfig(**sizes, image_size=(16, 64), patch_size=8, layer_norm_eps=1e-6)
    ).eval()
    torch.nn.init.normal_(model.embeddings.position_embeddings)
    model.save_pretrained(tmp_path)
    processor = {**DINO_VIT_PROCESSOR, "size": {"height": 16, "width": 64}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    backbone = load_backbone(tmp_path, device="cpu")
    crop = np.asarray(picture(64, 16))[None]
    with torch.inference_mode():
        pixels = torch.from_numpy(backbone.preprocessing.normalise(crop))
        truth = model(pixels).last_hidden_state[:, 0].numpy()
    assert backbone.config.vit.image_size == (16, 64)
    np.testing.assert_allclose(backbone.embed_crops(crop), truth, atol=1e-4)


def test_an_image_size_that_contradicts_the_weights_is_refused() -> None:
    args = {"num_heads": 3, "img_size": [16, 32]}
    with pytest.raises(
        ModelError, match="16 patch positions, but an image of 16x32 px has 2x4 patches of 8 px"
    ):
        config_from_timm({**TIMM_CONFIG, "model_args": args}, SHAPES, source="x")
    with pytest.raises(ModelError, match="the image size is 'big'; expected pixels, or two"):
        config_from_transformers(
            {**DINO_VIT_CONFIG, "image_size": "big"}, DINO_VIT_PROCESSOR, SHAPES, source="x"
        )


@pytest.mark.parametrize(
    "odd",
    [
        {"act_layer": "quick_gelu"},
        {"norm_layer": "rmsnorm"},
        {"class_token": False},
        {"rope_temperature": 10.0},
    ],
)
def test_arguments_of_timm_that_change_the_function_are_refused(odd: dict[str, Any]) -> None:
    plain = {
        "num_heads": 3,
        "img_size": 32,
        "drop_path_rate": 0.1,
        "dynamic_img_size": True,
        "no_embed_class": True,
        "act_layer": None,
    }
    config_from_timm({**TIMM_CONFIG, "model_args": plain}, SHAPES, source="x")
    ((key, value),) = odd.items()
    with pytest.raises(ModelError, match=f"x: its model_args have {key}={value!r}"):
        config_from_timm({**TIMM_CONFIG, "model_args": {**plain, **odd}}, SHAPES, source="x")


def test_a_licence_of_several_lines_becomes_one() -> None:
    config = config_from_timm(changed(TIMM_CONFIG, license="mit\ntags: [x]"), SHAPES, source="x")
    assert config.licence == "mit tags: [x]"


@pytest.mark.parametrize(
    ("source", "name"), [("a/mine", "mine"), ("a/mine/", "mine"), (".", "here"), ("./", "here")]
)
def test_a_folder_is_named_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert config_from_timm(TIMM_CONFIG, SHAPES, source=source).name == name
    assert config_from_transformers(DINO_VIT_CONFIG, DINO_VIT_PROCESSOR, SHAPES, source=source).name == name


def test_what_a_processor_does_not_state_is_its_classes_default() -> None:
    processor = {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 64},
        "crop_size": {"height": 32, "width": 48},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    found = config_from_transformers(DINO_VIT_CONFIG, processor, SHAPES, source="x").preprocessing
    assert (found.resize_px, found.crop_px, found.interpolation) == (64, (32, 48), "bicubic")
    other = {**processor, "image_processor_type": "ViTImageProcessor", "size": {"height": 32, "width": 48}}
    found = config_from_transformers(DINO_VIT_CONFIG, other, SHAPES, source="x").preprocessing
    assert (found.resize_px, found.crop_px, found.interpolation) == ((32, 48), (32, 48), "bilinear")
