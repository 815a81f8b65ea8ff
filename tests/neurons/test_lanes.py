"""Vectors of the CPU kernels: each operation against NumPy's or PyTorch's."""

import numba
import numpy as np
import pytest
import torch

from lasnn_sj.neurons import lanes
from lasnn_sj.neurons.lanes import (
    at,
    bits,
    bytes_,
    floats,
    ints,
    load,
    load_bits,
    looked_up,
    root,
    select,
    sequence,
    store,
    store_bits,
    stream,
    taken,
)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 255.0, 65504.0, 1e-8, 1e30, -1e30, 3.4e38, np.inf, -np.inf, np.nan, 1e-40]
NUMBERS = np.array([*SPECIAL, 1.00390625, 1.01171875], np.float32)  # both halfway between two bfloat16


def run(function, *arrays):
    """``function`` of the arrays' addresses, compiled."""
    numba.njit(function)(*(a.data_ptr() if isinstance(a, torch.Tensor) else a.ctypes.data for a in arrays))


def test_arithmetic_has_the_bits_of_float32():
    a, b = (np.random.default_rng(seed).normal(size=16).astype(np.float32) for seed in (0, 1))
    out = np.empty((7, 16), np.float32)
    half = np.float32(0.5)

    def compute(a, b, out):
        x, y, to = load(floats(a)), load(floats(b)), floats(out)
        store(to, x + y * half)
        store(at(to, 16), x / y - x)
        store(at(to, 32), root(abs(x)))
        store(at(to, 48), select(x > y, x, half))
        store(at(to, 64), select(x >= half, y, x))
        store(at(to, 80), select(x != x, y, x))
        store(at(to, 96), half - x)

    run(compute, a, b, out)
    expected = [
        a + b * half, a / b - a, np.sqrt(abs(a)), np.where(a > b, a, half), np.where(a >= half, b, a), a,
        half - a,
    ]  # fmt: skip
    assert np.array_equal(out, np.stack(expected))


def test_nan_is_neither_more_nor_equal():
    out = np.empty((3, 16), np.float32)
    zero, one = np.float32(0), np.float32(1)

    def compute(a, out):
        x, to = load(floats(a)), floats(out)
        store(to, select(x > zero, one, zero))
        store(at(to, 16), select(x >= x, one, zero))
        store(at(to, 32), select(x != x, one, zero))

    run(compute, NUMBERS, out)
    assert np.array_equal(out, np.stack([NUMBERS > 0, ~np.isnan(NUMBERS), np.isnan(NUMBERS)]))


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(("kind", "dtype"), list(enumerate([torch.float32, torch.float16, torch.bfloat16])))
def test_numbers_are_stored_as_pytorch_rounds_them(kind, dtype, streamed):
    if dtype == torch.float16 and not lanes.HAS_HALVES:
        pytest.skip("this processor has no float16")
    random = np.random.default_rng(0).normal(size=1600) * 10.0 ** np.repeat(np.arange(-50, 50), 16)
    x = torch.from_numpy(np.concatenate([NUMBERS, random.astype(np.float32)]))
    there, back = torch.empty(x.shape, dtype=dtype), torch.empty_like(x)

    def convert(x, there, back):
        to = sequence(there, kind)
        for i in range(0, 1616, 16):
            if streamed:
                stream(at(to, i), load(at(floats(x), i)))
            else:
                store(at(to, i), load(at(floats(x), i)))
        lanes.finish_streams()
        for i in range(0, 1616, 16):
            store(at(floats(back), i), load(at(to, i)))

    run(convert, x, there, back)
    assert torch.equal(there.nan_to_num(7), x.to(dtype).nan_to_num(7))
    assert torch.equal(back.nan_to_num(7), x.to(dtype).float().nan_to_num(7))
    assert torch.equal(there.isnan(), x.isnan())


def test_bytes_bits_and_tables():
    values = np.linspace(0, 255.9, 16).astype(np.float32)
    table = np.random.default_rng(0).normal(size=256).astype(np.float32)
    bytes_out, bits_out = np.empty(16, np.uint8), np.empty(1, np.int16)
    floats_out = np.empty((3, 16), np.float32)
    hundred, zero, one = np.float32(100), np.float32(0), np.float32(1)

    def compute(values, table, bytes_out, bits_out, floats_out):
        x, to = load(floats(values)), floats(floats_out)
        store(bytes_(bytes_out), x)
        store(to, load(bytes_(bytes_out)))
        store(at(to, 16), looked_up(floats(table), bytes_(bytes_out)))
        store_bits(bits(bits_out), x > hundred)
        store(at(to, 32), select(load_bits(bits(bits_out)), one, zero))

    run(compute, values, table, bytes_out, bits_out, floats_out)
    assert np.array_equal(bytes_out, values.astype(np.uint8))
    assert np.array_equal(floats_out, np.stack([bytes_out, table[bytes_out], values > 100]))
    assert bin(bits_out.view(np.uint16)[0]).count("1") == (values > 100).sum()


def test_what_one_takes_no_other_gets():
    counter, before = np.array([5]), np.empty(3, np.int64)

    def compute(counter, before):
        for i in range(3):
            ints(before)[i] = taken(ints(counter), 10)

    run(compute, counter, before)
    assert before.tolist() == [5, 15, 25]
    assert counter.tolist() == [35]
