"""A test that waits for other processes says what they said when they hang, and leaves none of them behind."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from two_processes import run_command


def test_a_command_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    # It starts another, as a run of several processes does, and waits for it.
    words = ["sh", "-c", f"echo begun; (while :; do echo >> {beats}; sleep 0.1; done) & wait"]
    with pytest.raises(AssertionError, match=r"(?s)was not done after 3 s, and was ended.*stdout:\nbegun"):
        run_command(words, patience_s=3.0)
    seen = beats.read_text()
    time.sleep(0.5)
    assert beats.read_text() == seen


def test_a_command_gives_its_status_and_what_it_wrote() -> None:
    done = run_command(["sh", "-c", "echo out; echo err >&2; exit 3"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "err\n")
