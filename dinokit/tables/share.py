"""One table made by several processes, on one machine or on many that share a disk: each takes a share of the shards.

They meet in the folder of finished shards only. No process waits for another: the one that finds all shards done
writes the table. If it is stopped, the command of any share, or the same command without a share, writes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from dinokit.errors import UsageError
from dinokit.files.locks import HeldElsewhereError, held
from dinokit.tables.shards import Shard

__all__ = ["Share", "sole_writer"]

_CLAIM = "table-is-being-written"


@dataclass(frozen=True)
class Share:
    """The ``number``-th of ``count`` shares, counted from 1. Raises UsageError if there is no such share."""

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise UsageError(
                f"there is no share {self.number} of {self.count}; shares are counted from 1: 1/{self.count} to "
                f"{self.count}/{self.count}"
                if self.count > 0
                else f"a run cannot have {self.count} shares; give 1/4 for the first of four"
            )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The share that ``2/8`` names: the second of eight. Raises UsageError for text of another form."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text.strip())
        if match is None:
            raise UsageError(
                f"{text!r} is not a share; give 2/8 for the second of eight processes that make the same run"
            )
        return cls(int(match[1]), int(match[2]))

    def of(self, shards: Sequence[Shard]) -> list[Shard]:
        """This share's shards: every ``count``-th, so that a slow archive at the end is spread over all machines."""
        return list(shards[self.number - 1 :: self.count])

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"


@contextmanager
def sole_writer(parts: Path) -> Iterator[bool]:
    """Whether this process is to write the table, where several find at the same time that all shards are done.

    The claim is a lock on a file among the finished shards, which the system releases if the process is killed.
    """
    claim = parts / _CLAIM
    with ExitStack() as stack:
        try:
            stack.enter_context(held(claim))
            first = (
                claim.exists()
            )  # else another process has written the table and removed the folder meanwhile
        except (HeldElsewhereError, FileNotFoundError):
            first = False
        yield first
