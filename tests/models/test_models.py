"""The papers' networks: counts by hand, an independent forward pass, dropout, shapes, errors."""

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binom, chi2
from spikingjelly.activation_based import functional, layer
from torch import nn
from torch.overrides import TorchFunctionMode

from lasnn_sj import models
from lasnn_sj.data.encoding import DirectEncoder, PoissonEncoder
from lasnn_sj.models.layers import Unit
from lasnn_sj.neurons import LIFNode

SIGNIFICANCE = 1e-6  # the chance that a correct network fails a statistical test, at another seed
STUDENTS = {
    name: getattr(models, name)
    for name in ("conv3_linear2", "vgg5", "vgg7", "vgg9", "vgg16", "resnet12", "resnet20")
}
K = 10
# 3x3 convolutions without bias, then the classifier; inputs of a linear layer are channels * side^2.
WEIGHTS = {
    "conv3_linear2": 9 * (3 * 64 + 64 * 128 + 128 * 128) + 128 * 4**2 * 256 + 256 * K,
    "vgg5": 9 * (3 * 64 + 64 * 128 + 128 * 128) + 128 * 8**2 * 4096 + 4096 * 4096 + 4096 * K,
    "vgg7": 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512)
    + 512 * 4**2 * 4096 + 4096 * 4096 + 4096 * K,
    "vgg9": 9 * (3 * 64 + 64 * 128 + 128 * 256 + 256 * 256 + 256 * 512 + 512 * 512 + 512 * 512)
    + 512 * 2**2 * 4096 + 4096 * 4096 + 4096 * K,
    "vgg16": 9 * (3 * 64 + 64 * 64 + 64 * 128 + 128 * 128 + 128 * 256 + 2 * 256 * 256)
    + 9 * (256 * 512 + 2 * 512 * 512 + 3 * 512 * 512) + 512 * 2**2 * 4096 + 4096 * 4096 + 4096 * K,
    # stem; then one block a stage, each with a 1x1 skip where the channels change
    "resnet12": 9 * (3 * 64 + 2 * 64 * 64) + 9 * 2 * 64 * 64
    + 9 * (64 * 128 + 128 * 128) + 64 * 128 + 9 * (128 * 256 + 256 * 256) + 128 * 256
    + 9 * (256 * 512 + 512 * 512) + 256 * 512 + 512 * 2**2 * K,
}  # fmt: skip
# and a second block a stage, of two convolutions
WEIGHTS["resnet20"] = WEIGHTS["resnet12"] + 9 * 2 * (64**2 + 128**2 + 256**2 + 512**2)


def count(net):
    return sum(p.numel() for p in net.parameters())


def on_meta(build, *args, **options):
    """The network's shapes without its memory."""
    with torch.device("meta"):
        return build(*args, **options)


# ---- structure ----


@pytest.mark.parametrize("spiking", [True, False])
@pytest.mark.parametrize("name", STUDENTS)
def test_parameter_counts(name, spiking):
    assert count(on_meta(STUDENTS[name], K, spiking=spiking)) == WEIGHTS[name]


@pytest.mark.parametrize("name", STUDENTS)
def test_images_of_64_pixels_leave_the_classifier_its_size(name):
    net = on_meta(STUDENTS[name], K, image_size=64, spiking=False)
    assert count(net) == WEIGHTS[name]
    pools = [m for m in net.modules() if isinstance(m, nn.AvgPool2d)]
    small = [m for m in on_meta(STUDENTS[name], K).modules() if isinstance(m, nn.AvgPool2d)]
    assert len(pools) == len(small) + 1


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("image_size", [32, 64])
def test_images_run_through_at_their_size(name, image_size):
    net = on_meta(STUDENTS[name], 7, in_channels=2, image_size=image_size, width=0.1, spiking=False)
    assert net(torch.empty(3, 2, image_size, image_size, device="meta")).shape == (3, 7)


def test_other_classes_and_channels():
    expected = 9 * (1 * 64 + 64 * 128 + 128 * 128) + 128 * 4**2 * 256 + 256 * 100
    assert count(on_meta(models.conv3_linear2, 100, in_channels=1)) == expected


def test_width_scales_every_hidden_layer():
    net = on_meta(models.vgg9, K, width=0.25)
    shapes = [tuple(p.shape) for p in net.parameters()]
    channels = [3, 16, 32, 64, 64, 128, 128, 128]
    assert shapes[:7] == [(b, a, 3, 3) for a, b in zip(channels, channels[1:])]
    assert shapes[7:] == [(1024, 128 * 2**2), (1024, 1024), (10, 1024)]


@pytest.mark.parametrize("name", STUDENTS)
def test_there_is_no_bias_and_no_normalisation(name):
    net = on_meta(STUDENTS[name], K, width=0.1)
    assert all(p.dim() in (2, 4) for p in net.parameters())
    assert not any(isinstance(m, (nn.modules.batchnorm._NormBase, nn.MaxPool2d)) for m in net.modules())


@pytest.mark.parametrize("name", STUDENTS)
def test_ann_and_snn_have_the_same_weights_under_the_same_names(name):
    ann, snn = (on_meta(STUDENTS[name], K, width=0.1, spiking=spiking) for spiking in (False, True))
    shapes = [{n: p.shape for n, p in net.named_parameters()} for net in (ann, snn)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", STUDENTS)
def test_every_hidden_layer_has_one_nonlinearity(name):
    hidden = {"conv3_linear2": 3 + 1, "vgg5": 3 + 2, "vgg7": 5 + 2, "vgg9": 7 + 2, "vgg16": 13 + 2}
    hidden |= {"resnet12": 3 + 4 * 2, "resnet20": 3 + 4 * 4}
    ann, snn = (on_meta(STUDENTS[name], K, width=0.1, spiking=spiking) for spiking in (False, True))
    assert sum(isinstance(m, nn.ReLU) for m in ann.modules()) == hidden[name]
    assert sum(isinstance(m, LIFNode) for m in snn.modules()) == hidden[name]


# ---- the same arithmetic, written again ----

PLANS = {
    "conv3_linear2": "c A c A c A l",
    "vgg5": "c A c c A l l",
    "vgg7": "c A c c A c c A l l",
    "vgg9": "c A c c A c c A c A c l l",
    "vgg16": "c c A c c A c c c A c c c A c c c l l",
}


@pytest.mark.parametrize("name", PLANS)
def test_vgg_against_a_forward_pass_written_out(name):
    torch.manual_seed(0)
    net = STUDENTS[name](4, width=0.05, spiking=False).eval().double()
    x = images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weights = list(net.parameters())
    for step in PLANS[name].split():
        if step == "c":
            x = F.relu(F.conv2d(x, weights.pop(0), padding=1))
        elif step == "A":
            x = F.avg_pool2d(x, 2)
        else:
            x = F.relu(x.flatten(1) @ weights.pop(0).T)
    torch.testing.assert_close(net(images), x @ weights.pop(0).T, rtol=1e-10, atol=1e-14)
    assert not weights


@pytest.mark.parametrize(("name", "blocks"), [("resnet12", 1), ("resnet20", 2)])
def test_resnet_against_a_forward_pass_written_out(name, blocks):
    torch.manual_seed(0)
    net = STUDENTS[name](4, width=0.05, spiking=False).eval().double()
    x = images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    w = dict(net.named_parameters())
    for i in range(3):
        x = F.relu(F.conv2d(x, w.pop(f"stem.{i}.weights.weight"), padding=1))
    x = F.avg_pool2d(x, 2)
    for stage, stride in enumerate((1, 2, 2, 2)):
        for block in range(blocks):
            at, s = f"stages.{stage}.{block}", stride if block == 0 else 1
            y = F.relu(F.conv2d(x, w.pop(f"{at}.first.weights.weight"), stride=s, padding=1))
            y = F.conv2d(y, w.pop(f"{at}.conv.weight"), padding=1)
            skip = F.conv2d(x, w.pop(f"{at}.skip.weight"), stride=s) if stage and block == 0 else x
            x = F.relu(y + skip)
    expected = x.flatten(1) @ w.pop("output.weight").T
    torch.testing.assert_close(net(images), expected, rtol=1e-10, atol=1e-14)
    assert not w


# ---- initial weights ----


def assert_deviation(weight, expected):
    """A sum of n squares of N(0, expected) is expected^2 times a chi-squared variable."""
    n = weight.numel()
    low, high = chi2.interval(1 - SIGNIFICANCE, n)
    assert low <= weight.double().square().sum().item() / expected**2 <= high


@pytest.mark.parametrize("spiking", [True, False])
def test_initial_deviations_at_full_width(spiking):
    torch.manual_seed(0)
    net = models.conv3_linear2(K, spiking=spiking)
    c1, c2, c3, hidden, output = net.parameters()
    for weight, c_out in ((c1, 64), (c2, 128), (c3, 128)):
        assert_deviation(weight, (2 / (3 * 3 * c_out)) ** 0.5)
    assert_deviation(hidden, 0.01)
    assert_deviation(output, 0.01)


def test_initial_deviations_of_a_one_by_one_skip():
    torch.manual_seed(0)
    net = models.resnet12(K, width=0.5)
    assert_deviation(net.stages[2][0].skip.weight, (2 / (1 * 1 * 128)) ** 0.5)


def test_a_narrow_linear_layer_starts_as_loud_as_a_wide_one():
    """0.01^2 * 4096 inputs = deviation^2 * 1024 inputs."""
    torch.manual_seed(0)
    net = models.vgg5(K, width=0.25)
    assert_deviation(net.classifier[1].weights.weight, 0.01 * 2)


# ---- dropout ----

# one letter a hidden layer: d with dropout, - without; "-" is the layer before a pool
DROPOUT = {
    "conv3_linear2": "---d",
    "vgg5": "-d-dd",
    "vgg7": "-d-d-dd",
    "vgg9": "-d-d--ddd",
    "vgg16": "d-d-dd-dd-ddddd",
    "resnet12": "dd-" + "d-" * 4,
    "resnet20": "dd-" + "d-" * 8,
}
DROPOUT_64 = {"vgg9": "-d-d---dd", "vgg16": "d-d-dd-dd-dd-dd"}  # a pool behind the last convolution


def seen_dropouts(net, image_size):
    """Which of the nonlinearities, in the order in which they run, hand their output to a dropout."""
    letters = []
    for module in net.modules():
        if isinstance(module, nn.ReLU):
            module.register_forward_hook(lambda *_: letters.append("-"))
        if isinstance(module, nn.Dropout):
            module.register_forward_hook(lambda *_: letters.__setitem__(-1, "d"))
    net(torch.empty(1, 3, image_size, image_size, device="meta"))
    return "".join(letters)


@pytest.mark.parametrize("name", STUDENTS)
def test_dropout_follows_hidden_layers_that_no_pool_follows(name):
    net = on_meta(STUDENTS[name], K, width=0.1, spiking=False)
    assert seen_dropouts(net, 32) == DROPOUT[name]


@pytest.mark.parametrize("name", DROPOUT_64)
def test_the_additional_pool_replaces_a_dropout(name):
    net = on_meta(STUDENTS[name], K, width=0.1, image_size=64, spiking=False)
    assert seen_dropouts(net, 64) == DROPOUT_64[name]


@pytest.mark.parametrize("name", STUDENTS)
def test_ann_and_snn_have_their_dropout_in_the_same_places(name):
    ann, snn = (on_meta(STUDENTS[name], K, width=0.1, spiking=spiking) for spiking in (False, True))
    of_ann = {n: m.p for n, m in ann.named_modules() if isinstance(m, nn.Dropout)}
    assert {n: m.p for n, m in snn.named_modules() if isinstance(m, layer.Dropout)} == of_ann


def test_no_dropout_where_its_probability_is_zero():
    net = on_meta(models.vgg5, K, width=0.1, dropout=0.0)
    assert not any(isinstance(m, layer.Dropout) for m in net.modules())


def always_firing(p=0.3, n=4000):
    """A unit whose neurons fire at every step."""
    unit = Unit(nn.Identity(), LIFNode(leak=1.0, step_mode="m"), layer.Dropout(p, step_mode="m")).train()
    return unit, torch.full((5, 2, n), 1.5)


def test_one_mask_for_all_steps_of_a_sequence():
    unit, x = always_firing()
    spikes = unit(x)
    assert spikes.unique().tolist() == pytest.approx([0, 1 / 0.7])
    assert all(torch.equal(step, spikes[0]) for step in spikes)
    assert torch.equal(unit(x), spikes)  # the sequence goes on


def test_the_mask_drops_the_given_fraction():
    torch.manual_seed(0)
    unit, x = always_firing()
    low, high = binom.interval(1 - SIGNIFICANCE, 2 * 4000, 0.3)
    assert low <= int((unit(x)[0] == 0).sum()) <= high


def test_a_new_sequence_has_a_new_mask():
    unit, x = always_firing()
    first = unit(x)
    functional.reset_net(unit)
    assert not torch.equal(unit(x), first)


def test_evaluation_drops_nothing():
    unit, x = always_firing()
    assert unit.eval()(x).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_folded_dropout_equals_dropout_after_the_neuron(dtype):
    torch.manual_seed(0)
    conv = layer.Conv2d(3, 4, 3, padding=1, bias=False, step_mode="m").to(dtype)
    unit = Unit(conv, LIFNode(v_threshold=0.4, step_mode="m"), layer.Dropout(0.5, step_mode="m")).train()
    x = torch.rand(6, 2, 3, 5, 5, dtype=dtype)
    pull = torch.randn(6, 2, 4, 5, 5, dtype=dtype)

    folded = unit(x)
    (g_folded,) = torch.autograd.grad((folded * pull).sum(), conv.weight)
    mask = unit.dropout.mask.clone()
    functional.reset_net(unit)
    explicit = unit.neuron(conv(x)) * mask
    (g_explicit,) = torch.autograd.grad((explicit * pull).sum(), conv.weight)

    assert torch.equal(folded, explicit)
    assert 0 < (explicit != 0).float().mean() < 1
    torch.testing.assert_close(g_folded, g_explicit)


def test_an_anns_dropout_needs_no_reset():
    """SpikingJelly's dropout would keep its mask, and refuse a last batch that is smaller."""
    torch.manual_seed(0)
    ann = models.conv3_linear2(K, width=0.25, spiking=False, dropout=0.5).train()
    images = torch.randn(4, 3, 32, 32)
    assert not torch.equal(ann(images), ann(images))
    assert ann(images[:1]).shape == (1, K)


# ---- initial thresholds ----


def firing_rates(net, encoded):
    """Mean spikes of each layer, in the order in which they run."""
    rates = []
    hooks = [
        m.register_forward_hook(lambda m, a, spikes: rates.append(spikes.mean().item()))
        for m in net.modules()
        if isinstance(m, LIFNode)
    ]
    functional.reset_net(net)
    with torch.no_grad():
        net.eval()(encoded)
    for hook in hooks:
        hook.remove()
    return rates


def test_initial_threshold_of_a_layer_by_hand():
    """z = 0.6745 with P(N(0, 1) > z) = 1/4; n * s^2 = 9 * 32 * 2 / (9 * 64) = 1 and 1e-4 * 128 * 64."""
    net = on_meta(models.vgg5, K, width=0.5)
    first, classifier = net.features[0].neuron, net.classifier[0].neuron
    assert first.v_threshold == pytest.approx(0.67449 * 0.5 * (3 * 2 / 32) ** 0.5, rel=1e-5)
    assert net.features[2].neuron.v_threshold == pytest.approx(0.67449 * 0.5 * (32 * 2 / 64) ** 0.5, rel=1e-5)
    assert classifier.v_threshold == pytest.approx(0.67449 * 0.5 * (1e-4 * 128 * 64) ** 0.5, rel=1e-5)


def test_a_fresh_layer_fires_at_the_rate_of_the_layer_before_it():
    torch.manual_seed(0)
    unit = models.layers.LayerFactory(True, 0.99, 0.0).conv_unit(64, 64)
    spikes = unit((torch.rand(1, 64, 64, 16, 16) < 0.25).float())
    assert spikes.mean().item() == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("encoder", [DirectEncoder, PoissonEncoder])
@pytest.mark.parametrize("name", STUDENTS)
def test_a_fresh_spiking_network_fires_in_every_layer(name, encoder):
    for seed in range(2):
        torch.manual_seed(seed)
        images = 2 * torch.rand(2, 3, 32, 32) - 1
        rates = firing_rates(STUDENTS[name](K, width=0.25), encoder(4)(images))
        assert min(rates) > 0.05
        assert max(rates) < 0.6


# ---- forward ----


@pytest.mark.parametrize("name", STUDENTS)
def test_a_spiking_network_gives_potentials_of_every_step(name):
    net = STUDENTS[name](7, in_channels=1, width=0.05).eval()
    assert net(torch.zeros(3, 2, 1, 32, 32)).shape == (3, 2, 7)


def test_potentials_are_the_summed_input_of_the_output_layer():
    torch.manual_seed(0)
    net = models.conv3_linear2(5, width=0.1).double().eval()
    for module in net.modules():
        if isinstance(module, LIFNode):
            module.v_threshold = 0.05
    seen = []
    net.classifier.register_forward_hook(lambda module, args, output: seen.append(output))
    potentials = net(torch.randn(6, 2, 3, 32, 32, dtype=torch.float64))
    spikes = seen[0]
    assert 0 < spikes.mean() < 1
    for t in range(6):
        expected = spikes[: t + 1].sum(0) @ net.output.weight.T
        torch.testing.assert_close(potentials[t], expected, rtol=1e-10, atol=1e-14)


class Convolutions(TorchFunctionMode):
    """Batch sizes of all convolutions."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (F.conv2d, torch.conv2d):
            self.batches.append(len(args[0]))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_direct_input_computes_the_first_convolution_once(name):
    net = STUDENTS[name](K, width=0.05).eval()
    code = DirectEncoder(6)(torch.randn(2, 3, 32, 32))
    with Convolutions() as direct:
        net(code)
    functional.reset_net(net)
    with Convolutions() as repeated:
        net(code.contiguous())
    assert repeated.batches == [12] * len(repeated.batches)
    assert direct.batches == [2, *repeated.batches[1:]]


def test_direct_input_gives_what_the_repeated_input_gives():
    torch.manual_seed(0)
    net = models.vgg5(K, width=0.05).double().eval()
    for module in net.modules():
        if isinstance(module, LIFNode):
            module.v_threshold = 0.1
    code = DirectEncoder(6)(torch.randn(2, 3, 32, 32, dtype=torch.float64))
    results = []
    for x in (code, code.contiguous()):
        functional.reset_net(net)
        potentials = net(x)
        (grad,) = torch.autograd.grad(potentials[-1].square().sum(), net.features[0].weights.weight)
        results.append((potentials, grad))
    assert results[0][0].any()
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-14)


# ---- errors ----


@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_the_other_forms_input_is_refused(name):
    with pytest.raises(ValueError, match=r"spiking network takes \[T, N, C, H, W\]; encode images first"):
        STUDENTS[name](K, width=0.05)(torch.zeros(2, 3, 32, 32))
    with pytest.raises(ValueError, match=r"an ANN takes \[N, C, H, W\], got shape \(4, 2, 3, 32, 32\)"):
        STUDENTS[name](K, width=0.05, spiking=False)(torch.zeros(4, 2, 3, 32, 32))


@pytest.mark.parametrize(("name", "image_size", "multiple"), [
    ("vgg5", 30, 4), ("vgg9", 24, 16), ("conv3_linear2", 4, 8), ("resnet12", 8, 16), ("vgg5", 0, 4),
    ("vgg9", 80, 32),
])  # fmt: skip
def test_image_sizes_that_do_not_divide(name, image_size, multiple):
    with pytest.raises(ValueError, match=rf"multiple of {multiple} for this network.*got {image_size}"):
        on_meta(STUDENTS[name], K, image_size=image_size)


@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_width_must_be_positive(name, width):
    with pytest.raises(ValueError, match="width must be a positive number"):
        on_meta(STUDENTS[name], K, width=width)


def test_the_narrowest_network_keeps_one_channel():
    net = on_meta(models.vgg5, K, width=1e-6)
    assert [p.shape[0] for p in net.parameters()] == [1, 1, 1, 1, 1, K]


@pytest.mark.parametrize("dropout", [1, 1.0, -0.1, float("nan")])
def test_dropout_must_be_a_probability_below_one(dropout):
    with pytest.raises(ValueError, match=r"dropout must lie in \[0, 1\)"):
        on_meta(models.vgg5, K, dropout=dropout)


# ---- teachers ----


def test_parameter_count_of_the_resnet20_teacher():
    """He et al. publish 0.27 M; 269,722 is the count of the published checkpoints for ten classes."""
    convolutions = 9 * (3 * 16 + 6 * 16 * 16 + 16 * 32 + 5 * 32 * 32 + 32 * 64 + 5 * 64 * 64)
    norms = 2 * (7 * 16 + 6 * 32 + 6 * 64)
    assert convolutions + norms + 64 * 10 + 10 == 269_722
    assert count(on_meta(models.teacher_resnet20, 10)) == 269_722


def test_parameter_count_of_the_vgg16_teacher():
    """torchvision publishes 138,365,992 for vgg16_bn; its three linear layers give way to one."""
    imagenet = 512 * 7 * 7 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
    assert count(on_meta(models.teacher_vgg16, 10)) == 138_365_992 - imagenet + 512 * 10 + 10


def test_parameter_count_of_the_densenet121_teacher():
    """torchvision publishes 7,978,856; 7x7 stem and 1000 classes give way to 3x3 and ten."""
    expected = 7_978_856 - 7 * 7 * 3 * 64 + 3 * 3 * 3 * 64 - 1025 * 1000 + 1025 * 10
    assert count(on_meta(models.teacher_densenet121, 10)) == expected


@pytest.mark.parametrize("build", [models.teacher_resnet20, models.teacher_vgg16, models.teacher_densenet121])
def test_teachers_take_other_channels_and_classes_and_keep_the_resolution_at_first(build):
    net = on_meta(build, 7, in_channels=1)
    sizes = []
    net.apply(lambda m: m.register_forward_hook(lambda m, a, y: sizes.append(tuple(y.shape[2:]))))
    assert net(torch.empty(2, 1, 32, 32, device="meta")).shape == (2, 7)
    assert sizes[:3] == [(32, 32)] * 3
    assert (16, 16) in sizes
    assert (8, 8) in sizes


def test_resnet20_shortcut_takes_every_other_pixel_and_pads_channels_on_both_sides():
    block = models.teachers._BasicBlock(2, 6, stride=2).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.arange(1.0, 33.0).view(1, 2, 4, 4)
    y = block(x)[0]
    assert not y[[0, 1, 4, 5]].any()
    assert y[2:4].flatten(1).tolist() == [[1, 3, 9, 11], [17, 19, 25, 27]]


def test_with_statistics_turns_minus_one_to_one_into_the_teachers_normalisation():
    teacher = models.InputNormalization(nn.Identity(), mean=(0.25, 0.5), std=(0.5, 2.0))
    images = torch.tensor([-1.0, 0.0, 1.0]).expand(1, 2, 1, 3)  # pixels 0, 1/2, 1
    assert teacher(images)[0, :, 0].tolist() == [[-0.5, 0.5, 1.5], [-0.25, 0, 0.25]]


def test_with_statistics_undoes_the_students_normalisation():
    pixels = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.1])
    teacher = models.InputNormalization(nn.Identity(), mean.tolist(), std.tolist()).double()
    expected = (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    # the statistics are kept in float32
    torch.testing.assert_close(teacher((pixels - 0.5) / 0.5), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "before zip"])
def test_checkpoints_of_the_published_resnet20_in_both_formats(tmp_path, new_format):
    """The published file was written before PyTorch's zip format."""
    net = models.teacher_resnet20(10)
    state = {f"module.{name}": tensor for name, tensor in net.state_dict().items()}
    path = tmp_path / "resnet20.th"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=new_format)
    loaded = models.published_resnet20(path).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("damage", ["compressed", "pipe", "empty", "text", "cut", "other", "list"])
def test_a_damaged_teacher_file_is_one_kind_of_error(tmp_path, damage):
    path, net = tmp_path / "resnet20.th", models.teacher_resnet20(10)
    torch.save({"state_dict": net.state_dict()}, path)
    whole = path.read_bytes()
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    elif damage == "compressed":  # of zeros, which are a thousandth on the disk
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data/0", bytes(1 << 20))
    elif damage in ("other", "list"):
        torch.save([1] if damage == "list" else {"state_dict": {"a": torch.ones(2)}}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"no checkpoint", "cut": whole[: len(whole) // 2]}[damage])
    with pytest.raises(ValueError, match=r"resnet20\.th is not a checkpoint of that ResNet-20 \(.+\)"):
        models.published_resnet20(path)


DATA = Path(os.environ.get("LASNN_SJ_DATA", "/nowhere"))
CHECKPOINT, CIFAR10 = DATA / "resnet20" / "resnet20-12fca82f.th", DATA / "cifar10.npz"


@pytest.mark.skipif(
    not (CHECKPOINT.is_file() and CIFAR10.is_file()),
    reason="LASNN_SJ_DATA names no folder with cifar10.npz and resnet20/resnet20-12fca82f.th",
)
def test_a_published_resnet20_scores_its_published_accuracy():
    n, published = 2000, 0.9173
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)["state_dict"]
    net = models.teacher_resnet20(10)
    net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    teacher = models.InputNormalization(net, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)).eval()
    with np.load(CIFAR10) as arrays:
        images, labels = arrays["x_test"][:n], torch.from_numpy(arrays["y_test"][:n].astype("i8"))
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.inference_mode():
        correct = sum(int((teacher(a).argmax(1) == b).sum()) for a, b in zip(x.split(250), labels.split(250)))
    low, high = binom.interval(1 - 1e-4, n, published)  # 89.3 to 94.0 %
    assert low <= correct <= high


@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_the_time_loop_computes_the_pools_that_follow_it(name):
    """The same numbers, bit for bit, as with the pools that a hook makes run by themselves."""
    net = getattr(models, name)(4, width=0.25).to(memory_format=torch.channels_last)
    pools = [m for m in net.modules() if isinstance(m, layer.AvgPool2d)]
    neuron = next(m for m in net.modules() if isinstance(m, LIFNode))
    x = PoissonEncoder(6)(torch.rand(2, 3, 32, 32))
    outcomes, seen, ran = [], [], []
    for hooked in (False, True):
        if hooked:
            for pool in pools:
                pool.register_forward_hook(lambda module, args, out: ran.append(args[0].shape))
            neuron.register_forward_hook(lambda module, args, out: seen.append(out))
        torch.manual_seed(0)
        net.zero_grad()
        functional.reset_net(net)
        scores = net(x)
        scores[-1].square().sum().backward()
        outcomes.append([scores, *(p.grad.clone() for p in net.parameters())])
        assert len(ran) == (len(pools) if hooked else 0)
    assert seen[0].shape[-1] == 32
    assert seen[0].unique().numel() == 2
    for fused, apart in zip(*outcomes, strict=True):
        assert torch.equal(fused, apart)
