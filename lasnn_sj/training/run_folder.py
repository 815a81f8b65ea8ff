"""The run folder: settings, metrics by epoch and by step, checkpoints."""

from __future__ import annotations

import csv
import itertools
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from time import monotonic
from typing import BinaryIO

import torch
from torch import Tensor, nn

from .. import __version__
from ..runtime import distributed, files, locks
from . import checkpoint
from .fingerprint import weights as digest_of

log = logging.getLogger(__name__)

HEAD = ["step", "epoch", "lr", "loss"]  # first columns of steps.csv
VERSIONS = {"lasnn_sj": __version__, "torch": torch.__version__}
# Settings that the fingerprint has in more detail.
SAID_TWICE = {
    "student", "architecture", "parameters", "encoder", "objective", "optimizer", "hyperparameters"
}  # fmt: skip
WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
NUMBER = re.compile(r"(-?[0-9]+(\.[0-9]+)?(e[-+][0-9]+)?|-?inf|nan)?")  # or an empty cell
FLUSH = 200  # steps whose rows are written together


class RunFolder:
    """Folder of a run; of several processes only rank 0 reads and writes it.

    As a context it holds the folder's lock (:class:`~lasnn_sj.runtime.FolderLock`).

    Args:
        path: path of the folder; created if missing.
        checkpoint_every: steps, or time, between checkpoints within an epoch.

    Raises:
        ValueError: the path is a file, or a file of the folder is a link that leads out of it.
        LockError: on entering, another process writes to the folder.
    """

    def __init__(self, path: Path, checkpoint_every: int | timedelta) -> None:
        self.path, self.every = path, checkpoint_every
        self._saved, self._rows = monotonic(), []
        self._table: BinaryIO | None = None  # steps.csv as last written
        self._lock = locks.FolderLock(path)
        distributed.by_main(self._make)

    def _make(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"run_dir must be a folder, {self.path} is a file; give another name")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"run_dir {self.path} cannot be made ({error}); give a folder elsewhere"
            ) from error
        for name in ("checkpoints", "metrics.csv", "steps.csv", "tensorboard", "nonfinite", WEIGHTS, BEST):
            if files.inside(self.path, name).is_dir() and name.endswith(".csv"):
                raise ValueError(f"{self.path / name} is a folder where a table belongs; move it away")

    def __enter__(self) -> RunFolder:
        distributed.by_main(self._lock.__enter__)
        if distributed.is_main():
            files.remove_parts(self.path)
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._write_what_waits()
            self._put_back()
        finally:
            self._hold(None)
            if distributed.is_main():
                self._lock.__exit__()

    def check_settings(self, settings: Mapping[str, object], fingerprint: Mapping[str, object]) -> None:
        """Write the settings of a new run, or compare them with those of the run in the folder.

        Differing versions give a warning. So do differing initial weights of the student if the processes
        were seeded differently or not at all. With equal seeds, other initial weights belong to another run,
        unless they are those of the last checkpoint.

        Args:
            settings: readable settings of the run; those that the fingerprint also holds are not compared.
            fingerprint: fingerprint from :func:`fingerprint.run`.

        Raises:
            ValueError: the settings differ (the message lists the differences), or the file is damaged.
        """
        here = {**settings, "fingerprint": fingerprint, "versions": VERSIONS}
        distributed.by_main(lambda: self._check_settings(here))

    def _check_settings(self, here: dict[str, object]) -> None:
        path = self.path / "settings.json"
        there = files.read_settings(path)
        if there is None:
            files.write_json(path, here)
            return
        one, other = ({k: v for k, v in all_.items() if k not in SAID_TWICE} for all_ in (there, here))
        found = files.differences(one, other)
        found = {key.removeprefix("fingerprint."): pair for key, pair in found.items()}
        versions = {key: found.pop(key) for key in list(found) if key.startswith("versions.")}
        if versions:
            said = ", ".join(
                f"{k.partition('.')[2]} {one}, here {other}" for k, (one, other) in versions.items()
            )
            log.warning("%s was started with %s: results may differ between versions", self.path, said)
            # options that only one of the versions has, such as a new one of an optimizer, are not compared
            found = {key: pair for key, pair in found.items() if None not in pair}
        seed, seeds = here["fingerprint"]["process_seed"], found.pop("process_seed", None)
        first = found.pop("student.weights", None)
        files.refuse_differences(self.path, found)
        if first is not None and not self._has(first[1]):
            if seeds is None and seed < 2**32:  # without a seed PyTorch chooses a larger one
                raise ValueError(
                    f"{self.path} holds a run whose student started from other weights than this one; "
                    f"build the student as that run did to resume it, or use another run folder"
                )
            log.warning(
                "the student's initial weights are not those of the run in %s, as in processes with "
                "different seeds; the weights of its checkpoint are loaded", self.path,
            )  # fmt: skip
        if versions:
            files.write_json(path, there | {"versions": VERSIONS})

    def _has(self, digest: str) -> bool:
        """Return whether the last checkpoint holds weights of this digest."""
        found = checkpoint.load_latest(self.path / "checkpoints")
        return found is not None and digest_of(found[1]) == digest

    def load(self) -> tuple[Path, dict[str, Tensor], dict[str, object]] | None:
        """Load path, weights and state of the last intact checkpoint on every process.

        Raises:
            checkpoint.CheckpointError: there are checkpoints, but none is intact.
        """
        folder = self.path / "checkpoints"
        return distributed.from_main(checkpoint.load_latest(folder) if distributed.is_main() else None)

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after this step, before the epoch ends."""
        if isinstance(self.every, timedelta):
            return distributed.is_main() and monotonic() - self._saved >= self.every.total_seconds()
        return step % self.every == 0

    def save(self, step: int, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> None:
        """Write the rows of the steps so far, then a checkpoint.

        Raises:
            checkpoint.CheckpointError: the checkpoint cannot be written; the previous one is intact.
        """
        self.write_steps()
        if distributed.is_main():
            self._lock.check()
            checkpoint.save(self.path / "checkpoints", step, weights, state)
        self._saved = monotonic()

    def write_weights(self, name: str, student: nn.Module) -> None:
        """Write the student's weights as a file in the folder.

        Raises:
            checkpoint.CheckpointError: it could not be written; the file that was there is intact.
        """
        if not distributed.is_main():
            return
        self._lock.check()
        try:
            checkpoint.save_weights(self.path / name, student)
        except OSError as error:
            raise checkpoint.CheckpointError(
                f"weights {self.path / name} could not be written ({error}); make room there, or give the "
                f"right to write, and start the same run again to go on"
            ) from error

    def add_step(self, step: int, epoch: int, lr: float, parts: Mapping[str, Tensor]) -> None:
        """Add a row to ``steps.csv``; it is written later, without waiting for the device."""
        self._rows.append(((step, epoch, lr), dict(parts)))
        if len(self._rows) >= FLUSH:
            self.write_steps()

    def write_steps(self) -> None:
        """Write the pending rows; losses are means over the processes."""
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
        self._put_back()
        head = self._widen(path, names)
        lines = []
        for (where, _), losses in zip(rows, values):
            there = {name: loss for name, loss in zip(names, losses) if not math.isnan(loss)}
            lines.append([*where, sum(there.values()), *(there.get(name, "") for name in head[len(HEAD) :])])
        files.append(path, files.as_csv(lines))
        self._hold(path)

    def _hold(self, path: Path | None) -> None:
        """Keep the table open, so that its content is there when somebody removes it."""
        if self._table is not None:
            self._table.close()
        self._table = None if path is None else open(path, "rb")

    def _put_back(self) -> None:
        """Write the table again if it was removed since this run last wrote it."""
        path = self.path / "steps.csv"
        if self._table is not None and not os.path.lexists(path):
            log.warning("%s was removed during the run and is written again", path)
            self._table.seek(0)
            files.write(path, self._table.read())

    @staticmethod
    def _widen(path: Path, names: Sequence[str]) -> list[str]:
        """Add missing columns to the table and return its columns; an objective may change its parts."""
        head = _head(path)
        if head[len(HEAD) :] and set(names) <= set(head):
            return head
        head, rows = _read_steps(path)
        new = [name for name in names if name not in head]
        files.write_csv(path, [head + new, *(row + [""] * len(new) for row in rows)])
        return head + new

    def _write_what_waits(self) -> None:
        """Write the pending rows after an error, unless this needs the other processes."""
        if distributed.world_size() == 1 and self._rows:
            self._lock.check()
            self.write_steps()

    def go_back(self, step: int, history: Sequence[Mapping[str, float]]) -> None:
        """Remove the rows of later steps, and write the finished epochs."""
        self._rows = []
        path = self.path / "steps.csv"
        if distributed.is_main():
            if os.path.lexists(path):
                head, rows = _read_steps(path)
                files.write_csv(path, [head, *(row for row in rows if int(row[0]) <= step)])
            self.write_history(history)

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``metrics.csv``, one row per epoch."""
        if not (distributed.is_main() and history):
            return
        columns = list(dict.fromkeys(itertools.chain.from_iterable(history)))
        rows = [[row.get(column, "") for column in columns] for row in history]
        files.write_csv(self.path / "metrics.csv", [columns, *rows])


def _head(path: Path) -> list[str]:
    """Return the columns of ``steps.csv``; the first four if it is missing or unreadable."""
    if path.is_symlink() or not path.is_file():
        return list(HEAD)
    with open(path, "rb") as file:
        return _columns(file.readline(1 << 16).decode(errors="replace"))


def _columns(line: str) -> list[str]:
    found = _cells(line)
    whole = found[: len(HEAD)] == HEAD and all(map(str.isprintable, found))
    return found if whole else list(HEAD)


def _read_steps(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read columns and complete rows of ``steps.csv``, each step once; damaged lines give a warning."""
    if not os.path.lexists(path):
        return list(HEAD), []
    try:
        first, *lines = files.read_regular(path, at_most=1 << 32).decode(errors="replace").split("\n")
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read (%s) and is started again; checkpoints are not touched", path, error)
        return list(HEAD), []
    head, rows, last = _columns(first), [], 0
    lines = lines[:-1]  # the last is empty, or an incomplete row of a killed process
    for line in lines:
        row = _cells(line)
        whole = len(row) == len(head) and _is_number(row[0]) and all(map(NUMBER.fullmatch, row))
        if whole and int(row[0]) > last:
            rows.append(row)
            last = int(row[0])
    left_out = len(lines) - len(rows) + (first.strip() != "" and _cells(first) != head)
    if left_out:
        log.warning(
            "%s has %d damaged lines, which are left out; checkpoints are not touched", path, left_out
        )
    return head, rows


def _cells(line: str) -> list[str]:
    """Parse one line of a CSV file by itself, so that an open quote does not swallow later lines."""
    try:
        return next(csv.reader([line.rstrip("\r\n")], strict=True), [])
    except csv.Error:
        return []


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 19
