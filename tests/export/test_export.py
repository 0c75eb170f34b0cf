"""The export: equal to torch on photographs or not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from PIL import Image

import dinokit.export.traced as traced
from dinokit.cli.export import export as export_command
from dinokit.errors import DinokitError, ImageError, MissingExtraError, ModelError, UsageError
from dinokit.export import (
    Comparison,
    ExportError,
    ExportReport,
    VariantReport,
    compare_engines,
    export_folder,
)
from dinokit.export.verification.verify import image_sizes
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.contract import OUTPUTS, contract
from dinokit.model_folder.folder import BackboneConfig, read_model_folder, write_model_folder
from dinokit.pictures.preprocess import Preprocessing
from dinokit.runtime.onnx import OnnxEngine

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "features.npz", allow_pickle=False)
WEIGHTS = {name.removeprefix("weights."): GOLDEN[name] for name in GOLDEN if name.startswith("weights.")}
VIT = VitArchitecture.from_shapes({name: w.shape for name, w in WEIGHTS.items()}, num_heads=3)
CONFIG = BackboneConfig(
    name="tiny",
    architecture=VIT,
    timm_architecture="vit_tiny_patch16_224",
    model_args={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3},
    preprocessing=Preprocessing(resize_px=36, crop_px=(32, 32)),
)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model_folder(tmp_path / "model source", CONFIG, WEIGHTS).path


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in files(folder)}


def break_the_graph(monkeypatch: pytest.MonkeyPatch, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    """The graph gets other weights than torch, which is what a wrong graph looks like from outside."""
    right = traced.split_vit_graph

    def wrong(vit: VitArchitecture, weights: Mapping[str, NDArray[Any]], **more: Any) -> Any:
        name = "blocks.1.mlp.fc2.bias"
        return right(vit, {**weights, name: change(weights[name])}, **more)

    monkeypatch.setattr(traced, "split_vit_graph", wrong)


def test_a_model_folder_becomes_one_with_onnx(model: Path, tmp_path: Path) -> None:
    steps: list[str] = []
    report = export_folder(model, tmp_path / "out", progress=steps.append)
    folder = read_model_folder(tmp_path / "out")
    assert folder.onnx_path is not None
    assert files(tmp_path / "out") == sorted([*files(model), "export_report.json", "onnx/model.onnx"])
    assert folder.weights_sha256 == read_model_folder(model).weights_sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model source", "out"]
    assert "onnx/model.onnx: comparing batch 8 of 48x48 pixels" in steps

    engine = OnnxEngine(folder.onnx_path, device="cpu")
    right = contract(folder.config, folder.weights_sha256)
    assert json.loads(engine.metadata["dinokit"]) == right
    pixels = folder.config.preprocessing.normalise(GOLDEN["image.32x72"].transpose(0, 2, 3, 1))
    found = engine.run(pixels, OUTPUTS)
    for output, golden in zip(OUTPUTS, ("tokens", "cls", "attention"), strict=True):
        assert np.abs(found[output] - GOLDEN[f"{golden}.32x72"]).max() <= 1e-5

    assert report.passed
    assert report.variants[0].max_difference <= 1e-5
    assert json.loads((tmp_path / "out" / "export_report.json").read_text()) == json.loads(
        json.dumps(report.to_json())
    )


def test_the_report_says_what_was_compared(model: Path, tmp_path: Path) -> None:
    values = json.loads(json.dumps(export_folder(model, tmp_path / "out").to_json()))
    (variant,) = values["variants"]
    done = [(c["height"], c["width"], c["batch_size"]) for c in variant["comparisons"]]
    assert done == [(h, w, b) for h, w in ((32, 32), (48, 48), (24, 48)) for b in (1, 3, 8)]
    assert values["photographs"] == ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "rocket.jpg"]
    assert values["model"] == "tiny"
    assert values["weights_sha256"] == read_model_folder(model).weights_sha256
    assert {"dinokit", "torch", "timm", "onnx", "python"} <= set(values["versions"])
    assert values["machine"]["cpu_count"] >= 1
    assert variant["images_per_second"] > 0
    assert "batches of 8 pictures of 32x32, ONNX Runtime" in variant["speed_of"]
    for c in variant["comparisons"]:
        assert c["finite"] is True
        assert 0 < c["cls_mean"] <= c["cls_max"] <= c["tokens_max"] < 1e-5
        assert 0 < c["attention_max"] < 1e-6
        assert 1 - 1e-6 < c["cosine_min"] <= c["cosine_mean"] < 1 + 1e-6


def test_a_run_folder(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text("epochs: 1\n")
    shutil.copytree(model, run / "model")
    export_folder(run, tmp_path / "out")
    assert read_model_folder(tmp_path / "out").onnx_path is not None
    assert content(run / "model") == content(model)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    source = write_model_folder(tmp_path / "half", CONFIG, WEIGHTS, dtype="float16")
    report = export_folder(tmp_path / "half", tmp_path / "out")
    assert report.weights_sha256 == source.weights_sha256
    assert read_model_folder(tmp_path / "out").weights_sha256 == source.weights_sha256


# -- nothing is left when it fails


def test_a_wrong_graph_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_the_graph(monkeypatch, lambda bias: bias + np.float32(0.001) * np.arange(48, dtype=np.float32))
    words = r"onnx/model\.onnx of 'tiny' differs from torch by \d\.\d\de-\d\d .* at most 1e-04 is allowed"
    with pytest.raises(ExportError, match=words):
        export_folder(model, tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_numbers_that_are_not_finite_fail(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_the_graph(monkeypatch, lambda bias: bias * np.float32(np.nan))
    with pytest.raises(ExportError, match="not finite at batch 1 of 32x32"):
        export_folder(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_the_old_folder(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_folder(model, tmp_path / "out")
    before = content(tmp_path / "out")
    break_the_graph(monkeypatch, lambda bias: bias + np.float32(np.arange(48)))
    with pytest.raises(ExportError):
        export_folder(model, tmp_path / "out")
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model source", "out"]


def test_ctrl_c_leaves_nothing(model: Path, tmp_path: Path) -> None:
    def stop(step: str) -> None:
        if "comparing" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_folder(model, tmp_path / "out", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["model source"]


# -- what is at the output already


def test_in_place_keeps_what_is_not_the_models(model: Path) -> None:
    (model / "README.md").write_text("my own words\n")
    (model / "notes").mkdir()
    (model / "notes" / "onnx").write_text("mine\n")
    before = content(model)
    export_folder(model, model)
    after = content(model)
    assert after.pop("onnx/model.onnx") != after.pop("export_report.json")
    config = [json.loads(c.pop("config.json")) for c in (before, after)]
    assert config[0]["dinokit"]["preprocessing"] == config[1]["dinokit"]["preprocessing"]
    assert after == before


def test_another_model_is_replaced_only_with_overwrite(model: Path, tmp_path: Path) -> None:
    other = {name: array * np.float32(1.01) for name, array in WEIGHTS.items()}
    out = write_model_folder(tmp_path / "out", replace(CONFIG, name="other"), other).path
    before = content(out)
    with pytest.raises(UsageError, match=r"holds other weights than .* --overwrite"):
        export_folder(model, out)
    assert content(out) == before
    export_folder(model, out, overwrite=True)
    assert read_model_folder(out).config.name == "tiny"


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_never_touched(model: Path, tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="exists and is not a model folder"):
        export_folder(model, tmp_path / "out", overwrite=overwrite)
    assert files(tmp_path / "out") == ["thesis.tex"]


def test_an_empty_folder_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export_folder(model, tmp_path / "out")
    assert read_model_folder(tmp_path / "out").onnx_path is not None


# -- requests that are wrong


def test_wrong_sources(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="gone does not exist; expected a model folder or file"):
        export_folder(tmp_path / "gone", tmp_path / "out")
    export_folder(model, tmp_path / "whole")
    with pytest.raises(UsageError, match=r"model\.onnx is an ONNX file, which is what an export writes"):
        export_folder(tmp_path / "whole" / "onnx" / "model.onnx", tmp_path / "out")
    (model / "timm.safetensors").unlink()
    with pytest.raises(ModelError, match=r"timm\.safetensors is missing"):
        export_folder(model, tmp_path / "out")


def test_own_photographs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(tmp_path / "photos" / f"{i}.png")
    report = export_folder(model, tmp_path / "out", photos=tmp_path / "photos")
    assert report.photographs == tuple(f"{i}.png" for i in (0, 1, 3, 4, 5, 6, 8, 9))  # evenly over all
    (tmp_path / "photos" / "0.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"0\.png"):
        export_folder(model, tmp_path / "out2", photos=tmp_path / "photos")
    assert not (tmp_path / "out2").exists()


def test_without_torch(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "timm", None)
    monkeypatch.delitem(__import__("sys").modules, "dinokit.runtime.torch", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'dinokit\[train\]'"):
        export_folder(model, tmp_path / "out")


# -- the comparison itself


class FakeEngine:
    name, device, precision = "fake", "cpu", "fp32"

    def __init__(self, shift: Mapping[str, float]) -> None:
        self.shift = shift
        self.seen: list[NDArray[np.float32]] = []

    def run(self, pixel_values: NDArray[np.float32], outputs: Any) -> dict[str, NDArray[np.float32]]:
        self.seen.append(pixel_values)
        shapes = {"last_hidden_state": (5, 4), "pooler_output": (4,), "attention": (2, 4)}
        return {
            name: np.full((len(pixel_values), *shapes[name]), 1 + self.shift.get(name, 0), np.float32)
            for name in outputs
        }


@pytest.mark.parametrize("output", OUTPUTS)
def test_each_output_counts(output: str) -> None:
    photographs = [Image.new("RGB", (40, 40), (i * 20, 0, 0)) for i in range(3)]
    right, ours = FakeEngine({}), FakeEngine({output: 0.5})
    found = compare_engines(right, ours, photographs, CONFIG.preprocessing, 8, batch_sizes=(2,))
    assert len(found) == 3
    for c in found:
        assert c.max_difference == pytest.approx(0.5)
        numbers = {
            "last_hidden_state": c.tokens_max,
            "pooler_output": c.cls_max,
            "attention": c.attention_max,
        }
        assert {name for name, value in numbers.items() if value} == {output}
    report = ExportReport("m", "0", (), (VariantReport("f", "fp32", "portable", 1, "0", found),))
    assert not report.passed
    with pytest.raises(ExportError, match=r"5\.00e-01 of the output's largest number at batch 2 of 32x32"):
        report.check()


@pytest.mark.parametrize("whose", ["torch", "file"])
def test_numbers_that_are_not_finite_on_either_side_are_no_pass(whose: str) -> None:
    broken, whole = FakeEngine({"attention": np.nan}), FakeEngine({})
    right, ours = (broken, whole) if whose == "torch" else (whole, broken)
    photographs = [Image.new("RGB", (40, 40), (i * 20, 0, 0)) for i in range(3)]
    found = compare_engines(right, ours, photographs, CONFIG.preprocessing, 8, batch_sizes=(2,))
    assert not any(c.finite for c in found)
    assert not VariantReport("f", "fp32", "portable", 1, "0", found).passed


def test_few_photographs_fill_a_batch_mirrored() -> None:
    photograph = Image.fromarray(np.random.default_rng(0).integers(0, 256, (36, 36, 3), np.uint8))
    engine = FakeEngine({})
    compare_engines(engine, FakeEngine({}), [photograph], CONFIG.preprocessing, 8, batch_sizes=(3,))
    one, two, three = engine.seen[0]
    assert np.array_equal(two, one[:, :, ::-1])
    assert np.array_equal(three, one)
    assert not np.array_equal(one, two)


@pytest.mark.parametrize("own", [(224, 224), (32, 32), (16, 16), (8, 8), (96, 64)])
def test_the_sizes_differ_and_fit(own: tuple[int, int]) -> None:
    first, larger, oblong = image_sizes(own, 8)
    assert first == own
    assert larger[0] > own[0]
    assert larger[1] > own[1]
    assert oblong[0] != oblong[1]
    assert all(side % 8 == 0 and side > 0 for size in (larger, oblong) for side in size)


def test_a_nan_in_torch_is_not_a_pass() -> None:
    c = Comparison(1, 8, 8, 0.0, 0.0, 0.0, 0.0, 0.0, (1.0,), finite=False, relative_max=0.0, maps_cosine=1.0)
    assert c.max_difference == float("inf")


# -- the command


def test_the_command_prints_a_table(model: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(export_command, [str(model), "-o", str(tmp_path / "out"), "--name", "[b]tiny"])
    assert done.exit_code == 0, done.output
    assert "[b]tiny: ONNX Runtime against torch" in done.stdout
    assert "…" not in done.stdout
    assert "4 photographs, batches of 1, 3, 8, 32x32, 48x48, 24x48 pixels." in done.stdout
    assert f"Wrote {tmp_path / 'out'}" in done.stderr


def test_the_command_prints_json(model: Path, tmp_path: Path) -> None:
    photo = tmp_path / "p.png"
    Image.new("RGB", (64, 50), (200, 30, 90)).save(photo)
    done = CliRunner().invoke(
        export_command, [str(model), "-o", str(tmp_path / "out"), "--json", "--photos", str(photo)]
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["photographs"] == ["p.png"]
    assert json.loads(done.stdout) == json.loads((tmp_path / "out" / "export_report.json").read_text())


def test_the_command_looks_first_whether_it_can_write(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    done = CliRunner().invoke(export_command, [str(model), "-o", str(tmp_path / "file" / "out")])
    with pytest.raises(DinokitError, match="out cannot be written: no file can be made in"):
        raise done.exception or AssertionError("it was written")


def test_the_command_needs_an_output(model: Path) -> None:
    done = CliRunner().invoke(export_command, [str(model)])
    with pytest.raises(UsageError, match="no output given; name a model folder with -o"):
        raise done.exception or AssertionError("it was accepted")
