"""What works on this machine: packages, ONNX Runtime's providers, GPUs, the bundled model, the Hub. As data.

Nothing is fetched and nothing is changed. Versions are read from the packages' metadata, so torch is not loaded.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dinokit._version import __version__
from dinokit.errors import DinokitError

__all__ = [
    "Check",
    "Diagnosis",
    "Gpu",
    "Hub",
    "MissingLibrary",
    "Provider",
    "diagnose",
    "needed_libraries",
    "pip_line",
]

PACKAGES = (
    "numpy",
    "pillow",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "pyarrow",
    "safetensors",
    "huggingface_hub",
    "torch",
    "timm",
)
_REQUIRED = ("numpy", "pillow", "onnx", "pyarrow", "safetensors", "huggingface_hub")
# They all install a package named onnxruntime, over one another.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)

# Opened by the CUDA provider while it works, so the linker does not name them.
_OPENED_LATER = {"12": ("libcudnn.so.9", "libcufft.so.11"), "13": ("libcudnn.so.9", "libcufft.so.12")}
_PIP = {
    "cublas": "nvidia-cublas",
    "cublasLt": "nvidia-cublas",
    "cudart": "nvidia-cuda-runtime",
    "cufft": "nvidia-cufft",
    "curand": "nvidia-curand",
    "nvrtc": "nvidia-cuda-nvrtc",
}
_DRIVER = "the NVIDIA driver brings it, no pip package does"


@dataclass(frozen=True)
class MissingLibrary:
    """A shared library that a provider needs and the linker does not find."""

    name: str
    fix: str
    """The pip line that brings it, or who else does."""


@dataclass(frozen=True)
class Provider:
    """One of ONNX Runtime's execution providers that the installed build has."""

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


@dataclass(frozen=True)
class Check:
    """Something that was tried."""

    works: bool
    detail: str


@dataclass(frozen=True)
class Hub:
    """How the Hugging Face Hub would be asked; it is not asked."""

    cache: str
    cache_free_bytes: int | None
    cache_writable: bool
    endpoint: str
    offline: bool
    token: bool
    """Whether there is one; never which."""


@dataclass(frozen=True)
class Diagnosis:
    """All that was found."""

    dinokit: str
    python: str
    platform: str
    packages: dict[str, str | None]
    """Distribution to version, None where it is not installed."""
    runtime_clash: tuple[str, ...]
    """Builds of ONNX Runtime that overwrite each other's files; empty when there is one, as it should be."""
    cpu_threads: int
    gpus: tuple[Gpu, ...]
    cuda_driver: str | None
    """The newest CUDA that the NVIDIA driver runs."""
    providers: tuple[Provider, ...]
    cpu: Check
    torch: Check | None
    """Tried only where ONNX Runtime cannot run on the CPU."""
    starter: Check
    hub: Hub | None
    """None where huggingface_hub cannot be imported."""
    problems: tuple[str, ...]
    """What is wrong and what to do, a sentence each."""

    @property
    def can_run(self) -> bool:
        """Whether a model can be run at all, on the CPU."""
        return self.cpu.works or (self.torch is not None and self.torch.works)

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.can_run:
            return f"dinokit cannot run a model here: {self.cpu.detail}"
        if not self.cpu.works:
            return "ONNX Runtime does not work here; torch does (engine='torch')"
        gpus = [p.name for p in self.providers if p.loads and p.name != "CPUExecutionProvider"]
        usable = self.gpus and gpus
        return (
            f"dinokit works on the CPU and on a GPU ({', '.join(gpus)})"
            if usable
            else "dinokit works on the CPU"
        )

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "can_run": self.can_run, "verdict": self.verdict}


def diagnose() -> Diagnosis:
    """Looks at everything. No fault of the machine is an exception: it is a finding."""
    packages = {name: _version(name) for name in PACKAGES}
    clash = tuple(name for name in _RUNTIMES if _version(name) is not None)
    clash = clash if len(clash) > 1 else ()
    driver, gpus = _gpus()
    cpu = _try(_run_on_cpu)
    torch = None if cpu.works or packages["torch"] is None else _try(_run_torch)
    starter = _try(_read_starter)
    providers = _providers(cpu, len(gpus))
    hub = _hub()
    absent = [name for name in _REQUIRED if packages[name] is None]
    problems = tuple(_problems(absent, clash, cpu, starter, providers, gpus, hub))
    return Diagnosis(
        dinokit=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages=packages,
        runtime_clash=clash,
        cpu_threads=_threads(),
        gpus=gpus,
        cuda_driver=driver,
        providers=providers,
        cpu=cpu,
        torch=torch,
        starter=starter,
        hub=hub,
        problems=problems,
    )


def _problems(
    absent: list[str],
    clash: tuple[str, ...],
    cpu: Check,
    starter: Check,
    providers: tuple[Provider, ...],
    gpus: tuple[Gpu, ...],
    hub: Hub | None,
) -> Iterator[str]:
    if absent:
        yield f"dinokit needs {', '.join(absent)}, which is not installed; pip install {' '.join(absent)}"
    if clash:
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in clash else clash[0]
        yield (
            f"{' and '.join(clash)} are both installed and overwrite each other's files. Keep one: "
            f"pip uninstall -y {' '.join(clash)} && pip install {keep}"
        )
    if not cpu.works:
        yield f"the CPU path does not work: {cpu.detail}"
    if not starter.works:
        yield f"the bundled model: {starter.detail}"
    if gpus and not any(p.loads for p in providers if p.name != "CPUExecutionProvider"):
        yield "there is a GPU, and ONNX Runtime cannot use it: see its providers; pip install 'dinokit[gpu]' may help"
    if hub is not None and not hub.cache_writable:
        yield f"the Hub's cache {hub.cache} cannot be written; set HF_HOME to a folder that can"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _try(check: Callable[[], str]) -> Check:
    try:
        return Check(True, check())
    except DinokitError as error:  # a sentence already
        return Check(False, str(error))
    except Exception as error:  # whatever a broken installation raises is the finding
        lines = str(error).strip().splitlines()
        return Check(False, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


# -- the CPU path


def _threads() -> int:
    try:
        from dinokit.runtime.onnx import _cpu_threads
    except ImportError:  # without numpy nothing runs, which is found elsewhere
        return os.cpu_count() or 1
    return _cpu_threads()


def _run_on_cpu() -> str:
    """A very small Vision Transformer: its graph written, run, and its numbers looked at."""
    import numpy as np

    from dinokit.architecture import VitArchitecture
    from dinokit.runtime.onnx import OnnxEngine
    from dinokit.vit_graph import build_vit_graph
    from dinokit.weights import expected_shapes

    began = time.perf_counter()
    vit = VitArchitecture(embed_dim=8, depth=1, num_heads=2, patch_size=8, image_size=(16, 16))
    shapes = expected_shapes(vit) or {}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    engine = OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")
    outputs = engine.run(np.zeros((1, 3, 16, 16), np.float32), ["pooler_output"])
    if not np.isfinite(outputs["pooler_output"]).all():
        raise ArithmeticError("ONNX Runtime gave numbers that are not finite")
    return f"a small model ran in {1000 * (time.perf_counter() - began):.0f} ms"


def _run_torch() -> str:
    import torch

    if float(torch.ones(2) @ torch.ones(2)) != 2:
        raise ArithmeticError("torch calculates wrongly")
    return f"torch {torch.__version__} calculates"


def _read_starter() -> str:
    from dinokit.locate import locate
    from dinokit.zoo import STARTER

    found = locate(STARTER)
    return f"whole ({found.config.timm_architecture}, {found.config.embed_dim} numbers a picture)"


# -- GPUs


def _gpus() -> tuple[str | None, tuple[Gpu, ...]]:
    """The driver's CUDA version and its devices."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        if driver.cuInit(0):
            return None, ()
        version, count = ctypes.c_int(0), ctypes.c_int(0)
        driver.cuDriverGetVersion(ctypes.byref(version))
        driver.cuDeviceGetCount(ctypes.byref(count))
        gpus = tuple(_gpu(driver, index) for index in range(count.value))
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


def _providers(cpu: Check, n_gpus: int) -> tuple[Provider, ...]:
    try:
        import onnxruntime as ort

        names = ort.get_available_providers()
        folder = Path(ort.__file__).parent / "capi"
    except Exception:  # not installed or broken: the check of the CPU says how
        return ()
    from dinokit.runtime.onnx import _preload_libraries

    _preload_libraries()
    found = []
    for name in sorted(names, key=lambda n: n != "CPUExecutionProvider"):
        kind = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "tensorrt"}.get(name)
        if name == "CPUExecutionProvider":
            found.append(Provider(name, cpu.works, None if cpu.works else cpu.detail))
        elif kind is not None:
            found.append(_gpu_provider(name, kind, folder, n_gpus))
    return tuple(found)


def _gpu_provider(name: str, kind: str, folder: Path, n_gpus: int) -> Provider:
    from dinokit.runtime.onnx import _load_fault

    library = folder / f"libonnxruntime_providers_{kind}.so"
    needed = needed_libraries(library) if library.is_file() else ()
    cuda = next((n.rpartition(".")[2] for n in needed if n.startswith("libcudart.so.")), "13")
    later = _OPENED_LATER.get(cuda, ())
    # What lies beside the provider (its own parts) is found by its path.
    foreign = [n for n in dict.fromkeys((*needed, *later)) if not (folder / n).exists()]
    missing = tuple(MissingLibrary(n, pip_line(n, cuda)) for n in foreign if not _opens(n))
    fault = _load_fault(folder, kind)
    if fault or missing:
        names = ", ".join(library.name for library in missing)
        return Provider(name, False, f"missing: {names}" if missing else fault, missing)
    if not n_gpus:
        return Provider(name, False, "its libraries load, but the driver offers no device")
    return Provider(name, True, None)


def _opens(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def pip_line(library: str, cuda: str) -> str:
    """What brings a library such as ``libcurand.so.10``.

    Args:
        library: its name as the linker asks for it.
        cuda: major version of CUDA that the provider was built for; packages before 13 carry it in their name.
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
        return f"the system's packages bring {library}"
    if cuda.isdecimal() and int(cuda) < 13:
        return f"pip install {_PIP[stem]}-cu{cuda}"
    return f"pip install '{_PIP[stem]}~={major}.0'"


def needed_libraries(path: Path) -> tuple[str, ...]:
    """The NEEDED entries of a 64-bit little-endian ELF library; empty for any other file.

    The linker names only the first library that it misses; this names all.
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


# -- the Hub


def _hub() -> Hub | None:
    try:
        from huggingface_hub import constants, get_token
    except Exception:  # a package that cannot be imported is in the list of packages
        return None
    cache = Path(constants.HF_HUB_CACHE)
    there = next((p for p in (cache, *cache.parents) if p.exists()), Path("/"))
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    return Hub(
        cache=str(cache),
        cache_free_bytes=free,
        cache_writable=os.access(there, os.W_OK),
        endpoint=_without_password(constants.ENDPOINT),
        offline=bool(constants.HF_HUB_OFFLINE),
        token=get_token() is not None,
    )


def _without_password(url: str) -> str:
    """A mirror behind a login may have its password in the address."""
    parts = urlsplit(url)
    return (
        urlunsplit(parts._replace(netloc="…@" + parts.netloc.rpartition("@")[2]))
        if "@" in parts.netloc
        else url
    )
