"""`dinokit info` of networks that have no patches."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from small_models import config_for, random_weights

from dinokit.cli import cli
from dinokit.model_folder.architecture import TimmArchitecture
from dinokit.model_folder.config import BackboneConfig
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.preprocess import Preprocessing


@pytest.mark.parametrize(
    ("network", "feature_map", "takes"),
    [
        # timm's resnet50: 2048 channels at a 32nd of the size, a last row and column that are cut off count
        (
            TimmArchitecture(2048, 32, (224, 240), 2048),
            "7 x 8 cells of 32 x 32 px from 224 x 240 px, 2048 numbers each",
            "any size",
        ),
        (
            TimmArchitecture(384, 16, (224, 224), 384, num_prefix_tokens=1, size_multiple=16),
            "14 x 14 cells of 16 x 16 px from 224 x 224 px, 384 numbers each",
            "sides that are multiples of 16 px",
        ),
        (
            TimmArchitecture(512, 32, (96, 96), None, size_multiple=None),
            "none to show",
            "pictures of 96 x 96 px only",
        ),
    ],
)
def test_cells_and_sizes(tmp_path: Path, network: TimmArchitecture, feature_map: str, takes: str) -> None:
    config = BackboneConfig(
        name="net",
        architecture=network,
        timm_architecture="resnet50",
        model_args={},
        preprocessing=Preprocessing(resize_px=256, crop_px=network.image_size),
    )
    folder = write_model_folder(tmp_path / "net", config, {"w": np.zeros((2, 2), np.float32)}).path
    done = CliRunner().invoke(cli, ["info", str(folder)])
    assert done.exit_code == 0, done.output
    lines = dict(line.split("  ", 1) for line in done.stdout.splitlines())
    assert lines["feature map"].strip() == feature_map
    assert lines["takes"].strip() == takes
    assert "patch" not in " ".join(lines)
    facts = json.loads(CliRunner().invoke(cli, ["info", str(folder), "--json"]).stdout)
    assert (facts["stride"], facts["feature_map"]) == (network.stride, feature_map)
    assert "patch_size" not in facts and "num_heads" not in facts


def test_what_a_terminal_would_obey_is_shown(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path / "net", config_for(name="a\u202eb"), random_weights()).path
    done = CliRunner().invoke(cli, ["info", str(folder)])
    assert done.exit_code == 0 and "a\\u202eb" in done.stdout and "\u202e" not in done.stdout
