"""The files of an export: which are written, the report and the card that tell of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("timm")

import onnx
from export_models import make_folder

from dinokit.card import card_is_ours
from dinokit.cli.export import export as export_command
from dinokit.errors import UsageError
from dinokit.export import export_folder
from dinokit.export.variants import Variant, plan_variants
from dinokit.model_folder.contract import OUTPUTS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "small")


def test_the_names_of_the_files() -> None:
    plan = plan_variants("int8, FP32", ["embedder", "portable"], None)
    assert [v.file for v in plan] == [
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "onnx/embedder.onnx",
        "onnx/embedder_int8.onnx",
    ]
    assert Variant("fp16", "portable", (224, 320)).file == "onnx/model_fp16_224x320.onnx"


@pytest.mark.parametrize(
    ("precision", "target", "words"),
    [
        (
            "fp61",
            "portable",
            r"precision 'fp61' is not known; expected one of fp32, fp16, int8; did you mean 'fp16'",
        ),
        ("fp32", "portabel", r"target 'portabel' is not known.*did you mean 'portable'"),
        (",", "portable", "no precision given"),
    ],
)
def test_a_typo(folder: Path, tmp_path: Path, precision: str, target: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        export_folder(folder, tmp_path / "out", precision=precision, target=target)
    assert not (tmp_path / "out").exists()


def test_the_report_and_the_card(exported_folder: Path) -> None:
    values = json.loads((exported_folder / "export_report.json").read_text())
    assert values["passed"] is True
    for variant in values["variants"]:
        file = exported_folder / variant["file"]
        assert variant["bytes"] == file.stat().st_size
        assert len(variant["comparisons"]) == 9
        assert (variant["comparisons"][0]["attention_max"] is None) == (variant["target"] == "embedder")
        assert variant["cosine_min"] <= variant["cosine_p1"] <= variant["cosine_mean"]
        model = onnx.load(file)
        onnx.checker.check_model(model, full_check=True)
        says = json.loads({p.key: p.value for p in model.metadata_props}["dinokit"])
        assert (says["precision"], says["target"]) == (variant["precision"], variant["target"])
        assert says["licence"] == "apache-2.0" and says["written_by"].startswith("dinokit ")
    card = (exported_folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm")
    assert card.count("<!-- dinokit export -->") == card.count("## ONNX files") == 1
    assert all(f"| `{v['file']}` | {v['bytes'] / 1e6:.1f} MB |" in card for v in values["variants"])
    assert card_is_ours(exported_folder)


def test_files_of_an_earlier_export_stay(exported_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(exported_folder, out)
    before = (out / "onnx" / "model_int8.onnx").read_bytes()
    (out / "onnx" / "embedder.onnx").write_bytes(b"damaged")
    report = export_folder(out, out, precision="fp16")
    assert (out / "onnx" / "model_int8.onnx").read_bytes() == before
    names = [v["file"] for v in report.to_json()["variants"]]
    assert names == [
        "onnx/model_fp16.onnx",
        "onnx/model.onnx",
        "onnx/model_int8.onnx",
        "onnx/embedder_fp16.onnx",
        "onnx/embedder_int8.onnx",
    ]
    assert sorted(p.name for p in (out / "onnx").iterdir()) == sorted(Path(name).name for name in names)
    card = (out / "README.md").read_text()
    assert card.count("## ONNX files") == 1 and "`onnx/embedder.onnx`" not in card
    assert report.dropped == ("onnx/embedder.onnx",)
    (out / "export_report.json").unlink()
    done = CliRunner().invoke(export_command, [str(out), "-o", str(out), "--no-onnx"])
    assert (
        done.exit_code == 0 and "Removed onnx/model_int8.onnx: it is not in export_report.json" in done.stderr
    )


def test_a_card_that_a_person_edited_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_text("mine\n")
    report = export_folder(folder, tmp_path / "out")
    assert report.card == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"
    assert export_folder(tmp_path / "out", tmp_path / "out").card == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == "mine\n"


def test_a_card_that_is_no_utf_8_is_said_to_be_so(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").write_bytes("größer\n".encode("latin-1"))
    with pytest.raises(UsageError, match=r"README\.md is not valid UTF-8"):
        export_folder(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_outputs_have_names(exported_folder: Path) -> None:
    for name in ("model.onnx", "model_fp16.onnx", "model_int8.onnx"):
        model = onnx.load(exported_folder / "onnx" / name, load_external_data=False)
        assert tuple(value.name for value in model.graph.output) == OUTPUTS


def test_a_file_for_one_size_declares_every_size_but_the_batch(folder: Path) -> None:
    export_folder(folder, folder, precision="fp16", image_size=(24, 40))
    model = onnx.load(folder / "onnx" / "model_fp16_24x40.onnx", load_external_data=False)
    dims = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert dims == {
        "pixel_values": ["batch", 3, 24, 40],
        "last_hidden_state": ["batch", 1 + 3 * 5, 48],
        "pooler_output": ["batch", 48],
        "attention": ["batch", 3, 3 * 5],
    }


def test_help_shows_examples() -> None:
    done = CliRunner().invoke(export_command, ["--help"])
    assert "--precision fp32,fp16,int8 --labelled" in done.output
    assert done.exit_code == 0
