"""load_backbone: what each name finds, which engine it gets, and what it says when it cannot."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.architecture import PosEmbedResize, VitArchitecture
from dinokit.errors import DeviceError, MissingExtraError, ModelError, UsageError
from dinokit.foreign import config_from_timm, config_from_transformers
from dinokit.locate import METADATA_KEY, locate
from dinokit.model_folder import ModelFolder, contract, write_model_folder
from dinokit.onnx_metadata import read_onnx_metadata
from dinokit.preprocess import Preprocessing
from dinokit.vit_graph import build_vit_graph
from dinokit.weights import timm_to_transformers, write_safetensors
from dinokit.zoo import ZOO

has_torch = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is not installed")

WIDE = VitArchitecture(embed_dim=64, depth=2, num_heads=1, patch_size=8, image_size=(32, 32))
"""Its one head is 64 wide, as in every published DINO, so that bare weights say all."""


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return write_model_folder(tmp_path / "model", config_for(), random_weights())


def add_onnx(folder: ModelFolder, **changes: Any) -> Path:
    """Writes the folder's ONNX file, its contract changed."""
    says = contract(folder.config, folder.weights_sha256) | changes
    path = folder.path / "onnx" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    graph = build_vit_graph(
        folder.config.vit, folder.load_weights(), metadata={METADATA_KEY: json.dumps(says)}
    )
    path.write_bytes(graph.SerializeToString())
    return path


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "dinokit.loading.importlib.util.find_spec",
        lambda name: None if name in ("torch", "timm") else real(name),
    )


def vector(name: Any, **options: Any) -> NDArray[np.float32]:
    out = load_backbone(name, device="cpu", **options).embed(picture())
    assert isinstance(out, np.ndarray)
    return out


# -- what a name finds


def test_folder_run_and_file_are_the_same_model(folder: ModelFolder, tmp_path: Path) -> None:
    expected = vector(folder.path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("epochs: 1\n")
    folder.path.rename(tmp_path / "run" / "model")
    moved = ModelFolder(tmp_path / "run" / "model", folder.config, folder.weights_sha256)
    np.testing.assert_array_equal(vector(tmp_path / "run"), expected)
    np.testing.assert_array_equal(vector(str(tmp_path / "run")), expected)
    onnx = add_onnx(moved)
    np.testing.assert_array_equal(vector(tmp_path / "run"), expected)
    np.testing.assert_array_equal(vector(onnx), expected)


def test_starter_is_the_bundled_folder(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.locate.starter_path", lambda: folder.path)
    backbone = load_backbone(device="cpu")
    assert (backbone.name, backbone.source, backbone.revision) == ("small", "bundled", None)
    np.testing.assert_array_equal(backbone.embed(picture()), vector(folder.path))
    monkeypatch.setattr("dinokit.locate.starter_path", lambda: folder.path / "gone")
    with pytest.raises(ModelError, match="this installation has no bundled model"):
        load_backbone("starter")


@needs_torch
def test_bare_weights_under_any_names(tmp_path: Path) -> None:
    import torch

    weights = random_weights(WIDE)
    written = write_model_folder(tmp_path / "model", config_for(WIDE), weights)
    expected = vector(written.path)
    write_safetensors(tmp_path / "w.safetensors", weights)
    write_safetensors(tmp_path / "hf.safetensors", timm_to_transformers(weights, WIDE))
    torch.save(
        {"teacher": {f"backbone.{k}": torch.from_numpy(v) for k, v in weights.items()}}, tmp_path / "c.pth"
    )
    for name in ("w.safetensors", "hf.safetensors", "c.pth"):
        np.testing.assert_array_equal(vector(tmp_path / name), expected, err_msg=name)
    found = locate(tmp_path / "c.pth")
    assert found.config.preprocessing == Preprocessing(resize_px=37, crop_px=(32, 32))
    assert found.config.vit == WIDE
    assert found.config.licence == "unknown"


def test_bare_weights_of_unknown_heads(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", random_weights(SMALL))
    with pytest.raises(ModelError, match="number of heads cannot be read"):
        load_backbone(tmp_path / "w.safetensors")


def test_bare_weights_with_more_in_them(tmp_path: Path) -> None:
    weights = random_weights(WIDE) | {"norm_pre.weight": np.zeros(64, np.float32)}
    write_safetensors(tmp_path / "w.safetensors", weights)
    with pytest.raises(ModelError, match=r"not a DINO Vision Transformer: .*norm_pre\.weight"):
        load_backbone(tmp_path / "w.safetensors")


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("dino_vits61", UsageError, r"Did you mean dino_vits16 .*Known names: starter, dino_vits16"),
        ("dinov2-vits14", UsageError, "Did you mean dinov2_vits14"),
        ("starter2", UsageError, "Did you mean starter"),
        ("qqq", UsageError, r"no Hub id \(user/model\)\. Known names"),
        ("./nowhere", ModelError, r"\./nowhere does not exist"),
        ("a/b/c", ModelError, "a/b/c does not exist"),
        ("model.onnx", ModelError, r"model\.onnx does not exist"),
        ("", UsageError, "'' is not a model"),
    ],
)
def test_names_that_are_nothing(
    name: str, error: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error, match=message):
        load_backbone(name)


def test_paths_that_are_no_model(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"x")
    with pytest.raises(
        UsageError, match=r"photo\.jpg is not a model file; expected a folder or one of \.onnx"
    ):
        load_backbone(tmp_path / "photo.jpg")
    with pytest.raises(ModelError, match=r"neither a model folder \(no config\.json\) nor a training run"):
        load_backbone(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="neither dinokit's, timm's nor transformers'"):
        load_backbone(tmp_path)


def test_revision_is_for_the_hub(folder: ModelFolder) -> None:
    with pytest.raises(UsageError, match=r"revision='main' was given, but .* is not on the Hub"):
        load_backbone(folder.path, revision="main")
    with pytest.raises(UsageError, match="'starter' is not on the Hub"):
        load_backbone("starter", revision="main")


def test_dinov3_wants_its_licence_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DINOKIT_ACCEPT_DINOV3_LICENSE", raising=False)
    with pytest.raises(ModelError, match=r"under the DINOv3 licence.*DINOKIT_ACCEPT_DINOV3_LICENSE=1"):
        load_backbone("dinov3_vits16")


# -- ONNX files


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
    with pytest.raises(ModelError, match="does not say how its pictures are prepared"):
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


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\xff" * 40, b"\x3a\xff\xff\x7f"])
def test_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"m\.onnx (is not an ONNX file|does not say)"):
        load_backbone(tmp_path / "m.onnx")


def test_torch_cannot_run_a_lone_onnx_file(folder: ModelFolder) -> None:
    with pytest.raises(ModelError, match="is an ONNX file: the torch engine needs the model folder"):
        load_backbone(add_onnx(folder), engine="torch")
    with pytest.raises(ModelError, match=r"needs the model folder.*precision='fp16' is another file"):
        load_backbone(add_onnx(folder), precision="fp16")


# -- engines, devices, precisions


@needs_torch
def test_engines_agree_and_auto_is_onnx(folder: ModelFolder) -> None:
    assert load_backbone(folder.path, device="cpu").engine == "onnx"
    assert load_backbone(folder.path, device="cpu", engine="torch").engine == "torch"
    difference = vector(folder.path, engine="onnx") - vector(folder.path, engine="torch")
    assert np.abs(difference).max() < 1e-5


@needs_torch
def test_auto_takes_torch_where_onnx_cannot(folder: ModelFolder) -> None:
    backbone = load_backbone(folder.path, device="cpu", precision="bf16")
    assert (backbone.engine, backbone.precision) == ("torch", "bf16")
    with pytest.raises(
        ModelError, match="cannot be run with engine='onnx': precision='bf16' needs the torch"
    ):
        load_backbone(folder.path, engine="onnx", precision="bf16")


def test_what_needs_torch_says_which_extra(folder: ModelFolder, no_torch: None) -> None:
    assert load_backbone(folder.path, device="cpu").engine == "onnx"
    with pytest.raises(MissingExtraError, match=r"small needs torch with timm.*dinokit\[train\]"):
        load_backbone(folder.path, engine="torch")
    with pytest.raises(
        MissingExtraError, match=r"precision='fp16' needs onnx/model_fp16\.onnx.*dinokit\[train\]"
    ):
        load_backbone(folder.path, precision="fp16")


def test_arguments_that_cannot_be(folder: ModelFolder) -> None:
    with pytest.raises(
        UsageError, match="engine='tensorflow' is not known; expected one of auto, onnx, torch"
    ):
        load_backbone(folder.path, engine="tensorflow")
    with pytest.raises(UsageError, match="precision='fp8' is not known"):
        load_backbone(folder.path, precision="fp8")
    with pytest.raises(
        ModelError, match=r"needs onnx/model_int8\.onnx .* dinokit export .* --precision int8"
    ):
        load_backbone(folder.path, precision="int8")
    with pytest.raises(UsageError, match="33"):
        load_backbone(folder.path, device="cpu", image_size=33)


@pytest.mark.parametrize("engine", ["auto", "onnx", pytest.param("torch", marks=needs_torch)])
def test_a_device_that_is_not_there_is_an_error(folder: ModelFolder, engine: str) -> None:
    with pytest.raises(DeviceError, match="cuda:97"):
        load_backbone(folder.path, engine=engine, device="cuda:97")


def test_image_size(folder: ModelFolder) -> None:
    backbone = load_backbone(folder.path, device="cpu", image_size=64)
    assert backbone.image_size == (64, 64)
    assert backbone.preprocessing.resize_px == 74
    assert backbone.embed(picture()).shape == (48,)
    assert load_backbone(folder.path, device="cpu", image_size=(32, 48)).image_size == (32, 48)


def test_nothing_heavy_is_loaded_to_find_a_model() -> None:
    import subprocess

    code = "import sys, dinokit.locate, dinokit.loading; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "timm", "onnx", "onnxruntime", "huggingface_hub", "safetensors"]
    run = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- folders of timm and transformers

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
    module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
    ).eval()
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True)
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
        ({"crop_mode": "border"}, "crops by 'border'"),
        ({"crop_pct": None}, "does not say the preprocessing whole"),
        ({"interpolation": "lanczos"}, "interpolation='lanczos' is not known"),
    ],
)
def test_timm_folders_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_timm(changed(TIMM_CONFIG, **changes), SHAPES, source="x")


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
        ({"hidden_act": "gelu_new"}, {}, "another activation"),
        ({"layer_norm_eps": 1e-5}, {}, "layer_norm_eps=1e-05"),
        ({}, {"do_resize": False}, r"switches off \['do_resize'\]"),
        ({}, {"size": {"longest_edge": 9}}, "does not say the preprocessing whole"),
        ({}, {"resample": 0}, "does not say the preprocessing whole"),
    ],
)
def test_transformers_folders_that_are_refused(
    changes: dict[str, Any], processor: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        config_from_transformers(
            DINO_VIT_CONFIG | changes, DINO_VIT_PROCESSOR | processor, SHAPES, source="x"
        )


def test_pickled_weights_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(DINO_VIT_CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"has no model\.safetensors; pickled weights are not opened"):
        load_backbone(tmp_path)


# -- the table of known names


@needs_torch
@pytest.mark.parametrize("name", sorted(ZOO))
def test_known_names_against_timm(name: str) -> None:
    """Sizes, parameters, repository and licence, as timm itself has them."""
    timm = pytest.importorskip("timm")
    import torch

    from dinokit.runtime.torch import describe

    known = ZOO[name]
    tagged = known.repo.removeprefix("timm/")
    published = timm.get_pretrained_cfg(tagged)
    assert published.hf_hub_id == known.repo
    assert published.license == known.licence
    assert published.mean == known.preprocessing.mean
    with torch.device("meta"):
        module = timm.create_model(known.timm_architecture, num_classes=0, **known.model_args)
    assert tagged.split(".")[0] == known.timm_architecture
    assert sum(p.numel() for p in module.parameters()) == known.params
    seen, said = describe(module), known.vit
    for size in ("embed_dim", "depth", "num_heads", "patch_size", "image_size", "num_register_tokens"):
        assert getattr(seen, size) == getattr(said, size), size
    for kind in ("layer_norm_eps", "qkv_bias", "ffn", "position"):
        assert getattr(seen, kind) == getattr(said, kind), kind
    assert any(n.endswith(("ls1.gamma", "gamma_1")) for n in module.state_dict()) == said.layer_scale


@pytest.mark.parametrize(
    ("name", "engine", "why"),
    [
        ("dinov2_vits14", "auto", "its ONNX graph cannot be written"),
        ("dino_vits16", "torch", "with engine='torch'"),
    ],
)
def test_a_name_that_needs_torch_says_so_before_it_downloads(
    name: str, engine: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_download(*_: object, **__: object) -> None:
        raise AssertionError("asked the Hub")

    monkeypatch.setattr("dinokit.locate.hub_file", no_download)
    monkeypatch.setattr("dinokit.loading._torch_is_installed", lambda: False)
    if engine == "auto":  # no known name is such any more, but the next family may be
        monkeypatch.setattr("dinokit.zoo.can_write", lambda vit: False)
    with pytest.raises(MissingExtraError, match=rf"{name} .*{why}.*pip install 'dinokit\[train\]'"):
        load_backbone(name, engine=engine)


def test_preprocessing_is_the_original_repositories() -> None:
    """dinov2's data/transforms.py; dinov3's README: squashed by torchvision's default filter."""
    assert ZOO["dinov2_vitl14_reg"].preprocessing == Preprocessing(256, (224, 224), "bicubic")
    assert ZOO["dinov3_vitl16"].preprocessing == Preprocessing((256, 256), (256, 256), "bilinear")


def test_dino_v1_runs_without_torch_and_with_the_official_crop() -> None:
    for name in ("dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8"):
        assert "onnx" in ZOO[name].engines
        assert ZOO[name].preprocessing == Preprocessing(256, (224, 224), "bicubic")
        assert ZOO[name].vit.pos_embed_resize == PosEmbedResize(0.1, False)
