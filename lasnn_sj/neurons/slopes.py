"""Surrogate slopes as bytes, for the backward pass of the CPU kernels."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from .dynamics import Shape
from .lanes import inlined, root, select

ONE, HALF, BYTE = np.float32(1), np.float32(0.5), np.float32(255)
FOUR, EIGHT, EIGHTH = np.float32(4), np.float32(8), np.float32(0.125)
# exp(-y) and, in powers of t^2, (4 / pi) * atan(t) / t on [0, 1]: relative errors 5e-6 and 2e-4
E1, E2, E3, E4, E5 = np.array([-0.99999815, 0.49990605, -0.16589675, 0.03942258, -0.00555601], "f4")
A0, A1, A2, A3 = np.array([1.27296395, -0.41473753, 0.19784118, -0.05627495], "f4")
FAR = np.float32(1e6)
TRIANGLE, ATAN, SIGMOID, NO_SLOPE = map(int, Shape)
ATAN_ANGLE, SIGMOID_ANGLE = NO_SLOPE + 1, NO_SLOPE + 2  # further codes of slope_byte


@inlined
def exp_minus(z):
    """``exp(-z)`` for ``0 <= z <= 8``, as the 8th power of a polynomial."""
    y = select(z > EIGHT, EIGHT, z) * EIGHTH
    e = ONE + y * (E1 + y * (E2 + y * (E3 + y * (E4 + y * E5))))
    e = e * e
    e = e * e
    return e * e


@inlined
def angle(t):
    """``255 * (1 - phi / (pi/2))`` for the angle ``phi = 2 * atan(t)``, ``0 <= t <= 1``."""
    w = t * t
    return BYTE - BYTE * t * (A0 + w * (A1 + w * (A2 + w * A3)))


@inlined
def slope_byte(distance, code, scale):
    """Encode the distance of the potential from the threshold in one byte, for the backward pass.

    ``TRIANGLE``, ``ATAN`` and ``SIGMOID`` are the surrogate's slope in 1/255 of its peak, rounded. An
    attached hard reset needs the distance too, which the slope hardly resolves near its peak. ``ATAN_ANGLE``
    and ``SIGMOID_ANGLE`` are therefore an angle ``phi``, 255 at 0 and 0 at ``pi/2``, of which slope and
    distance are smooth functions: the slope is ``cos(phi)^2`` of its peak.

    Returns:
        A number to be truncated to the byte.
    """
    if code == TRIANGLE:
        byte = BYTE + HALF - BYTE * scale * distance
        return select(byte > HALF, byte, HALF)
    if code == ATAN:
        z = scale * distance
        return BYTE / (ONE + z * z) + HALF
    if code == SIGMOID:
        e = exp_minus(scale * distance)  # beyond z = 8 the byte is 0
        return BYTE * FOUR * e / ((ONE + e) * (ONE + e)) + HALF
    if code == ATAN_ANGLE:
        z = scale * distance
        z = select(z > FAR, FAR, z)  # so that its square is finite; the byte is 0 there
        return angle(z / (ONE + root(ONE + z * z))) + HALF
    e = exp_minus(HALF * scale * distance)  # tanh(z / 4) = (1 - e) / (1 + e)
    return angle((ONE - e) / (ONE + e)) + HALF


@lru_cache
def decoded(code: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return slope (1/255 of its peak) and ``|v - v_threshold|`` for each byte of an attached hard reset."""
    byte = np.arange(256.0)
    if code == TRIANGLE:
        return byte.astype(np.float32), ((1 - byte / 255) / scale).astype(np.float32)
    phi = np.pi / 2 * (1 - np.maximum(byte, 0.25) / 255)  # the distance of byte 0 is not bounded
    slope = np.where(byte > 0, 255 * np.cos(phi) ** 2, 0)
    z = np.tan(phi) if code == ATAN_ANGLE else 4 * np.arctanh(np.tan(phi / 2))
    return slope.astype(np.float32), (z / scale).astype(np.float32)
