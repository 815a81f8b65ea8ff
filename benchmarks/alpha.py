"""What the attention loss's weight does to a narrow student: LaSNN for several alphas, and without.

    python benchmarks/alpha.py --root FOLDER --teacher-checkpoint resnet20-12fca82f.th

The settings are those of the row ``cifar10/vgg5/lasnn/activation`` of Table II at scale small, but for
alpha, and its intermediate ANNs are those of ``lasnn-sj reproduce II --scale small`` where ``run_dir`` holds
them. Prints a table and writes ``alpha.csv`` and ``alpha.md`` under benchmarks/results/; a run that was cut
off goes on.
"""

import csv
import platform
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from lasnn_sj.experiments import scales
from lasnn_sj.experiments.pipeline import Pipeline
from lasnn_sj.experiments.run import TableRunner
from lasnn_sj.experiments.tables import TABLES
from lasnn_sj.neurons import disable_malloc_trim

RESULTS = Path(__file__).parent / "results"
ROW = "cifar10/vgg5/lasnn/activation/vgg16/poisson-T100"


@dataclass(frozen=True)
class Run:
    """What is compared.

    Attributes:
        teacher_checkpoint: the trained ResNet-20.
        root: folder of the data sets.
        run_dir: that of ``lasnn-sj reproduce``.
        alphas: weights of the attention loss.
        seeds: how many, from 0 on.
    """

    teacher_checkpoint: Path
    root: Path = Path("data")
    run_dir: Path = Path("runs/reproduce")
    alphas: tuple[float, ...] = (0.1, 0.3, 0.9)
    seeds: int = 3


def last_epoch(folder: Path) -> dict[str, float]:
    """The last line of a run's training curves."""
    with open(folder / "metrics.csv", newline="") as file:
        return {name: float(value) for name, value in list(csv.DictReader(file))[-1].items() if value}


def spread(values: list[float], digits: int) -> str:
    """Mean and sample standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main(run: Run) -> None:
    """Train, then tell."""
    disable_malloc_trim()
    row = next(row for row in TABLES["II"].rows if row.name == ROW)
    place = TableRunner("small", run.root, run.run_dir / "small", run.teacher_checkpoint, "cpu")
    jobs = {"none (hybrid)": ("hybrid", None)} | {f"{alpha:g}": ("lasnn", alpha) for alpha in run.alphas}
    found = {job: [] for job in jobs}
    for seed in range(run.seeds):
        for job, (stage, alpha) in jobs.items():
            recipe = scales.lasnn(row, "small", seed).recipe
            if alpha is not None:
                recipe = replace(recipe, alpha=alpha)
            folder = place.run_dir / "alpha" / f"{stage}-{recipe.alpha:g}-seed{seed}"
            pipeline = Pipeline(
                recipe, place.images(row), folder, teacher=place.teacher(row), ann=place.ann(row, seed)
            )
            result = pipeline.run(["start", stage])
            end = last_epoch(folder / stage)
            found[job].append(
                {
                    "start": result["start"]["top1"],
                    "top1": result[stage]["top1"],
                    "spikes": result[stage]["spikes_per_neuron"],
                    "ce": end["ce"],
                    "attention": end.get("attention"),
                }
            )
            print(job, seed, found[job][-1], sep="\t", flush=True)
    head = (
        "alpha",
        "start, top-1 %",
        "top-1 %",
        "spikes per neuron",
        "CE, last epoch",
        "alpha / 2 * attention loss",
    )
    lines = []
    for job, results in found.items():
        columns = {name: [result[name] for result in results] for name in results[0]}
        attention = spread(columns["attention"], 3) if columns["attention"][0] is not None else ""
        lines.append(
            (
                job,
                spread(columns["start"], 2),
                spread(columns["top1"], 2),
                spread(columns["spikes"], 2),
                spread(columns["ce"], 3),
                attention,
            )
        )
    with open(RESULTS / "alpha.csv", "w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    text = "\n".join("| " + " | ".join(line) + " |" for line in (head, ("---",) * len(head), *lines))
    (RESULTS / "alpha.md").write_text(
        f"The weight of the attention loss, by\n\n    python benchmarks/alpha.py --seeds {run.seeds}\n\n"
        f"VGG5 at width 0.125, T = 8, {recipe.epochs} epochs of stage 3 from the same start, 4,000 training "
        f"and 5,000 test images of CIFAR-10, teacher ResNet-20; {run.seeds} seeds, mean ± sample deviation. "
        f"CPU ({platform.machine()}), torch {torch.__version__}.\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Run))
