"""3x3 convolution of sparse images on the CPU, at a cost that follows the nonzero values.

The kernels list the nonzero values of an image, pixel by pixel for the output, channel by channel for the
gradient of the weights, and for each add a row of the weights, or of the output's gradient, at each tap. What
they add comes from a tile that stays in the cache, and so do the pixels of the result. Images lie channels
last. Every element of a result is the sum of its terms in one order, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor

from . import cpu_kernels, lanes, sparse
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
    short_ints,
    spread,
    store,
    taken,
)
from .memory import advise_huge_pages
from .sparse import ZERO, nonzero
from .threads import run

STRIP = 64  # pixels of the output that are computed together: 16 KiB with 64 channels
PARTS = 16  # parts of a batch whose weight gradients are added in the end

_SOURCES = checksum(lanes, cpu_kernels, sparse)
TASK = record("next seats bad n H W C C_out a b y entries entries_size ends ends_size tiles tiles_size piece")


@inlined
def listed_by_pixel(a, values, places, ends, pixels, channels, step):
    """List the nonzero values of each pixel, with their channel times ``step``."""
    end = 0
    for p in range(pixels):
        for c in range(0, channels, WIDTH):
            here = at(a, p * channels + c)
            mask = nonzero(here, channels - c)
            while mask != 0:
                j = lowest(mask)
                values[2 * end] = here[j]
                places[2 * end + 1] = (c + j) * step
                end += 1
                mask &= mask - 1
        ends[p + 1] = end


@inlined
def listed_by_channel(a, values, places, ends, H, W, channels, step):
    """List the nonzero values of each channel, with their pixel in rows two pixels longer, times ``step``."""
    for c in range(channels + 1):
        ends[c] = 0
    own = at(ends, 1)
    for p in range(H * W):
        for c in range(0, channels, WIDTH):
            mask = nonzero(at(a, p * channels + c), channels - c)
            while mask != 0:
                own[c + lowest(mask)] += 1
                mask &= mask - 1
    total = 0
    for c in range(channels):
        count = own[c]
        own[c] = total
        total += count
    for p in range(H * W):
        place = (p // W * (W + 2) + p % W) * step
        for c in range(0, channels, WIDTH):
            here = at(a, p * channels + c)
            mask = nonzero(here, channels - c)
            while mask != 0:
                j = lowest(mask)
                end = own[c + j]
                values[2 * end] = here[j]
                places[2 * end + 1] = place
                own[c + j] = end + 1
                mask &= mask - 1


@cache
def output_kernel(wide: bool) -> Callable:
    """Compile the kernel of the output, 64 or 32 channels at a time.

    ``a`` is ``[n, H, W, C]``, ``b`` the weights ``[C_out / block, 3, 3, C, block]`` and ``y``
    ``[n, H, W, C_out]``.
    """
    sources = _SOURCES
    block = 64 if wide else 32

    def output(pointer):
        sources  # noqa: B018 - enclosed, so that it is part of the cache's key
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        n, H, W, C, C_out = task.n, task.H, task.W, task.C, task.C_out
        seat = taken(at(counters, SEATS), 1)
        entries = task.entries + 4 * task.entries_size * seat
        ends = ints(task.ends + 8 * task.ends_size * seat)
        values, places = floats(entries), short_ints(entries)
        rows = max(1, STRIP // W)
        image = taken(at(counters, NEXT), 1)
        while image < n:
            listed_by_pixel(at(floats(task.a), image * H * W * C), values, places, ends, H * W, C, block)
            y = at(floats(task.y), image * H * W * C_out)
            for r0 in range(0, H, rows):
                r1 = min(r0 + rows, H)
                for o in range(0, C_out, block):
                    for turn in range(9):
                        tap = (
                            4 if turn == 0 else (turn - 1 if turn < 5 else turn)
                        )  # all pixels have the centre
                        dy, dx = tap // 3 - 1, tap % 3 - 1
                        tile = at(floats(task.b), (o * 9 + tap * block) * C)
                        for r in range(max(r0, -dy), min(r1, H - dy)):
                            for q in range(max(0, -dx), min(W, W - dx)):
                                i, there = (r + dy) * W + q + dx, at(y, (r * W + q) * C_out + o)
                                s0 = s1 = s2 = s3 = spread(ZERO)
                                if turn > 0:
                                    s0, s1 = load(there), load(at(there, 16))
                                    if wide:
                                        s2, s3 = load(at(there, 32)), load(at(there, 48))
                                for entry in range(ends[i], ends[i + 1]):
                                    v, here = spread(values[2 * entry]), at(tile, places[2 * entry + 1])
                                    s0 = fused(load(here), v, s0)
                                    s1 = fused(load(at(here, 16)), v, s1)
                                    if wide:
                                        s2 = fused(load(at(here, 32)), v, s2)
                                        s3 = fused(load(at(here, 48)), v, s3)
                                store(there, s0)
                                store(at(there, 16), s1)
                                if wide:
                                    store(at(there, 32), s2)
                                    store(at(there, 48), s3)
            image = taken(at(counters, NEXT), 1)

    return c_function(output, TASK)


@cache
def weight_kernel() -> Callable:
    """Compile the kernel of the weight gradient, 32 channels at a time.

    ``a`` is ``[n, H, W, C]``, ``b`` ``[n, H, W, C_out]`` and ``y [parts, C, 3, 3, C_out]``, 0 at first: part
    ``i`` is the sum over images ``i * piece`` to ``(i + 1) * piece``. Adds to ``bad`` how many tiles of ``b``
    hold a value that is not finite.
    """
    sources = _SOURCES

    def weights(pointer):
        sources  # noqa: B018
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        n, H, W, C, C_out = task.n, task.H, task.W, task.C, task.C_out
        seat = taken(at(counters, SEATS), 1)
        entries = task.entries + 4 * task.entries_size * seat
        ends = ints(task.ends + 8 * task.ends_size * seat)
        values, places = floats(entries), short_ints(entries)
        frame = floats(task.tiles + 4 * task.tiles_size * seat)  # of b, with a border of zeros
        bad = 0
        first = taken(at(counters, NEXT), task.piece)
        while first < n:
            y = at(floats(task.y), first // task.piece * C * 9 * C_out)
            for image in range(first, min(first + task.piece, n)):
                a, b = at(floats(task.a), image * H * W * C), at(floats(task.b), image * H * W * C_out)
                listed_by_channel(a, values, places, ends, H, W, C, 32)
                for o in range(0, C_out, 32):
                    zeros = spread(ZERO)
                    for p in range(H * W):
                        here, there = (
                            at(b, p * C_out + o),
                            at(frame, ((p // W + 1) * (W + 2) + p % W + 1) * 32),
                        )
                        for half in range(0, 32, WIDTH):
                            value = load(at(here, half))
                            zeros = zeros + value * spread(ZERO)
                            store(at(there, half), value)
                    bad += mask_of(zeros != spread(ZERO)) != 0
                    for c in range(C):
                        for dy in range(3):
                            rows = at(frame, (2 - dy) * (W + 2) * 32)
                            s0 = s1 = s2 = s3 = s4 = s5 = spread(ZERO)
                            for entry in range(ends[c], ends[c + 1]):
                                v, here = spread(values[2 * entry]), at(rows, places[2 * entry + 1])
                                s0 = fused(load(at(here, 64)), v, s0)
                                s1 = fused(load(at(here, 80)), v, s1)
                                s2 = fused(load(at(here, 32)), v, s2)
                                s3 = fused(load(at(here, 48)), v, s3)
                                s4 = fused(load(here), v, s4)
                                s5 = fused(load(at(here, 16)), v, s5)
                            there = at(y, (c * 9 + dy * 3) * C_out + o)
                            store(there, load(there) + s0)
                            store(at(there, 16), load(at(there, 16)) + s1)
                            there = at(there, C_out)
                            store(there, load(there) + s2)
                            store(at(there, 16), load(at(there, 16)) + s3)
                            there = at(there, C_out)
                            store(there, load(there) + s4)
                            store(at(there, 16), load(at(there, 16)) + s5)
            first = taken(at(counters, NEXT), task.piece)
        taken(at(counters, BAD), bad)

    return c_function(weights, TASK)


def sparse_convolution(x: Tensor, weight: Tensor) -> Tensor | None:
    """Compute a 3x3 convolution of padding 1 from the nonzero values of ``x``.

    Args:
        x: ``[N, C, H, W]``, float32, channels last.
        weight: ``[C_out, C, 3, 3]``, float32; ``C_out`` a multiple of 32.

    Returns:
        ``[N, C_out, H, W]``, channels last; ``None`` if ``weight`` holds NaN or infinity.
    """
    if not torch.isfinite(weight).all():
        return None
    (n, C, H, W), C_out = x.shape, len(weight)
    block = 64 if C_out % 64 == 0 else 32
    packed = weight.reshape(C_out // block, block, C, 3, 3).permute(0, 3, 4, 2, 1).contiguous()
    y = advise_huge_pages(torch.empty(n, H, W, C_out))
    _run(output_kernel(block == 64), x, packed, y, C_out, lists=H * W, tile=0, piece=1)
    return y.permute(0, 3, 1, 2)


def sparse_weight_gradient(a: Tensor, b: Tensor) -> Tensor | None:
    """Compute the gradient of the weights from the nonzero values of the input or of the output's gradient.

    Args:
        a: the input ``[N, C, H, W]``, float32, channels last.
        b: the output's gradient ``[N, C_out, H, W]``, in the same form; ``C_out`` a multiple of 32.

    Returns:
        ``[C, 3, 3, C_out]``; with input and gradient exchanged, ``[C_out, 3, 3, C]`` with both axes of the
        taps reversed. ``None`` if ``b`` holds NaN or infinity.
    """
    (n, C, H, W), C_out = a.shape, b.shape[1]
    piece = -(-n // PARTS)
    y = torch.zeros(-(-n // piece), C, 3, 3, C_out)
    bad = _run(weight_kernel(), a, b, y, C_out, lists=C, tile=(H + 2) * (W + 2) * 32, piece=piece)
    return None if bad else y.sum(0)


def _run(
    kernel: Callable, a: Tensor, b: Tensor, y: Tensor, C_out: int, lists: int, tile: int, piece: int
) -> int:
    """Run a kernel in all threads; return ``bad``."""
    (n, C, H, W), threads = a.shape, torch.get_num_threads()
    entries = torch.empty(threads, 2 * H * W * C)
    ends = torch.zeros(threads, lists + 1, dtype=torch.int64)
    tiles = torch.zeros(threads, tile)
    addresses = a.data_ptr(), b.data_ptr(), y.data_ptr()
    scratch = [number for t in (entries, ends, tiles) for number in (t.data_ptr(), t.shape[1])]
    task = np.array((0, 0, 0, n, H, W, C, C_out, *addresses, *scratch, piece), TASK)
    run(kernel, task.ctypes.data, threads)
    return int(task["bad"])
