"""load_backbone: what each name finds, which engine it gets, and what it says when it cannot."""

from __future__ import annotations

import gc
import importlib.util
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine
from numpy.typing import NDArray
from onnx_folder import add_onnx
from safetensors.numpy import save_file
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.errors import DeviceError, MissingExtraError, ModelError, UsageError
from dinokit.loading.locate import locate
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.folder import ModelFolder, write_model_folder
from dinokit.model_folder.weight_files import unchanged
from dinokit.model_folder.weights import timm_to_transformers, write_safetensors
from dinokit.pictures.preprocess import Preprocessing

has_torch = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not has_torch, reason="torch is not installed")
WIDE = VitArchitecture(embed_dim=64, depth=2, num_heads=1, patch_size=8, image_size=(32, 32))
"""Its one head is 64 wide, as in every published DINO, so that bare weights say all."""


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    return write_model_folder(tmp_path / "model", config_for(), random_weights())


@pytest.fixture
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "dinokit.loading.load.importlib.util.find_spec",
        lambda name: None if name in ("torch", "timm") else real(name),
    )


def vector(name: Any, **options: Any) -> NDArray[np.float32]:
    out = load_backbone(name, device="cpu", **options).embed(picture())
    assert isinstance(out, np.ndarray)
    return out


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


@pytest.mark.parametrize("name", ["timm.safetensors", "model.safetensors"])
def test_a_folder_named_by_its_weights_keeps_what_its_config_says(folder: ModelFolder, name: str) -> None:
    """Preprocessing and licence are not in the weights."""
    found, whole = locate(folder.path / name), locate(folder.path)
    assert (found.kind, found.config, found.weights_sha256) == (
        whole.kind,
        whole.config,
        whole.weights_sha256,
    )
    np.testing.assert_array_equal(vector(folder.path / name), vector(folder.path))


def test_starter_is_the_bundled_folder(folder: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.loading.locate.starter_path", lambda: folder.path)
    backbone = load_backbone(device="cpu")
    assert (backbone.name, backbone.source, backbone.revision) == ("small", "bundled", None)
    np.testing.assert_array_equal(backbone.embed(picture()), vector(folder.path))
    monkeypatch.setattr("dinokit.loading.locate.starter_path", lambda: folder.path / "gone")
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
    with pytest.raises(ModelError, match="number of heads cannot be inferred"):
        load_backbone(tmp_path / "w.safetensors")


def test_bare_weights_of_another_network_are_named(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "w.safetensors", {"fc.weight": np.zeros((3, 4), np.float32)})
    with pytest.raises(ModelError, match=r"w\.safetensors: these weights .* It holds 1 entry: fc\.weight"):
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
        ("qqq", UsageError, r"nor a Hub id \(user/model\)\. Known names"),
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
    with pytest.raises(ModelError, match=r"needs onnx/model_int8\.onnx.* dinokit export .* --precision int8"):
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

    code = "import sys, dinokit.loading.load; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["torch", "timm", "onnx", "onnxruntime", "huggingface_hub", "safetensors"]
    run = subprocess.run([sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_weights_that_are_replaced_while_they_load_are_noticed(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dinokit.loading.load as load

    weights = folder.load_weights()
    found = load.locate

    def replaced(*args: Any, **options: Any) -> Any:
        located = found(*args, **options)
        write_model_folder(folder.path, folder.config, {name: 2 * array for name, array in weights.items()})
        return located

    monkeypatch.setattr(load, "locate", replaced)
    with pytest.raises(ModelError, match="was replaced by other weights while the model was being loaded"):
        load_backbone(folder.path, device="cpu")


def test_a_file_that_is_replaced_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"1")
    with pytest.raises(ModelError, match="was replaced while it was read"), unchanged(file):
        file.write_bytes(b"22")


def test_a_backbone_on_tensorrt_comes_back_there(
    folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dinokit.loading.load as load

    engine = FakeEngine()
    engine.device = "cuda:1"
    monkeypatch.setattr(load, "_open", lambda *_: engine)
    _, (again, _) = load_backbone(folder.path, device="tensorrt:1").__reduce_ex__(4)
    assert again["device"] == "tensorrt:1"


def test_a_very_long_name_is_unknown_and_no_error_of_the_system() -> None:
    with pytest.raises(UsageError):
        load_backbone("x" * 5000)


def zeros(*shape: int) -> NDArray[np.float32]:
    return np.zeros(shape, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"register_tokens": zeros(1, 4, 64), "cls_token": zeros(1, 1, 64)}, "have register tokens, so"),
        (
            {"register_tokens": zeros(1, 4, 64), "cls_token": zeros(1, 1, 64), "pos_embed": zeros(5)},
            r"but they have cls_token \(1, 1, 64\) and pos_embed \(5,\)",
        ),
        ({"storage_tokens": zeros(1, 4, 64), "blocks.0.attn.qkv.bias": zeros(10)}, r"has the shape \(10,\)"),
        (
            {"cls_attn_blocks.0.norm1.weight": zeros(64), "cls_attn_blocks.0.attn.qkv.weight": zeros(10, 64)},
            r"has the shape \(10, 64\); expected queries, keys and values",
        ),
        (
            {
                **{f"layer{i}.{j}.conv1.weight": zeros(3) for i in range(1, 5) for j in range(2)},
                "conv1.weight": zeros(64, 3, 7, 7),
                "layer1.0.conv2.weight": zeros(64, 64, 3, 3),
            },
            "not a DINO Vision Transformer",
        ),
        (
            {"pos_embed": zeros(5), "patch_embed.proj.weight": zeros(64, 3, 8, 8)},
            r"a name or shape among .* is invalid",
        ),
    ],
)
def test_malformed_weights_are_model_errors(
    tmp_path: Path, tensors: dict[str, NDArray[np.float32]], message: str
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=message):
        load_backbone(tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"^\S+x\.safetensors"):
        load_backbone(tmp_path / "x.safetensors")


def test_weights_of_a_file_are_handed_over(tmp_path: Path) -> None:
    """While an engine copies them, nothing else holds them; whoever wants them later reads the file again."""
    weights = random_weights(WIDE)
    write_safetensors(tmp_path / "x.safetensors", weights)
    located = locate(tmp_path / "x.safetensors")
    assert located.load_weights is not None
    first = located.load_weights()
    seen = weakref.ref(first["cls_token"])
    del first
    gc.collect()
    assert seen() is None
    np.testing.assert_array_equal(located.load_weights()["cls_token"], weights["cls_token"])
    write_safetensors(tmp_path / "x.safetensors", random_weights(WIDE, seed=1))
    with pytest.raises(ModelError, match=r"x\.safetensors was replaced by other weights meanwhile"):
        located.load_weights()


@pytest.mark.parametrize("prefix", ["hf-hub:", "local-dir:"])
def test_prefixes_of_timm_are_explained(prefix: str) -> None:
    with pytest.raises(UsageError, match=f"Leave out '{prefix}', which is timm's: 'timm/x'"):
        load_backbone(f"{prefix}timm/x")


@pytest.mark.parametrize(
    "name", ["m.onnx", "m.safetensors", "folder", pytest.param("m.pth", marks=needs_torch)]
)
def test_a_pointer_of_git_lfs_is_named(folder: ModelFolder, tmp_path: Path, name: str) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 12\n"
    if name == "folder":
        (folder.path / "timm.safetensors").write_bytes(pointer)
        given = folder.path
    else:
        given = tmp_path / name
        given.write_bytes(pointer)
    with pytest.raises(
        ModelError, match="is a Git LFS pointer, not the file itself; fetch it with: git lfs pull"
    ):
        load_backbone(given)


def test_what_is_at_a_path_and_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ModelError, match="link is a symbolic link to nowhere, which does not exist"):
        load_backbone(tmp_path / "link")
    with pytest.raises(ModelError, match=r"^nowhere does not exist"):
        load_backbone(Path("nowhere"))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.onnx")
        with pytest.raises(UsageError, match=r"pipe\.onnx is not a model file"):
            load_backbone(tmp_path / "pipe.onnx")
