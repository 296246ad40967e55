"""Ordered work on several threads with a bounded queue."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType
from typing import Generic, TypeVar

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h

T = TypeVar("T")
R = TypeVar("R")


def available_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tile: it would give the system back each one.

    That doubled the time of a conversion: a page fault for every 4 KiB of every temporary array.
    Holds for the whole process; elsewhere than with glibc nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 25)  # the most that 64-bit systems allow
        mallopt(M_TRIM_THRESHOLD, 1 << 28)


class Task(Generic[R]):
    """Work that whoever is free first does: a thread of the pool, or the one that wants it done."""

    def __init__(self, work: Callable[[], R], pool: ThreadPoolExecutor | None) -> None:
        self._work = work
        self._future: Future[R] = pool.submit(work) if pool else Future()

    @property
    def done(self) -> bool:
        return self._future.done()

    def begin(self) -> bool:
        """Do it on this thread, unless it has begun.

        Returns:
            Whether this thread did it. What it raised is left for `result`.
        """
        if not self._future.cancel():
            return False
        self._future = Future()
        try:
            self._future.set_result(self._work())
        except Exception as e:
            self._future.set_exception(e)
        return True

    def result(self) -> R:
        """What the work returned, or raise what it raised."""
        self.begin()
        return self._future.result()

    def cancel(self) -> None:
        self._future.cancel()


class Workers:
    """Threads whose results come back in the order of the work.

    The order is what makes results independent of the number of threads. The thread that takes the
    results is one of them: it works too while the next result is not there, so that no more threads
    run than were asked for and none waits. After an error or an interrupt nothing that is still
    queued is begun.

    Args:
        threads: how many, the calling one included.
    """

    def __init__(self, threads: int) -> None:
        _keep_freed_memory()
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads - 1) if threads > 1 else None

    def submit(self, work: Callable[[T], R], item: T) -> Task[R]:
        return Task(partial(work, item), self._pool)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``work`` of each item, in order; at most two results a thread wait to be taken."""
        waiting: deque[Task[R]] = deque()
        try:
            for item in items:
                waiting.append(self.submit(work, item))
                if len(waiting) > 2 * self.threads:
                    yield _first(waiting)
            while waiting:
                yield _first(waiting)
        finally:
            for task in waiting:
                task.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        if self._pool:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _first(waiting: deque[Task[R]]) -> R:
    """The result of the first task, with work on others for as long as it is not there."""
    while not waiting[0].done and any(task.begin() for task in waiting):
        pass
    return waiting.popleft().result()
