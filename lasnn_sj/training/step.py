"""A training step: encode, forward, teacher, losses, backward, update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..distillation.objectives import Objective, Signals, attention_loss
from ..distillation.teaching import Distillation
from ..models.readout import class_scores
from ..runtime import distributed
from . import nonfinite
from .evaluation import batch_axis
from .forward import StudentForward
from .nonfinite import NonFiniteError
from .precision import Precision
from .state import Progress


@dataclass
class TrainingStep:
    """What :class:`~lasnn_sj.LaSNNTrainer` does with a batch; the arguments are the trainer's.

    Attributes:
        progress: whose random state looking at a batch must leave alone.
        num_classes: ``K``, known once :meth:`prepare` has seen a batch.
    """

    student: nn.Module
    encoder: nn.Module | None
    objective: Objective
    alpha: float
    readout: str
    distillation: Distillation
    numbers: Precision
    optimizer: Optimizer
    progress: Progress
    accumulate: int
    time_chunks: int
    compile: bool
    num_classes: int | None = None
    _forward: nn.Module | None = None

    def run(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step of training on a batch that lies on the device already.

        Returns:
            The parts of the loss, and the class scores ``[N, K]``, both detached.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; the student keeps its weights.
        """
        self.prepare(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        buffers = [buffer.clone() for buffer in self.student.buffers()]  # of batch norm
        total: dict[str, Tensor] = {}
        scores = []
        try:
            for piece, piece_labels, last in self._pieces(images, labels):
                together = last or distributed.world_size() == 1
                with nullcontext() if together else self._forward.no_sync():
                    parts, piece_scores = self._agreed_loss(piece, piece_labels)
                    share = len(piece_labels) / len(labels)
                    self.numbers.backward(sum(parts.values()) * share)
                functional.reset_net(self.student)
                scores.append(piece_scores)
                for name, part in parts.items():
                    total[name] = total.get(name, 0) + part.detach() * share
            self._update(images)
        except NonFiniteError:
            for buffer, before in zip(self.student.buffers(), buffers):
                buffer.copy_(before)
            raise
        finally:
            functional.reset_net(self.student)
        return total, torch.cat(scores)

    def _update(self, images: Tensor) -> None:
        """The optimiser's step, or which layer's gradient is not finite."""
        try:
            self.numbers.update(self.optimizer, self.student)
        except NonFiniteError as error:
            self._explain(images if self.encoder is None else self.encoder(images), str(error), error)
            raise

    def _pieces(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """A batch in ``accumulate`` pieces, and whether each is the last."""
        count, axis = min(self.accumulate, len(labels)), batch_axis(images, labels)
        pieces = zip(images.tensor_split(count, axis), labels.tensor_split(count))
        for number, (piece, piece_labels) in enumerate(pieces, 1):
            yield piece, piece_labels, number == count

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Parts of the loss, and the class scores ``[N, K]``, detached."""
        x = images if self.encoder is None else self.encoder(images)
        with self.numbers.autocast():
            try:
                outputs, seen = self._forward(x)
            except ValueError as error:  # on the CPU neurons refuse what is not finite
                self._explain(x, f"the student's activations are not finite: {error}", error)
                raise
            signals = Signals(class_scores(outputs, len(labels), self.readout), labels, x)
            signals.outputs = outputs
            signals.teacher_logits, teacher_maps = self.distillation.ask_teacher(images, labels)
            parts = self.objective(signals)
        if self.distillation.attention:
            if "attention" in parts:
                name = type(self.objective).__name__
                raise ValueError(f"{name} names a part of its loss 'attention', as the trainer does its own")
            student_maps = self.distillation.student_maps(seen)
            loss = attention_loss(teacher_maps, student_maps)
            parts = parts | {"attention": self.alpha / 2 * loss}
        if not bool(torch.isfinite(sum(parts.values()))):
            named = ", ".join(f"{name} = {part.item():.4g}" for name, part in parts.items())
            message = f"the loss is not finite ({named}); a lower learning rate may do"
            self._explain(x, message)
            raise NonFiniteError(message)
        return parts, signals.scores.detach()

    def _agreed_loss(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """:meth:`_loss`, which fails on every process where it fails on one."""
        if distributed.world_size() == 1:
            return self._loss(images, labels)
        result = error = None
        try:
            result = self._loss(images, labels)
        except NonFiniteError as own:
            error = own
        if distributed.any_of([error is not None], self.progress.device)[0]:
            raise error or NonFiniteError("the loss of another process is not finite")
        return result

    def _explain(self, x: Tensor, message: str, cause: Exception | None = None) -> None:
        """Raise what names the first layer that is not finite, if one is."""
        before = self.progress.random_state()
        layer = nonfinite.first_layer(self.student, x)
        self.progress.set_random_state(before)
        if layer is not None:
            raise NonFiniteError(f"{message}; first in {layer}", layer) from cause

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Before the first step: look at what the student gives, choose the pairs and set the taps.

        Draws no random number that training would have drawn. :meth:`run` does so by itself.
        """
        if self.num_classes is not None:
            return
        axis = batch_axis(images, labels)
        small = images.narrow(axis, 0, min(2, len(labels))).to(self.progress.device)
        before = self.progress.random_state()  # looking must not change what is trained
        self.student.eval()
        functional.reset_net(self.student)
        try:
            with torch.no_grad():
                encoded = small if self.encoder is None else self.encoder(small)
                outputs = self.student(encoded)
                num_classes = class_scores(outputs, small.shape[axis], self.readout).shape[1]
                self.distillation.set_taps(encoded, small, num_classes)
        finally:
            functional.reset_net(self.student)
            self.student.train()
            self.progress.set_random_state(before)
        forward = StudentForward(self.student, self.distillation.student_taps, self.time_chunks)
        if self.compile:
            forward.compile()
        if distributed.world_size() > 1:
            forward = DistributedDataParallel(forward)
        self._forward, self.num_classes = forward, num_classes

    def close(self) -> None:
        """Remove the taps; :meth:`prepare` sets them again."""
        self.distillation.close()
        self._forward = self.num_classes = None
