"""Time and peak memory of KNNClassifier on many references, with random vectors.

    python benchmarks/knn_memory.py                               a million references of 384 numbers
    python benchmarks/knn_memory.py --references 100000 --queries 100

Prints what the vectors themselves take, what fitting adds (a normalised copy), what a search adds, and the time a
query. Of random vectors the neighbours mean nothing; time and memory are the same.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time

import numpy as np

from dinokit import KNNClassifier


def peak_gb() -> float:
    """The most memory this process has held, GB (kilobytes on Linux, bytes on macOS)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--references", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--dim", type=int, default=384)
    parser.add_argument("-k", type=int, default=20)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    references = rng.standard_normal((args.references, args.dim), dtype=np.float32)
    queries = rng.standard_normal((args.queries, args.dim), dtype=np.float32)
    labels = rng.integers(0, 1000, args.references)
    before = peak_gb()
    print(f"{args.references} references x {args.dim}: {before:.2f} GB")

    began = time.perf_counter()
    knn = KNNClassifier(k=args.k).fit(references, labels)
    fitted = peak_gb()
    print(f"fit      +{fitted - before:.2f} GB  {time.perf_counter() - began:.1f} s")

    began = time.perf_counter()
    knn.predict(queries)
    seconds = time.perf_counter() - began
    print(f"predict  +{peak_gb() - fitted:.2f} GB  {1000 * seconds / args.queries:.1f} ms a query")


if __name__ == "__main__":
    main()
