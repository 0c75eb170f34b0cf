"""ONNX Runtime as an engine: a session that runs on the requested device, or reports why it cannot."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import DeviceError, ModelError, UsageError
from dinokit.model_folder.contract import INPUT, METADATA_KEY
from dinokit.runtime.cpu import compute_threads
from dinokit.runtime.gpu_libraries import cuda_devices, load_fault, preload_libraries
from dinokit.runtime.tensorrt_cache import cache_options, engine_folder

__all__ = ["OnnxEngine", "cuda_loads", "session_options"]

_PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
_SILENT = 4  # ONNX Runtime's severity "fatal": errors are raised, not written to stderr


class OnnxEngine:
    """Runs an ONNX model with the inputs and outputs of :mod:`dinokit.model_folder.contract`.

    Args:
        model: the path of an .onnx file, or such a file's content.
        weights: those that are not in the content of a file
            (:func:`dinokit.vit_graph.split_vit_graph`), by their names in the graph.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt`` (``tensorrt:1``), or ``auto``: CUDA if it loads,
            otherwise the CPU.
        precision: ``auto``: the file's; ``fp32``, ``fp16`` or ``int8``: the file must have it. Another precision
            needs another file.

    Raises:
        DeviceError: the device was requested by name and cannot be used; the message says what is missing.
        ModelError: the model cannot be read.
        UsageError: there is no such device or precision.
    """

    name = "onnx"

    def __init__(
        self,
        model: bytes | Path | str,
        *,
        weights: Mapping[str, NDArray[np.float32]] | None = None,
        device: str = "auto",
        precision: str = "auto",
    ) -> None:
        self._label = "the ONNX model" if isinstance(model, bytes) else str(model)
        if isinstance(model, str):
            model = Path(model)
        if isinstance(model, Path) and not model.is_file():
            raise ModelError(f"{model} does not exist; expected an .onnx file")
        kind, index = _parse_device(device)
        self._weights = weights or {}
        self._session, self.device = self._open(model, kind, index)
        self._weights = {}  # the session has its own copy
        try:
            inputs = {i.name: tuple(i.shape) for i in self._session.get_inputs()}
            self._outputs = tuple(o.name for o in self._session.get_outputs())
            self.precision = self._precision()
        except UnicodeDecodeError as error:  # ONNX Runtime looks at no name that it does not need
            raise ModelError(f"{self._label} is damaged ({error}); copy or export it again") from error
        if list(inputs) != [INPUT]:
            raise ModelError(
                f"{self._label} has the inputs {list(inputs)}, expected only {INPUT!r}. Write it with `dinokit export`"
            )
        self._input_shape = inputs[INPUT]  # ints, or names where any size goes
        if precision not in ("auto", self.precision):
            raise UsageError(
                f"precision={precision!r} does not match {self._label}, which computes in "
                f"{self.precision!r}. Use a file of that precision (`dinokit export --precision`), or engine='torch'"
            )

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's ``metadata_props``, including those of :mod:`dinokit.model_folder.contract`."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def _precision(self) -> str:
        """The precision in the file's metadata; fp32 without it, since other precisions are always recorded."""
        try:
            stored = json.loads(self.metadata.get(METADATA_KEY, "{}")).get("precision", "fp32")
        except (ValueError, AttributeError):
            stored = "fp32"  # a damaged contract is reported by the code that needs it
        return str(stored)

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        """See :class:`dinokit.runtime.Engine`.

        Raises:
            ModelError: the model has no such output, or cannot take pictures of this shape.
        """
        if missing := [name for name in outputs if name not in self._outputs]:
            raise ModelError(
                f"{self._label} has no output {', '.join(map(repr, missing))}, "
                f"only {', '.join(self._outputs)}. Write it again with `dinokit export`"
            )
        self._check_input(pixel_values)
        try:
            results = self._session.run(list(outputs), {INPUT: pixel_values})
        except Exception as error:
            raise ModelError(
                f"{self._label} could not run on {INPUT} of shape {pixel_values.shape}: "
                f"{_first_line(error)}. "
                "Height and width must be multiples of the patch, and the batch must fit in memory"
            ) from error
        return {
            name: result.astype(np.float32, copy=False) for name, result in zip(outputs, results, strict=True)
        }

    def _check_input(self, pixel_values: NDArray[np.float32]) -> None:
        expected, shape = self._input_shape, pixel_values.shape
        fits = len(shape) == len(expected) and all(
            size > 0 and (not isinstance(want, int) or size == want)
            for size, want in zip(shape, expected, strict=True)
        )
        if pixel_values.dtype != np.float32 or not fits:
            wanted = ", ".join(str(size) for size in expected)
            raise ModelError(
                f"{INPUT} is {pixel_values.dtype} of shape {shape}; {self._label} takes float32 of shape "
                f"({wanted}). Make it with Preprocessing.normalise"
            )

    def _open(self, model: bytes | Path, kind: str, index: int) -> tuple[Any, str]:
        """The session, and the device it runs on."""
        if kind == "auto":
            if _why_not("cuda", 0) is None:
                with contextlib.suppress(DeviceError):
                    return self._open(model, "cuda", 0)
            kind = "cpu"
        if kind == "cpu":
            return self._create(model, [_PROVIDERS["cpu"]]), "cpu"
        device = f"{kind}:{index}"
        if reason := _why_not(kind, index):
            raise DeviceError(_cannot_use(device, reason))
        try:
            session = self._create_on_gpu(model, kind, index)
        except ModelError as error:
            self._create(model, [_PROVIDERS["cpu"]])  # raises if the fault is the model's
            raise DeviceError(_cannot_use(device, _first_line(error.__cause__ or error))) from error
        # get_available_providers() only reports what was compiled in, and a provider that fails to load is silently
        # replaced by the CPU: only the session's own list proves anything.
        if session.get_providers()[0] != _PROVIDERS[kind]:
            got = ", ".join(session.get_providers())
            raise DeviceError(_cannot_use(device, f"ONNX Runtime chose {got} instead and gave no reason"))
        return session, f"cuda:{index}"

    def _create_on_gpu(self, model: bytes | Path, kind: str, index: int) -> Any:
        if kind != "tensorrt" or (cache := engine_folder(model, self._weights)) is None:
            return self._create(model, _gpu_providers(kind, index))
        providers = _gpu_providers(kind, index, cache_options(cache))
        try:
            return self._create(model, providers)
        except ModelError:
            if not any(cache.iterdir()):
                raise
            # Perhaps an engine whose writing was interrupted. TensorRT builds it again.
            shutil.rmtree(cache, ignore_errors=True)
            cache.mkdir(exist_ok=True)
            return self._create(model, providers)

    def _create(self, model: bytes | Path, providers: list[Any]) -> Any:
        import onnxruntime as ort

        source = model if isinstance(model, bytes) else str(model)
        options = session_options()
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in self._weights.values()]  # no copies
        options.add_external_initializers(list(self._weights), values)
        try:
            session = ort.InferenceSession(source, options, providers=providers, enable_fallback=0)
        except Exception as error:  # onnxruntime has a class for each error code, and RuntimeError
            raise ModelError(
                f"{self._label} cannot be opened by ONNX Runtime {ort.__version__}: {_first_line(error)}. "
                "It is damaged or not an ONNX model; copy or export it again"
            ) from error
        session.disable_fallback()  # an error in run() must not continue on another device
        return session


def session_options() -> Any:
    """``onnxruntime.SessionOptions`` as dinokit uses them: all processors, no logging, no idle spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = compute_threads()
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = _SILENT
    # Threads spin while a batch runs, which is fast, but not after it, when the next batch is decoded.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def cuda_loads() -> bool:
    """Whether ``device="auto"`` means CUDA on this machine."""
    return _why_not("cuda", 0) is None


def _parse_device(device: str) -> tuple[str, int]:
    """``cuda:1`` to ("cuda", 1)."""
    kind, _, index = device.partition(":")
    if kind not in {"auto", *_PROVIDERS} or (index and (kind in {"auto", "cpu"} or not index.isdecimal())):
        raise UsageError(
            f"device={device!r} is not known to the ONNX engine; expected auto, cpu, cuda, cuda:1 or tensorrt"
        )
    return kind, int(index or 0)


# -------------------- what a GPU needs


def _gpu_providers(kind: str, index: int, tensorrt: Mapping[str, Any] = MappingProxyType({})) -> list[Any]:
    """ONNX Runtime's list: the first provider that supports a node runs it; shapes are computed on the CPU.

    Args:
        kind: ``cuda`` or ``tensorrt``.
        index: of the device.
        tensorrt: further options of TensorRT.
    """
    import onnxruntime as ort

    # The default logger warns of a missing plugin on every GPU session; session options do not affect it.
    ort.set_default_logger_severity(_SILENT)
    device: dict[str, Any] = {"device_id": index}
    # fp32 must mean fp32: by default ONNX Runtime lets tensor cores round to 10 bits (TF32). TensorRT has no such
    # option, only the variable NVIDIA_TF32_OVERRIDE=0, which is for users to set. HEURISTIC: the algorithm of a
    # convolution is not searched for again at each picture size.
    cuda = {**device, "use_tf32": 0, "cudnn_conv_algo_search": "HEURISTIC"}
    chain: list[Any] = [(_PROVIDERS["cuda"], cuda), _PROVIDERS["cpu"]]
    return [(_PROVIDERS["tensorrt"], {**device, **tensorrt}), *chain] if kind == "tensorrt" else chain


def _why_not(kind: str, index: int) -> str | None:
    """What a GPU provider lacks on this machine and what to do, or None.

    Each requirement is checked before ONNX Runtime is used, which would log to stderr, fall back to the CPU and return
    no reason.
    """
    if not (count := cuda_devices()):
        return "no NVIDIA driver with a device was found. Check with nvidia-smi"
    if index >= count:
        return f"there are only {count} CUDA devices. Choose one of cuda:0 to cuda:{count - 1}"
    import onnxruntime as ort

    if _PROVIDERS[kind] not in ort.get_available_providers():
        return (
            f"the installed onnxruntime {ort.__version__} was built without {_PROVIDERS[kind]}. "
            "Uninstall onnxruntime and install onnxruntime-gpu"
        )
    preload_libraries(kind)
    if fault := load_fault(Path(ort.__file__).parent / "capi", kind):
        what = "'dinokit[gpu]'" if kind == "cuda" else "'dinokit[gpu]' 'tensorrt~=10.0'"
        return f"{fault}. Install what is missing with: pip install {what}"
    return None


def _cannot_use(device: str, reason: str) -> str:
    return f"device={device!r} was requested but cannot be used: {reason}, or use device='cpu'"


def _first_line(error: BaseException) -> str:
    """The first line of ONNX Runtime's message, without the error code."""
    lines = str(error).strip().splitlines()
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", lines[0]) if lines else type(error).__name__
    return text.strip().rstrip(".")
