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
    from dinokit.classifiers.image_classifier import ImageClassifier, load_classifier
    from dinokit.classifiers.knn import KNNClassifier
    from dinokit.classifiers.linear_classifier import LinearClassifier
    from dinokit.errors import DinokitError
    from dinokit.features.backbone import Backbone
    from dinokit.features.embedder import DinoEmbedder
    from dinokit.loading.load import load_backbone
    from dinokit.neighbours.duplicates import find_duplicates, find_duplicates_against
    from dinokit.neighbours.search import SearchIndex
    from dinokit.neighbours.selection import select_diverse, select_typical
    from dinokit.tables.embeddings import read_embeddings
    from dinokit.tables.patches import read_patches

__all__ = [
    "Backbone",
    "DinoEmbedder",
    "DinokitError",
    "ImageClassifier",
    "KNNClassifier",
    "LinearClassifier",
    "SearchIndex",
    "__version__",
    "find_duplicates",
    "find_duplicates_against",
    "load_backbone",
    "load_classifier",
    "read_embeddings",
    "read_patches",
    "select_diverse",
    "select_typical",
]

_HOMES = {
    "Backbone": "dinokit.features.backbone",
    "DinoEmbedder": "dinokit.features.embedder",
    "DinokitError": "dinokit.errors",
    "ImageClassifier": "dinokit.classifiers.image_classifier",
    "KNNClassifier": "dinokit.classifiers.knn",
    "LinearClassifier": "dinokit.classifiers.linear_classifier",
    "SearchIndex": "dinokit.neighbours.search",
    "find_duplicates": "dinokit.neighbours.duplicates",
    "find_duplicates_against": "dinokit.neighbours.duplicates",
    "load_backbone": "dinokit.loading.load",
    "load_classifier": "dinokit.classifiers.image_classifier",
    "read_embeddings": "dinokit.tables.embeddings",
    "read_patches": "dinokit.tables.patches",
    "select_diverse": "dinokit.neighbours.selection",
    "select_typical": "dinokit.neighbours.selection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dinokit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
