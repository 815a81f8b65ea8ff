"""Train with reverse distillation on DVS-Gesture (Tables 1 and 2), at full or laptop size.

    python examples/reverse_kd_dvs_gesture.py paper  --device cuda --recipe.workers 8
    python examples/reverse_kd_dvs_gesture.py laptop --root FOLDER

Tonic reads the recordings from ``--root``, the folder that contains DVSGesture, and downloads them if they
are missing; their frames are cached on disk. The table compares the student alone, self-distillation,
sparse-KD and teacher-default KD. A picture of one test recording is saved in the run folder.
"""

import logging
from pathlib import Path

import tyro

from lasnn_sj.data import events
from lasnn_sj.experiments import ReverseRecipe
from lasnn_sj.experiments.runs import ReverseOnEvents

PAPER = ReverseOnEvents(
    recipe=ReverseRecipe(epochs=200, batch=16, optimizer="adam", lr=1e-3, weight_decay=0.0),
    seeds=(0, 1, 2),
    run_dir=Path("runs/reverse_kd_dvs_gesture"),
)
LAPTOP = ReverseOnEvents(
    recipe=ReverseRecipe(width=0.125, epochs=12, batch=10, optimizer="adam", lr=3e-3, weight_decay=0.0),
    framing=events.Framing(T=8, shrink=8),
    augment=False,
    seeds=(0, 1, 2),
    run_dir=Path("runs/reverse_kd_dvs_gesture"),
)


def main(run: ReverseOnEvents) -> None:
    """Draw a recording, then train all rows for every seed."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    frames, label = run.data.test[0]
    name = run.data.classes[label]
    strip, animation = events.draw(frames, run.run_dir, name.lower().replace(" ", "_"))
    print(f"{strip} and {animation} show a recording of {name!r}")
    run.run()


if __name__ == "__main__":
    main(
        tyro.extras.overridable_config_cli(
            {"paper": ("The paper's settings.", PAPER), "laptop": ("A narrow network, small frames.", LAPTOP)}
        )
    )
