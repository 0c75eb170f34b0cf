"""Hugging Face datasets as sources: folders of save_to_disk, Parquet as on the Hub, splits and labels.

The folders are written with pyarrow as ``datasets`` 5.2 writes them (Arrow's stream format, the struct of bytes and
path, the schema's metadata, ``state.json``, ``dataset_info.json``).
"""

from __future__ import annotations

import io
import json
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from small_models import config_for, picture, random_weights

from dinokit import load_backbone
from dinokit.classifiers.labelled import read_labelled_table
from dinokit.cli import cli
from dinokit.errors import ImageError, UsageError
from dinokit.model_folder.folder import write_model_folder
from dinokit.pictures.images import open_image
from dinokit.sources import find_pictures, is_collection, label_of, search_pictures
from dinokit.sources.datasets import split_of
from dinokit.sources.storage import filesystem_of
from dinokit.tables.embeddings import read_embeddings
from dinokit.tables.run import embed_to_table

FEATURES = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def png(seed: int) -> bytes:
    file = io.BytesIO()
    picture(20 + seed, 16, seed=seed).save(file, "PNG")
    return file.getvalue()


def table(seeds: Sequence[int], labels: Sequence[int | None], features: Any = FEATURES) -> pa.Table:
    image = pa.array(
        [{"bytes": png(seed), "path": None} for seed in seeds],
        pa.struct({"bytes": pa.binary(), "path": pa.string()}),
    )
    made = pa.table({"image": image, "label": pa.array(labels, pa.int64())})
    metadata = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    return made.replace_schema_metadata(metadata)


def write_stream(path: Path, made: pa.Table, rows: int = 2) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made, max_chunksize=rows)


def save_to_disk(folder: Path, shards: Sequence[pa.Table], **state: Any) -> None:
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{len(shards):05d}.arrow" for number in range(len(shards))]
    for name, made in zip(names, shards, strict=True):
        write_stream(folder / name, made)
    told = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "36f7", "_split": None}
    (folder / "state.json").write_text(json.dumps({**told, "_format_type": None, **state}))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES, "citation": ""}))


def widths(source: Any) -> list[int]:
    return [open_image(item).size[0] for item in find_pictures(source)]


def test_a_saved_dataset_is_its_rows_in_their_order() -> None:
    save_to_disk(Path("saved"), [table([1, 2, 3], [0, 1, None]), table([4, 5], [-1, 0])])
    # What map() leaves beside the data is not the data.
    write_stream(Path("saved/cache-146d206cae33021f.arrow"), table([9], [0]))
    found = find_pictures("saved")
    first, second = "saved/data-00000-of-00002.arrow", "saved/data-00001-of-00002.arrow"
    assert [str(item) for item in found] == [
        *(f"{first}::{i}" for i in range(3)),
        f"{second}::0",
        f"{second}::1",
    ]
    assert [label_of(item) for item in found] == ["cat", "dog", None, None, "cat"]
    assert [open_image(item).size[0] for item in found] == [21, 22, 23, 24, 25]
    assert [open_image(item).size[0] for item in reversed(found)] == [25, 24, 23, 22, 21]
    assert widths(f"{second}::1") == [25]
    assert is_collection("saved") and is_collection(first) and not is_collection(f"{first}::0")
    copies = pickle.loads(pickle.dumps(found[1:4]))
    assert [label_of(item) for item in copies] == ["dog", None, None]
    assert [item.read() for item in copies] == [png(2), png(3), png(4)]


def test_arrow_files_in_a_folder_of_ones_own() -> None:
    Path("mine").mkdir()
    for name, seed in (("b.arrow", 2), ("a.arrow", 1), ("cache-0f.arrow", 8), ("indices-0f.arrow", 9)):
        write_stream(Path("mine") / name, table([seed], [0]))
    write_stream(Path("mine/text.arrow"), pa.table({"text": ["a"]}))
    assert widths("mine") == [21, 22]


def test_splits_of_a_saved_dict() -> None:
    save_to_disk(Path("dd/train"), [table([1, 2], [0, 1])])
    save_to_disk(Path("dd/validation"), [table([3], [1])])
    Path("dd/dataset_dict.json").write_text(json.dumps({"splits": ["train", "validation"]}))
    assert widths("dd") == [21, 22, 23]
    assert widths("dd::train") == widths("dd/train") == [21, 22]
    assert widths("dd::val") == [23]
    assert is_collection("dd::val")
    with pytest.raises(
        UsageError, match=r"no split 'tain'; there are train, validation\. Did you mean dd::train\?"
    ):
        find_pictures("dd::tain")


def test_what_is_wrong_with_a_saved_dataset_is_said() -> None:
    save_to_disk(Path("a"), [table([1], [0])])
    Path("a/data-00000-of-00001.arrow").unlink()
    save_to_disk(Path("b"), [table([1], [0])], _indices_data_files=[{"filename": "indices.arrow"}])
    save_to_disk(Path("c"), [table([1], [0])])
    Path("c/state.json").write_text("{")
    save_to_disk(Path("d"), [table([1], [0])])
    Path("d/data-00000-of-00001.arrow").write_bytes(b"\xff\xff\xff\xffnonsense")
    save_to_disk(Path("e"), [table([1], [0])])
    Path("e/data-00000-of-00001.arrow").write_bytes(b"\xff\xd8\xff\xe0 a JPEG")
    for name, message in {
        "a": r"a/data-00000-of-00001\.arrow is missing",
        "b": "flatten_indices",
        "c": r"c/state\.json cannot be read",
        "d": "cannot be read as an Arrow file",
        "e": "cannot be read as an Arrow file",
    }.items():
        with pytest.raises(UsageError, match=message):
            find_pictures(name)
    # … and costs nobody else anything.
    save_to_disk(Path("good"), [table([7], [0])])
    assert [str(item) for item in search_pictures(["a", "good"]).pictures] == [
        "good/data-00000-of-00001.arrow::0"
    ]


def test_both_formats_of_arrow_and_names_beside_the_file() -> None:
    plain = table([1, 2, 3], [1, 0, 7], features=None)
    write_stream(Path("stream.arrow"), plain)
    with pa.OSFile("file.arrow", "wb") as file, pa.ipc.new_file(file, plain.schema) as writer:
        writer.write_table(plain, max_chunksize=1)
    for name in ("stream.arrow", "file.arrow"):
        assert widths(name) == [21, 22, 23]
        assert [label_of(item) for item in find_pictures(name)] == ["1", "0", "7"]
    # The schema of old files says nothing; dataset_info.json does.
    Path("dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    assert [label_of(item) for item in find_pictures("stream.arrow")] == ["dog", "cat", None]
    write_stream(Path("texts.arrow"), pa.table({"text": ["a"]}))
    with pytest.raises(UsageError, match=r"texts\.arrow has no column of pictures; its columns are text"):
        find_pictures("texts.arrow")
    with pytest.raises(ImageError, match="no picture with this name"):
        open_image("stream.arrow::3")


def test_wrong_offsets_in_an_arrow_file_cost_its_rows_not_the_process() -> None:
    good = [png(1), png(2), png(3)]
    made = pa.table({"image": pa.array(good, pa.binary()), "größe": [1, 2, 3]})
    with pa.OSFile("x.arrow", "wb") as file, pa.ipc.new_stream(file, made.schema) as writer:
        writer.write_table(made)
    data = Path("x.arrow").read_bytes()
    offsets = np.cumsum([0, *map(len, good)]).astype("<i4").tobytes()
    assert data.count(offsets) == 1
    Path("x.arrow").write_bytes(data.replace(offsets, offsets[:4] + b"\xff\xff\xff\x7f" + offsets[8:]))
    found = find_pictures("x.arrow")
    with pytest.raises(ImageError, match=r"x\.arrow cannot be read \(.*[Oo]ffset"):
        open_image(found[1])
    Path("x.arrow").write_bytes(data.replace("größe".encode(), b"gr\xff\xff\xff\xffe"))
    with pytest.raises(UsageError, match="cannot be read as an Arrow file"):
        find_pictures("x.arrow")


def test_an_arrow_file_that_became_shorter() -> None:
    write_stream(Path("x.arrow"), table([1, 2, 3], [0, 0, 0]))
    found = find_pictures("x.arrow")
    write_stream(Path("y.arrow"), table([1], [0]))
    Path("y.arrow").replace("x.arrow")
    with pytest.raises(ImageError, match="fewer rows than before"):
        open_image(found[2])


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00002.parquet", "train"),
        ("data/dev-00000-of-00001.parquet", "validation"),
        ("data/my.split-00000-of-00001-0123456789abcdef.parquet", "my.split"),
        ("default/test/0000.parquet", "test"),
        ("train/cat/1.jpg", "train"),
        ("test/train_images/1.jpg", "train"),
        ("my_eval_file.parquet", "test"),
        ("training.parquet", "train"),
        ("trains/latest.parquet", None),
        ("data/contest.parquet", None),
    ],
)
def test_the_split_in_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


def write_hub_layout(root: Path) -> None:
    """As push_to_hub leaves it, with a picture for the card."""
    (root / "data").mkdir(parents=True)
    pq.write_table(table([1, 2], [0, 1]), root / "data/train-00000-of-00002.parquet")
    pq.write_table(table([3], [1]), root / "data/train-00001-of-00002.parquet")
    pq.write_table(table([4], [-1]), root / "data/test-00000-of-00001.parquet")
    (root / "README.md").write_text("---\ndataset_info:\n  features: []\n---\n# Pets\n")
    (root / "thumbnail.png").write_bytes(png(30))


def test_parquet_as_it_lies_on_the_hub() -> None:
    write_hub_layout(Path("pets"))
    assert widths("pets") == [24, 21, 22, 23]
    assert widths("pets::train") == [21, 22, 23]
    assert [label_of(item) for item in find_pictures("pets::train")] == ["cat", "dog", "dog"]
    assert [label_of(item) for item in find_pictures("pets::test")] == [None]
    # Without a card it is a folder of somebody's, and its picture is what is meant.
    Path("pets/README.md").unlink()
    assert widths("pets") == [50]
    with pytest.raises(UsageError, match="no file or folder in it has the name of a split"):
        find_pictures("pets::train")


def test_folders_of_pictures_have_splits_too() -> None:
    for name, seed in (("train/cat/1.png", 1), ("train/dog/2.png", 2), ("val/cat/3.png", 3)):
        Path("pets", name).parent.mkdir(parents=True, exist_ok=True)
        Path("pets", name).write_bytes(png(seed))
    assert widths("pets::train") == [21, 22]
    assert widths("pets::validation") == widths("pets::val") == [23]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A file system in memory that answers to hf://, as huggingface_hub's does."""
    pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class Hub(MemoryFileSystem):  # type: ignore[misc]
        protocol = "hf"
        store: dict[str, Any] = {}  # noqa: RUF012
        pseudo_dirs = [""]  # noqa: RUF012

        @classmethod
        def _strip_protocol(cls, path: str) -> str:
            return "/" + path.removeprefix("hf://").strip("/")

        def unstrip_protocol(self, name: str) -> str:
            return "hf://" + name.strip("/")

    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "hf", Hub)
    filesystem_of.cache_clear()
    yield Hub()
    filesystem_of.cache_clear()


def test_datasets_on_the_hub(hub: Any, tmp_path: Path) -> None:
    write_hub_layout(tmp_path / "pets")
    for path in sorted((tmp_path / "pets").rglob("*.*")):
        if path.is_file():
            hub.pipe(f"/datasets/me/pets/{path.relative_to(tmp_path / 'pets')}", path.read_bytes())
    found = find_pictures("hf://datasets/me/pets::train")
    assert [str(item) for item in found] == [
        "hf://datasets/me/pets/data/train-00000-of-00002.parquet::0",
        "hf://datasets/me/pets/data/train-00000-of-00002.parquet::1",
        "hf://datasets/me/pets/data/train-00001-of-00002.parquet::0",
    ]
    assert [label_of(item) for item in found] == ["cat", "dog", "dog"]
    assert widths("hf://datasets/me/pets") == [24, 21, 22, 23]
    assert widths("hf://datasets/me/pets/data/train-00001-of-00002.parquet") == [23]
    assert is_collection("hf://datasets/me/pets::train") and is_collection("hf://datasets/me/pets")
    with pytest.raises(UsageError, match=r"no split 'dev'; there are test, train"):
        find_pictures("hf://datasets/me/pets::dev")
    with pytest.raises(UsageError, match=r"^hf://datasets/me/pest: no such file or folder$"):
        find_pictures("hf://datasets/me/pest")
    hub.pipe("/datasets/me/words/data.json", b"{}")
    with pytest.raises(UsageError, match=r"hf://datasets/me/words@~parquet"):
        find_pictures("hf://datasets/me/words")
    hub.pipe("/datasets/me/arrows/a.arrow", b"ARROW1")
    with pytest.raises(UsageError, match="read from this machine only"):
        find_pictures("hf://datasets/me/arrows")


# -- labels in the table


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, list(args))


@pytest.mark.parametrize("suffix", [".parquet", ".npy", ".csv", ".jsonl"])
def test_labels_stand_in_the_table(model: str, suffix: str) -> None:
    pytest.importorskip("onnxruntime")
    save_to_disk(Path("saved"), [table([1, 2], [0, 1]), table([3], [-1])])
    Path("b.png").write_bytes(png(4))
    result = run("embed", "b.png", "saved", "-m", model, "-o", f"e{suffix}", "-q")
    assert result.exit_code == 0, result.stderr
    read = read_embeddings(f"e{suffix}")
    assert read.labels == [None, "cat", "dog", None]
    expected = load_backbone(model).embed([Path("b.png"), *map(io.BytesIO, map(png, (1, 2, 3)))])
    np.testing.assert_allclose(read.embeddings, expected, atol=1e-5)
    labelled = read_labelled_table(f"e{suffix}")
    assert labelled.labels == ["cat", "dog"]
    assert labelled.problems == ["b.png and 1 more: has no label in the table; left out"]
    # Rows taken over by --update keep theirs.
    again = run("embed", "saved", "b.png", "-m", model, "-o", f"e{suffix}", "-q", "--update")
    assert again.exit_code == 0, again.stderr
    assert read_embeddings(f"e{suffix}").labels == ["cat", "dog", None, None]
    if suffix == ".parquet":
        assert pq.read_table("e.parquet").column_names == [
            "path", "embedding", "width", "height", "error", "label"
        ]  # fmt: skip


def test_without_labels_there_is_no_such_column(model: str) -> None:
    pytest.importorskip("onnxruntime")
    Path("b.png").write_bytes(png(4))
    embed_to_table([Path("b.png")], "e.parquet", load_backbone(model))
    assert pq.read_table("e.parquet").column_names == ["path", "embedding", "width", "height", "error"]
    assert read_embeddings("e.parquet").labels is None
