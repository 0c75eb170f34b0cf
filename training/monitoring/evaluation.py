"""k-NN accuracy during training: how well frozen features separate labelled pictures.

Source: Caron et al. 2021, §3.2 and Figure 6 (teacher and student over time). In a distillation, the student's
moving average replaces the teacher here, and in metrics.jsonl as ``knn_teacher``. Labels only evaluate; nothing is
learned from them. No random number is drawn from a global generator, so a run with labels has the same weights as one
without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from dinokit.classifiers.knn import KNNClassifier
from dinokit.classifiers.labelled import LabelledPictures, is_table, must_have_classes
from dinokit.classifiers.labelled_sources import find_labelled_items
from dinokit.errors import ImageError, UsageError
from dinokit.features.batching import count_workers, map_ahead
from dinokit.pictures.bands import decode_picture
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.timm_networks import evaluation_mode
from dinokit.sources import Item, in_order
from dinokit.training.views.pictures import Pictures, TrainingPictures

__all__ = ["KNNProbe", "embed_crops", "find_labelled_set", "read_crop"]

_BATCH = 64


def find_labelled_set(source: str | os.PathLike[str], *, channels: int = 3) -> LabelledPictures:
    """Labelled pictures in any form that ``dinokit knn`` takes as references, tables of embeddings excepted.

    Args:
        source: as for :func:`dinokit.classifiers.labelled_sources.find_labelled_items`.
        channels: of the network, on which it depends what files are pictures.

    Raises:
        UsageError: the source does not exist, has no labels, or only one class.
    """
    if is_table(source):
        raise UsageError(
            f"{source} is a table of embeddings, and k-NN during training needs the pictures, which the network in "
            "training embeds; name the folder, archive or dataset that they are in"
        )
    found = find_labelled_items(source, channels=channels)
    must_have_classes(found.labels, str(source))
    return found


class KNNProbe:
    """Evaluates networks on a bounded number of labelled pictures, which are decoded once and kept.

    Args:
        labelled: source of references (:func:`find_labelled_set`).
        queries: source of other pictures, which the references classify; without it, each reference is classified by
            all the others.
        preprocessing: from picture to network input, that of the model folder.
        limit: most references, and most queries; chosen uniformly at random, always the same.
        on_problem: called with a sentence for each problem.

    Raises:
        UsageError: see :func:`find_labelled_set`.
    """

    def __init__(
        self,
        labelled: str | os.PathLike[str],
        queries: str | os.PathLike[str] | None,
        preprocessing: Preprocessing,
        *,
        limit: int = 2000,
        on_problem: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.preprocessing, self.limit, self.on_problem = preprocessing, limit, on_problem
        self._sets = [
            find_labelled_set(source, channels=preprocessing.channels)
            for source in (labelled, queries)
            if source is not None
        ]
        for found in self._sets:
            for problem in found.problems:
                on_problem(problem)
        if queries is not None and not set(self._sets[0].labels) & set(self._sets[1].labels):
            raise UsageError(
                f"{queries} and {labelled} have no label in common ({self._sets[1].labels[0]!r} and "
                f"{self._sets[0].labels[0]!r}, for instance), so no query could be right"
            )
        self._decoded: list[tuple[NDArray[Any], list[str]]] | None = None

    @property
    def n_queries(self) -> int:
        """The number of pictures to classify, unreadable ones included."""
        return min(self.limit, len(self._sets[-1].paths))

    def score(self, backbone: nn.Module, device: torch.device) -> float:
        """Top-1 accuracy, 0 to 1, by the 20 nearest neighbours at temperature 0.07, the paper's.

        Args:
            backbone: (B, C, H, W) to (B, D). It runs in evaluation mode in float32; its mode is restored.
            device: the backbone's.

        Raises:
            UsageError: fewer than 2 of the pictures can be read.
        """
        if self._decoded is None:
            self._decoded = [self._decode(found) for found in self._sets]
        embedded = [embed_crops(backbone, crops, self.preprocessing, device) for crops, _ in self._decoded]
        references, labels = embedded[0], self._decoded[0][1]
        if len(references) < 2:
            raise UsageError(
                f"k-NN during training needs 2 readable pictures with labels, not {len(references)}"
            )
        if len(embedded) == 1:
            return KNNClassifier(k=min(20, len(references) - 1)).fit(references, labels).leave_one_out_score()
        return (
            KNNClassifier(k=min(20, len(references)))
            .fit(references, labels)
            .score(embedded[1], self._decoded[1][1])
        )

    def _decode(self, found: LabelledPictures) -> tuple[NDArray[Any], list[str]]:
        """(M, H, W, C) crops and their labels."""
        count = len(found.paths)
        chosen = np.sort(np.random.default_rng(0).permutation(count)[: self.limit]).tolist()

        def read(item: Item) -> NDArray[Any] | str:
            return read_crop(TrainingPictures([item]), 0, self.preprocessing)

        items = in_order(found.paths[index] for index in chosen)
        crops = list(map_ahead(read, items, workers=count_workers("auto"), ahead=_BATCH))
        for crop in crops:
            if isinstance(crop, str):
                self.on_problem(f"left out of k-NN, cannot be read: {crop}")
        kept = [
            (crop, found.labels[i])
            for crop, i in zip(crops, chosen, strict=True)
            if not isinstance(crop, str)
        ]
        shape = (0, *self.preprocessing.crop_px, self.preprocessing.channels)
        stacked = np.stack([crop for crop, _ in kept]) if kept else np.zeros(shape, np.uint8)
        return stacked, [label for _, label in kept]


def read_crop(pictures: Pictures, index: int, preprocessing: Preprocessing) -> NDArray[Any] | str:
    """(H, W, C) of one picture as the network sees it in evaluation, or why it cannot be read."""
    try:
        return preprocessing.crop(decode_picture(pictures.read(index), preprocessing.channels))
    except (ImageError, OSError) as error:
        return f"{pictures.name(index)}: {error}"


def embed_crops(
    backbone: nn.Module, crops: NDArray[Any], preprocessing: Preprocessing, device: torch.device
) -> NDArray[np.float32]:
    """(M, H, W, C) crops to (M, D) embeddings, in evaluation mode, float32, without gradient."""
    rows = []
    with evaluation_mode(backbone), torch.no_grad():
        for start in range(0, len(crops), _BATCH):
            pixels = torch.from_numpy(preprocessing.normalise(crops[start : start + _BATCH]))
            rows.append(backbone(pixels.to(device)).float().cpu().numpy())
    return np.concatenate(rows) if rows else np.zeros((0, 1), np.float32)
