"""Losses: pure functions of maps, potentials and labels, and the objectives made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .neurons import IntegratorNode


class BatchError(ValueError):
    """A batch or what the student made of it cannot be used; the message says which and why."""


def resolve_readout(model: nn.Module, readout: str) -> str:
    """``"last"`` or ``"mean"``; ``"auto"`` by whether the network integrates its output."""
    if readout != "auto":
        return readout
    return "last" if any(isinstance(m, IntegratorNode) for m in model.modules()) else "mean"


def class_scores(outputs: Tensor, batch: int, readout: str) -> Tensor:
    """Class scores ``[N, K]`` (float32) of a student's output ``[T, N, K]`` or ``[N, K]``.

    Raises:
        BatchError: any other shape.
    """
    if isinstance(outputs, Tensor):
        if outputs.dim() == 2 and outputs.shape[0] == batch:
            return outputs.float()
        if outputs.dim() == 3 and outputs.shape[1] == batch:
            return (outputs[-1] if readout == "last" else outputs.mean(0)).float()
    got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise BatchError(
        f"the student must give class scores [N, K] or [T, N, K] with N = {batch}, got {got}; "
        f"is it in multi-step mode (functional.set_step_mode(net, 'm'))?"
    )


def attention_loss(teacher_maps: Sequence[Tensor], student_maps: Sequence[Tensor]) -> Tensor:
    """Distance of attention maps, Eq. 7 and 12.

    ``L_at = sum over pairs l of || F_l(teacher) - F_l(student) ||_2``, mean over the batch; the norm is
    not squared.

    Args:
        teacher_maps: one map ``[N, P_l]`` for each pair.
        student_maps: as many, of the same shapes.

    Returns:
        A scalar.

    Raises:
        ValueError: no pair, unequal numbers of maps, or maps of a pair of unequal shape.
    """
    if len(teacher_maps) != len(student_maps) or not teacher_maps:
        raise ValueError(
            f"attention_loss needs the same number of maps, at least one, of teacher and student, "
            f"got {len(teacher_maps)} and {len(student_maps)}"
        )
    total = student_maps[0].new_zeros(())
    for level, (teacher, student) in enumerate(zip(teacher_maps, student_maps)):
        if teacher.shape != student.shape or teacher.dim() != 2:
            raise ValueError(
                f"pair {level}: both maps must be [N, P] of equal shape, got "
                f"{tuple(teacher.shape)} of the teacher and {tuple(student.shape)} of the student"
            )
        total = total + torch.linalg.vector_norm(teacher - student, dim=1).mean()
    return total


@dataclass
class Signals:
    """What a training step offers to an objective.

    Attributes:
        scores: class scores of the student, ``[N, K]`` (Eq. 4's ``v[T]``).
        labels: ``[N]``, whole numbers in [0, K).
        inputs: what the student was given, ``[T, N, ...]`` for a spiking one.
        teacher_logits: ``[N, K]`` of the trainer's teacher, ``None`` without one.
    """

    scores: Tensor
    labels: Tensor
    inputs: Tensor | None = None
    teacher_logits: Tensor | None = None


class Objective(Protocol):
    """A loss for :class:`~lasnn_sj.LaSNNTrainer`: named parts, whose sum is trained.

    Attributes:
        needs_teacher: whether it reads ``Signals.teacher_logits``.
    """

    needs_teacher: bool

    def __call__(self, signals: Signals) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class CrossEntropy:
    """``L_ce`` of Eq. 9 on the class scores."""

    needs_teacher: ClassVar[bool] = False

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": scalar}``."""
        return {"ce": F.cross_entropy(signals.scores, signals.labels)}
