"""Defaults from the environment and from a file, for every option of every command.

=================================  ================================================================
the command line                   wins over all others
``DINOKIT_EMBED_BATCH_SIZE=64``    an option of one command, named as in --help
``DINOKIT_MODEL=dino_vits16``      one of ``SHARED``, for every command that has it
``config.toml``                    the same: a table for each command, and above them for all
=================================  ================================================================

::

    model = "dino_vits16"
    [embed]
    batch-size = 64

``DINOKIT_CONFIG`` names the file; by default it is ``config.toml`` in the user's folder for dinokit.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

__all__ = [
    "DEFAULTS_HELP",
    "SHARED",
    "add_variables",
    "config_file",
    "SeveralModels",
    "defaults_of",
    "misspelt",
    "origin_of_option",
    "origin_of_value",
]

SHARED = ("model", "engine", "device", "workers", "offline", "quiet")
"""Options that mean the same in every command that has them."""
_OF_ANOTHER_MEANING = {("classify", "model"), ("search", "model")}
"""(command, option) of such a name that mean something else: a file of ``dinokit fit``; the model of a table."""

DEFAULTS_HELP = """\b
Defaults for options. The command line overrides variables, and these the file:
  DINOKIT_EMBED_BATCH_SIZE=64    an option of one command, by its name
  DINOKIT_MODEL=dino_vits16      for all commands; also ENGINE, DEVICE, WORKERS, OFFLINE, QUIET
  DINOKIT_CONFIG=defaults.toml   a file: model = "dino_vits16", [embed] batch-size = 64"""

_PREFIX = "DINOKIT_"
# Read elsewhere; not options.
_OTHERS = ("DEBUG", "CONFIG", "DATA", "CACHE", "MAX_PIXELS", "ACCEPT_DINOV3_LICENSE")


def _options(command: click.Command) -> dict[str, click.Option]:
    """Options that give a value, by their long names without leading dashes."""
    found = {}
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.expose_value:
            found[max(parameter.opts, key=len).lstrip("-")] = parameter
    return found


# -- variables


def add_variables(name: str, command: click.Command) -> None:
    """Gives each option a variable named after it (click would name it after the function's argument)."""
    for option_name, option in _options(command).items():
        if option.envvar is None:
            ending = _ending(option_name)
            option.envvar = [f"{_PREFIX}{_ending(name)}_{ending}"]
            if option_name in SHARED and (name, option_name) not in _OF_ANOTHER_MEANING:
                option.envvar.append(_PREFIX + ending)


def _ending(name: str) -> str:
    return name.upper().replace("-", "_")


class SeveralModels(click.Option):
    """An option that may be repeated; its shared variable names one model and is not split at spaces."""

    def value_from_envvar(self, ctx: click.Context) -> Any:
        shared = _PREFIX + _ending(max(self.opts, key=len).lstrip("-"))
        first = next((name for name in self.envvar or () if os.environ.get(name)), None)
        return [os.environ[shared]] if first == shared else super().value_from_envvar(ctx)


def misspelt(
    command: click.Command,
    variables: Iterable[str],
    others: Iterable[str] = (),
    load: Callable[[str], click.Command | None] = lambda _: None,
) -> list[tuple[str, str]]:
    """(variable, probable intention) for variables that nearly name an option.

    Args:
        command: the command that runs.
        variables: names of all variables.
        others: names of the other commands; a variable that begins with one is of that command.
        load: returns one of these, with its variables.
    """
    general = {*(_PREFIX + _ending(name) for name in SHARED), *(_PREFIX + name for name in _OTHERS)}
    known = general | _variables_of(command)
    found = []
    for variable in sorted(variables):
        if not variable.startswith(_PREFIX) or variable in known:
            continue
        owner = next((name for name in others if variable.startswith(f"{_PREFIX}{_ending(name)}_")), None)
        other = None if owner is None else load(owner)
        possible = known if other is None else _variables_of(other)
        if variable in possible:
            continue
        endings = {name.removeprefix(_PREFIX): name for name in sorted(possible)}
        near = difflib.get_close_matches(variable.removeprefix(_PREFIX), endings, n=1, cutoff=0.75)
        found += [(variable, endings[near[0]])] if near else []
    return found


def _variables_of(command: click.Command) -> set[str]:
    return {name for option in _options(command).values() for name in _names_of(option)}


def _names_of(parameter: click.Parameter) -> list[str]:
    return [parameter.envvar] if isinstance(parameter.envvar, str) else list(parameter.envvar or ())


# -- the file


def config_file() -> Path:
    """The file of defaults; it need not exist unless ``DINOKIT_CONFIG`` names it."""
    named = os.environ.get("DINOKIT_CONFIG")
    return Path(named) if named else Path(click.get_app_dir("dinokit")) / "config.toml"


def defaults_of(name: str, command: click.Command, commands: Iterable[str]) -> dict[str, Any]:
    """The file's values for the options of one command, by the names of its function's arguments.

    Raises:
        click.UsageError: the file cannot be read, or names a command or an option that does not exist.
    """
    path = config_file()
    options = _options(command)
    if not options:
        return {}
    if not path.is_file():
        if os.environ.get("DINOKIT_CONFIG"):
            raise click.UsageError(
                f"DINOKIT_CONFIG={path}: no such file; expected a file of defaults, or unset it"
            )
        return {}
    values = _read(path)
    tables = {key: value for key, value in values.items() if isinstance(value, dict)}
    for key in tables:
        _must_be_one_of(key, commands, f"{path}: there is no command {key!r}")
    found = {}
    for key, value in values.items():
        if key not in tables:
            _must_be_one_of(_dashed(key), SHARED, f"{path}: {key!r} is not an option that all commands share")
            if (name, _dashed(key)) not in _OF_ANOTHER_MEANING:
                found[_dashed(key)] = value
    for key, value in tables.get(name, {}).items():
        _must_be_one_of(_dashed(key), options, f"{path}: [{name}] has no option {key!r}")
        found[_dashed(key)] = value
    return {
        options[key].name or key: _plain(found[key], options[key], path)
        for key in found.keys() & options.keys()
    }


def _plain(value: Any, option: click.Option, path: Path) -> Any:
    parts = value if isinstance(value, list) and option.multiple else [value]
    if all(isinstance(part, str | int | float) for part in parts):  # bool is an int
        # As text, so that click checks it like the command line's; a number 2.9 would silently become 2 workers.
        texts = [str(part).lower() if isinstance(part, bool) else str(part) for part in parts]
        return texts if option.multiple else texts[0]
    expected = "a list of texts, or one text" if option.multiple else "a number, a text, true or false"
    raise click.UsageError(f"{path}: {option.opts[-1].lstrip('-')} is {value!r}; expected {expected}")


def _read(path: Path) -> Mapping[str, Any]:
    import tomllib  # imported here: most machines have no such file

    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.UsageError(
            f"{path} cannot be read as TOML ({error}); correct it, or remove it"
        ) from error


def _dashed(key: str) -> str:
    return key.replace("_", "-")


def _must_be_one_of(key: str, known: Iterable[str], problem: str) -> None:
    known = list(known)
    if key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        raise click.UsageError(
            f"{problem}. "
            + (f"Did you mean {near[0]!r}?" if near else f"Expected one of: {', '.join(known)}.")
        )


# -- where a value came from


def origin_of_value(error: click.UsageError) -> str | None:
    """Where an invalid value came from, if not from the command line: a variable or the file."""
    if not isinstance(error, click.BadParameter) or error.ctx is None or error.param is None:
        return None
    return origin_of_option(error.ctx, error.param)


def origin_of_option(context: click.Context, parameter: click.Parameter) -> str | None:
    """Where a value came from, if not from the command line: a variable or the file."""
    source = context.get_parameter_source(parameter.name or "")
    if source is ParameterSource.ENVIRONMENT:
        return next((f"the variable {name}" for name in _names_of(parameter) if os.environ.get(name)), None)
    return str(config_file()) if source is ParameterSource.DEFAULT_MAP else None
