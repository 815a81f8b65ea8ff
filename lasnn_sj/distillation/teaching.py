"""A teacher's and a student's attention in a training step: taps, what the teacher says, and the maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import activation_map, gradient_map, spike_map
from .taps import ChunkTaps, Pair, StudentTaps, TeacherTaps, choose_pairs

log = logging.getLogger(__name__)


class Distillation:
    """What a teacher tells a student layer by layer.

    Args:
        student, teacher: networks; without teacher nothing is tapped.
        attention: ``"activation"``, ``"gradient"`` or ``None``, which leaves the teacher's logits.
        normalise: L2-normalise the maps.
        through_trace: let gradient attention's gradient also flow through the spike trace.
        names: ``(student module, teacher module)`` for each level; chosen if not given.
        chunked: whether the student runs in pieces of time.

    Attributes:
        pairs: what is compared, once the taps are set.
        student_taps: to be entered around the student's pass; ``None`` without attention.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        attention: Literal["activation", "gradient"] | None,
        normalise: bool,
        through_trace: bool,
        names: Sequence[tuple[str, str]] | None,
        chunked: bool,
    ) -> None:
        self.student, self.teacher, self.attention = student, teacher, attention
        self.normalise, self.through_trace, self.names, self.chunked = (
            normalise,
            through_trace,
            names,
            chunked,
        )
        self.by_gradient = attention == "gradient"
        self.pairs: list[Pair] | None = None
        self.student_taps: StudentTaps | None = None
        self._teacher_taps: TeacherTaps | None = None

    def set_taps(self, encoded: Tensor, images: Tensor, num_classes: int) -> None:
        """Choose the pairs by a small batch, as it is and encoded, and tap them.

        Raises:
            TapError: no layer to choose, or a name that does not fit.
            ValueError: gradient attention with a teacher of other classes.
        """
        if not self.attention:
            return
        if self.pairs is None:
            self.pairs = choose_pairs(self.student, self.teacher, encoded, images, self.names)
            for level, pair in enumerate(self.pairs):
                log.info("attention pair %d: %s", level, pair)
        logits = self.teacher(images)
        if self.by_gradient and logits.shape[1:] != (num_classes,):
            raise ValueError(
                f"gradient attention needs a teacher with the student's {num_classes} classes, the "
                f"teacher gives shape {tuple(logits.shape)}"
            )
        names = [pair.student for pair in self.pairs]
        if self.by_gradient and self.chunked:
            self.student_taps = ChunkTaps(self.student, names, self.through_trace)
        else:
            what = "activation_map" if self.by_gradient else "firing_rate"
            self.student_taps = StudentTaps(self.student, names, what, self.through_trace)
        self._teacher_taps = TeacherTaps(self.teacher, [p.teacher for p in self.pairs], self.by_gradient)

    def close(self) -> None:
        """Remove the taps."""
        for tap in (self.student_taps, self._teacher_taps):
            if tap is not None:
                tap.close()
        self.student_taps = self._teacher_taps = None

    def student_maps(self, seen: Sequence[Tensor]) -> list[Tensor]:
        """Maps ``[N, H * W]`` of what the student's taps read."""
        finish = spike_map if self.by_gradient else activation_map
        return [finish(a, normalise=self.normalise) for a in seen]

    def ask_teacher(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The teacher's logits ``[N, K]`` and attention maps ``[N, H * W]``, both constants."""
        if self.teacher is None:
            return None, []
        with self._teacher_taps or nullcontext(), torch.set_grad_enabled(self.by_gradient):
            # float16 has no room for the gradients of a sum over the classes' probabilities
            with torch.autocast(images.device.type, enabled=False) if self.by_gradient else nullcontext():
                logits = self.teacher(images)
            if not self.attention:
                return logits, []
            seen = self._teacher_taps.collect()
            if self.by_gradient:
                # Summed, so that a sample's map does not depend on the size of its batch. In float64, as
                # of a sure teacher's p - 1 for the true class float32 leaves a few bits or none.
                seen = torch.autograd.grad(F.cross_entropy(logits.double(), labels, reduction="sum"), seen)
        finish = gradient_map if self.by_gradient else activation_map
        maps = [
            finish(a.detach(), normalise=self.normalise, size=pair.size) for a, pair in zip(seen, self.pairs)
        ]
        return logits.detach(), maps
