"""SpikingJelly nodes over the time-loop operation."""

from __future__ import annotations

import torch
from spikingjelly.activation_based import base, neuron
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_any_global_hook
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .dynamics import Dynamics
from .marks import mark
from .op import time_loop
from .surrogate import LinearSurrogate

State = tuple[object, ...]


def _state_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of potentials: float32 for half-precision inputs too."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _fit_state(v: object, x: Tensor, start: float) -> Tensor:
    """Return the state as a tensor that fits one step ``x``; a new one if the shape has changed."""
    dtype = _state_dtype(x)
    if isinstance(v, Tensor) and v.shape == x.shape:
        return v.to(dtype=dtype, device=x.device)
    return torch.full_like(x, start, dtype=dtype, requires_grad=False)


class TimeLoopNode(neuron.BaseNode):
    """Base class of neuron layers that run over all time steps in one operation.

    Subclasses define a step by :attr:`dynamics`. The nodes work with ``functional.reset_net``,
    ``set_step_mode``, ``store_v_seq`` and ``base.to_functional_forward`` like any SpikingJelly node.

    Threshold and leak are part of ``state_dict`` (as ``_extra_state``), the potential is not.

    Attributes:
        record: names among ``"firing_rate"`` and ``"activation_map"`` that a multi-step forward stores in
            :attr:`recorded`, each ``[N, ...]`` and differentiable.
        through_trace: let the activation map's gradient also flow through the spike trace.
    """

    def __init__(
        self,
        v_threshold: float,
        leak: float,
        v_reset: float | None,
        surrogate_function: nn.Module | None,
        detach_reset: bool,
        step_mode: str,
        store_v_seq: bool,
    ) -> None:
        if surrogate_function is None:
            surrogate_function = LinearSurrogate()
        if not callable(surrogate_function):
            raise TypeError(f"surrogate_function must be a surrogate module, got {surrogate_function!r}")
        super().__init__(
            v_threshold=float(v_threshold),
            v_reset=None if v_reset is None else float(v_reset),
            surrogate_function=surrogate_function,
            detach_reset=bool(detach_reset),
            step_mode=step_mode,
            store_v_seq=store_v_seq,
        )
        self.leak = float(leak)
        self.record: tuple[str, ...] = ()
        self.recorded: dict[str, Tensor] = {}
        self.through_trace = False
        _ = self.dynamics  # raises for a wrong argument here, not in the first forward

    @property
    def dynamics(self) -> Dynamics:
        """Dynamics of a step, from the current threshold and leak."""
        raise NotImplementedError(f"{type(self).__name__} must define dynamics")

    def extra_repr(self) -> str:
        return f"leak={self.leak}, " + super().extra_repr()

    def get_extra_state(self) -> Tensor:
        """Return threshold and leak, so that a saved network keeps its balanced thresholds."""
        return torch.tensor([self.v_threshold, self.leak], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore threshold and leak from :meth:`get_extra_state`."""
        self.v_threshold, self.leak = (float(value) for value in state)

    def materialize_states(self, inputs: tuple[Tensor, ...], states: State, step_mode: str) -> State:
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        return (_fit_state(states[0], x, self.get_reset_value("v")),)

    def single_step_functional_forward(self, inputs, states, *, mask: Tensor | None = None):
        x = inputs[0].unsqueeze(0)
        result = time_loop(x, states[0], self.dynamics, self.surrogate_function, mask=mask)
        return (result.spikes[0],), (result.v,)

    def multi_step_functional_forward(
        self, inputs, states, *, mask: Tensor | None = None, pool: bool = False
    ):
        result = time_loop(
            inputs[0],
            states[0],
            self.dynamics,
            self.surrogate_function,
            mask=mask,
            firing_rate="firing_rate" in self.record,
            activation_map="activation_map" in self.record,
            through_trace=self.through_trace,
            pool=pool,
        )
        if mask is None:
            mark(result.spikes, 0.25 if pool else 1.0)
        self.recorded = {name: getattr(result, name) for name in self.record}
        return (result.spikes,), (result.v,)

    def may_pool(self) -> bool:
        """Return whether a call takes ``pool=True``, and no hook reads the spikes that it leaves out."""
        takes = type(self).multi_step_functional_forward is TimeLoopNode.multi_step_functional_forward
        return takes and self.step_mode == "m" and not self.store_v_seq and not output_is_read(self)

    def reset(self) -> None:
        super().reset()
        self.recorded = {}


def output_is_read(module: nn.Module) -> bool:
    """Return whether hooks read a module's output or its gradient, or operations are being counted.

    A hook whose attribute ``reads_output`` is false does not.
    """
    if module._backward_hooks or module._backward_pre_hooks or has_any_global_hook():
        return True
    if any(getattr(hook, "reads_output", True) for hook in module._forward_hooks.values()):
        return True
    return not torch.compiler.is_compiling() and is_in_torch_dispatch_mode()


class LIFNode(TimeLoopNode):
    """Leaky integrate-and-fire neuron of LaSNN (Eq. 1-2).

    ``v[t] = leak * v[t-1] + x[t] - v_threshold * o[t-1]``, ``o[t] = 1 if v[t] > v_threshold else 0``

    The comparison is strict and the reset subtracts the whole threshold one step later, where
    SpikingJelly's ``LIFNode`` compares with ``>=`` and lets the subtraction leak too. ``node.v`` is
    therefore the potential before its reset.

    Args:
        v_threshold: threshold of the whole layer, above 0.
        leak: factor of the potential per step, in [0, 1]; 1 is no leak.
        surrogate_function: any SpikingJelly surrogate; ``LinearSurrogate(0.3)`` by default.
        detach_reset: stop the gradient through the reset (as Rathi et al.).
        step_mode: ``"s"`` for inputs ``[N, ...]``, ``"m"`` for ``[T, N, ...]``.
        store_v_seq: keep the potentials of all steps in ``v_seq``, ``[T, N, ...]``.

    Shape:
        - input ``[N, ...]`` or ``[T, N, ...]``; float32, bfloat16, float16 (or float64 for checks)
        - output: as the input, 0 or 1; potentials are float32 (float64)
    """

    def __init__(
        self,
        v_threshold: float = 1.0,
        leak: float = 0.99,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = True,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__(v_threshold, leak, None, surrogate_function, detach_reset, step_mode, store_v_seq)

    @property
    def dynamics(self) -> Dynamics:
        """Eq. 1-2 with this layer's threshold and leak."""
        return Dynamics(
            leak=self.leak, v_threshold=self.v_threshold, reset="paper", detach_reset=self.detach_reset
        )


class IFNode(LIFNode):
    """Integrate-and-fire neuron: :class:`LIFNode` without leak, as conversion uses it."""

    def __init__(
        self,
        v_threshold: float = 1.0,
        surrogate_function: nn.Module | None = None,
        detach_reset: bool = True,
        step_mode: str = "s",
        store_v_seq: bool = False,
    ) -> None:
        super().__init__(v_threshold, 1.0, surrogate_function, detach_reset, step_mode, store_v_seq)


class IntegratorNode(base.MemoryModule):
    """Output layer of LaSNN (Eq. 3): ``v[t] = v[t-1] + x[t]``, no leak and no firing.

    Returns the potentials of every step: ``output[-1]`` are the class scores of Eq. 4, ``output[t]`` those
    after ``t + 1`` steps.

    Shape:
        - input ``[N, K]`` or ``[T, N, K]``
        - output: as the input, float32 (float64)
    """

    def __init__(self, step_mode: str = "s") -> None:
        super().__init__()
        self.step_mode = step_mode
        self.register_memory("v", 0.0)

    def materialize_states(self, inputs: tuple[Tensor, ...], states: State, step_mode: str) -> State:
        x = inputs[0][0] if step_mode == "m" else inputs[0]
        return (_fit_state(states[0], x, 0.0),)

    def single_step_functional_forward(self, inputs, states):
        v = states[0] + inputs[0]
        return (v,), (v,)

    def multi_step_functional_forward(self, inputs, states):
        potentials = inputs[0].to(states[0].dtype).cumsum(0) + states[0]
        return (potentials,), (potentials[-1],)
