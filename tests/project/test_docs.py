"""What the pages tell one to type exists: commands, options, keys of a recipe, Python names and their arguments."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import dinokit
import dinokit.export
from dinokit.cli import COMMANDS, cli
from dinokit.features.backbone import Backbone
from dinokit.loading.zoo import ZOO
from dinokit.training.recipe import Recipe, bundled_recipes, load_recipe, with_overrides

ROOT = Path(__file__).parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = ["README.md", "CONTRIBUTING.md", "examples/README.md", *DOCS]
TRAINING, COMING = ROOT / "docs" / "training.md", ROOT / "docs" / "coming-from.md"


def code(page: str) -> list[str]:
    """Lines of shell blocks, and spans of code in the text."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:sh|console)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return lines + re.findall(r"`([^`]+)`", prose)


def commands(page: str) -> list[list[str]]:
    """The words after `dinokit` of every command on a page, to the next of the shell's own signs."""
    found = []
    for line in code(page):
        for part in re.split(r"&&|;|\||<\(| &$", line):
            match = re.search(r"(?:^|[\s/])dinokit ([a-z]+(?: .*)?)$", part.strip())
            if match and not part.strip().startswith(("from ", "import ")):
                found.append(shlex.split(match[1].rstrip(")'"), comments=True))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_options_exist(page: str) -> None:
    for name, *words in commands(page):
        assert name in COMMANDS, f"{page}: dinokit {name}"
        command = cli.get_command(None, name)  # type: ignore[arg-type]
        options = {
            o for parameter in command.params for o in (*parameter.opts, *parameter.secondary_opts)
        } | {"--help"}
        for word in words:
            if re.fullmatch(r"-[a-zA-Z]|--[a-z][a-z-]*", word):
                assert word in options, f"{page}: dinokit {name} … {word}"
        for option, value in itertools.pairwise(words):
            if option == "--recipe" and "." not in value:
                assert value in bundled_recipes(), f"{page}: --recipe {value}"
            if option in ("-m", "--model", "--init-from", "--distill-from"):
                assert is_model(value), f"{page}: {option} {value}"


def is_model(name: str) -> bool:
    return name in ZOO or name in ("starter", "MODEL", "hog") or bool(re.search(r"[/.]", name))


# Keys that mean nothing alone: the recipe they are shown with, and what else is set.
GOES_WITH = {
    "freeze_backbone_epochs": ("default", ["init_from=starter"]),
    "distill_pictures": ("distill", ["distill_from=[starter, hog]", "loss=relations"]),
}


@pytest.mark.parametrize("page", PAGES)
def test_keys_of_recipes_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for quoted, plain in re.findall(r"--set (?:'([^']+)'|([a-z_]+=[^\s`']+))", text):
        assignment = quoted or plain
        if not assignment.endswith(("value", "…")):
            key = assignment.split("=")[0]
            recipe, begun = GOES_WITH.get(key, ("default", []))
            with_overrides(load_recipe(recipe), [*begun, assignment])


# Of main_dino.py, in its order, without paths and what the launcher says.
ARGUMENTS = """
    arch patch_size out_dim norm_last_layer momentum_teacher use_bn_in_head warmup_teacher_temp teacher_temp
    warmup_teacher_temp_epochs use_fp16 weight_decay weight_decay_end clip_grad batch_size_per_gpu epochs
    freeze_last_layer lr warmup_epochs min_lr optimizer drop_path_rate global_crops_scale local_crops_number
    local_crops_scale saveckp_freq seed num_workers
"""


def test_every_argument_of_the_reference_has_its_key() -> None:
    table = COMING.read_text(encoding="utf-8").split("| `main_dino.py` | recipe |")[1].split("\n\n")[0]
    rows = [row.split("|")[1:3] for row in table.splitlines()[2:]]
    arguments = re.findall(r"--(\w+)", " ".join(there for there, _ in rows))
    assert sorted(arguments) == sorted(ARGUMENTS.split())
    keys = {field.name for field in dataclasses.fields(Recipe)}
    for there, here in rows:
        assert re.findall(r"`([a-z_]+)", here), there
        assert set(re.findall(r"`([a-z_]+)", here)) <= keys, here


def python_calls(page: str) -> list[ast.Call]:
    """Calls in spans of code and Python blocks that can be read as Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    sources = code(page) + re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    calls: list[ast.Call] = []
    for source in sources:
        try:
            tree = ast.parse(source.replace("…", "..."))
        except SyntaxError:
            continue
        calls += [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return calls


def called(call: ast.Call) -> Any:
    """What of dinokit a call is of, None for other things."""
    function = call.func
    if isinstance(function, ast.Name):
        rooms = (dinokit, dinokit.export)
        return next((getattr(room, function.id) for room in rooms if function.id in room.__all__), None)
    if isinstance(function, ast.Attribute):
        if isinstance(function.value, ast.Name) and function.value.id == "backbone":
            return getattr(Backbone, function.attr)
        if function.attr in dinokit.export.__all__:
            return getattr(dinokit.export, function.attr)
    return None


@pytest.mark.parametrize("page", PAGES)
def test_python_names_and_arguments_exist(page: str) -> None:
    for call in python_calls(page):
        function = called(call)
        if function is None or isinstance(function, property):  # `transform` gives a callable
            continue
        known = inspect.signature(function).parameters
        words = {keyword.arg for keyword in call.keywords if keyword.arg}
        assert words <= set(known), f"{page}: {ast.unparse(call)}"
        first = call.args[0] if call.args else None
        if (
            function is dinokit.load_backbone
            and isinstance(first, ast.Constant)
            and isinstance(first.value, str)
        ):
            assert is_model(first.value), f"{page}: {ast.unparse(call)}"


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        file, _, anchor = link.partition("#")
        target = ROOT / page if not file else (ROOT / page).parent / file
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"


def test_calls_and_commands_are_found() -> None:
    assert len(commands("docs/cli.md")) > 40
    assert len([call for call in python_calls("docs/coming-from.md") if called(call) is not None]) > 20


def stays() -> dict[str, Any]:
    """Name and object of all that docs/api.md says will stay."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8").split("## `load_backbone`")[0]
    found = {name: getattr(dinokit, name) for name in dinokit.__all__}
    found |= {name: getattr(dinokit.export, name) for name in dinokit.export.__all__}
    for row in re.findall(r"^\| (`dinokit\..*) \| (`.*) \|$", text, re.MULTILINE):
        modules = re.findall(r"`([\w.]+)`", row[0])
        for module, names in zip(modules, row[1].split(";"), strict=True):
            found |= {
                name: getattr(importlib.import_module(module), name) for name in re.findall(r"`(\w+)`", names)
            }
    return found


def stated_signatures() -> list[ast.FunctionDef]:
    """Spans of docs/api.md like `name(a, *, b=1)`: what could stand behind `def`."""
    text = re.sub(
        r"^```.*?^```", "", (ROOT / "docs/api.md").read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    found = []
    for span in re.findall(r"`([\w.]+\([^`]+\))`", text):
        with contextlib.suppress(SyntaxError):
            found.append(
                ast.parse(f"def {span.rpartition('.')[2] if '.' in span.split('(')[0] else span}: ...").body[
                    0
                ]
            )
    return found


def test_signatures_in_the_documentation_are_the_codes() -> None:
    known = stays()
    compared = 0
    for stated in stated_signatures():
        function = known.get(stated.name, getattr(Backbone, stated.name, None))
        if function is None or isinstance(function, property):  # `transform` gives a callable
            continue
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
        arguments = stated.args
        values = [d for d in (*arguments.defaults, *arguments.kw_defaults) if d]
        if not values or any(isinstance(value, ast.Call) for value in values):
            continue  # an example of a call
        kinds = {inspect.Parameter.POSITIONAL_OR_KEYWORD: [], inspect.Parameter.KEYWORD_ONLY: []}
        for parameter in parameters:
            kinds.setdefault(parameter.kind, []).append(parameter.name)
        assert [a.arg for a in arguments.args] == kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD], stated.name
        assert [a.arg for a in arguments.kwonlyargs] == kinds[inspect.Parameter.KEYWORD_ONLY], stated.name
        defaults = dict(zip([a.arg for a in arguments.args][::-1], arguments.defaults[::-1], strict=False))
        defaults |= {a.arg: d for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if d}
        for parameter in parameters:
            if parameter.name in defaults:
                assert ast.literal_eval(defaults[parameter.name]) == parameter.default, (
                    stated.name,
                    parameter.name,
                )
        compared += 1
    assert compared > 15


def first_column(heading: str) -> set[str]:
    section = TRAINING.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| `")]
    return {name for row in rows for name in re.findall(r"`([\w-]+)`", row.split("|")[1])}


def test_the_figures_to_watch_are_those_of_a_run() -> None:
    keys: set[str] = set()
    for run in (16, 19):
        metrics = ROOT / f"benchmarks/results/starter/run-{run}.metrics.jsonl"
        keys |= {key for line in metrics.read_text(encoding="utf-8").splitlines() for key in json.loads(line)}
    assert len(first_column("What to watch")) > 8
    assert first_column("What to watch") <= keys


def test_the_verdicts_are_those_of_the_code() -> None:
    kinds = re.findall(
        r'found\["([\w-]+)"\]', (ROOT / "training/monitoring/verdicts.py").read_text(encoding="utf-8")
    )
    kinds += re.findall(
        r'"([\w-]+)": verdict', (ROOT / "training/monitoring/monitor.py").read_text(encoding="utf-8")
    )
    assert len(kinds) == 6
    assert first_column("When it collapses") == set(kinds)
