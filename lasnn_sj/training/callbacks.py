"""What else is to happen while a trainer trains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

from torch import Tensor


class Trained(Protocol):
    """What a callback may read of the trainer; see :class:`~lasnn_sj.LaSNNTrainer`."""

    history: list[dict[str, float]]
    step: int
    run_dir: Path | None

    def settings(self) -> dict[str, object]: ...


class Callback:
    """Told by :class:`~lasnn_sj.LaSNNTrainer` how training goes; override what you need.

    Of several processes only the one of rank 0 calls. Weights & Biases, for example:

    .. code-block:: python

        class WandB(Callback):
            def on_fit_start(self, trainer):
                self.run = wandb.init(config=trainer.settings(), id=trainer.run_dir.name, resume="allow")

            def on_epoch(self, row):
                self.run.log(row)
    """

    def on_fit_start(self, trainer: Trained) -> None:
        """Training begins or goes on; ``trainer.history`` holds the epochs done, ``trainer.step`` counts."""

    def on_step(self, step: int, parts: dict[str, Tensor]) -> None:
        """After optimiser step number ``step`` (from 1 on).

        Args:
            step: steps of this run done, those before a restart included.
            parts: scalars of the loss, on the training device; ``.item()`` waits for it.
        """

    def on_epoch(self, row: dict[str, float]) -> None:
        """After an epoch and its validation, before its checkpoint; ``row`` as ``fit`` returns it."""

    def on_fit_end(self) -> None:
        """:meth:`fit` ends, by an error too."""


class TensorBoard(Callback):
    """Scalars of every epoch and the settings as text.

    Args:
        folder: of the event files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_fit_start(self, trainer: Trained) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import, needed only here

        self._writer = SummaryWriter(str(self.folder), purge_step=len(trainer.history) + 1)
        settings = json.dumps(trainer.settings(), indent=1)
        self._writer.add_text("settings", "    " + settings.replace("\n", "\n    "))

    def on_epoch(self, row: dict[str, float]) -> None:
        for name, value in row.items():
            if name != "epoch":
                self._writer.add_scalar(name, value, row["epoch"])
        self._writer.flush()

    def on_fit_end(self) -> None:
        self._writer.close()
