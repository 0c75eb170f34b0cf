"""What `reduced_decoding` saves on large JPEGs, and by how much crops and embeddings differ from those decoded whole.

    python benchmarks/reduced_decoding.py -o benchmarks/results/reduced_decoding.json
    python benchmarks/reduced_decoding.py photos/ --model dino_vits16

Without pictures of your own it takes those of examples/photos, enlarged to 12 and 24 megapixels, with some noise as a
sensor's, in JPEGs of quality 92. Each is decoded and cropped whole and reduced, one after the other in the same process
and thread; the time is this process's CPU time, so that what else the machine does counts little, and what is reported
is the ratio, the median over the rounds. `gap` is how many times larger than its resize a reduced picture has to stay;
dinokit's own is marked.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, features
from provenance import command

from dinokit import Backbone, __version__, load_backbone
from dinokit.pictures.bands import decode_picture_with_extent
from dinokit.pictures.images import find_images
from dinokit.pictures.preprocess import Preprocessing

GAPS = (1, 2, 3)
# Width and height of cameras' pictures; the second is a multiple of nothing.
SIZES = ((4032, 3024), (6001, 4003))


def enlarged(photo: Path, size: tuple[int, int], seed: int) -> bytes:
    """A JPEG of this size, cut to its shape from the middle."""
    with Image.open(photo) as opened:
        image = opened.convert("RGB")
    scale = min(image.width / size[0], image.height / size[1])
    width, height = size[0] * scale, size[1] * scale
    left, top = (image.width - width) / 2, (image.height - height) / 2
    large = image.resize(size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    noise = np.random.default_rng(seed).integers(-6, 7, (size[1], size[0], 1), dtype=np.int16)
    pixels = (np.asarray(large, np.int16) + noise).clip(0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return file.getvalue()


def made(photos: list[Path]) -> Iterator[tuple[str, bytes]]:
    """Names and JPEG files."""
    for seed, (photo, size) in enumerate(itertools.product(photos, SIZES)):
        yield f"{photo.name} {size[0]}x{size[1]}", enlarged(photo, size, seed)


def crop_in(
    data: bytes, preprocessing: Preprocessing, least_px: int | None
) -> tuple[NDArray[np.uint8], float]:
    """The crop, and the CPU seconds that it took."""
    began = time.process_time()
    image, extent = decode_picture_with_extent(data, 3, least_px=least_px)
    crop = preprocessing.crop(image, extent)
    return crop, time.process_time() - began


def resized_px(preprocessing: Preprocessing) -> int:
    return (
        preprocessing.resize_px if isinstance(preprocessing.resize_px, int) else max(preprocessing.resize_px)
    )


def compare(backbone: Backbone, pictures: list[tuple[str, bytes]], rounds: int) -> dict[str, Any]:
    """Whole against reduced decoding, for one size of the network's input."""
    preprocessing = backbone.preprocessing
    resize = resized_px(preprocessing)
    ratios: dict[int, list[float]] = {gap: [] for gap in GAPS}
    levels: dict[int, list[tuple[float, int]]] = {gap: [] for gap in GAPS}
    cosines: dict[int, list[float]] = {gap: [] for gap in GAPS}
    vectors = []
    for name, data in pictures:
        print(f"{backbone.image_size[0]} px: {name}", file=sys.stderr)
        crops: dict[int, NDArray[np.uint8]] = {}
        times: dict[int, list[float]] = {gap: [] for gap in GAPS}
        for _ in range(rounds):
            whole, whole_s = crop_in(data, preprocessing, None)
            for gap in GAPS:
                crops[gap], seconds = crop_in(data, preprocessing, gap * resize)
                times[gap].append(whole_s / seconds)
        vectors.append(backbone.embed_crops(whole[None], normalize=True)[0])
        for gap in GAPS:
            difference = np.abs(crops[gap].astype(int) - whole)
            levels[gap].append((float(difference.mean()), int(difference.max())))
            cosines[gap].append(
                float(backbone.embed_crops(crops[gap][None], normalize=True)[0] @ vectors[-1])
            )
            ratios[gap].append(statistics.median(times[gap]))
    between = (np.stack(vectors) @ np.stack(vectors).T)[np.triu_indices(len(vectors), 1)]
    return {
        "image_px": list(backbone.image_size),
        "resize_px": resize,
        "gaps": [
            {
                "gap": gap,
                "dinokit's": gap * resize == preprocessing.least_px,
                "times_faster": {
                    "median": round(statistics.median(ratios[gap]), 2),
                    "least": round(min(ratios[gap]), 2),
                },
                "grey_levels": {
                    "mean": round(statistics.mean(mean for mean, _ in levels[gap]), 3),
                    "most": max(most for _, most in levels[gap]),
                },
                "cosine": {
                    "mean": round(statistics.mean(cosines[gap]), 6),
                    "least": round(min(cosines[gap]), 6),
                },
            }
            for gap in GAPS
        ],
        "cosine_of_two_pictures": round(float(np.median(between)), 4),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    if args.photos:
        pictures = [(path.name, path.read_bytes()) for path in find_images(args.photos)]
    else:
        pictures = list(made(find_images(Path(__file__).parents[1] / "examples" / "photos")))
    sizes = [
        compare(load_backbone(args.model, device="cpu", image_size=size), pictures, args.rounds)
        for size in args.image_sizes
    ]
    return {
        "command": command(),
        "dinokit": __version__,
        "platform": platform.platform(),
        "pillow": PIL.__version__,
        "libjpeg_turbo": features.version("libjpeg_turbo"),
        "model": args.model,
        "weights_sha256": load_backbone(args.model).weights_sha256,
        "pictures": len(pictures),
        "pixels": "own" if args.photos else [f"{width}x{height}" for width, height in SIZES],
        "time": "CPU time of the process, decode and crop: whole / reduced, medians of the rounds",
        "rounds": args.rounds,
        "sizes": sizes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="*", help="large JPEGs of your own")
    parser.add_argument("--model", default="starter")
    parser.add_argument("--image-sizes", type=int, nargs="+", default=[96, 224], metavar="PX")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("-o", "--output", type=Path, help="JSON")
    args = parser.parse_args()
    text = json.dumps(measure(args), indent=2) + "\n"
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    print(text, end="")


if __name__ == "__main__":
    main()
