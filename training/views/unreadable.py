"""Pictures that cannot be read: counted, reported once each, and too many in a row end a run."""

from __future__ import annotations

from collections.abc import Callable

from dinokit.errors import TrainingError

__all__ = ["UnreadablePictures"]

_GIVE_UP = 16
"""Unreadable pictures in a row after which a run ends."""


class UnreadablePictures:
    """The unreadable pictures of a run.

    Args:
        n_pictures: pictures in all steps of the run together.
        is_alone: whether this is the only process. With several, none may skip a step that the others compute.
        warn: called once per unreadable picture.
    """

    def __init__(self, *, n_pictures: int, is_alone: bool, warn: Callable[[str], None]) -> None:
        self.seen = 0
        """Over all epochs, those of an earlier start included."""
        self._limit = min(_GIVE_UP, n_pictures) if is_alone else 1
        self._warn = warn
        self._listed: set[str] = set()
        self._in_a_row = 0

    def add(self, lines: list[str]) -> None:
        """Counts the unreadable pictures of a step."""
        self.seen += len(lines)
        for line in lines:
            if line not in self._listed:  # a picture recurs in every epoch
                self._listed.add(line)
                self._warn(f"left out, cannot be read: {line}")

    def step_trained(self) -> None:
        """Called for a step with enough readable pictures."""
        self._in_a_row = 0

    def step_skipped(self, step: int, lines: list[str], *, some_readable: bool) -> None:
        """Called for a step without enough readable pictures.

        Raises:
            TrainingError: too many unreadable pictures in a row. A few may meet in one small batch; many in a row mean
                that the disk fails.
        """
        self._in_a_row = 0 if some_readable else self._in_a_row + len(lines)
        if self._in_a_row >= self._limit:
            raise TrainingError(
                f"none of {self._in_a_row} pictures in a row, up to those of step {step}, can be read; the reason for "
                f"one: {lines[0]}. Check them, then run the same command again: it resumes from the last save"
            )
