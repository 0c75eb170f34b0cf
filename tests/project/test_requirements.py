"""The oldest versions that pyproject.toml allows are those that the tests are run with."""

from __future__ import annotations

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def test_the_oldest_versions_are_those_of_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # "gpu" needs a newer ONNX Runtime than the rest.
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "gpu"}
    allowed = {}
    for line in [*project["dependencies"], *(line for lines in extras.values() for line in lines)]:
        requirement = Requirement(line)
        lowest = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
        if lowest and requirement.name not in ("mypy", "ruff"):  # no test runs with these
            assert allowed.setdefault(requirement.name, lowest[0]) == lowest[0], (
                f"two minima of {requirement.name}"
            )
    file = ROOT / "tests" / "constraints-oldest.txt"
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    pinned = {name: Version(version) for name, _, version in (line.partition("==") for line in lines)}
    # The oldest scikit-learn and FastAPI warn with later ones of these.
    assert pinned.pop("scipy") and pinned.pop("anyio")
    assert pinned == allowed
