"""Errors of the surroundings become one sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from dinokit.cli import cli


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            MemoryError("Unable to allocate 698. TiB"),
            r"not enough memory \(Unable to allocate 698. TiB\); a smaller",
        ),
        (MemoryError(), "there is not enough memory; a smaller --batch-size"),
        (
            ModuleNotFoundError("No module named 'pyarrow'"),
            r"No module named 'pyarrow'\); dinokit doctor says",
        ),
    ],
)
def test_memory_and_installation(
    error: Exception, says: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("dinokit.loading.load_backbone", fail)
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
