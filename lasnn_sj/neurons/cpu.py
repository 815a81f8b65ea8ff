"""The time loop on the CPU: memory, tasks and threads around the Numba kernels."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .cpu_kernels import (
    BACKWARD,
    FORWARD,
    backward_kernel,
    backward_scratch,
    forward_kernel,
    forward_scratch,
)
from .dynamics import LoopParameters, Reset, Shape
from .lanes import HAS_HALVES, WIDTH
from .layout import empty_pooled, empty_sequence
from .memory import advise_huge_pages
from .slopes import ATAN_ANGLE, NO_SLOPE, SIGMOID_ANGLE, decoded
from .threads import run

BLOCK = 65536  # neurons that run together: their state fits the second-level cache
EXTRAS_BLOCK = 1024  # the same with a mask or maps, which take up to 70 values per neuron
LINE = 64  # neurons whose slope bytes fill a cache line, so that no two threads write to the same line
SERIAL = 1 << 17  # neuron-steps below which one thread is faster than several
STREAM = 4 << 20  # bytes of a result above which it is evicted from the cache before it is read
KINDS = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # in lanes.KINDS


def _run(
    kernel: Callable[[int], None], record: np.dtype, n: int, T: int, scratch: int, unit: int, *rest: float
) -> int:
    """Run a kernel on a layer of ``n`` neurons in all threads, about four pieces each.

    Args:
        scratch: number of floats that each thread needs for itself.
        unit: pieces are multiples of it.
        rest: fields of the record after ``scratch_size``.

    Returns:
        The number of neurons whose state is not finite in the end.
    """
    threads = 1 if n * T < SERIAL else torch.get_num_threads()
    piece = n if threads == 1 else -(-n // (4 * threads * unit)) * unit
    floats = torch.empty(min(threads, -(-n // piece)) * scratch)
    task = np.array((0, 0, 0, n, piece, floats.data_ptr(), scratch, *rest), record)
    run(kernel, task.ctypes.data, min(threads, -(-n // piece)))
    return int(task["bad"])


def _block(most: int, n: int, unit: int) -> int:
    return min(max(1, most // unit), -(-n // unit)) * unit


def _pooling(step: Tensor, pooled: bool) -> tuple[int, int, int]:
    """Return the distances of the neurons right of and below one in a channels_last step, and two rows."""
    if not pooled:
        return 0, 0, LINE
    _, C, _, W = step.shape
    return C, W * C, 2 * W * C


def _windows(block: int, right: int, below: int) -> Tensor:
    """Return where the windows of a block begin, sixteen channels at a time; empty if there is no pool."""
    if not right:
        return torch.empty(0, dtype=torch.int64)
    places = torch.arange(0, block, WIDTH).view(-1, 2, below // right // 2, 2, right // WIDTH)
    return places[:, 0, :, 0].contiguous()


def _flat(t: Tensor | None, step: Tensor, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """Return ``t`` in the memory order of ``step``, copied only if it is not."""
    if t is None or (t.dtype == dtype and t.stride() == step.stride()):
        return t
    return torch.empty_like(step, dtype=dtype).copy_(t)


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None or t.numel() == 0 else t.data_ptr() for t in tensors]


def _row_step(x: Tensor) -> int:
    """Return the distance in memory between two steps of ``x``; 0 if it is one step repeated."""
    return x.stride(0) if x.shape[0] > 1 else 0


def _streamed(result: Tensor, n: int) -> bool:
    """Return whether a result is written past the cache: a large one whose rows begin at a cache line."""
    return result.nbytes >= STREAM and n % WIDTH == 0 and result.data_ptr() % (4 * WIDTH) == 0


def _code(p: LoopParameters) -> int:
    """Return the code with which :func:`~.slopes.slope_byte` keeps a step."""
    if p.reset == Reset.HARD and not p.detach_reset:
        return {Shape.ATAN: ATAN_ANGLE, Shape.SIGMOID: SIGMOID_ANGLE}.get(p.shape, p.shape)
    return p.shape


def empty_fired(x: Tensor, p: LoopParameters) -> Tensor:
    """Allocate a bit for each neuron and step, if it is kept: int16 ``[T, number of 16-bit words]``."""
    words = (x.shape[1:].numel() + 15) // 16
    return x.new_empty((x.shape[0] if p.keep_fired else 0, words), dtype=torch.int16)


def forward(
    x: Tensor, v: Tensor, mask: Tensor | None, p: LoopParameters
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Run the loop: ``(spikes, v, firing_rate | None, activation_map | None, slope, fired)``.

    With ``p.pool`` the spikes are averages, see :func:`.layout.can_pool`.
    For the backward pass ``slope`` holds a byte of :func:`~.slopes.slope_byte` for each neuron and step,
    and ``fired`` a bit; each is empty if it is not needed.

    Args:
        x: ``[T, N, ...]``, each step without gaps in memory, any stride between steps.
        v: ``[N, ...]``, float32.
        mask: ``[N, ...]`` or ``None``.

    Raises:
        ValueError: the final potential is infinite or NaN, because ``x`` or ``v`` is.
    """
    if x.dtype == torch.float16 and not HAS_HALVES:
        spikes, *rest = forward(x.to(torch.float32), v, mask, p)
        return spikes.to(x.dtype), *rest
    T, n = x.shape[0], x[0].numel()
    spikes = advise_huge_pages((empty_pooled if p.pool else empty_sequence)(x, x.dtype))
    slope = empty_sequence(x, torch.uint8) if p.keep_slope else torch.empty(0, dtype=torch.uint8)
    advise_huge_pages(slope)
    fired = empty_fired(x, p)
    step = empty_sequence(x[:1], torch.float32)[0]
    v_T = torch.empty_like(step)
    rate = torch.empty_like(v_T) if p.firing_rate else None
    amap = torch.empty_like(v_T) if p.activation_map else None
    if n == 0:
        return spikes, v_T, rate, amap, slope, fired
    v, mask = _flat(v, step), _flat(mask, step)
    extras = mask is not None or p.firing_rate or p.activation_map
    code = _code(p) if p.keep_slope else NO_SLOPE
    kernel = forward_kernel(
        KINDS[x.dtype], p.reset, code, extras, fired.numel() > 0, _streamed(spikes, n), p.pool
    )
    right, below, unit = _pooling(step, p.pool)
    block = _block(EXTRAS_BLOCK if extras else BLOCK, n, unit)
    windows = _windows(block, right, below)
    bad = _run(
        kernel, FORWARD, n, T, forward_scratch(block, extras), unit,
        block, T, *_addresses(windows), right, below,
        *_addresses(x, v, mask, spikes, v_T, rate, amap, slope, fired), _row_step(x),
        p.leak, p.gain, p.offset, p.v_threshold, p.v_reset, p.scale,
    )  # fmt: skip
    if bad:
        raise ValueError("x (or the state v) holds NaN or infinity: the final potential is not finite")
    return spikes, v_T, rate, amap, slope, fired


def backward(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_rate: Tensor | None,
    g_map: Tensor | None,
    fired: Tensor | None,
    slope: Tensor,
    v0: Tensor,
    mask: Tensor | None,
    p: LoopParameters,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the adjoint of :func:`forward`: gradients of ``x`` (in ``dtype``) and ``v`` in ``slope``'s layout.

    A gradient that is ``None`` counts as 0. ``fired`` may be ``None`` unless the reset is hard or
    ``g_map`` is given.
    """
    if dtype == torch.float16 and not HAS_HALVES:
        g_spikes = None if g_spikes is None else g_spikes.to(torch.float32)
        g_x, g_v0 = backward(g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask, p, torch.float32)
        return g_x.to(dtype), g_v0
    if fired is None and (g_map is not None or p.reset == Reset.HARD):
        raise ValueError("fired must be given for a hard reset and for g_map, got None")
    T, step = slope.shape[0], slope[0]
    n = step.numel()
    g_x = advise_huge_pages(empty_sequence(slope, dtype))
    g_v0 = torch.empty_like(step, dtype=torch.float32)
    if n == 0:
        return g_x, g_v0
    if g_spikes is not None:
        empty = empty_pooled if p.pool else empty_sequence
        if g_spikes.dtype != dtype or g_spikes[0].stride() != empty(slope[:1], dtype)[0].stride():
            g_spikes = empty(slope, dtype).copy_(g_spikes)
    g_step = 0 if g_spikes is None else _row_step(g_spikes)
    g_v, g_rate, g_map, v0, mask = (_flat(t, step) for t in (g_v, g_rate, g_map, v0, mask))
    extras = any(t is not None for t in (g_rate, g_map, mask)) or g_spikes is None
    code, attached = _code(p), not p.detach_reset
    slope_of, away_of = decoded(code, p.scale)
    kernel = backward_kernel(KINDS[dtype], p.reset, code, attached, extras, _streamed(g_x, n), p.pool)
    right, below, unit = _pooling(step, p.pool)
    block = _block(EXTRAS_BLOCK if extras else BLOCK, n, unit)
    windows = _windows(block, right, below)
    _run(
        kernel, BACKWARD, n, T, backward_scratch(block, extras), unit,
        block, T, *_addresses(windows), right, below,
        *_addresses(g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask),
        slope_of.ctypes.data, away_of.ctypes.data, *_addresses(g_x, g_v0), g_step, p.through_trace,
        p.leak, p.gain, p.v_threshold, p.peak / 255, p.v_reset - p.v_threshold, p.scale,
    )  # fmt: skip
    return g_x, g_v0
