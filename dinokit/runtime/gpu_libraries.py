"""Finds and loads the NVIDIA driver and the libraries of ONNX Runtime's GPU providers, or reports what is missing."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import io
import sys
from pathlib import Path
from typing import Any

__all__ = ["cuda_devices", "cuda_driver", "load_fault", "preload_libraries"]


def cuda_driver() -> ctypes.CDLL | None:
    """The NVIDIA driver's library, initialised; None without a driver or a device."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        return None if driver.cuInit(0) else driver
    except (OSError, AttributeError):
        return None


def cuda_devices() -> int:
    """How many devices the NVIDIA driver offers; 0 without driver. Loads only the driver's library."""
    driver, count = cuda_driver(), ctypes.c_int(0)
    return 0 if driver is None or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value


def preload_libraries(kind: str) -> None:
    """Loads libraries of the packages nvidia-* and, for TensorRT, tensorrt, where the linker does not find them."""
    import onnxruntime as ort

    if hasattr(ort, "preload_dlls"):  # since 1.21; it prints what is missing, which load_fault finds, too
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(Exception):
            ort.preload_dlls()
    if kind == "tensorrt":
        spec = importlib.util.find_spec("tensorrt_libs")
        for folder in (spec and spec.submodule_search_locations) or ():
            # The others depend on the first.
            for stem in ("libnvinfer", "libnvinfer_plugin", "libnvonnxparser"):
                for library in sorted(Path(folder).glob(f"{stem}.so.*")):
                    with contextlib.suppress(OSError):
                        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def load_fault(folder: Path, kind: str) -> str | None:
    """The linker's error for a provider's library, which names a missing one; None if it loads."""
    windows = sys.platform == "win32"
    pattern = "{}.dll" if windows else "lib{}.so"
    # As ONNX Runtime loads them on Windows (LOAD_WITH_ALTERED_SEARCH_PATH): their dependencies may be on PATH.
    search: dict[str, Any] = {"winmode": 0x8} if windows else {}
    try:
        # The providers use functions of this one without naming it as needed.
        ctypes.CDLL(
            str(folder / pattern.format("onnxruntime_providers_shared")), ctypes.RTLD_GLOBAL, **search
        )
        ctypes.CDLL(str(folder / pattern.format(f"onnxruntime_providers_{kind}")), **search)
    except OSError as error:
        return str(error)
    return None
