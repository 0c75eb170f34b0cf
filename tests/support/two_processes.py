"""Two processes of one training run, for tests: on this machine's CPU, by gloo, without a launcher."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from pico_vit import PICO

from dinokit.training.devices.processes import Processes
from dinokit.training.networks.network import build_network
from dinokit.training.objectives.masks import HiddenPatches
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.run.state import TrainingState
from dinokit.training.trainer import training_step

N_PROCESSES = 2
STEPS = 3

PATIENCE_S = 3600.0
"""How long is waited for other processes. It bounds a hang and measures nothing: on a machine that has other work they
take a hundred times as long as on an idle one, and whoever is ready is not waited for."""

SETTINGS = [
    f"arch={PICO}",
    "global_crop_px=32",
    "local_crop_px=16",
    "n_local_crops=1",
    "n_prototypes=15",  # not the same number of rows in each process
    "head_hidden_dim=16",
    "head_bottleneck_dim=8",
    "epochs=3",
    "warmup_epochs=0",
    "freeze_last_layer_epochs=1",
    "teacher_momentum=0.9",
    "teacher_temp=0.04",
    "warmup_teacher_temp=0.04",
    "warmup_teacher_temp_epochs=0",
    # AdamW and clipping would hide gradients of another scale.
    "optimizer=sgd",
    "lr=0.05",
    "clip_grad=0",
    # Stochastic depth would draw other numbers for other pieces.
    "drop_path_rate=0.0",
    "precision=fp32",
    "device=cpu",
]

# Where a few values are normalised gradients are large, and at a high rate rounding grows from step to step.
RESNET = (
    "arch=resnet10t",
    "global_crop_px=64",
    "local_crop_px=32",
    "head_batch_norm=true",
    "predictor=true",
    "lr=0.00005",
)


@dataclass(frozen=True)
class Case:
    """A recipe, and how many pictures each process gets in each piece of a batch."""

    settings: tuple[str, ...] = ()
    pieces: tuple[tuple[int, ...], tuple[int, ...]] = ((3,), (2,))
    """Of the first process, and of the second."""


def of_two(
    function: Callable[[int, str], None], folder: Path, *, patience_s: float = PATIENCE_S
) -> list[Any]:
    """Runs ``function(rank, folder)`` in two processes that are joined to a group.

    Returns:
        What each has saved as ``folder/{rank}.pt``.

    Raises:
        AssertionError: one of them failed, or they are not done in time; with what both have said.
    """
    started: Any = torch.multiprocessing.spawn(
        _joined, args=(function, str(folder)), nprocs=N_PROCESSES, join=False
    )
    deadline = time.monotonic() + patience_s
    try:
        while not started.join(timeout=max(deadline - time.monotonic(), 0.0)):
            if time.monotonic() >= deadline:
                raise TimeoutError(f"two processes were not done after {patience_s:g} s, and were ended")
    except Exception as error:
        _end(started.processes)
        said = (f"-- process {rank} said:\n{_read(folder / f'{rank}.log')}" for rank in range(N_PROCESSES))
        raise AssertionError("\n".join([str(error), *said])) from error
    except BaseException:  # Ctrl-C: they would wait for each other for ever
        _end(started.processes)
        raise
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(N_PROCESSES)]


def _joined(rank: int, function: Callable[[int, str], None], folder: str) -> None:
    log = os.open(f"{folder}/{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    faulthandler.enable(file=2)  # who is ended by SIGABRT says where it was
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meet",
        rank=rank,
        world_size=N_PROCESSES,
        timeout=timedelta(seconds=2 * PATIENCE_S),  # who waits here says less than who waits for both
    )
    function(rank, folder)
    torch.distributed.destroy_process_group()


def run_command(words: Sequence[str], *, patience_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """Runs a command that may start further processes, one thread each, and waits for it.

    Returns:
        Its exit status, and what it wrote.

    Raises:
        AssertionError: it is not done in time; with what it has written. It and all that it started are ended.
    """
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1"},
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired as error:
        os.killpg(process.pid, signal.SIGABRT)
        stdout, stderr = process.communicate()
        raise AssertionError(
            f"{' '.join(words)} was not done after {patience_s:g} s, and was ended\n-- stdout:\n{stdout}\n"
            f"-- stderr, and where each of its processes was:\n{stderr}"
        ) from error
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)


def train_command(pictures: Iterable[Path | str], run: Path, settings: Iterable[str]) -> list[str]:
    """``dinokit train`` of this installation, with ``--set`` for each setting."""
    words = [sys.executable, "-m", "dinokit", "train", *map(str, pictures), "-o", str(run), "--quiet"]
    return words + [word for setting in settings for word in ("--set", setting)]


def _end(processes: Sequence[Any]) -> None:
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGABRT)
    for process in processes:
        process.join(10.0)  # to write where it was
        process.kill()
        process.join()


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else "nothing"


def recipe_of(case: Case) -> Recipe:
    return with_overrides(load_recipe("default"), [*SETTINGS, *case.settings])


def new_state(recipe: Recipe, processes: Processes) -> TrainingState:
    """The same weights in all processes, and in one alone."""
    torch.manual_seed(0)
    student, teacher = (build_network(recipe, is_student=student) for student in (True, False))
    return TrainingState.create(recipe, student, teacher, steps_per_epoch=2, processes=processes)


def train(
    case: Case, processes: Processes, *, until: int = STEPS, saved: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Trains on the pictures of one process, or on all in one piece, and goes on from what was saved.

    Returns:
        The state in the end, and each step's loss and norm of gradients as ``results``.
    """
    recipe = recipe_of(case)
    state = new_state(recipe, processes)
    if saved is not None:
        state.load_state_dict(saved)
    draw = torch.Generator().manual_seed(5)
    results = []
    for step in range(until):
        pieces, hidden = [], []
        for views, n_pictures, masks in _pieces(case, processes, draw, recipe):
            assert views[0].shape[1] == n_pictures
            pieces.append(views)
            hidden.append(HiddenPatches.of(masks, processes.device))
        if step < state.step:  # its crops are drawn all the same
            continue
        result = training_step(state, *pieces, hidden=hidden if recipe.ibot_weight else None)
        results.append(torch.stack([result.loss, result.grad_norm]))
    return {**state.state_dict(), "results": torch.stack(results)}


def _pieces(case: Case, processes: Processes, draw: Any, recipe: Recipe) -> list[tuple[list[Any], int, Any]]:
    """Of each piece the crops, the number of pictures and the masks; all processes draw the same batch."""
    counts = [count for of_process in case.pieces for count in of_process]
    channels, size, small = recipe.channels, recipe.global_crop_hw, recipe.local_crop_hw
    crops = [
        torch.randn(2, sum(counts), channels, *size, generator=draw),
        torch.randn(recipe.n_local_crops, sum(counts), channels, *small, generator=draw),
    ][: 2 if recipe.n_local_crops else 1]
    masks = torch.rand(2, sum(counts), 2, 2, generator=draw) < 0.4
    masks[..., 0, 0] = True
    if processes.world_size == 1:
        counts, first = [sum(counts)], 0
        here = counts
    else:
        first = sum(sum(of_process) for of_process in case.pieces[: processes.rank])
        here = list(case.pieces[processes.rank])
    found = []
    for count in here:
        of_piece = slice(first, first + count)
        found.append(([c[:, of_piece] for c in crops], count, masks[:, of_piece]))
        first += count
    return found


def assert_same_training(
    one: dict[str, Any], other: dict[str, Any], *, atol: float, what: str = "", but_for: str = "nothing"
) -> None:
    """Weights, buffers, centre, optimiser state, losses and norms of gradients.

    Args:
        one, other: of :func:`train`; ``other`` may have the last steps only.
        atol: of weights and buffers, relative to the largest of a tensor where that is above 1; a thousand times as
            much of the optimiser's sums of gradients, relative to the largest of all: where a norm or a softmax follows
            the gradient of a bias is 0, and what is found is rounding, and a ReLU that rounding opens is a step.
        what: said where they differ.
        but_for: what tensors with this in their name are, is not compared.
    """
    assert one["step"] == other["step"] > 0
    for part in ("student", "teacher", "targets", "masked_patches"):
        assert one[part].keys() == other[part].keys()
        for name, value in one[part].items():
            if but_for not in name:
                largest = max(float(value.abs().max()), 1.0)
                _close(other[part][name], value, atol * largest, f"{what} {part}.{name}")
    sums, others = _sums(one["optimizer"]), _sums(other["optimizer"])
    assert sums.keys() == others.keys()
    largest = max((float(value.abs().max()) for value in sums.values()), default=1.0)
    for key, value in sums.items():
        _close(others[key], value, 1000 * atol * largest, f"{what} optimizer {key}")
    n_steps = len(other["results"])
    torch.testing.assert_close(other["results"], one["results"][-n_steps:], rtol=100 * atol, atol=atol)


def _sums(optimizer: dict[str, Any]) -> dict[tuple[int, str], Any]:
    found = {
        (index, key): value for index, values in optimizer["state"].items() for key, value in values.items()
    }
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def _close(found: Any, expected: Any, atol: float, what: str) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol, msg=lambda reason: f"{what}: {reason}")
