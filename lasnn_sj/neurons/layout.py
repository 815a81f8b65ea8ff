"""Memory layouts: sequences ``[T, N, ...]`` whose steps are blocks of memory without gaps."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def use_channels_last(network: nn.Module) -> None:
    """Store weights of convolutions in channels_last, in which convolutions and pooling loops are faster.

    ``Module.to`` does so too, but refuses a tensor of five dimensions.
    """
    for tensor in itertools.chain(network.parameters(), network.buffers()):
        if not is_lazy(tensor) and tensor.dim() == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def is_gapless(t: Tensor) -> bool:
    """Return whether ``t`` fills one block of memory, each element once, its dimensions in any order."""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def is_time_major(x: Tensor) -> bool:
    """Return whether each step ``x[t]`` is gapless and the steps follow each other or are all the same."""
    if x.is_contiguous() or x.numel() == 0:
        return True
    far_enough = x.shape[0] == 1 or x.stride(0) == 0 or x.stride(0) >= x[0].numel()
    return far_enough and is_gapless(x[0])


def empty_sequence(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a sequence of ``x.shape`` without gaps, every step in the memory order of a step of ``x``."""
    step = x[0]
    return torch.empty_strided(x.shape, (step.numel(), *step.stride()), dtype=dtype, device=x.device)


def can_pool(x: Tensor) -> bool:
    """Return whether the time loop can average 2x2 pixels of ``x``: channels_last steps ``[N, C, H, W]``."""
    if x.dim() != 5 or x.numel() == 0:
        return False
    _, _, C, H, W = x.shape
    together = 16 if x.device.type == "cpu" else 1  # channels that the kernels run together
    return C % together == H % 2 == W % 2 == 0 and x[0].is_contiguous(memory_format=torch.channels_last)


def empty_pooled(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Allocate a sequence for averages of 2x2 pixels of ``x [T, N, C, H, W]``, every step channels_last."""
    T, N, C, H, W = x.shape
    return x.new_empty((T, N, H // 2, W // 2, C), dtype=dtype).permute(0, 1, 4, 2, 3)
