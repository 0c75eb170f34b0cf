"""Embed a folder of photographs into a table, and read it back.

    python examples/embed_a_folder.py                                     the example photographs
    python examples/embed_a_folder.py my/photos -m dino_vits16 -o my.parquet

The table has one row a photograph, in order; one that cannot be read keeps its row with the reason. The same call
again finds the work done. `dinokit embed my/photos -o my.parquet` does the same from the shell.

Prints how many were embedded, and for each photograph the most similar other one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dinokit import load_backbone, read_embeddings
from dinokit.pictures.image_files import find_images
from dinokit.tables.run import embed_to_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, default=Path(__file__).parent / "photos")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-o", "--output", type=Path, default=Path("embeddings.parquet"))
    args = parser.parse_args()

    embed_to_table(find_images(args.photos), args.output, load_backbone(args.model))

    table = read_embeddings(args.output)
    read = [i for i, error in enumerate(table.errors) if error is None]
    print(f"{len(read)} of {len(table.paths)} embedded by {table.origin['model']}, {args.output}")
    for path, error in zip(table.paths, table.errors, strict=True):
        if error is not None:
            print(f"  {path}: {error}")
    if len(read) < 2:
        return

    vectors = table.embeddings[read]  # (N, D); rows of photographs that could not be read would be NaN
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -1)
    for i, row in zip(read, similarity, strict=True):
        other = table.paths[read[int(row.argmax())]]
        print(f"{Path(table.paths[i]).name:<16} is most like {Path(other).name:<16} {row.max():.3f}")


if __name__ == "__main__":
    main()
