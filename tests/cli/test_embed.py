"""The command line: the group that holds the commands, and `dinokit embed` from end to end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from small_models import config_for, picture, random_weights

import dinokit.cli
from dinokit import __version__
from dinokit.cli import cli
from dinokit.cli._progress import open_progress
from dinokit.errors import ModelError
from dinokit.model_folder.folder import write_model_folder
from dinokit.tables.embeddings import read_embeddings

pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small random model folder."""
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def photos(count: int = 3, folder: str = "photos") -> list[Path]:
    Path(folder).mkdir(exist_ok=True)
    paths = [Path(folder) / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        picture(90 + i, 70, seed=i).save(path)
    return paths


# -- the group


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from dinokit.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit as e: assert e.code == 0\n"
        "heavy = {'numpy', 'PIL', 'torch', 'onnxruntime', 'onnx', 'pyarrow', 'rich', 'huggingface_hub'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name, (_, text) in dinokit.cli.COMMANDS.items():
        assert f"  {name}" in done.stdout
        assert text in done.stdout


def test_embedding_with_a_local_model_loads_neither_torch_nor_the_hub(model: str) -> None:
    photos(1)
    code = (
        "import sys; from dinokit.cli import cli\n"
        "try: cli(sys.argv[1:])\n"
        "except SystemExit as e: assert e.code == 0, e.code\n"
        "heavy = {'torch', 'timm', 'transformers', 'huggingface_hub', 'rich', 'pyarrow.compute', 'numpy.testing'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "embed", "photos", "-m", model]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path("embeddings.parquet").is_file()


def test_version() -> None:
    assert run("--version").output == f"dinokit {__version__}\n"
    module = subprocess.run(
        [sys.executable, "-m", "dinokit", "-V"], capture_output=True, text=True, check=True
    )
    assert module.stdout == f"dinokit {__version__}\n"


def test_mistyped_commands_get_a_suggestion() -> None:
    result = run("emebd", "x")
    assert result.exit_code == 2
    assert "No such command 'emebd'. Did you mean 'embed'?" in result.stderr
    assert "The commands are: embed, models" in run("zzzzzz").stderr
    assert run("--nonsense").exit_code == 2


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    @click.command()
    def broken() -> None:
        raise error

    class Module:
        pass

    module: Any = Module()
    module.broken = broken
    monkeypatch.setitem(dinokit.cli.COMMANDS, "broken", ("dinokit_broken", "Fails."))
    monkeypatch.setitem(sys.modules, "dinokit_broken", module)


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (ModelError("no such model"), 3, "Error: no such model\n"),
        (OSError(28, "No space left on device", "out.csv"), 3, "Error: out.csv: No space left on device\n"),
        (KeyboardInterrupt(), 130, "\nInterrupted.\n"),
    ],
)
def test_expected_errors_are_one_message_and_a_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    failing(monkeypatch, error)
    result = run("broken")
    assert (result.exit_code, result.stderr, result.stdout) == (code, message, "")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ModelError("no such model"))
    monkeypatch.setenv("DINOKIT_DEBUG", "1")
    with pytest.raises(ModelError):
        CliRunner().invoke(cli, ["broken"], catch_exceptions=False)


# -- embed: what comes out


def test_photographs_become_a_table(model: str) -> None:
    paths = photos()
    result = run("embed", "photos", "-m", model, "-o", "out.parquet")
    assert (result.exit_code, result.stdout) == (0, "out.parquet\n")
    first, last = result.stderr.splitlines()
    assert first.startswith(f"small ({model}): 48 numbers per picture, 32x32 px, onnx on ")
    assert last.startswith("3 embedded · ")
    vectors, names, origin = read_embeddings("out.parquet")
    assert names == [str(path) for path in paths]
    assert origin["model"] == "small"

    from dinokit import load_backbone

    expected = load_backbone(model, device="cpu").embed(paths)
    np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_the_default_model_and_how_to_get_a_stronger_one_are_said(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dinokit.loading.load

    original = dinokit.loading.load.load_backbone
    asked = []

    def bundled(name: str, **options: Any) -> Any:
        asked.append(name)
        backbone = original(model, **options)
        backbone.source = "bundled"
        return backbone

    monkeypatch.setattr(dinokit.loading.load, "load_backbone", bundled)
    photos(1)
    result = run("embed", "photos")
    assert asked == ["starter"]
    assert "(bundled)" in result.stderr
    assert "for stronger features: -m dino_vits16" in result.stderr.splitlines()[0]
    assert result.stdout == "embeddings.parquet\n"


def test_json_summary_and_quiet(model: str) -> None:
    photos(2)
    Path("photos/bad.jpg").write_bytes(b"")
    result = run("embed", "photos", "nothing/*.jpg", "-m", model, "-o", "o.csv", "--json", "--quiet")
    assert result.exit_code == 1
    summary = json.loads(result.stdout)
    assert (summary["rows"], summary["embedded"], summary["failed"]) == (3, 2, 1)
    assert summary["failures"] == [{"path": "photos/bad.jpg", "error": "the file is empty (0 bytes)"}]
    assert summary["problems"] == ["nothing/*.jpg: the pattern matches no file"]
    assert summary["output"] == "o.csv"
    assert result.stderr.splitlines() == [
        "Warning: nothing/*.jpg: the pattern matches no file",
        "Failed: photos/bad.jpg: the file is empty (0 bytes)",
    ]


def test_options_reach_the_model(model: str) -> None:
    photos(1)
    result = run(
        "embed",
        "photos",
        "-m",
        model,
        "--image-size",
        "64x48",
        "--engine",
        "onnx",
        "--device",
        "cpu",
        "-o",
        "o.csv",
    )
    assert "64x48 px, onnx on cpu, fp32" in result.stderr
    assert read_embeddings("o.csv").origin["preprocessing"]["crop_px"] == [64, 48]
    result = run("embed", "photos", "-m", model, "--image-size", "60", "-o", "p.csv")
    assert result.exit_code == 2
    assert "image height of 60 px is not a multiple of patch_size=8; use 56 or 64" in result.stderr


def test_two_shares_of_one_table(model: str) -> None:
    photos(300)
    first = run("embed", "photos", "-m", model, "-o", "t.npy", "--share", "2/2")
    assert (first.exit_code, first.stdout) == (0, "")
    assert "44 embedded" in first.stderr and (
        "Share 2/2 is done; 256 pictures left to the other shares, the last of which writes t.npy."
        in first.stderr
    )
    told = run("embed", "photos", "-m", model, "-o", "t.npy", "--share", "2/2", "--json")
    summary = json.loads(told.stdout)
    assert (summary["share"], summary["written"], summary["waiting"]) == ("2/2", False, 256)
    last = run("embed", "photos", "-m", model, "-o", "t.npy", "--share", "1/2")
    assert (last.exit_code, last.stdout) == (0, "t.npy\n")
    assert "300 embedded, 44 of them earlier or by other shares" in last.stderr
    assert np.load("t.npy").shape[0] == 300


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--share", "3/2"], "there is no share 3 of 2"),
        (["--share", "half"], "'half' is not a share; give 2/8"),
        (["--share", "1/2", "--overwrite"], "remove o.csv and o.csv.parts once, before the shares start"),
    ],
)
def test_shares_that_make_no_sense(model: str, options: list[str], message: str) -> None:
    photos(1)
    result = run("embed", "photos", "-m", model, "-o", "o.csv", *options)
    assert result.exit_code == 2 and message in result.stderr


# -- embed: pictures as people have them


def test_pictures_as_people_have_them_give_the_same_vector(model: str) -> None:
    """One grey picture, stored in every way that loses nothing: every row is the same vector."""
    Path("p").mkdir()
    grey = picture(90, 70).convert("L")
    values = np.asarray(grey)
    rgb = grey.convert("RGB")
    cmyk = Image.merge("CMYK", [Image.new("L", grey.size, 0)] * 3 + [Image.eval(grey, lambda v: 255 - v)])
    opaque = rgb.convert("RGBA")
    turned = {
        1: rgb,
        2: rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: rgb.transpose(Image.Transpose.ROTATE_180),
        4: rgb.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: rgb.transpose(Image.Transpose.TRANSPOSE),
        6: rgb.transpose(Image.Transpose.ROTATE_90),
        7: rgb.transpose(Image.Transpose.TRANSVERSE),
        8: rgb.transpose(Image.Transpose.ROTATE_270),
    }
    for orientation, image in turned.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(f"p/exif{orientation}.png", exif=exif)
    grey.save("p/grey.png")
    rgb.save("p/two words.bmp")
    rgb.save("p/größe 写真.png")
    grey.convert("P").save("p/palette.png")
    opaque.save("p/alpha.png")
    cmyk.save("p/cmyk.tif")
    Image.fromarray(values.astype(np.uint16) * 257).save("p/16bit.png")
    Image.fromarray(values.astype(np.uint16) * 257).save("p/16bit.tiff")
    rgb.save("p/lossless.webp", lossless=True)
    grey.save("p/animated.gif", save_all=True, append_images=[Image.new("L", grey.size, 7)], optimize=False)
    result = run("embed", "p", "p/grey.png", "p/grey.png", "-m", model, "-o", "o.parquet", "-b", "5")
    assert result.exit_code == 0, result.stderr
    vectors, paths, _ = read_embeddings("o.parquet")
    assert len(paths) == 20
    assert paths[-2:] == ["p/grey.png", "p/grey.png"]  # named again, again a row
    import pyarrow.parquet as pq

    table = pq.read_table("o.parquet")
    assert set(table.column("width").to_pylist()) == {90}
    assert set(table.column("height").to_pylist()) == {70}
    from dinokit import load_backbone

    expected = load_backbone(model, device="cpu").embed(rgb)
    for path, vector in zip(paths, vectors, strict=True):
        np.testing.assert_allclose(vector, expected, atol=1e-4, err_msg=path)


def test_odd_shapes_get_their_rows(model: str) -> None:
    Path("p").mkdir()
    for name, size in {"a.png": (1, 1), "b.png": (5000, 3), "c.png": (2, 6000)}.items():
        Image.new("RGB", size, (90, 120, 200)).save(f"p/{name}")
    assert run("embed", "p", "-m", model, "-o", "o.npy").exit_code == 0
    vectors = read_embeddings("o.npy").embeddings
    np.testing.assert_allclose(vectors, vectors[[0, 0, 0]], atol=1e-5)  # one colour, whatever the shape


def test_bad_pictures_cost_nobody_else_anything(model: str) -> None:
    good = photos(4)
    data = good[0].read_bytes()
    Path("photos/0cut.png").write_bytes(data[: len(data) // 2])
    Path("photos/1empty.jpg").write_bytes(b"")
    Path("photos/2text.jpg").write_text("not a picture at all")
    result = run("embed", "photos", "gone.jpg", "-m", model, "-o", "o.parquet", "-b", "2")
    assert result.exit_code == 1
    vectors, paths, _ = read_embeddings("o.parquet")
    assert paths == [*sorted(f"photos/{p.name}" for p in Path("photos").iterdir()), "gone.jpg"]
    alone = run("embed", *good, "-m", model, "-o", "good.parquet")
    assert alone.exit_code == 0
    fine = ~np.isnan(vectors).any(1)
    assert [paths[i] for i in np.flatnonzero(fine)] == [str(p) for p in good]
    np.testing.assert_allclose(vectors[fine], read_embeddings("good.parquet").embeddings, atol=1e-5)
    for line in (
        "Failed: photos/0cut.png: the file is truncated: it ends before the picture does",
        "Failed: photos/1empty.jpg: the file is empty (0 bytes)",
        "Failed: photos/2text.jpg: not a picture but text",
        "Failed: gone.jpg: no such file",
    ):
        assert line in result.stderr.splitlines()
    assert "4 embedded, 4 failed" in result.stderr


# -- embed: exit codes


def test_a_folder_without_pictures_is_said_and_the_rest_is_done(model: str) -> None:
    photos(2)
    Path("empty").mkdir()
    result = run("embed", "empty", "photos", "*.tiff", "-m", model, "-o", "o.csv")
    assert result.exit_code == 1
    assert "Warning: empty: no pictures in this folder; it is empty" in result.stderr
    assert "Warning: *.tiff: the pattern matches no file" in result.stderr
    assert len(read_embeddings("o.csv").paths) == 2


@pytest.mark.parametrize(
    ("header", "box"),
    [
        ("path,X,y,width,height,label", "x, y, width, height"),
        ("path,xmin,ymin,xmax,ymax", "xmin, ymin, xmax, ymax"),
        ("path,width,height,error", None),  # as in tables of dinokit
    ],
)
def test_boxes_in_a_list_are_not_used_and_that_is_told(model: str, header: str, box: str | None) -> None:
    photos(1)
    row = ",".join(["photos/0.png", "1", "2", "3", "4", "5"][: header.count(",") + 1])
    Path("list.csv").write_text(f"{header}\n{row}\n", encoding="utf-8")
    result = run("embed", "list.csv", "-m", model, "-o", "x.parquet", "--quiet")
    assert result.exit_code == 0
    if box is None:
        assert result.stderr == ""
    else:
        assert f"Warning: list.csv has boxes ({box}), which are not used" in result.stderr


def test_nothing_to_do_is_3_and_leaves_nothing(model: str) -> None:
    Path("empty").mkdir()
    for arguments in (["empty"], ["*.jpg"], ["gone.jpg"], ["empty", "gone.jpg"]):
        result = run("embed", *arguments, "-m", model, "-o", "o.csv")
        assert result.exit_code == 3
        assert "nothing to embed" in result.stderr
        assert not Path("o.csv").exists()


def test_all_failed_is_3_with_a_table_that_says_why(model: str) -> None:
    Path("bad.jpg").write_bytes(b"")
    assert run("embed", "bad.jpg", "-m", model, "-o", "o.csv").exit_code == 3
    assert np.isnan(read_embeddings("o.csv").embeddings).all()


def test_usage_errors_are_2(model: str) -> None:
    photos(1)
    assert run("embed").exit_code == 2
    assert run("embed", "photos", "--batch-size", "0").exit_code == 2
    result = run("embed", "photos", "-m", model, "-o", "o.parqet")
    assert result.exit_code == 2
    assert "Did you mean o.parquet?" in result.stderr
    assert run("embed", "photos", "-m", model, "-o", "o.csv").exit_code == 0
    photos(2)
    result = run("embed", "photos", "-m", model, "-o", "o.csv")
    assert result.exit_code == 2
    assert "o.csv exists, made from other inputs" in result.stderr
    assert "--overwrite" in result.stderr
    assert run("embed", "photos", "-m", model, "-o", "o.csv", "--overwrite").exit_code == 0


def test_the_same_command_again_finds_its_work_done(model: str) -> None:
    photos(2)
    Path("photos/bad.jpg").write_bytes(b"")
    assert run("embed", "photos", "-m", model, "-o", "o.csv").exit_code == 1
    result = run("embed", "photos", "-m", model, "-o", "o.csv")
    assert (result.exit_code, result.stdout) == (1, "o.csv\n")
    assert "already exists, from the same pictures and model; 1 of its pictures failed" in result.stderr


def test_max_failures(model: str) -> None:
    photos(2)
    Path("photos/bad.jpg").write_bytes(b"")
    result = run("embed", "photos", "-m", model, "-o", "o.csv", "--max-failures", "0")
    assert result.exit_code == 1
    assert "more than the 0 allowed; the first is photos/bad.jpg" in result.stderr
    assert not Path("o.csv").exists()


@pytest.mark.skipif(os.name == "nt", reason="sends signals")
@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_keeps_what_is_done_and_the_same_command_goes_on(model: str, number: str) -> None:
    picture(500, 400).save("large.jpg", quality=95)
    picture(90, 70).save("small.png")
    arguments = [
        "embed",
        *(["large.jpg", "small.png"] * 1000),
        "-m",
        model,
        "-o",
        "o.parquet",
        "--workers",
        "1",
    ]
    # A shell's background process, and all that it starts, ignores Ctrl-C; this one shall not.
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{listen}; from dinokit.cli import main; main()", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    first_part = Path("o.parquet.parts/000000.parquet")
    deadline = time.monotonic() + 60
    while not first_part.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.Signals[number])
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    assert (
        "of 2000 pictures are done and kept in o.parquet.parts. The same command resumes from there; with"
        in stderr
    )
    assert not Path("o.parquet").exists()
    assert not list(Path().glob("**/*.tmp"))

    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    assert " of them earlier" in result.stderr
    assert not Path("o.parquet.parts").exists()
    assert run(*arguments[:-4], "-o", "whole.parquet").exit_code == 0
    resumed, paths, _ = read_embeddings("o.parquet")
    np.testing.assert_allclose(resumed, read_embeddings("whole.parquet").embeddings, atol=1e-6)
    assert paths == ["large.jpg", "small.png"] * 1000


@pytest.mark.parametrize("name", ["run:1.parquet", "file:x.csv", "run:2/t.npy"])
def test_a_name_with_a_colon_is_no_address(model: str, name: str) -> None:
    photos(3)
    assert run("embed", "photos", "-m", model, "-o", name).exit_code == 0
    picture(30, 30).save("photos/new.png")
    again = run("embed", "photos", "-m", model, "-o", name, "--update")
    assert again.exit_code == 0 and len(read_embeddings(name)) == 4
    found = run("search", "photos/new.png", "--in", name, "-m", model, "-k", "1")
    assert found.exit_code == 0, found.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
def test_a_name_that_is_no_utf_8(model: str) -> None:
    photos(2)
    name = os.fsdecode(b"bad\xff.parquet")
    assert run("embed", "photos", "-m", model, "-o", name).exit_code == 0
    assert run("embed", "photos", "-m", model, "-o", name).exit_code == 0  # it is known again


@pytest.mark.parametrize(
    "arguments",
    [
        ("embed", "photos", "-o", "s3://bucket/x.parquet"),
        ("knn", "photos", "--reference", "photos", "-o", "gs://bucket/x.csv"),
        ("train", "photos", "-o", "s3://bucket/run"),
        ("attention", "photos", "-o", "https://host/folder"),
    ],
)
def test_an_address_is_no_output(arguments: tuple[str, ...]) -> None:
    photos(2)
    result = run(*arguments)
    assert result.exit_code == 2 and "is an address, but results are written on this machine" in result.stderr
    assert [path.name for path in Path().iterdir()] == ["photos"]


def test_where_nothing_can_be_written_is_said_before_a_model_is_loaded() -> None:
    photos(1)
    Path("file").write_text("")
    result = run("embed", "photos", "-m", "no/model", "-o", "file/x.parquet")
    assert result.exit_code == 3 and "file/x.parquet cannot be written" in result.stderr


# -- progress


class Terminal:
    """A stream that says it is a terminal."""

    def __init__(self, tty: bool) -> None:
        self.text, self.tty = "", tty

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.tty


def test_progress_draws_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    stream: Any = Terminal(tty=True)
    with open_progress(10, task="embedding", stream=stream) as progress:
        progress.advance(4)
        progress.advance(6, "2 failed")
    assert "embedding" in stream.text
    assert "10/10" in stream.text
    assert "images/s" in stream.text
    assert "2 failed" in stream.text


@pytest.mark.parametrize("columns", [60, 80])
def test_a_long_note_leaves_room_for_how_far_it_is(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    stream: Any = Terminal(tty=True)
    clock = iter((0.0, 1000.0))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock, 1000.0))
    with open_progress(32_000, task="training", stream=stream) as progress:
        progress.advance(12_345, "epoch 0.25, loss 4.695, teacher entropy 0.20, waiting for data 5%")
    assert "12345/32000" in stream.text and "12.3 images/s" in stream.text
    assert "…" in stream.text  # the note is cut off


def test_progress_writes_plain_lines_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    stream: Any = Terminal(tty=False)
    with open_progress(4000, task="embedding", stream=stream) as progress:
        progress.advance(10)
        clock[0] += 9
        progress.advance(10)
        assert stream.text == ""
        clock[0] += 1
        progress.advance(80, "3 failed")
        assert stream.text == "embedding: 100 of 4000 images, 10.0 images/s, 0:06:30 left, 3 failed\n"
    with open_progress(4000, task="embedding", stream=stream, quiet=True) as progress:
        clock[0] += 100
        progress.advance(1)
    assert stream.text.count("\n") == 1
