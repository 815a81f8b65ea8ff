"""Training and evaluation of students (and, without a teacher, of anything that gives class scores)."""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..distillation import objectives, taps
from ..distillation.teaching import Distillation
from ..models.readout import BatchError, resolve_readout
from ..runtime import distributed
from . import nonfinite
from .callbacks import Callback, TensorBoard
from .dataloader import Batch, TrainingBatches, parts_of
from .evaluation import check_batch, check_labels, device_of, evaluate
from .forward import refuse_batch_norm
from .metrics import EpochMetrics
from .nonfinite import NonFiniteError
from .precision import DTYPES, Precision
from .run_folder import RunFolder
from .signals import StopRequest
from .state import Epoch, Progress
from .step import TrainingStep

log = logging.getLogger(__name__)


class LaSNNTrainer:
    """Trains a student; with a teacher, by layer-wise distillation of attention (LaSNN, Section III-B).

    The loss is ``CE + alpha / 2 * L_at`` (Eq. 8, 13) on the student's class scores. Without attention
    (``attention=None``, no teacher) it is the cross-entropy alone: hybrid training of a converted SNN, or
    with ``encoder=None`` plain training of an ANN. Another ``objective`` takes the place of ``CE``.

    The defaults are the same on every device: float32, nothing compiled, whole batches. Started by
    ``torchrun`` the same script trains on all its processes (``batch_size`` is then each one's).

    Args:
        student: any SpikingJelly network in multi-step mode, ``[T, N, ...]`` to ``[T, N, K]`` or
            ``[N, K]``; without encoder any module that gives ``[N, K]``.
        teacher: any module, ``[N, ...]`` images to logits ``[N, K]``; it is put into evaluation mode and
            its weights are frozen. See ``models.InputNormalization`` where it wants other input statistics.
        encoder: gives the student's input its time axis; ``None`` where the loader's batches have it
            already or the student has none.
        attention: ``"activation"`` (Eq. 5-8), ``"gradient"`` (Eq. 10-13) or ``None``.
        alpha: weight of the attention loss, constant (the paper names a decay but gives none).
        objective: what is trained beside the attention, cross-entropy if not given.
        pairs: ``(student module, teacher module)`` names for each level; chosen by itself and logged if
            not given.
        normalise: L2-normalise the attention maps.
        through_trace: gradient attention only; let its gradient also flow through the spike trace.
        optimizer: of the student's parameters; Adam at 1e-4 with weight decay 5e-4 if not given.
        scheduler: stepped once an epoch.
        readout: class scores of ``[T, N, K]``: ``"last"`` step or ``"mean"`` over time; ``"auto"`` is
            the last where the student ends in an ``IntegratorNode``, the mean elsewhere.
        run_dir: folder for checkpoints, ``metrics.csv`` (by epoch), ``steps.csv`` and TensorBoard; nothing
            is written without. With it SIGTERM and SIGINT finish the step and save before they act.
        device: where to train; the student's own if not given.
        seed: seeds all random generators when training starts.
        precision: of convolutions and linear layers: ``"float32"``, ``"bfloat16"``, or ``"float16"`` with
            scaled gradients; potentials, maps and losses are float32 in each.
        compile: let ``torch.compile`` make the student's pass faster; the first steps take minutes.
        accumulate: run each batch in so many pieces, one after the other, and add their gradients: the same
            step in less memory (batch norm aside, which sees a piece).
        time_chunks: run the time steps in so many pieces and keep only the neurons' state between them:
            the same gradients in less memory and about a third more time. Not with batch norm.
        clip_norm: longest gradient, L2 over all parameters; not clipped if not given.
        on_nonfinite: at a loss or gradient that is NaN or infinite ``"stop"`` the run, or ``"skip"`` the
            batch and count it.
        checkpoint_every: steps, or time, between checkpoints; each epoch ends with one anyway.
        callbacks: told how training goes.

    Raises:
        ValueError: arguments that do not go together, named in the message.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None = None,
        *,
        encoder: nn.Module | None = None,
        attention: Literal["activation", "gradient"] | None = "activation",
        alpha: float = 0.9,
        objective: objectives.Objective | None = None,
        pairs: Sequence[tuple[str, str]] | None = None,
        normalise: bool = True,
        through_trace: bool = False,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        readout: Literal["auto", "last", "mean"] = "auto",
        run_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        precision: Literal["float32", "bfloat16", "float16"] = "float32",
        compile: bool = False,
        accumulate: int = 1,
        time_chunks: int = 1,
        clip_norm: float | None = None,
        on_nonfinite: Literal["stop", "skip"] = "stop",
        checkpoint_every: int | timedelta = timedelta(minutes=10),
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.objective = objective or objectives.CrossEntropy()
        _check_teacher(teacher, attention, self.objective)
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        _check_choice("readout", readout, ("auto", "last", "mean"))
        _check_choice("precision", precision, tuple(DTYPES))
        _check_choice("on_nonfinite", on_nonfinite, ("stop", "skip"))
        _check_count("accumulate", accumulate)
        _check_count("time_chunks", time_chunks)
        if not (isinstance(checkpoint_every, timedelta) and checkpoint_every > timedelta(0)):
            _check_count("checkpoint_every", checkpoint_every)
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be above 0, or None, got {clip_norm!r}")
        if time_chunks > 1:
            refuse_batch_norm(student)
        device = torch.device(device) if device is not None else device_of(student)
        self.device = distributed.initialise(device)
        self.student, self.teacher, self.encoder = student, teacher, encoder
        self.attention, self.alpha, self.normalise = attention, alpha, normalise
        self.readout = resolve_readout(student, readout)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.seed, self.callbacks, self.checkpoint_every = seed, list(callbacks), checkpoint_every
        self.precision, self.compile, self.clip_norm = precision, compile, clip_norm
        self.accumulate, self.time_chunks, self.on_nonfinite = accumulate, time_chunks, on_nonfinite
        self._names, self._through_trace = pairs, through_trace
        for module in (student, teacher, encoder):
            if module is not None:
                _place(module, self.device)
        if teacher is not None:
            if teacher.training:
                log.warning("the teacher was in training mode; it is used in evaluation mode")
            teacher.eval().requires_grad_(False)
        self.optimizer = optimizer or Adam(student.parameters(), lr=1e-4, weight_decay=5e-4)
        self.scheduler = scheduler
        _check_optimizer(student, self.optimizer, scheduler)
        self._numbers = Precision(precision, self.device, clip_norm)
        self._folder: RunFolder | None = None
        self._progress = Progress(student, self.optimizer, scheduler, self._numbers.scaler, self.device)
        self._progress.use_generators([encoder])
        self._step = TrainingStep(
            student=student,
            encoder=encoder,
            objective=self.objective,
            alpha=alpha,
            readout=self.readout,
            distillation=Distillation(
                student, teacher, attention, normalise, through_trace, pairs, chunked=time_chunks > 1
            ),
            numbers=self._numbers,
            optimizer=self.optimizer,
            progress=self._progress,
            accumulate=accumulate,
            time_chunks=time_chunks,
            compile=compile,
        )

    @property
    def history(self) -> list[dict[str, float]]:
        """A row for each epoch done, as :meth:`fit` returns them."""
        return self._progress.history

    @property
    def step(self) -> int:
        """Optimiser steps done in :meth:`fit`, those before a restart included."""
        return self._progress.step

    @property
    def pairs(self) -> list[taps.Pair] | None:
        """Layers that are compared, once they are chosen."""
        return self._step.distillation.pairs

    def fit(
        self,
        train_loader: Iterable,
        val_loader: Iterable | None = None,
        epochs: int = 100,
        validate_every: int = 1,
    ) -> list[dict]:
        """Train up to ``epochs`` epochs in all, from the run folder's last checkpoint if there is one.

        A run that was killed within an epoch goes on within it, on the CPU with the same result to the bit:
        the loader's order, its workers' random numbers and all others are taken up again. (A loader that is
        no plain ``DataLoader`` is run again up to there, and must draw from the same random generators.)

        Args:
            train_loader: batches ``(images, labels)``; images ``[N, C, H, W]`` as the encoder takes them,
                labels ``[N]``, whole numbers in [0, K).
            val_loader: the same, evaluated after an epoch.
            epochs: epochs this run has at its end, those of an earlier call or process included.
            validate_every: evaluate after every so many epochs, and after the last.

        Returns:
            One row for each epoch: losses, accuracy in percent (``top1``), learning rate, seconds, and
            batches left out (``skipped``) if there were any.

        Raises:
            BatchError: an empty loader; a batch with NaN or infinity, labels out of range, or a student
                output of the wrong shape. The student keeps its weights of the step before.
            NonFiniteError: a loss or gradient that is not finite, likewise (a ``BatchError``).
            CheckpointError: checkpoints that are all damaged, or one that cannot be written.
            ValueError: the run folder belongs to a run with other settings.
            SystemExit, KeyboardInterrupt: after SIGTERM or SIGINT, once a checkpoint is written.
        """
        _check_count("validate_every", validate_every)
        batches = TrainingBatches(train_loader)
        self._progress.use_generators([self.encoder, *parts_of(train_loader, val_loader)])
        if self.run_dir is not None:
            self._folder = RunFolder(self.run_dir, self.checkpoint_every)
            self._folder.check_settings(self.settings())
        self._progress.resume(self._folder)
        if len(self.history) >= epochs:
            return self.history
        self._progress.seed(self.seed)
        told = self._told()
        steps = len(batches) or None
        bar = tqdm(
            total=steps and steps * epochs, initial=self.step, unit="step", dynamic_ncols=True,
            disable=None if distributed.is_main() else True,
        )  # fmt: skip
        stop = StopRequest()
        with ExitStack() as ending:
            before = self._progress.random_state()  # what callbacks draw now a resumed run would draw again
            for callback in told:
                callback.on_fit_start(self)
                ending.callback(callback.on_fit_end)
            self._progress.set_random_state(before)
            if self._folder is not None:
                ending.callback(self._folder.close)
            ending.callback(self._step.close)
            with bar, logging_redirect_tqdm(), stop if self._folder is not None else nullcontext():
                for epoch in range(len(self.history) + 1, epochs + 1):
                    bar.set_description(f"epoch {epoch}/{epochs}")
                    row = self._train_epoch(batches, self._progress.begin(epoch), bar, stop, told)
                    if val_loader is not None and (epoch % validate_every == 0 or epoch == epochs):
                        result = self.evaluate(val_loader)
                        row |= {f"val_{name}": result[name] for name in ("loss", "top1")}
                    self._finish_epoch(row, told)
            if distributed.any_of([stop.signal is not None], self.device)[0]:
                stop.leave()
        return self.history

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step of training on a batch that lies on the device already; see :meth:`TrainingStep.run`.

        Returns:
            The parts of the loss, and the class scores ``[N, K]``, both detached.

        Raises:
            NonFiniteError: the loss or its gradient is not finite; the student keeps its weights.
        """
        return self._step.run(images, labels)

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Before the first step: look at what the student gives, choose the pairs and set the taps.

        Draws no random number that training would have drawn. Called by :meth:`fit` and
        :meth:`train_step` themselves.
        """
        self._step.prepare(images, labels)

    def evaluate(self, loader: Iterable) -> dict[str, float]:
        """Loss and accuracy of the student; see :func:`evaluate`.

        Random numbers that it draws are given back, so that training does not depend on it.
        """
        before = self._progress.random_state()
        try:
            return evaluate(self.student, loader, self.encoder, readout=self.readout, device=self.device)
        finally:
            self._progress.set_random_state(before)

    def _train_epoch(
        self,
        batches: TrainingBatches,
        epoch: Epoch,
        bar: tqdm,
        stop: StopRequest,
        told: Sequence[Callback],
    ) -> dict[str, float]:
        first, begun, shown = epoch.position, time.perf_counter() - epoch.seconds, 0.0
        source = batches.epoch(epoch.number, first, lambda: self._progress.set_random_state(epoch.random))
        self.student.train()
        while True:
            epoch.seconds = time.perf_counter() - begun
            self._save_if_due(epoch, first, len(batches), stop)
            batch = next(source, None)
            if not (batches.even or distributed.all_of(batch is not None, self.device)):
                batch = None
            if batch is None:
                break
            where = f"batch {batch.position} of epoch {epoch.number}"
            images, labels = check_batch(batch.content, where)
            self.prepare(images, labels)
            check_labels(labels, self._step.num_classes, where)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)
            epoch.position = batch.position + 1
            try:
                parts, scores = self.train_step(images, labels)
            except NonFiniteError as error:
                self._leave_out(error, where, batch, images, labels)
                continue
            except BatchError as error:
                raise BatchError(f"{where}: {error}") from error
            self._progress.step += 1
            if epoch.metrics is None:
                epoch.metrics = EpochMetrics(self._step.num_classes, self.device)
            epoch.metrics.update(parts, scores, labels)
            if self._folder is not None:
                self._folder.add_step(self.step, epoch.number, self._lr, parts)
            for callback in told:
                callback.on_step(self.step, parts)
            bar.update()
            if time.perf_counter() - shown > 0.5 and not bar.disable:
                shown = time.perf_counter()
                means = epoch.metrics.compute(together=False)
                bar.set_postfix({name: f"{value:.4f}" for name, value in means.items()})
        if epoch.metrics is None:
            gave = f"only batches that were left out, {epoch.skipped}" if epoch.skipped else "no batch"
            raise BatchError(f"the training loader gave {gave} in epoch {epoch.number}")
        for buffer in self.student.buffers():  # batch norm's: the main process' are used and saved
            distributed.take_from_main(buffer)
        row = {"epoch": epoch.number} | epoch.metrics.compute() | {"lr": self._lr, "seconds": epoch.seconds}
        return row | ({"skipped": epoch.skipped} if epoch.skipped else {})

    def _save_if_due(self, epoch: Epoch, first: int, last: int, stop: StopRequest) -> None:
        """Write a checkpoint within the epoch where one is due; end here if a signal asked for it."""
        if self._folder is None:
            return
        due = first < epoch.position != last and self._folder.due(self.step)
        stopped, due = distributed.any_of([stop.signal is not None, due], self.device)
        if due or (stopped and epoch.position > first):
            self._progress.save(self._folder)
        if stopped:
            log.warning("stopped and saved after step %d; start the same run again to go on", self.step)
            stop.leave()

    def _leave_out(
        self, error: NonFiniteError, where: str, batch: Batch, images: Tensor, labels: Tensor
    ) -> None:
        """Count a step that is not finite, or keep it on disk and stop."""
        shown = f"; its samples are {batch.indices[:16]}" if batch.indices else ""
        message = f"{where}: {error}{shown}"
        if self.on_nonfinite == "skip":
            self._progress.epoch.skipped += 1
            log.warning("left out: %s", message)
            return
        if self.run_dir is not None:
            folder = self.run_dir / "nonfinite"
            if distributed.world_size() > 1:
                folder = folder / f"process{distributed.rank()}"
            at = {"step": self.step + 1, "epoch": self._progress.epoch.number, "batch": batch.position}
            nonfinite.keep_for_inspection(folder, self.student, images, labels, error, at, batch.indices)
            message += f"; the step is kept in {folder}"
        raise NonFiniteError(message, error.layer) from error

    def _finish_epoch(self, row: dict[str, float], told: Sequence[Callback]) -> None:
        if self.scheduler is not None:
            self.scheduler.step()
        log.info("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        self._progress.finish(row)
        for callback in told:
            callback.on_epoch(row)
        if self._folder is not None:
            self._progress.save(self._folder)
            self._folder.write_history(self.history)

    def _told(self) -> list[Callback]:
        if not distributed.is_main():
            return []
        return self.callbacks + ([] if self.run_dir is None else [TensorBoard(self.run_dir / "tensorboard")])

    @property
    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def settings(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that wrote the run folder."""
        group = {k: v for k, v in self.optimizer.defaults.items() if isinstance(v, (int, float, bool, tuple))}
        later = {
            "precision": (self.precision, "float32"),
            "accumulate": (self.accumulate, 1),
            "time_chunks": (self.time_chunks, 1),
            "clip_norm": (self.clip_norm, None),
            "on_nonfinite": (self.on_nonfinite, "stop"),
            "processes": (distributed.world_size(), 1),
        }
        return {
            "student": type(self.student).__name__,
            "parameters": sum(p.numel() for p in self.student.parameters()),
            "encoder": repr(self.encoder),
            "attention": self.attention,
            "alpha": self.alpha if self.attention else None,
            "objective": repr(self.objective),
            "normalise": self.normalise,
            "through_trace": self._through_trace,
            "pairs": None if self._names is None else [list(pair) for pair in self._names],
            "readout": self.readout,
            "optimizer": type(self.optimizer).__name__,
            "hyperparameters": json.loads(json.dumps(group)),
            "seed": self.seed,
        } | {name: value for name, (value, default) in later.items() if value != default}


def _check_teacher(teacher: nn.Module | None, attention: str | None, objective: objectives.Objective) -> None:
    if attention not in ("activation", "gradient", None):
        raise ValueError(f'attention must be "activation", "gradient" or None, got {attention!r}')
    wanted = attention is not None or objective.needs_teacher
    if wanted != (teacher is not None):
        raise ValueError(
            f"attention={attention!r} with {type(objective).__name__} "
            + ("needs a teacher" if wanted else "makes no use of a teacher")
            + "; give both, or attention=None and no teacher"
        )


def _check_optimizer(student: nn.Module, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
    own = {id(parameter) for parameter in student.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"optimizer has none of the student's parameters, so nothing would be trained; make it of "
            f"student.parameters() of this very {type(student).__name__}"
        )
    if isinstance(scheduler, ReduceLROnPlateau):
        raise ValueError("scheduler is a ReduceLROnPlateau, whose step wants a metric; use one that does not")
    if scheduler is not None and scheduler.optimizer is not optimizer:
        raise ValueError(
            f"scheduler ({type(scheduler).__name__}) belongs to another optimizer than the trainer's; give "
            f"the optimizer that it was made for, too"
        )


def _place(module: nn.Module, device: torch.device) -> None:
    """Bring a network to a device; its convolutions' weights in the order in which they are faster."""
    module.to(device)
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if tensor.dim() == 4:  # module.to does so too, but refuses a tensor of five dimensions
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        *others, last = (f'"{one}"' for one in allowed)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number, at least 1, got {value!r}")
