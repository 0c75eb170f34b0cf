"""The errors dinokit raises on purpose, one small tree.

    DinokitError
    ├── UsageError            the request itself is wrong: a name, a value, a suffix      (exit code 2)
    ├── ModelError            a model cannot be found, read or trusted                    (exit code 3)
    │   └── ExportError       an exported model does not compute what the original does
    ├── MissingExtraError     a package that an optional feature needs is not installed   (exit code 3)
    ├── DeviceError           a requested device or engine is not available               (exit code 3)
    ├── ImageError            one picture cannot be read                                  (exit code 3)
    └── TrainingError         a training run cannot start or continue                     (exit code 3)

The exit codes are those of a command that ends with the error. A command that lists an ImageError and continues with
the other pictures ends with 1. Every message states what happened, what was expected and what to do.
"""

from __future__ import annotations

__all__ = [
    "DeviceError",
    "DinokitError",
    "ExportError",
    "ImageError",
    "MissingExtraError",
    "ModelError",
    "TrainingError",
    "UsageError",
]


class DinokitError(Exception):
    """Base of all errors that dinokit raises on purpose."""

    exit_code = 3


class UsageError(DinokitError, ValueError):
    """The request is wrong: an unknown name, an invalid value, an unsupported suffix."""

    exit_code = 2


class ModelError(DinokitError):
    """A model cannot be found, read or trusted."""


class ExportError(ModelError):
    """The exported model does not compute what the original does."""


class MissingExtraError(DinokitError, ImportError):
    """An optional dependency is not installed; the message names the extra that provides it."""

    def __init__(self, what: str, *, extra: str, package: str) -> None:
        is_not, it = ("are not", "them") if " and " in package else ("is not", "it")
        super().__init__(
            f"{what} needs {package}, which {is_not} installed. Install {it} with: pip install 'dinokit[{extra}]'"
        )
        self.extra = extra
        self.package = package


class DeviceError(DinokitError):
    """A device or engine was requested by name and cannot be used."""


class ImageError(DinokitError):
    """One picture cannot be read."""


class TrainingError(DinokitError):
    """A training run cannot start or continue."""
