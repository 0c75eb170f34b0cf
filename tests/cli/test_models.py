"""`dinokit models` and `dinokit info`: what they print, whole, and their exit codes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from small_models import config_for, random_weights

from dinokit.cli import cli
from dinokit.loading.zoo import ZOO
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import METADATA_KEY, contract
from dinokit.model_folder.folder import ModelFolder, write_model_folder
from dinokit.model_folder.weights import write_safetensors
from dinokit.vit_graph import build_vit_graph


@pytest.fixture
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelFolder:
    """A small folder in place of the bundled one, and an empty cache of the Hub."""
    folder = write_model_folder(tmp_path / "starter", config_for(name="starter"), random_weights())
    monkeypatch.setattr("dinokit.loading.locate.starter_path", lambda: folder.path)
    monkeypatch.setattr("dinokit.loading.hub.cached_file", lambda repo, filename: None)
    return folder


def run(*args: str) -> Result:
    return CliRunner().invoke(cli, args, prog_name="dinokit")


def test_models_as_a_table(starter: ModelFolder) -> None:
    result = run("models")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["name", "dim", "patch", "params", "MB", "k-NN", "licence", "engines", "here"]
    assert lines[1] == [
        "starter",
        "48",
        "8",
        "0.1",
        "M",
        "0",
        "–",
        "apache-2.0",
        "onnx",
        "or",
        "torch",
        "bundled",
    ]
    assert lines[2] == [
        "dino_vits16",
        "384",
        "16",
        "21.7",
        "M",
        "87",
        "74.5",
        "apache-2.0",
        "onnx",
        "or",
        "torch",
        "download",
    ]
    assert [line[0] for line in lines[2 : 2 + len(ZOO)]] == list(ZOO)
    assert "dinokit info dinov3_vits16" in result.stdout
    assert result.stderr == ""


def test_models_plain_and_json(starter: ModelFolder) -> None:
    assert run("models", "--plain").stdout.splitlines() == ["starter", *ZOO]
    both = run("models", "--plain", "--json")
    assert both.exit_code == 2 and not both.stdout and "give only one" in both.stderr
    rows = json.loads(run("models", "--json").stdout)
    assert [row["name"] for row in rows] == ["starter", *ZOO]
    by_name = {row["name"]: row for row in rows}
    assert by_name["starter"]["params"] == sum(array.size for array in random_weights().values())
    assert by_name["dinov2_vitb14_reg"] == {
        "name": "dinov2_vitb14_reg",
        "repo": "timm/vit_base_patch14_reg4_dinov2.lvd142m",
        "embed_dim": 768,
        "patch_size": 14,
        "params": 86_582_016,
        "size_mb": 346.3,
        "knn_top1_imagenet": 82.0,
        "knn_source": "facebookresearch/dinov2, README",
        "licence": "apache-2.0",
        "engines": list(ZOO["dinov2_vitb14_reg"].engines),
        "here": "download",
    }


def test_models_in_the_cache(starter: ModelFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "dinokit.loading.hub.cached_file", lambda repo, filename: Path(repo) if "patch8" in repo else None
    )
    rows = json.loads(run("models", "--json").stdout)
    here = {row["name"] for row in rows if row["here"] == "in cache"}
    assert here == {"dino_vits8", "dino_vitb8"}


def test_models_without_a_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.loading.locate.starter_path", lambda: tmp_path / "gone")
    first = json.loads(run("models", "--json").stdout)[0]
    assert (first["name"], first["here"]) == ("starter", "missing")
    assert "install dinokit again" in first["problem"]
    assert run("models").exit_code == 0


def test_info_of_a_folder(starter: ModelFolder) -> None:
    result = run("info", str(starter.path))
    assert result.exit_code == 0, result.output
    facts = dict(line.split("  ", 1) for line in result.stdout.splitlines())
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    assert facts == {
        "name": "starter",
        "kind": "folder",
        "source": str(starter.path),
        "trained by": "a test",
        "architecture": "vit_tiny_patch16_224",
        "embed dim": "48",
        "depth": "2",
        "num heads": "3",
        "patch size": "8",
        "num register tokens": "0",
        "image size": "32, 32",
        "preprocessing": "resize px 37; crop px 32, 32; interpolation bicubic; mean 0.485, 0.456, 0.406; "
        "std 0.229, 0.224, 0.225",
        "licence": "apache-2.0",
        "engines": "onnx, torch",
        "weights sha256": starter.weights_sha256,
        "written by": starter.config.written_by,
    }


def test_info_describes_the_starter_when_nothing_is_named(starter: ModelFolder) -> None:
    facts = json.loads(run("info", "--json").stdout)
    assert (facts["kind"], facts["source"]) == ("bundled", "starter")
    assert facts["preprocessing"] == starter.config.preprocessing.to_json()


def test_info_of_an_onnx_file(starter: ModelFolder, tmp_path: Path) -> None:
    says = json.dumps(contract(starter.config, starter.weights_sha256))
    graph = build_vit_graph(starter.config.vit, random_weights(), metadata={METADATA_KEY: says})
    (tmp_path / "m.onnx").write_bytes(graph.SerializeToString())
    facts = json.loads(run("info", str(tmp_path / "m.onnx"), "--json").stdout)
    assert facts["engines"] == ["onnx"]
    assert facts["weights_sha256"] == starter.weights_sha256
    assert facts["embed_dim"] == 48
    assert facts["written_by"] == starter.config.written_by
    assert "trained_by" not in facts  # nothing beyond the source


def test_info_of_what_dinokit_did_not_write(starter: ModelFolder, tmp_path: Path) -> None:
    wide = VitArchitecture(embed_dim=64, depth=1, num_heads=1, patch_size=8, image_size=(32, 32))
    write_safetensors(tmp_path / "timm.safetensors", random_weights(wide))
    facts = json.loads(run("info", str(tmp_path / "timm.safetensors"), "--json").stdout)
    assert facts["kind"] == "weights"
    assert not {"trained_by", "written_by"} & set(facts)


def test_info_of_a_known_name_downloads_nothing(
    starter: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be fetched")

    monkeypatch.setattr("dinokit.loading.locate.hub_file", no_network)
    facts = json.loads(run("info", "dinov3_vitb16", "--json").stdout)
    assert facts["here"] == "not downloaded yet"
    assert facts["licence"] == "dinov3-license"
    assert "DINOKIT_ACCEPT_DINOV3_LICENSE=1" in facts["to_accept"]
    assert "74.5 % (facebookresearch/dino" in run("info", "dino_vits16").stdout


def test_info_errors_are_one_message(starter: ModelFolder) -> None:
    unknown = run("info", "dino_vits61")
    assert unknown.exit_code == 2
    assert unknown.stdout == ""
    assert unknown.stderr.startswith("Error: 'dino_vits61' is not a model")
    (starter.path / "timm.safetensors").unlink()
    broken = run("info", str(starter.path))
    assert broken.exit_code == 3
    assert (
        broken.stderr
        == f"Error: {starter.path} is not a complete model folder: timm.safetensors is missing\n"
    )


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_no_name_is_cut_in_a_narrow_window(
    starter: ModelFolder, monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("NO_COLOR", "1")
    done = run("models")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    lines = plain.splitlines()
    names = ["starter", *ZOO]
    assert [line.split()[0] for line in lines[1 : 1 + len(names)]] == names
    assert "…" not in plain
    assert all(len(line) <= width for line in lines[: 1 + len(names)])
    assert lines[0].split()[0] == "name" and lines[0].split()[-1] == "here"
    assert ("engines" in lines[0]) == (width == 200) == ("Not shown" not in plain)
