"""The objective: one concept for every method of distillation, and sums of objectives."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

Reading = Literal["firing_rate", "activation_map", "spikes"]
Schedule = Literal["constant", "linear", "exponential", "cosine"] | Callable[[float], float]


@dataclass(frozen=True)
class Look:
    """A small batch and the networks' outputs for it, for :meth:`Objective.prepare`.

    Attributes:
        student: the network that is trained, in evaluation mode.
        teacher: the trainer's teacher, or ``None``.
        inputs: the batch as the student takes it, ``[T, N, ...]`` for a spiking one.
        images: the batch as the teacher takes it, ``[N, ...]``.
        outputs: of the student, ``[T, N, K]`` or ``[N, K]``.
        num_classes: ``K``.
        time_chunks: number of pieces in which the time steps are run.
    """

    student: nn.Module
    teacher: nn.Module | None
    inputs: Tensor
    images: Tensor
    outputs: Tensor
    num_classes: int
    time_chunks: int = 1


@dataclass(frozen=True)
class Needs:
    """Signals that an objective asks the trainer for.

    Attributes:
        teacher_logits: logits of the trainer's teacher.
        student: ``(module name, reading)`` of the student's layers. ``"firing_rate"`` is the mean of the
            output over time, ``"activation_map"`` the mean over time of Eq. 11's ``N[t] * o[t]`` for each
            neuron, ``"spikes"`` the output itself, ``[T, N, ...]``.
        teacher: module names of the teacher whose outputs are read.
        teacher_gradients: module names of the teacher for whose outputs ``A`` ``d CE / d A`` is computed.
    """

    teacher_logits: bool = False
    student: tuple[tuple[str, Reading], ...] = ()
    teacher: tuple[str, ...] = ()
    teacher_gradients: tuple[str, ...] = ()

    def __or__(self, other: Needs) -> Needs:
        """Unite the needs of two objectives."""
        both = {
            name: tuple(dict.fromkeys(getattr(self, name) + getattr(other, name)))
            for name in ("student", "teacher", "teacher_gradients")
        }
        return Needs(self.teacher_logits or other.teacher_logits, **both)

    @property
    def asks_teacher(self) -> bool:
        """True if the teacher has to run."""
        return bool(self.teacher_logits or self.teacher or self.teacher_gradients)


@dataclass
class Signals:
    """Outputs of the networks in a training step, the input of an objective.

    Attributes:
        scores: class scores of the student, ``[N, K]`` (Eq. 4's ``v[T]``).
        labels: ``[N]``, whole numbers in [0, K).
        inputs: input of the student, ``[T, N, ...]`` for a spiking one.
        outputs: output of the student, ``[T, N, K]`` for a spiking one.
        accumulated: whether the outputs add up over time, as those of an integrator whose last step is read.
        teacher_logits: ``[N, K]`` of the trainer's teacher where asked for; a constant.
        student: tapped values by ``(module name, reading)``.
        teacher: outputs of tapped teacher layers by module name; constants.
        teacher_gradients: gradients of the teacher's cross-entropy with respect to outputs of its layers.
        epoch: epochs done, 0 in the first.
        epochs: number of epochs in all, 1 where it is not known.
        logged: numbers for ``metrics.csv`` that are not part of the loss; objectives add theirs.
    """

    scores: Tensor
    labels: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    teacher_logits: Tensor | None = None
    student: Mapping[tuple[str, str], Tensor] = field(default_factory=dict)
    teacher: Mapping[str, Tensor] = field(default_factory=dict)
    teacher_gradients: Mapping[str, Tensor] = field(default_factory=dict)
    epoch: int = 0
    epochs: int = 1
    accumulated: bool = False
    logged: dict[str, Tensor | float] = field(default_factory=dict)


class Objective:
    """Base class of objectives. ``prepare`` returns the needs, ``__call__`` the named parts of a loss.

    The parts' sum is trained. Objectives add: ``LabelKD() + Attention("gradient")``. Subclasses are
    dataclasses or, where they have weights of their own, ``torch.nn.Module`` too; such weights are trained
    by the run's optimiser, moved, saved and resumed with the run.

    .. code-block:: python

        @dataclass
        class Confidence(Objective):
            weight: float = 0.1

            def __call__(self, signals):
                p = signals.scores.softmax(1)
                return {"confidence": self.weight * (p * p.log()).sum(1).mean()}

        LaSNNTrainer(student, objective=CrossEntropy() + Confidence(0.2))

    Attributes:
        needs_teacher: whether the trainer must have a teacher.
    """

    needs_teacher: bool = False

    def prepare(self, look: Look) -> Needs:
        """Return the needs of the objective; called before training with a small batch.

        Raises:
            ValueError: the networks cannot give it.
        """
        return Needs(teacher_logits=self.needs_teacher)

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """Compute the parts of the loss, scalars by name."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(signals)")

    def __add__(self, other: object) -> Sum:
        return Sum((self, other))

    def __repr__(self) -> str:
        if not dataclasses.is_dataclass(self):
            return f"{type(self).__name__}()"
        shown = []
        for one in dataclasses.fields(self):
            value = getattr(self, one.name)
            if one.repr and (one.default is dataclasses.MISSING or value != one.default):
                text = value.__qualname__ if isinstance(value, type(_unused)) else repr(value)
                shown.append(f"{one.name}={text}")
        return f"{type(self).__name__}({', '.join(shown)})"


def _unused() -> None: ...


class Sum(Objective):
    """Several objectives, whose parts are trained together.

    Args:
        objectives: each is called with the same signals.

    Raises:
        ValueError: when called, two objectives that give a part the same name.
    """

    def __init__(self, objectives: tuple[object, ...]) -> None:
        flat = (one.objectives if isinstance(one, Sum) else (one,) for one in objectives)
        self.objectives = tuple(each for group in flat for each in group)
        for one in self.objectives:
            if isinstance(one, type):
                raise TypeError(f"an objective is the class {one.__name__}; give {one.__name__}(...)")
            if not callable(one):
                raise TypeError(f"an objective must be callable with signals, got {one!r}")

    @property
    def needs_teacher(self) -> bool:
        return any(getattr(one, "needs_teacher", False) for one in self.objectives)

    def prepare(self, look: Look) -> Needs:
        needs = Needs()
        for one in self.objectives:
            needs = needs | needs_of(one, look)
        return needs

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for one in self.objectives:
            found = parts_of(one, signals)
            for name in found.keys() & parts.keys():
                raise ValueError(
                    f"two objectives of {self!r} give a part named '{name}'; give one of them another name"
                )
            parts |= found
        return parts

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.objectives))


@dataclass(repr=False)
class CrossEntropy(Objective):
    """``L_ce`` of Eq. 9 on the class scores."""

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": scalar}``."""
        return {"ce": F.cross_entropy(signals.scores, signals.labels)}


def members(objective: object) -> tuple[object, ...]:
    """Return the objectives of a sum, or the objective itself."""
    return objective.objectives if isinstance(objective, Sum) else (objective,)


def needs_of(objective: object, look: Look) -> Needs:
    """Ask an objective for its needs; without ``prepare`` they follow from ``needs_teacher``."""
    prepare = getattr(objective, "prepare", None)
    if prepare is None:
        return Needs(teacher_logits=bool(getattr(objective, "needs_teacher", False)))
    needs = prepare(look)
    if not isinstance(needs, Needs):
        raise TypeError(f"{type(objective).__name__}.prepare must return Needs, got {type(needs).__name__}")
    return needs


def parts_of(objective: object, signals: Signals) -> dict[str, Tensor]:
    """Call an objective and check what it returns.

    Raises:
        TypeError: no dict of scalar tensors by name, or an empty one.
        ValueError: it reads the logits of a teacher that is not there.
    """
    name = type(objective).__name__
    try:
        parts = objective(signals)
    except (TypeError, AttributeError) as error:
        if signals.teacher_logits is None and "NoneType" in str(error):
            raise ValueError(
                f"{name} reads the teacher's logits, but there are none ({error}); give its class "
                f"needs_teacher = True, and the trainer a teacher"
            ) from error
        raise
    if not isinstance(parts, dict) or not parts:
        got = "an empty dict" if parts == {} else type(parts).__name__
        raise TypeError(
            f"{name} must return a dict of the loss' parts by name, such as {{'ce': scalar}}, got {got}"
        )
    for key, part in parts.items():
        if not isinstance(key, str) or not isinstance(part, Tensor) or part.dim():
            got = f"shape {tuple(part.shape)}" if isinstance(part, Tensor) else type(part).__name__
            raise TypeError(f"part {key!r} of {name} must be a scalar tensor, got {got}")
    return parts


def weight_at(schedule: Schedule, epoch: int, epochs: int) -> float:
    """Return the factor of a weight in an epoch.

    ``"linear"`` is ``1 - p`` and ``"cosine"`` ``(1 + cos(pi * p)) / 2`` with the progress
    ``p = epoch / (epochs - 1)``, 0 in the first epoch and 1 in the last; ``"exponential"`` is
    ``0.9 ** epoch``; a function is called with ``p``.

    Args:
        schedule: a name or a function.
        epoch: epochs done.
        epochs: epochs in all; of a single one the progress is 0.

    Raises:
        ValueError: an unknown name, or a function whose value is negative or not finite.
    """
    progress = min(1.0, epoch / (epochs - 1)) if epochs > 1 else 0.0
    if callable(schedule):
        value = schedule(progress)
        if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
            name = getattr(schedule, "__qualname__", repr(schedule))
            raise ValueError(
                f"schedule {name} gave {value!r} at progress {progress:.3g}; it must give a finite number, "
                f"at least 0"
            )
        return float(value)
    check_schedule(schedule)
    values = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "exponential": 0.9**epoch,
        "cosine": (1 + math.cos(math.pi * progress)) / 2,
    }
    return values[schedule]


def check_schedule(schedule: Schedule) -> None:
    """Raise :class:`ValueError` for an unknown schedule."""
    names = ("constant", "linear", "exponential", "cosine")
    if not callable(schedule) and schedule not in names:
        raise ValueError(
            f"schedule must be one of {', '.join(names)}, or a function of progress, got {schedule!r}"
        )


def parse_objective(text: str, known: Mapping[str, type]) -> object:
    """Build an objective from text such as ``"LabelKD(alpha=0.5) + Attention('gradient')"``.

    Args:
        text: classes with literal arguments, added.
        known: classes by name.

    Raises:
        ValueError: anything else; no code is run.
    """

    def build(node: ast.expr) -> object:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return Sum((build(node.left), build(node.right)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id not in known:
                raise ValueError(
                    f"unknown objective '{node.func.id}' in {text!r}; there are {', '.join(sorted(known))}"
                )
            arguments = [ast.literal_eval(argument) for argument in node.args]
            named = {word.arg: ast.literal_eval(word.value) for word in node.keywords if word.arg}
            return known[node.func.id](*arguments, **named)
        raise ValueError(f"{text!r} is not a sum of objectives such as LabelKD() + Attention('gradient')")

    try:
        return build(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a sum of objectives ({error})") from error


def trained_modules(objective: object) -> Iterator[tuple[str, nn.Module]]:
    """Yield the objectives that have trained weights, with their names in checkpoints."""
    for number, one in enumerate(members(objective)):
        if isinstance(one, nn.Module) and any(True for _ in one.parameters()):
            yield f"{number}.{type(one).__name__}", one


def own_parameters(objective: object) -> list[nn.Parameter]:
    """Return the trained weights of the objectives."""
    return [p for _, module in trained_modules(objective) for p in module.parameters() if p.requires_grad]
