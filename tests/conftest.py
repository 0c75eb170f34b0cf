"""Fixtures that many tests share."""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests decide for themselves what is in a cache; nothing may ask a server.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
# Copies of sources go where they are forgotten with the tests; removed when this process ends.
_CACHE = tempfile.TemporaryDirectory(prefix="dinokit-tests-")
os.environ["DINOKIT_CACHE"] = _CACHE.name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder becomes the current one; for modules that mark themselves with it."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hide(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Lets ``importlib.util.find_spec`` find a package no more."""

    def hidden(package: str) -> None:
        found = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
        )

    return hidden


@pytest.fixture(scope="session")
def photos() -> Path:
    """The example photographs of the repository."""
    return Path(__file__).parents[1] / "examples" / "photos"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real image sets, for slow tests: the folder in DINOKIT_DATA, or ``../shared/data`` beside the checkout."""
    folder = Path(os.environ.get("DINOKIT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real image sets are not here; set DINOKIT_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def exported_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model's folder with all three precisions and the embedders; read only."""
    pytest.importorskip("timm")
    from export_models import make_folder

    from dinokit.export import export_folder

    there = tmp_path_factory.mktemp("exported")
    source = make_folder(there / "source")
    export_folder(source, there / "out", precision="fp32,fp16,int8", target="portable,embedder")
    return there / "out"
