"""The trainer of LaSNN's distillation: a shorthand for attention as an objective."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..distillation.attention import Attention
from ..distillation.objective import CrossEntropy, Objective, Sum, members
from .callbacks import Callback
from .options import TrainingOptions
from .trainer import Trainer

log = logging.getLogger(__name__)

LARGEST_ALPHA = 10.0  # above it an alpha is taken for a mistake


class LaSNNTrainer(Trainer):
    """Train a student by layer-wise distillation of a teacher's attention (LaSNN, Section III-B).

    The loss is ``CE + alpha / 2 * L_at`` (Eq. 8, 13), a shorthand for
    ``Trainer(student, CrossEntropy() + Attention(attention, alpha=alpha), teacher=teacher)``. Without a
    teacher it is the cross-entropy alone: hybrid training of a converted SNN.

    Args:
        student: see :class:`Trainer`.
        teacher: any module, images ``[N, ...]`` to logits ``[N, K]``; ``models.InputNormalization`` gives it
            input statistics other than the student's.
        attention: ``"activation"`` (Eq. 5-8), ``"gradient"`` (Eq. 10-13) or ``None``; ``"auto"`` is
            ``"activation"`` where a teacher is given and no objective is, else ``None``.
        alpha: weight of the attention loss in the first epoch; decays linearly to 0 in the last.
        pairs: ``(student module, teacher module)`` names of each level; chosen and logged if not given.
        objective: loss beside the attention, cross-entropy if not given.
        **settings: further arguments of :class:`Trainer`: ``encoder``, ``optimizer``, ``scheduler``,
            ``readout``, ``run_dir``, ``device``, ``seed``, ``options``, ``callbacks``.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        encoder: nn.Module | None = None,
        attention: Literal["auto", "activation", "gradient"] | None = "auto",
        alpha: float = 0.9,
        pairs: Sequence[tuple[str, str]] | None = None,
        objective: Objective | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        readout: Literal["auto", "last", "mean"] = "auto",
        run_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        options: TrainingOptions | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        if attention == "auto":
            attention = "activation" if teacher is not None and objective is None else None
        if attention is not None:
            wanted = Attention(attention, alpha=alpha, pairs=pairs)
            if alpha > LARGEST_ALPHA:
                log.warning("alpha = %g lets attention outweigh the cross-entropy; the paper has 0.9", alpha)
            objective = Sum((CrossEntropy() if objective is None else objective, wanted))
        super().__init__(
            student, objective, teacher=teacher, encoder=encoder, optimizer=optimizer, scheduler=scheduler,
            readout=readout, run_dir=run_dir, device=device, seed=seed, options=options, callbacks=callbacks,
        )  # fmt: skip

    @property
    def pairs(self) -> list[tuple[str, str]] | None:
        """``(student module, teacher module)`` of each level, once they are chosen."""
        for one in members(self.objective):
            if isinstance(one, Attention) and one.chosen is not None:
                return [(pair.student, pair.teacher) for pair in one.chosen]
        return None
