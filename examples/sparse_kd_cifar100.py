"""Train with sparse-KD on CIFAR-100 (reverse distillation, Table 1), at full or laptop size.

    python examples/sparse_kd_cifar100.py paper  --recipe.student spiking_wrn16_4 --device cuda
    python examples/sparse_kd_cifar100.py laptop --seeds 0 1 2

The table compares the student alone, self-distillation, sparse-KD at several pruning ratios, and teacher-
default KD. torchvision downloads CIFAR-100 to ``--root``; without a network, give ``--source FILE.npz``
with the arrays x_train, y_train, x_test, y_test. Start an interrupted run again to continue it.
"""

import logging
from pathlib import Path

import tyro

from lasnn_sj.experiments import ReverseRecipe
from lasnn_sj.experiments.runs import ReverseOnImages

PAPER = ReverseOnImages(recipe=ReverseRecipe(), seeds=(0, 1, 2), run_dir=Path("runs/sparse_kd_cifar100"))
LAPTOP = ReverseOnImages(
    recipe=ReverseRecipe(width=0.125, epochs=6, batch=64),
    classes=10,
    per_class=500,
    shrink=2,
    seeds=(0, 1, 2),
    run_dir=Path("runs/sparse_kd_cifar100"),
)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    presets = {
        "paper": ("The paper's settings.", PAPER),
        "laptop": ("A narrow network on few images.", LAPTOP),
    }
    tyro.extras.overridable_config_cli(presets).run()
