"""The code in a generated card, taken from it and run as it stands: all loaders give dinokit's vectors.

Python runs against a Hub on this machine. JavaScript needs Node and the package @huggingface/transformers
(`npm install --ignore-scripts @huggingface/transformers`) in a folder above, or where DINOKIT_NODE_MODULES says.
"""

from __future__ import annotations

import json
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
from hub_server import HubServer
from numpy.typing import NDArray
from PIL import ExifTags, Image
from small_models import SMALL, config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.card import CardSettings, write_card
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.contract import METADATA_KEY, contract
from dinokit.model_folder.folder import ModelFolder, write_model_folder
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import build_vit_graph

for package in ("torch", "timm", "transformers"):
    pytest.importorskip(package)

ROOT = Path(__file__).parents[2]
ROPE = replace(
    SMALL, position="rope", num_register_tokens=4, layer_scale=True, qkv_bias=False, layer_norm_eps=1e-5
)
SQUASHED = Preprocessing(resize_px=(32, 32), crop_px=(32, 32), interpolation="bilinear")
GREY = replace(SMALL, in_chans=1)
IN_GREY = Preprocessing(resize_px=36, crop_px=(32, 32), mean=(0.4,), std=(0.2,))

Photos = dict[str, Path]


@pytest.fixture(scope="module", params=["dino", "dinov3", "grey"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """A folder as the export leaves it, with a card that names a repository."""
    vit = {"dino": SMALL, "dinov3": ROPE, "grey": GREY}[request.param]
    own = {"dinov3": SQUASHED, "grey": IN_GREY}
    config = config_for(vit)
    config = replace(config, preprocessing=own.get(request.param, config.preprocessing))
    return folder_with_card(tmp_path_factory.mktemp("folder") / "me" / "small", config)


def folder_with_card(path: Path, config: BackboneConfig) -> ModelFolder:
    vit = config.vit
    folder = write_model_folder(path, config, random_weights(vit))
    says = json.dumps(contract(folder.config, folder.weights_sha256))
    (path / "onnx").mkdir()
    graph = build_vit_graph(vit, folder.load_weights(), metadata={METADATA_KEY: says})
    (path / "onnx" / "model.onnx").write_bytes(graph.SerializeToString())
    assert write_card(path, settings=CardSettings(repo="me/small")) == "written"
    return folder


@pytest.fixture(scope="module")
def photos(folder: ModelFolder, tmp_path_factory: pytest.TempPathFactory) -> Photos:
    """``exact``: needs no resize, so that nobody's resize matters; ``photo``: a photograph. Both are lossless."""
    prepare = folder.config.preprocessing
    size = (50, prepare.resize_px) if isinstance(prepare.resize_px, int) else prepare.resize_px[::-1]
    root = tmp_path_factory.mktemp("photos")
    found = {}
    for name, image in (("exact", picture(*size, seed=4)), ("photo", picture(390, 260, seed=5))):
        (root / name).mkdir()
        found[name] = root / name / "photo.jpg"  # as the code calls it; what it is, its content says
        image.save(found[name], format="PNG")
    return found


@pytest.fixture(scope="module")
def truth(folder: ModelFolder, photos: Photos) -> dict[str, NDArray[np.float32]]:
    """dinokit's own vectors."""
    backbone = load_backbone(folder.path, engine="onnx", device="cpu")
    return {name: backbone.embed(path) for name, path in photos.items()}


def code_of(folder: ModelFolder, language: str) -> dict[str, str]:
    """Title to code of the card's blocks in one language."""
    text = (folder.path / "README.md").read_text(encoding="utf-8")
    return dict(re.findall(rf"^### ([^\n]+)\n\n```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


RUN_PYTHON = """
import json, os, sys
import numpy as np
blocks, places, out = json.load(open(sys.argv[1])), json.loads(sys.argv[2]), {}
for title, code in blocks.items():
    for name, place in places.items():
        os.chdir(place)
        names = {}
        exec(compile(code, title, "exec"), names)
        out[f"{title}:{name}"] = np.asarray(names["vector"], np.float32)
np.savez(sys.argv[3], **out)
"""


def test_the_python_code_of_a_card(
    folder: ModelFolder, photos: Photos, truth: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    blocks = code_of(folder, "python")
    expected = ["dinokit", "timm", "transformers", "ONNX Runtime"]
    assert list(blocks) == [
        title for title in expected if folder.config.has_transformers_twin or title != "transformers"
    ]
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    photos, truth = dict(photos), dict(truth)
    photos["turned"] = tmp_path / "turned" / "photo.jpg"  # as a telephone writes it
    photos["turned"].parent.mkdir()
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    with Image.open(photos["photo"]) as image:
        image.save(photos["turned"], format="PNG", exif=exif)
    truth["turned"] = load_backbone(folder.path, engine="onnx", device="cpu").embed(photos["turned"])
    places = json.dumps({name: str(path.parent) for name, path in photos.items()})
    with HubServer() as hub:
        hub.add("me/small", folder.path)
        arguments = [str(tmp_path / "blocks.json"), places, str(tmp_path / "out.npz")]
        run = subprocess.run(
            [sys.executable, "-c", RUN_PYTHON, *arguments],
            env=hub.environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert run.returncode == 0, run.stderr
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        for title in blocks:
            assert_close(out[f"{title}:exact"], truth["exact"], title)
            for name in ("photo", "turned"):
                if title == "transformers":  # torchvision's rounding; the crop's place (test_five_loaders.py)
                    assert cosine(out[f"{title}:{name}"], truth[name]) > 0.95, title
                else:
                    assert_close(out[f"{title}:{name}"], truth[name], title)


@pytest.mark.parametrize("resize", [36, (40, 33)])
def test_the_code_of_a_card_for_five_channels(resize: Any, tmp_path: Path) -> None:
    """No loader reads such pictures itself, so each block makes its pixels; that is what is tested."""
    vit = replace(SMALL, in_chans=5)
    see = Preprocessing(resize_px=resize, crop_px=(32, 32), mean=(0.4,) * 5, std=(0.1, 0.2, 0.3, 0.2, 0.1))
    folder = folder_with_card(tmp_path / "me" / "small", replace(config_for(vit), preprocessing=see))
    blocks = code_of(folder, "python")
    assert list(blocks) == ["dinokit", "timm", "transformers", "ONNX Runtime"]
    text = (folder.path / "README.md").read_text(encoding="utf-8")
    assert not code_of(folder, "javascript") and "There is no JavaScript version" in text
    bands = np.concatenate([np.asarray(picture(seed=n)) for n in range(2)], axis=2)[:, :, :5]
    np.save(tmp_path / "picture.npy", bands)
    (tmp_path / "blocks.json").write_text(json.dumps(blocks))
    with HubServer() as hub:
        hub.add("me/small", folder.path)
        arguments = [
            str(tmp_path / "blocks.json"),
            json.dumps({"bands": str(tmp_path)}),
            str(tmp_path / "out.npz"),
        ]
        run = subprocess.run(
            [sys.executable, "-c", RUN_PYTHON, *arguments],
            env=hub.environment(tmp_path / "cache"),
            capture_output=True,
            text=True,
            timeout=500,
        )
    assert run.returncode == 0, run.stderr
    expected = load_backbone(folder.path, engine="onnx", device="cpu").embed(bands)
    with np.load(tmp_path / "out.npz", allow_pickle=False) as out:
        for title in blocks:
            assert_close(out[f"{title}:bands"], expected, title)


RUN_JAVASCRIPT = """
import { env } from "@huggingface/transformers";
import { writeFileSync } from "node:fs";
env.allowRemoteModels = false;
env.localModelPath = process.argv[2];
await import("./snippet.mjs");
writeFileSync(process.argv[3], JSON.stringify(globalThis.found));
"""


def node_modules() -> Path:
    """Where Transformers.js lies; skips where it does not."""
    if shutil.which("node") is None:
        pytest.skip("needs Node.js")
    named = os.environ.get("DINOKIT_NODE_MODULES")
    for place in [Path(named)] if named else [parent / "node_modules" for parent in (ROOT, *ROOT.parents)]:
        if (place / "@huggingface" / "transformers" / "package.json").is_file():
            return place.resolve()
    pytest.skip(
        "needs `npm install --ignore-scripts @huggingface/transformers`, in a folder above or one whose node_modules "
        "DINOKIT_NODE_MODULES names"
    )


def test_the_javascript_code_of_a_card(
    folder: ModelFolder, photos: Photos, truth: dict[str, NDArray[np.float32]], tmp_path: Path
) -> None:
    blocks = code_of(folder, "javascript")
    if not folder.config.has_transformers_twin:
        assert not blocks  # config.json has no model_type that Transformers.js knows
        return
    (code,) = blocks.values()
    modules = node_modules()
    (tmp_path / "node_modules").symlink_to(modules)
    told = (
        "globalThis.found = { vector: Array.from(vector), pixels: Array.from(inputs.pixel_values.data) };\n"
    )
    (tmp_path / "snippet.mjs").write_text(code + told, encoding="utf-8")
    (tmp_path / "run.mjs").write_text(RUN_JAVASCRIPT, encoding="utf-8")
    backbone = load_backbone(folder.path, engine="onnx", device="cpu")
    for name, photo in photos.items():
        run = subprocess.run(
            ["node", str(tmp_path / "run.mjs"), f"{folder.path.parents[1]}/", str(tmp_path / f"{name}.json")],
            cwd=photo.parent,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert run.returncode == 0, run.stderr
        found = json.loads((tmp_path / f"{name}.json").read_text())
        vector = np.asarray(found["vector"], np.float32)
        channels = folder.config.preprocessing.channels
        pixels = np.asarray(found["pixels"], np.float32).reshape(1, channels, *folder.config.image_size)
        same_pixels = backbone._engine.run(pixels, ("pooler_output",))["pooler_output"][0]
        assert_close(vector, same_pixels, f"{name}, from its own pixels")
        if name == "exact" and channels == 3:
            assert_close(vector, truth[name], name)
        else:  # it resizes by a filter of its own, and its grey may be a level beside Pillow's
            assert cosine(vector, truth[name]) > 0.95, name


def assert_close(found: NDArray[np.float32], expected: NDArray[np.float32], what: str) -> None:
    assert found.shape == expected.shape, what
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4, err_msg=what)


def cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(one @ other / np.linalg.norm(one) / np.linalg.norm(other))


def test_training_leaves_a_record_and_a_card(tmp_path: Path) -> None:
    from dinokit.training.networks.network import build_network
    from dinokit.training.recipe import Recipe, save_recipe
    from dinokit.training.run.teacher_folder import write_teacher

    recipe = Recipe(
        arch="vit_tiny_patch16_224",
        global_crop_px=32,
        local_crop_px=16,
        n_prototypes=8,
        head_hidden_dim=8,
        head_bottleneck_dim=4,
        licence="cc0-1.0",
        labelled=str(tmp_path / "pets" / "train"),
    )
    save_recipe(recipe, tmp_path / "recipe.yaml")
    lines = [{"step": 4, "epoch": 1.0, "loss": 2.5, "knn_teacher": 0.5, "knn_student": 0.4}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = write_teacher(tmp_path, build_network(recipe, is_student=False), recipe, 4, 8, 64)
    text = (model / "README.md").read_text(encoding="utf-8")
    assert "## How it was trained" in text and "| steps | 4 of 8 |" in text and "license: cc0-1.0" in text
    assert "name: pets" in text and "value: 50.0" in text
    record = json.loads((model / "training.json").read_text())
    assert record["runs"][0]["n_images"] == 64 and str(tmp_path) not in json.dumps(record)
