"""Locates a model by its name, and reads its configuration and weights. Nothing is run here."""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ModelError, UsageError
from dinokit.files.checksums import sha256_of
from dinokit.files.json_files import read_json
from dinokit.loading.foreign import (
    bare_weights_config,
    config_from_timm,
    config_from_transformers,
    licence_of,
    must_be_readable,
)
from dinokit.loading.hub import commit_of, hub_file, is_there, optional_hub_file, optional_onnx_file
from dinokit.loading.unknown_names import unknown_model
from dinokit.loading.zoo import DINOV3_LICENCE, DINOV3_LICENCE_URL, STARTER, ZOO, ZooModel
from dinokit.model_folder.architecture import VitArchitecture, architecture_from_json
from dinokit.model_folder.config import TIMM_FILE, TRANSFORMERS_FILE, BackboneConfig
from dinokit.model_folder.contract import contract_of, must_be_known_format
from dinokit.model_folder.folder import (
    CONFIG_FILE,
    ONNX_FILE,
    PROCESSOR_FILE,
    ModelFolder,
    is_model_folder,
    read_model_folder,
)
from dinokit.model_folder.reference_networks import to_timm_names
from dinokit.model_folder.weight_files import INDEX_SUFFIX, find_weight_files, unchanged
from dinokit.model_folder.weight_names import reference_to_timm, transformers_to_timm
from dinokit.model_folder.weights import (
    check_weights,
    expected_shapes,
    read_pth,
    read_safetensors,
    without_prefixes,
)
from dinokit.pictures.preprocess import Preprocessing
from dinokit.vit_graph import can_write

__all__ = ["LICENCE_VARIABLE", "Located", "locate", "starter_path"]

LICENCE_VARIABLE = "DINOKIT_ACCEPT_DINOV3_LICENSE"
"""Environment variable that users set to 1 to accept DINOv3's licence."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")

Weights = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Located:
    """A model that has been found and described, not yet run."""

    kind: str
    """``bundled``, ``zoo``, ``folder``, ``onnx``, ``weights`` or ``hub``."""
    config: BackboneConfig
    weights_sha256: str
    load_weights: Callable[[], Weights] | None
    """timm's names, float32; the arrays are the caller's. None for a lone ONNX file."""
    weights_path: Path | None
    onnx_path: Path | None
    source: str
    """Path, known name or Hub id, as the table of embeddings records it."""
    revision: str | None = None
    """Commit on the Hub."""


def starter_path() -> Path:
    """The folder of the bundled model."""
    return Path(__file__).parents[1] / "models" / STARTER


def locate(name: str | os.PathLike[str], *, revision: str | None = None) -> Located:
    """Finds a model.

    In this order:

    1. ``starter``, the model inside the package;
    2. a known name (:data:`dinokit.loading.zoo.ZOO`), fetched from the Hub;
    3. a path that exists: a run folder (its ``model/`` is taken), a model folder, a folder saved by timm or
       transformers, ``.onnx``, ``.safetensors``, or ``.pth`` and ``.pt`` of facebookresearch's dino, dinov2
       or dinov3;
    4. a Hub id ``user/model``: a dinokit folder, or a DINO ViT saved by timm or transformers.

    Raises:
        UsageError: none of these matches, or ``revision`` is given for a model without revisions.
        ModelError: it was found and cannot be read.
    """
    text = os.fspath(name)
    if not text:
        raise unknown_model(text)  # Path("") would be the current folder
    path = Path(text).expanduser()
    known = isinstance(name, str) and (text == STARTER or text in ZOO)
    exists = os.path.exists(path)  # noqa: PTH110  # Path.exists raises OSError on a very long name
    if not exists and not known and os.path.islink(path):  # noqa: PTH114  # as above
        raise ModelError(f"{text} is a symbolic link to {path.readlink()}, which does not exist")
    on_hub = text in ZOO if known else not exists and _may_be_on_hub(text)
    if revision is not None and not on_hub:
        raise UsageError(f"revision={revision!r} was given, but {text!r} is not on the Hub; leave it out")
    if known:
        return _zoo(ZOO[text], revision) if on_hub else _starter()
    if exists:
        return _folder(path, text) if path.is_dir() else _file(path, text)
    if on_hub:
        return _hub(text, revision)
    if _must_be_a_path(text) or not isinstance(name, str):
        raise ModelError(f"{text} does not exist; expected a model folder or file")
    raise unknown_model(text)


def _must_be_a_path(text: str) -> bool:
    return Path(text).suffix in _FILES or text.startswith(("/", ".", "~")) or text.count("/") > 1


def _may_be_on_hub(text: str) -> bool:
    return _HUB_ID.fullmatch(text) is not None and not _must_be_a_path(text)


# -- names


def _starter() -> Located:
    if not is_model_folder(starter_path()):
        raise ModelError(
            "this installation has no bundled model (dinokit/models/starter is missing); install dinokit "
            "again, or name another model, for example dino_vits16"
        )
    return _from_folder(read_model_folder(starter_path()), "bundled", STARTER)


def _zoo(model: ZooModel, revision: str | None) -> Located:
    _licence_must_be_accepted(model.licence, model.name)
    path = hub_file(model.repo, model.filename, revision=revision)
    return Located(
        kind="zoo",
        config=model.config,
        weights_sha256=sha256_of(path),
        load_weights=lambda: reference_to_timm(_without_classifier(read_safetensors(path))),
        weights_path=path,
        onnx_path=None,
        source=model.repo,
        revision=commit_of(path),
    )


def _licence_must_be_accepted(licence: str, name: str) -> None:
    """Raises ModelError before anything is fetched, unless the user has accepted the licence of DINOv3's weights."""
    if licence == DINOV3_LICENCE and os.environ.get(LICENCE_VARIABLE) != "1":
        raise ModelError(
            f"{name} is under the DINOv3 licence, which forbids some uses and travels with the "
            f"weights. Read {DINOV3_LICENCE_URL} and, if you "
            f"accept it, set {LICENCE_VARIABLE}=1. dino_* and dinov2_* are under Apache-2.0"
        )


# -- files and folders


def _from_folder(folder: ModelFolder, kind: str, source: str, revision: str | None = None) -> Located:
    return Located(
        kind=kind,
        config=folder.config,
        weights_sha256=folder.weights_sha256,
        load_weights=folder.load_weights,
        weights_path=folder.path / TIMM_FILE,
        onnx_path=folder.onnx_path,
        source=source,
        revision=revision,
    )


def _folder(path: Path, text: str) -> Located:
    if not (path / CONFIG_FILE).is_file() and (path / "model" / CONFIG_FILE).is_file():
        path = path / "model"  # a training run
    if not (path / CONFIG_FILE).is_file():
        raise ModelError(
            f"{text} is neither a model folder (no {CONFIG_FILE}) nor a training run (no model/{CONFIG_FILE})"
        )
    values = _json(path / CONFIG_FILE)
    if "dinokit" in values:
        return _from_folder(read_model_folder(path), "folder", text)
    return _foreign(values, _beside(path), "folder", text)


def _file(path: Path, text: str) -> Located:
    if path.name in (TIMM_FILE, TRANSFORMERS_FILE) and is_model_folder(path.parent):
        return _folder(path.parent, text)  # its config.json knows what the shapes do not
    reader = _weights_file if path.name.endswith(INDEX_SUFFIX) else _FILES.get(path.suffix)
    if reader is None or not path.is_file():  # a named pipe would be waited for
        raise UsageError(f"{text} is not a model file; expected a folder or one of {', '.join(_FILES)}")
    return reader(path, text)


def _onnx_file(path: Path, text: str) -> Located:
    values = contract_of(path)
    must_be_known_format(values, path)
    config = BackboneConfig(
        name=values["name"],
        architecture=architecture_from_json(values["architecture"]),
        timm_architecture="",  # only the torch engine would need it, and it needs the weights too
        preprocessing=Preprocessing.from_json(values["preprocessing"]),
        licence=values["licence"],
        source=text,
        written_by=values["written_by"],
    )
    return Located("onnx", config, values["weights_sha256"], None, None, path, text)


def _weights_file(path: Path, text: str) -> Located:
    name = path.stem
    if path.name.endswith(INDEX_SUFFIX):
        name = path.name.removesuffix(INDEX_SUFFIX)
        files = find_weight_files(f"{name}.safetensors", _beside(path.parent), text)
        assert files is not None  # the index is there
        with unchanged(path, *files.parts.values()):
            weights, sha256 = _any_names(files.read(), text), files.sha256()
    else:
        with unchanged(path):
            in_safetensors = path.suffix == ".safetensors"
            weights = _any_names(read_safetensors(path), text) if in_safetensors else read_pth(path)
            sha256 = sha256_of(path)
    config = bare_weights_config(_shapes(weights), name=name, source=text)
    if isinstance(config.architecture, VitArchitecture):
        _must_fit(weights, config.architecture, text)
    load = _handed_over(weights, sha256, functools.partial(_weights_file, path, text))
    return Located("weights", config, sha256, load, path, None, text)


def _beside(folder: Path) -> Callable[[str], Path | None]:
    return lambda name: folder / name if (folder / name).is_file() else None


_FILES: dict[str, Callable[[Path, str], Located]] = {
    ".onnx": _onnx_file,
    ".safetensors": _weights_file,
    ".pth": _weights_file,
    ".pt": _weights_file,
}


# -- the Hub


def _hub(repo: str, revision: str | None) -> Located:
    try:
        config_path = hub_file(repo, CONFIG_FILE, revision=revision)
    except ModelError as error:
        if is_there(error):
            raise
        # It may have been meant as a path.
        raise ModelError(f"{error}. (No file or folder here is called {repo} either.)") from error.__cause__
    # The other files belong to the same commit, whatever happens to the branch meanwhile.
    commit = commit_of(config_path)
    values = _json(config_path)
    if "dinokit" not in values:
        return _foreign(
            values, lambda file: optional_hub_file(repo, file, revision=commit), "hub", repo, revision=commit
        )
    config = BackboneConfig.from_json(values)
    for name in (TIMM_FILE, PROCESSOR_FILE):
        hub_file(repo, name, revision=commit)
    # Where the graph can be written from the weights, that saves half the download.
    if not can_write(config.architecture):
        optional_onnx_file(repo, ONNX_FILE, revision=commit)
    folder = read_model_folder(config_path.parent, whole=False)
    return _from_folder(folder, "hub", repo, commit)


# -- folders of timm and transformers


def _foreign(
    values: Mapping[str, Any],
    find: Callable[[str], Path | None],
    kind: str,
    source: str,
    *,
    revision: str | None = None,
) -> Located:
    must_be_readable(values, source)
    if kind == "hub":
        _licence_must_be_accepted(licence_of(values), source)
    files = find_weight_files(TRANSFORMERS_FILE, find, source)
    if files is None:
        raise ModelError(f"{source} has no {TRANSFORMERS_FILE}; pickled weights are not loaded")
    with unchanged(files.path, *files.parts.values()):
        tensors, sha256 = files.read(), files.sha256()
    if "architecture" in values:
        with _naming(source):
            weights = reference_to_timm(_without_classifier(tensors))
        config = config_from_timm(values, _shapes(weights), source=source)
    else:
        processor = find(PROCESSOR_FILE)
        if processor is None:
            raise ModelError(f"{source} has no {PROCESSOR_FILE}, so its preprocessing is unknown")
        with _naming(source):
            weights = transformers_to_timm(tensors)
        config = config_from_transformers(values, _json(processor), _shapes(weights), source=source)
    _must_fit(weights, config.vit, source)
    again = functools.partial(_foreign, values, find, kind, source, revision=revision)
    return Located(
        kind, config, sha256, _handed_over(weights, sha256, again), files.path, None, source, revision
    )


def _handed_over(weights: Weights, sha256: str, again: Callable[[], Located]) -> Callable[[], Weights]:
    """``load_weights`` for weights that had to be read to describe the model.

    The first call hands them over, so that memory holds them once while an engine copies them; a later call reads the
    file again.
    """
    held = [weights]

    def load() -> Weights:
        with contextlib.suppress(IndexError):
            return held.pop()
        located = again()
        if located.weights_sha256 != sha256:
            raise ModelError(
                f"{located.source} was replaced by other weights meanwhile; load the model again"
            )
        assert located.load_weights is not None
        return located.load_weights()

    return load


def _must_fit(weights: Weights, vit: VitArchitecture, source: str) -> None:
    problems = check_weights(_shapes(weights), expected_shapes(vit) or {}, source)
    if problems:
        raise ModelError("not a DINO Vision Transformer: " + "; ".join(problems))


def _without_classifier(weights: Weights) -> Weights:
    return {name: array for name, array in weights.items() if name not in ("head.weight", "head.bias")}


def _any_names(weights: Weights, source: str) -> Weights:
    with _naming(source):
        if any(name.startswith(("module.", "backbone.")) for name in weights):
            weights, _ = without_prefixes(weights)
        if any("embeddings.cls_token" in name for name in weights):
            return transformers_to_timm(weights)
        network = to_timm_names(weights)
        return reference_to_timm(_without_classifier(weights)) if network is None else network


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """Errors about weights name the file or folder that has them."""
    try:
        yield
    except ModelError as error:
        raise ModelError(f"{source}: {error}") from error


def _shapes(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(array.shape) for name, array in weights.items()}


def _json(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} is not readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise ModelError(f"{path} contains a {type(values).__name__}; expected an object")
    return values
