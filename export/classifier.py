"""A network with a linear classifier as one ONNX file: pixels in, probabilities out. Needs no torch.

The file follows the same contract as the network's (:mod:`dinokit.model_folder.contract`) and loads like it; it has an
additional output ``probabilities`` (B, classes), and the class names in its metadata. Only the head is added here, so
it works with files of any precision; the head itself is float32.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ExportError, ModelError, UsageError
from dinokit.export.graphs.embedder import to_embedder
from dinokit.export.graphs.external_data import put_onnx, write_onnx
from dinokit.export.graphs.graph import Rewriter, Store, check_graph
from dinokit.export.verification.proof import open_photographs
from dinokit.features.pooling import check_what, has_inner_blocks, vector_length
from dinokit.files.outputs import must_be_writable
from dinokit.loading.load import load_backbone, onnx_file
from dinokit.loading.locate import locate
from dinokit.model_folder.contract import (
    CLASSIFIER_BIAS,
    CLASSIFIER_KEY,
    CLASSIFIER_WEIGHT,
    EMBEDDING,
    IMAGE,
    INPUT,
    METADATA_KEY,
    POOLED,
    PROBABILITIES,
    TOKENS,
    contract,
)
from dinokit.vit_graph import split_vit_graph

if TYPE_CHECKING:
    import onnx

    from dinokit.classifiers.linear_classifier import LinearClassifier
    from dinokit.features.backbone import Backbone
    from dinokit.loading.load import PrecisionName
    from dinokit.loading.locate import Located

__all__ = ["CLASSIFIER_TARGETS", "CLASSIFIER_TOLERANCE", "ClassifierFile", "export_classifier"]

CLASSIFIER_TARGETS = ("portable", "embedder")
CLASSIFIER_TOLERANCE = 1e-4
"""Largest allowed difference of a probability from backbone and classifier run separately."""
_PREFIX = "classifier:"  # of the names of added nodes and tensors
_LARGE = 1024  # bytes; larger tensors are kept outside the graph while it is rewritten


def must_be_of_the_last_block(what: str) -> str:
    """Returns ``what``. Raises UsageError if a classifier of these vectors cannot be written to a file."""
    if has_inner_blocks(check_what(what)):
        raise UsageError(
            f"a classifier's file uses the network's last block only, and what={what!r} needs others; fit it to "
            f"vectors of what={'cls+mean' if what.endswith('mean') else 'cls'!r}, or use ImageClassifier from Python"
        )
    return what


@dataclass(frozen=True)
class ClassifierFile:
    """The written files and the result of their check."""

    files: tuple[Path, ...]
    """The ONNX file, and a second file with the weights if they are too large for one."""
    classes: tuple[str, ...]
    precision: str
    target: str
    pictures: int
    """Number of photographs compared."""
    largest_difference: float
    """Largest difference of a probability from :meth:`LinearClassifier.predict_proba`."""


def export_classifier(
    source: str | Path,
    classifier: LinearClassifier,
    output: str | Path,
    *,
    what: str = "cls",
    precision: PrecisionName = "auto",
    target: str = "portable",
    image_size: int | tuple[int, int] | None = None,
    revision: str | None = None,
    photos: str | Path | Sequence[str | Path] | None = None,
    told: Mapping[str, Any] | None = None,
) -> ClassifierFile:
    """Writes a network with a linear classifier as one ONNX file, after comparing it with the classifier.

    Args:
        source: the model whose embeddings the classifier was fitted to, as for :func:`dinokit.load_backbone`; it must
            run on ONNX Runtime (export other networks than DINO ViTs first).
        classifier: fitted.
        output: the ``.onnx`` file; an existing one is replaced.
        what: the vectors it was fitted to: ``cls``, ``mean`` or ``cls+mean``.
        precision: ``auto`` (float32, or the precision of a lone ``.onnx``), ``fp32``, ``fp16`` or ``int8``; the last
            two use the folder's file of that precision, to whose vectors the classifier should be fitted.
        target: ``portable`` (normalised pixels in; dinokit loads it) or ``embedder`` (uint8 crops in, for servers).
        image_size: as for ``load_backbone``, if the classifier was fitted at another size than the model's.
        revision: branch, tag or commit on the Hub.
        photos: photographs to compare on; by default those bundled with dinokit.
        told: further JSON entries for the file's metadata, such as the expected accuracy.

    Raises:
        UsageError: the classifier is not fitted or takes vectors of another length, or an argument is invalid.
        DinokitError: ``output`` cannot be written.
        ModelError: the model cannot be read, or has no ONNX graph.
        ExportError: the file's probabilities differ from the classifier's (a subclass of ModelError). No file is left.
    """
    output = Path(output)
    if target not in CLASSIFIER_TARGETS:
        raise UsageError(f"target={target!r} is not known; expected one of {', '.join(CLASSIFIER_TARGETS)}")
    if output.suffix.lower() != ".onnx":
        raise UsageError(f"{output}: the suffix {output.suffix!r} is not known; expected .onnx")
    if output.is_dir():
        raise UsageError(f"{output} is a folder; expected the name of a file")
    must_be_writable(output)
    try:
        json.dumps(told)
    except (TypeError, ValueError) as error:
        raise UsageError(
            f"told={told!r} cannot be written as JSON ({error}); use plain numbers and strings"
        ) from error
    if not hasattr(classifier, "coef_"):
        from dinokit.estimator import NotFittedError  # imports scikit-learn if installed

        raise NotFittedError("the classifier is not fitted yet; call fit(embeddings, labels) first")
    must_be_of_the_last_block(what)
    located = locate(source, revision=revision)
    backbone = load_backbone(
        source, engine="onnx", device="cpu", precision=precision, revision=revision, image_size=image_size
    )
    length = vector_length(what, backbone.embed_dim)
    if classifier.n_features_in_ != length:
        raise UsageError(
            f"the classifier takes {classifier.n_features_in_} numbers, but {backbone.name} gives {length} "
            f"(what={what!r}); fit it to embeddings of this model"
        )
    graph, store = _graph_of(located, precision)
    graph = add_head(graph, store, classifier, what=what, n_prefix=located.config.num_prefix_tokens)
    if target == "embedder":
        graph = to_embedder(graph, backbone.preprocessing, store, keep=(PROBABILITIES,))
    classes = [str(name) for name in classifier.classes_.tolist()]
    says = contract(
        replace(located.config, preprocessing=backbone.preprocessing),
        located.weights_sha256,
        precision=backbone.precision,
        target=target,
    )
    del graph.metadata_props[:]
    graph.metadata_props.add(key=METADATA_KEY, value=json.dumps(says))
    head = {**(told or {}), "classes": classes, "what": what}
    head.pop("class_type", None)  # may describe another classifier
    if kind := {"i": "int", "u": "int", "b": "bool"}.get(classifier.classes_.dtype.kind):
        head["class_type"] = kind
    graph.metadata_props.add(key=CLASSIFIER_KEY, value=json.dumps(head, ensure_ascii=False))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".dinokit-") as work:
        files = write_onnx(graph, Path(work) / output.name, store)
        check_graph(files[0])
        pictures = open_photographs(photos, backbone.preprocessing.channels).compared
        difference = _largest_difference(files[0], backbone, classifier, pictures, what=what, target=target)
        if not difference <= CLASSIFIER_TOLERANCE:  # also refuses NaN
            raise ExportError(
                f"the probabilities of the file differ from the classifier's by up to {difference:.1e}; at most "
                f"{CLASSIFIER_TOLERANCE:.0e} is allowed. Nothing was written; please report this"
            )
        put_onnx(files[0], output)
    written = tuple(output.with_name(file.name) for file in files)
    return ClassifierFile(written, tuple(classes), backbone.precision, target, len(pictures), difference)


def _graph_of(located: Located, precision: str) -> tuple[onnx.ModelProto, Store]:
    """The network's graph and its large weights, which are kept outside of it."""
    import onnx

    file = onnx_file(located, "cpu", precision)
    if file is None:  # load_backbone has made sure that it can be written
        assert located.load_weights is not None
        return split_vit_graph(located.config.vit, located.load_weights())
    model = onnx.load(str(file))
    without_head(model)
    store: Store = {}
    for tensor in model.graph.initializer:
        values = onnx.numpy_helper.to_array(tensor)
        if values.nbytes >= _LARGE:
            store[tensor.name] = values
            tensor.ClearField("raw_data")
            tensor.data_location = tensor.EXTERNAL
            tensor.external_data.add(key="location", value="in memory")
    return model, store


# -- the graph


def without_head(model: onnx.ModelProto) -> None:
    """Removes what an earlier :func:`add_head` added, in place."""
    for values in (model.graph.node, model.graph.initializer, model.graph.output):
        for place in reversed(range(len(values))):
            if values[place].name.startswith((_PREFIX, PROBABILITIES)):
                del values[place]


def add_head(
    model: onnx.ModelProto, store: Store, classifier: LinearClassifier, *, what: str, n_prefix: int
) -> onnx.ModelProto:
    """The network with the output ``probabilities``.

    Args:
        model: with the outputs of :mod:`dinokit.model_folder.contract`; not modified.
        store: its large weights; the head's are added.
        classifier: fitted to (N, D) vectors.
        what: the kind of vectors.
        n_prefix: number of tokens before the patch tokens.
    """
    return _Head(model, store).run(classifier, what, n_prefix)


class _Head(Rewriter):
    def run(self, classifier: LinearClassifier, what: str, n_prefix: int) -> onnx.ModelProto:
        self.nodes += self.source_nodes
        parts = [POOLED if part == "cls" else self.mean(n_prefix) for part in what.split("+")]
        vector = parts[0]
        if len(parts) > 1:
            vector = self.op("Concat", *parts, output=f"{_PREFIX}vector", axis=1)
        weight = self.constant(CLASSIFIER_WEIGHT, classifier.coef_.T.astype(np.float32))
        bias = self.constant(CLASSIFIER_BIAS, classifier.intercept_.astype(np.float32))
        logits = self.op("Gemm", vector, weight, bias, output=f"{_PREFIX}logits")
        self.op("Softmax", logits, output=PROBABILITIES, axis=-1)
        made = self.finish()
        batch = made.graph.output[0].type.tensor_type.shape.dim[0]
        shape = [batch.dim_param or batch.dim_value, len(classifier.intercept_)]
        values = self.onnx.helper.make_tensor_value_info
        made.graph.output.append(values(PROBABILITIES, self.onnx.TensorProto.FLOAT, shape))
        return made

    def mean(self, n_prefix: int) -> str:
        """The mean of the patch tokens."""
        if TOKENS not in self.outputs:
            raise UsageError("this network has no feature map; its classifier is one of what='cls'")
        ints = [("first", n_prefix), ("end", np.iinfo(np.int64).max), ("axis", 1)]
        names = [self.constant(f"{_PREFIX}{name}", np.array([value], np.int64)) for name, value in ints]
        patches = self.op("Slice", TOKENS, *names, output=f"{_PREFIX}patches")
        return self.op("ReduceMean", patches, names[-1], output=f"{_PREFIX}mean", keepdims=0)


# -- the proof


def _largest_difference(
    file: Path,
    backbone: Backbone,
    classifier: LinearClassifier,
    pictures: Sequence[Any],
    *,
    what: str,
    target: str,
) -> float:
    """Compares plain ONNX Runtime on the file with backbone and classifier in numpy, on one batch of pictures."""
    crops = np.stack([backbone.preprocessing.crop(picture) for picture in pictures])
    if target == "embedder":  # takes uint8, so finer values are rounded, as its users must do
        crops = np.rint(crops).clip(0, 255).astype(np.uint8)
    expected = classifier.predict_proba(backbone.embed_crops(crops, what=what))
    if target == "embedder":
        found = _run(file, {IMAGE: crops}, (EMBEDDING, PROBABILITIES))
    else:
        found = _run(file, {INPUT: backbone.preprocessing.normalise(crops)}, (POOLED, PROBABILITIES))
    return float(np.abs(found - expected).max())


def _run(file: Path, inputs: dict[str, NDArray[Any]], outputs: Sequence[str]) -> NDArray[np.float32]:
    import onnxruntime as ort

    from dinokit.runtime.onnx import session_options

    try:
        session = ort.InferenceSession(str(file), session_options(), providers=["CPUExecutionProvider"])
        found: NDArray[np.float32] = session.run(list(outputs), inputs)[-1]
    except Exception as error:
        raise ModelError(f"{file.name} cannot be run by ONNX Runtime: {error}") from error
    return found
