"""The equations against numbers worked out by hand. (Eq. numbers are those of the LaSNN paper.)"""

import math

import pytest
import torch
from spikingjelly.activation_based import surrogate
from torch import tensor
from torch.testing import assert_close

from lasnn_sj.neurons import IntegratorNode, LIFNode, LinearSurrogate
from lasnn_sj.neurons.dynamics import Dynamics, run
from lasnn_sj.neurons.op import time_loop

E = math.exp(-1)


def potentials(x, dynamics, v0=0.0):
    """Spikes and the state after each step, one neuron."""
    v, spikes, states = tensor([v0]), [], []
    for value in x:
        result = run(tensor([[value]]), v, dynamics, LinearSurrogate())
        v = result.v
        spikes.append(result.spikes.item())
        states.append(v.item())
    return spikes, states


def test_eq_1_and_2_leak_fire_and_subtract_one_step_later():
    # v1 = 0.5 * 0    + 0.8           = 0.8    <= 1: no spike
    # v2 = 0.5 * 0.8  + 0.8           = 1.2    >  1: spike
    # v3 = 0.5 * 1.2  + 0.8 - 1       = 0.4    (the threshold itself does not leak)
    # v4 = 0.5 * 0.4  + 0.8           = 1.0    not above 1: Eq. 2 is strict
    # v5 = 0.5 * 1.0  + 2.0           = 2.5    spike
    # v6 = 0.5 * 2.5  + 0.8 - 1       = 1.05   spike
    spikes, states = potentials([0.8, 0.8, 0.8, 0.8, 2.0, 0.8], Dynamics(leak=0.5))
    assert spikes == [0, 1, 0, 0, 1, 1]
    assert_close(states, [0.8, 1.2, 0.4, 1.0, 2.5, 1.05])


def test_threshold_scales_the_reset():
    # v1 = 3; v2 = 3 + 0 - 2 = 1; v3 = 1 + 1.5 = 2.5; v4 = 2.5 + 0 - 2 = 0.5
    spikes, states = potentials([3.0, 0.0, 1.5, 0.0], Dynamics(v_threshold=2.0))
    assert spikes == [1, 0, 1, 0]
    assert_close(states, [3.0, 1.0, 2.5, 0.5])


def test_spikingjelly_soft_reset_leaks_the_subtraction_and_fires_at_equality():
    # v1 = 1.0 -> spike (>=), u1 = 0; v2 = 0.5*0 + 1.6 = 1.6 -> spike, u2 = 0.6; v3 = 0.3 + 0.2 = 0.5
    spikes, states = potentials([1.0, 1.6, 0.2], Dynamics(leak=0.5, reset="soft"))
    assert spikes == [1, 1, 0]
    assert_close(states, [0.0, 0.6, 0.5])


def test_hard_reset_with_gain_and_offset():
    # c = 0.5 x - 0.1.  v1 = 0.9 -> 0 ; u1 = 0.9;  v2 = 0.5*0.9 + 0.9 = 1.35 -> 1, u2 = -0.2
    # v3 = 0.5*(-0.2) + 0.4 = 0.3
    d = Dynamics(leak=0.5, reset="hard", v_reset=-0.2, gain=0.5, offset=-0.1)
    spikes, states = potentials([2.0, 2.0, 1.0], d)
    assert spikes == [0, 1, 0]
    assert_close(states, [0.9, -0.2, 0.3])


def test_eq_3_and_4_the_output_sums_its_input_and_never_fires():
    node = IntegratorNode(step_mode="m")
    out = node(tensor([[[1.0, -2.0]], [[5.0, 0.5]], [[0.25, 4.0]]]))
    assert_close(out, tensor([[[1.0, -2.0]], [[6.0, -1.5]], [[6.25, 2.5]]]))  # no leak, no reset at 5
    assert_close(node.v, tensor([[6.25, 2.5]]))


@pytest.mark.parametrize("loop", [run, time_loop])
def test_eq_11_spike_activation_map_by_its_double_sum(loop):
    # x above / below the threshold makes spikes 1 1 0 1 0 1 with leak 0 and soft reset
    fires = [1, 1, 0, 1, 0, 1]
    x = tensor([[2.0 if o else 0.0] for o in fires])
    result = loop(
        x, torch.zeros(1), Dynamics(leak=0.0, reset="soft"), LinearSurrogate(),
        firing_rate=True, activation_map=True,
    )  # fmt: skip
    assert result.spikes.flatten().tolist() == fires
    # M = mean over t of o[t] * sum over earlier spikes t' of exp(-(t - t')):
    # t=1: t'=0 -> e^-1;  t=3: t'=0,1 -> e^-3 + e^-2;  t=5: t'=0,1,3 -> e^-5 + e^-4 + e^-2
    by_hand = (E + E**3 + E**2 + E**5 + E**4 + E**2) / 6
    assert_close(result.activation_map, tensor([by_hand]))
    assert_close(result.firing_rate, tensor([4 / 6]))


def test_eq_14_and_15_linear_surrogate_is_a_triangle_around_the_threshold():
    # do/dv = (0.3 / 2) * max(0, 1 - |v/2 - 1|) at threshold 2, with v = x for one step
    x = tensor([[-1.0, 0.0, 1.0, 2.0, 2.5, 3.0, 4.0, 7.0]], requires_grad=True)
    LIFNode(v_threshold=2.0, step_mode="m")(x).sum().backward()
    by_hand = [0.0, 0.0, 0.15 * 0.5, 0.15 * 1.0, 0.15 * 0.75, 0.15 * 0.5, 0.0, 0.0]
    assert_close(x.grad, tensor([by_hand]), rtol=0, atol=0.15 / 510)


def test_gradient_through_two_steps_by_hand():
    # leak 0.5, threshold 1, gamma 0.3.  v1 = 0.8, v2 = 0.4 + 0.9 = 1.3.  s = 0.3 * (1 - |v - 1|):
    # s1 = 0.24, s2 = 0.21.  Loss = o1 + 10 o2.
    # detached reset: dL/dx2 = 10 s2 = 2.1;  dL/dx1 = s1 + 0.5 * 2.1 = 1.29
    # attached: v2 also holds -o1, so dL/dx1 = s1 + (0.5 - s1) * 2.1 = 0.24 + 0.546 = 0.786
    for detach, by_hand in ((True, [1.29, 2.1]), (False, [0.786, 2.1])):
        x = tensor([[0.8], [0.9]], dtype=torch.float64, requires_grad=True)
        d = Dynamics(leak=0.5, detach_reset=detach)
        spikes = run(x, torch.zeros(1, dtype=torch.float64), d, LinearSurrogate()).spikes
        (spikes * tensor([[1.0], [10.0]])).sum().backward()
        assert_close(x.grad.flatten(), tensor(by_hand, dtype=torch.float64))


def test_map_gradient_goes_through_the_spike_and_optionally_through_the_trace():
    # Two steps, both fire: M = o2 * N2 / 2 with N2 = e^-1 * o1. leak 0 so that v1 = x1, v2 = x2.
    # dM/dx2 = s2 * e^-1 / 2;  dM/dx1 = s1 * e^-1 / 2 through the trace, else 0.  s = 0.3 * 0.9 = 0.27
    for through_trace in (False, True):
        x = tensor([[1.1], [1.1]], dtype=torch.float64, requires_grad=True)
        result = run(
            x, torch.zeros(1, dtype=torch.float64), Dynamics(leak=0.0, reset="soft"), LinearSurrogate(),
            activation_map=True, through_trace=through_trace,
        )  # fmt: skip
        result.activation_map.sum().backward()
        expected = 0.27 * E / 2
        assert_close(x.grad.flatten().tolist(), [expected if through_trace else 0.0, expected])


def test_linear_surrogate_is_the_derivative_of_its_primitive():
    x = torch.linspace(-2, 2, 33, dtype=torch.float64, requires_grad=True)
    smooth = LinearSurrogate(0.7, spiking=False)
    smooth(x).sum().backward()
    closed_form = 0.7 * (1 - x.detach().abs()).clamp_min(0)
    assert_close(x.grad, closed_form)
    assert_close(LinearSurrogate.backward(torch.ones_like(x), x.detach(), 0.7), closed_form)
    assert_close(smooth(tensor([-1.0, 0.0, 1.0])), tensor([0.0, 0.35, 0.7]))  # area of the triangle


@pytest.mark.parametrize("reset", ["paper", "soft", "hard"])
@pytest.mark.parametrize("function", [LinearSurrogate(spiking=False), surrogate.ATan(spiking=False)])
def test_gradcheck_with_the_smooth_stand_in(reset, function):
    torch.manual_seed(0)
    d = Dynamics(
        leak=0.8, v_threshold=0.9, reset=reset, v_reset=-0.3, gain=0.6, offset=0.1, detach_reset=False
    )
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 3, dtype=torch.float64)

    def loop(x, v):
        return run(x, v, d, function, mask, True, True, through_trace=True)

    assert torch.autograd.gradcheck(loop, (x, v))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reset": "none"}, "reset must be"),
        ({"v_threshold": 0.0}, "v_threshold must be a positive"),
        ({"v_threshold": math.nan}, "v_threshold must be a positive"),
        ({"leak": 1.5}, "leak must lie in"),
    ],
)
def test_impossible_dynamics_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        Dynamics(**changed)
