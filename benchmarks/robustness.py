"""What a run survives: kills, damaged files, a full disk, lost workers; and 2,000 steps on end.

    python benchmarks/robustness.py            # all of it, some minutes; also `make soak`
    python benchmarks/robustness.py kills --kills 20
    python benchmarks/robustness.py memory     # activation checkpointing: memory against time_chunks

Writes ``results/robustness.md``. Each line counts what was tried and what was lost.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback, LaSNNTrainer, PoissonEncoder, data, models
from lasnn_sj.checkpoint import CheckpointError

K, SIDE = 4, 8


class Crops(torch.utils.data.Dataset):
    """Images with a random crop, drawn from PyTorch's generator as augmentations are."""

    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels
        self.change = data.transforms(SIDE, augment=True)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.change(self.images[index]), self.labels[index]


def make_trainer(folder: Path | None, **arguments) -> LaSNNTrainer:
    """A tiny student with everything random about it: Poisson code, dropout, both from their generators."""
    torch.manual_seed(0)
    student = models.conv3_linear2(K, in_channels=1, image_size=SIDE, width=0.05)
    teacher = models.teacher_resnet20(K, in_channels=1, width=0.125).eval()
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.3
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    return LaSNNTrainer(
        student,
        teacher,
        encoder=PoissonEncoder(4, torch.Generator().manual_seed(5)),
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7),
        run_dir=folder,
        seed=0,
        **arguments,
    )


def make_loader(samples: int = 44, batch: int = 4, workers: int = 0) -> DataLoader:
    """Shuffled and augmented batches; the last one is not full."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (samples, 1, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    labels = torch.arange(samples) % K
    return DataLoader(
        Crops(images, labels), batch, shuffle=True, generator=torch.Generator().manual_seed(2),
        num_workers=workers,
    )  # fmt: skip


class Report(Callback):
    """Writes a byte for each step into a pipe, so that somebody else can time a kill."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step(self, step: int, parts: dict) -> None:
        os.write(self.pipe, b".")


def train_in_a_fork(folder: Path, epochs: int, workers: int, kill_after: int | None) -> bool:
    """Train in a process of its own; SIGKILL it after so many steps. Whether it ended by itself."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(read)
            torch.rand(os.getpid() % 100)  # a process of its own has another random state
            with open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), 2)
            trainer = make_trainer(folder, checkpoint_every=3, callbacks=[Report(write)])
            trainer.fit(make_loader(workers=workers), make_loader(8), epochs=epochs)
            code = 0
        finally:
            os._exit(code)
    os.close(write)
    for _ in range(kill_after or 0):
        os.read(read, 1)
    if kill_after is not None:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(read)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError(f"the training in {folder} failed")
    return os.WIFEXITED(status)


def content(folder: Path) -> dict[str, object]:
    """What must not depend on kills: the last weights byte for byte, and the tables without times."""
    last = sorted((folder / "checkpoints").iterdir())[-1]
    with open(folder / "metrics.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return {
        "weights": (last / "student.safetensors").read_bytes(),
        "steps": (folder / "steps.csv").read_bytes(),
        "epochs": rows,
    }


def kills(count: int, epochs: int = 10, workers: int = 0, seed: int = 0) -> dict[str, int]:
    """Kill a run ``count`` times, each after a few random steps, and compare with one left alone.

    Returns:
        ``kills`` done, ``steps`` of the run, and as ``lost`` what differs: weights, rows of steps or epochs.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, killed = Path(folder) / "alone", Path(folder) / "killed"
        train_in_a_fork(alone, epochs, workers, None)
        done = 0
        while done < count:
            # below the steps between checkpoints too, so that some kills come before the next one
            if train_in_a_fork(killed, epochs, workers, draw.randint(1, 8)):
                break
            done += 1
        train_in_a_fork(killed, epochs, workers, None)
        one, other = content(alone), content(killed)
        steps = one["steps"].decode().splitlines()[1:]
        assert [int(row.split(",")[0]) for row in steps] == list(range(1, len(steps) + 1))
        return {"kills": done, "steps": len(steps), "lost": sum(one[name] != other[name] for name in one)}
