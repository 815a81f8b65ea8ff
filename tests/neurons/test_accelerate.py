"""``accelerate``: SpikingJelly's own nodes over our loop must give SpikingJelly's own numbers."""

import copy
import logging

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.testing import assert_close

from lasnn_sj.neurons import LinearSurrogate, Sequential, TimeLoopNode, accelerate, acceleration_report

RESETS = {"soft": None, "hard": 0.0, "hard_below_zero": -0.25}


def forward(module, x, step_mode):
    functional.reset_net(module)
    functional.set_step_mode(module, step_mode)
    return module(x) if step_mode == "m" else torch.stack([module(step) for step in x])


@pytest.mark.parametrize("step_mode", ["m", "s"])
@pytest.mark.parametrize("v_reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("detach_reset", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda **k: neuron.IFNode(**k),
        lambda **k: neuron.LIFNode(tau=2.0, **k),
        lambda **k: neuron.LIFNode(tau=3.0, decay_input=False, **k),
    ],
    ids=["IF", "LIF", "LIF_undecayed"],
)
def test_a_node_gives_the_same_numbers(make, detach_reset, v_reset, step_mode):
    # float64 has no kernel: it is run by plain PyTorch and shows that the equations are the same; float32
    # then shows that the kernels agree with SpikingJelly to what the rounded slope allows.
    function = surrogate.ATan()
    stock = make(v_threshold=0.8, v_reset=v_reset, detach_reset=detach_reset, surrogate_function=function)
    fast = accelerate(copy.deepcopy(stock))
    generator = torch.Generator().manual_seed(3)
    x64 = 1.5 * torch.randn(12, 4, 50, dtype=torch.float64, generator=generator)
    weight = torch.randn(x64.shape, dtype=torch.float64, generator=generator)
    for dtype in (torch.float64, torch.float32):
        outcomes = []
        for node in (stock, fast):
            x = x64.detach().to(dtype, copy=True).requires_grad_()
            spikes = forward(node, x, step_mode)
            ((spikes * weight).sum() + node.v.sum()).backward()
            outcomes.append((spikes, node.v, x.grad))
        (spikes, v, gradient), (fast_spikes, fast_v, fast_gradient) = outcomes
        assert 0.02 < spikes.mean() < 0.98
        assert torch.equal(spikes, fast_spikes)
        assert_close(fast_v, v)
        if dtype == torch.float64:
            assert_close(fast_gradient, gradient)
        else:
            # the peak is 1; where a hard reset is attached, v is known from the rounded slope only
            limit = (1 if detach_reset or v_reset is None else 3) / 255
            assert (fast_gradient - gradient).norm() <= limit * gradient.norm()


def make_net(function, v_reset):
    torch.manual_seed(0)
    node = {"surrogate_function": function, "v_reset": v_reset}
    net = nn.Sequential(
        layer.Conv2d(2, 6, 3, padding=1, bias=False),
        layer.BatchNorm2d(6),
        neuron.IFNode(**node, detach_reset=True),
        layer.MaxPool2d(2),
        layer.Conv2d(6, 8, 3, padding=1),
        layer.BatchNorm2d(8),
        neuron.LIFNode(**node),
        layer.Flatten(),
        layer.Linear(8 * 16, 10),
        neuron.LIFNode(tau=4.0, **node),
    )
    functional.set_step_mode(net, "m")
    net[5].weight.data.fill_(3.0)  # so that all layers fire
    net[8].weight.data *= 8
    return net


@pytest.mark.parametrize("v_reset", RESETS.values(), ids=RESETS)
@pytest.mark.parametrize("function", [surrogate.ATan(), surrogate.Sigmoid()])
def test_a_convolutional_network_gives_the_same_numbers(function, v_reset):
    net = make_net(function, v_reset)
    fast = accelerate(copy.deepcopy(net))
    assert acceleration_report(fast).accelerated == ("2", "6", "9")
    x = 2 * torch.randn(5, 4, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    losses = []
    for module in (net, fast):
        rates = module(x).mean(0)
        loss = nn.functional.cross_entropy(3 * rates, torch.arange(4))
        loss.backward()
        losses.append((rates, loss))
    assert losses[0][0].sum() > 0
    assert_close(losses[1], losses[0])
    for (name, p), q in zip(net.named_parameters(), fast.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 3 / 255 * p.grad.norm() + 1e-6, name
        assert p.grad.norm() > 0 or name == "4.bias", name  # batch norm takes that bias out again


def test_the_node_stays_the_same_object_with_all_it_had():
    net = make_net(surrogate.ATan(), None)
    node, seen = net[2], []
    node.register_forward_hook(lambda *_: seen.append("hook"))
    net.eval()
    names = list(net.state_dict())
    assert accelerate(net) is net
    assert net[2] is node
    assert isinstance(node, TimeLoopNode)
    assert isinstance(node, neuron.IFNode)
    assert not node.training
    assert node.step_mode == "m"
    assert list(net.state_dict()) == names
    net(torch.randn(2, 1, 2, 8, 8))
    assert seen == ["hook"]
    assert repr(neuron.LIFNode(tau=3.0)) == repr(accelerate(neuron.LIFNode(tau=3.0))).replace(
        "Accelerated", ""
    )


def test_a_state_in_the_middle_of_a_sequence_is_taken_over():
    x = torch.full((4, 1, 3), 0.35)
    stock = neuron.IFNode(step_mode="m")
    whole = stock(torch.cat([x, x]))
    functional.reset_net(stock)
    first = stock(x)
    second = accelerate(stock)(x)
    assert torch.equal(torch.cat([first, second]), whole)
    assert second.sum() > 0


def test_changed_parameters_are_followed():
    node = accelerate(neuron.LIFNode(tau=2.0, v_reset=None, step_mode="m"))
    node.tau, node.v_threshold = 4.0, 0.5
    # v = 0.25 * 3 = 0.75 >= 0.5: a spike, 0.25 is left
    assert node(torch.full((1, 1), 3.0)).item() == 1
    assert_close(node.v, torch.tensor([0.25]))


class MyLIFNode(neuron.LIFNode):
    pass


def test_what_is_left_alone_is_named_with_the_reason(caplog):
    net = nn.ModuleDict(
        {
            "fine": neuron.IFNode(),
            "subclass": MyLIFNode(),
            "learned_tau": neuron.ParametricLIFNode(),
            "softsign": neuron.IFNode(surrogate_function=surrogate.SoftSign()),
            "smooth": neuron.IFNode(surrogate_function=surrogate.ATan(spiking=False)),
            "relative": neuron.IFNode(v_threshold=2.0, surrogate_function=LinearSurrogate()),
            "no_neuron": layer.Dropout(),
        }
    )
    classes = {name: type(module) for name, module in net.items()}
    with caplog.at_level(logging.WARNING):
        accelerate(net)
    report = acceleration_report(net)
    assert report.accelerated == ("fine",)
    reasons = {
        "subclass": "MyLIFNode is neither",
        "learned_tau": "ParametricLIFNode is neither",
        "softsign": "SoftSign has no kernel form",
        "smooth": "ATan has no kernel form",
        "relative": "does not divide",
    }
    assert report.left_alone.keys() == reasons.keys()
    for name, reason in reasons.items():
        assert reason in report.left_alone[name]
        assert f"{name}: {report.left_alone[name]}" in caplog.text
        assert type(net[name]) is classes[name]
    assert "1 neurons accelerated, 5 left alone" in caplog.text


def test_a_net_nobody_has_accelerated_says_so():
    report = acceleration_report(nn.Sequential(neuron.IFNode()))
    assert report.left_alone == {"0": "accelerate(model) has not been called on it"}


def test_the_time_loop_computes_a_pool_that_follows_in_a_sequential(monkeypatch):
    """The results are those of both layers to the bit, gradients too; hooks on neurons make both run."""
    torch.manual_seed(0)
    twice = layer.AvgPool2d(2, 2)
    net = nn.Sequential(
        nn.Sequential(layer.Conv2d(3, 16, 3, padding=1), neuron.LIFNode(surrogate_function=surrogate.ATan())),
        nn.Sequential(
            layer.Conv2d(16, 32, 3, padding=1),
            neuron.IFNode(surrogate_function=surrogate.ATan(), v_reset=None),
            layer.AvgPool2d(2),
            layer.Conv2d(32, 16, 3, padding=1),
            neuron.LIFNode(surrogate_function=surrogate.ATan()),
            twice,
            twice,  # runs by itself
        ),
    )
    functional.set_step_mode(net, "m")
    accelerate(net.to(memory_format=torch.channels_last))
    assert [type(each) for each in (net, *net)] == [nn.Sequential, nn.Sequential, Sequential]
    x, outcomes, calls, sizes = torch.rand(5, 2, 3, 16, 16), [], [], []
    pool_forward = layer.AvgPool2d.forward
    monkeypatch.setattr(
        layer.AvgPool2d, "forward", lambda self, x: calls.append(x.shape[-1]) or pool_forward(self, x)
    )
    for hooked in (False, True):
        if hooked:
            assert calls == [4]
            for node in (net[1][1], net[1][4]):
                node.register_forward_hook(lambda node, args, out: sizes.append(out.shape[-1]))
        net.zero_grad()
        functional.reset_net(net)
        out = net(x)
        out.square().sum().backward()
        outcomes.append([out, *(p.grad for p in net.parameters())])
    assert (calls, sizes) == ([4, 16, 8, 4], [16, 8])
    for joined, apart in zip(*outcomes, strict=True):
        assert torch.equal(joined, apart)
