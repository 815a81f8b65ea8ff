"""Sparse-KD on CIFAR-100 (reverse-KD, Table 1): the paper's settings, or a laptop's.

    python examples/sparse_kd_cifar100.py paper  --recipe.student spiking_wrn16_4 --device cuda
    python examples/sparse_kd_cifar100.py laptop --seeds 0 1 2

One table: the student alone, self-distillation, sparse-KD with its pruned copies as teachers, and for
comparison teacher-default KD. CIFAR-100 is downloaded by torchvision to ``--root``; where there is no
network give ``--source FILE.npz`` with the arrays x_train, y_train, x_test, y_test. A run that was cut off
goes on when started again.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lasnn_sj import DirectEncoder, data
from lasnn_sj.reverse import Recipe, Study, table, write_csv


@dataclass(frozen=True)
class Run:
    """One table: the recipe's rows over some seeds.

    Attributes:
        recipe: network and settings; its seed is replaced by each of ``seeds``.
        T: time steps.
        source: "cifar100", or an .npz file.
        root: folder of the downloaded data set.
        classes: the first so many of the 100 classes.
        per_class: training images of each class, all if not given.
        shrink: mean over squares of so many pixels, in front of the network; 1 leaves images as they are.
        seeds: one run of all rows each.
        run_dir: results, curves and checkpoints; table.md and table.csv are the tables.
        device: "cpu", "cuda", "cuda:1", ...
    """

    recipe: Recipe
    T: int = 4
    source: str = "cifar100"
    root: Path = Path("data")
    classes: int = 100
    per_class: int | None = None
    shrink: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    run_dir: Path = Path("runs/sparse_kd_cifar100")
    device: str = "cpu"


PAPER = Run(Recipe())
LAPTOP = Run(Recipe(width=0.125, epochs=6, batch=64), classes=10, per_class=500, shrink=2)


def main(run: Run) -> None:
    """Run the rows for every seed, print and write the table after each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    full = data.load(run.source, run.root)
    subset = dataclasses.replace(
        full.first_classes(run.classes, run.per_class), image_size=full.image_size // run.shrink
    )
    encoder = torch.nn.Sequential(torch.nn.AvgPool2d(run.shrink), DirectEncoder(run.T))
    results = {}
    for seed in run.seeds:
        recipe = dataclasses.replace(run.recipe, seed=seed)
        study = Study(recipe, subset, run.run_dir / f"seed{seed}", encoder, run.device)
        results[seed] = study.run()
        text = table(list(results.values()))
        (run.run_dir / "table.md").write_text(text + "\n")
        write_csv(run.run_dir / "table.csv", results)
        print(
            f"\n{run.recipe.student}, width {run.recipe.width}, T = {run.T}, {run.classes} classes, "
            f"{len(subset.train)} training and {len(subset.test)} test images of "
            f"{subset.image_size}x{subset.image_size}, {run.recipe.epochs} epochs\n{text}"
        )


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {"paper": ("The paper's settings.", PAPER), "laptop": ("A narrow network on few images.", LAPTOP)}
        )
    )
