"""A training step: encode, forward, teacher, objective, backward, update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..data.late_checks import LateChecks, require
from ..distillation.objective import Needs, Signals, members, own_parameters, parts_of
from ..distillation.taps import ChunkTaps, StudentTaps
from ..distillation.teacher import TeacherForward
from ..models.readout import class_scores, resolve_readout
from ..runtime import distributed
from . import nonfinite
from .batch_norm import SyncedBatchNorm, has_batch_norm
from .evaluation import batch_axis, evaluating
from .fingerprint import sentence
from .forward import StudentForward
from .graph import GraphedStep
from .look import look_at
from .nonfinite import NonFiniteError

if TYPE_CHECKING:
    from .trainer import Trainer

LAG = 16  # steps whose conditions are read together


@dataclass
class StepResult:
    """Results of a training step, all detached.

    Attributes:
        parts: of the loss, scalars by name.
        scores: class scores of the student, ``[N, K]``.
        logged: numbers that the objective logs beside the loss.
        checks: conditions of the step that are not read yet; ``None`` if they hold.
    """

    parts: dict[str, Tensor] = field(default_factory=dict)
    scores: Tensor | None = None
    logged: dict[str, Tensor] = field(default_factory=dict)
    checks: LateChecks | None = None


class TrainingStep:
    """Runs training steps of a trainer, whose networks, objective and options it reads at each step.

    On CUDA, with a fused optimizer, a step does not wait for the device: whether batch, loss and gradient are
    good is read some steps later by :meth:`errors`. Until then the device itself leaves the weights as they
    are from a bad step on (with ``on_nonfinite="skip"``, in the bad step only).

    Args:
        trainer: owner of everything that a step uses.

    Attributes:
        num_classes: ``K``, known once :meth:`prepare` has seen a batch.
        late_on_cpu: check late on the CPU too; for tests.
    """

    late_on_cpu = False

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.num_classes: int | None = None
        self._needs = Needs()
        self._taps: StudentTaps | None = None
        self._teacher: TeacherForward | None = None
        self._forward: nn.Module | None = None
        self._graph: GraphedStep | None = None
        self._prepared_for: object = None
        self._accumulated = False
        self._weight, self._has_batch_norm = 1.0, False
        self._checks: LateChecks | None = None
        self._stopped: Tensor | None = None  # whether a bad step has stopped the training

    @property
    def late(self) -> bool:
        """True if a step's conditions are read later."""
        trainer = self.trainer
        device = trainer.device.type == "cuda" or self.late_on_cpu
        fused = trainer.mixed_precision.skips_on_device(trainer.optimizer)
        return device and fused and distributed.world_size() == 1

    @property
    def lag(self) -> int:
        """Steps whose conditions are read together."""
        return LAG if self.late else 1

    def checking(self) -> LateChecks | nullcontext:
        """Return the context for checks of the next step."""
        if not self.late:
            return nullcontext()
        if self._checks is None:
            self._checks = LateChecks(self.late_on_cpu)
        return self._checks

    def run(self, images: Tensor, labels: Tensor, weight: float = 1.0) -> StepResult:
        """Run one step of training on a batch that lies on the device already.

        Args:
            images: batch for encoder or student.
            labels: ``[N]``.
            weight: of this process' loss in the mean over the processes; see :class:`.dataloader.Batch`.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; the student keeps its weights. A step that
                checks late does not raise it.
        """
        self._weight = weight
        try:
            with self.checking(), self.trainer.mixed_precision.tf32():
                if self.late:
                    self.prepare(images, labels)
                    # A label out of range, which is not read yet, would stop the device.
                    labels = labels.clamp(0, self.num_classes - 1)
                    if self._graph is not None:
                        return self._graph(images, labels, self._checks)
                return self.run_at_once(images, labels, self._checks)
        finally:
            self._checks = None

    def errors(self, results: Sequence[StepResult]) -> Iterator[Exception | None]:
        """Read the conditions of steps, in their order: the error of each, or ``None``.

        After an error that stops the training the weights are those before that step, and the later results
        are of no use.
        """
        late = [result.checks for result in results if result.checks is not None]
        failed = [checks.failed() for checks in late]
        read = iter(torch.cat(failed).tolist() if failed else [])
        bits = {id(checks): list(islice(read, len(one))) for checks, one in zip(late, failed)}
        for result in results:
            error = None if result.checks is None else result.checks.error(bits[id(result.checks)])
            if error is not None and not (isinstance(error, NonFiniteError) and self._skips):
                self._stopped.fill_(False)  # whoever catches the error may go on
            yield error

    @property
    def _skips(self) -> bool:
        return self.trainer.options.on_nonfinite == "skip"

    def run_at_once(
        self, images: Tensor, labels: Tensor, checks: LateChecks | None, update: bool = True
    ) -> StepResult:
        """Run one step, by :meth:`run` or for its recording.

        Args:
            images: as for :meth:`run`.
            labels: as for :meth:`run`; classes if the step checks late.
            checks: entered conditions of a step that checks late.
            update: change the weights.
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
                    trainer.mixed_precision.backward(sum(parts.values()) * (share * self._weight))
                functional.reset_net(trainer.student)
                scores.append(signals.scores.detach())
                _add(result.parts, parts, share, trainer.device)
                _add(result.logged, signals.logged, share, trainer.device)
            if update and checks is None:
                self._update(images)
            elif update:
                self._update_late(images, buffers, checks)
                result.checks = checks
        except NonFiniteError:
            for buffer, before in zip(trainer.student.buffers(), buffers):
                buffer.copy_(before)
            raise
        finally:
            functional.reset_net(trainer.student)
        result.scores = torch.cat(scores)
        return result

    def _loss(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Signals]:
        """Compute the parts of the loss, and the signals of the objective."""
        trainer = self.trainer
        x = images if trainer.encoder is None else trainer.encoder(images)
        together = SyncedBatchNorm(self._weight > 0) if self._has_batch_norm else nullcontext()
        with trainer.mixed_precision.autocast(), together:
            try:
                outputs, read = self._forward(x)
            except ValueError as error:  # on the CPU neurons refuse what is not finite
                self._explain(x, f"the student's activations are not finite: {error}", error)
                raise
            signals = Signals(class_scores(outputs, len(labels), trainer.readout), labels, x, outputs)
            signals.student = dict(zip(self._taps.wanted, read)) if self._taps else {}
            signals.epoch, signals.epochs = trainer.epoch, trainer.epochs
            signals.accumulated = self._accumulated and trainer.readout == "last"
            self._teacher(images, labels, signals)
            parts = parts_of(trainer.objective, signals)
        if torch.is_grad_enabled() and not any(part.requires_grad for part in parts.values()):
            raise ValueError(
                f"the loss of {sentence(trainer.objective)} depends on no weight, so nothing would be "
                f"trained; compute it from signals.scores, without detach() or item()"
            )
        found = {name: part.detach() for name, part in parts.items()}

        def not_finite(images: Tensor, *values: Tensor) -> NonFiniteError:
            named = ", ".join(f"{name} = {value.item():.4g}" for name, value in zip(found, values))
            return self._error(images, f"the loss is not finite ({named}); a lower learning rate may do")

        finite = torch.isfinite(sum(found.values()))
        require(finite, not_finite, images, *found.values(), skippable=self._skips)
        return parts, signals

    def _update(self, images: Tensor) -> None:
        """Run the optimizer step, or raise an error that names the layer whose gradient is not finite."""
        trainer = self.trainer
        if distributed.world_size() > 1:  # weights of the objective are outside the wrapped student
            for parameter in own_parameters(trainer.objective):
                if parameter.grad is not None:
                    parameter.grad = distributed.total(parameter.grad) / distributed.world_size()
        try:
            trainer.mixed_precision.update(trainer.optimizer, trainer.student)
        except NonFiniteError as error:
            raise self._error(images, str(error), error.layer) from error

    def _update_late(self, images: Tensor, buffers: list[Tensor], checks: LateChecks) -> None:
        """Run the optimizer step unless this step is not finite or, with ``"stop"``, an earlier one was."""
        trainer = self.trainer
        parameters, norms = trainer.mixed_precision.gradient_norms(trainer.optimizer)
        names = {id(p): name for name, p in trainer.student.named_parameters()}
        finite = torch.isfinite(norms)

        def not_finite(images: Tensor, finite: Tensor) -> NonFiniteError:
            bad = [names.get(id(p)) for p, good in zip(parameters, finite.tolist()) if not good]
            layer = next((name for name in reversed(bad) if name), None)  # backward comes from the output
            return self._error(images, f"the gradient is not finite, first in {layer}", layer)

        require(finite, not_finite, images, finite, skippable=self._skips)
        if self._stopped is None:
            self._stopped = torch.zeros((), dtype=torch.bool, device=finite.device)
        skip = self._stopped | checks.failed().any()
        self._stopped.logical_or_(checks.fatal())
        trainer.mixed_precision.update_unless(skip, trainer.optimizer, parameters, norms)
        for buffer, before in zip(trainer.student.buffers(), buffers):
            buffer.copy_(torch.where(skip, before, buffer))

    def _pieces(self, images: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, bool]]:
        """Yield a batch in ``accumulate`` pieces, each with a flag for the last."""
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

    def _error(self, images: Tensor, message: str, layer: str | None = None) -> NonFiniteError:
        """Return an error that names the first layer whose output is not finite, if there is one."""
        encoder, progress, student = self.trainer.encoder, self.trainer.progress, self.trainer.student
        before, buffers = progress.random_state(), [buffer.clone() for buffer in student.buffers()]
        try:
            self._explain(images if encoder is None else encoder(images), message)
        except NonFiniteError as error:
            return error
        finally:
            progress.set_random_state(before)
            for buffer, value in zip(student.buffers(), buffers):
                buffer.copy_(value)
        return NonFiniteError(message, layer)

    def _explain(self, x: Tensor, message: str, cause: Exception | None = None) -> None:
        """Raise an error that names the first layer whose output is not finite, if there is one."""
        progress = self.trainer.progress
        before = progress.random_state()
        layer = nonfinite.first_layer(self.trainer.student, x)
        progress.set_random_state(before)
        if layer is not None:
            raise NonFiniteError(f"{message}; first in {layer}", layer) from cause

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Call the objective's ``prepare`` on a small batch and set its taps, before the first step.

        With ``compile="graph"`` a step without its update is recorded, so that one that cannot be recorded is
        refused here. The random state of training is not changed. :meth:`run` calls this method itself.
        """
        trainer = self.trainer
        if self.num_classes is not None and self._prepared_for is trainer.objective:
            return
        self.close()
        student, teacher, chunks = trainer.student, trainer.teacher, trainer.options.time_chunks
        axis = batch_axis(images, labels)
        before = trainer.progress.random_state()  # looking must not change what is trained
        student.eval()
        functional.reset_net(student)
        try:
            with torch.no_grad():
                look, self._needs = look_at(trainer, images.to(trainer.device), axis)
        finally:
            functional.reset_net(student)
            student.train()
            trainer.progress.set_random_state(before)
        if self._needs.asks_teacher and teacher is None:
            raise ValueError(f"{trainer.objective!r} needs a teacher; give the trainer one")
        if self._needs.student:
            kind = ChunkTaps if chunks > 1 else StudentTaps
            through = any(getattr(one, "through_trace", False) for one in members(trainer.objective))
            self._taps = kind(student, self._needs.student, through)
        self._teacher = TeacherForward(teacher, self._needs)
        forward = StudentForward(student, self._taps, chunks)
        if trainer.options.compile == "graph":
            self._graph = GraphedStep(self)
        elif trainer.options.compile:
            forward.compile()
        self._has_batch_norm = distributed.world_size() > 1 and has_batch_norm(student)
        if self._has_batch_norm and trainer.options.compile:
            raise ValueError(
                "compile cannot be used with batch norm on several processes, which compute its statistics "
                "together; give compile=False"
            )
        if distributed.world_size() > 1:
            unused = distributed.any_of([self._has_unused(look.inputs)], trainer.device)[0]
            forward = DistributedDataParallel(forward, find_unused_parameters=unused)
            for parameter in own_parameters(trainer.objective):
                distributed.take_from_main(parameter.data)
        self._accumulated = resolve_readout(student, "auto") == "last"
        self._forward, self.num_classes = forward, look.num_classes
        self._prepared_for = trainer.objective
        if self._graph is not None:
            try:
                self._graph.rehearse(images, labels)
            except BaseException:
                self.close()
                raise

    def _has_unused(self, encoded: Tensor) -> bool:
        """Return whether some weights do not influence the output; other processes would wait for them."""
        student = self.trainer.student
        weights = [p for p in student.parameters() if p.requires_grad]
        before = self.trainer.progress.random_state()
        with evaluating(student), torch.enable_grad():
            outputs = student(encoded)
            found = torch.autograd.grad(outputs.float().sum(), weights, allow_unused=True)
        self.trainer.progress.set_random_state(before)
        return any(gradient is None for gradient in found)

    def close(self) -> None:
        """Remove the taps and a recorded step; :meth:`prepare` sets them again."""
        for part in (self._taps, self._teacher, self._graph):
            if part is not None:
                part.close()
        self._taps = self._teacher = self._graph = None
        self._forward = self.num_classes = self._prepared_for = None


def _add(
    total: dict[str, Tensor], values: dict[str, Tensor | float], share: float, device: torch.device
) -> None:
    """Add the values of a piece to the means of the batch."""
    for name, value in values.items():
        value = value.detach() if isinstance(value, Tensor) else torch.full((), float(value), device=device)
        total[name] = total.get(name, 0) + value * share
