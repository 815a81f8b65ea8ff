"""Conversion: thresholds against a plain loop over time, and accuracy without any training."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer
from torch import nn

from lasnn_sj import models
from lasnn_sj.conversion.convert import ConversionError, balance_thresholds, convert, scale_output
from lasnn_sj.data import images as data
from lasnn_sj.data.encoding import DirectEncoder, PoissonEncoder
from lasnn_sj.neurons import IntegratorNode, LIFNode, Sequential, TimeLoopNode
from lasnn_sj.neurons.layout import can_pool


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Layers this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Recorded(nn.Module):
    """A code that was drawn beforehand, so that every pass over a network sees the same."""

    def __init__(self, sequence):
        super().__init__()
        self.sequence, self.T, self.at, self.longest = sequence, len(sequence), 0, 0

    def steps(self, images, steps):
        if len(images) < self.sequence.shape[1]:  # the look at the order of the layers, with one image
            return self.sequence[:steps, : len(images)]
        self.longest = max(self.longest, steps)
        piece = self.sequence[self.at : self.at + steps]
        self.at = (self.at + steps) % self.T
        assert len(piece) == steps
        return piece


def poisson(images, T, seed=0):
    return PoissonEncoder(T, torch.Generator().manual_seed(seed))(images)


def nodes(snn):
    return {name: m for name, m in snn.named_modules() if isinstance(m, TimeLoopNode)}


def thresholds(snn):
    return {name: node.v_threshold for name, node in nodes(snn).items()}


def test_convolutions_of_a_converted_network_average_in_the_time_loop():
    ann = models.conv3_linear2(10, width=0.25, image_size=8, spiking=False)
    snn, pooled = convert(ann), []
    assert all(torch.equal(a, b) for a, b in zip(ann.parameters(), snn.parameters(), strict=True))
    for node in nodes(snn).values():
        node.register_forward_pre_hook(
            lambda node, args: pooled.append(args[0].dim() == 5 and can_pool(args[0]))
        )
    snn(poisson(torch.rand(2, 3, 8, 8), 3))
    assert pooled == [True, True, True, False]


# ---- a plain loop over time, layer by layer ----


class PlainNeuron:
    """v = v + x - threshold * o and o = v > threshold; Eq. 1-2 without leak."""

    def __init__(self, threshold):
        self.threshold, self.v, self.o = threshold, 0.0, 0.0

    def __call__(self, x):
        self.v = self.v + x - self.threshold * self.o
        self.o = (self.v > self.threshold).to(x)
        return self.o


def plain_thresholds(forward, sequence, count, statistic="max", given=None):
    """``forward(x, neurons, until)`` gives the input of neuron ``until`` at one step."""
    found = []
    for until in range(count):
        if given is not None and until in given:
            found.append(given[until])
            continue
        neurons = [PlainNeuron(threshold) for threshold in found]
        inputs = torch.stack([forward(x, neurons, until) for x in sequence])
        if statistic == "max":
            found.append(inputs.max().item())
        else:
            steps = inputs.flatten(1).numpy()
            found.append(max(np.percentile(step, statistic, method="inverted_cdf") for step in steps))
    return found


def small_vgg():
    """Weights and pixels are small whole numbers, so that every sum is exact in any order."""
    torch.manual_seed(0)
    net = models.VGG((4, "A", 6), (5,), 3, in_channels=2, image_size=4, spiking=False, dropout=0.2)
    with torch.no_grad():
        for weight in net.parameters():
            weight.uniform_(-2.5, 3.5).round_()
    return net.eval()


def small_vgg_forward(net):
    conv1, conv2, linear, _ = (weight.detach() for weight in net.parameters())

    def forward(x, neurons, until):
        x = F.conv2d(x, conv1, padding=1)
        if until == 0:
            return x
        x = F.conv2d(F.avg_pool2d(neurons[0](x), 2), conv2, padding=1)
        if until == 1:
            return x
        return F.linear(neurons[1](x).flatten(1), linear)

    return forward


@pytest.fixture(scope="module")
def vgg_case():
    net = small_vgg()
    images = torch.linspace(-1, 1, 5 * 2 * 4 * 4).reshape(5, 2, 4, 4)
    return net, images, poisson(images, 40)


@pytest.mark.parametrize("statistic", ["max", 99.0, 70, 80.5])
def test_thresholds_of_a_vgg_equal_a_plain_count(vgg_case, statistic):
    net, images, sequence = vgg_case
    expected = plain_thresholds(small_vgg_forward(net), sequence, 3, statistic)
    actual = balance_thresholds(convert(net), images, Recorded(sequence), statistic)
    assert list(actual) == ["features.0.neuron", "features.2.neuron", "classifier.0.neuron"]
    assert list(actual.values()) == expected


def test_thresholds_with_direct_input_equal_a_plain_count(vgg_case):
    net, _, _ = vgg_case
    images = torch.randint(-1, 2, (5, 2, 4, 4), generator=torch.Generator().manual_seed(1)).float()
    for statistic in ("max", 75):
        expected = plain_thresholds(small_vgg_forward(net), DirectEncoder(30)(images), 3, statistic)
        actual = balance_thresholds(convert(net), images, DirectEncoder(30), statistic)
        assert list(actual.values()) == expected


def small_resnet():
    """Weights of either sign, the positive ones larger, so that every layer fires within few steps."""
    torch.manual_seed(0)
    net = models.resnet12(3, in_channels=1, image_size=16, width=1 / 32, spiking=False).double().eval()
    for weight in net.parameters():
        nn.init.uniform_(weight, -1, 2)
    return net


def small_resnet_forward(net):
    w = {name: weight.detach() for name, weight in net.named_parameters()}

    def forward(x, neurons, until):
        for i in range(3):
            x = F.conv2d(x, w[f"stem.{i}.weights.weight"], padding=1)
            if until == i:
                return x
            x = neurons[i](x)
        x = F.avg_pool2d(x, 2)
        for stage, stride in enumerate((1, 2, 2, 2)):
            at, first = f"stages.{stage}.0", 3 + 2 * stage
            y = F.conv2d(x, w[f"{at}.first.weights.weight"], stride=stride, padding=1)
            if until == first:
                return y
            y = F.conv2d(neurons[first](y), w[f"{at}.conv.weight"], padding=1)
            skip = F.conv2d(x, w[f"{at}.skip.weight"], stride=stride) if stage else x
            y = y + skip / neurons[first].threshold
            if until == first + 1:
                return y
            x = neurons[first + 1](y)
        raise AssertionError

    return forward


@pytest.fixture(scope="module")
def resnet_case():
    images = torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    images = 1 - 0.7 * images
    return small_resnet(), images, poisson(images, 25)


def test_thresholds_of_a_resnet_equal_a_plain_count(resnet_case):
    net, images, sequence = resnet_case
    expected = plain_thresholds(small_resnet_forward(net), sequence, 11)
    actual = balance_thresholds(convert(net), images, Recorded(sequence))
    assert list(actual)[2:5] == ["stem.2.neuron", "stages.0.0.first.neuron", "stages.0.0.neuron"]
    assert list(actual.values()) == pytest.approx(expected, rel=1e-12)  # float64 sums in another order


def test_stem_only_leaves_the_blocks_at_one(resnet_case):
    net, images, sequence = resnet_case
    expected = plain_thresholds(small_resnet_forward(net), sequence, 3) + [1.0] * 8
    snn = convert(net)
    balance_thresholds(snn, images, Recorded(sequence))  # what was balanced before leaves no trace
    actual = balance_thresholds(snn, images, Recorded(sequence), stem_only=True)
    assert list(actual.values()) == pytest.approx(expected, rel=1e-12)
    assert [stage[0].skip_scale.item() for stage in snn.stages] == [1, 1, 1, 1]


def test_scale_multiplies_every_threshold_in_the_end(resnet_case):
    net, images, sequence = resnet_case
    snn = convert(net)
    full = balance_thresholds(snn, images, Recorded(sequence))
    scaled = balance_thresholds(snn, images, Recorded(sequence), scale=0.7)
    assert list(scaled.values()) == [0.7 * threshold for threshold in full.values()]
    assert thresholds(snn) == scaled


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_a_skip_is_divided_by_the_threshold_that_it_bypasses(resnet_case, scale):
    net, images, sequence = resnet_case
    snn = convert(net)
    balance_thresholds(snn, images, Recorded(sequence), scale=scale)
    for (block,) in snn.stages:
        assert block.skip_scale.item() == pytest.approx(1 / block.first.neuron.v_threshold, rel=1e-15)


# ---- streaming, state, failure ----


@pytest.mark.parametrize("chunk", [1, 7, 39, 40, 1000])
def test_pieces_of_time_do_not_change_thresholds(vgg_case, chunk):
    net, images, sequence = vgg_case
    found = [balance_thresholds(convert(net), images, Recorded(sequence), chunk=c) for c in (40, chunk)]
    assert found[0] == found[1]


def test_pieces_of_time_do_not_change_thresholds_of_a_seeded_random_code(vgg_case):
    net, images, _ = vgg_case
    found = []
    for chunk in (3, 50):
        encoder = PoissonEncoder(50, torch.Generator().manual_seed(4))
        found.append(balance_thresholds(convert(net), images, encoder, chunk=chunk))
    assert found[0] == found[1]


def test_memory_does_not_grow_with_T(vgg_case):
    net, images, _ = vgg_case
    largest = {}
    for T in (20, 200):
        snn, sizes = convert(net), set()
        for module in snn.modules():
            module.register_forward_hook(lambda _, args, output, sizes=sizes: sizes.add(output.numel()))
        balance_thresholds(snn, images, DirectEncoder(T), chunk=10)
        largest[T] = max(sizes)
    assert largest[200] == largest[20] == 10 * 5 * 4 * 4 * 4  # steps, images, channels, pixels


def test_no_more_steps_are_encoded_at_once_than_asked(vgg_case):
    net, images, sequence = vgg_case
    encoder = Recorded(sequence)
    balance_thresholds(convert(net), images, encoder, chunk=6)
    assert encoder.longest == 6


def test_modes_leaks_and_states_are_restored(vgg_case):
    net, images, sequence = vgg_case
    snn = convert(net, leak=0.9).train()
    snn.classifier.eval()
    modes = [module.training for module in snn.modules()]
    snn(sequence)
    balance_thresholds(snn, images, Recorded(sequence))
    assert [module.training for module in snn.modules()] == modes
    assert [node.leak for node in nodes(snn).values()] == [0.9] * 3
    assert [node.v for node in nodes(snn).values()] == [0.0] * 3
    assert snn.features[2].dropout.mask is None
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in snn.modules())


def test_leak_is_off_while_balancing(vgg_case):
    net, images, sequence = vgg_case
    found = [balance_thresholds(convert(net, leak), images, Recorded(sequence)) for leak in (1.0, 0.1)]
    assert found[0] == found[1]


def test_dropout_is_off_while_balancing(vgg_case):
    net, images, sequence = vgg_case
    found = [balance_thresholds(convert(net.train(t)), images, Recorded(sequence)) for t in (False, True)]
    net.eval()
    assert found[0] == found[1]


def test_a_silent_layer_is_named_and_nothing_changes(resnet_case):
    net, images, sequence = resnet_case
    snn = convert(net)
    balance_thresholds(snn, images, Recorded(sequence), scale=0.5)
    before, skips = thresholds(snn), [stage[0].skip_scale.item() for stage in snn.stages]
    nn.init.constant_(snn.stages[1][0].first.weights.weight, -1.0)
    with pytest.raises(ValueError, match=r"neuron 'stages\.1\.0\.first\.neuron': .* in 25 steps is 0"):
        balance_thresholds(snn, images, Recorded(sequence))
    assert thresholds(snn) == before
    assert [stage[0].skip_scale.item() for stage in snn.stages] == skips
    assert all(node.leak == 0.99 for node in nodes(snn).values())


@pytest.mark.parametrize(("changes", "said"), [
    ({"statistic": "mean"}, "statistic must be"), ({"statistic": 0}, "statistic must be"),
    ({"statistic": 101}, "statistic must be"), ({"statistic": float("nan")}, "statistic must be"),
    ({"scale": 0}, "scale must be a positive number"), ({"scale": float("nan")}, "scale must be"),
    ({"chunk": 0}, "chunk must be at least 1"),
    ({"images": torch.zeros(0, 2, 4, 4)}, "images must be a batch"),
])  # fmt: skip
def test_arguments_out_of_range(vgg_case, changes, said):
    net, images, _ = vgg_case
    arguments = {"images": images, "encoder": DirectEncoder(2)} | changes
    with pytest.raises(ValueError, match=said):
        balance_thresholds(convert(net), **arguments)


def test_a_network_without_neurons_is_refused():
    with pytest.raises(ValueError, match="Linear runs no neuron"):
        balance_thresholds(layer.Linear(2, 2, step_mode="m"), torch.zeros(1, 2), DirectEncoder(1))


def test_a_network_in_single_step_mode_is_refused(vgg_case):
    net, images, _ = vgg_case
    snn = convert(net)
    functional.set_step_mode(snn, "s")
    with pytest.raises(ValueError, match=r"neuron 'features\.0\.neuron' is in step mode 's'"):
        balance_thresholds(snn, images, DirectEncoder(2))


# ---- convert ----


@pytest.mark.parametrize("name", ["conv3_linear2", "vgg9", "resnet12"])
def test_weights_are_copied_unchanged(name):
    ann = getattr(models, name)(4, width=0.05, spiking=False)
    before = copy.deepcopy(ann.state_dict())
    snn = convert(ann)
    weights = dict(snn.named_parameters())
    assert list(weights) == [weight for weight, _ in ann.named_parameters()]
    assert all(torch.equal(weights[n], p) for n, p in ann.named_parameters())
    with torch.no_grad():
        for weight in weights.values():
            weight.zero_()
    assert all(torch.equal(tensor, before[n]) for n, tensor in ann.state_dict().items())


@pytest.mark.parametrize("name", ["conv3_linear2", "vgg9", "resnet20"])
def test_a_converted_network_is_the_spiking_network_of_that_name(name):
    """Same modules under the same names, same output for the same weights."""
    torch.manual_seed(0)
    build = getattr(models, name)
    ann, snn = build(4, width=0.05, spiking=False).eval(), build(4, width=0.05, leak=0.8).eval()
    converted = convert(ann, leak=0.8)
    types = [{n: type(m) for n, m in net.named_modules()} for net in (converted, snn)]
    assert types[0] == types[1]
    snn.load_state_dict(converted.state_dict())
    for node in [*nodes(converted).values(), *nodes(snn).values()]:
        node.v_threshold = 1e-3
    x = torch.randn(8, 2, 3, 32, 32)
    potentials = converted(x)
    assert potentials.any()
    assert torch.equal(potentials, snn(x))


def test_leak_and_mode_are_taken_over():
    ann = models.vgg5(4, width=0.05, spiking=False)
    for training in (True, False):
        snn = convert(ann.train(training), leak=0.5)
        assert all(module.training is training for module in snn.modules())
        assert [(node.leak, node.v_threshold) for node in nodes(snn).values()] == [(0.5, 1.0)] * 5


def foreign():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding="valid", bias=False), nn.ReLU(), nn.Dropout(0.5),
        nn.AvgPool2d(2), nn.Dropout2d(0.5), nn.Conv2d(6, 8, 1, groups=2, bias=False), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5, bias=False),
    ).eval()  # fmt: skip


def test_a_foreign_ann_converts():
    snn = convert(foreign())
    kinds = [layer.Conv2d, LIFNode, layer.Dropout, layer.AvgPool2d, layer.Dropout2d, layer.Conv2d, LIFNode,
             layer.AdaptiveAvgPool2d, layer.Flatten, layer.Linear]  # fmt: skip
    body, readout = snn
    assert all(isinstance(module, kind) for module, kind in zip(body, kinds, strict=True))
    assert isinstance(readout, IntegratorNode)
    assert snn(torch.randn(3, 2, 2, 9, 9)).shape == (3, 2, 5)


def test_potentials_of_a_converted_network_are_the_anns_logits():
    """One hidden layer, constant input: a neuron's count times its threshold is within one threshold of
    the sum of its input, so the rate is within 1/T of activation / threshold."""
    torch.manual_seed(0)
    T = 300
    ann = nn.Sequential(nn.Flatten(), nn.Linear(18, 30, bias=False), nn.ReLU(), nn.Linear(30, 4, bias=False))
    ann = ann.double()
    images = torch.rand(10, 2, 3, 3, dtype=torch.float64) * 2 - 1
    snn = convert(ann, leak=1.0)
    (threshold,) = balance_thresholds(snn, images, DirectEncoder(5)).values()
    with torch.no_grad():
        logits = snn(DirectEncoder(T)(images))[-1] / T * threshold
        bound = threshold * ann[3].weight.abs().sum(1) / T
        assert (logits - ann(images)).abs().le(bound + 1e-12).all()
        assert (bound < 0.05 * ann(images).abs().amax(0)).all()  # it says something


def test_a_pool_used_in_two_places_is_converted_in_both():
    pool = nn.AvgPool2d(2)
    ann = nn.Sequential(
        nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), pool, nn.Conv2d(2, 2, 1, bias=False), nn.ReLU(), pool,
        nn.Flatten(), nn.Linear(2, 3, bias=False),
    )  # fmt: skip
    snn = convert(ann)
    assert type(snn[0]) is Sequential  # whose time loops compute the pools where nothing reads the spikes
    assert snn(torch.rand(5, 2, 1, 4, 4)).shape == (5, 2, 3)


def net_with(*extra):
    return nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), *extra, nn.ReLU(), nn.Flatten())


class SpareReLU(nn.Module):
    """One ReLU module that runs twice, as torchvision's ResNets have it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Linear(3, 3, bias=False) for _ in range(2))
        self.relu = nn.ReLU()
        nn.init.eye_(self.a.weight)

    def forward(self, x):
        return self.b(self.relu(self.a(self.relu(x))))


@pytest.mark.parametrize(("ann", "said"), [
    (net_with(nn.Conv2d(4, 4, 3)), r"layer '1' \(Conv2d\) has a bias"),
    (nn.Sequential(nn.ReLU(), nn.Linear(2, 2)), r"layer '1' \(Linear\) has a bias.*bias=False"),
    (net_with(nn.BatchNorm2d(4)), r"layer '1' \(BatchNorm2d\) normalizes"),
    (net_with(nn.LayerNorm(4)), r"layer '1' \(LayerNorm\) normalizes"),
    (net_with(nn.RMSNorm(4)), r"layer '1' \(RMSNorm\) normalizes"),
    (net_with(nn.MaxPool2d(2)), r"layer '1' \(MaxPool2d\) takes a maximum.*average pooling"),
    (net_with(nn.AdaptiveMaxPool2d(2)), r"layer '1' \(AdaptiveMaxPool2d\) takes a maximum"),
    (net_with(nn.GELU()), r"layer '1' \(GELU\) has no spiking form.*nn\.ReLU"),
    (net_with(nn.LeakyReLU()), r"layer '1' \(LeakyReLU\) has no spiking form"),
    (net_with(nn.ConvTranspose2d(4, 4, 2, bias=False)), r"layer '1' \(ConvTranspose2d\) has no multi-step"),
    (nn.Sequential(nn.Linear(2, 2, bias=False)), "Sequential has no nn.ReLU module.*F.relu cannot be found"),
    (net_with(nn.Sequential(nn.Identity(), LIFNode())), r"layer '1\.1' \(LIFNode\) is a spiking layer"),
    (nn.Sequential(*[nn.ReLU()] * 2), r"layer '1' \(ReLU\) is the same module as layer '0'"),
])  # fmt: skip
def test_what_cannot_be_converted_is_named(ann, said):
    before = list(ann.modules())
    with pytest.raises(ConversionError, match=said):
        convert(ann)
    assert list(ann.modules()) == before


def test_a_relu_that_runs_twice_is_named():
    snn = convert(SpareReLU())
    with pytest.raises(ValueError, match=r"neuron '0\.relu' runs more than once"):
        balance_thresholds(snn, torch.ones(2, 3), DirectEncoder(4))
    assert thresholds(snn) == {"0.relu": 1.0}


@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_initial_thresholds_of_fresh_networks_do_not_reach_a_converted_one(name):
    snn = convert(models.create(name, num_classes=10, width=0.05, spiking=False))
    assert set(thresholds(snn).values()) == {1.0}
    assert {m.skip_scale.item() for m in snn.modules() if isinstance(m, models.resnet.Block)} <= {1.0}


# ---- conversion alone ----


def test_a_block_adds_both_arms_in_the_same_unit():
    """Rates of a balanced block, times its two thresholds, are the ANN's activations."""
    torch.manual_seed(0)
    T = 2000
    form = models.layers.LayerFactory(spiking=False, leak=1.0, dropout=0.0)
    ann = nn.Sequential(models.resnet.Block(form, 3, 3, 1)).double()
    images = torch.rand(4, 3, 6, 6, dtype=torch.float64)
    snn = convert(ann, leak=1.0)
    first, second = balance_thresholds(snn, images, DirectEncoder(50)).values()
    assert not 0.9 < first < 1.1  # at 1 there would be nothing to see
    with torch.no_grad():
        activations = ann(images)
        rates = snn(DirectEncoder(T)(images))[-1] / T
    # counts are off by a spike or a few, of up to T: a percent of the largest activation is plenty
    atol = 0.01 * activations.max().item()
    torch.testing.assert_close(rates * first * second, activations, rtol=0, atol=atol)


def digits(image_size, tests):
    loaded = data.load("digits")
    parts = []
    for part, count in ((loaded.train, len(loaded.train)), (loaded.test, tests)):
        images, labels = zip(*(part[i] for i in range(count)))
        parts.append((F.interpolate(torch.stack(images), image_size), torch.stack(labels)))
    return parts


def trained(net, x, y, epochs, lr):
    optimizer = torch.optim.Adam(net.parameters(), lr)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


@pytest.mark.parametrize(("name", "image_size", "epochs", "statistic", "tests"), [
    ("vgg5", 8, 10, "max", 300),
    # eleven layers at the maximum fire so rarely that at T = 1000 the last have only begun
    ("resnet12", 16, 5, 99.9, 100),
])  # fmt: skip
def test_conversion_alone_is_within_a_point_of_the_ann(name, image_size, epochs, statistic, tests):
    torch.manual_seed(0)
    (x, y), (x_test, y_test) = digits(image_size, tests)
    build = getattr(models, name)
    ann = trained(build(10, 1, image_size, width=1 / 16, spiking=False, dropout=0.0), x, y, epochs, 3e-3)
    snn = convert(ann, leak=1.0)
    balance_thresholds(snn, x[:100], DirectEncoder(100), statistic, chunk=20)
    encoder = DirectEncoder(1000)
    functional.reset_net(snn)
    with torch.inference_mode():
        ann_correct = int((ann(x_test).argmax(1) == y_test).sum())
        for _ in range(100):
            potentials = snn(encoder.steps(x_test, encoder.T // 100))
        snn_correct = int((potentials[-1].argmax(1) == y_test).sum())
    assert ann_correct >= 0.8 * tests
    assert abs(snn_correct - ann_correct) <= 0.01 * tests


# ---- scale of the output ----


@pytest.mark.parametrize("chunk", [2, 4, 50])
def test_the_output_is_scaled_by_the_best_of_forty_factors(chunk):
    """Against a plain search, which scales the scores of one whole pass; decisions stay."""
    torch.manual_seed(0)
    ann = nn.Sequential(nn.Linear(6, 20, bias=False), nn.ReLU(), nn.Linear(20, 4, bias=False))
    snn, images, labels = convert(ann), 2 * torch.rand(70, 6) - 1, torch.arange(70) % 4
    with torch.no_grad():
        snn(DirectEncoder(1)(images))
        snn[0][2].weight.mul_(5)
        functional.reset_net(snn)
        weight, scores = snn[0][2].weight.clone(), snn(DirectEncoder(10)(images))[-1]
        functional.reset_net(snn)
    grid = [10 ** (-3 + 3 * i / 39) for i in range(40)]
    losses = [F.cross_entropy(scores * factor, labels).item() for factor in grid]
    found = scale_output(snn, images, labels, DirectEncoder(10), batch=32, chunk=chunk)
    assert found == pytest.approx(grid[losses.index(min(losses))], rel=1e-5)
    assert 1e-3 < found < 1
    assert torch.equal(snn[0][2].weight, found * weight)
    with torch.no_grad():
        again = snn(DirectEncoder(10)(images))[-1]
    torch.testing.assert_close(again, found * scores, rtol=1e-4, atol=1e-5)
    assert torch.equal(again.argmax(1), scores.argmax(1))


def test_a_network_that_ends_in_neurons_has_no_output_to_scale():
    net = nn.Sequential(layer.Linear(4, 2, step_mode="m"), LIFNode(step_mode="m"))
    with pytest.raises(ValueError, match="Sequential does not end in a linear layer or convolution to scale"):
        scale_output(net, torch.rand(3, 4), torch.tensor([0, 1, 0]), DirectEncoder(2))
