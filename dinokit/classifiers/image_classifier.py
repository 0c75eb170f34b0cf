"""``load_classifier`` reads a file written by ``dinokit fit`` as an ImageClassifier, a backbone with a linear head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.classifiers.linear_classifier import LinearClassifier
from dinokit.errors import ModelError
from dinokit.features.batching import BatchSize, Workers
from dinokit.features.pooling import vector_length
from dinokit.loading.load import load_backbone
from dinokit.loading.zoo import STARTER, ZOO
from dinokit.model_folder.contract import CLASSIFIER_BIAS, CLASSIFIER_WEIGHT, classifier_of, contract_of
from dinokit.model_folder.folder import find_model_folder

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone

__all__ = ["ImageClassifier", "load_classifier"]


class ImageClassifier:
    """Pictures to labels: a backbone and a linear classifier of its embeddings.

    Made by :func:`dinokit.load_classifier`, or from two parts that belong together. Both methods take pictures,
    ``batch_size`` and ``workers`` as the methods of :class:`dinokit.Backbone` do, and raise the same errors.
    """

    def __init__(self, backbone: Backbone, head: LinearClassifier, *, what: str = "cls") -> None:
        """
        Args:
            backbone: makes the embeddings.
            head: fitted to embeddings of this backbone.
            what: which of its vectors, as for :meth:`dinokit.Backbone.embed`.

        Raises:
            ModelError: the head was fitted to vectors of another length.
        """
        length = vector_length(what, backbone.embed_dim)
        if head.n_features_in_ != length:
            raise ModelError(
                f"the classifier takes {head.n_features_in_} numbers and {backbone.name} makes {length} "
                f"(what={what!r}); they do not belong together"
            )
        self.backbone = backbone
        self.head = head
        self.what = what
        self.told: dict[str, Any] = {}
        """What the file records about how the head was fitted."""

    @property
    def classes_(self) -> NDArray[Any]:
        """(C,) labels, in the order of the columns of :meth:`predict_proba`."""
        classes: NDArray[Any] = self.head.classes_
        return classes

    def __repr__(self) -> str:
        return f"<ImageClassifier of {len(self.classes_)} classes on {self.backbone!r}>"

    def predict_proba(
        self, images: Any, *, batch_size: BatchSize = 32, workers: Workers = "auto"
    ) -> NDArray[np.float64]:
        """The probability of each class: (C,) float64 for one picture, (N, C) for several; a row sums to 1."""
        vectors = self.backbone.embed(images, what=self.what, batch_size=batch_size, workers=workers)
        if not len(vectors):
            return np.empty((0, len(self.classes_)))
        shares = self.head.predict_proba(np.atleast_2d(vectors))
        return shares if vectors.ndim == 2 else shares[0]

    def predict(self, images: Any, *, batch_size: BatchSize = 32, workers: Workers = "auto") -> Any:
        """The most probable label: a str for one picture, or an int or bool if ``head`` was fitted to these; (N,) for
        several pictures."""
        shares = self.predict_proba(images, batch_size=batch_size, workers=workers)
        found = self.classes_[shares.argmax(axis=-1)]
        return found.item() if shares.ndim == 1 else found


def load_classifier(
    path: str | os.PathLike[str], *, device: str = "auto", reduced_decoding: bool = False
) -> ImageClassifier:
    """Loads a classifier that turns pictures into labels. It needs neither torch nor scikit-learn.

    Args:
        path: an ONNX file written by ``dinokit fit`` or :func:`dinokit.export.export_classifier`.
        device: as for :func:`dinokit.load_backbone`.
        reduced_decoding: likewise.

    Raises:
        ModelError: there is no such file, or it has no classifier, is damaged, or takes crops (for other programs).
        DeviceError: the requested device is not available.
    """
    path = Path(path).expanduser()
    is_known = not path.exists() and (str(path) == STARTER or str(path) in ZOO)
    if is_known or find_model_folder(path):
        raise ModelError(
            f"{path} is a model without a classifier; make one with: dinokit fit LABELLED/ -m {path} -o kinds.onnx"
        )
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise ModelError(f"{path} {what}; expected a file written by `dinokit fit`")
    told = classifier_of(path)
    if told is None:
        raise ModelError(
            f"{path} contains no classifier (no metadata 'dinokit_classifier'); expected a file written by "
            "`dinokit fit`"
        )
    if contract_of(path)["target"] == "embedder":
        raise ModelError(
            f"{path} takes uint8 crops (B, H, W, 3): it is for ONNX Runtime itself and for servers. Write one for "
            "dinokit with: dinokit fit … --target portable"
        )
    backbone = load_backbone(path, device=device, reduced_decoding=reduced_decoding)
    classifier = ImageClassifier(backbone, _read_head(path, told["classes"]), what=told["what"])
    classifier.told = told
    return classifier


def _read_head(path: Path, classes: list[str] | list[int] | list[bool]) -> LinearClassifier:
    """Reads the head's weights from the graph, so that they are not stored twice."""
    import onnx

    tensors = {
        tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64)
        for tensor in onnx.load(str(path), load_external_data=False).graph.initializer
        if tensor.name in (CLASSIFIER_WEIGHT, CLASSIFIER_BIAS)
    }
    weight, bias = tensors.get(CLASSIFIER_WEIGHT), tensors.get(CLASSIFIER_BIAS)
    if weight is None or bias is None or weight.ndim != 2 or {weight.shape[1], *bias.shape} != {len(classes)}:
        raise ModelError(
            f"{path} lacks the weights of its {len(classes)} classes; it is damaged, or was rewritten by another "
            "program. Write it again with `dinokit fit`"
        )
    head = LinearClassifier()
    head.classes_ = np.asarray(classes)
    head.coef_, head.intercept_ = weight.T, bias
    head.n_features_in_ = len(weight)
    return head
