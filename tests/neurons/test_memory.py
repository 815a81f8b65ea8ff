"""Memory behind large tensors on the CPU."""

import multiprocessing
import resource
import sys

import pytest
import torch

from lasnn_sj.neurons import disable_malloc_trim
from lasnn_sj.neurons.memory import advise_huge_pages, release_freed_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux and glibc for something")


@pytest.mark.parametrize("elements", [0, 10, 5_000_000])
def test_advice_changes_no_value(elements):
    t = torch.arange(elements)
    assert advise_huge_pages(t) is t
    assert torch.equal(t, torch.arange(elements))


def faults_of_fresh_blocks() -> int:
    """Page faults while ten blocks of 32 MB are made, written and freed, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pages = bytes(8192)
    for _ in range(10):
        block = bytearray(32 << 20)
        block[::4096] = pages
        del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def count_faults(results) -> None:
    before = faults_of_fresh_blocks()
    results.put((disable_malloc_trim(), before, faults_of_fresh_blocks()))


@linux
def test_kept_memory_is_mapped_once():
    # in a fresh process, since it holds for the whole process and may have been asked for already
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=count_faults, args=(results,))
    process.start()
    took_effect, before, after = results.get(timeout=60)
    process.join()
    assert took_effect
    assert before > 10 * 8192 * 0.9  # each block was mapped anew
    assert after < 2 * 8192  # now only the first


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def measure_release(keeps, results) -> None:
    if keeps:
        disable_malloc_trim()
    blocks = [torch.ones(1 << 14) for _ in range(2000)]  # 64 KiB each, one after the other in the heap
    del blocks[::2]
    before = resident_bytes()
    release_freed_memory()
    results.put(before - resident_bytes())


@linux
@pytest.mark.parametrize("keeps", [False, True])
def test_freed_memory_between_blocks_is_returned_unless_it_is_to_be_kept(keeps):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=measure_release, args=(keeps, results))
    process.start()
    returned = results.get(timeout=60)
    process.join()
    freed = 1000 << 16
    assert returned < 0.1 * freed if keeps else returned > 0.9 * freed
