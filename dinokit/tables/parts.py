"""The folder in which a run of ``embed`` keeps its finished shards until the whole table is written.

An interrupted run resumes from there. If pictures were added or removed in between, its rows are set aside in the same
folder and reused picture by picture (``earlier_rows.py``), as ``update`` does with a table.
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
from dinokit.files.json_files import read_json
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.files.outputs import atomic
from dinokit.sources import Item
from dinokit.tables.begun import BEGUN, BegunRows
from dinokit.tables.earlier_rows import EarlierRows, ParquetRows
from dinokit.tables.labels import LABELS
from dinokit.tables.origin import differing_space
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
# Vectors that differ in one of these can be compared, but must not be mixed in one table.
_SAME_TABLE = {"normalize": False, "precision": None, "dtype": None, "reduced_decoding": False}


def parts_folder(output: Path) -> Path:
    """Where the finished shards of ``output`` are kept until it is complete."""
    return output.with_name(output.name + ".parts")


@contextmanager
def claimed_parts(parts: Path, output: Path, *, alone: bool) -> Iterator[None]:
    """Holds the folder inside the block, ``alone`` or together with other shares. It is created if it is missing.

    Raises:
        UsageError: another process holds it.
    """
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(parts / _LOCK, shared=not alone))
        except HeldElsewhereError as error:
            raise UsageError(
                f"another embed is at work on {output} ({error.holder}); wait for it to end, stop it, or choose "
                "another output"
            ) from error
        yield


def remove_left_parts(parts: Path, output: Path, there: dict[str, Any]) -> None:
    """Removes the folder that a run left next to its finished table because it stopped just before its last step.

    It leaves the parts of a running process, and those of an interrupted run that will replace this table.

    Args:
        parts: the folder.
        output: the table.
        there: the table's origin.
    """
    if not parts.is_dir():
        return
    with contextlib.suppress(UsageError, OSError), claimed_parts(parts, output, alone=True):
        if not _replaces(_manifest_of(parts), there):
            remove_parts(parts)


def clear_parts(parts: Path) -> None:
    """Removes the results of interrupted runs. The lock stays."""
    for path in parts.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != _LOCK:
            path.unlink(missing_ok=True)


def remove_parts(parts: Path) -> None:
    """Removes the folder in one step: other shares would take a half-removed folder for unfinished shards."""
    gone = parts.with_name(f".{parts.name}.{secrets.token_hex(4)}")
    try:
        parts.rename(gone)
    except OSError:  # another process was faster, or has a file open on Windows: then file by file
        gone = parts
    shutil.rmtree(gone, ignore_errors=True)


def resumes_overwrite(
    parts: Path, origin: dict[str, Any], shards: Sequence[Shard], before: dict[str, Any] | None
) -> bool:
    """Whether this run, which has ``overwrite``, resumes an interrupted run that also had it.

    Args:
        parts: the folder.
        origin: of the new table.
        shards: of all its rows.
        before: the origin of the existing table, None if there is none. If it differs from the one that the
            interrupted run recorded, that run has ended.
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
    """Distinguishes successive tables of one name: when the run began; ``unknown`` for tables of other programs."""
    return None if origin is None else origin.get("began", "unknown")


def _manifest_of(parts: Path) -> dict[str, Any]:
    try:
        found = read_json(parts / _MANIFEST)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _sizes(shards: Sequence[Shard]) -> list[int]:
    return [len(shard.paths) for shard in shards]


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How two origins differ, in words; empty if they are of the same run."""
    return other_vectors(old, new) or other_inputs(old, new)


def other_inputs(old: dict[str, Any], new: dict[str, Any]) -> str:
    """How the pictures or labels of two origins differ, in words; empty when they are the same."""
    if old.get("inputs_sha256") != new["inputs_sha256"]:
        return "from other inputs (pictures were added, removed or changed)"
    if old.get(LABELS) != new.get(LABELS):
        return "with other labels (some were added, removed or changed)"
    return ""


def other_vectors(old: dict[str, Any], new: dict[str, Any]) -> str:
    """Why vectors of two origins must not be mixed in one table, in words; empty if they may be."""
    keys = differing_space(old, new)
    keys += [key for key, default in _SAME_TABLE.items() if old.get(key, default) != new.get(key, default)]
    if not keys:
        return ""
    if "weights_sha256" in keys:
        return f"by another model ({old.get('model')}, now {new['model']}; they differ in {', '.join(keys)})"
    if "preprocessing" in keys:
        return f"at another image size, or prepared otherwise, by {new['model']}"
    defaults = {"what": "cls", **_SAME_TABLE}
    shown = [key for key in defaults if key in keys or key in ("what", "normalize")]
    was, now = (", ".join(f"{key}={o.get(key, defaults[key])}" for key in shown) for o in (old, new))
    return f"with other vectors ({was}; now {now})"


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
    """Makes the folder for the parts, or resumes from the existing one.

    Args:
        parts: the folder.
        origin: of the new table.
        shards: of all its rows.
        pictures: all pictures of the run.
        output: the table.
        alone: whether this run is not a share; only then are files moved.
        overwrite: whether this run replaces an existing table; see :func:`resumes_overwrite`.
        before: the origin of the table that it replaces, None if there is none.

    Returns:
        Rows of interrupted runs on other lists of pictures, which have some pictures in common with this one.

    Raises:
        UsageError: the folder belongs to a run whose rows cannot be used.
    """
    manifest = parts / _MANIFEST
    layout = {"format": _MANIFEST_FORMAT, "shards": _sizes(shards)}
    if manifest.exists() or any(parts.glob("*.parquet")):
        try:
            there = read_json(manifest)
            differs, other = difference(there["origin"], origin), other_vectors(there["origin"], origin)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            there = {}
            differs = other = "by something else"
        if not differs and {key: there.get(key) for key in layout} != layout:
            differs = "in shards of another size (batch_size above 256 sets it)"
        if differs:
            if not alone or other or not _worth_resuming(parts, there["origin"], pictures):
                raise UsageError(
                    f"{parts} holds an interrupted run for {output}, made {differs}; repeat that run's command to "
                    f"finish it, remove the folder {parts} to discard it, or give --overwrite (overwrite=True) to "
                    "start over"
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
    """Whether it holds rows of runs on other lists of pictures."""
    return (parts / _EARLIER).is_dir()


def _worth_resuming(parts: Path, origin: dict[str, Any], pictures: Sequence[Item]) -> bool:
    """Whether at least one row in the folder is of one of these pictures, or it has no rows. Otherwise a mistyped
    source would cost hours of work."""
    try:
        found = _rows_in(parts, origin)
    except (OSError, ValueError, KeyError):  # damaged, so that there is nothing to lose
        return True
    return not any(map(len, found)) or any(rows.has_any_of(pictures) for rows in found)


def _set_aside(parts: Path, manifest: Path) -> None:
    """Moves the rows in the folder to where a run on another list of pictures finds them. No file is lost if this is
    interrupted: each is in one place or the other, next to a manifest."""
    aside = parts / _EARLIER / f"{sum(1 for _ in (parts / _EARLIER).glob('*')):03d}"
    aside.mkdir(parents=True)
    shutil.copy2(manifest, aside / _MANIFEST)
    for file in [*parts.glob("*.parquet"), *parts.glob("*" + BEGUN)]:
        file.replace(aside / file.name)
    manifest.unlink()


def _earlier(parts: Path) -> list[EarlierRows]:
    """All rows that were set aside, the newest first."""
    found: list[EarlierRows] = []
    for folder in sorted((parts / _EARLIER).glob("*"), reverse=True):
        try:
            origin = read_json(folder / _MANIFEST)["origin"]
            found += _rows_in(folder, origin)
        except (OSError, ValueError, KeyError, TypeError):  # damaged: its pictures are embedded again
            continue
    return [rows for rows in found if len(rows)]


def _rows_in(folder: Path, origin: dict[str, Any]) -> list[EarlierRows]:
    column = PATCHES if origin.get("what") == PATCHES else "embedding"
    finished = ParquetRows(sorted(folder.glob("*.parquet")), column)
    began = origin.get("began")
    return [EarlierRows(rows, began) for rows in (finished, BegunRows(sorted(folder.glob("*" + BEGUN))))]
