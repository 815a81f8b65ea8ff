"""Distillation of logits against numbers worked out by hand."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lasnn_sj.distillation import (
    DIST,
    CrossEntropy,
    DecoupledKD,
    LabelKD,
    NoiseSmoothedKD,
    Signals,
    parse_objective,
)
from lasnn_sj.training.trainer import Trainer

ALL = [DecoupledKD(), DIST(), NoiseSmoothedKD()]


def logs(*rows):
    return torch.tensor(rows, dtype=torch.float64).log()


def signals(student, teacher, labels):
    return Signals(student, torch.tensor(labels), teacher_logits=teacher)


def test_decoupled_kd_by_hand():
    """Teacher 1/2, 3/8, 1/8 with label 0; student 1/4, 1/2, 1/4."""
    found = DecoupledKD(2.0, 3.0, 1.0)(signals(logs([1, 2, 1]), logs([4, 3, 1]), [0]))
    label_or_not = 1 / 2 * math.log((1 / 2) / (1 / 4)) + 1 / 2 * math.log((1 / 2) / (3 / 4))
    others = 3 / 4 * math.log((3 / 4) / (2 / 3)) + 1 / 4 * math.log((1 / 4) / (1 / 3))
    assert found["target_kd"].item() == pytest.approx(2 * label_or_not, rel=1e-12)
    assert found["other_kd"].item() == pytest.approx(3 * others, rel=1e-12)


@pytest.mark.parametrize(("epoch", "weight"), [(0, 1 / 20), (9, 1 / 2), (19, 1), (100, 1)])
def test_decoupled_kd_warms_up_over_20_of_240_epochs(epoch, weight):
    data = signals(logs([1, 2, 1]), logs([4, 3, 1]), [0])
    full = DecoupledKD(warmup=0)(data)
    data.epoch, data.epochs = epoch, 240
    for name, part in DecoupledKD()(data).items():
        assert part.item() == pytest.approx(weight * full[name].item(), rel=1e-12)
    with pytest.raises(ValueError, match=r"warmup must be a part of the epochs, in \[0, 1\], got 20"):
        DecoupledKD(warmup=20)


def test_decoupled_kd_is_label_kd_at_the_weight_that_the_paper_derives():
    """KL = TCKD + (1 - p_y) * NCKD, here of one sample at tau = 3."""
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 1, 5, dtype=torch.float64)
    rest = 1 - (teacher / 3).softmax(1)[0, 2].item()
    data = signals(student, teacher, [2])
    parts = DecoupledKD(1.0, rest, 3.0)(data)
    assert sum(parts.values()).item() == pytest.approx(LabelKD(3.0, alpha=1.0)(data)["kd"].item(), rel=1e-12)


def test_dist_by_hand():
    """Probabilities of the teacher (1/2, 1/3, 1/6), (1/6, 1/3, 1/2); of the student the same, or reversed."""
    teacher = logs([3, 2, 1], [1, 2, 3])
    same = DIST(1.0, 1.0, 1.0)(signals(teacher, teacher, [0, 2]))
    assert [part.item() for part in same.values()] == pytest.approx([0, 1 / 3], abs=1e-12)  # a constant class
    reverse = DIST(1.0, 10.0, 1.0)(signals(teacher.flip(1), teacher, [0, 2]))
    assert reverse["inter"].item() == pytest.approx(2, rel=1e-12)  # 1 - (-1)
    assert reverse["intra"].item() == pytest.approx(10 * (2 + 1 + 2) / 3, rel=1e-12)
    alone = DIST()(signals(teacher[:1], teacher[:1], [0]))
    assert alone["intra"].item() == 0


def test_noise_smoothed_kd_by_hand(monkeypatch):
    """Noise of 1 standard deviation for every class: z is moved as a whole, which changes no probability."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    found = NoiseSmoothedKD(4.0, 0.1, 1.0)(signals(logs([1, 3]), logs([1, 1]), [0]))
    kl = 1 / 2 * math.log((1 / 2) / (1 / 4)) + 1 / 2 * math.log((1 / 2) / (3 / 4))
    assert found["smoothed_kd"].item() == pytest.approx(4 * kl, rel=1e-12)
    # z = (0, 2) has mean 1 and deviation sqrt(2); noise (1, -1) gives z + strength * (1 + sqrt 2, 1 - sqrt 2)
    z = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    monkeypatch.setattr(torch, "randn_like", lambda x: torch.tensor([[1.0, -1.0]], dtype=x.dtype))
    found = NoiseSmoothedKD(1.0, 0.5, 1.0)(signals(z, logs([1, 1]), [0]))
    gap = 2 - math.sqrt(2)
    p = 1 / (1 + math.exp(gap))
    kl = 1 / 2 * math.log((1 / 2) / p) + 1 / 2 * math.log((1 / 2) / (1 - p))
    assert found["smoothed_kd"].item() == pytest.approx(kl, rel=1e-12)


@pytest.mark.parametrize("objective", [DecoupledKD(), DIST(), NoiseSmoothedKD(strength=0.0)], ids=str)
def test_gradients(objective):
    torch.manual_seed(0)
    student = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 4, dtype=torch.float64)
    assert gradcheck(lambda z: sum(objective(signals(z, teacher, [0, 3, 1])).values()), student)


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_bad_input(objective):
    scores = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="needs the logits of a teacher"):
        objective(signals(scores, None, [0]))
    with pytest.raises(ValueError, match=r"\(1, 3\) of the teacher and \(1, 2\) of the student"):
        objective(signals(scores, torch.zeros(1, 3), [0]))
    with pytest.raises(ValueError, match="needs a teacher; give one"):
        Trainer(torch.nn.Linear(2, 2), CrossEntropy() + objective)
    with pytest.raises(ValueError, match="temperature must be a number above 0, got -1"):
        type(objective)(temperature=-1)
    assert parse_objective(repr(objective)) == objective
