"""Training, evaluation, resuming, and what happens on bad input."""

import csv
import logging
import pydoc
import sys

import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback, DirectEncoder, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.distillation import (
    CrossEntropy,
    activation_map,
    attention_loss,
    gradient_map,
    spike_activation_map,
)
from lasnn_sj.distillation.taps import TapError
from lasnn_sj.models.readout import BatchError, class_scores
from lasnn_sj.training import TrainingOptions, evaluation
from lasnn_sj.training.checkpoint import CheckpointError
from lasnn_sj.training.evaluation import evaluate

K = 4


def images_and_labels(n=32, seed=0):
    """Images whose brightest quarter is their label: easy to learn."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(n, 1, 8, 8, generator=generator) * 0.4 - 0.2
    y = torch.arange(n) % K
    for image, label in zip(x, y):
        row, column = divmod(int(label), 2)
        image[0, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.8
    return x, y


def loader(n=32, batch_size=8, seed=0, **changes):
    x, y = images_and_labels(n, seed)
    tensors = {"x": x, "y": y} | changes
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        TensorDataset(tensors["x"], tensors["y"]), batch_size, shuffle=True, generator=generator
    )


def small_student(seed=0, **arguments):
    torch.manual_seed(seed)
    net = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.1, **arguments)
    for module in net.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.3
    return net


def small_teacher(seed=1):
    torch.manual_seed(seed)
    return models.teacher_resnet20(K, in_channels=1, width=0.25).eval()


def trainer_for(student, teacher, run_dir=None, **arguments):
    arguments = {"encoder": DirectEncoder(4), "seed": 0} | arguments
    optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
    return LaSNNTrainer(student, teacher, optimizer=optimizer, run_dir=run_dir, **arguments)


@pytest.mark.parametrize("attention", ["activation", "gradient"])
def test_a_student_learns(attention, tmp_path):
    student = small_student()
    trainer = trainer_for(student, small_teacher(), tmp_path, attention=attention)
    history = trainer.fit(loader(64), loader(32, seed=1), epochs=6)
    assert history[-1]["attention"] < history[0]["attention"]
    assert history[-1]["ce"] < 0.7 * history[0]["ce"]
    assert trainer.evaluate(loader(32, seed=1))["top1"] > 60  # chance: 25
    rows = list(csv.DictReader(open(tmp_path / "metrics.csv")))
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    assert float(rows[-1]["loss"]) == pytest.approx(history[-1]["ce"] + history[-1]["attention"])
    assert list((tmp_path / "tensorboard").iterdir())


def test_the_loss_of_a_step_is_eq_8():
    """CE + alpha/2 * L_at, recomputed from the networks' own outputs."""
    student, teacher = small_student(dropout=0.0), small_teacher()
    names = [("features.0.neuron", "layer1"), ("features.2.neuron", "layer2")]
    trainer = trainer_for(student, teacher, alpha=0.6, pairs=names)
    x, y = images_and_labels(8)
    spikes, activations = {}, {}
    hooks = [student.get_submodule(s).register_forward_hook(keep(spikes, s)) for s, _ in names]
    hooks += [teacher.get_submodule(t).register_forward_hook(keep(activations, t)) for _, t in names]
    with torch.no_grad():
        potentials = student(DirectEncoder(4)(x))
        teacher(x)
    functional.reset_net(student)
    for hook in hooks:
        hook.remove()
    parts = trainer.train_step(x, y).parts
    expected = attention_loss(
        [activation_map(activations[t]) for _, t in names],
        [activation_map(spikes[s].mean(0), power=1) for s, _ in names],
    )
    torch.testing.assert_close(parts["ce"], nn.functional.cross_entropy(potentials[-1], y))
    torch.testing.assert_close(parts["attention"], 0.3 * expected)


def test_the_loss_reported_is_the_sum_whatever_its_parts_are_called(tmp_path):
    class Named(CrossEntropy):
        def __call__(self, signals):
            return {"loss": super().__call__(signals)["ce"]}

    trainer = trainer_for(
        small_student(), small_teacher(), tmp_path, objective=Named(), attention="activation", alpha=10.0
    )
    (row,) = trainer.fit(loader(8), epochs=1)
    assert row["loss"] > row["attention"] > 1
    (step,) = csv.DictReader(open(tmp_path / "steps.csv"))
    assert float(step["loss"]) == pytest.approx(row["loss"])


def test_an_objectives_part_is_not_replaced_by_the_attention():
    class Named(CrossEntropy):
        def __call__(self, signals):
            return {"attention": super().__call__(signals)["ce"]}

    trainer = trainer_for(small_student(), small_teacher(), objective=Named(), attention="activation")
    with pytest.raises(ValueError, match=r"two objectives of Named\(.*\) give a part named 'attention'"):
        trainer.fit(loader(8), epochs=1)


def test_loss_and_accuracy_are_means_over_samples():
    """20 images in batches of 7, 7 and 6, each in three pieces; a student that stays as it is."""
    student = small_student(dropout=0.0)
    optimizer = torch.optim.SGD(student.parameters(), 1e-30)
    trainer = LaSNNTrainer(
        student, encoder=DirectEncoder(3), optimizer=optimizer, options=TrainingOptions(accumulate=3)
    )
    (row,) = trainer.fit(loader(20, 7), epochs=1)
    expected = trainer.evaluate(loader(20, 20))
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    assert row["top1"] == pytest.approx(expected["top1"], rel=1e-6)


def test_gradient_attention_of_a_step_is_eq_13():
    student, teacher = small_student(dropout=0.0), small_teacher()
    names = [("features.0.neuron", "layer1")]
    trainer = trainer_for(student, teacher, attention="gradient", pairs=names)
    x, y = images_and_labels(8)
    spikes, seen = {}, {}
    with student.get_submodule(names[0][0]).register_forward_hook(keep(spikes, "s")), torch.no_grad():
        student(DirectEncoder(4)(x))
    functional.reset_net(student)
    with teacher.get_submodule("layer1").register_forward_hook(keep(seen, "a")):
        logits = teacher(x.clone().requires_grad_())
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(logits.double(), y), seen["a"])
    parts = trainer.train_step(x, y).parts
    expected = attention_loss([gradient_map(g)], [spike_activation_map(spikes["s"])])
    torch.testing.assert_close(parts["attention"], 0.45 * expected)


def keep(store, name):
    def hook(module, args, output):
        store[name] = output

    return hook


def weights_of(net):
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def test_a_resumed_run_equals_one_that_was_left_alone(tmp_path):
    """Poisson code and dropout included: the same weights, bit for bit."""

    def run(folder, epochs):
        encoder = PoissonEncoder(4, torch.Generator().manual_seed(5))
        student = small_student()
        trainer = trainer_for(student, small_teacher(), folder, encoder=encoder)
        history = trainer.fit(loader(24), loader(8, seed=1), epochs=epochs)
        return weights_of(student), history

    alone, history = run(tmp_path / "alone", 3)
    run(tmp_path / "cut", 1)
    torch.rand(7)  # another process would not have the random state either
    resumed, history_resumed = run(tmp_path / "cut", 3)
    for name, tensor in alone.items():
        assert torch.equal(tensor, resumed[name]), name
    assert [row["loss"] for row in history] == [row["loss"] for row in history_resumed]


def test_validation_now_and_then():
    history = trainer_for(small_student(), small_teacher()).fit(loader(8), loader(8), 5, validate_every=2)
    assert ["val_top1" in row for row in history] == [False, True, False, True, True]


def test_two_checkpoints_are_kept(tmp_path):
    trainer_for(small_student(), small_teacher(), tmp_path).fit(loader(8), epochs=4)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000003", "00000004"]


def test_a_run_folder_of_other_settings_is_refused(tmp_path):
    trainer_for(small_student(), small_teacher(), tmp_path).fit(loader(8), epochs=1)
    with pytest.raises(ValueError, match=r"\(objective.objectives.1.alpha: there 0.9, here 0.5\)"):
        trainer_for(small_student(), small_teacher(), tmp_path, alpha=0.5).fit(loader(8), epochs=2)


def test_looking_before_the_first_step_changes_nothing():
    """The same seed gives the same first loss whether or not pairs have to be chosen."""
    losses, names = [], None
    for _ in range(2):
        encoder = PoissonEncoder(4, torch.Generator().manual_seed(5))
        trainer = trainer_for(small_student(), small_teacher(), encoder=encoder, pairs=names)
        losses.append(trainer.fit(loader(8), epochs=1)[0]["loss"])
        names = trainer.pairs
    assert losses[0] == losses[1]


def test_evaluate_counts_by_hand():
    """A network that answers its input's first pixel: 3 of 5 right, in batches of 2, 2 and 1."""

    class Answer(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(x[:, 0].long(), K).float()

    x = torch.tensor([[0.0], [1], [2], [3], [0]])
    y = torch.tensor([0, 1, 2, 0, 1])
    result = evaluate(Answer(), DataLoader(TensorDataset(x, y), 2))
    assert result["samples"] == 5
    assert result["top1"] == pytest.approx(60)
    right, wrong = torch.tensor([1.0, 0, 0, 0]).log_softmax(0)[:2].neg().tolist()
    assert result["loss"] == pytest.approx((3 * right + 2 * wrong) / 5)


@pytest.mark.parametrize("readout", ["last", "mean"])
@pytest.mark.parametrize("chunk", [1, 3, 7])
def test_evaluation_in_pieces_of_time(readout, chunk):
    """7 steps at once, or in pieces (of 3, 3 and 1 ...): the same loss to float rounding."""
    student, batches = small_student(), loader(16)
    whole = evaluate(student, batches, DirectEncoder(7), readout=readout)
    pieces = evaluate(student, batches, DirectEncoder(7), readout=readout, chunk=chunk)
    assert pieces["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert pieces["top1"] == whole["top1"]


@pytest.mark.parametrize("kind", ["images", "frames", "images of an ANN"])
def test_evaluation_of_many_samples_and_steps_in_pieces(kind, monkeypatch):
    student, encoder, T = small_student(), DirectEncoder(7), 7
    batches, seen = list(loader(16)), []
    if kind == "frames":
        batches, encoder = [(encoder(images), labels) for images, labels in batches], None
    elif kind == "images of an ANN":
        student, encoder, T = small_teacher(), None, 1
    more = {} if T == 1 else {"over_time": True, "early_exit": 0.5}
    whole = evaluate(student, batches, encoder, confusion=True, **more)
    student.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[: 1 + (T > 1)].numel()))
    monkeypatch.setattr(evaluation, "MOST_AT_ONCE", 3 * T + T // 2)
    pieces = evaluate(student, batches, encoder, confusion=True, **more)
    sizes = [[3 * T] * (len(labels) // 3) + [len(labels) % 3 * T] for _, labels in batches]
    assert seen == [size for batch in sizes for size in batch if size]
    assert len(seen) > 2 * len(batches)
    assert torch.equal(pieces.pop("confusion"), whole.pop("confusion"))
    assert pieces == {name: pytest.approx(value, rel=1e-5) for name, value in whole.items()}


def test_evaluation_leaves_training_as_it_was():
    """Poisson code and the loaders' orders are drawn, of the default generator and of the encoder's own."""
    own = torch.Generator().manual_seed(5)
    part_of_another = nn.Sequential(nn.Identity(), PoissonEncoder(3, own))
    for encoder in (PoissonEncoder(3), PoissonEncoder(3, own), part_of_another):
        student = small_student()
        trainer = trainer_for(student, small_teacher(), encoder=encoder)
        before, first = (torch.get_rng_state(), own.get_state()), trainer.evaluate(loader(8))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert torch.equal(own.get_state(), before[1])
        assert trainer.evaluate(loader(8)) == first
        assert student.training


def test_training_does_not_depend_on_validation():
    losses = []
    for every in (1, 2, None):
        trainer = trainer_for(small_student(), small_teacher(), encoder=PoissonEncoder(3))
        batches = DataLoader(loader(16).dataset, 8, shuffle=True)
        history = trainer.fit(batches, batches if every else None, epochs=3, validate_every=every or 1)
        losses.append([row["loss"] for row in history])
    assert losses[0] == losses[1] == losses[2]


def test_deterministic_algorithms_while_training_only():
    class Look(Callback):
        def on_step(self, trainer, parts):
            seen.append(torch.are_deterministic_algorithms_enabled())

    class Putting(CrossEntropy):
        def __call__(self, signals):
            torch.zeros(3).put_(torch.tensor([0]), torch.ones(1))  # which has no deterministic algorithm
            return super().__call__(signals)

    seen = []
    options = TrainingOptions(deterministic=True)
    trainer_for(small_student(), small_teacher(), options=options, callbacks=[Look()]).fit(loader(), epochs=1)
    assert seen == [True] * 4
    with pytest.raises(RuntimeError, match="put_ does not have a deterministic implementation"):
        LaSNNTrainer(
            small_student(), objective=Putting(), encoder=DirectEncoder(2), options=options
        ).fit(loader(), epochs=1)  # fmt: skip
    assert not torch.are_deterministic_algorithms_enabled()


def test_readouts():
    potentials = torch.tensor([[[1.0, 0]], [[0, 3]], [[2, 0]]])
    assert class_scores(potentials, 1, "last").tolist() == [[2, 0]]
    assert class_scores(potentials, 1, "mean").tolist() == [[1, 1]]
    assert LaSNNTrainer(small_student(), attention=None).readout == "last"
    stock = nn.Sequential(layer.Linear(2, 2), neuron.IFNode(step_mode="m"))
    assert LaSNNTrainer(stock).readout == "mean"


def test_a_stock_spikingjelly_student_and_any_teacher():
    student = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), layer.BatchNorm2d(8),
        neuron.IFNode(surrogate_function=surrogate.ATan()),
        layer.MaxPool2d(2), layer.Conv2d(8, 8, 3, padding=1), neuron.LIFNode(), layer.Flatten(),
        layer.Linear(8 * 16, K),
    )  # fmt: skip
    functional.set_step_mode(student, "m")
    teacher = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(6 * 64, K)
    ).eval()
    history = trainer_for(student, teacher).fit(loader(64), epochs=4)
    assert history[-1]["loss"] < history[0]["loss"]


def test_a_teacher_in_training_mode_is_put_into_evaluation_and_said_once(caplog):
    teacher = small_teacher().train()
    before = weights_of(teacher)
    with caplog.at_level(logging.WARNING, "lasnn_sj"):
        trainer_for(small_student(), teacher).fit(loader(16), epochs=2)
    assert len([r for r in caplog.records if "training mode" in r.message]) == 1
    assert not teacher.training
    after = weights_of(teacher)
    assert all(torch.equal(before[name], after[name]) for name in before)  # running statistics too


def bad(name):
    x, y = images_and_labels(16)
    if name == "nan":
        x[3, 0, 2, 2] = torch.nan
    elif name == "high":
        y[5] = K
    elif name == "low":
        y[5] = -1
    elif name == "float":
        y = y.float()
    elif name == "pixels":
        x = x * 3
    return loader(x=x, y=y)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", r"batch \d of epoch 1: images hold NaN or infinity, in samples \[\d\]"),
        ("high", r"batch \d of epoch 1: labels must lie in \[0, 4\), .* got \d to 4"),
        ("low", r"labels must lie in \[0, 4\), .* got -1 to"),
        ("float", "batch 0 of epoch 1: labels must be whole numbers"),
        ("pixels", r"PoissonEncoder needs pixels in \[-1, 1\]"),
    ],
)
def test_bad_batches_are_named(name, message):
    trainer = trainer_for(small_student(), small_teacher(), encoder=PoissonEncoder(2))
    with pytest.raises(ValueError, match=message):
        trainer.fit(bad(name), epochs=1)


def test_a_bad_batch_loses_nothing(tmp_path):
    """The NaN comes in the second epoch: the student keeps its weights, the first epoch its checkpoint."""
    x, y = images_and_labels(16)
    seen = []

    class Turns:
        epochs = 0

        def __iter__(self):
            self.epochs += 1
            yield x[:8], y[:8]
            seen.append(weights_of(student))
            yield (x[8:] * torch.nan if self.epochs == 2 else x[8:]), y[8:]

    student = small_student()
    trainer = trainer_for(student, small_teacher(), tmp_path)
    with pytest.raises(BatchError, match="batch 1 of epoch 2"):
        trainer.fit(Turns(), epochs=3)
    now = weights_of(student)
    assert all(torch.equal(now[name], tensor) for name, tensor in seen[-1].items())
    assert (tmp_path / "checkpoints" / "00000002" / "student.safetensors").exists()
    assert len(trainer.fit(loader(16), epochs=3)) == 3


def test_a_loss_that_is_not_finite_stops_before_the_weights_change():
    student = small_student()
    trainer = trainer_for(student, small_teacher(), alpha=float("inf"))
    before = weights_of(student)
    with pytest.raises(
        BatchError, match=r"batch 0 of epoch 1: the loss is not finite \(ce = .*, attention = inf"
    ):
        trainer.fit(loader(8), epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(student).items())


@pytest.mark.parametrize(
    "empty", [[], DataLoader(TensorDataset(torch.zeros(0, 1, 8, 8), torch.zeros(0).long()))]
)
def test_empty_loaders(empty):
    with pytest.raises(BatchError, match="training loader gave no batch in epoch 1"):
        trainer_for(small_student(), small_teacher()).fit(empty, epochs=1)
    with pytest.raises(BatchError, match="evaluation loader gave no batch"):
        evaluate(small_student(), empty, DirectEncoder(1))


@pytest.mark.parametrize("shape", [(K,), (3, K), (2, 3, K), (8, K, 1, 1)])
def test_a_student_of_the_wrong_shape(shape):
    class Wrong(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(shape))

        def forward(self, x):
            return self.w

    with pytest.raises(BatchError, match=r"class scores \[N, K\] or \[T, N, K\] with N = 2, got"):
        LaSNNTrainer(Wrong(), attention=None).fit(loader(8), epochs=1)


def test_an_encoder_is_missed():
    with pytest.raises(ValueError, match=r"\[T, N, C, H, W\]; encode images first, got shape \(2, 1, 8, 8\)"):
        trainer_for(small_student(), small_teacher(), encoder=None).fit(loader(8), epochs=1)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"objective CrossEntropy\(\) \+ Attention\(\) needs a teacher"):
        LaSNNTrainer(small_student(), attention="activation")
    with pytest.raises(ValueError, match=r"objective CrossEntropy\(\) makes no use of the teacher"):
        LaSNNTrainer(small_student(), small_teacher(), attention=None)
    with pytest.raises(ValueError, match='attention must be "activation"'):
        LaSNNTrainer(small_student(), small_teacher(), attention="both")
    with pytest.raises(ValueError, match="readout must be"):
        LaSNNTrainer(small_student(), readout="first")
    with pytest.raises(ValueError, match="alpha must be a number, at least 0, got -1"):
        LaSNNTrainer(small_student(), small_teacher(), alpha=-1)


def test_arguments_that_would_be_found_out_late_or_never():
    """An optimiser or a scheduler of something else trains nothing, silently."""
    student, other = small_student(), small_student()
    sgd, foreign = (torch.optim.SGD(net.parameters(), 0.1) for net in (student, other))
    with pytest.raises(ValueError, match="optimizer has none of the student's parameters"):
        LaSNNTrainer(student, optimizer=foreign)
    step = torch.optim.lr_scheduler.StepLR(foreign, 1)
    for optimizer in (sgd, None):
        with pytest.raises(ValueError, match="scheduler .* belongs to another optimizer"):
            LaSNNTrainer(student, optimizer=optimizer, scheduler=step)
    for mode, loaders, message in (
        ("min", [[]], "give fit a val_loader"),
        ("max", [[], []], "give mode='min'"),
    ):
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(sgd, mode)
        with pytest.raises(ValueError, match=f"ReduceLROnPlateau.*{message}"):
            LaSNNTrainer(student, optimizer=sgd, scheduler=plateau).fit(*loaders)
    with pytest.raises(ValueError, match="validate_every must be a whole number, at least 1, got 0"):
        LaSNNTrainer(student).fit([], [], validate_every=0)


@pytest.mark.parametrize("scheduled", [True, False])
def test_a_run_with_and_one_without_scheduler_are_not_the_same(tmp_path, scheduled):
    def run(with_scheduler, epochs):
        student = small_student()
        optimizer = torch.optim.SGD(student.parameters(), 0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if with_scheduler else None
        trainer = LaSNNTrainer(
            student, encoder=DirectEncoder(2), optimizer=optimizer, scheduler=scheduler,
            run_dir=tmp_path,
        )  # fmt: skip
        trainer.fit(loader(8), epochs=epochs)

    run(scheduled, 1)
    with pytest.raises(ValueError, match="other settings .scheduler: there"):
        run(not scheduled, 2)
    (tmp_path / "settings.json").unlink()
    with pytest.raises(CheckpointError, match=f"its run had {'a' if scheduled else 'no'} scheduler"):
        run(not scheduled, 2)


def test_weights_of_three_dimensional_convolutions():
    class Volume(nn.Module):
        """[T, N, C, H, W]: a convolution over time, height and width."""

        def __init__(self):
            super().__init__()
            self.conv, self.flat = nn.Conv3d(1, 2, 3, padding=1), nn.Conv2d(2, 3, 3)
            self.linear = nn.Linear(3, K)

        def forward(self, x):
            return self.linear(self.flat(self.conv(x.movedim(0, 2)).mean(2)).mean((2, 3)))

    net = Volume()
    history = LaSNNTrainer(net, encoder=DirectEncoder(2)).fit(loader(8), epochs=1)
    assert history[0]["loss"] > 0
    assert net.flat.weight.is_contiguous(memory_format=torch.channels_last)


def test_pairs_that_do_not_exist_are_found_before_the_first_step():
    student = small_student()
    before = weights_of(student)
    with pytest.raises(
        TapError, match="student tap 'features.1' gives no|student tap 'nowhere' matches no module"
    ):
        trainer_for(student, small_teacher(), pairs=[("nowhere", "layer1")]).fit(loader(8), epochs=1)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(student).items())


def test_a_first_look_that_fails_leaves_the_student_as_it_was():
    trainer = trainer_for(small_student(), small_teacher(), pairs=[("nowhere", "layer1")])
    state = torch.get_rng_state()
    for _ in range(2):  # the same error again, not one of half a trainer
        with pytest.raises(TapError, match="student tap 'nowhere' matches no module"):
            trainer.train_step(*images_and_labels(4))
        assert trainer.student.training
        assert torch.equal(torch.get_rng_state(), state)


def test_gradient_attention_needs_the_teachers_classes_to_be_the_students():
    teacher = models.teacher_resnet20(K + 1, in_channels=1, width=0.25).eval()
    with pytest.raises(ValueError, match="needs a teacher with the student's 4 classes"):
        trainer_for(small_student(), teacher, attention="gradient").fit(loader(8), epochs=1)


def test_help_on_the_trainer_fits_two_screens():
    lines = pydoc.plain(pydoc.render_doc(LaSNNTrainer)).splitlines()
    most = 110 if sys.version_info < (3, 13) else 150  # 3.13 gives each argument a line of its own
    assert len(lines) <= most


def test_a_trainer_is_shown_by_what_it_trains(tmp_path):
    net = nn.Sequential(nn.Flatten(2), nn.Linear(64, K))
    trainer = LaSNNTrainer(
        net, models.teacher_resnet20(K, 1, 0.125).eval(), encoder=DirectEncoder(3), run_dir=tmp_path
    )
    assert repr(trainer) == (
        "LaSNNTrainer(Sequential of 260 parameters, CrossEntropy() + Attention(), teacher TeacherResNet20, "
        f"DirectEncoder(T=3), Adam at 0.0001 on cpu, in {tmp_path}, 0 epochs done)"
    )
