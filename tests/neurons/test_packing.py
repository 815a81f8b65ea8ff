"""Inputs of weight layers as bytes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from spikingjelly.activation_based import layer

from lasnn_sj import neurons
from lasnn_sj.neurons import accelerate, packing
from lasnn_sj.neurons.packing import pack, unpack

LAST = torch.channels_last


@pytest.fixture
def small(monkeypatch):
    """Pack tensors of any size."""
    monkeypatch.setattr(packing, "SMALLEST", 0)


@settings(deadline=None, max_examples=60)
@given(
    unit=st.sampled_from([1.0, 0.25, 1.25, 1 / 0.7, 2.0, 3e-5]),
    multiples=st.sampled_from([[0], [0, 1], [-1, 0, 1], [0, 1, 2, 3, 4], list(range(-127, 128))]),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 5), st.sampled_from([16, 48]), st.integers(1, 9)),
    layout=st.sampled_from([torch.contiguous_format, LAST]),
    threads=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
)
def test_values_come_back_bit_for_bit(unit, multiples, shape, layout, threads, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.tensor(multiples)[torch.randint(len(multiples), shape, generator=generator)]
    codes[0, 0, 0, 0] = min(1, multiples[-1])  # the number itself is among the values
    x = (codes * torch.tensor(unit)).contiguous(memory_format=layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SMALLEST", 0)
        patch.setattr(packing, "PIECE", 64)
        packing.kernel.cache_clear()
        torch.set_num_threads(threads)
        try:
            kept, number = pack(x)
            back = unpack(kept, number)
        finally:
            torch.set_num_threads(1)
            packing.kernel.cache_clear()
    assert kept.dtype == torch.uint8
    assert torch.equal(back, x)
    assert back.stride() == x.stride()


@pytest.mark.parametrize("value", [0.3, 128.0, -129.0, math.nan, math.inf, 1 + 2**-23, 1e30])
@pytest.mark.parametrize("place", [0, 1, 99_999])
def test_other_values_are_not_packed(small, value, place):
    x = (torch.rand(100_000) < 0.2).float()
    x[0] = 1
    assert pack(x) is not None
    x[place] = value
    assert pack(x) is None


def test_other_tensors_are_not_packed(small):
    x = torch.ones(64, 64)
    assert pack(x) is not None
    assert pack(x.double()) is None
    assert pack(x[:, ::2]) is None  # gaps in memory
    assert pack(x[:1].expand(64, 64)) is None
    assert pack(torch.ones(15)) is None  # no multiple of a vector
    assert torch.equal(unpack(*pack(torch.zeros(64))), torch.zeros(64))


def test_a_small_tensor_is_not_worth_it():
    assert pack(torch.ones(packing.SMALLEST // 4 - 16)) is None
    assert pack(torch.ones(packing.SMALLEST // 4)) is not None


def kept_and_gradients(module, x):
    """Dtypes of what autograd keeps of the input, and the gradients."""
    kept, x = [], x.clone().requires_grad_()

    def note(t):
        kept.extend([t.dtype] * (t.numel() == x.numel()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        y = module(x)
    y.square().sum().backward()
    return kept, [x.grad, *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("kind", ["linear", "convolution", "three channels"])
def test_a_layer_keeps_bytes_of_spikes_and_gives_the_same_gradients(kind, monkeypatch):
    for room in (neurons.linear, neurons.convolution):
        monkeypatch.setattr(room, "SMALLEST", 1)
    if kind == "linear":
        module, shape = layer.Linear(64, 48, bias=False), (40, 64)
    else:
        channels = 3 if kind == "three channels" else 32
        module, shape = layer.Conv2d(channels, 32, 3, padding=1, bias=False), (6, channels, 8, 8)
    module = accelerate(module).to(memory_format=LAST)
    x = (torch.rand(shape) < 0.3).float() * 1.25
    found = {}
    for smallest in (0, math.inf):
        monkeypatch.setattr(packing, "SMALLEST", smallest)
        module.zero_grad()
        found[smallest] = kept_and_gradients(module, x)
    assert found[0][0] == [torch.uint8]
    assert found[math.inf][0] == [torch.float32]
    for packed, plain in zip(found[0][1], found[math.inf][1], strict=True):
        assert torch.equal(packed, plain)
        assert packed.count_nonzero() > 0


def test_frozen_weights_keep_no_input(small, monkeypatch):
    monkeypatch.setattr(neurons.linear, "SMALLEST", 1)
    module = accelerate(layer.Linear(64, 48, bias=False)).requires_grad_(False)
    kept, (g_x, _) = kept_and_gradients(module, torch.ones(40, 64))
    assert not kept
    assert torch.allclose(g_x, 2 * (torch.ones(40, 64) @ module.weight.T) @ module.weight, rtol=1e-4)
