"""Pictures with labels, for benchmarks: a folder a class, webdataset tar shards, Parquet."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from dinokit.pictures.image_files import find_images
from dinokit.pictures.images import open_image

__all__ = ["SETS", "read_split"]

# name: (folder of references, folder of queries) below the data folder
SETS = {
    "imagenette224": ("imagenette224/train/*.tar", "imagenette224/val/*.tar"),
    "clothing": ("clothing/train", "clothing/val"),
    "tiny-imagenet100": ("tiny-imagenet100/train-*.parquet", "tiny-imagenet100/val-*.parquet"),
    "cifar10": ("cifar10/train*.parquet", "cifar10/test*.parquet"),
}


def read_split(data: Path, pattern: str) -> tuple[list[bytes], list[str]]:
    """All encoded pictures of a split and their labels, in the order of the files."""
    pictures: list[bytes] = []
    labels: list[str] = []
    paths = sorted(data.glob(pattern))
    if not paths:
        raise SystemExit(f"nothing at {data / pattern}; --data must name the folder that holds the sets")
    for path in paths:
        if path.is_dir():
            for file in find_images(path):
                pictures.append(file.read_bytes())
                labels.append(file.parent.name)
        elif path.suffix == ".tar":
            with tarfile.open(path) as tar:
                parts = {m.name: tar.extractfile(m) for m in tar if m.isfile()}
                for name in sorted(n for n in parts if n.endswith(".jpg")):
                    pictures.append(parts[name].read())
                    labels.append(parts[name[:-4] + ".cls"].read().decode().strip())
        else:
            table = pq.read_table(path, columns=["image", "label"])
            pictures += table.column("image").to_pylist()
            labels += map(str, table.column("label").to_pylist())
    return pictures, labels


def decode(encoded: bytes) -> Image.Image:
    """Upright RGB, as dinokit sees it."""
    return open_image(io.BytesIO(encoded))
