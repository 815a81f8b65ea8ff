"""A whole LaSNN training step: ours against the same network written in plain SpikingJelly 2.

    python benchmarks/train_step.py                      # VGG5, width 0.25, T = 100, batch 16
    python benchmarks/train_step.py --T 8 25 50 100 200  # cost against T
    python benchmarks/train_step.py --ours-only --runs 15   # gradient against activation attention, alone

Both sides train the same VGG5 student from the same ResNet-20 teacher on Poisson input: encoding, forward,
activation attention at three levels, backward, Adam. The plain side is what its user would write: stock
layers, ``neuron.LIFNode`` with soft reset and ATan, forward hooks that average the spikes over time. Times
are measured in turns in one process; peak memory in processes of each side's own (the median of three), above
what it took after its imports. Writes ``results/train_step_DEVICE.csv`` and ``.png``, for ours alone
``train_step_DEVICE_ours.*``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from lasnn_sj import LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.neurons import keep_freed_memory

THRESHOLD = 0.4  # of every layer: fires at a rate of some percent
SIDES = ("plain SpikingJelly 2", "lasnn_sj", "lasnn_sj, gradient attention")


class PlainVGG5(nn.Module):
    """VGG5 of stock SpikingJelly layers."""

    def __init__(self, num_classes: int, width: float) -> None:
        super().__init__()
        c1, c2, h = round(64 * width), round(128 * width), round(4096 * width)

        def lif() -> neuron.LIFNode:
            return neuron.LIFNode(
                tau=100.0, decay_input=False, v_threshold=THRESHOLD, v_reset=None,
                surrogate_function=surrogate.ATan(), detach_reset=True,
            )  # fmt: skip

        self.net = nn.Sequential(
            layer.Conv2d(3, c1, 3, padding=1, bias=False), lif(), layer.AvgPool2d(2),
            layer.Conv2d(c1, c2, 3, padding=1, bias=False), lif(), layer.Dropout(0.2),
            layer.Conv2d(c2, c2, 3, padding=1, bias=False), lif(), layer.AvgPool2d(2), layer.Flatten(),
            layer.Linear(c2 * 64, h, bias=False), lif(), layer.Dropout(0.2),
            layer.Linear(h, h, bias=False), lif(), layer.Dropout(0.2),
            layer.Linear(h, num_classes, bias=False),
        )  # fmt: skip
        functional.set_step_mode(self.net, "m")
        self.tapped = [self.net[1], self.net[4], self.net[7]]

    def forward(self, x: Tensor) -> Tensor:
        """Potentials of the output after the last step."""
        return self.net(x).sum(0)


def plain_map(a: Tensor) -> Tensor:
    """Activation attention as its user would write it."""
    return F.normalize(a.pow(2).mean(1).flatten(1))


def plain_step(T: int, batch: int, width: float, device: str) -> Callable[[], object]:
    """A LaSNN step in plain SpikingJelly and PyTorch."""
    student = PlainVGG5(10, width).to(device)
    teacher = models.teacher_resnet20(10).to(device).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4, weight_decay=5e-4)
    seen: list[Tensor] = []
    for module in student.tapped:
        module.register_forward_hook(lambda module, args, out: seen.append(out.mean(0)))
    activations: list[Tensor] = []
    for module in (teacher.layer1, teacher.layer2, teacher.layer2):
        module.register_forward_hook(lambda module, args, out: activations.append(out))
    x, y = images(batch, device)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        u = torch.rand(T, *x.shape, device=device)
        scores = student((u <= x.abs()).to(x) * x.sign())
        with torch.no_grad():
            teacher(x)
        levels = zip((activations[0], activations[1], activations[1]), seen)
        attention = sum((plain_map(a) - plain_map(s)).norm(dim=1).mean() for a, s in levels)
        (F.cross_entropy(scores, y) + 0.45 * attention).backward()
        optimizer.step()
        functional.reset_net(student)
        seen.clear()
        activations.clear()

    return step


def our_step(T: int, batch: int, width: float, device: str, attention: str) -> Callable[[], object]:
    """The trainer's own step."""
    student = models.vgg5(10, width=width)
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = THRESHOLD
    teacher = models.teacher_resnet20(10).eval()
    names = [
        ("features.0.neuron", "layer1"),
        ("features.2.neuron", "layer2"),
        ("features.3.neuron", "layer2"),
    ]
    trainer = LaSNNTrainer(
        student, teacher, encoder=PoissonEncoder(T), attention=attention, pairs=names, device=device
    )
    x, y = images(batch, device)
    return lambda: trainer.train_step(x, y)


def images(batch: int, device: str) -> tuple[Tensor, Tensor]:
    """A batch in [-1, 1] and its labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(batch, 3, 32, 32, generator=generator) * 2 - 1
    return x.to(device), (torch.arange(batch) % 10).to(device)


def make(side: str, T: int, batch: int, width: float, device: str) -> Callable[[], object]:
    """The step of one side."""
    torch.manual_seed(0)
    if side == SIDES[0]:
        return plain_step(T, batch, width, device)
    return our_step(T, batch, width, device, "gradient" if side == SIDES[2] else "activation")


def peak_mib() -> float:
    """Highest resident memory of this process so far (``ru_maxrss`` would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_memory(side: str, T: int, batch: int, width: float, device: str, keep: bool) -> None:
    """Run in a process of its own: peak of a few steps above what the imports took."""
    # imports that come late are not the step's: make them all happen on a tiny step first
    make(side, 2, 2, 0.05, device)()
    if keep:
        keep_freed_memory()
    if device == "cuda":
        before = torch.cuda.memory_allocated() / 2**20
        torch.cuda.reset_peak_memory_stats()
    else:
        before = peak_mib()
    step = make(side, T, batch, width, device)
    for _ in range(3):
        step()
    common.synchronize(device)
    after = torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_mib()
    print(json.dumps(after - before))


def memory_mib(side: str, T: int, a: argparse.Namespace) -> float:
    """:func:`print_memory` of a side, the median of three processes: what a heap keeps is up to chance."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        side,
        "--T",
        T,
        "--batch",
        a.batch,
        "--width",
        a.width,
    ]
    command += ["--device", a.device, "--threads", torch.get_num_threads()]
    command += ["--keep-memory"] if a.keep_memory else []
    peaks = []
    for _ in range(3):
        done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"memory of {side}: {done.stderr.strip()}")
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory against T."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, column, label in zip(axes, ("median_s", "peak_mib"), ("seconds a step (median)", "peak MiB")):
        for side in SIDES:
            mine = [row for row in rows if row["what"] == side]
            if mine:
                axis.plot([row["T"] for row in mine], [row[column] for row in mine], "o-", label=side)
        axis.set_xlabel("T")
        axis.set_ylabel(label)
        axis.set_ylim(0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--T", type=int, nargs="+", default=[100])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of PyTorch and the neurons")
    parser.add_argument(
        "--keep-memory", action="store_true", help="ours and plain with neurons.keep_freed_memory()"
    )
    parser.add_argument("--ours-only", action="store_true", help="leave plain SpikingJelly out")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.memory_of:
        print_memory(a.memory_of, a.T[0], a.batch, a.width, a.device, a.keep_memory)
        return
    if a.keep_memory:
        keep_freed_memory()
    about = common.machine(a.device)
    print("; ".join(about.values()))
    rows, sides = [], SIDES[1:] if a.ours_only else SIDES
    for T in a.T:
        calls = {side: make(side, T, a.batch, a.width, a.device) for side in sides}
        seconds = common.in_turns(calls, a.device, a.runs)
        peaks = {side: memory_mib(side, T, a) for side in seconds}
        for side, times in seconds.items():
            rows.append(
                {
                    "what": side, "T": T, "batch": a.batch, "width": a.width,
                    "median_s": statistics.median(times), "min_s": min(times), "max_s": max(times),
                    "runs": len(times), "faster": common.ratio(seconds[sides[0]], times),
                    "against_activation": common.ratio(times, seconds[SIDES[1]]),
                    "peak_mib": peaks[side], "of_first_memory": peaks[side] / peaks[sides[0]],
                    "keep_memory": a.keep_memory,
                }
                | about
            )  # fmt: skip
        print()
        columns = [
            "what",
            "T",
            "median_s",
            "min_s",
            "max_s",
            "faster",
            "against_activation",
            "peak_mib",
            "of_first_memory",
        ]
        common.show([row for row in rows if row["T"] == T], columns)
    name = f"train_step_{a.device}" + "_ours" * a.ours_only + "_keep_memory" * a.keep_memory
    print(f"\n{common.write(name, rows)}")
    plot(rows, common.RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
