"""One model folder, five loaders, equal numbers: dinokit (ONNX, torch), timm, transformers, onnxruntime."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hub_server import HubServer
from numpy.typing import NDArray
from small_models import SMALL, TINY, config_for, picture, random_weights

import dinokit
from dinokit.export import export_onnx
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import METADATA_KEY, contract
from dinokit.model_folder.folder import ModelFolder, write_model_folder
from dinokit.vit_graph import build_vit_graph

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

ACROSS = 1e-4  # between frameworks, the bound; what is measured is about 1e-6


@pytest.fixture(scope="module", params=[SMALL, TINY], ids=["small", "vit_tiny"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A folder as the export leaves it, with its ONNX file."""
    vit: VitArchitecture = request.param
    path = tmp_path_factory.mktemp("folder") / "model"
    weights = random_weights(vit)
    folder = write_model_folder(path, config_for(vit), weights)
    says = json.dumps(contract(folder.config, folder.weights_sha256))
    (path / "onnx").mkdir()
    graph = build_vit_graph(vit, weights, metadata={METADATA_KEY: says})
    (path / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def pixels(folder: ModelFolder) -> NDArray[np.float32]:
    """(2, 3, H, W): what the folder's own preprocessing makes of two pictures."""
    prepare = folder.config.preprocessing
    pictures = [picture(400, 300, seed=1), picture(260, 390, seed=2)]
    return prepare.normalise(np.stack([prepare.crop(image) for image in pictures]))


@pytest.fixture(scope="module")
def truth(folder: ModelFolder, pixels: NDArray[np.float32]) -> dict[str, NDArray[np.float32]]:
    """dinokit's torch engine: everything below is held against it."""
    backbone = dinokit.load_backbone(folder.path, engine="torch", device="cpu")
    return backbone._engine.run(pixels, ("last_hidden_state", "pooler_output", "attention"))


def test_timm_from_the_file_is_identical(
    folder: ModelFolder, pixels: NDArray[np.float32], truth: dict[str, NDArray[np.float32]]
) -> None:
    model = timm.create_model(
        folder.config.timm_architecture,
        pretrained=True,
        # Its own cfg says that a file is a NumPy checkpoint of JAX, as timm before 1.0.31 believes.
        pretrained_cfg_overlay={"file": str(folder.path / "timm.safetensors"), "custom_load": False},
        num_classes=0,
        **folder.config.model_args,
    ).eval()
    with torch.inference_mode():
        cls = model(torch.from_numpy(pixels)).numpy()
    assert np.abs(cls - truth["pooler_output"]).max() == 0


def test_timm_as_the_documentation_says(
    folder: ModelFolder, pixels: NDArray[np.float32], truth: dict[str, NDArray[np.float32]]
) -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    code = page.split("<!-- a folder in timm -->\n```python\n")[1].split("```")[0]
    assert code.count("runs/mine/model") == 1
    names: dict[str, Any] = {}
    exec(code.replace("runs/mine/model", folder.path.as_posix()), names)
    with torch.inference_mode():
        cls = names["model"](torch.from_numpy(pixels)).numpy()
    assert np.abs(cls - truth["pooler_output"]).max() == 0
    photo = picture(120, 90)
    ours = dinokit.load_backbone(folder.path, engine="torch").transform(photo)
    assert np.abs(names["transform"](photo).numpy() - ours).max() < 0.05


def test_the_module_takes_the_folders_preprocessing_along(folder: ModelFolder, tmp_path: Path) -> None:
    """To timm, and to a file written from it; timm's own cfg of the architecture says something else."""
    backbone = dinokit.load_backbone(folder.path, engine="torch", device="cpu")
    photo = picture(120, 90)
    config = timm.data.resolve_model_data_config(backbone.module)
    theirs = timm.data.create_transform(**config, is_training=False)(photo).numpy()
    assert np.abs(theirs - backbone.transform(photo)).max() < 0.05
    export_onnx(backbone.module, tmp_path / "m.onnx")
    again = dinokit.load_backbone(tmp_path / "m.onnx")
    assert again.preprocessing == backbone.preprocessing
    np.testing.assert_allclose(again.embed(photo), backbone.embed(photo), atol=1e-4)


def test_timm_preprocessing_is_the_folders(folder: ModelFolder) -> None:
    values = json.loads((folder.path / "config.json").read_text())
    transform = timm.data.create_transform(
        **timm.data.resolve_data_config(pretrained_cfg=values["pretrained_cfg"]), is_training=False
    )
    image, prepare = picture(400, 300), folder.config.preprocessing
    ours = prepare.normalise(prepare.crop(image)[None])[0]
    assert _levels(transform(image).numpy() - ours) < 1e-3


def test_onnx_engine_and_plain_onnxruntime(
    folder: ModelFolder, pixels: NDArray[np.float32], truth: dict[str, NDArray[np.float32]]
) -> None:
    import onnxruntime

    path = folder.path / "onnx" / "model.onnx"
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = list(truth)
    plain = dict(zip(names, session.run(names, {"pixel_values": pixels}), strict=True))
    backbone = dinokit.load_backbone(folder.path, engine="onnx", device="cpu")
    ours = backbone._engine.run(pixels, tuple(names))
    for name in names:
        assert np.abs(plain[name] - truth[name]).max() < ACROSS, name
        assert np.abs(ours[name] - truth[name]).max() < ACROSS, name


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers(
    folder: ModelFolder,
    pixels: NDArray[np.float32],
    truth: dict[str, NDArray[np.float32]],
    attention: str,
) -> None:
    model, report = transformers.AutoModel.from_pretrained(
        folder.path, attn_implementation=attention, output_loading_info=True
    )
    assert type(model).__name__ == "Dinov2Model"
    assert not any(report.values()), report
    assert not model.training
    with torch.inference_mode():
        out = model(torch.from_numpy(pixels), output_attentions=attention == "eager")
    assert torch.equal(out.pooler_output, out.last_hidden_state[:, 0])
    assert np.abs(out.last_hidden_state.numpy() - truth["last_hidden_state"]).max() < ACROSS
    if attention == "eager":
        assert np.abs(out.attentions[-1][:, :, 0, 1:].numpy() - truth["attention"]).max() < 1e-5


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (100, 100)])
def test_transformers_image_processor(folder: ModelFolder, size: tuple[int, int]) -> None:
    theirs, ours = _both_preprocessings(folder, size)
    assert theirs.shape == ours.shape
    assert _levels(theirs - ours) <= 1.01  # torchvision's tensors round otherwise than Pillow, now and then


def test_transformers_crops_one_pixel_earlier_at_some_sizes(folder: ModelFolder) -> None:
    # (resized - crop) / 2 = 11.5 is 11 for transformers (truncated) and 12 for torchvision and DINO (half to
    # even). If this fails because the two agree, transformers has changed, and the note in the card may go.
    if folder.config.vit != SMALL:
        pytest.skip("shown by the small model")
    theirs, ours = _both_preprocessings(folder, (260, 390))
    assert _levels(theirs - ours) > 2
    assert _levels(theirs[..., 1:, :] - ours[..., :-1, :]) <= 1.01


def _both_preprocessings(
    folder: ModelFolder, size: tuple[int, int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    processor = transformers.AutoImageProcessor.from_pretrained(folder.path)
    assert type(processor).__name__.startswith("BitImageProcessor")
    image, prepare = picture(*size), folder.config.preprocessing
    theirs = processor(image, return_tensors="np")["pixel_values"]
    return theirs, prepare.normalise(prepare.crop(image)[None])


def _levels(difference: NDArray[np.float32]) -> float:
    """The largest difference of normalised pixels, in 8-bit levels."""
    std = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
    return float(np.abs(difference * std * 255).max())


FROM_THE_HUB = """
import sys, json, numpy as np, timm, torch, transformers
pixels = torch.from_numpy(np.load(sys.argv[1]))
model = timm.create_model("hf-hub:user/model", pretrained=True).eval()
hf = transformers.AutoModel.from_pretrained("user/model")
with torch.inference_mode():
    np.savez(sys.argv[2], timm=model(pixels).numpy(), hf=hf(pixels).pooler_output.numpy())
print(json.dumps({"classes": model.num_classes, "mean": model.pretrained_cfg["mean"]}))
"""


def test_timm_and_transformers_from_the_hub(
    folder: ModelFolder,
    pixels: NDArray[np.float32],
    truth: dict[str, NDArray[np.float32]],
    tmp_path: Path,
) -> None:
    if folder.config.vit != SMALL:
        pytest.skip("the small model shows it; the other would only take longer")
    np.save(tmp_path / "pixels.npy", pixels)
    with HubServer() as hub:
        hub.add("user/model", folder.path)
        run = subprocess.run(
            [sys.executable, "-c", FROM_THE_HUB, str(tmp_path / "pixels.npy"), str(tmp_path / "out.npz")],
            env=hub.environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        assert np.abs(out["timm"] - truth["pooler_output"]).max() == 0
        assert np.abs(out["hf"] - truth["pooler_output"]).max() < ACROSS
    assert json.loads(run.stdout.splitlines()[-1])["classes"] == 0
