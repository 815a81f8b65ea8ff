"""The time loop as Numba kernels, :data:`~.lanes.WIDTH` neurons at a time.

A block of neurons runs through all its time steps before the next block starts, so its state stays in the
cache and each value of ``x`` is read from memory once. Memory bandwidth limits the speed: the next inputs are
prefetched, and large results are streamed past the cache, which would read each line before it is written.

A kernel is compiled at its first use, in about a second, for each reset, surrogate and kind of input, and
cached on disk. Each thread calls it with the same task, a record that describes the layer, and takes pieces
of the layer until none is left.
"""

from __future__ import annotations

import ctypes
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
from numba import types

from . import dynamics, lanes, slopes
from .dynamics import TRACE_DECAY, TRACE_STEPS, Reset
from .lanes import (
    LINE,
    WIDTH,
    address,
    at,
    bits,
    bytes_,
    fetch,
    finish_streams,
    floats,
    inlined,
    ints,
    load,
    load_bits,
    looked_up,
    select,
    sequence,
    spread,
    store,
    store_bits,
    stream,
    taken,
)
from .slopes import NO_SLOPE, slope_byte

# Floats between the rows of a block: rows a power of two apart would evict each other from the cache.
SKEW = 80
AHEAD = 1024  # neurons that are prefetched before they are used
WINDOW = 64  # steps of the spike trace that the backward pass holds at a time

ZERO, ONE, QUARTER = np.float32(0), np.float32(1), np.float32(0.25)
DECAY = np.float32(TRACE_DECAY)
PAPER, SOFT, HARD = map(int, Reset)

_COUNTERS = "next seats bad "  # shared counters come first
_TO_DO = "n piece scratch scratch_size block T windows right below "
NEXT, SEATS, BAD = range(3)


def checksum(*modules: ModuleType) -> int:
    """Return a checksum of modules, which a kernel must enclose to be compiled anew after they change.

    Numba's cache on disk notices changes of a kernel's own file and of the values that it encloses, not those
    of the modules from which it takes constants and functions.
    """
    return zlib.crc32(b"".join(Path(module.__file__).read_bytes() for module in modules))


_SOURCES = checksum(lanes, slopes, dynamics)


def record(integers: str, numbers: str = "") -> np.dtype:
    """Return the layout of a task: names of its integers and of its float32 numbers."""
    fields = [(name, "i8") for name in integers.split()] + [(name, "f4") for name in numbers.split()]
    return np.dtype(fields, align=True)


FORWARD = record(
    _COUNTERS + _TO_DO + "x v mask spikes v_T rate amap slope fired x_step",
    "leak gain offset theta v_reset scale",
)
BACKWARD = record(
    _COUNTERS + _TO_DO + "g_spikes g_v g_rate g_map fired slope v0 mask slope_of away_of g_x g_v0 g_step "
    "through_trace",
    "leak gain theta peak back scale",
)


def c_function(function: Callable, record: np.dtype) -> Callable:
    """Compile ``function(task)`` to a C function of a record's address that releases the GIL.

    Without fastmath: spikes must equal the oracle's bit for bit, so no operation may be reordered or fused.
    """
    kind = types.void(types.CPointer(numba.from_dtype(record)))
    try:
        compiled = numba.cfunc(kind, cache=True, error_model="numpy")(function)
    except RuntimeError:  # no writable cache directory: compile anew in each process
        compiled = numba.cfunc(kind, error_model="numpy")(function)
    pointer = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(compiled.address)
    pointer.owner = compiled
    return pointer


@inlined
def copy(target, source, count):
    """``target[:count] = source[:count]``."""
    for i in range(count):
        target[i] = source[i]


@inlined
def fill(target, value, count):
    """``target[:count] = value``."""
    for i in range(count):
        target[i] = value


@inlined
def put(pointer, numbers, streamed):
    """Store numbers, past the cache if ``streamed``."""
    if streamed:
        stream(pointer, numbers)
    else:
        store(pointer, numbers)


# ----------------------------------------------------------------------------------------- forward


@inlined
def place(windows, k, q, right, below):
    """Return the place of pixel ``q`` of the window that comes after ``k`` neurons of a block."""
    return windows[k // (4 * WIDTH)] + (q & 1) * right + (q >> 1) * below


@inlined
def charge(x, state, reset, leak, gain, offset, theta, v_reset):
    """Advance the state by one step; return which neurons fire, and ``v - v_threshold``."""
    v = load(state)
    if reset == PAPER:
        u = leak * v + (gain * load(x) + offset) - select(v > theta, theta, ZERO)
        fires = u > theta
        store(state, u)
    else:
        u = leak * v + (gain * load(x) + offset)
        fires = u >= theta
        if reset == SOFT:
            store(state, u - select(fires, theta, ZERO))
        else:
            # a product, so that an infinite u becomes NaN and is detected instead of being reset
            o = select(fires, ONE, ZERO)
            store(state, (ONE - o) * u + o * v_reset)
    return fires, u - theta


def forward_scratch(block: int, extras: bool) -> int:
    """Return the number of floats that a thread of :func:`forward_kernel` needs for itself."""
    return (5 if extras else 1) * (block + SKEW) + 3 * WIDTH


@cache
def forward_kernel(
    kind: int, reset: int, code: int, extras: bool, marks: bool, streamed: bool, pooled: bool
) -> Callable:
    """Compile the kernel that runs pieces of a layer, for a :data:`FORWARD` task.

    Row ``t`` of ``x`` begins at ``t * x_step``, of ``spikes`` and ``slope`` at ``t * n``. ``mask``,
    ``rate``, ``amap`` and ``slope`` may be null. Adds to ``bad`` how many neurons end with a state that
    is not finite.

    If ``pooled``, the spikes of 2x2 pixels are averaged, so that a row of ``spikes`` has ``n / 4`` values.
    ``windows`` lists the places of the first pixels' neurons in a block, :data:`WIDTH` at a time; the other
    three are ``right``, ``below``, and both, further on. ``block`` and ``piece`` are whole pairs of rows.

    Args:
        kind: of ``x`` and ``spikes``, in :data:`~.lanes.KINDS`.
        reset: paper, soft, hard.
        code: of :func:`slope_byte`, or :data:`NO_SLOPE`.
        extras: whether there is a mask, or a map is wanted.
        marks: whether ``fired`` is written, a bit for each neuron and step.
        streamed: whether results go past the cache; then ``n`` is a multiple of :data:`WIDTH`.
        pooled: whether spikes are averaged.
    """
    sources = _SOURCES
    together = 4 if pooled else 1

    def forward(pointer):
        sources  # noqa: B018 - enclosed, so that it is part of the cache's key
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        x, spikes = sequence(task.x, kind), sequence(task.spikes, kind)
        slope, fired, v, v_T = bytes_(task.slope), bits(task.fired), floats(task.v), floats(task.v_T)
        mask, rate, amap = floats(task.mask), floats(task.rate), floats(task.amap)
        n, piece, block, T, x_step = task.n, task.piece, task.block, task.T, task.x_step
        windows, right, below = ints(task.windows), task.right, task.below
        groups = (n + WIDTH - 1) // WIDTH
        leak, gain, offset, theta = task.leak, task.gain, task.offset, task.theta
        v_reset, scale = task.v_reset, task.scale
        has_mask, has_rate, has_map = address(mask) != 0, address(rate) != 0, address(amap) != 0
        per_step = np.float32(T)
        state = floats(task.scratch + 4 * task.scratch_size * taken(at(counters, SEATS), 1))
        row = block + SKEW
        total, mapped = at(state, row), at(state, 2 * row)
        trace, masked = at(state, 3 * row), at(state, 4 * row)
        spare = address(at(state, (5 if extras else 1) * row))
        fill(floats(spare), ZERO, 3 * WIDTH)
        spare_x, spare_spikes = sequence(spare, kind), sequence(spare + LINE, kind)
        spare_slope = bytes_(spare + 2 * LINE)
        bad = 0
        start = taken(counters, piece)
        while start < n:
            stop = min(start + piece, n)
            for a in range(start, stop, block):
                m = min(block, stop - a)
                fill(
                    state, ZERO, row
                )  # beyond the last neuron too, so that slope and fired are deterministic
                copy(state, at(v, a), m)
                if extras:
                    fill(total, ZERO, 3 * row)
                    if has_mask:
                        copy(masked, at(mask, a), m)
                for t in range(T):
                    for k in range(0, m, together * WIDTH):
                        average = spread(ZERO)
                        for q in range(together):
                            c = place(windows, k, q, right, below) if pooled else k
                            here, x_here = t * n + a + c, t * x_step + a + c
                            in_x, in_spikes, in_slope = at(x, x_here), at(spikes, here), at(slope, here)
                            fetch(at(in_x, AHEAD if c + AHEAD < m else AHEAD - m + x_step))
                            is_whole = streamed or pooled or c + WIDTH <= m
                            if not is_whole:
                                copy(spare_x, in_x, m - c)
                                in_x, in_spikes, in_slope = spare_x, spare_spikes, spare_slope
                            fires, distance = charge(
                                in_x, at(state, c), reset, leak, gain, offset, theta, v_reset
                            )
                            if code != NO_SLOPE:
                                put(in_slope, slope_byte(abs(distance), code, scale), streamed)
                            if marks:
                                store_bits(at(fired, t * groups + (a + c) // WIDTH), fires)
                            o = select(fires, ONE, ZERO)
                            if extras:
                                if has_rate:
                                    store(at(total, c), load(at(total, c)) + o)
                                if has_map:  # Eq. 11: spikes times the trace of earlier ones
                                    before = load(at(trace, c))
                                    store(at(mapped, c), load(at(mapped, c)) + before * o)
                                    store(at(trace, c), DECAY * (before + o))
                                if has_mask:
                                    o = select(fires, load(at(masked, c)), ZERO)
                            if pooled:
                                average = average + o
                            else:
                                put(in_spikes, o, streamed)
                            if not is_whole:
                                copy(at(spikes, here), spare_spikes, m - c)
                                if code != NO_SLOPE:
                                    copy(at(slope, here), spare_slope, m - c)
                        if pooled:
                            put(at(spikes, (t * n + a + k) // 4), QUARTER * average, streamed)
                for i in range(m):
                    v_T[a + i] = state[i]
                    bad += not np.isfinite(state[i])
                if has_rate:
                    for i in range(m):
                        rate[a + i] = total[i] / per_step
                if has_map:
                    for i in range(m):
                        amap[a + i] = mapped[i] / per_step
            start = taken(counters, piece)
        finish_streams()
        taken(at(counters, BAD), bad)

    return c_function(forward, FORWARD)


# ---------------------------------------------------------------------------------------- backward


@inlined
def traces_before(fired, window, trace, row, count, groups, t0, t1):
    """Compute Eq. 11's trace ``N[t]`` for ``t0 <= t < t1`` into the rows of ``window``.

    Running its recursion backwards would amplify rounding, so it runs forwards again from ``TRACE_STEPS``
    steps before; what came earlier has decayed to rounding.
    """
    fill(trace, ZERO, row)
    for t in range(max(0, t0 - TRACE_STEPS), t1):
        for c in range(0, count, WIDTH):
            o, before = load_bits(at(fired, t * groups + c // WIDTH)), load(at(trace, c))
            if t >= t0:
                store(at(window, (t - t0) * row + c), before)
            store(at(trace, c), DECAY * (before + select(o, ONE, ZERO)))


@inlined
def adjoint(go, byte, fired, gv, reset, carry, reset_gain, attached, peak, back, slope_of, away_of):
    """Run one step backwards: the gradient of this step's potential from ``gv`` of the next step.

    ``carry`` is the share of the later gradient that reaches this step's state, ``reset_gain`` the share that
    reaches its spike through the reset (0 if the reset is detached). The ``v_reset - v`` of a hard reset
    follows from the byte, which gives ``|v - v_threshold|``, and the spike, which gives its sign; ``back`` is
    ``v_reset - v_threshold``.
    """
    later = load(gv)
    if reset != HARD:
        return carry * later + (go - reset_gain * later) * (peak * load(byte))
    o = select(load_bits(fired), ONE, ZERO)
    handed = carry * later
    if not attached:
        return (ONE - o) * handed + go * (peak * load(byte))
    jump = back + (ONE - o - o) * looked_up(away_of, byte)
    return (ONE - o) * handed + (go + jump * handed) * (peak * looked_up(slope_of, byte))


def backward_scratch(block: int, extras: bool) -> int:
    """Return the number of floats that a thread of :func:`backward_kernel` needs for itself."""
    return (6 + WINDOW if extras else 1) * (block + SKEW) + 3 * WIDTH


@cache
def backward_kernel(
    kind: int, reset: int, code: int, attached: bool, extras: bool, streamed: bool, pooled: bool
) -> Callable:
    """Compile the adjoint of :func:`forward_kernel`, for a :data:`BACKWARD` task.

    ``g_spikes``, ``g_v``, ``g_rate``, ``g_map``, ``mask`` may be null, and ``fired`` unless the reset is hard
    or ``g_map`` is given.

    Args:
        kind: of ``g_spikes`` and ``g_x``, in :data:`~.lanes.KINDS`.
        reset: paper, soft, hard.
        code: of :func:`slope_byte`, with which ``slope`` was written.
        attached: whether the gradient flows through the reset.
        extras: whether there is a mask, ``g_rate`` or ``g_map``, or no ``g_spikes``.
        streamed: whether ``g_x`` goes past the cache; then ``n`` is a multiple of :data:`WIDTH`.
        pooled: whether ``g_spikes`` is of averages of four spikes.
    """
    sources = _SOURCES
    together = 4 if pooled else 1

    def backward(pointer):
        sources  # noqa: B018 - enclosed, so that it is part of the cache's key
        task, counters = numba.carray(pointer, 1)[0], ints(address(pointer))
        g, g_x, fired = sequence(task.g_spikes, kind), sequence(task.g_x, kind), bits(task.fired)
        slope, v0, g_v0 = bytes_(task.slope), floats(task.v0), floats(task.g_v0)
        g_v, g_rate, g_map = floats(task.g_v), floats(task.g_rate), floats(task.g_map)
        mask, slope_of, away_of = floats(task.mask), floats(task.slope_of), floats(task.away_of)
        n, piece, block, T, g_step = task.n, task.piece, task.block, task.T, task.g_step
        windows, right, below = ints(task.windows), task.right, task.below
        groups = (n + WIDTH - 1) // WIDTH
        leak, gain, theta = task.leak, task.gain, task.theta
        peak, back, scale = task.peak, task.back, task.scale
        has_g, has_mask = address(g) != 0, address(mask) != 0
        has_rate, has_map = address(g_rate) != 0, address(g_map) != 0
        through_trace = has_map and task.through_trace != 0
        per_step = ONE / np.float32(T)
        gv = floats(task.scratch + 4 * task.scratch_size * taken(at(counters, SEATS), 1))
        row = block + SKEW
        constant, mapped, R, trace = at(gv, row), at(gv, 2 * row), at(gv, 3 * row), at(gv, 4 * row)
        masked, window = at(gv, 5 * row), at(gv, 6 * row)
        spare = address(at(gv, (6 + WINDOW if extras else 1) * row))
        spare_g, spare_g_x = sequence(spare, kind), sequence(spare + LINE, kind)
        spare_slope = bytes_(spare + 2 * LINE)
        start = taken(counters, piece)
        while start < n:
            stop = min(start + piece, n)
            for a in range(start, stop, block):
                m = min(block, stop - a)
                fill(gv, ZERO, block)
                if address(g_v) != 0:
                    copy(gv, at(g_v, a), m)
                if extras:
                    fill(constant, ZERO, 3 * row)
                    if has_mask:
                        copy(masked, at(mask, a), m)
                    if has_rate:
                        for i in range(m):
                            constant[i] = per_step * g_rate[a + i]
                    if has_map:
                        for i in range(m):
                            mapped[i] = per_step * g_map[a + i]
                for k in range(T):
                    t = T - 1 - k
                    t0 = t - t % WINDOW
                    if extras:
                        if has_map and (k == 0 or t % WINDOW == WINDOW - 1):
                            traces_before(at(fired, a // WIDTH), window, trace, row, m, groups, t0, t + 1)
                    # The paper's state is the potential before its reset, so the gradient of the last
                    # state is the potential's own; with the other resets the state comes after the reset.
                    carry = leak if k else ONE
                    reset_gain = ZERO
                    if attached:
                        reset_gain = theta * carry if reset == SOFT else theta if k else ZERO
                    for k in range(0, m, together * WIDTH):
                        for q in range(together):
                            c = place(windows, k, q, right, below) if pooled else k
                            here, g_here = t * n + a + c, t * g_step + (a + k) // together
                            in_g, in_g_x, in_slope = at(g, g_here), at(g_x, here), at(slope, here)
                            in_fired = at(fired, t * groups + (a + c) // WIDTH)
                            in_this_row = c + AHEAD < m  # or in the one before
                            ahead = AHEAD if in_this_row else AHEAD - m - n
                            if q == 0:
                                fetch(at(in_g, AHEAD if in_this_row else AHEAD - m // together - g_step))
                            if c % LINE == 0:
                                fetch(at(in_slope, ahead))
                            is_whole = streamed or pooled or c + WIDTH <= m
                            if not is_whole:
                                copy(spare_slope, in_slope, m - c)
                                if has_g:
                                    copy(spare_g, in_g, m - c)
                                in_g, in_g_x, in_slope = spare_g, spare_g_x, spare_slope
                            if has_g:
                                go = QUARTER * load(in_g) if pooled else load(in_g)
                                if has_mask:
                                    go = go * load(at(masked, c))
                            else:
                                go = spread(ZERO)
                            if extras:
                                go = go + (load(at(constant, c)) + load(at(R, c)))
                                if has_map:
                                    # through its own spike, and through the trace of later ones
                                    go = go + load(at(mapped, c)) * load(at(window, (t - t0) * row + c))
                                    if through_trace:
                                        by_spike = select(load_bits(in_fired), load(at(mapped, c)), ZERO)
                                        store(at(R, c), DECAY * (load(at(R, c)) + by_spike))
                            by_v = adjoint(
                                go, in_slope, in_fired, at(gv, c), reset, carry, reset_gain, attached, peak,
                                back, slope_of, away_of,
                            )  # fmt: skip
                            store(at(gv, c), by_v)
                            put(in_g_x, gain * by_v, streamed)
                            if not is_whole:
                                copy(at(g_x, here), spare_g_x, m - c)
                for i in range(m):
                    g_v0[a + i] = leak * gv[i]
                if attached and reset == PAPER:  # the given state v0 decides on the first step's reset
                    for c in range(0, m, WIDTH):
                        count = min(WIDTH, m - c)
                        distance = floats(spare)
                        for i in range(count):
                            distance[i] = abs(v0[a + c + i] - theta)
                        store(spare_slope, slope_byte(load(distance), code, scale))
                        for i in range(count):
                            by_reset = gv[c + i] * (peak * np.float32(spare_slope[i]))
                            g_v0[a + c + i] -= theta * by_reset
            start = taken(counters, piece)
        finish_streams()

    return c_function(backward, BACKWARD)
