"""Going on within an epoch: after SIGKILL, signals and errors, with the same result to the bit."""

import csv
import importlib.util
import logging
import os
import signal
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lasnn_sj import Callback
from lasnn_sj.distillation import CrossEntropy
from lasnn_sj.training.checkpoint import CheckpointError

PATH = Path(__file__).parents[2] / "benchmarks" / "robustness.py"
spec = importlib.util.spec_from_file_location("robustness", PATH)
robustness = importlib.util.module_from_spec(spec)
spec.loader.exec_module(robustness)
make_trainer, make_loader = robustness.make_trainer, robustness.make_loader

EPOCHS, STEPS = 3, 11  # of 44 samples in batches of 4


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.student.state_dict().items()}


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


class Stop(BaseException):
    """Ends a run where it is, as a kill would, without killing the tests."""


class StopAt(Callback):
    def __init__(self, step, action=None):
        self.at, self.action = step, action

    def on_step(self, trainer, parts):
        if trainer.step == self.at:
            if self.action is None:
                raise Stop
            self.action()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights and tables of a run that nobody disturbs, by its loader's workers."""
    made = {}

    def of(workers):
        if workers not in made:
            folder = tmp_path_factory.mktemp("alone")
            trainer = make_trainer(folder, checkpoint_every=4)
            trainer.fit(make_loader(workers=workers), make_loader(8), epochs=EPOCHS)
            made[workers] = weights_of(trainer), folder, trainer.history
        return made[workers]

    return of


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("workers", "stops"), [(0, [2, 7, 14, 22]), (2, [15])])
def test_a_run_cut_off_within_epochs_equals_one_left_alone(tmp_path, alone, workers, stops):
    for step in [*stops, None]:
        torch.rand(step or 1)  # nothing hangs on the state that a process happens to have
        trainer = make_trainer(tmp_path, checkpoint_every=4, callbacks=[StopAt(step)])
        try:
            trainer.fit(make_loader(workers=workers), make_loader(8), epochs=EPOCHS)
        except Stop:
            assert step is not None
    weights, folder, history = alone(workers)
    assert same(weights_of(trainer), weights)
    assert (tmp_path / "steps.csv").read_text() == (folder / "steps.csv").read_text()
    assert [int(row["step"]) for row in rows(tmp_path / "steps.csv")] == list(range(1, EPOCHS * STEPS + 1))
    assert [int(row["epoch"]) for row in rows(tmp_path / "metrics.csv")] == [1, 2, 3]
    without = [{k: v for k, v in row.items() if k != "seconds"} for row in trainer.history]
    assert without == [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def test_three_kills():
    """SIGKILL in a process of its own; `benchmarks/faults.py` does more."""
    assert robustness.kills(3, epochs=3) == {"kills": 3, "steps": 33, "lost": 0}


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)]
)
def test_signals_finish_the_step_save_and_leave(tmp_path, alone, caplog, number, error):
    def handler(number, frame):
        raise AssertionError("the trainer's own handler should have been there")

    before = signal.signal(number, handler)
    try:
        trainer = make_trainer(tmp_path, callbacks=[StopAt(6, lambda: os.kill(os.getpid(), number))])
        with pytest.raises(error) as left, caplog.at_level(logging.WARNING, "lasnn_sj"):
            trainer.fit(make_loader(), make_loader(8), epochs=EPOCHS)
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, before)
    if error is SystemExit:
        assert left.value.code == 143
    assert "start the same run again" in caplog.text
    assert (tmp_path / "checkpoints" / "00000006").is_dir()
    trainer = make_trainer(tmp_path)
    trainer.fit(make_loader(), make_loader(8), epochs=EPOCHS)
    assert same(weights_of(trainer), alone(0)[0])


def test_a_signal_ends_the_process_where_its_step_cannot_be_saved(tmp_path, caplog, monkeypatch):
    """So that a process of many runs does not go on with the next one."""

    def full(folder):
        raise CheckpointError("no space left on device")

    trainer = make_trainer(tmp_path, callbacks=[StopAt(6, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(trainer.progress, "save", full)
    try:
        with pytest.raises(SystemExit) as left, caplog.at_level(logging.ERROR, "lasnn_sj"):
            trainer.fit(make_loader(), epochs=EPOCHS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert "stopped after step 6, which could not be saved" in caplog.text
    assert "no space left on device" in caplog.text


def test_a_signal_behind_the_last_step_is_not_forgotten(tmp_path):
    """It comes as the last epoch is validated: that is finished and saved, and fit does not return."""

    class Interrupt(Callback):
        def on_epoch(self, trainer, row):
            if row["epoch"] == 2:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, callbacks=[Interrupt()]).fit(make_loader(), make_loader(8), epochs=2)
    assert (tmp_path / "checkpoints" / f"{2 * STEPS:08d}").is_dir()
    assert len(rows(tmp_path / "metrics.csv")) == 2


def test_the_same_trainer_goes_on_after_an_interrupt(tmp_path, alone):
    """As in a notebook: the loader and the trainer are still there, somewhere within an epoch."""
    stop = StopAt(16, lambda: os.kill(os.getpid(), signal.SIGINT))
    trainer, loader = make_trainer(tmp_path, callbacks=[stop]), make_loader()
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(loader, make_loader(8), epochs=EPOCHS)
    trainer.fit(loader, make_loader(8), epochs=EPOCHS)
    assert same(weights_of(trainer), alone(0)[0])


def test_without_a_run_folder_signals_are_left_alone():
    # a shell's background jobs begin with it ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = make_trainer(None, callbacks=[StopAt(2, lambda: os.kill(os.getpid(), signal.SIGINT))])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit(make_loader(), epochs=1)
    signal.signal(signal.SIGINT, before)
    assert trainer.step == 2


def test_a_damaged_latest_checkpoint_costs_only_time(tmp_path, alone, caplog):
    trainer = make_trainer(tmp_path, checkpoint_every=4, callbacks=[StopAt(18)])
    with pytest.raises(Stop):
        trainer.fit(make_loader(), make_loader(8), epochs=EPOCHS)
    latest = sorted((tmp_path / "checkpoints").iterdir())[-1]
    (latest / "state.pt").write_bytes(b"damaged")
    trainer = make_trainer(tmp_path, checkpoint_every=4)
    with caplog.at_level(logging.WARNING, "lasnn_sj"):
        trainer.fit(make_loader(), make_loader(8), epochs=EPOCHS)
    assert "is damaged" in caplog.text
    assert same(weights_of(trainer), alone(0)[0])


def test_both_damaged_changes_nothing(tmp_path):
    make_trainer(tmp_path).fit(make_loader(), epochs=2)
    for state in (tmp_path / "checkpoints").glob("*/state.pt"):
        state.write_bytes(b"damaged")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    trainer = make_trainer(tmp_path)
    weights = weights_of(trainer)
    with pytest.raises(CheckpointError, match="no checkpoint of .* can be used"):
        trainer.fit(make_loader(), epochs=3)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert same(weights_of(trainer), weights)


def test_a_checkpoint_of_other_networks_is_named(tmp_path):
    make_trainer(tmp_path).fit(make_loader(), epochs=1)
    (tmp_path / "settings.json").unlink()
    trainer = make_trainer(tmp_path)
    trainer.student.output = torch.nn.Identity()
    with pytest.raises(CheckpointError, match=r"checkpoint .*00000011 does not fit this run"):
        trainer.fit(make_loader(), epochs=2)


def test_a_kill_between_checkpoint_and_table_leaves_no_row_out(tmp_path):
    make_trainer(tmp_path).fit(make_loader(), epochs=2)
    (tmp_path / "metrics.csv").unlink()
    make_trainer(tmp_path).fit(make_loader(), epochs=2)
    assert [int(row["epoch"]) for row in rows(tmp_path / "metrics.csv")] == [1, 2]


def test_half_a_row_of_a_killed_process_is_taken_away(tmp_path):
    make_trainer(tmp_path).fit(make_loader(), epochs=1)
    with open(tmp_path / "steps.csv", "a") as file:
        file.write("12,2,0.003,1.5,1.0,0.5\r\n13,2,0.0")
    make_trainer(tmp_path).fit(make_loader(), epochs=2)
    assert [int(row["step"]) for row in rows(tmp_path / "steps.csv")] == list(range(1, 23))


def test_checkpoints_by_time(tmp_path):
    trainer = make_trainer(tmp_path, checkpoint_every=timedelta(microseconds=1), callbacks=[StopAt(5)])
    with pytest.raises(Stop):
        trainer.fit(make_loader(), epochs=1)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["00000003", "00000004"]
    with pytest.raises(ValueError, match="checkpoint_every must be a whole number"):
        make_trainer(tmp_path, checkpoint_every=timedelta(0))


def test_a_run_folder_with_a_link_out_of_it_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=r"metrics.csv is a link to .*outside the run folder"):
        make_trainer(tmp_path / "run").fit(make_loader(), epochs=1)
    assert not (tmp_path / "elsewhere").exists()


class Told(Callback):
    def __init__(self):
        self.calls = []

    def on_fit_start(self, trainer):
        self.calls.append(("start", len(trainer.history), trainer.step))

    def on_step(self, trainer, parts):
        self.calls.append(("step", trainer.step, sorted(parts)))

    def on_epoch(self, trainer, row):
        self.calls.append(("epoch", row["epoch"]))

    def on_fit_end(self, trainer):
        self.calls.append(("end",))


class WarmUp(CrossEntropy):
    """A part of the loss that comes with the second epoch, and one that ends with the first."""

    def __init__(self, calls):
        object.__setattr__(self, "calls", calls)

    def __call__(self, signals):
        object.__setattr__(self, "calls", self.calls + 1)
        ce = super().__call__(signals)["ce"]
        return {"ce": ce} | ({"early": 2 * ce} if self.calls <= STEPS else {"late": 3 * ce})


@pytest.mark.parametrize("stops", [[None], [STEPS + 4, None]])
def test_every_part_of_the_loss_is_in_the_table(tmp_path, stops):
    steps = 0
    for step in stops:
        objective = WarmUp(steps)
        trainer = make_trainer(
            tmp_path,
            checkpoint_every=1,
            objective=objective,
            attention="activation",
            callbacks=[StopAt(step)],
        )
        try:
            trainer.fit(make_loader(), epochs=2)
        except Stop:
            steps = step - 1
    table = rows(tmp_path / "steps.csv")
    assert list(table[0]) == ["step", "epoch", "lr", "loss", "ce", "early", "attention", "late"]
    assert len(table) == 2 * STEPS
    for row in table:
        first = row["epoch"] == "1"
        assert (row["early"] == "", row["late"] == "") == (not first, first)
        factor = 3 if first else 4
        assert float(row["loss"]) == pytest.approx(factor * float(row["ce"]) + float(row["attention"]))


def test_callbacks_are_told():
    told = Told()
    make_trainer(None, callbacks=[told]).fit(make_loader(8), epochs=2)
    step = [("step", n, ["attention", "ce"]) for n in range(1, 5)]
    assert told.calls == [("start", 0, 0), *step[:2], ("epoch", 1), *step[2:], ("epoch", 2), ("end",)]


class Drawn(torch.utils.data.Sampler):
    """Draws an index at a time from the global generator, as samplers of balanced classes do."""

    def __len__(self):
        return 44

    def __iter__(self):
        return (int(torch.randint(44, ())) for _ in range(44))


def generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("kind", ["drawn one by one", "with replacement", "batch sampler", "data set"])
def test_the_order_of_any_sampler_is_taken_up_again(tmp_path, kind):
    """Within an epoch, and right after one, where only a generator's own state says how it goes on."""

    def loader():
        dataset = make_loader().dataset
        if kind == "drawn one by one":
            return DataLoader(dataset, 4, sampler=Drawn())
        if kind == "with replacement":  # draws 32 indices at a time
            return DataLoader(dataset, 4, sampler=RandomSampler(dataset, True, 44, generator()))
        if kind == "batch sampler":
            order = RandomSampler(dataset, generator=generator())
            return DataLoader(dataset, batch_sampler=BatchSampler(order, 4, False))
        return DataLoader(Noisy(dataset), 4, shuffle=True)

    make_trainer(tmp_path / "alone").fit(loader(), epochs=EPOCHS)
    for step in [9, STEPS + 1, STEPS + 9, None]:
        trainer = make_trainer(tmp_path / "cut", checkpoint_every=1, callbacks=[StopAt(step)])
        try:
            trainer.fit(loader(), epochs=EPOCHS)
        except Stop:
            assert step is not None
    assert (tmp_path / "cut" / "steps.csv").read_text() == (tmp_path / "alone" / "steps.csv").read_text()


class Noisy(torch.utils.data.Dataset):
    """Noise from a generator of the data set's own."""

    def __init__(self, dataset):
        self.dataset, self.generator = dataset, generator()

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, label = self.dataset[index]
        return (image + 0.1 * torch.randn(image.shape, generator=self.generator)).clamp(-1, 1), label


def test_what_a_callback_draws_as_training_begins_changes_nothing(tmp_path, alone):
    class Draws(Callback):
        def on_fit_start(self, trainer):
            torch.rand(5)

    for step in (STEPS + 1, None):  # the first one ends right after a checkpoint between epochs
        trainer = make_trainer(tmp_path, checkpoint_every=1, callbacks=[Draws(), StopAt(step)])
        try:
            trainer.fit(make_loader(), make_loader(8), epochs=EPOCHS)
        except Stop:
            assert step is not None
    assert same(weights_of(trainer), alone(0)[0])


def test_an_error_as_training_begins_is_not_hidden(tmp_path):
    """Nor are they told of an end who were not told of the beginning."""

    class Fails(Callback):
        def on_fit_start(self, trainer):
            raise LookupError("no such project")

    first, last = Told(), Told()
    with pytest.raises(LookupError, match="no such project"):
        make_trainer(tmp_path, callbacks=[first, Fails(), last]).fit(make_loader(), epochs=1)
    assert first.calls == [("start", 0, 0), ("end",)]
    assert last.calls == []
