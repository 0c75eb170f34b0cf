"""Ctrl-C, SIGTERM and SIGHUP: a run finishes its step and saves before it stops."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["finish_step_on_interrupt"]


@contextlib.contextmanager
def finish_step_on_interrupt(tell: Callable[[str], None], world_size: int) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step finish, so that the save is consistent; the second stops at once.

    A single process handles SIGTERM, which batch systems and containers send, and SIGHUP, which a closed terminal
    sends, in the same way; under ``nohup`` SIGHUP stays ignored. With several processes these signals end them: a
    launcher sends SIGTERM when one of them has ended, and a process that finishes its step would wait for that one.

    Yields:
        A function that returns whether the signal has come.
    """
    came: list[int] = []
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    numbers = [signal.SIGINT]
    if world_size == 1:
        numbers.append(signal.SIGTERM)
        if hangup is not None and signal.getsignal(hangup) is not signal.SIG_IGN:
            numbers.append(hangup)
    before: dict[int, Any] = {}

    def answer(number: int, _frame: object) -> None:
        came.append(number)
        for caught, handler in before.items():
            after: Any = handler
            if caught in (signal.SIGINT, hangup):
                after = signal.default_int_handler if caught == signal.SIGINT else signal.SIG_IGN
            signal.signal(caught, after)  # a closed terminal and its shell each send SIGHUP
        # In the middle of another line, or the terminal is gone.
        with contextlib.suppress(RuntimeError, OSError):
            tell("interrupted: finishing this step and saving; a second time stops at once")

    try:
        for number in numbers:
            before[number] = signal.signal(number, answer)
    except ValueError:  # not in the main thread: there is no signal to catch
        yield lambda: False
        return
    try:
        yield lambda: bool(came)
    finally:
        for caught, handler in before.items():
            signal.signal(caught, handler)
