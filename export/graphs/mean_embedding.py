"""Subtracts the mean embedding from a Vision Transformer's embeddings, inside its weights.

Embeddings of one network share a direction: all cosines are high, and only small differences separate neighbours.
Without the mean, the cosine compares what differs between pictures. A ViT's last operation is an affine norm, so the
mean is subtracted from its bias: no file needs a new part, and every framework that loads the folder applies it.

Source: Jégou and Chum 2012, "Negative evidences and co-occurences in image retrieval", §3 (centring before the cosine);
Mu and Viswanath 2018, "All-but-the-Top", §2, for embeddings of words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ImageError, UsageError
from dinokit.features.backbone import Backbone
from dinokit.loading.locate import Located, Weights
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.pictures.bands import open_picture
from dinokit.sources import find_pictures
from dinokit.sources.spread import evenly_spaced

__all__ = ["NORM_BIAS", "mean_embedding", "subtract_mean"]

NORM_BIAS = "norm.bias"
"""timm's name of the final norm's bias."""

_MOST = 5000
"""Largest number of pictures used, evenly over all: the mean does not need more."""
_BATCH = 64


def subtract_mean(
    located: Located,
    backbone: Backbone,
    pictures: Sequence[str | Path],
    say: Callable[[str], None] = lambda step: None,
) -> tuple[Located, str]:
    """The model with another bias in its final norm, so that the embeddings of these pictures have mean 0.

    CLS, registers and patches share that norm, so all tokens move by the same vector; attention does not change.

    Args:
        located: a DINO ViT with weights.
        backbone: the same model, to embed with.
        pictures: as :func:`dinokit.sources.find_pictures` takes them. Labels are not read.
        say: called with a description of each step.

    Returns:
        The model, and a remark for its ``source``.

    Raises:
        UsageError: not a Vision Transformer, no pictures, or none that can be read.
    """
    if not isinstance(located.config.architecture, VitArchitecture):
        raise UsageError(
            f"{located.config.name} is a {located.config.timm_architecture}, whose embedding is not the output of a "
            "norm; only a Vision Transformer of the DINO family can have its mean subtracted (leave out --center)"
        )
    assert located.load_weights is not None
    load = located.load_weights
    mean, n_images = mean_embedding(backbone, pictures, say)

    def moved() -> Weights:
        weights = dict(load())
        weights[NORM_BIAS] = (weights[NORM_BIAS] - mean).astype(np.float32)
        return weights

    return replace(located, load_weights=moved), f"; mean embedding of {n_images} pictures taken off"


def mean_embedding(
    backbone: Backbone,
    pictures: Sequence[str | Path],
    say: Callable[[str], None] = lambda step: None,
) -> tuple[NDArray[np.float64], int]:
    """(D,) mean of the CLS embeddings, and the number of pictures.

    Raises:
        UsageError: no pictures, or none that can be read.
    """
    channels = backbone.preprocessing.channels
    found = find_pictures([str(name) for name in pictures], channels=channels)
    chosen = evenly_spaced(len(found), _MOST)
    total, n_images, first_problem = np.zeros(backbone.embed_dim), 0, ""
    for start in range(0, len(chosen), _BATCH):
        crops = []
        for i in chosen[start : start + _BATCH]:
            try:
                crops.append(backbone.preprocessing.crop(open_picture(found[i], channels)))
            except ImageError as error:
                first_problem = first_problem or str(error)
        if crops:
            total += backbone.embed_crops(np.stack(crops)).sum(axis=0, dtype=np.float64)
            n_images += len(crops)
        say(f"mean embedding: {min(start + _BATCH, len(chosen))} of {len(chosen)} pictures")
    if not n_images:
        raise UsageError(
            f"none of the {len(chosen)} pictures to center on can be read; the first: {first_problem}"
        )
    return total / n_images, n_images
