"""States of random generators: those of Python, NumPy and PyTorch, and those that objects hold."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

Generator: TypeAlias = torch.Generator | np.random.Generator | np.random.RandomState | random.Random
SEARCHED = 100_000  # objects at most; a data set's own lists of samples hold no generators
_LEAVES = (str, bytes, int, float, complex, type(None), Tensor, np.ndarray, types.ModuleType, type)


def random_state(generators: Mapping[str, Generator] | None = None) -> dict[str, object]:
    """Return the state of Python's, NumPy's and PyTorch's random-number generators, and of others by name."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "generators": {name: state_of(generator) for name, generator in (generators or {}).items()},
    }


def set_random_state(state: Mapping[str, object], generators: Mapping[str, Generator] | None = None) -> None:
    """Restore a state of :func:`random_state`; generators that it does not hold are unchanged."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    for name, generator in (generators or {}).items():
        if name in state["generators"]:
            set_state_of(generator, state["generators"][name])


def generators_of(owners: Mapping[str, object]) -> dict[str, Generator]:
    """Find the random-number generators that objects hold, by the path of attributes to them.

    Found are those of PyTorch (``torch.Generator``), NumPy (``Generator``, ``RandomState``) and Python
    (``random.Random``), in attributes, lists, tuples, dicts, parts of modules, data sets within data sets,
    bound methods, ``functools.partial`` and closures. Not found are global variables of other modules, state
    of compiled code, sources without a state (``random.SystemRandom``, ``os.urandom``), and objects that only
    a loader's workers hold.

    Args:
        owners: objects by the name with which their paths begin.
    """
    found: dict[str, Generator] = {}
    seen: set[int] = set()
    waiting = deque(owners.items())
    while waiting and len(seen) < SEARCHED:
        path, part = waiting.popleft()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, Generator):
            if not isinstance(part, random.SystemRandom):
                found[path] = part
            continue
        waiting.extend((f"{path}.{name}", value) for name, value in _parts(part))
    return found


def state_of(generator: Generator) -> object:
    """Return a generator's state, of types that ``torch.load(weights_only=True)`` can read."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.RandomState):
        return _plain(generator.get_state(legacy=False))
    return _plain(generator.bit_generator.state)


def set_state_of(generator: Generator, state: object) -> None:
    """Restore a state of :func:`state_of`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.RandomState):
        generator.set_state(_with_arrays(state))
    else:
        generator.bit_generator.state = _with_arrays(state)


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and PyTorch's (all devices') random generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def deterministic_algorithms(enabled: bool = True) -> Iterator[None]:
    """Context in which PyTorch uses deterministic algorithms only; without effect if not ``enabled``.

    An operation that has none raises an error that names it. On CUDA, cuBLAS needs the environment variable
    ``CUBLAS_WORKSPACE_CONFIG=:4096:8``, set before the process starts; the error names it.
    """
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)
        torch.backends.cudnn.benchmark = benchmark


def _parts(part: object) -> Iterator[tuple[object, object]]:
    """List the attributes of an object that may hold a generator, by name."""
    if isinstance(part, Mapping):
        pairs = part.items()
    elif isinstance(part, (list, tuple, deque)):
        pairs = enumerate(part)
    elif isinstance(part, functools.partial):
        pairs = (("func", part.func), ("args", part.args), ("keywords", part.keywords))
    elif isinstance(part, types.MethodType):
        pairs = (("__self__", part.__self__), ("__func__", part.__func__))
    elif isinstance(part, types.FunctionType):
        names = part.__code__.co_freevars
        cells = zip(names, part.__closure__ or ())
        pairs = [("__defaults__", part.__defaults__), ("__kwdefaults__", part.__kwdefaults__)]
        pairs += [(name, cell.cell_contents) for name, cell in cells if _is_filled(cell)]
    else:
        slots = (getattr(kind, "__slots__", ()) for kind in type(part).__mro__)
        names = (name for own in slots for name in ((own,) if isinstance(own, str) else own))
        pairs = [(name, getattr(part, name, None)) for name in names if not name.startswith("__")]
        pairs += list(getattr(part, "__dict__", {}).items())
    for name, value in pairs:
        if not isinstance(value, _LEAVES):
            yield name, value


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _plain(state: object) -> object:
    """Convert a NumPy state with its arrays to tensors of bytes."""
    if isinstance(state, dict):
        return {name: _plain(value) for name, value in state.items()}
    if isinstance(state, np.ndarray):
        return {"dtype": state.dtype.str, "bytes": torch.from_numpy(state.view(np.uint8).copy())}
    return state.item() if isinstance(state, np.generic) else state


def _with_arrays(state: object) -> object:
    if not isinstance(state, dict):
        return state
    if state.keys() == {"dtype", "bytes"}:
        return state["bytes"].numpy().view(state["dtype"])
    return {name: _with_arrays(value) for name, value in state.items()}
