"""Linear layers behind spiking neurons, whose cost on the CPU follows the spikes.

:class:`Linear` runs the operation ``lasnn_sj::linear``. For each of its three products, forward and
backward, it measures how many spikes or values of the gradient are zero, and leaves zeros out if most are.
"""

from __future__ import annotations

import llvmlite.binding
import torch
from spikingjelly.activation_based import layer
from torch import Tensor
from torch.library import CustomOpDef
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .marks import kept_as_bytes
from .op import _operation
from .packing import pack, unpack
from .sparse import nonzero_density, sparse_product

# The sparse product of a matrix of this density takes 0.8 of the dense one's time if the result is large, and
# as long if it has COLUMNS. The dense matrix is copied in tiles, which takes as long as the product for
# COPYING rows; the nonzero values are listed, which takes long where the result has few columns.
DENSEST, COPYING, COLUMNS = 0.35, 24, 256
TRANSPOSING = 0.1  # density for which the sparse product takes as long as transposing a weight gradient
SMALLEST = 1 << 24  # multiplications; the calls themselves take a large part of less
# MKL, which PyTorch calls, runs at half the speed of oneDNN on AMD's processors. PyTorch has oneDNN's product
# as an operation of its compiler only.
_ONEDNN = llvmlite.binding.get_host_cpu_name().startswith("znver") and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def dense_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b`` by the library that is faster on this processor."""
    if not (_ONEDNN and torch.backends.mkldnn.enabled):
        return a @ b
    return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")


def pays(a: Tensor, b: Tensor, density: float) -> bool:
    """Return whether ``a @ b`` is faster without the zeros of ``a``, which has this density."""
    return density < DENSEST - COPYING / len(a) and b.shape[1] >= COLUMNS


def _product(a: Tensor, b: Tensor, density: float) -> Tensor:
    result = sparse_product(a, b) if pays(a, b, density) else None
    return dense_product(a, b) if result is None else result


@_operation("linear")
def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x @ weight.T`` for ``x [M, K]`` and ``weight [N, K]``, float32 on the CPU."""
    x = x.contiguous()
    return _product(x, weight.t(), nonzero_density(x))


@_linear.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight))


@_operation("linear_input_gradient")
def _input_gradient(g: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``x [M, K]`` from that of the output, ``g [M, N]``."""
    g = g.contiguous()
    return _product(g, weight, nonzero_density(g))


@_input_gradient.register_fake
def _(g, weight):
    return g.new_empty(len(g), weight.shape[1])


@_operation("linear_weight_gradient")
def _weight_gradient(g: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Return the gradient of ``weight [N, K]``."""
    g, x = g.contiguous(), x.contiguous()
    of_g, of_x = nonzero_density(g), nonzero_density(x)
    if of_x + TRANSPOSING < of_g:
        return _product(x.t(), g, of_x).t().contiguous()
    return _product(g.t(), x, of_g)


@_weight_gradient.register_fake
def _(g, x, weight):
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


def differentiate(product: CustomOpDef, input_gradient: CustomOpDef, weight_gradient: CustomOpDef) -> None:
    """Let operations give the gradients of ``product(x, weight)``; ``x`` is kept packed if it can be.

    ``input_gradient(g, weight)`` does not take ``x``, so that it is not unpacked longer than it is needed.
    """

    def keep(ctx, inputs, output) -> None:
        x, weight = inputs
        if not ctx.needs_input_grad[1]:
            ctx.save_for_backward(None, weight)
            return
        packed = pack(x)
        ctx.unit = packed and packed[1]
        ctx.save_for_backward(packed[0] if packed else x, weight)

    def gradients(ctx, g):
        g_x = g_weight = None
        x, weight = ctx.saved_tensors  # once: activation checkpointing allows no more
        if ctx.needs_input_grad[1]:
            g_weight = weight_gradient(g, x if ctx.unit is None else unpack(x, ctx.unit), weight)
        if ctx.needs_input_grad[0]:
            g_x = input_gradient(g, weight)
        return g_x, g_weight

    product.register_autograd(gradients, setup_context=keep)


differentiate(_linear, _input_gradient, _weight_gradient)


class Linear(layer.Linear):
    """SpikingJelly's linear layer, faster on the CPU where spikes or their gradients are mostly zero.

    The result is that of ``layer.Linear`` up to the order of its sums. Small layers, and anything but
    float32 on the CPU, run as there; on CUDA large inputs that are spikes are kept as bytes.

    Shape:
        - input ``[..., in_features]``
        - output ``[..., out_features]``
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.T + bias``."""
        if not self._takes(x):
            with kept_as_bytes(x):
                return super().forward(x)
        y = _linear(x.reshape(-1, self.in_features), self.weight).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _takes(self, x: Tensor) -> bool:
        if x.dim() < 2 or x.shape[-1] != self.in_features or x.numel() * self.out_features < SMALLEST:
            return False
        return may_take(x, self.weight)


def may_take(x: Tensor, weight: Tensor) -> bool:
    """Return whether kernels of this package may compute a layer instead of PyTorch's."""
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in (x, weight)):
        return False
    if torch.is_autocast_enabled("cpu"):
        return False
    # counters of operations must see the ones that they know
    return torch.compiler.is_compiling() or not is_in_torch_dispatch_mode()
