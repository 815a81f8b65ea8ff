"""Threads that share a task on the CPU."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

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


def run(kernel: Callable[[int], None], task: int, threads: int) -> None:
    """Call ``kernel(task)`` in so many threads at once, the caller's own among them.

    Args:
        kernel: a C function, which raises nothing and lets go of the GIL.
        task: address of what they share; each takes from it until nothing is left.
        threads: how many. One that starts late may find nothing to do.
    """
    if threads == 1:
        kernel(task)
    elif _openmp is not None and os.getpid() == _process:  # OpenMP's threads do not survive a fork either
        _openmp(kernel, ctypes.c_void_p(task), threads, 0)
    else:
        helpers = [_pool(os.getpid(), threads).submit(kernel, task) for _ in range(threads - 1)]
        kernel(task)
        for helper in helpers:
            # one whose core was busy until now has nothing left to do
            if not helper.cancel():
                helper.result()
