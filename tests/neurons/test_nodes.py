"""The nodes as SpikingJelly modules."""

import copy

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, surrogate
from torch import nn, tensor
from torch.testing import assert_close

from lasnn_sj.neurons import IFNode, IntegratorNode, LIFNode, LinearSurrogate


def make_net():
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1),
        LIFNode(v_threshold=0.7, leak=0.9),
        layer.AvgPool2d(2),
        layer.Flatten(),
        layer.Linear(4 * 4 * 4, 5),
        IntegratorNode(),
    )
    functional.set_step_mode(net, "m")
    return net


X = torch.randn(6, 3, 2, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [make_net, lambda: LIFNode(0.8), lambda: IFNode(0.8), IntegratorNode])
def test_single_step_equals_multi_step(make):
    module = make()
    functional.set_step_mode(module, "m")
    multi = X.clone().requires_grad_()
    together = module(multi)
    weight = torch.randn(together.shape, generator=torch.Generator().manual_seed(2))
    (together * weight).sum().backward()

    functional.reset_net(module)
    functional.set_step_mode(module, "s")
    single = X.clone().requires_grad_()
    one_by_one = torch.stack([module(x) for x in single])
    (one_by_one * weight).sum().backward()

    assert_close(one_by_one, together)
    assert_close(single.grad, multi.grad)
    assert together.abs().sum() > 0


def test_a_mask_drops_the_same_neurons_at_every_step_in_both_modes():
    mask = tensor([[0.0, 2.0]])
    x = torch.full((4, 1, 2), 1.5)
    node = LIFNode(leak=1.0, step_mode="m")
    # v = 1.5, 2.0, 2.5, 3.0: a spike at every step
    expected = tensor([[[0.0, 2.0]]]).expand(4, 1, 2)
    assert torch.equal(node.multi_step_forward(x, mask=mask), expected)
    functional.reset_net(node)
    assert torch.equal(torch.stack([node.single_step_forward(a, mask=mask) for a in x]), expected)
    assert_close(node.v, tensor([[3.0, 3.0]]))


def test_the_state_lives_on_until_the_network_is_reset():
    node = LIFNode(leak=1.0, step_mode="m")
    x = torch.full((1, 1), 0.6)
    assert node(x[None]).item() == 0
    assert_close(node.v, tensor([[0.6]]))
    assert node(x[None]).item() == 1  # 0.6 + 0.6 > 1
    functional.reset_net(node)
    assert node.v == 0.0
    assert node(x[None]).item() == 0


def test_a_new_batch_size_starts_anew():
    node = LIFNode(leak=1.0, step_mode="m")
    node(torch.full((1, 2, 3), 0.6))
    assert node(torch.full((1, 4, 3), 0.6)).sum() == 0
    assert node.v.shape == (4, 3)


def test_potentials_are_float32_for_half_precision_and_float64_for_float64():
    node = LIFNode(step_mode="m")
    for dtype, state in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        assert node(torch.zeros(2, 3, dtype=dtype)).dtype == dtype
        assert node.v.dtype == state


def test_store_v_seq_keeps_the_potential_of_every_step():
    node = LIFNode(leak=0.5, step_mode="m", store_v_seq=True)
    node(tensor([[0.8], [0.8], [0.8]]))
    assert_close(node.v_seq, tensor([[0.8], [1.2], [0.4]]))  # 0.5*1.2 + 0.8 - 1
    functional.reset_net(node)
    assert node.v_seq is None


def test_functional_forward_leaves_the_module_alone():
    net = make_net()
    expected = net(X)
    functional.reset_net(net)
    forward = base.to_functional_forward(net)
    states = tuple(base.extract_memories(net))
    outputs, updated = forward((X,), states)
    assert_close(outputs[0], expected)
    assert net[1].v == 0.0
    assert updated[0].shape == (3, 4, 8, 8)


def test_deepcopy_after_reset():
    net = make_net()
    expected = net(X)
    functional.reset_net(net)
    twin = copy.deepcopy(net)
    assert_close(twin(X), expected)
    assert net[1].v == 0.0


def test_threshold_and_leak_travel_with_the_state_dict():
    net, other = make_net(), make_net()
    net[1].v_threshold, net[1].leak = 1.25, 0.5
    assert (other[1].v_threshold, other[1].leak) == (0.7, 0.9)
    other.load_state_dict(net.state_dict())
    assert (other[1].v_threshold, other[1].leak) == (1.25, 0.5)
    assert_close(other(X), net(X))


def test_recorded_maps_follow_the_forward_and_go_with_the_reset():
    node = LIFNode(leak=0.0, step_mode="m")
    node.record = ("firing_rate",)
    # v1 = 2: a spike; v2 = 0.5 - 1 < 1: none (the paper's reset comes a step later)
    node(tensor([[2.0], [0.5]]))
    assert node.recorded["firing_rate"].item() == 0.5
    node.reset()
    assert node.recorded == {}


@pytest.mark.parametrize("node", [LIFNode, IFNode])
def test_smooth_stand_in_passes_gradcheck_through_the_node(node):
    node = node(surrogate_function=LinearSurrogate(spiking=False), detach_reset=False, step_mode="m")
    x = torch.randn(4, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def forward(x):
        functional.reset_net(node)
        return node(x), node.v

    assert torch.autograd.gradcheck(forward, (x.requires_grad_(),))


def test_any_spikingjelly_surrogate_works():
    # SoftSign has no kernel form: plain PyTorch runs it, with its own gradient
    function = surrogate.SoftSign(alpha=2.0)
    x = tensor([[0.5, 1.5]], requires_grad=True)
    LIFNode(surrogate_function=function, step_mode="m")(x).sum().backward()
    distance = tensor([[-0.5, 0.5]], requires_grad=True)
    function(distance).sum().backward()
    assert_close(x.grad, distance.grad)


def test_if_node_is_a_lif_node_without_leak():
    assert IFNode(0.5).dynamics == LIFNode(0.5, leak=1.0).dynamics


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"v_threshold": 0.0}, "v_threshold must be a positive"),
        ({"v_threshold": -1.0}, "v_threshold must be a positive"),
        ({"leak": 1.01}, r"leak must lie in \[0, 1\], got 1.01"),
        ({"surrogate_function": "atan"}, "surrogate_function must be a surrogate module, got 'atan'"),
    ],
)
def test_wrong_arguments_are_refused_when_the_node_is_made(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message):
        LIFNode(**arguments)


@pytest.mark.parametrize("gamma", [0.0, -0.3, float("nan")])
def test_gamma_must_be_positive(gamma):
    with pytest.raises(ValueError, match="gamma must be a positive"):
        LinearSurrogate(gamma)
