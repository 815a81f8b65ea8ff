"""Choice of the implementation that runs the time loop."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dynamics import RESETS
from .surrogate import LinearSurrogate, kernel_form

NAMES = ("auto", "torch", "numba", "cupy")
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORCED = "asked for by use_backend"
# A plain variable, not a ContextVar: torch.compile reads and guards it, and cannot trace the other.
_forced = "auto"
_log = logging.getLogger(__name__)


class BackendChoice(NamedTuple):
    """Implementation that runs (``"numba"``, ``"cupy"`` or ``"torch"``), and why no faster one does."""

    name: str
    reason: str


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every neuron of this process on a backend, or raise, within a ``with`` block.

    Args:
        name: ``"torch"`` (plain PyTorch, the oracle), ``"numba"`` (CPU), ``"cupy"`` (CUDA), or
            ``"auto"``, the default: the fastest that can run.

    Raises:
        ValueError: an unknown backend. In the block, ``RuntimeError`` for a neuron whose device, dtype or
            surrogate the backend does not support; the message names it.
    """
    if name not in NAMES:
        raise ValueError(f"backend must be one of {', '.join(NAMES)}, got {name!r}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def backend(
    target: Tensor | torch.device | str = "cpu",
    surrogate: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> BackendChoice:
    """Return the backend that runs neurons on a device, and why no faster one does.

    Args:
        target: the neurons' input, or its device.
        surrogate: the neurons' surrogate; :class:`LinearSurrogate` by default.
        dtype: of the input; by default that of ``target`` if it is a tensor, else float32.

    Raises:
        RuntimeError: :func:`use_backend` selects a backend that cannot run this.
    """
    if isinstance(target, Tensor):
        device, dtype = target.device, dtype or target.dtype
    else:
        device, dtype = torch.device(target), dtype or torch.float32
    return choose(device, dtype, LinearSurrogate() if surrogate is None else surrogate)


def choose(
    device: torch.device, dtype: torch.dtype, surrogate: nn.Module, reset: str = "paper"
) -> BackendChoice:
    """Return the backend for a device, dtype, surrogate and reset; see :func:`backend`."""
    forced = _forced
    if forced == "torch":
        return BackendChoice("torch", FORCED)
    name = {"cpu": "numba", "cuda": "cupy"}.get(device.type)
    why_not = _why_no_kernel(name, device, dtype, surrogate, reset)
    if forced not in ("auto", name):
        why_not = f"{forced} does not run on device {device}"
    if why_not is None:
        return BackendChoice(name, "the fastest for this device")
    if forced != "auto":
        raise RuntimeError(f"use_backend({forced!r}) cannot be met: {why_not}")
    return BackendChoice("torch", why_not)


def _why_no_kernel(
    name: str | None, device: torch.device, dtype: torch.dtype, surrogate: nn.Module, reset: str
) -> str | None:
    if name is None:
        return f"no kernel for device {device}"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels compute in float32 and do not take {dtype}"
    if reset not in RESETS:
        return f"reset {reset!r} has no kernel; {', '.join(RESETS)} have one"
    if kernel_form(surrogate, 1.0) is None:
        return (
            f"surrogate {type(surrogate).__name__} has no kernel form; LinearSurrogate, ATan, Sigmoid "
            "and PiecewiseQuadratic with spiking=True and a plain number as alpha have one"
        )
    return _why_no_cupy(device) if name == "cupy" else None


@torch.compiler.assume_constant_result
def _why_no_cupy(device: torch.device) -> str | None:
    try:
        from . import cuda
    except ImportError as error:
        return f"the CUDA kernels cannot be loaded: {error}"
    return cuda.why_not(device)


@lru_cache
def _warn(reason: str) -> None:
    _log.warning("neurons run in plain PyTorch, slowly: %s", reason)


def warn_once(choice: BackendChoice) -> None:
    """Log, once per reason, that plain PyTorch runs the loop without :func:`use_backend` asking for it."""
    if choice.reason != FORCED and not torch.compiler.is_compiling():
        _warn(choice.reason)
