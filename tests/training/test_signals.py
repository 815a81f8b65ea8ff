"""Signals to a group of processes, as from ``timeout``, SLURM or a terminal, loader workers included."""

import os
import signal
import time

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback
from lasnn_sj.training import Trainer, TrainingOptions
from lasnn_sj.training.signals import Stopped, StopRequest

K = 4


class Slow(TensorDataset):
    def __init__(self, n, seconds=0.0):
        generator = torch.Generator().manual_seed(0)
        super().__init__(torch.rand(n, 8, generator=generator), torch.arange(n) % K)
        self.seconds = seconds

    def __getitem__(self, index):
        time.sleep(self.seconds)
        return super().__getitem__(index)


class Dots(Callback):
    """A byte into a pipe for each step, and one for each validation that begins."""

    def __init__(self, pipe):
        self.pipe = pipe

    def on_step(self, trainer, parts):
        os.write(self.pipe, b".")


def train(folder, callbacks=(), workers=2, validation=None):
    torch.manual_seed(0)
    net = nn.Linear(8, K)
    trainer = Trainer(
        net, optimizer=torch.optim.SGD(net.parameters(), 0.1), run_dir=folder, seed=0, callbacks=callbacks,
        options=TrainingOptions(checkpoint_every=1000),
    )  # fmt: skip
    data = Slow(64, 0.004)
    trainer.fit(
        DataLoader(data, 4, shuffle=True, generator=torch.Generator().manual_seed(1), num_workers=workers),
        validation, epochs=2,
    )  # fmt: skip
    return trainer


def in_a_group(call):
    """A process that leads a group of its own, the end of a pipe to read from, and what it said."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            os.close(read)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
                signal.signal(number, default)
            call(write)
            code = 0
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:
            code = 130
        finally:
            os._exit(code)
    os.close(write)
    return child, read


def ended(child, within):
    end = time.monotonic() + within
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    raise AssertionError(f"still there after {within} s")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone")).student.weight.detach()


@pytest.mark.parametrize(
    ("number", "code", "steps"),
    [
        (signal.SIGTERM, 143, 1), (signal.SIGTERM, 143, 17),
        (signal.SIGHUP, 129, 7), (signal.SIGINT, 130, 9),
    ],
)  # fmt: skip
def test_a_signal_to_the_group_saves_and_ends_with_its_code(tmp_path, alone, number, code, steps):
    child, read = in_a_group(lambda write: train(tmp_path, [Dots(write)]))
    for _ in range(steps):
        assert os.read(read, 1) == b"."
    os.killpg(child, number)
    assert ended(child, 20) == code
    os.close(read)
    last = sorted((tmp_path / "checkpoints").iterdir())[-1]
    assert steps <= int(last.name) <= steps + 2
    assert not (tmp_path / "run.lock").exists()
    assert torch.equal(train(tmp_path).student.weight, alone)


def test_ignored_signals_stay_ignored(tmp_path):
    """As under ``nohup``."""

    def call(write):
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        train(tmp_path, [Dots(write)])

    child, read = in_a_group(call)
    os.read(read, 1)
    os.killpg(child, signal.SIGHUP)
    assert ended(child, 30) == 0
    os.close(read)


def test_a_signal_ends_a_validation_at_once(tmp_path, alone):
    """It would take 200 s; the epoch's training is not lost, and the next start validates again."""
    slow = DataLoader(Slow(100, 2.0), 1)
    child, read = in_a_group(lambda write: train(tmp_path, [Dots(write)], validation=slow))
    for _ in range(16):
        os.read(read, 1)
    time.sleep(0.3)
    os.kill(child, signal.SIGTERM)
    assert ended(child, 10) == 143
    os.close(read)
    assert (tmp_path / "checkpoints" / "00000016").is_dir()
    assert not (tmp_path / "metrics.csv").exists()
    trainer = train(tmp_path, validation=DataLoader(Slow(8), 4))
    assert torch.equal(trainer.student.weight, alone)
    assert [row["epoch"] for row in trainer.history] == [1, 2]
    assert all("val_top1" in row for row in trainer.history)


def test_a_signal_between_the_last_step_and_the_validation_ends_it_at_once():
    reached = False
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Stopped), stop.safely(at_once=True):
            reached = True
    assert not reached


def test_a_worker_that_dies_by_itself_is_an_error():
    with StopRequest() as stop, pytest.raises(RuntimeError, match="DataLoader worker"), stop.safely():
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")


def test_a_worker_that_dies_of_the_signal_is_not():
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(Stopped), stop.safely():
                raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Terminated.")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert stop.signal == signal.SIGTERM
