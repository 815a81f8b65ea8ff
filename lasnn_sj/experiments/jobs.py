"""Jobs in several processes, each on its own device."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

import torch

from ..neurons import disable_malloc_trim
from ..runtime import distributed

log = logging.getLogger(__name__)

Job = TypeVar("Job")


def run_jobs(
    work: Callable[[Job, str], object], jobs: Sequence[Job], devices: Sequence[str], processes: int
) -> Iterator[tuple[Job, object, str | None]]:
    """Call ``work(job, device)`` for every job; a failing job does not stop the others.

    Args:
        work: called in this process if ``processes`` is 1, else in spawned processes, for which it must be
            picklable.
        jobs: arguments of the calls.
        devices: devices, assigned to the processes in turn.
        processes: number of jobs that run at once. Each process gets an equal share of the threads.

    Yields:
        A finished job, the result of ``work``, and its error as text or ``None``, in order of completion.
    """
    processes = min(processes, len(jobs))
    if processes > 1 and distributed.world_size() > 1:
        raise ValueError(
            f"processes must be 1 under torchrun, whose processes share each job, got {processes}"
        )
    if processes <= 1:
        for job in jobs:
            yield job, *attempt(work, job, devices[0])
        return
    context = multiprocessing.get_context("spawn")  # CUDA and thread pools do not survive a fork
    free = context.Queue()
    for worker in range(processes):
        free.put(devices[worker % len(devices)])
    start = (work, free, max(1, torch.get_num_threads() // processes), os.getpid())
    with ProcessPoolExecutor(processes, context, initializer=_start_worker, initargs=start) as pool:
        futures = {pool.submit(_call, job): job for job in jobs}
        try:
            for future in as_completed(futures):
                yield futures[future], *future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def default_processes(devices: Sequence[str]) -> int:
    """One process for each GPU, or for each core where there is only the CPU; one under torchrun."""
    if distributed.world_size() > 1:
        return 1
    return len(devices) if devices[0] != "cpu" else len(os.sched_getaffinity(0))


# Of a worker process, set once when it starts.
_work: Callable[[object], tuple[object, str | None]]
_parent: int


def _start_worker(work: Callable, free: multiprocessing.Queue, threads: int, parent: int) -> None:
    global _work, _parent
    _parent, device = parent, free.get()
    torch.set_num_threads(threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(process)d %(message)s", datefmt="%H:%M:%S")
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()

    def attempt_here(job: object) -> tuple[object, str | None]:
        return attempt(work, job, device)

    _work = attempt_here


def _end_with(parent: int) -> None:
    """Send SIGTERM to this process, which saves and ends, once its parent has ended."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def _call(job: object) -> tuple[object, str | None]:
    if os.getppid() != _parent:  # the pool takes a job that a signal ended for one that failed, and goes on
        os._exit(1)
    return _work(job)


def attempt(work: Callable[[Job, str], object], job: Job, device: str) -> tuple[object, str | None]:
    """Return what ``work(job, device)`` does, and its error as text or ``None``."""
    if device == "cpu":
        disable_malloc_trim()  # mapping new memory for every large tensor takes longer than filling it
    try:
        return work(job, device), None
    except Exception as error:  # a failing job must not end the others
        if distributed.world_size() > 1:  # the others are in the midst of this one
            raise
        log.exception("%s failed", job)
        return None, f"{type(error).__name__}: {error}"
