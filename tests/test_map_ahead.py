"""Work done ahead in threads: in order, and stopped whoever stops it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from dinokit.batching import map_ahead


def pool_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("dinokit-decode")}


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers: int) -> None:
    assert list(map_ahead(lambda n: n * n, range(20), workers=workers, ahead=4)) == [n * n for n in range(20)]


def test_no_thread_works_on_after_an_early_end() -> None:
    before = pool_threads()
    results = map_ahead(str, range(100), workers=2, ahead=4)
    assert next(results) == "0"
    assert pool_threads() - before
    results.close()  # type: ignore[attr-defined]
    assert pool_threads() == before


def test_one_of_its_own_threads_may_collect_it() -> None:
    """An iterator left in a cycle (a kept traceback makes one) is closed by the thread that happens to collect it."""
    asked, collected = threading.Event(), threading.Event()

    def collect(item: int) -> int:
        if item == 1:
            assert asked.wait(10)
            gc.collect()
            collected.set()
        return item

    def abandon() -> None:
        cycle: list[Iterator[int] | list[object]] = []
        results = map_ahead(collect, range(8), workers=1, ahead=2)
        cycle += [results, cycle]
        assert next(results) == 0

    gc.disable()
    try:
        abandon()
        asked.set()
        assert collected.wait(10)  # a failure inside would be a warning, and warnings are errors here
    finally:
        gc.enable()
