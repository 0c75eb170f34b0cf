"""The options with which every command that runs a model names it."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

__all__ = [
    "DEFAULT_MODEL",
    "batch_size_option",
    "device_option",
    "engine_option",
    "go_offline",
    "image_size_option",
    "model_options",
    "must_not_be_given",
    "offline_option",
    "parse_image_size",
    "quiet_option",
    "reduced_decoding_option",
    "with_values",
]

DEFAULT_MODEL = "starter"

F = TypeVar("F", bound=Callable[..., Any])

engine_option = click.option(
    "--engine", type=click.Choice(["auto", "onnx", "torch"]), default="auto", show_default=True
)
device_option = click.option("--device", default="auto", show_default=True, help="cpu, cuda, cuda:1, mps …")
batch_size_option = click.option("-b", "--batch-size", type=click.IntRange(1), default=32, show_default=True)


def model_options(command: F) -> F:
    """Adds ``--model``, ``--revision``, ``--engine`` and ``--device``, in this order."""
    options = (
        click.option(
            "-m", "--model", default=DEFAULT_MODEL, show_default=True, help="A name, a path or a Hub id."
        ),
        click.option("--revision", help="Branch, tag or commit of a model on the Hub."),
        engine_option,
        device_option,
    )
    for option in reversed(options):  # the decorator nearest to the function comes last in --help
        command = option(command)
    return command


def with_values(
    values: type[Any], options: Sequence[Callable[[Any], Any]]
) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Adds options to a command, and hands it those that are fields of a dataclass as one, its first argument.

    Args:
        values: the dataclass; each of its fields is one of the options.
        options: in the order of ``--help``; what the dataclass lacks the function takes by name.
    """
    shared = [field.name for field in fields(values)]

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        @functools.wraps(function)
        def command(**given: Any) -> int:
            return function(values(**{name: given.pop(name) for name in shared}), **given)

        decorated: Callable[..., int] = command
        for option in reversed(options):  # the decorator nearest to the function comes last in --help
            decorated = option(decorated)
        return decorated

    return decorate


def parse_image_size(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> int | tuple[int, int] | None:
    """click's callback for --image-size: ``480``, or ``480x320`` for height x width."""
    if value is None:
        return None
    match = re.fullmatch(r"([1-9]\d{0,4})(?:[x×,]([1-9]\d{0,4}))?", value.strip().lower())
    if match is None:
        raise click.BadParameter(f"{value!r}; expected pixels, 480, or height x width, 480x320")
    height, width = match.groups()
    return int(height) if width is None else (int(height), int(width))


image_size_option = click.option(
    "--image-size",
    callback=parse_image_size,
    metavar="PX|HxW",
    help="Size that the model sees: 480 for a square, 480x320 for height x width, to which pictures are squashed.",
)
reduced_decoding_option = click.option(
    "--reduced-decoding",
    is_flag=True,
    help="Decode large JPEGs smaller than they are: faster, and vectors change a little.",
)
offline_option = click.option(
    "--offline", is_flag=True, help="Ask no server; take models from the cache only."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")


def go_offline() -> None:
    """What --offline does. huggingface_hub reads the variable when it is imported, for models and hf:// alike."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def must_not_be_given(names: Iterable[str], why: str) -> None:
    """Raises UsageError where an option stands on the command line. Defaults from a variable or a file may be there."""
    context = click.get_current_context()
    for name in names:
        if context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")
