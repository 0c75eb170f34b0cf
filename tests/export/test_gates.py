"""The gates: below them nothing is written, unless it is allowed."""

from __future__ import annotations

import json
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("timm")

import onnx
from export_models import make_folder
from small_models import SMALL, picture

import dinokit.export.verification.labels as labelling
import dinokit.export.verification.proof as proof
from dinokit.cli.export import export as export_command
from dinokit.errors import UsageError
from dinokit.export import ExportError, ExportReport, VariantReport, export_folder
from dinokit.export.variants import Variant
from dinokit.export.verification.report import GATES, LabelAgreement
from dinokit.export.verification.verify import Comparison, compare, reference_samples
from dinokit.model_folder.contract import ATTENTION, POOLED, TOKENS
from dinokit.pictures.preprocess import Preprocessing


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


def report_of(
    precision: str,
    cosine: float,
    *,
    finite: bool = True,
    equal: float | None = None,
    maps: float | None = 1.0,
) -> VariantReport:
    c = Comparison(2, 32, 40, 0.5, 0.1, 0.5, 0.1, 0.0, (cosine, cosine), finite, 0.05, maps)
    labels = None if equal is None else LabelAgreement(200, 10, 20, equal, 0.9, 0.9, 1.0, 1.0, 1.0)
    return VariantReport(f"onnx/{precision}", precision, "portable", 1, "0", (c,), labels)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            report_of("fp32", 1.0),
            r"differs from torch by 5\.00e-02 of the output's largest number at batch 2 of 32x40 pixels, at most 1e-04",
        ),
        (report_of("fp16", 1.0, maps=0.998), r"patch tokens or attention .* 0\.998000 .* at least 0\.999"),
        (report_of("int8", 1.0, maps=0.9), r"patch tokens or attention .* 0\.900000 .* at least 0\.95"),
        (
            report_of("fp16", 0.9998),
            r"cosine of 0\.999800 with torch, at least 0\.9999 is needed \(1\.0e-04 too low",
        ),
        (report_of("int8", 0.98), r"mean cosine of 0\.980000"),
        (
            report_of("int8", 0.995, equal=0.985),
            r"gives 98\.5% of 200 pictures the k-NN label .* at least 99%",
        ),
        (report_of("int8", 1.0, finite=False), "not finite at batch 2 of 32x40"),
    ],
)
def test_below_the_gate(variant: VariantReport, words: str) -> None:
    report = ExportReport("m", "0", (), (variant,))
    assert not report.passed
    with pytest.raises(ExportError, match=words):
        report.check()
    if variant.finite:
        report.check(allow_loss=True)
    else:
        with pytest.raises(ExportError, match=words):
            report.check(allow_loss=True)


def test_at_the_gate() -> None:
    good = (report_of("fp16", 0.99995), report_of("int8", 0.9901, equal=0.99))
    ExportReport("m", "0", (), good).check()
    assert set(GATES) == {"fp32", "fp16", "int8"}


@pytest.mark.parametrize("precision", GATES)
def test_a_value_equal_to_its_gate_passes_and_the_next_worse_number_fails(precision: str) -> None:
    gate = GATES[precision]
    cosine, maps = gate.cosine_mean or 1.0, gate.maps_cosine_mean or 1.0
    exact = report_of(precision, cosine, maps=maps, equal=gate.equal_labels)
    limit = gate.relative_difference
    relative = exact.comparisons[0].relative_max if limit is None else limit
    exact = replace(
        exact,
        comparisons=(replace(exact.comparisons[0], relative_max=relative),),
        held_out_cosine=gate.cosine_mean,
    )
    assert list(exact.failures()) == []

    (comparison,) = exact.comparisons
    worse = []
    if limit is not None:
        worse.append(replace(exact, comparisons=(replace(comparison, relative_max=np.nextafter(limit, 1)),)))
    if gate.cosine_mean is not None:
        below = float(np.nextafter(gate.cosine_mean, 0))
        worse.append(replace(exact, comparisons=(replace(comparison, cosines=(below, below)),)))
        worse.append(replace(exact, held_out_cosine=below))
    if gate.maps_cosine_mean is not None:
        below = float(np.nextafter(gate.maps_cosine_mean, 0))
        worse.append(replace(exact, comparisons=(replace(comparison, maps_cosine=below),)))
    if gate.equal_labels is not None:
        assert exact.labels is not None
        below = float(np.nextafter(gate.equal_labels, 0))
        worse.append(replace(exact, labels=replace(exact.labels, equal=below)))
    assert [len(list(report.failures())) for report in worse] == [1] * len(worse) != []


def test_only_a_file_for_cuda_that_was_compared_on_the_cpu_is_not_on_its_device() -> None:
    portable = report_of("fp16", 1.0)
    cuda = replace(portable, target="ort-cuda")
    assert cuda.not_on_its_device
    assert "the CUDA kernels were not run" in cuda.remark
    for report in (
        portable,
        replace(cuda, device="cuda:0"),
        replace(cuda, comparisons=(), unproven="no kernel"),
    ):
        assert not report.not_on_its_device
        assert "CUDA" not in report.remark


def spoil(monkeypatch: pytest.MonkeyPatch, precision: str) -> None:
    """The variant of this precision gets a final norm with wrong weights."""
    right = proof.build

    def wrong(variant: Variant, graph: onnx.ModelProto, *rest: Any) -> onnx.ModelProto:
        model = right(variant, graph, *rest)
        if variant.precision == precision:
            tensor = next(t for t in model.graph.initializer if t.name == "norm.bias")
            noise = np.random.default_rng(0).normal(0, 0.3, SMALL.embed_dim).astype(np.float32)
            tensor.CopyFrom(
                onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) + noise, "norm.bias")
            )
        return model

    monkeypatch.setattr(proof, "build", wrong)


def test_a_failed_variant_leaves_nothing_unless_allowed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, "int8")
    done = CliRunner().invoke(
        export_command, [str(folder), "-o", str(tmp_path / "o"), "--precision", "fp32,int8"]
    )
    assert isinstance(done.exception, ExportError)
    assert "onnx/model_int8.onnx of 'small' has a mean cosine" in str(done.exception)
    assert "--allow-loss" in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]

    done = CliRunner().invoke(
        export_command, [str(folder), "-o", str(tmp_path / "o"), "--precision", "fp32,int8", "--allow-loss"]
    )
    assert done.exit_code == 0, done.output
    assert "Warning: onnx/model_int8.onnx has a mean cosine" in done.stderr
    assert (
        "Kept although below the accuracy gate: onnx/model_int8.onnx"
        in (tmp_path / "o" / "README.md").read_text()
    )
    values = json.loads((tmp_path / "o" / "export_report.json").read_text())
    assert [v["passed"] for v in values["variants"]] == [True, False]


def labelled_set(root: Path) -> Path:
    for label, seeds in (("a", range(6)), ("b", range(50, 56))):
        (root / label).mkdir(parents=True)
        for seed in seeds:
            picture(seed=seed).save(root / label / f"{seed}.png")
    return root


def test_labels_are_compared(folder: Path, tmp_path: Path) -> None:
    root = labelled_set(tmp_path / "set")
    (root / "a" / "broken.png").write_bytes(b"no picture")
    report = export_folder(folder, tmp_path / "out", precision="fp16", labelled=root)
    (variant,) = report.variants
    assert variant.labels is not None
    assert (variant.labels.pictures, variant.labels.classes, variant.labels.k) == (12, 2, 11)
    assert variant.labels.equal == 1.0
    assert variant.labels.accuracy == variant.labels.accuracy_torch
    assert (
        0.9999 < variant.labels.cosine_min <= variant.labels.cosine_p1 <= variant.labels.cosine_mean <= 1.0001
    )
    shutil.rmtree(root / "b")
    with pytest.raises(UsageError, match="at least two classes are"):
        export_folder(folder, tmp_path / "out", labelled=root)


class _Means:
    """An engine whose embedding is the mean of each channel."""

    device = "cpu"

    def run(self, pixels: np.ndarray[Any, Any], outputs: Sequence[str]) -> dict[str, np.ndarray[Any, Any]]:
        return {POOLED: pixels.mean(axis=(2, 3))}


def test_labelled_crops_are_held_in_memory_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelling, "_BATCH", 1)
    for label in "ab":
        (tmp_path / label).mkdir()
        for seed in range(20):
            picture(224, 224, seed).save(tmp_path / label / f"{seed}.png")
    preprocessing = Preprocessing(224, (224, 224))

    def read() -> labelling.LabelledSample:
        return labelling.labelled_sample(tmp_path, _Means(), preprocessing, lambda step: None)  # type: ignore[arg-type]

    read()  # what is imported on first use is not counted below
    tracemalloc.start()
    try:
        sample = read()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(sample.crops) == len(sample.labels) == len(sample.right) == 40
    assert peak < 1.6 * sum(crop.nbytes for crop in sample.crops)


def test_labels_out_of_a_tar(folder: Path, tmp_path: Path) -> None:
    """webdataset's shards: a .cls file beside each picture."""
    root = labelled_set(tmp_path / "set")
    shard = tmp_path / "000000.tar"
    with tarfile.open(shard, "w") as tar:
        for place, file in enumerate(sorted(root.rglob("*.png"))):
            (tmp_path / "label.cls").write_text(file.parent.name)
            tar.add(file, f"{place:03}.png")
            tar.add(tmp_path / "label.cls", f"{place:03}.cls")
    done = CliRunner().invoke(
        export_command, [str(folder), "-o", str(tmp_path / "out"), "--labelled", str(shard), "--json"]
    )
    assert done.exit_code == 0, done.output
    labels = json.loads(done.stdout)["variants"][0]["labels"]
    assert (labels["pictures"], labels["classes"], labels["equal"]) == (12, 2, 1.0)


def test_the_mean_cosine_and_the_largest_difference_count() -> None:
    near = Comparison(2, 32, 32, 0.0, 0.0, 0.0, 0.0, 0.0, (1.0, 1.0), True, 0.0, 1.0)
    far = Comparison(1, 48, 48, 2e-4, 0.0, 2e-4, 0.0, 0.0, (0.985,), True, 2e-4, 1.0)
    int8 = VariantReport("onnx/int8", "int8", "portable", 1, "0", (near, far))
    assert int8.cosines == pytest.approx((0.995, 0.9853, 0.985)) and int8.passed
    exact = VariantReport("onnx/fp32", "fp32", "portable", 1, "0", (near, far))
    with pytest.raises(ExportError, match=r"by 2\.00e-04 of the output's largest number at batch 1 of 48x48"):
        ExportReport("m", "0", (), (exact,)).check()


class Scaled:
    """An engine whose outputs are random numbers of a picture's own, times a factor; ``change`` alters them."""

    def __init__(
        self, factor: float, change: Callable[[str, np.ndarray], np.ndarray] = lambda _, x: x
    ) -> None:
        self.factor, self.change = factor, change

    def run(self, pixels: np.ndarray, outputs: Sequence[str]) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(0)
        shapes = {POOLED: (6,), TOKENS: (5, 6), ATTENTION: (2, 4)}
        made = {name: rng.random((len(pixels), *shape), np.float32) for name, shape in shapes.items()}
        return {name: self.change(name, self.factor * made[name]).astype(np.float32) for name in outputs}


def compared(factor: float, change: Callable[[str, np.ndarray], np.ndarray], precision: str) -> VariantReport:
    samples = reference_samples(
        Scaled(factor), [Image.new("RGB", (8, 8))], Preprocessing(crop_px=(8, 8)), [(8, 8)]
    )
    return VariantReport("f", precision, "portable", 1, "0", compare(Scaled(factor, change), samples))


@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e4])
def test_the_scale_of_the_features_makes_no_difference_to_the_fp32_gate(factor: float) -> None:
    assert compared(factor, lambda _, x: x * (1 + 5e-5), "fp32").passed
    assert not compared(factor, lambda _, x: x * (1 + 2e-4), "fp32").passed
    assert not compared(factor, lambda _, x: np.zeros_like(x), "fp32").passed


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("wrong", [TOKENS, ATTENTION])
def test_a_right_embedding_does_not_excuse_wrong_patch_tokens(precision: str, wrong: str) -> None:
    report = compared(1.0, lambda name, x: np.zeros_like(x) if name == wrong else x, precision)
    assert report.cosines[0] == pytest.approx(1.0) and not report.passed
    assert "patch tokens or attention" in next(iter(report.failures()))
