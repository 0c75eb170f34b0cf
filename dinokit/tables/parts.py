"""The folder in which a run of ``embed`` keeps its finished shards until the table is whole.

A run that was interrupted goes on there. Where pictures came or went meanwhile, what it had done is set aside in the
same folder and taken over picture by picture (``earlier_rows.py``), as ``update`` does with a table.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from dinokit.errors import UsageError
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.files.outputs import atomic
from dinokit.sources import Item
from dinokit.tables.begun import BEGUN, BegunRows
from dinokit.tables.earlier_rows import EarlierRows, ParquetRows
from dinokit.tables.embeddings import differing_space
from dinokit.tables.labels import LABELS
from dinokit.tables.patches import PATCHES
from dinokit.tables.shards import Shard

__all__ = [
    "claimed_parts",
    "clear_parts",
    "difference",
    "has_earlier_parts",
    "open_parts",
    "other_inputs",
    "other_vectors",
    "parts_folder",
    "remove_left_parts",
    "remove_parts",
    "resumes_overwrite",
]

_MANIFEST = "manifest.json"
_MANIFEST_FORMAT = 1
_EARLIER = "earlier"
_LOCK = ".lock"
# Vectors made with another of these could be compared, but shall not stand in one table.
_SAME_TABLE = {"precision": None, "normalize": False, "dtype": None, "reduced_decoding": False}
# What is asked for at each run, and not the model's own.
_ASKED_FOR = {"what": "cls", "normalize": False, "reduced_decoding": False}


def parts_folder(output: Path) -> Path:
    """Where the finished shards of ``output`` lie until it is complete."""
    return output.with_name(output.name + ".parts")


@contextmanager
def claimed_parts(parts: Path, output: Path, *, alone: bool) -> Iterator[None]:
    """Nobody else works in the folder inside the block, or only other shares; it is made where it is missing.

    Raises:
        UsageError: another process is at work there.
    """
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(parts / _LOCK, shared=not alone))
        except HeldElsewhereError as error:
            raise UsageError(
                f"another embed is at work on {output} ({error.holder}); wait for its end or stop it, or choose "
                "another output"
            ) from error
        yield


def remove_left_parts(parts: Path, output: Path, there: dict[str, Any]) -> None:
    """Removes what a run that stopped between its last two steps has left beside its table.

    Not the parts of a run that is at work, nor those of an interrupted run that is to replace this table.

    Args:
        parts: the folder.
        output: the table.
        there: its origin.
    """
    if not parts.is_dir():
        return
    with contextlib.suppress(UsageError, OSError), claimed_parts(parts, output, alone=True):
        if not _replaces(_manifest_of(parts), there):
            remove_parts(parts)


def clear_parts(parts: Path) -> None:
    """Forgets what interrupted runs have done. The claim stays."""
    for path in parts.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            path.unlink(missing_ok=True)


def remove_parts(parts: Path) -> None:
    """In one step for all who look: a folder half removed would look like shards that are still to be done."""
    gone = parts.with_name(f".{parts.name}.{secrets.token_hex(4)}")
    try:
        parts.rename(gone)
    except OSError:  # another was faster, or somebody has it open, where that forbids it: then file by file
        gone = parts
    shutil.rmtree(gone, ignore_errors=True)


def resumes_overwrite(
    parts: Path, origin: dict[str, Any], shards: Sequence[Shard], before: dict[str, Any] | None
) -> bool:
    """Whether the parts are of an interrupted run with ``overwrite`` that this one, also with it, is to finish.

    Args:
        parts: the folder.
        origin: of the table that is to be made.
        shards: of all its rows.
        before: the origin of the table that is there, None where there is none. Another one than the run began with
            means that the run has ended.
    """
    manifest = _manifest_of(parts)
    try:
        same = not difference(manifest["origin"], origin)
    except (KeyError, TypeError, AttributeError):
        return False
    return same and _replaces(manifest, before) and manifest.get("shards") == _sizes(shards)


def _replaces(manifest: dict[str, Any], before: dict[str, Any] | None) -> bool:
    return "replaces" in manifest and manifest["replaces"] == _identity(before)


def _identity(origin: dict[str, Any] | None) -> Any:
    """What tells one table from the next of the same name: when its run began; ``unknown`` for those of others."""
    return None if origin is None else origin.get("began", "unknown")


def _manifest_of(parts: Path) -> dict[str, Any]:
    try:
        found = json.loads((parts / _MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(shards: Sequence[Shard]) -> list[int]:
    return [len(shard.paths) for shard in shards]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What separates two origins, in words; empty when they are of one and the same run."""
    return other_vectors(old, new) or other_inputs(old, new)


def other_inputs(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the pictures or labels of two origins differ, in words; empty when they are the same."""
    if old.get("inputs_sha256") != new["inputs_sha256"]:
        return "from other inputs (pictures were added, removed or changed)"
    if old.get(LABELS) != new.get(LABELS):
        return "with other labels (some were added, removed or changed)"
    return ""


def other_vectors(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why vectors of two origins shall not stand in one table, in words; empty when they may."""
    keys = differing_space(old, new)
    keys += [key for key, default in _SAME_TABLE.items() if old.get(key, default) != new.get(key, default)]
    if not keys:
        return ""
    if _ASKED_FOR.keys() >= set(keys):
        shown = [key for key in _ASKED_FOR if key != "reduced_decoding" or key in keys]
        was, now = (", ".join(f"{key}={o.get(key, _ASKED_FOR[key])}" for key in shown) for o in (old, new))
        return f"with other vectors ({was}; now {now})"
    if keys == ["preprocessing"]:
        return f"at another image size, or prepared otherwise, by {new['model']}"
    return f"by another model ({old.get('model')}, now {new['model']}; they differ in {', '.join(keys)})"


def open_parts(
    parts: Path,
    origin: dict[str, Any],
    shards: Sequence[Shard],
    pictures: Sequence[Item],
    output: Path,
    *,
    alone: bool,
    overwrite: bool = False,
    before: dict[str, Any] | None = None,
) -> list[EarlierRows]:
    """Makes the folder for the parts, or resumes with the one that is there.

    Args:
        parts: the folder.
        origin: of the table that is to be made.
        shards: of all its rows.
        pictures: all of them.
        output: the table.
        alone: whether no other process is at it; only then is anything moved.
        overwrite: whether a new run replaces what is there; see :func:`resumes_overwrite`.
        before: the origin of the table that it replaces, None where there is none.

    Returns:
        Rows of runs that were interrupted and had other pictures; some of them are the same ones.

    Raises:
        UsageError: the folder belongs to a run of which nothing can be used.
    """
    manifest = parts / _MANIFEST
    layout = {"format": _MANIFEST_FORMAT, "shards": _sizes(shards)}
    if manifest.exists() or any(parts.glob("*.parquet")):
        try:
            there = json.loads(manifest.read_text(encoding="utf-8"))
            differs, other = difference(there["origin"], origin), other_vectors(there["origin"], origin)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            there = {}
            differs = other = "by something else"
        if not differs and {key: there.get(key) for key in layout} != layout:
            differs = "in shards of another size (batch_size above 256 sets it)"
        if differs:
            if not alone or other or not _worth_going_on(parts, there["origin"], pictures):
                raise UsageError(
                    f"{parts} holds an interrupted run for {output}, made {differs}; repeat that run's command to "
                    f"finish it, remove the folder {parts} to forget it, or give --overwrite (overwrite=True) to begin "
                    "again"
                )
            _set_aside(parts, manifest)
    if not manifest.exists():
        parts.mkdir(parents=True, exist_ok=True)
        with atomic(manifest) as temporary:
            replaces = {"replaces": _identity(before)} if overwrite else {}
            text = json.dumps({**layout, **replaces, "origin": origin}, indent=2)
            temporary.write_text(text, encoding="utf-8")
    return _earlier(parts)


def has_earlier_parts(parts: Path) -> bool:
    """Whether rows of runs with other pictures lie there."""
    return (parts / _EARLIER).is_dir()


def _worth_going_on(parts: Path, origin: dict[str, Any], pictures: Sequence[Item]) -> bool:
    """Whether the folder's rows are of these pictures, at least one, or it has none: a mistyped folder shall not cost
    the work of hours."""
    try:
        found = _rows_in(parts, origin)
    except (OSError, ValueError, KeyError):  # damaged, so that there is nothing to lose
        return True
    return not any(map(len, found)) or any(rows.has_any_of(pictures) for rows in found)


def _set_aside(parts: Path, manifest: Path) -> None:
    """What the folder has becomes rows that a run with other pictures looks at. Broken off and begun again, no file is
    lost: each lies in the one place or the other, beside a manifest."""
    aside = parts / _EARLIER / f"{sum(1 for _ in (parts / _EARLIER).glob('*')):03d}"
    aside.mkdir(parents=True)
    shutil.copy2(manifest, aside / _MANIFEST)
    for file in [*parts.glob("*.parquet"), *parts.glob("*" + BEGUN)]:
        file.replace(aside / file.name)
    manifest.unlink()


def _earlier(parts: Path) -> list[EarlierRows]:
    """Rows of all that was set aside, the newest first."""
    found: list[EarlierRows] = []
    for folder in sorted((parts / _EARLIER).glob("*"), reverse=True):
        try:
            origin = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["origin"]
            found += _rows_in(folder, origin)
        except (OSError, ValueError, KeyError, TypeError):  # damaged: its pictures are embedded again
            continue
    return [rows for rows in found if len(rows)]


def _rows_in(folder: Path, origin: dict[str, Any]) -> list[EarlierRows]:
    column = PATCHES if origin.get("what") == PATCHES else "embedding"
    finished = ParquetRows(sorted(folder.glob("*.parquet")), column)
    began = origin.get("began")
    return [EarlierRows(rows, began) for rows in (finished, BegunRows(sorted(folder.glob("*" + BEGUN))))]
