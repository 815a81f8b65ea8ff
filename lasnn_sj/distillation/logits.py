"""Distillation of logits: label KD, sparse-KD and teacher-default KD."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models.readout import class_scores, resolve_readout
from .objective import Objective, Signals


def sparse_kd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> Tensor:
    """Distillation of softened logits, reverse-KD's Eq. 4-5.

    ``L = alpha * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) + (1 - alpha) * CE``. The KL
    divergence is a sum over the classes, its mean over the batch. The paper writes its arguments the
    other way round and names code that calls ``kl_div(student, teacher)``, which is this.

    Args:
        student_logits: class scores ``[N, K]``.
        teacher_logits: ``[N, K]``; they are constants.
        labels: ``[N]``.
        temperature: ``tau``, above 0.
        alpha: weight of the distillation, in [0, 1]; at 0 this is the cross-entropy.

    Returns:
        A scalar.

    Raises:
        ValueError: a temperature or weight out of range, or logits of unequal shape.
    """
    return sum(_sparse_kd(student_logits, teacher_logits, labels, temperature, alpha).values())


def default_kd(
    student_logits: Tensor,
    labels: Tensor,
    probability: float,
    temperature: float,
    alpha: float,
    soften: Literal["probability", "log"] = "probability",
) -> Tensor:
    """Distillation of a virtual teacher that is always right, reverse-KD's Eq. 6-7.

    The teacher gives ``p = probability`` to the true class and ``(1 - probability) / (K - 1)`` to the
    others. ``L = alpha * KL(softened teacher || softmax(student)) + (1 - alpha) * CE``; as in Yuan et
    al. (2020), which the paper follows, the student is not softened and there is no ``tau^2``.

    Args:
        student_logits: class scores ``[N, K]``.
        labels: ``[N]``.
        probability: of the true class, above ``1 / K`` and at most 1.
        temperature: ``tau``, above 0.
        alpha: weight of the distillation, in [0, 1] (the paper gives it the same letter as the probability).
        soften: ``"probability"`` for ``softmax(p / tau)`` as in Yuan et al.'s code, or ``"log"`` for
            ``softmax(log p / tau)``, the softening of logits.

    Returns:
        A scalar.

    Raises:
        ValueError: a probability, temperature or weight out of range, or another softening.
    """
    return sum(_default_kd(student_logits, labels, probability, temperature, alpha, soften).values())


def _sparse_kd(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float, alpha: float
) -> dict[str, Tensor]:
    _check_weights(temperature, alpha)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student and teacher must have the same classes, got logits {tuple(student_logits.shape)} "
            f"of the student and {tuple(teacher_logits.shape)} of the teacher"
        )
    divergence = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits.detach() / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    return {
        "ce": (1 - alpha) * F.cross_entropy(student_logits, labels),
        "kd": alpha * temperature**2 * divergence,
    }


def _default_kd(
    student_logits: Tensor, labels: Tensor, probability: float, temperature: float, alpha: float, soften: str
) -> dict[str, Tensor]:
    _check_weights(temperature, alpha)
    num_classes = student_logits.shape[1]
    if not 1 / num_classes < probability <= 1:
        raise ValueError(
            f"probability must be above 1 / K = {1 / num_classes:.4g} (and at most 1), or the virtual "
            f"teacher is not right; got {probability}"
        )
    if soften not in ("probability", "log"):
        raise ValueError(f'soften must be "probability" or "log", got {soften!r}')
    teacher = torch.full_like(student_logits, (1 - probability) / (num_classes - 1))
    teacher.scatter_(1, labels.unsqueeze(1), probability)
    logits = teacher if soften == "probability" else teacher.log()
    divergence = F.kl_div(
        F.log_softmax(student_logits, dim=1), F.softmax(logits / temperature, dim=1), reduction="batchmean"
    )
    return {"ce": (1 - alpha) * F.cross_entropy(student_logits, labels), "kd": alpha * divergence}


def _check_weights(temperature: float, alpha: float) -> None:
    if not (temperature > 0 and temperature < float("inf")):
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")


@dataclass(frozen=True, repr=False)
class LabelKD(Objective):
    """Distillation of the trainer's teacher by its softened logits (Takuya et al., LaSNN's baseline).

    The loss is :func:`sparse_kd`'s; no paper gives temperature or weight for it, these are ours.

    Args:
        temperature: ``tau``, above 0.
        alpha: weight of the distillation, in [0, 1].
    """

    temperature: float = 4.0
    alpha: float = 0.5

    needs_teacher: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.alpha)

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - alpha) * CE, "kd": alpha * tau^2 * KL}``."""
        return _sparse_kd(
            signals.scores, signals.teacher_logits, signals.labels, self.temperature, self.alpha
        )


@dataclass(frozen=True, repr=False)
class SparseKD(Objective):
    """Sparse-KD: a trained, pruned and frozen SNN teaches a fresh copy of the same net (Eq. 4-5).

    The teacher is given the student's own input. It is put into evaluation mode and frozen, so it must
    be another object than the student: ``SparseKD(prune_magnitude(copy.deepcopy(trained), 0.3))``.
    Without pruning this is self-distillation.

    Args:
        teacher: spiking network, ``[T, N, ...]`` to ``[T, N, K]`` or ``[N, K]``; its scores are read as
            the trainer reads a student's with ``readout="auto"``.
        temperature: ``tau``, above 0.
        alpha: weight of the distillation, in [0, 1]. The paper gives neither; both defaults are ours.
    """

    teacher: nn.Module = field(repr=False)
    temperature: float = 4.0
    alpha: float = 0.5

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.alpha)
        self.teacher.eval().requires_grad_(False)

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - alpha) * CE, "kd": alpha * tau^2 * KL}``."""
        logits = self.teacher_logits(signals.inputs, len(signals.labels))
        return _sparse_kd(signals.scores, logits, signals.labels, self.temperature, self.alpha)

    def teacher_logits(self, inputs: Tensor, batch: int) -> Tensor:
        """The teacher's class scores ``[N, K]`` of encoded inputs ``[T, N, ...]``."""
        return class_scores(
            spiking_teacher(self.teacher, inputs), batch, resolve_readout(self.teacher, "auto")
        )


@torch.no_grad()
def spiking_teacher(teacher: nn.Module, inputs: Tensor) -> Tensor:
    """Run a spiking teacher on encoded inputs ``[T, N, ...]``; its output, a constant."""
    teacher = teacher.to(inputs.device)
    functional.reset_net(teacher)
    try:
        return teacher(inputs)
    finally:
        functional.reset_net(teacher)


@dataclass(frozen=True, repr=False)
class DefaultKD(Objective):
    """Teacher-default KD: a virtual teacher that is always right (Eq. 6-7); see :func:`default_kd`.

    Args:
        probability: of the true class, above ``1 / K``; the paper says above 0.9.
        temperature: ``tau``; Yuan et al.'s 20.
        alpha: weight of the distillation, in [0, 1]; Yuan et al.'s 0.1.
        soften: ``"probability"`` or ``"log"``.
    """

    probability: float = 0.99
    temperature: float = 20.0
    alpha: float = 0.1
    soften: Literal["probability", "log"] = "probability"

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.alpha)
        if not 0 < self.probability <= 1:
            raise ValueError(f"probability must be above 1 / K and at most 1, got {self.probability}")
        if self.soften not in ("probability", "log"):
            raise ValueError(f'soften must be "probability" or "log", got {self.soften!r}')

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - alpha) * CE, "kd": alpha * KL}``."""
        return _default_kd(
            signals.scores, signals.labels, self.probability, self.temperature, self.alpha, self.soften
        )
