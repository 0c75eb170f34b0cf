"""`dinokit export --own-size`: another size by default, the same network, in every library that reads the folder."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import SMALL, config_for, picture, random_weights

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.errors import MissingExtraError, UsageError
from dinokit.export import export_folder
from dinokit.export.graphs.own_size import with_own_size
from dinokit.loading.locate import locate
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.model_folder.folder import read_model_folder, write_model_folder

ROTARY = replace(
    SMALL, position="rope", num_register_tokens=4, layer_scale=True, qkv_bias=False, layer_norm_eps=1e-5
)
REGISTERS = replace(
    SMALL,
    num_register_tokens=4,
    layer_scale=True,
    pos_embed_resize=PosEmbedResize(offset=0.0, antialias=True),
)


@pytest.fixture(params=[SMALL, REGISTERS, ROTARY], ids=["learned", "registers", "rotary"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    vit = request.param
    return write_model_folder(tmp_path / "m", config_for(vit), random_weights(vit)).path


@pytest.mark.parametrize("size", [48, (40, 64)])
def test_it_sees_what_it_saw_when_asked(model: Path, size: int | tuple[int, int], tmp_path: Path) -> None:
    export_folder(model, tmp_path / "out", own_size=size)
    asked, own = load_backbone(model, image_size=size), load_backbone(tmp_path / "out")
    sides = (size, size) if isinstance(size, int) else size
    assert own.image_size == own.config.architecture.image_size == sides != load_backbone(model).image_size
    assert own.preprocessing == asked.preprocessing
    np.testing.assert_allclose(own.embed(picture()), asked.embed(picture()), atol=2e-5)
    np.testing.assert_allclose(own.attention(picture()), asked.attention(picture()), atol=1e-6)
    smaller = np.abs(load_backbone(model).embed(picture()) - own.embed(picture())).max()
    assert smaller > 0.01  # there was something to agree on


def test_timm_and_transformers_agree_at_that_size(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = write_model_folder(tmp_path / "m", config_for(), random_weights()).path
    export_folder(model, tmp_path / "out", own_size=48, onnx=False)
    own = load_backbone(tmp_path / "out", engine="onnx")
    pixels = torch.from_numpy(own.transform(picture()))[None]
    theirs = timm.create_model(
        own.config.timm_architecture,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "out" / "timm.safetensors"), "custom_load": False},
        num_classes=0,
        **own.config.model_args,
    ).eval()
    hf = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    with torch.inference_mode():
        np.testing.assert_allclose(theirs(pixels)[0].numpy(), own.embed(picture()), atol=1e-4)
        np.testing.assert_allclose(hf(pixels).pooler_output[0].numpy(), own.embed(picture()), atol=1e-4)


def test_rotary_positions_are_no_weights(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "m", config_for(ROTARY), random_weights(ROTARY)).path
    export_folder(model, tmp_path / "out", own_size=48, onnx=False)
    assert read_model_folder(tmp_path / "out").weights_sha256 == read_model_folder(model).weights_sha256


def test_the_command_says_so_and_centres_at_that_size(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "m", config_for(), random_weights()).path
    for i in range(3):
        picture(seed=i).save(tmp_path / f"{i}.png")
    words = ["export", str(model), "-o", str(tmp_path / "out"), "--no-onnx", "--own-size", "48"]
    done = CliRunner().invoke(cli, [*words, "--center", str(tmp_path / "*.png")])
    assert done.exit_code == 0, done.output
    backbone = load_backbone(tmp_path / "out")
    done_to_it = "; its own size 48x48 instead of 32x32; mean embedding of 3 pictures taken off"
    assert backbone.config.source == "a test" + done_to_it
    assert np.abs(backbone.embed([tmp_path / f"{i}.png" for i in range(3)]).mean(axis=0)).max() < 2e-5


def test_an_edited_card_is_said_to_be_of_before(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "m", config_for(), random_weights()).path
    (model / "README.md").write_text("# Mine\n\nk-NN 71.8 %\n", encoding="utf-8")
    words = ["export", str(model), "--no-onnx", "-o"]
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "same")])
    assert done.exit_code == 0 and "and is kept.\n" in done.stderr
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "sized"), "--own-size", "48"])
    assert done.exit_code == 0 and "Its figures show the model before this change." in done.stderr
    assert "k-NN 71.8 %" in (tmp_path / "sized" / "README.md").read_text(encoding="utf-8")


def test_its_own_size_already(tmp_path: Path) -> None:
    model = write_model_folder(tmp_path / "m", config_for(), random_weights()).path
    located = locate(str(model))
    assert with_own_size(located, 32) == (located, "")


def test_what_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model_folder(tmp_path / "m", config_for(), random_weights()).path
    with pytest.raises(UsageError, match="50x50 is not a multiple of patch_size=8; use 48 or 56"):
        export_folder(model, tmp_path / "out", own_size=50)
    located = locate(str(model))
    network = replace(located, config=replace(located.config, architecture=object()))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="only a Vision Transformer"):
        with_own_size(network, 48)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "dinokit.runtime.torch", raising=False)
    with pytest.raises(MissingExtraError, match="resizing the position embedding"):
        export_folder(model, tmp_path / "out", own_size=48, onnx=False)
    assert not (tmp_path / "out").exists()
