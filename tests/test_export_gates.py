"""The gates: below them nothing is written, unless it is allowed."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import onnx
from export_models import make_folder
from small_models import SMALL, picture

import dinokit.export.verification.proof as proof
from dinokit.cli.export import export as export_command
from dinokit.errors import UsageError
from dinokit.export import ExportError, ExportReport, VariantReport, export_folder
from dinokit.export.variants import Variant
from dinokit.export.verification.report import GATES, LabelAgreement
from dinokit.export.verification.verify import Comparison


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


def report_of(
    precision: str, cosine: float, *, finite: bool = True, equal: float | None = None
) -> VariantReport:
    c = Comparison(2, 32, 40, 0.5, 0.1, 0.5, 0.1, 0.0, (cosine, cosine), finite)
    labels = None if equal is None else LabelAgreement(200, 10, 20, equal, 0.9, 0.9, 1.0, 1.0, 1.0)
    return VariantReport(f"onnx/{precision}", precision, "portable", 1, "0", (c,), labels)


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        (
            report_of("fp32", 1.0),
            r"differs from torch by 5\.00e-01 at batch 2 of 32x40 pixels, at most 1e-04",
        ),
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
    assert "Kept although below its gate: onnx/model_int8.onnx" in (tmp_path / "o" / "README.md").read_text()
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
    near = Comparison(2, 32, 32, 0.0, 0.0, 0.0, 0.0, 0.0, (1.0, 1.0), True)
    far = Comparison(1, 48, 48, 2e-4, 0.0, 2e-4, 0.0, 0.0, (0.985,), True)
    int8 = VariantReport("onnx/int8", "int8", "portable", 1, "0", (near, far))
    assert int8.cosines == pytest.approx((0.995, 0.9853, 0.985)) and int8.passed
    exact = VariantReport("onnx/fp32", "fp32", "portable", 1, "0", (near, far))
    with pytest.raises(ExportError, match=r"by 2\.00e-04 at batch 1 of 48x48 pixels"):
        ExportReport("m", "0", (), (exact,)).check()
