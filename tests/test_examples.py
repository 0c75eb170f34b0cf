"""Every script in examples/ runs as its header says, on the pictures in the tree, and prints what it promises."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from onnx_folder import add_onnx
from PIL import Image
from small_models import config_for, random_weights

from dinokit import LinearClassifier, load_backbone, load_classifier, read_embeddings
from dinokit.export import export_classifier
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.preprocess import Preprocessing

pytest.importorskip("onnxruntime")
EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = {"astronaut", "camera", "chelsea", "coffee", "rocket"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(script: str, *args: str | Path) -> str:
    """What the script prints. Warnings are errors, as in the tests."""
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / script, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) %", text)]


def test_the_readme_lists_the_scripts() -> None:
    listed = re.findall(r"\(([\w.]+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_first_steps() -> None:
    assert "cut-outs of 5 photographs are in out" in run("first_steps.py", "-o", "out")
    assert {path.stem for path in Path("out").glob("*.png")} == NAMES


def test_first_steps_with_a_photograph_that_lies_on_its_side() -> None:
    upright = Image.open(EXAMPLES / "photos" / "rocket.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name, image, tags in (("upright", upright, None), ("lying", upright.rotate(90, expand=True), exif)):
        Path(name).mkdir()
        image.save(f"{name}/a.png", exif=tags)
        run("first_steps.py", name, "-o", f"out-{name}")
    one, two = (np.asarray(Image.open(f"out-{name}/a.png")) for name in ("upright", "lying"))
    np.testing.assert_array_equal(one, two)


def test_crops() -> None:
    assert run("crops.py", "made", "--per-class", "2").split() == ["made/seen", "made/new"]
    assert {path.name for path in Path("made/new").iterdir()} == NAMES
    assert len(list(Path("made").rglob("*.jpg"))) == 2 * 5 * 2


def test_embed_a_folder(photos: Path) -> None:
    text = run("embed_a_folder.py", "-o", "mine.parquet")
    assert "5 of 5 embedded by starter, mine.parquet" in text and text.count("is most like") == 5
    table = read_embeddings("mine.parquet")
    np.testing.assert_allclose(table.embeddings, load_backbone("starter").embed(photos), atol=1e-5)
    Path("broken").mkdir()
    Path("broken/a.jpg").write_bytes(b"no picture")
    assert "0 of 1 embedded" in run("embed_a_folder.py", "broken", "-o", "broken.csv")


def test_label_by_examples() -> None:
    text = run("label_by_examples.py")
    assert "20 examples; judged by the others" in text
    lines = text.splitlines()[1:]
    assert len(lines) == 20 and {line.split()[1] for line in lines} <= {*NAMES, "?"}
    right = [line.split("/")[0] == line.split()[1] for line in lines]
    assert np.mean(right) > 0.4  # one in five would be chance


def test_search() -> None:
    text = run("search.py", "-k", "3")
    assert "most like 00.jpg among 30:" in text
    found = [line.split() for line in text.splitlines()[1:]]
    assert len(found) == 3 and all(path.startswith("rocket/") for _, path in found)
    assert [float(s) for s, _ in found] == sorted((float(s) for s, _ in found), reverse=True)


def test_find_duplicates() -> None:
    lines = run("find_duplicates.py").splitlines()
    assert lines[0] == "8 photographs, 2 groups of near-duplicates"
    assert lines[1] == "chelsea.jpg" and lines[4] == "rocket.jpg"  # to keep: whole, and least compressed
    others = {line.split()[1] for line in lines[2:4] + lines[5:]}
    assert others == {"chelsea-saved-again.jpg", "chelsea-small.jpg", "rocket-brighter.jpg"}


def test_attention_masks() -> None:
    text = run("attention_masks.py", "-o", "out", "--mass", "0.5")
    assert "10 pictures are in out" in text and text.count("holds 50 % of its attention in") == 5
    mask = np.asarray(Image.open("out/chelsea-mask.png"))
    assert mask.shape == (192, 192) and set(np.unique(mask)) == {0, 255}
    assert np.asarray(Image.open("out/chelsea-attention.png")).shape == (192, 192, 3)


def test_linear_probe() -> None:
    pytest.importorskip("sklearn")
    run("crops.py", "made", "--per-class", "4")
    text = run("linear_probe.py", "made/seen", "made/new")
    assert "20 to train on, 20 to test with, 5 classes" in text
    folds, linear, knn = percentages(text)
    assert folds > 50 and linear > 40 and knn > 40


def test_deploy_classifier() -> None:
    pytest.importorskip("sklearn")
    lines = run("deploy_classifier.py").splitlines()
    assert len(lines) == 20 and {line.split()[1] for line in lines} <= NAMES
    right = [line.split("/")[0] == line.split()[1] for line in lines]
    assert np.mean(right) > 0.4  # one in five would be chance


def test_deploy_classifier_agrees_with_dinokit(photos: Path) -> None:
    """Its own resize and crop are dinokit's, also of photographs that are not square."""
    pytest.importorskip("sklearn")
    run("crops.py", "made", "--per-class", "2")
    for target in ("embedder", "portable"):
        command = ["-m", "dinokit", "fit", "made/seen", "-C", "1", "-o", f"{target}.onnx", "--target", target]
        subprocess.run(
            [sys.executable, *command, "--no-estimate", "--overwrite"], check=True, capture_output=True
        )
    lines = [line.split() for line in run("deploy_classifier.py", "embedder.onnx", photos).splitlines()]
    loaded = load_classifier("portable.onnx")
    paths = [photos / line[0] for line in lines]
    assert len(paths) == 5 and [line[1] for line in lines] == loaded.predict(paths).tolist()
    shares = loaded.predict_proba(paths).max(axis=1)
    np.testing.assert_allclose([float(line[2]) for line in lines], shares, atol=0.0051)


def test_deploy_classifier_reads_pictures_as_dinokit_does(tmp_path: Path) -> None:
    """Grey of 16 bits, transparent pixels, one channel, and a file that is no picture between them."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Path("pictures").mkdir()
    Image.fromarray(levels).save("pictures/deep.png")
    clear = Image.fromarray(rng.integers(0, 256, (40, 60, 4), np.uint8))
    clear.save("pictures/clear.png")
    Path("pictures/bad.jpg").write_bytes(b"no picture")
    network = VitArchitecture(48, 2, 3, 8, (32, 32), in_chans=1)
    config = replace(config_for(network), preprocessing=Preprocessing(36, (32, 32), mean=(0.5,), std=(0.25,)))
    for name, model in (
        ("rgb", write_model_folder(tmp_path / "rgb", config_for(), random_weights())),
        ("grey", write_model_folder(tmp_path / "grey", config, random_weights(network))),
    ):
        backbone = load_backbone(model.path)
        vectors = rng.normal(size=(20, backbone.embed_dim))
        head = LinearClassifier(C=1.0).fit(vectors, ["a", "b"] * 10)
        export_classifier(model.path, head, f"{name}.onnx", target="embedder")
        done = subprocess.run(
            [sys.executable, "-W", "error", EXAMPLES / "deploy_classifier.py", f"{name}.onnx", "pictures"],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "bad.jpg cannot be read" in done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == ["clear.png", "deep.png"]
        shares = head.predict_proba(backbone.embed([f"pictures/{line[0]}" for line in lines])).max(axis=1)
        np.testing.assert_allclose([float(line[2]) for line in lines], shares, atol=0.03)


def test_fine_tune_torch() -> None:
    pytest.importorskip("timm")
    run("crops.py", "made", "--per-class", "4")
    text = run("fine_tune_torch.py", "made/seen", "made/new", "--steps", "3", "-o", "mine")
    before, after = percentages(text)
    assert before > 40 and after > 30
    first, last = (float(loss) for loss in re.findall(r"loss ([\d.]+)", text))
    assert last < first
    tuned = load_backbone("mine")  # without torch
    photo = EXAMPLES / "photos" / "coffee.jpg"
    assert tuned.name == "mine" and tuned.config.source == "fine-tuned from starter (bundled)"
    change = np.linalg.norm(tuned.embed(photo) - load_backbone("starter").embed(photo))
    assert 0.01 < change < 10


def test_deploy_ort_gpu(photos: Path) -> None:
    """On a machine without GPU; IO binding and the fused operators are the same there, a CUDA graph is not."""
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['timm'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = [str(EXAMPLES / "deploy_ort_gpu.py"), "-b", "3", "-n", "2"]
    command = [sys.executable, "-W", "error", "-c", without_torch, *script]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "5 vectors are in vectors.npy" in text and re.search(
        r"^\d+ images/s of \d+x\d+ pixels, 3 a", text, re.M
    )
    on_cpu = "fp32 on cpu: no usable GPU here" in text
    assert on_cpu or "fp16 on cuda" in text
    right = load_backbone("starter", device="cpu").embed(photos)
    np.testing.assert_allclose(np.load("vectors.npy"), right, atol=1e-4 if on_cpu else 0.05)


def test_deploy_ort_gpu_takes_an_exported_file(photos: Path) -> None:
    pytest.importorskip("timm")
    from dinokit.export import export_folder

    export_folder("starter", "out", target="ort-cuda", image_size=96)
    text = run("deploy_ort_gpu.py", "out/onnx/model_cuda_fp16_96x96.onnx", photos, "-n", "1", "-o", "v.npy")
    assert "fp16 on " in text and "images/s of 96x96 pixels" in text
    found, right = np.load("v.npy"), load_backbone("starter", device="cpu", image_size=96).embed(photos)
    cosines = (found * right).sum(1) / np.linalg.norm(found, axis=1) / np.linalg.norm(right, axis=1)
    assert 0.9999 < cosines.min() < 1


def test_deploy_ort_gpu_of_one_channel(photos: Path, tmp_path: Path) -> None:
    network = VitArchitecture(48, 2, 3, 8, (32, 32), in_chans=1)
    config = replace(config_for(network), preprocessing=Preprocessing(36, (32, 32), mean=(0.5,), std=(0.25,)))
    model = write_model_folder(tmp_path / "grey", config, random_weights(network))
    file = add_onnx(model)
    assert "5 vectors are in v.npy" in run("deploy_ort_gpu.py", file, photos, "-n", "1", "-o", "v.npy")
    right = load_backbone(model.path, device="cpu").embed(photos)
    np.testing.assert_allclose(np.load("v.npy"), right, atol=1e-4)


def test_serve_fastapi(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi", reason="FastAPI is not installed; pip install fastapi httpx")
    pytest.importorskip("httpx", reason="FastAPI's test client needs httpx; pip install httpx")
    from fastapi.testclient import TestClient

    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLES / "serve_fastapi.py")
    assert spec is not None and spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_fastapi", service)  # FastAPI looks up annotations there
    spec.loader.exec_module(service)
    client = TestClient(service.create_app())

    data = (photos / "rocket.jpg").read_bytes()
    answer = client.post("/photo", content=data, headers={"content-type": "image/jpeg"})
    assert answer.status_code == 200
    found = answer.json()
    assert found["label"] == "rocket" and 0.5 < found["probability"] <= 1 and found["model"] == "starter"
    np.testing.assert_allclose(found["vector"], load_backbone("starter").embed(data), atol=1e-5)
    refused = client.post("/photo", content=b"hello", headers={"content-type": "image/jpeg"})
    assert refused.status_code == 422 and "not a picture but text" in refused.json()["detail"]
    monkeypatch.setattr(service, "MOST_BYTES", 1000)
    assert client.post("/photo", content=data).status_code == 413
