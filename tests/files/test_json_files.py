"""JSON files, damaged ones above all."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from dinokit.card.measured import read_measured
from dinokit.card.record import read_record
from dinokit.card.write import card_is_ours
from dinokit.errors import UsageError
from dinokit.files.json_files import read_json
from dinokit.sources import find_pictures
from dinokit.sources.labels import declared_features

DEEP = "[" * 100_000


def test_a_file_is_what_it_contains(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"größe": [1, None]}, ensure_ascii=False), "utf-8")
    assert read_json(tmp_path / "a.json") == {"größe": [1, None]}


@pytest.mark.parametrize("damaged", [DEEP.encode(), b"{", b"", b"\xff\xfe", b'"\xe9"'])
def test_all_damage_is_a_value_error(damaged: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(damaged)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError, match="No such file"):
        read_json(tmp_path / "b.json")


def test_files_nested_too_deeply_are_damaged_like_any_other(tmp_path: Path) -> None:
    for name in (
        "training.json",
        "evaluation.json",
        "config.json",
        "state.json",
        "dataset_info.json",
        "README.md",
    ):
        (tmp_path / name).write_text(DEEP)
    assert read_record(tmp_path, "0") is None
    assert read_measured(tmp_path, "0") == []
    assert not card_is_ours(tmp_path)
    with pytest.raises(UsageError, match=r"state\.json cannot be read \(it is nested too deeply\)"):
        find_pictures(tmp_path)
    assert declared_features(pa.schema([], {"huggingface": DEEP}), str(tmp_path / "a.arrow")) == {}
