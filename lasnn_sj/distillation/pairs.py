"""Choice of the layers whose attention maps are compared."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from .taps import TapError, TeacherTaps

LEVELS = ("low", "middle", "high")
PREFIX = 8  # most tokens that a transformer has before those of its grid (class, distillation, registers)
# Dimensions of a layer's output behind time: a feature map, one with channels last, tokens behind or before
# their channels.
Form = Literal["NCHW", "NHWC", "NCL", "NLC"]
_SPATIAL = (
    nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d,
    nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip


@dataclass(frozen=True)
class Pair:
    """A student layer and the teacher layer whose attention it imitates.

    Attributes:
        student, teacher: module names.
        size: ``(H, W)`` of the student's layer, to which the teacher's map is resized.
        teacher_size: ``(H, W)`` of the teacher's layer.
        level: ``"low"``, ``"middle"`` or ``"high"``, or a number where the pairs were given.
        form, teacher_form: dimensions of both layers' outputs, see :func:`as_map`.
    """

    student: str
    teacher: str
    size: tuple[int, int]
    teacher_size: tuple[int, int]
    level: str = "high"
    form: Form = "NCHW"
    teacher_form: Form = "NCHW"

    def __str__(self) -> str:
        (h, w), (th, tw) = self.size, self.teacher_size
        resized = "" if self.size == self.teacher_size else ", interpolated"
        return f"{self.level}: {self.student} [{h}x{w}] <- {self.teacher} [{th}x{tw}]{resized}"


def as_map(x: Tensor, size: tuple[int, int], form: Form) -> Tensor:
    """Arrange a layer's output as a feature map.

    Args:
        x: a feature map ``[N, C, H, W]`` or ``[N, H, W, C]``, or a sequence of tokens ``[N, C, L]`` or
            ``[N, L, C]``, whose last ``H * W`` tokens are the grid, row by row.
        size: ``(H, W)``.
        form: which of the four, ``"NCHW"``, ``"NHWC"``, ``"NCL"`` or ``"NLC"``.

    Returns:
        ``[N, C, H, W]``, a view.
    """
    if form == "NHWC":
        return x.permute(0, 3, 1, 2)
    if form == "NLC":
        x = x[:, x.shape[1] - size[0] * size[1] :].transpose(1, 2)
    return x if form == "NCHW" else x.unflatten(-1, size)


def find_module(model: nn.Module, name: str, role: str) -> str:
    """Find the one module of a full name, or of a pattern that matches only one.

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
    form: Form = "NCHW"
    output: Tensor | None = None
    activation: bool = False

    @property
    def channels(self) -> int:
        return self.output.shape[{"NCHW": -3, "NCL": -2}.get(self.form, -1)]


class _Grids:
    """Recognize outputs that are maps, by the sizes of the feature maps before them.

    Outputs of convolutions, pools and the like are feature maps. The output of another layer is one if it has
    the size of one before it, or is no larger than the last in either direction and of similar aspect ratio.
    A sequence of tokens is a map where its length is the number of pixels of a feature map before it; a
    teacher's sequence may begin with some more tokens.

    Args:
        x: the network's input.
        lead: number of dimensions before those of a map: 2 of a student (time and batch), 1 of a teacher.
    """

    def __init__(self, x: Tensor, lead: int) -> None:
        self.lead, self.shape = lead, tuple(x.shape[:lead])
        self.sizes = [tuple(x.shape[-2:])]  # the latest last

    def recognize(self, module: nn.Module, output: object) -> tuple[tuple[int, int] | None, Form]:
        """Return the size of a map, or ``None``, and its form."""
        if not isinstance(output, Tensor):
            return None, "NCHW"
        if isinstance(module, _SPATIAL) and output.dim() >= 4:
            self._add(tuple(output.shape[-2:]))
        dims, student = tuple(output.shape[self.lead :]), self.lead == 2
        if tuple(output.shape[: self.lead]) != self.shape or math.prod(dims[1:]) < 2:
            return None, "NCHW"
        if len(dims) == 3:
            size = dims[1:]
            if not student and size not in self.sizes and dims[:2] in self.sizes:
                return dims[:2], "NHWC"
            if size in self.sizes or self._follows(size):
                self._add(size)
                return size, "NCHW"
        if len(dims) == 2:
            for form, length in (("NCL", dims[1]), ("NLC", dims[0])) if student else (("NLC", dims[0]),):
                for extra in range(1 if student else PREFIX + 1):
                    for size in reversed(self.sizes):
                        if size[0] * size[1] == length - extra:
                            return size, form
        return None, "NCHW"

    def _add(self, size: tuple[int, int]) -> None:
        if size[0] * size[1] > 1:
            self.sizes = [*(other for other in self.sizes if other != size), size]

    def _follows(self, size: tuple[int, int]) -> bool:
        (h, w), (last_h, last_w) = size, self.sizes[-1]
        return h <= last_h and w <= last_w and 0.25 < h * last_w / (w * last_h) < 4


def _probe(model: nn.Module, x: Tensor, lead: int) -> list[_Seen]:
    """Record the modules that return a tensor, in the order in which they finish (the last call counts)."""
    seen: dict[str, _Seen] = {}
    keep: list[Tensor] = []
    activated: set[int] = set()
    grids = _Grids(x, lead)

    def hook_of(name: str):
        def hook(module, args, output):
            entry = seen.pop(name, None) or _Seen(name)
            entry.calls += 1
            entry.size, entry.form = grids.recognize(module, output)
            if isinstance(output, Tensor):
                keep.append(output)  # while it is kept, no other tensor has its id
                if type(module).__module__ == "torch.nn.modules.activation":
                    activated.add(id(output))
                entry.activation = id(output) in activated
                entry.output = output
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
    return [entry for entry in seen.values() if entry.output is not None]


def _is_neuron(module: nn.Module) -> bool:
    return isinstance(module, (neuron.BaseNode, neuron.SimpleBaseNode))


def _three_levels(sizes: Sequence[tuple[int, int]]) -> list[int]:
    """Return the index of the last layer of each level.

    The levels are three contiguous groups, split where the resolution changes if possible, and then as even
    in depth as possible.
    """
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
    """Return the last layer of each level, among layers with at least 4x4 pixels if there are any."""
    large = [entry for entry in layers if min(entry.size) >= 4] or list(layers)
    return [large[index] for index in _three_levels([entry.size for entry in large])]


def _student_levels(student: nn.Module, seen: Iterable[_Seen]) -> list[_Seen]:
    modules = dict(student.named_modules())
    spiking = [e for e in seen if e.size and _is_neuron(modules[e.name]) and e.calls == 1]
    if not spiking:
        raise TapError(
            f"{type(student).__name__} has no spiking layer with a feature map [T, N, C, H, W] or tokens of "
            f"such a map [T, N, C, L]; "
            f"name the pairs (student module, teacher module) yourself"
        )
    return _levels(spiking)


def _teacher_levels(teacher: nn.Module, seen: Sequence[_Seen]) -> list[_Seen]:
    seen = [entry for entry in seen if entry.size]
    blocks = _repeated_blocks(teacher)
    tokens = [e for e in seen if e.calls == 1 and e.name in blocks and e.form in ("NLC", "NHWC")]
    if tokens:
        return _levels(tokens)
    candidates = [e for e in seen if e.calls == 1 and e.activation]
    if not candidates:  # functional activations: outputs of blocks are those that are not negative
        once = [e for e in seen if e.calls == 1]
        candidates = [e for e in once if e.output is not None and bool((e.output >= 0).all())] or once
    if not candidates:
        raise TapError(
            f"teacher {type(teacher).__name__} has no module with a feature map [N, C, H, W], or tokens of "
            f"such a map [N, L, C], that runs once; "
            f"name the pairs (student module, teacher module) yourself"
        )
    # The widest layers of a resolution are at the ends of blocks; bottlenecks inside are narrower.
    widest: dict[tuple[int, int], int] = {}
    for entry in candidates:
        widest[entry.size] = max(widest.get(entry.size, 0), entry.channels)
    return _levels([entry for entry in candidates if entry.channels == widest[entry.size]])


def _repeated_blocks(model: nn.Module) -> set[str]:
    """Return the names of a transformer's repeated blocks: modules in a list with others of their type."""
    names = set()
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            kinds = [type(child) for child in module]
            names |= {
                f"{name}.{key}" if name else key
                for key, child in module.named_children()
                if kinds.count(type(child)) > 1 and any(True for _ in child.children())
            }
    return names


def choose_layers(student: nn.Module, encoded: Tensor) -> list[Pair]:
    """Choose the student's side of :func:`choose_pairs` alone; the pairs have no teacher.

    Raises:
        TapError: the student has no spiking layer whose output is a map.
    """
    functional.reset_net(student)
    seen = _probe(student, encoded, lead=2)
    functional.reset_net(student)
    layers = _student_levels(student, seen)
    return [
        Pair(entry.name, "", entry.size, (0, 0), level, entry.form)
        for entry, level in zip(layers, LEVELS[-len(layers) :])
    ]


def spiking_layer(student: nn.Module, encoded: Tensor, name: str | None = None) -> tuple[str, Form]:
    """Find a layer of the student and the form of its output.

    Args:
        student: spiking network, multi-step.
        encoded: a small encoded batch, ``[T, N, ...]``.
        name: a module or a pattern; the last spiking layer before the last linear layer if not given.

    Raises:
        TapError: no such layer, or one that does not give a sequence once in a forward pass.
    """
    functional.reset_net(student)
    seen = _probe(student, encoded, lead=2)
    functional.reset_net(student)
    modules = dict(student.named_modules())
    if name is not None:
        name = find_module(student, name, "student")
        found = [entry for entry in seen if entry.name == name]
    else:
        linear = [n for n, entry in enumerate(seen) if isinstance(modules[entry.name], nn.Linear)]
        before = seen[: linear[-1]] if linear else seen
        found = [entry for entry in before if _is_neuron(modules[entry.name])]
    if not found or found[-1].calls != 1 or found[-1].output.dim() < 3:
        raise TapError(
            f"{type(student).__name__} has no spiking layer before its last linear layer; give layer="
            if name is None
            else f"student tap '{name}' does not give a sequence [T, N, ...] once in a forward pass"
        )
    return found[-1].name, found[-1].form


def _refuse_swapped(student: nn.Module, teacher: nn.Module, names: Sequence[tuple[str, str]]) -> None:
    own, theirs = ({name for name, _ in net.named_modules()} for net in (student, teacher))
    for mine, other in names:
        if mine not in own and mine in theirs and other not in theirs and other in own:
            raise TapError(
                f"student tap '{mine}' matches no module of {type(student).__name__}; it is one of the "
                f"teacher's: pairs are (student, teacher)"
            )


def choose_pairs(
    student: nn.Module,
    teacher: nn.Module,
    encoded: Tensor,
    images: Tensor,
    names: Sequence[tuple[str, str]] | None = None,
    gradients: bool = False,
) -> list[Pair]:
    """Choose the layers whose attention maps are compared, one pair each at a low, middle and high level.

    The student's spiking layers and the teacher's activations are each cut into three groups by resolution
    and depth; the last layer of a student's group is paired with the last of the same group of the
    teacher. Maps of fewer than 4x4 pixels and layers inside bottlenecks are left out where there are others.
    A network with fewer layers than levels has the upper levels.

    Token sequences, ``[T, N, C, L]`` or ``[T, N, L, C]`` of a spiking transformer and ``[N, L, C]`` of a ViT,
    are maps where ``L`` is the number of pixels of a feature map before them. Of a ViT the outputs of its
    blocks are compared, without class tokens.

    Args:
        student: spiking network, multi-step.
        teacher: any module.
        encoded: a small encoded batch for the student, ``[T, N, C, H, W]``.
        images: the same batch for the teacher, ``[N, C, H, W]``.
        names: ``(student module, teacher module)`` for each pair, instead of the choice above.
        gradients: leave out token layers of the teacher whose map does not influence its scores, such as the
            last block of a ViT that reads the class token alone.

    Raises:
        TapError: a name that matches nothing or two modules, a module without a feature map, or no layer
            to choose.
    """
    functional.reset_net(student)
    of_student = {entry.name: entry for entry in _probe(student, encoded, lead=2)}
    functional.reset_net(student)
    of_teacher = {entry.name: entry for entry in _probe(teacher, images, lead=1)}
    if names is not None:
        _refuse_swapped(student, teacher, names)
        return [
            _named_pair(student, teacher, of_student, of_teacher, *pair, level=str(number))
            for number, pair in enumerate(names)
        ]
    mine = _student_levels(student, of_student.values())
    if gradients:
        idle = _without_gradient(
            teacher, images, [e for e in of_teacher.values() if e.size and e.form == "NLC"]
        )
        of_teacher = {name: entry for name, entry in of_teacher.items() if name not in idle}
    theirs = _teacher_levels(teacher, list(of_teacher.values()))
    count = min(len(mine), len(theirs))
    return [
        Pair(a.name, b.name, a.size, b.size, level, a.form, b.form)
        for a, b, level in zip(mine[-count:], theirs[-count:], LEVELS[-count:])
    ]


def _without_gradient(teacher: nn.Module, images: Tensor, seen: Sequence[_Seen]) -> set[str]:
    """Return the names of the layers whose map does not influence the teacher's scores."""
    names = [entry.name for entry in seen if entry.calls == 1]
    if not names:
        return set()
    taps = TeacherTaps(teacher, names, gradients=True)
    try:
        with taps, torch.enable_grad():
            scores = teacher(images)
            outputs = taps.collect()
            found = torch.autograd.grad(scores.amax(1).sum(), list(outputs.values()), allow_unused=True)
    finally:
        taps.close()
    gradients = dict(zip(outputs, found))
    idle = {
        entry.name
        for entry in seen
        if (g := gradients.get(entry.name)) is None or not as_map(g, entry.size, entry.form).any()
    }
    return idle if len(idle) < len(seen) else set()  # none at all: the scores are constant yet


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
    for role, model, seen, name, lead in (
        ("student", student, of_student, student_name, 2),
        ("teacher", teacher, of_teacher, teacher_name, 1),
    ):
        full = find_module(model, name, role)
        entry = seen.get(full)
        if entry is not None and entry.size is None and entry.output.dim() == lead + 3:
            # given by name, a layer may be larger than those before it
            entry.size, entry.form = tuple(entry.output.shape[-2:]), "NCHW"
        if entry is None or entry.size is None or math.prod(entry.size) < 2:
            got = "no tensor" if entry is None else f"shape {tuple(entry.output.shape)}"
            raise TapError(
                f"{role} tap '{full}' gives no feature map of at least 2 pixels and no tokens of such a map, "
                f"but {got}"
            )
        if entry.calls != 1:
            raise TapError(
                f"{role} tap '{full}' runs {entry.calls} times in a forward pass; name one that runs once"
            )
        found.append(entry)
    mine, theirs = found
    return Pair(mine.name, theirs.name, mine.size, theirs.size, level, mine.form, theirs.form)
