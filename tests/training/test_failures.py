"""What ends a run from outside: processes that are killed, memory, pictures, two trainings in one folder, signals."""

from __future__ import annotations

import errno
import io
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

torch = pytest.importorskip("torch")

from small_recipe import SMALL_RECIPE
from stop_after import StopAfter

from dinokit.card.run_files import logged_metrics
from dinokit.cli import cli
from dinokit.cli.train import _Console
from dinokit.errors import TrainingError, UsageError
from dinokit.training.interruption import finish_step_on_interrupt
from dinokit.training.recipe import save_recipe
from dinokit.training.run import checkpoint
from dinokit.training.run.failures import failures_in_words
from dinokit.training.run.run_folder import MetricsLog, claim_run_folder, first_line
from dinokit.training.trainer import train

RECIPE = replace(SMALL_RECIPE, batch_size=2, log_every_steps=1, n_local_crops=1)


OUT_OF_CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


class Signals(StopAfter):
    """Sends a signal after so many steps, and keeps what it was told."""

    def __init__(self, steps: int, number: int = signal.SIGINT) -> None:
        super().__init__(steps)
        self.number = number
        self.messages: list[str] = []
        self.warnings: list[str] = []

    def told(self, message: str) -> None:
        self.messages.append(message)

    def warned(self, message: str) -> None:
        self.warnings.append(message)

    def stepped(self, state: Any, n_images: int, metrics: Any) -> None:
        if state.step == self.steps:
            os.kill(os.getpid(), self.number)


class KillsTheReaders(Signals):
    """As the system does when memory runs out."""

    def stepped(self, state: Any, n_images: int, metrics: Any) -> None:
        if state.step == self.steps:
            for child in multiprocessing.active_children():
                assert child.pid is not None
                os.kill(child.pid, signal.SIGKILL)
                child.join()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_killed_reader_is_said_in_words_and_the_run_goes_on(tmp_path: Path, photos: Path) -> None:
    recipe = replace(RECIPE, workers=1, epochs=20)
    with pytest.raises(TrainingError, match=r"ended early .*resumes from the last save, after step 2\b"):
        train([photos], tmp_path / "run", recipe, observer=KillsTheReaders(3))
    on = train([photos], tmp_path / "run", replace(recipe, workers=0), observer=Signals(4))
    assert on.step == 4


@pytest.mark.parametrize(
    ("error", "batch_size", "said"),
    [
        (OUT_OF_CUDA, 64, "memory on the GPU for batch_size=64.*gradient_checkpointing=true. Or: .*accumulate=2$"),
        (OUT_OF_CUDA, 2, "for batch_size=2. Keep fewer activations, .*gradient_checkpointing=true$"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't"), 8, "not enough memory for"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), 8, "--shm-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 8, "memory runs out.*workers=0$"),
        (OSError(errno.ENOSPC, "No space left on device", "log.jsonl"), 8, "no space left on the disk of log.jsonl"),
        (MemoryError("Caught MemoryError in DataLoader worker.\nTraceback"), 8, "^there is not enough memory"),
    ],
)  # fmt: skip
def test_errors_of_torch_become_sentences(
    tmp_path: Path, error: Exception, batch_size: int, said: str
) -> None:
    with (
        pytest.raises(TrainingError) as caught,
        failures_in_words(tmp_path, replace(RECIPE, batch_size=batch_size)),
    ):
        raise error
    message = str(caught.value).replace(". Nothing was saved yet; the same command starts again", "")
    assert re.search(said, message), message
    assert "Traceback" not in message and "Nothing was saved yet" in str(caught.value)


def test_what_is_done_already_is_not_advised(tmp_path: Path) -> None:
    for batch_size, said in (
        (64, "batch_size=64. Compute each batch in more"),
        (2, "2. Start a new run with a smaller"),
    ):
        recipe = replace(RECIPE, batch_size=batch_size, gradient_checkpointing=True)
        with pytest.raises(TrainingError, match=said), failures_in_words(tmp_path, recipe):
            raise OUT_OF_CUDA


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(PermissionError), failures_in_words(tmp_path, RECIPE):
        raise PermissionError(errno.EACCES, "Permission denied")
    with pytest.raises(RuntimeError, match="mat1 and mat2"), failures_in_words(tmp_path, RECIPE):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_one_training_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with claim_run_folder(run, RECIPE):
        pass
    (run / "metrics.jsonl").write_text("theirs\n")
    lock = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", lock, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert other.stdout is not None and other.stdout.readline() == b"1\n"
        with pytest.raises(UsageError, match=r"another training is using .*\(process \d+ on .*another -o"):
            claim_run_folder(run, RECIPE).__enter__()
        assert (run / "metrics.jsonl").read_text() == "theirs\n"
    finally:
        other.kill()
        other.communicate()
    with claim_run_folder(run, RECIPE):  # the lock went with the process
        assert (run / "recipe.yaml").is_file()


def test_a_folder_of_something_else_gets_no_lock(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UsageError, match="neither empty nor a training run"):
        claim_run_folder(tmp_path, RECIPE).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]
    with pytest.raises(UsageError, match="cannot be created or written"):
        claim_run_folder(tmp_path / "thesis.txt", RECIPE).__enter__()


def test_one_source_by_its_name_and_warnings_where_nobody_observes(tmp_path: Path, photos: Path) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    (folder / "bad.png").write_text("no picture")
    recipe = replace(RECIPE, epochs=1)
    with pytest.warns(UserWarning, match=r"left out, .*bad\.png"):
        state = train(str(folder), str(tmp_path / "run"), recipe)
    assert state.step == state.n_steps and (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.filterwarnings("ignore:left out", "ignore:step")  # where nobody observes
def test_steps_whose_pictures_are_all_unreadable_are_passed_over(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(4):
        Image.new("RGB", (40, 40), (60 * i, 90, 200 - 40 * i)).save(photos / f"good{i}.png")
        (photos / f"bad{i}.png").write_text("no picture")
    recipe = replace(RECIPE, epochs=3)
    watching = Signals(-1)
    whole = train([photos], tmp_path / "whole", recipe, observer=watching)
    assert whole.step == whole.n_steps == 12
    lines = (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) < 12, "no batch of this seed has two bad pictures: choose another"
    left_out = [line for line in watching.warnings if line.startswith("left out")]
    assert len(left_out) == len(set(left_out)) == 4  # each once, not once an epoch

    train([photos], tmp_path / "cut", recipe, observer=Signals(7))
    resumed = train([photos], tmp_path / "cut", recipe)
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, resumed.teacher.state_dict()[name]), name
    counts = [[line["unreadable"] for line in logged_metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert counts[0] == counts[1] and counts[0][-1] >= 10


@pytest.mark.filterwarnings("ignore:left out")
def test_a_single_picture_is_passed_over_where_batch_norm_needs_two(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 90, 200 - 40 * i)).save(photos / f"good{i}.png")
    (photos / "bad.png").write_text("no picture")
    recipe = replace(RECIPE, arch="resnet10t", drop_path_rate=0.0, epochs=2, batch_size=6, accumulate=3)
    whole = train([photos], tmp_path / "whole", recipe)
    assert whole.step == whole.n_steps == 2
    train([photos], tmp_path / "cut", recipe, observer=Signals(1))
    resumed = train([photos], tmp_path / "cut", recipe)
    for name, value in whole.teacher.state_dict().items():
        assert torch.equal(value, resumed.teacher.state_dict()[name]), name
    for i in range(1, 5):
        (photos / f"good{i}.png").unlink()
    alone = replace(recipe, batch_size=2, accumulate=1)
    with pytest.raises(TrainingError, match=r"none of 2 steps had 2 readable pictures.*bad\.png"):
        train([photos], tmp_path / "alone", alone)
    assert not (tmp_path / "alone" / "model").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_sigterm_saves_as_ctrl_c_does_and_both_say_what_they_do(tmp_path: Path, photos: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        run, observer = tmp_path / str(number), Signals(1, number)
        before = signal.getsignal(number)
        state = train([photos], run, RECIPE, observer=observer)
        assert state.step == 1 < state.n_steps
        assert len(checkpoint.checkpoints(run / "checkpoint")) == 1
        assert any("a second time stops at once" in message for message in observer.messages)
        assert signal.getsignal(number) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_a_closed_terminal_sends_sighup_twice_and_nohup_ignores_it() -> None:
    with finish_step_on_interrupt(lambda _: None, world_size=1) as interrupted:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
        assert interrupted()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with finish_step_on_interrupt(lambda _: None, world_size=1) as interrupted:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupted()
    finally:
        signal.signal(signal.SIGHUP, before)


IN_A_TERMINAL_THAT_CLOSES = """
import os, pty, sys, time
log, *command = sys.argv[1:]
process, terminal = pty.fork()
if process == 0:
    os.execv(command[0], command)
while not os.path.exists(log):
    os.read(terminal, 1024)
os.close(terminal)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="terminals")
def test_a_run_saves_when_its_terminal_closes(tmp_path: Path, photos: Path) -> None:
    run = tmp_path / "run"
    log = run / "metrics.jsonl"
    save_recipe(replace(RECIPE, arch="resnet10t", drop_path_rate=0.0, epochs=100_000), tmp_path / "long.yaml")
    train_it = ["-m", "dinokit", "train", photos, "-o", run, "--recipe", tmp_path / "long.yaml"]
    command = [sys.executable, "-c", IN_A_TERMINAL_THAT_CLOSES, log, sys.executable, *train_it]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert len(checkpoint.checkpoints(run / "checkpoint")) == 1


def test_many_unreadable_pictures_hide_no_other_warning(capsys: pytest.CaptureFixture[str]) -> None:
    with ExitStack() as stack:
        console = _Console(stack, quiet=True)
        for number in range(25):
            console.warned(f"left out, cannot be read: {number}.jpg")
        console.warned("step 90: the teacher gives every picture the same answer")
        console.summary()
    told = capsys.readouterr().err
    assert "19.jpg" in told and "20.jpg" not in told
    assert "Warning: step 90: the teacher gives" in told
    assert told.endswith("Warning: and 5 more: left out, cannot be read\n")


def test_the_rate_is_that_of_steps_and_not_of_k_nn_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dinokit.cli._progress.time.monotonic", lambda: now[0])
    stream = io.StringIO()
    state: Any = SimpleNamespace(
        recipe=replace(RECIPE, batch_size=10),
        dtype=torch.float32,
        step=0,
        n_steps=10,
        steps_per_epoch=10,
        device="cpu",
    )
    with ExitStack() as stack:
        monkeypatch.setattr("sys.stderr", stream)
        console = _Console(stack, quiet=False)
        console.started(state, 100, [])
        now[0] += 100
        console.told("k-NN before training: 90.0%")
        for _ in range(2):
            now[0] += 10
            console.stepped(state, 10, None)
            console.told("interrupted: finishing this step")
    assert "training: 10 of 100 images, 1.0 images/s, 0:01:30 left" in stream.getvalue()
    assert "training: 20 of 100 images, 1.0 images/s, 0:01:20 left" in stream.getvalue()


@pytest.mark.skipif(sys.platform == "win32", reason="no locks there")
def test_two_threads_do_not_train_in_one_folder(tmp_path: Path, photos: Path) -> None:
    class TrainsToo(Signals):
        def stepped(self, state: Any, n_images: int, metrics: Any) -> None:
            with pytest.raises(UsageError, match=r"another training is using .*\(in this very process"):
                train([photos], tmp_path / "run", RECIPE)

    train([photos], tmp_path / "run", RECIPE, observer=TrainsToo(-1))


# -- the disk, and Ctrl-C as it is written to


class _BreaksOff(io.RawIOBase):
    """A file of which the system takes a thousand bytes; torch's writer then tells of a position that is wrong."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.written = error, 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.written += len(data)
        if self.written > 1000:
            raise self.error
        return len(data)


def _write_to(file: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args, **more: file if self.suffix == ".partial" else opened(self, *args, **more),
    )


LARGE = {"step": 2, "x": torch.ones(10_000)}


def test_ctrl_c_within_a_save_is_no_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, LARGE)
    _write_to(_BreaksOff(KeyboardInterrupt()), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_checkpoint(tmp_path, 2, LARGE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000001.pt"]


def test_a_full_disk_is_said_in_the_systems_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_to(_BreaksOff(OSError(errno.ENOSPC, "No space left on device")), monkeypatch)
    with pytest.raises(
        TrainingError, match=r"\.pt cannot be written: No space left on device\. Free some"
    ) as said:
        checkpoint.save_checkpoint(tmp_path, 2, LARGE)
    assert str(said.value).endswith("Nothing was saved yet; the same command starts again")
    assert "another -o" not in str(said.value)
    (tmp_path / "step-0000000001.pt").touch()
    _write_to(_BreaksOff(OSError(errno.ENOSPC, "No space left on device")), monkeypatch)
    with pytest.raises(TrainingError, match=r"resumes from the last save, after step 1$"):
        checkpoint.save_checkpoint(tmp_path, 2, LARGE)


def test_what_a_killed_run_was_writing_goes_with_the_next_save(tmp_path: Path) -> None:
    (tmp_path / "step-0000000002.partial").write_bytes(b"half of it")
    checkpoint.save_checkpoint(tmp_path, 3, LARGE)
    assert [path.name for path in tmp_path.iterdir()] == ["step-0000000003.pt"]


@pytest.mark.skipif(sys.platform == "win32", reason="names")
def test_what_a_killed_run_left_beside_its_model_goes(tmp_path: Path) -> None:
    with claim_run_folder(tmp_path, RECIPE):
        pass
    for name in ("model", ".model.new-7-aa", ".model.old-7-bb"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    (tmp_path / ".recipe.yaml.7-cc.tmp").write_text("arch")
    with claim_run_folder(tmp_path, RECIPE):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "model", "recipe.yaml"]
        assert (tmp_path / "model" / "weights").read_text() == "model"
    # Killed between the two renames of a save.
    (tmp_path / "model").rename(tmp_path / ".model.old-7-bb")
    with claim_run_folder(tmp_path, RECIPE):
        assert (tmp_path / "model" / "weights").read_text() == "model"


def test_a_checkpoint_of_something_else_is_passed_over(tmp_path: Path) -> None:
    checkpoint.save_checkpoint(tmp_path, 1, LARGE)
    torch.save([1, 2], tmp_path / "step-0000000002.pt")
    torch.save({"weight": torch.ones(2)}, tmp_path / "step-0000000003.pt")
    state, warnings = checkpoint.load_newest(tmp_path)
    assert state is not None and state["step"] == 2 and len(warnings) == 2
    assert (
        warnings[0]
        == "the checkpoint step-0000000003.pt is damaged (it is not a checkpoint); the one before is used"
    )
    (tmp_path / "step-0000000001.pt").write_bytes(b"")
    with pytest.raises(
        TrainingError, match=r"none of the 3 .* the newest, step-0000000003.pt: it is not a checkpoint\. Re"
    ):
        checkpoint.load_newest(tmp_path)


def test_a_full_disk_costs_neither_recipe_nor_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_recipe(RECIPE, tmp_path / "recipe.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self: Path, text: str, **_: Any) -> int:
        self.write_bytes(text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    for write in (
        lambda: save_recipe(replace(RECIPE, workers=1), tmp_path / "recipe.yaml"),
        lambda: MetricsLog(tmp_path / "metrics.jsonl", 1),
    ):
        with pytest.raises(OSError, match="No space left") as caught:
            write()
        assert Path(caught.value.filename).name in before  # not of the temporary file
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_damaged_lines_of_metrics_cost_no_others(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    good = ['{"step": 0, "loss": 1}', '{"step": 1}', '{"step": 2}']
    damaged = [b'{"step": \x8a\xff', b"[1]", b"3", b'{"loss": 1}', b'{"step": "1"}', b"\0\0\0"]
    for at in range(len(good) + 1):
        lines = [line.encode() for line in good]
        file.write_bytes(b"\n".join([*lines[:at], *damaged, *lines[at:]]) + b"\n")
        assert first_line(file) == {"step": 0, "loss": 1}
        with MetricsLog(file, 1):
            pass
        assert file.read_text().splitlines() == good[:2]
    for line in damaged:
        file.write_bytes(line + b"\n")
        assert first_line(file) == {}


def test_the_second_ctrl_c_says_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dinokit.training.trainer.train", pressed)
    words = ["train", str(tmp_path), "-o", str(tmp_path / "run")]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 130 and result.stdout == ""
    assert result.stderr == "Interrupted. Nothing was saved yet; the same command starts again.\n"
    # Stopped in order, before any step had a picture that could be read.
    passed_over = SimpleNamespace(step=1, n_steps=4, processes=SimpleNamespace(is_first=True))
    monkeypatch.setattr("dinokit.training.trainer.train", lambda *_, **__: passed_over)
    again = CliRunner().invoke(cli, words)
    assert (again.exit_code, again.stdout, again.stderr) == (130, "", result.stderr)
    monkeypatch.setattr("dinokit.training.trainer.train", pressed)
    checkpoint.save_checkpoint(tmp_path / "run" / "checkpoint", 7, LARGE)
    result = CliRunner().invoke(cli, words)
    assert result.stderr == "Interrupted. The same command resumes from the last save, after step 7.\n"
