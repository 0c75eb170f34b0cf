"""A module in memory to an ONNX file, or to two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("timm")

import onnx
import onnxruntime as ort
import timm
import torch
from export_models import small_timm, worst_cosine
from small_models import picture

from dinokit import load_backbone
from dinokit.errors import DinokitError, UsageError
from dinokit.export import ExportError, export_onnx


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_module_in_memory(tmp_path: Path, precision: str) -> None:
    module = small_timm(num_classes=5).train()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    file = tmp_path / "new" / "m.onnx"
    report = export_onnx(module, file, precision=precision, name="mine", licence="mit")
    assert report.passed
    assert [path.name for path in file.parent.iterdir()] == ["m.onnx"]
    assert module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    backbone = load_backbone(file, device="cpu")
    assert (backbone.name, backbone.precision, backbone.config.licence) == ("mine", precision, "mit")
    crop = backbone.preprocessing.crop(picture())
    pixel_values = torch.from_numpy(backbone.preprocessing.normalise(crop[None]))
    with torch.inference_mode():
        right = module.eval().forward_features(pixel_values)[:, 0].numpy()  # type: ignore[operator]
    assert worst_cosine(right, backbone.embed(picture())[None]) > (1 - 1e-9 if precision == "fp32" else 0.99)


def test_a_float16_file_tells_what_a_cpu_does_not_show_and_what_stays_float32(tmp_path: Path) -> None:
    module: Any = small_timm()
    report = export_onnx(module, tmp_path / "m.onnx", precision="fp16")
    assert report.in_float == ()
    assert report.remark.startswith(
        "compared on the CPU, which reads the float16 weights but computes in float32"
    )
    with torch.no_grad():
        module.blocks[0].mlp.fc1.bias += 2e5
        module.blocks[0].mlp.fc2.weight *= 1e-4
    report = export_onnx(module, tmp_path / "m.onnx", precision="fp16")
    assert report.passed and "blocks.0.mlp.fc2.weight" in report.in_float
    assert (
        "these weights stay float32, since their inputs or outputs come close to float16's largest number: "
        in report.remark
    )
    assert report.to_json()["in_float"] == list(report.in_float)


@pytest.mark.parametrize("name", ["vit", "resnet"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_more_than_one_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, precision: str
) -> None:
    """With 2 GiB made small: a network's weights then go beside the graph, and never through the exporter."""
    for place in ("module", "traced"):
        monkeypatch.setattr(f"dinokit.export.{place}.LARGEST_FILE", 40_000)
    module = small_timm() if name == "vit" else small_resnet()
    file = tmp_path / "m.onnx"
    report = export_onnx(module, file, precision=precision)
    data = tmp_path / "m.onnx_data"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "m.onnx_data"]
    assert report.passed and report.data is not None
    assert report.bytes == file.stat().st_size + data.stat().st_size
    onnx.checker.check_model(str(file), full_check=True)
    numbers = sum(tensor.numel() for key, tensor in module.state_dict().items() if "head" not in key)
    size = {"fp32": 4, "fp16": 2}[precision]
    assert data.stat().st_size > 0.7 * numbers * size

    moved = tmp_path / "elsewhere"  # the pair belongs together by its names alone
    moved.mkdir()
    file.rename(moved / file.name)
    data.rename(moved / data.name)
    pixel_values = torch.rand(2, 3, 64, 64) if name == "resnet" else torch.rand(2, 3, 32, 32)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(moved / file.name, options, providers=["CPUExecutionProvider"])
    (found,) = session.run(["pooler_output"], {"pixel_values": pixel_values.numpy()})
    with torch.inference_mode():
        features = module.eval().forward_features(pixel_values)
        right = (features[:, 0] if name == "vit" else module.forward_head(features, pre_logits=True)).numpy()
    assert np.abs(found - right).max() < (1e-4 if precision == "fp32" else 0.02) * max(1, np.abs(right).max())


def small_resnet() -> Any:
    torch.manual_seed(0)
    return timm.create_model(
        "resnet10t", pretrained=False, pretrained_cfg_overlay={"input_size": (3, 64, 64)}
    )


def test_an_earlier_pair_is_replaced_whole(tmp_path: Path) -> None:
    file, data = tmp_path / "m.onnx", tmp_path / "m.onnx_data"
    export_onnx(small_timm(), file, external_data=True)
    before = load_backbone(file, device="cpu").embed(picture())
    with pytest.raises(ExportError):
        export_onnx(broken(small_timm()), file)
    assert np.array_equal(load_backbone(file, device="cpu").embed(picture()), before)
    export_onnx(small_timm(), file)
    assert not data.exists()
    assert np.allclose(load_backbone(file, device="cpu").embed(picture()), before, atol=1e-5)
    data.write_bytes(b"somebody's own")  # the file does not name it
    export_onnx(small_timm(), file)
    assert data.read_bytes() == b"somebody's own"


def broken(module: Any) -> Any:
    with torch.no_grad():
        module.norm.bias.fill_(float("nan"))
    return module


def test_what_is_no_vision_transformer(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a Linear is neither a Vision Transformer nor"):
        export_onnx(torch.nn.Linear(3, 3), tmp_path / "m.onnx")
    with pytest.raises(UsageError, match=r"should end in \.onnx"):
        export_onnx(small_timm(), tmp_path / "m.bin")
    with pytest.raises(UsageError, match="are not valid for one file; expected one of each"):
        export_onnx(small_timm(), tmp_path / "m.onnx", precision="fp32,fp16")
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UsageError, match=r"folder\.onnx is a folder; expected the name of a file"):
        export_onnx(small_timm(), tmp_path / "folder.onnx")
    for name in ("a\nb", "\x1b[31m", " "):
        with pytest.raises(UsageError, match=r"name=.* expected one line of text"):
            export_onnx(small_timm(), tmp_path / "m.onnx", name=name)
    for size in ("64", 64.0, (64, 64, 3)):
        with pytest.raises(UsageError, match=r"image_size=.* is invalid; expected pixels \(224\)"):
            export_onnx(small_timm(), tmp_path / "m.onnx", image_size=size)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="precision=32 is not valid; expected one of fp32, fp16, int8"):
        export_onnx(small_timm(), tmp_path / "m.onnx", precision=32)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"photos=\[\] does not name any photographs"):
        export_onnx(small_timm(), tmp_path / "m.onnx", photos=[])
    (tmp_path / "folder.onnx").rmdir()
    assert not list(tmp_path.iterdir())


def test_it_is_looked_first_whether_it_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("dinokit.export.module._describe", None)
    with pytest.raises(DinokitError, match=r"m\.onnx cannot be written"):
        export_onnx(small_timm(), tmp_path / "file" / "m.onnx")


def test_the_report_names_the_file_that_was_written(tmp_path: Path) -> None:
    report = export_onnx(small_timm(), tmp_path / "mine.onnx", external_data=True)
    assert report.data is not None
    assert (report.file, report.data.file) == ("mine.onnx", "mine.onnx_data")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.onnx", "mine.onnx_data"}
    with pytest.raises(ExportError, match=r"mine\.onnx of .* gave numbers that are not finite"):
        export_onnx(broken(small_timm()), tmp_path / "mine.onnx")


def test_a_network_made_for_another_size_than_the_published_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = timm.create_model("resmlp_12_224", pretrained=False, img_size=32)
    module.blocks = module.blocks[:2]
    report = export_onnx(module, tmp_path / "m.onnx")
    assert report.passed and load_backbone(tmp_path / "m.onnx", device="cpu").image_size == (32, 32)


def test_what_torch_wraps_around_a_module_is_taken_off(tmp_path: Path) -> None:
    plain = export_onnx(small_timm(), tmp_path / "m.onnx")
    for name, wrapped in (
        ("compiled", torch.compile(small_timm())),
        ("parallel", torch.nn.DataParallel(small_timm())),
    ):
        assert export_onnx(wrapped, tmp_path / f"{name}.onnx").sha256 == plain.sha256


@pytest.mark.parametrize("thing", [None, "vit_tiny_patch16_224", {}])
def test_what_is_no_module_is_refused(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(
        UsageError, match=rf"module is a {type(thing).__name__}; expected a torch\.nn\.Module"
    ):
        export_onnx(thing, tmp_path / "m.onnx")


def test_a_module_without_values_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="on torch's meta device"):
        export_onnx(small_timm().to("meta"), tmp_path / "m.onnx")
