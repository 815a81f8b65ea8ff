"""Threads of the CPU kernels."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

_process = os.getpid()


def _torchs_own() -> Callable | None:
    """``GOMP_parallel`` of the OpenMP library that PyTorch has loaded, if there is one.

    After a PyTorch operation its threads spin for some milliseconds, waiting for the next one; other threads
    would have to share the cores with them.
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
    """Call ``kernel(task)`` in several threads at once, one of them the caller's.

    Args:
        kernel: a C function that raises nothing and releases the GIL.
        task: address of the shared task; each thread takes pieces of it until none is left.
        threads: number of threads. One that starts late may find nothing left.
    """
    if threads == 1:
        kernel(task)
    elif _openmp is not None and os.getpid() == _process:  # OpenMP's threads do not survive a fork either
        _openmp(kernel, ctypes.c_void_p(task), threads, 0)
    else:
        helpers = [_pool(os.getpid(), threads).submit(kernel, task) for _ in range(threads - 1)]
        kernel(task)
        for helper in helpers:
            # a helper that has not started yet has nothing left to do
            if not helper.cancel():
                helper.result()
