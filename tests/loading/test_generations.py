"""DINOv2 and DINOv3 as people have them: folders of transformers and timm, files of facebookresearch, names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from small_generations import (
    TIMM,
    TRANSFORMERS,
    lively,
    timm_model,
    transformers_model,
    transformers_outputs,
)
from small_models import picture

from dinokit import load_backbone
from dinokit.errors import ModelError
from dinokit.loading.foreign import config_from_transformers, licence_of, must_be_readable
from dinokit.loading.zoo import DINOV2_EVAL, DINOV3_EVAL, ZOO
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.model_folder.weight_names import dinov3_to_timm, reference_to_timm, transformers_to_timm
from dinokit.model_folder.weights import write_safetensors
from dinokit.pictures.preprocess import Preprocessing

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

TOLERANCE = 2e-5


def processor(kind: str, side: int) -> dict[str, Any]:
    """As facebook/dinov2-* and facebook/dinov3-* have it, at a small size."""
    common = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    if kind.startswith("dinov3"):
        unused = {"do_center_crop": None, "crop_size": None}
        return common | unused | {"size": {"height": side, "width": side}, "resample": 2, "do_resize": True}
    crop = {"crop_size": {"height": side, "width": side}, "do_center_crop": True}
    return common | crop | {"size": {"shortest_edge": side + 4}, "resample": 3}


@pytest.fixture
def transformers_folder(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Any]:
    model = transformers_model(request.param)
    model.save_pretrained(tmp_path)
    text = json.dumps(processor(request.param, model.config.image_size))
    (tmp_path / "preprocessor_config.json").write_text(text)
    return tmp_path, model


# -- folders that transformers saved


@pytest.mark.parametrize("transformers_folder", sorted(TRANSFORMERS), indirect=True)
def test_a_folder_of_transformers(transformers_folder: tuple[Path, Any]) -> None:
    folder, model = transformers_folder
    backbone = load_backbone(folder, device="cpu")
    assert backbone.engine == "onnx"
    side, patch = model.config.image_size, model.config.patch_size
    assert backbone.image_size == (side, side)
    assert backbone.config.num_register_tokens == getattr(model.config, "num_register_tokens", 0)
    dinov3 = model.config.model_type == "dinov3_vit"
    assert backbone.config.licence == ("dinov3-license" if dinov3 else "unknown")

    images = picture(), picture(70, 90, seed=1)
    pixels = np.stack([backbone.transform(image) for image in images])
    right = transformers_outputs(model, pixels)
    rows = side // patch
    tokens = right["last_hidden_state"][:, -rows * rows :].reshape(2, rows, rows, -1)
    assert np.abs(backbone.embed(images) - right["pooler_output"]).max() <= TOLERANCE
    assert np.abs(backbone.patch_tokens(images) - tokens).max() <= TOLERANCE
    attention = right["attention"].reshape(2, -1, rows, rows)
    assert np.abs(backbone.attention(images) - attention).max() <= TOLERANCE


@pytest.mark.parametrize("transformers_folder", sorted(TRANSFORMERS), indirect=True)
def test_both_engines_agree_at_any_size(transformers_folder: tuple[Path, Any]) -> None:
    folder, model = transformers_folder
    patch = model.config.patch_size
    for size in (model.config.image_size, (5 * patch, 8 * patch)):
        onnx, torch_ = (
            load_backbone(folder, device="cpu", engine=engine, image_size=size)
            for engine in ("onnx", "torch")
        )
        assert np.abs(onnx.embed(picture()) - torch_.embed(picture())).max() <= TOLERANCE
        assert np.abs(onnx.patch_tokens(picture()) - torch_.patch_tokens(picture())).max() <= TOLERANCE
        assert np.abs(onnx.attention(picture()) - torch_.attention(picture())).max() <= TOLERANCE


@pytest.mark.parametrize("transformers_folder", ["dinov2 reg", "dinov3"], indirect=True)
def test_other_sizes_as_transformers_itself(transformers_folder: tuple[Path, Any]) -> None:
    """These two follow the size in transformers as in the original repositories."""
    folder, model = transformers_folder
    patch = model.config.patch_size
    backbone = load_backbone(folder, device="cpu", image_size=(7 * patch, 5 * patch))
    right = transformers_outputs(model, backbone.transform(picture())[None])
    assert np.abs(backbone.embed(picture()) - right["pooler_output"][0]).max() <= TOLERANCE


@pytest.mark.parametrize("transformers_folder", ["dinov2"], indirect=True)
def test_dinov2_without_registers_follows_the_size_as_it_was_trained(
    transformers_folder: tuple[Path, Any],
) -> None:
    """facebookresearch/dinov2 adds 0.1 to the grid as DINO does (hubconf.py: interpolate_offset=0.1)."""
    assert load_backbone(transformers_folder[0]).config.vit.pos_embed_resize == PosEmbedResize(0.1, False)


def test_the_processors_of_facebook() -> None:
    model = transformers_model("dinov3")
    shapes = {k: v.shape for k, v in transformers_to_timm(named(model)).items()}
    values = {**model.config.to_dict(), "model_type": "dinov3_vit"}
    config = config_from_transformers(values, processor("dinov3", 224), shapes, source="facebook/x")
    assert config.preprocessing == Preprocessing((224, 224), (224, 224), "bilinear")
    assert config.vit.image_size == (224, 224)
    assert config.timm_architecture == "vit_small_patch16_dinov3_qkvb"


def named(model: Any) -> dict[str, Any]:
    """A model's weights under the names that its files have."""
    renamed = {name.removeprefix("model."): tensor.numpy() for name, tensor in model.state_dict().items()}
    return {name: array for name, array in renamed.items() if "inv_freq" not in name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "dinov3_convnext"}, "has model_type 'dinov3_convnext'"),
        ({"rope_theta": 10000.0}, r"not a DINOv3 as published; it has rope_theta=10000\.0"),
        ({"key_bias": True}, "it has key_bias=True"),
        ({"query_bias": False}, "it has query_bias=False"),
        ({"layer_norm_eps": 1e-6}, "it has layer_norm_eps=1e-06"),
        ({"use_gated_mlp": True}, r"a different activation .* 'gelu', expected 'silu' \(SwiGLU\)"),
        ({"hidden_act": "silu"}, r"a different activation .* 'silu', expected 'gelu'"),
    ],
)
def test_configs_of_transformers_that_are_refused(changes: dict[str, Any], message: str) -> None:
    values = {**transformers_model("dinov3").config.to_dict(), "model_type": "dinov3_vit"}
    must_be_readable(values, "x")
    with pytest.raises(ModelError, match=message):
        must_be_readable(values | changes, "x")


def test_a_bias_of_keys_that_says_something_is_refused() -> None:
    weights = named(transformers_model("dinov3"))
    weights["layer.1.attention.k_proj.bias"] = np.zeros(48, np.float32)
    assert "blocks.1.attn.q_bias" in transformers_to_timm(weights)
    weights["layer.1.attention.k_proj.bias"] = np.ones(48, np.float32)
    with pytest.raises(ModelError, match=r"blocks\.1\.attn\.qkv\.bias has a bias for keys"):
        transformers_to_timm(weights)


def test_a_key_without_its_bias_is_missing_in_dinov2() -> None:
    weights = {
        f"encoder.layer.0.attention.attention.{part}.bias": np.ones(48, np.float32)
        for part in ("query", "value")
    }
    with pytest.raises(ModelError, match=r"cannot be joined: \['key'\] is missing"):
        transformers_to_timm(weights)


# -- folders that timm saved


@pytest.mark.parametrize("name", sorted(TIMM))
def test_a_folder_of_timm(name: str, tmp_path: Path) -> None:
    module = timm_model(name)
    module.pretrained_cfg = {
        **module.pretrained_cfg,
        "input_size": (3, TIMM[name]["img_size"], TIMM[name]["img_size"]),
    }
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
    onnx = load_backbone(tmp_path, device="cpu")
    assert onnx.engine == "onnx"
    pixels = onnx.transform(picture())
    with torch.inference_mode():
        truth = module.forward_features(torch.from_numpy(pixels)[None])[0].numpy()
    assert np.abs(onnx.embed(picture()) - truth[0]).max() <= TOLERANCE
    assert (
        np.abs(onnx.patch_tokens(picture()).reshape(-1, 48) - truth[-np.prod(onnx.grid) :]).max() <= TOLERANCE
    )
    torch_ = load_backbone(tmp_path, device="cpu", engine="torch")
    assert np.abs(torch_.embed(picture()) - truth[0]).max() <= TOLERANCE
    registers = "reg4" in name or "dinov3" in name
    assert onnx.config.vit.pos_embed_resize == (PosEmbedResize(0.0, True) if registers else PosEmbedResize())
    assert onnx.config.licence == ("dinov3-license" if "dinov3" in name else "apache-2.0")


# -- files without a config


def test_a_bare_file_of_transformers(tmp_path: Path) -> None:
    """Width 64, so that the number of heads follows from it."""
    import transformers

    model = lively(
        transformers.DINOv3ViTModel(
            transformers.DINOv3ViTConfig(
                hidden_size=64,
                num_hidden_layers=1,
                num_attention_heads=1,
                intermediate_size=128,
                num_register_tokens=4,
            )
        )
    )
    model.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path / "model.safetensors", device="cpu")
    assert backbone.preprocessing == DINOV3_EVAL
    with torch.inference_mode():
        truth = model(torch.from_numpy(backbone.transform(picture())[None])).pooler_output[0].numpy()
    assert np.abs(backbone.embed(picture()) - truth).max() <= TOLERANCE


# timm's names, and those of facebookresearch/dinov3 for the same
DINOV3_NAMES = {
    "reg_token": "storage_tokens",
    ".gamma_1": ".ls1.gamma",
    ".gamma_2": ".ls2.gamma",
    "mlp.fc1_g.": "mlp.w1.",
    "mlp.fc1_x.": "mlp.w2.",
}


def reference_file(path: Path, module: Any) -> dict[str, Any]:
    """A file as facebookresearch/dinov3 publishes it, from a timm module, and what timm reads from it."""
    state: dict[str, Any] = {}
    gated = any("fc1_g" in name for name in module.state_dict())
    for name, tensor in module.state_dict().items():
        for ours, theirs in (DINOV3_NAMES | ({"mlp.fc2.": "mlp.w3."} if gated else {})).items():
            name = name.replace(ours, theirs)
        if name.endswith(("q_bias", "v_bias")):
            continue
        state[name] = tensor.clone()
    for index, block in enumerate(module.blocks):
        if block.attn.q_bias is not None:
            key = f"blocks.{index}.attn.qkv.bias"
            # What stands in the masked part is never used.
            state[key] = torch.cat([block.attn.q_bias, torch.ones(64), block.attn.v_bias]).detach()
            state[f"{key}_mask"] = torch.cat([torch.ones(64), torch.zeros(64), torch.ones(64)])
    state["mask_token"] = torch.randn(1, 64)
    state["rope_embed.periods"] = torch.ones(16, dtype=torch.bfloat16)
    torch.save(state, path)
    return state


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3_qkvb", "vit_small_plus_patch16_dinov3"])
def test_a_file_of_facebookresearch_dinov3(name: str, tmp_path: Path) -> None:
    module = lively(timm.create_model(name, num_classes=0, embed_dim=64, depth=2, num_heads=1))
    state = reference_file(tmp_path / "dinov3_vits16.pth", module)
    from timm.models.eva import checkpoint_filter_fn

    truth = checkpoint_filter_fn(dict(state), module)
    assert truth.keys() == module.state_dict().keys()  # the file is one that timm reads too
    found = dinov3_to_timm({key: tensor.float().numpy() for key, tensor in state.items()})
    assert found.keys() == truth.keys()
    for key, tensor in truth.items():
        np.testing.assert_array_equal(found[key], tensor.numpy(), err_msg=key)

    backbone = load_backbone(tmp_path / "dinov3_vits16.pth", device="cpu")
    assert backbone.preprocessing == DINOV3_EVAL
    with torch.inference_mode():
        right = module.forward_features(torch.from_numpy(backbone.transform(picture())[None]))[0, 0].numpy()
    assert np.abs(backbone.embed(picture()) - right).max() <= TOLERANCE


@pytest.mark.parametrize("registers", [0, 4])
def test_a_file_of_facebookresearch_dinov2(registers: int, tmp_path: Path) -> None:
    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    module = lively(timm.create_model(name, num_classes=0, embed_dim=64, depth=1, num_heads=1))
    state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    if registers:  # the position of CLS is not in the token yet
        cls = torch.randn(1, 1, 64)
        state["register_tokens"] = state.pop("reg_token")
        state["pos_embed"] = torch.cat([cls, state["pos_embed"]], 1)
        state["cls_token"] = state["cls_token"] - cls
    state["mask_token"] = torch.randn(1, 64)
    torch.save(state, tmp_path / "dinov2.pth")
    backbone = load_backbone(tmp_path / "dinov2.pth", device="cpu", image_size=518)
    assert load_backbone(tmp_path / "dinov2.pth", device="cpu").preprocessing == DINOV2_EVAL
    assert backbone.config.num_register_tokens == registers
    with torch.inference_mode():
        right = module.forward_features(torch.from_numpy(backbone.transform(picture())[None]))[0, 0].numpy()
    assert np.abs(backbone.embed(picture()) - right).max() <= TOLERANCE


@pytest.mark.parametrize("name", sorted(TIMM))
def test_the_torch_engine_describes_what_the_weights_say(name: str) -> None:
    from dinokit.model_folder.architecture import VitArchitecture
    from dinokit.runtime.torch import describe

    module = timm_model(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    seen, said = describe(module), VitArchitecture.from_shapes(shapes, num_heads=3)
    for key in (
        "embed_dim",
        "depth",
        "mlp_ratio",
        "num_register_tokens",
        "layer_norm_eps",
        "qkv_bias",
        "ffn",
    ):
        assert getattr(seen, key) == getattr(said, key), key
    assert (seen.layer_scale, seen.position) == (said.layer_scale, said.position)


def test_names_that_are_timms_stay() -> None:
    for name in TIMM:
        weights = {key: tensor.numpy() for key, tensor in timm_model(name).state_dict().items()}
        assert reference_to_timm(weights).keys() == weights.keys()


# -- known names and Hub ids, without torch

LOAD = """
import json, sys
from dinokit import load_backbone
from dinokit.errors import DinokitError
from PIL import Image
for name in sys.argv[2:]:
    try:
        backbone = load_backbone(name, device="cpu", image_size=64 if "v3" in name else 56)
        image = Image.open(sys.argv[1])
        said = {"engine": backbone.engine, "vector": backbone.embed(image).tolist(),
                "attention": backbone.attention(image).shape, "licence": backbone.config.licence}
    except DinokitError as error:
        said = {"error": str(error), "kind": type(error).__name__}
    print(json.dumps(said))
assert not {"torch", "timm", "transformers"} & set(sys.modules)
"""


def load_from(hub: HubServer, folder: Path, *names: str, **environment: str) -> list[dict[str, Any]]:
    picture().save(folder / "photo.png")
    run = subprocess.run(
        [sys.executable, "-c", LOAD, str(folder / "photo.png"), *names],
        env=hub.environment(folder / "cache", **environment),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize("name", ["dinov2_vits14_reg", "dinov3_vits16"])
def test_known_names_need_no_torch(name: str, tmp_path: Path) -> None:
    """Random weights of the real size from timm's own module, whose forward pass is the truth.

    (It resizes the position embedding of the one as dinokit does; the other has none.)
    """
    known = ZOO[name]
    size = 64 if "v3" in name else 56
    options = {"dynamic_img_size": True} if "v2" in name else {}
    torch.manual_seed(0)
    module = timm.create_model(known.timm_architecture, num_classes=0, **known.model_args, **options).eval()
    write_safetensors(tmp_path / "w.safetensors", {k: t.numpy() for k, t in module.state_dict().items()})
    with HubServer() as hub:
        hub.add(known.repo, {known.filename: (tmp_path / "w.safetensors").read_bytes()})
        (said,) = load_from(hub, tmp_path, name, DINOKIT_ACCEPT_DINOV3_LICENSE="1")
    assert said["engine"] == "onnx"
    assert said["licence"] == known.licence
    assert said["attention"] == [6, 4, 4]
    prepare = known.preprocessing.with_image_size(size)
    pixels = torch.from_numpy(prepare.normalise(prepare.crop(picture())[None]))
    with torch.inference_mode():
        truth = module.forward_features(pixels)[0, 0].numpy()
    np.testing.assert_allclose(said["vector"], truth, atol=TOLERANCE)


def test_dinov3_from_a_hub_id_wants_its_licence_accepted_too(tmp_path: Path) -> None:
    timm_folder, hf_folder = tmp_path / "timm", tmp_path / "hf"
    timm.models.save_for_hf(timm_model("vit_small_patch16_dinov3"), timm_folder, safe_serialization=True)
    transformers_model("dinov3").save_pretrained(hf_folder)
    (hf_folder / "preprocessor_config.json").write_text(json.dumps(processor("dinov3", 64)))
    with HubServer() as hub:
        hub.add("user/timm-v3", timm_folder)
        hub.add("user/hf-v3", hf_folder)
        for said in load_from(hub, tmp_path, "user/timm-v3", "user/hf-v3", "dinov3_vits16"):
            assert said["kind"] == "ModelError"
            assert "under the DINOv3 licence" in said["error"]
            assert "set DINOKIT_ACCEPT_DINOV3_LICENSE=1" in said["error"]
        assert not [request for request in hub.requests if "safetensors" in request]  # nothing was fetched
        accepted = load_from(hub, tmp_path, "user/timm-v3", "user/hf-v3", DINOKIT_ACCEPT_DINOV3_LICENSE="1")
    assert [said["engine"] for said in accepted] == ["onnx", "onnx"]
    assert [said["licence"] for said in accepted] == ["dinov3-license"] * 2


def test_licences_that_configs_name() -> None:
    assert licence_of({"model_type": "dinov3_vit"}) == "dinov3-license"
    assert licence_of({"model_type": "dinov2"}) == "unknown"
    assert licence_of({"architecture": "x", "pretrained_cfg": {"license": "apache-2.0"}}) == "apache-2.0"
    assert licence_of({"architecture": "x", "pretrained_cfg": {"license": None}}) == "unknown"
