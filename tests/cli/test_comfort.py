"""Defaults from variables and a file, and completion in the shell."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

from dinokit.cli import COMMANDS, cli
from dinokit.cli._defaults import SHARED, config_file
from dinokit.loading.zoo import ZOO

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the one who runs the tests."""
    for name in list(os.environ):
        if name.startswith("DINOKIT_"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("click.get_app_dir", lambda name: str(tmp_path / name))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A command ``embed`` that only notes what it was given."""
    noted: dict[str, Any] = {}

    @click.command()
    @click.argument("photos", nargs=-1)
    @click.option("-m", "--model", default="starter")
    @click.option("-b", "--batch-size", type=click.IntRange(1), default=32)
    @click.option("--set", "assignments", multiple=True)
    @click.option("--json", "as_json", is_flag=True)
    @click.option("-q", "--quiet", is_flag=True)
    def embed(**values: Any) -> None:
        noted.update(values)

    monkeypatch.setattr("dinokit.cli.embed.embed", embed)
    yield noted


def run(*args: str, **variables: str) -> Result:
    return CliRunner().invoke(cli, args, env=variables, prog_name="dinokit")


# -- variables


def test_a_variable_for_one_command_and_for_all(seen: dict[str, Any]) -> None:
    result = run("embed", DINOKIT_EMBED_BATCH_SIZE="64", DINOKIT_MODEL="dino_vits16", DINOKIT_QUIET="1")
    assert result.exit_code == 0 and result.stderr == ""
    assert (seen["batch_size"], seen["model"], seen["quiet"], seen["as_json"]) == (
        64,
        "dino_vits16",
        True,
        False,
    )
    run("embed", DINOKIT_EMBED_MODEL="mine", DINOKIT_MODEL="dino_vits16", DINOKIT_EMBED_JSON="true")
    assert (seen["model"], seen["as_json"]) == ("mine", True)
    run("embed", "-m", "given", DINOKIT_EMBED_MODEL="mine")
    assert seen["model"] == "given"
    run("embed", DINOKIT_EMBED_SET="epochs=3 lr=1", DINOKIT_BATCH_SIZE="64", DINOKIT_MODEL="")
    assert (seen["assignments"], seen["batch_size"], seen["model"]) == (("epochs=3", "lr=1"), 32, "starter")


def test_a_wrong_value_names_its_variable(seen: dict[str, Any]) -> None:
    result = run("embed", DINOKIT_EMBED_BATCH_SIZE="many")
    assert result.exit_code == 2
    assert (
        "'many' is not a valid integer range.\nThe value comes from the variable DINOKIT_EMBED_BATCH_SIZE.\n"
        in result.stderr
    )
    result = run("embed", "-b", "0", DINOKIT_EMBED_BATCH_SIZE="2")
    assert "0 is not in the range" in result.stderr and "comes from" not in result.stderr


def test_a_misspelt_variable_is_told(seen: dict[str, Any]) -> None:
    result = run("embed", DINOKIT_MODLE="x", DINOKIT_EMBED_BATCHSIZE="2", DINOKIT_TRAIN_RECIPE="small")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "Warning: DINOKIT_EMBED_BATCHSIZE is not known; did you mean DINOKIT_EMBED_BATCH_SIZE?",
        "Warning: DINOKIT_MODLE is not known; did you mean DINOKIT_MODEL?",
    ]


@pytest.mark.parametrize("name", COMMANDS)
def test_variables_are_named_after_options(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    for option in command.params:
        if not isinstance(option, click.Option) or not option.expose_value:
            continue
        long = max(option.opts, key=len).lstrip("-")
        own = f"DINOKIT_{name}_{long}".upper().replace("-", "_")
        of_all = long in SHARED and (name, long) not in {("classify", "model"), ("search", "model")}
        shared = [f"DINOKIT_{long.upper()}"] if of_all else []
        assert option.envvar == [own, *shared]


def test_variables_in_the_code_never_count_as_misspelt(seen: dict[str, Any]) -> None:
    names: set[str] = set()
    for folder in ("dinokit", "training", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    names |= set(re.findall(r"^DINOKIT_[A-Z0-9_]+$", node.value))
    assert {"DINOKIT_DEBUG", "DINOKIT_ACCEPT_DINOV3_LICENSE"} <= names
    names.discard("DINOKIT_CONFIG")
    assert run("embed", **dict.fromkeys(names, "1")).stderr == ""


# -- the file


def test_defaults_from_a_file(seen: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(
        'model = "dino_vits16"\nengine = "onnx"\n'
        '[embed]\nbatch-size = 8\nset = ["epochs=3"]\njson = true\n[train]\nrecipe = "small"\n'
    )
    result = run("embed", DINOKIT_CONFIG=str(file))
    assert result.exit_code == 0 and result.stderr == ""
    assert seen == {
        "photos": (),
        "model": "dino_vits16",
        "batch_size": 8,
        "assignments": ("epochs=3",),
        "as_json": True,
        "quiet": False,
    }
    run("embed", "-m", "given", DINOKIT_CONFIG=str(file), DINOKIT_EMBED_BATCH_SIZE="4")
    assert (seen["model"], seen["batch_size"]) == ("given", 4)


def test_the_model_of_all_commands_is_no_classifier(tmp_path: Path) -> None:
    """Which `classify -m` names; it has a variable and a table of its own."""
    file = tmp_path / "mine.toml"
    file.write_text('model = "dino_vits16"\n')
    both = {"DINOKIT_CONFIG": str(file), "DINOKIT_MODEL": "dino_vits16"}
    assert "classifier.onnx does not exist" in run("classify", str(tmp_path), **both).stderr
    file.write_text('model = "dino_vits16"\n[classify]\nmodel = "mine.onnx"\n')
    assert "mine.onnx does not exist" in run("classify", str(tmp_path), **both).stderr


def test_the_file_in_the_users_folder_is_found(seen: dict[str, Any], tmp_path: Path) -> None:
    assert config_file() == tmp_path / "dinokit" / "config.toml"
    config_file().parent.mkdir()
    config_file().write_text("[embed]\nbatch_size = 5\n")
    assert run("embed").exit_code == 0
    assert seen["batch_size"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[embed]\nbatch-sise = 8", "[embed] has no option 'batch-sise'. Did you mean 'batch-size'?"),
        ("[embbed]\nquiet = true", "there is no command 'embbed'. Did you mean 'embed'?"),
        (
            "batch-size = 8",
            "'batch-size' is not an option that all commands share. Expected one of: model, engine,",
        ),
        (
            "model = ",
            "cannot be read as TOML (Invalid value (at end of document)); correct it, or remove it",
        ),
        ("[embed]\nbatch-size = [8]", "batch-size is [8]; expected a number, a text, true or false"),
        ("[embed]\nset = {a = 1}", "set is {'a': 1}; expected a list of texts, or one text"),
        ("[embed]\nbatch-size = 0", "0 is not in the range x>=1.\nThe value comes from "),
        ('quiet = "perhaps"', "'perhaps' is not a valid boolean"),
        ("quiet = 3", "'3' is not a valid boolean"),
        ("[embed]\nbatch-size = 2.9", "'2.9' is not a valid integer range"),
    ],
)
def test_a_wrong_file(seen: dict[str, Any], tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text(text)
    result = run("embed", DINOKIT_CONFIG=str(file))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "wrong.toml" in result.stderr
    assert not seen
    assert run("embed", "--help", DINOKIT_CONFIG=str(file)).exit_code == 0
    assert run("completion", "bash", DINOKIT_CONFIG=str(file)).exit_code == 0


def test_a_file_that_is_named_and_not_there(seen: dict[str, Any]) -> None:
    result = run("embed", DINOKIT_CONFIG="none.toml")
    assert result.exit_code == 2
    assert "DINOKIT_CONFIG=none.toml: no such file; expected a file of defaults, or unset it" in result.stderr


# -- completion


def completed(*words: str) -> list[str]:
    """What bash would be offered for the last word: lines of kind,value."""
    variables = {
        "_DINOKIT_COMPLETE": "bash_complete",
        "COMP_WORDS": " ".join(words),
        "COMP_CWORD": str(len(words) - 1),
    }
    return run(**variables).stdout.splitlines()


def test_commands_and_options_are_completed() -> None:
    assert completed("dinokit", "") == [f"plain,{name}" for name in COMMANDS]
    assert completed("dinokit", "em") == ["plain,embed"]
    assert "plain,--help" in completed("dinokit", "--")
    assert completed("dinokit", "embed", "--batch") == ["plain,--batch-size"]
    assert completed("dinokit", "embed", "--engine", "o") == ["plain,onnx"]


def test_models_devices_and_files_are_completed() -> None:
    assert completed("dinokit", "embed", "-m", "dinov2_vits") == [
        "plain,dinov2_vits14",
        "plain,dinov2_vits14_reg",
    ]
    assert completed("dinokit", "info", "") == ["plain,starter", *(f"plain,{name}" for name in ZOO)]
    assert completed("dinokit", "embed", "-m", "runs/") == ["file,runs/"]
    assert completed("dinokit", "embed", "--device", "c") == ["plain,cpu", "plain,cuda"]
    for words in (["embed", "ph"], ["embed", "-o", "ph"], ["atlas", "ph"], ["knn", "--reference", "ph"]):
        assert completed("dinokit", *words) == ["file,ph"]
    assert completed("dinokit", "embed", "--revision", "ma") == [""]


def test_completing_a_command_imports_no_other() -> None:
    variables = {"_DINOKIT_COMPLETE": "bash_complete", "COMP_WORDS": "dinokit e", "COMP_CWORD": "1"}
    code = "import sys\ntry:\n from dinokit.cli import main; main()\nfinally: print(sorted(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, **variables},
        check=True,
    )
    assert done.stdout.startswith("plain,embed\nplain,eval\nplain,export\n")
    assert not {f"dinokit.cli.{name}" for name in COMMANDS} & set(re.findall(r"'([\w.]+)'", done.stdout))
    assert "'numpy'" not in done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_of_each_shell(shell: str) -> None:
    result = run("completion", shell)
    assert result.exit_code == 0 and result.stderr == ""
    assert f"_DINOKIT_COMPLETE={shell}_complete" in result.stdout
    assert "dinokit" in result.stdout and "%(" not in result.stdout


def test_an_unknown_shell() -> None:
    result = run("completion", "powershell")
    assert result.exit_code == 2
    assert "'powershell' is not one of 'bash', 'zsh', 'fish'" in result.stderr


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., str]:
    """Runs a line in a shell that has ``dinokit`` on its path and its script read."""
    command = tmp_path / "bin" / "dinokit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dinokit "$@"\n')
    command.chmod(0o755)

    def in_shell(name: str, line: str) -> str:
        if shutil.which(name) is None:
            pytest.skip(f"there is no {name} here")
        (tmp_path / "script").write_text(run("completion", name).stdout)
        done = subprocess.run(
            [name, "-c", line.format(script=tmp_path / "script")],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"},
            check=True,
        )
        return done.stdout

    return in_shell


def test_bash_completes(shell: Callable[..., str]) -> None:
    line = (
        "source {script}; COMP_WORDS=(dinokit embed --eng); COMP_CWORD=2; _dinokit_completion dinokit; "
        'echo "${{COMPREPLY[@]}}"; complete -p dinokit'
    )
    first, second = shell("bash", line).splitlines()
    assert first == "--engine"
    assert second.startswith("complete ") and second.endswith(" -F _dinokit_completion dinokit")


def test_fish_completes(shell: Callable[..., str]) -> None:
    assert shell("fish", "source {script}; complete -C 'dinokit mod'").split()[0] == "models"


def test_zsh_reads_the_script(shell: Callable[..., str]) -> None:
    line = "autoload -U compinit; compinit -D -u; source {script}; print ${{_comps[dinokit]}}"
    assert shell("zsh", line).strip() == "_dinokit_completion"


# -- defaults that contradict the command line, and those of other commands


def test_a_variable_of_another_command_is_no_misspelling(seen: dict[str, Any]) -> None:
    assert run("embed", "x", DINOKIT_KNN_BATCH_SIZE="8", DINOKIT_FIT_DEVICE="cpu").stderr == ""
    said = run("embed", "x", DINOKIT_KNN_BATCHSIZE="8").stderr
    assert said == "Warning: DINOKIT_KNN_BATCHSIZE is not known; did you mean DINOKIT_KNN_BATCH_SIZE?\n"


def test_the_command_line_wins_over_a_default_that_contradicts_it(photos: Path, tmp_path: Path) -> None:
    table = str(tmp_path / "t.parquet")
    for option, variable in (
        ("--overwrite", "DINOKIT_EMBED_UPDATE"),
        ("--update", "DINOKIT_EMBED_OVERWRITE"),
        ("-q", "DINOKIT_EMBED_DTYPE"),
    ):
        value = "float32" if variable.endswith("DTYPE") else "true"
        done = run("embed", str(photos), "-o", table, option, **{variable: value})
        assert done.exit_code == 0, done.stderr
    both = {"DINOKIT_EMBED_UPDATE": "1", "DINOKIT_EMBED_OVERWRITE": "1"}
    done = run("embed", str(photos), "-o", table, **both)
    assert done.exit_code == 2
    assert "--update comes from the variable DINOKIT_EMBED_UPDATE" in done.stderr


def test_defaults_for_figures_do_not_contradict_no_figures(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    done = run("card", missing, "--no-figures", DINOKIT_CARD_IMAGE_SIZE="96")
    assert "does not exist" in done.stderr and "contradicts" not in done.stderr
    done = run("card", missing, "--image-size", "96", DINOKIT_CARD_NO_FIGURES="1")
    assert "does not exist" in done.stderr and "contradicts" not in done.stderr
    assert "contradicts" in run("card", missing, "--no-figures", "--image-size", "96").stderr


def test_a_model_of_all_commands_with_a_space_is_one_model(tmp_path: Path) -> None:
    done = run("eval", "--reference", str(tmp_path), DINOKIT_MODEL="my models/first")
    assert "my models/first" in done.stderr and done.exit_code != 0


def test_search_takes_a_model_of_its_own_and_a_revision_needs_one(photos: Path, tmp_path: Path) -> None:
    table, picture = str(tmp_path / "t.parquet"), str(sorted(photos.glob("*.jpg"))[0])
    assert run("embed", picture, "-o", table).exit_code == 0
    shutil.copy(picture, tmp_path / "new.jpg")
    new = str(tmp_path / "new.jpg")
    (tmp_path / "mine.toml").write_text('model = "no/such"\n[search]\nmodel = "no_such_model"\n')
    done = run("search", new, "--in", table, DINOKIT_CONFIG=str(tmp_path / "mine.toml"))
    assert done.exit_code != 0 and "no_such_model" in done.stderr
    done = run("search", new, "--in", table, "--revision", "main")
    assert done.exit_code == 2 and "--revision main needs a model given with --model" in done.stderr


@pytest.mark.parametrize("command", ["search", "classify"])
def test_offline_is_on_before_anything_is_looked_for(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []

    def stop(*args: Any, **named: Any) -> None:
        seen.append(os.environ.get("HF_HUB_OFFLINE"))
        raise click.UsageError("stop")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("dinokit.neighbours.search.SearchIndex.read", stop)
    monkeypatch.setattr("dinokit.classifiers.image_classifier.load_classifier", stop)
    run(
        command,
        "hf://datasets/a/b",
        *(("--in", "t.parquet") if command == "search" else ()),
        DINOKIT_OFFLINE="1",
    )
    assert seen == ["1"]
