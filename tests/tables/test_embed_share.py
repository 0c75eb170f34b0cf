"""Several processes make one table: each its share, the last one writes it, and none undoes what another did."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_engine import FakeEngine, InterruptedEngine, backbone_of
from numpy.typing import NDArray
from small_models import picture

from dinokit.errors import UsageError
from dinokit.tables.embeddings import read_embeddings
from dinokit.tables.run import Interrupted, RunSummary, Share, embed_to_table, parts_folder
from dinokit.tables.share import sole_writer

SHARD = 2


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """11 pictures, so six shards; the fourth cannot be read."""
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / f"{i:02}.png" for i in range(11)]
    for i, path in enumerate(paths):
        picture(40 + i, 60 - i, seed=i).save(path)
    paths[3].write_bytes(b"")
    return paths


def embed(
    files: list[Path], output: Path, share: str | None, engine: FakeEngine | None = None, **options: Any
) -> RunSummary:
    return embed_to_table(
        files,
        output,
        backbone_of(engine),
        batch_size=SHARD,
        shard_size=SHARD,
        share=Share.parse(share) if share else None,
        **options,
    )


def computed(engine: FakeEngine) -> int:
    return sum(shape[0] for shape in engine.shapes)


@pytest.mark.parametrize("order", [(1, 2, 3), (3, 1, 2)])
def test_shares_make_the_table_that_one_process_makes(
    files: list[Path], tmp_path: Path, order: tuple[int, ...]
) -> None:
    output, whole = tmp_path / "t.parquet", tmp_path / "whole.parquet"
    embed(files, whole, None)
    engines = [FakeEngine() for _ in order]
    planned: list[int] = []
    seen: list[int] = []
    summaries = [
        embed(
            files,
            output,
            f"{number}/3",
            engine,
            on_planned=planned.append,
            on_progress=lambda done, _: seen.append(done),
        )
        for number, engine in zip(order, engines, strict=True)
    ]
    assert [summary.written for summary in summaries] == [False, False, True]
    assert [summary.waiting for summary in summaries] == [11 - planned[0], planned[2], 0]
    assert [summary.rows for summary in summaries] == [planned[0], planned[1], 11]
    assert sum(planned) == sum(seen) == 11 and sorted(planned) == [3, 4, 4]
    assert (summaries[2].embedded, summaries[2].failed) == (10, 1)
    assert max(map(computed, engines)) <= 4  # nobody did another's work
    ours, theirs = read_embeddings(output), read_embeddings(whole)
    np.testing.assert_array_equal(ours.embeddings, theirs.embeddings)
    assert (ours.paths, ours.sizes, ours.errors) == (theirs.paths, theirs.sizes, theirs.errors)
    assert ours.origin["failed"] == 1 and ours.origin["rows"] == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "t.parquet", "whole.parquet"]
    again = FakeEngine()
    assert embed(files, output, "2/3", again).already_done and not again.shapes


def test_without_a_share_the_rest_is_done(files: list[Path], tmp_path: Path) -> None:
    output, engine = tmp_path / "t.parquet", FakeEngine()
    embed(files, output, "1/2")
    summary = embed(files, output, None, engine)
    assert summary.written and summary.resumed == 6 and len(read_embeddings(output)) == 11
    assert computed(engine) <= 6


def test_more_shares_than_shards(files: list[Path], tmp_path: Path) -> None:
    summary = embed(files, tmp_path / "t.parquet", "9/9")
    assert (summary.rows, summary.waiting, summary.written) == (0, 11, False)


def test_ctrl_c_in_a_share_leaves_the_others_alone(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    embed(files, output, "1/2")
    with pytest.raises(Interrupted) as caught:
        embed(files, output, "2/2", InterruptedEngine(0))
    assert (caught.value.done, caught.value.rows) == (0, 5)
    engine = FakeEngine()
    assert embed(files, output, None, engine).written and computed(engine) <= 6


def test_only_one_writes(tmp_path: Path) -> None:
    with sole_writer(tmp_path) as first, sole_writer(tmp_path) as second:
        assert first and not second
    with sole_writer(tmp_path / "cleared away") as late:
        assert not late


def test_a_writer_that_was_killed_is_replaced_by_the_command_without_a_share(
    files: list[Path], tmp_path: Path
) -> None:
    output = tmp_path / "t.parquet"
    embed(files, output, "1/2")
    with sole_writer(parts_folder(output)):
        summary = embed(files, output, "2/2")
        assert (summary.waiting, summary.written, summary.rows) == (0, False, 5) and not output.exists()
        assert embed(files, output, None).written
    assert len(read_embeddings(output)) == 11 and not parts_folder(output).exists()


def test_a_writer_that_was_killed_is_replaced_by_any_share(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    embed(files, output, "1/2")
    code = (
        "import os, signal, sys; from pathlib import Path; from dinokit.tables.share import sole_writer\n"
        "with sole_writer(Path(sys.argv[1])) as first: os.kill(os.getpid(), signal.SIGKILL if first else 0)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(parts_folder(output))])
    assert killed.returncode == -9
    assert embed(files, output, "2/2").written
    assert len(read_embeddings(output)) == 11 and not parts_folder(output).exists()


class MeanwhileEngine(FakeEngine):
    """Something happens during its first run of the network."""

    def __init__(self, event: Callable[[], object]) -> None:
        super().__init__()
        self.event = event

    def run(
        self, pixel_values: NDArray[np.float32], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.float32]]:
        if not self.shapes:
            self.event()
        return super().run(pixel_values, outputs)


def test_a_share_that_another_process_overtakes_finds_the_table(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    summary = embed(files, output, "1/2", MeanwhileEngine(lambda: embed(files, output, None)))
    assert summary.written and summary.waiting == 0
    assert len(read_embeddings(output)) == 11 and not parts_folder(output).exists()


def test_update_in_shares(files: list[Path], tmp_path: Path) -> None:
    """The old table is there all the time, from the very same files where only the failed ones are tried again."""
    output = tmp_path / "t.parquet"
    time.sleep(0.1)  # what changed just before a table was begun is embedded again
    embed(files, output, None)
    first = embed(files, output, "1/2", update=True)
    assert (first.written, first.waiting, first.kept) == (False, 5, 6)
    assert parts_folder(output).exists()
    engine = FakeEngine()
    second = embed(files, output, "2/2", engine, update=True)
    assert second.written and not engine.shapes and (second.kept, second.failed) == (4, 1)


def test_what_a_share_must_not_do(files: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "t.parquet"
    embed(files, output, "1/2")
    with pytest.raises(UsageError, match="overwrite in a share would discard"):
        embed(files, output, "2/2", overwrite=True)
    assert list(parts_folder(output).glob("*.parquet"))
    with pytest.raises(UsageError, match="made by another model"):
        embed_to_table(
            files, output, backbone_of(sha="b" * 64), batch_size=2, shard_size=2, share=Share(2, 2)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0/3", "counted from 1: 1/3 to 3/3"),
        ("4/3", "there is no share 4 of 3"),
        ("1/0", "cannot have 0 shares"),
        ("2of3", "is not a share; give 2/8"),
        ("", "is not a share"),
    ],
)
def test_shares_that_are_none(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Share.parse(text)
