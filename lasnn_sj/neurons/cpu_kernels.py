"""The time loop as Numba kernels, each over one range of neurons.

A block of neurons runs through all its time steps before the next block starts, so its state stays in
the cache and each value of ``x`` is read from memory once. A row of a block is done in chunks that stay
in the first-level cache from one small loop to the next; there is one loop per reset and surrogate, so
that each is a few vector instructions and all of them together compile once, in seconds.

Memory is what limits the speed. So the next chunk is fetched while this one is computed, and large
results are streamed past the cache, which would read each line before it is written. Kernels take
addresses, not arrays: counting references to arrays would wait, at every row, for the streamed stores.

All in one file, as Numba's cache on disk looks only at the file of the function that it compiled.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache, lru_cache

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from .dynamics import TRACE_DECAY

CHUNK = 256  # neurons of a row that go through all its loops together
LINE = 64  # bytes of a cache line
WINDOW = 64  # steps of the spike trace that the backward holds at a time
MEMORY = 24  # steps after which a spike has left the trace: exp(-24) = 4e-11

ZERO, ONE, HALF, BYTE = np.float32(0), np.float32(1), np.float32(0.5), np.float32(255)
FOUR, EIGHT, EIGHTH = np.float32(4), np.float32(8), np.float32(0.125)
DECAY = np.float32(TRACE_DECAY)
DROPPED = np.float32(-0.0)
# exp(-y) and, in powers of t^2, (4 / pi) * atan(t) / t on [0, 1]: relative errors 5e-6 and 2e-4
E1, E2, E3, E4, E5 = np.array([-0.99999815, 0.49990605, -0.16589675, 0.03942258, -0.00555601], "f4")
A0, A1, A2, A3 = np.array([1.27296395, -0.41473753, 0.19784118, -0.05627495], "f4")
FAR = np.float32(1e6)

FLOATS, INTS, BYTES = map(types.CPointer, (types.float32, types.int32, types.uint8))
INT, FLOAT = types.int64, types.float32


def _or_uncached(compile_: Callable[[bool], Callable]) -> Callable:
    try:
        return compile_(True)
    except RuntimeError:  # no writable cache directory: compile anew in each process
        return compile_(False)


def compiled(function):
    """``numba.njit``, cached on disk where there is a place to write.

    No fastmath: spikes must be those of the oracle bit for bit, so nothing may be reordered or fused.
    """
    return _or_uncached(lambda cached: numba.njit(cache=cached, nogil=True, error_model="numpy")(function))


def c_function(result, *arguments):
    """Decorator: compiled at its first use, called through ctypes, which lets go of the GIL."""

    def decorate(function):
        @cache
        def kernel():
            of = _or_uncached(
                lambda cached: numba.cfunc(result(*arguments), cache=cached, error_model="numpy")(function)
            )
            in_c = {INT: ctypes.c_int64, FLOAT: ctypes.c_float}
            call = ctypes.CFUNCTYPE(*(in_c.get(kind, ctypes.c_void_p) for kind in (result, *arguments)))
            pointer = call(of.address)
            pointer.owner = of
            return pointer

        return kernel

    return decorate


# ------------------------------------------------------------------------------------------ memory


@intrinsic
def at(typing, pointer, index):
    """The pointer to ``pointer[index]``."""

    def build(context, builder, signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, types.int64), build


@intrinsic
def address(typing, pointer):
    """The pointer as a number, 0 where there is no such tensor."""

    def build(context, builder, signature, arguments):
        return builder.ptrtoint(arguments[0], context.get_value_type(types.int64))

    return types.int64(pointer), build


@intrinsic
def fetch_line(typing, pointer):
    """Ask for the cache line at ``pointer``, without waiting for it."""

    def build(context, builder, signature, arguments):
        byte_pointer, i32 = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [byte_pointer, i32, i32, i32])
        prefetch = builder.module.globals.get("llvm.prefetch.p0") or ir.Function(
            builder.module, kind, "llvm.prefetch.p0"
        )
        reading, in_all_caches, data = i32(0), i32(3), i32(1)
        builder.call(prefetch, [builder.bitcast(arguments[0], byte_pointer), reading, in_all_caches, data])
        return context.get_dummy_value()

    return types.void(pointer), build


@intrinsic
def stream_line(typing, target, source):
    """Copy one cache line to ``target``, aligned to one, past the cache."""

    def build(context, builder, signature, arguments):
        line = ir.VectorType(ir.IntType(8), LINE).as_pointer()
        values = builder.load(builder.bitcast(arguments[1], line), align=1)
        store = builder.store(values, builder.bitcast(arguments[0], line), align=LINE)
        store.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(ir.IntType(32), 1)]))
        return context.get_dummy_value()

    return types.void(target, source), build


@intrinsic
def finish_streams(typing):
    """Wait until what was streamed can be seen by other threads."""

    def build(context, builder, signature, arguments):
        builder.fence("seq_cst")
        return context.get_dummy_value()

    return types.void(), build


@compiled
def fetch(pointer, count, size):
    """Ask for ``count`` elements of ``size`` bytes."""
    for i in range(0, count, LINE // size):
        fetch_line(at(pointer, i))


@compiled
def put(target, source, count, size, stream):
    """Copy ``count`` elements of ``size`` bytes; whole cache lines past the cache if ``stream``."""
    done = 0
    if stream:
        done = min(count, (-address(target) % LINE) // size)
        for i in range(done):
            target[i] = source[i]
        for _ in range((count - done) // (LINE // size)):
            stream_line(at(target, done), at(source, done))
            done += LINE // size
    for i in range(done, count):
        target[i] = source[i]


@compiled
def fill(target, value, count):
    """Set ``count`` elements."""
    for i in range(count):
        target[i] = value


@compiled
def scale_into(target, source, factor, count):
    """``target = factor * source``."""
    for i in range(count):
        target[i] = factor * source[i]


# ----------------------------------------------------------------------------------------- forward


@compiled
def charge_and_fire(x, v, spikes, distance, count, reset, leak, gain, offset, theta, v_reset):
    """One step of a chunk: moves the state ``v`` on, writes spikes and ``|v - v_threshold|``."""
    if reset == 0:
        for i in range(count):
            u = leak * v[i] + (gain * x[i] + offset) - (theta if v[i] > theta else ZERO)
            spikes[i] = ONE if u > theta else ZERO
            distance[i] = abs(u - theta)
            v[i] = u
    elif reset == 1:
        for i in range(count):
            u = leak * v[i] + (gain * x[i] + offset)
            spikes[i] = ONE if u >= theta else ZERO
            distance[i] = abs(u - theta)
            v[i] = u - (theta if u >= theta else ZERO)
    else:
        for i in range(count):
            u = leak * v[i] + (gain * x[i] + offset)
            o = ONE if u >= theta else ZERO
            spikes[i] = o
            distance[i] = abs(u - theta)
            # a product, so that an infinite u becomes NaN and is noticed instead of being reset
            v[i] = (ONE - o) * u + o * v_reset


@compiled
def exp_minus(z):
    """``exp(-z)`` for ``0 <= z <= 8``, as the 8th power of a polynomial; a call of exp would keep the
    loop around it from being vectorised."""
    y = min(z, EIGHT) * EIGHTH
    e = ONE + y * (E1 + y * (E2 + y * (E3 + y * (E4 + y * E5))))
    e = e * e
    e = e * e
    return e * e


@compiled
def angle_byte(t):
    """``255 * (1 - phi / (pi/2))``, rounded, for the angle ``phi = 2 * atan(t)``, ``0 <= t <= 1``."""
    w = t * t
    return np.uint8(np.int32(BYTE - BYTE * t * (A0 + w * (A1 + w * (A2 + w * A3))) + HALF))


@compiled
def slope_bytes(distance, slope, count, code, scale):
    """What is kept of each step: one byte that says how far the potential was from the threshold.

    Codes 0 to 2 are the surrogate's slope (triangle, atan, sigmoid) in 1/255 of its peak, rounded.
    An attached hard reset needs the distance as well, which the slope hardly tells near its top. So
    codes 3 and 4 (atan, sigmoid) are an angle ``phi``, 255 at 0 and 0 at ``pi/2``, of which slope and
    distance are smooth functions: the slope is ``cos(phi)^2`` of its peak.
    """
    if code == 0:
        steepness = BYTE * scale
        for i in range(count):
            slope[i] = np.uint8(np.int32(max(HALF, BYTE + HALF - steepness * distance[i])))
    elif code == 1:
        for i in range(count):
            z = scale * distance[i]
            slope[i] = np.uint8(np.int32(BYTE / (ONE + z * z) + HALF))
    elif code == 2:
        for i in range(count):
            e = exp_minus(scale * distance[i])  # beyond z = 8 the byte is 0
            slope[i] = np.uint8(np.int32(BYTE * FOUR * e / ((ONE + e) * (ONE + e)) + HALF))
    elif code == 3:
        for i in range(count):
            z = min(scale * distance[i], FAR)  # so that its square is finite; the byte is 0 there
            slope[i] = angle_byte(z / (ONE + np.sqrt(ONE + z * z)))
    else:
        for i in range(count):
            e = exp_minus(HALF * scale * distance[i])  # tanh(z / 4) = (1 - e) / (1 + e)
            slope[i] = angle_byte((ONE - e) / (ONE + e))


@lru_cache
def decoded(code: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Slope (in 1/255 of its peak) and ``|v - v_threshold|`` for each byte of an attached hard reset."""
    byte = np.arange(256.0)
    if code == 0:
        return byte.astype(np.float32), ((1 - byte / 255) / scale).astype(np.float32)
    phi = np.pi / 2 * (1 - np.maximum(byte, 0.25) / 255)  # the distance of byte 0 has no upper end
    slope = np.where(byte > 0, 255 * np.cos(phi) ** 2, 0)
    z = np.tan(phi) if code == 3 else 4 * np.arctanh(np.tan(phi / 2))
    return slope.astype(np.float32), (z / scale).astype(np.float32)


@compiled
def add_to_maps(spikes, total, mapped, trace, count, rate, amap):
    """Sums over time of the spikes, and of the spikes times the trace of earlier ones (Eq. 11)."""
    if rate:
        for i in range(count):
            total[i] += spikes[i]
    if amap:
        for i in range(count):
            mapped[i] += trace[i] * spikes[i]
            trace[i] = DECAY * (trace[i] + spikes[i])


@compiled
def drop(spikes, mask, count):
    """Spikes times the dropout mask; a spike that is dropped leaves -0.0.

    It equals 0 for whoever reads it, and its sign tells the backward that the neuron did fire.
    """
    for i in range(count):
        kept = spikes[i] * mask[i]
        spikes[i] = DROPPED if spikes[i] > ZERO and kept == ZERO else kept


def forward_scratch(block: int, has_maps: bool) -> int:
    """Floats that :func:`forward_range` needs for itself."""
    return (4 if has_maps else 1) * block + 2 * CHUNK


@c_function(
    INT, *[FLOATS] * 7, BYTES, *[INT] * 4, INT, *[FLOAT] * 5, INT, FLOAT,
    FLOATS, BYTES, INT, INT, INT,
)  # fmt: skip
def forward_range(
    x, v, mask, spikes, v_T, rate, amap, slope, T, n, x_step, stream,
    reset, leak, gain, offset, theta, v_reset, code, scale,
    scratch, byte_row, block, start, stop,
):  # fmt: skip
    """Neurons ``start`` to ``stop`` over all steps; returns how many end with a state not finite.

    Row ``t`` of ``x`` begins at ``t * x_step``, of ``spikes`` and ``slope`` at ``t * n``. ``mask``,
    ``rate``, ``amap`` and ``slope`` may be null. ``stream`` says whether results go past the cache.
    """
    row, distance, state = scratch, at(scratch, CHUNK), at(scratch, 2 * CHUNK)
    total, mapped, trace = at(state, block), at(state, 2 * block), at(state, 3 * block)
    has_slope, has_rate, has_map = address(slope) != 0, address(rate) != 0, address(amap) != 0
    per_step = np.float32(T)
    bad = 0
    for a in range(start, stop, block):
        m = min(block, stop - a)
        put(state, at(v, a), m, 4, False)
        if has_rate or has_map:
            fill(total, ZERO, 3 * block)
        for t in range(T):
            for c in range(0, m, CHUNK):
                count = min(CHUNK, m - c)
                here, x_here = t * n + a + c, t * x_step + a + c
                if c + CHUNK < m:
                    fetch(at(x, x_here + CHUNK), CHUNK, 4)
                elif t + 1 < T:
                    fetch(at(x, x_here + CHUNK - m + x_step), CHUNK, 4)
                charge_and_fire(
                    at(x, x_here), at(state, c), row, distance, count,
                    reset, leak, gain, offset, theta, v_reset,
                )  # fmt: skip
                if has_slope:
                    slope_bytes(distance, byte_row, count, code, scale)
                    put(at(slope, here), byte_row, count, 1, stream)
                if has_rate or has_map:
                    add_to_maps(row, at(total, c), at(mapped, c), at(trace, c), count, has_rate, has_map)
                if address(mask) != 0:
                    drop(row, at(mask, a + c), count)
                put(at(spikes, here), row, count, 4, stream)
        for i in range(m):
            v_T[a + i] = state[i]
            bad += not np.isfinite(state[i])
        if has_rate:
            for i in range(m):
                rate[a + i] = total[i] / per_step
        if has_map:
            for i in range(m):
                amap[a + i] = mapped[i] / per_step
    finish_streams()
    return bad


# ---------------------------------------------------------------------------------------- backward


@compiled
def output_gradient(g, mask, constant, R, out, count, has_g, has_mask, has_maps):
    """Gradient that reaches a step's spikes from outside: ``g * mask + constant + R``."""
    if has_maps:
        for i in range(count):
            out[i] = constant[i] + R[i]
    else:
        fill(out, ZERO, count)
    if has_g and has_mask:
        for i in range(count):
            out[i] += g[i] * mask[i]
    elif has_g:
        for i in range(count):
            out[i] += g[i]


@compiled
def traces_before(bits, window, trace, block, count, n, t0, t1):
    """Eq. 11's trace ``N[t]`` for ``t0 <= t < t1`` into the rows of ``window``.

    Its recursion cannot be run backwards without loss, so it is run forwards again from ``MEMORY``
    steps before, where what came earlier has decayed away.
    """
    fill(trace, ZERO, count)
    for t in range(max(0, t0 - MEMORY), t1):
        for c in range(0, count, CHUNK):
            m = min(CHUNK, count - c)
            row, chunk = at(bits, t * n + c), at(trace, c)
            fetch(at(row, CHUNK if c + CHUNK < count else n - c), CHUNK, 4)
            if t >= t0:
                put(at(window, (t - t0) * block + c), chunk, m, 4, False)
            for i in range(m):
                chunk[i] = DECAY * (chunk[i] + (ONE if row[i] != 0 else ZERO))


@compiled
def add_map_gradient(out, mapped, trace, bits, R, count, through_trace):
    """What the activation map's gradient adds to a step's: by its own spike, by the trace of later ones."""
    for i in range(count):
        out[i] += mapped[i] * trace[i]
    if through_trace:
        for i in range(count):
            R[i] = DECAY * (R[i] + (mapped[i] if bits[i] != 0 else ZERO))


@compiled
def adjoint(
    go, code, bits, gv, g_x, count, hard, carry, reset_gain, peak, gain, back, slope_of, away_of, slope, away
):  # fmt: skip
    """One step backwards: ``gv``, the gradient of the potential, of this step in place of the next.

    ``carry`` is what of the later gradient reaches the state handed on, ``reset_gain`` what of it
    reaches the spike through the reset (0 where the reset is detached). The ``v_reset - v`` of a hard
    reset is found from the byte, which is even in ``v - v_threshold``, and the spike, which is its
    sign; ``back`` is ``v_reset - v_threshold``.
    """
    if not hard:
        for i in range(count):
            gv[i] = carry * gv[i] + (go[i] - reset_gain * gv[i]) * (peak * np.float32(code[i]))
            g_x[i] = gain * gv[i]
        return
    if reset_gain == ZERO:
        for i in range(count):
            slope[i] = np.float32(code[i])
            away[i] = ZERO
    else:
        for i in range(count):  # alone in its loop: a table look-up is not vectorised
            slope[i] = slope_of[code[i]]
            away[i] = away_of[code[i]]
    for i in range(count):
        o = ONE if bits[i] != 0 else ZERO
        handed = carry * gv[i]
        jump = reset_gain * (back + (ONE - o - o) * away[i])
        gv[i] = (ONE - o) * handed + (go[i] + jump * handed) * (peak * slope[i])
        g_x[i] = gain * gv[i]


def backward_scratch(block: int, has_maps: bool) -> int:
    """Floats that :func:`backward_range` needs for itself."""
    return (5 + WINDOW if has_maps else 1) * block + 4 * CHUNK


@c_function(
    INT, *[FLOATS] * 4, INTS, BYTES, *[FLOATS] * 6, *[INT] * 4, INT, *[FLOAT] * 6, INT, FLOAT, INT,
    FLOATS, BYTES, INT, INT, INT,
)  # fmt: skip
def backward_range(
    g_spikes, g_v, g_rate, g_map, bits, slope, v0, mask, slope_of, away_of, g_x, g_v0, T, n, g_step, stream,
    reset, leak, gain, theta, attached, peak, back, code, scale, through_trace,
    scratch, byte_row, block, start, stop,
):  # fmt: skip
    """Adjoint of :func:`forward_range`; ``bits`` are the spikes as integers, not 0 where one fired.

    ``g_spikes``, ``g_v``, ``g_rate``, ``g_map``, ``mask`` and ``bits`` may be null.
    """
    out, g_row = scratch, at(scratch, CHUNK)
    decoded_slope, away = at(scratch, 2 * CHUNK), at(scratch, 3 * CHUNK)
    gv = at(scratch, 4 * CHUNK)
    constant, mapped, R = at(gv, block), at(gv, 2 * block), at(gv, 3 * block)
    trace, window = at(gv, 4 * block), at(gv, 5 * block)
    has_g, has_mask, has_map = address(g_spikes) != 0, address(mask) != 0, address(g_map) != 0
    reads_bits = reset == 2 or (has_map and through_trace != 0)
    has_rate = address(g_rate) != 0
    direct = has_g and not (has_mask or has_rate or has_map)
    per_step = ONE / np.float32(T)
    for a in range(start, stop, block):
        m = min(block, stop - a)
        fill(gv, ZERO, 5 * block if has_rate or has_map else block)
        if address(g_v) != 0:
            put(gv, at(g_v, a), m, 4, False)
        if has_rate:
            scale_into(constant, at(g_rate, a), per_step, m)
        if has_map:
            scale_into(mapped, at(g_map, a), per_step, m)
        for k in range(T):
            t = T - 1 - k
            t0 = t - t % WINDOW
            if has_map and (k == 0 or t % WINDOW == WINDOW - 1):
                traces_before(at(bits, a), window, trace, block, m, n, t0, t + 1)
            # The paper's state is the potential itself, so what arrives at the last one is its own
            # gradient; the other resets hand on what is left after the reset.
            carry = leak if k else ONE
            if reset == 0:
                reset_gain = attached if k else ZERO
            elif reset == 1:
                reset_gain = attached * carry
            else:
                reset_gain = attached
            for c in range(0, m, CHUNK):
                count = min(CHUNK, m - c)
                here, g_here = t * n + a + c, t * g_step + a + c
                ahead, g_ahead = CHUNK, CHUNK
                if c + CHUNK >= m:  # in the row before
                    ahead, g_ahead = CHUNK - m - n, CHUNK - m - g_step
                if t or ahead > 0:
                    fetch(at(slope, here + ahead), CHUNK, 1)
                    if has_g:
                        fetch(at(g_spikes, g_here + g_ahead), CHUNK, 4)
                    if reads_bits:
                        fetch(at(bits, here + ahead), CHUNK, 4)
                go, fired = out, at(bits, here)
                if direct:
                    go = at(g_spikes, g_here)
                else:
                    output_gradient(
                        at(g_spikes, g_here), at(mask, a + c), at(constant, c), at(R, c), out, count,
                        has_g, has_mask, has_rate or has_map,
                    )  # fmt: skip
                if has_map:
                    in_window = at(window, (t - t0) * block + c)
                    add_map_gradient(out, at(mapped, c), in_window, fired, at(R, c), count, through_trace)
                adjoint(
                    go, at(slope, here), fired, at(gv, c), g_row, count, reset == 2, carry, reset_gain,
                    peak, gain, back, slope_of, away_of, decoded_slope, away,
                )  # fmt: skip
                put(at(g_x, here), g_row, count, 4, stream)
        scale_into(at(g_v0, a), gv, leak, m)
        if attached != ZERO and reset == 0:  # the paper's reset of the first step is by the state given
            for c in range(0, m, CHUNK):
                count = min(CHUNK, m - c)
                for i in range(count):
                    out[i] = abs(v0[a + c + i] - theta)
                slope_bytes(out, byte_row, count, code, scale)
                for i in range(count):
                    g_v0[a + c + i] -= attached * gv[c + i] * (peak * np.float32(byte_row[i]))
    finish_streams()
    return 0
