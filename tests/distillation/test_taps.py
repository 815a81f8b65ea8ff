"""Choosing pairs of layers, and reading them while the networks run."""

import pytest
import torch
import torchvision
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from lasnn_sj import DirectEncoder, models
from lasnn_sj.distillation import taps
from lasnn_sj.distillation.attention import spike_activation_map, spike_map
from lasnn_sj.neurons import LIFNode

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pairs_of(student, teacher, names=None, T=2, images=IMAGES):
    return taps.choose_pairs(student, teacher, DirectEncoder(T)(images), images, names)


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ([32], [0]),
        ([32, 16], [0, 1]),
        ([32, 16, 16], [0, 1, 2]),
        ([32, 16, 16, 8, 8, 4, 2], [2, 4, 6]),  # VGG9: cut where the resolution changes, 3 + 2 + 2 deep
        ([32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2], [3, 6, 12]),  # VGG16: 4 + 3 + 6, or 4 + 6 + 3
        ([16] * 6, [1, 3, 5]),  # one resolution: by depth alone
        ([16, 16, 16, 16, 8], [1, 3, 4]),  # one change only: there, and in the middle of the rest
    ],
)
def test_three_levels(sizes, levels):
    chosen = taps._three_levels([(s, s) for s in sizes])
    if len(sizes) == 13:  # both cuts are equally even
        assert chosen in ([3, 6, 12], [3, 9, 12])
    else:
        assert chosen == levels


def test_pairs_of_vgg5_and_resnet20():
    """VGG5's three convolutions see 32, 16 and 16 pixels; the teacher's last activations there are its
    first and second stage."""
    found = pairs_of(models.vgg5(10, width=0.1), models.teacher_resnet20(10))
    assert [(p.student, p.teacher, p.size) for p in found] == [
        ("features.0.neuron", "layer1", (32, 32)),
        ("features.2.neuron", "layer2", (16, 16)),
        ("features.3.neuron", "layer2", (16, 16)),
    ]


def test_nearest_resolution_is_interpolated():
    """torchvision's ResNet18 gives 16, 8, 4, 2, 1 pixels for 32: the 32-pixel layer takes the nearest."""
    teacher = torchvision.models.resnet18(num_classes=10)
    found = pairs_of(models.vgg5(10, width=0.1), teacher)
    assert (found[0].size, found[0].teacher_size) == ((32, 32), (16, 16))
    assert "interpolated" in str(found[0])
    # its ReLU modules run twice, so the choice falls on a block that hands on a ReLU's output
    assert all(dict(teacher.named_modules())[p.teacher] is not None for p in found)


def test_functional_activations_are_found_by_their_sign():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), Block()
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            return self.head(self.b(self.a(x)).mean((2, 3)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x))

    assert {p.teacher for p in pairs_of(models.vgg5(10, width=0.1), Functional())} == {"b"}


def test_named_pairs_and_patterns():
    student, teacher = models.vgg5(10, width=0.1), models.teacher_resnet20(10)
    (pair,) = pairs_of(student, teacher, [("features.2.n*", "layer3")])
    assert (pair.student, pair.teacher) == ("features.2.neuron", "layer3")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("features.9.neuron", "layer1"), "matches no module of VGG; near: features"),
        (("features.*.neuron", "layer1"), "matches 3 modules"),
        (("features.0.neuron", "layer7"), "teacher tap 'layer7' matches no module"),
        (("classifier.0.neuron", "layer1"), "student tap 'classifier.0.neuron' gives no feature map"),
        (("features.0.neuron", "linear"), "teacher tap 'linear' gives no feature map"),
    ],
)
def test_wrong_names_are_errors(pair, message):
    with pytest.raises(taps.TapError, match=message.replace("*", r"\*")):
        pairs_of(models.vgg5(10, width=0.1), models.teacher_resnet20(10), [pair])


def test_a_module_that_runs_twice_cannot_be_named():
    relu = nn.ReLU()
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), relu, nn.Conv2d(4, 4, 3, padding=1), relu)
    with pytest.raises(taps.TapError, match="'1' runs 2 times"):
        pairs_of(models.vgg5(10, width=0.1), teacher, [("features.0.neuron", "1")])


def test_a_student_without_feature_maps_is_an_error():
    student = nn.Sequential(layer.Flatten(step_mode="m"), layer.Linear(3072, 10), LIFNode(step_mode="m"))
    with pytest.raises(taps.TapError, match="no spiking layer with a feature map"):
        pairs_of(student, models.teacher_resnet20(10))


@pytest.mark.parametrize("stock", [False, True])
def test_firing_rate_is_the_mean_of_the_spikes(stock):
    node = neuron.LIFNode(step_mode="m") if stock else LIFNode(step_mode="m")
    student = nn.Sequential(node)
    x = torch.rand(6, 2, 3, 4, 4) * 2
    tap = taps.StudentTaps(student, ["0"], "firing_rate")
    with tap:
        spikes = student(x)
        (rate,) = tap.collect()
    assert 0 < spikes.mean() < 1
    torch.testing.assert_close(rate, spikes.mean(0))


def test_firing_rates_of_half_precision_are_float32():
    """100 spikes or less have a mean that bfloat16 rounds by up to 0.4 %."""
    student = nn.Sequential(neuron.IFNode(step_mode="m"))
    tap = taps.StudentTaps(student, ["0"], "firing_rate")
    with tap:
        spikes = student((torch.rand(100, 2, 3, 4, 4) * 0.6).bfloat16())
        (rate,) = tap.collect()
    assert spikes.dtype == torch.bfloat16
    torch.testing.assert_close(rate, spikes.float().mean(0), rtol=1e-6, atol=0)


def test_what_a_node_records_for_somebody_else_is_recorded_again_afterwards():
    node = LIFNode(step_mode="m")
    node.record, node.through_trace = ("activation_map",), True
    with taps.StudentTaps(nn.Sequential(node), ["0"], "firing_rate"):
        assert (node.record, node.through_trace) == (("firing_rate",), False)
    assert (node.record, node.through_trace) == (("activation_map",), True)


def test_activation_map_of_the_loop_equals_the_one_of_the_spikes():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, ["0"], "activation_map")
    with tap:
        spikes = student(torch.rand(9, 2, 3, 4, 4) * 2)
        (m,) = tap.collect()
    torch.testing.assert_close(spike_map(m), spike_activation_map(spikes))


def test_a_stock_neuron_has_no_activation_map():
    with pytest.raises(taps.TapError, match="cannot record an activation map"):
        taps.StudentTaps(nn.Sequential(neuron.LIFNode(step_mode="m")), ["0"], "activation_map")


def test_a_tap_must_fire_once():
    student = nn.Sequential(LIFNode(step_mode="m"))
    tap = taps.StudentTaps(student, ["0"], "firing_rate")
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
    tap = taps.StudentTaps(student, ["0"], "firing_rate")
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
        (seen,) = tap.collect()
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
        after, before = tap.collect()
    g_after, g_before = torch.autograd.grad(out.sum(), [after, before])
    w = teacher[3].weight.view(1, 2, 2, 2).expand(3, -1, -1, -1)
    torch.testing.assert_close(g_after, w)
    torch.testing.assert_close(g_before, w * (before > 0))
