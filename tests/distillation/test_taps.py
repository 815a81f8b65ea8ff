"""Taps of layers while the networks run."""

import pytest
import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from lasnn_sj import models
from lasnn_sj.distillation import spike_activation_map, spike_map, taps
from lasnn_sj.neurons import LIFNode, accelerate


@pytest.mark.parametrize("stock", [False, True])
def test_firing_rate_is_the_mean_of_the_spikes(stock):
    node = neuron.LIFNode(step_mode="m") if stock else LIFNode(step_mode="m")
    student = nn.Sequential(node)
    x = torch.rand(6, 2, 3, 4, 4) * 2
    tap = taps.StudentTaps(student, [("0", "firing_rate")])
    with tap:
        spikes = student(x)
        (rate,) = tap.collect()
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(rate, spikes.mean(0))


def test_firing_rates_of_half_precision_are_float32():
    """100 spikes or less have a mean that bfloat16 rounds by up to 0.4 %."""
    student = nn.Sequential(neuron.IFNode(step_mode="m"))
    tap = taps.StudentTaps(student, [("0", "firing_rate")])
    with tap:
        spikes = student((torch.rand(100, 2, 3, 4, 4) * 0.6).bfloat16())
        (rate,) = tap.collect()
    assert spikes.dtype == torch.bfloat16
    torch.testing.assert_close(rate, spikes.float().mean(0), rtol=1e-6, atol=0)


def test_what_a_node_records_for_somebody_else_is_recorded_again_afterwards():
    node = LIFNode(step_mode="m")
    node.record, node.through_trace = ("activation_map",), True
    with taps.StudentTaps(nn.Sequential(node), [("0", "firing_rate")]):
        assert (node.record, node.through_trace) == (("firing_rate",), False)
    assert (node.record, node.through_trace) == (("activation_map",), True)


def test_activation_map_of_the_loop_equals_the_one_of_the_spikes():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, [("0", "activation_map")])
    with tap:
        spikes = student(torch.rand(9, 2, 3, 4, 4) * 2)
        (m,) = tap.collect()
    torch.testing.assert_close(spike_map(m), spike_activation_map(spikes))


@pytest.mark.parametrize("through_trace", [False, True])
def test_activation_map_of_a_stock_neuron_is_that_of_its_spikes(through_trace):
    """Values and gradients equal those of this package's neuron, which has them from its time loop."""
    x, found = torch.rand(7, 2, 3, 4, 4) * 2, []
    for node in (neuron.LIFNode(tau=2.0, step_mode="m", detach_reset=True), None):
        node = node or accelerate(nn.Sequential(neuron.LIFNode(tau=2.0, step_mode="m", detach_reset=True)))[0]
        student, leaf = nn.Sequential(node), x.clone().requires_grad_()
        tap = taps.StudentTaps(student, [("0", "activation_map")], through_trace)
        with tap:
            student(leaf)
            (m,) = tap.collect()
        (m * torch.arange(m.numel()).view_as(m)).sum().backward()
        found.append((m.detach(), leaf.grad))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert (found[0][1] - found[1][1]).norm() < 0.02 * found[0][1].norm()  # slopes are kept in one byte


def test_several_readings_of_one_layer():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, [("0", "spikes"), ("0", "firing_rate"), ("0", "activation_map")])
    with tap:
        out = student(torch.rand(6, 2, 3, 4, 4) * 2)
        spikes, rate, m = tap.collect()
    assert torch.equal(spikes, out)
    torch.testing.assert_close(rate, out.mean(0))
    torch.testing.assert_close(m, taps.trace_map(out))


def test_a_tap_must_fire_once():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, [("0", "firing_rate")])
    with tap:
        for _ in range(2):
            student(torch.rand(2, 1, 1, 2, 2))
            functional.reset_net(student)
        with pytest.raises(taps.TapError, match="'0' fired 2 times"):
            tap.collect()
    with tap, pytest.raises(taps.TapError, match="fired 0 times"):
        tap.collect()


def test_nothing_is_read_or_recorded_outside():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, [("0", "firing_rate")])
    student(torch.rand(2, 1, 1, 2, 2))
    assert student[0].recorded == {}
    with tap:
        student(torch.rand(2, 1, 1, 2, 2))
    assert student[0].record == ()
    tap.close()
    assert not student[0]._forward_hooks


def test_in_place_layers_do_not_change_what_was_read():
    """conv -> tap -> ReLU(inplace): the tap must hold the convolution's output, negative values and all."""
    teacher = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(inplace=True))
    tap = taps.TeacherTaps(teacher, ["0"])
    x = torch.randn(2, 1, 3, 3)
    with torch.no_grad(), tap:
        teacher(x)
        seen = tap.collect()["0"]
        torch.testing.assert_close(seen, teacher[0](x))
    assert (seen < 0).any()


def test_gradients_with_respect_to_frozen_teachers_activations():
    """Linear head: d(sum of w * a) / d a is w, though no weight wants a gradient."""
    teacher = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8, 1, bias=False)
    )
    teacher.requires_grad_(False)
    tap = taps.TeacherTaps(teacher, ["1", "0"], gradients=True)
    with tap:
        out = teacher(torch.randn(3, 1, 2, 2))
        after, before = tap.collect().values()
    g_after, g_before = torch.autograd.grad(out.sum(), [after, before])
    w = teacher[3].weight.view(1, 2, 2, 2).expand(3, -1, -1, -1)
    torch.testing.assert_close(g_after, w)
    torch.testing.assert_close(g_before, w * (before > 0))


@pytest.mark.parametrize(
    ("kind", "reading", "folds"),
    [
        (taps.StudentTaps, "firing_rate", True),
        (taps.StudentTaps, "activation_map", True),
        (taps.StudentTaps, "spikes", False),
        (taps.ChunkTaps, "firing_rate", True),
        (taps.ChunkTaps, "activation_map", False),
    ],
)
def test_taps_of_recorded_maps_leave_the_pool_to_the_time_loop(kind, reading, folds):
    student = models.vgg5(4, width=0.25).to(memory_format=torch.channels_last)
    assert student.features[0].may_pool()
    kind(student, [("features.0.neuron", reading)])
    assert student.features[0].may_pool() is folds


def test_maps_are_those_of_a_network_whose_pools_run_by_themselves():
    student = models.vgg5(4, width=0.25).to(memory_format=torch.channels_last)
    wanted = [("features.0.neuron", "firing_rate"), ("features.3.neuron", "activation_map")]
    tap, x, found = taps.StudentTaps(student.eval(), wanted), torch.rand(5, 2, 3, 32, 32), []
    for pools_apart in (False, True):
        if pools_apart:
            student.features[1].register_forward_hook(lambda module, args, out: None)
            student.features[4].register_forward_hook(lambda module, args, out: None)
        functional.reset_net(student)
        with tap:
            student(x)
            found.append(tap.collect())
    for fused, apart in zip(*found, strict=True):
        assert 0 < fused.mean() < 1
        assert torch.equal(fused, apart)
