"""``--what``: which vector represents a picture (:mod:`dinokit.features.pooling`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

from dinokit.errors import UsageError

__all__ = ["what_option"]

_KNOWN = ("cls", "mean", "cls+mean")  # pooling.WHAT, repeated here because importing it loads numpy
_COMPLETED = (*_KNOWN, "cls:4", "cls:4+mean")


class _Kind(StringParamType):
    """One of :data:`dinokit.features.pooling.WHAT`, ``cls:N``, ``cls:N+mean``, or a value that the command adds."""

    name = "what"

    def __init__(self, more: Sequence[str]) -> None:
        self._more = tuple(more)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        from dinokit.features.pooling import check_what

        if value in self._more:
            return str(value)
        try:
            return check_what(str(value))
        except UsageError as error:
            more = f"; or {', '.join(self._more)}" if self._more else ""
            self.fail(str(error) + more, param, ctx)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(word) for word in (*_COMPLETED, *self._more) if word.startswith(incomplete)]


def what_option(*more: str, help: str = "") -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The option --what, for commands that accept every kind of vector.

    Args:
        more: further values to accept.
        help: what these mean.
    """
    return click.option(
        "--what",
        type=_Kind(more),
        metavar=f"[{'|'.join((*_KNOWN, 'cls:N', 'cls:N+mean', *more))}]",
        default="cls",
        show_default=True,
        help="cls: the CLS token; mean: the mean of the patch tokens; cls+mean: both, concatenated; cls:4: the CLS "
        f"tokens of the last 4 blocks.{' ' if help else ''}{help}",
    )
