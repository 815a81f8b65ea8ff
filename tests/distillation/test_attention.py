"""Attention maps against numbers worked out by hand (Eq. 5-6, 10-11)."""

import math

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj.distillation import (
    Attention,
    Look,
    Signals,
    TapError,
    TeacherForward,
    activation_map,
    gradient_map,
    spike_activation_map,
    spike_map,
    weight_at,
)
from lasnn_sj.distillation.pairs import Pair
from lasnn_sj.neurons import LIFNode

E = math.exp(-1)
MAPS = [activation_map, gradient_map, spike_map]


def test_activation_map_is_the_mean_over_channels_of_squares():
    a = torch.tensor([[[[1.0, 2.0], [0.0, -1.0]], [[3.0, 0.0], [0.0, 7.0]]]])  # [1, 2, 2, 2]
    # (1 + 9) / 2, (4 + 0) / 2, 0, (1 + 49) / 2
    assert activation_map(a, normalize=False).tolist() == [[5, 2, 0, 25]]


def test_gradient_map_is_the_mean_over_channels_of_absolute_values():
    g = torch.tensor([[[[1.0, -2.0]], [[-3.0, 0.0]]], [[[0.0, 0.5]], [[0.0, 0.5]]]])  # [2, 2, 1, 2]
    assert gradient_map(g, normalize=False).tolist() == [[2, 1], [0, 0.5]]


def test_gradient_map_of_a_cross_entropy():
    """Two classes, logits = sums of the two channels: d CE / d A = softmax - one-hot (Eq. 10)."""
    a = torch.zeros(1, 2, 1, 2, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(a.sum((2, 3)), torch.tensor([0]))
    (g,) = torch.autograd.grad(loss, a)
    assert gradient_map(g, normalize=False).tolist() == [[0.5, 0.5]]  # (|1/2 - 1| + |1/2 - 0|) / 2


@pytest.mark.parametrize("margin", [1, 10, 20])
def test_gradient_map_of_a_confident_teacher(margin):
    """Two pixels are the two logits: d CE / d A = p - 1 and 1 - p of the true class, equally long for any p.

    In float32 p is 1 from a margin of 17 on, and p - 1 of two digits at 10.
    """
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.eye(2))
        linear.bias.copy_(torch.tensor([margin, 0.0]))
    student, teacher = LIFNode(step_mode="m"), nn.Sequential(nn.Identity(), nn.Flatten(), linear)
    attention = Attention("gradient", pairs=[("0", "0")])
    images = torch.zeros(1, 1, 1, 2)
    look = Look(nn.Sequential(student), teacher, images.expand(2, 1, 1, 1, 2), images, images, num_classes=2)
    needs, signals = attention.prepare(look), Signals(images, torch.tensor([0]))
    TeacherForward(teacher, needs)(images, torch.tensor([0]), signals)
    (actual,) = attention.teacher_maps(signals)
    torch.testing.assert_close(actual, torch.tensor([[0.5, 0.5]]).sqrt())


def test_spike_activation_map_of_one_neuron_by_hand():
    spikes = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1, 1)
    # N = 0, e^-1, e^-2, e^-3 + e^-1; times o and averaged over the four steps
    expected = (E**2 + E**3 + E) / 4
    assert spike_activation_map(spikes, normalize=False).item() == pytest.approx(expected, rel=1e-15)


def test_spike_activation_map_equals_the_double_sum_over_spike_pairs():
    T = 9
    spikes = (torch.rand(T, 2, 3, 2, 4, generator=torch.Generator().manual_seed(0)) < 0.4).double()
    expected = np.zeros((2, 2, 4))
    for t in range(T):
        for earlier in range(t):
            product = (spikes[t] * spikes[earlier]).sum(1).numpy()  # sum over channels
            expected += math.exp(-(t - earlier)) * product / T
    actual = spike_activation_map(spikes, normalize=False)
    np.testing.assert_allclose(actual, expected.reshape(2, 8), rtol=1e-12)


def test_spike_activation_map_of_one_step_is_zero():
    assert spike_activation_map(torch.ones(1, 1, 1, 2, 2)).tolist() == [[0, 0, 0, 0]]


def test_gradient_of_the_spike_map_flows_through_o_and_not_through_N():
    spikes = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1, 1).requires_grad_()
    spike_activation_map(spikes, normalize=False).sum().backward()
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
    assert gradient_map(g, normalize=False, size=(2, 2)).tolist() == [[2.5, 4.5, 10.5, 12.5]]


def test_every_pixel_counts_where_a_map_shrinks_by_more_than_two():
    g = torch.tensor([[[[0.0, 4.0, 8.0, 28.0]]]])  # bilinear samples would see the middle two alone
    assert gradient_map(g, normalize=False, size=(1, 1)).tolist() == [[10]]


def test_a_map_grows_by_bilinear_interpolation():
    g = torch.tensor([[[[1.0, 5.0]]]])
    # centres of four pixels at -0.25, 0.25, 0.75, 1.25 of the two: ends are kept, thirds are mixed 3:1
    assert gradient_map(g, normalize=False, size=(1, 4)).tolist() == [[1, 2, 4, 5]]


def test_squares_are_taken_before_and_the_norm_after_resizing():
    a = torch.tensor([[[[1.0, 3.0, 4.0, 0.0]]]])
    # squares 1 9 16 0, means 5 and 8
    assert activation_map(a, normalize=False, size=(1, 2)).tolist() == [[5, 8]]
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
    assert gradcheck(lambda x: make(x, size=size, normalize=normalise), a.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_of_half_precision_are_computed_in_float32(dtype):
    a = torch.full((1, 1, 32, 32), 200.0, dtype=dtype)  # its square leaves float16
    maps = activation_map(a, normalize=False)
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


# ---- the objective ----

RATE = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.0]]]])  # [1, 2, 1, 2]; per-step maps: mean over C (0.75, 0)
TEACHER = torch.tensor([[[[3.0, 4.0]]]])  # [1, 1, 1, 2]; its map is (9, 16) / |(9, 16)|


def attention_of(**arguments):
    """The objective on one pair, with the pair already chosen."""
    attention = Attention(pairs=[("s", "t")], **arguments)
    attention.chosen = [Pair("s", "t", (1, 2), (1, 2), "0")]
    return attention


def signals_of(epoch=0, epochs=1):
    return Signals(
        torch.zeros(1, 2), torch.tensor([0]), student={("s", "firing_rate"): RATE}, teacher={"t": TEACHER},
        epoch=epoch, epochs=epochs,
    )  # fmt: skip


def test_the_part_of_the_loss_by_hand():
    """Maps (1, 0) and (9, 16) / 18.358: distance sqrt((1 - 0.49026)^2 + 0.87157^2)."""
    norm = math.hypot(9, 16)
    expected = math.hypot(1 - 9 / norm, 16 / norm)
    parts = attention_of()(signals_of())
    assert parts["attention"].item() == pytest.approx(0.45 * expected, rel=1e-6)
    squared = attention_of(distance="mse", alpha=2.0)(signals_of())["attention"].item()
    assert squared == pytest.approx(expected**2 / 2, rel=1e-6)


def test_flat_maps_are_logged_beside_the_distance():
    """A flat map is (1, 1) / sqrt 2; of centered maps it is 0 and the teacher's has norm 1."""
    norm, signals = math.hypot(9, 16), signals_of()
    attention_of()(signals)
    flat = math.hypot(9 / norm - 0.5**0.5, 16 / norm - 0.5**0.5)
    assert signals.logged["attention_flat"].item() == pytest.approx(flat, rel=1e-5)
    assert signals.logged["attention_0"].item() == pytest.approx(math.hypot(1 - 9 / norm, 16 / norm))
    centered = signals_of()
    attention_of(center=True)(centered)
    assert centered.logged["attention_flat"].item() == pytest.approx(1)
    # centered maps (1, -1) / sqrt 2 and (-1, 1) / sqrt 2 are opposite
    assert centered.logged["attention_0"].item() == pytest.approx(2)


@pytest.mark.parametrize(("power", "expected"), [(1, [0.75, 0.0]), (2, [0.625, 0.0])])
def test_power_of_the_firing_rate(power, expected):
    assert activation_map(RATE, power=power, normalize=False).tolist() == [expected]


def test_silent_neurons_have_a_gradient_at_power_1_only():
    for power, moves in ((1, True), (2, False)):
        rate = torch.zeros(1, 1, 1, 3, requires_grad=True)
        (activation_map(rate, power=power, normalize=False) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        assert bool((rate.grad != 0).all()) is moves


@pytest.mark.parametrize(
    ("schedule", "weights"),
    [
        ("constant", [0.9, 0.9, 0.9]),
        ("linear", [0.9, 0.45, 0.0]),
        ("exponential", [0.9, 0.81, 0.729]),
        ("cosine", [0.9, 0.45, 0.0]),
        (lambda progress: 2 * progress, [0.0, 0.9, 1.8]),
    ],
    ids=["constant", "linear", "exponential", "cosine", "function"],
)
def test_schedules_by_hand(schedule, weights):
    found = []
    for epoch in range(3):
        signals = signals_of(epoch, 3)
        attention_of(schedule=schedule)(signals)
        found.append(signals.logged["attention_alpha"])
    assert found == pytest.approx(weights)
    assert weight_at("linear", 0, 1) == 1  # of a single epoch


@pytest.mark.parametrize("value", [-0.1, math.inf, math.nan, "1"])
def test_a_schedule_of_impossible_weights(value):
    with pytest.raises(ValueError, match=f"schedule .* gave {value!r} at progress 0"):
        attention_of(schedule=lambda progress: value)(signals_of())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "both"}, 'must be "activation" or "gradient"'),
        ({"alpha": -1}, "alpha must be a number, at least 0, got -1"),
        ({"alpha": "0.9"}, "alpha must be a number"),
        ({"schedule": "linaer"}, "schedule must be one of constant, linear, exponential, cosine"),
        ({"power": 3}, "power must be 1 or 2"),
        ({"distance": "l1"}, 'distance must be "l2" or "mse"'),
        ({"levels": ("top",)}, "levels must be some of low, middle, high"),
        ({"pairs": ["a", "b"]}, r"pairs must be a list of \(student module, teacher module\)"),
        ({"pairs": {"a": "b"}}, "pairs must be a list"),
        ({"pairs": []}, "pairs must be a list"),
    ],
)
def test_wrong_arguments_of_the_objective(arguments, message):
    with pytest.raises(ValueError, match=message):
        Attention(**arguments)


def test_gradient_attention_of_one_step_is_refused():
    x = torch.zeros(1, 2, 1, 4, 4)
    look = Look(nn.Sequential(LIFNode(step_mode="m")), nn.ReLU(), x, x[0], x, num_classes=2)
    with pytest.raises(ValueError, match="gradient attention needs T of at least 2"):
        Attention("gradient", pairs=[("0", "0")]).prepare(look)


def test_levels_that_the_networks_do_not_have():
    x = torch.zeros(2, 2, 1, 4, 4)
    teacher = nn.Sequential(nn.ReLU())
    look = Look(nn.Sequential(LIFNode(step_mode="m")), teacher, x, x[0], x, num_classes=2)
    with pytest.raises(TapError, match="not among those of the networks: high"):
        Attention(levels=("low",)).prepare(look)
