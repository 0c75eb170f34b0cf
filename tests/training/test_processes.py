"""A batch in pieces, over two processes or killed in between: the same weights as the whole batch in one go."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from pico_vit import PICO
from two_processes import PATIENCE_S, run_command, train_command

from dinokit.errors import UsageError
from dinokit.training.devices.processes import Processes
from dinokit.training.recipe import load_recipe, with_overrides
from dinokit.training.run import checkpoint
from dinokit.training.trainer import train
from dinokit.training.views.data import _Order

SETTINGS = [
    "arch=vit_tiny_patch16_224",
    "global_crop_px=32",
    "local_crop_px=16",
    "n_local_crops=1",
    "n_prototypes=16",
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "epochs=3",
    "batch_size=4",
    "warmup_epochs=1",
    "freeze_last_layer_epochs=1",
    # AdamW and clipping would hide gradients of another scale.
    "optimizer=sgd",
    "lr=0.01",
    "clip_grad=0",
    # Stochastic depth would draw other numbers for other pieces.
    "drop_path_rate=0.0",
    "log_every_steps=1",
    "precision=fp32",
    "workers=0",
    "device=cpu",
    "tensorboard=false",
]
RECIPE = with_overrides(load_recipe("default"), SETTINGS)


def saved(run: Path) -> dict[str, Any]:
    state, warnings = checkpoint.load_newest(run / "checkpoint")
    assert state is not None and not warnings
    return state


def assert_same_weights(one: dict[str, Any], other: dict[str, Any], *, atol: float) -> None:
    assert one["step"] == other["step"] > 0
    for part in ("student", "teacher", "targets"):
        for name, value in one[part].items():
            torch.testing.assert_close(other[part][name], value, rtol=0, atol=atol, msg=f"{part}.{name}")


@pytest.fixture
def four_photos(tmp_path: Path, photos: Path) -> Path:
    """Four pictures: a step an epoch."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for path in sorted(photos.glob("*.jpg"))[:4]:
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.mark.parametrize("accumulate", [2, 4])
def test_a_batch_in_pieces_gives_the_weights_of_the_whole(
    tmp_path: Path, four_photos: Path, accumulate: int
) -> None:
    recipe = replace(RECIPE, arch=PICO)
    train([four_photos], tmp_path / "whole", recipe)
    train([four_photos], tmp_path / "pieces", replace(recipe, accumulate=accumulate))
    assert_same_weights(saved(tmp_path / "whole"), saved(tmp_path / "pieces"), atol=1e-5)


def test_two_processes_give_the_weights_of_one(tmp_path: Path, four_photos: Path) -> None:
    train([four_photos], tmp_path / "one", RECIPE)
    done = run_command(train_command([four_photos], tmp_path / "two", [*SETTINGS, "devices=2"]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(tmp_path / "two" / "model")]  # said once, not by each process
    two = saved(tmp_path / "two")
    assert len(two["torch_rng"]) == 2
    assert_same_weights(saved(tmp_path / "one"), two, atol=1e-5)


@pytest.mark.filterwarnings("ignore:step")  # verdicts on so small a run
def test_killed_runs_end_with_the_same_weights(tmp_path: Path, four_photos: Path) -> None:
    # A checkpoint a step; kill -9 as soon as there is one, twice.
    settings = ("epochs=10", "drop_path_rate=0.2")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train([four_photos], whole, with_overrides(RECIPE, settings))
    for kills in range(1, 3):
        command = train_command([four_photos], cut, [*SETTINGS, *settings])
        process = subprocess.Popen(command, stderr=subprocess.PIPE)
        deadline = time.monotonic() + PATIENCE_S
        while len(list((cut / "checkpoint").glob("*.pt"))) < min(kills, 2) and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    at = saved(cut)["step"]
    train([four_photos], cut, with_overrides(RECIPE, settings))
    assert at < 10  # the second kill, too, came before the end
    assert_same_weights(saved(whole), saved(cut), atol=0)


def test_the_pieces_of_all_processes_are_the_batch() -> None:
    recipe = replace(RECIPE, batch_size=12, epochs=2, accumulate=3)
    batches = list(_Order(25, replace(recipe, accumulate=1), 1))
    per_process = [list(_Order(25, recipe, 1, rank=rank, world_size=2)) for rank in range(2)]
    assert len(batches) == 3 and all(len(pieces) == 9 for pieces in per_process)
    for step, batch in enumerate(batches):
        pieces = [piece for process in per_process for piece in process[3 * step : 3 * step + 3]]
        assert [len(piece) for piece in pieces] == [2] * 6
        assert [key for piece in pieces for key in piece] == batch


def test_a_share_that_does_not_come_out_even_is_refused() -> None:
    with pytest.raises(UsageError, match="batch_size=4 is not a multiple of accumulate"):
        replace(RECIPE, accumulate=3)


def test_several_processes_need_a_device_for_each() -> None:
    with pytest.raises(UsageError, match="device=cuda or device=cpu"):
        Processes.start("cpu:0" if not torch.cuda.is_available() else "cuda:0", devices=2)


def test_what_cannot_be_started_again_is_said_with_how_to_start_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import __main__

    monkeypatch.setattr(__main__, "__spec__", None)
    for name in ("", "-", "-c"):
        monkeypatch.setattr("sys.argv", [name])
        with pytest.raises(UsageError, match=r"this one \(.*\) is not a file\. Start it as a script"):
            Processes.start("cpu", devices=2)


def test_a_slurm_job_without_srun_does_not_wait_for_its_other_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_JOB_NAME", "train")
    with pytest.raises(UsageError, match="has 2 tasks, but srun did not start this process"):
        Processes.start("cpu")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # an interactive shell
    assert Processes.start("cpu").world_size == 1


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_the_launcher_decides_the_number_of_processes(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {
        "srun": {"SLURM_NTASKS": "6", "SLURM_STEP_NUM_TASKS": "6", "SLURM_NTASKS_PER_NODE": "3"},
        "torchrun": {"WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "3"},
    }
    for name, value in variables[launcher].items():
        monkeypatch.setenv(name, value)

    def asked(**options: object) -> None:
        raise ValueError(f"{options['devices']} devices, {options['num_nodes']} nodes")

    monkeypatch.setattr("lightning_fabric.Fabric", asked)
    with pytest.raises(UsageError, match="3 devices, 2 nodes"):
        Processes.start("cpu")
