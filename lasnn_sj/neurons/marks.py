"""Spikes that weight layers keep as bytes on CUDA, from the forward to the backward pass.

There looking at values would stall the device. So neurons mark their spikes as multiples of a number, and a
weight layer that takes this very tensor keeps a byte for each value instead of a float, without loss. On the
CPU, where any input is looked at, :mod:`.packing` does so.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

DEVICE = "cuda"
SMALLEST = 8 << 20  # bytes of an input below which it is kept as it is


def mark(spikes: Tensor, unit: float | Tensor) -> None:
    """Note that all values are 0 to 4 times a number, for the weight layer that takes this very tensor.

    Args:
        spikes: result of neurons.
        unit: 1, or 0.25 of averages, or a dropout mask, whose values are 0 and the number.
    """
    if spikes.device.type == DEVICE and spikes.requires_grad and not torch.compiler.is_compiling():
        spikes._multiples = (unit, spikes._version)


def kept_as_bytes(x: Tensor) -> AbstractContextManager:
    """Context in which autograd keeps a weight layer's input as bytes, if it is marked and large."""
    unit, version = getattr(x, "_multiples", (None, None))
    # a changed version: the values have been changed in place since
    if unit is None or version != x._version or x.nbytes < SMALLEST or torch.compiler.is_compiling():
        return nullcontext()
    storage, size, dtype = x.untyped_storage()._cdata, x.numel(), x.dtype  # not x, which is to be freed
    averages = unit == 0.25 if isinstance(unit, float) else False
    unit = unit.amax().to(dtype) if isinstance(unit, Tensor) else unit

    def keep(t: Tensor) -> Tensor | tuple[Tensor]:
        if (t.untyped_storage()._cdata, t.numel(), t.dtype) != (storage, size, dtype):
            return t  # the weight
        return ((4 * t).to(torch.uint8) if averages else t != 0,)

    def restore(kept: Tensor | tuple[Tensor]) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        (codes,) = kept
        return codes.to(dtype) * unit

    return saved_tensors_hooks(keep, restore)
