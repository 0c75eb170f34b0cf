"""Options shared by the commands that run a model, and checks of option values."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, TypeVar

import click

from dinokit.cli._defaults import origin_of_option

__all__ = [
    "DEFAULT_MODEL",
    "MODEL_SETTINGS",
    "FiniteRange",
    "batch_size_option",
    "default_yields",
    "device_option",
    "engine_option",
    "go_offline",
    "image_size_option",
    "is_on_the_command_line",
    "model_options",
    "json_rows_option",
    "must_not_be_given",
    "offline_option",
    "origin_in_words",
    "parse_image_size",
    "quiet_option",
    "reduced_decoding_option",
    "temperature_option",
    "unknown_below_option",
    "with_values",
]

DEFAULT_MODEL = "starter"
MODEL_SETTINGS = ("model", "revision", "engine", "device", "image_size", "reduced_decoding", "batch_size")
"""Options that have no effect if every input is a table of embeddings."""

F = TypeVar("F", bound=Callable[..., Any])


class FiniteRange(click.FloatRange):
    """click's FloatRange, but refusing nan and inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a finite number", param, ctx)
        return number


engine_option = click.option(
    "--engine",
    type=click.Choice(["auto", "onnx", "torch"]),
    default="auto",
    show_default=True,
    help="onnx: ONNX Runtime; torch: PyTorch; auto: ONNX Runtime if it can run the model.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    help="auto: an accelerator if there is one; or cpu, cuda, cuda:1, mps …",
)
batch_size_option = click.option(
    "-b", "--batch-size", type=click.IntRange(1), default=32, show_default=True, help="Pictures per batch."
)


def model_options(command: F) -> F:
    """Adds ``--model``, ``--revision``, ``--engine`` and ``--device``, in this order."""
    options = (
        click.option(
            "-m", "--model", default=DEFAULT_MODEL, show_default=True, help="Model name, path or Hub id."
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
    """Adds options to a command, and passes those that are fields of a dataclass as one object, its first argument.

    Args:
        values: the dataclass; each of its fields is one of the options.
        options: in the order of ``--help``; the function takes those that the dataclass lacks by name.
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
    help="Model input size: 480 for a square, or 480x320 for height x width, to which pictures are squashed.  "
    "[default: the model's own]",
)
reduced_decoding_option = click.option(
    "--reduced-decoding",
    is_flag=True,
    help="Decode large JPEGs at a reduced size: faster, but vectors change a little.",
)
temperature_option = click.option(
    "--temperature",
    type=FiniteRange(0, min_open=True),
    default=0.07,
    show_default=True,
    help="Votes are weighted by exp(similarity / temperature).",
)
unknown_below_option = click.option(
    "--unknown-below",
    type=FiniteRange(0, 1),
    metavar="P",
    help="Leave a photograph unlabelled if its label is less probable than this.",
)
json_rows_option = click.option(
    "--json", "as_json", is_flag=True, help="Print a summary as JSON; without -o, include all rows."
)
offline_option = click.option(
    "--offline", is_flag=True, help="Do not contact the Hub; use cached models only."
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Print errors only.")


def go_offline() -> None:
    """Implements --offline. huggingface_hub reads the variable on import, for models and hf:// alike."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def is_on_the_command_line(name: str) -> bool:
    """Whether an option was given on the command line, not by a variable, by a file or not at all."""
    return click.get_current_context().get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def default_yields(name: str, *others: str) -> bool:
    """Whether an option from a variable or a file yields to a contradicting one on the command line."""
    return not is_on_the_command_line(name) and any(map(is_on_the_command_line, others))


def origin_in_words(*names: str) -> str:
    """For the end of an error message: where options that were not on the command line came from."""
    context = click.get_current_context()
    origins = []
    for option in context.command.params:
        origin = origin_of_option(context, option) if option.name in names else None
        if origin is not None:
            origins.append(f"{max(option.opts, key=len)} comes from {origin}")
    return f" ({'; '.join(origins)})" if origins else ""


def must_not_be_given(names: Iterable[str], why: str) -> None:
    """Raises UsageError if an option is on the command line. Defaults from a variable or a file are ignored."""
    for name in names:
        if is_on_the_command_line(name):
            raise click.UsageError(f"--{name.replace('_', '-')} {why}")
