"""Teacher-default KD on CIFAR-100 (reverse-KD, Table 2): the paper's settings, or a laptop's.

    python examples/default_kd_cifar100.py paper  --device cuda
    python examples/default_kd_cifar100.py laptop --seeds 0 1 2

The three networks, each alone and taught by a virtual teacher that is always right; no network is needed
as teacher. CIFAR-100 comes as in sparse_kd_cifar100.py. A run that was cut off goes on when started again.
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
    """A table for each network.

    Attributes:
        recipe: settings; its student and seed are replaced by each of ``students`` and ``seeds``.
        students: networks.
        T: time steps.
        source: "cifar100", or an .npz file.
        root: folder of the downloaded data set.
        classes: the first so many of the 100 classes.
        per_class: training images of each class, all if not given.
        shrink: mean over squares of so many pixels, in front of the network (VGG16 needs 32x32); 1 leaves
            images as they are.
        seeds: one run of all rows each.
        run_dir: results, curves and checkpoints; table.md and table.csv of each network.
        device: "cpu", "cuda", "cuda:1", ...
    """

    recipe: Recipe
    students: tuple[str, ...] = ("spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16")
    T: int = 4
    source: str = "cifar100"
    root: Path = Path("data")
    classes: int = 100
    per_class: int | None = None
    shrink: int = 1
    seeds: tuple[int, ...] = (0, 1, 2)
    run_dir: Path = Path("runs/default_kd_cifar100")
    device: str = "cpu"


PAPER = Run(Recipe(ratios=()))
LAPTOP = Run(
    Recipe(ratios=(), width=0.125, epochs=6, batch=64),
    students=("spiking_resnet18", "spiking_wrn16_4"),
    classes=10,
    per_class=500,
    shrink=2,
)


def main(run: Run) -> None:
    """Run both rows for every network and seed, print and write the tables."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    full = data.load(run.source, run.root)
    subset = dataclasses.replace(
        full.first_classes(run.classes, run.per_class), image_size=full.image_size // run.shrink
    )
    encoder = torch.nn.Sequential(torch.nn.AvgPool2d(run.shrink), DirectEncoder(run.T))
    for student in run.students:
        folder, results = run.run_dir / student, {}
        for seed in run.seeds:
            recipe = dataclasses.replace(run.recipe, student=student, seed=seed)
            results[seed] = Study(recipe, subset, folder / f"seed{seed}", encoder, run.device).run()
        text = table(list(results.values()))
        (folder / "table.md").write_text(text + "\n")
        write_csv(folder / "table.csv", results)
        print(
            f"\n{student}, width {run.recipe.width}, T = {run.T}, {run.classes} classes, {len(subset.train)} "
            f"training images of {subset.image_size}x{subset.image_size}, {run.recipe.epochs} epochs\n{text}"
        )


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {"paper": ("The paper's settings.", PAPER), "laptop": ("Narrow networks on few images.", LAPTOP)}
        )
    )
