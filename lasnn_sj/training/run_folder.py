"""What a training run leaves on disk: settings, metrics by epoch and by step, checkpoints."""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch
from torch import Tensor

from ..runtime import distributed, files
from . import checkpoint

FLUSH = 200  # steps whose rows are written together


class RunFolder:
    """A run's folder; of several processes only the one of rank 0 reads and writes it.

    Args:
        path: made if it is not there.
        checkpoint_every: steps, or time, between checkpoints within an epoch.

    Raises:
        ValueError: something of it is a link that leads out of it.
    """

    def __init__(self, path: Path, checkpoint_every: int | timedelta) -> None:
        self.path, self.every = path, checkpoint_every
        self._saved, self._rows = monotonic(), []
        if distributed.is_main():
            path.mkdir(parents=True, exist_ok=True)
            for name in ("checkpoints", "metrics.csv", "steps.csv", "tensorboard", "nonfinite"):
                files.inside(path, name)

    def check_settings(self, settings: dict[str, object]) -> None:
        """Compare with those the folder was made with; see :func:`files.check_settings`."""
        if distributed.is_main():
            files.check_settings(self.path / "settings.json", settings)

    def load(self) -> tuple[Path, dict[str, Tensor], dict[str, object]] | None:
        """Path, weights and state of the last good checkpoint, on every process.

        Raises:
            checkpoint.CheckpointError: there are some, but none is whole.
        """
        folder = self.path / "checkpoints"
        return distributed.from_main(checkpoint.load_latest(folder) if distributed.is_main() else None)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be written after this step, before the epoch is over."""
        if isinstance(self.every, timedelta):
            return distributed.is_main() and monotonic() - self._saved >= self.every.total_seconds()
        return step % self.every == 0

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Write the rows of the steps so far, and a checkpoint that stands behind them.

        Raises:
            checkpoint.CheckpointError: it could not be written; the one before is intact.
        """
        self.write_steps()
        if distributed.is_main():
            checkpoint.save(self.path / "checkpoints", step, weights, state)
        self._saved = monotonic()

    def add_step(self, step: int, epoch: int, lr: float, parts: Mapping[str, Tensor]) -> None:
        """A row of ``steps.csv``; written later, so that nobody waits for the device."""
        self._rows.append(((step, epoch, lr), dict(parts)))
        if len(self._rows) >= FLUSH:
            self.write_steps()

    def write_steps(self) -> None:
        """Write the rows that wait; the losses are means over the processes."""
        if not self._rows:
            return
        rows, self._rows = self._rows, []
        names = list(dict.fromkeys(itertools.chain.from_iterable(parts for _, parts in rows)))
        none = torch.full_like(next(iter(rows[0][1].values())), torch.nan)
        values = torch.stack(
            [torch.stack([parts.get(name, none).float() for name in names]) for _, parts in rows]
        )
        values = (distributed.total(values) / distributed.world_size()).tolist()
        if not distributed.is_main():
            return
        path = self.path / "steps.csv"
        head = self._widen(path, names)
        with open(path, "a", newline="") as file:
            table = csv.writer(file)
            for (where, _), losses in zip(rows, values):
                there = {name: loss for name, loss in zip(names, losses) if not math.isnan(loss)}
                table.writerow([*where, sum(there.values()), *(there.get(name, "") for name in head[4:])])

    @staticmethod
    def _widen(path: Path, names: Sequence[str]) -> list[str]:
        """The table's columns, once it has all that are wanted; an objective may change its parts."""
        head, rows = ["step", "epoch", "lr", "loss"], []
        if path.exists():
            with open(path, newline="", errors="replace") as file:
                lines = csv.reader(file)
                there = next(lines, head)
                if there[4:] and set(names) <= set(there):
                    return there
                head, rows = there, list(lines)
        new = [name for name in names if name not in head]
        files.write(path, _csv([head + new, *(row + [""] * len(new) for row in rows)]))
        return head + new

    def close(self) -> None:
        """Write what an error has left waiting, if this process can do so alone."""
        if distributed.world_size() == 1:
            self.write_steps()

    def go_back(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Take away what is written of steps after this one, and write the epochs that are done."""
        self._rows = []
        path = self.path / "steps.csv"
        if distributed.is_main():
            kept = []
            if path.exists():
                with open(path, newline="", errors="replace") as file:
                    head, *rows = list(csv.reader(file)) or [[]]
                # whole rows only: a killed process may have left half of one
                kept = [
                    row for row in rows if len(row) == len(head) and row[0].isdigit() and int(row[0]) <= step
                ]
                files.write(path, _csv([head, *kept] if head else []))
            self.write_history(history)

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``metrics.csv``, a row for each epoch."""
        if not (distributed.is_main() and history):
            return
        columns = list(dict.fromkeys(itertools.chain.from_iterable(history)))
        rows = [[row.get(column, "") for column in columns] for row in history]
        files.write(self.path / "metrics.csv", _csv([columns, *rows]))


def _csv(rows: Sequence[Sequence[object]]) -> str:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue()
