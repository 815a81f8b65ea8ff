"""Neuron equations in plain PyTorch: one step, the loop over time, the maps.

Every faster kernel in this package is tested against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Surrogate = Callable[[Tensor], Tensor]
TRACE_DECAY = math.exp(-1.0)  # of the spike trace in a step, Eq. 11
# Steps of the trace that the kernels' backward computes again: older spikes add exp(-17) / (1 - exp(-1)) =
# 7e-8 at most, which is rounding in float32. CUDA's window of 32 bits holds these and the 16 steps that it
# reads ahead.
TRACE_STEPS = 16


ResetForm = Literal["paper", "soft", "hard"]


class Reset(IntEnum):
    """Code of :attr:`Dynamics.reset` in the kernels; a form without a code runs in plain PyTorch."""

    PAPER = 0
    SOFT = 1
    HARD = 2


RESETS = tuple(code.name.lower() for code in Reset)  # in the order of their codes


class Shape(IntEnum):
    """Code of :attr:`.surrogate.KernelForm.shape` in the kernels; ``NONE`` if no slope is kept."""

    TRIANGLE = 0
    ATAN = 1
    SIGMOID = 2
    NONE = 3


@dataclass(frozen=True)
class Dynamics:
    """Constants of a layer of neurons.

    ``reset`` selects one of three forms; with ``c[t] = gain * x[t] + offset``:

    - ``"paper"`` (LaSNN, Eq. 1-2): ``v[t] = leak * v[t-1] + c[t] - v_threshold * o[t-1]`` and
      ``o[t] = 1 if v[t] > v_threshold else 0``. The state handed on is ``v[t]``, before its reset.
    - ``"soft"`` (SpikingJelly): ``v[t] = leak * u[t-1] + c[t]``, ``o[t] = v[t] >= v_threshold``,
      and the state handed on is ``u[t] = v[t] - v_threshold * o[t]``.
    - ``"hard"``: as ``"soft"``, with ``u[t] = v_reset`` where the neuron has fired.

    ``detach_reset=True`` lets no gradient through the reset term.
    """

    leak: float = 1.0
    v_threshold: float = 1.0
    reset: ResetForm = "paper"
    v_reset: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    detach_reset: bool = True

    def __post_init__(self) -> None:
        if self.reset not in get_args(ResetForm):
            raise ValueError(f"reset must be one of {', '.join(get_args(ResetForm))}, got {self.reset!r}")
        if not (math.isfinite(self.v_threshold) and self.v_threshold > 0):
            raise ValueError(f"v_threshold must be a positive number, got {self.v_threshold}")
        if not 0 <= self.leak <= 1:
            raise ValueError(f"leak must lie in [0, 1], got {self.leak}")


class LoopParameters(NamedTuple):
    """Parameters of the kernels as plain numbers.

    The surrogate is ``peak * shape(scale * |v - v_threshold|)`` (see ``surrogate.KernelForm``); ``shape`` is
    a :class:`Shape` and ``reset`` a :class:`Reset`. Without ``keep_slope`` (no gradient is wanted) no slope
    bytes are written. With ``pool`` the spikes that are returned are averages of 2x2 pixels.
    """

    leak: float
    gain: float
    offset: float
    v_threshold: float
    v_reset: float
    reset: int
    shape: int
    peak: float
    scale: float
    detach_reset: bool
    firing_rate: bool
    activation_map: bool
    through_trace: bool
    keep_slope: bool = True
    pool: bool = False

    @property
    def keep_fired(self) -> bool:
        """True if the backward pass needs to know which neurons fired, not only the slope."""
        return self.keep_slope and (self.reset == Reset.HARD or self.activation_map)


class LoopResult(NamedTuple):
    """Results of a run over time; the maps are ``None`` unless they were asked for.

    Shape:
        - spikes: ``[T, N, ...]``, in the input's dtype, times the dropout mask if one was given
        - v: ``[N, ...]``, the state after the last step
        - firing_rate: ``[N, ...]``, the mean of the spikes over time (without the dropout mask)
        - activation_map: ``[N, ...]``, the mean over time of ``N[t] * o[t]`` (Eq. 11)
    """

    spikes: Tensor
    v: Tensor
    firing_rate: Tensor | None
    activation_map: Tensor | None


def fire(v: Tensor, dynamics: Dynamics, surrogate: Surrogate) -> Tensor:
    """Compute the spikes of potentials ``v``, differentiable through ``surrogate`` (Eq. 2, 14, 15).

    A surrogate whose attribute ``relative`` is true takes ``v / v_threshold - 1``, any other
    ``v - v_threshold`` as in SpikingJelly.
    """
    distance = v - dynamics.v_threshold
    if getattr(surrogate, "relative", False):
        distance = distance / dynamics.v_threshold
    spikes = surrogate(distance)
    if dynamics.reset == "paper" and getattr(surrogate, "spiking", True):
        # Eq. 2 is strict, SpikingJelly's surrogates fire at equality too; this changes only the value.
        spikes = spikes + ((v > dynamics.v_threshold).to(spikes) - spikes).detach()
    return spikes


def step(x: Tensor, v: Tensor, dynamics: Dynamics, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """Run one step of the neuron: ``(spikes, state)`` from the input ``x`` and the previous state.

    Args:
        x: weighted input of this step, ``[N, ...]``.
        v: state after the previous step, same shape, float32 or float64.
    """
    d = dynamics
    x = x.to(v.dtype)
    if d.gain != 1.0 or d.offset != 0.0:
        x = d.gain * x + d.offset
    if d.reset == "paper":
        before = fire(v, d, surrogate)
        v = d.leak * v + x - d.v_threshold * (before.detach() if d.detach_reset else before)
        return fire(v, d, surrogate), v
    v = d.leak * v + x
    spikes = fire(v, d, surrogate)
    reset = spikes.detach() if d.detach_reset else spikes
    if d.reset == "soft":
        return spikes, v - d.v_threshold * reset
    return spikes, (1.0 - reset) * v + reset * d.v_reset


def decay_trace(trace: Tensor, spikes: Tensor) -> Tensor:
    """Advance the trace of earlier spikes, Eq. 11's inner sum: ``N[t] = exp(-1) * (N[t-1] + o[t-1])``."""
    return TRACE_DECAY * (trace + spikes)


def run(
    x: Tensor,
    v: Tensor,
    dynamics: Dynamics,
    surrogate: Surrogate,
    mask: Tensor | None = None,
    firing_rate: bool = False,
    activation_map: bool = False,
    through_trace: bool = False,
) -> LoopResult:
    """Run the loop over time in operations that autograd differentiates.

    Args:
        x: weighted inputs, ``[T, N, ...]``.
        v: state before the first step, ``[N, ...]``.
        mask: dropout mask shared by all steps, ``[N, ...]``; multiplies the spikes that are returned.
        firing_rate: also return the mean of the spikes over time.
        activation_map: also return the mean over time of ``N[t] * o[t]``.
        through_trace: let the activation map's gradient also reach earlier spikes through ``N``.
    """
    out, total, mapped = [], None, None
    trace = torch.zeros_like(v)
    for x_t in x:
        spikes, v = step(x_t, v, dynamics, surrogate)
        if firing_rate:
            total = spikes if total is None else total + spikes
        if activation_map:
            product = trace * spikes
            mapped = product if mapped is None else mapped + product
            trace = decay_trace(trace, spikes if through_trace else spikes.detach())
        out.append((spikes if mask is None else spikes * mask).to(x.dtype))
    T = len(out)
    return LoopResult(
        torch.stack(out),
        v,
        total / T if firing_rate else None,
        mapped / T if activation_map else None,
    )
