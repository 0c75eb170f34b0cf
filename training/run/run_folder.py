"""The run folder: whose it is, that one training at a time works in it, and the lines of metrics in it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinokit.errors import UsageError
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.files.outputs import atomic
from dinokit.training.monitoring.snapshots import forget_snapshots
from dinokit.training.recipe import Recipe, load_recipe, save_recipe
from dinokit.training.run import checkpoint

__all__ = ["MetricsLog", "claim_run_folder", "first_line", "recipe_of"]

_LOCK = ".lock"


@contextlib.contextmanager
def claim_run_folder(run: Path, recipe: Recipe) -> Iterator[None]:
    """Writes recipe.yaml, or checks that the run that is there has the same one; nobody else may claim it inside.

    Raises:
        UsageError: it cannot be made or written, holds something else or another run, or another training is at work
            in it.
    """
    with _alone_in(run):
        file = run / "recipe.yaml"
        before = file.read_bytes() if file.exists() else None
        _clear(run)
        _claim(run, recipe)
        try:
            yield
        except BaseException as error:
            if before is None:
                _forget_if_nothing_was_done(run)
            elif isinstance(
                error, UsageError
            ):  # what was refused, such as another teacher, is not the run's recipe
                with contextlib.suppress(OSError), atomic(file) as again:
                    again.write_bytes(before)
            raise


def _forget_if_nothing_was_done(run: Path) -> None:
    """A run that was refused, for its device or what it begins with, leaves no folder behind."""
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} <= {_LOCK, "recipe.yaml"}:
            for path in run.iterdir():
                path.unlink()
            run.rmdir()


@contextlib.contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """Two trainings would write over each other's checkpoints."""
    with contextlib.ExitStack() as stack:
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not (run / "recipe.yaml").exists() and any(path.name != _LOCK for path in run.iterdir()):
                raise UsageError(
                    f"{run} is neither empty nor a training run (no recipe.yaml); choose another -o"
                )
            stack.enter_context(held(run / _LOCK))
        except HeldElsewhereError as error:
            raise UsageError(
                f"another training is at work in {run} ({error.holder}); wait for its end or stop it, or choose "
                "another -o"
            ) from error
        except OSError as error:
            raise UsageError(
                f"the run folder {run} cannot be made or written: {error.strerror or error}; choose another -o"
            ) from error
        yield


def _clear(run: Path) -> None:
    """Takes away what a killed run was writing (`outputs.py`); of two renames the second may be missing."""
    for old in run.glob(".model.old-*"):
        if not (run / "model").exists():
            old.replace(run / "model")
    for left in [*run.glob(".model.*-*"), *run.glob(".*.tmp")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _claim(run: Path, recipe: Recipe) -> None:
    path = run / "recipe.yaml"
    if path.exists() and not checkpoint.checkpoints(run / "checkpoint"):
        path.unlink()  # a start that came to nothing binds nobody
        (run / "metrics.jsonl").unlink(missing_ok=True)
        forget_snapshots(run)
    if not path.exists():
        save_recipe(recipe, path)
        return
    before = asdict(load_recipe(path))
    # These change how a run is watched or where it runs, not what it computes.
    free = {
        "save_every_epochs",
        "save_every_minutes",
        "keep_checkpoints",
        "log_every_steps",
        "labelled",
        "labelled_queries",
        "knn_every_epochs",
        "knn_images",
        "tensorboard",
        "workers",
        "device",
        "devices",
        "num_nodes",
        "strategy",
        "accumulate",
        "gradient_checkpointing",
    }
    if recipe.teachers and before["distill_from"]:
        free.add("distill_from")  # it may have moved: the checkpoint knows its weights, and refuses others
    now = asdict(recipe)
    changed = [f"{k}: {before[k]} there, {now[k]} now" for k in now if now[k] != before[k] and k not in free]
    if changed:
        raise UsageError(
            f"{run} holds a run with another recipe ({'; '.join(changed)}). Use the same settings and pictures to go "
            "on with it, or another -o to start a new one"
        )
    save_recipe(recipe, path)


def recipe_of(run: Path) -> Recipe | None:
    """What the run in a folder began with; None where there is none, or one that was never saved: it binds nobody.

    Raises:
        UsageError: it cannot be read.
    """
    path = run / "recipe.yaml"
    return load_recipe(path) if path.is_file() and checkpoint.checkpoints(run / "checkpoint") else None


def first_line(path: Path) -> dict[str, Any]:
    """Of metrics.jsonl, which tells of the weights with which a run begins; empty where there is none."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8", errors="replace") as file:
        line = json.loads(file.readline())
        if isinstance(line, dict) and line.get("step") == 0:
            return line
    return {}


class MetricsLog:
    """Appends lines to metrics.jsonl; lines from after the step that the run goes on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                # The last line of a killed run, or what a failing disk has left.
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        with atomic(path) as file:  # a full disk must not cost the lines that are there
            file.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
