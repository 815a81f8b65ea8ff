"""Batch norm over the samples of all processes, as one process has it over the whole batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from ..runtime import distributed


def has_batch_norm(net: nn.Module) -> bool:
    """Return whether a network has batch norm."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())


class SyncedBatchNorm(TorchFunctionMode):
    """Within it batch norm in training mode has the mean and variance of all processes' samples.

    All processes must run the same layers. ``torch.nn.SyncBatchNorm`` runs on accelerators alone and replaces
    the modules of a network; this one runs everywhere and leaves them as they are.

    Args:
        counts: whether this process' samples are part of the step; if not, they are normalised alike.
    """

    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return _batch_norm(*args, **(kwargs or {}), counts=self.counts)
        return func(*args, **(kwargs or {}))


def _batch_norm(
    input: Tensor,  # named as in torch.nn.functional.batch_norm
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    counts: bool,
) -> Tensor:
    if not training:
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    with torch.no_grad():
        mean, var, count = _statistics(input, counts)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = var * (count / (count - 1).clamp(min=1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
    return _Normalise.apply(input, weight, bias, mean, var, count, eps, counts)


def _statistics(x: Tensor, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance ``[C]`` and number of values per channel, over all processes."""
    dims = [dim for dim in range(x.dim()) if dim != 1]
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    var, mean = torch.var_mean(x, dims, correction=0)
    count = torch.full_like(mean, x.numel() / x.shape[1] if counts else 0.0)
    own = torch.stack([mean, var, count])
    every = [torch.empty_like(own) for _ in range(distributed.world_size())]
    dist.all_gather(every, own)
    means, variances, count = torch.stack(every, 1)  # [processes, C] each
    shares = count / count.sum(0)
    mean = (shares * means).sum(0)
    return mean, (shares * (variances + (means - mean).square())).sum(0), count.sum(0)


class _Normalise(torch.autograd.Function):
    """``(x - mean) / sqrt(var + eps) * weight + bias``; mean and variance depend on all processes' x."""

    @staticmethod
    def forward(ctx, x, weight, bias, mean, var, count, eps, counts):
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count)
        ctx.counts, ctx.has_bias = counts, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        x, weight, mean, inverse, count = ctx.saved_tensors
        dims, shape = [dim for dim in range(x.dim()) if dim != 1], [1, -1, *[1] * (x.dim() - 2)]
        normal = (x.to(mean.dtype) - mean.view(shape)) * inverse.view(shape)
        gradient = gradient.to(mean.dtype)
        sums = torch.stack([gradient.sum(dims), (gradient * normal).sum(dims)])
        own_bias, own_weight = sums.clone()
        if ctx.counts:
            of_bias, of_weight = distributed.total(sums) / count
            through = gradient - of_bias.view(shape) - normal * of_weight.view(shape)
        else:  # mean and variance do not depend on these samples
            distributed.total(sums)
            through = gradient
        scale = inverse if weight is None else inverse * weight
        dx = (through * scale.view(shape)).to(x.dtype)
        return (
            dx,
            None if weight is None else own_weight.to(weight.dtype),
            own_bias if ctx.has_bias else None,
            *[None] * 5,
        )
