"""Embed photographs, compare them, and cut out what the model looks at.

    python examples/first_steps.py                      a few seconds on a CPU, with the bundled starter
    python examples/first_steps.py -m dino_vits16 my/photos -o out

Prints the cosine similarity of each pair of photographs, and writes for each photograph NAME.png: the picture with
the patches dimmed that the mean attention of the last block passes over.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from dinokit import Backbone, load_backbone
from dinokit.features.attention import mass_masks, upsample_nearest
from dinokit.pictures.image_files import find_images
from dinokit.pictures.images import open_image

PHOTOS = Path(__file__).parent / "photos"


def print_similarities(names: list[str], embeddings: np.ndarray) -> None:
    """(N, D) embeddings to a table of cosines."""
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    print(" " * 12 + "".join(f"{name[:10]:>12}" for name in names))
    for name, row in zip(names, unit @ unit.T, strict=True):
        print(f"{name[:11]:<12}" + "".join(f"{value:12.3f}" for value in row))


def save_cutout(backbone: Backbone, path: Path, output: Path) -> None:
    """The picture as the model sees it, dimmed outside the patches with 60 % of the mean attention."""
    attention = backbone.attention(path).mean(axis=0)  # (h, w)
    mask = mass_masks(attention.reshape(1, -1), mass=0.6).reshape(attention.shape)
    pixels = backbone.preprocessing.crop(open_image(path))
    seen = upsample_nearest(mask, backbone.patch_size)
    Image.fromarray(np.where(seen[..., None], pixels, pixels // 4)).save(output)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, default=PHOTOS)
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-o", "--output", type=Path, default=Path("first_steps"))
    args = parser.parse_args()

    paths = find_images(args.photos)
    backbone = load_backbone(args.model)
    print_similarities([path.stem for path in paths], backbone.embed(paths))

    # At a larger size the maps are finer; the position embedding follows as it was trained.
    larger = load_backbone(args.model, image_size=tuple(2 * side for side in backbone.image_size))
    args.output.mkdir(parents=True, exist_ok=True)
    for path in paths:
        save_cutout(larger, path, args.output / f"{path.stem}.png")
    print(f"cut-outs of {len(paths)} photographs are in {args.output}")


if __name__ == "__main__":
    main()
