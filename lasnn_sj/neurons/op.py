"""The operation behind every neuron: a whole layer, over all time steps, in one call.

``time_loop`` selects the implementation. The kernels are registered as the operations ``lasnn_sj::time_loop``
and ``lasnn_sj::time_loop_backward``, so autograd, ``torch.compile`` and the profiler see one node per layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from types import ModuleType
from typing import get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends import choose, warn_once
from .dynamics import RESETS, Dynamics, LoopParameters, LoopResult, Shape, run
from .layout import can_pool, empty_pooled, empty_sequence, is_time_major
from .surrogate import kernel_form

SHAPES = tuple(code.name.lower() for code in Shape)
PARAMETER_TYPES = tuple(get_type_hints(LoopParameters).values())


def time_loop(
    x: Tensor,
    v: Tensor,
    dynamics: Dynamics,
    surrogate: nn.Module,
    mask: Tensor | None = None,
    firing_rate: bool = False,
    activation_map: bool = False,
    through_trace: bool = False,
    pool: bool = False,
) -> LoopResult:
    """Run a layer of neurons over time; see :func:`.dynamics.run` for the other arguments.

    With ``pool`` the spikes that are returned are averages of 2x2 pixels, ``[T, N, C, H / 2, W / 2]``. With
    channels_last steps of even sides (on the CPU of a multiple of 16 channels too) the spikes themselves are
    not written to memory.

    An ``x`` whose steps are gapless blocks of memory is not copied (in channels_last too, or one step
    repeated with time stride 0), and the results have the layout of its steps; any other ``x`` is copied
    once. Potentials are float32 (float64 for a float64 ``x``, which plain PyTorch runs). For the backward
    pass the kernels keep the surrogate's slope, rounded to 1/255 of its peak.

    Raises:
        ValueError: no time step; a state or mask that does not fit one step of the input; on the CPU,
            NaN or infinity in ``x`` or ``v`` (on CUDA this check would stall the device).
        RuntimeError: ``use_backend`` selects a backend that cannot run this.
    """
    if x.dim() < 2 or x.shape[0] < 1:
        raise ValueError(f"x must be [T, N, ...] with T >= 1, got shape {tuple(x.shape)}")
    if not torch.is_floating_point(x):
        raise ValueError(f"x must be a floating point tensor, got {x.dtype}")
    for name, other in (("state v", v), ("mask", mask)):
        if other is not None and (other.shape != x.shape[1:] or other.device != x.device):
            raise ValueError(
                f"{name} must have the shape {tuple(x.shape[1:])} of one step of x and its device "
                f"{x.device}, got {tuple(other.shape)} on {other.device}"
            )
    state_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if v.dtype != state_dtype:
        raise ValueError(f"state v must be {state_dtype} for an input x of {x.dtype}, got {v.dtype}")
    if mask is not None and mask.requires_grad:
        raise ValueError("mask is a constant of the operation, got one that requires a gradient")

    chosen = choose(x.device, x.dtype, surrogate, dynamics.reset)
    if chosen.name == "torch":
        warn_once(chosen)
        result = run(x, v, dynamics, surrogate, mask, firing_rate, activation_map, through_trace)
        return result._replace(spikes=_Average.apply(result.spikes)) if pool else result

    x = x if is_time_major(x) else x.contiguous()
    form = kernel_form(surrogate, dynamics.v_threshold)
    wants_gradient = torch.is_grad_enabled() and (x.requires_grad or v.requires_grad)
    parameters = LoopParameters(
        leak=dynamics.leak,
        gain=dynamics.gain,
        offset=dynamics.offset,
        v_threshold=dynamics.v_threshold,
        v_reset=dynamics.v_reset,
        reset=RESETS.index(dynamics.reset),
        shape=SHAPES.index(form.shape),
        peak=form.peak,
        scale=form.scale,
        detach_reset=dynamics.detach_reset,
        firing_rate=firing_rate,
        activation_map=activation_map,
        through_trace=through_trace,
        keep_slope=wants_gradient,
        pool=pool and can_pool(x),
    )
    spikes, v, rate, amap, _, _ = _time_loop(x, v, mask, [float(value) for value in parameters])
    if pool and not parameters.pool:
        spikes = _Average.apply(spikes)
    return LoopResult(spikes, v, rate if firing_rate else None, amap if activation_map else None)


class _Average(torch.autograd.Function):
    """Average 2x2 pixels of ``[T, N, C, H, W]``, and keep nothing: PyTorch's pool keeps all spikes."""

    @staticmethod
    def forward(ctx, spikes: Tensor) -> Tensor:
        ctx.whole = spikes.shape[-2:]
        return F.avg_pool2d(spikes.flatten(0, 1), 2).unflatten(0, spikes.shape[:2])

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        quarters = F.interpolate(0.25 * g.flatten(0, 1), scale_factor=2, mode="nearest")
        (H, W), (rows, columns) = ctx.whole, quarters.shape[-2:]
        if (H, W) != (rows, columns):  # the last row or column of an odd side is in no average
            quarters = F.pad(quarters, (0, W - columns, 0, H - rows))
        return quarters.unflatten(0, g.shape[:2])


def _kernels(device: torch.device) -> ModuleType:
    if device.type == "cuda":
        from . import cuda

        return cuda
    from . import cpu

    return cpu


def _unpack(numbers: Sequence[float]) -> LoopParameters:
    return _typed(tuple(numbers))


@lru_cache
def _typed(numbers: tuple[float, ...]) -> LoopParameters:
    return LoopParameters(*(kind(n) for kind, n in zip(PARAMETER_TYPES, numbers, strict=True)))


def _operation(name: str) -> Callable[[Callable], Callable]:
    """Register a function as ``lasnn_sj::name``.

    A custom operation checks at every call, in Python, whether a result is one of its arguments, which takes
    as long as a small layer. Here none is, so the kernels are also registered without that check.
    """

    def register(function: Callable) -> Callable:
        defined = torch.library.custom_op(f"lasnn_sj::{name}", function, mutates_args=())
        for device in ("CPU", "CUDA"):
            _library.impl(name, function, device)
        return defined

    return register


_library = torch.library.Library("lasnn_sj", "IMPL")


@_operation("time_loop")
def _time_loop(
    x: Tensor, v: Tensor, mask: Tensor | None, parameters: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``(spikes, v, firing_rate, activation_map, slope, fired)``; results not asked for are empty."""
    if not is_time_major(x):
        raise ValueError(f"x must be laid out time-major without gaps, got strides {x.stride()}")
    p = _unpack(parameters)
    spikes, v_T, rate, amap, slope, fired = _kernels(x.device).forward(x, v, mask, p)
    rate, amap = (x.new_empty(0) if t is None else t for t in (rate, amap))
    return spikes, v_T, rate, amap, slope, fired


@_time_loop.register_fake
def _(x, v, mask, parameters):
    p = _unpack(parameters)
    step = empty_sequence(x[:1], torch.float32)[0]
    return (
        (empty_pooled if p.pool else empty_sequence)(x, x.dtype),
        torch.empty_like(step),
        torch.empty_like(step) if p.firing_rate else x.new_empty(0),
        torch.empty_like(step) if p.activation_map else x.new_empty(0),
        empty_sequence(x, torch.uint8) if p.keep_slope else x.new_empty(0, dtype=torch.uint8),
        _kernels(x.device).empty_fired(x, p),
    )


@_operation("time_loop_backward")
def _time_loop_backward(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_rate: Tensor | None,
    g_map: Tensor | None,
    fired: Tensor | None,
    slope: Tensor,
    v0: Tensor,
    mask: Tensor | None,
    parameters: Sequence[float],
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` (in ``dtype``) and of the first state (float32)."""
    return _kernels(slope.device).backward(
        g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask, _unpack(parameters), dtype
    )


@_time_loop_backward.register_fake
def _(g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask, parameters, dtype):
    g_x = torch.empty_strided(slope.shape, slope.stride(), dtype=dtype, device=slope.device)
    return g_x, torch.empty_like(slope[0], dtype=torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    x, v, mask, ctx.parameters = inputs
    *_, slope, fired = output
    keep_fired = _unpack(ctx.parameters).keep_fired
    ctx.save_for_backward(fired if keep_fired else None, slope, v, mask)
    ctx.dtype = x.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx, g_spikes, g_v, g_rate, g_map, *_):
    p = _unpack(ctx.parameters)
    g_rate = g_rate if p.firing_rate else None
    g_map = g_map if p.activation_map else None
    g_x, g_v = _time_loop_backward(
        g_spikes, g_v, g_rate, g_map, *ctx.saved_tensors, ctx.parameters, ctx.dtype
    )
    return g_x, g_v, None, None


_time_loop.register_autograd(_backward, setup_context=_setup_context)
