"""States of the random generators of Python, NumPy and PyTorch."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import nn


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
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])


def generators_of(owners: Iterable[object]) -> list[torch.Generator]:
    """The random generators that these objects, or parts of these modules, have as ``generator``."""
    parts = (part for o in owners for part in (o.modules() if isinstance(o, nn.Module) else (o,)))
    found = (getattr(part, "generator", None) for part in parts)
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices') random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
