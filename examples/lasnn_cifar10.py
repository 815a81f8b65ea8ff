"""LaSNN on CIFAR-10: the paper's settings, or a laptop's.

    python examples/lasnn_cifar10.py paper  --recipe.student vgg9 --device cuda
    python examples/lasnn_cifar10.py laptop --seeds 0 1 2
    python examples/lasnn_cifar10.py laptop --seeds 0 1 2 --teacher-checkpoint resnet20-12fca82f.th

The last one takes a ready teacher (a ResNet-20 of github.com/akamaster/pytorch_resnet_cifar10) instead of
training one on the laptop's few images. CIFAR-10 is downloaded by torchvision to ``--root``; where there is
no network give ``--source FILE.npz`` with the arrays x_train, y_train, x_test, y_test. A run that was cut off
goes on when started again.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lasnn_sj import data, models
from lasnn_sj.neurons import keep_freed_memory
from lasnn_sj.pipeline import Pipeline, Recipe, table


@dataclass(frozen=True)
class Run:
    """One table: the recipe's stages over some seeds.

    Attributes:
        recipe: networks and settings; its seed is replaced by each of ``seeds``.
        source: "cifar10", or an .npz file.
        root: folder of the downloaded data set.
        train_images, test_images: how many of each, all if not given.
        seeds: one run of all stages each.
        run_dir: results, curves and checkpoints.
        teacher_checkpoint: a trained ResNet-20 that takes the place of stage 1.
        device: "cpu", "cuda", "cuda:1", ...
    """

    recipe: Recipe
    source: str = "cifar10"
    root: Path = Path("data")
    train_images: int | None = None
    test_images: int | None = None
    seeds: tuple[int, ...] = (0,)
    run_dir: Path = Path("runs/lasnn_cifar10")
    teacher_checkpoint: Path | None = None
    device: str = "cpu"


PAPER = Run(Recipe(student="vgg5", teacher="vgg16"))
LAPTOP = Run(
    Recipe(
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
)


def ready_teacher(path: Path) -> torch.nn.Module:
    """The published ResNet-20, which was trained on images normalised with ImageNet's statistics."""
    net = models.teacher_resnet20(num_classes=10)
    weights = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    return models.WithStatistics(net, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).eval()


def main(run: Run) -> None:
    """Run the stages for every seed and print the table."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if run.device == "cpu":
        keep_freed_memory()  # mapping memory anew for every large tensor takes longer than filling it
    images = data.load(run.source, run.root).subset(run.train_images, run.test_images)
    teacher = None if run.teacher_checkpoint is None else ready_teacher(run.teacher_checkpoint)
    results = []
    for seed in run.seeds:
        recipe = dataclasses.replace(run.recipe, seed=seed)
        folder = run.run_dir / f"seed{seed}"
        results.append(Pipeline(recipe, images, folder, teacher=teacher, device=run.device).run())
    text = table(run.recipe, results)
    (run.run_dir / "table.md").write_text(text + "\n")
    print(f"\n{run.recipe.student}, width {run.recipe.width}, {len(images.train)} training images\n{text}")


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {
                "paper": ("The paper's settings.", PAPER),
                "laptop": ("A small network and T, on two cores.", LAPTOP),
            }
        )
    )
