"""Several processes: the same losses as one with the whole batch, one writer, every sample counted once."""

import csv
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from options import with_options
from processes import kill_a_worker_after_a_checkpoint, together
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset

from lasnn_sj import Callback, DirectEncoder, LaSNNTrainer, models
from lasnn_sj.distillation import CrossEntropy, parse_objective
from lasnn_sj.distillation.objective import own_parameters
from lasnn_sj.runtime import distributed
from lasnn_sj.training import Trainer, TrainingOptions
from lasnn_sj.training.dataloader import TrainingBatches
from lasnn_sj.training.evaluation import evaluate

EXAMPLE = Path(__file__).parents[2] / "examples" / "many_processes.py"
K = 4


def data(n=26):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.rand(n, 1, 8, 8, generator=generator) * 2 - 1, torch.arange(n) % K)


def loader(n=26, batch=8, **arguments):
    return DataLoader(data(n), batch, shuffle=True, generator=torch.Generator().manual_seed(3), **arguments)


def make(folder=None, attention="activation", **arguments):
    torch.manual_seed(0)
    student = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.1, dropout=0.0)
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.3
    teacher = models.teacher_resnet20(K, in_channels=1, width=0.125).eval()
    return LaSNNTrainer(
        student, teacher, encoder=DirectEncoder(4), attention=attention, run_dir=folder, seed=0,
        optimizer=torch.optim.SGD(student.parameters(), lr=0.05), **with_options(arguments),
    )  # fmt: skip


def curve(folder):
    with open(folder / "steps.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize(
    ("attention", "arguments"),
    [("activation", {}), ("gradient", {"accumulate": 2, "time_chunks": 2, "clip_norm": 0.5})],
)
def test_two_processes_have_the_losses_of_one_with_twice_the_batch(tmp_path, attention, arguments):
    """26 samples: steps of 16 and 10, or twice 8 and twice 5; gradients are sums in another order."""
    alone = make(tmp_path / "alone", attention, **arguments)
    history = alone.fit(loader(batch=16), loader(13), epochs=3)

    def run(rank):
        trainer = make(tmp_path / "both", attention, **arguments)
        trainer.fit(loader(batch=8), loader(13), epochs=3)
        return trainer.history, {n: t.clone() for n, t in trainer.student.state_dict().items()}

    (first, weights), (second, other) = together(run)
    assert curve(tmp_path / "both") == pytest.approx(curve(tmp_path / "alone"), rel=1e-4)
    for row, one, two in zip(history, first, second):
        assert {k: v for k, v in one.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in row.items() if k != "seconds"}, rel=1e-4
        )
        assert one["loss"] == two["loss"]
    assert weights.keys() == alone.student.state_dict().keys()  # no "module." in front
    for name, tensor in alone.student.state_dict().items():
        assert torch.equal(weights[name], other[name]), name
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)


def test_an_objective_with_weights_trains_on_two_processes_as_on_one(tmp_path):
    """Its gradients are means over the whole batch; every process has the main one's weights."""

    def train(folder, batch):
        torch.manual_seed(torch.distributed.is_initialized() and torch.distributed.get_rank())
        objective = parse_objective("CrossEntropy() + KDSNN() + EnOF()")  # weights are drawn by each
        torch.manual_seed(0)
        student = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.1, dropout=0.0)
        trainer = Trainer(
            student, objective, teacher=models.teacher_resnet20(K, in_channels=1, width=0.125),
            encoder=DirectEncoder(4), run_dir=folder, seed=0,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.05),
        )  # fmt: skip
        trainer.fit(loader(batch=batch), epochs=2)
        return [p.detach().clone() for p in (*own_parameters(objective), *student.parameters())]

    alone = train(tmp_path / "alone", 16)
    first, second = together(lambda rank: train(tmp_path / "both", 8))
    assert len(alone) == 2 + 5  # of KDSNN and EnOF, and the student's
    assert curve(tmp_path / "both") == pytest.approx(curve(tmp_path / "alone"), rel=1e-4)
    for expected, one, two in zip(alone, first, second, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, expected, rtol=1e-3, atol=1e-5)


def test_only_rank_0_writes(tmp_path):
    def run(rank):
        folder = tmp_path / str(rank)  # if another rank wrote, it would be here
        make(folder).fit(loader(), epochs=1)
        return folder.exists()

    assert together(run) == [True, False]


def test_two_processes_stop_early_together_and_one_keeps_the_weights(tmp_path):
    def run(rank):
        trainer = make(tmp_path / str(rank), monitor="val_loss", keep_best=True, patience=1)
        worse = iter([1.0, 0.9, 0.95])  # the second epoch is the best, the third the last
        trainer.evaluate = lambda _: {"loss": next(worse), "top1": 0.0, "samples": 8}
        trainer.fit(loader(8), loader(8), epochs=6)
        return trainer.epoch, trainer.best["epoch"], logging.getLogger("lasnn_sj").level

    assert together(run) == [(3, 2, logging.NOTSET), (3, 2, logging.WARNING)]  # each message once
    assert {path.name for path in tmp_path.glob("*/*.safetensors")} == {
        "best.safetensors",
        "weights.safetensors",
    }
    assert not (tmp_path / "1").exists()


class Answer(nn.Module):
    def forward(self, x):
        return nn.functional.one_hot(x[:, 0].long(), K).float()


def norms(spiking):
    torch.manual_seed(0)
    if spiking:
        return models.spiking_resnet18(K, in_channels=1, image_size=8, width=0.05)
    return models.teacher_resnet20(K, in_channels=1, width=0.125).double()


@pytest.mark.parametrize(("spiking", "rel"), [(False, 1e-8), (True, 1e-3)])
def test_batch_norm_is_that_of_the_whole_batch(spiking, rel):
    """17 samples: steps of 16 and of 1, of which the second process has none. The ANN is in float64."""
    arguments = {"encoder": DirectEncoder(3) if spiking else None, "attention": None, "seed": 0}

    def run(batch):
        net = norms(spiking)
        x, y = data(17)[:]
        generator = torch.Generator().manual_seed(3)
        samples = TensorDataset(x if spiking else x.double(), y)
        train = DataLoader(samples, batch, shuffle=True, generator=generator)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
        trainer = LaSNNTrainer(net, optimizer=optimizer, **arguments)
        history = trainer.fit(train, DataLoader(samples, 5), epochs=2)
        return history, {n: t.clone() for n, t in trainer.student.state_dict().items()}

    history, weights = run(16)
    (first, one), (second, other) = together(lambda rank: run(8))
    for row, ours, theirs in zip(history, first, second):
        for name in ("loss", "top1", "val_loss", "val_top1"):
            assert ours[name] == theirs[name]
            assert ours[name] == pytest.approx(row[name], rel=max(rel, 1e-6)), name
    for name, tensor in weights.items():
        assert torch.equal(one[name], other[name]), name
        torch.testing.assert_close(one[name], tensor, rtol=rel, atol=rel / 10)


class Subclass(DataLoader):
    """Not a plain loader, and shuffled: processes that draw for themselves see other batches."""


@pytest.mark.parametrize("kind", ["plain", "distributed sampler", "in a batch sampler", "list", "subclass"])
def test_evaluation_counts_every_sample_once(kind):
    """5 samples, 3 of them right, in batches of 2: padding to 6 would count one twice."""
    x, y = torch.tensor([[0.0], [1], [2], [3], [0]]), torch.tensor([0, 1, 2, 0, 1])

    def batches():
        if kind == "distributed sampler":
            return DataLoader(TensorDataset(x, y), 2, sampler=DistributedSampler(TensorDataset(x, y), 2, 0))
        if kind == "in a batch sampler":
            sampler = DistributedSampler(TensorDataset(x, y), 2, torch.distributed.get_rank())
            return DataLoader(TensorDataset(x, y), batch_sampler=BatchSampler(sampler, 2, False))
        if kind == "subclass":
            torch.manual_seed(100 + torch.distributed.get_rank())
            return Subclass(TensorDataset(x, y), 2, shuffle=True)
        plain = DataLoader(TensorDataset(x, y), 2)
        return plain if kind == "plain" else list(plain)

    results = together(lambda rank: evaluate(Answer(), batches()), 2)
    expected = evaluate(Answer(), DataLoader(TensorDataset(x, y), 2))
    assert results[0] == results[1]
    assert results[0] == pytest.approx(expected)
    assert (expected["samples"], expected["top1"]) == (5, pytest.approx(60))


class TwoHeads(nn.Module):
    """Only one head has a part in the output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head, self.unused = nn.Linear(64, K), nn.Linear(64, K)

    def forward(self, x):
        return self.head(x.flatten(1))


def test_weights_without_a_part_in_the_output_are_no_obstacle():
    alone = Trainer(TwoHeads(), seed=0)
    alone.fit(loader(24, batch=8), epochs=1)

    def run(rank):
        trainer = Trainer(TwoHeads(), seed=0)
        trainer.fit(loader(24, batch=4), epochs=1)
        return trainer.step, trainer.student.head.weight.detach().clone()

    (steps, weight), (_, other) = together(run)
    assert steps == 3
    assert torch.equal(weight, other)
    torch.testing.assert_close(weight, alone.student.head.weight.detach(), rtol=1e-4, atol=1e-6)


def test_pieces_of_unequal_last_batches():
    """Processes with 4 and 3 samples in their last batch, in 4 pieces: both make 3."""

    def run(rank):
        x, y = data(8)[:]
        sizes = [4, 4 - rank]
        batches = [(x[:n], y[:n]) for n in sizes]
        trainer = Trainer(TwoHeads(), seed=0, options=TrainingOptions(accumulate=4))
        trainer.fit(batches, epochs=1)
        return trainer.step, trainer.student.head.weight.detach().clone()

    (steps, weight), (_, other) = together(run)
    assert steps == 2
    assert torch.equal(weight, other)


def test_a_process_without_a_sample_to_evaluate():
    one = DataLoader(TensorDataset(torch.tensor([[2.0]]), torch.tensor([2])), 2)
    assert [r["samples"] for r in together(lambda rank: evaluate(Answer(), one), 2)] == [1, 1]


def test_samples_are_shared_out_in_the_order_of_one():
    """Steps of two processes hold what a step of one holds; of 13 samples the last step has one."""
    whole = [b.indices for b in TrainingBatches(loader(13, batch=4)).epoch(1, 0, lambda: None)]

    def run(rank):
        batches = TrainingBatches(loader(13, batch=2))
        return len(batches), [(b.indices, b.weight) for b in batches.epoch(1, 0, lambda: None)]

    (n, first), (_, second) = together(run)
    assert n == len(first) == len(second) == 4
    for (one, w1), (two, w2), both in zip(first[:3], second, whole):
        assert sorted(one + two) == sorted(both)
        assert w1 == w2 == 1
    assert first[3] == (whole[3], 2)
    assert second[3] == (whole[3], 0)  # takes part, and counts for nothing


def test_a_step_that_is_not_whole_is_dropped_as_one_process_drops_it():
    def run(rank):
        return len(TrainingBatches(loader(15, batch=4, drop_last=True)))

    assert together(run) == [1, 1]
    assert len(TrainingBatches(loader(15, batch=8, drop_last=True))) == 1


def test_uneven_last_steps_weigh_each_sample_alike():
    """11 samples: steps of 4, 4 and 3, the last one as 2 and 1."""

    def run(batch):
        torch.manual_seed(0)
        trainer = Trainer(nn.Sequential(nn.Flatten(), nn.Linear(64, K)), seed=0)
        trainer.fit(loader(11, batch=batch), epochs=2)
        return trainer.history, trainer.student[1].weight.detach().clone()

    history, weight = run(4)
    (rows, one), (_, other) = together(lambda rank: run(2))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in history], rel=1e-5)
    assert [row["top1"] for row in rows] == [row["top1"] for row in history]
    assert torch.equal(one, other)
    torch.testing.assert_close(one, weight, rtol=1e-4, atol=1e-6)


def test_a_batch_that_cannot_be_shared_is_refused():
    def run(rank):
        with pytest.raises(ValueError, match="recipe.batch is 33, which 2 processes .* give 32 or 34"):
            distributed.share_batch("recipe.batch", 33)
        return distributed.share_batch("recipe.batch", 32)

    assert together(run) == [16, 16]


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_distributed_sampler_is_told_the_epoch(wrapped):
    def run(rank):
        sampler = DistributedSampler(data(8), shuffle=True, seed=1)
        batch_sampler = BatchSampler(sampler, 2, False)
        if wrapped:
            batches = TrainingBatches(DataLoader(data(8), batch_sampler=batch_sampler))
        else:
            batches = TrainingBatches(DataLoader(data(8), 2, sampler=sampler))
        return [[b.indices for b in batches.epoch(number, 0, lambda: None)] for number in (1, 2)]

    first, second = together(run)
    assert first[0] != first[1]
    assert sorted(sum(first[0] + second[0], [])) == list(range(8))


def test_a_bad_step_of_one_process_is_left_out_by_all(tmp_path):
    """Rank 1's second batch overflows; both skip the step, neither waits for ever."""

    def run(rank):
        calls = []

        class Spoiled(CrossEntropy):
            def __call__(self, signals):
                calls.append(1)
                spoil = torch.inf if rank == 1 and len(calls) == 2 else 1
                return {"ce": super().__call__(signals)["ce"] * spoil}

        trainer = make(on_nonfinite="skip", objective=Spoiled())
        history = trainer.fit(loader(32, batch=4), epochs=1)
        return trainer.step, history[0]["skipped"], trainer.student.output.weight.sum().item()

    first, second = together(run)
    assert first == second
    assert first[:2] == (3, 1)


def test_a_resumed_run_of_two_processes(tmp_path):
    class Stop(Exception):
        pass

    class StopAt(Callback):
        def on_step(self, trainer, parts):
            if trainer.step == 5:
                raise Stop

    def run(rank):
        trainer = make(tmp_path / "alone")
        trainer.fit(loader(), epochs=3)
        return {n: t.clone() for n, t in trainer.student.state_dict().items()}

    def cut(rank):
        try:
            # rank 0 alone is told; the other one is where the processes have to agree next
            make(tmp_path / "cut", checkpoint_every=1, callbacks=[StopAt()]).fit(loader(), epochs=3)
        except (Stop, RuntimeError):
            os._exit(0)

    alone = together(run)[0]
    with pytest.raises((EOFError, AssertionError)):
        together(cut)

    def resumed(rank):
        trainer = make(tmp_path / "cut", checkpoint_every=1)
        trainer.fit(loader(), epochs=3)
        return {n: t.clone() for n, t in trainer.student.state_dict().items()}

    again = together(resumed)[0]
    assert all(torch.equal(alone[name], again[name]) for name in alone)
    assert curve(tmp_path / "cut") == curve(tmp_path / "alone")


def test_a_run_of_two_processes_is_not_gone_on_with_by_one(tmp_path):
    together(lambda rank: make(tmp_path).fit(loader(), epochs=1) and None)
    with pytest.raises(ValueError, match="processes: there 2, here None"):
        make(tmp_path).fit(loader(), epochs=2)


def test_alone_nothing_is_asked_of_others():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.from_main("x") == "x"
    assert distributed.of_all(3) == [3]
    assert distributed.any_of([True, False], torch.device("cpu")) == [True, False]


def test_a_worker_killed_under_torchrun_leads_to_a_restart_from_the_last_checkpoint(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", str(EXAMPLE), "--run-dir", str(tmp_path), "--batch", "64", "--epochs", "2",
        "--checkpoint-every", "3",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as file:
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        killed = kill_a_worker_after_a_checkpoint(run.pid, tmp_path / "checkpoints")
        assert run.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if run.poll() is None:
            run.terminate()
            run.wait()
    text = (tmp_path / "log").read_text()
    assert killed
    assert "continuing after epoch" in text
    with open(tmp_path / "steps.csv", newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, 2 * 12 + 1))  # 1437 images in batches of twice 64
    assert "of 360 images" in text
