"""3x3 convolutions behind spiking neurons, whose cost on the CPU follows the spikes.

:class:`Conv2d` runs the operation ``lasnn_sj::convolution``. As in :mod:`.linear`, each of its three products
leaves zeros out if enough of the spikes, or of the gradient, are zero.
"""

from __future__ import annotations

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .linear import SMALLEST, differentiate, may_take
from .marks import kept_as_bytes
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
    return _convolution_of(x, weight)


def _convolution_of(x: Tensor, weight: Tensor) -> Tensor:
    x, y = _channels_last(x), None
    if _fits(x, weight) and _density(x) < OUTPUT:
        y = sparse_convolution(x, weight)
    return _channels_last(torch.conv2d(x, weight, None, 1, 1)) if y is None else y


@_convolution.register_fake
def _(x, weight):
    shape = (len(x), len(weight), *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@_operation("convolution_input_gradient")
def _input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``x``, the convolution of the output's gradient with the turned weights."""
    return _convolution_of(g, weight.flip(2, 3).transpose(0, 1).contiguous())


@_input_gradient.register_fake
def _(g, weight):
    return g.new_empty(g.shape[0], *g.shape[2:], weight.shape[1]).permute(0, 3, 1, 2)


@_operation("convolution_weight_gradient")
def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``weight``, in its layout."""
    g, x, found = _channels_last(g), _channels_last(x), None
    if _fits(x, weight) and weight.shape[0] * weight.shape[1] <= WEIGHTS:
        of_g, of_x = _density(g), _density(x)
        if of_g < min(of_x, WEIGHT):
            found = sparse_weight_gradient(g, x)
            found = None if found is None else found.flip(1, 2).permute(0, 3, 1, 2)
        elif of_x < WEIGHT:
            found = sparse_weight_gradient(x, g)
            found = None if found is None else found.permute(3, 0, 1, 2)
    if found is None:
        geometry = ([1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False])
        found = torch.ops.aten.convolution_backward(g, x, weight, None, *geometry)[1]
    return torch.empty_like(weight).copy_(found)


@_weight_gradient.register_fake
def _(g, x, weight):
    return torch.empty_like(weight)


def _fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether there are kernels for the channels, and images are large enough."""
    return not (x.shape[1] % CHANNELS or len(weight) % CHANNELS) and x.shape[2] * x.shape[3] >= PIXELS


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _density(t: Tensor) -> float:
    return nonzero_density(t.permute(0, 2, 3, 1).reshape(len(t), -1))


differentiate(_convolution, _input_gradient, _weight_gradient)


class Conv2d(layer.Conv2d):
    """SpikingJelly's convolution, faster on the CPU where spikes or their gradients are mostly zero.

    The result is that of ``layer.Conv2d`` up to the order of its sums. Only 3x3 convolutions of stride 1 and
    padding 1 between multiples of 32 channels leave zeros out; other ones, small ones, and anything but
    float32 on the CPU, run as there. On CUDA large inputs that are spikes are kept as bytes.

    Shape:
        - input ``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode
        - output in the same form, channels last
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution of every image."""
        with kept_as_bytes(x):
            return super().forward(x)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if not self._takes(x, weight):
            return super()._conv_forward(x, weight, bias)
        y = _convolution(x, weight)
        return y if bias is None else y + bias.view(-1, 1, 1)

    def _takes(self, x: Tensor, weight: Tensor) -> bool:
        if _geometry(self) or x.dim() != 4 or x.shape[1] != self.in_channels or not may_take(x, weight):
            return False
        if x.numel() * 9 * self.out_channels < SMALLEST:
            return False
        # the operation's results are channels_last
        return _fits(x, weight) or weight.is_contiguous(memory_format=torch.channels_last)


def why_dense(conv: nn.Conv2d) -> str | None:
    """Return why no zeros are left out in a convolution; ``None`` if they can be."""
    if conv.in_channels % CHANNELS or conv.out_channels % CHANNELS:
        channels = f"{conv.in_channels} and {conv.out_channels} channels"
        return _geometry(conv) or f"{channels}; only multiples of {CHANNELS} are"
    return _geometry(conv)


def _geometry(conv: nn.Conv2d) -> str | None:
    if conv.padding_mode != "zeros" or conv.groups != 1:
        return f"padding_mode={conv.padding_mode!r} and groups={conv.groups}, not 'zeros' and 1"
    geometry = (conv.kernel_size, conv.stride, conv.padding, conv.dilation)
    if geometry != ((3, 3), (1, 1), (1, 1), (1, 1)):
        names = ("kernel_size", "stride", "padding", "dilation")
        given = ", ".join(f"{name}={value}" for name, value in zip(names, geometry))
        return f"{given}; only 3x3 convolutions of stride, padding and dilation 1 are"
    return None
