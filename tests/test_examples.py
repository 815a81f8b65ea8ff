"""The examples: other loops train as ours does, other libraries' networks fit in, command lines stay."""

import copy
import importlib
import runpy
import sys
from pathlib import Path

import pytest
import torch

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.data import images as data
from lasnn_sj.experiments import runs
from lasnn_sj.neurons import accelerate

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """Imports an example by name, as one that is run finds its neighbours."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module


@pytest.fixture
def ingredients(example):
    """Student, teacher, encoder, and two batches of digits in a fixed order."""
    torch.manual_seed(0)
    student = accelerate(example("your_own_model").spiking_net(10))
    teacher = models.teacher_resnet20(10, 1, 0.25).eval()
    loader, _ = data.load("digits").loaders(16)
    batches = [batch for batch, _ in zip(loader, range(2))]  # more, and a spike that rounding moves is seen
    return student, teacher, DirectEncoder(T=3), batches


def trained_by_us(student, teacher, encoder, batches):
    """Weights that LaSNNTrainer gives from the same start, and its mean attention loss."""
    student = copy.deepcopy(student)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    trainer = LaSNNTrainer(student, copy.deepcopy(teacher), encoder=encoder, optimizer=optimizer)
    (row,) = trainer.fit(batches, epochs=1)
    return student.state_dict(), row["attention"] / 0.45


def assert_same(student, wanted, before):
    moved = 0.0
    for name, value in student.state_dict().items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
        moved = max(moved, (value - before[name]).abs().max().item())
    assert moved > 1e-3


def test_the_bare_loop_trains_as_the_trainer_does(example, ingredients):
    student, _, _, _ = ingredients
    wanted, attention = trained_by_us(*ingredients)
    before = copy.deepcopy(student.state_dict())
    history = example("bare_loop").distil(*ingredients, epochs=1)
    assert history == [pytest.approx(attention, rel=1e-3)]
    assert_same(student, wanted, before)


@pytest.mark.filterwarnings("ignore")  # Lightning's advice about loaders and loggers
def test_the_lightning_module_trains_as_the_trainer_does(example, ingredients):
    lightning = pytest.importorskip("lightning")
    student, teacher, encoder, batches = ingredients
    wanted, attention = trained_by_us(*ingredients)
    before, of_teacher = (copy.deepcopy(net.state_dict()) for net in (student, teacher))
    module = example("lightning_module").Distillation(student, teacher, encoder, batches[0][0][:2])
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    first = torch.utils.data.DataLoader(batches[:1], batch_size=None)  # a list would be several loaders
    trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None), first)
    assert_same(student, wanted, before)
    assert trainer.callback_metrics["attention"] / 0.45 == pytest.approx(attention, rel=1e-3)
    assert 0 <= trainer.callback_metrics["top1"] <= 100
    assert all(torch.equal(value, of_teacher[name]) for name, value in teacher.state_dict().items())


def test_the_bare_loop_runs(example, capsys):
    top1, history = example("bare_loop").main(epochs=2, images=400)
    assert top1 > 50
    assert history[1] < history[0]
    assert "student" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_the_lightning_module_runs(example):
    pytest.importorskip("lightning")
    logged = example("lightning_module").main(epochs=1, images=200)
    assert set(logged) == {"ce", "attention", "top1"}


def test_models_of_timm_and_spikingjelly_and_torchvision_transforms(example):
    pytest.importorskip("timm")
    zoos = example("model_zoos")
    train, _ = zoos.loaders(64)
    (first, labels), (again, _) = (next(iter(train)) for _ in range(2))
    assert first.shape == (32, 1, 28, 28)
    assert (first.amin() >= -1.001, first.amax() <= 1.001) == (True, True)
    assert not torch.equal(first, again)  # drawn anew
    teacher, student = zoos.main(epochs=1, images=200)
    assert 0 <= student <= 100
    assert teacher > 10


@pytest.mark.parametrize(("line", "wanted"), [
    ("lasnn_cifar10.py laptop --seeds 0 1 2 --teacher-checkpoint resnet20-12fca82f.th",
     {"seeds": (0, 1, 2), "teacher_checkpoint": Path("resnet20-12fca82f.th"), "train_images": 5000}),
    ("lasnn_cifar10.py paper --recipe.student vgg9 --device cuda", {"device": "cuda", "train_images": None}),
    ("sparse_kd_cifar100.py laptop", {"classes": 10, "per_class": 500, "shrink": 2, "seeds": (0, 1, 2)}),
    ("sparse_kd_cifar100.py paper --recipe.student spiking_wrn16_4 --device cuda",
     {"classes": None, "T": 4, "run_dir": Path("runs/sparse_kd_cifar100")}),
    ("default_kd_cifar100.py laptop --seeds 0 1 2",
     {"classes": 10, "run_dir": Path("runs/default_kd_cifar100/spiking_wrn16_4")}),
])  # fmt: skip
def test_command_lines_of_the_tables(line, wanted, monkeypatch):
    seen = []
    for kind in runs.methods().values():
        monkeypatch.setattr(kind, "run", lambda self: seen.append(self))
    name, *args = line.split()
    monkeypatch.setattr(sys, "argv", [name, *args])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert {key: getattr(seen[-1], key) for key in wanted} == wanted
    if "--recipe.student" in args:
        assert seen[-1].recipe.student == args[args.index("--recipe.student") + 1]


def test_the_quickstart_s_sentence_is_computed(example):
    quickstart = example("quickstart")
    rows = (quickstart.START, *quickstart.COMPARISON.rows)  # hybrid, label KD, LaSNN, both
    tops = dict(zip(rows, ((50, 60), (80, 90), (92, 93), (83, 88), (94, 96))))
    results = {row: {s: {"top1": v, "samples": 360} for s, v in enumerate(tops[row])} for row in rows}
    said = quickstart.sentence(results)
    assert said.startswith("On 360 test images, training raises the converted SNN from 55.0 % to 95.0 %")
    assert "LaSNN is 0.50 points above hybrid (cross-entropy) (above on 1 of 2 seeds)" in said
    assert "LaSNN + label KD is 2.50 points above label KD (above on 2 of 2 seeds)" in said
    results[quickstart.LASNN] = {s: {"top1": 70.0, "samples": 360} for s in (0, 1)}
    assert "LaSNN is 15.00 points below hybrid" in quickstart.sentence(results)
    shown = quickstart.table({"teacher": [97.0], "LaSNN, T = 2": [90.0, 92.0]})
    assert "| LaSNN, T = 2 | 91.00 ± 1.41 |" in shown
