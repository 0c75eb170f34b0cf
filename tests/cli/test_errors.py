"""Errors of the surroundings become one sentence and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dinokit.cli import _describe, cli


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            MemoryError("Unable to allocate 698. TiB"),
            r"out of memory \(Unable to allocate 698. TiB\); use a smaller",
        ),
        (MemoryError(), "out of memory; use a smaller --batch-size"),
        (
            ModuleNotFoundError("No module named 'pyarrow'"),
            r"No module named 'pyarrow'\); run dinokit doctor to see",
        ),
        (
            ModuleNotFoundError("No module named 'dinokit.export'", name="dinokit.export"),
            r"from the source folder .*dinokit, which lacks it; run this in another folder, or install the clone",
        ),
    ],
)
def test_memory_and_installation(
    error: Exception, says: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("dinokit.loading.load.load_backbone", fail)
    arguments = ["embed", str(photos), "-o", str(tmp_path / "x.csv")]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 3 and "Traceback" not in result.stderr
    assert re.search(says, result.stderr)
    monkeypatch.setenv("DINOKIT_DEBUG", "1")
    assert CliRunner().invoke(cli, arguments).exception is error


def test_an_empty_name_is_not_the_current_folder(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As "$PHOTOS" in a script gives it where the variable is not set."""
    monkeypatch.chdir(photos)
    result = CliRunner().invoke(cli, ["embed", "", "-o", str(tmp_path / "x.csv")])
    assert result.exit_code == 3 and "an empty name was given" in result.stderr


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_a_reader_that_went_away_is_no_error(options: tuple[str, ...]) -> None:
    """As `dinokit models | head -1`; the table is rich's, which would end the process with 1."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dinokit", "models", *options]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(os.name == "nt", reason="a POSIX shell")
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_the_shell_closed(closed: str, photos: Path, tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m dinokit embed {shlex.quote(str(photos))} -o x.npy {closed}"
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert np.load(tmp_path / "x.npy", allow_pickle=False).shape[1] == 192


@pytest.mark.parametrize(
    ("encoding", "command", "shown"),
    [
        (
            "cp1252",
            ["duplicates", "photos", "--threshold", "-0.99"],
            "photos/\\u2192.jpg",
        ),  # a pipe on Windows
        ("ascii", ["models"], "MB"),
        ("utf-8", ["duplicates", "photos", "--threshold", "-0.99"], "photos/→.jpg"),
    ],
)
def test_what_the_encoding_of_the_output_lacks(
    encoding: str, command: list[str], shown: str, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for name in ("→.jpg", "b.jpg"):
        shutil.copy(next(photos.glob("*.jpg")), tmp_path / "photos" / name)
    done = subprocess.run(
        [sys.executable, "-m", "dinokit", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout.decode(encoding)


_NOBODY = "http://127.0.0.1:9"  # the port of "discard", where nobody listens
_WITHOUT_WAITING = (
    "import sys, time; time.sleep = lambda _: None; from dinokit.cli import main; main(sys.argv[1:])"
)


@pytest.mark.parametrize(
    "command",
    [
        ("pull", "user/model"),
        ("info", "user/model"),
        ("embed", "PHOTOS", "-m", "dino_vits16", "-o", "x.csv"),
        ("embed", "PHOTOS", "-m", "dino_vits16", "-o", "x.csv", "--quiet"),
    ],
)
def test_an_unreachable_hub_is_told_in_our_words_only(
    command: tuple[str, ...], photos: Path, tmp_path: Path
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_WAITING, *(str(photos) if a == "PHOTOS" else a for a in command)],
        cwd=tmp_path,
        env=kept | {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": _NOBODY},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (3, "")
    *before, last = done.stderr.splitlines()
    assert last.startswith("Error: ") and "the Hub cannot be reached" in last
    assert before in ([], ["The Hub does not answer; trying again for up to half a minute."])
    assert not ("--quiet" in command and before)


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("start", ["module", "script"])
def test_an_interruption_while_python_imports(start: str, tmp_path: Path) -> None:
    """Ctrl-C in the first moments, when the command is not there yet to answer it."""
    # A test runner that was started in the background hands on that SIGINT is ignored.
    lines = (
        "import os, signal",
        "signal.signal(signal.SIGINT, signal.default_int_handler)",
        "os.kill(os.getpid(), signal.SIGINT)",
    )
    (tmp_path / "click.py").write_text("\n".join(lines) + "\n")
    module, _, function = _entry_point().partition(":")
    script = f"import sys\nfrom {module} import {function}\nsys.exit({function}())"  # as pip writes it
    arguments = ["-m", "dinokit"] if start == "module" else ["-c", script]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *arguments, "models"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "Interrupted.\n")


def _entry_point() -> str:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    entry = pyproject["project"]["scripts"]["dinokit"]
    assert isinstance(entry, str)
    return entry


def test_a_full_disk_without_a_name_says_where_to_look() -> None:
    assert _describe(OSError(errno.ENOSPC, "No space left on device")) == (
        "No space left on device while writing the result or temporary files (TMPDIR)"
    )
    assert (
        _describe(OSError(errno.ENOSPC, "No space left on device", "a.csv"))
        == "a.csv: No space left on device"
    )
    assert _describe(OSError(errno.EIO, "Input/output error")) == "Input/output error"


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_of_stderr_that_went_away_does_not_end_the_work(
    unbuffered: str, photos: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "dinokit", "embed", str(photos), "-o", "x.npy"]
    done = subprocess.run(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=writing, env=environment, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stdout) == (0, b"x.npy\n")
    assert (tmp_path / "x.npy").is_file()


@pytest.mark.skipif(os.name == "nt", reason="pipes of POSIX")
def test_another_pipe_that_broke_is_an_error() -> None:
    code = (
        "import dinokit.loading.zoo, dinokit.cli.models as m\n"
        "def broken(): raise BrokenPipeError(32, 'Broken pipe')\n"
        "m._zoo_rows = broken\n"
        "from dinokit.cli import main; main(['models'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        3,
        "Error: a pipe to another process broke; run the command again\n",
    )


@pytest.mark.skipif(sys.platform != "linux", reason="names of files that are not UTF-8")
def test_names_that_are_not_utf8_are_printed_as_they_are(photos: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    source = os.fsencode(sorted(photos.glob("*.jpg"))[0])

    def dinokit(*args: str | bytes) -> bytes:
        command = [os.fsencode(arg) for arg in (sys.executable, "-m", "dinokit", *args, "-q")]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout

    assert dinokit("embed", str(photos), "-o", b"x\xff.parquet") == b"x\xff.parquet\n"
    assert dinokit("select", b"x\xff.parquet", "-n", "2", "-o", b"c\xff.csv") == b"c\xff.csv\n"
    assert dinokit("duplicates", b"x\xff.parquet", "-o", b"d\xff.csv") == b"d\xff.csv\n"
    assert dinokit("search", source, "--in", b"x\xff.parquet", "--sheet", b"s\xff.png") == b"s\xff.png\n"
    assert dinokit("attention", source, "-o", b"a\xff") == b"a\xff\n"
    assert dinokit("atlas", b"x\xff.parquet", "-o", b"y\xff.html") == b"y\xff.html\n"
    assert "<title>x\\xff.parquet" in next(tmp_path.glob("y*.html")).read_text(encoding="utf-8")
