"""A run's folder: its settings, and its checkpoints, each complete or not there at all."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

KEPT = 2


def save(folder: Path, number: int, weights: Mapping[str, Tensor], state: Mapping[str, object]) -> Path:
    """Write checkpoint ``number`` under ``folder`` and keep the last two.

    The files are written beside it, flushed to the disk and then renamed, so that a run killed meanwhile
    leaves the checkpoint before intact.

    Args:
        folder: where checkpoints of this run live.
        number: orders them, e.g. epochs done.
        weights: tensors by name, as ``state_dict`` gives them.
        state: whatever else ``torch.load(weights_only=True)`` can read: numbers, strings, tensors and
            dicts, lists and tuples of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{number:08d}"
    part = folder / f".{number:08d}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, part / "student.safetensors")
    torch.save(dict(state), part / "state.pt")
    for file in part.iterdir():
        _flush(file)
    _flush(part)
    if final.exists():
        shutil.rmtree(final)
    os.replace(part, final)
    _flush(folder)
    for old in _complete(folder)[:-KEPT]:
        shutil.rmtree(old)
    return final


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint under ``folder``, or ``None``."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, object]]:
    """Weights and state of a checkpoint; no code in it is run."""
    weights = load_file(path / "student.safetensors", device=str(device))
    return weights, torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def check_settings(path: Path, settings: dict[str, object]) -> None:
    """Write the settings of a new run folder, or hold them against those it was made with.

    Raises:
        ValueError: they differ; the message lists how.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        path.write_text(json.dumps(settings, indent=1) + "\n")
        return
    there = json.loads(path.read_text())
    other = [
        f"{key}: there {there.get(key)!r}, here {settings.get(key)!r}"
        for key in sorted(there.keys() | settings.keys())
        if there.get(key) != settings.get(key)
    ]
    if other:
        raise ValueError(
            f"{path.parent} holds a run with other settings ({'; '.join(other)}); "
            f"use another run folder, or delete this one"
        )


def random_state() -> dict[str, object]:
    """State of Python's, NumPy's and PyTorch's random generators."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_state(state: Mapping[str, object]) -> None:
    """Take back what :func:`random_state` gave."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices') random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdigit())


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
