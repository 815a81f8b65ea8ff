"""The time loop on CUDA: selects a variant of the kernels in ``lif.cu`` and launches it through CuPy.

Kernels run on torch's current stream of the tensor's device. They do not synchronise and allocate nothing but
their outputs, so they can be captured in a CUDA graph. A variant is compiled at its first use (about a
second; CuPy caches the result on disk), so run once before a capture.

CuPy compiles with ``-ftz=true``: potentials below 1.2e-38 count as 0.
"""

from __future__ import annotations

from functools import cache, lru_cache
from importlib import resources
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dynamics import TRACE_DECAY, TRACE_STEPS, LoopParameters, Reset, Shape
from .layout import empty_pooled, empty_sequence

THREADS = 128  # as in the kernels' __launch_bounds__
BUSY = 512  # threads that each multiprocessor should have before a thread runs more neurons
TYPES = {torch.float32: "float", torch.bfloat16: "BFloat16", torch.float16: "Float16"}
OPTIONS = ("--std=c++17",)
MORE_REGISTERS = "-DMORE_REGISTERS"  # for variants that would spill otherwise; see lif.cu

# Argument structures of lif.cu.
_FORWARD = np.dtype(
    [(name, np.uint64) for name in ("x", "v", "mask", "spikes", "v_T", "rate", "amap", "slope", "fired")]
    + [(name, np.int64) for name in ("T", "n", "x_step", "right", "below")]
    + [(name, np.float32) for name in ("leak", "gain", "offset", "v_threshold", "v_reset", "scale")]
)
_BACKWARD = np.dtype(
    [(name, np.uint64) for name in ("g_spikes", "g_v", "g_rate", "g_map")]
    + [(name, np.uint64) for name in ("fired", "slope", "v0", "mask", "g_x", "g_v0")]
    + [(name, np.int64) for name in ("T", "n", "g_step", "right", "below")]
    + [(name, np.float32) for name in ("leak", "gain", "v_threshold", "v_reset", "scale", "peak")]
    + [(name, np.float32) for name in ("attached", "through_trace")]
)


class Launch(NamedTuple):
    """One kernel launch: the variant's C++ name, blocks, and its argument structure by value."""

    kernel: str
    blocks: int
    args: np.ndarray


class _Stream(NamedTuple):
    """A raw stream in the form that CuPy's launch takes (its own classes changed names in CuPy 14)."""

    ptr: int


def why_not(target: Tensor | torch.device) -> str | None:
    """Return why the CUDA kernels cannot run for a tensor or device; ``None`` if they can."""
    device = target if isinstance(target, torch.device) else target.device
    if device.type != "cuda":
        return f"the CUDA kernels need a CUDA tensor, got one on {device}"
    if isinstance(target, Tensor) and target.dtype not in TYPES:
        return f"the CUDA kernels take float32, bfloat16 and float16, got {target.dtype}"
    if torch.version.hip:
        return "the CUDA kernels are not built for ROCm"
    return _why_no_cupy()


@lru_cache(maxsize=1)
def _why_no_cupy() -> str | None:
    extra = f"cuda{(torch.version.cuda or '13').split('.')[0]}"
    try:
        import cupy  # noqa: F401
    except ImportError as error:
        return f'CuPy cannot be imported ({error}); it comes with: pip install "lasnn-sj[{extra}]"'
    return None


def forward(
    x: Tensor, v: Tensor, mask: Tensor | None, p: LoopParameters
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """Run the loop: ``(spikes, v, firing_rate | None, activation_map | None, slope, fired)``.

    With ``p.pool`` the spikes are averages, see :func:`.layout.can_pool`.

    Args:
        x: ``[T, N, ...]``, float32, bfloat16 or float16; each step without gaps in memory, any stride
            between steps, 0 too. ``spikes`` get its dtype and the layout of its steps.
        v: ``[N, ...]``, float32.
        mask: ``[N, ...]`` or ``None``.

    ``slope`` is uint8, ``[T, N, ...]``, in 1/255 of the surrogate's peak; empty without
    ``p.keep_slope``. ``fired`` is described at :func:`empty_fired`. ``x`` is not checked for NaN, which
    would stall the device.
    """
    step = x[0]
    outputs = (
        (empty_pooled if p.pool else empty_sequence)(x, x.dtype),
        torch.empty_like(step, dtype=torch.float32),
        torch.empty_like(step, dtype=torch.float32) if p.firing_rate else None,
        torch.empty_like(step, dtype=torch.float32) if p.activation_map else None,
        empty_sequence(x, torch.uint8) if p.keep_slope else step.new_empty(0, dtype=torch.uint8),
        empty_fired(x, p),
    )
    if step.numel():
        inputs = (x, _as_step(v, step), _as_step(mask, step))
        _launch(plan_forward(*inputs, outputs, p, _processors(x.device)), x.device)
    return outputs


def backward(
    g_spikes: Tensor | None,
    g_v: Tensor | None,
    g_rate: Tensor | None,
    g_map: Tensor | None,
    fired: Tensor | None,
    slope: Tensor,
    v0: Tensor,
    mask: Tensor | None,
    p: LoopParameters,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Run the adjoint of :func:`forward`: gradients of ``x`` (in ``dtype``) and ``v``, in ``slope``'s layout.

    A gradient that is ``None`` counts as 0. ``fired`` may be ``None`` unless the reset is hard or
    ``g_map`` is given.
    """
    step, empty = slope[0], empty_pooled if p.pool else empty_sequence
    like = empty(slope[:1], dtype)[0]
    if g_spikes is None:
        g_spikes = like.zero_().expand(len(slope), *like.shape)
    elif (
        g_spikes.dtype != dtype
        or not _same_order(g_spikes[0], like)
        or 0 < g_spikes.stride(0) < like.numel()  # steps overlap
    ):
        g_spikes = empty(slope, dtype).copy_(g_spikes)
    g_x = empty_sequence(slope, dtype)
    g_v0 = torch.empty_like(step, dtype=torch.float32)
    if step.numel():
        inputs = (
            g_spikes, _as_step(g_v, step), _as_step(g_rate, step), _as_step(g_map, step),
            fired, slope, _as_step(v0, step), _as_step(mask, step),
        )  # fmt: skip
        _launch(plan_backward(*inputs, (g_x, g_v0), p, _processors(slope.device)), slope.device)
    return g_x, g_v0


def empty_fired(x: Tensor, p: LoopParameters) -> Tensor:
    """Allocate a bit for each neuron and step, if it is kept: uint8 ``[ceil(T / 8), N, ...]``.

    Bit ``t % 8`` of ``[t // 8, ...]`` says whether the neuron fired at step ``t``.
    """
    return empty_sequence(x[::8], torch.uint8) if p.keep_fired else x.new_empty(0, dtype=torch.uint8)


def plan_forward(
    x: Tensor,
    v: Tensor,
    mask: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor],
    p: LoopParameters,
    processors: int,
) -> Launch:
    """Plan a forward launch: variant and arguments. All tensors are in the memory order of ``x[0]``."""
    T, n = x.shape[0], x[0].numel()
    x_step = x.stride(0) if T > 1 else 0
    right, below = _window(x[0], p.pool)
    width = _width(n, x_step, x.element_size(), processors, (x, v, mask, *outputs), right)
    shape = p.shape if p.keep_slope else Shape.NONE
    pointers = [_pointer(t) for t in (x, v, mask, *outputs)]
    numbers = (p.leak, p.gain, p.offset, p.v_threshold, p.v_reset, p.scale)
    return Launch(
        kernel_name("forward", x.dtype, width, p.reset, shape, p.activation_map, p.pool),
        -(-n // (width * THREADS)),
        np.array((*pointers, T, n, x_step, right, below, *numbers), _FORWARD),
    )


def plan_backward(
    g_spikes: Tensor,
    g_v: Tensor | None,
    g_rate: Tensor | None,
    g_map: Tensor | None,
    fired: Tensor | None,
    slope: Tensor,
    v0: Tensor,
    mask: Tensor | None,
    outputs: tuple[Tensor, Tensor],
    p: LoopParameters,
    processors: int,
) -> Launch:
    """Plan a backward launch: variant and arguments. All tensors are in the memory order of ``slope[0]``."""
    if fired is None and (g_map is not None or p.reset == Reset.HARD):
        raise ValueError("fired must be given for a hard reset and for g_map, got None")
    T, n = slope.shape[0], slope[0].numel()
    g_step = g_spikes.stride(0) if T > 1 else 0
    tensors = (g_spikes, g_v, g_rate, g_map, fired, slope, v0, mask, *outputs)
    right, below = _window(slope[0], p.pool)
    width = _width(n, g_step, g_spikes.element_size(), processors, tensors, right)
    # A detached reset needs no potentials, an attached soft one only the slope.
    shape = Shape.NONE if p.detach_reset or p.reset == Reset.SOFT else p.shape
    pointers = [_pointer(t) for t in tensors]
    numbers = (p.leak, p.gain, p.v_threshold, p.v_reset, p.scale, p.peak)
    switches = (not p.detach_reset, p.through_trace)
    return Launch(
        kernel_name("backward", g_spikes.dtype, width, p.reset, shape, g_map is not None, p.pool),
        -(-n // (width * THREADS)),
        np.array((*pointers, T, n, g_step, right, below, *numbers, *switches), _BACKWARD),
    )


def kernel_name(
    direction: str,
    dtype: torch.dtype,
    width: int,
    reset: int,
    shape: int,
    activation_map: bool,
    pool: bool,
) -> str:
    """Return the C++ name of a variant, for example ``lif_forward<float, 4, 0, 0, 0, 0>``."""
    codes = (width, reset, shape, activation_map, pool)
    return f"lif_{direction}<{TYPES[dtype]}, {', '.join(str(int(code)) for code in codes)}>"


def widths(element_size: int, pool: bool = False) -> list[int]:
    """Return the numbers of neurons that a thread may run, widest (16 bytes of a step) first."""
    return [w for w in ((8, 4) if pool else (8, 4, 2, 1)) if w * element_size <= 16]


def kernel_names() -> list[str]:
    """Return every variant that :func:`forward` and :func:`backward` can launch."""
    return [
        kernel_name(direction, dtype, width, reset, shape, activation_map, pool)
        for direction, dtype, reset, shape, activation_map, pool in product(
            ("forward", "backward"), TYPES, Reset, Shape, (False, True), (False, True)
        )
        if not (direction == "backward" and reset == Reset.SOFT and shape != Shape.NONE)
        for width in widths(dtype.itemsize, pool)
    ]


def source() -> str:
    """Return the CUDA source of all variants: ``lif.cu`` after the constants that it uses."""
    codes = ", ".join(f"{code.name} = {code.value}" for codes in (Reset, Shape) for code in codes)
    constants = (
        f"enum {{ {codes}, TRACE_STEPS = {TRACE_STEPS} }};\nconstexpr float TRACE_DECAY = {TRACE_DECAY!r}f;\n"
    )
    return constants + resources.files(__package__).joinpath("lif.cu").read_text(encoding="utf-8")


def _window(step: Tensor, pool: bool) -> tuple[int, int]:
    """Return the distances of the neurons right of and below one in a channels_last step, or 0."""
    return (step.shape[1], step.shape[1] * step.shape[3]) if pool else (0, 0)


def _width(
    n: int,
    row: int,
    element_size: int,
    processors: int,
    tensors: tuple[Tensor | None, ...],
    channels: int = 0,
) -> int:
    """Return the neurons per thread: what 16 bytes hold if memory is aligned and the device stays busy.

    Args:
        n: neurons of the layer.
        row: elements between two steps of the input.
        tensors: all that the kernel reads and writes.
        channels: of a layer whose 2x2 pixels are averaged, else 0. A thread then runs four pixels.
    """
    choices = widths(element_size, channels > 0)
    for width in choices:
        together = width // 4 if channels else width  # neurons of one access
        aligned = (channels or n) % together == row % together == 0 and all(
            _pointer(t) % (together * t.element_size()) == 0 for t in tensors if t is not None
        )
        if aligned and n >= width * BUSY * processors:
            return width
    return choices[-1]


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None or t.numel() == 0 else t.data_ptr()


def _same_order(t: Tensor, step: Tensor) -> bool:
    strides = zip(t.stride(), step.stride(), step.shape, strict=True)
    return all(a == b or size == 1 for a, b, size in strides)


def _as_step(t: Tensor | None, step: Tensor) -> Tensor | None:
    """Return ``t`` as float32 in the memory order of ``step``, copied only if it is not."""
    if t is None or (t.dtype == torch.float32 and _same_order(t, step)):
        return t
    return torch.empty_like(step, dtype=torch.float32).copy_(t)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _compiled(kernel: str):
    import cupy

    def build(*options: str):
        # CuPy keeps a copy for each device. One module for each variant, so that no other is compiled.
        module = cupy.RawModule(code=source(), options=(*OPTIONS, *options), name_expressions=(kernel,))
        return module.get_function(kernel)

    function = build()
    return build(MORE_REGISTERS) if function.local_size_bytes else function


def _launch(launch: Launch, device: torch.device) -> None:
    with torch.cuda.device(device):
        stream = _Stream(torch.cuda.current_stream(device).cuda_stream)
        _compiled(launch.kernel)((launch.blocks,), (THREADS,), (launch.args,), stream=stream)
