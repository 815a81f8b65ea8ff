"""3x3 convolutions behind spiking neurons, whose cost on the CPU follows the spikes.

:class:`Conv2d` runs the operation ``lasnn_sj::convolution``. As in :mod:`.linear`, each of its three products
leaves zeros out if enough of the spikes, or of the gradient, are zero.
"""

from __future__ import annotations

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .linear import SMALLEST, differentiate, may_take
from .op import _operation
from .sparse import nonzero_density
from .sparse_convolution import sparse_convolution, sparse_weight_gradient

# Densities up to which the sparse products take 0.6 to 0.85 of the dense ones' time; pixels below
# which, and weights above which, they would take more.
OUTPUT, WEIGHT = 0.2, 0.3
PIXELS, WEIGHTS = 64, 1 << 14
CHANNELS = 32  # the kernels run this many at a time


@_operation("convolution")
def _convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Return the 3x3 convolution of padding 1 of ``x [N, C, H, W]``, float32 on the CPU; channels last."""
    x = _channels_last(x)
    y = None
    if _density(x) < OUTPUT:
        y = sparse_convolution(x, weight)
    return _channels_last(torch.conv2d(x, weight, None, 1, 1)) if y is None else y


@_convolution.register_fake
def _(x, weight):
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_operation("convolution_backward")
def _convolution_backward(
    g: Tensor, x: Tensor, weight: Tensor, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (channels last) and ``weight``; empty if not needed."""
    g, x = _channels_last(g), _channels_last(x)
    of_g, g_x, g_weight = _density(g), None, None
    if needs_x and of_g < OUTPUT:
        g_x = sparse_convolution(g, weight.flip(2, 3).transpose(0, 1).contiguous())
    if needs_weight and weight.shape[0] * weight.shape[1] <= WEIGHTS:
        of_x = _density(x)
        if of_g < min(of_x, WEIGHT):
            g_weight = sparse_weight_gradient(g, x)
            g_weight = None if g_weight is None else g_weight.flip(1, 2).permute(0, 3, 1, 2)
        elif of_x < WEIGHT:
            g_weight = sparse_weight_gradient(x, g)
            g_weight = None if g_weight is None else g_weight.permute(3, 0, 1, 2)
    dense = [needs_x and g_x is None, needs_weight and g_weight is None, False]
    if any(dense):
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1)
        found = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry, dense)
        g_x, g_weight = (new if wanted else old for new, wanted, old in zip(found, dense, (g_x, g_weight)))
    none = g.new_empty(0)
    return (
        _channels_last(g_x) if needs_x else none,
        torch.empty_like(weight).copy_(g_weight) if needs_weight else none,
    )


@_convolution_backward.register_fake
def _(g, x, weight, needs_x, needs_weight):
    none = g.new_empty(0)
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if needs_x else none,
        torch.empty_like(weight) if needs_weight else none,
    )


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _density(t: Tensor) -> float:
    return nonzero_density(t.permute(0, 2, 3, 1).reshape(len(t), -1))


differentiate(_convolution, _convolution_backward)


class Conv2d(layer.Conv2d):
    """SpikingJelly's convolution, faster on the CPU where spikes or their gradients are mostly zero.

    The result is that of ``layer.Conv2d`` up to the order of its sums. Only 3x3 convolutions of stride 1 and
    padding 1 between multiples of 32 channels leave zeros out; other ones, small ones, and anything but
    float32 on the CPU, run as there.

    Shape:
        - input ``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode
        - output in the same form, channels last
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        work = x.numel() * 9 * self.out_channels
        fits = x.dim() == 4 and x.shape[1] == self.in_channels and x.shape[2] * x.shape[3] >= PIXELS
        if why_dense(self) or not fits or work < SMALLEST or not may_take(x, weight):
            return super()._conv_forward(x, weight, bias)
        y = _convolution(x, weight)
        return y if bias is None else y + bias.view(-1, 1, 1)


def why_dense(conv: nn.Conv2d) -> str | None:
    """Return why no zeros are left out in a convolution; ``None`` if they can be."""
    if conv.padding_mode != "zeros" or conv.groups != 1:
        return f"padding_mode={conv.padding_mode!r} and groups={conv.groups}, not 'zeros' and 1"
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1)):
        names = ("kernel_size", "stride", "padding", "dilation")
        given = ", ".join(f"{name}={value}" for name, value in zip(names, geometry))
        return f"{given}; only 3x3 convolutions of stride, padding and dilation 1 are"
    if conv.in_channels % CHANNELS or conv.out_channels % CHANNELS:
        return f"{conv.in_channels} and {conv.out_channels} channels; only multiples of {CHANNELS} are"
    return None
