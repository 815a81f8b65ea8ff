"""Distillation of logits: label KD, sparse-KD, teacher-default KD, decoupled KD, DIST, smoothed logits."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..models.readout import class_scores, resolve_readout
from .objective import Objective, Signals


def sparse_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    reduction: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Compute the distillation loss of softened logits, reverse-KD's Eq. 4-5.

    ``L = alpha * tau^2 * KL(softmax(teacher / tau) || softmax(student / tau)) + (1 - alpha) * CE``. The KL
    divergence is a sum over the classes, its mean over the batch. The paper writes its arguments the
    other way round and names code that calls ``kl_div(student, teacher)``, which is this.

    Args:
        student_logits: class scores ``[N, K]``.
        teacher_logits: ``[N, K]``; they are constants.
        labels: ``[N]``.
        temperature: ``tau``, above 0.
        alpha: weight of the distillation, in [0, 1]; at 0 this is the cross-entropy.
        reduction: over the classes, ``"sum"`` as in the definition of the divergence, or ``"mean"``, ``K``
            times smaller, as of code that calls ``torch.nn.KLDivLoss()`` with its default.

    Returns:
        A scalar.

    Raises:
        ValueError: a temperature, weight or reduction out of range, or logits of unequal shape.
    """
    return sum(_sparse_kd(student_logits, teacher_logits, labels, temperature, alpha, reduction).values())


def default_kd(
    student_logits: Tensor,
    labels: Tensor,
    probability: float,
    temperature: float,
    alpha: float,
    soften: Literal["probability", "log"] = "probability",
) -> Tensor:
    """Compute the distillation loss of a virtual teacher that is always right, reverse-KD's Eq. 6-7.

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
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    reduction: str = "sum",
) -> dict[str, Tensor]:
    _check_weights(temperature, alpha)
    _check_reduction(reduction)
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
    if reduction == "mean":
        divergence = divergence / student_logits.shape[1]
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


def _check_reduction(reduction: str) -> None:
    if reduction not in ("sum", "mean"):
        raise ValueError(f'reduction must be "sum" or "mean", got {reduction!r}')


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
        reduction: of the divergence over the classes, ``"sum"`` or ``"mean"``; see :func:`sparse_kd`.
    """

    teacher: nn.Module = field(repr=False)
    temperature: float = 4.0
    alpha: float = 0.5
    reduction: Literal["sum", "mean"] = "sum"

    def __post_init__(self) -> None:
        _check_weights(self.temperature, self.alpha)
        _check_reduction(self.reduction)
        self.teacher.eval().requires_grad_(False)

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": (1 - alpha) * CE, "kd": alpha * tau^2 * KL}``."""
        logits = self.teacher_logits(signals.inputs, len(signals.labels))
        return _sparse_kd(
            signals.scores, logits, signals.labels, self.temperature, self.alpha, self.reduction
        )

    def teacher_logits(self, inputs: Tensor, batch: int) -> Tensor:
        """Compute the teacher's class scores ``[N, K]`` of encoded inputs ``[T, N, ...]``."""
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


@dataclass(repr=False)
class DecoupledKD(Objective):
    """Decoupled distillation (DKD; Zhao et al., CVPR 2022), added to a cross-entropy.

    With the label ``y``, ``p`` and ``q`` the softened probabilities of teacher and student:
    ``w * tau^2 * (alpha * TCKD + beta * NCKD)``. ``TCKD = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))`` is how sure
    both are of the label, ``NCKD = KL(p' || q')`` compares the classes but the label,
    ``p'_k = p_k / (1 - p_y)``. In ordinary distillation ``beta`` would be ``1 - p_y``. The weight ``w`` rises
    from 0 to 1 over the first epochs. Form and defaults are those of the authors' code (mdistiller), which
    warms up over 20 of 240 epochs.

    Args:
        alpha: weight of the label's part, at least 0.
        beta: weight of the other classes' part, at least 0. On CIFAR-100 the authors have 8 for ResNet-32x4
            and ResNet-50 as teachers, 6 for VGG-13 and WRN-40-2, 2 for ResNet-56 and -110.
        temperature: ``tau``, above 0.
        warmup: part of the epochs over which ``w`` rises, in [0, 1]:
            ``w = min(1, (epoch + 1) / (warmup * epochs))``.
    """

    alpha: float = 1.0
    beta: float = 8.0
    temperature: float = 4.0
    warmup: float = 1 / 12

    needs_teacher = True

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "beta", "warmup")
        if self.warmup > 1:
            raise ValueError(f"warmup must be a part of the epochs, in [0, 1], got {self.warmup}")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"target_kd": w * alpha * ..., "other_kd": w * beta * ...}``."""
        teacher = same_classes(signals.scores, signals.teacher_logits, "DecoupledKD")
        if teacher.shape[1] < 2:
            raise ValueError("DecoupledKD needs at least 2 classes, the student has 1")
        labels = signals.labels[:, None]
        index = torch.arange(teacher.shape[1] - 1, device=labels.device)
        index = index + (index >= labels)  # of the classes but the label; a mask would be read by the host
        tau, rise = self.temperature, self.warmup * signals.epochs
        weight = tau**2 * (min(1.0, (signals.epoch + 1) / rise) if rise else 1.0)
        sure = [self._label_or_not(z / tau, labels) for z in (teacher, signals.scores)]
        others = [z.gather(1, index) for z in (teacher, signals.scores)]
        tckd = (sure[0].exp() * (sure[0] - sure[1])).sum(1).mean()
        nckd = divergence(others[0], others[1], tau).mean()
        return {"target_kd": self.alpha * weight * tckd, "other_kd": self.beta * weight * nckd}

    @staticmethod
    def _label_or_not(z: Tensor, labels: Tensor) -> Tensor:
        """Log probabilities of the label and of all other classes together, ``[N, 2]``."""
        log_p = F.log_softmax(z, dim=1)
        return torch.cat([log_p.gather(1, labels), log_p.scatter(1, labels, -math.inf).logsumexp(1, True)], 1)


@dataclass(repr=False)
class DIST(Objective):
    """Distillation of relations by Pearson's correlation (DIST; Huang et al., NeurIPS 2022), added to a CE.

    With softened probabilities ``p`` of the teacher and ``q`` of the student, ``[N, K]``, and the correlation
    ``r``: ``tau^2 * (beta * mean over samples of (1 - r(p_n, q_n)) + gamma * mean over classes of
    (1 - r(p_k, q_k)))``. The first compares the classes of a sample, the second the samples of a class; a
    batch of one sample has no second. Form and defaults are those of the authors' code for CIFAR-100
    (image_classification_sota, ``dist_cifar.yaml``: weight 2, ``tau`` 4); for ImageNet they have ``tau`` 1.

    Args:
        beta: weight of the relations between classes, at least 0.
        gamma: weight of the relations within a class, at least 0.
        temperature: ``tau``, above 0.
    """

    beta: float = 2.0
    gamma: float = 2.0
    temperature: float = 4.0

    needs_teacher = True

    def __post_init__(self) -> None:
        check_weights(self, "beta", "gamma")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"inter": beta * ..., "intra": gamma * ...}``."""
        teacher, tau = same_classes(signals.scores, signals.teacher_logits, "DIST"), self.temperature
        p, q = F.softmax(teacher / tau, dim=1), F.softmax(signals.scores / tau, dim=1)
        inter = (1 - _correlation(p, q)).mean()
        intra = (1 - _correlation(p.T, q.T)).mean() if len(p) > 1 else 0 * inter
        return {"inter": self.beta * tau**2 * inter, "intra": self.gamma * tau**2 * intra}


def _correlation(a: Tensor, b: Tensor) -> Tensor:
    """Compute Pearson's correlation of rows; 0 if a row is constant."""
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


@dataclass(repr=False)
class NoiseSmoothedKD(Objective):
    """Noise-smoothed logits distillation (NLD, part of CKDSNN; AAAI 2026), added to a cross-entropy.

    ``alpha * KL(s(z_A) || s(z + strength * eps))`` with ``s = softmax(. / tau)`` and Gaussian noise ``eps``
    of the student's mean and standard deviation. As described in secondary sources; mean and deviation are
    assumed to be those of a sample over its classes, and constants.

    Args:
        alpha: weight, at least 0; ``tau^2`` at its default.
        strength: of the noise, at least 0.
        temperature: ``tau``, above 0.
    """

    alpha: float = 4.0
    strength: float = 0.1
    temperature: float = 2.0

    needs_teacher = True

    def __post_init__(self) -> None:
        check_weights(self, "alpha", "strength")

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"smoothed_kd": alpha * KL}``."""
        z = signals.scores
        teacher = same_classes(z, signals.teacher_logits, "NoiseSmoothedKD")
        fixed = z.detach()
        noise = fixed.mean(1, keepdim=True) + fixed.std(1, keepdim=True) * torch.randn_like(fixed)
        each = divergence(teacher, z + self.strength * noise, self.temperature)
        return {"smoothed_kd": self.alpha * each.mean()}


def divergence(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """``KL(softmax(target / tau) || softmax(logits / tau))``, a sum over the last dimension.

    Args:
        target: ``[N, K]`` or ``[T, N, K]``.
        logits: ``[T, N, K]``, or ``[N, K]``.
        temperature: ``tau``.

    Returns:
        ``[T, N]``, or ``[N]``.
    """
    target = F.log_softmax(target / temperature, dim=-1)
    return (target.exp() * (target - F.log_softmax(logits / temperature, dim=-1))).sum(-1)


def same_classes(scores: Tensor, teacher_logits: Tensor | None, name: str) -> Tensor:
    """Return the teacher's logits, detached, in the dtype of the scores.

    Raises:
        ValueError: there are none, or of other classes than the student's.
    """
    if teacher_logits is None:
        raise ValueError(f"{name} needs the logits of a teacher; give the trainer one")
    if teacher_logits.shape != scores.shape:
        raise ValueError(
            f"{name} needs a teacher with the student's classes, got logits {tuple(teacher_logits.shape)} of "
            f"the teacher and {tuple(scores.shape)} of the student"
        )
    return teacher_logits.detach().to(scores.dtype)


def check_weights(objective: Objective, *weights: str) -> None:
    """Raise :class:`ValueError` for a negative weight, or a temperature that is not above 0."""
    for name in weights:
        value = getattr(objective, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number, at least 0, got {value!r}")
    tau = getattr(objective, "temperature", 1.0)
    if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau < math.inf:
        raise ValueError(f"temperature must be a number above 0, got {tau!r}")
