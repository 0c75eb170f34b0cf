"""An ONNX file for the model folders of tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dinokit.model_folder.contract import METADATA_KEY, contract
from dinokit.model_folder.folder import ModelFolder
from dinokit.vit_graph import build_vit_graph


def add_onnx(folder: ModelFolder, **changes: Any) -> Path:
    """Writes the folder's ONNX file, its contract changed."""
    says = contract(folder.config, folder.weights_sha256) | changes
    path = folder.path / "onnx" / "model.onnx"
    path.parent.mkdir(exist_ok=True)
    graph = build_vit_graph(
        folder.config.vit, folder.load_weights(), metadata={METADATA_KEY: json.dumps(says)}
    )
    path.write_bytes(graph.SerializeToString())
    return path
