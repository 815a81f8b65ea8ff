"""The CUDA kernels against the oracle: on the device where there is one, and always on the CPU.

Without a GPU, g++ builds the CUDA source with ``cuda_host.h``, so that ``lasnn_sj.neurons.cuda`` runs as it
is except for the last call, which launches.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import Tensor

from lasnn_sj.neurons import LinearSurrogate, cuda, dynamics, op
from lasnn_sj.neurons.dynamics import Dynamics, LoopParameters
from lasnn_sj.neurons.surrogate import kernel_form

RESETS = ("paper", "soft", "hard")
SHAPES = ("triangle", "atan", "sigmoid")
SURROGATES = {
    "triangle": LinearSurrogate(0.3),
    "atan": surrogate.ATan(alpha=2.0),
    "sigmoid": surrogate.Sigmoid(alpha=4.0),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


# ------------------------------------------------------------------------------- running the kernels


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory):
    """All variants of lif.cu as a library for this CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed; it is what runs the CUDA kernels on the CPU")
    folder = tmp_path_factory.mktemp("lif")
    calls = "".join(
        f'    if (!std::strcmp(name, "{name}")) return run_kernel({name}, blocks, threads, args, size);\n'
        for name in cuda.kernel_names()
    )
    (folder / "lif.cu").write_text(cuda.source())
    (folder / "host.cpp").write_text(
        '#include "cuda_host.h"\n#include "lif.cu"\n'
        'extern "C" int launch(const char* name, unsigned blocks, unsigned threads,\n'
        "                      const void* args, unsigned size) {\n"
        f"{calls}    return 1;\n}}\n"
    )
    library = folder / "lif.so"
    flags = ["-std=c++17", "-O0", "-w", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += os.environ.get("CXXFLAGS", "").split()  # e.g. -fsanitize=address
    command = ["g++", *flags, "-I", str(Path(__file__).parent), "-shared", "-fPIC"]
    built = subprocess.run(
        [*command, str(folder / "host.cpp"), "-o", str(library)], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr[:4000]
    return ctypes.CDLL(str(library))


@pytest.fixture(params=["host", "device"])
def device(request, monkeypatch):
    """Devices of the kernels: the CPU through cuda_host.h, or a GPU, at the largest widths."""
    monkeypatch.setattr(cuda, "BUSY", 1)
    monkeypatch.setattr(cuda, "_processors", lambda device: 1)
    if request.param == "device":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        reason = cuda.why_not(torch.device("cuda"))
        if reason:
            pytest.skip(reason)
        return torch.device("cuda")
    library = request.getfixturevalue("host_kernels")

    def launch(plan: cuda.Launch, device: torch.device) -> None:
        pointer = plan.args.ctypes.data_as(ctypes.c_void_p)
        size = plan.args.dtype.itemsize
        status = library.launch(plan.kernel.encode(), plan.blocks, cuda.THREADS, pointer, size)
        assert status == 0, {1: f"no kernel {plan.kernel}", 2: "the structure's size differs"}[status]

    monkeypatch.setattr(cuda, "_launch", launch)
    return torch.device("cpu")


@pytest.fixture
def launched(monkeypatch):
    """The launches that were made, in order."""
    plans = []
    for name in ("plan_forward", "plan_backward"):
        plan = getattr(cuda, name)
        monkeypatch.setattr(cuda, name, lambda *a, plan=plan: plans.append(plan(*a)) or plans[-1])
    return plans


def parameters(d: Dynamics, shape: str, **flags: bool) -> LoopParameters:
    form = kernel_form(SURROGATES[shape], d.v_threshold)
    return LoopParameters(
        leak=d.leak,
        gain=d.gain,
        offset=d.offset,
        v_threshold=d.v_threshold,
        v_reset=d.v_reset,
        reset=RESETS.index(d.reset),
        shape=SHAPES.index(form.shape),
        peak=form.peak,
        scale=form.scale,
        detach_reset=d.detach_reset,
        **{"firing_rate": False, "activation_map": False, "through_trace": False, **flags},
    )


def memory_order(t: Tensor) -> list[int]:
    return [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]


# ---------------------------------------------------------------------------------------- the oracle


class _Kept(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return (x >= 0).to(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad * ctx.saved_tensors[0], None


class KeptSlopes:
    """A surrogate whose slope at each call is the one that the kernel kept, so that what is left
    between the oracle's gradients and the kernel's is rounding in float32."""

    def __init__(self, slope: Tensor, v0: Tensor, d: Dynamics, p: LoopParameters) -> None:
        self.slopes = list(slope.float() * (p.peak / 255))
        if d.reset == "paper":  # asked twice a step: for the reset by the spike before, and for this one
            first = p.peak * shape_of(p, p.scale * (v0 - d.v_threshold).abs())
            steps = [first, *self.slopes]
            self.slopes = [s for pair in zip(steps, self.slopes) for s in pair]
        self.calls = iter(self.slopes)

    def __call__(self, x: Tensor) -> Tensor:
        return _Kept.apply(x, next(self.calls))


def shape_of(p: LoopParameters, z: Tensor) -> Tensor:
    """``surrogate.KernelForm``'s shape."""
    s = torch.sigmoid(z)
    return [(1 - z).clamp_min(0), 1 / (1 + z * z), 4 * s * (1 - s)][p.shape]


def unpacked(fired: Tensor, T: int) -> Tensor:
    """Who fired, ``[T, N, ...]``, from the bits that the kernels keep."""
    steps = [fired >> bit & 1 for bit in range(8)]
    return torch.stack(steps, 1).flatten(0, 1)[:T].bool()


def kept_potentials(slope: Tensor, fired: Tensor, p: LoopParameters) -> Tensor:
    """Potentials as far as one byte and the side of the threshold tell."""
    s = slope.double().clamp_min(0.5) / 255
    r = (1 - s).sqrt()
    z = [1 - s, (1 / s - 1).sqrt(), torch.log((1 + r) / (1 - r).clamp_min(1e-12))][p.shape]
    z = torch.where(slope == 255, torch.zeros_like(z), z) if p.shape == 2 else z
    side = torch.where(fired, 1.0, -1.0)
    return (p.v_threshold + side * z / p.scale).float()


def attached_hard_step(potentials: Tensor):
    """``dynamics.step`` whose reset takes the potential that its gradient needs from ``potentials``."""
    seen = iter(potentials)

    def step(x, v, d, surrogate):
        x = x.to(v.dtype)
        if d.gain != 1.0 or d.offset != 0.0:
            x = d.gain * x + d.offset
        v = d.leak * v + x
        spikes = dynamics.fire(v, d, surrogate)
        o = spikes.detach()
        return spikes, (1 - o) * v + o * d.v_reset + (spikes - o) * (d.v_reset - next(seen))

    return step


def draw(T: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> SimpleNamespace:
    """Inputs that fire in about a third of the steps, and gradients for every output."""
    torch.manual_seed(seed)
    n = torch.randn
    return SimpleNamespace(
        x=(0.4 + 0.6 * n(T, *shape)).to(dtype),
        v=0.8 * n(shape),
        mask=(torch.rand(shape) < 0.7).float() / 0.7,
        g_spikes=n(T, *shape).to(dtype),
        g_pooled=n(T, *shape[:-2], *(size // 2 for size in shape[-2:])).to(dtype),
        g_v=n(shape),
        g_rate=n(shape),
        g_map=n(shape),
    )


def pooled(spikes: Tensor) -> Tensor:
    """Averages of 2x2 pixels of ``[T, N, C, H, W]``, by PyTorch."""
    return torch.nn.functional.avg_pool2d(spikes.flatten(0, 1), 2).unflatten(0, spikes.shape[:2])


def check(case, d, shape, device, monkeypatch, use_mask=False, maps=False, through_trace=False, pool=False):
    """One forward and backward of the kernels against ``dynamics.run`` and autograd."""
    flags = dict(firing_rate=maps, activation_map=maps, through_trace=through_trace)
    p = parameters(d, shape, **flags, pool=pool)
    mask = case.mask if use_mask else None
    dtype = case.x.dtype

    def put(t: Tensor | None) -> Tensor | None:
        """To the device with all its strides."""
        if t is None or t.device == device:
            return t
        base = t.as_strided((t.untyped_storage().size() // t.itemsize,), (1,), 0)
        return base.to(device).as_strided(t.shape, t.stride(), t.storage_offset())

    x, v = put(case.x), put(case.v)
    spikes, v_T, rate, amap, slope, fired = cuda.forward(x, v, put(mask), p)
    g_spikes = case.g_pooled if pool else case.g_spikes
    gradients = [put(g) for g in (g_spikes, case.g_v, case.g_rate, case.g_map)]
    g_x, g_v0 = cuda.backward(
        *(gradients if maps else (*gradients[:2], None, None)),
        fired if maps or d.reset == "hard" else None, slope, v, put(mask), p, dtype,
    )  # fmt: skip
    for t in (slope, g_x) if pool else (spikes, slope, g_x):
        assert memory_order(t[0]) == memory_order(x[0])
    assert (spikes.dtype, g_x.dtype, slope.dtype, v_T.dtype) == (dtype, dtype, torch.uint8, torch.float32)
    spikes, v_T, slope, fired, g_x, g_v0 = (t.cpu() for t in (spikes, v_T, slope, fired, g_x, g_v0))

    with monkeypatch.context() as patch:
        if d.reset == "hard" and not d.detach_reset:
            potentials = kept_potentials(slope, unpacked(fired, len(slope)), p)
            patch.setattr(dynamics, "step", attached_hard_step(potentials))
        oracle_x = case.x.clone().requires_grad_()
        oracle_v = case.v.clone().requires_grad_()
        result = dynamics.run(
            oracle_x, oracle_v, d, KeptSlopes(slope, case.v, d, p), mask,
            firing_rate=maps, activation_map=maps, through_trace=through_trace,
        )  # fmt: skip
    assert 0.03 < (spikes != 0).float().mean() < 0.97 or spikes.numel() < 200
    result = result._replace(spikes=pooled(result.spikes)) if pool else result
    assert torch.equal(spikes, result.spikes)
    assert torch.equal(v_T, result.v)
    if maps:
        torch.testing.assert_close(rate.cpu(), result.firing_rate, rtol=2e-7, atol=0)
        torch.testing.assert_close(amap.cpu(), result.activation_map, rtol=2e-7, atol=1e-7)

    outputs = [result.spikes, result.v, result.firing_rate, result.activation_map]
    pairs = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o is not None]
    expected_x, expected_v = torch.autograd.grad(
        [o for o, _ in pairs], [oracle_x, oracle_v], [g.cpu() for _, g in pairs]
    )
    # Rounding grows with what is added up along the way, not with what is left of it.
    scale = max(1.0, expected_x.float().abs().max().item())
    torch.testing.assert_close(
        g_x.float(), expected_x.float(), rtol=1e-5 + 2 * ROUNDING[dtype], atol=3e-6 * scale
    )
    torch.testing.assert_close(g_v0, expected_v, rtol=1e-5, atol=3e-6 * scale)


# ------------------------------------------------------------------------------------ kernels = oracle


@pytest.mark.parametrize("detach_reset", [True, False], ids=["detached", "attached"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reset", RESETS)
def test_every_variant_equals_the_oracle(reset, shape, dtype, detach_reset, device, monkeypatch):
    d = Dynamics(0.9, 1.2, reset, v_reset=-0.1, gain=0.8, offset=0.05, detach_reset=detach_reset)
    case = draw(21, (2, 3, 4, 4), dtype)
    check(case, d, shape, device, monkeypatch)
    check(case, d, shape, device, monkeypatch, use_mask=True)
    check(case, d, shape, device, monkeypatch, maps=True)
    check(case, d, shape, device, monkeypatch, use_mask=True, maps=True, through_trace=True)


@pytest.mark.parametrize("channels", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
def test_the_loop_that_averages_equals_the_oracle_and_a_pool(
    reset, dtype, channels, device, monkeypatch, launched
):
    for T, shape, detach_reset in zip((1, 7, 8, 9, 21, 40), SHAPES * 2, (True, False) * 3):
        case = draw(T, (2, channels, 4, 6), dtype, seed=T)
        case.x, case.g_spikes, case.g_pooled = map(
            LAYOUTS["channels_last"], (case.x, case.g_spikes, case.g_pooled)
        )
        d = Dynamics(0.9, 1.2, reset, v_reset=-0.1, detach_reset=detach_reset)
        check(case, d, shape, device, monkeypatch, pool=True)
        check(case, d, shape, device, monkeypatch, pool=True, use_mask=True, maps=True, through_trace=True)
        case.x = case.x[:1].expand(case.x.shape)  # a step that repeats
        case.g_pooled = case.g_pooled[:1, :1, :1, :1, :1].expand(case.g_pooled.shape)  # from .sum()
        check(case, d, shape, device, monkeypatch, pool=True, maps=True)
    width = 8 if dtype.itemsize == 2 and channels == 2 else 4
    assert {plan.kernel.split(", ")[1] for plan in launched} == {str(width)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 8, 33, 34, 36, 40, 1025])
def test_every_size_and_width(n, dtype, device, monkeypatch, launched):
    width = max(w for w in cuda.widths(dtype.itemsize) if n % w == 0)
    for T, reset in zip((1, 2, 5, 16, 17, 40), itertools.cycle(RESETS)):
        d = Dynamics(reset=reset, detach_reset=False)
        check(draw(T, (n,), dtype), d, "triangle", device, monkeypatch, use_mask=True, maps=True)
        check(draw(T, (n,), dtype), d, "triangle", device, monkeypatch)
    assert {plan.kernel.split(", ")[1] for plan in launched} == {str(width)}


def _offset(t: Tensor) -> Tensor:
    """The same numbers, one element off any alignment."""
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


LAYOUTS = {
    "channels_last": lambda t: t.movedim(2, -1).contiguous().movedim(-1, 2),
    "same_every_step": lambda t: t[:1].expand(t.shape),
    "gap_between_steps": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "unaligned": _offset,
}


@pytest.mark.parametrize("reset", RESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_taken_as_they_are(layout, dtype, reset, device, monkeypatch, launched):
    case = draw(9, (2, 3, 4, 4), dtype)
    plain = case.g_spikes
    case.x = LAYOUTS[layout](case.x)
    d = Dynamics(reset=reset)
    check(case, d, "triangle", device, monkeypatch, use_mask=True, maps=True)
    case.g_spikes = LAYOUTS[layout](plain)
    check(case, d, "triangle", device, monkeypatch, use_mask=True, maps=True)
    case.g_spikes = plain[:1, :1, :1, :1, :1].expand(plain.shape)  # what .sum() sends back
    check(case, d, "triangle", device, monkeypatch, use_mask=True, maps=True)
    width = 1 if layout == "unaligned" else 16 // dtype.itemsize
    assert f", {width}, " in launched[0].kernel


@pytest.mark.parametrize(("reset", "fires"), [("paper", 0), ("soft", 1), ("hard", 1)])
def test_a_potential_at_the_threshold(reset, fires, device, monkeypatch):
    """The paper's comparison is strict, SpikingJelly's is not."""
    p = parameters(Dynamics(reset=reset), "triangle")
    x, v = torch.tensor([[0.5], [0.5]], device=device), torch.zeros(1, device=device)
    spikes, _, _, _, slope, _ = cuda.forward(x, v, None, p)
    assert spikes.flatten().tolist() == [0, fires]
    assert slope.flatten().tolist() == [128, 255]  # 255 / 2 to even
    case = draw(30, (64,), torch.float32)
    case.x, case.v = (case.x * 4).round() / 4, (case.v * 4).round() / 4
    check(case, Dynamics(reset=reset, detach_reset=False), "triangle", device, monkeypatch)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("reset", RESETS)
def test_what_is_not_finite_stays_so(reset, value, device):
    x, v = torch.ones(5, 3, device=device), torch.zeros(3, device=device)
    x[1, 1] = value
    v_T = cuda.forward(x, v, None, parameters(Dynamics(0.9, reset=reset), "triangle"))[1]
    assert v_T.isfinite().tolist() == [True, False, True]


def test_a_missing_gradient_is_zero(device):
    case = draw(6, (5,), torch.float32)
    p = parameters(Dynamics(), "triangle", firing_rate=True)
    x, v, g_rate = (t.to(device) for t in (case.x, case.v, case.g_rate))
    spikes, _, _, _, slope, _ = cuda.forward(x, v, None, p)
    sparse = cuda.backward(None, None, g_rate, None, None, slope, v, None, p, x.dtype)
    zeros = torch.zeros_like(spikes), torch.zeros_like(v)
    full = cuda.backward(*zeros, g_rate, None, None, slope, v, None, p, x.dtype)
    assert torch.equal(sparse[0], full[0])
    assert torch.equal(sparse[1], full[1])


def test_a_dropped_spike_can_be_told_from_none(device):
    case = draw(12, (40,), torch.float16)
    case.mask[:20] = 0
    case.mask[0] = 1e-9  # is 0 in float16
    p = parameters(Dynamics(), "triangle", firing_rate=True, activation_map=True)
    x, v, mask = (t.to(device) for t in (case.x, case.v, case.mask))
    spikes, _, rate, _, _, fired = cuda.forward(x, v, mask, p)
    assert (spikes[:, :20] == 0).all()
    torch.testing.assert_close(unpacked(fired, 12).float().mean(0), rate)
    assert (rate[:20] > 0).any()
    assert torch.equal(unpacked(fired, 12)[:, 20:] & (mask[20:] != 0), spikes[:, 20:] != 0)


def test_without_slopes_nothing_else_changes(device, launched):
    case = draw(7, (3, 8), torch.bfloat16)
    p = parameters(Dynamics(), "atan", firing_rate=True, activation_map=True)
    x, v, mask = (t.to(device) for t in (case.x, case.v, case.mask))
    with_slope = cuda.forward(x, v, mask, p)
    without = cuda.forward(x, v, mask, p._replace(keep_slope=False))
    for a, b in zip(with_slope[:4], without[:4], strict=True):
        assert torch.equal(a, b)
    assert without[4].numel() == without[5].numel() == 0


def test_no_neurons(device):
    x, v = torch.zeros(3, 0, 2, device=device), torch.zeros(0, 2, device=device)
    p = parameters(Dynamics(), "triangle", firing_rate=True)
    spikes, v_T, rate, amap, slope, _ = cuda.forward(x, v, None, p)
    assert spikes.shape == slope.shape == x.shape
    assert v_T.shape == rate.shape == v.shape
    assert amap is None
    g_x, g_v0 = cuda.backward(spikes, v, rate, None, None, slope, v, None, p, x.dtype)
    assert (g_x.shape, g_v0.shape) == (x.shape, v.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reset", RESETS)
def test_slopes_are_rounded_to_a_byte(reset, shape, device):
    """Kept slopes are within half a 255th of their peak, so the gradients err by no more than that
    adds up to along the steps behind: ``e[t] = leak * e[t+1] + |g[t]| * peak / 510``."""
    d = Dynamics(0.9, 1.2, reset, v_reset=-0.1)
    case, T = draw(15, (500,), torch.float32), 15
    p = parameters(d, shape)
    x = case.x.requires_grad_()
    *_, slope, fired = cuda.forward(x.detach().to(device), case.v.to(device), None, p)

    state, z = case.v, []
    with torch.no_grad():
        for x_t in x:  # potentials before their reset
            o, after = dynamics.step(x_t, state, d, SURROGATES[shape])
            z.append(p.scale * ((after if reset == "paper" else d.leak * state + x_t) - 1.2).abs())
            state = after
    assert (slope.cpu().float() - 255 * shape_of(p, torch.stack(z))).abs().max() < 0.501

    g = [case.g_spikes.to(device), case.g_v.to(device)]
    g_x, _ = cuda.backward(*g, None, None, fired, slope, case.v.to(device), None, p, torch.float32)
    exact = dynamics.run(x, case.v, d, SURROGATES[shape])
    (expected,) = torch.autograd.grad(exact[:2], x, [case.g_spikes, case.g_v])
    error = torch.zeros(500)
    for t in reversed(range(T)):
        error = d.leak * error + case.g_spikes[t].abs() * p.peak * 0.501 / 255
        assert ((g_x[t].cpu() - expected[t]).abs() <= error + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reset", RESETS)
def test_the_operation_reaches_them(reset, dtype, device, monkeypatch, launched):
    """From ``time_loop`` down, with autograd choosing what is saved; Numba as the other side."""

    def gradients(device: torch.device) -> list[Tensor]:
        case = draw(12, (2, 8), dtype)
        x, v = case.x.to(device).requires_grad_(), case.v.to(device).requires_grad_()
        d = Dynamics(0.9, reset=reset, detach_reset=False)
        results = [
            op.time_loop(x, v, d, SURROGATES["atan"], case.mask.to(device), **flags)
            for flags in ({}, {"firing_rate": True}, {"activation_map": True, "through_trace": True})
        ]
        loss = results[0].spikes.float().sum() + results[0].v.sin().sum()
        loss = loss + results[1].firing_rate.square().sum() + results[2].activation_map.square().sum()
        return [t.cpu() for t in (results[2].spikes, *torch.autograd.grad(loss, [x, v]))]

    expected = gradients(torch.device("cpu"))
    assert not launched
    monkeypatch.setattr(op, "_kernels", lambda device: cuda)
    got = gradients(device)
    assert len(launched) == 6
    assert torch.equal(got[0], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):  # a slope on the edge may round either way
        torch.testing.assert_close(a.float(), b.float(), rtol=2e-5 + 8 * ROUNDING[dtype], atol=0.02)


@pytest.mark.parametrize("reset", RESETS)
def test_the_operation_averages_in_them(reset, device, monkeypatch, launched):
    """A pool as part of the loop, from ``time_loop`` down; Numba as the other side."""
    case = draw(9, (2, 16, 4, 4), torch.float32)

    def results(device: torch.device) -> list[Tensor]:
        x = LAYOUTS["channels_last"](case.x.to(device)).requires_grad_()
        v = case.v.to(device).contiguous(memory_format=torch.channels_last)
        d = Dynamics(0.9, reset=reset)
        result = op.time_loop(x, v, d, SURROGATES["atan"], case.mask.to(device), pool=True, firing_rate=True)
        loss = (result.spikes * case.g_pooled.to(device)).sum() + result.firing_rate.square().sum()
        return [t.cpu() for t in (result.spikes, *torch.autograd.grad(loss, [x]))]

    expected = results(torch.device("cpu"))
    assert not launched
    monkeypatch.setattr(op, "_kernels", lambda device: cuda)
    got = results(device)
    assert [plan.kernel.endswith(", 1>") for plan in launched] == [True, True]
    assert torch.equal(got[0], expected[0])
    torch.testing.assert_close(got[1], expected[1], rtol=2e-5, atol=0.02)


def test_a_hard_reset_needs_to_know_who_fired(device):
    case = draw(3, (4,), torch.float32)
    p = parameters(Dynamics(reset="hard"), "triangle")
    slope = torch.zeros(3, 4, dtype=torch.uint8, device=device)
    g, v = case.g_spikes.to(device), case.v.to(device)
    with pytest.raises(ValueError, match="fired must be given"):
        cuda.backward(g, None, None, None, None, slope, v, None, p, torch.float32)


# ------------------------------------------------------------------------------------- device only


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_runs_in_a_cuda_graph_and_on_a_side_stream():
    if reason := cuda.why_not(torch.device("cuda")):
        pytest.skip(reason)
    p = parameters(Dynamics(), "triangle", activation_map=True)
    case = draw(9, (64,), torch.float32)
    x, v, g_map = case.x.cuda(), case.v.cuda(), case.g_map.cuda()

    def both():
        spikes, v_T, _, amap, slope, fired = cuda.forward(x, v, None, p)
        gradients = cuda.backward(spikes, v_T, None, g_map, fired, slope, v, None, p, x.dtype)
        return spikes, v_T, amap, *gradients

    expected = [t.clone() for t in both()]  # also compiles
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        outside = both()
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    original, x_other = x.clone(), torch.zeros_like(x)
    x.copy_(x_other)
    graph.replay()
    assert captured[0].sum() < expected[0].sum()
    x.copy_(original)
    graph.replay()
    torch.cuda.synchronize()
    for a, b, c in zip(expected, outside, captured, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


# ----------------------------------------------------------------------------------------- launching


def test_width_keeps_the_device_busy():
    h100 = 132
    assert cuda._width(20_000, 20_000, 4, h100, ()) == 1
    assert cuda._width(1 << 20, 1 << 20, 4, h100, ()) == 4
    assert cuda._width(1 << 20, 1 << 20, 2, h100, ()) == 8
    assert cuda._width((1 << 20) + 2, 0, 2, h100, ()) == 2
    assert cuda._width(1 << 20, (1 << 20) + 1, 4, h100, ()) == 1  # a row of x would be unaligned
    assert cuda._width(1 << 20, 1 << 20, 2, h100, (), channels=64) == 8
    assert cuda._width(1 << 20, 1 << 20, 2, h100, (), channels=63) == 4
    assert cuda._width(20_000, 20_000, 2, h100, (), channels=64) == 4


class FakeKernel:
    """CuPy's RawKernel as far as a launch uses it."""

    def __init__(self, calls, local_size_bytes=0):
        self.calls, self.local_size_bytes = calls, local_size_bytes

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))


@pytest.fixture
def fake_cupy(monkeypatch):
    """Install a CuPy that records modules and launches; the first build of a kernel may spill."""

    def install(spills=0):
        modules, launches = [], []

        def build(**kwargs):
            modules.append(kwargs)
            kernel = FakeKernel(launches, spills if len(modules) == 1 else 0)
            return SimpleNamespace(get_function=lambda name: kernel)

        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=build))
        return modules, launches

    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch.context())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=7))
    cuda._compiled.cache_clear()
    yield install
    cuda._compiled.cache_clear()


PLAN = cuda.Launch("lif_forward<float, 1, 0, 0, 0, 0>", 3, np.zeros((), cuda._FORWARD))


def test_launches_go_to_torchs_stream(fake_cupy):
    modules, launches = fake_cupy()
    cuda._launch(PLAN, torch.device("cuda", 0))
    cuda._launch(PLAN, torch.device("cuda", 0))
    (module,) = modules  # compiled once
    assert module["name_expressions"] == (PLAN.kernel,)
    assert module["code"] == cuda.source()
    assert len(launches) == 2
    for (grid, block, args), kwargs in launches:
        assert (grid, block, kwargs["stream"].ptr) == ((3,), (cuda.THREADS,), 7)
        assert args[0].size == 1  # CuPy passes an array of one by value


def test_a_variant_that_spills_is_compiled_with_more_registers(fake_cupy):
    modules, launches = fake_cupy(spills=8)
    cuda._launch(PLAN, torch.device("cuda", 0))
    options = [module["options"] for module in modules]
    assert options == [cuda.OPTIONS, (*cuda.OPTIONS, cuda.MORE_REGISTERS)]
    assert len(launches) == 1


def test_why_not_names_the_reason(monkeypatch):
    assert "need a CUDA tensor" in cuda.why_not(torch.zeros(2))
    assert "on cpu" in cuda.why_not(torch.device("cpu"))
    device = torch.device("cuda")
    assert cuda.why_not(device) is None or "CuPy" in cuda.why_not(device)
    monkeypatch.setitem(sys.modules, "cupy", None)
    cuda._why_no_cupy.cache_clear()
    try:
        assert 'pip install "lasnn-sj[cuda1' in cuda.why_not(device)
    finally:
        cuda._why_no_cupy.cache_clear()


def test_cupy_takes_the_source():
    """CuPy compiles at the first launch, which needs a device; its input can be checked here."""
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    names = (cuda.kernel_names()[0],)
    cupy.RawModule(code=cuda.source(), options=("--std=c++17",), name_expressions=names)
