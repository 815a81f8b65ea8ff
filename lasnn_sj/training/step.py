"""A training step: encode, forward, teacher, objective, backward, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..distillation.objective import Look, Needs, Signals, needs_of, own_parameters, parts_of
from ..distillation.taps import ChunkTaps, StudentTaps
from ..distillation.teacher import TeacherForward
from ..models.readout import class_scores
from ..runtime import distributed
from . import nonfinite
from .evaluation import batch_axis, evaluating
from .forward import StudentForward
from .nonfinite import NonFiniteError

if TYPE_CHECKING:
    from .trainer import Trainer


@dataclass
class StepResult:
    """Results of a training step, all detached.

    Attributes:
        parts: of the loss, scalars by name.
        scores: class scores of the student, ``[N, K]``.
        logged: numbers that the objective logs beside the loss.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    logged: dict[str, Tensor] = field(default_factory=dict)


class TrainingStep:
    """Runs training steps of a trainer, whose networks, objective and options it reads at each step.

    Args:
        trainer: owner of everything that a step uses.

    Attributes:
        num_classes: ``K``, known once :meth:`prepare` has seen a batch.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.num_classes: int | None = None
        self._needs = Needs()
        self._taps: StudentTaps | None = None
        self._teacher: TeacherForward | None = None
        self._forward: nn.Module | None = None
        self._prepared_for: object = None

    def run(self, images: Tensor, labels: Tensor) -> StepResult:
        """Run one step of training on a batch that lies on the device already.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; the student keeps its weights.
        """
        trainer = self.trainer
        self.prepare(images, labels)
        trainer.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in trainer.student.buffers()]  # of batch norm
        result, scores = StepResult(), []
        try:
            for piece, piece_labels, last in self._pieces(images, labels):
                together = last or distributed.world_size() == 1
                with nullcontext() if together else self._forward.no_sync():
                    parts, signals = self._agreed_loss(piece, piece_labels)
                    share = len(piece_labels) / len(labels)
                    trainer.mixed_precision.backward(sum(parts.values()) * share)
                functional.reset_net(trainer.student)
                scores.append(signals.scores.detach())
                _add(result.parts, parts, share)
                _add(result.logged, signals.logged, share)
            self._update(images)
        except NonFiniteError:
            for buffer, before in zip(trainer.student.buffers(), buffers):
                buffer.copy_(before)
            raise
        finally:
            functional.reset_net(trainer.student)
        result.scores = torch.cat(scores)
        return result

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Signals]:
        """Parts of the loss, and the signals that the objective had."""
        trainer = self.trainer
        x = images if trainer.encoder is None else trainer.encoder(images)
        with trainer.mixed_precision.autocast():
            try:
                outputs, read = self._forward(x)
            except ValueError as error:  # on the CPU neurons refuse what is not finite
                self._explain(x, f"the student's activations are not finite: {error}", error)
                raise
            signals = Signals(class_scores(outputs, len(labels), trainer.readout), labels, x, outputs)
            signals.student = dict(zip(self._taps.wanted, read)) if self._taps else {}
            signals.epoch, signals.epochs = trainer.epoch, trainer.epochs
            self._teacher(images, labels, signals)
            parts = parts_of(trainer.objective, signals)
        if not bool(torch.isfinite(sum(parts.values()))):
            named = ", ".join(f"{name} = {part.item():.4g}" for name, part in parts.items())
            message = f"the loss is not finite ({named}); a lower learning rate may do"
            self._explain(x, message)
            raise NonFiniteError(message)
        return parts, signals

    def _update(self, images: Tensor) -> None:
        """Run the optimiser's step, or say which layer's gradient is not finite."""
        trainer = self.trainer
        if distributed.world_size() > 1:  # weights of the objective are outside the wrapped student
            for parameter in own_parameters(trainer.objective):
                if parameter.grad is not None:
                    parameter.grad = distributed.total(parameter.grad) / distributed.world_size()
        try:
            trainer.mixed_precision.update(trainer.optimizer, trainer.student)
        except NonFiniteError as error:
            self._explain(images if trainer.encoder is None else trainer.encoder(images), str(error), error)
            raise

    def _pieces(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """A batch in ``accumulate`` pieces, and whether each is the last."""
        count, axis = min(self.trainer.options.accumulate, len(labels)), batch_axis(images, labels)
        if self.trainer.options.accumulate > 1:  # processes meet in each piece's pass
            count = distributed.least(count, self.trainer.device)
        pieces = zip(images.tensor_split(count, axis), labels.tensor_split(count))
        for number, (piece, piece_labels) in enumerate(pieces, 1):
            yield piece, piece_labels, number == count

    def _agreed_loss(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Signals]:
        """:meth:`_loss`, which fails on every process where it fails on one."""
        if distributed.world_size() == 1:
            return self._loss(images, labels)
        result = error = None
        try:
            result = self._loss(images, labels)
        except NonFiniteError as own:
            error = own
        if distributed.any_of([error is not None], self.trainer.device)[0]:
            raise error or NonFiniteError("the loss of another process is not finite")
        return result

    def _explain(self, x: Tensor, message: str, cause: Exception | None = None) -> None:
        """Raise an error that names the first layer whose output is not finite, if there is one."""
        progress = self.trainer.progress
        before = progress.random_state()
        layer = nonfinite.first_layer(self.trainer.student, x)
        progress.set_random_state(before)
        if layer is not None:
            raise NonFiniteError(f"{message}; first in {layer}", layer) from cause

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Show the objective a small batch and set the taps that it asks for, before the first step.

        Draws no random number that training would have drawn. :meth:`run` calls it by itself.
        """
        trainer = self.trainer
        if self.num_classes is not None and self._prepared_for is trainer.objective:
            return
        self.close()
        student, teacher, chunks = trainer.student, trainer.teacher, trainer.options.time_chunks
        axis = batch_axis(images, labels)
        small = images.narrow(axis, 0, min(2, len(labels))).to(trainer.device)
        before = trainer.progress.random_state()  # looking must not change what is trained
        student.eval()
        functional.reset_net(student)
        try:
            with torch.no_grad():
                encoded = small if trainer.encoder is None else trainer.encoder(small)
                outputs = student(encoded)
                num_classes = class_scores(outputs, small.shape[axis], trainer.readout).shape[1]
                functional.reset_net(student)
                look = Look(student, teacher, encoded, small, outputs, num_classes, chunks)
                self._needs = needs_of(trainer.objective, look)
        finally:
            functional.reset_net(student)
            student.train()
            trainer.progress.set_random_state(before)
        if self._needs.asks_teacher and teacher is None:
            raise ValueError(f"{trainer.objective!r} needs a teacher; give the trainer one")
        if self._needs.student:
            kind = ChunkTaps if chunks > 1 else StudentTaps
            through = any(getattr(one, "through_trace", False) for one in trainer.members)
            self._taps = kind(student, self._needs.student, through)
        self._teacher = TeacherForward(teacher, self._needs)
        forward = StudentForward(student, self._taps, chunks)
        if trainer.options.compile:
            forward.compile()
        if distributed.world_size() > 1:
            unused = distributed.any_of([self._has_unused(encoded)], trainer.device)[0]
            forward = DistributedDataParallel(forward, find_unused_parameters=unused)
        self._forward, self.num_classes = forward, num_classes
        self._prepared_for = trainer.objective

    def _has_unused(self, encoded: Tensor) -> bool:
        """Whether weights of the student have no part in its output, for which processes would wait."""
        student = self.trainer.student
        weights = [p for p in student.parameters() if p.requires_grad]
        before = self.trainer.progress.random_state()
        with evaluating(student), torch.enable_grad():
            outputs = student(encoded)
            found = torch.autograd.grad(outputs.float().sum(), weights, allow_unused=True)
        self.trainer.progress.set_random_state(before)
        return any(gradient is None for gradient in found)

    def close(self) -> None:
        """Remove the taps; :meth:`prepare` sets them again."""
        for tap in (self._taps, self._teacher):
            if tap is not None:
                tap.close()
        self._taps = self._teacher = self._forward = self.num_classes = self._prepared_for = None


def _add(total: dict[str, Tensor], values: dict[str, Tensor | float], share: float) -> None:
    """Add a piece's values to the batch's means."""
    for name, value in values.items():
        value = value.detach() if isinstance(value, Tensor) else torch.tensor(float(value))
        total[name] = total.get(name, 0) + value * share
