"""Methods in a run: weights of their own are trained, saved and resumed; mistakes end in one sentence."""

import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lasnn_sj import Callback, DirectEncoder, models
from lasnn_sj.distillation import CrossEntropy, PerStepCE, TapError, parse_objective
from lasnn_sj.distillation.objective import own_parameters, trained_modules
from lasnn_sj.training.options import TrainingOptions
from lasnn_sj.training.trainer import Trainer


class Stop(BaseException):
    pass


class StopAt(Callback):
    def __init__(self, step, kill=False):
        self.at, self.kill = step, kill

    def on_step(self, trainer, parts):
        if trainer.step == self.at and self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if trainer.step == self.at:
            raise Stop


def run(folder, stop=None, objective="CrossEntropy() + KDSNN() + BKD(alpha=0.01)", kill=False):
    """Train two epochs of six steps, or up to a step."""
    torch.manual_seed(0)
    student = models.conv3_linear2(4, in_channels=1, image_size=8, width=0.05)
    net = models.teacher_resnet20(4, in_channels=1, width=0.125)
    trainer = Trainer(
        student, parse_objective(objective), teacher=net, encoder=DirectEncoder(2), run_dir=folder, seed=0,
        callbacks=[] if stop is None else [StopAt(stop, kill)], options=TrainingOptions(checkpoint_every=2),
    )  # fmt: skip
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(images, torch.arange(24) % 4)
    generator = torch.Generator().manual_seed(2)
    loader = torch.utils.data.DataLoader(data, 4, shuffle=True, generator=generator)
    try:
        trainer.fit(loader, epochs=2)
    except Stop:
        assert stop is not None
    own = [p.detach().clone() for p in own_parameters(trainer.objective)]
    return trainer, [*(p.detach().clone() for p in student.parameters()), *own]


def test_weights_of_a_method_are_trained_saved_and_taken_up_again(tmp_path):
    alone, expected = run(tmp_path / "alone")
    assert len(own_parameters(alone.objective)) == 7
    optimized = {id(p) for group in alone.optimizer.param_groups for p in group["params"]}
    assert all(id(p) in optimized for p in own_parameters(alone.objective))
    _, first = run(tmp_path / "first", stop=1)
    moved = [not torch.equal(a, b) for a, b in zip(first[-7:], expected[-7:])]
    assert all(moved)
    run(tmp_path / "killed", stop=3)
    run(tmp_path / "killed", stop=9)
    _, found = run(tmp_path / "killed")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    again, _ = run(tmp_path / "killed")  # has its epochs already
    assert again.epoch == 2
    assert not any(name.startswith(("adaptor", "first")) for name, _ in alone.student.named_parameters())


def test_a_scheduler_made_before_sets_the_learning_rate_of_a_methods_weights():
    torch.manual_seed(0)
    student = models.conv3_linear2(4, in_channels=1, image_size=8, width=0.05)
    adam = torch.optim.Adam(student.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.LambdaLR(adam, lambda epoch: 0.5**epoch)
    objective = parse_objective("CrossEntropy() + KDSNN()")
    teacher = models.teacher_resnet20(4, in_channels=1, width=0.125)
    trainer = Trainer(student, objective, teacher=teacher, encoder=DirectEncoder(2), optimizer=adam,
                      scheduler=scheduler)  # fmt: skip
    images = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    data = torch.utils.data.TensorDataset(images, torch.arange(4))
    trainer.fit(torch.utils.data.DataLoader(data, 4), epochs=1)
    before = [p.detach().clone() for p in own_parameters(objective)]
    trainer.fit(torch.utils.data.DataLoader(data, 4), epochs=2)
    assert not any(torch.equal(a, b) for a, b in zip(before, own_parameters(objective), strict=True))
    rates = {id(p): group["lr"] for group in adam.param_groups for p in group["params"]}
    assert {rates[id(p)] for p in (*student.parameters(), *own_parameters(objective))} == {0.0025}


def test_a_process_killed_within_an_epoch_ends_with_the_same_bytes(tmp_path):
    """SIGKILL at step 9 of twice 6, behind the checkpoint of step 8; then the same run in another process."""
    text = "CrossEntropy() + KDSNN() + BKD(alpha=0.01) + EnOF() + SASTC(batch_size=4)"
    own = bytes_of_weights(run(tmp_path / "alone", None, text)[0])
    killed = tmp_path / "killed"
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch\n"
        f"torch.set_num_threads(1); import test_methods_in_training as tests\n"
        f"tests.run({str(killed)!r}, 9, {text!r}, kill=True)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert sorted(path.name for path in (killed / "checkpoints").iterdir())[-1] == "00000008"
    assert bytes_of_weights(run(killed, None, text)[0]) == own
    last = "checkpoints/00000012/student.safetensors"
    assert (killed / last).read_bytes() == (tmp_path / "alone" / last).read_bytes()


def bytes_of_weights(trainer):
    """Of the objective, by name."""
    found = {
        f"{name}.{key}": tensor.numpy().tobytes()
        for name, module in trained_modules(trainer.objective)
        for key, tensor in module.state_dict().items()
    }
    assert sum(map(bool, found.values())) > 30  # those that are not empty
    return found


@pytest.mark.parametrize(
    "objective",
    [
        "RelationalKD() + DIST()",
        "SAMD(pair=('features.0', 'layer3'))",
        "StableSpike() + StableNoise() + EnOF()",
    ],
)
def test_the_others_train_too(objective):
    trainer, _ = run(None, objective=f"CrossEntropy() + {objective}")
    assert all(math.isfinite(v) for row in trainer.history for v in row.values())


def trainer_of(objective, teacher=None, student=None):
    torch.manual_seed(0)
    student = student or models.conv3_linear2(4, in_channels=1, image_size=8, width=0.05)
    return Trainer(student, objective, teacher=teacher, encoder=DirectEncoder(2))


def resnet20(num_classes=4):
    return models.teacher_resnet20(num_classes, in_channels=1, width=0.125).eval()


class Flat(nn.Module):
    """Without a feature map anywhere."""

    def __init__(self):
        super().__init__()
        self.hidden, self.fc = nn.Linear(64, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc(self.hidden(x.flatten(1)).relu())


ON_LOGITS = ["LabelKD()", "TemporalKD()", "SeAlKD()"] + [
    f"CrossEntropy() + {name}()" for name in ("DecoupledKD", "DIST", "NoiseSmoothedKD", "SASTC", "EnOF")
]
ON_FEATURES = ["KDSNN", "BKD", "RelationalKD", "SAMD"]
IMAGES = torch.rand(4, 1, 8, 8), torch.arange(4)


@pytest.mark.parametrize("text", [*ON_LOGITS, *(f"CrossEntropy() + {name}()" for name in ON_FEATURES)])
def test_a_method_without_its_teacher(text):
    with pytest.raises(ValueError, match=rf"{re.escape(text)} needs a teacher; give one"):
        trainer_of(parse_objective(text))


@pytest.mark.parametrize("text", ON_LOGITS)
def test_a_teacher_of_other_classes_for_logits(text):
    trainer = trainer_of(parse_objective(text), resnet20(7))
    with pytest.raises(ValueError, match=r"(\[N, 4\]|student's 4 classes).*(\(2, 7\)|'linear' \(7, 8\))"):
        trainer.train_step(*IMAGES)


@pytest.mark.parametrize("name", [*ON_FEATURES, "SASTC"])
def test_features_that_no_adaptor_can_match(name):
    """A teacher without a feature map."""
    trainer = trainer_of(CrossEntropy() + parse_objective(f"{name}()"), Flat())
    with pytest.raises(
        TapError, match=r"teacher Flat has no module with a feature map \[N, C, H, W\].*name the"
    ):
        trainer.train_step(*IMAGES)


@pytest.mark.parametrize("name", ON_FEATURES)
def test_an_adaptor_for_a_layer_that_is_not_there(name):
    text = f"{name}(pair=('features.0.neuron', 'layer9'))"
    trainer = trainer_of(CrossEntropy() + parse_objective(text), resnet20())
    with pytest.raises(TapError, match="teacher tap 'layer9' matches no module of .*; near: layer"):
        trainer.train_step(*IMAGES)


@pytest.mark.parametrize("name", ["EnOF", "StableNoise", "StableSpike"])
def test_a_layer_of_the_student_that_is_not_there(name):
    objective = parse_objective(f"{name}(layer='features.9')")
    trainer = trainer_of(CrossEntropy() + objective, resnet20() if objective.needs_teacher else None)
    with pytest.raises(TapError, match=r"student tap 'features\.9' matches no module of VGG"):
        trainer.train_step(*IMAGES)


def test_two_parts_of_one_name():
    trainer = trainer_of(PerStepCE() + CrossEntropy())
    with pytest.raises(
        ValueError, match=r"two objectives of PerStepCE\(\) \+ CrossEntropy\(\) give a part .*'ce'"
    ):
        trainer.train_step(*IMAGES)


@pytest.mark.parametrize(
    ("text", "taps"), [("CrossEntropy()", 0), ("LabelKD()", 0), ("LabelKD() + KDSNN()", 1)]
)
def test_layers_that_no_method_reads_are_not_tapped(text, taps):
    objective = parse_objective(text)
    trainer = trainer_of(objective, resnet20() if objective.needs_teacher else None)
    trainer.train_step(*IMAGES)
    for network in (trainer.student, trainer.teacher):
        modules = [] if network is None else list(network.modules())
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules) == taps * bool(modules)
    assert not any(getattr(module, "recorded", None) for module in trainer.student.modules())
