"""Decode ahead in threads, in order, with bounded memory; batches of one constant size, or of one that fits."""

from __future__ import annotations

import operator
import re
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from dinokit.errors import ImageError, UsageError
from dinokit.runtime.cpu import usable_cpus

if TYPE_CHECKING:
    from PIL import Image

    from dinokit.pictures.bands import Bands
    from dinokit.sources import Item

__all__ = [
    "BatchSize",
    "Halving",
    "Workers",
    "batched",
    "check_batch_size",
    "count_workers",
    "decode_ahead",
    "even_batch_size",
    "first_batch_size",
    "is_out_of_memory",
    "map_ahead",
]

A = TypeVar("A")
B = TypeVar("B")
Workers = int | Literal["auto"]
BatchSize = int | Literal["auto"]


def count_workers(workers: Workers) -> int:
    """``auto``: a thread for each core this process may use, 8 at most. 0: decode in the calling thread."""
    if workers == "auto":
        return min(8, usable_cpus())
    number = _whole(workers)
    if number is None or number < 0:
        raise UsageError(f"workers={workers!r} is invalid; use 'auto' or an integer of at least 0")
    return number


def check_batch_size(batch_size: int) -> int:
    """The batch size itself. Raises UsageError below 1."""
    number = _whole(batch_size)
    if number is None or number < 1:
        raise UsageError(f"batch_size={batch_size!r} is invalid; use an integer of at least 1")
    return number


def _whole(value: object) -> int | None:
    """An integer, also numpy's, as Python's; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def first_batch_size(batch_size: BatchSize, device: str) -> int:
    """The batch size a run starts with: the number itself, or for ``auto`` 32 on a CPU, where more is not faster, and
    128 elsewhere. ``auto`` is for use with :class:`Halving`."""
    if batch_size == "auto":
        return 32 if device == "cpu" else 128
    return check_batch_size(batch_size)


def even_batch_size(count: int, at_most: int) -> int:
    """The constant batch size that wastes least padding: 33 pictures at 32 are two batches of 17."""
    n_batches = -(-count // at_most)
    return -(-count // n_batches) if n_batches else at_most


def map_ahead(function: Callable[[A], B], items: Iterable[A], *, workers: int, ahead: int) -> Iterator[B]:
    """``map`` in order, computed by threads up to ``ahead`` items before they are needed.

    Items are drawn in the calling thread. An exception of ``function`` is raised at its item's turn.
    """
    if workers == 0:
        yield from map(function, items)
        return
    caller = threading.get_ident()
    closed = False
    pool = ThreadPoolExecutor(workers, thread_name_prefix="dinokit-decode")
    pending: deque[Future[B]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) >= ahead:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except GeneratorExit:
        closed = True
        raise
    finally:
        # Also on Ctrl-C and when the consumer stops early: no thread keeps working. But an iterator
        # that was left in a reference cycle is closed by whichever thread collects it, wherever that is: it may be one
        # of the pool, or in the middle of starting, with locks of `threading` that a join would wait for for ever. So
        # no thread is joined when it is closed, and only the caller waits for what is being computed.
        pool.shutdown(wait=not closed, cancel_futures=True)
        if closed and threading.get_ident() == caller:
            wait([future for future in pending if not future.cancelled()])


def decode_ahead(
    pictures: Iterable[Item], channels: int, *, workers: int, ahead: int
) -> Iterator[tuple[Item, Image.Image | Bands | str]]:
    """Each picture with what it decodes to (``bands.decode_picture``), or with the reason why it does not."""
    from dinokit.pictures.bands import decode_picture
    from dinokit.sources import in_order

    def decode(picture: Item) -> tuple[Item, Image.Image | Bands | str]:
        try:
            return picture, decode_picture(picture, channels)
        except ImageError as error:
            return picture, str(error)

    return map_ahead(decode, in_order(pictures), workers=workers, ahead=ahead)


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


# -- batches that fit in memory


class Halving:
    """Runs a function over batches, in smaller pieces once a whole batch has not fitted in memory.

    ``size`` is the most that is given to the function at a time; it is halved whenever memory runs out, and stays
    so for the batches that follow.
    """

    def __init__(self, size: int, on_halving: Callable[[int], None] | None = None) -> None:
        self.size = size
        self._on_halving = on_halving

    def run(self, function: Callable[[NDArray[Any]], NDArray[Any]], batch: NDArray[Any]) -> NDArray[Any]:
        """``function`` of the whole batch, first axis B. Raises its error when a single one does not fit."""
        results: list[NDArray[Any]] = []
        start = 0
        while start < len(batch):
            piece = batch[start : start + self.size]
            try:
                results.append(function(piece))
            except Exception as error:
                if len(piece) == 1 or not is_out_of_memory(error):
                    raise
                fitted = False
            else:
                fitted = True
            if fitted:
                start += len(piece)
            else:  # outside of the except block: there, the traceback holds on to what did not fit
                self.size = max(1, len(piece) // 2)
                _free_cached_memory()
                if self._on_halving:
                    self._on_halving(self.size)
        return results[0] if len(results) == 1 else np.concatenate(results)


# How ONNX Runtime, torch, CUDA and cuBLAS say it.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|failed to allocate memory|bad_alloc|(can't|cannot|unable to) allocate|not enough memory"
    r"|cudaErrorMemoryAllocation|CUBLAS_STATUS_ALLOC_FAILED|available memory of \d+ is smaller than requested",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that caused it, reports that the machine or the accelerator ran out of memory."""
    while error is not None:
        if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _free_cached_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
