"""Inputs of weight layers as bytes between the forward and the backward pass.

Spikes, with a dropout mask or averaged by a pool, are small multiples of one number. Where that holds, a byte
for each value is kept instead of a float, without loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numba
import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from . import cpu_kernels, lanes
from .cpu_kernels import BAD, NEXT, c_function, checksum, record
from .lanes import WIDTH, address, at, bytes_, floats, ints, load, mask_of, spread, store, taken
from .layout import is_gapless
from .marks import SMALLEST
from .memory import advise_huge_pages, release_freed_memory
from .threads import run

SAMPLE = 4096  # values of which the number is found
MOST = 127  # times the number
PIECE = 1 << 16  # values that a thread takes at a time

_SOURCES = checksum(lanes, cpu_kernels)
TASK = record("next seats bad n values codes", "unit")
HALF, ZERO_CODE = np.float32(0.5), np.float32(128)


@cache
def kernel(packs: bool) -> Callable:
    """Compile the kernel that writes ``codes`` from ``values``, or ``values`` from ``codes``.

    A code is ``value / unit + 128``. Packing adds to ``bad`` the number of pieces with a value that its code
    does not give back. ``n`` is a multiple of :data:`~.lanes.WIDTH`.
    """
    sources = _SOURCES

    def convert(pointer):
        sources  # noqa: B018 - enclosed, so that it is part of the cache's key
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        values, codes, unit = floats(task.values), bytes_(task.codes), spread(task.unit)
        start = taken(at(counters, NEXT), PIECE)
        while start < task.n:
            bad = 0
            for i in range(start, min(start + PIECE, task.n), WIDTH):
                value, code = at(values, i), at(codes, i)
                if packs:
                    store(code, load(value) / unit + (ZERO_CODE + HALF))
                    bad |= mask_of(unit * (load(code) - ZERO_CODE) != load(value))
                else:
                    store(value, unit * (load(code) - ZERO_CODE))
            if bad != 0:
                taken(at(counters, BAD), 1)
                return  # a value cannot be packed, so the rest need not be
            start = taken(at(counters, NEXT), PIECE)

    return c_function(convert, TASK)


def pack(x: Tensor) -> tuple[Tensor, float] | None:
    """Return a byte for each value of ``x``, in its layout, and the number that the values are multiples of.

    -0.0 comes back as 0.0.

    Returns:
        ``None`` if ``x`` is small, is not float32 on the CPU, or has other values; NaN and infinity are such.
    """
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():
        return None
    if x.dtype != torch.float32 or x.device.type != "cpu" or x.nbytes < SMALLEST or x.numel() % WIDTH:
        return None
    if not is_gapless(x):
        return None
    values = x.as_strided((x.numel(),), (1,))
    sample = values[:: x.numel() // SAMPLE | 1].abs()
    unit = float(sample[sample > 0].min()) if (sample > 0).any() else 1.0
    multiples = (sample / unit).round()
    if not ((multiples <= MOST) & (multiples * unit == sample)).all():
        return None
    codes = advise_huge_pages(torch.empty_like(x, dtype=torch.uint8))
    return (codes, unit) if _convert(x, codes, unit, packs=True) == 0 else None


def unpack(codes: Tensor, unit: float) -> Tensor:
    """Return the float32 tensor that :func:`pack` was given."""
    release_freed_memory()  # a backward pass takes the most memory at its large layers
    x = advise_huge_pages(torch.empty_like(codes, dtype=torch.float32))
    _convert(x, codes, unit, packs=False)
    return x


def _convert(x: Tensor, codes: Tensor, unit: float, packs: bool) -> int:
    task = np.array((0, 0, 0, x.numel(), x.data_ptr(), codes.data_ptr(), unit), TASK)
    run(kernel(packs), task.ctypes.data, torch.get_num_threads())
    return int(task["bad"])
