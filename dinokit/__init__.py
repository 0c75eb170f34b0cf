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
    from dinokit.duplicates import find_duplicates, find_duplicates_against
    from dinokit.embedder import DinoEmbedder
    from dinokit.embedding_patches import read_patches
    from dinokit.embeddings import read_embeddings
    from dinokit.errors import DinokitError
    from dinokit.image_classifier import ImageClassifier, load_classifier
    from dinokit.knn import KNNClassifier
    from dinokit.linear_classifier import LinearClassifier
    from dinokit.loading import load_backbone
    from dinokit.search import SearchIndex
    from dinokit.selection import select_diverse, select_typical

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
    "Backbone": "dinokit.backbone",
    "DinoEmbedder": "dinokit.embedder",
    "DinokitError": "dinokit.errors",
    "ImageClassifier": "dinokit.image_classifier",
    "KNNClassifier": "dinokit.knn",
    "LinearClassifier": "dinokit.linear_classifier",
    "SearchIndex": "dinokit.search",
    "find_duplicates": "dinokit.duplicates",
    "find_duplicates_against": "dinokit.duplicates",
    "load_backbone": "dinokit.loading",
    "load_classifier": "dinokit.image_classifier",
    "read_embeddings": "dinokit.embeddings",
    "read_patches": "dinokit.embedding_patches",
    "select_diverse": "dinokit.selection",
    "select_typical": "dinokit.selection",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dinokit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
