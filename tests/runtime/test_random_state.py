"""Random generators that objects hold: found wherever they are, and taken back to the number."""

import functools
import io
import random

import numpy as np
import pytest
import torch
from torch import nn

from lasnn_sj import PoissonEncoder
from lasnn_sj.runtime.random_state import generators_of, set_state_of, state_of

KINDS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "NumPy's PCG64": lambda: np.random.default_rng(1),
    "NumPy's MT19937": lambda: np.random.Generator(np.random.MT19937(1)),
    "NumPy's Philox": lambda: np.random.Generator(np.random.Philox(1)),
    "NumPy's SFC64": lambda: np.random.Generator(np.random.SFC64(1)),
    "RandomState": lambda: np.random.RandomState(1),
    "Python": lambda: random.Random(1),
}


def draw(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand(3, generator=generator).tolist()
    if isinstance(generator, random.Random):
        return [generator.gauss(0, 1) for _ in range(3)]
    return (
        [float(generator.standard_normal()), *generator.random(2).tolist()]
        if hasattr(generator, "random")
        else generator.randn(3).tolist()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_goes_through_a_checkpoint(kind):
    generator = KINDS[kind]()
    draw(generator)
    buffer = io.BytesIO()
    torch.save({"state": state_of(generator)}, buffer)
    expected = draw(generator)
    fresh = KINDS[kind]()
    set_state_of(fresh, torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)["state"])
    assert draw(fresh) == expected


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)


class Slots:
    __slots__ = ("rng",)

    def __init__(self):
        self.rng = random.Random(0)


class Frames:
    def __init__(self):
        self.transform = functools.partial(self.jitter, by=1)
        self._source = random.Random(0)

    def jitter(self, x, by):
        return x + self._source.random() * by


def closure():
    generator = np.random.RandomState(0)
    return lambda x: x + generator.rand()


def test_generators_are_found_wherever_they_are():
    data = torch.utils.data.Subset(Frames(), [0])
    owners = {
        "student": nn.Sequential(
            nn.Linear(1, 1), nn.Sequential(Noise(), PoissonEncoder(2, torch.Generator()))
        ),
        "data": data,
        "list": [{"deep": (1, closure())}],
        "slots": Slots(),
        "again": data,
        "none": (None, random, "text", random.SystemRandom(), torch.rand),
    }
    found = generators_of(owners)
    assert {path.split(".")[0] for path in found} == {"student", "data", "list", "slots"}
    assert sorted(type(g).__name__ for g in found.values()) == [
        "Generator", "Generator", "Random", "Random", "RandomState",
    ]  # fmt: skip
    assert found["student._modules.1._modules.0.rng"] is owners["student"][1][0].rng
    assert list(generators_of(owners)) == list(found)


def test_a_circle_ends():
    one, other = Frames(), Frames()
    one.other, other.other = other, one
    assert len(generators_of({"one": one})) == 2
