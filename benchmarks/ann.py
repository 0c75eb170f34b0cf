"""The approximate index against exact search: recall@10 and time, on tables of dinokit embed.

    dinokit embed DATA/cifar10/test.parquet -o cifar10.parquet
    dinokit embed DATA/clothing -o clothing.parquet
    python benchmarks/ann.py cifar10.parquet clothing.parquet --copies 4 -o benchmarks/results/ann.json

A thousand rows (or all) spread over the table are searched for; a row does not find itself. Speed is the ratio of exact
search to search by the index, queries all at once and one by one, in this process. --copies 20 repeats the table with
noise added (a tenth of a vector's length), for a size at which an index begins to be of use. Needs dinokit[ann].
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray
from provenance import command

from dinokit import SearchIndex, __version__, read_embeddings
from dinokit.neighbours.ann import build_index
from dinokit.tables.embeddings import table_of, write_embeddings

K = 10
QUERIES = 1000
ONE_BY_ONE = 50


def with_copies(table: Path, copies: int, folder: Path) -> Path:
    """The table and so many noisy copies of it."""
    read = read_embeddings(table)
    rng = np.random.default_rng(0)
    lengths = np.linalg.norm(read.embeddings, axis=1, keepdims=True) / np.sqrt(read.embeddings.shape[1])
    noisy = [read.embeddings + 0.1 * lengths * rng.normal(size=read.embeddings.shape) for _ in range(copies)]
    vectors: NDArray[np.float32] = np.concatenate([read.embeddings, *noisy]).astype(np.float32)
    made = table_of(
        [str(row) for row in range(len(vectors))], vectors, [None] * len(vectors), [None] * len(vectors)
    )
    output = folder / "copies.parquet"
    write_embeddings(output, lambda: iter([made]), len(vectors), read.origin)
    return output


def measure(table: Path, links: int, effort: int, folder: Path) -> dict[str, Any]:
    """Recall and times of one table."""
    began = time.perf_counter()
    info = build_index(table, folder / "index", links=links, effort=effort, overwrite=True)
    build = time.perf_counter() - began
    exact, near = SearchIndex.read(table), SearchIndex.read(table, index=folder / "index")
    rows = np.unique(np.linspace(0, len(exact.paths) - 1, QUERIES).astype(int))
    rows = rows[[exact.has_embedding(int(row)) for row in rows]]
    found, seconds, alone = [], [], []
    for index in (exact, near):
        began = time.perf_counter()
        found.append(index.search_rows(rows, K)[1].tolist())
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
        for row in rows[:ONE_BY_ONE]:
            index.search_rows(int(row), K)
        alone.append(time.perf_counter() - began)
    same = sum(len(set(a) & set(b)) for a, b in zip(*found, strict=True)) / (K * len(rows))
    return {
        "rows": info.rows,
        "dim": info.dim,
        "links": links,
        "effort": effort,
        "recall_at_10": round(same, 4),
        "recall_at_10_said_by_the_index": info.recall_at_10,
        "times_faster_all_at_once": round(seconds[0] / seconds[1], 2),
        "times_faster_one_by_one": round(alone[0] / alone[1], 2),
        "build_in_exact_searches_of_1000": round(build / seconds[0] * len(rows) / 1000, 1),
        "bytes_per_vector": round((folder / "index" / "index.faiss").stat().st_size / info.rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", type=Path)
    parser.add_argument("--links", type=int, default=32)
    parser.add_argument("--effort", type=int, default=200)
    parser.add_argument(
        "--copies", type=int, default=0, help="measure the first table with noisy copies, too"
    )
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tables = [(table.stem, table) for table in args.tables]
        if args.copies:
            made = with_copies(args.tables[0], args.copies, folder)
            tables.append((f"{args.tables[0].stem} and {args.copies} noisy copies", made))
        for what, table in tables:
            results.append({"table": what, **measure(table, args.links, args.effort, folder)})
            print(json.dumps(results[-1]), flush=True)
    if args.output:
        report = {
            "command": command(),
            "dinokit": __version__,
            "faiss": faiss.__version__,
            "model": read_embeddings(args.tables[0]).origin.get("model"),
            "weights_sha256": read_embeddings(args.tables[0]).origin.get("weights_sha256"),
            "results": results,
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
