"""Callbacks of a trainer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

log = logging.getLogger(__name__)


class TrainerView(Protocol):
    """Attributes of the trainer that a callback may rely on; see :class:`~lasnn_sj.training.Trainer`."""

    history: list[dict[str, float]]
    step: int
    run_dir: Path | None

    def settings(self) -> dict[str, object]: ...


class Callback:
    """Base class for trainer callbacks. Override the hooks you need.

    With several processes only rank 0 calls them. Weights & Biases, for example:

    .. code-block:: python

        class WandB(Callback):
            def on_fit_start(self, trainer):
                self.run = wandb.init(config=trainer.settings(), id=trainer.run_dir.name, resume="allow")

            def on_epoch(self, trainer, row):
                self.run.log(row)
    """

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Called when training begins or resumes; ``trainer.history`` holds the epochs done."""

    def on_step(self, trainer: TrainerView, parts: Mapping[str, Tensor]) -> None:
        """Called after each optimiser step, the ``trainer.step``-th of the run (from 1 on).

        On CUDA with a fused optimizer, the default there, steps are read 16 at a time and the hook is called
        for these one after the other.

        Args:
            trainer: the trainer.
            parts: scalars of the loss, on the training device; ``.item()`` waits for it.
        """

    def on_validation(self, trainer: TrainerView, result: Mapping[str, float]) -> None:
        """Called after a validation pass with its ``loss``, ``top1`` and ``samples``."""

    def on_epoch(self, trainer: TrainerView, row: Mapping[str, float]) -> None:
        """Called after an epoch and its validation, before its checkpoint; ``row`` as ``fit`` returns it."""

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Called when ``fit`` ends, by an error too."""


class TensorBoard(Callback):
    """Scalars of every epoch and the settings as text.

    A file that cannot be written (full disk) is said in a warning, and training goes on without it.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer = None

    def on_fit_start(self, trainer: TrainerView) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import, needed only here

        with going_on(self.folder):
            self._writer = SummaryWriter(str(self.folder), purge_step=len(trainer.history) + 1)
            settings = json.dumps(trainer.settings(), indent=1)
            self._writer.add_text("settings", "    " + settings.replace("\n", "\n    "))

    def on_epoch(self, trainer: TrainerView, row: Mapping[str, float]) -> None:
        if self._writer is None:
            return
        with going_on(self.folder):
            for name, value in row.items():
                if name != "epoch":
                    self._writer.add_scalar(name, value, row["epoch"])
            self._writer.flush()

    def on_fit_end(self, trainer: TrainerView) -> None:
        if self._writer is not None:
            with going_on(self.folder):
                self._writer.close()


@contextmanager
def going_on(folder: Path) -> Iterator[None]:
    """Context in which a failure to write TensorBoard's file gives a warning instead of an error."""
    try:
        yield
    except (OSError, UnicodeError) as error:  # it wants names in UTF-8
        log.warning("TensorBoard's file in %s cannot be written (%s); goes on without it", folder, error)
