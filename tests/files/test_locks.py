"""One process at a time at a result, and what each is told: locks held by real other processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_engine import InterruptedEngine, backbone_of
from small_models import picture

from dinokit.errors import UsageError
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.tables.run import Interrupted, RunSummary, Share, embed_to_table, parts_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no locks there")

# Not by `held`: the system is to say whether the lock is there.
_HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, getattr(fcntl, sys.argv[2]))
print(flush=True)
input()
"""


@contextmanager
def another_process_holds(file: Path, kind: str = "LOCK_EX") -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(file), kind], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"\n"
        yield
    finally:
        process.kill()
        process.communicate()


def can_take(file: Path, kind: str) -> bool:
    code = (
        "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a+'), getattr(fcntl, sys.argv[2]) | fcntl.LOCK_NB)"
    )
    return subprocess.run([sys.executable, "-c", code, str(file), kind], capture_output=True).returncode == 0


def test_a_lock_is_there_in_the_block_only(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    with held(file):
        assert not can_take(file, "LOCK_EX") and not can_take(file, "LOCK_SH")
    assert can_take(file, "LOCK_EX")
    with held(file, shared=True):
        assert not can_take(file, "LOCK_EX") and can_take(file, "LOCK_SH")
    assert can_take(file, "LOCK_EX")


def test_what_another_holds_goes_with_it(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    file.write_text("process 7 on mars\n")
    with another_process_holds(file):
        for shared in (False, True):
            with pytest.raises(HeldElsewhereError, match="process 7 on mars"), held(file, shared=shared):
                pytest.fail("two hold it")
    with another_process_holds(file, "LOCK_SH"), held(file, shared=True):
        assert file.read_text() == ""  # nobody holds it alone
    with held(file):
        assert file.read_text().startswith("process ")


def test_threads_of_one_process_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "lock"
    (tmp_path / "link").symlink_to(tmp_path)
    with held(file):
        for shared in (False, True):
            refused = pytest.raises(HeldElsewhereError, match=f"in this very process, {os.getpid()}")
            with refused, held(tmp_path / "link" / "lock", shared=shared):
                pytest.fail("two hold it")
        assert not can_take(file, "LOCK_SH")  # the refused have given nothing away
        with held(tmp_path / "other"):
            pass
    with held(file, shared=True), held(file, shared=True):
        pass
    with held(file):
        pass


def test_a_lock_can_be_waited_for(tmp_path: Path) -> None:
    """Of another process, of another thread, and by two threads at once, of which one has it at a time."""
    file = tmp_path / "lock"
    inside: list[int] = []
    most: list[int] = []

    def work(number: int) -> None:
        with held(file, wait=True):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.05)
            inside.remove(number)

    with ThreadPoolExecutor(3) as pool:
        with another_process_holds(file):
            futures = [pool.submit(work, number) for number in range(3)]
            time.sleep(0.2)
            assert not most
        for future in futures:
            future.result(timeout=10)
    assert most == [1, 1, 1]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{i}.png" for i in range(6)]
    for i, path in enumerate(paths):
        picture(40 + i, 60 - i, seed=i).save(path)
    return paths


def embed(files: list[Path], output: Path, *, stop_at: int = 10**9, **options: object) -> RunSummary:
    engine = InterruptedEngine(stop_at)
    return embed_to_table(files, output, backbone_of(engine), batch_size=2, shard_size=2, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"share": Share(1, 2)}])
def test_two_embeds_do_not_write_over_each_other(
    files: list[Path], tmp_path: Path, options: dict[str, object]
) -> None:
    output = tmp_path / "t.parquet"
    with pytest.raises(Interrupted):
        embed(files, output, stop_at=1)
    parts = parts_folder(output)
    before = {path.name: path.read_bytes() for path in parts.iterdir()}
    assert len(before) > 2
    with (
        another_process_holds(parts / ".lock"),
        pytest.raises(UsageError, match=r"at work on .*t\.parquet \(process"),
    ):
        embed(files, output, **options)
    assert {path.name: path.read_bytes() for path in parts.iterdir()} == before
    assert embed(files, output).resumed == 2
    assert not parts.exists()


def test_shares_work_beside_each_other_but_not_beside_one_without(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    embed(files, output, share=Share(1, 2))
    parts = parts_folder(output)
    with another_process_holds(parts / ".lock", "LOCK_SH"):
        with pytest.raises(UsageError, match="another embed is at work"):
            embed(files, output)
        assert embed(files, output, share=Share(2, 2)).written


def test_overwrite_forgets_what_was_done(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    with pytest.raises(Interrupted):
        embed(files, output, stop_at=1)
    assert embed(files, output, overwrite=True).resumed == 0
    assert not parts_folder(output).exists()
