"""Embed a folder of photographs into a table, and read it back.

    python examples/embed_a_folder.py                                     the example photographs
    python examples/embed_a_folder.py my/photos -m dino_vits16 -o my.parquet

The table has one row per photograph, in order; the row of an unreadable one holds the reason. The same call again
embeds only photographs that are new, have changed or could not be read, and drops the rows of those that are gone.
`dinokit embed my/photos -o my.parquet --update` does the same from the shell.

Prints how many were embedded, and for each photograph the most similar other one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from dinokit import SearchIndex, load_backbone, read_embeddings
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

    embed_to_table(find_images(args.photos), args.output, load_backbone(args.model), update=True)

    table = read_embeddings(args.output)
    read = [i for i, error in enumerate(table.errors) if error is None]
    print(f"{len(read)} of {len(table.paths)} embedded by {table.origin['model']}, {args.output}")
    for path, error in zip(table.paths, table.errors, strict=True):
        if error is not None:
            print(f"  {path}: {error}")
    if len(read) < 2:
        return

    index = SearchIndex(table.embeddings, table.paths)  # never finds the rows of unreadable photographs
    similarities, found = index.search_rows(read, k=1)  # (N, 1) each
    for row, similarity, other in zip(read, similarities[:, 0], found[:, 0], strict=True):
        name, like = Path(table.paths[row]).name, Path(table.paths[other]).name
        print(f"{name:<16} is most like {like:<16} {similarity:.3f}")


if __name__ == "__main__":
    main()
