"""What the model looks at: attention drawn over photographs, and masks that hold a share of it.

    python examples/attention_masks.py                                      the example photographs
    python examples/attention_masks.py my/photos -m dino_vits16 --mass 0.6 -o out/

`dinokit attention my/photos -o out/` draws every head and a contact sheet; this script shows the Python calls.

Writes NUMBER-NAME-attention.png (mean over the heads, dark is little) and NUMBER-NAME-mask.png (white where the most
concentrated head looks) for each photograph, and prints which head that is and how much of the picture its mask covers.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dinokit import Backbone, load_backbone
from dinokit.drawing.overlays import overlay
from dinokit.errors import ImageError
from dinokit.pictures.image_files import find_images
from dinokit.pictures.images import open_image


def draw(backbone: Backbone, path: Path, mass: float, prefix: Path) -> str:
    """Writes the two pictures of one photograph and returns a line about them."""
    photo = open_image(path)  # upright RGB
    attention = backbone.attention(photo)  # (heads, h, w): probabilities over the patches
    masks = backbone.masks(photo, mass=mass)  # (heads, H, W) bool: the fewest patches that hold `mass`
    crop = backbone.preprocessing.crop(photo)  # (H, W, 3) uint8: what the network saw

    overlay(crop, attention.mean(axis=0)).save(f"{prefix}-attention.png")
    # The head whose attention is concentrated in the fewest patches usually shows an object best.
    covered = masks.mean(axis=(1, 2))
    head = int(covered.argmin())
    Image.fromarray(masks[head].astype(np.uint8) * 255).save(f"{prefix}-mask.png")
    return (
        f"head {head} holds {100 * mass:.0f} % of its attention in {100 * covered[head]:.0f} % of the picture"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--mass", type=float, default=0.6)
    parser.add_argument("-o", "--output", type=Path, default=Path("attention_masks"))
    args = parser.parse_args()

    paths = find_images(args.photos)
    height, width = load_backbone(args.model).image_size
    backbone = load_backbone(args.model, image_size=(2 * height, 2 * width))  # finer maps
    args.output.mkdir(parents=True, exist_ok=True)
    drawn = 0
    for number, path in enumerate(paths, start=1):
        try:
            print(f"{path.name}: {draw(backbone, path, args.mass, args.output / f'{number:02}-{path.stem}')}")
            drawn += 1
        except ImageError as error:
            print(error)
    print(f"{2 * drawn} pictures are in {args.output}")


if __name__ == "__main__":
    main()
