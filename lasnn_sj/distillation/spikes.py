"""Distillation of spike counts from an SNN to an SNN."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models.readout import resolve_readout
from .logits import spiking_teacher
from .objective import Objective, Signals


@dataclass(frozen=True, repr=False)
class SpikeKD(Objective):
    """Spike-based distillation from an SNN to an SNN (Kushawaha et al., LaSNN's Table III): approximated.

    They compare spike counts of output neurons in windows over ``T``. Output layers here do not fire, so
    what they receive in a window stands for the count: ``c_w = v[end of w] - v[end of w - 1]`` of both,
    ``L = CE + alpha * mean over w of || c_w / ||c_w|| - t_w / ||t_w|| ||_2``, mean over the batch. Their
    teacher assistants and stages are left out. No paper gives ``windows`` and ``alpha``; these are ours.

    Args:
        teacher: trained SNN, ``[T, N, ...]`` to ``[T, N, K]``; put into evaluation mode and frozen, so it
            must be another object than the student, and end in an ``IntegratorNode`` as the student does.
        windows: how many pieces of equal length ``T`` is cut into; at most ``T``.
        alpha: weight of the distance.
    """

    teacher: nn.Module = field(repr=False)
    windows: int = 4
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.windows < 1:
            raise ValueError(f"windows must be at least 1, got {self.windows}")
        if not self.alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {self.alpha}")
        if resolve_readout(self.teacher, "auto") != "last":
            raise ValueError(
                f"teacher must end in an IntegratorNode, whose potential says what arrived in a window; "
                f"{type(self.teacher).__name__} has none"
            )
        self.teacher.eval().requires_grad_(False)

    def __call__(self, signals: Signals) -> dict[str, Tensor]:
        """``{"ce": CE, "spike_kd": alpha * distance}``."""
        wanted = spiking_teacher(self.teacher, signals.inputs)
        if signals.outputs.shape != wanted.shape or self.windows > len(wanted):
            raise ValueError(
                f"student and teacher must both give [T, N, K] with at least {self.windows} steps (windows), "
                f"got {tuple(signals.outputs.shape)} of the student, {tuple(wanted.shape)} of the teacher"
            )
        distance = torch.linalg.vector_norm(self._counts(signals.outputs) - self._counts(wanted), dim=2)
        ce = F.cross_entropy(signals.scores, signals.labels)
        return {"ce": ce, "spike_kd": self.alpha * distance.mean()}

    def _counts(self, potentials: Tensor) -> Tensor:
        """Compute the inputs of the output neurons by window, normalized over the classes, ``[W, N, K]``."""
        ends = [round(len(potentials) * (w + 1) / self.windows) - 1 for w in range(self.windows)]
        reached = torch.stack([potentials[end] for end in ends]).float()
        received = torch.diff(reached, dim=0, prepend=torch.zeros_like(reached[:1]))
        return F.normalize(received, dim=2)
