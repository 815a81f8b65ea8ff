"""Train LaSNN on CIFAR-10 with the paper's settings or at laptop size.

    python examples/lasnn_cifar10.py paper  --recipe.student vgg9 --device cuda
    python examples/lasnn_cifar10.py laptop --seeds 0 1 2
    python examples/lasnn_cifar10.py laptop --seeds 0 1 2 --teacher-checkpoint resnet20-12fca82f.th

The last line loads a trained teacher (a ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10) instead
of training one on the laptop's 5,000 images. torchvision downloads CIFAR-10 to ``--root``; without a
network, give ``--source FILE.npz`` with the arrays x_train, y_train, x_test, y_test. Start an interrupted
run again to continue it.
"""

import logging
from pathlib import Path

import tyro

from lasnn_sj.experiments.pipeline import Recipe
from lasnn_sj.experiments.runs import LaSNN

PAPER = LaSNN(recipe=Recipe(student="vgg5", teacher="vgg16"), run_dir=Path("runs/lasnn_cifar10"))
LAPTOP = LaSNN(
    recipe=Recipe(
        student="conv3_linear2",
        width=0.5,
        T=8,
        encoding="direct",
        teacher_epochs=30,
        teacher_lr=0.1,
        teacher_batch=64,
        ann_epochs=60,
        ann_lr=0.05,
        ann_batch=64,
        calibration_steps=100,
        threshold_scale=0.4,
        epochs=20,
        lr=5e-4,
        batch=32,
        validate_every=10,
    ),
    train_images=5000,
    run_dir=Path("runs/lasnn_cifar10"),
)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    presets = {
        "paper": ("The paper's settings.", PAPER),
        "laptop": ("A narrow network and a small T, for two cores.", LAPTOP),
    }
    tyro.extras.overridable_config_cli(presets).run()
