"""Work done ahead in threads: in order, and stopped whoever stops it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator

import pytest

from dinokit.features.batching import map_ahead


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
    for thread in pool_threads() - before:  # with nothing to do, they end at once
        thread.join(10)
    assert pool_threads() == before


def test_what_is_being_computed_is_waited_for_at_an_early_end() -> None:
    begun, done = threading.Event(), threading.Event()

    def slow(item: int) -> int:
        if item == 1:
            begun.set()
            time.sleep(0.3)
            done.set()
        return item

    results = map_ahead(slow, range(8), workers=1, ahead=2)
    assert next(results) == 0 and begun.wait(10)
    results.close()  # type: ignore[attr-defined]
    assert done.is_set()


def test_it_may_be_collected_while_threads_lock_is_held() -> None:
    """By a thread that is just starting, for instance: a join would wait for that lock for ever."""
    if not hasattr(threading, "_shutdown_locks_lock"):  # Python 3.13 has none
        pytest.skip("this Python's threads start without that lock")

    def abandon() -> None:
        cycle: list[Iterator[int] | list[object]] = []
        results = map_ahead(int, range(8), workers=1, ahead=2)
        cycle += [results, cycle]
        assert next(results) == 0

    def collect() -> None:
        with threading._shutdown_locks_lock:  # type: ignore[attr-defined]
            gc.collect()

    gc.disable()
    try:
        abandon()
        collector = threading.Thread(target=collect, daemon=True)
        collector.start()
        collector.join(10)
        assert not collector.is_alive()
    finally:
        gc.enable()


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
