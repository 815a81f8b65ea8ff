"""Choice of the layers whose attention maps are compared."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from .taps import TapError

LEVELS = ("low", "middle", "high")


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layer whose attention it imitates.

    Attributes:
        student, teacher: module names.
        size: ``(H, W)`` of the student's layer, to which the teacher's map is resized.
        teacher_size: ``(H, W)`` of the teacher's layer.
        level: ``"low"``, ``"middle"`` or ``"high"``, or a number where the pairs were given.
    """

    student: str
    teacher: str
    size: tuple[int, int]
    teacher_size: tuple[int, int]
    level: str = "high"

    def __str__(self) -> str:
        (h, w), (th, tw) = self.size, self.teacher_size
        resized = "" if self.size == self.teacher_size else ", interpolated"
        return f"{self.level}: {self.student} [{h}x{w}] <- {self.teacher} [{th}x{tw}]{resized}"


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


def _levels(layers: Sequence[_Seen]) -> list[_Seen]:
    """The last layer of each level, of those with at least 4x4 pixels where there are such."""
    large = [entry for entry in layers if min(entry.size) >= 4] or list(layers)
    return [large[index] for index in _three_levels([entry.size for entry in large])]


def _student_levels(student: nn.Module, seen: Iterable[_Seen]) -> list[_Seen]:
    modules = dict(student.named_modules())
    spiking = [e for e in seen if _is_neuron(modules[e.name]) and e.calls == 1]
    if not spiking:
        raise TapError(
            f"{type(student).__name__} has no spiking layer with a feature map [T, N, C, H, W] to tap; "
            f"name the pairs (student module, teacher module) yourself"
        )
    return _levels(spiking)


def _teacher_levels(teacher: nn.Module, seen: Sequence[_Seen]) -> list[_Seen]:
    candidates = [e for e in seen if e.calls == 1 and e.activation]
    if not candidates:  # functional activations: outputs of blocks are those that are not negative
        once = [e for e in seen if e.calls == 1]
        candidates = [e for e in once if e.output is not None and bool((e.output >= 0).all())] or once
    if not candidates:
        raise TapError(
            f"teacher {type(teacher).__name__} has no module with a feature map [N, C, H, W] that runs once; "
            f"name the pairs (student module, teacher module) yourself"
        )
    # The widest layers of a resolution are at the ends of blocks; bottlenecks inside are narrower.
    widest: dict[tuple[int, int], int] = {}
    for entry in candidates:
        widest[entry.size] = max(widest.get(entry.size, 0), entry.output.shape[1])
    return _levels([entry for entry in candidates if entry.output.shape[1] == widest[entry.size]])


def choose_layers(student: nn.Module, encoded: Tensor) -> list[str]:
    """The student's side of :func:`choose_pairs`, for a student without teacher: modules of the levels.

    Raises:
        TapError: the student has no spiking layer with a feature map.
    """
    functional.reset_net(student)
    seen = _probe(student, encoded)
    functional.reset_net(student)
    return [entry.name for entry in _student_levels(student, seen)]


def choose_pairs(
    student: nn.Module,
    teacher: nn.Module,
    encoded: Tensor,
    images: Tensor,
    names: Sequence[tuple[str, str]] | None = None,
) -> list[Pair]:
    """Choose the layers whose attention maps are compared, one pair each at a low, middle and high level.

    The student's spiking layers and the teacher's activations are each cut into three groups by resolution
    and depth; the last layer of a student's group is paired with the last of the same group of the
    teacher. Maps of fewer than 4x4 pixels and layers inside bottlenecks are left out where there are others.
    A network with fewer layers than levels has the upper levels.

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
        return [
            _named_pair(student, teacher, of_student, of_teacher, *pair, level=str(number))
            for number, pair in enumerate(names)
        ]
    mine = _student_levels(student, of_student.values())
    theirs = _teacher_levels(teacher, list(of_teacher.values()))
    count = min(len(mine), len(theirs))
    return [
        Pair(a.name, b.name, a.size, b.size, level)
        for a, b, level in zip(mine[-count:], theirs[-count:], LEVELS[-count:])
    ]


def _named_pair(
    student: nn.Module,
    teacher: nn.Module,
    of_student: dict[str, _Seen],
    of_teacher: dict[str, _Seen],
    student_name: str,
    teacher_name: str,
    level: str,
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
    return Pair(mine.name, theirs.name, mine.size, theirs.size, level)
