"""Attention maps of the paper, as pure functions of tensors (Eq. 5-6, 10-11)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..neurons.dynamics import decay_trace


def activation_map(a: Tensor, *, normalise: bool = True, size: tuple[int, int] | None = None) -> Tensor:
    """Attention of an activation, Eq. 5-6 per position: ``F(A) = mean over C of |A|^2``.

    (The right side of Eq. 6 as printed averages over space too, which would leave no map.) For a
    student, ``a`` is the firing rate, the mean over time of a layer's spikes.

    Args:
        a: activations ``[N, C, H, W]``.
        normalise: divide each flattened map by its L2 norm (Zagoruyko & Komodakis).
        size: resize the map to this ``(H, W)`` first.

    Returns:
        ``[N, H * W]``, float32 (float64 for float64 input).
    """
    return _finish(_check(a, "a").square().mean(1), normalise, size)


def gradient_map(g: Tensor, *, normalise: bool = True, size: tuple[int, int] | None = None) -> Tensor:
    """Gradient attention of a teacher, Eq. 10 per layer: ``mean over C of |d CE / d A|``.

    Args:
        g: gradient of the loss with respect to a layer's activations, ``[N, C, H, W]``.
        normalise, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    return _finish(_check(g, "g").abs().mean(1), normalise, size)


def spike_activation_map(
    spikes: Tensor, *, normalise: bool = True, size: tuple[int, int] | None = None
) -> Tensor:
    """Spike activation map of a student, Eq. 11, from the spikes of all steps.

    ``M[t] = sum over C of N[t] * o[t]`` with ``N[t] = sum over earlier spikes t' of exp(-(t - t'))``,
    averaged over ``t``. The gradient flows through ``o[t]``, not through ``N[t]``. In training the
    neurons compute the same inside their own loop; see :func:`spike_map`.

    Args:
        spikes: ``[T, N, C, H, W]``.
        normalise, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    if spikes.dim() != 5 or spikes.shape[0] < 1:
        raise ValueError(f"spikes must be [T, N, C, H, W], got shape {tuple(spikes.shape)}")
    total, trace = 0.0, torch.zeros_like(spikes[0])
    for o in spikes:
        total = total + trace * o
        trace = decay_trace(trace, o.detach())
    return spike_map(total / len(spikes), normalise=normalise, size=size)


def spike_map(m: Tensor, *, normalise: bool = True, size: tuple[int, int] | None = None) -> Tensor:
    """Finish a spike activation map that the neurons have accumulated over time (Eq. 11).

    Args:
        m: ``[N, C, H, W]``, per neuron the mean over time of ``N[t] * o[t]``.
        normalise, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    return _finish(_check(m, "m").sum(1), normalise, size)


def _check(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got shape {tuple(tensor.shape)}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finish(maps: Tensor, normalise: bool, size: tuple[int, int] | None) -> Tensor:
    if size is not None and tuple(size) != tuple(maps.shape[1:]):
        shrinks = size[0] <= maps.shape[1] and size[1] <= maps.shape[2]
        # Averaging keeps every pixel's share when a map shrinks, where bilinear samples would skip some.
        how = {"mode": "area"} if shrinks else {"mode": "bilinear", "align_corners": False}
        maps = F.interpolate(maps.unsqueeze(1), size=tuple(size), **how).squeeze(1)
    maps = maps.flatten(1)
    if not normalise:
        return maps
    # In float64: the squares of a sure teacher's gradients would be 0 in float32.
    norm = torch.linalg.vector_norm(maps, dim=1, keepdim=True, dtype=torch.float64).to(maps.dtype)
    # A silent layer has the map 0 and no direction: its norm is taken as 1, and no gradient explodes.
    return maps / torch.where(norm > 0, norm, torch.ones_like(norm))
