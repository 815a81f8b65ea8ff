"""Students as NIR graphs: against other simulators, NIR's own equations, and by hand."""

import copy
import sys

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.conversion import nir as export
from lasnn_sj.conversion.pruning import prune_magnitude
from lasnn_sj.data import images as data
from lasnn_sj.neurons import IFNode, IntegratorNode, accelerate

nir = pytest.importorskip("nir")
pytest.importorskip("nirtorch")
T = 6


def lif(v_threshold=0.7):
    return neuron.LIFNode(2.0, decay_input=False, v_threshold=v_threshold, v_reset=0.0)


def small_net(make, down):
    """Convolutions with batch norm on 8x8 digits, ``down`` to 4x4 between them."""
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1, bias=False), layer.BatchNorm2d(8), make(), down,
        layer.Conv2d(8, 16, 3, padding=1), layer.BatchNorm2d(16), make(),
        layer.Flatten(), layer.Dropout(0.1), layer.Linear(256, 10),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def outputs_of(net, images, steps=T):
    """``[T, N, K]`` of directly encoded images."""
    functional.reset_net(net)
    with torch.no_grad():
        outputs = net.eval()(DirectEncoder(steps)(images))
    functional.reset_net(net)
    return outputs


def run_imported(net, images, restart, steps=T):
    """``[T, N, K]`` of another simulator's network, which takes one sample at a time."""
    samples = []
    with torch.no_grad():
        for image in images:
            restart(net)
            outputs, state = [], None
            for _ in range(steps):
                output, state = net(image, state)
                outputs.append(output)
            samples.append(torch.stack(outputs))
    return torch.stack(samples, 1)


def simulate(graph, x, dt=export.DT, steps=T):
    """NIR's definition of a chain of Linear/Affine and IF/LIF, by Euler steps in float32; ``[T, K]``."""
    after = dict(graph.edges)
    potentials, outputs = {}, []
    for _ in range(steps):
        name, value = after["input_1"], np.asarray(x, np.float32)
        while name != "output":
            node = graph.nodes[name]
            if isinstance(node, nir.Linear):
                value = node.weight @ value
            else:
                v = potentials.get(name, np.zeros_like(value))
                slope = node.r * value if isinstance(node, nir.IF) else (node.v_leak - v + node.r * value)
                v = (v + np.float64(dt) / getattr(node, "tau", 1.0) * slope).astype(np.float32)
                value = (v > node.v_threshold).astype(np.float32)
                potentials[name] = np.where(value > 0, node.v_reset, v).astype(np.float32)
            name = after[name]
        outputs.append(value)
    return np.stack(outputs)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.fixture(scope="module")
def trained(digits):
    """A student with hard reset, trained on digits in a few seconds, with its loader's test images."""
    torch.manual_seed(0)
    net = accelerate(small_net(lif, layer.AvgPool2d(2)))
    train, test = digits.loaders(64)
    optimizer = torch.optim.Adam(net.parameters(), lr=5e-3)
    trainer = LaSNNTrainer(net, encoder=DirectEncoder(T), optimizer=optimizer, seed=0)
    trainer.fit(train, epochs=2)
    images, labels = next(iter(test))
    scores = outputs_of(net, images).mean(0)
    assert (scores.argmax(1) == labels).float().mean() > 0.8
    return net, images[:40]


def test_snntorch_gives_the_same_at_every_step(trained, tmp_path):
    importer = pytest.importorskip("snntorch.import_nir")
    net, images = trained
    path = export.save(net, tmp_path / "student.nir", (1, 8, 8))
    assert [file.name for file in tmp_path.iterdir()] == ["student.nir"]
    imported = importer.import_from_nir(nir.read(path))

    def restart(net):
        for module in net.modules():
            if hasattr(module, "reset_mem"):
                module.reset_mem()

    wanted, got = outputs_of(net, images), run_imported(imported, images, restart)
    assert torch.equal(got.mean(0).argmax(1), wanted.mean(0).argmax(1))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
    assert len(wanted.mean(0).argmax(1).unique()) > 5


@pytest.mark.parametrize("make", [
    lambda: neuron.IFNode(0.4),
    lambda: neuron.IFNode(0.6, v_reset=0.2),
    lambda: neuron.LIFNode(2.0, v_threshold=0.3, v_reset=0.0),
    lambda: neuron.ParametricLIFNode(3.0, v_threshold=0.1, v_reset=-0.1),
])  # fmt: skip
def test_norse_gives_the_same_at_every_step(make, digits):
    norse = pytest.importorskip("norse.torch")
    torch.manual_seed(0)
    net = small_net(make, layer.Conv2d(8, 8, 2, 2, bias=False))
    train, _ = digits.loaders(128)
    images, _ = next(iter(train))
    net(DirectEncoder(T)(images))  # gives the batch norms their statistics
    graph = export.to_nir(net, (1, 8, 8), dt=1e-3)
    imported = norse.from_nir(graph, ignore_warnings=True, dt=1e-3)
    wanted = outputs_of(net, images[:20])
    got = run_imported(imported, images[:20], lambda net: None)
    assert wanted.std(1).mean() > 0.01
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["spiking_resnet18", "spiking_wrn16_4"])
def test_residual_networks_come_back(name, digits, tmp_path):
    """Through SpikingJelly's own reader: sums, batch norm behind a sum, global pooling."""
    from spikingjelly.activation_based import nir_exchange

    torch.manual_seed(0)
    net = getattr(models, name)(10, 1, 8, width=0.25)
    for module in net.modules():
        if isinstance(module, neuron.IFNode):
            module.v_threshold = 0.2
    images = next(iter(digits.loaders(64)[0]))[0]
    for _ in range(3):
        net(DirectEncoder(T)(images))
        functional.reset_net(net)
    path = export.save(accelerate(net), tmp_path / "net.nir", (1, 8, 8))
    imported = nir_exchange.import_from_nir(path)
    wanted, outputs, state = outputs_of(net, images), [], None
    assert wanted.std(1).mean() > 0.01
    with torch.no_grad():
        for _ in range(T):
            output, state = imported(images, state)
            outputs.append(output)
    torch.testing.assert_close(torch.stack(outputs), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("make", "by_hand"), [
    # v: 0.5, 1.0 fires at equality and is reset to 0
    (lambda: neuron.IFNode(1.0, v_reset=0.0), [0, 1, 0, 1, 0, 1]),
    # from v_reset 0.25: 0.75, 1.25 fires
    (lambda: neuron.IFNode(1.25, v_reset=0.25), [0, 1, 0, 1, 0, 1]),
    # v = v / 2 + 0.5: 0.5, 0.75 fires
    (lambda: neuron.LIFNode(2.0, decay_input=False, v_threshold=0.75, v_reset=0.0), [0, 1, 0, 1, 0, 1]),
    # v = v + (0.5 - v) / 2: 0.25, 0.375, 0.4375 fires
    (lambda: neuron.LIFNode(2.0, v_threshold=0.4375, v_reset=0.0), [0, 0, 1, 0, 0, 1]),
])  # fmt: skip
def test_nirs_equations_by_hand(make, by_hand):
    """SpikingJelly fires at its threshold, NIR above: the values are chosen to meet it exactly."""
    net = nn.Sequential(layer.Linear(1, 1, bias=False), make())
    functional.set_step_mode(net, "m")
    with torch.no_grad():
        net[0].weight.fill_(0.5)
        spikes = net(torch.ones(T, 1, 1)).flatten()
    assert spikes.tolist() == by_hand
    graph = export.to_nir(net, (1,))
    assert simulate(graph, [1.0]).flatten().tolist() == by_hand
    (node,) = (n for n in graph.nodes.values() if isinstance(n, (nir.IF, nir.LIF)))
    assert node.v_reset == 0
    below = np.nextafter(np.float32(net[1].v_threshold - net[1].v_reset), np.float32(0))
    assert node.v_threshold == below


def test_an_integrator_at_the_output_is_the_sum():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Linear(4, 6, bias=False), lif(), layer.Linear(6, 3, bias=False), IntegratorNode()
    )
    functional.set_step_mode(net, "m")
    x = 3 * torch.rand(4)
    with torch.no_grad():
        wanted = net(x.expand(T, 1, 4))[-1, 0]
    graph = export.to_nir(net, (4,))
    assert graph.nodes["output"].metadata == {"readout": "sum"}
    assert wanted.abs().max() > 0.1
    np.testing.assert_allclose(simulate(graph, x).sum(0), wanted.numpy(), rtol=1e-5)


def test_metadata_are_in_the_file(tmp_path):
    net = nn.Sequential(layer.Linear(4, 3), lif())
    path = export.save(net, tmp_path / "new" / "net.nir", (4,))
    assert nir.read(path).nodes["output"].metadata == {"readout": "mean"}


def test_the_student_is_left_as_it_is(trained):
    net, _ = trained
    net.train()
    before = copy.deepcopy(net.state_dict())
    kinds = [(type(m), m.training, getattr(m, "step_mode", None)) for m in net.modules()]
    export.to_nir(net, (1, 8, 8))
    assert [(type(m), m.training, getattr(m, "step_mode", None)) for m in net.modules()] == kinds
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_masks_of_a_loaded_student_count():
    """A pruned layer's weight attribute is as old as its last forward."""
    torch.manual_seed(0)
    source, loaded = (prune_magnitude(nn.Sequential(layer.Conv2d(1, 4, 3), lif()), r) for r in (0.5, 0.0))
    loaded.load_state_dict(source.state_dict())
    (conv,) = (n for n in export.to_nir(loaded, (1, 8, 8)).nodes.values() if isinstance(n, nir.Conv2d))
    assert (conv.weight == 0).sum() == 18


def test_containers_and_functions_that_carry_time():
    """SpikingJelly's SeqToANNContainer, ``torch.flatten``, ``+=`` and one pool in two places."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = layer.SeqToANNContainer(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2))
            self.pool, self.a, self.b = layer.AvgPool2d(2), lif(0.3), lif(0.3)
            self.conv = layer.Conv2d(2, 2, 1)
            self.flatten = layer.Linear(8, 3)  # a name that the function's call would have
            functional.set_step_mode(self, "m")

        def forward(self, x):
            x = self.pool(self.a(self.first(x)))
            y = self.conv(x)
            y += x
            return self.flatten(torch.flatten(self.pool(self.b(y)), 2))

    torch.manual_seed(0)
    net = Net().eval()
    graph = export.to_nir(net, (1, 8, 8))
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert sorted(kinds) == sorted(
        ["Input", "Conv2d", "LIF", "AvgPool2d", "Conv2d", "LIF", "AvgPool2d", "Flatten", "Affine", "Output"]
    )
    from spikingjelly.activation_based import nir_exchange

    x = 4 * torch.rand(5, 1, 8, 8)
    wanted = outputs_of(net, x, steps=1)[0]
    assert wanted.std(0).mean() > 0.01
    with torch.no_grad():
        torch.testing.assert_close(nir_exchange.import_from_nir(graph)(x)[0], wanted, rtol=0, atol=1e-5)


def twice():
    """One neuron in two places."""
    node = lif()
    return nn.Sequential(layer.Linear(4, 4), node, layer.Linear(4, 4), node)


class Squares(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(layer.Linear(4, 4), lif())

    def forward(self, x):
        return self.inner(x * x)


class Branches(Squares):
    def forward(self, x):
        return self.inner(x) if x.sum() > 0 else x


@pytest.mark.parametrize(("make", "shape", "message"), [
    (lambda: models.vgg5(10, 1, 8, width=0.1), (1, 8, 8),
     r"features\.0\.neuron, features\.2\.neuron, .*LIFNode resets by subtracting.*v_reset=0\.0"),
    (lambda: nn.Sequential(layer.Linear(4, 4), IFNode()), (4,), "1: IFNode resets by subtracting"),
    (lambda: nn.Sequential(neuron.LIFNode(v_reset=None)), (4,), "0: LIFNode resets by subtracting"),
    (lambda: nn.Sequential(neuron.QIFNode()), (4,), "0: NIR has no equivalent of QIFNode; train"),
    (lambda: models.spiking_vgg16(10, 1, 32, width=0.1), (1, 32, 32),
     r"features\.3, .*: NIR has no max pooling \(MaxPool2d\); train with average pooling"),
    (lambda: layer.Conv2d(4, 4, 3, groups=2), (4, 8, 8), r"\(root\): groups=2"),
    (lambda: layer.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (4, 8, 8), "padding_mode='circular'"),
    (lambda: layer.AvgPool2d(2, ceil_mode=True), (4, 8, 8), "ceil_mode"),
    (lambda: layer.BatchNorm2d(4, track_running_stats=False), (4, 8, 8), "no running statistics"),
    (lambda: layer.AdaptiveAvgPool2d(3), (4, 8, 8), r"\(8, 8\) pixels cannot be divided evenly"),
    (lambda: nn.Sequential(nn.ReLU()), (4,), "layer '0': ReLU has no form in NIR; use"),
    (lambda: nn.Sequential(IntegratorNode(), layer.Linear(4, 4)), (4,), "'0': IntegratorNode .* output only"),
    (twice, (4,), "one LIFNode is used in 2 places"),
    (Squares, (4,), r"layer '\(root\)': its forward calls mul"),
    (Branches, (4,), "Branches's forward cannot be traced"),
])  # fmt: skip
def test_what_nir_cannot_express_is_refused_by_name(make, shape, message):
    with pytest.raises(export.ExportError, match=message):
        export.to_nir(make(), shape)


def test_other_bad_arguments(monkeypatch):
    net = nn.Sequential(layer.Linear(4, 4), lif())
    with pytest.raises(ValueError, match=r"sample_shape \(5,\) does not fit the network"):
        export.to_nir(net, (5,))
    with pytest.raises(ValueError, match="dt must be above 0 seconds, got 0"):
        export.to_nir(net, (4,), dt=0)
    from spikingjelly import activation_based

    monkeypatch.delattr(activation_based, "nir_exchange", raising=False)
    monkeypatch.setitem(sys.modules, "spikingjelly.activation_based.nir_exchange", None)
    with pytest.raises(ImportError, match=r"pip install 'lasnn-sj\[nir\]'"):
        export.to_nir(net, (4,))
