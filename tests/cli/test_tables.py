"""Tables on the screen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from dinokit.cli import cli
from dinokit.cli._messages import list_messages
from dinokit.cli._tables import as_columns, visible
from dinokit.wording import counted


def test_columns_stand_below_each_other() -> None:
    assert as_columns([("a", "bb", "c"), ("aaa", "b", "")]) == "a    bb  c\naaa  b"


def test_what_a_terminal_would_obey_is_shown() -> None:
    assert as_columns([("new\nline\x1b[2J.jpg", "x")]) == "new\\nline\\x1b[2J.jpg  x"


def test_wide_characters_take_two_places_and_accents_none() -> None:
    assert (
        as_columns([("東京", "x"), ("ko\u0308ln", "x"), ("Köln", "x")]) == "東京  x\nko\u0308ln  x\nKöln  x"
    )


@pytest.mark.skipif(os.name == "nt", reason="file names are bytes on POSIX only")
def test_names_are_shown_as_tables_hold_them() -> None:
    assert visible(os.fsdecode(b"caf\xe9.jpg")) == "caf\\xe9.jpg"
    assert visible("Käse 猫.jpg") == "Käse 猫.jpg"


def test_messages_hold_nothing_that_a_terminal_would_obey(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    list_messages(["a\x1b[2J\nb.jpg: no such file"], "Failed: ")
    assert capsys.readouterr().err == "Failed: a\\x1b[2J\\nb.jpg: no such file\n"
    result = CliRunner().invoke(cli, ["info", str(tmp_path / "\x1b[2Jmodel")])
    assert result.exit_code != 0 and "\\x1b[2Jmodel" in result.stderr and "\x1b" not in result.stderr


def test_how_many_more_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    list_messages(["a"] * 22, "", count=50, see="there")
    assert capsys.readouterr().err == "a\n" * 20 + "… and 30 more: see there\n"


def test_numbers_of_things() -> None:
    assert [counted(number, "row") for number in (0, 1, 2000)] == ["0 rows", "1 row", "2,000 rows"]
