"""What --help says, and how it looks."""

from __future__ import annotations

import importlib.util
import re

import click
import pytest
from click.testing import CliRunner

from dinokit.cli import cli

_needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")


@pytest.mark.parametrize(
    ("args", "option"),
    [
        pytest.param(("train", "PHOTOS"), "-o", marks=_needs_torch),
        (("export", "starter"), "-o"),
        (("knn", "PHOTOS"), "--reference"),
        (("eval",), "--reference"),
        (("search", "QUERY"), "--in"),
        (("select", "PHOTOS"), "-n"),
    ],
)
def test_an_option_that_a_command_cannot_do_without_is_marked(args: tuple[str, ...], option: str) -> None:
    refused = CliRunner().invoke(cli, args)
    assert refused.exit_code == 2 and option in refused.stderr
    command = cli.get_command(click.Context(cli), args[0])
    assert command is not None
    (found,) = (p for p in command.params if option in p.opts)
    record = found.get_help_record(click.Context(command))
    assert record is not None and re.search(r"\[required(, except .*)?\]$", record[1])
