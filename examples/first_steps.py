"""Embed photographs, compare them, and cut out what the model looks at.

    python examples/first_steps.py                      a few seconds on a CPU, with the bundled starter
    python examples/first_steps.py -m dino_vits16 my/photos -o out

Takes the first ten photographs (change it with -n). Prints the cosine similarity of each pair, and writes a cut-out of
each photograph, NUMBER-NAME.png: the darker a patch, the fewer attention heads of the last block look at it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dinokit import Backbone, load_backbone
from dinokit.errors import ImageError
from dinokit.pictures.image_files import find_images
from dinokit.pictures.images import open_image

PHOTOS = Path(__file__).parent / "photos"


def print_similarities(names: list[str], embeddings: np.ndarray) -> None:
    """Prints the cosines of (N, D) embeddings as a table."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    print(" " * 12 + "".join(f"{name[:10]:>12}" for name in names))
    for name, row in zip(names, unit @ unit.T, strict=True):
        print(f"{name[:11]:<12}" + "".join(f"{value:12.3f}" for value in row))


def save_cutout(backbone: Backbone, photo: Image.Image, output: Path) -> None:
    """Writes the network's input crop, at full brightness where all heads have 60 % of their attention."""
    masks = backbone.masks(photo, mass=0.6)  # (heads, H, W) bool
    pixels = backbone.preprocessing.crop(photo)  # (H, W, 3) uint8
    brightness = 0.2 + 0.8 * masks.mean(axis=0)
    Image.fromarray((pixels * brightness[..., None]).astype(np.uint8)).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-n", "--most", type=int, default=10, help="take at most so many photographs")
    parser.add_argument("-o", "--output", type=Path, default=Path("first_steps"))
    args = parser.parse_args()

    photos: dict[Path, Image.Image] = {}
    for path in find_images(args.photos)[: args.most]:
        try:
            photos[path] = open_image(path)  # upright RGB
        except ImageError as error:
            print(error)
    if not photos:
        raise SystemExit("none of the photographs can be read")
    backbone = load_backbone(args.model)
    print_similarities([path.stem for path in photos], backbone.embed(photos.values()))

    # A larger input gives finer maps; the position embedding is interpolated to it.
    larger = load_backbone(args.model, image_size=tuple(2 * side for side in backbone.image_size))
    args.output.mkdir(parents=True, exist_ok=True)
    for number, (path, photo) in enumerate(photos.items(), start=1):
        save_cutout(larger, photo, args.output / f"{number:02}-{path.stem}.png")
    print(f"cut-outs of {len(photos)} photographs are in {args.output}")


if __name__ == "__main__":
    main()
