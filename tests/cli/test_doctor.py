"""`dinokit doctor`: what it finds, how it says it, and that it loads and shows nothing it should not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from small_models import config_for, random_weights

from dinokit import diagnosis
from dinokit.cli import cli
from dinokit.diagnosis import Check, diagnose
from dinokit.model_folder.folder import write_model_folder
from dinokit.runtime import execution_providers, gpu_libraries
from dinokit.runtime.execution_providers import Gpu, MissingLibrary, Provider, needed_libraries, pip_line

TOKEN = "hf_" + "s3cret" * 6


@pytest.fixture(autouse=True)
def starter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small folder in place of the bundled one."""
    folder = write_model_folder(tmp_path / "starter", config_for(name="starter"), random_weights())
    monkeypatch.setattr("dinokit.loading.locate.starter_path", lambda: folder.path)
    return folder.path


def test_the_cpu_path_is_tried_and_works() -> None:
    found = diagnose()
    assert found.cpu.works, found.cpu.detail
    assert found.can_run
    assert found.verdict.startswith("dinokit works on the CPU")
    assert found.packages["numpy"] == importlib.metadata.version("numpy")
    assert found.providers[0] == Provider("CPUExecutionProvider", True, None)
    assert found.starter.detail.startswith("complete (vit_")
    assert found.torch is None
    assert 1 <= found.cpu_threads <= (os.cpu_count() or 1)


def test_the_command_prints_and_answers_in_json() -> None:
    done = CliRunner().invoke(cli, ["doctor"], prog_name="dinokit")
    assert done.exit_code == 0, done.output
    rows = {line.split("  ")[0]: line for line in done.stdout.splitlines()}
    names = {
        "dinokit",
        "Python",
        "numpy",
        "pillow",
        "onnx",
        "CPU",
        "GPU",
        "starter model",
        "Hub cache",
        "Hub token",
    }
    assert names <= set(rows)
    assert "GiB free" in rows["Hub cache"]
    assert done.stdout.splitlines()[-1].startswith("dinokit works on the CPU")
    as_json = CliRunner().invoke(cli, ["doctor", "--json"], prog_name="dinokit")
    values = json.loads(as_json.stdout)
    assert values["can_run"] is True
    assert values["hub"]["cache_free_bytes"] > 0


def test_nothing_heavy_is_loaded_and_no_secret_shown(tmp_path: Path) -> None:
    code = """
import sys
from dinokit.cli import cli
try: cli(["doctor"] + sys.argv[1:])
finally: print("HEAVY", [m for m in ("torch", "timm", "transformers") if m in sys.modules], file=sys.stderr)
"""
    environment = os.environ | {
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_ENDPOINT": "https://me:passw0rd@mirror.example/hub",
    }
    for args in ([], ["--json"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *args], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert "HEAVY []" in done.stderr
        assert TOKEN not in done.stdout + done.stderr
        assert "passw0rd" not in done.stdout + done.stderr
    hub = json.loads(done.stdout)["hub"]
    assert (hub["endpoint"], hub["offline"], hub["token"]) == ("https://…@mirror.example/hub", True, True)
    assert hub["cache"] == str(tmp_path / "home" / "hub")
    assert not (tmp_path / "home").exists()  # looked at, not made


def test_two_runtimes_that_overwrite_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    real = diagnosis._version
    pretend = {"onnxruntime": "1.30.0", "onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(diagnosis, "_version", lambda name: pretend.get(name) or real(name))
    found = diagnose()
    assert found.runtime_clash == ("onnxruntime", "onnxruntime-gpu")
    assert found.problems[0] == (
        "onnxruntime and onnxruntime-gpu are installed together and overwrite each other's files; keep only one: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    )


def test_when_nothing_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("libonnxruntime.so: file too short\nand more")

    monkeypatch.setattr(diagnosis, "_run_on_cpu", broken)
    monkeypatch.setattr(diagnosis, "_run_torch", broken)
    done = CliRunner().invoke(cli, ["doctor"], prog_name="dinokit")
    assert done.exit_code == 3
    last = done.stdout.splitlines()[-1]
    assert last == "dinokit cannot run a model here: ImportError: libonnxruntime.so: file too short"


@pytest.mark.parametrize("package", ["numpy", "onnxruntime", "onnx"])
def test_without_a_package_it_still_answers(package: str) -> None:
    code = """
import importlib.metadata as metadata, sys
broken, real = sys.argv[1], metadata.version
def version(name):
    if name in (broken, "torch"): raise metadata.PackageNotFoundError(name)
    return real(name)
metadata.version = version
sys.modules[broken] = None
from dinokit.cli import cli
cli(["doctor"])
"""
    done = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr  # a library of ONNX Runtime may write a line of its own there
    assert done.stdout.splitlines()[-1].startswith("dinokit cannot run a model here: ")
    if package != "onnxruntime":
        assert (
            f"Problem: required but not installed: {package}; install with: pip install {package}"
            in done.stdout
        )


def test_torch_stands_in_for_a_broken_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> str:
        raise ImportError("broken")

    real = diagnosis._version
    monkeypatch.setattr(diagnosis, "_version", lambda name: "2.0" if name == "torch" else real(name))
    monkeypatch.setattr(diagnosis, "_run_on_cpu", broken)
    monkeypatch.setattr(diagnosis, "_run_torch", lambda: "torch calculates")
    found = diagnose()
    assert (found.can_run, found.torch) == (True, Check(True, "torch calculates"))
    assert found.verdict == "ONNX Runtime does not work here; torch does (engine='torch')"


def test_a_damaged_bundled_model_is_a_problem_not_the_end(starter: Path) -> None:
    (starter / "timm.safetensors").write_bytes(b"cut")
    found = diagnose()
    assert found.can_run
    assert not found.starter.works
    assert any(
        p.startswith("the bundled model cannot be used: ") and "timm.safetensors" in p for p in found.problems
    )


# -- GPU providers, whose libraries this machine need not have


def test_a_missing_library_is_named_with_its_pip_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("shared", "cuda"):
        (tmp_path / f"libonnxruntime_providers_{name}.so").write_bytes(b"")
    needed = ("libcublas.so.13", "libcudart.so.13", "libcurand.so.10", "libcuda.so.1", "libc.so.6")
    there = {"libcublas.so.13", "libcudart.so.13", "libc.so.6", "libcudnn.so.9", "libcufft.so.12"}
    monkeypatch.setattr(execution_providers, "needed_libraries", lambda path: needed)
    monkeypatch.setattr(execution_providers, "_opens", there.__contains__)
    found = execution_providers._gpu_provider("CUDAExecutionProvider", "cuda", tmp_path, 1)
    assert found == Provider(
        "CUDAExecutionProvider",
        False,
        "missing: libcurand.so.10, libcuda.so.1",
        (
            MissingLibrary("libcurand.so.10", "pip install 'nvidia-curand~=10.0'"),
            MissingLibrary("libcuda.so.1", "part of the NVIDIA driver, not of a pip package"),
        ),
    )
    # all is there but the provider's own file is broken: the linker's words; and libraries are no device
    monkeypatch.setattr(execution_providers, "_opens", lambda name: True)
    assert "file too short" in str(execution_providers._gpu_provider("C", "cuda", tmp_path, 1).reason)
    monkeypatch.setattr("dinokit.runtime.execution_providers.load_fault", lambda folder, kind: None)
    assert execution_providers._gpu_provider("C", "cuda", tmp_path, 1).loads
    assert execution_providers._gpu_provider("C", "cuda", tmp_path, 0).reason == (
        "its libraries load, but the driver offers no device"
    )


def test_libraries_of_linux_are_not_missed_where_the_provider_is_a_dll(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dinokit.runtime.execution_providers.load_fault", lambda folder, kind: None)
    monkeypatch.setattr(execution_providers, "_opens", lambda name: False)
    assert execution_providers._gpu_provider("CUDAExecutionProvider", "cuda", tmp_path, 1).loads


def test_the_libraries_of_tensorrts_package_are_loaded_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt_libs").mkdir()
    (tmp_path / "tensorrt_libs" / "__init__.py").write_text("raise RuntimeError('it need not be imported')")
    names = ["libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10"]
    for name in (*names, "libother.so.1"):
        (tmp_path / "tensorrt_libs" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    opened: list[str] = []
    monkeypatch.setattr(
        "dinokit.runtime.gpu_libraries.ctypes.CDLL", lambda path, mode=0: opened.append(Path(path).name)
    )
    gpu_libraries.preload_libraries("cuda")
    assert not any("nvinfer" in name for name in opened)
    gpu_libraries.preload_libraries("tensorrt")
    assert [name for name in opened if name in names] == names and "libother.so.1" not in opened


def test_the_verdict_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Provider("CUDAExecutionProvider", True, None)
    cpu = Provider("CPUExecutionProvider", True, None)
    monkeypatch.setattr(diagnosis, "find_gpus", lambda: ("13.2", (Gpu("H100", 80 * 2**30),)))
    monkeypatch.setattr(diagnosis, "find_providers", lambda cpu_fault, n_gpus: (cpu, cuda))
    assert diagnose().verdict == "dinokit works on the CPU and on a GPU (CUDAExecutionProvider)"
    done = CliRunner().invoke(cli, ["doctor"], prog_name="dinokit")
    assert "H100, 80.0 GiB (driver for CUDA 13.2)" in done.stdout
    monkeypatch.setattr(diagnosis, "find_providers", lambda cpu_fault, n_gpus: (cpu,))
    assert any("there is a GPU, but ONNX Runtime cannot use it" in p for p in diagnose().problems)


@pytest.mark.parametrize(
    ("library", "cuda", "line"),
    [
        ("libcublasLt.so.13", "13", "pip install 'nvidia-cublas~=13.0'"),
        ("libcublasLt.so.12", "12", "pip install nvidia-cublas-cu12"),
        ("libcurand.so.10", "13", "pip install 'nvidia-curand~=10.0'"),
        ("libcudnn.so.9", "13", "pip install 'nvidia-cudnn-cu13~=9.0'"),
        ("libnvinfer.so.10", "13", "pip install 'tensorrt~=10.0'"),
        ("libcuda.so.1", "13", "part of the NVIDIA driver, not of a pip package"),
        ("libgomp.so.1", "13", "libgomp.so.1 is part of a system package"),
    ],
)
def test_pip_lines(library: str, cuda: str, line: str) -> None:
    assert pip_line(library, cuda) == line


@pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf is not installed")
def test_needed_libraries_are_those_of_readelf(tmp_path: Path) -> None:
    import onnxruntime

    libraries = sorted((Path(onnxruntime.__file__).parent / "capi").glob("*.so*"))
    if not libraries:
        pytest.skip("no ELF libraries on this system")
    for path in libraries:
        said = subprocess.run(["readelf", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        truth = [line.split("[")[1].rstrip("]") for line in said.splitlines() if "(NEEDED)" in line]
        assert list(needed_libraries(path)) == truth, path.name
    cut = tmp_path / "cut.so"
    cut.write_bytes(libraries[0].read_bytes()[:200])
    assert needed_libraries(cut) == ()


def test_files_that_are_no_libraries(tmp_path: Path) -> None:
    for content in (b"", b"MZ" + bytes(100), b"\x7fELF\x02\x01" + bytes(100)):
        (tmp_path / "x.so").write_bytes(content)
        assert needed_libraries(tmp_path / "x.so") == ()


@pytest.mark.parametrize("kind", ["folder", "binary"])
def test_a_token_that_cannot_be_read_is_a_problem(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "token"
    place.mkdir() if kind == "folder" else place.write_bytes(b"\xff\xfe")
    environment = {k: v for k, v in os.environ.items() if k not in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    environment |= {"HF_TOKEN_PATH": str(place), "HF_HOME": "/dev/null/hf"}
    done = subprocess.run(
        [sys.executable, "-m", "dinokit", "doctor"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert f"Problem: the Hub token in {place} cannot be read" in done.stdout


def test_a_package_that_is_installed_and_broken_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("raise ImportError('libarrow.so: cut short')\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", "dinokit", "doctor"], capture_output=True, text=True, env=environment
    )
    said = "Problem: pyarrow is installed but cannot be imported (ImportError: libarrow.so: cut short)"
    assert said in done.stdout
    assert done.stdout.splitlines()[-1].endswith("but pyarrow cannot be imported: see the problems")


def test_torch_without_timm_runs_no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "timm", None)
    check = diagnosis._try(diagnosis._run_torch)
    assert not check.works and "timm" in check.detail


def test_json_is_json_whatever_the_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {
        **os.environ,
        "PYTHONIOENCODING": "ascii",
        "HF_ENDPOINT": "https://me:secret@mirror.example",
    }
    done = subprocess.run(
        [sys.executable, "-m", "dinokit", "doctor", "--json"], capture_output=True, text=True, env=environment
    )
    assert json.loads(done.stdout)["hub"]["endpoint"] == "https://…@mirror.example"
