"""The one operation behind every neuron: a whole layer, over all time steps, in one call."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dynamics import Dynamics, LoopResult, run


def time_loop(
    x: Tensor,
    v: Tensor,
    dynamics: Dynamics,
    surrogate: nn.Module,
    mask: Tensor | None = None,
    firing_rate: bool = False,
    activation_map: bool = False,
    through_trace: bool = False,
) -> LoopResult:
    """Run a layer of neurons over time; see :func:`.dynamics.run` for the arguments.

    Raises:
        ValueError: no time step, or a state or mask that does not fit one step of the input.
    """
    if x.dim() < 2 or x.shape[0] < 1:
        raise ValueError(f"x must be [T, N, ...] with T >= 1, got shape {tuple(x.shape)}")
    for name, other in (("state v", v), ("mask", mask)):
        if other is not None and (other.shape != x.shape[1:] or other.device != x.device):
            raise ValueError(
                f"{name} must have the shape {tuple(x.shape[1:])} of one step of x and its device "
                f"{x.device}, got {tuple(other.shape)} on {other.device}"
            )
    if not torch.is_floating_point(x):
        raise ValueError(f"x must be a floating point tensor, got {x.dtype}")
    return run(x, v, dynamics, surrogate, mask, firing_rate, activation_map, through_trace)
