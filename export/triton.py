"""A model repository for NVIDIA's Triton Inference Server, written from a model folder's ONNX files.

::

    REPOSITORY/
        shoes-embedder_fp16/
            config.pbtxt            shapes, batching, warm-up, where it runs
            1/model.onnx            the file that was proven, as it is; its data file beside it if it has one

It is started with ``tritonserver --model-repository=REPOSITORY``. The embedder is the natural choice: clients resize
and crop, send uint8 (a quarter of the traffic of float32), and get the vector. The configuration also says how to
resize and crop, in the parameter ``dinokit``, which Triton returns with the model's configuration.

A classifier of `dinokit fit` is written likewise (:func:`write_triton_classifier`), with its class names in
``labels.txt`` for Triton's classification extension.

Keys and values follow Triton's ``model_config.proto`` and the README of its onnxruntime backend. No server was run and
no speed measured: batch size and queue delay are starting points for measurements with ``perf_analyzer``.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinokit.errors import ModelError, UsageError
from dinokit.export.variants import Variant, differences_in_folder, size_in_name
from dinokit.files.checksums import sha256_of
from dinokit.files.outputs import atomic_folder, must_be_writable
from dinokit.model_folder.architecture import architecture_from_json
from dinokit.model_folder.contract import (
    CLASSIFIER_KEY,
    METADATA_KEY,
    PROBABILITIES,
    classifier_of,
    contract_of,
    data_file_of,
    free_sizes,
    missing_data_file,
    must_be_known_format,
)
from dinokit.model_folder.folder import ModelFolder, is_model_folder, read_model_folder
from dinokit.pictures.preprocess import Preprocessing

if TYPE_CHECKING:
    import onnx

__all__ = [
    "CACHE",
    "must_be_a_repository",
    "must_be_free",
    "must_have_room",
    "must_suit_tensorrt",
    "write_triton_classifier",
    "write_triton_repository",
]

CACHE = "/cache"
"""Folder of TensorRT's engines on the server's machine or in its container."""

_MARK = "# Written by dinokit"
_CONFIG, _FILE, _LABELS, _VERSION = "config.pbtxt", "model.onnx", "labels.txt", "1"
_QUEUE_MICROSECONDS = 2000  # how long a request waits for others to join its batch
_WORKSPACE_BYTES = 2**30
_KINDS = {"int8": "KIND_CPU", "ort-cuda": "KIND_GPU"}  # else KIND_AUTO: a GPU where there is one


@dataclass(frozen=True)
class _Word:
    """A value of an enumeration, written without quotes in text format."""

    text: str


Fields = Sequence[tuple[str, Any]]
"""A message: names and values; a name comes again for each value of a list. Messages nest."""


def must_suit_tensorrt(variant: Variant) -> None:
    """Raises UsageError if TensorRT inside ONNX Runtime cannot run a file."""
    if variant.precision == "int8" or variant.target == "ort-cuda":
        raise UsageError(
            f"{variant.file} is not for TensorRT, which takes fp32 and fp16 of the targets portable and embedder"
        )
    if variant.image_size is None:
        raise UsageError(
            f"{variant.file} is for pictures of every size, and TensorRT builds an engine for one; name it with "
            "--image-size, for instance the one it was trained at (dinokit info says it)"
        )


def must_be_a_repository(path: Path) -> None:
    """Raises UsageError if ``path`` is a file or a model folder, DinokitError if it is not writable."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file; name a folder for Triton's models")
    if is_model_folder(path):
        raise UsageError(f"{path} is a model folder; name another one for Triton's models")
    must_be_writable(path / _CONFIG)


def write_triton_repository(
    folder: str | Path,
    repository: str | Path,
    files: str | Sequence[str],
    *,
    max_batch_size: int = 64,
    tensorrt: bool = False,
) -> tuple[Path, ...]:
    """Writes one Triton model for each ONNX file.

    Each is written atomically; a model of the same name that dinokit wrote is replaced.

    Args:
        folder: a model folder.
        repository: created if missing; other models in it stay.
        files: one or several ONNX files of the folder, such as ``onnx/embedder.onnx``.
        max_batch_size: maximum number of pictures in a batch.
        tensorrt: let TensorRT run what it can. It builds an engine when the server starts, which takes minutes the
            first time, and rounds in its own way: its vectors have not been compared with torch's.

    Returns:
        The folders of the models.

    Raises:
        ModelError: the folder or a file of it cannot be read, or a file is of other weights or other pixels.
        UsageError: dinokit did not write what is at the destination, or TensorRT cannot run a file.
    """
    model, repository = read_model_folder(folder), Path(repository).resolve()
    if max_batch_size < 1:
        raise UsageError(f"max_batch_size={max_batch_size} is not valid; expected 1 or more")
    must_be_a_repository(repository)
    planned = []
    for file in [files] if isinstance(files, str) else files:
        path = model.path / file
        says = _contract_of_whole(path)
        _must_be_of(model, path, says)
        if tensorrt:
            must_suit_tensorrt(_variant_of(path, says))
        name = _model_name(model.config.name, path)
        _must_be_ours(repository / name)
        planned.append((name, path, says))
    return tuple(
        _write(repository / name, path, _config(name, path, says, max_batch_size, tensorrt=tensorrt))
        for name, path, says in planned
    )


def write_triton_classifier(file: str | Path, repository: str | Path, *, max_batch_size: int = 64) -> Path:
    """Writes a Triton model of a classifier, with the names of its classes.

    A request with ``classification`` (``class_count`` of Triton's clients) is answered by the most probable of them.

    Args:
        file: an ONNX file of ``dinokit fit`` or :func:`dinokit.export.export_classifier`; its name becomes the model's.
        repository: as for :func:`write_triton_repository`.
        max_batch_size: likewise.

    Returns:
        The folder of the model.

    Raises:
        ModelError: the file cannot be read, or has no classifier.
        UsageError: something that is not dinokit's stands in the way.
    """
    path, repository = Path(file), Path(repository).resolve()
    if max_batch_size < 1:
        raise UsageError(f"max_batch_size={max_batch_size} is not valid; expected 1 or more")
    must_be_free(repository, path)
    says, told = _contract_of_whole(path), classifier_of(path)
    if told is None:
        raise ModelError(f"{path} has no classifier in it; expected a file of `dinokit fit`")
    name = _addressable(path.stem)
    labels = [" ".join(str(label).split()) for label in told["classes"]]  # a line each
    return _write(repository / name, path, _config(name, path, says, max_batch_size, told=told), labels)


def must_be_free(repository: Path, classifier: Path) -> None:
    """Raises UsageError if :func:`write_triton_classifier` could not write its model."""
    must_be_a_repository(repository)
    _must_be_ours(repository / _addressable(classifier.stem))


def must_have_room(repository: Path, name: str, files: Sequence[str]) -> None:
    """Raises UsageError if :func:`write_triton_repository` could not write models for these files."""
    for file in files:
        _must_be_ours(repository / _model_name(name, Path(file)))


def _contract_of_whole(path: Path) -> dict[str, Any]:
    """The contract of a file. Raises ModelError if it is damaged, or the weights are missing."""
    says = contract_of(path)
    must_be_known_format(says, path)
    try:
        architecture_from_json(says["architecture"])
        Preprocessing.from_json(says["preprocessing"])
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    if missing := missing_data_file(path):
        raise ModelError(f"{path} has its weights in {missing.name}, which is missing; export it again")
    return says


def _must_be_of(model: ModelFolder, path: Path, says: Mapping[str, Any]) -> None:
    """Raises ModelError if a file would give other vectors than its folder."""
    if wrong := differences_in_folder(path, says, model):
        raise ModelError(
            f"{path} does not belong to its folder: its {' and '.join(wrong)} differ from the folder's; write it again "
            "with `dinokit export`"
        )


def _variant_of(path: Path, says: Mapping[str, Any]) -> Variant:
    return Variant(says["precision"], says["target"], size_in_name(path))


def _model_name(name: str, path: Path) -> str:
    """``shoes-embedder_fp16``"""
    return _addressable(f"{name}-{path.stem}")


def _addressable(name: str) -> str:
    """A name that Triton can use in URLs."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.") or "model"


# -- files


def _must_be_ours(there: Path) -> None:
    if not there.exists():
        return
    config = there / _CONFIG
    if not config.is_file() or not config.read_text(encoding="utf-8", errors="replace").startswith(_MARK):
        raise UsageError(f"{there} exists and was not written by dinokit; choose another place or remove it")


def _write(there: Path, file: Path, config: str, labels: Sequence[str] = ()) -> Path:
    with atomic_folder(there) as new:
        version = new / _VERSION
        version.mkdir(parents=True)
        shutil.copyfile(file, version / _FILE)
        if data := data_file_of(file):  # the graph refers to it by this name
            shutil.copyfile(data, version / data.name)
        if labels:
            (new / _LABELS).write_text("".join(f"{label}\n" for label in labels), encoding="utf-8")
        (new / _CONFIG).write_text(config, encoding="utf-8")
    return there


# -- the configuration


def _config(
    name: str,
    path: Path,
    says: Mapping[str, Any],
    max_batch_size: int,
    *,
    tensorrt: bool = False,
    told: Mapping[str, Any] | None = None,
) -> str:
    """The text of config.pbtxt; ``told``: what the file says of its classifier."""
    graph = _graph_of(path)
    height, width = map(int, says["preprocessing"]["crop_px"])
    sizes = free_sizes(architecture_from_json(says["architecture"]), height, width)
    if len(graph.input) != 1:
        raise ModelError(f"{path} has {len(graph.input)} inputs, where one was expected; export it again")
    (source,) = graph.input
    dims = _dims(source, sizes)
    kind = _KINDS.get(says["target"], _KINDS.get(says["precision"], "KIND_AUTO"))
    fields: list[tuple[str, Any]] = [
        ("name", name),
        ("backend", "onnxruntime"),
        ("default_model_filename", _FILE),
        ("max_batch_size", max_batch_size),
        ("input", [("name", source.name), ("data_type", _kind(source)), ("dims", dims)]),
        *(("output", _output(out, sizes, labelled=told is not None)) for out in graph.output),
        ("dynamic_batching", [("max_queue_delay_microseconds", _QUEUE_MICROSECONDS)]),
        ("instance_group", [("count", 1), ("kind", _Word("KIND_GPU" if tensorrt else kind))]),
        ("version_policy", [("latest", [("num_versions", 1)])]),
    ]
    if tensorrt:
        fields.append(("optimization", _tensorrt(name, path, source.name, dims, max_batch_size, says)))
    warm_up = dict.fromkeys((1, max_batch_size))  # a lone request, and the memory of a full batch
    fields += [("model_warmup", _warm_up(source.name, _kind(source), dims, size)) for size in warm_up]
    for key, values in ((METADATA_KEY, says), (CLASSIFIER_KEY, told)):
        if values is not None:
            text = json.dumps(dict(values), ensure_ascii=True, sort_keys=True)
            fields.append(("parameters", [("key", key), ("value", [("string_value", text)])]))
    shape = "x".join(map(str, dims))
    head = [
        _comment(
            f"{_MARK}: {says['name']}, {source.name} {shape} to {', '.join(out.name for out in graph.output)}."
        ),
        "# How pictures are resized, cropped and normalised stands below, under parameters, as JSON.",
        "# Batch size and queue delay were not measured on a GPU: try others with perf_analyzer.",
    ]
    if tensorrt:
        head.append(f"# TensorRT keeps its engines in {CACHE}/{name}; mount a volume there.")
    return "\n".join([*head, "", *_lines(fields, ""), ""])


def _comment(text: str) -> str:
    """The text on one line, since Triton would parse further lines."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def _graph_of(path: Path) -> onnx.GraphProto:
    import onnx

    try:
        return onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf's own errors
        raise ModelError(f"{path} is not an ONNX file ({error})") from error


def _dims(value: onnx.ValueInfoProto, sizes: Mapping[str, int]) -> list[int]:
    """Sizes without the batch; -1 for a free size that is not known by name."""
    dims = list(value.type.tensor_type.shape.dim)[1:]
    return [dim.dim_value or sizes.get(dim.dim_param, -1) for dim in dims]


def _output(value: onnx.ValueInfoProto, sizes: Mapping[str, int], *, labelled: bool) -> Fields:
    fields: list[tuple[str, Any]] = [
        ("name", value.name),
        ("data_type", _kind(value)),
        ("dims", _dims(value, sizes)),
    ]
    if labelled and value.name == PROBABILITIES:
        fields.append(("label_filename", _LABELS))
    return fields


def _kind(value: onnx.ValueInfoProto) -> _Word:
    import onnx

    kinds = {int(onnx.TensorProto.FLOAT): "TYPE_FP32", int(onnx.TensorProto.UINT8): "TYPE_UINT8"}
    kind = int(value.type.tensor_type.elem_type)
    if kind not in kinds:
        raise ModelError(
            f"{value.name} is of ONNX's type {kind}; expected float32 or uint8. Export the model again"
        )
    return _Word(kinds[kind])


def _warm_up(source: str, kind: _Word, dims: Sequence[int], size: int) -> Fields:
    tensor = [("data_type", kind), ("dims", dims), ("zero_data", True)]
    return [
        ("name", f"batch_{size}"),
        ("batch_size", size),
        ("inputs", [("key", source), ("value", tensor)]),
    ]


def _tensorrt(
    name: str, path: Path, source: str, dims: Sequence[int], most: int, says: Mapping[str, Any]
) -> Fields:
    shape = "x".join(map(str, dims))
    parameters = {
        "precision_mode": "FP16" if says["precision"] == "fp16" else "FP32",
        "max_workspace_size_bytes": str(_WORKSPACE_BYTES),
        "trt_layer_norm_fp32_fallback": "true",
        "trt_engine_cache_enable": "true",
        "trt_engine_cache_path": f"{CACHE}/{name}",
        # ONNX Runtime tells engines apart by names, not by weights: a model that takes the place of another would be
        # answered by the engine of that one.
        "trt_engine_cache_prefix": sha256_of(path)[:16],
        "trt_timing_cache_enable": "true",
        "trt_timing_cache_path": f"{CACHE}/{name}",
        "trt_profile_min_shapes": f"{source}:1x{shape}",
        "trt_profile_opt_shapes": f"{source}:{most}x{shape}",
        "trt_profile_max_shapes": f"{source}:{most}x{shape}",
    }
    listed = [("parameters", [("key", key), ("value", value)]) for key, value in parameters.items()]
    return [("execution_accelerators", [("gpu_execution_accelerator", [("name", "tensorrt"), *listed])])]


# -- protobuf's text format


def _lines(fields: Fields, indent: str) -> Iterator[str]:
    for name, value in fields:
        if isinstance(value, list) and value and isinstance(value[0], tuple):
            yield f"{indent}{name} {{"
            yield from _lines(value, f"{indent}  ")
            yield f"{indent}}}"
        else:
            yield f"{indent}{name}: {_scalar(value)}"


def _scalar(value: Any) -> str:
    if isinstance(value, _Word):
        return value.text
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, int):
        return str(value)
    escaped = str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
