"""Objectives of reverse distillation: numbers by hand, limits, the published formula, and training."""

import copy
import math
import runpy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.autograd import gradcheck
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import DirectEncoder, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.conversion.pruning import prune_magnitude, sparsity
from lasnn_sj.data.images import Loaders
from lasnn_sj.distillation import DefaultKD, LabelKD, Signals, SparseKD, default_kd, sparse_kd
from lasnn_sj.experiments import reverse

K = 4


def logits(n=6, k=5, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    z = scale * torch.randn(2, n, k, generator=generator, dtype=torch.float64)
    return z[0], z[1], torch.arange(n) % k


# Two classes. With student logits [0, 0] at any tau the student says 1/2, 1/2; teacher logits
# [tau * log 3, 0] say 3/4, 1/4 at tau; so KL = 3/4 log(3/2) + 1/4 log(1/2), and CE = log 2.
KL = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_sparse_kd_by_hand(tau, alpha):
    student, teacher = torch.zeros(1, 2), torch.tensor([[tau * math.log(3), 0.0]])
    loss = sparse_kd(student, teacher, torch.tensor([0]), tau, alpha)
    assert loss.item() == pytest.approx(alpha * tau**2 * KL + (1 - alpha) * math.log(2), rel=1e-6)


def test_sparse_kd_is_a_mean_over_the_batch_and_a_sum_over_the_classes():
    student, teacher = torch.zeros(2, 2), torch.tensor([[math.log(3), 0.0], [0.0, 0.0]])
    assert sparse_kd(student, teacher, torch.tensor([0, 1]), 1, 1).item() == pytest.approx(KL / 2, rel=1e-6)


def test_sparse_kd_as_a_mean_over_the_classes():
    student, teacher = torch.zeros(1, 2), torch.tensor([[math.log(3), 0.0]])
    loss = sparse_kd(student, teacher, torch.tensor([0]), 1, 0.5, reduction="mean")
    assert loss.item() == pytest.approx(0.5 * KL / 2 + 0.5 * math.log(2), rel=1e-6)
    with pytest.raises(ValueError, match='reduction must be "sum" or "mean", got \'none\''):
        SparseKD(nn.Identity(), reduction="none")


def test_the_teacher_comes_first_in_the_divergence():
    """KL(p || q) of p = (3/4, 1/4) and q = (1/4, 3/4) with other numbers than KL(q || p): three classes."""
    p, q = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.3, 0.3, 0.4]])
    expected = sum(a * math.log(a / b) for a, b in zip(p[0].tolist(), q[0].tolist()))
    assert sparse_kd(q.log(), p.log(), torch.tensor([0]), 1, 1).item() == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(sum(b * math.log(b / a) for a, b in zip(p[0].tolist(), q[0].tolist())))


def test_default_kd_by_hand():
    """K = 3, p = 0.9 and 0.05 twice; tau = 1; a student of equal logits: q = softmax(p)."""
    e, f = math.exp(0.9), math.exp(0.05)
    q = [f / (e + 2 * f), e / (e + 2 * f), f / (e + 2 * f)]
    divergence = sum(x * math.log(3 * x) for x in q)
    loss = default_kd(torch.zeros(1, 3), torch.tensor([1]), 0.9, 1.0, 0.4)
    assert loss.item() == pytest.approx(0.4 * divergence + 0.6 * math.log(3), rel=1e-6)


def test_default_kd_softened_in_the_logarithm_by_hand():
    """softmax(log p / 2) goes as the root: 0.81 and 0.01 twice to 0.9 : 0.1 : 0.1."""
    p = 0.81 / 0.83
    q = [0.9 / 1.1, 0.1 / 1.1, 0.1 / 1.1]
    divergence = sum(x * math.log(3 * x) for x in q)
    loss = default_kd(torch.zeros(1, 3), torch.tensor([0]), p, 2.0, 1.0, soften="log")
    assert loss.item() == pytest.approx(divergence, rel=1e-5)


def yuan_et_al(outputs, labels, probability, temperature, alpha):
    """Written after the published description of teacher-free KD with a virtual teacher."""
    classes = outputs.size(1)
    virtual = torch.empty_like(outputs)
    for i in range(outputs.size(0)):
        for k in range(classes):
            virtual[i, k] = probability if k == labels[i] else (1 - probability) / (classes - 1)
    q = (virtual / temperature).exp() / (virtual / temperature).exp().sum(1, keepdim=True)
    p = outputs.exp() / outputs.exp().sum(1, keepdim=True)
    divergence = (q * (q / p).log()).sum(1).mean()
    cross_entropy = -p[torch.arange(len(labels)), labels].log().mean()
    return (1 - alpha) * cross_entropy + alpha * divergence


@pytest.mark.parametrize(("probability", "tau", "alpha"), [(0.99, 20, 0.1), (0.95, 40, 0.9), (0.5, 1, 0.5)])
def test_default_kd_is_the_published_formula(probability, tau, alpha):
    student, _, labels = logits()
    expected = yuan_et_al(student, labels, probability, tau, alpha)
    torch.testing.assert_close(default_kd(student, labels, probability, tau, alpha), expected)


def test_the_student_is_not_softened_and_there_is_no_tau_squared():
    """At tau far above 1 the tau^2 form would grow with tau, this one tends to a constant."""
    student, _, labels = logits()
    losses = [default_kd(student, labels, 0.99, tau, 1.0).item() for tau in (1e3, 1e6)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_alpha_0_is_cross_entropy():
    student, teacher, labels = logits()
    expected = F.cross_entropy(student, labels)
    torch.testing.assert_close(sparse_kd(student, teacher, labels, 4, 0), expected)
    for soften in ("probability", "log"):
        torch.testing.assert_close(default_kd(student, labels, 0.99, 20, 0, soften), expected)


@pytest.mark.parametrize("alpha", [0.1, 0.7])
@pytest.mark.parametrize("soften", ["probability", "log"])
def test_a_uniform_teacher_is_label_smoothing(alpha, soften):
    """tau to infinity: KL(u || q) is the smoothed part of the cross-entropy less the entropy log K."""
    student, _, labels = logits()
    smoothed = F.cross_entropy(student, labels, label_smoothing=alpha) - alpha * math.log(5)
    loss = default_kd(student, labels, 0.99, 1e9, alpha, soften)
    torch.testing.assert_close(loss, smoothed, rtol=1e-6, atol=1e-6)


def test_a_certain_teacher_is_cross_entropy_in_the_logarithm():
    student, _, labels = logits()
    loss = default_kd(student, labels, 1.0, 20, 0.6, soften="log")
    torch.testing.assert_close(loss, F.cross_entropy(student, labels))


def test_equal_logits_have_no_divergence():
    student, _, labels = logits()
    loss = sparse_kd(student, student, labels, 4, 1.0)
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)


def test_tau_squared_keeps_the_gradient_at_a_high_temperature():
    """Hinton et al.: as tau grows the gradient tends to (z - v) / (N K), for logits of zero mean."""
    student, teacher, labels = logits()
    student, teacher = (z - z.mean(1, keepdim=True) for z in (student, teacher))
    student.requires_grad_()
    sparse_kd(student, teacher, labels, 1e4, 1.0).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 30, rtol=1e-2, atol=1e-4)


def test_gradients():
    student, teacher, labels = logits()
    student.requires_grad_()
    assert gradcheck(lambda z: sparse_kd(z, teacher, labels, 3, 0.4), student)
    assert gradcheck(lambda z: default_kd(z, labels, 0.9, 3, 0.4), student)
    teacher.requires_grad_()
    sparse_kd(student, teacher, labels, 3, 0.4).backward()
    assert teacher.grad is None


def test_extreme_logits_stay_finite():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    teacher, labels = torch.tensor([[-1e4, 1e4, 0.0]]), torch.tensor([2])
    for loss in (
        sparse_kd(student, teacher, labels, 1, 0.5),
        default_kd(student, labels, 1.0, 1, 0.5, "log"),
    ):
        loss.backward()
        assert loss.isfinite()
        assert student.grad.isfinite().all()


@pytest.mark.parametrize(("call", "message"), [
    (lambda s, t, y: default_kd(s, y, 0.2, 20, 0.1), r"probability must be above 1 / K = 0.2 .* got 0.2"),
    (lambda s, t, y: default_kd(s, y, 1.01, 20, 0.1), "probability must be above 1 / K .* got 1.01"),
    (lambda s, t, y: default_kd(s, y, float("nan"), 20, 0.1), "probability must be above"),
    (lambda s, t, y: default_kd(s, y, 0.9, 20, 0.1, "logit"), 'soften must be "probability" or "log"'),
    (lambda s, t, y: default_kd(s, y, 0.9, 0, 0.1), "temperature must be a number above 0, got 0"),
    (lambda s, t, y: sparse_kd(s, t, y, -1, 0.1), "temperature must be a number above 0, got -1"),
    (lambda s, t, y: sparse_kd(s, t, y, 4, 1.1), r"alpha must lie in \[0, 1\], got 1.1"),
    (lambda s, t, y: sparse_kd(s, t[:, :4], y, 4, 0.1), r"logits \(6, 5\) of the student and \(6, 4\)"),
    (lambda s, t, y: SparseKD(nn.Identity(), alpha=-0.1), r"alpha must lie in \[0, 1\], got -0.1"),
    (lambda s, t, y: LabelKD(temperature=float("inf")), "temperature must be a number above 0"),
    (lambda s, t, y: DefaultKD(probability=0.0), "probability must be above 1 / K"),
    (lambda s, t, y: DefaultKD(probability=0.2)(Signals(s, y)), "probability must be above 1 / K = 0.2"),
    (lambda s, t, y: DefaultKD(soften="none"), "soften must be"),
])  # fmt: skip
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(*logits())


def test_defaults():
    assert DefaultKD() == DefaultKD(probability=0.99, temperature=20, alpha=0.1, soften="probability")
    assert [kind.needs_teacher for kind in (SparseKD, DefaultKD, LabelKD)] == [False, False, True]


def data(n=32, seed=0):
    """Images whose brightest quarter is their label."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator) * 0.4 - 0.2
    y = torch.arange(n) % K
    for image, label in zip(x, y):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.8
    return x, y


def loader(n=32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(TensorDataset(*data(n, seed)), 8, shuffle=True, generator=generator)


def student(seed=0, in_channels=1):
    torch.manual_seed(seed)
    net = nn.Sequential(
        layer.Conv2d(in_channels, 8, 3, padding=1), layer.BatchNorm2d(8), spikes(), layer.MaxPool2d(2),
        layer.Conv2d(8, 8, 3, padding=1), layer.BatchNorm2d(8), spikes(),
        layer.Flatten(), layer.Linear(128, K),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def spikes():
    return neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)


def trainer_for(net, teacher=None, attention=None, run_dir=None, **arguments):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    return LaSNNTrainer(
        net, teacher, encoder=DirectEncoder(2), attention=attention, optimizer=optimizer, seed=0,
        run_dir=run_dir, **arguments,
    )  # fmt: skip


def test_sparse_kd_teaches_with_the_pruned_teachers_mean_output():
    net, teacher = student(), prune_magnitude(student(1), 0.5)
    teacher.eval()
    x, y = data(8)
    encoded = DirectEncoder(2)(x)
    with torch.no_grad():
        v = teacher(encoded).mean(0)
        net.train()
        z = copy.deepcopy(net)(encoded).mean(0)
    functional.reset_net(teacher)
    parts = trainer_for(net, objective=SparseKD(teacher, 3.0, 0.7)).train_step(x, y).parts
    torch.testing.assert_close(sum(parts.values()), sparse_kd(z, v, y, 3.0, 0.7))
    torch.testing.assert_close(parts["ce"], 0.3 * F.cross_entropy(z, y))


def test_the_teacher_of_sparse_kd_is_frozen_in_evaluation_and_stateless():
    teacher = prune_magnitude(student(1), 0.3).train()
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    trainer_for(student(), objective=SparseKD(teacher)).fit(loader(), epochs=2)
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in teacher.state_dict().items())
    objective, x = SparseKD(teacher), DirectEncoder(2)(data(8)[0])
    assert torch.equal(objective.teacher_logits(x, 8), objective.teacher_logits(x, 8))


def test_a_ratio_of_0_is_self_distillation():
    """Step for step what the unpruned teacher gives, and what label KD from it gives."""
    trained = student(1)
    trainer_for(trained).fit(loader(), epochs=1)

    class Unfolded(nn.Module):
        """The spiking teacher behind images, as a trainer's teacher sees them."""

        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            functional.reset_net(self.net)
            return self.net(DirectEncoder(2)(images)).mean(0)

    histories = [
        trainer_for(student(), objective=SparseKD(prune_magnitude(copy.deepcopy(trained), 0.0))),
        trainer_for(student(), objective=SparseKD(copy.deepcopy(trained))),
        trainer_for(student(), Unfolded(copy.deepcopy(trained)).eval(), objective=LabelKD()),
    ]
    losses = [[row["loss"] for row in trainer.fit(loader(), epochs=2)] for trainer in histories]
    assert losses[0] == losses[1]
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("objective", [
    DefaultKD(), LabelKD(), SparseKD(prune_magnitude(student(1), 0.3)),
], ids=lambda objective: type(objective).__name__)  # fmt: skip
@pytest.mark.parametrize("attention", [None, "activation"])
def test_one_trainer_trains_with_any_objective_alone_or_with_attention(objective, attention, tmp_path):
    torch.manual_seed(3)
    needed = attention is not None or objective.needs_teacher
    teacher = models.teacher_resnet20(K, in_channels=1, width=0.25).eval() if needed else None
    trainer = trainer_for(student(), teacher, attention, tmp_path, objective=objective)
    history = trainer.fit(loader(64), epochs=6)
    names = ["ce", "kd", *(["attention"] if attention else [])]
    assert list(history[0])[2 : 2 + len(names)] == names
    assert history[0]["loss"] == pytest.approx(sum(history[0][name] for name in names), rel=1e-5)
    assert trainer.evaluate(loader(32, seed=1))["top1"] > 40  # chance: 25, and the teachers are not trained


def test_label_kd_needs_a_teacher_and_sparse_kd_takes_none():
    with pytest.raises(ValueError, match=r"objective LabelKD\(\) needs a teacher"):
        LaSNNTrainer(student(), objective=LabelKD())
    with pytest.raises(ValueError, match=r"objective DefaultKD\(\) makes no use of the teacher"):
        LaSNNTrainer(student(), nn.Identity(), objective=DefaultKD())


@pytest.mark.parametrize("n", [4, 3])
def test_batches_that_have_their_time_axis_already(n):
    """[T, N, C, H, W] with T = N too; a NaN is named by its sample, not its step."""
    net = student(in_channels=2)
    frames, labels = torch.rand(4, n, 2, 8, 8), torch.arange(n) % K
    trainer = LaSNNTrainer(net, objective=DefaultKD())
    assert len(trainer.fit([(frames, labels)], epochs=1)) == 1
    frames[3, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity, in samples \[1\]"):
        trainer.fit([(frames, labels)], epochs=2)


class Pictures(Loaders):
    name, num_classes, in_channels, image_size = "quarters", K, 1, 8
    train = TensorDataset(*data(24))
    test = TensorDataset(*data(16, seed=1))
    validation = TensorDataset(*data(10, seed=2))


RECIPE = reverse.ReverseRecipe(width=0.05, epochs=2, batch=12, ratios=(0.0, 0.5))


def test_a_study_has_all_rows_and_skips_those_it_has(tmp_path, monkeypatch):
    study = reverse.ReversePipeline(RECIPE, Pictures(), tmp_path, DirectEncoder(2))
    results = study.run()
    assert list(results) == ["alone", "sparse 0", "sparse 0.5", "default"]
    assert results["sparse 0"]["teacher_top1"] == results["alone"]["top1"]
    assert all(result["samples"] == 16 for result in results.values())  # the test images, not the 10
    assert "val_top1" in (tmp_path / "alone" / "metrics.csv").read_text()
    assert sparsity(study.student("sparse 0.5")).zeros == 0  # the teacher is pruned, the student is not
    monkeypatch.setattr(reverse, "Trainer", None)
    again = reverse.ReversePipeline(RECIPE, Pictures(), tmp_path, DirectEncoder(2))
    assert again.run() == results


def test_a_row_that_was_cut_off_goes_on_to_the_same_result(tmp_path, monkeypatch):
    whole = reverse.ReversePipeline(RECIPE, Pictures(), tmp_path / "whole", DirectEncoder(2)).run()

    class Cut(reverse.Trainer):
        def fit(self, train_loader, val_loader=None, epochs=100, validate_every=1):
            super().fit(train_loader, val_loader, epochs=1)
            raise KeyboardInterrupt

    for _ in range(4):  # each row is cut once
        cut = reverse.ReversePipeline(RECIPE, Pictures(), tmp_path / "cut", DirectEncoder(2))
        monkeypatch.setattr(reverse, "Trainer", Cut)
        with pytest.raises(KeyboardInterrupt):
            cut.run()
    monkeypatch.undo()
    resumed = reverse.ReversePipeline(RECIPE, Pictures(), tmp_path / "cut", DirectEncoder(2)).run()
    for row, result in whole.items():
        assert resumed[row]["loss"] == result["loss"]
        files = [tmp_path / folder / row.replace(" ", "_") / "metrics.csv" for folder in ("whole", "cut")]
        assert [len(file.read_text().splitlines()) for file in files] == [3, 3]


def test_a_row_does_not_depend_on_the_rows_before_it(tmp_path):
    """An encoder's generator goes on from row to row; those that are there already do not draw from it."""

    def rows(folder, ratios):
        encoder = PoissonEncoder(2, torch.Generator().manual_seed(7))
        recipe = reverse.ReverseRecipe(width=0.05, epochs=1, batch=12, ratios=ratios, default=False)
        return reverse.ReversePipeline(recipe, Pictures(), tmp_path / folder, encoder).run()

    together = rows("one", (0.5,))
    assert rows("two", ())["alone"]["loss"] == together["alone"]["loss"]
    apart = rows("two", (0.5,))["sparse 0.5"]
    for name in ("loss", "teacher_top1"):
        assert apart[name] == together["sparse 0.5"][name]


def test_a_study_folder_of_another_recipe_is_refused(tmp_path):
    reverse.ReversePipeline(RECIPE, Pictures(), tmp_path)
    other = reverse.ReverseRecipe(width=0.05, epochs=2, batch=12, alpha=0.9)
    with pytest.raises(ValueError, match=r"other settings \(alpha: there 0.5, here 0.9\)"):
        reverse.ReversePipeline(other, Pictures(), tmp_path)
    more = reverse.ReverseRecipe(width=0.05, epochs=2, batch=12, ratios=(0.9,))
    reverse.ReversePipeline(more, Pictures(), tmp_path)  # more rows may be added


def test_the_table_by_hand(tmp_path):
    def results(alone, teacher, taught):
        return {
            "alone": {"top1": alone, "seconds": 1},
            "sparse 0.3": {"top1": taught, "teacher_top1": teacher, "seconds": 2},
        }

    runs = {0: results(50.0, 40.0, 52.0), 1: results(54.0, 44.0, 53.0)}
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in reverse.table(list(runs.values())).splitlines()
    ]
    assert lines[0] == [
        "",
        "teacher top-1 %",
        "student top-1 %, mean ± deviation of 2 seeds",
        "gain",
        "seconds",
    ]
    assert lines[2] == ["student alone", "", "52.00 ± 2.83", "", "1"]
    interval = "+0.50 ± 19.06"  # 12.706 * 2.1213 / sqrt(2)
    assert lines[3] == ["sparse-KD, pruned 0.3", "42.00 ± 2.83", "52.50 ± 0.71", interval, "2"]
    assert reverse.title("sparse 0") == "self-KD (teacher not pruned)"
    reverse.write_csv(tmp_path / "table.csv", runs)
    assert (tmp_path / "table.csv").read_text().splitlines()[2] == "0,sparse 0.3,40.0,52.0,,,2"


@pytest.mark.parametrize(("name", "recipe", "T"), [
    ("sparse_kd_cifar100", ("sgd", 0.1, 5e-4, 128, 200), 4),
    ("default_kd_cifar100", ("sgd", 0.1, 5e-4, 128, 200), 4),
    ("reverse_kd_dvs_gesture", ("adam", 1e-3, 0.0, 16, 200), 16),
])  # fmt: skip
def test_the_examples_have_the_papers_settings(name, recipe, T):
    example = runpy.run_path(str(Path(__file__).parents[2] / "examples" / f"{name}.py"))
    run, laptop = example["PAPER"], example["LAPTOP"]
    r = run.recipe
    assert (r.optimizer, r.lr, r.weight_decay, r.batch, r.epochs) == recipe
    assert (r.width, getattr(run, "T", None) or run.framing.T) == (1.0, T)
    assert laptop.recipe.width < 1
    assert len(laptop.seeds) == 3
