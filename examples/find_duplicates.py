"""Find near-duplicate photographs: saved again, made smaller, brightened a little.

    python examples/find_duplicates.py                             altered copies of the example photographs
    python examples/find_duplicates.py my/photos --threshold 0.95

`dinokit duplicates embeddings.parquet` does the same from the shell, with a table of `dinokit embed`.

Prints each group: the photograph to keep (the one with the most pixels, then the most bytes), and below it the
others with their cosine similarity to it. Unreadable photographs are listed with the reason and left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from PIL import Image, ImageEnhance

from dinokit import find_duplicates, load_backbone, read_embeddings
from dinokit.pictures.image_files import find_images
from dinokit.pictures.images import open_image
from dinokit.tables.run import embed_to_table


def write_copies(folder: Path) -> Path:
    """Writes the example photographs, and altered copies of two of them."""
    for path in find_images(Path(__file__).parent / "photos"):
        photo = open_image(path)
        photo.save(folder / path.name, quality=95)
        if path.stem == "chelsea":
            photo.save(folder / "chelsea-saved-again.jpg", quality=40)
            photo.resize((photo.width // 2, photo.height // 2), Image.Resampling.LANCZOS).save(
                folder / "chelsea-small.jpg"
            )
        if path.stem == "rocket":
            ImageEnhance.Brightness(photo).enhance(1.1).save(folder / "rocket-brighter.jpg")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path)
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--threshold", type=float, default=0.95)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as made:
        photos = args.photos or write_copies(Path(made))
        paths = find_images(photos)
        file = Path(made) / "embeddings.parquet"
        embed_to_table(paths, file, load_backbone(args.model))
        table = read_embeddings(file)
        for path, error in zip(paths, table.errors, strict=True):
            if error is not None:
                print(f"{path}: {error}")
        quality = [
            (size[0] * size[1], path.stat().st_size) if size else (0, 0)
            for path, size in zip(paths, table.sizes, strict=True)
        ]
        groups = find_duplicates(table.embeddings, args.threshold, quality=quality)

        print(f"{table.errors.count(None)} photographs, {len(groups)} groups of near-duplicates")
        for group in groups:
            keep, *others = (paths[row].relative_to(photos) for row in group.rows)
            print(keep)
            for other, similarity in zip(others, group.similarities[1:], strict=True):
                print(f"  {similarity:.3f}  {other}")


if __name__ == "__main__":
    main()
