"""Peak memory of `dinokit embed` at few and at many pictures: it must not grow with their number.

    python benchmarks/embed_memory.py -o benchmarks/results/embed_memory.json
    python benchmarks/embed_memory.py --counts 1000 10000 --kinds tar --suffix .npy

Writes tiny pictures (8x8 px PNG) into a source of each kind and a tiny random model, runs `dinokit embed` on each in
a process of its own and prints its peak resident memory, from the operating system (wait4, so not on Windows).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fresh_process import run_python
from PIL import Image
from provenance import command

from dinokit import __version__
from dinokit.model_folder.architecture import VitArchitecture
from dinokit.model_folder.config import BackboneConfig, timm_arguments
from dinokit.model_folder.folder import write_model_folder
from dinokit.model_folder.weights import expected_shapes
from dinokit.pictures.preprocess import Preprocessing


def write_model(folder: Path) -> None:
    """A random Vision Transformer of one block, so that the time goes into everything but the network."""
    vit = VitArchitecture(embed_dim=48, depth=1, num_heads=3, patch_size=16, image_size=(32, 32))
    shapes = expected_shapes(vit)
    assert shapes is not None
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}
    architecture, model_args = timm_arguments(vit)
    config = BackboneConfig(
        name="tiny",
        architecture=vit,
        timm_architecture=architecture,
        model_args=model_args,
        preprocessing=Preprocessing(resize_px=32, crop_px=(32, 32)),
        source="benchmarks/embed_memory.py",
    )
    write_model_folder(folder, config, weights)


def pictures(count: int) -> Iterator[tuple[str, bytes]]:
    """Names and files; each picture is another one."""
    rng = np.random.default_rng(0)
    for i in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(file, "PNG")
        yield f"{i:08}.png", file.getvalue()


def write_tar(path: Path, count: int) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        for name, data in pictures(count):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
            archive.members.clear()  # type: ignore[attr-defined]  # it would keep a kilobyte for each


def write_zip(path: Path, count: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in pictures(count):
            archive.writestr(name, data)


def write_parquet(path: Path, count: int) -> None:
    column = pa.array([data for _, data in pictures(count)], pa.binary())
    pq.write_table(pa.table({"image": column}), path)  # one row group, as pandas writes it


def write_folder(path: Path, count: int) -> None:
    path.mkdir()
    for name, data in pictures(count):
        (path / name).write_bytes(data)


KINDS: dict[str, tuple[str, Callable[[Path, int], None]]] = {
    "tar": (".tar", write_tar),
    "tar.gz": (".tar.gz", write_tar),
    "zip": (".zip", write_zip),
    "parquet": (".parquet", write_parquet),
    "folder": ("", write_folder),
}


def measure(source: Path, model: Path, output: Path) -> tuple[float, float]:
    """(peak resident memory in MiB, seconds) of one run in a process of its own."""
    embed = [
        "-m",
        "dinokit",
        "embed",
        str(source),
        "-m",
        str(model),
        "-o",
        str(output),
        "-q",
        "--device",
        "cpu",
    ]
    usage = run_python(embed)
    return usage.peak_mib, usage.seconds


def write_results(output: Path, rows: list[dict[str, object]], suffix: str) -> None:
    about = {
        "command": command(),
        "dinokit": __version__,
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "table": suffix,
    }
    output.write_text(json.dumps({**about, "rows": rows}, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="+", default=[1000, 100_000])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["tar", "parquet"])
    parser.add_argument("--suffix", default=".parquet", help="of the table that is written")
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    args = parser.parse_args()

    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="dinokit-memory-") as name:
        folder = Path(name)
        write_model(folder / "model")
        for kind in args.kinds:
            for count in args.counts:
                suffix, write = KINDS[kind]
                source = folder / f"{kind.replace('.', '-')}-{count}{suffix}"
                write(source, count)
                peak, seconds = measure(
                    source, folder / "model", folder / f"{source.stem}-table{args.suffix}"
                )
                print(f"{kind:8} {count:8} pictures: {peak:7.1f} MiB at most, {seconds:6.1f} s", flush=True)
                rows.append({"kind": kind, "count": count, "peak_mib": peak, "seconds": seconds})
                if args.output:  # after each, because the last ones take minutes
                    write_results(args.output, rows, args.suffix)


if __name__ == "__main__":
    main()
