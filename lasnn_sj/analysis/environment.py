"""Environment of a result: versions, hardware, command line."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import torch

from ..neurons import backend

PACKAGES = ("torch", "torchvision", "spikingjelly", "numpy", "numba", "tonic", "timm", "cupy-cuda12x",
            "cupy-cuda13x")  # fmt: skip


def environment(device: torch.device | str = "cpu") -> dict[str, object]:
    """Collect versions, hardware, command line, date and the neurons' backend, as JSON can hold them."""
    versions = {"python": platform.python_version()}
    for package in ("lasnn-sj", *PACKAGES):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    hardware = {"system": platform.platform(), "processor": _processor(), "threads": torch.get_num_threads()}
    hardware["cores"] = os.cpu_count()
    if torch.cuda.is_available():
        gpu = torch.cuda.get_device_properties(0)
        hardware["gpu"] = f"{torch.cuda.device_count()} x {gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
        versions["cuda"] = torch.version.cuda
    choice = backend(device)
    return {
        "versions": versions,
        "hardware": hardware | {"device": str(device)},
        "neurons": f"{choice.name} ({choice.reason})",
        "command": shlex.join(sys.argv),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
