"""Label photographs by a few labelled examples, with the paper's weighted k-NN.

    python examples/label_by_examples.py                                  crops of the example photographs
    python examples/label_by_examples.py labelled/ new/ -m dino_vits16    one subfolder per class; what to label

`dinokit knn --reference labelled/ new/` does the same from the shell, and writes a table.

Prints how well the examples label each other (the accuracy to expect), then path, label and share of the votes; `?`
where the winner has less than half of the votes. Unreadable photographs are listed with the reason and left out.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from crops import write_crops
from numpy.typing import NDArray

from dinokit import Backbone, KNNClassifier, load_backbone, read_embeddings
from dinokit.classifiers.labelled import find_labelled
from dinokit.pictures.image_files import find_images
from dinokit.tables.run import embed_to_table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("labelled", nargs="?", type=Path, help="a folder with one subfolder per class")
    parser.add_argument("new", nargs="?", type=Path, help="photographs to label")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("-k", type=int, default=5)
    args = parser.parse_args()
    if args.labelled is not None and args.new is None:
        parser.error("the photographs to label are missing; name them after the labelled folder")

    with tempfile.TemporaryDirectory() as made:
        if args.labelled is None:
            args.labelled, args.new = write_crops(Path(made), per_class=4)
        backbone = load_backbone(args.model)
        examples = find_labelled(args.labelled)
        vectors, rows = embed(examples.paths, Path(made) / "examples.parquet", backbone)
        knn = KNNClassifier(k=args.k).fit(vectors, [examples.labels[row] for row in rows])
        right = 100 * knn.leave_one_out_score()
        print(f"{len(rows)} examples; judged by the others {right:.0f} % are right")

        paths = find_images(args.new)
        vectors, rows = embed(paths, Path(made) / "new.parquet", backbone)
        for row, shares in zip(rows, knn.predict_proba(vectors), strict=True):  # (n_classes,) each
            winner = knn.classes_[shares.argmax()] if shares.max() >= 0.5 else "?"
            print(f"{paths[row].relative_to(args.new)}  {winner}  {shares.max():.2f}")


def embed(paths: Sequence[Any], file: Path, backbone: Backbone) -> tuple[NDArray[np.float32], list[int]]:
    """The vectors (R, D) of the readable photographs, and their R positions in ``paths``. Prints the others."""
    embed_to_table(paths, file, backbone)
    table = read_embeddings(file)
    for path, error in zip(table.paths, table.errors, strict=True):
        if error is not None:
            print(f"{path}: {error}")
    rows = [row for row, error in enumerate(table.errors) if error is None]
    if not rows:
        raise SystemExit("none of the photographs can be read")
    return table.embeddings[rows], rows


if __name__ == "__main__":
    main()
