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

import tyro

from lasnn_sj.experiments.reverse import Recipe
from lasnn_sj.experiments.runs import ReverseOnImages


@dataclass(frozen=True, kw_only=True)
class Tables(ReverseOnImages):
    """A table for each network, in a folder of its name.

    Attributes:
        students: networks; the recipe's is replaced by each.
    """

    students: tuple[str, ...] = ("spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16")

    def each(self) -> list[ReverseOnImages]:
        """The runs, one for each network."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(ReverseOnImages)}
        return [
            ReverseOnImages(**common | {
                "recipe": dataclasses.replace(self.recipe, student=student),
                "run_dir": self.run_dir / student,
            })
            for student in self.students
        ]  # fmt: skip


PAPER = Tables(recipe=Recipe(ratios=()), seeds=(0, 1, 2), run_dir=Path("runs/default_kd_cifar100"))
LAPTOP = Tables(
    recipe=Recipe(ratios=(), width=0.125, epochs=6, batch=64),
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
