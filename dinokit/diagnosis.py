"""What works on this machine, as data: packages, ONNX Runtime's providers, GPUs, the bundled model, the Hub.

Nothing is downloaded or changed. Versions are read from the packages' metadata. Required packages are also imported;
torch is imported only if ONNX Runtime does not work.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from dinokit._version import __version__
from dinokit.errors import DinokitError
from dinokit.runtime.execution_providers import Gpu, Provider, find_gpus, find_providers

__all__ = [
    "Check",
    "Diagnosis",
    "Hub",
    "diagnose",
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
_MODULES = {"pillow": "PIL.Image"}
"""The module to import for a distribution, if its name differs."""
# All of them install a package named onnxruntime, overwriting each other.
_RUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
)


@dataclass(frozen=True)
class Check:
    """The result of trying something."""

    works: bool
    detail: str


@dataclass(frozen=True)
class Hub:
    """How the Hugging Face Hub would be contacted; diagnosing does not contact it."""

    cache: str
    cache_free_bytes: int | None
    cache_writable: bool
    endpoint: str
    offline: bool
    token: bool
    """Whether a token exists; the token itself is never kept."""


@dataclass(frozen=True)
class Diagnosis:
    """All findings."""

    dinokit: str
    python: str
    platform: str
    packages: dict[str, str | None]
    """Distribution to version; None if it is not installed."""
    broken: tuple[str, ...]
    """Required packages that are installed and cannot be imported."""
    runtime_clash: tuple[str, ...]
    """Builds of ONNX Runtime that overwrite each other's files; empty if at most one is installed, as it should be."""
    cpu_threads: int
    gpus: tuple[Gpu, ...]
    cuda_driver: str | None
    """The newest CUDA version that the NVIDIA driver supports."""
    providers: tuple[Provider, ...]
    cpu: Check
    torch: Check | None
    """Tried only if ONNX Runtime cannot run on the CPU."""
    starter: Check
    hub: Hub | None
    """None if huggingface_hub cannot be imported."""
    problems: tuple[str, ...]
    """What is wrong and what to do about it, one sentence per problem."""

    @property
    def can_run(self) -> bool:
        """Whether a model can be run at all, on the CPU."""
        return self.cpu.works or (self.torch is not None and self.torch.works)

    @property
    def verdict(self) -> str:
        """The conclusion, in one line."""
        if not self.can_run:
            return f"dinokit cannot run a model here: {self.cpu.detail}"
        if not self.cpu.works:
            return "ONNX Runtime does not work here; torch does (engine='torch')"
        gpus = [p.name for p in self.providers if p.loads and p.name != "CPUExecutionProvider"]
        where = f"the CPU and on a GPU ({', '.join(gpus)})" if self.gpus and gpus else "the CPU"
        if self.broken:
            return f"models run on {where}, but {', '.join(self.broken)} cannot be imported: see the problems"
        return f"dinokit works on {where}"

    def to_json(self) -> dict[str, Any]:
        """For programs."""
        return {**asdict(self), "can_run": self.can_run, "verdict": self.verdict}


def diagnose() -> Diagnosis:
    """Checks everything. A fault of the machine is a finding, never an exception."""
    packages = {name: _version(name) for name in PACKAGES}
    clash = tuple(name for name in _RUNTIMES if _version(name) is not None)
    clash = clash if len(clash) > 1 else ()
    driver, gpus = find_gpus()
    cpu = _try(_run_on_cpu)
    torch = None if cpu.works or packages["torch"] is None else _try(_run_torch)
    starter = _try(_read_starter)
    providers = find_providers(None if cpu.works else cpu.detail, len(gpus))
    hub, token_problem = _hub()
    absent = [name for name in _REQUIRED if packages[name] is None]
    imports = {name: _try(functools.partial(_import, name)) for name in _REQUIRED if name not in absent}
    broken = {name: check.detail for name, check in imports.items() if not check.works}
    problems = (
        *_problems(absent, broken, clash, cpu, starter, providers, gpus, hub),
        *([] if token_problem is None else [token_problem]),
    )
    return Diagnosis(
        dinokit=__version__,
        python=f"{platform.python_version()} ({sys.executable})",
        platform=platform.platform(),
        packages=packages,
        broken=tuple(broken),
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
    broken: dict[str, str],
    clash: tuple[str, ...],
    cpu: Check,
    starter: Check,
    providers: tuple[Provider, ...],
    gpus: tuple[Gpu, ...],
    hub: Hub | None,
) -> Iterator[str]:
    if absent:
        yield f"required but not installed: {', '.join(absent)}; install with: pip install {' '.join(absent)}"
    for name, reason in broken.items():
        yield (
            f"{name} is installed but cannot be imported ({reason}); reinstall it: "
            f"pip install --force-reinstall {name}"
        )
    if clash:
        keep = "onnxruntime-gpu" if "onnxruntime-gpu" in clash else clash[0]
        yield (
            f"{' and '.join(clash)} are installed together and overwrite each other's files; keep only one: "
            f"pip uninstall -y {' '.join(clash)} && pip install {keep}"
        )
    if not cpu.works:
        yield f"models cannot run on the CPU with ONNX Runtime: {cpu.detail}"
    if not starter.works:
        yield f"the bundled model cannot be used: {starter.detail}"
    if gpus and not any(p.loads for p in providers if p.name != "CPUExecutionProvider"):
        yield "there is a GPU, but ONNX Runtime cannot use it; see its providers, or try pip install 'dinokit[gpu]'"
    if hub is not None and not hub.cache_writable:
        yield f"the Hub's cache {hub.cache} is not writable; set HF_HOME to a folder that is"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import(distribution: str) -> str:
    importlib.import_module(_MODULES.get(distribution, distribution))
    return "can be imported"


def _try(check: Callable[[], str]) -> Check:
    try:
        return Check(True, check())
    except DinokitError as error:  # a sentence already
        return Check(False, str(error))
    except Exception as error:  # a broken installation may raise anything
        lines = str(error).strip().splitlines()
        return Check(False, f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__)


# -- the CPU path


def _threads() -> int:
    from dinokit.runtime.cpu import compute_threads

    return compute_threads()


def _run_on_cpu() -> str:
    """Writes the graph of a very small Vision Transformer, runs it and checks its output."""
    import numpy as np

    from dinokit.model_folder.architecture import VitArchitecture
    from dinokit.model_folder.contract import POOLED
    from dinokit.model_folder.weights import expected_shapes
    from dinokit.runtime.onnx import OnnxEngine
    from dinokit.vit_graph import build_vit_graph

    began = time.perf_counter()
    vit = VitArchitecture(embed_dim=8, depth=1, num_heads=2, patch_size=8, image_size=(16, 16))
    shapes = expected_shapes(vit) or {}
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    engine = OnnxEngine(build_vit_graph(vit, weights).SerializeToString(), device="cpu")
    outputs = engine.run(np.zeros((1, 3, 16, 16), np.float32), [POOLED])
    if not np.isfinite(outputs[POOLED]).all():
        raise ArithmeticError("ONNX Runtime returned numbers that are not finite")
    return f"a small model ran in {1000 * (time.perf_counter() - began):.0f} ms"


def _run_torch() -> str:
    import timm  # builds the networks that torch runs
    import torch

    if float(torch.ones(2) @ torch.ones(2)) != 2:
        raise ArithmeticError("torch returned a wrong result")
    return f"torch {torch.__version__} works, with timm {timm.__version__}"


def _read_starter() -> str:
    from dinokit.loading.locate import locate
    from dinokit.loading.zoo import STARTER

    found = locate(STARTER)
    return f"complete ({found.config.timm_architecture}, {found.config.embed_dim} numbers per picture)"


# -- the Hub


def _hub() -> tuple[Hub | None, str | None]:
    """The Hub's settings, and what is wrong with the token."""
    try:
        from huggingface_hub import constants, get_token
    except Exception:  # reported with the packages
        return None, None
    cache = Path(constants.HF_HUB_CACHE)
    there = next((p for p in (cache, *cache.parents) if _exists(p)), Path("/"))
    token_problem = None
    try:
        token = get_token() is not None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8
        token = False
        reason = getattr(error, "strerror", None) or str(error)
        token_problem = (
            f"the Hub token in {constants.HF_TOKEN_PATH} cannot be read ({reason}); make that file readable, set "
            "HF_TOKEN_PATH to another one, or log in again: hf auth login"
        )
    try:
        free: int | None = shutil.disk_usage(there).free
    except OSError:
        free = None
    hub = Hub(
        cache=str(cache),
        cache_free_bytes=free,
        cache_writable=os.access(there, os.W_OK),
        endpoint=_without_password(constants.ENDPOINT),
        offline=bool(constants.HF_HUB_OFFLINE),
        token=token,
    )
    return hub, token_problem


def _exists(path: Path) -> bool:
    try:
        path.stat()
    except (OSError, ValueError):  # a folder without access counts as absent
        return False
    return True


def _without_password(url: str) -> str:
    """The address without user name and password, which that of a mirror may contain."""
    parts = urlsplit(url)
    return (
        urlunsplit(parts._replace(netloc="…@" + parts.netloc.rpartition("@")[2]))
        if "@" in parts.netloc
        else url
    )
