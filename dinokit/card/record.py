"""``training.json``: how the weights of a model folder were trained, for publication.

It is made from a run folder (``recipe.yaml``, ``metrics.jsonl``) and is part of the model. It contains no paths of the
training machine: only the folder name of the labelled pictures and the number of training pictures.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any

from dinokit._version import __version__
from dinokit.card.run_files import flat_yaml, logged_metrics
from dinokit.errors import ModelError
from dinokit.files.json_files import read_json
from dinokit.model_folder.folder import RECORD_FILE

__all__ = [
    "RECORD_FILE",
    "make_record",
    "method_of",
    "name_of_average",
    "read_record",
    "record_of_run",
    "set_name",
]

FORMAT_VERSION = 1

# Paths, monitoring and distribution of a run: private, or not part of how the weights were trained.
_PRIVATE = {
    "labelled",
    "labelled_queries",
    "init_from",
    "workers",
    "device",
    "devices",
    "num_nodes",
    "strategy",
    "keep_checkpoints",
    "save_every_epochs",
    "save_every_minutes",
    "log_every_steps",
    "knn_every_epochs",
    "tensorboard",
}
_LONGEST_CHAIN = 50


def make_record(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The content of ``training.json`` without ``weights_sha256``, which the folder's writer adds.

    Args:
        runs: from :func:`record_of_run`, in training order.
    """
    return {"format_version": FORMAT_VERSION, "written_by": f"dinokit {__version__}", "runs": list(runs)}


def read_record(folder: Path, weights_sha256: str) -> dict[str, Any] | None:
    """``training.json`` of a model folder; None if missing, unreadable, too new, or of other weights."""
    try:
        values = read_json(folder / RECORD_FILE)
        fits = (
            values["weights_sha256"] == weights_sha256
            and values["format_version"] <= FORMAT_VERSION
            and all(
                isinstance(run["recipe"], dict) and isinstance(run["knn"], list) for run in values["runs"]
            )
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return values if fits and values["runs"] else None


def record_of_run(
    run: str | Path, *, step: int | None = None, n_steps: int | None = None, n_images: int | None = None
) -> list[dict[str, Any]]:
    """The records of a run and, before it, of the runs it started from, as far as they can be found.

    Args:
        run: with ``recipe.yaml`` and ``metrics.jsonl``.
        step, n_steps, n_images: its progress and number of pictures; by default from its metrics and model
            folder.

    Raises:
        ModelError: it is not a run folder, or its files cannot be read.
    """
    return _chain(Path(run), step, n_steps, n_images, seen=())


def method_of(recipe: Mapping[str, Any]) -> str:
    """The published method that a recipe corresponds to: ``DINO``, ``iBOT``, ``SwAV``, ``BYOL``, ``MoCo``, ``SEED``
    or ``CompRess``."""
    loss = recipe.get("loss", "cross_entropy")
    if recipe.get("distill_from"):
        return {"similarity": "SEED", "relations": "CompRess"}.get(str(loss), "distillation")
    if loss != "cross_entropy":
        return {"squared_error": "BYOL", "info_nce": "MoCo"}.get(str(loss), str(loss))
    if recipe.get("teacher", "momentum") == "student":
        return "SwAV"
    return "iBOT" if recipe.get("ibot_weight") else "DINO"


def name_of_average(distill_from: object) -> str:
    """The name of the student's moving average, which a run measures and publishes: ``teacher``, unless pretrained
    models are the teachers (``distill_from`` of the recipe)."""
    return "moving average" if distill_from else "teacher"


def _chain(
    run: Path, step: int | None, n_steps: int | None, n_images: int | None, seen: tuple[Path, ...]
) -> list[dict[str, Any]]:
    recipe = _recipe(run)
    progress = _progress(run)
    earlier: list[dict[str, Any]] = []
    before = recipe.get("init_from")
    if isinstance(before, str) and len(seen) < _LONGEST_CHAIN and run.resolve() not in seen:
        # The path as recorded, from here or from the run's parent; or beside the run, if they were moved together.
        places = (Path(before).expanduser(), run.parent / before, run.parent / Path(before).name)
        found = next((place for place in places if (place / "recipe.yaml").is_file()), None)
        if found is not None:
            with contextlib.suppress(ModelError):  # a damaged earlier run must not stop this one
                earlier = _chain(found, None, None, None, (*seen, run.resolve()))
    last: dict[str, Any] = {}
    rates, knn = [], []
    for line in _metrics(run, step):
        last = line
        if _is_number(line.get("images_per_s")):
            rates.append(line["images_per_s"])
        if _is_number(line.get("knn_teacher")):
            kept = ("step", "epoch", "knn_teacher", "knn_student")
            knn.append({key: line[key] for key in kept if _is_number(line.get(key))})
    rates.sort()
    entry: dict[str, Any] = {
        "name": run.resolve().name,
        "recipe": {
            key: _PUBLIC[key](value) if value and key in _PUBLIC else value
            for key, value in recipe.items()
            if key not in _PRIVATE
        },
        "goes_on_from": Path(before).name if isinstance(before, str) else None,
        "step": step if step is not None else last.get("step", progress.get("step")),
        "n_steps": n_steps if n_steps is not None else progress.get("n_steps"),
        "n_images": n_images if n_images is not None else progress.get("n_images"),
        "epoch": last.get("epoch"),
        "metrics": {key: last[key] for key in ("loss", "teacher_entropy", "kl") if last.get(key) is not None},
        "images_per_s": rates[len(rates) // 2] if rates else None,
        "knn": knn,
    }
    if recipe.get("labelled"):
        entry["labelled"] = set_name(str(recipe["labelled"]))
        queries = recipe.get("labelled_queries")
        entry["labelled_queries"] = set_name(str(queries)) if queries else None
    return [*earlier, entry]


def _public_names(models: Any) -> Any:
    return [_public_name(model) for model in models] if isinstance(models, list) else _public_name(models)


def _public_name(model: Any) -> str:
    """A known name or Hub id unchanged; for a path, the folder's name."""
    path = Path(str(model)).expanduser()
    if not path.exists() and not path.is_absolute():
        return str(model)
    path = path.resolve()
    return path.parent.name if path.name == "model" else path.name


def _public_patterns(patterns: Any) -> Any:
    """Patterns of picture names without folders of this machine."""
    if not isinstance(patterns, list):
        return None
    return [
        "*/" + "/".join(pattern.split("/")[-2:]) if _is_of_a_machine(pattern) else pattern
        for pattern in patterns
    ]


def _is_of_a_machine(pattern: Any) -> bool:
    return isinstance(pattern, str) and (pattern.startswith("~") or PureWindowsPath(pattern).root != "")


_PUBLIC = {"distill_from": _public_names, "distill_pictures": _public_patterns}
"""Keys whose values may name folders, and how they are made public."""


def _recipe(run: Path) -> dict[str, Any]:
    file = run / "recipe.yaml"
    try:
        values = flat_yaml(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(
            f"{run} is not a training run (no recipe.yaml); name the folder that `dinokit train -o` wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    return {str(key): value for key, value in values.items()}


def _metrics(run: Path, step: int | None) -> Iterator[dict[str, Any]]:
    """The lines of metrics.jsonl up to ``step``; none where the file cannot be read."""
    with contextlib.suppress(OSError):
        yield from (line for line in logged_metrics(run) if step is None or line["step"] <= step)


def _progress(run: Path) -> dict[str, int]:
    """Steps and pictures, from the sentence that training records in the model folder."""
    try:
        config = read_json(run / "model" / "config.json")
        found = re.search(r"step (\d+) of (\d+) \((\d+) pictures\)", config["dinokit"]["source"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return dict(zip(("step", "n_steps", "n_images"), map(int, found.groups()), strict=True)) if found else {}


def set_name(path: str) -> str:
    """The last part of a path that names the set: ``imagenette224`` for ``/data/imagenette224/train``."""
    parts = [part for part in re.split(r"[/\\]|::", path) if part not in ("", ".", "..")]
    while len(parts) > 1 and Path(parts[-1]).stem.lower() in _SPLITS:
        parts.pop()
    return Path(parts[-1]).stem if parts else "labelled pictures"


_SPLITS = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "test",
    "images",
    "queries",
    "references",
    "labelled",
}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
