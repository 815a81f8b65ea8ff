"""Run SpikingJelly's own IF and LIF neurons and weights on this package's kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from spikingjelly.activation_based import layer, neuron
from torch import nn

from .convolution import Conv2d, why_dense
from .dynamics import Dynamics
from .linear import Linear
from .nodes import TimeLoopNode
from .sequential import join_pools
from .surrogate import LinearSurrogate, kernel_form

_log = logging.getLogger(__name__)


class _StockNode(TimeLoopNode):
    """Base of both accelerated nodes. Its ``state_dict`` is that of the stock node: empty."""

    leak = 1.0
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def extra_repr(self) -> str:
        return super(TimeLoopNode, self).extra_repr()  # the stock node's own

    def _dynamics(self, gain: float, offset: float) -> Dynamics:
        hard = self.v_reset is not None
        return Dynamics(
            leak=self.leak,
            v_threshold=self.v_threshold,
            reset="hard" if hard else "soft",
            v_reset=self.v_reset if hard else 0.0,
            gain=gain,
            offset=offset,
            detach_reset=self.detach_reset,
        )


class AcceleratedIFNode(_StockNode, neuron.IFNode):
    """SpikingJelly's ``IFNode`` after :func:`accelerate`: the same results from this package's time loop."""

    @property
    def dynamics(self) -> Dynamics:
        """``v[t] = v[t-1] + x[t]``, then SpikingJelly's soft or hard reset."""
        return self._dynamics(gain=1.0, offset=0.0)


class AcceleratedLIFNode(_StockNode, neuron.LIFNode):
    """SpikingJelly's ``LIFNode`` after :func:`accelerate`: the same results from this package's time loop."""

    @property
    def leak(self) -> float:
        """Factor of the potential per step, ``1 - 1 / tau``."""
        return 1.0 - 1.0 / self.tau

    @property
    def dynamics(self) -> Dynamics:
        """``v[t] = v[t-1] + (x[t] - (v[t-1] - v_reset)) / tau`` (``x`` undivided unless decayed)."""
        gain = 1.0 / self.tau if self.decay_input else 1.0
        return self._dynamics(gain, offset=(self.v_reset or 0.0) / self.tau)


ACCELERATED = {neuron.IFNode: AcceleratedIFNode, neuron.LIFNode: AcceleratedLIFNode}
SPARSE = {layer.Linear: Linear, layer.Conv2d: Conv2d}


@dataclass(frozen=True)
class AccelerationReport:
    """Names of the neurons that run on the time loop, and of the others with the reason for each.

    ``sparse`` names the linear layers and convolutions that leave zeros out on the CPU, see
    :class:`~lasnn_sj.neurons.Linear`, and ``dense`` the other ones, with the reason for each.
    """

    accelerated: tuple[str, ...]
    left_alone: dict[str, str]
    sparse: tuple[str, ...] = ()
    dense: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.accelerated)} neurons accelerated, {len(self.left_alone)} left alone"]
        return "\n".join(lines + [f"  {name or '(root)'}: {why}" for name, why in self.left_alone.items()])


def accelerate(model: nn.Module) -> nn.Module:
    """Make SpikingJelly's stock ``IFNode`` and ``LIFNode`` run on the time loop, in place.

    On the CPU, its ``Linear`` and ``Conv2d`` layers leave zeros out where enough spikes or gradients are 0.
    An ``nn.Sequential`` in which a 2x2 average pool follows such a node becomes a
    :class:`~lasnn_sj.neurons.Sequential`.

    Only the class of the objects changes; hooks, state, step mode, training mode and references to them
    stay. Spikes agree to rounding of the potential, gradients to 1/255 of the surrogate's peak. The state is
    float32 for half-precision inputs too. Neurons that are left alone are logged with the reason; see
    :func:`acceleration_report`.

    Args:
        model: a network, or a single neuron.

    Returns:
        The same ``model``.
    """
    for module in model.modules():
        if type(module) in ACCELERATED and _why_not(module) is None:
            module.record, module.recorded, module.through_trace = (), {}, False
            module.__class__ = ACCELERATED[type(module)]
        elif type(module) in SPARSE:
            module.__class__ = SPARSE[type(module)]
    join_pools(model)
    report = acceleration_report(model)
    _log.log(logging.WARNING if report.left_alone else logging.INFO, "%s", report)
    return model


def acceleration_report(model: nn.Module) -> AccelerationReport:
    """Report which of a model's neurons run on the time loop, and why the others do not."""
    neurons = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode))
    }
    weights = {
        name: _why_dense(module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd))
    }
    return AccelerationReport(
        tuple(name for name, module in neurons.items() if isinstance(module, TimeLoopNode)),
        {
            name: _why_not(module) or "accelerate(model) has not been called on it"
            for name, module in neurons.items()
            if not isinstance(module, TimeLoopNode)
        },
        tuple(name for name, why in weights.items() if why is None),
        {name: why for name, why in weights.items() if why is not None},
    )


def _why_dense(module: nn.Module) -> str | None:
    if isinstance(module, (Linear, Conv2d)):
        return why_dense(module) if isinstance(module, Conv2d) else None
    kind = type(module)
    if kind in SPARSE:
        return "accelerate(model) has not been called on it"
    return f"{kind.__name__} is neither SpikingJelly's Linear nor its Conv2d (subclasses may differ)"


def _why_not(node: nn.Module) -> str | None:
    kind = type(node)
    if kind not in ACCELERATED:
        return f"{kind.__name__} is neither SpikingJelly's IFNode nor its LIFNode (subclasses may differ)"
    if node._neuron_precision is not None:
        return "its precision was set explicitly"
    if not node.v_threshold > 0:
        return f"v_threshold {node.v_threshold} is not above 0"
    surrogate = node.surrogate_function
    if kernel_form(surrogate, node.v_threshold) is None:
        return f"surrogate {type(surrogate).__name__} has no kernel form"
    if isinstance(surrogate, LinearSurrogate) and node.v_threshold != 1:
        return "a stock node does not divide LinearSurrogate's argument by the threshold, ours does"
    return None
