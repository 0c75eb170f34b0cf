"""The name, licence and source that an exported model folder states."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dinokit.errors import UsageError
from dinokit.model_folder.config import BackboneConfig, is_one_line

__all__ = ["with_origin"]

_BEFORE = "; before it "
_OF_TRAINING = re.compile(r"step \d+ of \d+ \(\d+ pictures\)$")
"""The end of the ``source`` that training writes; a person's own text is not extended."""


def with_origin(
    config: BackboneConfig,
    record: Mapping[str, Any] | None,
    *,
    name: str | None = None,
    trained_by: str | None = None,
    licence: str | None = None,
) -> BackboneConfig:
    """The config with another name and licence, and a ``source`` that counts every run that trained it.

    Args:
        config: the current one.
        record: how the weights were trained (``training.json``), if known.
        name: None: unchanged.
        trained_by: one line for ``source``; None: the current one, with the lengths of the runs before the last if the
            runs continued one another.
        licence: of the weights, as the Hub spells it; None: unchanged.

    Raises:
        UsageError: a text is empty or has several lines.
    """
    for what, text in (("name", name), ("trained-by", trained_by), ("licence", licence)):
        if text is not None and (not text.strip() or not is_one_line(text)):
            raise UsageError(f"--{what} is {text!r}; expected one line of text")
    source = _without_folders(config.source) if trained_by is None else trained_by.strip()
    if trained_by is None and record and _OF_TRAINING.search(source):
        source += _earlier(record["runs"][:-1])
    return replace(
        config,
        name=config.name if name is None else name.strip(),
        source=source,
        licence=config.licence if licence is None else licence.strip(),
    )


def _without_folders(source: str) -> str:
    """Only the file name of a path on the user's machine, since the folder may go to the Hub."""
    if re.match(r"(?:[A-Za-z]:)?[/\\~]", source):
        return re.split(r"[/\\]", source.rstrip("/\\"))[-1]
    return source


def _earlier(runs: Sequence[Mapping[str, Any]]) -> str:
    """``; before it runs of 1474, 443 and 1236 steps``; empty if there were none, or if a length is unknown."""
    steps = [run.get("step") for run in runs]
    if not steps or not all(isinstance(count, int) for count in steps):
        return ""
    *first, last = map(str, steps)
    if not first:
        return f"{_BEFORE}a run of {last} steps"
    return f"{_BEFORE}runs of {', '.join(first)} and {last} steps"
