"""Reverse distillation on DVS-Gesture (Tables 1 and 2): the paper's settings, or a laptop's.

    python examples/reverse_kd_dvs_gesture.py paper  --device cuda --recipe.workers 8
    python examples/reverse_kd_dvs_gesture.py laptop --root FOLDER

The recordings are read by Tonic from ``--root`` (the folder with DVSGesture in it), which downloads them
where they are missing; their frames are cached on disk. One table: the student alone, self-distillation,
sparse-KD and teacher-default KD. A picture of a test recording is drawn into the run folder.
"""

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import tyro

from lasnn_sj import events
from lasnn_sj.reverse import Recipe, Study, table, write_csv


@dataclass(frozen=True)
class Run:
    """One table: the recipe's rows over some seeds.

    Attributes:
        recipe: network and settings; its seed is replaced by each of ``seeds``.
        framing: how recordings become frames; its T is the network's.
        root: folder with DVSGesture in it.
        cache: folder of the cached frames, ``root/frames`` if not given.
        augment: flip (with the labels it changes), shift and cutout in training.
        seeds: one run of all rows each.
        run_dir: results, curves, checkpoints and the picture; table.md and table.csv are the tables.
        device: "cpu", "cuda", "cuda:1", ...
    """

    recipe: Recipe
    framing: events.Framing = events.Framing()
    root: Path = Path("data")
    cache: Path | None = None
    augment: bool = True
    seeds: tuple[int, ...] = (0, 1, 2)
    run_dir: Path = Path("runs/reverse_kd_dvs_gesture")
    device: str = "cpu"


PAPER = Run(Recipe(epochs=200, batch=16, optimizer="adam", lr=1e-3, weight_decay=0.0))
LAPTOP = Run(
    Recipe(width=0.125, epochs=12, batch=10, optimizer="adam", lr=3e-3, weight_decay=0.0),
    framing=events.Framing(T=8, shrink=8),
    augment=False,
)


def main(run: Run) -> None:
    """Run the rows for every seed, print and write the table after each."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    gestures = events.load("dvs-gesture", run.root, run.framing, run.augment, run.cache)
    frames, label = gestures.test[0]
    strip, animation = events.draw(frames, run.run_dir, gestures.classes[label].lower().replace(" ", "_"))
    print(f"{strip} and {animation} show a recording of {gestures.classes[label]!r}")
    results = {}
    for seed in run.seeds:
        recipe = dataclasses.replace(run.recipe, seed=seed)
        results[seed] = Study(recipe, gestures, run.run_dir / f"seed{seed}", device=run.device).run()
        text = table(list(results.values()))
        (run.run_dir / "table.md").write_text(text + "\n")
        write_csv(run.run_dir / "table.csv", results)
        size, points = gestures.image_size, 100 / len(gestures.test)
        print(
            f"\n{run.recipe.student}, width {run.recipe.width}, T = {run.framing.T}, {len(gestures.train)} "
            f"training and {len(gestures.test)} test recordings (one is {points:.2f} points), frames of "
            f"{size}x{size}, {run.recipe.epochs} epochs\n{text}"
        )


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {"paper": ("The paper's settings.", PAPER), "laptop": ("A narrow network, small frames.", LAPTOP)}
        )
    )
