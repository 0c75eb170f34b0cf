"""What scikit-learn expects of an estimator, with or without scikit-learn.

If scikit-learn is installed, dinokit's estimators inherit from its classes (``BaseEstimator`` with a mixin), so that
``clone``, ``Pipeline``, ``GridSearchCV`` and the diagrams in notebooks work. Without it, they are plain objects with
the same methods. Input is checked here in both cases, so behaviour and messages are the same.
"""

from __future__ import annotations

import contextlib
import inspect
import operator
import warnings
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import UsageError

__all__ = [
    "BaseEstimator",
    "ClassifierMixin",
    "NotFittedError",
    "TransformerMixin",
    "accuracy",
    "check_columns",
    "check_labels",
    "check_matrix",
    "check_real",
    "check_seed",
    "check_whole",
    "check_width",
    "column_names",
    "remember_columns",
]


class BaseEstimator:
    """Parameters by name. If scikit-learn is installed, its own class replaces this one below."""

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor by name."""
        return {name: getattr(self, name) for name in _parameters(type(self))}

    def set_params(self, **params: Any) -> Self:
        """Changes arguments of the constructor. Raises UsageError for an unknown name."""
        known = _parameters(type(self))
        for name, value in params.items():
            if name not in known:
                raise UsageError(
                    f"{type(self).__name__} has no parameter {name!r}; it has {', '.join(known)}"
                )
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self.get_params().items())
        return f"{type(self).__name__}({values})"

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled."""
        return self.__dict__.copy()


class ClassifierMixin:
    """Empty without scikit-learn, whose own class marks this as a classifier."""


class TransformerMixin:
    """``fit_transform``; scikit-learn's own class adds ``set_output``."""

    def fit_transform(self, X: Any, y: Any = None) -> Any:
        """``fit`` followed by ``transform``."""
        return self.fit(X, y).transform(X)  # type: ignore[attr-defined]


def _parameters(kind: type) -> list[str]:
    return [name for name in inspect.signature(kind.__init__).parameters if name != "self"]  # type: ignore[misc]


_NotFitted: type[Exception] = AttributeError
_ConversionWarning: type[Warning] = UserWarning

if not TYPE_CHECKING:  # scikit-learn has no types; the plain classes above declare what is used of it
    with contextlib.suppress(ImportError):
        from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin
        from sklearn.exceptions import DataConversionWarning as _ConversionWarning
        from sklearn.exceptions import NotFittedError as _NotFitted


class NotFittedError(UsageError, _NotFitted):  # type: ignore[valid-type, misc]
    """A method was called before ``fit``. If scikit-learn is installed, this is also its error of the same name."""


def column_names(X: Any) -> NDArray[np.object_] | None:
    """The column names of a data frame; None for anything else, or if one name is not text."""
    columns = getattr(X, "columns", None)
    names = None if columns is None else np.asarray(columns, dtype=object)
    return names if names is not None and len(names) and all(isinstance(n, str) for n in names) else None


def remember_columns(estimator: Any, X: Any) -> None:
    """Sets ``feature_names_in_`` in ``fit``, or removes that of an earlier fit where X has no names."""
    names = column_names(X)
    if names is not None:
        estimator.feature_names_in_ = names
    elif hasattr(estimator, "feature_names_in_"):
        del estimator.feature_names_in_


def check_columns(X: Any, fitted: NDArray[np.object_] | None, of: str) -> None:
    """Refuses a data frame whose columns differ from those of ``fit``; warns if only one of the two has names."""
    given = column_names(X)
    if given is None and fitted is not None:
        # The wording is scikit-learn's: programs filter these warnings.
        warnings.warn(
            f"X does not have valid feature names, but {of} was fitted with feature names", stacklevel=4
        )
    elif given is not None and fitted is None:
        warnings.warn(f"X has feature names, but {of} was fitted without feature names", stacklevel=4)
    elif given is not None and fitted is not None and list(given) != list(fitted):
        raise UsageError(_how_columns_differ(list(given), list(fitted)))


def _how_columns_differ(given: list[str], fitted: list[str]) -> str:
    lines = ["The feature names should match those that were passed during fit."]
    unseen, missing = sorted(set(given) - set(fitted)), sorted(set(fitted) - set(given))
    if unseen:
        lines += ["Feature names unseen at fit time:", *(f"- {name}" for name in unseen[:5])]
    if missing:
        lines += ["Feature names seen at fit time, yet now missing:", *(f"- {name}" for name in missing[:5])]
    if not unseen and not missing:
        lines.append("Feature names must be in the same order as they were in fit.")
    return "\n".join([*lines, ""])


def check_matrix(X: Any, what: str = "embeddings") -> NDArray[np.float32]:
    """Converts an array-like to (N, D) float32 with N and D at least 1 and finite values.

    Raises:
        UsageError: it is sparse, complex, not numbers, of another shape or empty, or contains NaN or infinity.
    """
    if hasattr(X, "toarray"):
        raise UsageError(f"sparse {what} cannot be used: a dense array is expected, X.toarray()")
    try:
        array = np.asarray(X)
        array = array if np.iscomplexobj(array) else np.asarray(array, np.float32)
    except (TypeError, ValueError) as error:
        # As in scikit-learn: an object that is not a number raises a TypeError.
        text = f"the {what} are not numbers ({error}); expected (N, D) floats"
        raise (_WrongType(text) if isinstance(error, TypeError) else UsageError(text)) from error
    if np.iscomplexobj(array):
        raise UsageError(
            f"Complex data not supported: the {what} are {array.dtype}, real numbers are expected"
        )
    if array.ndim != 2:
        hint = "; Reshape your data: X.reshape(1, -1) if it is one embedding" if array.ndim == 1 else ""
        raise UsageError(f"the {what} have shape {array.shape}; expected (N, D), one row each{hint}")
    if 0 in array.shape:
        rows, columns = array.shape
        lack = f"{rows} sample(s)" if not rows else f"{columns} feature(s)"
        raise UsageError(
            f"the {what} hold {lack} (shape=({rows}, {columns})) while a minimum of 1 is required."
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        row = int(np.argmin(finite))
        kind = "NaN" if np.isnan(array[row]).any() else "infinity"
        raise UsageError(
            f"the {what} contain {kind}, first in row {row}; leave out the rows of pictures that could not be read"
        )
    return array


class _WrongType(UsageError, TypeError):
    pass


def check_width(array: NDArray[Any], estimator: Any, what: str = "embeddings") -> None:
    """Raises UsageError unless an array has as many columns as the estimator was fitted with."""
    width = estimator.n_features_in_
    if array.shape[1] != width:
        # The second sentence is scikit-learn's: its own tests look for it.
        raise UsageError(
            f"the {what} have shape {array.shape}; expected (M, {width}), as in fit. X has {array.shape[1]} features, "
            f"but {type(estimator).__name__} is expecting {width} features as input"
        )


def accuracy(predicted: NDArray[Any], y: Any, sample_weight: Any = None) -> float:
    """Share of the predictions that equal the labels ``y``, 0 to 1; weighted where weights are given."""
    right = predicted == check_labels(y, len(predicted))
    return float(np.average(right, weights=None if sample_weight is None else np.asarray(sample_weight)))


def check_labels(y: Any, count: int) -> NDArray[Any]:
    """Converts labels to (N,), one for each of ``count`` embeddings.

    Raises:
        UsageError: there are none, there are more or fewer, some are missing, or they are numbers but not classes.
    """
    if y is None:
        raise UsageError(
            "the labels are None: this classifier requires y to be passed, but the target y is None"
        )
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = _as_one_column(labels)
    if labels.shape != (count,):
        raise UsageError(f"the labels of {count} embeddings have shape {labels.shape}; expected ({count},)")
    if labels.dtype.kind == "O":
        _check_objects(labels)
    if labels.dtype.kind == "c":
        raise UsageError(
            "Complex data not supported: the labels are complex, expected names or whole numbers"
        )
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise UsageError("Input y contains NaN or infinity: every embedding needs a label")
        if (labels != np.round(labels)).any():
            raise UsageError(
                "Unknown label type: continuous. Labels are names or whole numbers, not measurements"
            )
    return labels


def _check_objects(labels: NDArray[Any]) -> None:
    """Refuses labels that cannot be sorted: missing ones, and names mixed with numbers."""
    for row, label in enumerate(labels.tolist()):
        if _is_missing(label):
            raise UsageError(
                f"Input y contains NaN or None, first in row {row}: every embedding needs a label"
            )
    kinds = sorted({"text" if isinstance(label, str) else type(label).__name__ for label in labels.tolist()})
    if "text" in kinds and len(kinds) > 1:
        raise UsageError(f"the labels are of several kinds ({', '.join(kinds)}); make all of them text")


def _is_missing(label: Any) -> bool:
    try:
        return label is None or bool(label != label)  # NaN
    except TypeError:  # pandas' NA
        return True


def check_whole(value: Any, name: str) -> int:
    """The value as a Python int. Raises UsageError unless it is a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UsageError(f"{name}={value!r} is not a whole number") from None


def check_seed(value: Any) -> int:
    """The value as a seed for numpy's generators. Raises UsageError unless it is a whole number from 0."""
    seed = check_whole(value, "seed")
    if seed < 0:
        raise UsageError(f"seed={seed} must not be negative")
    return seed


def check_real(value: Any, name: str) -> float:
    """The value as a Python float. Raises UsageError unless it is a number."""
    if isinstance(value, bool | str) or not hasattr(value, "__float__"):
        raise UsageError(f"{name}={value!r} is not a number")
    return float(value)


def _as_one_column(labels: NDArray[Any]) -> NDArray[Any]:
    """(N, 1) to (N,), with a warning."""
    warnings.warn(
        "A column-vector y was passed when a 1d array was expected. Please change the shape of y to (n_samples,)",
        _ConversionWarning,
        stacklevel=5,
    )
    return labels[:, 0]
