"""What an exported folder says of itself: its name, how its weights came to be, how they are stored."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from export_models import CONFIG, WEIGHTS, make_folder
from safetensors.numpy import load_file
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.card import make_record, read_record
from dinokit.cli import cli
from dinokit.cli.export import export as export_command
from dinokit.cli.push import push as push_command
from dinokit.errors import UsageError
from dinokit.export import export_folder, plan_push
from dinokit.export.origin import with_origin
from dinokit.files.checksums import sha256_of
from dinokit.model_folder.folder import read_model_folder, write_model_folder
from dinokit.model_folder.onnx_metadata import read_onnx_metadata

SENTENCE = "dinokit train, vit_tiny_patch16_224, step 30 of 40 (900 pictures)"


def run_of(step: int | None) -> dict[str, object]:
    recipe = {"arch": "vit_tiny_patch16_224", "patch_size": 8, "epochs": 2, "batch_size": 4}
    return {"name": "r", "recipe": recipe, "goes_on_from": None, "step": step, "n_steps": 40, "n_images": 900,
            "epoch": 1, "metrics": {}, "images_per_s": None, "knn": []}  # fmt: skip


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A folder as training writes it, after two runs before it."""
    record = make_record([run_of(1474), run_of(443), run_of(30)])
    config = replace(CONFIG, name="run-3", source=SENTENCE)
    return write_model_folder(tmp_path / "run-3", config, WEIGHTS, record=record).path


@pytest.mark.parametrize(
    ("steps", "more"),
    [
        ([], ""),
        ([5], "; before it a run of 5 steps"),
        ([5, 6, 7], "; before it runs of 5, 6 and 7 steps"),
        ([5, None], ""),
    ],
)
def test_the_runs_before_are_told(steps: list[int | None], more: str) -> None:
    config = replace(config_for(), source=SENTENCE)
    record = make_record([*(run_of(step) for step in steps), run_of(30)])
    once = with_origin(config, record)
    assert once.source == config.source + more
    assert with_origin(once, record) == once
    assert with_origin(config, None) == config
    assert with_origin(config, record, trained_by=" by hand ").source == "by hand"


@pytest.mark.parametrize("source", ["/home/me/private/w.pth", "C:\\me\\w.pth", "~/w.pth"])
def test_folders_of_somebodys_machine_are_not_told(source: str) -> None:
    assert with_origin(replace(CONFIG, source=source), None).source == "w.pth"
    assert (
        with_origin(replace(CONFIG, source="user/name, of s3://a/b"), None).source == "user/name, of s3://a/b"
    )


@pytest.mark.parametrize("text", ["", " ", "two\nlines", "\x1b[31m"])
def test_what_is_no_line_of_text(trained: Path, tmp_path: Path, text: str) -> None:
    for what in ("name", "trained_by", "licence"):
        with pytest.raises(UsageError, match=f"--{what.replace('_', '-')} is .* expected one line"):
            export_folder(trained, tmp_path / "out", onnx=False, **{what: text})  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_one_command_makes_the_folder_that_is_shipped(trained: Path, tmp_path: Path) -> None:
    """The starter's own folder is made so; see its card."""
    out = tmp_path / "out"
    done = CliRunner().invoke(
        export_command,
        [str(trained), "-o", str(out), "--name", "dinokit/tiny", "--weights", "float16", "--no-onnx"],
    )
    assert done.exit_code == 0, done.output
    folder = read_model_folder(out)
    assert folder.config.name == "dinokit/tiny"
    assert folder.config.source == f"{SENTENCE}; before it runs of 1474 and 443 steps"
    assert not (out / "onnx").exists() and not (out / "export_report.json").exists()
    for name, values in load_file(out / "timm.safetensors").items():
        np.testing.assert_array_equal(values, WEIGHTS[name].astype(np.float16))
    record = read_record(out, folder.weights_sha256)
    assert record is not None and [run["step"] for run in record["runs"]] == [1474, 443, 30]
    card = (out / "README.md").read_text()
    assert "# dinokit/tiny" in card and "runs of 1474 and 443 steps" in card
    assert load_backbone(out, device="cpu").embed(picture()).shape == (48,)


@pytest.mark.parametrize(
    ("licence", "remark"),
    [
        ("apache", r"no licence 'apache'; .* license_name: apache\. Did you mean apache-2\.0\?$"),
        ("Apache 2.0", r"Did you mean apache-2\.0"),
        ("MIT", r"Did you mean mit\?"),
        ("gpl3", r"Did you mean gpl or lgpl or gpl-3\.0"),
        ("acme-research-terms", r"license_name: acme-research-terms\.$"),
        ("apache-2.0", None),
        ("other", None),
        ("dinov3-license", None),
    ],
)
def test_a_licence_that_the_hub_does_not_list_is_told(
    licence: str, remark: str | None, trained: Path, tmp_path: Path
) -> None:
    options = [str(trained), "-o", str(tmp_path / "out"), "--no-onnx", "--licence", licence]
    said = CliRunner().invoke(export_command, options)
    assert said.exit_code == 0
    warnings = [
        line for line in said.stderr.splitlines() if line.startswith("Warning: the Hub has no licence")
    ]
    assert len(warnings) == (remark is not None)
    assert remark is None or re.search(remark, warnings[0])


def test_a_photograph_that_cannot_be_read_leaves_nothing_to_export(trained: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no picture")
    said = CliRunner().invoke(
        cli, ["export", str(trained), "-o", str(tmp_path / "out"), "--photos", str(broken)]
    )
    assert said.exit_code == 3 and "Error: broken.jpg: " in said.stderr.replace(f"{tmp_path}/", "")
    assert not (tmp_path / "out").exists()


def test_a_licence_is_stated_afterwards(trained: Path, tmp_path: Path) -> None:
    write_model_folder(trained, replace(CONFIG, licence="other"), WEIGHTS)
    unstated = CliRunner().invoke(push_command, [str(trained), "me/tiny", "--dry-run"])
    assert unstated.exit_code == 0 and "the model has no licence" in unstated.stderr
    out = tmp_path / "out"
    options = [str(trained), "-o", str(out), "--no-onnx", "--licence", "cc-by-4.0"]
    assert CliRunner().invoke(export_command, options).exit_code == 0
    assert read_model_folder(out).config.licence == "cc-by-4.0"
    card = (out / "README.md").read_text()
    assert "\nlicense: cc-by-4.0\n" in card and "not stated" not in card
    stated = CliRunner().invoke(push_command, [str(out), "me/tiny", "--dry-run"])
    assert stated.exit_code == 0 and "the model has no licence" not in stated.stderr


def test_no_torch_is_needed_without_onnx_files(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "dinokit.runtime.torch", raising=False)
    assert export_folder(trained, tmp_path / "out", onnx=False).passed
    for more in ({"precision": "fp32"}, {"target": "embedder"}, {"image_size": 32}, {"external_data": True}):
        with pytest.raises(UsageError, match="leave out --no-onnx"):
            export_folder(trained, tmp_path / "out2", onnx=False, **more)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="'bfloat16' is not known; expected float32 or float16"):
        export_folder(trained, tmp_path / "out2", onnx=False, weights_dtype="bfloat16")
    assert not (tmp_path / "out2").exists()


def test_the_onnx_file_belongs_to_the_stored_weights(trained: Path, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    out = tmp_path / "out"
    report = export_folder(trained, out, name="tiny", weights_dtype="float16", trained_by="somebody")
    assert report.passed and report.model == "tiny"
    says = json.loads(read_onnx_metadata(out / "onnx" / "model.onnx")["dinokit"])
    assert (says["name"], says["weights_sha256"]) == ("tiny", read_model_folder(out).weights_sha256)
    halved = {name: values.astype(np.float16).astype(np.float32) for name, values in WEIGHTS.items()}
    other = write_model_folder(tmp_path / "other", CONFIG, halved).path
    found, right = (load_backbone(path, device="cpu").embed(picture()) for path in (out, other))
    np.testing.assert_allclose(found, right, atol=1e-5)
    assert "# tiny" in (out / "README.md").read_text() and "somebody" in (out / "README.md").read_text()
    # Without a word it keeps what it says, and its ONNX file stays where none is made.
    export_folder(out, out, onnx=False)
    assert read_model_folder(out).config.source == "somebody"
    assert (out / "onnx" / "model.onnx").is_file() and (out / "export_report.json").is_file()


@pytest.mark.parametrize("external", [False, True])
def test_a_new_name_and_licence_reach_the_files_that_stay(
    trained: Path, tmp_path: Path, external: bool
) -> None:
    pytest.importorskip("timm")
    out = tmp_path / "out"
    export_folder(trained, out, external_data=external)
    before = json.loads((out / "export_report.json").read_text())
    vector = load_backbone(out, device="cpu").embed(picture())
    export_folder(out, out, onnx=False, name="a new name", licence="cc-by-4.0")
    says = json.loads(read_onnx_metadata(out / "onnx" / "model.onnx")["dinokit"])
    assert (says["name"], says["licence"]) == ("a new name", "cc-by-4.0")
    np.testing.assert_array_equal(load_backbone(out, device="cpu").embed(picture()), vector)
    report = json.loads((out / "export_report.json").read_text())
    (entry,), (entry_before,) = report["variants"], before["variants"]
    assert entry["sha256"] == sha256_of(out / "onnx" / "model.onnx") != entry_before["sha256"]
    assert entry["bytes"] == sum(path.stat().st_size for path in (out / "onnx").iterdir())
    assert {**entry, "sha256": 0, "bytes": 0} == {**entry_before, "sha256": 0, "bytes": 0}
    assert report["photographs"] == before["photographs"]
    assert plan_push(out, "me/tiny").files
    # Told again, nothing changes.
    export_folder(out, out, onnx=False)
    assert json.loads((out / "export_report.json").read_text())["variants"] == [entry]


def test_the_starters_card_is_nobodys_edit(tmp_path: Path) -> None:
    done = CliRunner().invoke(export_command, ["starter", "-o", str(tmp_path / "st"), "--no-onnx"])
    assert done.exit_code == 0, done.output
    assert "README.md is its authors' own text and is kept." in done.stderr
    assert "by hand" not in done.stderr
    done = CliRunner().invoke(cli, ["card", str(tmp_path / "st"), "--no-figures"])
    assert "README.md is its authors' own text and is kept" in done.stderr


def test_what_an_earlier_export_was_told_stands(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "shoes"
    export = partial(export_folder, trained, out, onnx=False)
    export(name="me/shoes", trained_by="two evenings", licence="cc-by-4.0", weights_dtype="float16")
    export(weights_dtype="float16")
    told = read_model_folder(out).config
    assert (told.name, told.source, told.licence) == ("me/shoes", "two evenings", "cc-by-4.0")
    card = (out / "README.md").read_text()
    assert "# me/shoes" in card and "license: cc-by-4.0" in card and "two evenings" in card
    export(weights_dtype="float16", name="you/shoes", licence="mit", trained_by="one evening")
    told = read_model_folder(out).config
    assert (told.name, told.source, told.licence) == ("you/shoes", "one evening", "mit")
    # Other weights are another model, of which nothing was told.
    export(overwrite=True)
    assert read_model_folder(out).config.name == read_model_folder(trained).config.name


def test_a_folder_exported_onto_itself_tells_of_all_its_runs(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.parent)
    export_folder(trained.name, trained.name, onnx=False)  # by a relative name
    assert read_model_folder(trained).config.source == f"{SENTENCE}; before it runs of 1474 and 443 steps"


def test_a_card_of_a_persons_own_stays_with_new_weights(trained: Path, tmp_path: Path) -> None:
    shipped = make_folder(tmp_path / "shipped")
    write_model_folder(shipped, CONFIG, random_weights(seed=5))
    (shipped / "README.md").write_text("mine\n")
    done = CliRunner().invoke(
        export_command, [str(trained), "-o", str(shipped), "--name", "starter", "--no-onnx", "--overwrite"]
    )
    assert done.exit_code == 0, done.output
    assert "README.md was edited by hand and is kept" in done.stderr
    assert (shipped / "README.md").read_text() == "mine\n"
    assert read_model_folder(shipped).config.name == "starter"
    np.testing.assert_array_equal(load_file(shipped / "timm.safetensors")["norm.bias"], WEIGHTS["norm.bias"])


def test_a_name_may_have_no_break_spaces_and_joined_emoji() -> None:
    assert with_origin(CONFIG, None, name="my\u00a0model \U0001f469\u200d\U0001f52c").name.startswith(
        "my\u00a0model"
    )
