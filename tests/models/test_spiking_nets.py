"""Directly trained spiking networks: sizes worked out by hand, neurons, forms, direct input."""

import pytest
import torch
from spikingjelly.activation_based import functional, neuron, surrogate
from torch.utils.flop_counter import FlopCounterMode

from lasnn_sj import DirectEncoder, models
from lasnn_sj.models.layers import BatchNorm2d
from lasnn_sj.neurons import accelerate

NETS = {
    "resnet18": models.spiking_resnet18,
    "wrn16_4": models.spiking_wrn16_4,
    "vgg16": models.spiking_vgg16,
    "vgg9": models.spiking_vgg9,
}

# Weights of the 3x3 convolutions between so many channels, and so on: c * c' * 9, c * c'.
R_STEM = 3 * 64 * 9
R1 = 4 * 64 * 64 * 9
R2 = 64 * 128 * 9 + 3 * 128 * 128 * 9 + 64 * 128
R3 = 128 * 256 * 9 + 3 * 256 * 256 * 9 + 128 * 256
R4 = 256 * 512 * 9 + 3 * 512 * 512 * 9 + 256 * 512
R_NORMS = 2 * (5 * 64 + 5 * 128 + 5 * 256 + 5 * 512)
W_STEM = 3 * 16 * 9
W1 = 16 * 64 * 9 + 3 * 64 * 64 * 9 + 16 * 64
W_NORMS = 2 * (16 + 3 * 64 + 64 + 3 * 128 + 128 + 3 * 256 + 256)
V_STEM = 3 * 64 * 9
V = (64 * 64 * 9, 64 * 128 * 9 + 128 * 128 * 9, 128 * 256 * 9 + 2 * 256 * 256 * 9,
     256 * 512 * 9 + 2 * 512 * 512 * 9, 3 * 512 * 512 * 9)  # fmt: skip
V9 = (64 * 64 * 9, 64 * 128 * 9 + 128 * 128 * 9, 128 * 256 * 9 + 256 * 256 * 9, 256 * 512 * 9 + 512 * 512 * 9)
V9_NORMS = 2 * (2 * 64 + 2 * 128 + 2 * 256 + 2 * 512)
V_NORMS = 2 * (2 * 64 + 2 * 128 + 3 * 256 + 6 * 512)

PARAMETERS = {
    "resnet18": R_STEM + R1 + R2 + R3 + R4 + R_NORMS + 512 * 100 + 100,
    "wrn16_4": W_STEM + W1 + R2 + R3 + W_NORMS + 256 * 100 + 100,
    "vgg16": V_STEM + sum(V) + V_NORMS + 512 * 100 + 100,
    "vgg9": V_STEM + sum(V9) + V9_NORMS + 512 * 100 + 100,
}
# Multiply-adds of one 32x32 image and step: first convolution, everything behind it.
MACS = {
    "resnet18": (R_STEM * 1024, R1 * 1024 + R2 * 256 + R3 * 64 + R4 * 16 + 512 * 100),
    "wrn16_4": (W_STEM * 1024, W1 * 1024 + R2 * 256 + R3 * 64 + 256 * 100),
    "vgg16": (
        V_STEM * 1024,
        V[0] * 1024 + V[1] * 256 + V[2] * 64 + V[3] * 16 + V[4] * 4 + 512 * 100,
    ),
    "vgg9": (V_STEM * 1024, V9[0] * 1024 + V9[1] * 256 + V9[2] * 64 + V9[3] * 16 + 512 * 100),
}


def test_the_numbers_by_hand_are_the_usual_ones():
    usual = {"resnet18": 11_220_132, "wrn16_4": 2_772_020, "vgg16": 14_770_212}
    assert {name: PARAMETERS[name] for name in usual} == usual
    assert {name: sum(MACS[name]) for name in usual} == {
        "resnet18": 555_468_800, "wrn16_4": 392_635_392, "vgg16": 313_247_744,
    }  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_parameters_and_multiply_adds(name):
    """The first convolution of a directly encoded image runs once, all others in every step."""
    net = NETS[name](100).eval()
    assert sum(p.numel() for p in net.parameters()) == PARAMETERS[name]
    T, counter = 3, FlopCounterMode(display=False)
    with counter, torch.no_grad():
        scores = net(DirectEncoder(T)(torch.zeros(1, 3, 32, 32)))
    assert scores.shape == (T, 1, 100)
    stem, rest = MACS[name]
    assert counter.get_total_flops() == 2 * (stem + T * rest)  # a multiply-add is two operations


def test_the_dvs_form_differs_in_its_stem_alone():
    """Stem of stride 2 on 128x128, then one pool: 32x32 as in the CIFAR form."""
    net, cifar = models.spiking_resnet18(11, 2, 128).eval(), models.spiking_resnet18(11, 2, 32)
    assert [p.shape for p in net.parameters()] == [p.shape for p in cifar.parameters()]
    assert sum(p.numel() for p in net.parameters()) == 11_220_132 - 64 * 9 - 89 * 513
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        net(torch.zeros(2, 1, 2, 128, 128))
    stem = 2 * 64 * 9 * 64 * 64
    assert counter.get_total_flops() == 2 * 2 * (stem + MACS["resnet18"][1] - 512 * 89)


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize(("channels", "size"), [(2, 128), (3, 64), (2, 34)])
def test_forms(name, channels, size):
    net = NETS[name](11, in_channels=channels, image_size=size, width=0.1)
    assert net(torch.rand(2, 3, channels, size, size)).shape == (2, 3, 11)


@pytest.mark.parametrize("name", NETS)
def test_neurons_are_stock_if_nodes(name):
    nodes = [m for m in NETS[name](10, width=0.1).modules() if isinstance(m, neuron.BaseNode)]
    assert len(nodes) == {"resnet18": 17, "wrn16_4": 13, "vgg16": 13, "vgg9": 8}[name]
    for node in nodes:
        assert type(node) is neuron.IFNode
        assert (node.v_threshold, node.v_reset, node.detach_reset) == (1.0, 0.0, True)
        assert isinstance(node.surrogate_function, surrogate.ATan)


def test_a_neuron_by_hand():
    """Fires at v = 1 exactly, is then at 0, and what goes over the threshold is lost."""
    node = models.spiking_resnet18(10, width=0.1).stem[2]
    current = torch.tensor([0.5, 0.5, 0.75, 3.0, 0.5, 0.5]).view(-1, 1, 1, 1, 1)
    assert node(current).flatten().tolist() == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("name", NETS)
def test_only_spikes_enter_a_convolution_behind_the_first(name):
    net, seen = NETS[name](10, width=0.1), []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0].unique()))
    net(DirectEncoder(4)(torch.randn(4, 3, 32, 32)))
    assert len(seen[0]) > 2
    assert all(set(values.tolist()) <= {0.0, 1.0} for values in seen[1:])
    assert any(len(values) == 2 for values in seen[1:])


@pytest.mark.parametrize("training", [True, False])
def test_a_repeated_input_gives_what_its_copy_gives(training):
    """Through convolution and batch norm; the running variance's n / (n - 1) has other n."""
    torch.manual_seed(0)
    net = models.spiking_resnet18(10, width=0.1).train(training)
    copy = models.spiking_resnet18(10, width=0.1).train(training)
    copy.load_state_dict(net.state_dict())
    x = DirectEncoder(4)(torch.randn(8, 3, 32, 32))
    current = net.stem[1](net.stem[0](x))
    assert current.stride(0) == 0
    torch.testing.assert_close(current, copy.stem[1](copy.stem[0](x.clone())), rtol=1e-5, atol=1e-5)
    norm, other = net.stem[1], copy.stem[1]
    torch.testing.assert_close(norm.running_mean, other.running_mean)
    if training:
        n = 8 * 32 * 32
        ours, theirs = ((v.running_var - 0.9) / 0.1 for v in (norm, other))
        torch.testing.assert_close(ours * (n - 1) / n, theirs * (4 * n - 1) / (4 * n), rtol=1e-4, atol=1e-4)


def test_batch_norm_leaves_other_inputs_alone():
    norm = BatchNorm2d(2, step_mode="m")
    x = torch.randn(1, 3, 2, 4, 4)
    torch.testing.assert_close(norm(x)[0].mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-6)
    assert BatchNorm2d(2, step_mode="s")(x[0]).shape == (3, 2, 4, 4)


@pytest.mark.parametrize("name", NETS)
def test_every_weight_gets_a_gradient_stock_and_accelerated(name):
    torch.manual_seed(0)
    x = torch.randn(3, 4, 3, 32, 32)
    net = NETS[name](10, width=0.25)
    outputs = []
    for _ in range(2):
        net.zero_grad()
        outputs.append(net(x).mean(0))
        functional.reset_net(net)
        outputs[-1].logsumexp(1).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
        accelerate(net)
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("vgg16", {"image_size": 16}, "image_size must be .* at least 32 for this network, got 16"),
    ("vgg9", {"image_size": 7}, "image_size must be .* at least 8 for this network, got 7"),
    ("resnet18", {"image_size": 0}, "image_size must be .* at least 1"),
    ("wrn16_4", {"image_size": 32.0}, "image_size must be a whole number"),
    ("resnet18", {"width": 0}, "width must be a positive number"),
])  # fmt: skip
def test_bad_arguments(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        NETS[name](10, **arguments)


def test_images_without_a_time_axis_are_refused():
    with pytest.raises(ValueError, match=r"\[T, N, C, H, W\]; encode images first"):
        models.spiking_resnet18(10, width=0.1)(torch.zeros(2, 3, 32, 32))


# ---- ResNet-19 with tdBN ----


def test_parameters_of_resnet19_by_hand():
    """Zheng et al.: 3x3 stem of 128, stages of 3/3/2 blocks, hidden linear layer of 256."""
    stem = 3 * 128 * 9
    stages = 6 * 128 * 128 * 9
    stages += 128 * 256 * 9 + 5 * 256 * 256 * 9 + 128 * 256
    stages += 256 * 512 * 9 + 3 * 512 * 512 * 9 + 256 * 512
    norms = 2 * (128 * 7 + 256 * 7 + 512 * 5)
    linear = 512 * 256 + 256 + 256 * 10 + 10
    with torch.device("meta"):
        net = models.spiking_resnet19(10)
    assert sum(p.numel() for p in net.parameters()) == stem + stages + norms + linear == 12_697_994
    assert sum(isinstance(m, neuron.LIFNode) for m in net.modules()) == 1 + 2 * 8 + 1


def test_a_neuron_of_resnet19_by_hand():
    """v = v / 4 + x, fires at 1 and is reset to 0."""
    node = models.spiking_resnet19(10, width=0.05).stem[2]
    current = torch.tensor([0.8, 0.8, 0.75, 0.8, 0.0, 3.0, 0.96]).view(-1, 1, 1, 1, 1)
    # 0.8 | 0.2 + 0.8 = 1 | 0.75 | 0.1875 + 0.8 < 1 | 0.246875 | 3.06 | 0.96
    assert node(current).flatten().tolist() == [0, 1, 0, 0, 0, 1, 0]


def test_tdbn_gives_every_neuron_an_input_of_the_threshold_s_size():
    """alpha * v_threshold = 1 in a series, two branches of variance 1/2 before a sum."""
    torch.manual_seed(0)
    net, deviations = models.spiking_resnet19(10, width=0.1), {}
    for name, module in net.blocks.named_modules():
        if isinstance(module, BatchNorm2d):
            module.register_forward_hook(lambda m, a, y, name=name: deviations.update({name: y.std().item()}))
    net(DirectEncoder(2)(torch.randn(4, 3, 32, 32)))
    assert deviations["0.norm1"] == pytest.approx(1, abs=0.01)
    for name in ("0.norm2", "3.norm2", "3.skip.1"):
        assert deviations[name] == pytest.approx(0.5**0.5, abs=0.01)


def test_forms_of_resnet19_and_its_gradients():
    torch.manual_seed(0)
    for channels, size in ((3, 32), (2, 128)):
        net = models.spiking_resnet19(11, channels, size, width=0.1)
        scores = net(torch.rand(4, 3, channels, size, size))
        assert scores.shape == (4, 3, 11)
        scores.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.parametrize("name", [*NETS, "resnet19"])
def test_a_fresh_network_fires_in_every_layer(name):
    torch.manual_seed(0)
    net, rates = (NETS | {"resnet19": models.spiking_resnet19})[name](10, width=0.25), []
    for module in net.modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(lambda m, a, spikes: rates.append(spikes.mean().item()))
    net(DirectEncoder(4)(2 * torch.rand(4, 3, 32, 32) - 1))
    assert min(rates) > 0.01
