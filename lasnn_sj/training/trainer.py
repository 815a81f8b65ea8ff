"""Trainer for any network and any objective."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm import tqdm

from ..distillation.objective import CrossEntropy, Objective, own_parameters, trained_modules
from ..models.readout import BatchError, resolve_readout
from ..runtime import distributed
from ..runtime.progress import progress_bar
from ..runtime.random_state import deterministic_algorithms
from . import checks, fingerprint, graph, nonfinite
from .callbacks import Callback, TensorBoard
from .console import lines_shown
from .dataloader import Batch, TrainingBatches
from .evaluation import check_batch, check_labels, device_of, evaluate
from .forward import place, refuse_batch_norm
from .metrics import EpochMetrics, best_row, describe, rows_since_best
from .nonfinite import NonFiniteError
from .options import TrainingOptions, check_choice, check_count
from .precision import MixedPrecision, add_missing
from .run_folder import BEST, WEIGHTS, RunFolder
from .signals import Stopped, StopRequest, outlasting
from .state import Epoch, Progress
from .step import StepResult, TrainingStep

log = logging.getLogger(__name__)


class Trainer:
    """Train a network on an objective: an SNN by surrogate gradients, or an ANN with ``encoder=None``.

    Under ``torchrun`` the same script trains on all processes; ``batch_size`` then counts per process.
    Student, teacher, encoder, objective, optimizer and options are attributes and may be changed between
    steps.

    Args:
        student: any SpikingJelly network in multi-step mode, ``[T, N, ...]`` to ``[T, N, K]`` or
            ``[N, K]``; without encoder any module that gives ``[N, K]``.
        objective: loss that is trained; cross-entropy if not given. Its own weights, if it has some, are
            added to the optimizer.
        teacher: any module, ``[N, ...]`` images to logits ``[N, K]``; put into evaluation mode and frozen.
        encoder: adds the time axis to the student's input; ``None`` if the loader's batches have one
            or the student takes none.
        optimizer: of the student's parameters; Adam at 1e-4 with weight decay 5e-4 if not given.
        scheduler: stepped once an epoch; ``ReduceLROnPlateau`` with the validation loss.
        readout: class scores of ``[T, N, K]``: ``"last"`` step or ``"mean"`` over time; ``"auto"`` is
            the last where the student ends in an ``IntegratorNode``, the mean elsewhere.
        run_dir: folder for checkpoints, ``metrics.csv`` (by epoch), ``steps.csv`` and TensorBoard; nothing
            is written without it. With it, SIGTERM, SIGHUP and SIGINT stop after the step is saved.
        device: device to train on; the student's own if not given.
        seed: seeds all random generators when training starts.
        options: precision, memory, gradients, checkpoints.
        callbacks: objects whose hooks are called.

    Raises:
        ValueError: arguments that do not go together, named in the message.
    """

    def __init__(
        self,
        student: nn.Module,
        objective: Objective | None = None,
        *,
        teacher: nn.Module | None = None,
        encoder: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        readout: Literal["auto", "last", "mean"] = "auto",
        run_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        options: TrainingOptions | None = None,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        checks.networks(student, teacher, encoder)
        checks.settings(optimizer, scheduler, options, callbacks, seed)
        self.objective = CrossEntropy() if objective is None else objective
        self.options = TrainingOptions() if options is None else options
        checks.teacher(teacher, self.objective)
        check_choice("readout", readout, ("auto", "last", "mean"))
        if self.options.time_chunks > 1:
            refuse_batch_norm(student)
        device = checks.device(device_of(student) if device is None else device)
        self.device = distributed.initialise(device)
        if self.options.precision == "float16" and self.device.type == "cpu":
            log.warning("precision='float16' is slower than 'float32' on a CPU, many times; give 'bfloat16'")
        self.student, self.teacher, self.encoder = student, teacher, encoder
        self.readout = resolve_readout(student, readout)
        self.run_dir = checks.run_dir(run_dir, self.options)
        self.seed, self.callbacks, self.epochs = seed, list(callbacks), 1
        own = dict(trained_modules(self.objective))
        for module in (student, teacher, encoder, *own.values()):
            if module is not None:
                place(module, self.device)
        if teacher is not None:
            if teacher.training:
                log.warning("the teacher was in training mode; it is used in evaluation mode")
            teacher.eval().requires_grad_(False)
        trained = [*student.parameters(), *own_parameters(self.objective)]
        fused = self.device.type == "cuda" or None  # in one kernel, which can skip a bad step by itself
        self.optimizer = optimizer or Adam(trained, lr=1e-4, weight_decay=5e-4, fused=fused)
        add_missing(self.optimizer, own_parameters(self.objective))
        self.scheduler = scheduler
        checks.optimizer(student, self.optimizer, scheduler)
        self.mixed_precision = MixedPrecision(self.options.precision, self.device, self.options)
        if self.options.compile == "graph":
            graph.check(self)
        self.progress = Progress(
            student, self.optimizer, scheduler, self.mixed_precision.scaler, self.device, own
        )
        self.progress.use_generators({"encoder": encoder, "student": student})
        self._folder: RunFolder | None = None
        self._fingerprint: dict[str, object] | None = None
        self._step = TrainingStep(self)
        self._direct: list[StepResult] = []  # steps of train_step that are checked late
        self._unread: list[tuple[Batch, Tensor, Tensor, StepResult]] = []  # steps that are checked late

    def __repr__(self) -> str:
        count = sum(p.numel() for p in self.student.parameters())
        said = [
            f"{type(self.student).__name__} of {count:,} parameters",
            fingerprint.sentence(self.objective),
        ]
        if self.teacher is not None:
            said.append(f"teacher {type(self.teacher).__name__}")
        said += [repr(self.encoder)] * (self.encoder is not None)
        said.append(f"{type(self.optimizer).__name__} at {self._lr:g} on {self.device}")
        said += [f"in {self.run_dir}"] * (self.run_dir is not None)
        return f"{type(self).__name__}({', '.join(said)}, {self.epoch} epochs done)"

    @property
    def epoch(self) -> int:
        """Epochs finished so far."""
        return len(self.history)

    @property
    def history(self) -> list[dict[str, float]]:
        """One row per finished epoch, as returned by :meth:`fit`."""
        return self.progress.history

    @property
    def step(self) -> int:
        """Optimizer steps of :meth:`fit` so far, those before a restart included."""
        return self.progress.step

    def fit(
        self,
        train_loader: Iterable,
        val_loader: Iterable | None = None,
        epochs: int = 100,
        validate_every: int = 1,
    ) -> list[dict]:
        """Train up to ``epochs`` epochs in all, from the run folder's last checkpoint if there is one.

        On the CPU a resumed run gives the same result to the bit. A loader that is not a plain ``DataLoader``
        is iterated again up to the batch of the checkpoint; it must draw from the same random generators.

        Args:
            train_loader: batches ``(images, labels)``; labels ``[N]``, integers in [0, K).
            val_loader: the same, evaluated after an epoch.
            epochs: total number of epochs, those of earlier calls and processes included.
            validate_every: evaluate after every so many epochs, and after the last.

        Returns:
            One row per epoch: losses, ``top1`` in percent, ``lr``, ``seconds``, ``skipped`` batches if any.

        Raises:
            BatchError: an empty loader, a batch or output that cannot be used, or (``NonFiniteError``) a loss
                or gradient that is not finite. The student keeps its weights of the step before.
            CheckpointError: all checkpoints are damaged, or one cannot be written.
            ValueError: the run folder belongs to a run with other settings, networks or data.
            LockError: another process writes to the run folder.
            SystemExit, KeyboardInterrupt: after SIGTERM, SIGHUP or SIGINT, once a checkpoint is written.
        """
        check_count("validate_every", validate_every)
        check_count("epochs", epochs)
        checks.loaders(train_loader, val_loader, self.scheduler, self.options)
        self.epochs = epochs
        with lines_shown(), ExitStack() as ending:
            ending.enter_context(deterministic_algorithms(self.options.deterministic))
            if self.run_dir is not None:
                self._folder = ending.enter_context(RunFolder(self.run_dir, self.options.checkpoint_every))
                ending.enter_context(outlasting(train_loader, val_loader))
            batches = TrainingBatches(train_loader)
            self.progress.use_generators(self._owners(train_loader, val_loader))
            if self._folder is not None:
                self._fingerprint = self._fingerprint or fingerprint.run(self, train_loader)
                self._folder.check_settings(self.settings(), self._fingerprint)
            self.progress.resume(self._folder)
            if len(self.history) >= epochs or self._is_over():
                where = "" if self.run_dir is None else f" in {self.run_dir}"
                how = "has its %d epochs already" if self.epoch >= epochs else "stopped early after epoch %d"
                log.warning(f"the run%s {how}; nothing was trained", where, self.epoch)
                if self._folder is not None:  # a process may have been killed before it wrote them
                    self._folder.write_weights(WEIGHTS, self.student)
                return self.history
            self.progress.seed(self.seed)
            callbacks = self._callbacks()
            steps = len(batches) or None
            bar = progress_bar(
                total=steps and steps * epochs, initial=self.step, unit="step",
                quiet=not distributed.is_main(),
            )  # fmt: skip
            stop = StopRequest()
            before = self.progress.random_state()  # callbacks may draw, also when a run resumes
            for callback in callbacks:
                callback.on_fit_start(self)
                ending.callback(callback.on_fit_end, self)
            self.progress.set_random_state(before)
            ending.callback(self._step.close)
            with bar, stop if self._folder is not None else nullcontext():
                for epoch in range(len(self.history) + 1, epochs + 1):
                    bar.set_description(f"epoch {epoch}/{epochs}")
                    row = self._train_epoch(batches, self.progress.begin(epoch), bar, stop, callbacks)
                    if val_loader is not None and (epoch % validate_every == 0 or epoch == epochs):
                        result = self._validate(val_loader, stop)
                        row |= {f"val_{name}": result[name] for name in ("loss", "top1")}
                        for callback in callbacks:
                            callback.on_validation(self, result)
                    self._finish_epoch(row, callbacks)
                    if self._is_over():
                        break
            self._end()
            if distributed.any_of([stop.signal is not None], self.device)[0]:
                stop.leave()
        return self.history

    @property
    def best(self) -> Mapping[str, float] | None:
        """The row of :attr:`history` that is best by ``options.monitor``, ``None`` before a validation."""
        return best_row(self.history, self.options.monitor)

    def train_step(self, images: Tensor, labels: Tensor) -> StepResult:
        """Run one training step on a batch that lies on the device; the results are detached.

        A loss or gradient that is not finite raises :class:`NonFiniteError`; the student keeps its weights.
        On CUDA with a fused optimizer the step does not wait for the device. An error is then raised up to
        16 steps later, or by :meth:`finish_steps`; the steps after the bad one are not applied.
        """
        if self._step.late:
            with self._step.checking():
                self.prepare(images, labels)
                check_labels(labels, self._step.num_classes, "train_step")
        result = self._step.run(images, labels)
        self._direct.append(result)
        if len(self._direct) >= self._step.lag:
            self.finish_steps()
        return result

    def finish_steps(self) -> None:
        """Check the steps of :meth:`train_step` that are not checked yet and raise the first error."""
        results, self._direct = self._direct, []
        for error in self._step.errors(results):
            if error is not None:
                raise error

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Choose pairs and set taps; :meth:`fit` and :meth:`train_step` do so before their first step."""
        self._step.prepare(images, labels)

    def evaluate(self, loader: Iterable) -> dict[str, float]:
        """Evaluate the student, see :func:`evaluate`; restores the random-number generators afterwards."""
        before = self.progress.random_state()
        try:
            return evaluate(self.student, loader, self.encoder, readout=self.readout, device=self.device)
        finally:
            self.progress.set_random_state(before)

    def _owners(self, *loaders: Iterable | None) -> dict[str, object]:
        """Return the objects whose random-number generators belong to the run."""
        own = {name: getattr(self, name) for name in ("encoder", "student", "teacher", "objective")}
        return own | dict(zip(("train_loader", "val_loader"), loaders))

    def _validate(self, loader: Iterable, stop: StopRequest) -> dict[str, float]:
        """Evaluate; in a single process a signal interrupts it, and the resumed run repeats it."""
        try:
            with stop.safely(at_once=distributed.world_size() == 1):
                return self.evaluate(loader)
        except Stopped:
            self._save_and_leave(stop)

    def _train_epoch(
        self,
        batches: TrainingBatches,
        epoch: Epoch,
        bar: tqdm,
        stop: StopRequest,
        callbacks: Sequence[Callback],
    ) -> dict[str, float]:
        first, begun, shown = epoch.position, time.perf_counter() - epoch.seconds, 0.0
        source = batches.epoch(epoch.number, first, lambda: self.progress.set_random_state(epoch.random))
        count = partial(self._count, epoch, bar, callbacks)
        self._unread = []  # of an epoch that an exception ended
        self.student.train()
        while True:
            epoch.seconds = time.perf_counter() - begun
            self._save_if_due(epoch, first, len(batches), stop, count)
            try:
                with stop.safely():
                    batch = next(source, None)
            except Stopped:  # a loader's worker died of the signal
                count()
                self._save_and_leave(stop, save=epoch.position > first)
            if not (batches.even or distributed.all_of(batch is not None, self.device)):
                batch = None
            if batch is None:
                break
            where = f"batch {batch.position} of epoch {epoch.number}"
            with self._step.checking():
                images, labels = check_batch(batch.content, where)
                if self._step.num_classes is None:
                    checks.time_axis(batches.loader, images, self.encoder)
                self.prepare(images, labels)
                check_labels(labels, self._step.num_classes, where)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)
            epoch.position = batch.position + 1
            try:
                result = self._step.run(images, labels, batch.weight)
            except NonFiniteError as error:
                nonfinite.leave_out(self, error, where, batch, images, labels)
                continue
            except BatchError as error:
                raise BatchError(f"{where}: {error}") from error
            self._unread.append((batch, images, labels, result))
            if len(self._unread) >= self._step.lag:
                count()
            if time.perf_counter() - shown > 0.5 and not bar.disable and epoch.metrics is not None:
                shown = time.perf_counter()
                means = epoch.metrics.compute(together=False)
                said = {n: f"{value:.4f}" for n, value in means.items() if n not in result.logged}
                bar.set_postfix(said)
        count()
        if epoch.metrics is None:
            gave = f"only batches that were left out, {epoch.skipped}" if epoch.skipped else "no batch"
            raise BatchError(f"the training loader gave {gave} in epoch {epoch.number}")
        for buffer in self.student.buffers():  # the main process' are used and saved
            distributed.take_from_main(buffer)
        row = {"epoch": epoch.number} | epoch.metrics.compute() | {"lr": self._lr, "seconds": epoch.seconds}
        return row | ({"skipped": epoch.skipped} if epoch.skipped else {})

    def _count(self, epoch: Epoch, bar: tqdm, callbacks: Sequence[Callback]) -> None:
        """Count the unread steps, or raise the error of the first bad one."""
        unread, self._unread = self._unread, []
        errors = self._step.errors([result for *_, result in unread])
        for (batch, images, labels, result), error in zip(unread, errors):
            where = f"batch {batch.position} of epoch {epoch.number}"
            if isinstance(error, NonFiniteError):
                nonfinite.leave_out(self, error, where, batch, images, labels)
                continue
            if error is not None:
                raise error if isinstance(error, BatchError) else BatchError(f"{where}: {error}") from error
            self.progress.step += 1
            if epoch.metrics is None:
                epoch.metrics = EpochMetrics(self._step.num_classes, self.device)
            epoch.metrics.update(result.parts, result.scores, labels, result.logged, batch.weight > 0)
            if self._folder is not None:
                weighted = {name: part * batch.weight for name, part in result.parts.items()}
                self._folder.add_step(self.step, epoch.number, self._lr, weighted)
            for callback in callbacks:
                callback.on_step(self, result.parts)
            bar.update()

    def _save_if_due(
        self, epoch: Epoch, first: int, last: int, stop: StopRequest, count: Callable[[], None]
    ) -> None:
        """Write a checkpoint if one is due; stop if a signal was received."""
        if self._folder is None:
            return
        due = first < epoch.position != last and self._folder.due(self.step + len(self._unread))
        stopped, due = distributed.any_of([stop.signal is not None, due], self.device)
        if stopped or due:
            count()
        if stopped:
            self._save_and_leave(stop, save=epoch.position > first)
        if due:
            self.progress.save(self._folder)

    def _save_and_leave(self, stop: StopRequest, save: bool = True) -> NoReturn:
        try:
            if save:
                self.progress.save(self._folder)
            log.warning("stopped and saved after step %d; start the same run again to resume", self.step)
        except Exception:  # must not keep the process from ending
            log.exception("stopped after step %d, which could not be saved", self.step)
        stop.leave()

    def _finish_epoch(self, row: dict[str, float], callbacks: Sequence[Callback]) -> None:
        if isinstance(self.scheduler, ReduceLROnPlateau):
            if "val_loss" in row:
                self.scheduler.step(row["val_loss"])
        elif self.scheduler is not None:
            self.scheduler.step()
        where = "" if self.run_dir is None else f"{'/'.join(self.run_dir.parts[-2:])}: "
        log.info("%s%s", where, describe(row))
        self.progress.finish(row)
        for callback in callbacks:
            callback.on_epoch(self, row)
        if self.options.keep_best and self.best is row:  # before the checkpoint: a killed run comes by again
            self._folder.write_weights(BEST, self.student)
        if self._folder is not None:
            self.progress.save(self._folder)
            self._folder.write_history(self.history)

    def _is_over(self) -> bool:
        """Return whether the patience of early stopping is exhausted."""
        patience = self.options.patience
        return patience is not None and rows_since_best(self.history, self.options.monitor) >= patience

    def _end(self) -> None:
        """Write the last weights, and log the best epoch if one is monitored."""
        options = self.options
        if self._folder is not None:
            self._folder.write_weights(WEIGHTS, self.student)
        if self._is_over():
            log.info("stopped early: no better epoch in %d validations", options.patience)
        if self.best is not None and (options.keep_best or options.patience):
            value = describe({options.monitor: self.best[options.monitor]})
            kept = f", weights in {self.run_dir / BEST}" if options.keep_best else ""
            log.info("best epoch %d: %s%s", self.best["epoch"], value, kept)

    def _callbacks(self) -> list[Callback]:
        if not distributed.is_main():
            return []
        return self.callbacks + ([] if self.run_dir is None else [TensorBoard(self.run_dir / "tensorboard")])

    @property
    def _lr(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def settings(self) -> dict[str, object]:
        """Return the settings that a resumed run must share with the run that wrote the folder."""
        return fingerprint.settings(self)
