"""Taps: forward hooks that read layers of student and teacher for an objective."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..neurons import TimeLoopNode
from ..neurons.dynamics import TRACE_DECAY, decay_trace
from .objective import Reading


class TapError(ValueError):
    """A tap cannot be set or did not fire once; the message names it."""


class _Taps:
    """Forward hooks that read while the object is entered, and must then fire once each.

    Used as a context manager around one forward pass; outside it they cost nothing.
    """

    role: str

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._names = list(dict.fromkeys(names))
        self._active = False
        self._values: dict[str, list] = {}
        self._hooks = [
            model.get_submodule(name).register_forward_hook(self._hook(name)) for name in self._names
        ]

    def _hook(self, name: str):
        def hook(module, args, output):
            if not self._active:
                return None
            value, output = self.read(name, module, output)
            self._values.setdefault(name, []).append(value)
            return output

        hook.reads_output = self.reads_output(name)
        return hook

    def reads_output(self, name: str) -> bool:
        """Return whether a module's output is needed, and not only what it records."""
        return True

    def read(self, name: str, module: nn.Module, output: Tensor) -> tuple[object, Tensor | None]:
        """Return the value to keep of a module's output, and the output to pass on."""
        raise NotImplementedError

    def __enter__(self) -> _Taps:
        self._active, self._values = True, {}
        return self

    def __exit__(self, *exception) -> None:
        self._active = False

    def _read_once(self) -> dict[str, object]:
        """Return the values by name that were read since entering.

        Raises:
            TapError: a tap fired other than once.
        """
        values, self._values = self._values, {}
        for name in self._names:
            fired = len(values.get(name, ()))
            if fired != 1:
                raise TapError(
                    f"{self.role} tap '{name}' fired {fired} times in a forward pass, it must fire once "
                    f"(layers inside activation checkpointing do not)"
                )
        return {name: values[name][0] for name in self._names}

    def close(self) -> None:
        """Remove the taps."""
        for hook in self._hooks:
            hook.remove()


class StudentTaps(_Taps):
    """Read firing rates, spike activation maps or outputs of a student's layers.

    Nodes of this package compute rates and maps inside their time loop; those of other layers are computed
    from their outputs.

    Args:
        student: the network.
        wanted: ``(module name, reading)``; see :class:`~lasnn_sj.distillation.Needs`.
        through_trace: let the activation map's gradient also flow through the spike trace.
    """

    role = "student"

    def __init__(
        self, student: nn.Module, wanted: Sequence[tuple[str, Reading]], through_trace: bool = False
    ) -> None:
        self.wanted, self.through_trace = list(dict.fromkeys(wanted)), through_trace
        self._readings = {
            name: tuple(reading for other, reading in self.wanted if other == name) for name, _ in self.wanted
        }
        modules = {name: student.get_submodule(name) for name in self._readings}
        self._nodes = {name: m for name, m in modules.items() if isinstance(m, TimeLoopNode)}
        self._before: list[tuple[tuple[str, ...], bool]] = []
        super().__init__(student, list(self._readings))

    def reads_output(self, name: str) -> bool:
        """Return whether spikes are wanted, or the module is no node that records the readings."""
        return name not in self._nodes or "spikes" in self._readings[name]

    def read(self, name: str, module: nn.Module, output: Tensor) -> tuple[dict[str, Tensor], None]:
        """Return the readings of a module, by name."""
        recorded = getattr(module, "recorded", {})
        return {
            reading: recorded[reading] if reading in recorded else self._compute(name, reading, output)
            for reading in self._readings[name]
        }, None

    def _compute(self, name: str, reading: Reading, output: Tensor) -> Tensor:
        if reading == "spikes":
            return output
        if not isinstance(output, Tensor) or output.dim() < 3:
            got = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise TapError(f"student tap '{name}' gave {got}, not a sequence [T, N, ...]")
        if reading == "activation_map":
            return trace_map(output, self.through_trace)
        return output.mean(0, dtype=torch.promote_types(output.dtype, torch.float32))

    def __enter__(self) -> StudentTaps:
        self._before = [(node.record, node.through_trace) for node in self._nodes.values()]
        for name, node in self._nodes.items():
            node.record = tuple(r for r in self._readings[name] if r != "spikes")
            node.through_trace = self.through_trace
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for node, (record, through_trace) in zip(self._nodes.values(), self._before):
            node.record, node.recorded, node.through_trace = record, {}, through_trace

    def collect(self) -> list[Tensor]:
        """Return the values read since entering, in the order of ``wanted``.

        Raises:
            TapError: a tap fired other than once.
        """
        found = self._read_once()
        return [found[name][reading] for name, reading in self.wanted]


class ChunkTaps(StudentTaps):
    """Student taps for a sequence that is run in pieces of time.

    Spike activation maps (Eq. 11) go on from the spike trace of the piece before: with the trace ``n`` at
    the piece's start, the map of its ``S`` steps grows by ``n * sum over t of exp(-t) * o[t]``, and the
    trace at its end is ``exp(-S) * n + sum over t of exp(-(S - t)) * o[t]``.
    """

    def __init__(
        self, student: nn.Module, wanted: Sequence[tuple[str, Reading]], through_trace: bool = False
    ) -> None:
        super().__init__(student, wanted, through_trace)
        if any(reading == "spikes" for _, reading in self.wanted):
            raise TapError("an objective reads whole spike sequences, which needs time_chunks=1")
        mapped = [name for name, readings in self._readings.items() if "activation_map" in readings]
        self._places = {name: place for place, name in enumerate(mapped)}
        self.traces: list[Tensor | None] = []
        self._masks: dict[nn.Module, Tensor | None] = {}
        self._hooks += [
            self._nodes[name].register_forward_pre_hook(self._take_mask, with_kwargs=True)
            for name in mapped
            if name in self._nodes
        ]

    def reads_output(self, name: str) -> bool:
        """Return whether the module's spikes are needed to go on with a trace."""
        return "activation_map" in self._readings[name] or super().reads_output(name)

    def no_traces(self) -> list[None]:
        """Return the traces before the first piece."""
        return [None] * len(self._places)

    def _take_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Keep the dropout mask from the node: the trace needs the spikes before dropout."""
        if not self._active:
            return None
        self._masks[module] = kwargs.pop("mask", None)
        return args, kwargs

    def read(self, name: str, module: nn.Module, output: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return the mean readings of a piece, and the output times its dropout mask."""
        values, _ = super().read(name, module, output)
        mask = self._masks.pop(module, None)
        if name not in self._places:
            return values, output
        place, value = self._places[name], values["activation_map"]
        with torch.autocast(output.device.type, enabled=False):  # einsum would be cast to half precision
            spikes = output.to(value.dtype)
            steps = torch.arange(len(output), device=output.device, dtype=value.dtype)
            trace = self.traces[place]
            if trace is not None:
                decayed = torch.einsum("t,t...->...", TRACE_DECAY**steps, spikes)
                values["activation_map"] = value + trace * decayed / len(output)
            kept = spikes if self.through_trace else spikes.detach()
            late = torch.einsum("t,t...->...", TRACE_DECAY ** (len(output) - steps), kept)
        self.traces = [*self.traces]
        self.traces[place] = late if trace is None else late + TRACE_DECAY ** len(output) * trace
        return values, output if mask is None else output * mask


class TeacherTaps(_Taps):
    """Read outputs of a teacher's layers.

    Args:
        teacher: the network.
        names: modules to tap.
        gradients: keep the graph from the first tap on, so that a loss can be differentiated with respect
            to the outputs though no weight requires a gradient.
    """

    role = "teacher"

    def __init__(self, teacher: nn.Module, names: Sequence[str], gradients: bool = False) -> None:
        self.gradients = gradients
        super().__init__(teacher, names)

    def read(self, name: str, module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output; a copy is passed on, which a later in-place layer may overwrite."""
        if self.gradients and not output.requires_grad:
            output = output.detach().requires_grad_()
        return output, output.clone()

    def collect(self) -> dict[str, Tensor]:
        """Return the outputs read since entering, by module name.

        Raises:
            TapError: a tap fired other than once.
        """
        return self._read_once()


def trace_map(spikes: Tensor, through_trace: bool = False) -> Tensor:
    """Compute the mean over time of ``N[t] * o[t]`` for each neuron (Eq. 11), from the spikes of all steps.

    Args:
        spikes: ``[T, N, ...]``.
        through_trace: let the gradient also flow through ``N``.

    Returns:
        ``[N, ...]``, float32 (float64 for float64 spikes).
    """
    spikes = spikes.to(torch.promote_types(spikes.dtype, torch.float32))
    total = trace = torch.zeros_like(spikes[0])
    for o in spikes:
        total = total + trace * o
        trace = decay_trace(trace, o if through_trace else o.detach())
    return total / len(spikes)
