"""A run folder: one writer, the same run or an error that shows what differs, tables that may be damaged."""

import csv
import functools
import json
import logging
import os
import random
import sys
import time

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, Subset, TensorDataset

from lasnn_sj import Callback, DirectEncoder, PoissonEncoder, models
from lasnn_sj.analysis import inspect
from lasnn_sj.analysis.report import report
from lasnn_sj.distillation import CrossEntropy, LabelKD
from lasnn_sj.runtime import LockError
from lasnn_sj.training import Trainer, TrainingOptions, checkpoint, fingerprint

K = 4


def student(seed=0, tau=2.0, v_threshold=0.1, alpha=2.0, p=0.1):
    torch.manual_seed(seed)
    net = nn.Sequential(
        layer.Flatten(), layer.Linear(64, 16), neuron.LIFNode(tau, v_threshold=v_threshold,
        surrogate_function=surrogate.ATan(alpha)), layer.Dropout(p), layer.Linear(16, K),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def teacher(seed=1, width=0.125):
    torch.manual_seed(seed)
    return models.teacher_resnet20(K, in_channels=1, width=width).eval()


def dataset(n=16, flip=None):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % K
    if flip is not None:
        labels[flip] = (labels[flip] + 1) % K
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, labels)


def loader(data=None, batch_size=4, **arguments):
    generator = torch.Generator().manual_seed(2)
    return DataLoader(data or dataset(), batch_size, shuffle=True, generator=generator, **arguments)


class StopAt(Callback):
    """Ends a run where it is, as a kill would."""

    def __init__(self, step):
        self.at = step

    def on_step(self, trainer, parts):
        if trainer.step == self.at:
            raise KeyboardInterrupt


def run(
    folder, epochs=2, net=None, objective=None, data=None, optimizer=None, scheduler=None, val_loader=None,
    stop=None, **arguments,
):  # fmt: skip
    net = student() if net is None else net
    optimizer = (optimizer or (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)))(net.parameters())
    scheduler = scheduler and scheduler(optimizer)
    arguments = {"encoder": DirectEncoder(2), "seed": 0} | arguments
    trainer = Trainer(
        net, objective, optimizer=optimizer, scheduler=scheduler, run_dir=folder,
        options=TrainingOptions(checkpoint_every=1), callbacks=[StopAt(stop)], **arguments,
    )  # fmt: skip
    try:
        trainer.fit(loader() if data is None else data, val_loader, epochs=epochs)
    except KeyboardInterrupt:
        assert stop is not None
    return trainer


def steps(folder):
    with open(folder / "steps.csv", newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def same(one, other):
    one, other = (t.student.state_dict() for t in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


StepLR = functools.partial(torch.optim.lr_scheduler.StepLR, step_size=1)


def two_groups(rate):
    return lambda p: torch.optim.SGD([{"params": q, "lr": rate * (1 + i)} for i, q in enumerate(p)], 0.1)


class Plain:
    """An objective of one's own, with neither a repr nor a base class."""

    def __init__(self, weight=1.0):
        self.weight, self._calls = weight, 0

    def __call__(self, signals):
        self._calls += 1
        return {"ce": self.weight * nn.functional.cross_entropy(signals.scores, signals.labels)}


CHANGES = {
    "batch size": ({}, {"data": loader(batch_size=8)}, "data.batch_size: there 4, here 8"),
    "labels": ({}, {"data": loader(dataset(flip=5))}, "data.labels: there"),
    "length": ({}, {"data": loader(dataset(20))}, "data.samples: there 16, here 20"),
    "images": ({}, {"data": loader(TensorDataset(-dataset()[:][0], dataset()[:][1]))}, "data.items.0: there"),
    "order": ({}, {"data": DataLoader(dataset(), 4)}, "data.sampler: there 'RandomSampler', here 'S"),
    "teacher's weights": (
        {"teacher": teacher(), "objective": LabelKD()},
        {"teacher": teacher(3), "objective": LabelKD()},
        "teacher.weights: there",
    ),
    "teacher's layers": (
        {"teacher": teacher(), "objective": LabelKD()},
        {"teacher": teacher(width=0.25), "objective": LabelKD()},
        "teacher.parameters: there",
    ),
    "surrogate": ({}, {"net": student(alpha=4.0)}, "layers.2.surrogate_function.alpha: there 2.0, here 4"),
    "dropout": ({}, {"net": student(p=0.5)}, "student.layers.3.p: there 0.1, here 0.5"),
    "tau": ({}, {"net": student(tau=8.0)}, "student.layers.2.tau: there 2.0, here 8.0"),
    "threshold": ({}, {"net": student(v_threshold=0.2)}, "student.layers.2.v_threshold: there 0.1, here 0.2"),
    "scheduler": (
        {"scheduler": StepLR},
        {"scheduler": functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.1)},
        "scheduler.class: there 'StepLR', here 'ExponentialLR'",
    ),
    "gamma": (
        {"scheduler": StepLR},
        {"scheduler": functools.partial(StepLR, gamma=0.5)},
        "scheduler.gamma: there 0.1, here 0.5",
    ),
    "rates": (
        {"optimizer": two_groups(0.1)},
        {"optimizer": two_groups(0.2)},
        "optimizer.groups.0.lr: there 0.1, here 0.2",
    ),
    "momentum": (
        {},
        {"optimizer": lambda p: torch.optim.SGD(p, 0.1)},
        "optimizer.groups.0.momentum: there 0.9, here 0",
    ),
    "dtype": ({}, {"net": student().bfloat16()}, "layers.1.weight: there 'float32 .16, 64.', here 'bf"),
    "objective": ({"objective": Plain()}, {"objective": Plain(2.0)}, "objective.weight: there 1.0, here 2.0"),
    "objective's class": ({}, {"objective": Plain()}, "objective.class: there 'CrossEntropy', here 'Plain'"),
    "encoder": ({}, {"encoder": DirectEncoder(3)}, "encoder.T: there 2, here 3"),
    "encoder's seed": (
        {"encoder": PoissonEncoder(2, torch.Generator().manual_seed(1))},
        {"encoder": PoissonEncoder(2, torch.Generator().manual_seed(2))},
        "encoder.generator.seed: there 1, here 2",
    ),
    "seed": ({}, {"seed": 1}, "seed: there 0, here 1"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_run_is_refused_and_only_what_differs_is_shown(tmp_path, change):
    first, second, message = CHANGES[change]
    torch.manual_seed(7)
    run(tmp_path, 1, **first)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    torch.manual_seed(7)
    with pytest.raises(ValueError, match=message) as error:
        run(tmp_path, 2, **second)
    assert str(error.value).count("there ") <= 5  # the objects differ in little else
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_the_same_run_goes_on(tmp_path):
    alone = run(tmp_path / "alone", objective=Plain(), scheduler=StepLR)
    run(tmp_path / "cut", objective=Plain(), scheduler=StepLR, stop=6)
    assert same(run(tmp_path / "cut", objective=Plain(), scheduler=StepLR), alone)


def test_a_student_with_other_first_weights(tmp_path, caplog):
    """Seeded alike it is another student; not seeded, or trained on, it takes the checkpoint's weights."""
    with pytest.raises(KeyboardInterrupt):
        unseeded(tmp_path, 2**40, stop=6)
    finished = unseeded(tmp_path, 2**41)
    assert "initial weights are not those" in caplog.text
    with pytest.raises(ValueError, match="student started from other weights"):
        unseeded(tmp_path / "seeded", 3) and unseeded(tmp_path / "seeded", 3, weights=5)
    caplog.clear()
    again = run(tmp_path, 3, net=finished.student)  # as in a notebook
    assert again.epoch == 3
    assert "initial weights" not in caplog.text


def unseeded(folder, seed, weights=None, stop=None):
    net = student(weights or seed % 97)
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    trainer = Trainer(
        net, encoder=DirectEncoder(2), optimizer=optimizer, seed=0, run_dir=folder, callbacks=[StopAt(stop)],
        options=TrainingOptions(checkpoint_every=1),
    )  # fmt: skip
    trainer.fit(loader(), epochs=2)
    return trainer


def test_versions_that_change_are_said(tmp_path, caplog):
    run(tmp_path, 1)
    path = tmp_path / "settings.json"
    settings = json.loads(path.read_text())
    assert settings["versions"]["torch"] == torch.__version__
    settings["versions"]["torch"] = "2.6.0"
    del settings["fingerprint"]["optimizer"]["groups"][0]["nesterov"]  # an option that came later
    path.write_text(json.dumps(settings))
    run(tmp_path, 2)
    assert f"was started with torch 2.6.0, here {torch.__version__}" in caplog.text
    caplog.clear()
    assert json.loads(path.read_text())["versions"]["torch"] == torch.__version__


def test_a_finished_run_says_that_nothing_was_trained(tmp_path, caplog):
    run(tmp_path, 1)
    assert "nothing was trained" not in caplog.text
    assert run(tmp_path, 1).step == 4
    (record,) = (r for r in caplog.records if "nothing was trained" in r.message)
    assert record.levelno == logging.WARNING  # seen without a configuration of logging
    assert f"the run in {tmp_path} has its 1 epochs already" in record.message


def test_a_fingerprint_of_50_mb_takes_well_under_a_second():
    net = nn.Linear(3600, 3600)
    start = time.process_time()
    one = fingerprint.network(net)
    assert time.process_time() - start < 0.5
    net.weight.data[1234, 567] += 1e-6
    assert fingerprint.network(net)["weights"] != one["weights"]


# ---- two writers ----


def test_a_second_process_is_told_who_writes(tmp_path):
    ready, wait = os.pipe(), os.pipe()

    class Hold(Callback):
        def on_step(self, trainer, parts):
            if trainer.step == 2:
                os.write(ready[1], b".")
                os.read(wait[0], 1)

    child = os.fork()
    if child == 0:
        code = 1
        try:
            net = student()
            Trainer(
                net, encoder=DirectEncoder(2), seed=0, run_dir=tmp_path, callbacks=[Hold()],
                optimizer=torch.optim.SGD(net.parameters(), 0.1, momentum=0.9),
            ).fit(loader(), epochs=2)  # fmt: skip
            code = 0
        finally:
            os._exit(code)
    os.read(ready[0], 1)
    with pytest.raises(LockError, match=f"in use by process {child} on "):
        run(tmp_path)
    os.write(wait[1], b".")
    assert os.waitpid(child, 0)[1] == 0
    assert steps(tmp_path) == list(range(1, 9))
    assert not (tmp_path / "run.lock").exists()


def test_an_error_releases_the_folder(tmp_path):
    with pytest.raises(ValueError, match="labels"):
        run(tmp_path, data=[(torch.zeros(2, 1, 8, 8), torch.tensor([0, 99]))])
    assert not (tmp_path / "run.lock").exists()


# ---- damaged tables ----


@pytest.mark.parametrize(
    "damage",
    ["zeros", "open quote", "odd digit", "no number", "pipe", "twice", "empty", "binary", "separator"],
)
def test_a_damaged_table_does_not_stop_the_resume_of_checkpoints(tmp_path, caplog, damage):
    alone = run(tmp_path / "alone")
    folder = tmp_path / "cut"
    run(folder, stop=6)
    path = folder / "steps.csv"
    whole = path.read_bytes().splitlines(keepends=True)
    assert len(whole) > 4
    lines = {
        "zeros": [*whole[:2], b"\0" * 40 + b"\r\n", *whole[2:]],
        "open quote": [*whole[:2], b'"' + whole[2], *whole[3:]],
        "odd digit": [*whole[:2], "\u00b2,1,0.1,1,1\r\n".encode(), *whole[2:]],
        "no number": [*whole[:2], b"2,1,0.1,\x0b1,1\r\n", *whole[2:]],
        "twice": [*whole[:3], *whole[2:]],
        "separator": [whole[0].replace(b"ce", b'"c\x1ce"'), *whole[1:]],
        "empty": [],
        "binary": [os.urandom(200)],
        "pipe": whole,
    }[damage]
    path.unlink()
    if damage == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(b"".join(lines))
    caplog.clear()
    assert same(run(folder), alone)
    rows = steps(folder)
    assert rows == sorted(set(rows))
    assert rows[-1] == 8
    if damage in ("zeros", "odd digit", "no number", "twice"):
        assert rows == list(range(1, 9))
    if damage != "empty":
        assert "steps.csv" in caplog.text


@pytest.mark.parametrize("left", ["nothing", "those of an earlier epoch"])
def test_a_kill_between_the_last_checkpoint_and_the_weights(tmp_path, left):
    trained = run(tmp_path)
    path = tmp_path / "weights.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if left != "nothing":
        checkpoint.save_weights(path, student(seed=1))
    again = run(tmp_path)
    assert same(again, trained)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("at", [3, 8])
def test_a_table_removed_during_the_run_is_written_again(tmp_path, caplog, at):
    class Remove(Callback):
        def on_step(self, trainer, parts):
            if trainer.step == at:
                (tmp_path / "steps.csv").unlink()

    Trainer(
        student(), encoder=DirectEncoder(2), run_dir=tmp_path, seed=0, callbacks=[Remove()],
        options=TrainingOptions(checkpoint_every=1),
    ).fit(loader(), epochs=2)  # fmt: skip
    assert steps(tmp_path) == list(range(1, 9))
    assert "steps.csv was removed during the run and is written again" in caplog.text


def test_tensorboard_that_cannot_write_does_not_stop_a_run(tmp_path, caplog, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def fails(*_, **__):
        raise OSError(28, "No space left on device")

    alone = run(tmp_path / "alone")
    monkeypatch.setattr(SummaryWriter, "flush", fails)
    disturbed = run(tmp_path / "disturbed")
    assert len(disturbed.history) == 2
    assert same(disturbed, alone)
    assert "No space left on device); goes on without it" in caplog.text
    caplog.clear()
    monkeypatch.setattr(SummaryWriter, "add_hparams", fails)
    inspect(disturbed, loader())
    assert (tmp_path / "disturbed" / "inspection.json").exists()
    assert "No space left on device); goes on without it" in caplog.text


def test_a_folder_in_place_of_a_table_or_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run" / "steps.csv").mkdir(parents=True)
    with pytest.raises(ValueError, match="steps.csv is a folder where a table belongs"):
        run(tmp_path / "run")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="run_dir must be a folder, .*file is a file"):
        run(tmp_path / "file")


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_folder_whose_name_is_not_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"r\xfcn")
    alone = run(tmp_path / "alone")
    run(folder, stop=6)
    assert same(run(folder), alone)
    assert steps(folder) == list(range(1, 9))
    report(folder)
    assert b"r?n" in (folder / "report.html").read_bytes()


# ---- data without length, schedulers that look at the loss ----


class Stream(IterableDataset):
    def __iter__(self):
        return iter(dataset())


def test_a_stream_without_length_is_trained_and_resumed(tmp_path):
    data = DataLoader(Stream(), 4)
    with pytest.raises(TypeError):
        len(data)
    alone = run(tmp_path / "alone", data=data, val_loader=data)
    assert alone.step == 8
    run(tmp_path / "cut", data=DataLoader(Stream(), 4), stop=6)
    assert same(run(tmp_path / "cut", data=DataLoader(Stream(), 4)), alone)


def test_reduce_on_plateau_is_stepped_with_the_validation_loss(tmp_path):
    plateau = functools.partial(
        torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.5, threshold=0.99
    )
    data = {"data": loader(), "val_loader": DataLoader(dataset(8), 8), "scheduler": plateau}
    alone = run(tmp_path / "alone", 4, **data)
    assert [row["lr"] for row in alone.history] == [0.1, 0.1, 0.05, 0.025]  # no loss is a hundredth
    assert alone.scheduler.best == alone.history[0]["val_loss"]
    run(tmp_path / "cut", 4, **data | {"data": loader()}, stop=10)
    again = run(tmp_path / "cut", 4, **data | {"data": loader()})
    assert same(again, alone)
    assert [row["lr"] for row in again.history] == [0.1, 0.1, 0.05, 0.025]


# ---- random numbers elsewhere ----


class NoisyStudent(nn.Module):
    """An encoder inside the student, and a gain from NumPy."""

    def __init__(self):
        super().__init__()
        self.net, self.rng = student(), np.random.default_rng(3)
        self.code = PoissonEncoder(2, torch.Generator().manual_seed(4))

    def forward(self, x):
        return self.net(self.code(x) * float(self.rng.uniform(0.9, 1.1)))


class NoisyObjective:
    def __init__(self):
        self.rng = random.Random(3)

    def __call__(self, signals):
        return {name: (0.5 + self.rng.random()) * part for name, part in CrossEntropy()(signals).items()}


class Jittered(torch.utils.data.Dataset):
    def __init__(self, rng):
        self.rng, self.data = rng, dataset()

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        image, label = self.data[index]
        if isinstance(self.rng, torch.Generator):
            by = float(torch.rand((), generator=self.rng))
        else:
            by = self.rng.random() if hasattr(self.rng, "random") else self.rng.rand()
        return image * by, label


PLACES = {
    "an encoder inside the student": lambda: {"net": NoisyStudent(), "encoder": None},
    "an objective": lambda: {"objective": NoisyObjective()},
    "Subset of a data set with a generator": lambda: {
        "data": loader(Subset(Jittered(torch.Generator().manual_seed(1)), range(16)))
    },
    "NumPy's Generator": lambda: {"data": loader(Jittered(np.random.default_rng(1)))},
    "NumPy's RandomState": lambda: {"data": loader(Jittered(np.random.RandomState(1)))},
    "random.Random": lambda: {"data": loader(Jittered(random.Random(1)))},
    "collate": lambda: {"data": loader(collate_fn=functools.partial(jitter, rng=np.random.default_rng(5)))},
}


def jitter(samples, rng):
    images, labels = torch.utils.data.default_collate(samples)
    return images * float(rng.random()), labels


@pytest.mark.parametrize("place", PLACES)
def test_random_numbers_elsewhere_are_taken_up_again(tmp_path, place):
    """Within an epoch and between two."""
    alone = run(tmp_path / "alone", **PLACES[place]())
    for stop in (3, 5, 7):
        run(tmp_path / "cut", **PLACES[place](), stop=stop)
    assert same(run(tmp_path / "cut", **PLACES[place]()), alone)


def test_a_checkpoint_of_other_generators_is_gone_on_from_with_a_warning(tmp_path, caplog):
    run(tmp_path, stop=6, data=loader(Jittered(random.Random(1))))
    path = sorted((tmp_path / "checkpoints").iterdir())[-1]
    weights, state = checkpoint.load(path)
    for name in ("random", "start"):
        del state["processes"][0][name]["generators"]["train_loader.dataset.rng"]
    checkpoint.save(path.parent, int(path.name), weights, state)
    run(tmp_path, data=loader(Jittered(random.Random(1))))
    assert "random generators are not where they were (then none besides, now train_loader.d" in caplog.text
