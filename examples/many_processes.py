"""Train with one process or many: digits, a small student, a teacher.

    python examples/many_processes.py
    torchrun --standalone --nproc-per-node=2 --max-restarts=3 examples/many_processes.py  # one machine

Two machines with eight GPUs each; run the same command on both, where ``--rdzv-endpoint`` names one of
them:

    torchrun --nnodes=2 --nproc-per-node=8 --max-restarts=3 --rdzv-id=42 --rdzv-backend=c10d \\
        --rdzv-endpoint=node0.example.org:29500 examples/many_processes.py --device cuda

``--batch`` is the batch of each process: two processes take steps of twice as many images. Only the process
of rank 0 writes the run folder. When a process dies, torchrun restarts all of them, and they continue from
the last checkpoint.
"""

import argparse
import logging
from pathlib import Path

import torch

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.data import images as data
from lasnn_sj.training import TrainingOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/many_processes"))
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda"')
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="images per step and process")
    parser.add_argument("--checkpoint-every", type=int, default=20, help="steps between checkpoints")
    a = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")

    torch.manual_seed(0)  # every process builds the same networks
    digits = data.load("digits")
    train_loader, test_loader = digits.loaders(a.batch)
    teacher = models.teacher_resnet20(10, in_channels=1, width=0.25).eval()  # untrained: a demonstration
    student = models.conv3_linear2(10, in_channels=1, image_size=8, width=0.25)
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.3
    trainer = LaSNNTrainer(
        student,
        teacher,
        encoder=DirectEncoder(T=4),
        optimizer=torch.optim.Adam(student.parameters(), lr=1e-3),
        run_dir=a.run_dir,
        device=a.device,
        seed=0,
        options=TrainingOptions(checkpoint_every=a.checkpoint_every),
    )
    trainer.fit(train_loader, test_loader, epochs=a.epochs)
    result = trainer.evaluate(test_loader)  # all processes together, each image once
    print(f"{result['top1']:.2f} % of {result['samples']} images")


if __name__ == "__main__":
    main()
