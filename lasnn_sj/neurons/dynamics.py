"""The neuron equations in plain PyTorch: one step, the loop over time, the maps read from it.

Every faster kernel in this package is tested against these functions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Surrogate = Callable[[Tensor], Tensor]
TRACE_DECAY = math.exp(-1.0)


@dataclass(frozen=True)
class Dynamics:
    """What is fixed while one layer of neurons runs.

    ``reset`` names the three forms in use; with ``c[t] = gain * x[t] + offset``:

    - ``"paper"`` (LaSNN, Eq. 1-2): ``v[t] = leak * v[t-1] + c[t] - v_threshold * o[t-1]`` and
      ``o[t] = 1 if v[t] > v_threshold else 0``. The state handed on is ``v[t]``, before its reset.
    - ``"soft"`` (SpikingJelly): ``v[t] = leak * u[t-1] + c[t]``, ``o[t] = v[t] >= v_threshold``,
      and the state handed on is ``u[t] = v[t] - v_threshold * o[t]``.
    - ``"hard"``: as ``"soft"``, with ``u[t] = v_reset`` where the neuron has fired.

    ``detach_reset=True`` lets no gradient through the reset term.
    """

    leak: float = 1.0
    v_threshold: float = 1.0
    reset: Literal["paper", "soft", "hard"] = "paper"
    v_reset: float = 0.0
    gain: float = 1.0
    offset: float = 0.0
    detach_reset: bool = True

    def __post_init__(self) -> None:
        if self.reset not in ("paper", "soft", "hard"):
            raise ValueError(f"reset must be 'paper', 'soft' or 'hard', got {self.reset!r}")
        if not (math.isfinite(self.v_threshold) and self.v_threshold > 0):
            raise ValueError(f"v_threshold must be a positive number, got {self.v_threshold}")
        if not 0 <= self.leak <= 1:
            raise ValueError(f"leak must lie in [0, 1], got {self.leak}")


class LoopParameters(NamedTuple):
    """What the kernels are told, as plain numbers.

    The surrogate is ``peak * shape(scale * |v - v_threshold|)`` (see ``surrogate.KernelForm``) with
    shape 0 triangle, 1 atan, 2 sigmoid; ``reset`` is 0 paper, 1 soft, 2 hard. With ``keep_slope``
    false (no gradient is wanted) no slope bytes are written.
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

    @property
    def keep_fired(self) -> bool:
        """Whether the backward asks which neurons fired: else the slope is enough."""
        return self.keep_slope and (self.reset == 2 or self.activation_map)


class LoopResult(NamedTuple):
    """What a run over time gives; the maps are ``None`` unless they were asked for.

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
    """Spikes of the potentials ``v``, differentiable through ``surrogate`` (Eq. 2, 14, 15).

    A surrogate whose attribute ``relative`` is true is given ``v / v_threshold - 1``, any other
    ``v - v_threshold`` as in SpikingJelly.
    """
    distance = v - dynamics.v_threshold
    if getattr(surrogate, "relative", False):
        distance = distance / dynamics.v_threshold
    spikes = surrogate(distance)
    if dynamics.reset == "paper" and getattr(surrogate, "spiking", True):
        # Eq. 2 is strict where SpikingJelly's surrogates fire at equality; only the value changes.
        spikes = spikes + ((v > dynamics.v_threshold).to(spikes) - spikes).detach()
    return spikes


def step(x: Tensor, v: Tensor, dynamics: Dynamics, surrogate: Surrogate) -> tuple[Tensor, Tensor]:
    """One step of the neuron: ``(spikes, state)`` from the input ``x`` and the state before it.

    Args:
        x: weighted input of this step, ``[N, ...]``.
        v: state handed on by the step before, same shape, float32 or float64.
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
    """Trace of earlier spikes, Eq. 11's inner sum: ``N[t] = exp(-1) * (N[t-1] + o[t-1])``."""
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
    """The loop over time, as autograd sees it.

    Args:
        x: weighted inputs, ``[T, N, ...]``.
        v: state before the first step, ``[N, ...]``.
        mask: dropout mask shared by all steps, ``[N, ...]``; multiplies the spikes handed on.
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
