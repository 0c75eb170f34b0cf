"""The model folder: what is written comes back, and what is wrong is named, all of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_models import SMALL, config_for, random_weights

from dinokit.errors import ModelError
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig, timm_arguments
from dinokit.model_folder.contract import contract
from dinokit.model_folder.folder import (
    find_model_folder,
    is_model_folder,
    read_model_folder,
    write_model_folder,
)
from dinokit.model_folder.weights import read_safetensors, safetensors_shapes, write_safetensors

FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", "timm.safetensors"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    write_model_folder(path, config_for(), random_weights())
    return path


def edit(file: Path, **changes: Any) -> None:
    """Sets keys of a JSON file; dots go into sections, None removes."""
    values = json.loads(file.read_text())
    for dotted, value in changes.items():
        *sections, key = dotted.split("__")
        place = values
        for section in sections:
            place = place[section]
        if value is None:
            del place[key]
        else:
            place[key] = value
    file.write_text(json.dumps(values))


# -- there and back


def test_a_training_run_is_found_by_its_model(path: Path) -> None:
    assert find_model_folder(path) == path
    assert find_model_folder(str(path.parent)) == path
    assert find_model_folder(path.parent.parent) is None
    assert find_model_folder(path / "config.json") is None


def test_an_empty_folder_is_filled_and_stays_itself(tmp_path: Path) -> None:
    there = tmp_path.stat().st_ino
    write_model_folder(tmp_path, config_for(), random_weights())
    assert tmp_path.stat().st_ino == there
    assert {file.name for file in tmp_path.iterdir()} == FILES


def test_round_trip(path: Path) -> None:
    folder = read_model_folder(path)
    assert folder.config == config_for()
    assert {item.name for item in path.iterdir()} == FILES
    weights = folder.load_weights()
    assert weights.keys() == random_weights().keys()
    for name, array in random_weights().items():
        np.testing.assert_array_equal(weights[name], array)
        assert weights[name].dtype == np.float32


@pytest.mark.parametrize("name", sorted(ZOO))
def test_every_known_config_comes_back(name: str) -> None:
    config = ZOO[name].config
    assert BackboneConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_only_a_dino_v1_vit_says_it_is_transformers() -> None:
    assert config_for().to_json()["model_type"] == "dinov2"
    assert "model_type" not in ZOO["dinov2_vits14"].config.to_json()
    # transformers' MLP ratio is an int, its position embedding square
    odd_ratio = replace(SMALL, mlp_ratio=2.5)
    oblong = replace(SMALL, image_size=(32, 48))
    for vit in (odd_ratio, oblong):
        architecture, model_args = timm_arguments(vit)
        assert "model_type" not in BackboneConfig("x", vit, architecture, model_args).to_json()


def test_a_folder_without_a_twin_has_no_file_for_it(tmp_path: Path) -> None:
    vit = replace(SMALL, mlp_ratio=2.5)
    architecture, model_args = timm_arguments(vit)
    config = BackboneConfig("x", vit, architecture, model_args)
    write_model_folder(tmp_path / "m", config, random_weights(vit))
    assert not (tmp_path / "m" / "model.safetensors").exists()
    assert read_model_folder(tmp_path / "m").config == config


def test_num_classes_never_reaches_model_args() -> None:
    config = BackboneConfig("x", SMALL, "vit_tiny_patch16_224", {"num_classes": 0, "img_size": (32, 32)})
    assert config.model_args == {"img_size": [32, 32]}


def test_float16_storage(tmp_path: Path) -> None:
    full = write_model_folder(tmp_path / "full", config_for(), random_weights())
    half = write_model_folder(tmp_path / "half", config_for(), random_weights(), dtype="float16")
    sizes = [(folder.path / "timm.safetensors").stat().st_size for folder in (full, half)]
    assert sizes[1] < 0.6 * sizes[0]
    assert json.loads((half.path / "config.json").read_text())["dtype"] == "float32"
    for name, array in half.load_weights().items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, random_weights()[name].astype(np.float16).astype(np.float32))


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    weights = random_weights()
    weights["norm.bias"] = weights["norm.bias"] + 1e6
    with pytest.raises(ModelError, match=r"norm\.bias are not finite as float16; store them as float32"):
        write_model_folder(tmp_path / "m", config_for(), weights, dtype="float16")
    assert list(tmp_path.iterdir()) == []


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write_model_folder(tmp_path / "a", config_for(), random_weights())
    second = write_model_folder(tmp_path / "b", config_for(), random_weights())
    assert first.weights_sha256 == second.weights_sha256
    other = write_model_folder(tmp_path / "c", config_for(), random_weights(seed=1))
    assert other.weights_sha256 != first.weights_sha256


def test_contract_binds_pixels_and_weights(path: Path) -> None:
    folder = read_model_folder(path)
    says = contract(folder.config, folder.weights_sha256)
    assert set(says) == {
        "format_version",
        "name",
        "preprocessing",
        "architecture",
        "weights_sha256",
        "licence",
        "written_by",
        "precision",
        "target",
    }
    assert VitArchitecture.from_json(json.loads(json.dumps(says))["architecture"]) == SMALL


def test_the_card_has_metadata_the_hub_reads(path: Path) -> None:
    from huggingface_hub import ModelCard

    card = ModelCard((path / "README.md").read_text(encoding="utf-8"))
    assert card.data.library_name == "timm"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "image-feature-extraction"


# -- writing again


def test_writing_again_replaces_the_model_and_keeps_the_rest(path: Path) -> None:
    (path / "onnx").mkdir()
    (path / "onnx" / "model.onnx").write_bytes(b"of the old weights")
    (path / "notes.txt").write_text("mine")
    old = (path / "README.md").read_text(encoding="utf-8")
    folder = write_model_folder(path, config_for(name="second"), random_weights(seed=1))
    assert folder.onnx_path is None
    assert not (path / "onnx").exists()
    assert (path / "notes.txt").read_text() == "mine"
    renamed = old.replace("# small", "# second").replace("user/small", "user/second")
    assert (path / "README.md").read_text(encoding="utf-8") == renamed
    assert read_model_folder(path) == folder
    assert [item.name for item in path.parent.iterdir()] == ["model"]


def test_an_edited_card_stays(path: Path) -> None:
    (path / "README.md").write_text("# My words\n")
    write_model_folder(path, config_for(name="second"), random_weights(), card="# Made up\n")
    assert (path / "README.md").read_text() == "# My words\n"
    write_model_folder(path, config_for(name="third"), random_weights())
    assert (path / "README.md").read_text() == "# My words\n"


def test_a_given_card_is_written_and_replaced(tmp_path: Path) -> None:
    write_model_folder(tmp_path / "m", config_for(), random_weights(), card="# One\n")
    assert (tmp_path / "m" / "README.md").read_text() == "# One\n"
    write_model_folder(tmp_path / "m", config_for(), random_weights(), card="# Two\n")
    assert (tmp_path / "m" / "README.md").read_text() == "# Two\n"


def test_a_failure_leaves_the_old_folder_whole(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_model_folder(path)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dinokit.model_folder.folder.write_safetensors", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_model_folder(path, config_for(name="second"), random_weights(seed=1))
    assert read_model_folder(path) == before
    assert [item.name for item in path.parent.iterdir()] == ["model"]


def test_a_failing_swap_puts_the_old_folder_back(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = read_model_folder(path)
    real = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if ".new-" in self.name:
            raise OSError(16, "Device or resource busy")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="busy"):
        write_model_folder(path, config_for(name="second"), random_weights(seed=1))
    monkeypatch.undo()
    assert read_model_folder(path) == before
    assert [item.name for item in path.parent.iterdir()] == ["model"]


def test_somebody_elses_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(ModelError, match="exists and is not a model folder"):
        write_model_folder(tmp_path, config_for(), random_weights())
    assert [item.name for item in tmp_path.iterdir()] == ["photo.jpg"]


def test_wrong_weights_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    weights = random_weights()
    del weights["norm.weight"]
    weights["head.weight"] = np.zeros((2, 48), np.float32)
    with pytest.raises(ModelError, match=r"lacks 1 tensor: norm\.weight; .*unexpected tensor: head\.weight"):
        write_model_folder(tmp_path / "m", config_for(), weights)
    assert list(tmp_path.iterdir()) == []


# -- reading


def test_everything_missing_is_named(path: Path) -> None:
    for name in ("timm.safetensors", "model.safetensors", "preprocessor_config.json"):
        (path / name).unlink()
    with pytest.raises(ModelError) as caught:
        read_model_folder(path)
    for name in ("timm.safetensors", "model.safetensors", "preprocessor_config.json"):
        assert f"{name} is missing" in str(caught.value)


def test_a_fetched_folder_may_lack_the_weights_for_transformers(path: Path) -> None:
    (path / "model.safetensors").unlink()
    read_model_folder(path, whole=False)
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        read_model_folder(path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a folder"):
        read_model_folder(tmp_path / "nowhere")


def test_tensors_are_held_against_the_architecture(path: Path) -> None:
    weights = random_weights()
    weights["extra"] = np.zeros(3, np.float32)
    weights["norm.bias"] = np.zeros(7, np.float32)
    del weights["pos_embed"]
    write_safetensors(path / "timm.safetensors", weights)
    theirs = read_safetensors(path / "model.safetensors")
    del theirs["layernorm.weight"]
    write_safetensors(path / "model.safetensors", theirs)
    with pytest.raises(ModelError) as caught:
        read_model_folder(path)
    for part in (
        "timm.safetensors lacks 1 tensor: pos_embed",
        "timm.safetensors has 1 unexpected tensor: extra",
        "norm.bias is (7,), expected (48,)",
        "model.safetensors lacks 1 tensor: layernorm.weight",
    ):
        assert part in str(caught.value)


def test_a_file_cut_short(path: Path) -> None:
    file = path / "timm.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ModelError, match="truncated or damaged"):
        read_model_folder(path)
    file.write_bytes(b"")
    with pytest.raises(ModelError, match="is not a safetensors file"):
        read_model_folder(path)


def test_a_newer_format_is_refused(path: Path) -> None:
    edit(path / "config.json", dinokit__format_version=2, dinokit__written_by="dinokit 9.0")
    with pytest.raises(
        ModelError, match=r"format_version 2 \(dinokit 9\.0\).*reads up to 1\. Update dinokit"
    ):
        read_model_folder(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dinokit": None}, 'no section "dinokit"'),
        ({"dinokit__format_version": "1"}, "format_version='1' is not a valid format number"),
        ({"dinokit__licence": None, "model_args": None}, r"dinokit\.licence, model_args missing"),
        ({"dinokit__backbone": "a\x1b[31m"}, r"dinokit\.backbone is .* expected one line of text"),
        ({"dinokit__source": "a\u2028b"}, r"dinokit\.source is .* expected one line of text"),
        ({"dinokit__architecture__depth": None}, "the architecture is incomplete"),
        ({"dinokit__architecture__novelty": 1}, r"unknown keys \['novelty'\]"),
        ({"dinokit__preprocessing__novelty": 1}, r"unknown keys \['novelty'\]"),
        (
            {"dinokit__architecture__pos_embed_resize__antialias": []},
            r"pos_embed_resize of the architecture is damaged: antialias is \[\], expected bool",
        ),
        ({"dinokit__architecture__depth": "2"}, "the architecture is damaged: depth is '2', expected int"),
        ({"dinokit__architecture__num_heads": True}, "num_heads is True, expected int"),
        ({"dinokit__architecture__image_size": [32]}, r"image_size is \[32\], expected tuple\[int, int\]"),
        ({"dinokit__architecture__mlp_ratio": float("nan")}, "mlp_ratio is nan, expected float"),
        ({"dinokit__architecture__num_heads": 0}, "sizes of the architecture are invalid: num_heads=0"),
        ({"dinokit__architecture__depth": 10**9}, "invalid: depth=1000000000"),
        ({"dinokit__architecture__depth": 10**4}, r"invalid: .*depth=10000"),
        ({"dinokit__preprocessing__crop_px": 1}, "the preprocessing is damaged: crop_px is 1, expected"),
        ({"dinokit__preprocessing__std": [0.2, 0.2, -0.2]}, "each std must be above 0"),
        ({"model_args__num_heads": 1}, r"model_args\.num_heads is 1, expected 3"),
        ({"hidden_size": 64}, "hidden_size is 64, expected 48"),
        ({"model_type": "vit"}, "model_type is 'vit', expected 'dinov2'"),
        ({"dinokit__patch_size": 16}, r"dinokit\.patch_size is 16, expected 8"),
        ({"pretrained_cfg__crop_pct": 0.9}, r"pretrained_cfg\.crop_pct is 0\.9"),
        ({"pretrained_cfg__hf_hub_filename": None}, r"hf_hub_filename is None, expected 'timm\.bin'"),
    ],
)
def test_a_config_that_cannot_be_trusted(path: Path, changes: dict[str, Any], message: str) -> None:
    edit(path / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        read_model_folder(path)


def test_config_that_is_not_json(path: Path) -> None:
    (path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json is not readable JSON"):
        read_model_folder(path)
    (path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"config\.json contains a list"):
        read_model_folder(path)


def test_another_preprocessing_for_transformers_is_refused(path: Path) -> None:
    edit(path / "preprocessor_config.json", resample=2, size__shortest_edge=40)
    with pytest.raises(ModelError, match=r"preprocessor_config\.json disagrees .* in size, resample"):
        read_model_folder(path)


def test_keys_that_dinokit_does_not_know_may_be_added(path: Path) -> None:
    edit(path / "config.json", mine="hello", pretrained_cfg__tag="mine")
    assert read_model_folder(path).config == config_for()


def test_is_model_folder(path: Path, tmp_path: Path) -> None:
    assert is_model_folder(path)
    assert not is_model_folder(tmp_path)


def test_header_alone_gives_the_shapes(path: Path) -> None:
    shapes = safetensors_shapes(path / "timm.safetensors")
    assert shapes == {name: array.shape for name, array in random_weights().items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_ratio": 10**400}, "mlp_ratio is 1000"),
        ({"mlp_ratio": -4.0}, "mlp_ratio=-4.0 is invalid"),
        ({"mlp_ratio": 1e300}, r"mlp_ratio=1e\+300 is invalid"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0 is invalid"),
        ({"pos_embed_resize": {"offset": 5.0}}, "offset=5.0 is invalid"),
        ({"pos_embed_resize": {"offset": -0.1}}, "offset=-0.1 is invalid"),
    ],
)
def test_impossible_numbers_of_an_architecture(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        VitArchitecture.from_json({**SMALL.to_json(), **changes})


def test_a_folder_that_names_its_safetensors_file_for_timm_still_loads(path: Path) -> None:
    """The first folders do; timm before 1.0.29 cannot load them from the Hub."""
    config = json.loads((path / "config.json").read_text())
    assert config["pretrained_cfg"]["hf_hub_filename"] == "timm.bin"  # of which timm loads timm.safetensors
    edit(path / "config.json", pretrained_cfg__hf_hub_filename="timm.safetensors")
    assert read_model_folder(path).config.name == config["dinokit"]["backbone"]
