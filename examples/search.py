"""Find the photographs most similar to a given one, in a table of embeddings.

    python examples/search.py                                         crops of the example photographs
    python examples/search.py my/photos query.jpg -m dino_vits16      a folder to search, a photograph to look for

`dinokit search query.jpg --in embeddings.parquet` does the same from the shell, with a table of `dinokit embed`.

Prints the five most similar photographs with their cosine similarity, the most similar first.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crops import write_crops

from dinokit import SearchIndex, load_backbone
from dinokit.pictures.image_files import find_images
from dinokit.tables.run import embed_to_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", nargs="?", type=Path, help="a folder to search")
    parser.add_argument("query", nargs="?", type=Path, help="the photograph to look for")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-k", type=int, default=5)
    args = parser.parse_args()
    if args.photos is not None and args.query is None:
        parser.error("the photograph to look for is missing; name it after the folder")

    with tempfile.TemporaryDirectory() as made:
        if args.photos is None:
            args.photos, new = write_crops(Path(made), per_class=6)
            args.query = new / "rocket" / "00.jpg"
        # Make the table once, and search it as often as you like.
        backbone = load_backbone(args.model)
        table = Path(made) / "embeddings.parquet"
        embed_to_table(find_images(args.photos), table, backbone)
        index = SearchIndex.read(table)

        similarities, rows = index.search_images(args.query, k=args.k, backbone=backbone)
        print(f"most like {args.query.name} among {len(index)}:")
        for similarity, row in zip(similarities, rows, strict=True):
            print(f"{similarity:6.3f}  {Path(index.paths[row]).relative_to(args.photos)}")


if __name__ == "__main__":
    main()
