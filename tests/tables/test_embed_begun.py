"""Ctrl-C in the middle of a shard: what it had computed is kept, and computed no second time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from fake_engine import FakeEngine, InterruptedEngine, backbone_of
from small_models import picture

from dinokit.errors import DinokitError
from dinokit.tables.embeddings import read_embeddings
from dinokit.tables.run import Interrupted, embed_to_table, parts_folder


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """12 pictures; the fourth cannot be read."""
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i:02}.png" for i in range(12)]
    for i, path in enumerate(paths):
        picture(40 + i, 60 - i, seed=i).save(path)
    paths[3].write_bytes(b"")
    return paths


def interrupt(files: list[Path], output: Path, at: int) -> Interrupted:
    with pytest.raises(Interrupted) as caught:
        embed_to_table(files, output, backbone_of(InterruptedEngine(at)), batch_size=2)
    return caught.value


def test_what_a_shard_had_computed_is_not_computed_again(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    assert interrupt(files, output, at=3).done == 5  # three batches of two, less the picture that failed
    assert (
        interrupt(files, output, at=1).done == 6
    )  # of two that were left, the fourth again without a vector
    engine = FakeEngine()
    summary = embed_to_table(files, output, backbone_of(engine), batch_size=2)
    assert (summary.resumed, summary.embedded, summary.failed) == (6, 11, 1)
    assert sum(shape[0] for shape in engine.shapes) == 6
    assert not parts_folder(output).exists()
    whole = tmp_path / "whole.parquet"
    embed_to_table(files, whole, backbone_of(FakeEngine()), batch_size=2)
    ours, theirs = read_embeddings(output), read_embeddings(whole)
    np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)
    assert (ours.paths, ours.sizes, ours.errors) == (theirs.paths, theirs.sizes, theirs.errors)


def test_a_killed_run_loses_no_more_than_seconds(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(done: int, _: int) -> None:
        nonlocal batches
        batches += 1
        if batches == 4:
            raise MemoryError  # as a kill, it is not handled

    output, batches = tmp_path / "t.parquet", 0
    monkeypatch.setattr("dinokit.tables.shards._KEEP_EVERY_S", 0)
    with pytest.raises(MemoryError):
        embed_to_table(files, output, backbone_of(FakeEngine()), batch_size=2, on_progress=killed)
    summary = embed_to_table(files, output, backbone_of(FakeEngine()), batch_size=2)
    assert (summary.resumed, summary.embedded) == (
        5,
        11,
    )  # three batches of two, less the picture that failed


def test_a_damaged_beginning_is_computed_again(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    interrupt(files, output, at=3)
    (begun,) = parts_folder(output).glob("*.begun.npz")
    begun.write_bytes(begun.read_bytes()[:100])
    assert embed_to_table(files, output, backbone_of(FakeEngine()), batch_size=2).resumed == 0


def test_a_full_disk_says_what_is_kept(
    files: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    output = tmp_path / "t.npy"
    with monkeypatch.context() as patch:
        patch.setattr("dinokit.tables.run.write_embeddings", full)
        with pytest.raises(
            DinokitError, match=r"t\.npy cannot be written \(No space .*; 12 of 12 pictures are done"
        ):
            embed_to_table(files, output, backbone_of(FakeEngine()))
    assert embed_to_table(files, output, backbone_of(FakeEngine())).resumed == 12
