"""Distillation through a classifier against numbers worked out by hand."""

import math
from collections import OrderedDict

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj.distillation import EnOF, Look, Signals, StableNoise, TapError, parse_objective
from lasnn_sj.neurons import IntegratorNode, LIFNode

L3 = math.log(3)


class Student(nn.Module):
    """Two channels of spikes, averaged over positions, and one linear layer; the output may add up."""

    def __init__(self, adds=False, flat=False, twice=False):
        super().__init__()
        self.early = LIFNode(step_mode="m")
        self.neuron = LIFNode(step_mode="m")
        self.fc = layer.Linear(8 if flat else 2, 2, step_mode="m")
        self.out = IntegratorNode(step_mode="m") if adds else nn.Identity()
        self.flat, self.twice = flat, twice

    def forward(self, x):
        spikes = self.neuron(2 - 2 * self.early(4 * x))
        features = spikes.flatten(2) if self.flat else spikes.mean((3, 4))
        return self.out(self.fc(features + features**3 * self.twice * 2))


def teacher(features=2, classes=2):
    layers = OrderedDict(conv=nn.Conv2d(2, features, 1), pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
    return nn.Sequential(layers | {"fc": nn.Linear(features, classes)})


def prepared(objective, student, net=None, T=3):
    torch.manual_seed(0)
    images = torch.rand(2, 2, 2, 2)
    frames = images * torch.tensor([1.0, 0.3, 1.0][:T]).view(T, 1, 1, 1, 1)
    student.eval()
    with torch.no_grad():
        outputs = student(frames)
    return objective.prepare(Look(student, net or teacher(), frames, images, outputs, 2))


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def test_enof_by_hand():
    """Mean rates (1/2, 0) and (1, 1); the classifier weighs the first with 2 log 3, the second with log 3."""
    net = teacher()
    net.fc.weight.data = torch.tensor([[2 * L3, 0.0], [0.0, L3]])
    net.fc.bias.data = torch.tensor([0.0, 0.0])
    objective = EnOF(alpha=2.0)
    needs = prepared(objective, Student(), net)
    assert needs.student == (("neuron", "firing_rate"),)
    assert needs.teacher_logits
    assert objective.adaptor.numel() == 0
    rates = torch.tensor([[[[1.0, 0.0]], [[0.0, 0.0]]], [[[1.0, 1.0]], [[1.0, 1.0]]]], dtype=torch.float64)
    one = Signals(torch.zeros(2, 2, dtype=torch.float64), torch.tensor([0, 1]))
    one.student = {("neuron", "firing_rate"): rates}
    one.teacher_logits = torch.zeros(2, 2)
    half = [1 / 2, 1 / 2]  # of the teacher; the classifier makes log 3 : 0 and log 9 : log 3
    expected = 2 * (kl(half, [3 / 4, 1 / 4]) + kl(half, [3 / 4, 1 / 4])) / 2
    assert objective(one)["output_features"].item() == pytest.approx(expected, rel=1e-6)
    objective.temperature = 2.0
    root = [3**0.5 / (1 + 3**0.5), 1 / (1 + 3**0.5)]
    assert objective(one)["output_features"].item() == pytest.approx(2 * 4 * kl(half, root), rel=1e-6)


def test_enof_of_a_wider_teacher_has_a_map_between():
    objective = EnOF()
    prepared(objective, Student(), teacher(features=5))
    assert objective.adaptor.shape == (5, 2)
    one = Signals(torch.zeros(2, 2), torch.tensor([0, 1]), teacher_logits=torch.ones(2, 2))
    one.student = {("neuron", "firing_rate"): torch.rand(2, 2, 2, 2)}
    objective(one)["output_features"].backward()
    assert objective.adaptor.grad.abs().sum() > 0
    assert [name for name, _ in objective.named_parameters()] == ["adaptor"]  # not the teacher's


def noise_signals(spikes, scores=(0.0, 0.0)):
    one = Signals(torch.tensor([scores], dtype=torch.float64), torch.tensor([0]))
    one.student = {("neuron", "spikes"): spikes}
    return one


@pytest.mark.parametrize("adds", [False, True])
def test_stable_noise_by_hand(monkeypatch, adds):
    """Of spikes 1 1 0 and 1 0 1 the first has the shared rate 1/2, and noise at its position: 3/2 and 0."""
    student = Student(adds)
    student.fc.weight.data, student.fc.bias.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.zeros(2)
    objective = StableNoise(alpha=2.0, temperature=1.0)
    assert prepared(objective, student).student == (("neuron", "spikes"),)
    monkeypatch.setattr(torch, "bernoulli", lambda p: (p == 0.5).to(p.dtype))
    spikes = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).view(3, 1, 2, 1, 1)
    gap = 3 / 2 * (3 if adds else 1)
    noisy = [math.exp(gap) / (1 + math.exp(gap)), 1 / (1 + math.exp(gap))]
    assert objective(noise_signals(spikes))["noise"].item() == pytest.approx(2 * kl([1 / 2, 1 / 2], noisy))


def test_noise_is_certain_at_the_shared_rate_1_and_absent_at_0():
    student = Student(flat=True)
    student.fc.weight.data, student.fc.bias.data = torch.eye(2, 8), torch.zeros(2)
    objective = StableNoise()
    prepared(objective, student)
    spikes = torch.zeros(3, 1, 2, 2, 2)
    spikes[:, 0, 0, 0, 0] = 1  # fires always: noise is certain; the others never have it
    for value in (1, 2):  # of a spike behind dropout
        found = objective(noise_signals(value * spikes))["noise"].item()
        e = math.exp(value * 2 / 2)
        assert found == pytest.approx(4 * kl([1 / 2, 1 / 2], [e / (1 + e), 1 / (1 + e)]), rel=1e-5)


def test_gradients(monkeypatch):
    monkeypatch.setattr(torch, "bernoulli", lambda p: torch.ones_like(p) * 0.5)
    torch.manual_seed(0)
    objective, noise = EnOF(temperature=2.0), StableNoise()
    prepared(objective, Student(), teacher(features=3).double())
    prepared(noise, Student())
    objective.adaptor.data = objective.adaptor.data.double()
    scores = torch.randn(2, 2, dtype=torch.float64)
    one = Signals(scores, torch.tensor([0, 1]), teacher_logits=torch.randn(2, 2, dtype=torch.float64))

    def loss(method, key):
        def of(x):
            x = x.index_fill(0, torch.tensor([0]), 1.0)  # the value of a spike, a constant
            one.student = {("neuron", key): x}
            return sum(method(one).values())

        return of

    rates = torch.rand(2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss(objective, "firing_rate"), rates)
    spikes = torch.rand(3, 2, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert gradcheck(loss(noise, "spikes"), spikes)


def test_networks_that_do_not_fit():
    with pytest.raises(ValueError, match=r"gives the student's 2 classes; the teacher has 'fc' \(3, 2\)"):
        prepared(EnOF(), Student(), teacher(classes=3))
    with pytest.raises(ValueError, match="gives the student's 2 classes; the teacher has no linear layer"):
        prepared(EnOF(), Student(), nn.Conv2d(2, 2, 1))
    with pytest.raises(ValueError, match=r"one linear layer of the firing rates of 'neuron'.*'fc' \(2, 2\)"):
        prepared(StableNoise(), Student(twice=True))
    with pytest.raises(ValueError, match="one linear layer of the firing rates of 'early'"):
        prepared(StableNoise(layer="early"), Student())
    with pytest.raises(ValueError, match="needs T of at least 2, got T = 1"):
        prepared(StableNoise(), Student(), T=1)
    silent = Student(twice=True)  # whose spikes would say nothing of what is behind them
    silent.early.v_threshold = silent.neuron.v_threshold = 1e9
    with pytest.raises(ValueError, match="one linear layer of the firing rates of 'neuron'"):
        prepared(StableNoise(), silent)
    for make in (EnOF, StableNoise):
        with pytest.raises(TapError, match="student tap 'neurn' matches no module .* near: neuron"):
            prepared(make(layer="neurn"), Student())


@pytest.mark.parametrize("text", ["EnOF(temperature=2.0)", "StableNoise(layer='neuron')"])
def test_texts_give_the_objectives_back(text):
    assert repr(parse_objective(text)) == text
