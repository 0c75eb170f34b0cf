"""The ONNX Runtime engine: what it runs, what it refuses, and that it never falls to the CPU unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dinokit.runtime.onnx as runtime
from dinokit.errors import DeviceError, ModelError, UsageError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import OUTPUTS
from dinokit.model_folder.weights import expected_shapes
from dinokit.runtime import Engine
from dinokit.runtime.cpu import compute_threads, usable_cpus
from dinokit.runtime.onnx import OnnxEngine
from dinokit.vit_graph import build_vit_graph

VIT = VitArchitecture(embed_dim=16, depth=1, num_heads=2, patch_size=8, image_size=(16, 16))
no_gpu = pytest.mark.skipif(runtime.cuda_devices() > 0, reason="this machine has an NVIDIA GPU")


@pytest.fixture(scope="module")
def model() -> bytes:
    shapes = expected_shapes(VIT)
    assert shapes is not None
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.5, shape).astype(np.float32) for name, shape in shapes.items()}
    content = build_vit_graph(
        VIT, weights, metadata={"dinokit": json.dumps({"name": "é"})}
    ).SerializeToString()
    assert isinstance(content, bytes)
    return content


def pixels(batch: int = 2, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(batch, 3, height, width)).astype(np.float32)


def test_path_and_bytes_give_the_same(model: bytes, tmp_path: Path) -> None:
    file = tmp_path / "with space é.onnx"
    file.write_bytes(model)
    engines = [
        OnnxEngine(model, device="cpu"),
        OnnxEngine(file, device="cpu"),
        OnnxEngine(str(file), device="cpu"),
    ]
    results = [engine.run(pixels(), OUTPUTS) for engine in engines]
    for engine, result in zip(engines, results, strict=True):
        assert isinstance(engine, Engine)
        assert (engine.name, engine.device, engine.precision) == ("onnx", "cpu", "fp32")
        assert json.loads(engine.metadata["dinokit"]) == {"name": "é"}
        assert {name: array.shape for name, array in result.items()} == {
            "last_hidden_state": (2, 7, 16),
            "pooler_output": (2, 16),
            "attention": (2, 2, 6),
        }
        for name in OUTPUTS:
            assert np.array_equal(result[name], results[0][name])


def test_only_what_is_asked_for_comes_back(model: bytes) -> None:
    engine = OnnxEngine(model, device="cpu")
    assert list(engine.run(pixels(), ["attention"])) == ["attention"]
    assert list(engine.run(pixels(), ["attention", "pooler_output"])) == ["attention", "pooler_output"]
    with pytest.raises(
        ModelError, match=r"no output 'pooled', only last_hidden_state, pooler_output, attention"
    ):
        engine.run(pixels(), ["pooled"])


def test_input_without_contiguous_memory_is_taken(model: bytes) -> None:
    engine = OnnxEngine(model, device="cpu")
    array = pixels(4)
    right = engine.run(np.ascontiguousarray(array[::2]), OUTPUTS)
    found = engine.run(array[::2], OUTPUTS)
    for name in OUTPUTS:
        assert np.array_equal(found[name], right[name])


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((1, 16, 16, 3), np.uint8), r"uint8 of shape \(1, 16, 16, 3\).*takes float32 of shape"),
        (np.zeros((1, 3, 16, 16)), "float64"),
        (np.zeros((3, 16, 16), np.float32), r"\(batch, 3, height, width\)"),
        (np.zeros((1, 4, 16, 16), np.float32), "Preprocessing.normalise"),
        (np.zeros((0, 3, 16, 16), np.float32), r"shape \(0, 3, 16, 16\)"),
        (np.zeros((1, 3, 15, 16), np.float32), "multiples of the patch"),
    ],
)
def test_wrong_input_is_refused(model: bytes, array: np.ndarray, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        OnnxEngine(model, device="cpu").run(array, ["pooler_output"])


def test_damaged_files_are_named(model: bytes, tmp_path: Path) -> None:
    contents = {"half.onnx": model[: len(model) // 2], "empty.onnx": b"", "text.onnx": b"not a model\n" * 99}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=rf"{name} cannot be opened by ONNX Runtime.*damaged"):
            OnnxEngine(tmp_path / name)
    with pytest.raises(ModelError, match=r"gone\.onnx does not exist"):
        OnnxEngine(tmp_path / "gone.onnx")
    with pytest.raises(ModelError, match=r"^the ONNX model cannot be opened"):
        OnnxEngine(model[:100])


def test_a_damaged_name_is_an_error_in_words(model: bytes) -> None:
    with pytest.raises(ModelError, match="the ONNX model is damaged"):
        OnnxEngine(model.replace(b"height", b"h\xc8ight"), device="cpu")


def test_a_model_with_another_input_is_refused() -> None:
    from onnx import TensorProto, helper

    a, b = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "ab")
    graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "g", [a], [b])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(ModelError, match=r"inputs \['a'\], expected only 'pixel_values'"):
        OnnxEngine(other.SerializeToString(), device="cpu")


# -- devices


@pytest.mark.parametrize("device", ["gpu", "mps", "cpu:0", "auto:1", "cuda:x", "cuda:-1", ""])
def test_unknown_devices(model: bytes, device: str) -> None:
    with pytest.raises(UsageError, match="expected auto, cpu, cuda, cuda:1 or tensorrt"):
        OnnxEngine(model, device=device)


def test_other_precisions(model: bytes) -> None:
    with pytest.raises(UsageError, match=r"precision='fp16'.* which computes in 'fp32'.*engine='torch'"):
        OnnxEngine(model, precision="fp16")
    assert OnnxEngine(model, device="cpu", precision="fp32").precision == "fp32"


@no_gpu
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "tensorrt"])
def test_a_device_that_is_not_there_is_an_error(model: bytes, device: str) -> None:
    with pytest.raises(DeviceError, match=rf"device='{device.split(':')[0]}:\d' .* no NVIDIA driver"):
        OnnxEngine(model, device=device)


def test_too_high_a_device(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cuda_devices", lambda: 2)
    with pytest.raises(DeviceError, match=r"only 2 CUDA devices\. Choose one of cuda:0 to cuda:1"):
        OnnxEngine(model, device="cuda:2")


def test_a_build_without_cuda(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(runtime, "cuda_devices", lambda: 1)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(DeviceError, match=r"built without CUDAExecutionProvider.*install onnxruntime-gpu"):
        OnnxEngine(model, device="cuda")
    assert OnnxEngine(model, device="auto").device == "cpu"


@no_gpu
def test_a_missing_library_is_named(model: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that answers, but a provider that cannot be loaded: here for want of libcuda.so.1 itself."""
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is a CPU build")
    monkeypatch.setattr(runtime, "cuda_devices", lambda: 1)
    with pytest.raises(
        DeviceError, match=r"lib\w+\.so.* cannot open shared object.*pip install 'dinokit\[gpu\]'"
    ):
        OnnxEngine(model, device="cuda")
    assert OnnxEngine(model, device="auto").device == "cpu"


class SessionOnTensorRT:
    """As much of a session as an engine looks at when it is made."""

    def __init__(self, session: Any) -> None:
        self.get_inputs, self.get_outputs = session.get_inputs, session.get_outputs
        self.get_modelmeta = session.get_modelmeta

    def get_providers(self) -> list[str]:
        return ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]


@pytest.fixture
def tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """TensorRT seems to be there; gives the options that it is created with."""
    given: list[dict[str, Any]] = []
    create = OnnxEngine._create

    def created(self: OnnxEngine, content: bytes | Path, providers: list[Any]) -> Any:
        given.append(dict(providers[0][1]))
        if any(Path(given[-1]["trt_engine_cache_path"]).iterdir()):
            raise ModelError("could not deserialize engine from cache")
        self._weights = {}  # those of the tests are not the graph's
        return SessionOnTensorRT(create(self, content, ["CPUExecutionProvider"]))

    monkeypatch.setattr(OnnxEngine, "_create", created)
    monkeypatch.setattr(runtime, "_why_not", lambda kind, index: None)
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "cache"))
    return given


def test_tensorrt_keeps_its_engines_by_the_weights(model: bytes, tensorrt: list[dict[str, Any]]) -> None:
    weights = {"w": np.zeros(3, np.float32)}
    assert OnnxEngine(model, device="tensorrt:1").device == "cuda:1"
    for content, beside in ((model, {}), (model, weights), (model, {"w": np.ones(3, np.float32)})):
        OnnxEngine(content, weights=beside, device="tensorrt")
    first, again, other, third = (options.pop("trt_engine_cache_path") for options in tensorrt)
    assert first == again
    assert len({first, other, third}) == 3
    assert tensorrt[0] == {
        "device_id": 1,
        "trt_engine_cache_enable": True,
        "trt_timing_cache_enable": True,
        "trt_timing_cache_path": first,
    }


def test_a_damaged_engine_of_tensorrt_is_built_again(model: bytes, tensorrt: list[dict[str, Any]]) -> None:
    OnnxEngine(model, device="tensorrt")
    damaged = Path(tensorrt[0]["trt_engine_cache_path"]) / "half.engine"
    damaged.write_bytes(b"1")
    OnnxEngine(model, device="tensorrt")
    assert len(tensorrt) == 3
    assert not damaged.exists()


def test_tensorrt_without_a_folder_for_its_engines(
    model: bytes, tensorrt: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("DINOKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(KeyError, match="trt_engine_cache_path"):  # of the fixture: no such option
        OnnxEngine(model, device="tensorrt")
    assert tensorrt == [{"device_id": 0}]


@no_gpu
def test_never_silently_on_the_cpu(
    model: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Everything looks right, and still ONNX Runtime gives a session on the CPU."""
    monkeypatch.setattr(runtime, "_why_not", lambda kind, index: None)
    with pytest.raises(DeviceError, match="CPUExecutionProvider"):
        OnnxEngine(model, device="cuda")
    assert OnnxEngine(model, device="auto").device == "cpu"
    assert capfd.readouterr() == ("", "")


def test_threads_follow_the_wish_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for wish, threads in (("3", 3), ("2,4", 2), ("64", 8), ("0", 8), ("-1", 8), ("many", 8), ("", 8)):
        monkeypatch.setenv("OMP_NUM_THREADS", wish)
        assert compute_threads(tmp_path / "none") == threads
        assert usable_cpus(tmp_path / "none") == 8  # torchrun wishes for 1, which is not for decoding


def test_threads_follow_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = tmp_path / "cpu.max"
    for text, threads in (
        ("max 100000", available),
        ("100000 100000", 1),
        ("20000 100000", 1),
        ("", available),
    ):
        quota.write_text(text)
        assert compute_threads(quota) == usable_cpus(quota) == threads
    assert compute_threads(tmp_path / "none") == available


def test_quiet_and_without_torch(model: bytes, tmp_path: Path) -> None:
    """In a process of its own: what is printed, and what is imported."""
    (tmp_path / "m.onnx").write_bytes(model)
    code = """
import sys
from pathlib import Path
import numpy as np
from dinokit.runtime.onnx import OnnxEngine
assert "onnxruntime" not in sys.modules
engine = OnnxEngine(Path(sys.argv[1]))
engine.run(np.zeros((1, 3, 16, 16), np.float32), ["pooler_output"])
try:
    engine.run(np.zeros((1, 3, 15, 16), np.float32), ["pooler_output"])
except Exception as error:
    print(type(error).__name__)
assert not {"torch", "onnx"} & set(sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.onnx")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ModelError\n", "")


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(model: bytes) -> None:
    cuda = OnnxEngine(model, device="cuda")
    assert cuda.device == "cuda:0"
    found, right = (engine.run(pixels(), OUTPUTS) for engine in (cuda, OnnxEngine(model, device="cpu")))
    for name in OUTPUTS:
        assert np.abs(found[name] - right[name]).max() <= 1e-5
