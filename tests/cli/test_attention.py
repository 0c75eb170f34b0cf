"""`dinokit attention` from end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.cli import cli
from dinokit.drawing.attention_pictures import write_attention
from dinokit.drawing.overlays import overlay
from dinokit.model_folder.folder import write_model_folder

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder: 3 heads, 32 px, patches of 8."""
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(["a/cat.png", "b/cat.png", "b/dog.png"]):
        Path(name).parent.mkdir(exist_ok=True)
        picture(90 + i, 70, seed=i).save(name)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, ["attention", *map(str, args)])


def test_every_picture_of_every_photograph(model: str) -> None:
    result = run("a", "b", "-o", "out", "-m", model)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "out\n"
    assert "3 heads, 32x32 px in 4x4 patches, onnx on cpu" in result.stderr
    assert "3 drawn · see out/contact-sheet.png" in result.stderr
    heads = [f"head-{i}.png" for i in range(3)]
    kinds = ["picture.png", "mean.png", "mask-mean.png", *heads, *(f"mask-{head}" for head in heads)]
    expected = {f"{photo}/{kind}" for photo in ("cat", "cat-2", "dog") for kind in kinds}
    found = {str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file()}
    assert found == expected | {"contact-sheet.png", "attention.json"}

    backbone = load_backbone(model)
    photo = "b/cat.png"  # the second of its name
    crop = backbone.preprocessing.crop(Image.open(photo).convert("RGB"))
    maps = backbone.attention(photo)
    np.testing.assert_array_equal(Image.open("out/cat-2/picture.png"), crop)
    np.testing.assert_array_equal(Image.open("out/cat-2/mean.png"), overlay(crop, maps.mean(0)))
    np.testing.assert_array_equal(Image.open("out/cat-2/head-2.png"), overlay(crop, maps[2]))
    masks = backbone.masks(photo, 0.6)
    for head in range(3):
        drawn = np.asarray(Image.open(f"out/cat-2/mask-head-{head}.png"))
        np.testing.assert_array_equal(drawn, masks[head] * np.uint8(255))


def test_numbers_equal_the_python_call_also_when_a_camera_was_turned(model: str) -> None:
    turned = picture(90, 60, seed=9)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save("turned.jpg", exif=exif)
    result = run(
        "turned.jpg", "a/cat.png", "-o", "maps", "-m", model, "--format", "npy", "--image-size", "48x64"
    )
    assert result.exit_code == 0, result.stderr
    backbone = load_backbone(model, image_size=(48, 64))
    for name, path in {"turned": "turned.jpg", "cat": "a/cat.png"}.items():
        maps = np.load(f"maps/{name}.npy")
        assert maps.shape == (3, 6, 8) and maps.dtype == np.float32
        np.testing.assert_allclose(maps, backbone.attention(path), atol=1e-6)
    assert sorted(p.name for p in Path("maps").iterdir()) == ["attention.json", "cat.npy", "turned.npy"]
    origin = json.loads(Path("maps/attention.json").read_text())["origin"]
    assert origin["what"] == "attention" and not {"mass", "heads"} & set(origin)
    for option in (["--heads", "0,2"], ["--mass", "0.3"]):
        refused = run("a", "-o", "other", "-m", model, "--format", "npy", *option)
        assert refused.exit_code == 2 and f"{option[0]} applies to --format png only" in refused.stderr


def test_another_mass_and_chosen_heads(model: str) -> None:
    result = run("a", "-o", "out", "-m", model, "--mass", "0.2", "--heads", "1", "-q")
    assert result.exit_code == 0 and result.stderr == ""
    names = {p.name for p in Path("out/cat").iterdir()}
    assert names == {"picture.png", "mean.png", "head-1.png", "mask-mean.png", "mask-head-1.png"}
    expected = load_backbone(model).masks("a/cat.png", 0.2)[1] * np.uint8(255)
    np.testing.assert_array_equal(Image.open("out/cat/mask-head-1.png"), expected)
    assert run("a", "-o", "none", "-m", model, "--heads", "none").exit_code == 0
    assert "head" not in "".join(p.name for p in Path("none/cat").iterdir())
    wrong = run("a", "-o", "other", "-m", model, "--heads", "0,3")
    assert wrong.exit_code == 2
    assert "there is no head 3; this model has 3, counted from 0 to 2" in wrong.stderr
    assert "expected all, none, or numbers" in run("a", "--heads", "first").stderr


def test_a_broken_picture_costs_the_others_nothing(model: str) -> None:
    Path("a/a-broken.jpg").write_bytes(b"no picture")
    args = ("a", "missing.jpg", "b", "nothing*.jpg", "-o", "out", "-m", model, "--json", "-b", "2")
    result = run(*args)
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert [photo["path"] for photo in summary["photos"]] == ["a/cat.png", "b/cat.png", "b/dog.png"]
    assert summary["photos"][1]["files"][0] == "cat-2/picture.png"
    assert [f["path"] for f in summary["failures"]] == ["a/a-broken.jpg", "missing.jpg"]
    assert summary["problems"] == ["nothing*.jpg: the pattern matches no file"]
    assert "Failed: missing.jpg: no such file" in result.stderr
    index = json.loads(Path("out/attention.json").read_text())
    assert index["photos"] == summary["photos"] and index["failures"] == summary["failures"]
    assert index["origin"]["weights_sha256"] == summary["weights_sha256"] and index["origin"]["mass"] == 0.6


def test_nothing_to_draw(model: str) -> None:
    Path("text.jpg").write_text("no")
    assert run("text.jpg", "-o", "out", "-m", model).exit_code == 3
    result = run("missing.jpg", "-m", model)
    assert result.exit_code == 3 and "there is nothing to draw" in result.stderr


def test_a_folder_with_something_in_it_is_left_alone(model: str) -> None:
    Path("out").mkdir()
    Path("out/mine.txt").write_text("keep")
    result = run("a", "-o", "out", "-m", model)
    assert result.exit_code == 2
    assert "out is not empty; choose another folder, or give --overwrite" in result.stderr
    assert (
        "out is not empty" in run("a", "-o", "out", "-m", "no-such-model").stderr
    )  # before a model is looked for
    assert run("a", "-o", "out", "-m", model, "--overwrite").exit_code == 0
    assert run("a", "-o", "out", "-m", model, "--overwrite").exit_code == 0
    assert Path("out/mine.txt").read_text() == "keep"
    assert "is a file; expected a folder" in run("a", "-o", "out/mine.txt", "-m", model).stderr
    Path("out/cat/mean.png").unlink()
    picture(20, 20, seed=1).save("out/cat/mean.png")  # somebody's photograph
    before = Path("out/cat/mean.png").read_bytes()
    refused = run("a", "-o", "out", "-m", model, "--overwrite")
    assert refused.exit_code == 2 and "was not drawn by dinokit, so it is not replaced" in refused.stderr
    assert Path("out/cat/mean.png").read_bytes() == before


@pytest.mark.parametrize("size", ["33", "32x20"])
def test_sizes_that_do_not_fit_the_patches(model: str, size: str) -> None:
    result = run("a", "-o", "out", "-m", model, "--image-size", size)
    assert result.exit_code == 2 and "not a multiple of patch_size=8; use" in result.stderr
    assert not Path("out").exists()


def test_sizes_that_are_none(model: str) -> None:
    for size in ("0", "x48", "48x", "wide"):
        result = run("a", "-m", model, "--image-size", size)
        assert result.exit_code == 2 and "expected pixels, 480, or height x width" in result.stderr


def test_many_photographs_need_several_sheets(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dinokit.drawing.attention_pictures._ROWS_OF_A_SHEET", 2)
    result = run("a", "b", "-o", "out", "-m", model, "--json")
    assert json.loads(result.stdout)["sheets"] == ["contact-sheet.png", "contact-sheet-2.png"]


def test_an_interruption_keeps_what_is_drawn(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(model)
    whole, calls = backbone.attention, []

    def attention(*args: object, **kwargs: object) -> np.ndarray:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(backbone, "attention", attention)
    monkeypatch.setattr("dinokit.loading.load.load_backbone", lambda *a, **k: backbone)
    result = run("a", "b", "-o", "out", "-m", model, "-b", "1")
    assert result.exit_code == 130
    assert "Interrupted: 1 of 3 are drawn and kept in out" in result.stderr
    assert Path("out/contact-sheet.png").is_file() and Path("out/cat/mean.png").is_file()


def test_python_arguments_are_checked(model: str) -> None:
    from dinokit.errors import UsageError

    backbone = load_backbone(model)
    with pytest.raises(UsageError, match="form='jpg' is not known; expected png"):
        write_attention([Path("a/cat.png")], "out", backbone, form="jpg")
    with pytest.raises(UsageError, match="expected 0 < mass <= 1"):
        write_attention([Path("a/cat.png")], "out", backbone, mass=0)
    assert not Path("out").exists()
