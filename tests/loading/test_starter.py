"""The bundled model: whole, small, the same on both engines, and as good as its card says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dinokit import load_backbone
from dinokit.loading.locate import starter_path
from dinokit.model_folder.folder import read_model_folder

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "knn_starter.json"


def test_the_folder_is_whole_and_small() -> None:
    folder = read_model_folder(starter_path())
    assert folder.config.name == "starter"
    assert sum(file.stat().st_size for file in starter_path().rglob("*")) <= 25 * 10**6
    from safetensors import safe_open

    for name in ("timm.safetensors", "model.safetensors"):
        with safe_open(starter_path() / name, "numpy") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"F16"}  # noqa: SIM118


def test_both_engines_agree_on_the_example_photographs(photos: Path) -> None:
    pytest.importorskip("torch")
    onnx, torch = load_backbone(engine="onnx", device="cpu"), load_backbone(engine="torch", device="cpu")
    np.testing.assert_allclose(onnx.embed(photos), torch.embed(photos), atol=1e-4)
    np.testing.assert_allclose(onnx.attention(photos), torch.attention(photos), atol=1e-5)


def test_it_works_at_other_sizes(photos: Path) -> None:
    wide = load_backbone(image_size=(96, 192))
    maps = wide.attention(photos / "coffee.jpg")
    assert maps.shape == (3, 6, 12) and np.isfinite(maps).all() and (maps.sum(axis=(1, 2)) <= 1 + 1e-5).all()


def test_different_photographs_have_different_embeddings(photos: Path) -> None:
    vectors = load_backbone().embed(photos)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (unit @ unit.T)[~np.eye(len(unit), dtype=bool)].max() < 0.99


@pytest.mark.parametrize("file", sorted(RESULTS.parent.glob("*.json")), ids=lambda file: file.name)
def test_results_are_those_of_the_bundled_weights(file: Path) -> None:
    measured = json.loads(file.read_text(encoding="utf-8"))
    sha256 = load_backbone().weights_sha256
    assert measured.get("weights_sha256", sha256) == sha256
    assert measured["command"].startswith(("python benchmarks/", "OMP_NUM_THREADS=1 python benchmarks/"))


def test_the_card_says_what_the_benchmark_measured() -> None:
    measured = json.loads(RESULTS.read_text())
    assert measured["weights_sha256"] == read_model_folder(starter_path()).weights_sha256
    card = (starter_path() / "README.md").read_text()
    for line in measured["results"]:
        row = rf"\| {line['set']} .*\b{line['top1']:.1f} %"
        assert re.search(row, card), f"the card lacks {line}"


def test_first_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "first_steps.py"), "-o", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "chelsea" in done.stdout and len(list(tmp_path.glob("*.png"))) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["clothing", "imagenette224"])
def test_quality_is_kept(shared_data: Path, tmp_path: Path, name: str) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "knn.py"),
        "--data",
        str(shared_data),
        "--sets",
        name,
    ]
    output = tmp_path / "knn.json"
    subprocess.run([*command, "--model-only", "-o", str(output)], check=True)
    (now,) = json.loads(output.read_text())["results"]
    (then,) = (
        r for r in json.loads(RESULTS.read_text())["results"] if r["set"] == name and r["features"] == "model"
    )
    assert now["top1"] == pytest.approx(then["top1"], abs=0.5)
