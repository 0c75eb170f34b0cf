"""Jaccard of attention masks with drawn foregrounds, beside the untrained network and the whole picture.

    python benchmarks/masks.py --data DATA/horses --image-size 192 -o benchmarks/results/masks_starter.json

Per head the fewest patches that hold 60 % of its attention, as in Caron et al. 2021, Figure 4, on the crop that the
network sees. Two ways to choose a head: the best one of each picture, as there, and the one that is best over all
pictures. A mask is the picture's own name with another suffix; the drawn one goes through the picture's own crop.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from knn import untrained
from numpy.typing import NDArray
from PIL import Image
from provenance import command

from dinokit import Backbone, __version__, load_backbone


def jaccards(masks: NDArray[np.bool_], drawn: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(heads, H, W) and (H, W) to one value a head: what both hold by what either holds."""
    both = (masks & drawn).sum(axis=(1, 2))
    return np.asarray(both / np.maximum((masks | drawn).sum(axis=(1, 2)), 1))


def measure(backbone: Backbone, pairs: Sequence[tuple[Path, Path]], mass: float) -> dict[str, float]:
    """Means over the pictures, in percent of the union."""
    values, whole = [], []
    for image, mask in pairs:
        with Image.open(mask) as opened:
            foreground = opened.convert("L").point(lambda v: 255 if v else 0).convert("RGB")
        drawn = backbone.preprocessing.crop(foreground)[..., 0] > 127
        masks = backbone.masks(image, mass=mass)
        values.append(jaccards(masks, drawn))
        whole.append(float(jaccards(np.ones_like(masks[:1]), drawn)[0]))
    table = np.stack(values)
    return {
        "best_head_of_each_picture": round(float(table.max(axis=1).mean()), 4),
        "best_head": round(float(table.mean(axis=0).max()), 4),
        "mean_of_heads": round(float(table.mean()), 4),
        "whole_picture": round(float(np.mean(whole)), 4),
    }


def main() -> None:
    """Prints a line a network, and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="a folder with images/ and masks/")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--image-size", type=int, nargs="*", default=[192, 384])
    parser.add_argument("--mass", type=float, default=0.6)
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    drawn = {path.stem: path for path in (options.data / "masks").iterdir()}
    pairs = [
        (path, drawn[path.stem]) for path in sorted((options.data / "images").iterdir()) if path.stem in drawn
    ]
    results = []
    for size in options.image_size:
        backbone = load_backbone(options.model, image_size=size)
        for features, network in (("model", backbone), ("untrained", untrained(backbone))):
            if network is None:  # no torch here
                continue
            found = measure(network, pairs, options.mass)
            results.append({"image_size": size, "features": features, **found})
            print(results[-1], flush=True)
    report = {
        "command": command(options.data.parent),
        "dinokit": __version__,
        "model": options.model,
        "weights_sha256": load_backbone(options.model).weights_sha256,
        "pictures": len(pairs),
        "mass": options.mass,
        "results": results,
    }
    if options.output:
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
