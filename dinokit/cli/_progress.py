"""Progress of a long command, on stderr: a bar on a terminal, otherwise a plain line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

__all__ = ["Progress", "counting_failures", "counting_steps", "open_progress"]

_SECONDS_BETWEEN_LINES = 10.0


class Progress(Protocol):
    """What a command calls to report its progress."""

    def begin(self) -> None:
        """The first unit of work begins now: earlier time does not count in the rate."""

    def advance(self, count: int, note: str | None = None) -> None:
        """``count`` more are done; ``note`` replaces the text at the end of the line (None keeps it)."""

    def expect(self, total: int) -> None:
        """Corrects the number of units of work to ``total``."""


@contextmanager
def open_progress(
    total: int, *, task: str, unit: str = "images", quiet: bool = False, stream: TextIO | None = None
) -> Iterator[Progress]:
    """Shows the progress of ``total`` units of work: rate, time left and a note.

    Args:
        total: units of work.
        task: what is being done, e.g. ``embedding``.
        unit: of the rate, plural.
        quiet: show nothing.
        stream: sys.stderr by default. A terminal gets the bar; otherwise the first line is printed after ten
            seconds, so that short runs in scripts print nothing.
    """
    stream = stream or sys.stderr
    if quiet:
        yield _Silent()
    elif stream.isatty():
        with _open_bar(total, task, unit, stream) as bar:
            yield bar
    else:
        yield _Lines(total, task, unit, stream)


def counting_failures(progress: Progress) -> Callable[[int, int], None]:
    """A callback for (pictures done, failures among them) since its last call; the note counts all failures."""
    failures = 0

    def on_progress(done: int, failed: int) -> None:
        nonlocal failures
        failures += failed
        progress.advance(done, f"{failures} failed" if failures else None)

    return on_progress


def counting_steps(progress: Progress) -> Callable[[int, int], None]:
    """A callback for (steps done so far, number of steps)."""
    before = 0

    def on_progress(done: int, steps: int) -> None:
        nonlocal before
        progress.expect(steps)
        progress.advance(done - before)
        before = done

    return on_progress


class _Silent:
    def begin(self) -> None:
        pass

    def advance(self, count: int, note: str | None = None) -> None:
        pass

    def expect(self, total: int) -> None:
        pass


class _Lines:
    def __init__(self, total: int, task: str, unit: str, stream: TextIO) -> None:
        self._total, self._task, self._unit, self._stream = total, task, unit, stream
        self._done, self._note = 0, ""
        self.begin()

    def begin(self) -> None:
        self._began = self._last = time.monotonic()

    def expect(self, total: int) -> None:
        self._total = total

    def advance(self, count: int, note: str | None = None) -> None:
        self._done += count
        self._note = self._note if note is None else note
        now = time.monotonic()
        if now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        rate = self._done / (now - self._began)
        left = (self._total - self._done) / rate if rate else 0.0
        line = (
            f"{self._task}: {self._done} of {self._total} {self._unit}, "
            f"{rate:.1f} {self._unit}/s, {_clock(left)} left"
        )
        print(f"{line}, {self._note}" if self._note else line, file=self._stream, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


@contextmanager
def _open_bar(total: int, task: str, unit: str, stream: TextIO) -> Iterator[Progress]:
    from rich.console import Console  # imported here: most runs in scripts need no bar
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Task,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as RichProgress
    from rich.table import Column
    from rich.text import Text

    class NoteColumn(TextColumn):
        """A text that alone is cut off at the end of the line; otherwise rich would shorten all columns."""

        def render(self, task: Task) -> Text:
            text = super().render(task)
            text.no_wrap, text.overflow = True, "ellipsis"
            return text

    console = Console(file=stream)
    width = min((console.width - 60) // 3, 40)  # of the bar, the least informative column
    columns = (
        TextColumn("{task.description}"),
        *([BarColumn(width)] if width >= 5 else []),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        NoteColumn("{task.fields[note]}", table_column=Column(no_wrap=False)),
    )
    with RichProgress(*columns, console=console, transient=True) as bar:
        # The mean rate of the whole run: rich's own rate jumps from batch to batch.
        identity = bar.add_task(task, total=total, rate="", note="")

        class Bar:
            done = 0
            began = time.monotonic()

            def begin(self) -> None:
                self.began = time.monotonic()

            def advance(self, count: int, note: str | None = None) -> None:
                self.done += count
                rate = self.done / max(time.monotonic() - self.began, 1e-9)
                bar.update(identity, advance=count, rate=f"{rate:.1f} {unit}/s")
                if note is not None:
                    bar.update(identity, note=note)

            def expect(self, total: int) -> None:
                bar.update(identity, total=total)

        yield Bar()
