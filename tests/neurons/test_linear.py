"""Sparse products and the linear layers that use them, against dense ones in float64."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import functional, layer
from spikingjelly.activation_based.op_counter import DispatchCounterMode, SynOpCounter
from torch import nn
from torch.testing import assert_close

from lasnn_sj import models
from lasnn_sj.neurons import Linear, accelerate, linear
from lasnn_sj.neurons.sparse import nonzero_density, sparse_product


def sparse_matrix(rows, columns, density, generator, binary=True):
    values = torch.ones(rows, columns) if binary else torch.randn(rows, columns, generator=generator)
    return values * (torch.rand(rows, columns, generator=generator) < density)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 300), st.integers(1, 150)),
    density=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    transposed=st.tuples(st.booleans(), st.booleans()),
    binary=st.booleans(),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_a_product_is_the_dense_one(sizes, density, transposed, binary, threads, seed):
    M, K, N = sizes
    generator = torch.Generator().manual_seed(seed)
    a = sparse_matrix(M, K, density, generator, binary)
    b = torch.randn(K, N, generator=generator)
    expected, share = a.double() @ b.double(), a.count_nonzero().item() / a.numel()
    a, b = (t.t().contiguous().t() if flip else t for t, flip in zip((a, b), transposed))
    one = sparse_product(a, b)
    torch.set_num_threads(threads)
    try:
        several = sparse_product(a, b)
    finally:
        torch.set_num_threads(1)
    assert one.is_contiguous()
    assert_close(one.double(), expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(one, several)  # bit for bit, whatever the number of threads
    assert nonzero_density(a.contiguous()) == share


def test_values_that_are_not_finite_are_not_hidden():
    """A NaN of the sparse matrix is one of its values; a NaN of the other is left to the dense product."""
    a, b = torch.zeros(40, 20), torch.ones(20, 70)
    a[3, 17] = math.nan
    assert sparse_product(a, b).isnan().nonzero()[:, 0].unique().tolist() == [3]
    a.zero_()
    for value in (math.nan, math.inf, -math.inf):
        b[19, 69] = value
        assert sparse_product(a, b) is None


def test_of_many_rows_some_are_counted():
    """About 256, of all time steps and of all images of a batch of even size."""
    a = torch.zeros(100, 16, 40)  # [T, N, K]
    a[:50, :4] = 1
    assert abs(nonzero_density(a.view(1600, 40)) - 1 / 8) < 0.01


def test_a_matrix_without_contiguous_rows_or_columns_is_refused():
    with pytest.raises(ValueError, match=r"contiguous rows or columns, got strides \(16, 2\)"):
        sparse_product(torch.zeros(8, 16)[:, ::2], torch.zeros(8, 8))


@pytest.fixture
def always_sparse(monkeypatch):
    """Take the sparse product at any size, up to a density of 0.9; count how often."""
    for name, value in {"DENSEST": 0.9, "COPYING": 0, "COLUMNS": 1, "SMALLEST": 1}.items():
        monkeypatch.setattr(linear, name, value)
    calls = []
    monkeypatch.setattr(linear, "sparse_product", lambda a, b: calls.append(a) or sparse_product(a, b))
    return calls


def gradients(module, x, g):
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(g)
    return y, x.grad, *(p.grad for p in module.parameters())


# of the input and of the output's gradient; the weight's gradient comes from the sparser of them
@pytest.mark.parametrize("densities", [(0.1, 0.4), (0.4, 0.1), (0.1, 1.0), (1.0, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_gives_the_results_and_gradients_of_the_stock_one(
    densities, onednn, bias, always_sparse, monkeypatch
):
    monkeypatch.setattr(linear, "_ONEDNN", onednn and torch.backends.mkldnn.is_available())
    generator = torch.Generator().manual_seed(0)
    x = sparse_matrix(15, 40, densities[0], generator).view(3, 5, 40)
    g = sparse_matrix(15, 30, densities[1], generator, binary=False).view(3, 5, 30)
    stock = layer.Linear(40, 30, bias=bias, step_mode="m")
    fast = accelerate(copy.deepcopy(stock))
    assert type(fast) is Linear
    assert_close(gradients(fast, x, g), gradients(stock, x, g))
    first, second = (density < 0.9 for density in densities)
    assert len(always_sparse) == first + second + (first or second)


def test_frozen_weights_and_inputs_without_gradient(always_sparse):
    generator = torch.Generator().manual_seed(0)
    x, module = sparse_matrix(15, 40, 0.2, generator), accelerate(layer.Linear(40, 30))
    module(x).sum().backward()  # of the weight alone
    assert_close(module.weight.grad, x.sum(0).expand(30, 40))
    module.weight.requires_grad_(False)
    x.requires_grad_()
    module(x).sum().backward()
    assert_close(x.grad, module.weight.sum(0).expand(15, 40))


def test_nan_weights_and_inputs_give_what_the_dense_layer_gives(always_sparse):
    x = sparse_matrix(15, 40, 0.2, torch.Generator().manual_seed(0))
    module = accelerate(layer.Linear(40, 30, bias=False))
    module.weight.data[4, 5] = math.nan
    x[2, 7] = math.nan
    isnan = module(x).isnan()
    assert torch.equal(isnan, nn.functional.linear(x, module.weight).isnan())
    assert isnan[2].all()
    assert isnan[:, 4].all()


def test_the_operation_passes_pytorchs_own_checks(always_sparse):
    generator = torch.Generator().manual_seed(0)
    x = sparse_matrix(15, 40, 0.2, generator).requires_grad_()
    weight = torch.randn(30, 40, generator=generator, requires_grad=True)
    torch.library.opcheck(linear._linear, (x, weight))
    g = torch.randn(15, 30)
    torch.library.opcheck(linear._input_gradient, (g, weight.detach()))
    torch.library.opcheck(linear._weight_gradient, (g, x.detach(), weight.detach()))


def test_the_operation_compiles_as_a_whole(always_sparse):
    x = sparse_matrix(15, 40, 0.2, torch.Generator().manual_seed(0))
    module = accelerate(layer.Linear(40, 30))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert_close(compiled(x), module(x))
    assert len(always_sparse) == 2


@pytest.mark.parametrize("case", ["float64", "autocast", "small"])
def test_other_inputs_run_as_in_the_stock_layer(case, always_sparse, monkeypatch):
    module, x = accelerate(layer.Linear(40, 30)), sparse_matrix(15, 40, 0.2, torch.Generator().manual_seed(0))
    if case == "float64":
        module, x = module.double(), x.double()
    if case == "small":
        monkeypatch.setattr(linear, "SMALLEST", x.numel() * 30 + 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        y = module(x)
        assert torch.equal(y, nn.functional.linear(x, module.weight, module.bias))
    assert not always_sparse
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        module(x[:, :7])


def test_counters_see_the_operations(always_sparse):
    x, counter = torch.ones(15, 40), SynOpCounter()
    with DispatchCounterMode([counter]):
        accelerate(layer.Linear(40, 30, bias=False))(x)
    assert counter.get_total() == 15 * 40 * 30


def test_a_network_trains_alike(always_sparse):
    """Gradients of a whole network agree with those of dense layers."""
    torch.manual_seed(0)
    fast = models.vgg5(10, width=0.1, dropout=0.0)
    dense = copy.deepcopy(fast)
    for module in dense.modules():
        if type(module) is Linear:
            module.__class__ = layer.Linear
    x = (torch.rand(4, 2, 3, 32, 32) < 0.4).float()
    for net in (fast, dense):
        net(x)[-1].square().sum().backward()
        functional.reset_net(net)
    assert len(always_sparse) >= 6
    for (name, p), q in zip(fast.named_parameters(), dense.parameters(), strict=True):
        assert (p.grad - q.grad).norm() <= 1e-4 * q.grad.norm(), name
        assert q.grad.norm() > 0
