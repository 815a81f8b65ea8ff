"""LaSNN in two minutes: teacher, intermediate ANN, conversion and distillation on 8x8 digits.

    python examples/quickstart.py

Needs no download: the images come with scikit-learn. Run it again and the finished stages are skipped.
"""

import argparse
import logging
from pathlib import Path

from lasnn_sj.data import images as data
from lasnn_sj.experiments.pipeline import Pipeline, Recipe, table

RECIPE = Recipe(
    student="conv3_linear2",
    width=0.5,
    T=8,
    encoding="direct",
    dropout=0.1,
    teacher_epochs=8,
    teacher_lr=0.1,
    teacher_batch=64,
    ann_epochs=20,
    ann_lr=0.1,
    ann_batch=32,
    calibration_images=256,
    calibration_steps=50,
    threshold_scale=0.4,
    epochs=6,
    lr=5e-4,
    batch=32,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    run_dir = parser.parse_args().run_dir
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results = Pipeline(RECIPE, data.load("digits"), run_dir).run()
    print()
    print(table(RECIPE, [results]))
    print(f"\nCurves: tensorboard --logdir {run_dir}")


if __name__ == "__main__":
    main()
