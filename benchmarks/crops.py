"""Images a second of the two ways to make crops, side by side: Pillow in the workers, or batched on the device.

    python benchmarks/crops.py examples/photos --workers 0
    OMP_NUM_THREADS=1 python benchmarks/crops.py DATA/imagenette224/train --batch-size 16 --workers 0 \\
        -o benchmarks/results/crops_cpu.json
    python benchmarks/crops.py DATA/imagenette224/train --device cuda -o crops.json

Each round times both ways in turn with the same pictures and the same drawn views, from the encoded file to the crops
on the device; the median of the rounds counts. `decode` is the time that reading and decoding takes alone, in one
process. Nothing is trained. On a GPU the batched crops take time from the training step, which is not seen here: look
at images_per_s and data_wait of a run as well.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from provenance import command

from dinokit import __version__
from dinokit.pictures.images import open_image
from dinokit.training.recipe import Recipe, load_recipe, with_overrides
from dinokit.training.views.augment import MultiCrop
from dinokit.training.views.data import Batch, CropLoader
from dinokit.training.views.pictures import Pictures, collect_pictures


def wait_for(device: torch.device) -> None:
    """Lets everything that was started on the device end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def crops_per_s(pictures: Pictures, recipe: Recipe, device: torch.device, batches: int) -> float:
    """Images a second over ``batches``, after one that starts the workers and warms up."""
    found = iter(CropLoader(pictures, recipe, device=device))
    n_images, start = 0, 0.0
    for i in range(batches + 1):
        batch = next(found)
        if not isinstance(batch, Batch):
            raise SystemExit(f"no picture of a batch can be read: {batch[0]}")
        for crops in (batch.global_crops, batch.local_crops):
            if crops is not None:
                crops.to(device, non_blocking=True)
        wait_for(device)
        if i == 0:
            start = time.perf_counter()
        else:
            n_images += batch.n_images
    return n_images / (time.perf_counter() - start)


def decoded_per_s(pictures: Pictures, recipe: Recipe, n_images: int) -> float:
    """Images a second of reading and decoding alone, in this process."""
    least_px = MultiCrop(recipe).least_px if recipe.reduced_decoding else None
    start = time.perf_counter()
    for i in range(n_images):
        source = pictures.read(i % len(pictures))
        open_image(io.BytesIO(source) if isinstance(source, bytes) else source, least_px=least_px)
    return n_images / (time.perf_counter() - start)


def processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def measure(args: argparse.Namespace) -> dict[str, Any]:
    device = torch.device(args.device)
    pictures = collect_pictures(args.sources)
    recipe = with_overrides(load_recipe(args.recipe), args.set)
    # As many epochs as the rounds may need; fewer pictures than a batch would give none.
    recipe = replace(
        recipe,
        epochs=100_000,
        workers=args.workers,
        batch_size=min(args.batch_size or recipe.batch_size, len(pictures)),
    )
    found: dict[str, list[float]] = {"decode": [], "pillow": [], "batched": []}
    for round_ in range(args.rounds):
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr)
        found["decode"].append(decoded_per_s(pictures, recipe, recipe.batch_size * args.batches))
        for crops in ("pillow", "batched"):
            rate = crops_per_s(pictures, replace(recipe, crops=crops), device, args.batches)
            found[crops].append(rate)
    median = {name: round(statistics.median(rates), 2) for name, rates in found.items()}
    return {
        "command": command(Path(args.sources[0]).absolute().parent.parent),
        "images_per_s": median,
        "batched_over_pillow": round(median["batched"] / median["pillow"], 3),
        "rounds": {name: [round(rate, 2) for rate in rates] for name, rates in found.items()},
        "recipe": args.recipe,
        "crops": f"2 × {recipe.global_crop_px} + {recipe.n_local_crops} × {recipe.local_crop_px} px",
        "batch_size": recipe.batch_size,
        "workers": args.workers,
        "device": f"{device} ({processor(device)})",
        "pictures": len(pictures),
        "dinokit": __version__,
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sources", nargs="+", help="pictures: folders, files, tar shards, Parquet files")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe", default="default", help="a bundled recipe or a YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change the recipe")
    parser.add_argument("--batch-size", type=int, help="the recipe's by default")
    parser.add_argument("--workers", type=int, help="by default one a core, at most 16; 0: in this process")
    parser.add_argument("--batches", type=int, default=4, help="timed batches a round (default 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds (default 5)")
    parser.add_argument("-o", "--output", type=Path, help="write the result as JSON")
    args = parser.parse_args()
    result = measure(args)
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if args.output:
        args.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
