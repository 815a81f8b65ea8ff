"""Sparse convolutions and the layers that use them, against dense ones."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn
from torch.testing import assert_close

from lasnn_sj import models, neurons
from lasnn_sj.neurons import accelerate, acceleration_report, convolution
from lasnn_sj.neurons.sparse_convolution import sparse_convolution, sparse_weight_gradient

LAST = torch.channels_last


def sparse_images(shape, density, generator, binary=True):
    values = torch.ones(shape) if binary else torch.randn(shape, generator=generator)
    values = values * (torch.rand(shape, generator=generator) < density)
    return values.contiguous(memory_format=LAST)


def with_threads(count, call):
    torch.set_num_threads(count)
    try:
        return call()
    finally:
        torch.set_num_threads(1)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 9), st.integers(1, 70)),
    channels=st.tuples(st.integers(1, 40), st.sampled_from([32, 64, 96, 128])),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    binary=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_are_the_dense_ones(sizes, channels, density, binary, seed):
    (n, H, W), (C, C_out) = sizes, channels
    generator = torch.Generator().manual_seed(seed)
    x = sparse_images((n, C, H, W), density, generator, binary)
    g = sparse_images((n, C_out, H, W), 0.5, generator, binary=False)
    weight = torch.randn(C_out, C, 3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.conv2d(x.double(), weight, padding=1)
    expected.backward(g.double())

    y = sparse_convolution(x, weight.detach().float())
    assert y.is_contiguous(memory_format=LAST)
    assert_close(y.double(), expected.detach(), atol=2e-4, rtol=1e-5)
    g_weight = sparse_weight_gradient(x, g)
    assert_close(g_weight.permute(3, 0, 1, 2).double(), weight.grad, atol=2e-4, rtol=1e-5)
    several = with_threads(
        3, lambda: (sparse_convolution(x, weight.detach().float()), sparse_weight_gradient(x, g))
    )
    assert torch.equal(several[0], y)  # bit for bit, whatever the number of threads
    assert torch.equal(several[1], g_weight)


def test_values_that_are_not_finite_are_not_hidden():
    x, weight = torch.zeros(2, 32, 5, 5).contiguous(memory_format=LAST), torch.ones(32, 32, 3, 3)
    x[1, 7, 0, 4] = math.nan
    touched = sparse_convolution(x, weight).isnan().any(1).nonzero().tolist()
    assert touched == [[1, 0, 3], [1, 0, 4], [1, 1, 3], [1, 1, 4]]
    for value in (math.nan, math.inf, -math.inf):
        g = torch.zeros_like(x)
        g[1, 31, 4, 4] = value
        assert sparse_weight_gradient(torch.zeros_like(x), g) is None
        weight[31, 31, 2, 2] = value
        assert sparse_convolution(x, weight) is None


@pytest.fixture
def always_sparse(monkeypatch):
    """Take the sparse products at any size, up to a density of 0.9; name them."""
    for name, value in {"OUTPUT": 0.9, "WEIGHT": 0.9, "PIXELS": 1, "SMALLEST": 1}.items():
        monkeypatch.setattr(convolution, name, value)
    calls = []
    for kernel in (sparse_convolution, sparse_weight_gradient):
        noted = lambda a, b, kernel=kernel: calls.append(kernel.__name__) or kernel(a, b)  # noqa: E731
        monkeypatch.setattr(convolution, kernel.__name__, noted)
    return calls


def gradients(module, x, g):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    return y, x.grad, *(p.grad for p in module.parameters())


# of the input and of the output's gradient; the weight's gradient comes from the sparser of them
@pytest.mark.parametrize("densities", [(0.1, 0.4), (0.4, 0.1), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_the_results_and_gradients_of_the_stock_one(densities, layout, bias, always_sparse):
    generator = torch.Generator().manual_seed(0)
    x = sparse_images((6, 32, 9, 10), densities[0], generator).contiguous(memory_format=layout)
    g = sparse_images((6, 64, 9, 10), densities[1], generator, binary=False).contiguous(memory_format=layout)
    stock = layer.Conv2d(32, 64, 3, padding=1, bias=bias, step_mode="m").to(memory_format=layout)
    fast = accelerate(copy.deepcopy(stock))
    assert type(fast) is neurons.Conv2d
    x, g = x.unflatten(0, (3, 2)), g.unflatten(0, (3, 2))
    assert_close(gradients(fast, x, g), gradients(stock, x, g), atol=2e-4, rtol=1e-5)
    first, second = (density < 0.9 for density in densities)
    assert always_sparse.count("sparse_convolution") == first + second
    assert always_sparse.count("sparse_weight_gradient") == (first or second)


def test_nan_weights_give_what_the_dense_layer_gives(always_sparse):
    x = sparse_images((2, 32, 8, 8), 0.2, torch.Generator().manual_seed(0))
    module = accelerate(layer.Conv2d(32, 32, 3, padding=1))
    module.weight.data[3, 4, 0, 0] = math.nan
    x[1, 2, 3, 4] = math.nan
    dense = nn.functional.conv2d(x, module.weight, module.bias, padding=1)
    assert torch.equal(module(x).isnan(), dense.isnan())
    assert 0 < dense.isnan().sum() < dense.numel()


def test_the_operation_passes_pytorchs_own_checks(always_sparse):
    generator = torch.Generator().manual_seed(0)
    x = sparse_images((2, 32, 8, 8), 0.2, generator).requires_grad_()
    weight = torch.randn(32, 32, 3, 3, generator=generator, requires_grad=True)
    torch.library.opcheck(convolution._convolution, (x, weight))
    g = torch.randn(2, 32, 8, 8, generator=generator)
    torch.library.opcheck(convolution._input_gradient, (g, weight.detach()))
    torch.library.opcheck(convolution._weight_gradient, (g, x.detach(), weight.detach()))


def test_the_operation_compiles_as_a_whole(always_sparse):
    x = sparse_images((2, 32, 8, 8), 0.2, torch.Generator().manual_seed(0))
    module = accelerate(layer.Conv2d(32, 32, 3, padding=1))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), module(x))
    assert len(always_sparse) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"stride": 2}, {"padding": 0}, {"dilation": 2}, {"kernel_size": 5}, {"groups": 2},
        {"padding": "same"}, {"padding_mode": "reflect"}, {"in_channels": 24},
    ],
    ids=str,
)  # fmt: skip
def test_other_convolutions_stay_dense_and_the_report_names_the_reason(changed, always_sparse):
    settings = {"in_channels": 32, "out_channels": 32, "kernel_size": 3, "padding": 1} | changed
    stock = layer.Conv2d(**settings)
    fast = accelerate(nn.Sequential(copy.deepcopy(stock)))
    x = sparse_images((2, settings["in_channels"], 12, 12), 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(fast(x), stock(x))
    assert not always_sparse
    ((name, why),) = acceleration_report(fast).dense.items()
    assert name == "0"
    assert str(next(iter(changed.values()))) in why


def test_students_have_them_and_the_report_names_them():
    report = acceleration_report(models.vgg5(10, width=0.5))
    assert report.sparse == (
        "features.2.weights", "features.3.weights", "classifier.0.weights", "classifier.1.weights", "output",
    )  # fmt: skip
    assert list(report.dense) == ["features.0.weights"]
    assert "3 and 32 channels; only multiples of 32 are" in report.dense["features.0.weights"]
    stock = nn.Sequential(layer.Linear(4, 4), neuron.IFNode(), nn.Linear(4, 4))
    assert "has not been called" in acceleration_report(stock).dense["0"]
    report = acceleration_report(accelerate(stock))
    assert report.sparse == ("0",)
    assert report.accelerated == ("1",)
    assert "neither SpikingJelly's Linear nor its Conv2d" in report.dense["2"]


def test_a_network_trains_alike(always_sparse):
    """Gradients of a whole network agree with those of dense layers."""
    torch.manual_seed(0)
    fast = models.vgg5(10, width=0.5, dropout=0.0)
    dense = copy.deepcopy(fast)
    for module in dense.modules():
        if isinstance(module, neurons.Conv2d):
            module.__class__ = layer.Conv2d
    x = (torch.rand(3, 2, 3, 32, 32) < 0.4).float()
    for net in (fast, dense):
        net(x)[-1].square().sum().backward()
        functional.reset_net(net)
    assert len(always_sparse) >= 5
    for (name, p), q in zip(fast.named_parameters(), dense.named_parameters(), strict=True):
        assert (p.grad - q[1].grad).norm() <= 1e-4 * q[1].grad.norm(), name
        assert q[1].grad.norm() > 0
