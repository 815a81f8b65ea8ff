"""Cost of training on several GPUs: a model from pieces that are measured or printed on data sheets.

    python benchmarks/scaling.py                 # a few minutes of two cores
    python benchmarks/scaling.py --no-measure    # the model alone
    python benchmarks/scaling.py --step-ms 40    # with the step time that you measured on one GPU

Counted: gradient bytes, multiply-accumulates and neurons of VGG5 and ResNet18 at full width. Measured here: a
gloo all-reduce of such gradients with 2 and 4 processes, and the share of communication in a step of small
networks: the processes make a step each for itself and one together, in turns. Modelled: the efficiency at 8
and 64 GPUs, with data-sheet bandwidths. Writes ``results/scaling.md``.

The step time on a GPU is a floor unless ``--step-ms`` is given: the longer of the arithmetic at the data
sheet's float32 rate and the neurons' memory traffic at its memory bandwidth. A real step takes longer, and so
hides more of the communication.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import common
import torch
import torch.distributed as dist
from torch import nn

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.neurons import TimeLoopNode
from lasnn_sj.runtime import distributed

# NVIDIA H100 SXM data sheet: NVLink 900 GB/s in both directions together, float32 67 TFLOP/s, HBM 3.35 TB/s.
NVLINK, FLOPS, MEMORY = 450e9, 67e12, 3.35e12
# NVIDIA DGX H100: eight ConnectX-7 adapters of 400 Gb/s, one for each GPU.
INFINIBAND = 400e9 / 8
LATENCY = 20e-6  # of one collective; assumed, not measured
NODE = 8  # GPUs of one machine
BYTES = 18  # of memory traffic for a neuron and step: 9 forward, 9 backward (float32 in and out, a byte kept)
BACKWARD = 2 / 3  # part of a step that gradients can be sent in
NETWORKS = {"VGG5": "vgg5", "ResNet18": "spiking_resnet18"}
EFFICIENT = 0.9


@dataclass(frozen=True)
class Counted:
    """What a network's step is made of.

    Attributes:
        gradient_bytes: float32 gradients.
        macs: multiply-accumulates of an image and time step.
        neurons: of an image.
        norms: layers of batch norm, each of which costs two small collectives.
    """

    gradient_bytes: int
    macs: int
    neurons: int
    norms: int

    def step_seconds(self, T: int, batch: int) -> float:
        """Shortest time of a step on one GPU; backward costs twice the forward."""
        arithmetic = 3 * 2 * self.macs * T * batch / FLOPS
        return max(arithmetic, BYTES * self.neurons * T * batch / MEMORY)


def build(network: str, width: float = 1.0, size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return getattr(models, network)(10, image_size=size, width=width)


def count(network: str) -> Counted:
    """Run one image for one step and count."""
    net, macs, neurons = build(network).eval(), [], []

    def weights(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        macs.append(output.numel() * module.weight[0].numel())

    def nodes(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        neurons.append(output.numel())

    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(weights)
        elif isinstance(module, TimeLoopNode):
            module.register_forward_hook(nodes)
    with torch.no_grad():
        net(torch.rand(1, 1, 3, 32, 32))
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules())
    return Counted(4 * sum(p.numel() for p in net.parameters()), sum(macs), sum(neurons), norms)


def all_reduce_seconds(size: int, gpus: int) -> float:
    """Ring within a machine; between machines each GPU sends its part of the gradient."""
    inside = min(gpus, NODE)
    seconds = 2 * (inside - 1) / inside * size / NVLINK + LATENCY
    machines = gpus // NODE
    if machines > 1:
        seconds += 2 * (machines - 1) / machines * (size / NODE) / INFINIBAND + LATENCY
    return seconds


def efficiency(step: float, counted: Counted, gpus: int) -> float:
    """Step alone over step together: gradients are sent during the backward pass, small collectives wait."""
    waits = (2 * counted.norms + 2) * LATENCY * (2 if gpus > NODE else 1)  # and the agreement on each loss
    rest = max(0.0, all_reduce_seconds(counted.gradient_bytes, gpus) - BACKWARD * step)
    return step / (step + waits + rest)


def batch_for(counted: Counted, T: int, gpus: int) -> int:
    """Smallest batch of a GPU, in powers of two, at which the efficiency is 90 %."""
    batch = 1
    while efficiency(counted.step_seconds(T, batch), counted, gpus) < EFFICIENT and batch < 1 << 16:
        batch *= 2
    return batch


def model(step_ms: float | None, batch: int) -> list[dict]:
    """A row for each network and T."""
    rows = []
    for name, network in NETWORKS.items():
        counted = count(network)
        for T in (4, 100):
            step = counted.step_seconds(T, batch) if step_ms is None else step_ms / 1000
            row = {
                "network": name, "T": T, "batch of a GPU": batch, "gradient MB": counted.gradient_bytes / 1e6,
                "step ms" + (" (floor)" if step_ms is None else ""): 1000 * step,
            }  # fmt: skip
            for gpus in (8, 64):
                row[f"all-reduce ms, {gpus}"] = 1000 * all_reduce_seconds(counted.gradient_bytes, gpus)
                row[f"efficiency, {gpus}"] = efficiency(step, counted, gpus)
            row["batch for 90 % at 8"] = batch_for(counted, T, 8)
            row["batch for 90 % at 64"] = batch_for(counted, T, 64)
            rows.append(row)
    return rows


def worker(width: float, batch: int, runs: int) -> None:
    """One of several processes: steps for itself, steps together, and all-reduces of whole gradients."""
    torch.set_num_threads(1)
    found = {}
    trainers = [(name, T, network) for name, network in NETWORKS.items() for T in (4, 16)]

    def step_of(name: str, T: int, network: str):
        trainer = LaSNNTrainer(build(network, width), attention=None, encoder=DirectEncoder(T), seed=0)
        images, labels = torch.rand(batch, 3, 32, 32) * 2 - 1, torch.arange(batch) % 10
        trainer.train_step(images, labels)
        return lambda: trainer.train_step(images, labels)

    def seconds(call) -> float:
        """From a barrier until all processes have ended the call."""
        dist.barrier()
        begun = time.perf_counter()
        call()
        dist.barrier()
        return time.perf_counter() - begun

    distributed.initialise(torch.device("cpu"))
    joined = distributed._together
    for name, T, network in trainers:
        distributed._together = lambda: False
        own = step_of(name, T, network)
        distributed._together = joined
        shared, pairs = step_of(name, T, network), []
        for _ in range(runs):  # in turns: both see the same load
            distributed._together = lambda: False
            first = seconds(own)
            distributed._together = joined
            pairs.append((first, seconds(shared)))
        share = statistics.median(1 - one / two for one, two in pairs)
        found[f"step of {name}, T = {T}"] = [*(statistics.median(p) for p in zip(*pairs, strict=True)), share]
    for name, network in NETWORKS.items():
        gradient = torch.zeros(count(network).gradient_bytes // 4)
        times = [seconds(lambda g=gradient: dist.all_reduce(g)) for _ in range(6)][1:]
        found[f"all-reduce {name}"] = [gradient.numel() * 4, statistics.median(times), None]
    if dist.get_rank() == 0:
        print(json.dumps(found))


def measure(processes: int, width: float, batch: int, runs: int) -> dict[str, list[float]]:
    """Start the processes and read what the first says."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        env = os.environ | {
            "TORCHELASTIC_RUN_ID": "scaling", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": port,
            "WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        command = [sys.executable, __file__, "--worker", "--width", str(width), "--batch-here", str(batch),
                   "--runs", str(runs)]  # fmt: skip
        started.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True))
    said = [process.communicate()[0] for process in started]
    if any(process.returncode for process in started):
        raise RuntimeError("a process failed; its message is above")
    return json.loads(said[0].splitlines()[-1])


def table(rows: list[dict]) -> str:
    """Rows as Markdown."""
    lines = [list(rows[0])] + [
        [f"{v:.3g}" if isinstance(v, float) else str(v) for v in r.values()] for r in rows
    ]
    text = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([text[0], "|" + " --- |" * len(rows[0]), *text[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16, help="images of a GPU's step, in the model")
    parser.add_argument("--step-ms", type=float, help="measured time of such a step on one GPU")
    parser.add_argument("--no-measure", action="store_true")
    parser.add_argument("--width", type=float, default=0.25, help="of the networks whose steps are measured")
    parser.add_argument("--batch-here", type=int, default=16, help="images of a process' step here")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.worker:
        worker(a.width, a.batch_here, a.runs)
        return
    text = ["; ".join(common.machine("cpu").values()) + f"; {len(os.sched_getaffinity(0))} cores"]
    if not a.no_measure:
        rows = []
        for processes in (2, 4):
            for what, (one, two, share) in measure(processes, a.width, a.batch_here, a.runs).items():
                row = {
                    "processes": processes,
                    "what": what,
                    "each for itself, ms": "",
                    "together, ms": 1000 * two,
                }
                if what.startswith("all-reduce"):
                    row["what"] += f", {one / 1e6:.1f} MB"
                    row["communication"] = f"{one / two / 1e9:.2f} GB/s"
                else:
                    row["each for itself, ms"] = 1000 * one
                    row["communication"] = f"{100 * share:.0f} % of the step"
                rows.append(row)
        head = f"Measured, gloo, width {a.width:g}, {a.batch_here} images a process, medians of {a.runs}:"
        text.append(f"{head}\n\n{table(rows)}")
    text.append(f"Modelled, H100 with NVLink and InfiniBand:\n\n{table(model(a.step_ms, a.batch))}")
    print("\n\n".join(text))
    if not a.no_measure and a.step_ms is None:
        path = common.RESULTS / "scaling.md"
        path.write_text("# `python benchmarks/scaling.py`\n\n" + "\n\n".join(text) + "\n")
        print(f"\n{path}")


if __name__ == "__main__":
    main()
