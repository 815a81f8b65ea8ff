"""Training and evaluation of students (and, without a teacher, of anything that gives class scores)."""

from __future__ import annotations

import csv
import itertools
import json
import logging
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy
from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from . import attention, checkpoint, inspection, objectives, taps
from .checkpoint import check_settings
from .evaluation import batch_axis, check_batch, check_labels, device_of, evaluate
from .objectives import BatchError, class_scores, resolve_readout

log = logging.getLogger(__name__)


class LaSNNTrainer:
    """Trains a student; with a teacher, by layer-wise distillation of attention (LaSNN, Section III-B).

    The loss is ``CE + alpha / 2 * L_at`` (Eq. 8, 13) on the student's class scores. Without attention
    (``attention=None``, no teacher) it is the cross-entropy alone: hybrid training of a converted SNN, or
    with ``encoder=None`` plain training of an ANN. Another ``objective`` takes the place of ``CE``.

    Args:
        student: any SpikingJelly network in multi-step mode, ``[T, N, ...]`` to ``[T, N, K]`` or
            ``[N, K]``; without encoder any module that gives ``[N, K]``.
        teacher: any module, ``[N, ...]`` images to logits ``[N, K]``; it is put into evaluation mode and
            its weights are frozen. See ``models.WithStatistics`` where it wants other input statistics.
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
        run_dir: folder for checkpoints, ``metrics.csv`` and TensorBoard; nothing is written without.
        device: where to train; the student's own if not given.
        seed: seeds all random generators when training starts.

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
    ) -> None:
        if attention not in ("activation", "gradient", None):
            raise ValueError(f'attention must be "activation", "gradient" or None, got {attention!r}')
        self.objective = objective or objectives.CrossEntropy()
        wanted = attention is not None or self.objective.needs_teacher
        if wanted != (teacher is not None):
            raise ValueError(
                f"attention={attention!r} with {type(self.objective).__name__} "
                + ("needs a teacher" if wanted else "makes no use of a teacher")
                + "; give both, or attention=None and no teacher"
            )
        if not alpha >= 0:
            raise ValueError(f"alpha must be at least 0, got {alpha}")
        if readout not in ("auto", "last", "mean"):
            raise ValueError(f'readout must be "auto", "last" or "mean", got {readout!r}')
        self.student, self.teacher, self.encoder = student, teacher, encoder
        self.attention, self.alpha, self.pairs, self.normalise = attention, alpha, None, normalise
        self.readout = resolve_readout(student, readout)
        self.device = torch.device(device) if device is not None else device_of(student)
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.seed = seed
        self.history: list[dict[str, float]] = []
        self._names, self._through_trace = pairs, through_trace
        self._student_taps = self._teacher_taps = self._num_classes = None
        for module in (student, teacher, encoder):
            if module is not None:
                # Only the order in memory: convolutions are faster so, on either device.
                module.to(self.device, memory_format=torch.channels_last)
        if teacher is not None:
            if teacher.training:
                log.warning("the teacher was in training mode; it is used in evaluation mode")
            teacher.eval().requires_grad_(False)
        self.optimizer = optimizer or Adam(student.parameters(), lr=1e-4, weight_decay=5e-4)
        self.scheduler = scheduler

    def fit(
        self,
        train_loader: Iterable,
        val_loader: Iterable | None = None,
        epochs: int = 100,
        validate_every: int = 1,
    ) -> list[dict]:
        """Train up to ``epochs`` epochs in all, from the run folder's last checkpoint if there is one.

        Args:
            train_loader: batches ``(images, labels)``; images ``[N, C, H, W]`` as the encoder takes them,
                labels ``[N]``, whole numbers in [0, K).
            val_loader: the same, evaluated after an epoch.
            epochs: epochs this run has at its end, those of an earlier call or process included.
            validate_every: evaluate after every so many epochs, and after the last.

        Returns:
            One row for each epoch: losses, accuracy in percent (``top1``), learning rate, seconds.

        Raises:
            BatchError: an empty loader; a batch with NaN or infinity, labels out of range, or a student
                output of the wrong shape. The student keeps its weights of the step before.
            ValueError: the run folder belongs to a run with other settings.
        """
        done = self._resume(train_loader)
        if done >= epochs:
            return self.history
        if done == 0 and self.seed is not None:
            checkpoint.seed_everything(self.seed)
        writer = self._tensorboard()
        steps = len(train_loader) if hasattr(train_loader, "__len__") else None
        bar = tqdm(
            total=steps and steps * epochs, initial=(steps or 0) * done, unit="step", disable=None,
            dynamic_ncols=True,
        )  # fmt: skip
        try:
            with bar, logging_redirect_tqdm():
                for epoch in range(done + 1, epochs + 1):
                    bar.set_description(f"epoch {epoch}/{epochs}")
                    row = self._train_epoch(epoch, train_loader, bar)
                    if val_loader is not None and (epoch % validate_every == 0 or epoch == epochs):
                        result = self.evaluate(val_loader)
                        row |= {f"val_{name}": result[name] for name in ("loss", "top1")}
                    if self.scheduler is not None:
                        self.scheduler.step()
                    self._finish_epoch(row, train_loader, writer)
        finally:
            self._close_taps()
            if writer is not None:
                writer.close()
        return self.history

    def train_step(self, images: Tensor, labels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """One step of training on a batch that lies on the device already.

        Returns:
            The parts of the loss, and the class scores ``[N, K]``, both detached.

        Raises:
            BatchError: the loss is not finite; the student keeps its weights.
        """
        self.prepare(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        x = images if self.encoder is None else self.encoder(images)
        try:
            with self._student_taps or nullcontext():
                outputs = self.student(x)
                student_maps = self._student_maps()
            scores = class_scores(outputs, len(labels), self.readout)
            signals = objectives.Signals(scores, labels, x, outputs=outputs)
            signals.teacher_logits, teacher_maps = self._ask_teacher(images, labels)
            parts = self.objective(signals)
            if self.attention:
                loss = objectives.attention_loss(teacher_maps, student_maps)
                parts = parts | {"attention": self.alpha / 2 * loss}
            loss = sum(parts.values())
            if not bool(torch.isfinite(loss)):
                named = ", ".join(f"{name} = {part.item():.4g}" for name, part in parts.items())
                raise BatchError(f"the loss is not finite ({named}); a lower learning rate may do")
            loss.backward()
            self.optimizer.step()
        finally:
            functional.reset_net(self.student)
        return {name: part.detach() for name, part in parts.items()}, signals.scores.detach()

    def evaluate(self, loader: Iterable) -> dict[str, float]:
        """Loss and accuracy of the student; see :func:`evaluate`."""
        return evaluate(self.student, loader, self.encoder, readout=self.readout, device=self.device)

    def inspect(self, loader: Iterable) -> Path:
        """Write what a report shows of the student into the run folder; see :func:`inspection.inspect`."""
        if self.run_dir is None:
            raise ValueError("inspect writes into the run folder; give the trainer a run_dir")
        return inspection.inspect(
            self.student, self.teacher, self._names, loader, self.encoder, self.run_dir, device=self.device,
            attention=self.attention or "activation", readout=self.readout, seed=self.seed,
        )  # fmt: skip

    def _student_maps(self) -> list[Tensor]:
        if not self.attention:
            return []
        finish = attention.activation_map if self.attention == "activation" else attention.spike_map
        return [finish(a, normalise=self.normalise) for a in self._student_taps.collect()]

    def _ask_teacher(self, images: Tensor, labels: Tensor) -> tuple[Tensor | None, list[Tensor]]:
        """The teacher's logits and attention maps."""
        if self.teacher is None:
            return None, []
        by_gradient = self.attention == "gradient"
        with self._teacher_taps or nullcontext(), torch.set_grad_enabled(by_gradient):
            logits = self.teacher(images)
            if not self.attention:
                return logits, []
            seen = self._teacher_taps.collect()
            if by_gradient:
                # Summed, so that a sample's map does not depend on the size of its batch.
                seen = torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), seen)
        finish = attention.gradient_map if by_gradient else attention.activation_map
        maps = [
            finish(a.detach(), normalise=self.normalise, size=pair.size) for a, pair in zip(seen, self.pairs)
        ]
        return logits.detach(), maps

    def _train_epoch(self, epoch: int, loader: Iterable, bar: tqdm) -> dict[str, float]:
        start, shown = time.perf_counter(), 0.0
        losses: dict[str, MeanMetric] = {}
        correct = None
        self.student.train()
        for index, batch in enumerate(loader):
            where = f"batch {index} of epoch {epoch}"
            images, labels = check_batch(batch, where)
            if correct is None:
                self.prepare(images, labels)
                correct = MulticlassAccuracy(self._num_classes, average="micro").to(self.device)
            check_labels(labels, self._num_classes, where)
            images, labels = images.to(self.device, non_blocking=True), labels.to(self.device)
            try:
                parts, scores = self.train_step(images, labels)
            except BatchError as error:
                raise BatchError(f"{where}: {error}") from error
            correct.update(scores, labels)
            for name, part in {"loss": sum(parts.values()), **parts}.items():
                losses.setdefault(name, MeanMetric().to(self.device)).update(part, len(labels))
            bar.update()
            if time.perf_counter() - shown > 0.5 and not bar.disable:
                shown = time.perf_counter()
                means = {name: f"{metric.compute().item():.4f}" for name, metric in losses.items()}
                bar.set_postfix(means | {"top1": f"{100 * correct.compute().item():.2f}"})
        if correct is None:
            raise BatchError(f"the training loader gave no batch in epoch {epoch}")
        row = {"epoch": epoch} | {name: metric.compute().item() for name, metric in losses.items()}
        row["top1"] = 100 * correct.compute().item()
        row["lr"] = self.optimizer.param_groups[0]["lr"]
        row["seconds"] = time.perf_counter() - start
        return row

    def prepare(self, images: Tensor, labels: Tensor) -> None:
        """Before the first step: look at what the student gives, choose the pairs and set the taps.

        Draws no random number that training would have drawn. Called by :meth:`fit` and
        :meth:`train_step` themselves.
        """
        if self._num_classes is not None:
            return
        axis = batch_axis(images, labels)
        small = images.narrow(axis, 0, min(2, len(labels))).to(self.device)
        random_state = checkpoint.random_state()  # looking must not change what is trained
        generator = getattr(self.encoder, "generator", None)
        generator_state = None if generator is None else generator.get_state()
        self.student.eval()
        functional.reset_net(self.student)
        with torch.no_grad():
            encoded = small if self.encoder is None else self.encoder(small)
            outputs = self.student(encoded)
            self._num_classes = class_scores(outputs, small.shape[axis], self.readout).shape[1]
            if self.attention:
                self._set_taps(encoded, small)
        functional.reset_net(self.student)
        self.student.train()
        checkpoint.set_random_state(random_state)
        if generator_state is not None:
            generator.set_state(generator_state)

    def _set_taps(self, encoded: Tensor, images: Tensor) -> None:
        if self.pairs is None:
            self.pairs = taps.choose_pairs(self.student, self.teacher, encoded, images, self._names)
            for level, pair in enumerate(self.pairs):
                log.info("attention pair %d: %s", level, pair)
        logits = self.teacher(images)
        if self.attention == "gradient" and logits.shape[1:] != (self._num_classes,):
            raise ValueError(
                f"gradient attention needs a teacher with the student's {self._num_classes} classes, the "
                f"teacher gives shape {tuple(logits.shape)}"
            )
        what = "firing_rate" if self.attention == "activation" else "activation_map"
        self._student_taps = taps.StudentTaps(
            self.student, [p.student for p in self.pairs], what, self._through_trace
        )
        self._teacher_taps = taps.TeacherTaps(
            self.teacher, [p.teacher for p in self.pairs], self.attention == "gradient"
        )

    def _close_taps(self) -> None:
        for tap in (self._student_taps, self._teacher_taps):
            if tap is not None:
                tap.close()
        self._student_taps = self._teacher_taps = self._num_classes = None

    def _settings(self) -> dict[str, object]:
        """What a resumed run must have in common with the one that wrote the checkpoint."""
        group = {k: v for k, v in self.optimizer.defaults.items() if isinstance(v, (int, float, bool, tuple))}
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
        }

    def _resume(self, loader: Iterable) -> int:
        """Epochs done already; settings of the run folder are written or compared."""
        if self.run_dir is None:
            return len(self.history)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        check_settings(self.run_dir / "settings.json", self._settings())
        path = checkpoint.latest(self.run_dir / "checkpoints")
        if path is None or self.history:
            return len(self.history)
        weights, state = checkpoint.load(path, self.device)
        self.student.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for generator, saved in zip(self._generators(loader), state["generators"]):
            generator.set_state(saved)
        checkpoint.set_random_state(state["random"])
        self.history = state["history"]
        log.info("continuing after epoch %d from %s", len(self.history), path)
        return len(self.history)

    def _generators(self, loader: Iterable) -> list[torch.Generator]:
        owners = (self.encoder, loader, getattr(loader, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _finish_epoch(self, row: dict[str, float], loader: Iterable, writer) -> None:
        self.history.append(row)
        log.info("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
        if self.run_dir is None:
            return
        for name, value in row.items():
            if name != "epoch":
                writer.add_scalar(name, value, row["epoch"])
        state = {
            "history": self.history,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "generators": [generator.get_state() for generator in self._generators(loader)],
            "random": checkpoint.random_state(),
        }
        checkpoint.save(self.run_dir / "checkpoints", row["epoch"], self.student.state_dict(), state)
        columns = list(dict.fromkeys(itertools.chain.from_iterable(self.history)))
        with open(self.run_dir / "metrics.csv", "w", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(self.history)

    def _tensorboard(self):
        if self.run_dir is None:
            return None
        from torch.utils.tensorboard import SummaryWriter  # a second to import, needed only here

        return SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=len(self.history) + 1)
