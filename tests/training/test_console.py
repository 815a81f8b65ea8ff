"""Lines of training on the console of a program that has not set up logging, and of one that has."""

import subprocess
import sys

import pytest

PROGRAM = """
import logging
import sys
import torch
from torch.utils.data import DataLoader, TensorDataset
from lasnn_sj import DirectEncoder, LaSNNTrainer, models

if "set up" in sys.argv:
    logging.basicConfig(level=logging.INFO, format="logged %(message)s")
torch.manual_seed(0)
loader = DataLoader(TensorDataset(torch.rand(8, 1, 8, 8), torch.arange(8) % 4), 4)
student = models.conv3_linear2(4, in_channels=1, image_size=8, width=0.1)
for module in student.modules():
    if hasattr(module, "v_threshold"):
        module.v_threshold = 0.01
teacher = models.teacher_resnet20(4, in_channels=1, width=0.125).eval()
run = sys.argv[1]
LaSNNTrainer(student, teacher, encoder=DirectEncoder(2), run_dir=run).fit(loader, loader, epochs=2)
print(logging.getLogger("lasnn_sj").level, logging.getLogger("lasnn_sj").handlers)
"""


@pytest.mark.parametrize("arguments", [(), ("set up",)], ids=str)
def test_epochs_and_pairs_are_shown_once(arguments, tmp_path):
    run = tmp_path / "runs" / "first"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(run), *arguments], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stderr.splitlines() if "attention pair" in line or "epoch" in line]
    start = "logged " if arguments else ""
    pairs = [line for line in lines if line.startswith(f"{start}attention pair ")]
    epochs = [line for line in lines if line.startswith(f"{start}runs/first: epoch ")]
    assert len(pairs) >= 2
    assert [line.split("epoch ")[1][0] for line in epochs] == ["1", "2"]
    assert all("validation accuracy" in line for line in epochs)
    assert len(lines) == len(pairs) + 2
    assert done.stdout.splitlines() == ["0 []"]
