"""Threads that share work: order, how many there are, and what an error leaves undone."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from qconvert.stages.parallel import Workers


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_results_come_in_the_order_of_the_work(threads: int) -> None:
    def work(i: int) -> int:
        time.sleep(0.002 * (i % 3))
        return i * i

    with Workers(threads) as workers:
        assert list(workers.map(work, range(50))) == [i * i for i in range(50)]
        assert list(workers.map(work, [])) == []


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_threads_work_as_were_asked_for(threads: int) -> None:
    """Each waits until all are there: with one fewer none would go on."""
    together = threading.Barrier(threads, timeout=60)
    names: set[int] = set()

    def work(_: int) -> None:
        names.add(threading.get_ident())
        together.wait()

    with Workers(threads) as workers:
        for _ in workers.map(work, range(4 * threads)):
            pass
    assert len(names) == threads
    assert threading.get_ident() in names


def test_results_wait_for_who_takes_them() -> None:
    begun: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            begun.append(i)
            yield i

    with Workers(2) as workers:
        results = workers.map(lambda i: i, items())
        assert next(results) == 0
        assert len(begun) <= 4 * 2 + 1


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_the_first_error_in_order_is_raised_and_the_rest_not_begun(threads: int) -> None:
    done: list[int] = []

    def work(i: int) -> int:
        if i == 3:
            time.sleep(0.05)  # a later one fails before
            raise ValueError("three")
        if i == 4:
            raise ValueError("four")
        done.append(i)
        return i

    taken: list[int] = []
    with Workers(threads) as workers, pytest.raises(ValueError, match="three"):
        taken.extend(workers.map(work, range(1000)))  # keeps what came before
    assert taken == [0, 1, 2]
    assert len(done) <= 3 + 4 * threads + 1


@pytest.mark.parametrize("threads", [1, 2])
def test_a_task_is_done_once_by_whoever_is_free(threads: int) -> None:
    calls: list[int] = []

    def work(i: int) -> int:
        calls.append(i)
        return -i

    with Workers(threads) as workers:
        tasks = [workers.submit(work, i) for i in range(20)]
        assert [task.result() for task in reversed(tasks)] == [-i for i in reversed(range(20))]
        assert [task.result() for task in tasks] == [-i for i in range(20)]
    assert sorted(calls) == list(range(20))


def test_an_interrupt_is_not_kept_for_later() -> None:
    def work(_: int) -> None:
        raise KeyboardInterrupt

    with Workers(1) as workers, pytest.raises(KeyboardInterrupt):
        workers.submit(work, 0).begin()
