"""Attention maps against numbers worked out by hand (Eq. 5-6, 10-11)."""

import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj.distillation.attention import activation_map, gradient_map, spike_activation_map, spike_map
from lasnn_sj.distillation.teaching import Distillation
from lasnn_sj.neurons import LIFNode

E = math.exp(-1)
MAPS = [activation_map, gradient_map, spike_map]


def test_activation_map_is_the_mean_over_channels_of_squares():
    a = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]], [[3.0, 0.0], [0.0, 7.0]]]])  # [1, 2, 2, 2]
    # (1 + 9) / 2, (4 + 0) / 2, 0, (1 + 49) / 2
    assert activation_map(a, normalise=False).tolist() == [[5, 2, 0, 25]]


def test_gradient_map_is_the_mean_over_channels_of_absolute_values():
    g = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]], [[[0.0, 0.5]], [[0.0, 0.5]]]])  # [2, 2, 1, 2]
    assert gradient_map(g, normalise=False).tolist() == [[2, 1], [0, 0.5]]


def test_gradient_map_of_a_cross_entropy():
    """Two classes, logits = sums of the two channels: d CE / d A = softmax - one-hot (Eq. 10)."""
    a = torch.zeros(1, 2, 1, 2, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(a.sum((2, 3)), torch.tensor([0]))
    (g,) = torch.autograd.grad(loss, a)
    assert gradient_map(g, normalise=False).tolist() == [[0.5, 0.5]]  # (|1/2 - 1| + |1/2 - 0|) / 2


@pytest.mark.parametrize("margin", [1, 10, 20])
def test_gradient_map_of_a_sure_teacher(margin):
    """Two pixels are the two logits: d CE / d A = p - 1 and 1 - p of the true class, equally long for any p.

    In float32 p is 1 from a margin of 17 on, and p - 1 of two digits at 10.
    """
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.copy_(torch.tensor([margin, 0.0]))
    student, teacher = LIFNode(step_mode="m"), nn.Sequential(nn.Identity(), nn.Flatten(), linear)
    distillation = Distillation(nn.Sequential(student), teacher, "gradient", True, False, [("0", "0")], False)
    images = torch.zeros(1, 1, 1, 2)
    distillation.set_taps(images.unsqueeze(0), images, 2)
    _, (actual,) = distillation.ask_teacher(images, torch.tensor([0]))
    torch.testing.assert_close(actual, torch.tensor([[0.5, 0.5]]).sqrt())


def test_spike_activation_map_of_one_neuron_by_hand():
    spikes = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1, 1)
    # N = 0, e^-1, e^-2, e^-3 + e^-1; times o and averaged over the four steps
    expected = (E**2 + E**3 + E) / 4
    assert spike_activation_map(spikes, normalise=False).item() == pytest.approx(expected, rel=1e-15)


def test_spike_activation_map_equals_the_double_sum_over_spike_pairs():
    T = 9
    spikes = (torch.rand(T, 2, 3, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    expected = np.zeros((2, 2, 4))
    for t in range(T):
        for earlier in range(t):
            product = (spikes[t] * spikes[earlier]).sum(1).numpy()  # sum over channels
            expected += math.exp(-(t - earlier)) * product / T
    actual = spike_activation_map(spikes, normalise=False)
    np.testing.assert_allclose(actual, expected.reshape(2, 8), rtol=1e-12)


def test_spike_activation_map_of_one_step_is_zero():
    assert spike_activation_map(torch.ones(1, 1, 1, 2, 2)).tolist() == [[0, 0, 0, 0]]


def test_gradient_of_the_spike_map_flows_through_o_and_not_through_N():
    spikes = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1, 1).requires_grad_()
    spike_activation_map(spikes, normalise=False).sum().backward()
    expected = [0, E / 4, E**2 / 4, (E**3 + E) / 4]  # N[t] / T
    assert spikes.grad.flatten().tolist() == pytest.approx(expected, rel=1e-15)


def test_the_map_that_neurons_record_is_the_map_of_their_spikes():
    node = LIFNode(leak=0.9, step_mode="m")
    node.record = ("firing_rate", "activation_map")
    spikes = node(torch.rand(11, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1)))
    recorded = node.recorded
    assert 0 < spikes.mean() < 1
    # float32 sums of 11 terms in another order
    mine = spike_map(recorded["activation_map"])
    torch.testing.assert_close(mine, spike_activation_map(spikes), rtol=1e-5, atol=0)
    torch.testing.assert_close(recorded["firing_rate"], spikes.mean(0), rtol=1e-6, atol=0)
    functional.reset_net(node)


def test_maps_are_divided_by_their_l2_norm_image_by_image():
    a = torch.tensor([[[[3.0, 4.0]]], [[[0.0, 0.5]]]])
    assert gradient_map(a).tolist() == [[0.6000000238418579, 0.800000011920929], [0, 1]]  # 3/5 and 4/5


@pytest.mark.parametrize("make", MAPS)
def test_normalised_maps_do_not_depend_on_the_scale(make):
    a = torch.rand(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(make(a), make(1000 * a), rtol=1e-12, atol=0)
    torch.testing.assert_close(make(a).norm(dim=1), torch.ones(3, dtype=torch.float64), rtol=1e-12, atol=0)


def test_the_smallest_gradients_are_normalised_too():
    """Their squares would be 0 in float32."""
    g = torch.tensor([[[[3e-25, -4e-25]]]])
    torch.testing.assert_close(gradient_map(g), torch.tensor([[0.6, 0.8]]))


def test_a_map_shrinks_by_averaging():
    g = torch.arange(16.0).view(1, 1, 4, 4)
    # of 0 1 4 5, of 2 3 6 7, of 8 9 12 13, of 10 11 14 15
    assert gradient_map(g, normalise=False, size=(2, 2)).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_every_pixel_counts_where_a_map_shrinks_by_more_than_two():
    g = torch.tensor([[[[0.0, 4.0, 8.0, 28.0]]]])  # bilinear samples would see the middle two alone
    assert gradient_map(g, normalise=False, size=(1, 1)).tolist() == [[10]]


def test_a_map_grows_by_bilinear_interpolation():
    g = torch.tensor([[[[1.0, 5.0]]]])
    # centres of four pixels at -0.25, 0.25, 0.75, 1.25 of the two: ends are kept, thirds are mixed 3:1
    assert gradient_map(g, normalise=False, size=(1, 4)).tolist() == [[1, 2, 4, 5]]


def test_squares_are_taken_before_and_the_norm_after_resizing():
    a = torch.tensor([[[[1.0, 3.0, 4.0, 0.0]]]])
    # squares 1 9 16 0, means 5 and 8
    assert activation_map(a, normalise=False, size=(1, 2)).tolist() == [[5, 8]]
    norm = math.sqrt(25 + 64)
    assert activation_map(a, size=(1, 2)).tolist()[0] == pytest.approx([5 / norm, 8 / norm], rel=1e-6)


@pytest.mark.parametrize("size", [(4, 6), None])
def test_a_size_that_is_there_already_changes_nothing(size):
    a = torch.rand(2, 3, 4, 6)
    assert torch.equal(activation_map(a, size=size), activation_map(a))


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("size", [None, (2, 2), (5, 7)])
def test_a_silent_layer_has_a_zero_map_and_finite_gradients(make, size):
    a = torch.zeros(2, 3, 4, 4, requires_grad=True)
    maps = make(a, size=size)
    assert not maps.any()
    maps.sum().backward()
    assert a.grad.isfinite().all()


def test_a_silent_image_leaves_the_others_alone():
    a = torch.rand(3, 2, 4, 4)
    a[1] = 0
    maps = activation_map(a)
    assert not maps[1].any()
    assert torch.equal(maps[2], activation_map(a[2:])[0])


@pytest.mark.parametrize("make", MAPS)
@pytest.mark.parametrize("size", [None, (2, 2), (5, 6)])
@pytest.mark.parametrize("normalise", [True, False])
def test_gradients_of_maps(make, size, normalise):
    # away from 0, where an absolute value has no derivative
    a = torch.rand(1, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.5
    assert gradcheck(lambda x: make(x, size=size, normalise=normalise), a.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_half_precision_are_computed_in_float32(dtype):
    a = torch.full((1, 1, 32, 32), 200.0, dtype=dtype)  # its square leaves float16
    maps = activation_map(a, normalise=False)
    assert maps.dtype == torch.float32
    assert (maps == 40000).all()


@pytest.mark.parametrize(("make", "name"), list(zip(MAPS, ["a", "g", "m"])))
def test_maps_refuse_another_rank(make, name):
    with pytest.raises(ValueError, match=rf"{name} must be \[N, C, H, W\], got shape \(3, 4, 4\)"):
        make(torch.zeros(3, 4, 4))


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (0, 1, 1, 2, 2)])
def test_spike_activation_map_refuses_another_rank_or_no_step(shape):
    with pytest.raises(ValueError, match=r"spikes must be \[T, N, C, H, W\]"):
        spike_activation_map(torch.zeros(shape))
