"""The model folder: what training writes, export adds to, the SDK loads and the Hugging Face Hub stores.

::

    config.json               keys of transformers and of timm, and a section "dinokit"  (model_config.py)
    timm.safetensors          weights under timm's (= facebookresearch/dino's) names
    model.safetensors         the same under transformers' names, where transformers has the same network
    preprocessor_config.json  for transformers' AutoImageProcessor
    README.md                 the card
    training.json             how the weights were trained, for the card; where dinokit trained them
    onnx/model.onnx           added by the export; without it the graph is written from the weights
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError
from dinokit.files.checksums import sha256_of
from dinokit.files.json_files import read_json
from dinokit.files.outputs import atomic_folder
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import FORMAT_VERSION, TIMM_FILE, TRANSFORMERS_FILE, BackboneConfig
from dinokit.model_folder.weight_files import identity_of, unchanged
from dinokit.model_folder.weights import (
    check_weights,
    expected_shapes,
    read_safetensors,
    safetensors_shapes,
    timm_to_transformers,
    write_safetensors,
)

__all__ = [
    "FORMAT_VERSION",
    "BackboneConfig",
    "ModelFolder",
    "find_model_folder",
    "is_model_folder",
    "read_model_folder",
    "write_model_folder",
]

CONFIG_FILE = "config.json"
PROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
RECORD_FILE = "training.json"
ONNX_FILE = "onnx/model.onnx"

# What write_model_folder writes or removes; everything else in a folder belongs to its owner.
_OURS = {CONFIG_FILE, PROCESSOR_FILE, TIMM_FILE, TRANSFORMERS_FILE, "onnx"}


@dataclass(frozen=True)
class ModelFolder:
    """A model folder that has been read and checked."""

    path: Path
    config: BackboneConfig
    weights_sha256: str
    """Of the file ``timm.safetensors``, hexadecimal."""
    _hashed: tuple[int, ...] | None = field(default=None, compare=False, repr=False)
    """The file that has this sha256 (``weight_files.identity_of``)."""

    @property
    def onnx_path(self) -> Path | None:
        """``onnx/model.onnx`` if it is there."""
        path = self.path / ONNX_FILE
        return path if path.is_file() else None

    def load_weights(self) -> dict[str, NDArray[np.float32]]:
        """The weights under timm's names, float32.

        Raises:
            ModelError: the file cannot be read, or the folder was replaced since it was read.
        """
        file = self.path / TIMM_FILE
        with unchanged(file):
            weights = read_safetensors(file)
            if identity_of(file) != self._hashed and sha256_of(file) != self.weights_sha256:
                raise ModelError(
                    f"{file} was replaced by other weights while the model was being loaded; load it again"
                )
        return weights


# -- reading


def is_model_folder(path: str | Path) -> bool:
    """Whether ``path`` is a folder whose ``config.json`` has a section ``dinokit``, whole or not."""
    try:
        values = read_json(Path(path) / CONFIG_FILE)
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and "dinokit" in values


def find_model_folder(path: str | Path) -> Path | None:
    """``path`` if it is a model folder, its ``model/`` if it is a training run; None otherwise."""
    path = Path(path)
    return next((folder for folder in (path, path / "model") if is_model_folder(folder)), None)


def read_model_folder(path: str | Path, *, whole: bool = True) -> ModelFolder:
    """Reads a model folder and checks it: files, keys, and the shape of every tensor.

    Args:
        path: the folder.
        whole: False requires only what dinokit itself needs, for a folder fetched without the weights for
            transformers.

    Raises:
        ModelError: it names everything that is missing or wrong, not only the first problem.
    """
    path = Path(path)
    if not path.is_dir():
        raise ModelError(f"{path} is not a folder; expected a model folder")
    problems: list[str] = []
    config = _read_config(path, problems)
    twin = whole and (config is None or config.has_transformers_twin)
    needed = (TIMM_FILE, PROCESSOR_FILE, *([TRANSFORMERS_FILE] if twin else []))
    problems += [f"{name} is missing" for name in needed if not (path / name).is_file()]
    if config is not None:
        _check_processor(path, config, problems)
        _check_tensors(path, config, problems, twin=twin)
    if problems or config is None:
        raise ModelError(f"{path} is not a complete model folder: " + "; ".join(problems))
    hashed = identity_of(path / TIMM_FILE)
    return ModelFolder(path, config, sha256_of(path / TIMM_FILE), hashed)


def _read_config(path: Path, problems: list[str]) -> BackboneConfig | None:
    file = path / CONFIG_FILE
    if not file.is_file():
        problems.append(f"{CONFIG_FILE} is missing")
        return None
    values = _read_json(file, problems)
    if values is None:
        return None
    try:
        return BackboneConfig.from_json(values)
    except ModelError as error:
        problems.append(str(error))
        return None


def _read_json(file: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} is not readable JSON ({error})")
        return None
    if not isinstance(values, dict):
        problems.append(f"{file.name} contains a {type(values).__name__}, expected an object")
        return None
    return values


def _check_processor(path: Path, config: BackboneConfig, problems: list[str]) -> None:
    if not (path / PROCESSOR_FILE).is_file():
        return
    values = _read_json(path / PROCESSOR_FILE, problems)
    if values is None:
        return
    expected = json.loads(json.dumps(config.preprocessing.to_processor_config()))
    wrong = [key for key, right in expected.items() if values.get(key) != right]
    if wrong:
        problems.append(f"{PROCESSOR_FILE} disagrees with config.json's preprocessing in {', '.join(wrong)}")


def _check_tensors(path: Path, config: BackboneConfig, problems: list[str], *, twin: bool) -> None:
    expected = _expected_shapes(config)
    tables = {TIMM_FILE: expected}
    if twin and expected is not None:
        # Only shapes matter here: the weights are represented by arrays that use no memory.
        ghosts = {name: np.broadcast_to(np.float32(0), shape) for name, shape in expected.items()}
        theirs = timm_to_transformers(ghosts, config.vit)
        tables[TRANSFORMERS_FILE] = {name: array.shape for name, array in theirs.items()}
    for name, table in tables.items():
        if not (path / name).is_file():
            continue
        try:
            found = safetensors_shapes(path / name)
        except ModelError as error:
            problems.append(str(error))
            continue
        if not found:
            problems.append(f"{name} holds no tensors")
        elif table is not None:
            problems += check_weights(found, table, name)


def _expected_shapes(config: BackboneConfig) -> dict[str, tuple[int, ...]] | None:
    """None if only timm knows them: then the torch engine compares, and an ONNX file is bound to the sha256."""
    known = config.architecture
    return expected_shapes(known) if isinstance(known, VitArchitecture) else None


# -- writing


def write_model_folder(
    path: str | Path,
    config: BackboneConfig,
    weights: Mapping[str, NDArray[Any]],
    *,
    card: str | None = None,
    record: Mapping[str, Any] | None = None,
    dtype: str = "float32",
) -> ModelFolder:
    """Writes a model folder, whole or not at all.

    The new folder is made beside the old one and replaces it by a rename: a program that loads it meanwhile
    finds the old one or the new one. Files that are not the model's stay; ONNX files of the old
    weights go; a README.md that a person has edited stays as it is.

    Args:
        path: where; its parents are made. An existing folder must be empty or a model folder.
        config: the content of ``config.json``.
        weights: under timm's names, exactly those of the architecture.
        card: the text of README.md; without it, one is written from the folder (``dinokit.card``).
        record: how the weights were trained (``dinokit.card.make_record``); kept as ``training.json``.
        dtype: how the weights are stored, ``float32`` or ``float16``; they are computed with in float32.

    Raises:
        ModelError: the weights do not fit the architecture, or the folder is something else.
    """
    path = Path(path).resolve()
    expected = _expected_shapes(config)
    if expected is not None:
        found = {name: tuple(array.shape) for name, array in weights.items()}
        problems = check_weights(found, expected, "the weights")
        if problems:
            raise ModelError("; ".join(problems))
    if path.exists() and not (path.is_dir() and (is_model_folder(path) or not any(path.iterdir()))):
        raise ModelError(f"{path} exists and is not a model folder; choose another place, or an empty folder")

    with atomic_folder(path) as new:
        new.mkdir()
        _fill(new, config, weights, card, record, dtype)
        if path.exists():
            _carry_over(path, new)
        folder = read_model_folder(new)
        if card is None:
            from dinokit.card import first_card  # here, because the card is written from the folder

            first_card(folder, earlier=path)
    return replace(folder, path=path)


def _fill(
    new: Path,
    config: BackboneConfig,
    weights: Mapping[str, NDArray[Any]],
    card: str | None,
    record: Mapping[str, Any] | None,
    dtype: str,
) -> None:
    values = config.to_json()
    if card is not None:
        # To detect later whether a person has edited the card.
        values["dinokit"]["card_sha256"] = hashlib.sha256(card.encode()).hexdigest()
        (new / CARD_FILE).write_bytes(card.encode())
    _write_json(new / CONFIG_FILE, values)
    _write_json(new / PROCESSOR_FILE, config.preprocessing.to_processor_config())
    write_safetensors(new / TIMM_FILE, weights, dtype=dtype)
    if config.has_transformers_twin:
        write_safetensors(new / TRANSFORMERS_FILE, timm_to_transformers(weights, config.vit), dtype=dtype)
    if record is not None:
        _write_json(new / RECORD_FILE, {**record, "weights_sha256": sha256_of(new / TIMM_FILE)})


def _write_json(file: Path, values: Mapping[str, Any]) -> None:
    file.write_bytes((json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode())


def _carry_over(old: Path, new: Path) -> None:
    """Copies what the folder's owner has put into it, and their README.md if they changed it."""
    for item in old.iterdir():
        if item == new:  # an empty folder is filled from within
            continue
        if item.name in _OURS or (item.name == CARD_FILE and not _edited(old)):
            continue
        if item.name == RECORD_FILE and (new / RECORD_FILE).exists():
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True)
        else:
            shutil.copy2(item, new / item.name, follow_symlinks=False)


def _edited(folder: Path) -> bool:
    """Whether README.md is not the one that dinokit wrote."""
    try:
        values = read_json(folder / CONFIG_FILE)
        written = values["dinokit"]["card_sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return True
    return bool(sha256_of(folder / CARD_FILE) != written)
