"""Frames of event recordings: counts of events by time step, and augmentation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Framing:
    """Settings that turn a recording into frames.

    Attributes:
        T: frames, the network's time steps.
        by: ``"count"`` for frames with equally many events (to one), ``"time"`` for equally long ones.
        denoise_us: drop an event without another one at a neighbouring pixel in the microseconds before it
            (Tonic's ``Denoise``); ``None`` keeps all.
        shrink: sum squares with this side, in pixels, into one pixel.
        remainder: events (or microseconds) left over by the division into ``T``: ``"spread"`` over the
            frames, or all in the ``"last"`` one, as in
            SpikingJelly's ``integrate_events_by_fixed_frames_number``.
    """

    T: int = 16
    by: Literal["count", "time"] = "count"
    denoise_us: float | None = None
    shrink: int = 1
    remainder: Literal["spread", "last"] = "spread"

    def __post_init__(self) -> None:
        for name in ("T", "shrink"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
        if self.by not in ("count", "time"):
            raise ValueError(f'by must be "count" or "time", got {self.by!r}')
        if self.remainder not in ("spread", "last"):
            raise ValueError(f'remainder must be "spread" or "last", got {self.remainder!r}')
        if self.denoise_us is not None and not self.denoise_us > 0:
            raise ValueError(f"denoise_us must be above 0 microseconds, or None, got {self.denoise_us!r}")


def to_frames(events: np.ndarray, sensor_size: tuple[int, int], framing: Framing) -> np.ndarray:
    """Count a recording's events in frames; every event is in one frame.

    Tonic's ``ToFrame`` gives the same where the number of events is a multiple of ``T``, and else drops
    the rest.

    Args:
        events: structured array with the fields ``t`` (microseconds, in order), ``x``, ``y`` and ``p``.
        sensor_size: width and height in pixels.
        framing: its ``denoise_us`` is not used here.

    Returns:
        Counts ``[T, 2, H, W]``, int64; the second axis is the polarity.

    Raises:
        ValueError: times too far apart to be divided into ``T`` in 64 bits.
    """
    T, n = framing.T, len(events)
    width, height = (-(-side // framing.shrink) for side in sensor_size)
    last = framing.remainder == "last"
    if framing.by == "count":
        step = _in_last(np.arange(n), n, T) if last else np.arange(n) * T // max(n, 1)
    else:
        t = events["t"].astype(np.int64)
        span = int(t.max()) - int(t[0]) + 1 if n else 1
        if span * T >= 2**63:
            raise ValueError(f"times from {t[0]} to {t.max()} microseconds are too far apart for {T} frames")
        step = _in_last(t - t[:1], span - 1, T) if last else (t - t[:1]) * T // span
    x, y, p = (events[name].astype(np.int64) for name in ("x", "y", "p"))
    pixel = ((step * 2 + p) * height + y // framing.shrink) * width + x // framing.shrink
    return np.bincount(pixel, minlength=T * 2 * height * width).reshape(T, 2, height, width)


def _in_last(place: np.ndarray, length: int, T: int) -> np.ndarray:
    """Return the frame of each place for ``T`` frames of ``length // T`` places; the last takes the rest."""
    each = length // T
    return np.minimum(place // each, T - 1) if each else np.full_like(place, T - 1)


@dataclass(frozen=True)
class Augment:
    """Random flip, shift and cutout, the same for all frames of a recording.

    Args:
        flip: labels that a mirror image changes, others keep theirs; ``None`` never flips.
        shift: greatest shift in pixels, either way in both directions; what comes in is empty.
        cutout: side of an empty square somewhere; 0 for none.
    """

    flip: Mapping[int, int] | None = None
    shift: int = 0
    cutout: int = 0

    def __call__(self, frames: Tensor, label: int) -> tuple[Tensor, int]:
        """Augment frames ``[T, 2, H, W]`` and their label."""
        # torch's generator throughout: loader workers are given different seeds of it
        if self.flip is not None and bool(torch.rand(()) < 0.5):
            frames, label = frames.flip(-1), self.flip.get(label, label)
        if self.shift:
            for dim in (-2, -1):
                frames = _shift(frames, int(torch.randint(-self.shift, self.shift + 1, ())), dim)
        if self.cutout:
            rows, columns = (_window(side, self.cutout) for side in frames.shape[-2:])
            frames = frames.clone()
            frames[..., rows, columns] = 0
        return frames, label


def _shift(frames: Tensor, by: int, dim: int) -> Tensor:
    if by == 0:
        return frames
    moved, size = torch.zeros_like(frames), frames.shape[dim]
    moved.narrow(dim, max(by, 0), size - abs(by)).copy_(frames.narrow(dim, max(-by, 0), size - abs(by)))
    return moved


def _window(side: int, length: int) -> slice:
    start = int(torch.randint(0, max(side - length, 0) + 1, ()))
    return slice(start, start + length)
