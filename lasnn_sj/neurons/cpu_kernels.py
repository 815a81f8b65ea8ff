"""The time loop as Numba kernels, each over one range of neurons.

A block of neurons runs through all its time steps before the next block starts, so its state stays in
the cache and each value of ``x`` is read from memory once. The small loops take a row of a block each:
there is one per reset and surrogate, so that each is a few vector instructions and all of them together
compile once, in seconds.
"""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np

from .dynamics import TRACE_DECAY

WINDOW = 32  # steps of the spike trace that the backward holds at a time
MEMORY = 24  # steps after which a spike has left the trace: exp(-24) = 4e-11

ZERO, ONE, HALF, BYTE = np.float32(0), np.float32(1), np.float32(0.5), np.float32(255)
FOUR, EIGHT, EIGHTH = np.float32(4), np.float32(8), np.float32(0.125)
DECAY = np.float32(TRACE_DECAY)
DROPPED = np.float32(-0.0)
NONE = np.empty(0, np.float32)
# exp(-y) and, in powers of t^2, (4 / pi) * atan(t) / t on [0, 1]: relative errors 5e-6 and 2e-4
E1, E2, E3, E4, E5 = np.array([-0.99999815, 0.49990605, -0.16589675, 0.03942258, -0.00555601], "f4")
A0, A1, A2, A3 = np.array([1.27296395, -0.41473753, 0.19784118, -0.05627495], "f4")
FAR = np.float32(1e6)

# No fastmath: spikes must be those of the oracle bit for bit, so nothing may be reordered or fused.
OPTIONS = {"nogil": True, "error_model": "numpy"}


def compiled(function):
    """``numba.njit``, cached on disk where there is a place to write."""
    try:
        return numba.njit(cache=True, **OPTIONS)(function)
    except RuntimeError:  # no writable cache directory: compile anew in each process
        return numba.njit(**OPTIONS)(function)


@compiled
def charge_and_fire(x, v, spikes, distance, reset, leak, gain, offset, theta, v_reset):
    """One step of a block: moves the state ``v`` on, writes spikes and ``|v - v_threshold|``."""
    if reset == 0:
        for i in range(x.size):
            before = ONE if v[i] > theta else ZERO
            u = leak * v[i] + (gain * x[i] + offset) - theta * before
            spikes[i] = ONE if u > theta else ZERO
            distance[i] = abs(u - theta)
            v[i] = u
    elif reset == 1:
        for i in range(x.size):
            u = leak * v[i] + (gain * x[i] + offset)
            o = ONE if u >= theta else ZERO
            spikes[i] = o
            distance[i] = abs(u - theta)
            v[i] = u - theta * o
    else:
        for i in range(x.size):
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
def slope_bytes(distance, slope, code, scale):
    """What is kept of each step: one byte that says how far the potential was from the threshold.

    Codes 0 to 2 are the surrogate's slope (triangle, atan, sigmoid) in 1/255 of its peak, rounded.
    An attached hard reset needs the distance as well, which the slope hardly tells near its top. So
    codes 3 and 4 (atan, sigmoid) are an angle ``phi``, 255 at 0 and 0 at ``pi/2``, of which slope and
    distance are smooth functions: the slope is ``cos(phi)^2`` of its peak.
    """
    if code == 0:
        for i in range(distance.size):
            s = max(ZERO, ONE - scale * distance[i])
            slope[i] = np.uint8(np.int32(BYTE * s + HALF))
    elif code == 1:
        for i in range(distance.size):
            z = scale * distance[i]
            slope[i] = np.uint8(np.int32(BYTE / (ONE + z * z) + HALF))
    elif code == 2:
        for i in range(distance.size):
            e = exp_minus(scale * distance[i])  # beyond z = 8 the byte is 0
            slope[i] = np.uint8(np.int32(BYTE * FOUR * e / ((ONE + e) * (ONE + e)) + HALF))
    elif code == 3:
        for i in range(distance.size):
            z = min(scale * distance[i], FAR)  # so that its square is finite; the byte is 0 there
            slope[i] = angle_byte(z / (ONE + np.sqrt(ONE + z * z)))
    else:
        for i in range(distance.size):
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
def add_to_maps(spikes, total, mapped, trace, rate, amap):
    """Sums over time of the spikes, and of the spikes times the trace of earlier ones (Eq. 11)."""
    if rate:
        for i in range(spikes.size):
            total[i] += spikes[i]
    if amap:
        for i in range(spikes.size):
            mapped[i] += trace[i] * spikes[i]
            trace[i] = DECAY * (trace[i] + spikes[i])


@compiled
def drop(spikes, mask):
    """Spikes times the dropout mask; a spike that is dropped leaves -0.0.

    It equals 0 for whoever reads it, and its sign tells the backward that the neuron did fire.
    """
    for i in range(spikes.size):
        kept = spikes[i] * mask[i]
        spikes[i] = DROPPED if spikes[i] > ZERO and kept == ZERO else kept


@compiled
def forward_range(
    x, x_step, v, mask, spikes, v_T, rate, amap, slope, T, n, start, stop,
    block, reset, leak, gain, offset, theta, v_reset, code, scale,
):  # fmt: skip
    """Neurons ``start`` to ``stop`` over all steps; returns how many end with a state not finite.

    Everything is flat: row ``t`` of ``x`` begins at ``t * x_step``, of ``spikes`` and ``slope`` at
    ``t * n``. An empty array stands for an argument that is not there.
    """
    state = np.empty(block, np.float32)
    distance = np.empty(block, np.float32)
    total = np.empty(block, np.float32)
    mapped = np.empty(block, np.float32)
    trace = np.empty(block, np.float32)
    steps = np.float32(T)
    bad = 0
    for a in range(start, stop, block):
        b = min(a + block, stop)
        m = b - a
        state[:m] = v[a:b]
        total[:] = ZERO
        mapped[:] = ZERO
        trace[:] = ZERO
        for t in range(T):
            row = spikes[t * n + a : t * n + b]
            charge_and_fire(
                x[t * x_step + a : t * x_step + b], state[:m], row, distance[:m],
                reset, leak, gain, offset, theta, v_reset,
            )  # fmt: skip
            if slope.size:
                slope_bytes(distance[:m], slope[t * n + a : t * n + b], code, scale)
            if rate.size or amap.size:
                add_to_maps(row, total[:m], mapped[:m], trace[:m], rate.size > 0, amap.size > 0)
            if mask.size:
                drop(row, mask[a:b])
        for i in range(m):
            v_T[a + i] = state[i]
            bad += not np.isfinite(state[i])
        if rate.size:
            for i in range(m):
                rate[a + i] = total[i] / steps
        if amap.size:
            for i in range(m):
                amap[a + i] = mapped[i] / steps
    return bad


@compiled
def output_gradient(g, mask, constant, R, out, has_g, has_mask):
    """Gradient that reaches a step's spikes from outside: ``g * mask + constant + R``."""
    for i in range(out.size):
        out[i] = constant[i] + R[i]
    if has_g and has_mask:
        for i in range(out.size):
            out[i] += g[i] * mask[i]
    elif has_g:
        for i in range(out.size):
            out[i] += g[i]


@compiled
def traces_before(bits, window, n, a, b, t0, t1):
    """Eq. 11's trace ``N[t]`` for ``t0 <= t < t1`` into the rows of ``window``.

    Its recursion cannot be run backwards without loss, so it is run forwards again from ``MEMORY``
    steps before, where what came earlier has decayed away.
    """
    m = b - a
    trace = np.zeros(m, np.float32)
    for t in range(max(0, t0 - MEMORY), t1):
        if t >= t0:
            window[t - t0, :m] = trace
        row = bits[t * n + a : t * n + b]
        for i in range(m):
            trace[i] = DECAY * (trace[i] + (ONE if row[i] != 0 else ZERO))


@compiled
def adjoint(
    go, code, bits, gv, g_x, hard, carry, reset_gain, peak, gain, back, tables, away, slope
):  # fmt: skip
    """One step backwards: ``gv``, the gradient of the potential, of this step in place of the next.

    ``carry`` is what of the later gradient reaches the state handed on, ``reset_gain`` what of it
    reaches the spike through the reset (0 where the reset is detached). The ``v_reset - v`` of a hard
    reset is found from the byte, which is even in ``v - v_threshold``, and the spike, which is its
    sign; ``back`` is ``v_reset - v_threshold``.
    """
    if not hard:
        for i in range(go.size):
            gv[i] = carry * gv[i] + (go[i] - reset_gain * gv[i]) * (peak * np.float32(code[i]))
            g_x[i] = gain * gv[i]
        return
    if reset_gain == ZERO:
        for i in range(go.size):
            slope[i] = np.float32(code[i])
    else:
        for i in range(go.size):  # alone in its loop: a table look-up is not vectorised
            slope[i] = tables[0][code[i]]
            away[i] = tables[1][code[i]]
    for i in range(go.size):
        o = ONE if bits[i] != 0 else ZERO
        handed = carry * gv[i]
        jump = reset_gain * (back + (ONE - o - o) * away[i])
        gv[i] = (ONE - o) * handed + (go[i] + jump * handed) * (peak * slope[i])
        g_x[i] = gain * gv[i]


@compiled
def backward_range(
    g_spikes, g_step, g_v, g_rate, g_map, bits, slope, slope0, mask, g_x, g_v0, T, n, start, stop,
    block, reset, leak, gain, attached_theta, peak, back, tables, through_trace,
):  # fmt: skip
    """Adjoint of :func:`forward_range`; ``bits`` are the spikes as integers, not 0 where one fired."""
    gv = np.empty(block, np.float32)
    constant = np.zeros(block, np.float32)
    mapped = np.empty(block, np.float32)
    R = np.zeros(block, np.float32)
    out = np.empty(block, np.float32)
    away = np.zeros(block, np.float32)
    decoded_slope = np.empty(block, np.float32)
    window = np.empty((WINDOW if g_map.size else 1, block), np.float32)
    per_step = ONE / np.float32(T)
    direct = g_spikes.size and not (mask.size or g_rate.size or g_map.size)
    for a in range(start, stop, block):
        b = min(a + block, stop)
        m = b - a
        if g_v.size:
            gv[:m] = g_v[a:b]
        else:
            gv[:m] = ZERO
        if g_rate.size:
            constant[:m] = g_rate[a:b] * per_step
        if g_map.size:
            mapped[:m] = g_map[a:b] * per_step
            R[:] = ZERO
        for k in range(T):
            t = T - 1 - k
            row = t * n
            go = out[:m]
            if direct:
                go = g_spikes[t * g_step + a : t * g_step + b]
            else:
                output_gradient(
                    g_spikes[t * g_step + a : t * g_step + b] if g_spikes.size else out[:m],
                    mask[a:b] if mask.size else out[:m],
                    constant[:m], R[:m], go, g_spikes.size > 0, mask.size > 0,
                )  # fmt: skip
            if g_map.size:
                t0 = t - t % WINDOW
                if k == 0 or t % WINDOW == WINDOW - 1:
                    traces_before(bits, window, n, a, b, t0, t + 1)
                for i in range(m):
                    go[i] += mapped[i] * window[t - t0, i]
                if through_trace:
                    for i in range(m):
                        fired = ONE if bits[row + a + i] != 0 else ZERO
                        R[i] = DECAY * (R[i] + fired * mapped[i])
            # The paper's state is the potential itself, so what arrives at the last one is its own
            # gradient; the other resets hand on what is left after the reset.
            carry = leak if k else ONE
            if reset == 0:
                reset_gain = attached_theta if k else ZERO
            elif reset == 1:
                reset_gain = attached_theta * carry
            else:
                reset_gain = attached_theta
            adjoint(
                go, slope[row + a : row + b],
                bits[row + a : row + b] if bits.size else bits,
                gv[:m], g_x[row + a : row + b], reset == 2, carry, reset_gain, peak, gain,
                back, tables, away[:m], decoded_slope[:m],
            )  # fmt: skip
        if slope0.size:
            for i in range(m):
                g_v0[a + i] = leak * gv[i] - attached_theta * gv[i] * (peak * np.float32(slope0[a + i]))
        else:
            for i in range(m):
                g_v0[a + i] = leak * gv[i]
