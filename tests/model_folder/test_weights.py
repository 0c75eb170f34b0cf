"""Weights: safetensors against torch's own reader, names against transformers, .pth as DINO writes them."""

from __future__ import annotations

import argparse
import errno
import pickle
import re
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from small_models import SMALL, random_weights

from dinokit.errors import MissingExtraError, ModelError, UsageError
from dinokit.loading.locate import locate
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.weights import (
    dinov2_to_timm,
    expected_shapes,
    read_pth,
    read_safetensors,
    safetensors_shapes,
    timm_to_transformers,
    transformers_to_timm,
    write_safetensors,
)

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

Weights = dict[str, NDArray[np.float32]]


def tensors(weights: Weights) -> dict[str, Any]:
    return {name: torch.from_numpy(array) for name, array in weights.items()}


def assert_same(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
        assert found[name].dtype == np.float32


# -- safetensors


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float64"])
def test_every_float_type_is_read_as_float32(tmp_path: Path, dtype: str) -> None:
    from safetensors.torch import save_file

    stored = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(random_weights()).items()}
    stored["scalar"] = torch.tensor(1.5, dtype=getattr(torch, dtype))
    save_file(stored, tmp_path / "w.safetensors")
    expected = {name: tensor.float().numpy() for name, tensor in stored.items()}
    assert_same(read_safetensors(tmp_path / "w.safetensors"), expected)


def test_integers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"steps": torch.arange(3)}, tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match=r"not floating point: steps \(I64\)"):
        read_safetensors(tmp_path / "w.safetensors")


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\xff" * 64])
def test_no_safetensors(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "w.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="is not a complete safetensors file"):
        read_safetensors(tmp_path / "w.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        read_safetensors(tmp_path / "other.safetensors")


def test_what_is_written_torch_reads(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file

    write_safetensors(tmp_path / "w.safetensors", random_weights())
    read = load_file(tmp_path / "w.safetensors")
    assert_same({name: tensor.numpy() for name, tensor in read.items()}, random_weights())
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses a file without it


@pytest.mark.skipif(sys.platform == "win32", reason="modes of POSIX")
def test_others_may_read_what_is_written(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write_safetensors(tmp_path / "w.safetensors", random_weights())
    assert (tmp_path / "w.safetensors").stat().st_mode == (tmp_path / "any").stat().st_mode


@pytest.mark.skipif(sys.platform == "win32", reason="limits of POSIX")
def test_a_disk_that_takes_no_more_is_an_error_of_the_system(tmp_path: Path) -> None:
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"w\.safetensors") as caught:
            write_safetensors(tmp_path / "w.safetensors", random_weights())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG


def test_only_known_types_are_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="dtype='int8' cannot be stored"):
        write_safetensors(tmp_path / "w.safetensors", random_weights(), dtype="int8")


def test_expected_shapes_are_timms() -> None:
    module = timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    assert expected_shapes(SMALL) == {name: tuple(t.shape) for name, t in module.state_dict().items()}


def test_expected_shapes_of_dinov2_are_timms() -> None:
    with torch.device("meta"):
        module = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    vit = VitArchitecture(384, 12, 6, 14, (518, 518), layer_scale=True)
    assert expected_shapes(vit) == {name: tuple(t.shape) for name, t in module.state_dict().items()}


# -- transformers' names


def test_there_and_back_through_transformers_names() -> None:
    assert_same(transformers_to_timm(timm_to_transformers(random_weights(), SMALL)), random_weights())


def test_layer_scale_that_is_not_one_is_kept() -> None:
    theirs = timm_to_transformers(random_weights(), SMALL)
    theirs["encoder.layer.1.layer_scale2.lambda1"] = np.full(48, 0.5, np.float32)
    back = transformers_to_timm(theirs)
    assert set(back) - set(random_weights()) == {f"blocks.{i}.ls{j}.gamma" for i in (0, 1) for j in (1, 2)}
    assert (back["blocks.1.ls2.gamma"] == 0.5).all()


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_the_layout_of_facebook_dino(prefix: str) -> None:
    """``model_type`` "vit", its keys as the published files have them, the random pooler included."""
    weights = random_weights()
    theirs = {
        "embeddings.cls_token": weights["cls_token"],
        "embeddings.position_embeddings": weights["pos_embed"],
        "embeddings.patch_embeddings.projection.weight": weights["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.projection.bias": weights["patch_embed.proj.bias"],
        "layernorm.weight": weights["norm.weight"],
        "layernorm.bias": weights["norm.bias"],
        "pooler.dense.weight": np.ones((48, 48), np.float32),
        "pooler.dense.bias": np.ones(48, np.float32),
    }
    names = {
        "layernorm_before": "norm1",
        "attention.output.dense": "attn.proj",
        "layernorm_after": "norm2",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            for left, right in names.items():
                theirs[f"encoder.layer.{i}.{left}.{kind}"] = weights[f"blocks.{i}.{right}.{kind}"]
            parts = np.split(weights[f"blocks.{i}.attn.qkv.{kind}"], 3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                theirs[f"encoder.layer.{i}.attention.attention.{name}.{kind}"] = part
    assert_same(transformers_to_timm({prefix + name: array for name, array in theirs.items()}), weights)


def test_a_key_without_a_place_is_named() -> None:
    theirs = timm_to_transformers(random_weights(), SMALL)
    theirs["decoder.weight"] = np.zeros(3, np.float32)
    with pytest.raises(
        ModelError, match=r"1 tensor that a DINO Vision Transformer does not have: decoder\.weight"
    ):
        transformers_to_timm(theirs)
    del theirs["decoder.weight"]
    key = "encoder.layer.0.attention.attention.key.bias"
    theirs[key] = theirs[key][:7]
    with pytest.raises(ModelError, match=r"have different shapes: query \(48,\), key \(7,\), value \(48,\)"):
        transformers_to_timm(theirs)
    del theirs[key]
    with pytest.raises(
        ModelError, match=r"blocks\.0\.attn\.qkv\.bias cannot be joined: \['key'\] is missing"
    ):
        transformers_to_timm(theirs)


def test_dinov2_names_as_timm_converts_them() -> None:
    """With registers and SwiGLU; timm's own conversion is the truth."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    rng = np.random.default_rng(0)
    shapes = {
        "cls_token": (1, 1, 4),
        "pos_embed": (1, 5, 4),
        "register_tokens": (1, 2, 4),
        "mask_token": (1, 4),
        "blocks.0.mlp.w12.weight": (6, 4),
        "blocks.0.mlp.w3.bias": (4,),
        "norm.weight": (4,),
    }
    theirs = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        embed_dim=4,
        num_heads=1,
        depth=1,
        reg_tokens=2,
        no_embed_class=True,
    )
    truth = checkpoint_filter_fn(tensors(theirs), module)
    found = dinov2_to_timm(theirs)
    assert found.keys() == truth.keys()
    for name, tensor in truth.items():
        np.testing.assert_array_equal(found[name], tensor.numpy(), err_msg=name)
    assert dinov2_to_timm(found).keys() == found.keys()


# -- .pth


def full_checkpoint() -> dict[str, Any]:
    """As main_dino.py saves it: students are wrapped for distributed training, teachers are not."""
    student = {f"module.backbone.{name}": t for name, t in tensors(random_weights(seed=1)).items()}
    teacher = {f"backbone.{name}": t for name, t in tensors(random_weights(seed=2)).items()}
    student["module.head.mlp.0.weight"] = torch.zeros(2, 48)
    teacher["head.last_layer.weight_g"] = torch.ones(5, 1)
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.linspace(0, 1, 5)[2]  # cosine_scheduler gives numpy's numbers
    return {
        "student": student,
        "teacher": teacher,
        "optimizer": optimizer.state_dict(),
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=8, lr=5e-4, output_dir=".", use_fp16=True),
        "dino_loss": {"center": torch.zeros(1, 5)},
        "fp16_scaler": {"scale": 65536.0, "growth_factor": 2.0},
    }


def test_backbone_only(tmp_path: Path) -> None:
    torch.save(tensors(random_weights()), tmp_path / "b.pth")
    assert_same(read_pth(tmp_path / "b.pth"), random_weights())
    assert_same(read_pth(tmp_path / "b.pth", part="backbone"), random_weights())
    with pytest.raises(ModelError, match="has no teacher; it has a backbone only"):
        read_pth(tmp_path / "b.pth", part="teacher")


def test_full_checkpoint(tmp_path: Path) -> None:
    torch.save(full_checkpoint(), tmp_path / "c.pth")
    assert_same(read_pth(tmp_path / "c.pth"), random_weights(seed=2))
    assert_same(read_pth(tmp_path / "c.pth", part="teacher"), random_weights(seed=2))
    assert_same(read_pth(tmp_path / "c.pth", part="student"), random_weights(seed=1))
    with pytest.raises(ModelError, match=r"full checkpoint with \['teacher', 'student'\]; choose one"):
        read_pth(tmp_path / "c.pth", part="backbone")


def test_full_checkpoint_of_the_days_of_numpy_1(tmp_path: Path) -> None:
    torch.save(full_checkpoint(), tmp_path / "new.pth")
    with zipfile.ZipFile(tmp_path / "new.pth") as new, zipfile.ZipFile(tmp_path / "old.pth", "w") as old:
        for name in new.namelist():
            data = new.read(name)
            if name.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in data or b"numpy.core.multiarray" in data
                data = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            old.writestr(name, data)
    assert_same(read_pth(tmp_path / "old.pth"), random_weights(seed=2))


def test_full_checkpoint_of_dinov2(tmp_path: Path) -> None:
    """Two heads, a mask token, and blocks in chunks, each of which counts on from those before it."""
    weights = random_weights(seed=2)
    teacher = {f"backbone.{name}": tensor for name, tensor in tensors(weights).items()}
    for name in [name for name in teacher if ".blocks." in name]:
        chunk = name.replace("blocks.0.", "blocks.0.0.").replace("blocks.1.", "blocks.1.1.")
        teacher[chunk] = teacher.pop(name)
    heads = {f"{head}_head.mlp.0.weight": torch.zeros(2, 48) for head in ("dino", "ibot")}
    mask = {"backbone.mask_token": torch.zeros(1, 48)}
    torch.save({"teacher": teacher | heads | mask}, tmp_path / "c.pth")
    assert_same(read_pth(tmp_path / "c.pth"), weights)
    teacher["backbone.blocks.1.0.norm1.bias"] = torch.zeros(48)
    torch.save({"teacher": teacher}, tmp_path / "c.pth")
    with pytest.raises(ModelError, match=r"c\.pth: two entries are both blocks\.0\.norm1\.bias"):
        read_pth(tmp_path / "c.pth")


@pytest.mark.parametrize("container", ["state_dict", "model"])
def test_a_state_dict_in_a_container(tmp_path: Path, container: str) -> None:
    torch.save({container: tensors(random_weights()), "epoch": 3}, tmp_path / "c.pth")
    assert_same(read_pth(tmp_path / "c.pth"), random_weights())


@pytest.mark.parametrize("prefix", ["backbone.", "module.backbone."])
def test_prefixes_in_safetensors(tmp_path: Path, prefix: str) -> None:
    weights = random_weights(VitArchitecture(64, 2, 1, 8, (32, 32)))
    head = {f"{prefix.removesuffix('backbone.')}head.mlp.0.weight": np.zeros((2, 64), np.float32)}
    write_safetensors(
        tmp_path / "b.safetensors", {f"{prefix}{name}": array for name, array in weights.items()} | head
    )
    load = locate(tmp_path / "b.safetensors").load_weights
    assert load is not None
    assert_same(load(), weights)


def test_keys_are_strict(tmp_path: Path) -> None:
    checkpoint = full_checkpoint()
    checkpoint["teacher"]["backbone.blocks.0.novelty"] = torch.zeros(1)
    del checkpoint["teacher"]["backbone.norm.bias"]
    torch.save(checkpoint, tmp_path / "c.pth")
    with pytest.raises(ModelError) as caught:
        read_pth(tmp_path / "c.pth")
    assert "lacks 1 tensor: norm.bias" in str(caught.value)
    assert "has 1 unexpected tensor: blocks.0.novelty" in str(caught.value)
    assert "keys of the projection head that were set aside: 1" in str(caught.value)


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(3, 3)}, tmp_path / "r.pth")
    with pytest.raises(ModelError, match=r"not a DINO Vision Transformer: .*It holds 1 entry: conv1\.weight"):
        read_pth(tmp_path / "r.pth")
    torch.save([1, 2], tmp_path / "l.pth")
    with pytest.raises(ModelError, match="contains a list"):
        read_pth(tmp_path / "l.pth")
    torch.save({"epoch": 3}, tmp_path / "e.pth")
    with pytest.raises(ModelError, match=r"e\.pth: the entry 'epoch' is a int"):
        read_pth(tmp_path / "e.pth")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(1, 1, 3, dtype=torch.int8),
        torch.zeros(1, 1, 3, dtype=torch.complex64),
        torch.zeros(1, 1, 3, device="meta"),
    ],
)
def test_tensors_that_are_not_plain_floats(tmp_path: Path, tensor: torch.Tensor) -> None:
    torch.save({"cls_token": tensor}, tmp_path / "x.pth")
    with pytest.raises(
        ModelError, match=r"x\.pth: the entry 'cls_token' is a tensor of .*expected floating-point"
    ):
        read_pth(tmp_path / "x.pth")


class Malicious:
    """Pickled, it asks for a function to be called on opening."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (print, ("code has been run",))


def test_code_in_a_file_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"student": Malicious()}, tmp_path / "evil.pth")
    with pytest.raises(ModelError, match="cannot be opened as weights only") as caught:
        read_pth(tmp_path / "evil.pth")
    assert str(caught.value).isprintable()  # torch says it in bold
    assert re.search(r"GLOBAL (builtins\.)?print was not an allowed global", str(caught.value))
    assert "False" not in str(caught.value)  # torch's advice to allow any code
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(ModelError, match="cannot be opened as weights only"):
        read_pth(tmp_path / "plain.pth")
    assert "code has been run" not in capsys.readouterr().out


def test_damaged_and_missing(tmp_path: Path) -> None:
    (tmp_path / "d.pth").write_bytes(b"PK\x03\x04 but no archive")
    with pytest.raises(ModelError, match="cannot be opened as weights only"):
        read_pth(tmp_path / "d.pth")
    with pytest.raises(ModelError, match="does not exist"):
        read_pth(tmp_path / "nowhere.pth")
    with pytest.raises(UsageError, match="part='both' is not known"):
        read_pth(tmp_path / "d.pth", part="both")


def test_without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingExtraError, match=r"reading b\.pth needs torch.*dinokit\[train\]"):
        read_pth(tmp_path / "b.pth")


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b'{"a": {"dtype": "F32", "shape": [1e999], "data_offsets": [0, 4]}}']
)
def test_a_header_made_to_break_readers_is_an_error_in_words(tmp_path: Path, header: bytes) -> None:
    file = tmp_path / "m.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ModelError, match="is not a safetensors file"):
        safetensors_shapes(file)
    (tmp_path / "config.json").write_bytes(header)
    with pytest.raises(ModelError):
        locate(tmp_path)
