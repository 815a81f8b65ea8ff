"""Taps: what an objective wants to see of student and teacher while both run."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from ..neurons import TimeLoopNode
from ..neurons.dynamics import TRACE_DECAY


class TapError(ValueError):
    """A tap cannot be set or did not fire once; the message names it."""


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layer that it is to imitate.

    Attributes:
        student, teacher: module names.
        size: ``(H, W)`` of the student's layer, to which the teacher's map is resized.
        teacher_size: ``(H, W)`` of the teacher's layer.
    """

    student: str
    teacher: str
    size: tuple[int, int]
    teacher_size: tuple[int, int]

    def __str__(self) -> str:
        (h, w), (th, tw) = self.size, self.teacher_size
        resized = "" if self.size == self.teacher_size else ", interpolated"
        return f"{self.student} [{h}x{w}] <- {self.teacher} [{th}x{tw}]{resized}"


def find_module(model: nn.Module, name: str, role: str) -> str:
    """The one module that ``name`` means: its full name, or a pattern that fits just it.

    In a pattern ``*`` and ``?`` stand for characters between two dots, as in ``features.*.neuron``.

    Raises:
        TapError: no module or more than one.
    """
    names = [n for n, _ in model.named_modules() if n]
    if name in names:
        return name
    parts = name.split(".")
    found = [
        n
        for n in names
        if len(n.split(".")) == len(parts) and all(map(fnmatch.fnmatchcase, n.split("."), parts))
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise TapError(
            f"{role} tap '{name}' matches {len(found)} modules ({', '.join(found[:4])}"
            f"{', ...' * (len(found) > 4)}); name one"
        )
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.4) or names[:6]
    raise TapError(
        f"{role} tap '{name}' matches no module of {type(model).__name__}; near: {', '.join(near)}"
    )


@dataclass
class _Seen:
    """A module's calls during a probe."""

    name: str
    calls: int = 0
    size: tuple[int, int] | None = None
    output: Tensor | None = None
    activation: bool = False


def _probe(model: nn.Module, x: Tensor) -> list[_Seen]:
    """Modules with a feature map as output, in the order in which they finish (the last call counts)."""
    seen: dict[str, _Seen] = {}
    keep: list[Tensor] = []
    activated: set[int] = set()

    def hook_of(name: str):
        def hook(module, args, output):
            entry = seen.pop(name, None) or _Seen(name)
            entry.calls += 1
            if isinstance(output, Tensor) and output.dim() >= 4:
                keep.append(output)  # while it is kept, no other tensor has its id
                if type(module).__module__ == "torch.nn.modules.activation":
                    activated.add(id(output))
                entry.activation = id(output) in activated
                entry.size = tuple(output.shape[-2:])
                entry.output = output
                if all(s == 1 for s in entry.size):
                    entry.size = None
            seen[name] = entry

        return hook

    hooks = [m.register_forward_hook(hook_of(n)) for n, m in model.named_modules() if n]
    training = {m: m.training for m in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in training.items():
            module.training = mode
    return [entry for entry in seen.values() if entry.size is not None]


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode))


def _three_levels(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Index of the last layer of each level: three contiguous groups, cut where the resolution changes
    if it can be, and then as even in depth as possible."""
    n = len(sizes)
    if n <= 3:
        return list(range(n))

    def badness(cuts: tuple[int, int]) -> tuple[int, int]:
        inside = sum(sizes[c] == sizes[c - 1] for c in cuts)
        lengths = (cuts[0], cuts[1] - cuts[0], n - cuts[1])
        return inside, sum(length * length for length in lengths)

    cuts = min(((a, b) for a in range(1, n - 1) for b in range(a + 1, n)), key=badness)
    return [cuts[0] - 1, cuts[1] - 1, n - 1]


def _levels(student: nn.Module, seen: Iterable[_Seen]) -> list[_Seen]:
    modules = dict(student.named_modules())
    spiking = [e for e in seen if _is_neuron(modules[e.name]) and e.calls == 1]
    if not spiking:
        raise TapError(
            f"{type(student).__name__} has no spiking layer with a feature map [T, N, C, H, W] to tap; "
            f"name the pairs (student module, teacher module) yourself"
        )
    return [spiking[index] for index in _three_levels([e.size for e in spiking])]


def choose_layers(student: nn.Module, encoded: Tensor) -> list[str]:
    """The student's side of :func:`choose_pairs`, for a student without teacher: modules of the levels.

    Raises:
        TapError: the student has no spiking layer with a feature map.
    """
    functional.reset_net(student)
    seen = _probe(student, encoded)
    functional.reset_net(student)
    return [entry.name for entry in _levels(student, seen)]


def choose_pairs(
    student: nn.Module,
    teacher: nn.Module,
    encoded: Tensor,
    images: Tensor,
    names: Sequence[tuple[str, str]] | None = None,
) -> list[Pair]:
    """Pairs of layers whose attention maps are compared, one each at a low, middle and high level.

    The student's spiking convolutional layers are cut into three groups by resolution and depth; the last
    of each is paired with the teacher's last activation of the same resolution, else of the nearest.

    Args:
        student: spiking network, multi-step.
        teacher: any module.
        encoded: a small encoded batch for the student, ``[T, N, C, H, W]``.
        images: the same batch for the teacher, ``[N, C, H, W]``.
        names: ``(student module, teacher module)`` for each pair, instead of the choice above.

    Raises:
        TapError: a name that matches nothing or two modules, a module without a feature map, or no layer
            to choose.
    """
    functional.reset_net(student)
    of_student = {entry.name: entry for entry in _probe(student, encoded)}
    functional.reset_net(student)
    of_teacher = {entry.name: entry for entry in _probe(teacher, images)}
    if names is not None:
        return [_named_pair(student, teacher, of_student, of_teacher, *pair) for pair in names]
    levels = _levels(student, of_student.values())
    candidates = [e for e in of_teacher.values() if e.calls == 1 and e.activation]
    if not candidates:  # a teacher with functional activations: what its blocks give out is not negative
        once = [e for e in of_teacher.values() if e.calls == 1]
        candidates = [e for e in once if e.output is not None and bool((e.output >= 0).all())] or once
    if not candidates:
        raise TapError(
            f"teacher {type(teacher).__name__} has no module with a feature map [N, C, H, W] that runs once; "
            f"name the pairs (student module, teacher module) yourself"
        )
    pairs = []
    for mine in levels:

        def distance(entry: _Seen, mine: _Seen = mine) -> float:
            return abs(math.log(entry.size[0] * entry.size[1] / (mine.size[0] * mine.size[1])))

        # min keeps the first of equals: the last activation, as they come in reversed
        theirs = min(reversed(candidates), key=distance)
        pairs.append(Pair(mine.name, theirs.name, mine.size, theirs.size))
    return pairs


def _named_pair(
    student: nn.Module,
    teacher: nn.Module,
    of_student: dict[str, _Seen],
    of_teacher: dict[str, _Seen],
    student_name: str,
    teacher_name: str,
) -> Pair:
    found = []
    for role, model, seen, name in (
        ("student", student, of_student, student_name),
        ("teacher", teacher, of_teacher, teacher_name),
    ):
        full = find_module(model, name, role)
        entry = seen.get(full)
        if entry is None:
            raise TapError(f"{role} tap '{full}' gives no feature map of at least 2 pixels in a forward pass")
        if entry.calls != 1:
            raise TapError(
                f"{role} tap '{full}' runs {entry.calls} times in a forward pass; name one that runs once"
            )
        found.append(entry)
    mine, theirs = found
    return Pair(mine.name, theirs.name, mine.size, theirs.size)


class _Taps:
    """Forward hooks that read while the object is entered, and must then fire once each.

    Used as a context manager around one forward pass; outside it they cost nothing.
    """

    role: str

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._names = list(names)
        self._active = False
        self._values: dict[str, list[Tensor]] = {}
        self._hooks = [
            model.get_submodule(name).register_forward_hook(self._hook(name)) for name in dict.fromkeys(names)
        ]

    def _hook(self, name: str):
        def hook(module, args, output):
            if not self._active:
                return None
            value, output = self.read(module, output)
            self._values.setdefault(name, []).append(value)
            return output

        return hook

    def read(self, module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """What to keep of a module's output, and what to hand on in its place."""
        raise NotImplementedError

    def __enter__(self) -> _Taps:
        self._active, self._values = True, {}
        return self

    def __exit__(self, *exception) -> None:
        self._active = False

    def collect(self) -> list[Tensor]:
        """What was read since entering, ``[N, C, H, W]`` for each name.

        Raises:
            TapError: a tap fired other than once, or what it read is no feature map.
        """
        values, self._values = self._values, {}
        for name in self._names:
            fired = len(values.get(name, ()))
            if fired != 1:
                raise TapError(
                    f"{self.role} tap '{name}' fired {fired} times in a forward pass, it must fire once "
                    f"(layers inside activation checkpointing do not)"
                )
            shape = tuple(values[name][0].shape)
            if len(shape) != 4:
                raise TapError(f"{self.role} tap '{name}' gave shape {shape}, not [N, C, H, W]")
        return [values[name][0] for name in self._names]

    def close(self) -> None:
        """Remove the taps."""
        for hook in self._hooks:
            hook.remove()


class StudentTaps(_Taps):
    """Reads firing rates or spike activation maps of a student's layers.

    Nodes of this package compute them inside their time loop; of any other layer the rate is the mean of
    its output over time.

    Args:
        student: the network.
        names: modules to tap.
        what: ``"firing_rate"`` or ``"activation_map"``.
        through_trace: let the activation map's gradient also flow through the spike trace.
    """

    role = "student"

    def __init__(
        self, student: nn.Module, names: Sequence[str], what: str, through_trace: bool = False
    ) -> None:
        self.what, self.through_trace = what, through_trace
        modules = {name: student.get_submodule(name) for name in names}
        self._nodes = [m for m in modules.values() if isinstance(m, TimeLoopNode)]
        self._before: list[tuple[tuple[str, ...], bool]] = []
        for name, module in modules.items():
            if what == "activation_map" and not isinstance(module, TimeLoopNode):
                raise TapError(
                    f"student tap '{name}' ({type(module).__name__}) cannot record an activation map; tap a "
                    f'neuron of lasnn_sj.neurons, or use attention="activation"'
                )
        super().__init__(student, names)

    def read(self, module: nn.Module, output: Tensor) -> tuple[Tensor, None]:
        """The map that the node has recorded, else the mean of the output over time."""
        recorded = getattr(module, "recorded", {})
        if self.what in recorded:
            return recorded[self.what], None
        return output.mean(0, dtype=torch.promote_types(output.dtype, torch.float32)), None

    def __enter__(self) -> StudentTaps:
        self._before = [(node.record, node.through_trace) for node in self._nodes]
        for node in self._nodes:
            node.record, node.through_trace = (self.what,), self.through_trace
        return super().__enter__()

    def __exit__(self, *exception) -> None:
        super().__exit__(*exception)
        for node, (record, through_trace) in zip(self._nodes, self._before):
            node.record, node.recorded, node.through_trace = record, {}, through_trace


class ChunkTaps(StudentTaps):
    """Spike activation maps (Eq. 11) of a piece of time, going on from the spike trace of the one before.

    With the trace ``n`` at the piece's start, the map of its ``S`` steps grows by ``n * sum over t of
    exp(-t) * o[t]``, and the trace at its end is ``exp(-S) * n + sum over t of exp(-(S - t)) * o[t]``.
    """

    def __init__(self, student: nn.Module, names: list[str], through_trace: bool) -> None:
        super().__init__(student, names, "activation_map", through_trace)
        self.traces: list[Tensor | None] = []
        self._places = {student.get_submodule(name): place for place, name in enumerate(names)}
        self._masks: dict[nn.Module, Tensor | None] = {}
        self._hooks += [
            node.register_forward_pre_hook(self._take_mask, with_kwargs=True) for node in self._places
        ]

    def no_traces(self) -> list[None]:
        """The traces before the first piece."""
        return [None] * len(self._names)

    def _take_mask(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The trace wants spikes as they were before dropout."""
        if not self._active:
            return None
        self._masks[module] = kwargs.pop("mask", None)
        return args, kwargs

    def read(self, module: TimeLoopNode, output: Tensor) -> tuple[Tensor, Tensor]:
        """The piece's mean map, and the output times its dropout mask."""
        value, _ = super().read(module, output)
        place, mask = self._places[module], self._masks.pop(module, None)
        with torch.autocast(output.device.type, enabled=False):  # einsum would be cast to half precision
            spikes = output.to(value.dtype)
            steps = torch.arange(len(output), device=output.device, dtype=value.dtype)
            trace = self.traces[place]
            if trace is not None:
                decayed = torch.einsum("t,t...->...", TRACE_DECAY**steps, spikes)
                value = value + trace * decayed / len(output)
            kept = spikes if self.through_trace else spikes.detach()
            late = torch.einsum("t,t...->...", TRACE_DECAY ** (len(output) - steps), kept)
        self.traces = [*self.traces]
        self.traces[place] = late if trace is None else late + TRACE_DECAY ** len(output) * trace
        return value, output if mask is None else output * mask


class TeacherTaps(_Taps):
    """Reads activations of a teacher's layers.

    Args:
        teacher: the network.
        names: modules to tap.
        gradients: keep the graph from the first tap on, so that a loss can be differentiated with respect
            to the activations though no weight wants a gradient.
    """

    role = "teacher"

    def __init__(self, teacher: nn.Module, names: Sequence[str], gradients: bool = False) -> None:
        self.gradients = gradients
        super().__init__(teacher, names)

    def read(self, module: nn.Module, output: Tensor) -> tuple[Tensor, Tensor]:
        """The output; what is handed on is a copy, which an in-place layer behind may overwrite."""
        if self.gradients and not output.requires_grad:
            output = output.detach().requires_grad_()
        return output, output.clone()
