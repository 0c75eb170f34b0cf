"""ViTs with rotary positions in training: what is trained is what the model folder gives, and how they start."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from small_recipe import SMALL_RECIPE
from stop_after import StopAfter

import dinokit
from dinokit.errors import UsageError
from dinokit.model_folder.architecture import PosEmbedResize
from dinokit.runtime.torch import create_vit
from dinokit.training.networks.initialise import initialise
from dinokit.training.networks.network import build_backbone
from dinokit.training.run import checkpoint
from dinokit.training.trainer import train

DINOV3 = replace(
    SMALL_RECIPE, arch="vit_tiny_patch16_dinov3_qkvb", n_local_crops=1, batch_size=4, log_every_steps=1
)
HIDING = replace(DINOV3, ibot_weight=1.0, ibot_mask_probability=1.0)


def test_the_embedding_that_is_trained_is_the_cls_token() -> None:
    """timm takes the mean of the patches for these names; the folder and the SDK take the CLS token."""
    backbone, width = build_backbone(DINOV3, is_student=True)
    vit: Any = backbone.eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = vit.forward_features(pixels)
    assert width == 192
    torch.testing.assert_close(vit(pixels), tokens[:, 0])
    # Where the folder leaves the embedding to timm, the training does too.
    eva02: Any = build_backbone(replace(DINOV3, arch="eva02_tiny_patch14_224"), is_student=True)[0]
    assert eva02.global_pool == "avg"


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_with_hidden_patches_goes_on_exactly_and_its_folder_gives_the_teachers_cls_token(
    tmp_path: Path, photos: Path
) -> None:
    recipe = replace(HIDING, epochs=2, drop_path_rate=0.2)
    state = train([photos], tmp_path / "whole", recipe)
    train([photos], tmp_path / "cut", recipe, observer=StopAfter(1))
    assert 0 < metrics(tmp_path / "cut")[-1]["step"] < state.step
    again = train([photos], tmp_path / "cut", recipe)
    for name, value in state.student.state_dict().items():
        assert torch.equal(again.student.state_dict()[name], value), name
    assert state.student.mask_token is not None and state.student.mask_token.any()
    assert all(0 < line["ibot_loss"] < 10 for line in metrics(tmp_path / "cut"))
    # A mask token of 0, to which no position is added, would have a gradient of millions in the head's normalisation.
    assert metrics(tmp_path / "cut")[0]["grad_norm"] < 1e5

    backbone = dinokit.load_backbone(tmp_path / "cut" / "model")
    pixels = np.random.default_rng(0).normal(size=(2, 3, 32, 32)).astype(np.float32)
    vit: Any = state.teacher.backbone.eval()
    with torch.no_grad():
        tokens = vit.forward_features(torch.from_numpy(pixels))
    found = backbone._engine.run(pixels, ["pooler_output", "last_hidden_state"])
    np.testing.assert_allclose(found["pooler_output"], tokens[:, 0], atol=1e-4)
    np.testing.assert_allclose(found["last_hidden_state"], tokens, atol=1e-4)
    config = json.loads((tmp_path / "cut" / "model" / "config.json").read_text())
    assert config["model_args"]["global_pool"] == "token"


def test_hidden_patches_begin_with_a_model_that_knew_of_none(tmp_path: Path, photos: Path) -> None:
    taught = train([photos], tmp_path / "plain", DINOV3)
    warnings: list[str] = []

    class Listening(StopAfter):
        def warned(self, message: str) -> None:
            warnings.append(message)

    recipe = replace(HIDING, lr=0.0, min_lr=0.0, teacher_momentum=0.5)
    for source, said in ((tmp_path / "plain" / "model", []), (tmp_path / "plain", ["no mask token"])):
        run = tmp_path / f"hiding-{source.name}"
        warnings.clear()
        state = train([photos], run, replace(recipe, init_from=str(source)), observer=Listening(1))
        assert state.step == 1
        for name, value in taught.teacher.backbone.state_dict().items():
            torch.testing.assert_close(state.teacher.backbone.state_dict()[name], value, msg=name)
        assert all(any(words in warning for warning in warnings) for words in said), warnings
        saved, _ = checkpoint.load_newest(run / "checkpoint")
        assert saved is not None and saved["masked_patches"]["targets.center"].any()


def test_weights_of_learned_positions_are_refused_by_name(tmp_path: Path, photos: Path) -> None:
    with pytest.raises(
        UsageError, match=r"init_from=starter is a model of another shape: .* of the backbone"
    ):
        train([photos], tmp_path / "run", replace(DINOV3, init_from="starter"))


@pytest.mark.parametrize(
    "arch", ["vit_tiny_patch16_dinov3_qkvb", "vit_small_patch16_rope_ape_224", "eva02_tiny_patch14_224"]
)
def test_rotary_networks_start_as_moco_v3_too(arch: str) -> None:
    """Where positions are learned beside the angles, they begin as sines, with or without some for the CLS token."""
    vit: Any = create_vit(
        arch, {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}, PosEmbedResize()
    )
    initialise(vit, "xavier")
    if vit.pos_embed is not None:
        patches = vit.pos_embed.detach()[0, -16:].view(4, 4, 4, 6)  # row, column, kind, rate
        np.testing.assert_allclose(patches[:, 2, 0, 0], np.sin(np.arange(4)), atol=1e-6)
        assert not vit.pos_embed[0, :-16].any()
