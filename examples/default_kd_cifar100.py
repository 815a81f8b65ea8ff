"""Train with teacher-default KD on CIFAR-100 (reverse distillation, Table 2), at full or laptop size.

    python examples/default_kd_cifar100.py paper  --device cuda
    python examples/default_kd_cifar100.py laptop --seeds 0 1 2

Each of the three networks is trained alone and with a virtual teacher that is always right; no teacher
network is needed. For CIFAR-100 see sparse_kd_cifar100.py. Start an interrupted run again to continue it.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from lasnn_sj.experiments import ReverseRecipe
from lasnn_sj.experiments.runs import ReverseOnImages


@dataclass(frozen=True, kw_only=True)
class Tables(ReverseOnImages):
    """One table for each network, in a folder with its name.

    Attributes:
        students: names of the networks, which replace the recipe's.
    """

    students: tuple[str, ...] = ("spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16")

    def each(self) -> list[ReverseOnImages]:
        """Return one run for each network."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReverseOnImages)}
        return [
            ReverseOnImages(**common | {
                "recipe": dataclasses.replace(self.recipe, student=student),
                "run_dir": self.run_dir / student,
            })
            for student in self.students
        ]  # fmt: skip


PAPER = Tables(recipe=ReverseRecipe(ratios=()), seeds=(0, 1, 2), run_dir=Path("runs/default_kd_cifar100"))
LAPTOP = Tables(
    recipe=ReverseRecipe(ratios=(), width=0.125, epochs=6, batch=64),
    students=("spiking_resnet18", "spiking_wrn16_4"),
    classes=10,
    per_class=500,
    shrink=2,
    seeds=(0, 1, 2),
    run_dir=Path("runs/default_kd_cifar100"),
)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    presets = {
        "paper": ("The paper's settings.", PAPER),
        "laptop": ("Narrow networks on few images.", LAPTOP),
    }
    for table in tyro.extras.overridable_config_cli(presets).each():
        table.run()
