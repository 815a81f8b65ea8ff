"""benchmarks/on_gpu.sh: each part rehearsed on the CPU at toy size, and what happens when a part overruns."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parents[2]


def run(*arguments, **environment):
    """The finished script."""
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "on_gpu.sh"), *map(str, arguments)],
        env={**os.environ, "PYTHON": sys.executable, "DEVICE": "cpu", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Noise as CIFAR-10 in sheets, in two folders, and a teacher as it came out of its initialisation."""
    from PIL import Image

    from lasnn_sj import models

    folder = tmp_path_factory.mktemp("data")
    pixels = np.random.RandomState(0)
    for name, place in (("train_00", "a"), ("train_01", "b"), ("test_00", "b")):
        (folder / place).mkdir(exist_ok=True)
        sheet = pixels.randint(0, 256, (2 * 32, 10 * 32, 3)).astype(np.uint8)
        Image.fromarray(sheet).save(folder / place / f"{name}.webp", lossless=True)
    labels = {"y_train": np.arange(40) % 10, "y_test": np.arange(20) % 10}
    np.savez(folder / "a" / "labels.npz", **labels)
    weights = {f"module.{name}": value for name, value in models.teacher_resnet20(10).state_dict().items()}
    torch.save({"state_dict": weights}, folder / "a" / "resnet20-12fca82f.th")
    return folder


def test_first(tmp_path):
    done = run("first", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    whats = {row["what"] for row in table(tmp_path / "neuron_cpu.csv")}
    assert {"SpikingJelly 2 LIFNode", "lasnn_sj numba, LIFNode of the paper"} <= whats
    rows = table(tmp_path / "train_step_cpu.csv")
    assert {row["what"] for row in rows} == {"plain SpikingJelly 2", "lasnn_sj"}
    assert all(float(row["epoch_minutes"]) > 0 for row in rows)
    log = (tmp_path / "first.log").read_text()
    assert "kernels: status 0" in log
    assert "graph: status 0" in log


def test_train(data, tmp_path):
    done = run("train", tmp_path, DATA=str(data))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path / "stage3.csv")
    assert [row["method"] for row in rows[:3]] == ["hybrid", "lasnn", "lasnn_label_kd"]
    assert {row["steps"] for row in rows[:3]} == {"2"}
    assert all(0 <= float(row["test_top1"]) <= 100 for row in rows)
    assert float(rows[1]["attention"]) > 0
    assert not rows[0]["attention"]
    for method in ("hybrid", "lasnn", "lasnn_label_kd"):
        assert (tmp_path / f"{method}.safetensors").stat().st_size > 1e6


def test_more(tmp_path):
    done = run("more", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    whats = {row["what"] for row in table(tmp_path / "train_step_cpu.csv")}
    assert "lasnn_sj, gradient attention" in whats


def test_a_step_that_overruns_is_stopped_and_keeps_what_it_wrote(tmp_path):
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *pytest*) echo begun; echo kept >"$RESULTS_DIR/kept"; sleep 60 ;; esac\n'
    )
    stub.chmod(0o755)
    done = run("first", tmp_path / "out", PYTHON=str(stub), LIMIT="3")
    assert done.returncode == 1
    log = (tmp_path / "out" / "first.log").read_text()
    assert "begun" in log
    assert "kernels: status 124" in log
    assert "neuron: no time left" in log
    assert (tmp_path / "out" / "kept").read_text() == "kept\n"


@pytest.mark.parametrize(("arguments", "environment", "message"), [
    ((), {}, "usage: benchmarks/on_gpu.sh first|train|more OUT"),
    (("second", "out"), {}, "usage: benchmarks/on_gpu.sh first|train|more OUT"),
    (("first",), {}, "OUT is missing"),
    (("train", "OUT"), {"DATA": "nowhere"}, "nowhere: No such file or directory"),
    (("train", "OUT"), {}, "DATA must name the folder with CIFAR-10"),
])  # fmt: skip
def test_a_wrong_call_is_refused(arguments, environment, message, tmp_path):
    done = run(*(tmp_path if a == "OUT" else a for a in arguments), **environment)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr


def test_without_a_device_nothing_runs(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    done = run("first", tmp_path, DEVICE="cuda")
    assert done.returncode == 2
    assert "DEVICE=cpu rehearses" in done.stdout + done.stderr or "missing Python packages" in done.stdout
