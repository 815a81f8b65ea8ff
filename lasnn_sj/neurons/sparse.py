"""Product of a sparse and a dense matrix on the CPU, at a cost that follows the nonzero values.

Spikes are zero in most places, and so is the gradient at neurons whose surrogate slope is 0. ``a @ b`` then
needs, for each nonzero ``a[m, k]``, only the addition of ``a[m, k] * b[k]`` to row ``m`` of the result. The
kernels list the nonzero values of each row of ``a``, :data:`DEEP` columns at a time, and copy ``b`` in tiles
of :data:`DEEP` rows and :data:`WIDE` columns that stay in the first-level cache. Every element of the result
is the sum of its terms in one order, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from . import cpu_kernels, lanes
from .cpu_kernels import BAD, NEXT, SEATS, c_function, checksum, record
from .lanes import (
    WIDTH,
    address,
    at,
    floats,
    fused,
    inlined,
    ints,
    load,
    lowest,
    mask_of,
    ones,
    short_ints,
    spread,
    store,
    taken,
)
from .memory import advise_huge_pages
from .threads import run

DEEP, WIDE = 128, 64  # rows and columns of a tile of b: 32 KiB
ROWS = 32  # rows of a that a thread takes at a time
ZERO = np.float32(0)

_SOURCES = checksum(lanes, cpu_kernels)
TASK = record("next seats bad M K N a b y a_row a_column b_row b_column y_row ends entries tiles")


@inlined
def nonzero(values, count):
    """Return a bit for each of the next sixteen values, set if it is not 0 (NaN is not)."""
    if count >= WIDTH:
        return mask_of(load(values) != spread(ZERO))
    mask = 0
    for i in range(count):
        if values[i] != ZERO:
            mask |= 1 << i
    return mask


@cache
def listing_kernel(fills: bool) -> Callable:
    """Compile the kernel that counts the nonzero values of each list, or with ``fills`` writes the lists.

    List ``i = k // DEEP * M + m`` has the nonzero values among ``DEEP`` columns of row ``m``, each as its
    value and the place of its row in a tile of ``b``. Counts are written to ``ends[i + 1]``. To fill,
    ``ends[i + 1]`` must hold where the list starts, and holds in the end where it ends.
    """
    sources = _SOURCES

    def listing(pointer):
        sources  # noqa: B018 - enclosed, so that it is part of the cache's key
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        a, ends = floats(task.a), at(ints(task.ends), 1)
        values, places = floats(task.entries), short_ints(task.entries)
        M, K, row, column = task.M, task.K, task.a_row, task.a_column
        by_rows = column == 1
        piece, whole = (ROWS, M) if by_rows else (DEEP, K)
        start = taken(at(counters, NEXT), piece)
        while start < whole:
            stop = min(start + piece, whole)
            if by_rows:
                for m in range(start, stop):
                    for k0 in range(0, K, DEEP):
                        i, k1 = k0 // DEEP * M + m, min(k0 + DEEP, K)
                        end = ends[i] if fills else 0
                        for k in range(k0, k1, WIDTH):
                            here = at(a, m * row + k)
                            mask = nonzero(here, k1 - k)
                            if fills:
                                while mask != 0:
                                    j = lowest(mask)
                                    values[2 * end] = here[j]
                                    places[2 * end + 1] = (k - k0 + j) * WIDE
                                    end += 1
                                    mask &= mask - 1
                            else:
                                end += ones(mask)
                        ends[i] = end
            else:
                own = at(ends, start // DEEP * M)
                for k in range(start, stop):
                    for m in range(0, M, WIDTH):
                        here = at(a, k * column + m)
                        mask = nonzero(here, M - m)
                        while mask != 0:
                            j = lowest(mask)
                            end = own[m + j]
                            if fills:
                                values[2 * end] = here[j]
                                places[2 * end + 1] = (k - start) * WIDE
                            own[m + j] = end + 1
                            mask &= mask - 1
            start = taken(at(counters, NEXT), piece)

    return c_function(listing, TASK)


@cache
def product_kernel() -> Callable:
    """Compile the kernel that computes ``WIDE`` columns of the result at a time.

    Adds to ``bad`` how many tiles of ``b`` hold a value that is not finite: its product with 0 is not 0.
    """
    sources = _SOURCES

    def product(pointer):
        sources  # noqa: B018
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        b, y, ends = floats(task.b), floats(task.y), ints(task.ends)
        values, places = floats(task.entries), short_ints(task.entries)
        M, K, N, y_row = task.M, task.K, task.N, task.y_row
        b_row, b_column = task.b_row, task.b_column
        tile = floats(task.tiles + 4 * DEEP * WIDE * taken(at(counters, SEATS), 1))
        bad = 0
        n0 = taken(at(counters, NEXT), WIDE)
        while n0 < N:
            wide = min(WIDE, N - n0)
            for k0 in range(0, K, DEEP):
                deep = min(DEEP, K - k0)
                copied(tile, at(b, k0 * b_row + n0 * b_column), b_row, b_column, deep, wide)
                bad += not_finite(tile, deep * WIDE)
                for m in range(M):
                    i = k0 // DEEP * M + m
                    s0 = s1 = s2 = s3 = spread(ZERO)
                    for entry in range(ends[i], ends[i + 1]):
                        v, here = spread(values[2 * entry]), at(tile, places[2 * entry + 1])
                        s0 = fused(load(here), v, s0)
                        s1 = fused(load(at(here, 16)), v, s1)
                        s2 = fused(load(at(here, 32)), v, s2)
                        s3 = fused(load(at(here, 48)), v, s3)
                    there = at(y, m * y_row + n0)
                    if k0 > 0:
                        s0 = s0 + load(there)
                        s1 = s1 + load(at(there, 16))
                        s2 = s2 + load(at(there, 32))
                        s3 = s3 + load(at(there, 48))
                    store(there, s0)
                    store(at(there, 16), s1)
                    store(at(there, 32), s2)
                    store(at(there, 48), s3)
            n0 = taken(at(counters, NEXT), WIDE)
        taken(at(counters, BAD), bad)

    return c_function(product, TASK)


@inlined
def copied(tile, b, row, column, deep, wide):
    """Copy ``deep`` rows and ``wide`` columns of a matrix to a tile, 0 in its other columns."""
    if column == 1 and wide == WIDE:
        for k in range(deep):
            for n in range(0, WIDE, WIDTH):
                store(at(tile, k * WIDE + n), load(at(b, k * row + n)))
        return
    if wide < WIDE:
        for i in range(deep * WIDE):
            tile[i] = ZERO
    for n in range(wide):
        for k in range(deep):
            tile[k * WIDE + n] = b[k * row + n * column]


@inlined
def not_finite(tile, count):
    """Return 1 if a tile holds NaN or infinity, else 0."""
    zeros = spread(ZERO)
    for i in range(0, count, WIDTH):
        zeros = zeros + load(at(tile, i)) * spread(ZERO)
    return 1 if mask_of(zeros != spread(ZERO)) != 0 else 0


def nonzero_density(a: Tensor) -> float:
    """Return the share of values that are not 0 in a float32 matrix of contiguous rows.

    Of many rows, about 256 are counted, an odd number apart: those of one image at all time steps lie an even
    number apart as a rule.
    """
    a = a[:: len(a) // 256 | 1]
    task, ends = _task(a, a, a)
    return _lists(task, ends) / max(1, a.numel())


def sparse_product(a: Tensor, b: Tensor) -> Tensor | None:
    """Compute ``a @ b`` from the nonzero values of ``a``.

    Args:
        a: ``[M, K]``, float32, its rows or its columns contiguous.
        b: ``[K, N]``, float32, any strides.

    Returns:
        ``[M, N]``; ``None`` if ``b`` holds NaN or infinity, whose product with a zero is not 0.
    """
    M, N = len(a), b.shape[1]
    y = advise_huge_pages(torch.empty(M, -(-N // WIDE) * WIDE))
    task, ends = _task(a, b, y)
    entries = torch.empty(2 * _lists(task, ends))
    ends[1:] = ends[1:].cumsum(0) - ends[1:]
    task["entries"] = entries.data_ptr()
    _run(listing_kernel(True), task)
    tiles = torch.empty(torch.get_num_threads() * DEEP * WIDE)
    task["tiles"] = tiles.data_ptr()
    _run(product_kernel(), task)
    if task["bad"]:
        return None
    return y if y.shape[1] == N else y[:, :N].contiguous()


def _task(a: Tensor, b: Tensor, y: Tensor) -> tuple[np.ndarray, Tensor]:
    """Return the task of a product, and its ``ends``."""
    if 1 not in a.stride():
        raise ValueError(f"a must have contiguous rows or columns, got strides {a.stride()}")
    (M, K), N = a.shape, b.shape[1]
    ends = torch.zeros(-(-K // DEEP) * M + 1, dtype=torch.int64)
    addresses = (a.data_ptr(), b.data_ptr(), y.data_ptr())
    strides = (*a.stride(), *b.stride(), y.stride(0))
    return np.array((0, 0, 0, M, K, N, *addresses, *strides, ends.data_ptr(), 0, 0), TASK), ends


def _lists(task: np.ndarray, ends: Tensor) -> int:
    """Write the length of each list to ``ends``; return their sum."""
    _run(listing_kernel(False), task)
    return int(ends.sum())


def _run(kernel: Callable, task: np.ndarray) -> None:
    task["next"] = task["seats"] = 0
    run(kernel, task.ctypes.data, torch.get_num_threads())
