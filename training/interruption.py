"""Ctrl-C and SIGTERM: the step is finished and saved before a run stops."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

__all__ = ["finish_step_on_interrupt"]


@contextlib.contextmanager
def finish_step_on_interrupt(tell: Callable[[str], None], world_size: int) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C lets the step finish, so that what is saved is whole; the second stops at once.

    So does SIGTERM, which batch systems and containers send, to one process; of several, some may be told to end
    because another has ended, and would wait for it.
    """
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM) if world_size == 1 else (signal.SIGINT,)
    before: dict[int, Any] = {}

    def answer(number: int, _frame: object) -> None:
        came.append(number)
        for caught, handler in before.items():
            signal.signal(caught, signal.default_int_handler if caught == signal.SIGINT else handler)
        with contextlib.suppress(RuntimeError):  # in the middle of another line
            tell("interrupted: this step is finished and all is saved; a second time stops at once")

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
