"""How good a few labels are, by how the pictures to label were chosen: typical, diverse or by chance.

    python benchmarks/selection.py --data DATA -m starter -o benchmarks/results/selection_starter.json

Of a set's training part N pictures are chosen, without their labels; with these labels (nothing else) weighted k-NN
(k = 5, T = 0.07) judges the other part. ``typical`` and ``diverse`` are `dinokit select --by`. Chance is the mean over
many draws, with their standard deviation. ``classes``: how many classes the choice holds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from knn import embed_all
from labelled import SETS, read_split
from numpy.typing import NDArray
from provenance import command

from dinokit import KNNClassifier, __version__, load_backbone, select_diverse, select_typical

DRAWS = 50


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the sets")
    parser.add_argument("-m", "--model", default="starter")
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=["imagenette224", "clothing"])
    parser.add_argument("--counts", nargs="+", type=int, default=[20, 50, 100, 200])
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()

    backbone = load_backbone(args.model)
    results: list[dict[str, Any]] = []
    for name in args.sets:
        (pool, labels), (queries, truth) = (read_split(args.data, pattern) for pattern in SETS[name])
        vectors, judged = embed_all(backbone.embed, pool), embed_all(backbone.embed, queries)
        y = np.asarray(labels)

        def judge(
            rows: NDArray[np.intp],
            vectors: NDArray[np.float32] = vectors,
            judged: NDArray[np.float32] = judged,
            y: NDArray[Any] = y,
            truth: Any = truth,
        ) -> tuple[float, int]:
            knn = KNNClassifier(k=5, temperature=0.07).fit(vectors[rows], y[rows])
            return 100 * knn.score(judged, truth), len(np.unique(y[rows]))

        for count in args.counts:
            rng = np.random.default_rng(count)
            draws = [judge(rng.choice(len(vectors), count, replace=False)) for _ in range(DRAWS)]
            row: dict[str, Any] = {"set": name, "labels": count}
            for way, choose in (("typical", select_typical), ("diverse", select_diverse)):
                top1, classes = judge(np.asarray(choose(vectors, count).rows))
                row |= {way: round(top1, 1), f"{way}_classes": classes}
            top1s = np.array([top1 for top1, _ in draws])
            row |= {
                "chance": round(float(top1s.mean()), 1),
                "chance_deviation": round(float(top1s.std(ddof=1)), 1),
                "chance_classes": round(float(np.mean([classes for _, classes in draws])), 1),
            }
            results.append(row)
            print(
                f"{name:<18}{count:>4} labels   typical {row['typical']:5.1f} %   diverse {row['diverse']:5.1f} %   "
                f"chance {row['chance']:5.1f} ± {row['chance_deviation']:.1f} %",
                flush=True,
            )
    if args.output:
        report = {
            "command": command(args.data),
            "protocol": f"k=5, T=0.07, chance over {DRAWS} draws",
            "dinokit": __version__,
            "model": backbone.name,
            "weights_sha256": backbone.weights_sha256,
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
