"""A training step as one CUDA graph: encoder, networks, losses, backward pass, checks and update."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.device_loader import DeviceLoader
from ..data.late_checks import LateChecks, require
from ..models.readout import BatchError
from ..runtime import distributed
from ..runtime.random_state import generators_of

if TYPE_CHECKING:
    from .step import StepResult, TrainingStep
    from .trainer import Trainer

WARM_UP = 3  # steps that initialise libraries, kernels and the optimizer's state before the recording


class CudaRecorder:
    """Runs a function on a side stream, or records the kernels that it launches there and replays them."""

    device = "cuda"

    def __init__(self, device: torch.device) -> None:
        self._stream, self._graph = torch.cuda.Stream(device), None

    def run(self, function: Callable[[], StepResult]) -> StepResult:
        """Run a function, in order with the work of the current stream."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], StepResult], generators: Iterable[torch.Generator]) -> StepResult:
        """Record a function without running its kernels; its results get their values by :meth:`replay`."""
        self._graph = torch.cuda.CUDAGraph()
        for generator in generators:
            self._graph.register_generator_state(generator)
        # "thread_local": a loader's thread may pin memory meanwhile
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="thread_local"):
            return function()

    def replay(self) -> None:
        """Run the recorded kernels, on the memory that they were recorded with."""
        self._graph.replay()

    def close(self) -> None:
        """Drop the recording and its memory."""
        if self._graph is not None:
            torch.cuda.synchronize(self._stream.device)
            self._graph.reset()
            self._graph = None


class GraphedStep:
    """Runs training steps by replaying a recorded one.

    Before training, :meth:`rehearse` refuses a step that cannot be recorded. The first :data:`WARM_UP` steps
    run as usual. The next one is recorded, and later ones copy their batch to the recorded input and replay.
    Learning rates are tensors on the device, filled before each step. Everything else that Python reads in a
    step is fixed by the recording, which is made anew in each epoch and when a setting of objective, encoder,
    optimizer or options has changed. All batches have one shape and dtype.

    Args:
        step: its trainer's networks must be on a CUDA device.

    Raises:
        ValueError: see :func:`check`.
    """

    recorder = CudaRecorder

    def __init__(self, step: TrainingStep) -> None:
        check(step.trainer)
        self._step, self._recorder = step, self.recorder(step.trainer.device)
        self._images: Tensor | None = None  # input of the recording, as the next two
        self._labels: Tensor | None = None
        self._bad_batch = torch.zeros((), dtype=torch.bool, device=step.trainer.device)
        self._rates: list[Tensor] = []
        self._settings: tuple[tuple, str] | None = None  # of the recording, as the next three
        self._result: StepResult | None = None
        self._checks: LateChecks | None = None
        self._gradients: list[tuple[Tensor, Tensor | None]] = []
        self._warm = 0

    def __call__(self, images: Tensor, labels: Tensor, checks: LateChecks) -> StepResult:
        """Run one step.

        Args:
            images, labels: batch on the device, whose labels are classes.
            checks: conditions of the batch; those of the step are added.

        Raises:
            BatchError: images of another shape or dtype than those of the first step; nothing was changed.
            torch.OutOfMemoryError: no memory is left for the recording; nothing was changed.
            RuntimeError: the step cannot be recorded; nothing was changed.
        """
        self._set_rates()
        if self._images is None:
            self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
        if (images.shape, images.dtype) != (self._images.shape, self._images.dtype):
            raise BatchError(
                f'compile="graph" repeats one step, of images {_described(self._images)}, got '
                f"{_described(images)}; give batches of one size (drop_last=True), or compile=False"
            )
        if self._warm < WARM_UP:
            self._warm += 1
            with self._rates_on_device(capturable=False):
                return self._recorder.run(lambda: self._step.run_at_once(images, labels, checks))
        self._images.copy_(images)
        self._labels.copy_(labels)
        self._bad_batch.copy_(checks.failed().any()) if len(checks) else self._bad_batch.zero_()
        if self._settings != (settings := self._current_settings()):
            self._settings = None
            self._record()
            self._settings = settings
        self._recorder.replay()
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        checks.add_copies(self._checks)
        return replace(
            self._result,
            parts=_copies(self._result.parts),
            scores=self._result.scores.clone(),
            logged=_copies(self._result.logged),
            checks=checks,
        )

    def rehearse(self, images: Tensor, labels: Tensor) -> None:
        """Run and record a step of zeros without its update, and drop the recording.

        Weights, buffers and random numbers are as before.

        Args:
            images, labels: batch of the shapes to expect.

        Raises:
            torch.OutOfMemoryError: the device has too little memory for a step.
            RuntimeError: the step cannot be recorded.
        """
        step, trainer = self._step, self._step.trainer
        images = torch.zeros_like(images, device=trainer.device)
        labels = torch.zeros_like(labels, device=trainer.device)
        random, buffers = trainer.progress.random_state(), [b.clone() for b in trainer.student.buffers()]

        def run() -> StepResult:
            with LateChecks(step.late_on_cpu) as checks:
                return step.run_at_once(images, labels, checks, update=False)

        try:
            with trainer.mixed_precision.tf32():
                with _explained(images, torch.OutOfMemoryError):
                    self._recorder.run(run)
                with _explained(images, RuntimeError):
                    self._recorder.record(run, self._generators())
        finally:
            self.close()
            trainer.optimizer.zero_grad(set_to_none=True)
            for buffer, before in zip(trainer.student.buffers(), buffers):
                buffer.copy_(before)
            trainer.progress.set_random_state(random)

    def close(self) -> None:
        """Drop the recording and its memory."""
        self._result = self._checks = self._settings = None
        self._gradients = []
        self._recorder.close()

    def _record(self) -> None:
        self.close()
        self._checks = checks = LateChecks(self._step.late_on_cpu)

        def run() -> StepResult:
            with checks:
                require(~self._bad_batch, RuntimeError)  # the batch's own condition comes first
                return self._step.run_at_once(self._images, self._labels, checks)

        try:
            with self._rates_on_device(capturable=True), _explained(self._images, RuntimeError):
                self._result = self._recorder.record(run, self._generators())
        except RuntimeError:
            self.close()
            raise
        trained = [p for group in self._step.trainer.optimizer.param_groups for p in group["params"]]
        self._gradients = [(p, p.grad) for p in trained]

    def _generators(self) -> list[torch.Generator]:
        trainer = self._step.trainer
        owners = {name: getattr(trainer, name) for name in ("encoder", "student", "teacher", "objective")}
        return [g for g in generators_of(owners).values() if isinstance(g, torch.Generator)]

    def _current_settings(self) -> tuple[tuple, str]:
        """Return the objects of a step, and its settings and the places of its weights as text."""
        trainer = self._step.trainer
        groups = trainer.optimizer.param_groups
        names = ("student", "teacher", "encoder", "objective", "optimizer")
        objects = (*(_Same(getattr(trainer, name)) for name in names), _Same(trainer.optimizer.state))
        values = [
            trainer.epoch, trainer.epochs, trainer.objective, trainer.options, trainer.readout,
            [{k: v for k, v in group.items() if k not in ("params", "lr", "initial_lr")} for group in groups],
            [p.data_ptr() for group in groups for p in group["params"]],
            getattr(trainer.encoder, "T", None),
        ]  # fmt: skip
        return objects, repr(values)

    def _set_rates(self) -> None:
        groups = self._step.trainer.optimizer.param_groups
        if len(self._rates) != len(groups):
            self._rates = [torch.zeros((), device=self._bad_batch.device) for _ in groups]
            self._settings = None
        for rate, group in zip(self._rates, groups):
            rate.fill_(group["lr"])

    @contextmanager
    def _rates_on_device(self, capturable: bool) -> Iterator[None]:
        """Context in which the optimizer reads its learning rates on the device."""
        groups = self._step.trainer.optimizer.param_groups
        before = [dict(group) for group in groups]
        try:
            for group, rate in zip(groups, self._rates):
                group["lr"] = rate
                if "capturable" in group:
                    group["capturable"] = capturable
            yield
        finally:
            for group, old in zip(groups, before):
                group |= {name: old[name] for name in ("lr", "capturable") if name in old}


class _Same:
    """Equal to the same object only."""

    def __init__(self, of: object) -> None:
        self.of = of

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.of is other.of


def check(trainer: Trainer) -> None:
    """Refuse settings with which a step cannot be recorded.

    Raises:
        ValueError: the argument that does not go with ``compile="graph"``.
    """
    options, processes = trainer.options, distributed.world_size()
    if trainer.device.type != GraphedStep.recorder.device:
        problem = f"needs a CUDA device, got device {trainer.device}; use True or False"
    elif processes > 1:
        problem = f"is for a single process, got {processes} processes; use True or False"
    elif options.precision == "float16":
        problem = 'cannot be used with precision="float16", whose scale is read in each step; use "bfloat16"'
    elif options.time_chunks > 1:
        problem = (
            f"cannot be used with time_chunks={options.time_chunks}, which saves random states in a step; "
            f"use time_chunks=1, or accumulate to save memory"
        )
    elif not trainer.mixed_precision.skips_on_device(trainer.optimizer):
        problem = (
            f"needs a fused optimizer, which can skip a bad step on the device, got "
            f"{type(trainer.optimizer).__name__}; give Adam, AdamW or SGD with fused=True"
        )
    else:
        return
    raise ValueError(f'compile="graph" {problem}')


def check_batches(loader: Iterable) -> None:
    """Refuse a training loader whose last batch may be smaller than the others.

    Raises:
        ValueError: ``drop_last`` is needed.
    """
    batches = loader if isinstance(loader, DeviceLoader) else getattr(loader, "batch_sampler", None)
    size = getattr(batches, "batch_size", None)
    if size is None or getattr(batches, "drop_last", True):
        return
    try:
        count = len(loader.labels if isinstance(loader, DeviceLoader) else batches.sampler)
    except TypeError:  # a stream
        problem = "may be smaller"
    else:
        rest = count % size
        if not rest or count < size:
            return
        problem = f"has {rest} of {size} samples"
    raise ValueError(
        f'compile="graph" needs batches of one size, and the last one of train_loader {problem}; give it '
        f"drop_last=True, or compile=False"
    )


def _described(images: Tensor) -> str:
    return f"{tuple(images.shape)} in {str(images.dtype).removeprefix('torch.')}"


def _copies(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in values.items()}


@contextmanager
def _explained(images: Tensor, kind: type[RuntimeError]) -> Iterator[None]:
    """Context in which an error of this kind gets a message that names the option."""
    try:
        yield
    except kind as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, torch.OutOfMemoryError):
            cause = cause.__context__
        if cause is not None:
            raise torch.OutOfMemoryError(
                f'compile="graph" needs memory for a recorded step of {tuple(images.shape)}, and '
                f"{images.device} has too little; give a smaller batch_size, a higher accumulate, or "
                f"compile=False"
            ) from error
        raise RuntimeError(
            f'compile="graph" cannot record the step: {str(error).partition(chr(10))[0]}; encoder, networks '
            f"and objective must read no value on the host (item(), bool(), index by a mask), or give "
            f"compile=False"
        ) from error
