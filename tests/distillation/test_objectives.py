"""Losses against numbers worked out by hand (Eq. 7, 9, 12)."""

import math

import pytest
import torch
from torch.autograd import gradcheck

from lasnn_sj.distillation import CrossEntropy, Signals, SpikeKD, attention_loss
from lasnn_sj.neurons import IntegratorNode


def test_the_norm_is_not_squared():
    assert attention_loss([torch.tensor([[3.0, 0.0]])], [torch.tensor([[0.0, 4.0]])]).item() == 5


def test_mean_over_the_batch_and_sum_over_the_pairs():
    teacher = [torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0], [2.0]])]
    student = [torch.zeros(2, 2), torch.zeros(2, 1)]
    # (5 + 1) / 2 of the first pair, (1 + 2) / 2 of the second
    assert attention_loss(teacher, student).item() == 4.5


def test_equal_maps_have_no_loss_and_a_finite_gradient():
    maps = torch.rand(2, 6).requires_grad_()
    loss = attention_loss([maps.detach()], [maps])
    loss.backward()
    assert loss.item() == 0
    assert maps.grad.isfinite().all()


def test_teacher_and_student_may_change_places():
    a, b = torch.rand(2, 3, 8, dtype=torch.float64)
    assert attention_loss([a], [b]) == attention_loss([b], [a])


def test_gradient_of_the_attention_loss():
    teacher = torch.rand(2, 5, dtype=torch.float64)
    student = torch.rand(2, 5, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x: attention_loss([teacher, 2 * teacher], [x, x * x]), student)


@pytest.mark.parametrize(("teacher", "student", "said"), [
    ([], [], "at least one, of teacher and student, got 0 and 0"),
    ([(2, 4)], [(2, 4), (2, 4)], "got 1 and 2"),
    ([(2, 4)], [(3, 4)], r"pair 0: .*\(2, 4\) of the teacher and \(3, 4\) of the student"),
    ([(2, 4), (2, 4)], [(2, 4), (2, 9)], r"pair 1: .*\(2, 9\) of the student"),
    ([(2, 2, 2)], [(2, 2, 2)], r"must be \[N, P\]"),
])  # fmt: skip
def test_maps_that_do_not_match_are_refused(teacher, student, said):
    with pytest.raises(ValueError, match=said):
        attention_loss([torch.zeros(s) for s in teacher], [torch.zeros(s) for s in student])


# log 2 of the even scores and -log(3/4) of 3 : 1, averaged
CE = (math.log(2) + math.log(4 / 3)) / 2


def test_cross_entropy_on_the_output_potentials():
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64)
    parts = CrossEntropy()(Signals(scores, torch.tensor([1, 0])))
    assert {name: part.item() for name, part in parts.items()} == pytest.approx({"ce": CE}, rel=1e-14)


def test_gradient_of_the_cross_entropy_is_softmax_minus_one_hot():
    scores = torch.tensor([[0.0, 0.0], [math.log(3), 0.0]], dtype=torch.float64, requires_grad=True)
    CrossEntropy()(Signals(scores, torch.tensor([1, 0])))["ce"].backward()
    expected = torch.tensor([[1 / 2, -1 / 2], [-1 / 4, 1 / 4]], dtype=torch.float64) / 2
    torch.testing.assert_close(scores.grad, expected, rtol=1e-14, atol=0)


def test_cross_entropy_reads_no_teacher():
    assert CrossEntropy.needs_teacher is False


class Repeats(torch.nn.Module):
    """An SNN whose output neurons receive what the input says, ``[T, N, K]``."""

    def __init__(self):
        super().__init__()
        self.readout = IntegratorNode(step_mode="m")

    def forward(self, x):
        return self.readout(x)


def test_spike_kd_by_hand():
    """Two windows of two steps; the directions of what was received in each are compared.

    Teacher: (3, 4) then (0, 2), directions (0.6, 0.8) and (0, 1). Student: (0, 1) then (0, 5): (0, 1) both.
    Distances: |(0.6, -0.2)| = sqrt(0.4) and 0.
    """
    received = torch.tensor([[[1.0, 4.0]], [[2.0, 0.0]], [[0.0, 1.0]], [[0.0, 1.0]]])
    potentials = torch.tensor([[[0.0, 1.0]], [[0.0, 1.0]], [[0.0, 3.0]], [[0.0, 6.0]]])
    signals = Signals(potentials[-1], torch.tensor([1]), received, outputs=potentials)
    parts = SpikeKD(Repeats(), windows=2, alpha=3.0)(signals)
    assert parts["spike_kd"].item() == pytest.approx(3.0 * math.sqrt(0.4) / 2)
    assert parts["ce"].item() == pytest.approx(math.log(1 + math.exp(-6.0)), rel=1e-3)


def test_spike_kd_of_the_student_itself_is_zero_and_its_gradient_reaches_the_student():
    x = torch.rand(6, 3, 4)
    own = x.cumsum(0).requires_grad_()
    signals = Signals(own[-1], torch.tensor([0, 1, 2]), x, outputs=own)
    assert SpikeKD(Repeats(), windows=3)(signals)["spike_kd"].item() == pytest.approx(0, abs=1e-6)
    other = torch.rand(6, 3, 4).cumsum(0).requires_grad_()
    SpikeKD(Repeats(), windows=6)(Signals(other[-1], signals.labels, x, outputs=other))["spike_kd"].backward()
    assert (other.grad != 0).any(2).all()


def test_spike_kd_says_what_does_not_fit():
    with pytest.raises(ValueError, match="windows must be at least 1, got 0"):
        SpikeKD(Repeats(), windows=0)
    with pytest.raises(ValueError, match="alpha must be at least 0, got -1"):
        SpikeKD(Repeats(), alpha=-1)
    with pytest.raises(ValueError, match="must end in an IntegratorNode.*Linear has none"):
        SpikeKD(torch.nn.Linear(2, 2))
    x = torch.rand(2, 3, 4)
    with pytest.raises(ValueError, match="at least 4 steps"):
        SpikeKD(Repeats())(Signals(x[-1], torch.tensor([0, 1, 2]), x, outputs=x))
    wide, x = torch.rand(4, 3, 5), torch.rand(4, 3, 4)
    with pytest.raises(ValueError, match=r"\(4, 3, 5\) of the student, \(4, 3, 4\) of the teacher"):
        SpikeKD(Repeats())(Signals(wide[-1], torch.tensor([0, 1, 2]), x, outputs=wide))
