"""Ordered work on several threads with a bounded queue."""

from __future__ import annotations

import ctypes
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

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


class Workers:
    """A pool of threads whose results come back in the order of the work.

    The order is what makes results independent of the number of threads. After an error or an
    interrupt nothing that is still queued is begun.
    """

    def __init__(self, threads: int) -> None:
        _keep_freed_memory()
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads)

    def submit(self, work: Callable[[T], R], item: T) -> Future[R]:
        return self._pool.submit(work, item)

    def map(self, work: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        """``work`` of each item, in order; at most four results a thread wait to be taken."""
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(self._pool.submit(work, item))
                if len(waiting) > 4 * self.threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()

    def __enter__(self) -> Workers:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
