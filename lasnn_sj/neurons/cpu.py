"""The time loop on the CPU: memory and threads around the Numba kernels.

A kernel call releases the GIL and does one range of neurons; a small pool of Python threads covers
the layer. (Numba's own threads would abort a forked worker, or a second thread that runs neurons at
the same time.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from .cpu_kernels import NONE, backward_range, decoded, forward_range, slope_bytes
from .dynamics import LoopParameters
from .layout import empty_sequence
from .memory import advise_huge_pages

BLOCK = 4096  # neurons that run together: their rows fit the second-level cache
LINE = 64  # neurons whose slope bytes fill a cache line: no two threads write into one
SERIAL = 1 << 15  # neuron-steps below which handing out work costs more than it saves


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # keyed by the process: threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="time_loop")


def _spread(kernel: Callable[[int, int, int], int], n: int, T: int) -> list[int]:
    """Call ``kernel(start, stop, block)`` over all neurons, in about three pieces per thread."""
    threads = torch.get_num_threads()
    if threads == 1 or n * T < SERIAL:
        return [kernel(0, n, min(BLOCK, n))]
    piece = -(-n // (3 * threads * LINE)) * LINE
    starts = range(0, n, piece)
    stops = [min(start + piece, n) for start in starts]
    return list(_pool(os.getpid(), threads).map(kernel, starts, stops, repeat(min(BLOCK, piece))))


def _flat(t: Tensor | None, step: Tensor) -> np.ndarray:
    """``t`` as float32 in the memory order of ``step``, flat; copied only where it is not so yet."""
    if t is None:
        return NONE
    if t.dtype != torch.float32 or t.stride() != step.stride():
        t = torch.empty_like(step, dtype=torch.float32).copy_(t)
    return _memory(t)


def _memory(t: Tensor) -> np.ndarray:
    """The memory behind a tensor that has no gaps, as a flat array."""
    return t.detach().as_strided((t.numel(),), (1,)).numpy()


def _row_step(x: Tensor) -> int:
    """How far apart in memory two steps of ``x`` begin; 0 where it is one step repeated."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _code(p: LoopParameters) -> int:
    """How :func:`slope_bytes` writes a step down."""
    needs_distance = p.reset == 2 and not p.detach_reset and p.shape > 0
    return p.shape + 2 if needs_distance else p.shape


def forward(
    x: Tensor, v: Tensor, mask: Tensor | None, p: LoopParameters
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """Run the loop: ``(spikes, v, firing_rate | None, activation_map | None, slope)``.

    Args:
        x: ``[T, N, ...]``, each step without gaps in memory, any stride between steps.
        v: ``[N, ...]``, float32.
        mask: ``[N, ...]`` or ``None``.

    Raises:
        ValueError: the potential ends infinite or NaN, because ``x`` or ``v`` was.
    """
    step = x[0]
    if x.dtype != torch.float32:
        spikes, *rest = forward(x.to(torch.float32), v, mask, p)
        return spikes.to(x.dtype), *rest
    T, n = x.shape[0], step.numel()
    spikes = advise_huge_pages(empty_sequence(x, torch.float32))
    slope = empty_sequence(x, torch.uint8) if p.keep_slope else torch.empty(0, dtype=torch.uint8)
    advise_huge_pages(slope)
    v_T = torch.empty_like(step)
    rate = torch.empty_like(step) if p.firing_rate else None
    amap = torch.empty_like(step) if p.activation_map else None
    if n == 0:
        return spikes, v_T, rate, amap, slope
    x_step = _row_step(x)
    arrays = (
        x.detach().as_strided(((T - 1) * x_step + n,), (1,)).numpy(), x_step, _flat(v, step),
        _flat(mask, step), _memory(spikes), _memory(v_T), _flat(rate, step), _flat(amap, step),
        _memory(slope), T, n,
    )  # fmt: skip
    numbers = map(np.float32, (p.leak, p.gain, p.offset, p.v_threshold, p.v_reset))
    scalars = (p.reset, *numbers, _code(p), np.float32(p.scale))
    if any(_spread(lambda *part: forward_range(*arrays, *part, *scalars), n, T)):
        raise ValueError("x (or the state v) holds NaN or infinity: the potential ends without a value")
    return spikes, v_T, rate, amap, slope


def backward(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_rate: Tensor | None,
    g_map: Tensor | None,
    spikes: Tensor | None,
    slope: Tensor,
    v0: Tensor,
    mask: Tensor | None,
    p: LoopParameters,
) -> tuple[Tensor, Tensor]:
    """Adjoint of :func:`forward`: gradients of ``x`` and ``v`` in ``slope``'s layout, float32.

    A gradient that is ``None`` counts as 0. ``spikes`` may be ``None`` unless the reset is hard or
    ``g_map`` is given.
    """
    T, step = slope.shape[0], slope[0]
    n = step.numel()
    g_x = advise_huge_pages(empty_sequence(slope, torch.float32))
    g_v0 = torch.empty_like(step, dtype=torch.float32)
    if n == 0:
        return g_x, g_v0
    g_step = n
    if g_spikes is None:
        g = NONE
    elif g_spikes.dtype == torch.float32 and g_spikes[0].stride() == step.stride():
        g_step = _row_step(g_spikes)
        g = g_spikes.detach().as_strided(((T - 1) * g_step + n,), (1,)).numpy()
    else:
        g = _memory(torch.empty_like(g_x).copy_(g_spikes))
    attached = 0.0 if p.detach_reset else 1.0 if p.reset == 2 else p.v_threshold
    slope0 = np.empty(0, np.uint8)
    if attached and p.reset == 0:
        start = np.abs(_flat(v0, step) - np.float32(p.v_threshold))
        slope0 = np.empty(n, np.uint8)
        slope_bytes(start, slope0, p.shape, np.float32(p.scale))
    bits = np.empty(0, np.int32) if spikes is None else _memory(spikes.to(torch.float32).view(torch.int32))
    arrays = (
        g, g_step, _flat(g_v, step), _flat(g_rate, step), _flat(g_map, step), bits, _memory(slope),
        slope0, _flat(mask, step), _memory(g_x), _memory(g_v0), T, n,
    )  # fmt: skip
    back = p.v_reset - p.v_threshold
    numbers = map(np.float32, (p.leak, p.gain, attached, p.peak / 255, back))
    scalars = (p.reset, *numbers, decoded(_code(p), p.scale), p.through_trace)
    _spread(lambda *part: backward_range(*arrays, *part, *scalars), n, T)
    return g_x, g_v0
