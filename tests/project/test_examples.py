"""Every script in examples/ runs as its header says, on the pictures in the tree, and prints what it promises."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

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
EXAMPLES = Path(__file__).parents[2] / "examples"
NAMES = {"astronaut", "camera", "chelsea", "coffee", "rocket"}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def done(script: str, *args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs the script. Warnings are errors, as in the tests."""
    kept_by_torch = "ignore:Implicitly cleaning up:ResourceWarning"  # a folder of torch 2.6's own
    return subprocess.run(
        [sys.executable, "-W", "error", "-W", kept_by_torch, EXAMPLES / script, *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        timeout=300,
    )


def run(script: str, *args: str | Path) -> str:
    """What the script prints when it succeeds."""
    result = done(script, *args)
    assert result.returncode == 0, result.stderr
    return result.stdout


def refusal(script: str, *args: str | Path) -> str:
    """What the script prints when it refuses, which is not a traceback."""
    result = done(script, *args)
    assert result.returncode != 0 and "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture
def mixed(photos: Path) -> Path:
    """A folder with two photographs of the same name in subfolders, and an unreadable file between them."""
    for folder, name in (("a", "rocket.jpg"), ("c", "coffee.jpg")):
        Path("mixed", folder).mkdir(parents=True)
        shutil.copy(photos / name, f"mixed/{folder}/1.jpg")
    Path("mixed/b").mkdir()
    Path("mixed/b/1.jpg").write_bytes(b"no picture")
    return Path("mixed")


def percentages(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"([\d.]+) %", text)]


def test_the_readme_lists_the_scripts() -> None:
    listed = re.findall(r"\(([\w.]+\.py)\)", (EXAMPLES / "README.md").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


def test_first_steps() -> None:
    assert "cut-outs of 5 photographs are in out" in run("first_steps.py", "-o", "out")
    assert {path.stem for path in Path("out").glob("*.png")} == {
        f"{number:02}-{name}" for number, name in enumerate(sorted(NAMES), start=1)
    }


def test_first_steps_with_equal_names_and_an_unreadable_file(mixed: Path) -> None:
    text = run("first_steps.py", mixed, "-o", "out")
    assert "mixed/b/1.jpg" in text and "cut-outs of 2 photographs" in text
    assert sorted(path.name for path in Path("out").iterdir()) == ["01-1.png", "02-1.png"]
    assert "cut-outs of 1 photographs" in run("first_steps.py", mixed, "-n", "1", "-o", "first")


def test_first_steps_with_a_photograph_that_lies_on_its_side() -> None:
    upright = Image.open(EXAMPLES / "photos" / "rocket.jpg").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    for name, image, tags in (("upright", upright, None), ("lying", upright.rotate(90, expand=True), exif)):
        Path(name).mkdir()
        image.save(f"{name}/a.png", exif=tags)
        run("first_steps.py", name, "-o", f"out-{name}")
    one, two = (np.asarray(Image.open(f"out-{name}/01-a.png")) for name in ("upright", "lying"))
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
    found = re.findall(r"^(\S+) +is most like (\S+) +([\d.]+)$", text, re.M)
    unit = table.embeddings / np.linalg.norm(table.embeddings, axis=1, keepdims=True)
    cosines = unit @ unit.T - 2 * np.eye(5)
    for row, (name, other, similarity) in enumerate(found):
        assert name == Path(table.paths[row]).name and other == Path(table.paths[cosines[row].argmax()]).name
        assert abs(float(similarity) - cosines[row].max()) < 1e-3
    Path("broken").mkdir()
    Path("broken/a.jpg").write_bytes(b"no picture")
    assert "0 of 1 embedded" in run("embed_a_folder.py", "broken", "-o", "broken.csv")


def test_embed_a_folder_again_after_it_has_changed(mixed: Path) -> None:
    assert "2 of 3 embedded" in run("embed_a_folder.py", mixed)
    Path("mixed/c/1.jpg").rename("mixed/c/2.jpg")
    shutil.copy("mixed/a/1.jpg", "mixed/b/1.jpg")
    text = run("embed_a_folder.py", mixed)
    assert "3 of 3 embedded" in text and "1.jpg            is most like 1.jpg            1.000" in text


def test_label_by_examples_leaves_out_unreadable_files(mixed: Path) -> None:
    shutil.copytree(mixed, "new")
    text = run("label_by_examples.py", mixed, "new", "-k", "1")
    assert "2 examples; judged by the others" in text
    assert text.splitlines()[-2:] == ["a/1.jpg  a  1.00", "c/1.jpg  c  1.00"]
    assert "mixed/b/1.jpg: " in text and "new/b/1.jpg: " in text


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


def test_find_duplicates_leaves_out_unreadable_files(mixed: Path) -> None:
    shutil.copy("mixed/a/1.jpg", "mixed/c/3.jpg")
    lines = run("find_duplicates.py", mixed).splitlines()
    assert lines[0].startswith("mixed/b/1.jpg: ")
    assert lines[1:] == ["3 photographs, 1 groups of near-duplicates", "a/1.jpg", "  1.000  c/3.jpg"]


def test_attention_masks_with_equal_names_and_an_unreadable_file(mixed: Path) -> None:
    text = run("attention_masks.py", mixed, "-o", "out")
    assert "mixed/b/1.jpg" in text and "4 pictures are in out" in text
    found = sorted(path.name for path in Path("out").iterdir())
    assert found == ["01-1-attention.png", "01-1-mask.png", "03-1-attention.png", "03-1-mask.png"]


def test_attention_masks() -> None:
    text = run("attention_masks.py", "-o", "out", "--mass", "0.5")
    assert "10 pictures are in out" in text and text.count("holds 50 % of its attention in") == 5
    mask = np.asarray(Image.open("out/03-chelsea-mask.png"))
    assert mask.shape == (192, 192) and set(np.unique(mask)) == {0, 255}
    assert np.asarray(Image.open("out/03-chelsea-attention.png")).shape == (192, 192, 3)


def test_linear_probe() -> None:
    pytest.importorskip("sklearn")
    run("crops.py", "made", "--per-class", "4")
    text = run("linear_probe.py", "made/seen", "made/new")
    assert "20 to train on, 20 to test with, 5 classes" in text
    folds, linear, knn = percentages(text)
    assert folds > 50 and linear > 40 and knn > 40


def test_labelled_photos() -> None:
    run("crops.py", "made", "--per-class", "2")
    Path("made/seen/rocket/00.jpg").write_bytes(b"no picture")
    lines = run("labelled_photos.py", "made/seen").splitlines()
    assert lines[0].startswith("made/seen/rocket/00.jpg: ") and lines[0].endswith("; left out")
    assert [line.split() for line in lines[1:]] == [
        [str(1 if name == "rocket" else 2), name] for name in sorted(NAMES)
    ]
    assert "missing: no such file or folder" in refusal("labelled_photos.py", "missing")
    for path in Path("made/new").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    assert "made/new has 0 classes with a readable photograph" in refusal("labelled_photos.py", "made/new")


def test_linear_probe_and_fine_tuning_leave_out_unreadable_files() -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("timm")
    run("crops.py", "made", "--per-class", "4")
    Path("made/seen/coffee/00.jpg").write_bytes(b"no picture")
    Path("made/new/rocket/01.jpg").write_bytes(b"")
    for script, more in (("linear_probe.py", []), ("fine_tune_torch.py", ["--steps", "1"])):
        text = run(script, "made/seen", "made/new", *more)
        for name in ("seen/coffee/00.jpg", "new/rocket/01.jpg"):
            assert re.search(f"^made/{name}: .*; left out$", text, re.M), text


def test_deploy_classifier() -> None:
    pytest.importorskip("sklearn")
    lines = run("deploy_classifier.py").splitlines()
    assert len(lines) == 20 and {line.split()[1] for line in lines} <= NAMES
    right = [line.split("/")[0] == line.split()[1] for line in lines]
    assert np.mean(right) > 0.4  # one in five would be chance


def test_deploy_classifier_refuses_in_words(photos: Path, tmp_path: Path) -> None:
    Path("empty").mkdir()
    for nothing in ("empty", "missing"):
        assert f"no photographs found in {nothing}" in refusal("deploy_classifier.py", "kinds.onnx", nothing)
    assert "missing.onnx cannot be loaded" in refusal("deploy_classifier.py", "missing.onnx", photos)
    file = add_onnx(write_model_folder(tmp_path / "model", config_for(), random_weights()))
    assert "is not a classifier; write one with" in refusal("deploy_classifier.py", file, photos)


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
    (one,) = run("deploy_classifier.py", "embedder.onnx", photos / "rocket.jpg").splitlines()
    assert one.split() == next(line for line in lines if line[0] == "rocket.jpg")
    assert "portable.onnx does not take uint8 crops" in refusal(
        "deploy_classifier.py", "portable.onnx", photos
    )


def test_deploy_classifier_reads_pictures_as_dinokit_does(tmp_path: Path) -> None:
    """Grey of 16 bits, transparent pixels, one channel, and a file that is no picture between them."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0, 65535, 40 * 60).reshape(40, 60).astype(np.uint16)
    Path("pictures").mkdir()
    Image.fromarray(levels).save("pictures/deep.png")
    clear = Image.fromarray(rng.integers(0, 256, (40, 60, 4), np.uint8))
    clear.save("pictures/clear.png")
    clear.save("pictures/other.TIF")
    Path("pictures/bad.jpg").write_bytes(b"no picture")
    Path("pictures/notes.txt").write_bytes(b"no picture")
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
        assert "bad.jpg cannot be read" in done.stderr and "notes" not in done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        assert [line[0] for line in lines] == ["clear.png", "deep.png", "other.TIF"]
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


def test_fine_tune_torch_with_few_photographs_and_fewer_classes_to_test() -> None:
    pytest.importorskip("timm")
    run("crops.py", "made", "--per-class", "2")  # 10 photographs are less than a batch
    for name in ("astronaut", "camera", "coffee"):  # without these, numbering the test set alone is wrong
        shutil.rmtree(f"made/new/{name}")
    shutil.rmtree("made/seen/coffee")
    shutil.copytree("made/seen", "whole")
    text = run("fine_tune_torch.py", "whole", "made/new", "--steps", "2")
    before, _ = percentages(text)
    assert before > 40
    assert "tuned exists and is not an empty folder" in refusal("fine_tune_torch.py")
    shutil.rmtree("whole/rocket")
    message = refusal("fine_tune_torch.py", "whole", "made/new", "-o", "other")
    assert "made/new has classes that the training set lacks: rocket" in message


def test_deploy_ort_gpu_exports_the_starter() -> None:
    pytest.importorskip("timm")
    text = run("deploy_ort_gpu.py", "-b", "3", "-n", "2")
    assert "5 vectors are in vectors.npy" in text
    assert "fp32 on cpu: no usable GPU here" in text or "fp16 on cuda" in text


def test_deploy_ort_gpu_says_what_the_export_of_the_starter_needs() -> None:
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['timm'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", without_torch, str(EXAMPLES / "deploy_ort_gpu.py")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "dinokit[train]" in result.stderr and "deploy_ort_gpu.py model.onnx" in result.stderr


def test_deploy_ort_gpu_keeps_the_rows_of_unreadable_files(mixed: Path, tmp_path: Path) -> None:
    file = add_onnx(write_model_folder(tmp_path / "model", config_for(), random_weights()))
    text = run("deploy_ort_gpu.py", file, mixed, "-n", "1")
    assert "mixed/b/1.jpg" in text and "2 vectors are in vectors.npy" in text
    assert np.isnan(np.load("vectors.npy")).all(axis=1).tolist() == [False, True, False]


def test_deploy_ort_gpu_without_torch(photos: Path, tmp_path: Path) -> None:
    """On a machine without GPU; IO binding is the same there, a CUDA graph is not."""
    file = add_onnx(write_model_folder(tmp_path / "model", config_for(), random_weights()))
    without_torch = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['timm'] = None; sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    script = [str(EXAMPLES / "deploy_ort_gpu.py"), str(file), str(photos), "-b", "3", "-n", "2"]
    command = [sys.executable, "-W", "error", "-c", without_torch, *script]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "5 vectors are in vectors.npy" in text and re.search(
        r"^\d+ images/s of \d+x\d+ pixels, 3 per batch,", text, re.M
    )
    assert "fp32 on cpu: no usable GPU here" in text or "fp32 on cuda" in text
    right = load_backbone(tmp_path / "model", device="cpu").embed(photos)
    np.testing.assert_allclose(np.load("vectors.npy"), right, atol=1e-3)


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


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module serve_fastapi."""
    pytest.importorskip("fastapi", reason="FastAPI is not installed; pip install fastapi httpx")
    pytest.importorskip("httpx", reason="FastAPI's test client needs httpx; pip install httpx")
    monkeypatch.syspath_prepend(EXAMPLES)
    spec = importlib.util.spec_from_file_location("serve_fastapi", EXAMPLES / "serve_fastapi.py")
    assert spec is not None and spec.loader is not None
    service = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "serve_fastapi", service)  # FastAPI looks up annotations there
    spec.loader.exec_module(service)
    return service


def test_serve_fastapi(photos: Path, service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi.testclient import TestClient

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

    # Without a stated length, the service stops reading as soon as there is too much.
    sent: list[dict[str, Any]] = []
    read = 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": bytes(400), "more_body": read < 50}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/photo",
        "query_string": b"",
        "headers": [],
        "http_version": "1.1",
    }
    asyncio.run(client.app(scope, receive, send))
    assert sent[0]["status"] == 413 and read == 3


def test_serve_fastapi_leaves_out_unreadable_examples(
    mixed: Path, service: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastapi.testclient import TestClient

    client = TestClient(service.create_app(labelled=mixed))
    assert "left out: mixed/b/1.jpg" in capsys.readouterr().out
    answer = client.post("/photo", content=(mixed / "c/1.jpg").read_bytes()).json()
    assert answer["label"] == "c"
