"""Stage 3 of LaSNN from a trained intermediate ANN: hybrid, LaSNN, LaSNN + label KD, side by side.

    python benchmarks/stage3.py --data .data --minutes 6 --out out            # on a GPU
    python benchmarks/stage3.py --data .data --device cpu --T 4 --images 512 --minutes 2 --out out

The ANN is converted, its thresholds are balanced on 512 images and scaled by 0.7, its output weights by the
factor of least cross-entropy on these images, and copies of this one SNN are trained with Adam 1e-4 by each
method, on the same images in the same order with the same codes. The methods take turns, an epoch each. The
first epoch's time decides how many epochs the minutes allow; the weight of the attention loss decays over
these. Writes ``stage3.csv`` (a row for each method and epoch) and each method's weights into ``--out`` as
it goes, so a run that is cut off keeps its last whole epoch.

``--data`` is a folder that holds, at any depth, ``labels.npz`` with ``y_train`` and ``y_test`` and lossless
sheets ``train_00.webp``, ``test_00.webp``, ... of 1,000 CIFAR-10 images each, row by row; or ``cifar10.npz``.
Training uses the sheets that are there, from the first on. The test images are looked at after each
epoch and choose nothing.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path

import common
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lasnn_sj import LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.conversion import balance_thresholds, convert, scale_output
from lasnn_sj.data import DeviceLoader, Images, transforms
from lasnn_sj.distillation import LabelKD
from lasnn_sj.training import TrainingOptions, evaluate

WEIGHTS = Path(__file__).parent / "weights" / "conv3_linear2_w1.safetensors"
METHODS = ("hybrid", "lasnn", "lasnn_label_kd")
RESERVE = 0.9  # share of the remaining time that further epochs are planned for


def sheets(folder: Path, split: str) -> np.ndarray:
    """Images ``[n, 32, 32, 3]`` of a split, uint8, in order.

    Raises:
        FileNotFoundError: no first sheet.
    """
    from PIL import Image

    found = {path.name: path for path in folder.rglob(f"{split}_*.webp")}
    parts: list[np.ndarray] = []
    while (name := f"{split}_{len(parts):02d}.webp") in found:
        sheet = np.asarray(Image.open(found[name]).convert("RGB"))
        rows, columns = sheet.shape[0] // 32, sheet.shape[1] // 32
        parts.append(sheet.reshape(rows, 32, columns, 32, 3).swapaxes(1, 2).reshape(-1, 32, 32, 3))
    if not parts:
        raise FileNotFoundError(f"{folder} holds neither cifar10.npz nor {split}_00.webp")
    return np.concatenate(parts)


def images_of(folder: Path, split: str, count: int | None) -> Images:
    """The first images of a split, not augmented."""
    packed = next(iter(folder.rglob("cifar10.npz")), None)
    if packed is not None:
        with np.load(packed) as arrays:
            pixels, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    else:
        pixels = sheets(folder, split)
        with np.load(next(folder.rglob("labels.npz"))) as arrays:
            labels = arrays[f"y_{split}"]
    pixels = pixels[:count]
    return Images(pixels, labels[: len(pixels)].reshape(-1), transforms(32, augment=False))


def starting_point(
    weights: Path, network: str, width: float, train: Images, a: argparse.Namespace
) -> nn.Module:
    """The SNN that stage 3 starts from."""
    ann = models.create(network, num_classes=10, width=width, spiking=False)
    ann.load_state_dict(load_file(weights))
    snn = convert(ann, leak=0.99).to(a.device)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:512]
    batch, labels = (torch.stack(part).to(a.device) for part in zip(*(train[int(i)] for i in order)))
    encoder = PoissonEncoder(a.calibration_steps, torch.Generator(a.device).manual_seed(0))
    thresholds = balance_thresholds(snn, batch, encoder, scale=0.7)
    codes = PoissonEncoder(a.T, torch.Generator(a.device).manual_seed(0))
    factor = scale_output(snn, batch, labels, codes)
    print(
        f"output weights times {factor:.4g}; thresholds: "
        + ", ".join(f"{value:.4g}" for value in thresholds.values()),
        flush=True,
    )
    return snn


def trainer_of(method: str, start: nn.Module, teacher: nn.Module, a: argparse.Namespace) -> LaSNNTrainer:
    """A trainer with a copy of the starting point."""
    encoder = PoissonEncoder(a.T, torch.Generator(a.device).manual_seed(1))
    options = TrainingOptions(precision=a.precision, compile=a.compile)
    shared = {"encoder": encoder, "options": options, "device": a.device}
    if method == "hybrid":
        return LaSNNTrainer(copy.deepcopy(start), **shared)
    objective = LabelKD() if method == "lasnn_label_kd" else None
    return LaSNNTrainer(copy.deepcopy(start), teacher, attention="activation", objective=objective, **shared)


def epoch(
    trainer: LaSNNTrainer, loader: DeviceLoader, until: float, most: int
) -> tuple[dict[str, float], int]:
    """Train an epoch, or at least a step until a time or number of steps; return means and the steps."""
    totals: dict[str, torch.Tensor] = {}
    steps = seen = 0
    trainer.student.train()
    for images, labels in loader:
        if steps and (steps >= most or time.monotonic() > until):
            break
        result = trainer.train_step(images, labels)
        correct = (result.scores.argmax(1) == labels).sum()
        for name, value in {**result.parts, "train_top1": 100 * correct / len(labels)}.items():
            totals[name] = totals.get(name, 0) + value * len(labels)
        steps, seen = steps + 1, seen + len(labels)
    trainer.finish_steps()
    return {name: float(total) / seen for name, total in totals.items()}, steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="of the ANN")
    parser.add_argument("--network", default="conv3_linear2")
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--teacher", type=Path, help="resnet20-12fca82f.th; below --data if not given")
    parser.add_argument("--T", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--calibration-steps", type=int, default=2500)
    parser.add_argument("--images", type=int, help="training images; all if not given")
    parser.add_argument("--test-images", type=int, help="test images; all if not given")
    parser.add_argument("--most-epochs", type=int, default=100)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--compile", choices=["graph"], help="as TrainingOptions")
    a = parser.parse_args()
    a.compile = a.compile or False
    begun, until = time.monotonic(), time.monotonic() + 60 * a.minutes
    a.out.mkdir(parents=True, exist_ok=True)
    about = common.machine(a.device)
    print("; ".join(about.values()), flush=True)
    train, test = images_of(a.data, "train", a.images), images_of(a.data, "test", a.test_images)
    path = a.teacher or next(a.data.rglob("resnet20-12fca82f.th"))
    teacher = models.published_resnet20(path).to(a.device)
    test_loader = DeviceLoader(test, 500, a.device)
    start = starting_point(a.weights, a.network, a.width, train, a)
    runs = {
        method: (
            trainer_of(method, start, teacher, a),
            DeviceLoader(train, a.batch, a.device, augment=True, shuffle=True, drop_last=True),
        )
        for method in a.methods
    }
    print(f"{len(train)} training images, {len(test)} test images, ready after "
          f"{time.monotonic() - begun:.0f} s", flush=True)  # fmt: skip

    rows, epochs, most, done = [], 1, len(next(iter(runs.values()))[1]), 0
    while done < min(epochs, a.most_epochs):
        first = time.monotonic()
        for number, (method, (trainer, loader)) in enumerate(runs.items()):
            trainer.epochs = epochs
            share = until if done else first + (until - first) / (len(runs) - number)
            at = time.monotonic()
            means, steps = epoch(trainer, loader, share, most)
            common.synchronize(a.device)
            seconds = time.monotonic() - at
            if done and steps < most:  # the methods would have had unequal steps
                print(f"out of time in epoch {done + 1}, which does not count", flush=True)
                return
            most = min(most, steps)
            trainer.history.append({"epoch": done + 1})
            encoder = PoissonEncoder(a.T, torch.Generator(a.device).manual_seed(2))
            result = evaluate(trainer.student, test_loader, encoder, device=a.device)
            row = {
                "method": method, "epoch": done + 1, "epochs": epochs, "steps": steps, "seconds": seconds,
                "images_per_second": steps * a.batch / seconds, **means,
                "test_top1": result["top1"], "test_loss": result["loss"], "T": a.T, "batch": a.batch,
                "images": len(train), "precision": a.precision, "compile": str(a.compile),
            }  # fmt: skip
            if a.device == "cuda":
                row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
            rows.append(row | about)
            common.write("stage3", rows, a.out)
            common.show([row], ["method", "epoch", "steps", "seconds", "ce", "train_top1", "test_top1"])
            part = a.out / f".{method}.safetensors"
            save_file({k: v.contiguous() for k, v in trainer.student.state_dict().items()}, part)
            part.replace(a.out / f"{method}.safetensors")
        done += 1
        if done == 1:
            spent = time.monotonic() - first
            epochs = 1 + max(0, int(RESERVE * (until - time.monotonic()) / spent))
            print(f"an epoch of all methods takes {spent:.0f} s: {epochs} epochs", flush=True)


if __name__ == "__main__":
    main()
