"""A linear probe: logistic regression on frozen features, compared with k-NN, with scikit-learn.

    python examples/linear_probe.py                                     crops of the example photographs
    python examples/linear_probe.py train/ test/ -m dino_vits16         one subfolder per class in each

Needs scikit-learn (pip install scikit-learn). The model is one step of a pipeline, so cross-validation and the rest of
scikit-learn work on lists of paths; `memory=` caches the vectors, so that each fold is embedded once for all values of
C.

Prints the C that cross-validation chooses, and the accuracy of both classifiers on the test set. Unreadable photographs
are listed with the reason and left out.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from crops import write_crops
from labelled_photos import read_labelled
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from dinokit import DinoEmbedder, KNNClassifier


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("train", nargs="?", type=Path, help="a folder with one subfolder per class")
    parser.add_argument("test", nargs="?", type=Path, help="the same for testing")
    parser.add_argument("-m", "--model", default="starter")
    args = parser.parse_args()
    if args.train is not None and args.test is None:
        parser.error("the test set is missing; name it after the training set")

    with tempfile.TemporaryDirectory() as made:
        if args.train is None:
            args.train, args.test = write_crops(Path(made), per_class=8)
        train, test = read_labelled(args.train), read_labelled(args.test)

        linear = make_pipeline(
            DinoEmbedder(args.model),
            StandardScaler(),
            LogisticRegression(max_iter=2000),
            memory=str(Path(made) / "vectors"),
        )
        search = GridSearchCV(linear, {"logisticregression__C": [0.01, 0.1]}, cv=2)
        search.fit(train.paths, train.labels)
        knn = make_pipeline(DinoEmbedder(args.model), KNNClassifier()).fit(train.paths, train.labels)

        print(
            f"{len(train.paths)} to train on, {len(test.paths)} to test with, {len(set(train.labels))} classes"
        )
        print(
            f"C = {search.best_params_['logisticregression__C']} ({100 * search.best_score_:.0f} % in the folds)"
        )
        print(f"linear probe {100 * search.score(test.paths, test.labels):.1f} %")
        print(f"k-NN         {100 * knn.score(test.paths, test.labels):.1f} %")


if __name__ == "__main__":
    main()
