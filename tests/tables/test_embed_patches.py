"""Tables of patch tokens: the same numbers from the command, from Python and from timm's own module."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from fake_engine import EMBED_DIM, HEADS, PATCH, FakeEngine
from small_models import config_for, picture, random_weights

import dinokit.tables.patches
from dinokit import Backbone, load_backbone, read_embeddings, read_patches
from dinokit.cli import cli
from dinokit.errors import DinokitError, UsageError
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.folder import write_model_folder
from dinokit.tables.patches import rows_of_a_shard, to_dtype
from dinokit.tables.run import Interrupted, embed_to_table, parts_folder

CONFIG = config_for(
    VitArchitecture(embed_dim=EMBED_DIM, depth=1, num_heads=HEADS, patch_size=PATCH, image_size=(32, 32))
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "small"
    write_model_folder(path, config_for(), random_weights())
    return str(path)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def photos(count: int = 3, folder: str = "photos") -> list[Path]:
    Path(folder).mkdir(exist_ok=True)
    paths = [Path(folder) / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        picture(90 + i, 70, seed=i).save(path)
    return paths


def fake() -> Backbone:
    return Backbone(CONFIG, FakeEngine(), weights_sha256="0" * 64, source="a test")


def run(*args: str) -> Any:
    return CliRunner().invoke(cli, list(args))


def test_tokens_equal_timms_in_both_formats_and_precisions(model: str) -> None:
    pytest.importorskip("onnxruntime")
    torch = pytest.importorskip("torch")
    paths = photos()
    (Path("photos") / "1.png").write_bytes(b"broken")
    torch_backbone = load_backbone(model, engine="torch", device="cpu")
    seen = np.stack([torch_backbone.transform(paths[i]) for i in (0, 2)])
    with torch.inference_mode():  # 4x4 patches of 8 px, after one CLS token
        truth = (
            torch_backbone.module.forward_features(torch.from_numpy(seen))[:, 1:].numpy().reshape(2, 4, 4, 48)
        )

    for name, dtype, tolerance in (
        ("a.npy", "float32", 1e-4),
        ("b.parquet", "float32", 1e-4),
        ("c.npy", None, 2e-3 * np.abs(truth).max()),
        ("d.parquet", "float16", 2e-3 * np.abs(truth).max()),
    ):
        result = run(
            "embed",
            "photos",
            "-m",
            model,
            "--what",
            "patches",
            "-o",
            name,
            *(["--dtype", dtype] if dtype else []),
        )
        assert result.exit_code == 1, result.stderr
        assert "4x4x48 numbers per picture" in result.stderr
        table = read_patches(name)
        assert table.shape == (3, 4, 4, 48) and len(table) == 3 and table.grid == (4, 4)
        assert table.dtype == np.dtype(dtype or "float16") == table[0].dtype
        np.testing.assert_allclose(table[0], truth[0], atol=tolerance)
        np.testing.assert_allclose(table[-1], truth[1], atol=tolerance)
        assert np.isnan(table[1]).all() and table.errors[1] is not None
        assert table.sizes == [(90, 70), None, (92, 70)] and table.paths == list(map(str, paths))
        assert table.labels is None
        assert table.origin["what"] == "patches" and table.origin["grid"] == [4, 4]
        batches = list(table.batches(2))
        assert [len(batch) for batch in batches] == [2, 1]
        np.testing.assert_array_equal(np.concatenate(batches), table[:])
    # As others read them.
    array = np.load("a.npy", mmap_mode="r")
    assert array.shape == (3, 4, 4, 48) and array.dtype == np.float32
    column = pq.read_table("b.parquet").column("patches").to_pylist()
    assert column[1] is None
    np.testing.assert_array_equal(np.array(column[2], np.float32).reshape(4, 4, 48), array[2])
    np.testing.assert_array_equal(np.load("c.npy")[0], array[0].astype(np.float16))


def test_python_gives_the_same_numbers() -> None:
    paths = photos()
    backbone = fake()
    for name in ("x.npy", "x.parquet"):
        embed_to_table(paths, name, backbone, what="patches", dtype="float32")
        np.testing.assert_array_equal(read_patches(name)[:], backbone.patch_tokens(paths))
    table = read_patches("x.npy")
    for index in ([2, 0], np.array([-1, 1, 1]), np.array([True, False, True]), [], slice(None, None, -1)):
        np.testing.assert_array_equal(table[index], table[:][index])
    for wrong in (3, [0, 3]):
        with pytest.raises(IndexError):
            table[wrong]


def test_several_threads_read_one_table() -> None:
    embed_to_table(photos(12), "x.parquet", fake(), what="patches", shard_size=2)
    table = read_patches("x.parquet")
    expected = table[:].copy()
    numbers = [1, 2, 9] * 200  # of other row groups
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(table.__getitem__, numbers))
    np.testing.assert_array_equal(found, expected[numbers])


@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
def test_an_interrupted_run_goes_on_and_update_keeps_what_is_known(suffix: str) -> None:
    paths = photos(6)
    time.sleep(0.08)  # so that they count as unchanged
    output = f"x{suffix}"
    count = 0

    def stop(done: int, failed: int) -> None:
        nonlocal count
        count += done
        if count >= 4:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="4 of 6"):
        embed_to_table(paths, output, fake(), what="patches", shard_size=2, batch_size=2, on_progress=stop)
    summary = embed_to_table(paths, output, fake(), what="patches", shard_size=2, batch_size=2)
    assert summary.resumed == 4 and not parts_folder(Path(output)).exists()
    more = [*photos(2, "new"), *reversed(paths)]
    engine = FakeEngine()
    backbone = Backbone(CONFIG, engine, weights_sha256="0" * 64, source="a test")
    summary = embed_to_table(more, output, backbone, what="patches", update=True)
    assert summary.kept == 6 and sum(shape[0] for shape in engine.shapes) == 2
    np.testing.assert_array_equal(read_patches(output)[:], fake().patch_tokens(more).astype(np.float16))
    with pytest.raises(
        UsageError,
        match=r"made with other vectors .*dtype=float16; now what=patches, normalize=False, dtype=float32",
    ):
        embed_to_table(more, output, fake(), what="patches", dtype="float32", update=True)


def test_memory_is_bounded_by_the_bytes_of_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    row = 4 * 4 * 6 * 2  # the fake engine's six numbers a patch, float16
    monkeypatch.setattr(dinokit.tables.patches, "_SHARD_BYTES", 3 * row)
    assert rows_of_a_shard(fake(), "float16") == 3 and rows_of_a_shard(fake(), "float32") == 1
    embed_to_table(photos(7), "x.parquet", fake(), what="patches")
    with pq.ParquetFile("x.parquet") as file:
        assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [3, 3, 1]
    np.testing.assert_array_equal(read_patches("x.parquet")[5:1:-2], read_patches("x.parquet")[:][5:1:-2])


def test_what_does_not_fit_in_float16_is_an_error() -> None:
    assert to_dtype(np.array([65000], np.float32), np.float16)[0] == 64992
    with pytest.raises(DinokitError, match="a token contains the number 70000, and float16 ends at 65504"):
        to_dtype(np.array([70000], np.float32), np.float16)


def test_wrong_usage(model: str) -> None:
    photos(1)
    for args, message in (
        (("-o", "x.csv", "--what", "patches"), "only written as .parquet or .npy; for instance x.npy"),
        (("--what", "patches", "--normalize"), "--normalize is for one vector per picture"),
        (("--dtype", "float16"), "--dtype is for --what patches"),
    ):
        result = run("embed", "photos", "-m", model, *args)
        assert result.exit_code == 2 and message in result.stderr
    embed_to_table(photos(1), "p.npy", fake(), what="patches")
    embed_to_table(photos(1), "v.npy", fake())
    with pytest.raises(
        UsageError, match="holds patch tokens, several vectors per picture; read it with read_patches"
    ):
        read_embeddings("p.npy")
    with pytest.raises(UsageError, match=r"v\.npy holds cls, not patch tokens"):
        read_patches("v.npy")
    with pytest.raises(UsageError, match="no such file"):
        read_patches("z.npy")
    with pytest.raises(UsageError, match=r"for instance z\.npy"):
        read_patches("z.jsonl")
    Path("p.npy").write_bytes(Path("p.npy").read_bytes()[:200])
    with pytest.raises(DinokitError, match="is not a table of patch tokens, or it is damaged"):
        read_patches("p.npy")
    with pytest.raises(UsageError, match="dtype='float64' is not known"):
        embed_to_table(photos(1), "q.npy", fake(), what="patches", dtype="float64")
    with pytest.raises(UsageError, match="vectors are float32"):
        embed_to_table(photos(1), "q.npy", fake(), dtype="float16")
