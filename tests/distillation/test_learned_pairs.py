"""Learned pairing of layers against numbers worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj.distillation import SASTC, Look, Signals, parse_objective
from lasnn_sj.distillation.pairs import Pair
from lasnn_sj.neurons import LIFNode


class Student(nn.Module):
    """One channel of spikes at 8x8, then two at 4x4."""

    def __init__(self):
        super().__init__()
        self.one, self.two = LIFNode(step_mode="m"), LIFNode(step_mode="m")

    def forward(self, x):
        first = self.one(4 * x)
        second = self.two(F.max_pool3d(first, (1, 2, 2)).repeat(1, 1, 2, 1, 1))
        return second.flatten(3).sum(3)


def teacher():
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))  # fmt: skip


def prepared(**arguments):
    torch.manual_seed(0)
    objective, images = SASTC(**arguments), torch.rand(2, 1, 8, 8)
    frames, student = images.expand(3, 2, 1, 8, 8), Student().eval()
    with torch.no_grad():
        look = Look(student, teacher().eval(), frames, images, student(frames), 2)
        needs = objective.prepare(look)
    for parameter in objective.parameters():
        parameter.data = parameter.data.double()
    return objective, needs


def signals(spikes, features):
    one = Signals(
        torch.zeros(len(features[0]), 2, dtype=torch.float64), torch.zeros(len(features[0]), dtype=int)
    )
    one.teacher_logits = torch.zeros_like(one.scores)
    one.student = {(name, "spikes"): x for name, x in zip(("one", "two"), spikes)}
    one.teacher = dict(zip(("1", "4"), features))
    return one


def test_layers_and_weights():
    objective, needs = prepared(batch_size=8)
    assert needs.student == (("one", "spikes"), ("two", "spikes"))
    assert needs.teacher == ("1", "4")
    shapes = {name: tuple(p.shape) for name, p in objective.named_parameters() if p.numel()}
    assert len(shapes) == 2 * 2 * 4 + 4 * 4  # of a pair of layers four, of a layer four
    assert shapes["key0"] == (4, 8)
    assert shapes["query_out1"] == (2, 4)
    assert shapes["conv01"] == (6, 1, 3, 3)
    assert shapes["project10"] == (2, 4, 1, 1)
    assert set(objective.scale01.tolist()) == {1.0}
    assert set(objective.shift01.tolist()) == {0.0}


def single():
    """One pair of layers of one channel and one pixel by hand."""
    objective, _ = prepared(batch_size=4, beta=10.0, temperature=1.0)
    objective._pairs = [Pair("one", "1", (1, 2), (1, 2))]
    return objective


def test_of_one_pair_the_attention_is_one_and_the_distance_by_hand():
    """``R``: copied to a channel and, less, to another; normalised over a step to +-1; the sum of both."""
    objective = single()
    objective.conv00.data = torch.zeros(2, 1, 3, 3, dtype=torch.float64)
    objective.conv00.data[:, 0, 1, 1] = torch.tensor([1.0, -1.0])
    objective.scale00.data = torch.tensor([2.0, 3.0], dtype=torch.float64)
    objective.shift00.data = torch.zeros(2, dtype=torch.float64)
    objective.project00.data = torch.tensor([1.0, 1.0], dtype=torch.float64).view(1, 2, 1, 1)
    spikes = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]], dtype=torch.float64).view(1, 2, 1, 1, 2)
    steps = torch.cat([spikes, 1 - spikes])
    features = torch.tensor([[2.0, 0.0], [3.0, 1.0]], dtype=torch.float64).view(2, 1, 1, 2)
    # restored 2 where there is a spike, 3 where there is none: in step 1 (2, 3) and (3, 2); in step 2 swapped
    squares = [0 + 9, 0 + 1, 1 + 4, 1 + 4]
    found = objective(signals([steps], [features]))
    assert found["calibrated"].item() == pytest.approx(10 * sum(squares) / 2 / 4, rel=1e-4)
    assert found["kd"].item() == 0


def test_attention_by_hand():
    """Query and keys of length 1: 0.6, 0.8 against (1, 0) and (0, 1)."""
    objective = single()
    queries = torch.tensor([0.6, 0.8], dtype=torch.float64)
    keys = torch.eye(2, dtype=torch.float64)
    objective._pairs = [Pair("one", "1", (1, 2), (1, 2)), Pair("two", "4", (1, 2), (1, 2))]
    objective._embed = lambda side, number, products: (queries if side == "query" else keys[number]).expand(
        *products.shape[:-1], 2
    )
    objective._distance = lambda s, f, number: torch.full(s.shape[:2], {"0": 1.0, "1": 2.0}[number[1]])
    x = torch.rand(3, 2, 1, 1, 2, dtype=torch.float64)
    weight = 1 / (1 + math.exp(0.2))  # of the first teacher layer
    expected = 10 * (weight + 2 * (1 - weight))
    found = objective(signals([x, x], [x[0], x[0]]))["calibrated"].item()
    assert found == pytest.approx(expected, rel=1e-6)


def test_rows_are_of_length_one_and_filled_up():
    objective, _ = prepared(batch_size=8)
    products = torch.rand(3, 2, 2, dtype=torch.float64)
    found = objective._embed("query", 0, products)
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(3, 2, dtype=torch.float64))
    filled = torch.zeros(3, 2, 8, dtype=torch.float64)
    filled[..., :2] = products
    hidden = (filled @ objective.query0.T + objective.query_bias0).relu()
    expected = F.normalize(hidden @ objective.query_out0.T + objective.query_out_bias0, dim=-1)
    torch.testing.assert_close(found, expected)


def test_gradient():
    objective = single()
    torch.manual_seed(0)
    spikes = torch.rand(2, 3, 1, 1, 2, dtype=torch.float64, requires_grad=True)
    features = torch.rand(3, 1, 1, 2, dtype=torch.float64)
    objective.project00.data = torch.rand(1, 4, 1, 1, dtype=torch.float64)
    assert gradcheck(lambda x: sum(objective(signals([x], [features])).values()), spikes)


def test_the_larger_map_is_brought_to_the_smaller_one():
    objective = single()
    seen = []
    objective.project00.data = torch.zeros_like(objective.project00)
    spikes = torch.rand(2, 2, 1, 4, 4, dtype=torch.float64)
    for size in (2, 8):  # of a restored map that is 0 the squares of the features are left
        features = torch.rand(2, 1, size, size, dtype=torch.float64)
        target = F.adaptive_avg_pool2d(features, min(4, size))
        channels = objective.project00.shape[0]
        found = objective._distance(spikes, features.expand(2, channels, size, size), "00")
        torch.testing.assert_close(found, target.square().mean((1, 2, 3)).expand(2, 2))
        seen.append(found)


def test_what_is_refused():
    with pytest.raises(ValueError, match="batch_size must be a whole number, at least 4, got 2"):
        SASTC(batch_size=2)
    objective, _ = prepared(batch_size=4)
    x = torch.rand(3, 5, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match="SASTC got a batch of 5 samples; give it batch_size=5"):
        objective(signals([x], [x[0]]))
    assert repr(parse_objective("SASTC(batch_size=32)")) == "SASTC(batch_size=32)"
