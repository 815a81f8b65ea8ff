"""Distillation over time steps: losses on the logits of every step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .logits import check_weights, divergence, same_classes
from .objective import Look, Needs, Objective, Signals


def step_logits(signals: Signals) -> Tensor:
    """Return the student's logits of every step, ``z_t``.

    Of a student whose scores are the mean over time, ``z_t`` is its output at step ``t``. Of one that ends in
    an integrator, whose scores are ``v[T]``, it is ``T * (v[t] - v[t - 1])`` with ``v[0] = 0``. In both cases
    the mean of ``z_t`` over all steps is the class scores, as in the papers' networks, and the mean of the
    first ``t`` has the same largest class as the scores of a run that is stopped after ``t`` steps.
    With many steps and Poisson input the increments of an integrator are noisy: the objectives on them
    are meant for small ``T``.

    Returns:
        ``[T, N, K]``, float32 (float64 for float64 outputs).

    Raises:
        ValueError: the student gives no outputs of single steps.
    """
    outputs = signals.outputs
    if not isinstance(outputs, Tensor) or outputs.dim() != 3:
        raise ValueError(_NO_STEPS.format("the objective", _shape(outputs)))
    outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    if not signals.accumulated:
        return outputs
    return len(outputs) * torch.diff(outputs, dim=0, prepend=torch.zeros_like(outputs[:1]))


@dataclass(repr=False)
class _PerStep(Objective):
    """Base of objectives on the logits of every step."""

    least_steps = 1

    def prepare(self, look: Look) -> Needs:
        """Check the student's outputs, and the teacher's classes where it is asked.

        Raises:
            ValueError: outputs without time steps or with too few, or a teacher with other classes.
        """
        name = type(self).__name__
        if not isinstance(look.outputs, Tensor) or look.outputs.dim() != 3:
            raise ValueError(_NO_STEPS.format(name, _shape(look.outputs)))
        if len(look.outputs) < self.least_steps:
            raise ValueError(f"{name} needs T of at least {self.least_steps}, got T = {len(look.outputs)}")
        return Needs(teacher_logits=self.needs_teacher)


@dataclass(repr=False)
class PerStepCE(_PerStep):
    """Cross-entropy at every step: ``mean over t of CE(z_t, y)``.

    The first term of :class:`TET`. ``z_t`` as :func:`step_logits`. It takes the place of
    :class:`CrossEntropy`.
    """

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": mean over t of CE}``."""
        return {"ce": _per_step_ce(step_logits(signals), signals.labels)}


@dataclass(repr=False)
class TET(_PerStep):
    """Temporal efficient training (TET; Deng et al., ICLR 2022).

    ``L = (1 - weight) * <CE(z_t, y)> + weight * mean of (z_t - level)^2``, the second a mean over steps,
    samples and classes that keeps outliers away. ``z_t`` as :func:`step_logits`. Form and defaults are those
    of the authors' code (temporal_efficient_training). It takes the place of :class:`CrossEntropy`.

    Args:
        weight: ``lambda`` of the paper, in [0, 1].
        level: ``phi`` of the paper, drawn to by every logit; there the threshold.
    """

    weight: float = 1e-3
    level: float = 1.0

    def __post_init__(self) -> None:
        check_weights(self, "weight")
        if self.weight > 1:
            raise ValueError(f"weight must lie in [0, 1], got {self.weight}")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - weight) * ..., "level": weight * ...}``."""
        z = step_logits(signals)
        ce = _per_step_ce(z, signals.labels)
        return {"ce": (1 - self.weight) * ce, "level": self.weight * (z - self.level).square().mean()}


@dataclass(repr=False)
class TemporalKD(_PerStep):
    """Temporal-wise logits distillation (TWLD; Yu et al., ICML 2025).

    ``L = <CE(z_t, y)> + alpha * <tau^2 * KL(s(z_A), s(z_t))> + beta * <tau^2 * KL(s(e), s(z_t))>`` with
    ``s = softmax(. / tau)``, ``<.>`` the mean over steps, ``z_A`` the teacher's logits and ``e`` the
    student's own ensemble, a constant. With ``alpha=0`` no teacher is needed: the ensemble teaches the early
    steps.

    Args:
        alpha: weight of the teacher, at least 0.
        beta: weight of the ensemble, at least 0.
        temperature: ``tau``, above 0.
        ensemble: ``"all"`` for the mean of all steps' logits (the paper's text), or ``"correct"`` for the
            mean of the steps whose largest class is the label (its code). A sample that has no such step is
            then left out of the third term, which is our reading.
    """

    alpha: float = 0.2
    beta: float = 0.5
    temperature: float = 3.0
    ensemble: Literal["all", "correct"] = "all"

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "beta")
        if self.ensemble not in ("all", "correct"):
            raise ValueError(f'ensemble must be "all" or "correct", got {self.ensemble!r}')

    @property
    def needs_teacher(self) -> bool:
        """True if the teacher's term has a weight."""
        return self.alpha > 0

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": ..., "kd": alpha * ..., "ensemble": beta * ...}``; a term of weight 0 is left out."""
        z, tau = step_logits(signals), self.temperature
        parts = {"ce": _per_step_ce(z, signals.labels)}
        if self.alpha > 0:
            teacher = same_classes(z[0], signals.teacher_logits, type(self).__name__)
            parts["kd"] = self.alpha * tau**2 * divergence(teacher, z, tau).mean()
        if self.beta > 0:
            if self.ensemble == "all":
                each = divergence(z.mean(0).detach(), z, tau).mean(0)
            else:
                total, any_right = _of_correct_steps(z, signals.labels)
                each = divergence(total, z, tau).mean(0) * any_right
            parts["ensemble"] = self.beta * tau**2 * each.mean()
        return parts


@dataclass(repr=False)
class TKS(_PerStep):
    """Temporal knowledge sharing (Dong et al., arXiv 2304.06540).

    ``L = (1 - w) * CE(mean z_t, y) + w * <H(s(z_c), s(z_t))>``, where ``z_c`` is the sum of the logits of the
    steps whose largest class is the label, a constant, ``H`` the cross-entropy with soft labels and
    ``s = softmax(. / tau)``. As in the published training script ``w`` rises from 0 to ``alpha``: it is
    ``alpha * epoch / epochs``. A sample without a correct step is left out of the second term, and there is
    no ``tau^2``: both are our reading.

    Args:
        alpha: weight that is reached at the end, in [0, 1].
        temperature: ``tau``, above 0; the published command line has 3.
    """

    alpha: float = 0.7
    temperature: float = 3.0

    def __post_init__(self) -> None:
        check_weights(self, "alpha")
        if self.alpha > 1:
            raise ValueError(f"alpha must lie in [0, 1], got {self.alpha}")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - w) * CE of the mean, "tks": w * ...}``."""
        z, tau = step_logits(signals), self.temperature
        weight = self.alpha * signals.epoch / signals.epochs
        right = _right(z, signals.labels)
        target = F.softmax((z.detach() * right.unsqueeze(2)).sum(0) / tau, dim=1)
        each = -(target * F.log_softmax(z / tau, dim=2)).sum(2).mean(0) * right.any(0)
        ce = F.cross_entropy(z.mean(0), signals.labels)
        return {"ce": (1 - weight) * ce, "tks": weight * each.mean()}


@dataclass(repr=False)
class TPD(_PerStep):
    """Temporal progressive distillation: each prefix of the steps learns from the next (part of MEOM).

    ``alpha / (T - 1) * sum over t < T of H(s(mean z_1..t+1), s(mean z_1..t))`` with the cross-entropy ``H``
    of soft labels and ``s = softmax``; the longer prefix is a constant. As described in secondary sources;
    MEOM's mixing of teacher features is not part of it. Add it to :class:`PerStepCE` or :class:`TemporalKD`.

    Args:
        alpha: weight, at least 0.
    """

    alpha: float = 0.3

    least_steps = 2

    def __post_init__(self) -> None:
        check_weights(self, "alpha")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"tpd": alpha / (T - 1) * ...}``."""
        z = step_logits(signals)
        count = torch.arange(1, len(z) + 1, device=z.device, dtype=z.dtype).view(-1, 1, 1)
        prefix = z.cumsum(0) / count
        target = F.softmax(prefix[1:].detach(), dim=2)
        each = -(target * F.log_softmax(prefix[:-1], dim=2)).sum(2)
        return {"tpd": self.alpha * each.mean()}


@dataclass(repr=False)
class Synergy(_PerStep):
    """Self-distillation between the most and the least confident step (S2W and W2S of Synergy).

    ``alpha * KL(s(z_strong), s(z_weak))``, where strong and weak are the steps of the highest and lowest mean
    over the batch of the largest probability; ``W2S`` swaps them. The target is a constant and ``s =
    softmax(. / tau)``. No factor ``tau^2``: the paper does not say. Add it to :class:`CrossEntropy` or
    :class:`PerStepCE`; it needs no teacher.

    Args:
        direction: ``"S2W"``, the strong step teaches the weak one, or ``"W2S"``.
        alpha: weight, at least 0.
        temperature: ``tau``, above 0.
    """

    direction: Literal["S2W", "W2S"] = "S2W"
    alpha: float = 1.0
    temperature: float = 2.0

    least_steps = 2

    def __post_init__(self) -> None:
        check_weights(self, "alpha")
        if self.direction not in ("S2W", "W2S"):
            raise ValueError(f'direction must be "S2W" or "W2S", got {self.direction!r}')

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"synergy": alpha * KL}``."""
        z = step_logits(signals)
        confidence = F.softmax(z.detach(), dim=2).amax(2).mean(1)
        # an index that is a tensor of one element would be read by the host
        strong, weak = (z.index_select(0, of(confidence, 0, True))[0] for of in (torch.argmax, torch.argmin))
        target, student = (strong, weak) if self.direction == "S2W" else (weak, strong)
        each = divergence(target.detach(), student.unsqueeze(0), self.temperature)
        return {"synergy": self.alpha * each.mean()}


@dataclass(repr=False)
class SeAlKD(_PerStep):
    """Selective alignment (SeAl-KD, arXiv 2605.14252).

    ``L = <CE(z_t, y)> + alpha * <tau^2 * KL(s(a_t), s(s_t))> + beta * STA`` with ``s = softmax(. / tau)``.

    - ``s_t = z_t`` and ``a_t = z_A``, except where the largest class ``w`` of ``z_t`` is not ``y``: there
      ``s_t[w]`` is replaced by ``z_t[y]``, and ``a_t[y]`` and ``a_t[w]`` by the smaller of the two.
    - ``STA = tau^2 * mean over i of KL(s(sum over j of w_ij * z_j), s(z_i))``, the sum a constant, with
      ``w_ij = softmax over j != i of c_j * cos(z_i, z_j)`` and the confidence
      ``c_j = 1 - H(softmax(z_j)) / log K``.

    Args:
        alpha: weight of the teacher, at least 0.
        beta: weight of the temporal alignment, at least 0.
        temperature: ``tau``, above 0.
    """

    alpha: float = 0.6
    beta: float = 0.15
    temperature: float = 3.0

    needs_teacher = True
    least_steps = 2

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "beta")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": ..., "kd": alpha * ..., "temporal": beta * STA}``."""
        z, tau = step_logits(signals), self.temperature
        teacher = same_classes(z[0], signals.teacher_logits, type(self).__name__)
        T = len(z)
        y = signals.labels.expand(T, -1).unsqueeze(2)
        w = z.argmax(2, keepdim=True)
        student = z.scatter(2, w, z.gather(2, y))  # no change where w = y
        a = teacher.expand(T, -1, -1)
        least = torch.minimum(a.gather(2, y), a.gather(2, w))
        a = a.scatter(2, y, least).scatter(2, w, least)
        kd = tau**2 * divergence(a, student, tau).mean()
        sta = tau**2 * divergence(self._mixed(z.detach()), z, tau).mean()
        ce = _per_step_ce(z, signals.labels)
        return {"ce": ce, "kd": self.alpha * kd, "temporal": self.beta * sta}

    @staticmethod
    def _mixed(z: Tensor) -> Tensor:
        """Sum over ``j`` of ``w_ij * z_j``, ``[T, N, K]``."""
        log_p = F.log_softmax(z, dim=2)
        confidence = 1 + (log_p.exp() * log_p).sum(2) / math.log(z.shape[2])  # [T, N]
        unit = F.normalize(z, dim=2)
        affinity = torch.einsum("ink,jnk->ijn", unit, unit) * confidence
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device).unsqueeze(2)
        weights = affinity.masked_fill(itself, -math.inf).softmax(1)
        return torch.einsum("ijn,jnk->ink", weights, z)


@dataclass(repr=False)
class EntropyRegularization(_PerStep):
    """Entropy of every step's prediction, kept high: ``-weight * <H(softmax(z_t))>``.

    Part of temporal separation with entropy regularization (TSER; Yu et al., CVPR 2025), as in two public
    reimplementations, whose loss is ``(1 - a) * <CE(z_t, y)> + a * <tau^2 * KL(s(z_A), s(z_t))> - weight *
    <H>``; the weight is assumed. Add it to :class:`TemporalKD` or another objective.

    Args:
        weight: at least 0.
    """

    weight: float = 0.1

    def __post_init__(self) -> None:
        check_weights(self, "weight")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"entropy": -weight * mean entropy}``."""
        log_p = F.log_softmax(step_logits(signals), dim=2)
        return {"entropy": self.weight * (log_p.exp() * log_p).sum(2).mean()}


_NO_STEPS = (
    "{} needs a student that gives the scores of every step, [T, N, K], got {}; return them before they are "
    "averaged over time"
)


def _shape(outputs: object) -> object:
    return tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__


def _per_step_ce(z: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(z.flatten(0, 1), labels.repeat(len(z)))


def _right(z: Tensor, labels: Tensor) -> Tensor:
    """Return the steps whose predicted class is the label, ``[T, N]``."""
    return z.argmax(2) == labels


def _of_correct_steps(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Average the logits of correct steps, ``[N, K]``, detached; also return which samples have one."""
    right = _right(z, labels)
    count = right.sum(0).clamp(min=1).unsqueeze(1)
    return (z.detach() * right.unsqueeze(2)).sum(0) / count, right.any(0)
