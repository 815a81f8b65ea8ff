"""Marked spikes as bytes between the passes, on the CPU in place of CUDA."""

import weakref

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from lasnn_sj import models
from lasnn_sj.neurons import LIFNode, accelerate, linear, marks

LAST = torch.channels_last


@pytest.fixture
def marking(monkeypatch):
    """Mark spikes on the CPU, whatever their size, and leave its own kernels out."""
    monkeypatch.setattr(marks, "DEVICE", "cpu")
    monkeypatch.setattr(marks, "SMALLEST", 0)
    monkeypatch.setattr(linear, "SMALLEST", 1 << 60)


class Kept:
    """Notes what autograd keeps as bytes."""

    def __init__(self, monkeypatch):
        self.shapes, context = [], marks.saved_tensors_hooks

        def hooks(keep, restore):
            def noted(t):
                kept = keep(t)
                if isinstance(kept, tuple):
                    assert kept[0].itemsize == 1
                    self.shapes.append(tuple(t.shape))
                return kept

            return context(noted, restore)

        monkeypatch.setattr(marks, "saved_tensors_hooks", hooks)


def gradients(net, x):
    net.zero_grad()
    functional.reset_net(net)
    torch.manual_seed(1)  # of dropout
    scores = net(x)
    scores.float().square().sum().backward()
    return [scores, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["vgg5", "resnet12"])
def test_gradients_are_the_same_to_the_bit(name, dtype, marking, monkeypatch):
    """With dropout masks and averages; most inputs of convolutions are kept as bytes."""
    net = getattr(models, name)(4, width=0.25).to(memory_format=LAST)
    x = torch.rand(5, 2, 3, 32, 32).round()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        kept = Kept(monkeypatch)
        got = gradients(net, x)
        monkeypatch.setattr(marks, "DEVICE", "none")
        expected = gradients(net, x)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    if name == "vgg5":
        assert kept.shapes == [(10, 16, 16, 16), (10, 32, 16, 16), (10, 1024), (10, 1024)]
    else:
        assert len(kept.shapes) >= 6


def test_spikingjellys_layers_too(marking, monkeypatch):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(3, 8, 3, padding=1), neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.Conv2d(8, 8, 3), neuron.IFNode(surrogate_function=surrogate.ATan()), layer.Flatten(),
        layer.Linear(8 * 36, 4),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    accelerate(net)
    kept = Kept(monkeypatch)
    x = torch.rand(5, 2, 3, 8, 8)
    got = gradients(net, x)
    assert kept.shapes == [(10, 8, 8, 8)]
    monkeypatch.setattr(marks, "DEVICE", "none")
    assert all(map(torch.equal, got, gradients(net, x)))


def test_the_input_is_freed(marking):
    """Only its bytes live on, and the gradient of the weight comes from them."""
    node, conv = LIFNode(step_mode="m"), accelerate(layer.Conv2d(16, 4, 3, step_mode="m"))
    x = torch.rand(6, 2, 16, 8, 8, requires_grad=True)
    freed = []
    spikes = node(3 * x)
    weakref.finalize(spikes.untyped_storage(), freed.append, True)
    y = conv(spikes)
    del spikes
    assert freed
    y.sum().backward()
    assert conv.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("change", [
    lambda spikes: spikes + 0.5,  # another tensor
    lambda spikes: spikes.mul_(0.3),  # the same one with other values
    lambda spikes: spikes[..., :6],
], ids=["sum", "in place", "part"])  # fmt: skip
def test_what_is_no_longer_spikes_is_kept_as_it_is(change, marking, monkeypatch):
    node, conv = LIFNode(step_mode="m"), accelerate(layer.Conv2d(4, 4, 3, step_mode="m"))
    x = torch.rand(6, 2, 4, 8, 8, requires_grad=True)
    kept = Kept(monkeypatch)
    conv(change(node(3 * x))).sum().backward()
    assert kept.shapes == []


def test_nothing_is_marked_elsewhere_or_without_a_gradient(marking, monkeypatch):
    node = LIFNode(step_mode="m")
    assert not hasattr(node(torch.rand(3, 2, 4)), "_multiples")
    monkeypatch.setattr(marks, "DEVICE", "cuda")
    assert not hasattr(node(torch.rand(3, 2, 4, requires_grad=True)), "_multiples")
