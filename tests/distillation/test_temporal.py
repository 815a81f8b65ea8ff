"""Losses on the logits of every step against numbers worked out by hand."""

import math

import pytest
import torch
from spikingjelly.activation_based import functional
from torch import nn
from torch.autograd import gradcheck

from lasnn_sj import DirectEncoder, models
from lasnn_sj.distillation import (
    TET,
    TKS,
    TPD,
    EntropyRegularization,
    LabelKD,
    Look,
    PerStepCE,
    SeAlKD,
    Signals,
    Synergy,
    TemporalKD,
    parse_objective,
    step_logits,
)
from lasnn_sj.training.trainer import Trainer

L3 = math.log(3)
# Two steps, one sample, two classes: 3 : 1 for class 0, then even. The label is 0.
Z = torch.tensor([[[L3, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
LABEL = torch.tensor([0])
CE = (math.log(4 / 3) + math.log(2)) / 2
ALL = [PerStepCE(), TET(), TemporalKD(), TemporalKD(ensemble="correct"), TKS(), TPD(), Synergy(),
       Synergy("W2S"), SeAlKD(), EntropyRegularization()]  # fmt: skip


def signals(z=Z, labels=LABEL, teacher=None, **more):
    return Signals(z.mean(0), labels, outputs=z, teacher_logits=teacher, **more)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q) if a)


def softmax(z, tau=1.0):
    e = [math.exp(x / tau) for x in z]
    return [x / sum(e) for x in e]


def values(parts):
    return {name: part.item() for name, part in parts.items()}


def test_step_logits_of_an_integrator_are_its_increments_times_T():
    received = torch.tensor([[[1.0, 2.0]], [[0.0, -1.0]], [[3.0, 0.5]]])
    found = step_logits(Signals(received.sum(0), LABEL, outputs=received.cumsum(0), accumulated=True))
    assert found.tolist() == [[[3, 6]], [[0, -3]], [[9, 1.5]]]
    assert found.mean(0).tolist() == received.sum(0).tolist()  # the class scores
    assert step_logits(signals(received)).equal(received)


def test_per_step_ce_by_hand():
    assert values(PerStepCE()(signals())) == pytest.approx({"ce": CE}, rel=1e-14)


def test_tet_by_hand():
    """Distances to 1 of log 3, 0, 0, 0."""
    found = values(TET(weight=0.25)(signals()))
    assert found == pytest.approx({"ce": 0.75 * CE, "level": 0.25 * ((L3 - 1) ** 2 + 3) / 4}, rel=1e-12)


def test_temporal_kd_by_hand():
    """The teacher has 1 : 3, the ensemble sqrt(3) : 1."""
    teacher = torch.tensor([[0.0, L3]], dtype=torch.float64)
    parts = TemporalKD(alpha=0.5, beta=2.0, temperature=1.0)(signals(teacher=teacher))
    kd = (kl((1 / 4, 3 / 4), (3 / 4, 1 / 4)) + kl((1 / 4, 3 / 4), (1 / 2, 1 / 2))) / 2
    e = (math.sqrt(3) / (1 + math.sqrt(3)), 1 / (1 + math.sqrt(3)))
    own = (kl(e, (3 / 4, 1 / 4)) + kl(e, (1 / 2, 1 / 2))) / 2
    assert values(parts) == pytest.approx({"ce": CE, "kd": 0.5 * kd, "ensemble": 2 * own}, rel=1e-12)


def test_temporal_kd_softens_and_multiplies_by_the_square():
    teacher = torch.tensor([[0.0, 2 * L3]], dtype=torch.float64)
    parts = TemporalKD(alpha=1.0, beta=0.0, temperature=2.0)(signals(2 * Z, teacher=teacher))
    kd = (kl((1 / 4, 3 / 4), (3 / 4, 1 / 4)) + kl((1 / 4, 3 / 4), (1 / 2, 1 / 2))) / 2
    assert parts["kd"].item() == pytest.approx(4 * kd, rel=1e-12)
    assert "ensemble" not in parts


def test_the_ensemble_of_correct_steps_and_a_sample_without_one():
    z = torch.tensor([[[L3, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 2.0]]], dtype=torch.float64)
    objective = TemporalKD(alpha=0.0, beta=1.0, temperature=1.0, ensemble="correct")
    assert not objective.needs_teacher
    part = objective(signals(z, torch.tensor([0, 0])))["ensemble"]
    target = (3 / 4, 1 / 4)  # of the first sample: its first step; the second sample has none
    expected = (kl(target, target) + kl(target, softmax([0, 1]))) / 2 / 2
    assert part.item() == pytest.approx(expected, rel=1e-12)


def test_tks_by_hand():
    """The first step of two is correct; its 3 : 1 is the target of both. Half the weight in epoch 1 of 2."""
    z = torch.tensor([[[L3, 0.0]], [[0.0, L3]]], dtype=torch.float64)
    parts = TKS(alpha=0.8, temperature=1.0)(signals(z, epoch=1, epochs=2))
    soft = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    other = -(3 / 4 * math.log(1 / 4) + 1 / 4 * math.log(3 / 4))
    assert values(parts) == pytest.approx({"ce": 0.6 * math.log(2), "tks": 0.4 * (soft + other) / 2})
    assert TKS()(signals(z, epoch=0, epochs=2))["tks"].item() == 0


def test_tpd_by_hand():
    """Prefixes: 3 : 1, then sqrt(3) : 1, which is the target."""
    e = math.sqrt(3) / (1 + math.sqrt(3))
    expected = -(e * math.log(3 / 4) + (1 - e) * math.log(1 / 4))
    assert TPD(0.3)(signals())["tpd"].item() == pytest.approx(0.3 * expected, rel=1e-12)


def test_synergy_by_hand():
    strong, weak = (3 / 4, 1 / 4), (1 / 2, 1 / 2)
    assert Synergy(temperature=1.0)(signals())["synergy"].item() == pytest.approx(kl(strong, weak))
    swapped = Synergy("W2S", alpha=3.0, temperature=1.0)(signals())
    assert swapped["synergy"].item() == pytest.approx(3 * kl(weak, strong))


def test_seal_kd_by_hand():
    """Step 1 is wrong: its class 1 gets the label's logit, the teacher's classes 0 and 1 the smaller one."""
    z = torch.tensor([[[0.0, 2.0, -1.0]], [[1.0, 0.0, 0.5]]], dtype=torch.float64)
    teacher = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64)
    parts = SeAlKD(alpha=1.0, beta=1.0, temperature=2.0)(signals(z, teacher=teacher))
    first = kl(softmax([1, 1, 0], 2), softmax([0, 0, -1], 2))
    second = kl(softmax([3, 1, 0], 2), softmax([1, 0, 0.5], 2))
    assert parts["kd"].item() == pytest.approx(4 * (first + second) / 2, rel=1e-12)
    # of two steps each has the other alone for its mixture
    one, two = softmax([0, 2, -1], 2), softmax([1, 0, 0.5], 2)
    assert parts["temporal"].item() == pytest.approx(4 * (kl(two, one) + kl(one, two)) / 2, rel=1e-12)


def test_seal_kd_mixes_by_confidence_and_similarity():
    """Step 1 is equally similar to 2 and 3; with no confidence in 3, w = softmax(c * cos, 0)."""
    z = torch.tensor([[[2.0, 0.0]], [[2.0, 0.0]], [[1.0, 1.0]]], dtype=torch.float64)
    p = softmax([2, 0])
    c = 1 + sum(x * math.log(x) for x in p) / math.log(2)
    w = math.exp(c) / (math.exp(c) + 1)
    mixed = SeAlKD._mixed(z)[0, 0].tolist()
    assert mixed == pytest.approx([w * 2 + (1 - w), 1 - w], rel=1e-12)


def test_entropy_by_hand():
    entropy = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    part = EntropyRegularization(0.1)(signals())["entropy"].item()
    assert part == pytest.approx(-0.1 * (entropy + math.log(2)) / 2, rel=1e-12)


def test_gradients_of_losses_whose_targets_are_constants_of_the_student():
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    labels, teacher = torch.tensor([1, 3]), torch.randn(2, 4, dtype=torch.float64)
    for objective in (PerStepCE(), TET(0.5), TemporalKD(beta=0.0), SeAlKD(beta=0.0), EntropyRegularization()):

        def loss(z, objective=objective):
            return sum(objective(signals(z, labels, teacher)).values())

        assert gradcheck(loss, z)


@pytest.mark.parametrize("objective", [TemporalKD(alpha=0.0), TPD(1.0), Synergy(), TKS(1.0)], ids=str)
def test_targets_made_of_the_student_carry_no_gradient(objective):
    """The gradient of KL(t, softmax(z)) or H(t, softmax(z)) sums to 0 over classes, as does that of CE."""
    torch.manual_seed(0)
    z = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    sum(objective(signals(z, torch.tensor([1, 3]), epoch=1)).values()).backward()
    assert z.grad.abs().sum() > 0
    torch.testing.assert_close(z.grad.sum(2), torch.zeros(3, 2, dtype=torch.float64), rtol=0, atol=1e-15)


def test_the_last_prefix_and_the_strong_step_are_not_pulled():
    z = Z.clone().requires_grad_()
    Synergy()(signals(z))["synergy"].backward()
    assert z.grad[0].abs().sum() == 0
    assert z.grad[1].abs().sum() > 0


def look(outputs, teacher=None):
    return Look(nn.Identity(), teacher, outputs, outputs, outputs, num_classes=outputs.shape[-1])


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_a_student_without_steps_is_refused(objective):
    name = type(objective).__name__
    with pytest.raises(ValueError, match=rf"{name} needs a student .*\[T, N, K\], got \(2, 4\)"):
        objective.prepare(look(torch.zeros(2, 4)))


@pytest.mark.parametrize("objective", [TPD(), Synergy(), SeAlKD()], ids=str)
def test_one_step_is_too_few(objective):
    with pytest.raises(ValueError, match="needs T of at least 2, got T = 1"):
        objective.prepare(look(torch.zeros(1, 2, 4)))


@pytest.mark.parametrize("objective", [TemporalKD(), SeAlKD()], ids=str)
def test_teachers_that_do_not_fit(objective):
    assert objective.prepare(look(Z)).teacher_logits
    with pytest.raises(ValueError, match="needs the logits of a teacher"):
        objective(signals())
    with pytest.raises(ValueError, match=r"\(1, 3\) of the teacher and \(1, 2\) of the student"):
        objective(signals(teacher=torch.zeros(1, 3)))
    with pytest.raises(ValueError, match=rf"{type(objective).__name__}.* needs a teacher; give one"):
        Trainer(nn.Linear(2, 2), objective)


@pytest.mark.parametrize(("make", "said"), [
    (lambda: TemporalKD(alpha=-1), "alpha must be a finite number, at least 0, got -1"),
    (lambda: TemporalKD(beta="1"), "beta must be a finite number"),
    (lambda: TemporalKD(temperature=0), "temperature must be a number above 0, got 0"),
    (lambda: TemporalKD(ensemble="best"), 'ensemble must be "all" or "correct", got \'best\''),
    (lambda: TKS(alpha=1.5), r"alpha must lie in \[0, 1\], got 1.5"),
    (lambda: TET(2), r"weight must lie in \[0, 1\], got 2"),
    (lambda: Synergy("up"), 'direction must be "S2W" or "W2S", got \'up\''),
    (lambda: EntropyRegularization(float("nan")), "weight must be a finite number"),
])  # fmt: skip
def test_arguments_out_of_range(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("objective", ALL, ids=str)
def test_texts_give_the_objectives_back(objective):
    assert parse_objective(repr(objective)) == objective


@pytest.mark.parametrize("readout", ["last", "mean"])
def test_the_trainer_says_whether_outputs_add_up(readout):
    """Per-step parts of the trainer are those of the increments where the last step is read."""
    torch.manual_seed(0)
    student = models.conv3_linear2(4, in_channels=1, image_size=8, width=0.05, dropout=0.0)
    trainer = Trainer(student, PerStepCE() + TPD(), encoder=DirectEncoder(4), readout=readout)
    images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 4
    trainer.prepare(images, labels)
    student.eval()
    with torch.no_grad():
        outputs = student(DirectEncoder(4)(images))
    functional.reset_net(student)
    student.train()
    result = trainer.train_step(images, labels)
    expected = PerStepCE()(Signals(outputs[-1], labels, outputs=outputs, accumulated=readout == "last"))
    torch.testing.assert_close(result.parts["ce"], expected["ce"])


def test_parts_of_two_methods_with_one_name_are_refused():
    teacher = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="two objectives .* give a part named 'ce'"):
        (LabelKD() + PerStepCE())(signals(teacher=teacher))
