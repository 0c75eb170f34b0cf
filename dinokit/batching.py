"""Decode ahead in threads, in order, with bounded memory; cut a stream into batches of one constant size."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, TypeVar

from dinokit.errors import UsageError

__all__ = ["Workers", "batched", "check_batch_size", "count_workers", "even_batch_size", "map_ahead"]

A = TypeVar("A")
B = TypeVar("B")
Workers = int | Literal["auto"]


def count_workers(workers: Workers) -> int:
    """``auto``: a thread for each core this process may use, 8 at most. 0: decode in the calling thread."""
    if workers == "auto":
        affinity = getattr(os, "sched_getaffinity", None)  # respects containers and taskset; not on macOS
        return min(8, len(affinity(0)) if affinity else os.cpu_count() or 1)
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise UsageError(f"workers={workers!r} is not possible; use 'auto', or a number from 0")
    return workers


def check_batch_size(batch_size: int) -> int:
    """The batch size itself. Raises UsageError below 1."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size={batch_size!r} is not possible; use a number from 1")
    return batch_size


def even_batch_size(count: int, at_most: int) -> int:
    """The constant batch size that wastes least padding: 33 pictures at 32 are two batches of 17."""
    n_batches = -(-count // at_most)
    return -(-count // n_batches) if n_batches else at_most


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, workers: int, ahead: int) -> Iterator[B]:
    """``map`` in order, computed by threads up to ``ahead`` items before they are asked for.

    Items are drawn in the calling thread. An exception of ``function`` is raised at its item's turn.
    """
    if workers == 0:
        yield from map(function, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="dinokit-decode")
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        # Also on Ctrl-C and when the consumer stops early: nothing goes on working behind its back.
        pool.shutdown(wait=True, cancel_futures=True)


def batched(items: Iterable[A], size: int) -> Iterator[list[A]]:
    """Lists of ``size`` items, the last one shorter (itertools.batched is Python 3.12)."""
    batch: list[A] = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
