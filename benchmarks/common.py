"""Shared by the benchmarks: turns, medians, the machine, tables."""

from __future__ import annotations

import csv
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

RESULTS = Path(os.environ.get("RESULTS_DIR") or Path(__file__).parent / "results")
PACKAGES = ("torch", "spikingjelly", "numba", "cupy-cuda13x", "cupy-cuda12x", "snntorch", "norse")


def machine(device: str) -> dict[str, str]:
    """Hardware and versions, for every row of a CSV."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
        models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = f"{models[0] if models else platform.processor()}, {torch.get_num_threads()} threads"
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"hardware": name, "python": platform.python_version(), "versions": "; ".join(versions)}


def synchronize(device: str) -> None:
    """Wait for the device, where it works on its own."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turns(calls: dict[str, Callable[[], object]], device: str, runs: int) -> dict[str, list[float]]:
    """Seconds of each call, one run of each in turn, so that drift affects all alike.

    Each round has a random order, because a call changes what is in the caches for the next one. Two runs of
    each come first and do not count. A call that fails is reported and left out.
    """
    seconds: dict[str, list[float]] = {}
    for name, call in list(calls.items()):
        try:
            for _ in range(2):
                call()
            synchronize(device)
            seconds[name] = []
        except Exception as error:  # a peer that cannot run here must not end the comparison
            print(f"  {name}: {type(error).__name__}: {error}", flush=True)
    shuffled = random.Random(0)
    for _ in range(runs):
        for name in shuffled.sample(list(seconds), len(seconds)):
            synchronize(device)
            start = time.perf_counter()
            calls[name]()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median over the turns of ``a / b``."""
    return statistics.median(x / y for x, y in zip(a, b))


def copy_seconds(elements: int, device: str) -> Callable[[], object]:
    """One float32 copy of that many elements into memory that is there already."""
    source = torch.ones(elements, device=device)
    target = torch.empty_like(source).fill_(0)
    return lambda: target.copy_(source)


def write(name: str, rows: list[dict], folder: Path | None = None) -> Path:
    """Write rows to ``NAME.csv`` in a folder: ``RESULTS_DIR`` if set, else ``benchmarks/results``."""
    folder = RESULTS if folder is None else folder
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.csv"
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with open(path, "w", newline="") as file:
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    return path


def show(rows: list[dict], columns: Sequence[str]) -> None:
    """Print rows as a Markdown table."""
    cells = [list(columns)] + [[_text(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    for number, line in enumerate(cells):
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |")
        if number == 0:
            print("| " + " | ".join("-" * width for width in widths) + " |", flush=True)


def _text(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
