"""``load_backbone``: a name, a path or a Hub id becomes a Backbone."""

from __future__ import annotations

import importlib.util
import operator
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from dinokit.errors import DeviceError, MissingExtraError, ModelError, UsageError
from dinokit.loading.hub import optional_onnx_file
from dinokit.loading.locate import Located, locate
from dinokit.loading.written_engine import with_layers, write_engine
from dinokit.loading.zoo import STARTER, ZOO
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import contract_of, differences, missing_data_file
from dinokit.vit_graph import can_write

if TYPE_CHECKING:
    from dinokit.features.backbone import Backbone
    from dinokit.pictures.preprocess import Preprocessing
    from dinokit.runtime import Engine
    from dinokit.runtime.onnx import OnnxEngine

__all__ = [
    "ENGINES",
    "PRECISIONS",
    "EngineName",
    "PrecisionName",
    "checked_size",
    "load_backbone",
    "onnx_file",
]

EngineName = Literal["auto", "onnx", "torch"]
PrecisionName = Literal["auto", "fp32", "fp16", "bf16", "int8"]
ENGINES: tuple[str, ...] = get_args(EngineName)
PRECISIONS: tuple[str, ...] = get_args(PrecisionName)

# Precisions that a model folder can have an ONNX file of its own for.
_FILE_PRECISIONS = ("fp16", "int8")


def load_backbone(
    name: str | os.PathLike[str] = STARTER,
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    precision: PrecisionName = "auto",
    revision: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    reduced_decoding: bool = False,
) -> Backbone:
    """Loads a backbone that turns images into vectors.

    Args:
        name: ``starter`` (bundled), a known name such as ``dino_vits16`` (``dinokit models`` lists them), a
            path (run folder, model folder, ``.onnx``, ``.safetensors``, ``.pth``) or a Hub id ``user/model``,
            looked up in this order (:func:`dinokit.loading.locate.locate`).
        engine: ``onnx`` (ONNX Runtime), ``torch`` (needs the extra ``[train]``), or ``auto``: ONNX Runtime if
            it can run the model as requested, otherwise torch if it is installed.
        device: ``auto`` (an accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, ``mps`` …
        precision: ``auto`` and ``fp32`` compute in float32 (but ``auto`` runs a single ``.onnx`` file in the file's
            precision); ``fp16`` and ``int8`` need the folder's ONNX file of that precision, written by
            ``dinokit export --precision``; ``fp16`` without such a file, and ``bf16``, need torch. On CUDA, a
            file of that precision written for it (``--target ort-cuda``) is preferred.
        revision: branch, tag or commit on the Hub.
        image_size: pixels of the square crop, or (height, width), instead of the model's own; the resize
            before it is scaled likewise, and the position embedding is resized by the model's own rule.
        reduced_decoding: decode large JPEG files at a half, a quarter or an eighth of their size, if that is
            still at least twice the size that the resize needs. Several times faster for photographs of many
            megapixels; their vectors change a little (``benchmarks/reduced_decoding.py``).

    Raises:
        UsageError: an argument is invalid.
        ModelError: the model cannot be found, read or trusted.
        MissingExtraError: the model needs torch, which is not installed.
        DeviceError: the requested device is not available; there is no silent fallback to the CPU.
    """
    if engine not in ENGINES:
        raise UsageError(f"engine={engine!r} is not known; expected one of {', '.join(ENGINES)}")
    if precision not in PRECISIONS:
        raise UsageError(f"precision={precision!r} is not known; expected one of {', '.join(PRECISIONS)}")
    if not isinstance(name, str | os.PathLike):
        raise UsageError(
            f"{name!r} is not a model name; expected a string or path: starter, dino_vits16, a folder, a Hub id"
        )
    if not isinstance(device, str):
        raise UsageError(
            f"device={device!r} is not a string; expected auto, cpu, cuda, cuda:1, tensorrt or mps"
        )
    size = None if image_size is None else checked_size(image_size)
    from dinokit.features.backbone import Backbone

    _check_engine_of(name, engine)
    located = locate(name, revision=revision)
    preprocessing = located.config.preprocessing
    if size is not None:
        preprocessing = _at_size(preprocessing, size)
    there = Path(name).expanduser()
    # When it is loaded again, the current folder may be another, and the Hub's branch may have moved.
    again = str(there.absolute()) if located.kind in ("folder", "onnx", "weights") else os.fspath(name)
    opened = _open(located, engine, device, precision, again)
    # A TensorRT engine reports cuda:N, which would load as CUDA.
    where = opened.device.replace("cuda", "tensorrt") if device.startswith("tensorrt") else opened.device
    return Backbone(
        located.config,
        opened,
        weights_sha256=located.weights_sha256,
        source=located.kind if located.kind == "bundled" else located.source,
        revision=located.revision,
        preprocessing=preprocessing,
        reduced_decoding=reduced_decoding,
        _loaded_as={
            "name": again,
            "engine": opened.name,
            "device": where,
            "precision": precision,
            "revision": located.revision,
            "image_size": size,
            "reduced_decoding": reduced_decoding,
        },
    )


def checked_size(image_size: Any) -> int | tuple[int, int]:
    """Pixels of the square, or (height, width), as plain numbers; UsageError for anything else."""
    try:
        sides = tuple(map(operator.index, image_size)) if isinstance(image_size, list | tuple) else None
        size = sides if sides is not None else operator.index(image_size)
    except TypeError:
        size = ()
    least = min(size, default=0) if isinstance(size, tuple) else size
    if least < 1 or (isinstance(size, tuple) and len(size) != 2):
        raise UsageError(
            f"image_size={image_size!r} is invalid; expected pixels (224) or (height, width), such as (224, 448)"
        )
    return size  # two sides, as checked


def _at_size(preprocessing: Preprocessing, size: int | tuple[int, int]) -> Preprocessing:
    try:
        return preprocessing.with_image_size(size)
    except ModelError as error:  # the fault is the request's, not the model's
        raise UsageError(f"image_size={size} is invalid: {error}") from error


def _check_engine_of(name: str | os.PathLike[str], engine: str) -> None:
    """Raises, before a download, if a known model needs torch and torch is not installed."""
    known = ZOO.get(os.fspath(name))
    if known is None or _torch_is_installed():
        return
    if "onnx" not in known.engines:
        raise MissingExtraError(
            f"{known.name} (its ONNX graph cannot be written from the weights yet)",
            extra="train",
            package="torch with timm",
        )
    if engine == "torch":
        raise MissingExtraError(f"{known.name} with engine='torch'", extra="train", package="torch with timm")


def _onnx_is_installed() -> bool:
    return importlib.util.find_spec("onnxruntime") is not None


def _torch_is_installed() -> bool:
    return all(importlib.util.find_spec(package) is not None for package in ("torch", "timm"))


def _open(located: Located, engine: str, device: str, precision: str, name: str) -> Engine:
    """The requested engine; for ``auto``, ONNX Runtime if it can do what was requested, otherwise torch.

    ``name``: by which the model can be located again.
    """
    if engine == "torch":
        return _open_torch(located, device, precision)
    file = onnx_file(located, device, precision)
    reason = _why_not_onnx(located, file, device, precision)
    if reason is None:
        try:
            return with_layers(_open_onnx(located, file, device, precision), located, name, device)
        except DeviceError:
            if engine == "onnx" or precision == "int8" or not _torch_can(located):
                raise
            try:  # torch brings its own CUDA libraries, so it may reach a device that ONNX Runtime cannot
                return _open_torch(located, device, precision)
            except DeviceError:
                pass
            raise  # what ONNX Runtime lacked: the lighter thing to install
    if engine == "onnx" or precision == "int8":  # torch has no int8
        how = "precision='int8'" if precision == "int8" else "engine='onnx'"
        raise ModelError(f"{located.config.name} cannot be run with {how}: {reason}")
    return _open_torch(located, device, precision, because=f" ({reason})")


def onnx_file(located: Located, device: str, precision: str) -> Path | None:
    """The ONNX file to run; None if there is none, and the graph must be written from the weights.

    On CUDA, a file with fused operators is preferred. A single ``.onnx`` file is used as it is.
    """
    if located.kind == "onnx":
        return located.onnx_path
    if precision != "int8" and _is_cuda(device):
        suffix = "_fp16" if precision == "fp16" else ""
        if fused := _file_of(located, f"onnx/model_cuda{suffix}.onnx"):
            return fused
    if precision not in _FILE_PRECISIONS:
        return located.onnx_path
    return _file_of(located, f"onnx/model_{precision}.onnx")


def _is_cuda(device: str) -> bool:
    """Whether ONNX Runtime will run on CUDA, not on TensorRT, which does not support the fused operators."""
    if not _onnx_is_installed():
        return False
    if device == "auto":
        from dinokit.runtime.onnx import cuda_loads

        return cuda_loads()
    return device.partition(":")[0] == "cuda"


def _file_of(located: Located, name: str) -> Path | None:
    """A file in the model's folder, fetched with its external data if it is on the Hub; None if it does not exist."""
    if located.kind == "hub":
        return optional_onnx_file(located.source, name, revision=located.revision)
    folder = located.weights_path
    if located.kind not in ("folder", "bundled") or folder is None or not (folder.parent / name).is_file():
        return None
    return folder.parent / name


def _why_not_onnx(located: Located, file: Path | None, device: str, precision: str) -> str | None:
    """Why ONNX Runtime cannot do what was requested, or None."""
    if not _onnx_is_installed():
        return "ONNX Runtime is not installed; dinokit requires it: pip install onnxruntime"
    if precision == "bf16":
        return "precision='bf16' needs the torch engine"
    if located.kind == "onnx" and precision in _FILE_PRECISIONS:
        stored = contract_of(located.onnx_path or Path())["precision"]
        if stored != precision:
            return f"the file computes in {stored!r}; precision={precision!r} needs another file, or the torch engine"
    elif file is None and precision in _FILE_PRECISIONS:
        or_torch = ", or the torch engine" if precision == "fp16" else ""
        return (
            f"precision={precision!r} needs onnx/model_{precision}.onnx, which its model folder does not have"
            f"{or_torch}; write it with: dinokit export {located.source} -o FOLDER --precision {precision}"
        )
    if device.partition(":")[0] == "mps":
        return "device='mps' needs the torch engine"
    if file is None and not can_write(located.config.architecture):
        return _needs_export(located)
    return None


def _needs_export(located: Located) -> str:
    """Why a network must be exported, with torch, before it runs without torch."""
    if isinstance(located.config.architecture, VitArchitecture):
        return "its ONNX graph cannot be written from the weights yet"
    return (
        f"it is a {located.config.timm_architecture}, and dinokit cannot write its ONNX graph without torch; export it "
        f"on a machine with torch: dinokit export {located.source} -o FOLDER"
    )


def _open_onnx(located: Located, file: Path | None, device: str, precision: str) -> OnnxEngine:
    from dinokit.runtime.onnx import OnnxEngine

    if file is None:
        return write_engine(located, device)
    if missing := missing_data_file(file):
        raise ModelError(
            f"{file} needs a second file beside it with its weights, {missing.name}, which is missing; copy both, or "
            "export the model again"
        )
    if located.kind == "onnx":
        _must_take_pixels(file)
    else:
        _must_agree(located, file, precision)
    return OnnxEngine(file, device=device, precision=precision if located.kind == "onnx" else "auto")


def _must_take_pixels(path: Path) -> None:
    """Refuses an embedder, whose input is uint8 and which normalises it itself: dinokit has no use for it."""
    if contract_of(path)["target"] == "embedder":
        raise ModelError(
            f"{path} is an embedder: it takes uint8 crops (B, H, W, 3), for direct use with ONNX Runtime and for "
            "servers. Load the model.onnx beside it, or their folder"
        )


def _must_agree(located: Located, path: Path, precision: str) -> None:
    """Refuses an ONNX file that has other weights or preprocessing than its folder: its vectors would differ."""
    found = contract_of(path)
    wrong = differences(found, located.config, located.weights_sha256)
    if found["precision"] != (precision if precision in _FILE_PRECISIONS else "fp32"):
        wrong.append("precision")
    if wrong:
        raise ModelError(
            f"{path} does not belong to its folder: its {' and '.join(wrong)} differ from the folder's. "
            "Write it again with `dinokit export`, or delete it: dinokit then writes the graph from the "
            "weights"
        )


def _torch_can(located: Located) -> bool:
    return located.load_weights is not None and _torch_is_installed()


def _open_torch(located: Located, device: str, precision: str, *, because: str = "") -> Engine:
    if located.load_weights is None:
        raise ModelError(
            f"{located.source} is an ONNX file: the torch engine needs the model folder it was written "
            f"from{because}"
        )
    if not _torch_can(located):
        raise MissingExtraError(f"{located.config.name}{because}", extra="train", package="torch with timm")
    from dinokit.runtime.torch import TorchEngine

    return TorchEngine(located.config, located.load_weights(), device=device, precision=precision)
