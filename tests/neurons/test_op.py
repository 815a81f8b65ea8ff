"""The time-loop operation and its CPU kernels against the oracle in ``dynamics.py``."""

import ctypes
import logging
import math
import shutil
import threading
from unittest import mock

import numba
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import surrogate
from torch import nn
from torch.testing import assert_close

from lasnn_sj import neurons
from lasnn_sj.neurons import (
    LIFNode,
    LinearSurrogate,
    backends,
    cpu,
    cpu_kernels,
    dynamics,
    lanes,
    op,
    slopes,
    threads,
    use_backend,
)
from lasnn_sj.neurons.dynamics import Dynamics, LoopParameters, run
from lasnn_sj.neurons.op import time_loop

SURROGATES = {
    "linear": LinearSurrogate(0.3),
    "atan": surrogate.ATan(2.0),
    "sigmoid": surrogate.Sigmoid(4.0),
    "piecewise": surrogate.PiecewiseQuadratic(1.5),
}


@numba.njit
def write_slope_bytes(distance, slope, count, code, scale):
    distance, slope = lanes.floats(distance), lanes.bytes_(slope)
    for i in range(0, count, lanes.WIDTH):
        byte = slopes.slope_byte(lanes.load(lanes.at(distance, i)), code, scale)
        lanes.store(lanes.at(slope, i), byte)


def slope_bytes(distance: np.ndarray, code: int, scale: float) -> np.ndarray:
    """Slopes that the kernels keep for each distance of a potential from the threshold."""
    padded = np.zeros(-(-distance.size // lanes.WIDTH) * lanes.WIDTH, np.float32)
    padded[: distance.size] = distance
    slope = np.empty(padded.size, np.uint8)
    write_slope_bytes(padded.ctypes.data, slope.ctypes.data, padded.size, code, np.float32(scale))
    return slope[: distance.size]


class Rounded(nn.Module):
    """A surrogate whose slope is rounded to a byte by the kernels' own function.

    The oracle with it must have the kernels' gradients but for float rounding. How far what a byte
    stands for is from the surrogate's slope is a test of its own, below.
    """

    def __init__(self, function: nn.Module, v_threshold: float, attached_hard: bool = False):
        super().__init__()
        form = op.kernel_form(function, v_threshold)
        shape = op.SHAPES.index(form.shape)
        angle = {slopes.ATAN: slopes.ATAN_ANGLE, slopes.SIGMOID: slopes.SIGMOID_ANGLE}
        self.code = angle.get(shape, shape) if attached_hard else shape
        self.scale, self.unit = form.scale, np.float32(form.peak / 255)
        values = np.arange(256, dtype=np.float32)
        if attached_hard:
            values, self.distances = map(torch.from_numpy, slopes.decoded(self.code, form.scale))
        self.slopes = torch.as_tensor(values)

    def bytes(self, x):
        distance = x.detach().abs().flatten().numpy()
        return torch.from_numpy(slope_bytes(distance, self.code, self.scale)).reshape(x.shape).long()

    def forward(self, x):
        slope = self.slopes[self.bytes(x)] * self.unit
        return (x >= 0).to(x) + slope * (x - x.detach())


def attached_hard_step(x, v, d, rounded):
    """The oracle's step, but its reset gradient uses ``v`` as it can be told from byte and spike."""
    v = d.leak * v + (d.gain * x.float() + d.offset)
    spikes = rounded(v - d.v_threshold)
    o = spikes.detach()
    told = d.v_threshold + (2 * o - 1) * rounded.distances[rounded.bytes(v - d.v_threshold)]
    return spikes, (1 - o) * v + o * d.v_reset + (d.v_reset - told) * (spikes - o)


def lay_out(x, layout):
    """The same values in another memory layout."""
    if layout == "channels_last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "repeated":
        return x[:1].expand_as(x)
    if layout == "batch_first":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every_other_step":
        return torch.stack([x, x + 1], 1).flatten(0, 1)[::2]
    if layout == "every_other_channel":
        return torch.stack([x, x + 1], 3).flatten(2, 3)[:, :, ::2]
    return x


LAYOUTS = (
    "contiguous",
    "channels_last",
    "repeated",
    "batch_first",
    "every_other_step",
    "every_other_channel",
)


def both(x, v, d, function, mask, maps, through_trace, oracle_function):
    """Results and gradients ``(result, g_x, g_v)`` of the kernels and of the oracle."""
    outcomes = []
    for loop, f in ((time_loop, function), (run, oracle_function)):
        x_leaf, v_leaf = x.detach().requires_grad_(), v.detach().requires_grad_()
        result = loop(x_leaf, v_leaf, d, f, mask, maps, maps, through_trace)
        generator = torch.Generator().manual_seed(5)
        loss = sum((r * torch.randn(r.shape, generator=generator)).sum() for r in result if r is not None)
        loss.backward()
        outcomes.append((result, x_leaf.grad, v_leaf.grad))
    return outcomes


@st.composite
def cases(draw, surrogates=tuple(SURROGATES)):
    reset = draw(st.sampled_from(["paper", "soft", "hard"]))
    dynamics = Dynamics(
        leak=draw(st.sampled_from([0.0, 0.5, 0.99, 1.0])),
        v_threshold=draw(st.sampled_from([0.4, 1.0, 2.5])),
        reset=reset,
        v_reset=draw(st.sampled_from([0.0, -0.3])),
        gain=draw(st.sampled_from([1.0, 0.5])),
        offset=draw(st.sampled_from([0.0, 0.1])),
        detach_reset=draw(st.booleans()),
    )
    shape = [draw(st.integers(1, 100))] + [draw(st.integers(1, n)) for n in (3, 5, 4, 6)]
    return {
        "dynamics": dynamics,
        "surrogate": draw(st.sampled_from(surrogates)),
        "shape": shape,
        "layout": draw(st.sampled_from(LAYOUTS)),
        "masked": draw(st.booleans()),
        "maps": draw(st.booleans()),
        "through_trace": draw(st.booleans()),
        # inputs on a grid meet the threshold exactly
        "on_grid": draw(st.booleans()),
        # as large layers are cut up: blocks shorter than a row, results past the cache
        "small_blocks": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def make(case):
    generator = torch.Generator().manual_seed(case["seed"])
    x = torch.randn(case["shape"], generator=generator)
    x = lay_out((2 * x).round() / 2 if case["on_grid"] else x, case["layout"])
    v = torch.randn(case["shape"][1:], generator=generator)
    mask = None
    if case["masked"]:
        mask = (torch.rand(v.shape, generator=generator) > 0.3).float() / 0.7
    return x, v, mask


@settings(max_examples=120, deadline=None)
@given(cases())
def test_equals_the_oracle(case):
    x, v, mask = make(case)
    function = SURROGATES[case["surrogate"]]
    d = case["dynamics"]
    attached_hard = d.reset == "hard" and not d.detach_reset
    rounded = Rounded(function, d.v_threshold, attached_hard)
    step = attached_hard_step if attached_hard else dynamics.step
    cut = {"BLOCK": 96, "EXTRAS_BLOCK": 96, "STREAM": 0} if case["small_blocks"] else {"BLOCK": cpu.BLOCK}
    with mock.patch.object(dynamics, "step", step), mock.patch.multiple(cpu, **cut):
        (ours, g_x, g_v), (oracle, o_x, o_v) = both(
            x, v, d, function, mask, case["maps"], case["through_trace"], rounded
        )
    for name, value in oracle._asdict().items():
        got = getattr(ours, name)
        # bit for bit: no tolerance
        assert (got is None and value is None) or torch.equal(got, value), name
    assert g_x.shape == x.shape
    assert g_v.shape == v.shape
    for got, value in ((g_x, o_x), (g_v, o_v)):
        assert (got - value).abs().max() <= 1e-4 * value.abs().max() + 1e-6


def average(spikes):
    """Averages of 2x2 pixels of a sequence."""
    return torch.nn.functional.avg_pool2d(spikes.flatten(0, 1), 2).unflatten(0, spikes.shape[:2])


@settings(max_examples=16, deadline=None)
@given(
    cases(["linear"]),
    st.tuples(*map(st.sampled_from, ([16, 48], [2, 4, 6], [2, 4, 8]))),
    st.integers(0, 3),
)
def test_the_loop_that_averages_equals_an_average_pool_after_it(case, sizes, other):
    """Bit for bit, gradients too; ``other`` is 0 where the shape or the layout needs a pool of its own."""
    C, H, W = sizes if other else (5, 2, 3)
    case = case | {"shape": [*case["shape"][:2], C, H, W], "layout": "channels_last"}
    x, v, mask = make(case)
    function, maps, d = SURROGATES[case["surrogate"]], case["maps"], case["dynamics"]
    outcomes = []
    for pool in (True, False):
        x_leaf, v_leaf = x.clone().requires_grad_(), v.clone().requires_grad_()
        with mock.patch.multiple(cpu, BLOCK=96, EXTRAS_BLOCK=96, STREAM=0):
            result = time_loop(x_leaf, v_leaf, d, function, mask, maps, maps, case["through_trace"], pool)
            result = result if pool else result._replace(spikes=average(result.spikes))
            generator = torch.Generator().manual_seed(5)
            parts = [r * torch.randn(r.shape, generator=generator) for r in result if r is not None]
            sum(part.sum() for part in parts).backward()
        outcomes.append((*result, x_leaf.grad, v_leaf.grad))
    for fused, apart in zip(*outcomes, strict=True):
        assert (fused is None and apart is None) or torch.equal(fused, apart)


@pytest.mark.parametrize("backend", ["numba", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_averages_of_spikes_in_every_precision(dtype, backend):
    x = lay_out(torch.randn(9, 2, 16, 4, 6), "channels_last").to(dtype)
    v, d, function = torch.zeros(2, 16, 4, 6), Dynamics(v_threshold=0.5), LinearSurrogate(0.3)
    with use_backend(backend):
        fused = time_loop(x, v, d, function, pool=True).spikes
    expected = average(run(x, v, d, function).spikes)
    assert fused.dtype == dtype
    assert torch.equal(fused, expected)
    assert 0 < fused.float().mean() < 1


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_pool_keeps_no_spikes_for_its_backward_pass(layout):
    x = lay_out(torch.randn(9, 2, 16, 4, 6), layout).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        time_loop(x, torch.zeros(2, 16, 4, 6), Dynamics(), LinearSurrogate(0.3), pool=True)
    assert [t.dtype for t in kept if t.numel() >= x.numel()] == [torch.uint8]  # the slopes


def test_averages_of_a_layer_that_several_threads_share():
    x = lay_out(torch.randn(20, 8, 32, 16, 16), "channels_last")
    v, d, function = torch.zeros(x.shape[1:]), Dynamics(), LinearSurrogate(0.3)
    before, found = torch.get_num_threads(), []
    for count in (1, 2, 5):
        torch.set_num_threads(count)
        leaf = x.clone().requires_grad_()
        spikes = time_loop(leaf, v, d, function, pool=True).spikes
        (spikes * torch.arange(20.0).view(-1, 1, 1, 1, 1)).sum().backward()
        found.append((spikes, leaf.grad))
    torch.set_num_threads(before)
    assert found[0][1].count_nonzero() > 0
    for spikes, gradient in found[1:]:
        assert torch.equal(spikes, found[0][0])
        assert torch.equal(gradient, found[0][1])


@pytest.mark.parametrize("function", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize(
    ("reset", "detach_reset"), [("paper", True), ("soft", False), ("hard", True), ("hard", False)]
)
def test_one_step_gradient_is_off_by_less_than_a_255th_of_the_peak(reset, detach_reset, function):
    theta = 0.8
    form = op.kernel_form(function, theta)
    x = torch.linspace(-3, 4, 5001).reshape(1, -1)
    slopes = []
    for loop in (time_loop, run):
        leaf = x.clone().requires_grad_()
        d = Dynamics(v_threshold=theta, reset=reset, detach_reset=detach_reset)
        loop(leaf, torch.zeros(5001), d, function).spikes.sum().backward()
        slopes.append(leaf.grad)
    # Half a byte, and what the approximate exponential and arctangent add. An angle code: at its steepest
    # d cos(phi)^2 / d byte is pi / 2 / 255.
    angle = reset == "hard" and not detach_reset and form.shape != "triangle"
    bytes_off = 0.56 * math.pi / 2 if angle else 0.52
    error = (slopes[0] - slopes[1]).abs().max()
    assert error <= form.peak / 255 * bytes_off
    assert error > form.peak / 255 * 0.4  # the bound is reached, so it is the rounding that is seen
    assert slopes[1].max() > 0.99 * form.peak


@pytest.mark.parametrize("function", SURROGATES.values(), ids=SURROGATES)
def test_attached_hard_reset_knows_the_potential_to_a_255th(function):
    # Here the gradient of the state, v (1 - o) + v_reset o, is (1 - o) + (v_reset - v) s, and both s and
    # (v - v_threshold) s are smooth in the byte's angle: with z = scale * |v - v_threshold| each is known
    # to half a byte, pi / 2 / 510 of what z and its slope scale with. (triangle: z (1 - z), 1 / 510)
    theta, v_reset = 1.0, -0.5
    form = op.kernel_form(function, theta)
    d = Dynamics(v_threshold=theta, reset="hard", v_reset=v_reset, detach_reset=False)
    x = torch.linspace(-8, 10, 9001).reshape(1, -1)
    gradients = []
    for loop in (time_loop, run):
        leaf = x.clone().requires_grad_()
        loop(leaf, torch.zeros(9001), d, function).v.sum().backward()
        gradients.append(leaf.grad)
    error = (gradients[0] - gradients[1]).abs().max()
    # d(z cos(phi)^2) / d phi is at most 1 for atan and 2 for sigmoid (z = 2 artanh(sin(phi)))
    steepest = 2 if form.shape == "sigmoid" else 1
    by_slope, by_distance = abs(v_reset - theta), steepest / form.scale
    assert error <= 0.56 * math.pi / 2 / 255 * form.peak * (by_slope + by_distance)
    assert gradients[1].min() < -0.1  # the reset's part counts


@pytest.mark.parametrize("alpha", [1e2, 1e4, 1e6])
def test_attached_hard_reset_with_a_very_sharp_surrogate(alpha):
    """One step: off by half an angle code of the peak, as with a blunt one; steps multiply it."""
    d, function = Dynamics(reset="hard", detach_reset=False), surrogate.ATan(alpha)
    near = 1 + torch.linspace(-30, 30, 2001) / alpha
    x, gradients = torch.cat([torch.linspace(-3, 4, 1001), near]).reshape(1, -1), []
    for loop in (time_loop, run):
        leaf = x.clone().requires_grad_()
        loop(leaf, torch.zeros(x.shape[1]), d, function).v.sum().backward()
        gradients.append(leaf.grad)
    form = op.kernel_form(function, 1.0)
    bound = 0.56 * math.pi / 2 / 255 * form.peak * (1 + 1 / form.scale)
    assert (gradients[0] - gradients[1]).abs().max() <= bound
    assert gradients[1].abs().max() > 0.9 * form.peak


@pytest.mark.parametrize("theta", [1e-30, 1e30])
def test_gradients_of_thresholds_from_1e_minus_30_on(theta):
    x, slopes = torch.linspace(0, 3, 301).reshape(1, -1) * theta, []
    for loop in (time_loop, run):
        leaf = x.clone().requires_grad_()
        d = Dynamics(v_threshold=theta, reset="soft")
        loop(leaf, torch.zeros(301), d, LinearSurrogate()).spikes.sum().backward()
        slopes.append(leaf.grad)
    peak = 0.3 / theta
    assert slopes[1].max() == pytest.approx(peak, rel=0.01)
    assert (slopes[0] - slopes[1]).abs().max() <= 0.52 * peak / 255


def test_the_trace_of_an_old_spike_reaches_the_backward():
    # One spike at t = 48, so N[t] = exp(48 - t) after it, and dM/dx[t] = N[t] * s / T with s = 0.3 / 2
    # (x = 0.5, leak 0). Blocks of the trace begin at t = 64: the spike lies 16 steps before.
    assert (cpu_kernels.WINDOW, dynamics.TRACE_STEPS) == (64, 16)
    x = torch.full((80, 1), 0.5)
    x[48] = 3.0
    x.requires_grad_()
    d = Dynamics(leak=0.0, reset="soft")
    time_loop(x, torch.zeros(1), d, LinearSurrogate(), activation_map=True).activation_map.sum().backward()
    by_hand = [math.exp(48 - t) * 0.15 / 80 for t in range(49, 80)]
    assert_close(x.grad[49:, 0], torch.tensor(by_hand), rtol=0.005, atol=0)


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("code", [slopes.TRIANGLE, slopes.ATAN_ANGLE, slopes.SIGMOID_ANGLE])
def test_the_distance_found_from_a_byte_has_that_byte(code, scale):
    found, distances = slopes.decoded(code, scale)
    bytes_again = slope_bytes(distances, code, scale)
    assert bytes_again[1:].tolist() == list(range(1, 256))
    assert (np.diff(distances) < 0).all()
    assert (np.diff(found) > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    torch.manual_seed(0)
    x = torch.randn(20, 4, 33).to(dtype)
    v = torch.zeros(4, 33)
    function = SURROGATES["atan"]
    d = Dynamics(leak=0.9)
    (ours, g_x, g_v), (oracle, o_x, o_v) = both(x, v, d, function, None, True, False, Rounded(function, 1.0))
    assert ours.spikes.dtype == g_x.dtype == dtype
    assert ours.v.dtype == ours.firing_rate.dtype == g_v.dtype == torch.float32
    for got, value in zip(ours, oracle, strict=True):
        assert torch.equal(got, value)
    assert_close(g_x, o_x, rtol=0.02, atol=0.01)
    assert_close(g_v, o_v, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_outputs_keep_the_layout_of_a_step(layout):
    x = lay_out(torch.randn(4, 2, 3, 5, 7), layout).requires_grad_()
    result = time_loop(x, torch.zeros(2, 3, 5, 7), Dynamics(), LinearSurrogate(), firing_rate=True)
    step = x[0].stride() if layout in ("channels_last", "repeated") else (105, 35, 7, 1)
    assert result.v.stride() == result.firing_rate.stride() == step
    assert result.spikes.stride() == (210, *step)


@pytest.mark.parametrize(("reset", "activation_map"), [("paper", False), ("paper", True), ("hard", False)])
def test_backward_keeps_one_byte_per_neuron_and_step(reset, activation_map):
    x = torch.randn(50, 1000, requires_grad=True)
    d, kept = Dynamics(reset=reset), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        time_loop(x, torch.zeros(1000), d, LinearSurrogate(), None, True, activation_map)
    # slopes and the first state; a map or a hard reset asks for a bit more, in words of 16
    bits = 50 * 1008 // 8 if activation_map or reset == "hard" else 0
    assert sum(kept) == 50 * 1000 + 4 * 1000 + bits


def test_without_a_gradient_no_slopes_are_kept():
    parameters = LoopParameters(
        0.9, 1.0, 0.0, 1.0, 0.0, 0, 0, 0.3, 1.0, True, False, False, False, keep_slope=False
    )
    outputs = op._time_loop(torch.randn(4, 5), torch.zeros(5), None, [float(p) for p in parameters])
    assert outputs[-2].numel() == outputs[-1].numel() == 0
    with torch.no_grad():
        x = torch.randn(4, 5, requires_grad=True)
        assert time_loop(x, torch.zeros(5), Dynamics(), LinearSurrogate()).spikes.grad_fn is None


@pytest.mark.parametrize("reset", ["paper", "soft", "hard"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("t", [0, 3, 6])
def test_nan_and_infinity_are_errors(reset, value, t):
    x = torch.ones(7, 5000)
    x[t, 4321] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        time_loop(x, torch.zeros(5000), Dynamics(leak=0.5, reset=reset), LinearSurrogate())


def test_zero_neurons_give_empty_results():
    x = torch.randn(3, 0, 4, requires_grad=True)
    result = time_loop(
        x, torch.zeros(0, 4), Dynamics(), LinearSurrogate(), firing_rate=True, activation_map=True
    )
    assert result.spikes.shape == (3, 0, 4)
    assert result.v.shape == result.firing_rate.shape == result.activation_map.shape == (0, 4)
    result.spikes.sum().backward()
    assert x.grad.shape == (3, 0, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(0, 3)}, "T >= 1"),
        ({"x": torch.zeros(3)}, r"\[T, N, ...\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.int64)}, "floating point"),
        ({"v": torch.zeros(4)}, r"state v must have the shape \(3,\)"),
        ({"v": torch.zeros(3, device="meta")}, "its device cpu"),
        ({"v": torch.zeros(3, dtype=torch.float64)}, "state v must be torch.float32"),
        ({"v": torch.zeros(3, dtype=torch.bfloat16)}, "state v must be torch.float32"),
        ({"mask": torch.zeros(2, 3)}, "mask must have the shape"),
        ({"mask": torch.zeros(3, requires_grad=True)}, "mask is a constant"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    given = {"x": torch.zeros(2, 3), "v": torch.zeros(3), "mask": None} | arguments
    with pytest.raises(ValueError, match=message):
        time_loop(given["x"], given["v"], Dynamics(), LinearSurrogate(), given["mask"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reset", [0.0, 2.0])
def test_opcheck(reset, masked):
    x = lay_out(torch.randn(4, 2, 3, 5, 5), "channels_last" if masked else "contiguous").requires_grad_()
    v = torch.zeros(2, 3, 5, 5, requires_grad=True)
    mask = torch.ones(2, 3, 5, 5) if masked else None
    maps = float(masked)
    parameters = [0.9, 1.0, 0.0, 1.0, 0.0, reset, 0.0, 0.3, 1.0, 1.0, maps, maps, 0.0, 1.0, 0.0]
    torch.library.opcheck(op._time_loop, (x, v, mask, parameters))
    if masked:
        spikes, _, rate, amap, slope, fired = (o.detach() for o in op._time_loop(x, v, mask, parameters))
        arguments = (spikes, None, rate, amap, fired, slope, v.detach(), mask, parameters, x.dtype)
        torch.library.opcheck(op._time_loop_backward, arguments)


@pytest.mark.parametrize("maps", [0.0, 1.0])
def test_opcheck_with_averages(maps):
    x = lay_out(torch.randn(4, 2, 16, 4, 2), "channels_last").requires_grad_()
    v = torch.zeros(2, 16, 4, 2, requires_grad=True)
    parameters = [0.9, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.3, 1.0, 1.0, maps, maps, 0.0, 1.0, 1.0]
    torch.library.opcheck(op._time_loop, (x, v, None, parameters))
    spikes, _, _, _, slope, fired = (o.detach() for o in op._time_loop(x, v, None, parameters))
    arguments = (spikes, None, None, None, fired, slope, v.detach(), None, parameters, x.dtype)
    torch.library.opcheck(op._time_loop_backward, arguments)


def test_compiles_into_one_graph():
    node = LIFNode(step_mode="m")
    node.record = ("firing_rate",)
    torch.manual_seed(0)
    weight = torch.randn(7, 7, requires_grad=True)
    x = torch.randn(6, 4, 7)

    def layer(x, weight):
        return node(x @ weight).sum(0), node.recorded["firing_rate"]

    outcomes = []
    for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        node.reset()
        counts, rate = f(x, weight)
        (gradient,) = torch.autograd.grad((counts**2).sum() + rate.sum(), weight)
        outcomes.append((counts, rate, gradient))
    assert outcomes[0][0].sum() > 0
    for eager, compiled in zip(*outcomes, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler on the CPU")
def test_compiles_with_inductor():
    # what is around the neurons is fused by inductor, the loop stays one operation
    torch.manual_seed(0)
    node = LIFNode(step_mode="m")
    weight = torch.randn(7, 7, requires_grad=True)
    x = torch.randn(6, 4, 7)

    def layer(x, weight):
        return (node(torch.tanh(x @ weight) * 2) * 0.5).sum(0)

    outcomes = []
    for f in (layer, torch.compile(layer, fullgraph=True)):
        node.reset()
        counts = f(x, weight)
        outcomes.append((counts, *torch.autograd.grad((counts**2).sum(), weight)))
    assert outcomes[0][0].sum() > 0
    for eager, compiled in zip(*outcomes, strict=True):
        assert_close(eager, compiled)


def test_under_autocast_the_neuron_takes_and_gives_bfloat16():
    torch.manual_seed(0)
    conv, node = nn.Conv2d(2, 4, 3), LIFNode(step_mode="m")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = torch.randn(10, 2, 8, 8)
        spikes = node(conv(images).unflatten(0, (5, 2)) * 3)
    assert spikes.dtype == torch.bfloat16
    assert node.v.dtype == torch.float32
    spikes.sum().backward()
    assert conv.weight.grad.dtype == torch.float32
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("openmp", [True, False])
def test_same_result_on_any_number_of_threads_and_from_several_at_once(openmp, monkeypatch):
    torch.manual_seed(0)
    x, v = torch.randn(20, 9001), torch.zeros(9001)
    assert x.numel() > cpu.SERIAL

    def spikes():
        return time_loop(x, v, Dynamics(), LinearSurrogate()).spikes

    monkeypatch.setattr(threads, "_openmp", threads._openmp if openmp else None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = spikes()
        torch.set_num_threads(3)
        assert torch.equal(spikes(), alone)
        results = []
        callers = [threading.Thread(target=lambda: results.append(spikes())) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
    assert len(results) == 4
    assert all(torch.equal(r, alone) for r in results)


@pytest.mark.parametrize("openmp", [True, False])
def test_every_thread_gets_the_task(openmp, monkeypatch):
    if openmp and threads._openmp is None:
        pytest.skip("this PyTorch has another OpenMP library")
    monkeypatch.setattr(threads, "_openmp", threads._openmp if openmp else None)
    together = threading.Barrier(3, timeout=30)  # so that no thread can do the work of another
    tasks = []

    def kernel(task):
        together.wait()
        tasks.append(task)

    threads.run(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(kernel), 1234, 3)
    assert tasks == [1234] * 3


class SpikingDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        x = torch.full((20, 9001), 0.3 + index)
        return time_loop(x, torch.zeros(9001), Dynamics(), LinearSurrogate()).spikes.mean()


def test_runs_in_a_forked_data_loader_worker():
    expected = [data.item() for data in map(SpikingDataset().__getitem__, range(2))]
    loader = torch.utils.data.DataLoader(
        SpikingDataset(), num_workers=1, multiprocessing_context="fork", timeout=60
    )
    assert [batch.item() for batch in loader] == expected


def test_kernels_compile_without_a_place_to_cache(monkeypatch):
    cfunc = numba.cfunc

    def no_place(kind, *, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return cfunc(kind, **options)

    monkeypatch.setattr(numba, "cfunc", no_place)
    record = np.dtype([("x", "i8")], align=True)

    def double(pointer):
        numba.carray(pointer, 1)[0].x *= 2

    task = np.array((21,), record)
    cpu_kernels.c_function(double, record)(task.ctypes.data)
    assert task["x"] == 42


def test_a_reset_without_a_kernel_runs_in_plain_pytorch(monkeypatch, caplog):
    monkeypatch.setattr(backends, "RESETS", ("paper", "hard"))
    x, v = torch.rand(5, 3), torch.zeros(3)
    soft = Dynamics(reset="soft")
    found = time_loop(x, v, soft, LinearSurrogate())
    assert_close(found, run(x, v, soft, LinearSurrogate()), rtol=0, atol=0)
    assert "reset 'soft' has no kernel; paper, hard have one" in caplog.text
    with use_backend("numba"), pytest.raises(RuntimeError, match="cannot be met: reset 'soft' has no kernel"):
        time_loop(x, v, soft, LinearSurrogate())


def test_backend_names_what_runs_and_why():
    assert neurons.backend("cpu").name == "numba"
    assert neurons.backend(torch.zeros(2, dtype=torch.bfloat16)).name == "numba"
    name, reason = neurons.backend(torch.zeros(2, dtype=torch.float64))
    assert name == "torch"
    assert "float64" in reason
    name, reason = neurons.backend("cpu", surrogate=surrogate.SoftSign())
    assert name == "torch"
    assert "SoftSign has no kernel form" in reason
    name, reason = neurons.backend("meta")
    assert name == "torch"
    assert "no kernel for device meta" in reason


def test_a_forced_backend_runs_or_raises():
    x, v, d = torch.randn(3, 4), torch.zeros(4), Dynamics()
    with use_backend("torch"):
        assert neurons.backend("cpu").name == "torch"
        with use_backend("numba"):
            assert neurons.backend(x).name == "numba"
        exact = time_loop(x.requires_grad_(), v, d, LinearSurrogate())
    assert "TimeLoop" not in exact.spikes.grad_fn.name()
    assert "time_loop" in time_loop(x, v, d, LinearSurrogate()).spikes.grad_fn.name()
    with use_backend("cupy"), pytest.raises(RuntimeError, match="cupy does not run on device cpu"):
        time_loop(x, v, d, LinearSurrogate())
    with use_backend("numba"), pytest.raises(RuntimeError, match="SoftSign"):
        time_loop(x, v, d, surrogate.SoftSign())
    with pytest.raises(ValueError, match="backend must be one of"), use_backend("gpu"):
        pass
    assert neurons.backend("cpu").name == "numba"


def test_falling_back_is_logged_once(caplog):
    backends._warn.cache_clear()
    x, v = torch.randn(3, 4), torch.zeros(4)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            time_loop(x, v, Dynamics(), surrogate.SoftSign())
            time_loop(x, v, Dynamics(), LinearSurrogate())
        with use_backend("torch"):
            time_loop(x, v, Dynamics(), LinearSurrogate())
    (record,) = caplog.records
    assert "SoftSign" in record.getMessage()


@pytest.mark.parametrize(("name", "distance"), [("atan", 7.18), ("sigmoid", 1.90)])
def test_slopes_below_half_a_byte_of_the_peak_are_zero_and_no_others(name, distance):
    """``1 / (1 + (pi z)^2) = 1 / 510`` at z = 7.18; ``4 s (1 - s) = 1 / 510`` at 4 z = 7.62."""
    inside, outside = 1 - 0.98 * distance, 1 - 1.02 * distance

    def gradient(x, backend):
        x = torch.tensor([[x]], requires_grad=True)
        with use_backend(backend):
            time_loop(x, torch.zeros(1), Dynamics(1.0, 1.0, "soft"), SURROGATES[name]).spikes.sum().backward()
        return x.grad.item()

    assert gradient(outside, "numba") == 0 < gradient(outside, "torch")
    peak = {"atan": 1.0, "sigmoid": 1.0}[name]
    assert gradient(inside, "numba") == pytest.approx(peak / 255)
    assert gradient(inside, "numba") == pytest.approx(gradient(inside, "torch"), abs=peak / 510)
