"""The teacher's pass through a batch, with the layers that an objective asked for."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .objective import Needs, Signals
from .taps import TeacherTaps


class TeacherForward:
    """Runs a frozen teacher and reads what an objective needs of it.

    Args:
        teacher: images ``[N, ...]`` to logits ``[N, K]``, in evaluation mode; may be ``None``.
        needs: of the objective.
    """

    def __init__(self, teacher: nn.Module | None, needs: Needs) -> None:
        self.teacher, self.needs = teacher, needs
        names = needs.teacher + needs.teacher_gradients
        self._taps = TeacherTaps(teacher, names, bool(needs.teacher_gradients)) if names else None

    def __call__(self, images: Tensor, labels: Tensor, signals: Signals) -> None:
        """Fill in the teacher's part of the signals, constants all."""
        if self.teacher is None or not self.needs.asks_teacher:
            return
        differentiated = bool(self.needs.teacher_gradients)
        with self._taps or nullcontext(), torch.set_grad_enabled(differentiated):
            # float16 has no room for the gradients of a sum over the classes' probabilities
            with torch.autocast(images.device.type, enabled=False) if differentiated else nullcontext():
                logits = self.teacher(images)
            read = self._taps.collect() if self._taps else {}
            if differentiated:
                # Summed, so that a sample's map does not depend on the size of its batch. In float64:
                # of a confident teacher's p - 1 for the true class float32 leaves a few bits or none.
                loss = F.cross_entropy(logits.double(), labels, reduction="sum")
                wanted = [read[name] for name in self.needs.teacher_gradients]
                found = torch.autograd.grad(loss, wanted)
                signals.teacher_gradients = dict(zip(self.needs.teacher_gradients, found))
        signals.teacher_logits = logits.detach()
        signals.teacher = {name: read[name].detach() for name in self.needs.teacher}

    def close(self) -> None:
        """Remove the taps."""
        if self._taps is not None:
            self._taps.close()
