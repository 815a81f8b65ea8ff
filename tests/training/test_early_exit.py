"""Early exit against accuracies and steps counted by hand."""

import math

import pytest
import torch
from torch import nn

from lasnn_sj.neurons import IntegratorNode
from lasnn_sj.training.evaluation import evaluate

# Three steps, three samples of label 0, two classes, as log odds of class 0 that arrive at each step.
ARRIVING = torch.tensor([[3.0, -3.0, 0.0], [0.0, 6.0, 0.1], [0.0, 0.0, 0.1]])
FRAMES = torch.stack([ARRIVING, torch.zeros(3, 3)], 2)  # [T, N, K]
LOADER = [(FRAMES, torch.tensor([0, 0, 0]))]


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.readout = IntegratorNode(step_mode="m")

    def forward(self, x):
        return self.readout(x)


class Mean(nn.Module):
    def forward(self, x):
        return x


def test_by_confidence():
    """At 0.9 (log odds of 2.2) sample 1 stops right, 2 stops wrong, 3 goes on to the end."""
    found = evaluate(Sum(), LOADER, early_exit=0.9, over_time=True)
    assert found["early_exit_top1"] == pytest.approx(200 / 3)
    assert found["early_exit_steps"] == pytest.approx((1 + 1 + 3) / 3)
    assert found["top1"] == 100
    assert found["top1_over_time"][-1] == 100


def test_of_a_mean_the_scores_up_to_a_step_are_a_mean():
    """Means of the second sample: -3, 1.5, 1: never at 0.96 (3.18); of the first 3, 1.5, 1."""
    found = evaluate(Mean(), LOADER, early_exit=0.96)
    assert found["early_exit_steps"] == 3
    # at 0.8 (1.39) all is decided in the first step but the third sample
    found = evaluate(Mean(), LOADER, early_exit=0.8)
    assert found["early_exit_steps"] == pytest.approx((1 + 1 + 3) / 3)


def test_by_entropy():
    p = 1 / (1 + math.exp(3.0))
    entropy = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    above = evaluate(Sum(), LOADER, early_exit=entropy + 1e-4, exit_by="entropy")
    assert above["early_exit_steps"] == pytest.approx((1 + 1 + 3) / 3)
    below = evaluate(Sum(), LOADER, early_exit=entropy - 1e-4, exit_by="entropy")
    assert below["early_exit_steps"] == 3  # the second sample ends with log odds of 3 again


def test_the_ends_of_the_scale():
    first, last = (evaluate(Sum(), LOADER, early_exit=threshold) for threshold in (0.0, 1.0))
    assert first["early_exit_steps"] == 1
    assert last["early_exit_steps"] == 3
    assert last["early_exit_top1"] == last["top1"]


def test_several_thresholds_of_one_pass_are_those_of_several():
    for by in ("confidence", "entropy"):
        found = evaluate(Sum(), LOADER, early_exit=[0.0, 0.5, 0.9, 1.0], exit_by=by)
        each = [evaluate(Sum(), LOADER, early_exit=one, exit_by=by) for one in (0.0, 0.5, 0.9, 1.0)]
        for name in ("early_exit_top1", "early_exit_steps"):
            assert found[name] == [result[name] for result in each]
    assert len(set(found["early_exit_steps"])) > 1
    with pytest.raises(ValueError, match=r"early_exit must lie in \[0, 1\], got \[0.5, 2\]"):
        evaluate(Sum(), LOADER, early_exit=[0.5, 2])


def test_what_does_not_fit():
    with pytest.raises(ValueError, match=r"early_exit must lie in \[0, 1\], got 90"):
        evaluate(Sum(), LOADER, early_exit=90)
    with pytest.raises(ValueError, match='exit_by must be "confidence" or "entropy", got \'margin\''):
        evaluate(Sum(), LOADER, early_exit=0.5, exit_by="margin")
    with pytest.raises(
        ValueError, match="early_exit or over_time needs a network that gives scores of every step"
    ):
        evaluate(nn.Linear(2, 2), [(torch.zeros(3, 2), torch.tensor([0, 0, 0]))], early_exit=0.5)
