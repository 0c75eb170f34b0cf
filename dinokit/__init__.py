"""Image features from self-supervised Vision Transformers (DINO).

    from dinokit import load_backbone

    backbone = load_backbone("starter")
    backbone.embed("photo.jpg")          # (D,) float32

Importing this package loads neither torch nor onnxruntime: the public names are resolved when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dinokit._version import __version__

if TYPE_CHECKING:
    from dinokit.backbone import Backbone
    from dinokit.errors import DinokitError
    from dinokit.knn import KNNClassifier
    from dinokit.loading import load_backbone

__all__ = ["Backbone", "DinokitError", "KNNClassifier", "__version__", "load_backbone"]

_HOMES = {
    "Backbone": "dinokit.backbone",
    "DinokitError": "dinokit.errors",
    "KNNClassifier": "dinokit.knn",
    "load_backbone": "dinokit.loading",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dinokit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
