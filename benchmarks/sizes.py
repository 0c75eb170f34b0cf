"""k-NN of a model at several sizes of its pictures, on training parts only: for choosing the size it sees by itself.

    python benchmarks/sizes.py --data DATA -m starter --image-sizes 96 112 128 -o benchmarks/results/sizes_starter.json

Leave-one-out, k = 20, T = 0.07, on pictures drawn from the training part of each set by a seed, so that the validation
parts stay unseen until the size is chosen. `dinokit export --own-size` makes it the model's own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from labelled import SETS, decode, read_split
from provenance import command

from dinokit import KNNClassifier, __version__, load_backbone


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--image-sizes", nargs="+", type=int, default=[96, 112, 128, 144], metavar="PX")
    parser.add_argument("--count", type=int, default=3000, help="pictures drawn from each set")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    results = []
    for name in args.sets:
        pictures, labels = read_split(args.data, SETS[name][0])
        drawn = np.random.default_rng(0).permutation(len(pictures))[: args.count]
        images = [decode(pictures[i]) for i in drawn]
        truth = [labels[i] for i in drawn]
        for size in args.image_sizes:
            embeddings = load_backbone(args.model, image_size=size).embed(images)
            knn = KNNClassifier(k=20, temperature=0.07).fit(embeddings, truth)
            top1 = round(100 * knn.leave_one_out_score(), 2)
            results.append({"set": name, "image_size": size, "pictures": len(images), "top1": top1})
            print(f"{name:<18}{size:>4} px{top1:8.2f} %   {len(images)} pictures", flush=True)
    if args.output:
        report = {
            "command": command(args.data),
            "protocol": "leave-one-out, k=20, T=0.07",
            "dinokit": __version__,
            "model": load_backbone(args.model).name,
            "weights_sha256": load_backbone(args.model).weights_sha256,
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
