"""Surrogate gradients: the paper's, and the form in which the kernels compute SpikingJelly's."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, alpha: float) -> Tensor:
        return surrogate.heaviside(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, ctx.alpha = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (x,) = ctx.saved_tensors
        return grad * LinearSurrogate.slope(x, ctx.alpha), None


class LinearSurrogate(surrogate.SurrogateFunctionBase):
    """Linear pseudo-derivative of the paper (Eq. 14-15, read as Bellec et al. 2018).

    ``do/dv = (gamma / v_threshold) * max(0, 1 - |v / v_threshold - 1|)``

    The nodes of this package call it with ``x = v / v_threshold - 1`` (``relative`` is true), so the factor
    ``1 / v_threshold`` comes from the chain rule and ``slope`` is a function of ``x`` alone. A stock
    SpikingJelly node calls it with ``v - v_threshold``, which is the same at threshold 1.

    Args:
        gamma: height of the slope at the threshold (dampening), above 0.
        spiking: ``False`` returns the slope's integral instead of spikes, for gradient checks.
    """

    relative = True

    def __init__(self, gamma: float = 0.3, spiking: bool = True) -> None:
        if not (math.isfinite(gamma) and gamma > 0):
            raise ValueError(f"gamma must be a positive number, got {gamma}")
        super().__init__(spiking=spiking, alpha=float(gamma))

    @staticmethod
    def slope(x: Tensor, alpha: float) -> Tensor:
        """Return ``alpha * max(0, 1 - |x|)``, elementwise."""
        return alpha * (1.0 - x.abs()).clamp_min(0.0)

    @staticmethod
    def spiking_function(x: Tensor, alpha: float) -> Tensor:
        """Return 1 where ``x >= 0``, else 0; the gradient is :meth:`slope`."""
        return _Linear.apply(x, alpha)

    @staticmethod
    def primitive_function(x: Tensor, alpha: float) -> Tensor:
        """Return the integral of :meth:`slope` up to ``x``: 0 at -1, ``alpha`` at 1."""
        x = x.clamp(-1.0, 1.0)
        return alpha * (0.5 + x - 0.5 * x * x.abs())

    @staticmethod
    def backward(grad_output: Tensor, x: Tensor, alpha: float) -> Tensor:
        """Return the gradient with respect to ``x``, with the signature of SpikingJelly's surrogates."""
        return grad_output * LinearSurrogate.slope(x, alpha)


class KernelForm(NamedTuple):
    """Surrogate in the form of the kernels: ``do/dv = peak * shape(scale * |v - v_threshold|)``.

    ``shape(z)`` is ``max(0, 1 - z)`` for ``"triangle"``, ``1 / (1 + z * z)`` for ``"atan"`` and
    ``4 * s * (1 - s)`` with ``s = sigmoid(z)`` for ``"sigmoid"``; each is 1 at ``z = 0``.
    """

    shape: str
    peak: float
    scale: float


def kernel_form(function: nn.Module, v_threshold: float) -> KernelForm | None:
    """Return the kernels' form of a surrogate, or ``None`` if it has none and plain PyTorch runs."""
    alpha = getattr(function, "alpha", None)
    if not isinstance(alpha, (int, float)) or not getattr(function, "spiking", True):
        return None
    if type(function) is LinearSurrogate:
        return KernelForm("triangle", alpha / v_threshold, 1.0 / v_threshold)
    if type(function) is surrogate.PiecewiseQuadratic:
        return KernelForm("triangle", alpha, alpha)
    if type(function) is surrogate.ATan:
        return KernelForm("atan", alpha / 2, math.pi / 2 * alpha)
    if type(function) is surrogate.Sigmoid:
        return KernelForm("sigmoid", alpha / 4, alpha)
    return None
