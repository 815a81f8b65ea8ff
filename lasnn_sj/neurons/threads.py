"""Threads that cover a layer on the CPU, each taking a piece of it as soon as it is free."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_process = os.getpid()


def _torchs_own() -> Callable | None:
    """``GOMP_parallel`` of the OpenMP library that PyTorch has loaded, where it has one.

    After a PyTorch operation its threads keep spinning for some milliseconds in wait of the next one;
    other threads would have to share the cores with them.
    """
    try:
        return ctypes.CDLL(None).GOMP_parallel
    except (AttributeError, OSError, TypeError):
        return None


_openmp = _torchs_own()


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # keyed by the process: threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="time_loop")


def spread(kernel: Callable[[int, int], int], n: int, piece: int, threads: int) -> int:
    """The sum of ``kernel(start, stop)`` over pieces of ``range(n)``.

    Args:
        kernel: lets go of the GIL while it works.
        n: how many there are to cover.
        piece: how many go to a thread at a time.
        threads: how many threads, the caller's own among them.
    """
    if threads == 1 or piece >= n:
        return kernel(0, n)
    starts, results, errors = list(range(0, n, piece)), [], []

    def work(_: object = None) -> None:
        try:
            while starts:
                try:
                    start = starts.pop()
                except IndexError:  # another thread was faster
                    return
                results.append(kernel(start, min(start + piece, n)))
        except BaseException as error:  # OpenMP's threads can raise nothing
            errors.append(error)

    if _openmp is not None and os.getpid() == _process:  # OpenMP's threads do not survive a fork either
        body = _BODY(work)
        _openmp(body, None, threads, 0)
    else:
        helpers = [_pool(os.getpid(), threads).submit(work) for _ in range(threads - 1)]
        work()
        for helper in helpers:
            # one whose core was busy until now has nothing left to do
            if not helper.cancel():
                helper.result()
    if errors:
        raise errors[0]
    return sum(results)
