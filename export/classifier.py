"""A linear classifier behind its network, as one ONNX file: pixels in, probabilities out. Needs no torch.

The file is what its network's file is (:mod:`dinokit.model_folder.contract`), and loads as that; it has one output
more, ``probabilities`` (B, classes), and the names of the classes in its metadata. Only the head is added here, so it
works on a file of any precision; the head itself is float32.
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
from dinokit.export.graphs.external_data import write_onnx
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
    from dinokit.loading.locate import Located

__all__ = ["CLASSIFIER_TARGETS", "CLASSIFIER_TOLERANCE", "ClassifierFile", "export_classifier"]

CLASSIFIER_TARGETS = ("portable", "embedder")
CLASSIFIER_TOLERANCE = 1e-4
"""The most by which a probability may differ from that of the backbone's embedding and the classifier."""
_PREFIX = "classifier:"  # of the names of what is added
_LARGE = 1024  # bytes of a tensor that stands beside the graph while that is rewritten


def must_be_of_the_last_block(what: str) -> str:
    """``what`` itself. Raises UsageError when a classifier of such vectors cannot become a file."""
    if has_inner_blocks(check_what(what)):
        raise UsageError(
            f"a classifier's file has the network's last block only, and what={what!r} needs others; fit it to vectors "
            f"of what={'cls+mean' if what.endswith('mean') else 'cls'!r}, or use ImageClassifier from Python"
        )
    return what


@dataclass(frozen=True)
class ClassifierFile:
    """What was written, and how it was proven."""

    files: tuple[Path, ...]
    """The ONNX file, and a second one with its weights where they are too large for one."""
    classes: tuple[str, ...]
    precision: str
    target: str
    pictures: int
    """Photographs that were compared."""
    largest_difference: float
    """Of a probability in the file from that of :meth:`LinearClassifier.predict_proba`."""


def export_classifier(
    source: str | Path,
    classifier: LinearClassifier,
    output: str | Path,
    *,
    what: str = "cls",
    precision: str = "auto",
    target: str = "portable",
    image_size: int | tuple[int, int] | None = None,
    revision: str | None = None,
    photos: str | Path | Sequence[str | Path] | None = None,
    told: Mapping[str, Any] | None = None,
) -> ClassifierFile:
    """Writes a network with a linear classifier behind it as one ONNX file, once it gives the classifier's numbers.

    Args:
        source: the model whose embeddings the classifier was fitted to, as for :func:`dinokit.load_backbone`; it must
            run on ONNX Runtime (a network that is no DINO ViT is exported first).
        classifier: fitted.
        output: the ``.onnx`` file; one that is there is replaced.
        what: which vectors it was fitted to: ``cls``, ``mean`` or ``cls+mean``.
        precision: ``auto`` (float32, or what a lone ``.onnx`` computes in), ``fp32``, ``fp16`` or ``int8``: the last
            two take the folder's file of that precision. The classifier should be fitted to its vectors.
        target: ``portable`` (normalised pixels in; dinokit loads it) or ``embedder`` (uint8 crops in, for servers).
        image_size: as for ``load_backbone``, if the classifier was fitted to vectors of another size than the model's.
        revision: branch, tag or commit on the Hub.
        photos: photographs to compare on; by default those that come with dinokit.
        told: further entries for the file's metadata, such as what accuracy to expect; JSON values.

    Raises:
        UsageError: the classifier is not fitted, is of vectors of another length, or an argument cannot be.
        DinokitError: ``output`` cannot be written.
        ModelError: the model cannot be read, or has no ONNX graph; ExportError, its subclass: the file gives other
            probabilities than the classifier. Nothing is left on the disk then.
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
            f"told={told!r} cannot be written as JSON ({error}); give plain numbers and texts"
        ) from error
    if not hasattr(classifier, "coef_"):
        from dinokit.classifiers.estimator import (
            NotFittedError,  # with it comes scikit-learn, if that is installed
        )

        raise NotFittedError("the classifier is not fitted yet; call fit(embeddings, labels) first")
    must_be_of_the_last_block(what)
    located = locate(source, revision=revision)
    backbone = load_backbone(
        source, engine="onnx", device="cpu", precision=precision, revision=revision, image_size=image_size
    )
    length = vector_length(what, backbone.embed_dim)
    if classifier.n_features_in_ != length:
        raise UsageError(
            f"the classifier takes {classifier.n_features_in_} numbers and {backbone.name} makes {length} "
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
    head.pop("class_type", None)  # told of another classifier
    if kind := {"i": "int", "u": "int", "b": "bool"}.get(classifier.classes_.dtype.kind):
        head["class_type"] = kind
    graph.metadata_props.add(key=CLASSIFIER_KEY, value=json.dumps(head, ensure_ascii=False))
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=".dinokit-") as work:
        files = write_onnx(graph, Path(work) / output.name, store)
        check_graph(files[0])
        _, pictures = open_photographs(photos, backbone.preprocessing.channels)
        difference = _largest_difference(files[0], backbone, classifier, pictures, what=what, target=target)
        if not difference <= CLASSIFIER_TOLERANCE:  # NaN is not either
            raise ExportError(
                f"the probabilities of the written file differ from the classifier's by up to {difference:.1e}; at "
                f"most {CLASSIFIER_TOLERANCE:.0e} was expected. Nothing was written; please report this"
            )
        for file in reversed(files):  # the graph last: it is what people open
            file.replace(output.with_name(file.name))
    written = tuple(output.with_name(file.name) for file in files)
    return ClassifierFile(written, tuple(classes), backbone.precision, target, len(pictures), difference)


def _graph_of(located: Located, precision: str) -> tuple[onnx.ModelProto, Store]:
    """The network's graph, and its large weights, which stand outside of it."""
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
    """Takes away what an earlier :func:`add_head` has added, if it has; in place."""
    for values in (model.graph.node, model.graph.initializer, model.graph.output):
        for place in reversed(range(len(values))):
            if values[place].name.startswith((_PREFIX, PROBABILITIES)):
                del values[place]


def add_head(
    model: onnx.ModelProto, store: Store, classifier: LinearClassifier, *, what: str, n_prefix: int
) -> onnx.ModelProto:
    """The network with the output ``probabilities``.

    Args:
        model: with the outputs of :mod:`dinokit.model_folder.contract`; it stays as it is.
        store: its large weights; gets the head's.
        classifier: fitted to (N, D) vectors.
        what: which vectors these are.
        n_prefix: tokens before those of the patches.
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
        """The mean of the patches' tokens."""
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
    """Plain ONNX Runtime on the file, beside the backbone and the classifier in numpy, on one batch of pictures."""
    crops = np.stack([backbone.preprocessing.crop(picture) for picture in pictures])
    if target == "embedder":  # which takes bytes: what is finer is rounded, as whoever uses the file must
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
