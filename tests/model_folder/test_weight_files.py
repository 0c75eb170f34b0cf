"""Weights in several safetensors files, as transformers and the Hub cut large models."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")

from hub_server import HubServer
from small_generations import transformers_model
from small_models import picture

from dinokit import load_backbone
from dinokit.errors import ModelError
from dinokit.model_folder.weight_files import WeightFiles, find_weight_files
from dinokit.model_folder.weights import read_safetensors

INDEX = "model.safetensors.index.json"
PROCESSOR = {
    "size": {"height": 32, "width": 32},
    "resample": 2,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same DINOv3 saved by transformers in one file, ``whole``, and in several, ``parts``; read only."""
    there = tmp_path_factory.mktemp("saved")
    model = transformers_model("dinov3")
    model.save_pretrained(there / "whole")
    model.save_pretrained(there / "parts", max_shard_size="70KB")
    for name in ("whole", "parts"):
        (there / name / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return there


@pytest.fixture
def parts(folders: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(folders / "parts", tmp_path / "parts"))


def files_of(folder: Path) -> WeightFiles | None:
    return find_weight_files(
        "model.safetensors", lambda name: folder / name if (folder / name).is_file() else None, "it"
    )


def test_several_files_are_the_same_network(folders: Path) -> None:
    shards = sorted(path.name for path in (folders / "parts").glob("*.safetensors"))
    assert len(shards) > 2 and not (folders / "parts" / "model.safetensors").exists()
    whole, cut = (load_backbone(folders / name, device="cpu") for name in ("whole", "parts"))
    np.testing.assert_array_equal(whole.embed(picture()), cut.embed(picture()))
    one = read_safetensors(folders / "whole" / "model.safetensors")
    files = files_of(folders / "parts")
    assert files is not None and list(files.parts) == shards
    together = files.read()
    assert one.keys() == together.keys()
    for name, array in one.items():
        np.testing.assert_array_equal(together[name], array)


def test_the_checksum_is_the_one_of_sha256sum(folders: Path) -> None:
    files = files_of(folders / "parts")
    assert files is not None
    done = subprocess.run(
        "sha256sum model-*.safetensors | sha256sum",
        shell=True,
        cwd=folders / "parts",
        capture_output=True,
        text=True,
    )
    if done.returncode or not done.stdout:
        pytest.skip("no sha256sum here")
    assert files.sha256() == done.stdout.split()[0]
    assert load_backbone(folders / "parts", device="cpu").weights_sha256 == files.sha256()
    whole = files_of(folders / "whole")
    assert whole is not None
    content = (folders / "whole" / "model.safetensors").read_bytes()
    assert whole.sha256() == hashlib.sha256(content).hexdigest()


def test_the_index_alone(tmp_path: Path) -> None:
    """Width 64, so that the number of heads follows from it."""
    import transformers
    from small_generations import lively

    config = transformers.DINOv3ViTConfig(
        hidden_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=128,
        num_register_tokens=4,
    )
    lively(transformers.DINOv3ViTModel(config)).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / INDEX).is_file()
    backbone = load_backbone(tmp_path / INDEX, device="cpu")
    assert backbone.name == "model" and backbone.embed_dim == 64


def test_neither() -> None:
    assert find_weight_files("model.safetensors", lambda name: None, "it") is None


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def test_a_missing_file_is_named(parts: Path) -> None:
    gone = sorted(parts.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(ModelError, match=rf"lacks 1 of the \d files that {INDEX} lists: {gone.name}; fetch"):
        load_backbone(parts)


def test_a_damaged_file(parts: Path) -> None:
    part = sorted(parts.glob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(ModelError, match=rf"{part.name} is not a complete safetensors file"):
        load_backbone(parts)


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", 3, None]
)
def test_an_index_that_points_elsewhere(parts: Path, name: object) -> None:
    rewrite(parts / INDEX, lambda values: values["weight_map"].update(norm_weight=name))
    with pytest.raises(ModelError, match=r"expected names of \.safetensors files beside it"):
        load_backbone(parts)


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": [1]}', "null", "\xff"]
)
def test_an_index_that_is_none(parts: Path, content: str) -> None:
    (parts / INDEX).write_text(content, encoding="latin-1")
    with pytest.raises(ModelError, match="is not an index of safetensors files"):
        load_backbone(parts)


def test_files_that_disagree_with_the_index(parts: Path) -> None:
    table = json.loads((parts / INDEX).read_text())["weight_map"]
    tensor, first = next(iter(table.items()))
    other = next(file for file in table.values() if file != first)
    rewrite(parts / INDEX, lambda values: values["weight_map"].update({tensor: other}))
    with pytest.raises(ModelError, match=rf"does not match {INDEX}: it (has beyond it|lacks) "):
        load_backbone(parts)


LOAD = """
import sys
sys.modules["torch"] = None
from dinokit import load_backbone
from PIL import Image
print(load_backbone("me/large", device="cpu").embed(Image.open(sys.argv[1]))[:4].tolist())
"""


def test_from_the_hub(folders: Path, tmp_path: Path) -> None:
    picture().save(tmp_path / "p.png")
    with HubServer() as hub:
        hub.add("me/large", folders / "parts")
        done = subprocess.run(
            [sys.executable, "-c", LOAD, str(tmp_path / "p.png")],
            env=hub.environment(tmp_path / "cache", DINOKIT_ACCEPT_DINOV3_LICENSE="1"),
            capture_output=True,
            text=True,
        )
    assert done.returncode == 0, done.stderr
    right = load_backbone(folders / "whole", device="cpu").embed(tmp_path / "p.png")
    np.testing.assert_allclose(json.loads(done.stdout), right[:4], rtol=1e-6)
