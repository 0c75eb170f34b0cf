"""Label photographs by a few labelled examples, with the paper's weighted k-NN.

    python examples/label_by_examples.py                                  crops of the example photographs
    python examples/label_by_examples.py labelled/ new/ -m dino_vits16    a folder a class, and what to label

`dinokit knn --reference labelled/ new/` does the same from the shell, and writes a table.

Prints how well the examples label each other (what to expect), then path, label and share of the votes; `?` where the
winner has less than half of the votes.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crops import write_crops

from dinokit import KNNClassifier, load_backbone
from dinokit.classifiers.labelled import find_labelled
from dinokit.pictures.image_files import find_images


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
        parser.error("name the photographs to label too")

    with tempfile.TemporaryDirectory() as made:
        if args.labelled is None:
            args.labelled, args.new = write_crops(Path(made), per_class=4)
        label(args.labelled, args.new, args.model, args.k)


def label(labelled: Path, new: Path, model: str, k: int) -> None:
    """Prints a line for each photograph in ``new``."""
    backbone = load_backbone(model)
    examples = find_labelled(labelled)
    knn = KNNClassifier(k=k).fit(backbone.embed(examples.paths), examples.labels)
    print(
        f"{len(examples.paths)} examples; judged by the others {100 * knn.leave_one_out_score():.0f} % are right"
    )

    paths = find_images(new)
    shares = knn.predict_proba(backbone.embed(paths))  # (N, n_classes)
    for path, row in zip(paths, shares, strict=True):
        winner = knn.classes_[row.argmax()] if row.max() >= 0.5 else "?"
        print(f"{path.relative_to(new)}  {winner}  {row.max():.2f}")


if __name__ == "__main__":
    main()
