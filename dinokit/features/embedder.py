"""DinoEmbedder: a scikit-learn transformer that embeds pictures."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError
from dinokit.estimator import BaseEstimator, TransformerMixin
from dinokit.features.batching import BatchSize, Workers, count_workers, first_batch_size
from dinokit.features.pooling import check_what, vector_length
from dinokit.pictures.images import is_tensor
from dinokit.sources import is_collection

if TYPE_CHECKING:
    from PIL import Image

    from dinokit.features.backbone import Backbone
    from dinokit.loading.load import EngineName, PrecisionName

__all__ = ["DinoEmbedder"]

# Threads that start together share one load. Not an attribute, since a lock cannot be pickled or copied.
_LOADING = threading.Lock()


class DinoEmbedder(TransformerMixin, BaseEstimator):
    """Pictures to embeddings, as a scikit-learn transformer.

    ::

        classifier = make_pipeline(DinoEmbedder("starter"), KNNClassifier())
        classifier.fit(paths, labels).predict(["photo.jpg"])

    ``fit`` learns nothing: the same pictures always give the same vectors. The model is loaded when it is first
    needed. ``clone``, pickle and joblib do not copy it; the copy loads it again by its name. With
    ``Pipeline(…, memory="folder")`` a grid search over later steps embeds the training set once.

    Args:
        model: a name, path or Hub id, as for :func:`dinokit.load_backbone`.
        batch_size: pictures per run of the network.
        workers: threads that decode: ``"auto"``, or a number.
        what: ``cls``, ``mean``, ``cls+mean``, ``cls:4`` …, as for :meth:`dinokit.Backbone.embed`.
        normalize: L2-normalise each vector.
        engine, device, precision, revision, image_size, reduced_decoding: as for :func:`dinokit.load_backbone`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] = "starter",
        *,
        batch_size: BatchSize = 32,
        workers: Workers = "auto",
        what: str = "cls",
        normalize: bool = False,
        engine: EngineName = "auto",
        device: str = "auto",
        precision: PrecisionName = "auto",
        revision: str | None = None,
        image_size: int | tuple[int, int] | None = None,
        reduced_decoding: bool = False,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.workers = workers
        self.what = what
        self.normalize = normalize
        self.engine = engine
        self.device = device
        self.precision = precision
        self.revision = revision
        self.image_size = image_size
        self.reduced_decoding = reduced_decoding

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Loads the model, so that a wrong name, device or size raises here. Pictures are not read.

        Raises:
            DinokitError: as :func:`dinokit.load_backbone` raises.
        """
        first_batch_size(self.batch_size, "cpu")  # checks it
        count_workers(self.workers)
        check_what(self.what)
        _ = self.backbone  # loads it
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Embeds pictures.

        Args:
            X: several pictures, N: a list, an array of paths, a pandas Series or a data frame of one column; each a
                path, Pillow image, bytes, uint8 array … as for :meth:`dinokit.Backbone.embed`. Also a uint8 array
                (N, H, W, 3) or tensor (N, 3, H, W), the name of a folder, pattern or archive.

        Returns:
            (N, D) float32, (N, 2 D) for ``cls+mean``, (N, 4 D) for ``cls:4``.

        Raises:
            UsageError: one picture instead of several, or something without pictures.
            ImageError: a picture cannot be read; the message names it.
        """
        return self.backbone.embed(
            _several(X),
            what=self.what,
            normalize=self.normalize,
            batch_size=self.batch_size,
            workers=self.workers,
        )

    @property
    def backbone(self) -> Backbone:
        """The model, loaded on first use and again after a parameter has changed."""
        from dinokit.loading.load import load_backbone

        options = {
            "engine": self.engine,
            "device": self.device,
            "precision": self.precision,
            "revision": self.revision,
            "image_size": self.image_size,
            "reduced_decoding": self.reduced_decoding,
        }
        with _LOADING:
            loaded, backbone = getattr(self, "_loaded", (None, None))
            if backbone is None or loaded != (self.model, options):
                backbone = load_backbone(self.model, **options)  # type: ignore[arg-type]  # a dict loses the types
                self._loaded = ((self.model, options), backbone)
            return backbone

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """(D,) names of the columns, ``dinoembedder0`` …, by scikit-learn's rule for such transformers."""
        prefix, length = type(self).__name__.lower(), vector_length(self.what, self.backbone.embed_dim)
        return np.array([f"{prefix}{i}" for i in range(length)], dtype=object)

    def __getstate__(self) -> dict[str, Any]:
        # A session cannot be pickled, and weights do not belong in a pickle.
        return {name: value for name, value in super().__getstate__().items() if name != "_loaded"}

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # type: ignore[misc]  # scikit-learn's
        tags.requires_fit = False
        tags.no_validation = True
        tags.input_tags.two_d_array = False
        tags.input_tags.one_d_array = True
        tags.input_tags.string = True
        return tags


def _several(X: Any) -> Any:
    """Several pictures as ``Backbone.embed`` takes them, from any form into which scikit-learn converts a list."""
    if isinstance(X, str | os.PathLike):
        if is_collection(X):
            return X
        raise _one_picture(f"the path {X}")
    if hasattr(X, "to_numpy"):  # a Series, or the data frame that a ColumnTransformer passes
        X = X.to_numpy()
    if isinstance(X, np.ndarray) and X.dtype.kind in "OUT":
        if X.ndim == 2 and X.shape[1] == 1:
            X = X[:, 0]
        if X.ndim != 1:
            raise UsageError(f"the pictures have shape {X.shape}; expected (N,), or one column (N, 1)")
        return X.tolist()
    if isinstance(X, np.ndarray) or is_tensor(X):
        if X.ndim != 4:
            raise _one_picture(f"an array of shape {tuple(X.shape)}")
        return X
    if _is_picture(X):
        raise _one_picture(f"a {type(X).__name__}")
    if not hasattr(X, "__iter__"):
        raise UsageError(
            f"a {type(X).__name__} does not contain pictures; expected a list of paths, images or arrays"
        )
    return X


def _is_picture(X: Image.Image | Any) -> bool:
    from PIL import Image

    return isinstance(X, Image.Image | bytes | bytearray | memoryview) or hasattr(X, "read")


def _one_picture(what: str) -> UsageError:
    return UsageError(
        f"{what} is one picture, not several; expected a list of pictures, which may hold only one: [picture]"
    )
