"""Calibrated against plain conversion of a network with batch norm, at few time steps.

    python benchmarks/calibration.py --checkpoint resnet20-12fca82f.th --source cifar10.npz

The network is the published ResNet-20 for CIFAR-10 (github.com/akamaster/pytorch_resnet_cifar10), with direct
input. One batch of training images sets thresholds and biases; accuracy is that of the first test images.
Writes ``calibration.csv`` and ``calibration.md`` under benchmarks/results/.
"""

import csv
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from lasnn_sj import DirectEncoder, models
from lasnn_sj.conversion.calibration import calibrate
from lasnn_sj.data import images as data
from lasnn_sj.neurons import disable_malloc_trim
from lasnn_sj.training.evaluation import evaluate

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """Settings of the comparison.

    Attributes:
        checkpoint: the trained ResNet-20.
        source: "cifar10", or an .npz file.
        root: folder of the downloaded data set.
        T: numbers of time steps; the network is calibrated for each.
        images: training images in the batch that calibrates.
        test_images: test images.
        seed: of the batch and its augmentation.
        device: "cpu", "cuda", ...
    """

    checkpoint: Path
    source: str = "cifar10"
    root: Path = Path("data")
    T: tuple[int, ...] = (4, 8, 16, 32)
    images: int = 128
    test_images: int = 1000
    seed: int = 0
    device: str = "cpu"


def main(run: Run) -> None:
    """Evaluate the ANN, then both conversions for every T."""
    if run.device == "cpu":
        disable_malloc_trim()
    cifar = data.load(run.source, run.root).subset(None, run.test_images)
    ann = models.published_resnet20(run.checkpoint).to(run.device)
    train, test = cifar.loaders(run.images, seed=run.seed)
    torch.manual_seed(run.seed)  # the batch is augmented
    images = next(iter(train))[0].to(run.device)
    lines = [("T", "ann", "plain conversion", "calibrated")]
    top1 = evaluate(ann, test)["top1"]
    for T in run.T:
        converted = (calibrate(ann, images, DirectEncoder(T), correct) for correct in (False, True))
        found = [evaluate(snn, test, DirectEncoder(T), chunk=4)["top1"] for snn in converted]
        lines.append((T, *(f"{value:.2f}" for value in (top1, *found))))
        print(*lines[-1], sep="\t", flush=True)
    with open(RESULTS / "calibration.csv", "w", newline="") as file:
        csv.writer(file).writerows(lines)
    text = "\n".join(
        "| " + " | ".join(map(str, line)) + " |" for line in [lines[0], ("---",) * 4, *lines[1:]]
    )
    where = torch.cuda.get_device_name() if run.device != "cpu" else f"CPU ({platform.machine()})"
    (RESULTS / "calibration.md").write_text(
        f"Calibrated conversion of a ResNet-20 with batch norm, by\n\n    python benchmarks/calibration.py "
        f"--checkpoint {run.checkpoint.name}\n\nTop-1 % on the first {run.test_images} test images of "
        f"CIFAR-10, direct input, {run.images} images to calibrate. {where}, "
        f"torch {torch.__version__}.\n\n{text}\n"
    )
    print(text)


if __name__ == "__main__":
    main(tyro.cli(Run))
