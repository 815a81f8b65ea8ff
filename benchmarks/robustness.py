"""Robustness of runs: faults at every call that changes a file, damaged files, lost workers; steps on end.

    python benchmarks/robustness.py            # all of it, within 40 minutes of two cores; also `make soak`
    python benchmarks/robustness.py faults --kills 1000 --others 300
    python benchmarks/robustness.py fuzz --examples 6250
    python benchmarks/robustness.py memory     # activation checkpointing: memory against time_chunks

Writes the sections of ``results/robustness.md``. Each line counts what was tried and what was lost.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from lasnn_sj import Callback, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.data import images as data
from lasnn_sj.runtime import files
from lasnn_sj.training import Trainer, TrainingOptions
from lasnn_sj.training.checkpoint import CheckpointError

K, SIDE = 4, 8

OPTIONS = {one.name for one in dataclasses.fields(TrainingOptions)}


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
        options=TrainingOptions(**{name: value for name, value in arguments.items() if name in OPTIONS}),
        **{name: value for name, value in arguments.items() if name not in OPTIONS},
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

    def on_step(self, trainer: Trainer, parts: dict) -> None:
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
    """Results that must not depend on kills: the last weights byte for byte, and the tables without times."""
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


def damage(count: int, seed: int = 0) -> dict[str, int]:
    """Damage the latest checkpoint of a run in a random place, and see whether the run ends as if it had not.

    Returns:
        ``files`` damaged, ``lost`` runs that ended otherwise.
    """
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        alone, cut = Path(folder) / "alone", Path(folder) / "cut"
        train_in_a_fork(alone, 2, 0, None)
        train_in_a_fork(cut, 2, 0, 14)
        lost = 0
        for number in range(count):
            run = Path(folder) / f"damaged{number}"
            shutil.copytree(cut, run)
            file = draw.choice(sorted(sorted((run / "checkpoints").iterdir())[-1].iterdir()))
            whole = bytearray(file.read_bytes())
            place = draw.randrange(len(whole))
            if draw.random() < 0.5:
                file.write_bytes(whole[:place])
            else:
                whole[place] ^= 1 << draw.randrange(8)
                file.write_bytes(whole)
            train_in_a_fork(run, 2, 0, None)
            lost += content(run) != content(alone)
        return {"files": count, "lost": lost}


def full_disk() -> dict[str, int]:
    """Train onto a tmpfs too small for two checkpoints; then on with more room.

    Returns:
        ``tried``, 0 where this user may not mount; ``lost``, whether the run did not go on as if alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        disk, alone = Path(folder) / "disk", Path(folder) / "alone"
        disk.mkdir()
        train_in_a_fork(alone, 2, 0, None)
        needed = sum(file.stat().st_size for file in alone.rglob("*") if file.is_file())  # two checkpoints
        mount = ["mount", "-t", "tmpfs", "-o", f"size={round(1.2 * needed)}", "tmpfs", str(disk)]
        if subprocess.run(mount, capture_output=True).returncode:
            return {"tried": 0, "lost": 0}
        try:
            stopped = ""
            try:
                make_trainer(disk, checkpoint_every=3).fit(make_loader(), make_loader(8), epochs=2)
            except (CheckpointError, OSError) as error:
                stopped = str(error)
            subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
            train_in_a_fork(disk, 2, 0, None)
            print(f"  full disk: {stopped or 'was never full'}")
            return {"tried": int(bool(stopped)), "lost": int(content(disk) != content(alone))}
        finally:
            subprocess.run(["umount", str(disk)], check=True)


def worker_killed() -> dict[str, int]:
    """The test that kills a worker under ``torchrun --max-restarts=1``."""
    return {
        "tried": 1,
        "lost": int(_pytest("tests/training/test_distributed.py", "-k", "under_torchrun") != 0),
    }


def stages_killed(count: int) -> dict[str, int]:
    """The test that kills one of two processes in each stage of a pipeline, so many times."""
    os.environ["STAGE_KILLS"] = str(count)
    lost = _pytest("tests/experiments/test_torchrun.py", "-k", "killed_in_each_stage")
    return {"tried": count, "lost": int(lost != 0)}


def hostile(examples: int) -> dict[str, int]:
    """The fuzzer of ``tests/test_hostile_files.py``, so many files of each kind."""
    os.environ["HOSTILE_EXAMPLES"] = str(examples)
    kinds = (
        Path(__file__).parents[1].joinpath("tests", "test_hostile_files.py").read_text().count("\n@many\n")
    )
    failed = _pytest("-n", "auto", "--dist", "load", "tests/test_hostile_files.py") != 0
    return {"cases": examples * kinds, "lost": int(failed)}


def faults_by_kind(kills: int, others: int, jobs: int, minutes: float) -> list[dict[str, object]]:
    """Rows of :func:`faults.attack`, one for each fault over all that it disturbs; empty without ``cc``."""
    import faults

    whole: dict[str, dict[str, object]] = {}
    for row in faults.attack(kills, others, jobs=jobs, minutes=minutes, say=True) or ():
        so_far = whole.setdefault(row["fault"], {"what": row["fault"], "tried": 0, "lost": 0})
        so_far["tried"] += row["struck"]  # trials in which the fault was met
        so_far["lost"] += len(row["lost"])
    return [whole[fault] for fault in faults.FAULTS if fault in whole]


def _pytest(*arguments: str) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore", *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    if done.returncode:
        print(done.stdout[-3000:])
    return done.returncode


class Meter(Callback):
    """Resident memory and time of every step."""

    def __init__(self) -> None:
        self.mib: list[float] = []
        self.at: list[float] = []

    def on_step(self, trainer: Trainer, parts: dict) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.mib.append(pages * os.sysconf("SC_PAGE_SIZE") / 2**20)
        self.at.append(time.perf_counter())


def soak(steps: int) -> dict[str, float]:
    """Train so many steps with all switches on, and compare their first and last quarter but for a warm-up.

    Returns:
        Medians of both quarters: resident memory in MiB, and milliseconds a step.
    """
    meter = Meter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            Path(folder) / "run", attention="gradient", precision="bfloat16", accumulate=2, time_chunks=2,
            clip_norm=1.0, on_nonfinite="skip", checkpoint_every=50, callbacks=[meter],
        )  # fmt: skip
        epochs = -(-steps // 100)
        trainer.fit(make_loader(400, workers=1), make_loader(16), epochs=epochs)
    quarter = len(meter.at) // 4
    milliseconds = [1000 * (b - a) for a, b in zip(meter.at, meter.at[1:])]
    # the first steps fill caches
    first, last = slice(quarter // 2, quarter + quarter // 2), slice(-quarter, None)
    return {
        "steps": len(meter.at),
        "MiB, first": statistics.median(meter.mib[first]),
        "MiB, last": statistics.median(meter.mib[last]),
        "ms, first": statistics.median(milliseconds[first]),
        "ms, last": statistics.median(milliseconds[last]),
    }


def memory(T: int, chunks: list[int]) -> list[dict[str, float]]:
    """Peak memory and time of a VGG5 step (width 0.25, batch 16) by ``time_chunks``, each in a process."""
    rows = []
    for count in chunks:
        command = [sys.executable, __file__, "memory-of", "--T", str(T), "--chunks", str(count)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"memory of {count} chunks: {done.stderr.strip()}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def memory_of(T: int, chunks: int) -> dict[str, float]:
    """One row of :func:`memory`, in this process."""

    def peak() -> float:
        return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

    torch.manual_seed(0)
    net = models.vgg5(10, width=0.25)
    for module in net.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.4
    teacher = models.teacher_resnet20(10).eval()
    options = TrainingOptions(time_chunks=chunks)
    trainer = LaSNNTrainer(net, teacher, encoder=PoissonEncoder(T), options=options)
    x, y = torch.rand(16, 3, 32, 32) * 2 - 1, torch.arange(16) % 10
    trainer.prepare(x[:2], y[:2])
    before, seconds = peak(), []
    for _ in range(3):
        start = time.perf_counter()
        trainer.train_step(x, y)
        seconds.append(time.perf_counter() - start)
    return {"T": T, "time_chunks": chunks, "peak MiB": peak() - before, "seconds a step": min(seconds)}


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    cells = [list(rows[0])] + [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows
    ]
    lines = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "what",
        nargs="?",
        choices=["all", "faults", "damage", "fuzz", "soak", "memory", "memory-of"],
        default="all",
    )
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--others", type=int, default=300, help="signals, and of each error of writing")
    parser.add_argument("--jobs", type=int, default=2, help="processes that share the faults")
    parser.add_argument("--minutes", type=float, default=20.0, help="at most, for the faults")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--files", type=int, default=10, help="checkpoints damaged")
    parser.add_argument("--examples", type=int, default=6250, help="hostile files of each kind")
    parser.add_argument("--T", type=int, default=100)
    parser.add_argument("--chunks", type=int, nargs="+", default=[1, 2, 4, 10])
    a = parser.parse_args()
    torch.set_num_threads(1)
    if a.what == "memory-of":
        print(json.dumps(memory_of(a.T, a.chunks[0])))
        return
    import common
    import faults

    path, tried = common.RESULTS / "robustness.md", []

    def tell(title: str, about: str, rows: list[dict]) -> None:
        """Print a section and put it into the file in place of the one that was there."""
        where = "; ".join(common.machine("cpu").values())
        section = f"## {title}\n\n{about}\n\n{table(rows)}\n\n`{' '.join(sys.argv)}`; {where}\n"
        print(f"\n{section}", flush=True)
        there = path.read_text() if path.exists() else "# Robustness\n"
        head, *sections = re.split(r"\n(?=## )", there.rstrip("\n") + "\n")
        kept = [one for one in sections if not one.startswith(f"## {title}\n")]
        files.write(path, "\n".join([head, *sorted([*kept, section])]))
        tried.extend(rows)

    def counted(**calls: Callable[[], dict[str, int]]) -> list[dict]:
        rows = []
        for name, call in calls.items():
            result = call()
            rows.append(
                {"what": name.replace("_", " "), "tried": next(iter(result.values())), "lost": result["lost"]}
            )
            print(rows[-1], flush=True)
        return rows

    if a.what in ("all", "faults"):
        rows = faults_by_kind(a.kills, a.others, a.jobs, a.minutes)
        about = (
            "A process is disturbed at its n-th call that changes a file (open for writing, write, rename, "
            "unlink, mkdir, link, ftruncate, fsync), n spread over the whole run, and started again. Lost: a "
            "folder that then differs by a byte from an undisturbed one (times, TensorBoard and older "
            f"checkpoints aside), or an error without a path. Disturbed are: {', '.join(faults.SUBJECTS)}."
        )
        if rows:
            tell("Faults", about, rows)
        else:
            print("faults are skipped: there is no C compiler (cc), or this is not Linux")
    if a.what in ("all", "damage"):
        tell(
            "Kills and damage",
            "Lost: a run that ended with other weights or tables than one left alone.",
            counted(
                kills_with_two_loader_workers=lambda: kills(5, 5, 2, seed=1),
                checkpoints_damaged=lambda: damage(a.files),
                full_disk=full_disk,
                worker_killed_under_torchrun=worker_killed,
                processes_killed_in_each_stage=lambda: stages_killed(10),
            ),
        )
    if a.what in ("all", "fuzz"):
        about = (
            "Configurations, data, checkpoints, teachers, events, run folders; lost: an undocumented error."
        )
        tell("Hostile files", about, counted(hostile_files=lambda: hostile(a.examples)))
    if a.what in ("all", "soak"):
        tell(
            "Training on end", "Medians of the first quarter after the warm-up and the last.", [soak(a.steps)]
        )
    if a.what in ("all", "memory"):
        tell("Pieces of time", "VGG5 at width 0.25, batch 16.", memory(a.T, a.chunks))
    if any(row.get("lost") for row in tried):
        sys.exit("something was lost")


if __name__ == "__main__":
    main()
