"""The time loop on the CPU: memory and threads around the Numba kernels.

A kernel call releases the GIL and does one range of neurons; :mod:`.threads` cover the layer. (Numba's
own threads would abort a forked worker, or a second thread that runs neurons at the same time.)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cpu_kernels import CHUNK, backward_range, backward_scratch, decoded, forward_range, forward_scratch
from .dynamics import LoopParameters
from .layout import empty_sequence
from .memory import advise_huge_pages
from .threads import spread

BLOCK = 65536  # neurons that run together: their state fits the second-level cache
MAP_BLOCK = 1024  # the same with maps, which take up to 69 values a neuron
LINE = 64  # neurons whose slope bytes fill a cache line: no two threads write into one
SERIAL = 1 << 15  # neuron-steps below which handing out work costs more than it saves
STREAM = 4 << 20  # bytes of a result above which it would not stay in the cache until it is read


def _spread(kernel: Callable[[int, int], int], n: int, T: int) -> int:
    """The sum of ``kernel(start, stop)`` over all neurons, cut into about four pieces per thread."""
    threads = torch.get_num_threads()
    if n * T < SERIAL:
        return kernel(0, n)
    return spread(kernel, n, -(-n // (4 * threads * LINE)) * LINE, threads)


def _flat(t: Tensor | None, step: Tensor) -> Tensor | None:
    """``t`` as float32 in the memory order of ``step``; copied only where it is not so yet."""
    if t is None or (t.dtype == torch.float32 and t.stride() == step.stride()):
        return t
    return torch.empty_like(step, dtype=torch.float32).copy_(t)


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if t is None or t.numel() == 0 else t.data_ptr() for t in tensors]


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
    v, mask = _flat(v, step), _flat(mask, step)
    arguments = (
        *_addresses(x, v, mask, spikes, v_T, rate, amap, slope), T, n, _row_step(x), spikes.nbytes >= STREAM,
        p.reset, p.leak, p.gain, p.offset, p.v_threshold, p.v_reset, _code(p), p.scale,
    )  # fmt: skip
    has_maps = p.firing_rate or p.activation_map
    kernel, block = forward_range(), min(MAP_BLOCK if has_maps else BLOCK, n)

    def part(start: int, stop: int) -> int:
        scratch = torch.empty(forward_scratch(block, has_maps))
        byte_row = torch.empty(CHUNK, dtype=torch.uint8)
        return kernel(*arguments, *_addresses(scratch, byte_row), block, start, stop)

    if _spread(part, n, T):
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
    if g_spikes is not None and (g_spikes.dtype != torch.float32 or g_spikes[0].stride() != step.stride()):
        g_spikes = torch.empty_like(g_x).copy_(g_spikes)
    g_step = 0 if g_spikes is None else _row_step(g_spikes)
    fired = None if spikes is None else spikes.to(torch.float32)
    attached = 0.0 if p.detach_reset else 1.0 if p.reset == 2 else p.v_threshold
    g_v, g_rate, g_map, v0, mask = (_flat(t, step) for t in (g_v, g_rate, g_map, v0, mask))
    slope_of, away_of = decoded(_code(p), p.scale)
    arguments = (
        *_addresses(g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask),
        slope_of.ctypes.data, away_of.ctypes.data, *_addresses(g_x, g_v0),
        T, n, g_step, g_x.nbytes >= STREAM,
        p.reset, p.leak, p.gain, p.v_threshold, attached, p.peak / 255, p.v_reset - p.v_threshold,
        _code(p), p.scale, p.through_trace,
    )  # fmt: skip
    has_maps = g_rate is not None or g_map is not None
    kernel, block = backward_range(), min(MAP_BLOCK if has_maps else BLOCK, n)

    def part(start: int, stop: int) -> int:
        scratch = torch.empty(backward_scratch(block, has_maps))
        byte_row = torch.empty(CHUNK, dtype=torch.uint8)
        return kernel(*arguments, *_addresses(scratch, byte_row), block, start, stop)

    _spread(part, n, T)
    return g_x, g_v0
