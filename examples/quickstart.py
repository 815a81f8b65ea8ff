"""Compare methods of training a small SNN on 8x8 digits: LaSNN and its baselines in two minutes.

    python examples/quickstart.py

A teacher and a small ANN are trained; the ANN is converted to an SNN of two time steps. From this start the
SNN is trained by four methods and three seeds. The settings were chosen on images held out of the training
images; the test images are used once, for the table. The images come with scikit-learn. Run the script again
to print the finished results.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import logging
import statistics
from pathlib import Path

from lasnn_sj.experiments import text
from lasnn_sj.experiments.compare import START, Comparison, paired
from lasnn_sj.experiments.pipeline import Recipe

HYBRID, LABEL, LASNN, BOTH = "hybrid (cross-entropy)", "label KD", "LaSNN", "LaSNN + label KD"
COMPARISON = Comparison(
    recipe=Recipe(
        student="conv3_linear2",
        width=0.25,
        T=2,
        encoding="direct",
        dropout=0.1,
        teacher_width=0.5,
        teacher_epochs=8,
        teacher_lr=0.1,
        teacher_batch=32,
        ann_epochs=20,
        ann_lr=0.1,
        ann_batch=32,
        calibration_images=256,
        calibration_steps=50,
        threshold_scale=0.4,
        epochs=10,
        lr=2e-3,
        batch=32,
        validate_every=10,
    ),
    rows={
        HYBRID: "CrossEntropy()",
        LABEL: "LabelKD()",
        LASNN: "CrossEntropy() + Attention('activation')",
        BOTH: "LabelKD() + Attention('activation')",
    },
    baseline=HYBRID,
    judge="test",
    source="digits",
    seeds=(0, 1, 2),
    run_dir=Path("runs/quickstart"),
)


def table(accuracies: dict[str, list[float]]) -> str:
    """Format accuracies by row and seed as a Markdown table of mean and standard deviation."""
    return text.markdown([["", "top-1 %"], *([row, text.spread(top1)] for row, top1 in accuracies.items())])


def sentence(results: dict[str, dict[int, dict]]) -> str:
    """Say how far training raises the converted SNN, and what LaSNN gains on the same seeds."""
    trained = [row for row in COMPARISON.rows if results[row]]
    mean = {row: statistics.mean(one["top1"] for one in results[row].values()) for row in (START, *trained)}
    best = max(trained, key=mean.get)
    said = [f"training raises the converted SNN from {mean[START]:.1f} % to {mean[best]:.1f} % ({best})"]
    for row, other in ((LASNN, HYBRID), (BOTH, LABEL)):
        gains = list(paired(results, row, other).values())
        gain, ahead = statistics.mean(gains), sum(one > 0 for one in gains)
        where = f"{abs(gain):.2f} points {'above' if gain > 0 else 'below'}"
        said.append(f"{row} is {where} {other} (above on {ahead} of {len(gains)} seeds)")
    return f"On {next(iter(results[START].values()))['samples']} test images, {'; '.join(said)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run-dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seeds", type=int, nargs="+", default=COMPARISON.seeds)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    run = dataclasses.replace(COMPARISON, run_dir=arguments.run_dir, seeds=tuple(arguments.seeds))
    with contextlib.redirect_stdout(io.StringIO()):  # the full table is in the folder
        run.run()
    results = run.results()
    accuracies = {}
    for row, stage in (("teacher", "teacher"), ("ANN of the student's size", "ann")):
        result = json.loads((run.run_dir / "shared" / stage / "result.json").read_text())
        accuracies[row] = [result["top1"]]
    for row, by_seed in results.items():
        name = "converted, not trained" if row == START else row
        accuracies[f"{name}, T = {run.recipe.T}"] = [one["top1"] for one in by_seed.values()]
    print(f"\n{table(accuracies)}\n\n{sentence(results)}\n")
    print(f"All columns and the figure: {run.run_dir}/table.md and table.png")


if __name__ == "__main__":
    main()
