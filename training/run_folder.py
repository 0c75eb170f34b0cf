"""The run folder: whose it is, and the lines of metrics in it."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dinokit.errors import UsageError
from dinokit.training import checkpoint
from dinokit.training.recipe import Recipe, load_recipe, save_recipe

__all__ = ["MetricsLog", "claim_run_folder"]


def claim_run_folder(run: Path, recipe: Recipe) -> None:
    """Writes recipe.yaml, or checks that the run that is there has the same one."""
    path = run / "recipe.yaml"
    came_to_nothing = False
    if path.exists() and not checkpoint.checkpoints(run / "checkpoint"):
        path.unlink()  # a start that came to nothing binds nobody
        (run / "metrics.jsonl").unlink(missing_ok=True)
        came_to_nothing = True
    if not path.exists():
        try:
            run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"the run folder {run} cannot be made: {error}; choose another -o") from error
        if any(run.iterdir()) and not came_to_nothing:
            raise UsageError(f"{run} is neither empty nor a training run (no recipe.yaml); choose another -o")
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
    }
    now = asdict(recipe)
    changed = [f"{k}: {before[k]} there, {now[k]} now" for k in now if now[k] != before[k] and k not in free]
    if changed:
        raise UsageError(
            f"{run} holds a run with another recipe ({'; '.join(changed)}). Use the same settings to go on with it, "
            "or another -o to start a new one"
        )
    save_recipe(recipe, path)


class MetricsLog:
    """Appends lines to metrics.jsonl; lines from after the step that the run goes on from are dropped."""

    def __init__(self, path: Path, step: int) -> None:
        kept = []
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run
                    if json.loads(line)["step"] <= step:
                        kept.append(line + "\n")
        path.write_text("".join(kept), encoding="utf-8")
        self.file = path.open("a", encoding="utf-8")

    def write(self, metrics: dict[str, Any]) -> None:
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exc: object) -> None:
        self.file.close()
