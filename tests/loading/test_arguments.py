"""load_backbone: arguments that cannot be, and an installation without ONNX Runtime."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from dinokit import load_backbone
from dinokit.errors import MissingExtraError, ModelError, UsageError

has_torch = all(importlib.util.find_spec(name) is not None for name in ("torch", "timm"))


@pytest.mark.parametrize("size", [0, -16, "96", 96.0, (96,), (96, 96, 3), (96, "96"), (96, 0)])
def test_sizes_that_are_none(size: Any) -> None:
    with pytest.raises(UsageError, match=r"image_size=.* is invalid; expected pixels"):
        load_backbone(image_size=size)


def test_a_size_beyond_all_pictures() -> None:
    with pytest.raises(
        UsageError, match=r"image_size=1000000 is invalid: .*each side must be 1 to 65536 pixels"
    ):
        load_backbone(image_size=10**6)


@pytest.mark.skipif(not has_torch, reason="torch is not installed")
@pytest.mark.parametrize("device", ["gpu", "cuda:x", ""])
def test_a_device_that_torch_does_not_know(device: str) -> None:
    with pytest.raises(UsageError, match=f"device='{device}' is not known to the torch engine"):
        load_backbone(device=device, engine="torch")


def test_a_size_of_numpy_and_a_list() -> None:
    pytest.importorskip("onnxruntime")
    assert load_backbone(image_size=np.int64(112)).image_size == (112, 112)  # type: ignore[arg-type]
    assert load_backbone(image_size=[96, 112]).image_size == (96, 112)  # type: ignore[arg-type]


def test_a_device_that_is_no_text() -> None:
    with pytest.raises(UsageError, match="device=None is not a string"):
        load_backbone(device=None)  # type: ignore[arg-type]


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "dinokit.loading.load.importlib.util.find_spec",
        lambda name: None if name in packages else real(name),
    )


@pytest.mark.skipif(not has_torch, reason="torch is not installed")
def test_without_onnx_runtime_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime")
    assert load_backbone(device="cpu").engine == "torch"
    with pytest.raises(
        ModelError, match=r"engine='onnx': ONNX Runtime is not installed; .*pip install onnxruntime"
    ):
        load_backbone(engine="onnx")


def test_without_both_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "onnxruntime", "torch", "timm")
    with pytest.raises(MissingExtraError, match="ONNX Runtime is not installed"):
        load_backbone()


def test_a_missing_package_is_no_fault_of_a_model() -> None:
    assert not issubclass(MissingExtraError, ModelError)
    assert issubclass(MissingExtraError, ImportError)
