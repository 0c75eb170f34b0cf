"""Tables as Lance datasets: written, updated, searched, read by Lance itself."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import EMBED_DIM, HEADS, PATCH, FakeEngine
from small_models import config_for, picture

from dinokit import Backbone, SearchIndex, read_embeddings
from dinokit.classifiers.labelled import is_table
from dinokit.errors import DinokitError, MissingExtraError, UsageError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.tables.origin import read_origin
from dinokit.tables.run import Interrupted, embed_to_table

CONFIG = config_for(
    VitArchitecture(embed_dim=EMBED_DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=(32, 32))
)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def lance() -> Any:
    return pytest.importorskip("lance", reason="Lance is not installed: pip install 'dinokit[lance]'")


def photos(count: int) -> list[Path]:
    paths = [Path(f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        picture(90 + i, 70, seed=i).save(path)
    return paths


def fake() -> Backbone:
    return Backbone(CONFIG, FakeEngine(), weights_sha256="0" * 64, source="a test")


def test_the_same_rows_as_parquet_and_lance_finds_the_same(lance: Any) -> None:
    paths = photos(5)
    paths[2].write_bytes(b"broken")
    embed_to_table(paths, "x.lance", fake())
    embed_to_table(paths, "x.parquet", fake())
    one, other = read_embeddings("x.lance"), read_embeddings("x.parquet")
    np.testing.assert_array_equal(one.embeddings, other.embeddings)
    assert (one.paths, one.sizes, one.errors) == (other.paths, other.sizes, other.errors)
    assert np.isnan(one.embeddings[2]).all()
    assert one.origin | {"began": 0} == other.origin | {"began": 0} and one.origin["embed_dim"] == EMBED_DIM
    assert is_table("x.lance")
    query = one.embeddings[4]
    found = lance.dataset("x.lance").to_table(nearest={"column": "embedding", "q": query, "k": 1})
    assert found.column("path").to_pylist() == ["4.png"]
    index = SearchIndex.read("x.lance")
    assert index.paths[index.search(query, 1)[1][0]] == "4.png"


def test_resume_update_and_overwrite(lance: Any) -> None:
    import time

    paths = photos(6)
    time.sleep(0.08)
    done = 0

    def stop(count: int, failed: int) -> None:
        nonlocal done
        done += count
        if done >= 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted):
        embed_to_table(paths, "x.lance", fake(), shard_size=2, batch_size=2, on_progress=stop)
    assert not Path("x.lance").exists()
    # One shard was finished, and what the second had computed was kept.
    assert embed_to_table(paths[:], "x.lance", fake(), shard_size=2, batch_size=2).resumed == 4
    assert embed_to_table(paths, "x.lance", fake()).already_done
    summary = embed_to_table(paths[::-1], "x.lance", fake(), update=True)
    assert summary.kept == 6
    assert read_embeddings("x.lance").paths == list(map(str, paths[::-1]))
    assert len(lance.dataset("x.lance").versions()) == 1
    embed_to_table(paths[:2], "x.lance", fake(), overwrite=True)
    assert len(read_embeddings("x.lance")) == 2
    assert [p.name for p in Path().glob(".x*")] == []


def test_what_is_no_dataset_is_left_alone(lance: Any) -> None:
    Path("x.lance").mkdir()
    Path("x.lance/precious.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"x\.lance exists and is not a Lance dataset"):
        embed_to_table(photos(1), "x.lance", fake(), overwrite=True)
    assert Path("x.lance/precious.txt").read_text() == "mine"
    with pytest.raises(UsageError, match=r"x\.lance: no such file"):
        read_embeddings("x.lance")
    Path("y.lance/_versions").mkdir(parents=True)
    with pytest.raises(DinokitError, match=r"y\.lance cannot be read as a Lance dataset"):
        read_embeddings("y.lance")
    assert read_origin("y.lance") == {}


def test_without_lance_it_is_said_before_anything_is_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lance", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        MissingExtraError, match=r"A Lance dataset \(\.lance\) needs pylance.*dinokit\[lance\]"
    ):
        embed_to_table(photos(1), "x.lance", fake())
