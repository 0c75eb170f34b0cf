"""What ONNX Runtime can use on this machine: GPUs, execution providers that load, and the libraries others lack.

The linker names only the first missing library. This module finds all of them, each with the pip command that installs
it.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dinokit.runtime.gpu_libraries import cuda_devices, cuda_driver, load_fault, preload_libraries

__all__ = [
    "Gpu",
    "MissingLibrary",
    "Provider",
    "find_gpus",
    "find_providers",
    "needed_libraries",
    "pip_line",
]

# Opened by the CUDA provider at run time, so the linker does not name them.
_OPENED_LATER = {"12": ("libcudnn.so.9", "libcufft.so.11"), "13": ("libcudnn.so.9", "libcufft.so.12")}
_PIP = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "cufft": "nvidia-cufft",
    "curand": "nvidia-curand",
    "nvrtc": "nvidia-cuda-nvrtc",
}
_DRIVER = "part of the NVIDIA driver, not of a pip package"


@dataclass(frozen=True)
class MissingLibrary:
    """A shared library that a provider needs and the linker does not find."""

    name: str
    fix: str
    """The pip command that installs it, or what else does."""


@dataclass(frozen=True)
class Provider:
    """An execution provider of the installed build of ONNX Runtime."""

    name: str
    loads: bool
    reason: str | None
    """Why it does not load."""
    missing: tuple[MissingLibrary, ...] = ()


@dataclass(frozen=True)
class Gpu:
    """A GPU as its driver names it."""

    name: str
    memory_bytes: int


# -- GPUs


def find_gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The newest CUDA that the NVIDIA driver supports, and its devices; None and an empty list without a driver."""
    driver, version = cuda_driver(), ctypes.c_int(0)
    if driver is None:
        return None, ()
    try:
        driver.cuDriverGetVersion(ctypes.byref(version))
        gpus = tuple(_gpu(driver, index) for index in range(cuda_devices()))
    except (OSError, AttributeError):
        return None, ()
    return f"{version.value // 1000}.{version.value % 1000 // 10}", gpus


def _gpu(driver: Any, index: int) -> Gpu:
    device, name, memory = ctypes.c_int(0), ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    driver.cuDeviceGet(ctypes.byref(device), index)
    driver.cuDeviceGetName(name, len(name), device)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return Gpu(name.value.decode(errors="replace"), memory.value)


# -- providers


def find_providers(cpu_fault: str | None, n_gpus: int) -> tuple[Provider, ...]:
    """The providers of the installed build that dinokit can use, the CPU's first; empty if it cannot be imported.

    Args:
        cpu_fault: why models do not run on the CPU, which the caller tries; None: they do.
        n_gpus: the number of devices that the driver offers.
    """
    try:
        import onnxruntime as ort

        names = ort.get_available_providers()
        folder = Path(ort.__file__).parent / "capi"
    except Exception:  # not installed or broken: the check of the CPU reports it
        return ()
    found = []
    for name in sorted(names, key=lambda n: n != "CPUExecutionProvider"):
        kind = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}.get(name)
        if name == "CPUExecutionProvider":
            found.append(Provider(name, cpu_fault is None, cpu_fault))
        elif kind is not None:
            found.append(_gpu_provider(name, kind, folder, n_gpus))
    return tuple(found)


def _gpu_provider(name: str, kind: str, folder: Path, n_gpus: int) -> Provider:
    preload_libraries(kind)
    library = folder / f"libonnxruntime_providers_{kind}.so"
    needed = needed_libraries(library) if library.is_file() else ()
    cuda = next((n.rpartition(".")[2] for n in needed if n.startswith("libcudart.so.")), "13")
    later = _OPENED_LATER.get(cuda, ()) if needed else ()  # names of Linux's libraries
    # Libraries beside the provider (its own parts) are found by their path.
    foreign = [n for n in dict.fromkeys((*needed, *later)) if not (folder / n).exists()]
    missing = tuple(MissingLibrary(n, pip_line(n, cuda)) for n in foreign if not _opens(n))
    fault = load_fault(folder, kind)
    if fault or missing:
        names = ", ".join(library.name for library in missing)
        return Provider(name, False, f"missing: {names}" if missing else fault, missing)
    if not n_gpus:
        return Provider(name, False, "its libraries load, but the driver offers no device")
    return Provider(name, True, None)


# -- shared libraries


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def pip_line(library: str, cuda: str) -> str:
    """The package that provides a library such as ``libcurand.so.10``.

    Args:
        library: its name, as in the linker's message.
        cuda: major version of CUDA that the provider was built for; packages before 13 have it in their names.
    """
    if library.startswith("libcuda.so"):
        return _DRIVER
    match = re.fullmatch(r"lib(\w+)\.so\.(\d+).*", library)
    stem, major = (match[1], match[2]) if match else (library, "")
    if stem.startswith("cudnn"):
        return f"pip install 'nvidia-cudnn-cu{cuda}~={major}.0'"
    if stem.startswith(("nvinfer", "nvonnxparser")):
        return f"pip install 'tensorrt~={major}.0'"
    if stem not in _PIP:
        return f"{library} is part of a system package"
    if cuda.isdecimal() and int(cuda) < 13:
        return f"pip install {_PIP[stem]}-cu{cuda}"
    return f"pip install '{_PIP[stem]}~={major}.0'"


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The NEEDED entries of a 64-bit little-endian ELF library; empty for any other file.

    The linker names only the first missing library; this names all.
    """
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size < 64:
            return ()
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[:6] != b"\x7fELF\x02\x01":
                return ()
            try:
                return _needed(data)
            except (struct.error, ValueError, StopIteration):  # cut short, or nonsense
                return ()


def _needed(data: mmap.mmap) -> tuple[str, ...]:
    start, size, count = struct.unpack_from("<Q14xHH", data, 32)
    segments = []  # type, offset in the file, address in memory, length in the file
    for position in range(start, start + size * count, size):
        kind, offset, address, length = struct.unpack_from("<I4xQQ8xQ", data, position)
        segments.append((kind, offset, address, length))
    entries = [
        struct.unpack_from("<qQ", data, position)
        for kind, offset, _, length in segments
        if kind == 2  # PT_DYNAMIC
        for position in range(offset, offset + length, 16)
    ]
    names = next(value for tag, value in entries if tag == 5)  # DT_STRTAB, an address
    table = next(
        offset + names - address
        for kind, offset, address, length in segments
        if kind == 1 and address <= names < address + length  # PT_LOAD
    )
    found = [table + value for tag, value in entries if tag == 1]  # DT_NEEDED
    return tuple(data[position : data.find(b"\0", position)].decode() for position in found)
