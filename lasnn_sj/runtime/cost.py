"""Time and peak memory of a piece of work."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
from pathlib import Path

import torch


class Cost:
    """Measures what runs inside ``with Cost(device) as cost``.

    Attributes:
        seconds: wall-clock time.
        peak_memory_mib: on CUDA the most that tensors took on the device; on Linux's CPU the most that
            the whole process had resident meanwhile, libraries included; ``None`` elsewhere.
    """

    seconds: float
    peak_memory_mib: float | None

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)

    def __enter__(self) -> Cost:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what is still running is earlier work
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            _reset_resident_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.peak_memory_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            self.peak_memory_mib = _resident_peak()
        self.seconds = time.perf_counter() - self._start


def _reset_resident_peak() -> None:
    gc.collect()
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)  # what earlier work freed is not of this one
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not allowed in some containers: the peak is then that of the whole process
        pass


def _resident_peak() -> float | None:
    try:
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(found[1]) / 1024 if found else None
