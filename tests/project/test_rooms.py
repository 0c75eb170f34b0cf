"""The direction of imports, what importing costs, and that public names and documentation agree."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import dinokit
from dinokit.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]


def imported(path: Path, *, module_level: bool) -> set[str]:
    """Names of the modules that a file imports, anywhere or outside functions and TYPE_CHECKING only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes: list[ast.AST] = list(ast.walk(tree))
    if module_level:
        hidden: set[int] = set()
        for node in ast.walk(tree):
            types_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            if types_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                hidden |= {id(inner) for inner in ast.walk(node)}
        nodes = [node for node in nodes if id(node) not in hidden]
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(names: set[str], *parts: str) -> set[str]:
    return {n for n in names if any(n == f"dinokit.{p}" or n.startswith(f"dinokit.{p}.") for p in parts)}


SDK = sorted((ROOT / "dinokit").rglob("*.py"))
TRAINING = sorted((ROOT / "training").rglob("*.py"))
EXPORT = sorted((ROOT / "export").rglob("*.py"))


def test_the_rooms_were_found() -> None:
    assert len(SDK) > 20 and len(TRAINING) > 10 and len(EXPORT) >= 3


@pytest.mark.parametrize("path", SDK, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_sdk_imports_neither_training_nor_export(path: Path) -> None:
    assert not room(imported(path, module_level=True), "training", "export")
    if path.parent.name != "cli":  # a command may, in its body
        assert not room(imported(path, module_level=False), "training", "export")


# From the bottom up.
FLOORS = [
    *("_version", "errors", "wording", "estimator", "files", "pictures", "sources", "model_folder"),
    *("vit_graph", "runtime", "features", "loading", "diagnosis", "tables", "neighbours", "drawing"),
    *("classifiers", "atlas", "card", "cli", "__main__"),
]
UP_WHEN_CALLED = {("pictures", "sources"), ("model_folder", "card"), ("features", "loading")}
"""Rooms that import from a higher one inside functions: a picture may be in an archive, a new folder gets its first
card, an unpickled backbone is loaded again."""


@pytest.mark.parametrize(
    "path", [p for p in SDK if p != ROOT / "dinokit" / "__init__.py"], ids=lambda p: str(p.relative_to(ROOT))
)
def test_rooms_import_from_lower_rooms_only(path: Path) -> None:
    here = path.relative_to(ROOT / "dinokit").with_suffix("").parts[0]

    def higher(*, module_level: bool) -> set[str]:
        names = imported(path, module_level=module_level)
        there = {name.split(".")[1] for name in names if name.startswith("dinokit.")}
        return {name for name in there & set(FLOORS) if FLOORS.index(name) > FLOORS.index(here)}

    assert not higher(module_level=True)
    assert {(here, there) for there in higher(module_level=False)} <= UP_WHEN_CALLED


@pytest.mark.parametrize("path", TRAINING, ids=lambda p: p.name)
def test_training_does_not_import_export(path: Path) -> None:
    assert not room(imported(path, module_level=False), "export", "cli")


@pytest.mark.parametrize("path", EXPORT, ids=lambda p: p.name)
def test_export_does_not_import_training(path: Path) -> None:
    assert not room(imported(path, module_level=False), "training", "cli")


@pytest.mark.parametrize("path", SDK, ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_torch_engine_needs_torch(path: Path) -> None:
    heavy = {n.split(".")[0] for n in imported(path, module_level=True)} & {"torch", "timm", "transformers"}
    assert not heavy or path.name in ("torch.py", "timm_networks.py", "timm_blocks.py")


HEAVY = (
    "torch",
    "timm",
    "onnxruntime",
    "onnx",
    "transformers",
    "huggingface_hub",
    "pyarrow",
    "rich.progress",
)


@pytest.mark.parametrize(
    "code",
    [
        "import dinokit; dinokit.__version__; dir(dinokit)",
        "import dinokit.model_folder.contract",
        "from dinokit.cli import cli; cli(['--help'], standalone_mode=False)",
        "from dinokit.cli import cli; cli(['--version'], standalone_mode=False)",
        "from dinokit.cli import cli; cli(['embed', '--help'], standalone_mode=False)",
    ],
)
def test_light_to_import(code: str) -> None:
    check = f"{code}\nimport sys; print('HEAVY', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout


def test_public_names_exist_and_are_documented() -> None:
    for name in dinokit.__all__:
        value = getattr(dinokit, name)
        assert name == "__version__" or value.__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'load_backbon'"):
        dinokit.load_backbon  # noqa: B018
    assert set(dir(dinokit)) == set(dinokit.__all__)
    # docs/api.md has a heading for each public name, and for nothing else.
    headings = re.findall(r"^## `(\w+)", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(set(dinokit.__all__) - {"__version__"})


def test_the_help_names_every_command() -> None:
    result = CliRunner().invoke(cli, ["--help"])
    assert all(re.search(rf"^  {name} ", result.output, re.MULTILINE) for name in COMMANDS)


def test_every_public_function_and_class_has_a_docstring() -> None:
    missing = []
    for path in [*SDK, *TRAINING, *EXPORT]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), f"{path} has no docstring"
        missing += [
            f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
            for node in tree.body
            if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_")
            and not ast.get_docstring(node)
        ]
    assert not missing


def test_the_changelog_knows_this_version() -> None:
    assert f"## {dinokit.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
