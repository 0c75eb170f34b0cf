"""What the shell offers after Tab: names of models and devices, and files wherever a value may be one.

click completes commands, options and choices by itself, but nothing for plain texts, and once click completes for a
command, the shell no longer offers files of its own.
"""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType

__all__ = ["SHELLS", "complete_values", "script"]

SHELLS = ("bash", "zsh", "fish")

_DEVICES = ("auto", "cpu", "cuda", "tensorrt", "mps")
# Texts that are never files.
_NO_FILES = frozenset({"revision", "title", "assignments", "message", "heads", "repo_id"})


class _Text(StringParamType):
    """A text that may be the name of a file."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


class _Model(_Text):
    """A known name, or a path."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        from dinokit.loading.zoo import STARTER, ZOO

        names = [CompletionItem(name) for name in (STARTER, *ZOO) if name.startswith(incomplete)]
        return names or super().shell_complete(ctx, param, incomplete)


class _Device(StringParamType):
    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return [CompletionItem(name) for name in _DEVICES if name.startswith(incomplete)]


def complete_values(command: click.Command) -> None:
    """Gives every plain text among a command's parameters a completion."""
    for parameter in command.params:
        if type(parameter.type) is not StringParamType or parameter.name in _NO_FILES:
            continue
        if parameter.name == "model":
            parameter.type = _Model()
        elif parameter.name == "device":
            parameter.type = _Device()
        else:
            parameter.type = _Text()


def script(shell: str, command: click.Command) -> str:
    """The script that a shell must read to complete ``dinokit``."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    completion = kind(command, {}, "dinokit", "_DINOKIT_COMPLETE")
    # Not .source(): for bash it starts a shell to ask for its version.
    return completion.source_template % completion.source_vars()
