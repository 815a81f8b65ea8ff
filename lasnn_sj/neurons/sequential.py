"""Layers in order, where a time loop also computes the average pool that follows it."""

from __future__ import annotations

from itertools import pairwise

from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .nodes import TimeLoopNode, output_is_read


class Sequential(nn.Sequential):
    """``nn.Sequential`` that gives a 2x2 average pool to the time loop of the neurons before it.

    The results are the same, bit for bit; the spikes are not written to memory, see
    :func:`~lasnn_sj.neurons.op.time_loop`. Both run by themselves where a hook reads the spikes or the pool's
    output. The layer before the pool must have a method ``may_pool`` and take ``pool=True``, as
    :class:`~lasnn_sj.neurons.TimeLoopNode` does.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Take and return what the layers do."""
        joined = False  # whether the layer before has computed this one
        for module, after in pairwise([*self, None]):
            if joined:
                joined = False
                continue
            joined = _is_plain_pool(after) and hasattr(module, "may_pool") and module.may_pool()
            x = module(x, pool=True) if joined else module(x)
        return x


def join_pools(model: nn.Module) -> None:
    """Make each ``nn.Sequential`` in which a pool follows neurons a :class:`Sequential`, in place."""
    for module in model.modules():
        if type(module) is nn.Sequential and any(
            isinstance(first, TimeLoopNode) and type(second) is layer.AvgPool2d
            for first, second in pairwise(module)
        ):
            module.__class__ = Sequential


def _is_plain_pool(module: nn.Module | None) -> bool:
    """Return whether a module is an average pool of 2x2 pixels that no hook reads."""
    if type(module) is not layer.AvgPool2d or output_is_read(module) or module._forward_pre_hooks:
        return False
    sizes = {2, (2, 2)}
    plain = module.kernel_size in sizes and module.stride in sizes and module.padding in {0, (0, 0)}
    return plain and module.divisor_override is None and module.step_mode == "m"
