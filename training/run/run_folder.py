"""The run folder: which run it belongs to, one training at a time, and its lines of metrics."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinokit.card.run_files import logged_lines
from dinokit.errors import UsageError
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.files.outputs import atomic
from dinokit.training.monitoring.snapshot_files import forget_snapshots
from dinokit.training.recipe import MAY_CHANGE, Recipe, load_recipe, save_recipe
from dinokit.training.run import checkpoint

__all__ = ["MetricsLog", "claim_run_folder", "first_line", "recipe_of"]

_LOCK = ".lock"


@contextlib.contextmanager
def claim_run_folder(run: Path, recipe: Recipe) -> Iterator[None]:
    """Writes recipe.yaml, or checks that the run in the folder has the same one; holds the folder inside the block.

    Raises:
        UsageError: the folder cannot be created or written, has other contents or another run, or is in use by
            another training.
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
            elif isinstance(error, UsageError):  # a refused recipe, such as one with another teacher
                with contextlib.suppress(OSError), atomic(file) as again:
                    again.write_bytes(before)
            raise


def _forget_if_nothing_was_done(run: Path) -> None:
    """Removes the folder of a run that was refused, for instance for its device or its initial weights."""
    with contextlib.suppress(OSError):
        if {path.name for path in run.iterdir()} <= {_LOCK, "recipe.yaml"}:
            for path in run.iterdir():
                path.unlink()
            run.rmdir()


@contextlib.contextmanager
def _alone_in(run: Path) -> Iterator[None]:
    """Two trainings would overwrite each other's checkpoints."""
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
                f"another training is using {run} ({error.holder}); wait for it to end, stop it, or choose "
                "another -o"
            ) from error
        except OSError as error:
            raise UsageError(
                f"the run folder {run} cannot be created or written: {error.strerror or error}; choose another -o"
            ) from error
        yield


def _clear(run: Path) -> None:
    """Removes partial files of a killed run, and undoes the first of two renames (`outputs.py`)."""
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
        path.unlink()  # a start that saved nothing does not bind this one
        (run / "metrics.jsonl").unlink(missing_ok=True)
        forget_snapshots(run)
    if not path.exists():
        save_recipe(recipe, path)
        return
    before, now = asdict(load_recipe(path)), asdict(recipe)
    free = set(MAY_CHANGE)
    if recipe.teachers and before["distill_from"]:
        free.add("distill_from")  # it may have moved: the checkpoint has its digest and refuses other weights
    changed = [f"{k}: {before[k]} there, {now[k]} now" for k in now if now[k] != before[k] and k not in free]
    if changed:
        raise UsageError(
            f"{run} holds a run with another recipe ({'; '.join(changed)}). Use the same settings and pictures to "
            "resume it, or another -o to start a new one"
        )
    save_recipe(recipe, path)


def recipe_of(run: Path) -> Recipe | None:
    """The recipe that the run in a folder began with; None if there is no run, or one that was never saved.

    Raises:
        UsageError: recipe.yaml cannot be read.
    """
    path = run / "recipe.yaml"
    return load_recipe(path) if path.is_file() and checkpoint.checkpoints(run / "checkpoint") else None


def first_line(path: Path) -> dict[str, Any]:
    """The line of metrics.jsonl about the initial weights of a run (step 0); empty if there is none."""
    with contextlib.suppress(OSError):
        for _, line in logged_lines(path):
            return line if line["step"] == 0 else {}
    return {}


class MetricsLog:
    """Appends lines to metrics.jsonl; lines from after the step that the run resumes at are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = "".join(f"{line}\n" for line, values in logged_lines(path) if values["step"] <= step)
        with atomic(path) as file:  # a full disk must not lose the existing lines
            file.write_text(kept, encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
