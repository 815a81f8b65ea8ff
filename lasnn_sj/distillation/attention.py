"""LaSNN's attention: maps (Eq. 5-6, 10-11), their distance (Eq. 7, 12), and the objective made of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based.neuron import BaseNode
from torch import Tensor, nn

from ..neurons import TimeLoopNode
from .objective import Look, Needs, Objective, Schedule, Signals, check_schedule, weight_at
from .pairs import LEVELS, Pair, as_map, choose_pairs
from .taps import TapError, trace_map

log = logging.getLogger(__name__)


def activation_map(
    a: Tensor,
    *,
    power: int = 2,
    center: bool = False,
    normalize: bool = True,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Compute the attention of an activation, Eq. 5-6 per position: ``F(A) = mean over C of |A|^power``.

    The right side of Eq. 6 as printed averages over space too, which would leave no map. For a student,
    ``a`` is the firing rate, the mean over time of a layer's spikes; as a spike is its own square, Eq. 6
    at each step, averaged over time, is ``power = 1`` on the rate.

    Args:
        a: activations ``[N, C, H, W]``.
        power: exponent, 1 or 2.
        center: subtract the map's mean over space, so that a flat map is 0.
        normalize: divide each flattened map by its L2 norm (Zagoruyko & Komodakis).
        size: resize the map to this ``(H, W)`` first.

    Returns:
        ``[N, H * W]``, float32 (float64 for float64 input).
    """
    a = _check(a, "a")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power!r}")
    # The sign is a constant: abs has the gradient 0 at 0, and a silent neuron's rate must have one.
    a = a * torch.copysign(a.new_ones(()), a.detach()) if power == 1 else a.square()
    return _finish(a.mean(1), normalize, size, center)


def gradient_map(
    g: Tensor, *, center: bool = False, normalize: bool = True, size: tuple[int, int] | None = None
) -> Tensor:
    """Compute the gradient attention of a teacher, Eq. 10 per layer: ``mean over C of |d CE / d A|``.

    Args:
        g: gradient of the loss with respect to a layer's activations, ``[N, C, H, W]``.
        center, normalize, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    return _finish(_check(g, "g").abs().mean(1), normalize, size, center)


def spike_activation_map(
    spikes: Tensor, *, normalize: bool = True, size: tuple[int, int] | None = None
) -> Tensor:
    """Compute the spike activation map of a student, Eq. 11, from the spikes of all steps.

    ``M[t] = sum over C of N[t] * o[t]`` with ``N[t] = sum over earlier spikes t' of exp(-(t - t'))``,
    averaged over ``t``. The gradient flows through ``o[t]``, not through ``N[t]``. In training the
    neurons compute the same inside their own loop; see :func:`spike_map`.

    Args:
        spikes: ``[T, N, C, H, W]``.
        center, normalize, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    if spikes.dim() != 5 or spikes.shape[0] < 1:
        raise ValueError(f"spikes must be [T, N, C, H, W], got shape {tuple(spikes.shape)}")
    return spike_map(trace_map(spikes), normalize=normalize, size=size)


def spike_map(
    m: Tensor, *, center: bool = False, normalize: bool = True, size: tuple[int, int] | None = None
) -> Tensor:
    """Finish a spike activation map that the neurons have accumulated over time (Eq. 11).

    Args:
        m: ``[N, C, H, W]``, per neuron the mean over time of ``N[t] * o[t]``.
        center, normalize, size: as for :func:`activation_map`.

    Returns:
        ``[N, H * W]``.
    """
    return _finish(_check(m, "m").sum(1), normalize, size, center)


def attention_loss(
    teacher_maps: Sequence[Tensor],
    student_maps: Sequence[Tensor],
    distance: Literal["l2", "mse"] = "l2",
) -> Tensor:
    """Compute the distance of attention maps, Eq. 7 and 12.

    ``L_at = sum over pairs l of || F_l(teacher) - F_l(student) ||_2``, mean over the batch; the norm is
    not squared.

    Args:
        teacher_maps: one map ``[N, P_l]`` for each pair.
        student_maps: as many, of the same shapes.
        distance: ``"l2"`` as above, or ``"mse"``, the mean over positions of the squared differences as in
            the code of Zagoruyko & Komodakis, whose weight is about 1000.

    Returns:
        A scalar.

    Raises:
        ValueError: no pair, unequal numbers of maps, or maps of a pair of unequal shape.
    """
    return sum(pair_distances(teacher_maps, student_maps, distance), student_maps[0].new_zeros(()))


def pair_distances(
    teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor], distance: Literal["l2", "mse"] = "l2"
) -> list[Tensor]:
    """Compute the distance of each pair of maps, mean over the batch; :func:`attention_loss` is their sum."""
    if len(teacher_maps) != len(student_maps) or not teacher_maps:
        raise ValueError(
            f"attention_loss needs the same number of maps, at least one, of teacher and student, "
            f"got {len(teacher_maps)} and {len(student_maps)}"
        )
    if distance not in ("l2", "mse"):
        raise ValueError(f'distance must be "l2" or "mse", got {distance!r}')
    found = []
    for level, (teacher, student) in enumerate(zip(teacher_maps, student_maps)):
        if teacher.shape != student.shape or teacher.dim() != 2:
            raise ValueError(
                f"pair {level}: both maps must be [N, P] of equal shape, got "
                f"{tuple(teacher.shape)} of the teacher and {tuple(student.shape)} of the student"
            )
        difference = teacher - student
        if distance == "mse":
            found.append(difference.square().mean())
        else:
            found.append(torch.linalg.vector_norm(difference, dim=1).mean())
    return found


@dataclass(repr=False)
class Attention(Objective):
    """Layer-wise distillation of attention (LaSNN, Eq. 5-8 and 10-13).

    The part ``"attention"`` of the loss is ``alpha_e / 2 * L_at`` with ``L_at`` of :func:`attention_loss`
    over the pairs of layers. ``kind="activation"`` compares the teacher's ``mean over C of |A|^2`` with the
    student's from firing rates (Eq. 5-6); ``kind="gradient"`` compares the teacher's
    ``mean over C of |d CE / d A|`` (Eq. 10) with the student's spike activation map (Eq. 11).

    Logged beside the loss: the distance of each pair (``attention_low``, ``attention_middle``,
    ``attention_high``, or ``attention_0``, ... for pairs that were given), the sum of the distances that
    flat maps would have (``attention_flat``; a student whose distance is not below it has learned no
    positions), and the weight (``attention_alpha``).

    Args:
        kind: ``"activation"`` or ``"gradient"``.
        alpha: weight of the attention loss in the first epoch.
        schedule: decay of ``alpha`` over the epochs, see :func:`~lasnn_sj.distillation.weight_at`. The paper
            calls alpha "the decayed term" and prints no formula; linear to 0 is our reading.
        pairs: ``(student module, teacher module)`` names; chosen by :func:`choose_pairs` if not given.
        levels: of the chosen pairs, those that are compared.
        power: exponent of the student's firing rate, 1 (Eq. 6 at each step) or 2 (Eq. 6 on the rate).
        center: subtract each map's mean over space before it is normalized; then a flat map, which a
            student reaches by firing everywhere, is not near the teacher's. Not in the paper.
        distance: ``"l2"`` (Eq. 7) or ``"mse"``; see :func:`attention_loss`.
        normalize: L2-normalize the maps.
        through_trace: gradient attention only; let its gradient also flow through the spike trace.

    Raises:
        ValueError: an argument out of range, or pairs of another form.
    """

    kind: Literal["activation", "gradient"] = "activation"
    alpha: float = 0.9
    schedule: Schedule = "linear"
    pairs: Sequence[tuple[str, str]] | None = None
    levels: Sequence[str] = LEVELS
    power: int = 1
    center: bool = False
    distance: Literal["l2", "mse"] = "l2"
    normalize: bool = True
    through_trace: bool = False
    chosen: list[Pair] | None = field(default=None, init=False, repr=False, compare=False)

    needs_teacher = True

    def __post_init__(self) -> None:
        if self.kind not in ("activation", "gradient"):
            raise ValueError(f'attention must be "activation" or "gradient", got {self.kind!r}')
        if isinstance(self.alpha, bool) or not isinstance(self.alpha, (int, float)) or not self.alpha >= 0:
            raise ValueError(f"alpha must be a number, at least 0, got {self.alpha!r}")
        check_schedule(self.schedule)
        if self.power not in (1, 2):
            raise ValueError(f"power must be 1 or 2, got {self.power!r}")
        if self.distance not in ("l2", "mse"):
            raise ValueError(f'distance must be "l2" or "mse", got {self.distance!r}')
        if not self.levels or any(level not in LEVELS for level in self.levels):
            raise ValueError(f"levels must be some of {', '.join(LEVELS)}, got {self.levels!r}")
        if self.pairs is not None:
            self.pairs = _named(self.pairs)

    @property
    def reading(self) -> Literal["firing_rate", "activation_map"]:
        """Signal of a student's layer that its map is made of."""
        return "activation_map" if self.kind == "gradient" else "firing_rate"

    def prepare(self, look: Look) -> Needs:
        """Choose the pairs of layers, log them, and ask for their outputs or gradients.

        Raises:
            TapError: no layer to choose, or a name that does not fit.
            ValueError: gradient attention with a teacher of other classes, or with a single time step.
        """
        if self.kind == "gradient" and look.inputs.dim() > 3 and len(look.inputs) < 2:
            raise ValueError(
                "gradient attention needs T of at least 2: the spike activation map of one step is 0 (Eq. 11)"
            )
        if self.chosen is None:
            gradients = self.kind == "gradient"
            pairs = choose_pairs(look.student, look.teacher, look.inputs, look.images, self.pairs, gradients)
            self.chosen = [p for p in pairs if self.pairs is not None or p.level in self.levels]
            if not self.chosen:
                have = ", ".join(pair.level for pair in pairs)
                raise TapError(f"levels {tuple(self.levels)} are not among those of the networks: {have}")
            for pair in self.chosen:
                log.info("attention pair %s", pair)
            if gradients:
                self._suggest_accelerate(look.student)
        if self.kind == "gradient":
            logits = look.teacher(look.images)
            if logits.shape[1:] != (look.num_classes,):
                raise ValueError(
                    f"gradient attention needs a teacher with the student's {look.num_classes} classes, the "
                    f"teacher gives shape {tuple(logits.shape)}"
                )
        theirs = tuple(pair.teacher for pair in self.chosen)
        return Needs(
            student=tuple((pair.student, self.reading) for pair in self.chosen),
            teacher=() if self.kind == "gradient" else theirs,
            teacher_gradients=theirs if self.kind == "gradient" else (),
        )

    def _suggest_accelerate(self, student: nn.Module) -> None:
        """Say where spike activation maps take a second pass over all spikes."""
        nodes = {pair.student: student.get_submodule(pair.student) for pair in self.chosen}
        stock = [
            f"{name} ({type(node).__name__})"
            for name, node in nodes.items()
            if isinstance(node, BaseNode) and not isinstance(node, TimeLoopNode)
        ]
        if stock:
            log.info(
                "spike activation maps of %s are computed from the output spikes; those of "
                "neurons.accelerate(student) inside the time loop, which is faster", ", ".join(stock),
            )  # fmt: skip

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"attention": alpha_e / 2 * L_at}``."""
        teacher, student = self.teacher_maps(signals), self.student_maps(signals)
        distances = pair_distances(teacher, student, self.distance)
        weight = self.alpha * weight_at(self.schedule, signals.epoch, signals.epochs)
        with torch.no_grad():
            flat = [self._flat(maps) for maps in teacher]
            signals.logged |= {
                f"attention_{pair.level}": value.detach() for pair, value in zip(self.chosen, distances)
            }
            signals.logged["attention_flat"] = sum(pair_distances(teacher, flat, self.distance))
            signals.logged["attention_alpha"] = weight
        return {"attention": weight / 2 * sum(distances)}

    def student_maps(self, signals: Signals) -> list[Tensor]:
        """Return the student's map of each pair, ``[N, H * W]``."""
        read = [
            as_map(signals.student[pair.student, self.reading], pair.size, pair.form) for pair in self.chosen
        ]
        if self.kind == "gradient":
            return [spike_map(m, center=self.center, normalize=self.normalize) for m in read]
        return [
            activation_map(a, power=self.power, center=self.center, normalize=self.normalize) for a in read
        ]

    def teacher_maps(self, signals: Signals) -> list[Tensor]:
        """Return the teacher's map of each pair at the student's size, ``[N, H * W]``."""
        finish = gradient_map if self.kind == "gradient" else activation_map
        read = signals.teacher_gradients if self.kind == "gradient" else signals.teacher
        return [
            finish(
                as_map(read[pair.teacher], pair.teacher_size, pair.teacher_form),
                size=pair.size, center=self.center, normalize=self.normalize,
            )
            for pair in self.chosen
        ]  # fmt: skip

    def _flat(self, maps: Tensor) -> Tensor:
        """Return flat maps of the same mean, or of norm 1 if maps are normalized; 0 if they are centered."""
        if self.center:
            return torch.zeros_like(maps)
        if self.normalize:
            return torch.full_like(maps, maps.shape[1] ** -0.5)
        return maps.mean(1, keepdim=True).expand_as(maps)


def _named(pairs: object) -> tuple[tuple[str, str], ...]:
    """Return pairs of module names as tuples.

    Raises:
        ValueError: anything else.
    """
    try:
        found = tuple((student, teacher) for student, teacher in pairs)
    except (TypeError, ValueError):
        found = ()
    if isinstance(pairs, (str, dict)) or not found or not all(isinstance(n, str) for p in found for n in p):
        raise ValueError(
            f"pairs must be a list of (student module, teacher module) names, such as "
            f"[('features.0.neuron', 'layer1')], got {pairs!r}"
        )
    return found


def _check(tensor: Tensor, name: str) -> Tensor:
    if tensor.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], got shape {tuple(tensor.shape)}")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _finish(maps: Tensor, normalize: bool, size: tuple[int, int] | None, center: bool = False) -> Tensor:
    if size is not None and tuple(size) != tuple(maps.shape[1:]):
        shrinks = size[0] <= maps.shape[1] and size[1] <= maps.shape[2]
        # Averaging keeps every pixel's share when a map shrinks, where bilinear samples would skip some.
        how = {"mode": "area"} if shrinks else {"mode": "bilinear", "align_corners": False}
        maps = F.interpolate(maps.unsqueeze(1), size=tuple(size), **how).squeeze(1)
    maps = maps.flatten(1)
    if center:
        maps = maps - maps.mean(1, keepdim=True)
    if not normalize:
        return maps
    # In float64: the squares of a confident teacher's gradients would be 0 in float32.
    norm = torch.linalg.vector_norm(maps, dim=1, keepdim=True, dtype=torch.float64).to(maps.dtype)
    # A silent layer has the map 0 and no direction: its norm is taken as 1, and no gradient explodes.
    return maps / torch.where(norm > 0, norm, torch.ones_like(norm))
