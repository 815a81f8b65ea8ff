"""Pipelines on several processes: the results of one process, one writer, restarts."""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import threading

import pytest
import torch
from processes import kill_a_worker_after_a_checkpoint, together
from torch.utils.data import DataLoader

from lasnn_sj import DirectEncoder, models
from lasnn_sj.analysis.spikes import spike_statistics
from lasnn_sj.data import images as data
from lasnn_sj.experiments import reproduce, runs
from lasnn_sj.experiments.pipeline import DEFAULT, Pipeline, Recipe
from lasnn_sj.experiments.recipes import ReverseRecipe
from lasnn_sj.experiments.reverse import ReversePipeline

# Nothing is drawn at random while it trains: dropout masks are each process' own.
RECIPE = Recipe(
    student="conv3_linear2", width=0.1, T=2, encoding="direct", dropout=0.0, teacher_width=0.25,
    teacher_epochs=1, teacher_lr=0.01, teacher_batch=32, ann_epochs=2, ann_lr=0.1, ann_batch=16,
    calibration_images=32, calibration_steps=10, threshold_scale=0.5, epochs=1, lr=1e-3, batch=32,
)  # fmt: skip
KILLS = int(os.environ.get("STAGE_KILLS", "3"))
COSTS = ("seconds", "seconds_per_epoch", "peak_memory_mib")


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").split(100).subset(250, 65)


def without_costs(results):
    return {row: {k: v for k, v in one.items() if k not in COSTS} for row, one in results.items()}


def assert_same(results, others):
    """The same but for the order in which floats are added; predictions and spikes are equal."""
    assert results.keys() == others.keys()
    for row, one in without_costs(results).items():
        other = without_costs(others)[row]
        assert one.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-4), row
        assert one == other, row


def test_two_processes_have_the_table_of_one(digits, tmp_path):
    """250 training images: the last steps are not even; 65 test images: shares of 33 and 32.

    The teacher is given: in float32 the trained one, with batch norm, makes the last digit grow by the step.
    """
    stages = (*DEFAULT, "calibrated", "label_kd")
    torch.manual_seed(0)
    teacher = models.teacher_resnet20(10, in_channels=1, width=0.125).eval()

    def run(folder):
        return Pipeline(RECIPE, digits, tmp_path / folder, teacher).run(stages)

    alone = run("alone")
    one, other = together(lambda rank: run("both"))
    assert one == other
    assert_same(one, alone)
    assert all(result["samples"] == 65 for result in one.values())
    assert run("both") == one  # one process reads what two wrote


def test_two_processes_have_the_reverse_distillation_of_one(digits, tmp_path):
    recipe = ReverseRecipe(width=0.05, epochs=1, batch=32, ratios=(0.3,), lr=0.01)

    def run(folder):
        return ReversePipeline(recipe, digits, tmp_path / folder, DirectEncoder(2)).run()

    alone = run("alone")
    one, other = together(lambda rank: run("both"))
    assert one == other
    for row, result in alone.items():
        assert one[row]["loss"] == pytest.approx(result["loss"], rel=1e-2)
        assert one[row]["samples"] == 65
    assert list(one) == ["alone", "sparse 0.3", "default"]


def test_a_comparison_of_two_processes(tmp_path, capfd):
    """Rows one after the other, each on both processes; printed and written once."""
    whole = runs.read("compare_digits")
    recipe = dataclasses.replace(RECIPE, ann_epochs=1)
    few = {"rows": {"hybrid": "CrossEntropy()"}, "gains": {}, "baseline": "hybrid"}

    def run(folder):
        return dataclasses.replace(whole, **few, seeds=(0,), recipe=recipe, run_dir=folder).run()

    alone = run(tmp_path / "alone")
    capfd.readouterr()
    one, other = together(lambda rank: run(tmp_path / "both"))
    assert one == other
    assert_same(one[0], alone[0])
    assert capfd.readouterr().out.count("# Comparison") == 1


def test_a_table_of_two_processes(tmp_path):
    def run(rank):
        return reproduce("II", ["cifar10/conv3_linear2/converted"], "smoke", 1, run_dir=tmp_path)

    one, other = together(run)
    assert one == other == (tmp_path / "smoke" / "table_II.md").read_text()
    assert len(list(tmp_path.glob("smoke/runs/*/converted/result.json"))) == 1


def test_spikes_are_counted_once(digits):
    """70 of 250 images in batches of 16, the last with 6: three for one process and two for the other."""
    torch.manual_seed(0)
    net = models.conv3_linear2(10, in_channels=1, image_size=8, width=0.1)
    loader = DataLoader(digits.train, 16)
    alone = spike_statistics(net, loader, DirectEncoder(4), samples=70)
    for one in together(lambda rank: spike_statistics(net, loader, DirectEncoder(4), samples=70)):
        assert one == alone
    assert alone.samples == 70
    few = spike_statistics(net, loader, DirectEncoder(4), samples=3)  # nothing for the second process
    assert together(lambda rank: spike_statistics(net, loader, DirectEncoder(4), samples=3)) == [few, few]


def test_a_number_of_processes_that_does_not_divide_the_batch(digits, tmp_path):
    def run(rank):
        recipe = dataclasses.replace(RECIPE, ann_batch=15)
        with pytest.raises(ValueError, match="recipe.ann_batch is 15, which 2 processes .* give 14 or 16"):
            Pipeline(recipe, digits, tmp_path / "run")
        return (tmp_path / "run").exists()

    assert together(run) == [False, False]


def test_settings_of_another_run_are_refused_by_every_process(digits, tmp_path):
    Pipeline(RECIPE, digits, tmp_path)

    def run(rank):
        with pytest.raises((ValueError, RuntimeError), match="lr: there 0.001, here 0.5"):
            Pipeline(dataclasses.replace(RECIPE, lr=0.5), digits, tmp_path)
        return True

    assert together(run) == [True, True]


def killed_in(stage, victim, delay, run):
    """Run on two processes, one of which is killed so many seconds after it has begun a stage."""

    def begin(rank):
        if rank == victim:
            original = Pipeline._run

            def armed(self, name, folder):
                if name == stage:
                    threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
                return original(self, name, folder)

            Pipeline._run = armed
        return run(rank)

    try:
        together(begin)
    except (AssertionError, EOFError):
        return True
    return False


def test_workers_killed_in_each_stage_lose_nothing(digits, tmp_path):
    """Stages and processes in turn, several kills in one run; STAGE_KILLS says how many there are in all."""
    recipe, draw, done = dataclasses.replace(RECIPE, dropout=0.2), random.Random(0), 0
    alone = without_costs(together(lambda rank: Pipeline(recipe, digits, tmp_path / "alone").run())[0])
    stages = ("ann", "converted", "lasnn") if KILLS <= 3 else DEFAULT
    while done < KILLS:
        folder = tmp_path / f"from{done}"

        def run(rank, folder=folder):
            return Pipeline(recipe, digits, folder).run()

        for number, stage in enumerate(stages[: KILLS - done]):
            done += killed_in(stage, number % 2, draw.uniform(0.0, 0.1), run)
        assert without_costs(together(run)[0]) == alone


def test_the_command_line_under_torchrun_with_a_worker_killed(tmp_path):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "--max-restarts=1", "-m", "lasnn_sj", "train", "smoke_digits", "--run-dir", str(tmp_path / "run"),
        "--recipe.ann-epochs", "3", "--stages", "ann", "converted", "hybrid",
    ]  # fmt: skip
    with open(tmp_path / "log", "w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
    try:
        killed = kill_a_worker_after_a_checkpoint(process.pid, tmp_path / "run" / "seed0/ann/checkpoints")
        assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    text = (tmp_path / "log").read_text()
    assert killed
    assert text.count("| hybrid (CE only), T = 4 |") == 1, text[-3000:]
