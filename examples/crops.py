"""A small labelled set: many different crops of each example photograph.

    python examples/crops.py labelled/          writes labelled/seen and labelled/new, one subfolder per class

Five photographs are not a data set, so the examples that need labels use these crops instead: `seen` comes from the
left half of each photograph, `new` from the right half, so that the two share no pixels. The scores that the examples
print show that the code runs, and say nothing about the model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = Path(__file__).parent / "photos"


def write_crops(folder: Path, *, per_class: int = 12, seed: int = 0) -> tuple[Path, Path]:
    """Writes ``folder/seen/cat/00.jpg`` …, ``folder/new/cat/00.jpg`` … and returns the two folders."""
    rng = np.random.default_rng(seed)
    for path in sorted(PHOTOS.glob("*.jpg")):
        with Image.open(path) as image:
            photo = image.convert("RGB")
        middle = photo.width // 2
        for part, left, right in (("seen", 0, middle), ("new", middle, photo.width)):
            target = folder / part / path.stem
            target.mkdir(parents=True, exist_ok=True)
            for i in range(per_class):
                side = int(rng.uniform(0.7, 1.0) * min(right - left, photo.height))
                x = int(rng.integers(left, right - side + 1))
                y = int(rng.integers(0, photo.height - side + 1))
                photo.crop((x, y, x + side, y + side)).save(target / f"{i:02}.jpg", quality=90)
    return folder / "seen", folder / "new"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--per-class", type=int, default=12)
    args = parser.parse_args()
    for written in write_crops(args.folder, per_class=args.per_class):
        print(written)


if __name__ == "__main__":
    main()
