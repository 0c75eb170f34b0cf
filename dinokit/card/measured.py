"""``evaluation.json``: results of ``dinokit eval`` for the card.

It keeps the parts of ``dinokit eval --json`` that a reader needs: scores and names of sets, but no local paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dinokit.card.record import set_name
from dinokit.errors import ModelError, UsageError
from dinokit.files.json_files import read_json
from dinokit.model_folder.folder import ModelFolder

__all__ = ["MEASURED_FILE", "add_measured", "at_k", "read_measured"]

MEASURED_FILE = "evaluation.json"
FORMAT_VERSION = 1
_K = 20  # as reported in the DINO papers


def add_measured(model: ModelFolder, scores: str | Path) -> dict[str, Any]:
    """The content of ``evaluation.json`` with the scores of this model added.

    Args:
        model: the evaluated model.
        scores: the output of ``dinokit eval --json``. Scores of the same set are replaced.

    Raises:
        ModelError: the file cannot be read, or is not from ``dinokit eval``.
        UsageError: it has no scores of these weights with their own image size and the CLS token.
    """
    values = _read(Path(scores))
    try:
        entry = _entry(values, model)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{scores} is not the output of `dinokit eval --json`: a value is missing or has another form "
            f"({type(error).__name__}: {error}); write it again"
        ) from error
    if entry is None:
        judged = ", ".join(str(result.get("features")) for result in values["results"])
        raise UsageError(
            f"{scores} has no scores of the model in {model.path}, only of {judged}. Measure it with `dinokit eval "
            f"--reference LABELLED -m {model.path} --json`, at its own image size and with --what cls"
        )
    key = (entry["set"], entry["protocol"])
    others = [e for e in read_measured(model.path, model.weights_sha256) if (e["set"], e["protocol"]) != key]
    return {
        "format_version": FORMAT_VERSION,
        "weights_sha256": model.weights_sha256,
        "sets": [*others, entry],
    }


def _entry(values: Mapping[str, Any], model: ModelFolder) -> dict[str, Any] | None:
    """What ``evaluation.json`` keeps of these results; None if none is of this model."""
    from dinokit.classifiers.evaluation import RAW_PIXELS

    ours = next((result for result in values["results"] if _is_of(result, model)), None)
    if ours is None:
        return None
    floor = next((result for result in values["results"] if result.get("features") == RAW_PIXELS), None)
    entry = {
        "set": set_name(str(values["reference"])),
        "protocol": values["protocol"],
        "references": values["references"],
        "judged": values["judged"],
        "classes": len(values["classes"]),
        "temperature": values["temperature"],
        "knn": ours["knn"],
        "linear": ours.get("linear"),
        "raw_pixels": {"knn": floor["knn"], "linear": floor.get("linear")} if floor else None,
        "measured_by": f"dinokit {values['dinokit']}",
    }
    _check(entry)
    return entry


def _check(entry: Mapping[str, Any]) -> None:
    """Raises what accessing it raises, if an entry lacks what the card needs."""
    float(at_k(entry["knn"])["top1"]["value"])
    int(entry["references"]) + int(entry["judged"])
    str(entry["set"] + entry["protocol"])


def read_measured(folder: Path, weights_sha256: str) -> list[dict[str, Any]]:
    """Entries of ``evaluation.json``; empty if it is unreadable or of other weights."""
    try:
        values = read_json(folder / MEASURED_FILE)
        if values["weights_sha256"] != weights_sha256 or values["format_version"] > FORMAT_VERSION:
            return []
        sets: list[dict[str, Any]] = values["sets"]
        for entry in sets:
            _check(entry)
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return []
    return sets


def at_k(scores: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The score at k = 20, else at the largest measured k."""
    return next((score for score in scores if score["k"] == _K), scores[-1])


def _read(file: Path) -> dict[str, Any]:
    try:
        values = read_json(file)
    except FileNotFoundError as error:
        raise ModelError(f"{file} does not exist; expected the output of `dinokit eval --json`") from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{file} is not readable JSON ({error}); expected the output of `dinokit eval --json`"
        ) from error
    keys = ("results", "reference", "protocol", "references", "judged", "classes", "temperature", "dinokit")
    missing = [key for key in keys if key not in values] if isinstance(values, dict) else list(keys)
    if missing:
        raise ModelError(f"{file} is not the output of `dinokit eval --json`: it lacks {', '.join(missing)}")
    return dict(values)


def _is_of(result: Mapping[str, Any], model: ModelFolder) -> bool:
    return (
        result.get("weights_sha256") == model.weights_sha256
        and result.get("what", "cls") == "cls"
        and result.get("preprocessing") == model.config.preprocessing.to_json()
    )
