"""Distillation of features against numbers worked out by hand, and weights of objectives in a run."""

import math
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj.distillation import (
    BKD,
    KDSNN,
    SAMD,
    CrossEntropy,
    Look,
    RelationalKD,
    Signals,
    StableSpike,
    TapError,
    parse_objective,
)
from lasnn_sj.neurons import LIFNode
from lasnn_sj.training.trainer import Trainer

RATES = torch.tensor(
    [[[[0.0, 1.0], [0.5, 0.0]]], [[[1.0, 0.0], [0.0, 0.5]]]], dtype=torch.float64
)  # [2,1,2,2]
PAIR = ("neuron", "conv")


class Student(nn.Module):
    """One spiking layer of 1 channel; scores of 2 classes."""

    def __init__(self):
        super().__init__()
        self.neuron = LIFNode(step_mode="m")

    def forward(self, x):
        spikes = self.neuron(x)
        return torch.stack([spikes.flatten(2).sum(2), x.flatten(2).sum(2)], 2)


def teacher(channels=2, classes=2):
    layers = OrderedDict(conv=nn.Conv2d(1, channels, 1), relu=nn.ReLU(), pool=nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(layers | {"flat": nn.Flatten(), "fc": nn.Linear(channels, classes)})


def prepared(objective, T=2, theirs=None):
    images = torch.rand(2, 1, 2, 2)
    student, frames = Student(), images.expand(T, 2, 1, 2, 2)
    look = Look(student, teacher() if theirs is None else theirs, frames, images, torch.zeros(T, 2, 2), 2)
    return objective, objective.prepare(look)


def signals(rates=RATES, features=None, labels=(0, 1)):
    one = Signals(torch.zeros(2, 2), torch.tensor(labels))
    one.student = {("neuron", "firing_rate"): rates}
    one.teacher = {"conv": features}
    return one


def doubled(objective):
    for parameter in objective.parameters():
        parameter.data = parameter.data.double()
    return objective


def test_kdsnn_by_hand():
    objective, needs = prepared(KDSNN(alpha=2.0, pair=PAIR))
    assert needs.student == (("neuron", "firing_rate"),)
    assert needs.teacher == ("conv",)
    objective.adaptor.data = torch.tensor([3.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    features = torch.cat([3 * RATES, torch.ones_like(RATES)], 1)
    # the first channel fits; of the second each square is 1
    assert objective(signals(features=features))["features"].item() == pytest.approx(2 * 0.5)


def test_features_of_another_size_are_averaged():
    objective, _ = prepared(KDSNN(pair=PAIR))
    objective.adaptor.data = torch.ones(2, 1, 1, 1, dtype=torch.float64)
    features = RATES.repeat_interleave(2, 2).repeat_interleave(2, 3).expand(2, 2, 4, 4)
    assert objective(signals(features=features))["features"].item() == 0


def copying(objective, channels):
    """Let the two 3x3 convolutions copy their middle."""
    for name in ("first", "second"):
        kernel = torch.zeros(channels, channels, 3, 3, dtype=torch.float64)
        kernel[range(channels), range(channels), 1, 1] = 1
        getattr(objective, name).data = kernel
    return doubled(objective)


def test_bkd_by_hand():
    """A maps one channel to itself and to 0; max A r / max F = 1 / 4, so that the first channel fits."""
    objective, _ = prepared(BKD(alpha=0.1, drop=0.0, pair=PAIR))
    copying(objective, 2).adaptor.data = torch.tensor([1.0, 0.0], dtype=torch.float64).view(2, 1, 1, 1)
    features = torch.cat([4 * RATES, 4 * RATES], 1)
    squares = RATES.square().sum().item()  # of the second, which is 0 and should be r
    assert objective(signals(features=features))["blurred"].item() == pytest.approx(0.1 / 2 * squares)


def test_bkd_of_equal_widths_has_no_adaptor_and_its_second_bias_is_added():
    objective, _ = prepared(BKD(alpha=0.1, drop=0.0, pair=PAIR), theirs=teacher(channels=1))
    copying(objective, 1).second_bias.data += 0.5
    assert objective.adaptor.numel() == 0
    found = objective(signals(features=3 * RATES))["blurred"].item()
    assert found == pytest.approx(0.1 / 2 * 8 * 0.25)


def test_bkd_drops_channels():
    torch.manual_seed(0)
    objective, _ = prepared(BKD(alpha=1.0, drop=0.999999, pair=PAIR), theirs=teacher(channels=1))
    found = doubled(objective)(signals(features=RATES))["blurred"].item()
    assert found == pytest.approx(RATES.square().sum().item() / 2)  # nothing is restored from nothing


def test_relational_kd_by_hand():
    """Embeddings of three samples on a line, 0, 1, 3, and at the corners of a right angle, legs 3 and 4."""
    objective = RelationalKD(distance=1.0, angle=0.0, pair=PAIR)
    prepared(objective)
    mine = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64).view(3, 1, 1, 1)
    theirs = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=torch.float64).view(3, 2, 1, 1)
    objective._pair = type(objective._pair)("neuron", "conv", (1, 1), (1, 1))
    # distances 1, 3, 2 of mean 2 and 3, 4, 5 of mean 4, in pairs (0, 1), (0, 2), (1, 2)
    differences = [1 / 2 - 3 / 4, 3 / 2 - 4 / 4, 2 / 2 - 5 / 4]
    expected = 2 * sum(d * d / 2 for d in differences) / 9
    found = objective(signals(mine, theirs, (0, 1, 0)))
    assert found["distances"].item() == pytest.approx(expected, rel=1e-12)
    objective.angle = 1.0
    # cosines of j != k: mine 1, -1, 1 at samples 0, 1, 2; the triangle's 0, 3/5, 4/5
    huber = [0.5, 1.6 - 0.5, 0.2**2 / 2]
    assert objective(signals(mine, theirs, (0, 1, 0)))["angles"].item() == pytest.approx(
        2 * sum(huber) / 27, rel=1e-12
    )


def test_relational_kd_of_equal_samples_is_finite():
    objective, _ = prepared(RelationalKD(pair=PAIR))
    rates = torch.zeros(2, 1, 2, 2, requires_grad=True)
    sum(objective(signals(rates, torch.rand(2, 2, 2, 2))).values()).backward()
    assert rates.grad.isfinite().all()


def test_samd_by_hand():
    """Two positions. CAM of label 0 is log 3 against 0; T * r gives equal spikes."""
    net = teacher()
    with torch.no_grad():
        net.fc.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    objective, _ = prepared(SAMD(alpha=2.0, temperature=1.0, pair=PAIR), theirs=net)
    objective._pair = type(objective._pair)("neuron", "conv", (1, 2), (1, 2))
    features = torch.tensor([[[[math.log(3), 0.0]], [[9.0, -9.0]]]], dtype=torch.float64)
    rates = torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64)
    expected = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)
    assert objective(signals(rates, features, (0,)))["saliency"].item() == pytest.approx(2 * expected)
    # T = 2: rates that differ by log(3) / 2 have the teacher's map
    rates = torch.tensor([[[[math.log(3) / 2, 0.0]]]], dtype=torch.float64)
    assert objective(signals(rates, features, (0,)))["saliency"].item() == pytest.approx(0, abs=1e-12)


def test_stable_spike_by_hand():
    """Spikes 1 1 0 and 1 0 1: means 2/3, shared spikes 1/2 and 0."""
    objective = StableSpike(alpha=2.0, layer="neuron")
    prepared(objective, T=3)
    spikes = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    one = Signals(torch.zeros(2, 2), torch.tensor([0, 1]))
    one.student = {("neuron", "spikes"): spikes}
    expected = 2 * ((2 / 3 - 1 / 2) ** 2 + (2 / 3) ** 2) / 2
    assert objective(one)["stable"].item() == pytest.approx(expected, rel=1e-12)
    one.student = {("neuron", "spikes"): 4 * spikes}  # behind dropout: all means are four times as large
    assert objective(one)["stable"].item() == pytest.approx(16 * expected, rel=1e-12)
    one.student = {("neuron", "spikes"): 0 * spikes}
    assert objective(one)["stable"].item() == 0


@pytest.mark.parametrize("kind", [KDSNN, RelationalKD, SAMD])
def test_gradients(kind):
    objective, _ = prepared(kind(pair=PAIR))
    if isinstance(objective, nn.Module):
        doubled(objective)
    torch.manual_seed(0)
    rates = torch.rand(2, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    features = torch.rand(2, 2, 2, 2, dtype=torch.float64)
    assert gradcheck(lambda r: sum(objective(signals(r, features)).values()), rates)


@pytest.mark.parametrize("make", [KDSNN, BKD, RelationalKD, SAMD])
def test_bad_layers_and_teachers(make):
    for pair, said in [(("neuron", "cnov"), "teacher tap 'cnov' matches no module .* near: conv"),
                       (("neurn", "conv"), "student tap 'neurn' matches no module"),
                       (("neuron", "flat"), "gives no feature map")]:  # fmt: skip
        with pytest.raises(TapError, match=said):
            prepared(make(pair=pair))
    with pytest.raises(ValueError, match=r"pair must be \(student module, teacher module\).*got 'neuron'"):
        prepared(make(pair="neuron"))
    with pytest.raises(ValueError, match="needs a teacher; give one"):
        Trainer(Student(), CrossEntropy() + make())


def test_networks_that_a_method_cannot_use():
    with pytest.raises(ValueError, match=r"weights \(2, 2\).*'conv'; the teacher has 'fc' \(3, 2\)"):
        prepared(SAMD(pair=PAIR), theirs=teacher(classes=3))
    objective, _ = prepared(KDSNN(pair=PAIR))
    with pytest.raises(ValueError, match=r"'adaptor' has shape \(2, 1, 1, 1\).*\(5, 1, 1, 1\)"):
        prepared(objective, theirs=teacher(channels=5))
    with pytest.raises(ValueError, match="StableSpike needs T of at least 2"):
        prepared(StableSpike(layer="neuron"), T=1)
    with pytest.raises(TapError, match="student tap 'norun' matches no module of Student"):
        prepared(StableSpike(layer="norun"))
    with pytest.raises(ValueError, match=r"drop must lie in \[0, 1\), got 1"):
        BKD(drop=1)


@pytest.mark.parametrize("text", ["KDSNN(alpha=2.0)", "BKD(drop=0.5)", "RelationalKD()", "SAMD()",
                                  "StableSpike()"])  # fmt: skip
def test_texts_give_the_objectives_back(text):
    assert repr(parse_objective(text)) == text
