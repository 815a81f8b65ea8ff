"""A whole LaSNN training step: ours against the same network written in plain SpikingJelly 2.

    python benchmarks/train_step.py                         # VGG5, width 0.25, T = 100, batch 16
    python benchmarks/train_step.py --T 8 25 50 100 200     # cost against T
    python benchmarks/train_step.py --width 0.25 0.5 1      # and against width
    python benchmarks/train_step.py --width 1 --time-chunks 2
    python benchmarks/train_step.py --ours-only --runs 15   # gradient against activation attention, alone
    python benchmarks/train_step.py --against CHECKOUT      # ours against another checkout of this project
    python benchmarks/train_step.py --device cuda --width 1 --networks conv3_linear2 vgg5 vgg9 \\
        --batch 16 64 --precision float32 bfloat16 --compile no graph

Both sides train the same student from the same ResNet-20 teacher on Poisson input: encoding, forward,
activation attention at three levels, backward, Adam. The plain side is what a user would write: stock layers,
``neuron.LIFNode`` with soft reset and ATan, forward hooks that average the spikes over time. On the CPU times
are measured in turns in one process (with ``--against`` in one process for each checkout) and peak memory in
separate processes (the median of three), above what each took after its imports. On CUDA the sides run one
after the other, and the allocator tells each peak. ``epoch_minutes`` is the time of 50,000 images. Writes
``results/train_step_DEVICE.csv`` after each setting and ``.png``; names end in ``_ours``, ``_against`` or
``_widths`` or ``_2_chunks`` with those options.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import Tensor, nn

from lasnn_sj import LaSNNTrainer, PoissonEncoder, models

THRESHOLD = 0.4  # of every layer: fires at a rate of some percent
PLAIN, OURS, GRADIENT = "plain SpikingJelly 2", "lasnn_sj", "lasnn_sj, gradient attention"
OTHER = "lasnn_sj, other checkout"
# Convolutions and pools, sizes of hidden linear layers, and the teacher's layer for each tapped convolution.
NETWORKS = {
    "conv3_linear2": ((64, "A", 128, "A", 128, "A"), (256,), {0: "layer1", 2: "layer2", 4: "layer3"}),
    "vgg5": ((64, "A", 128, 128, "A"), (4096, 4096), {0: "layer1", 2: "layer2", 3: "layer2"}),
    "vgg9": (
        (64, "A", 128, 256, "A", 256, 512, "A", 512, "A", 512), (4096, 4096),
        {0: "layer1", 3: "layer2", 6: "layer3"},
    ),
}  # fmt: skip
PAPER_MINUTES = {"vgg5": 34, "vgg9": 56}  # an epoch with activation attention, batch 16, T = 100, RTX 3090


@dataclass(frozen=True)
class Case:
    """A setting that is measured."""

    side: str
    network: str = "vgg5"
    T: int = 100
    batch: int = 16
    width: float = 0.25
    device: str = "cpu"
    precision: str = "float32"
    compile: str = "no"
    time_chunks: int = 1


class PlainNet(nn.Module):
    """A student of stock SpikingJelly layers."""

    def __init__(self, network: str, num_classes: int, width: float) -> None:
        super().__init__()
        plan, hidden, tapped = NETWORKS[network]

        def lif() -> neuron.LIFNode:
            return neuron.LIFNode(
                tau=100.0, decay_input=False, v_threshold=THRESHOLD, v_reset=None,
                surrogate_function=surrogate.ATan(), detach_reset=True,
            )  # fmt: skip

        layers: list[nn.Module] = []
        self.tapped: list[nn.Module] = []
        channels = 3
        for place, item in enumerate(plan):
            if item == "A":
                layers.append(layer.AvgPool2d(2))
                continue
            layers += [
                layer.Conv2d(channels, channels := round(item * width), 3, padding=1, bias=False),
                lif(),
            ]
            if place in tapped:
                self.tapped.append(layers[-1])
            if plan[place + 1 : place + 2] != ("A",):
                layers.append(layer.Dropout(0.2))
        size = channels * (32 >> plan.count("A")) ** 2
        layers.append(layer.Flatten())
        for wide in hidden:
            layers += [layer.Linear(size, size := round(wide * width), bias=False), lif(), layer.Dropout(0.2)]
        self.net = nn.Sequential(*layers, layer.Linear(size, num_classes, bias=False))
        functional.set_step_mode(self.net, "m")

    def forward(self, x: Tensor) -> Tensor:
        """Potentials of the output after the last step."""
        return self.net(x).float().sum(0)


def plain_map(a: Tensor) -> Tensor:
    """Activation attention as its user would write it."""
    return F.normalize(a.float().pow(2).mean(1).flatten(1))


def plain_step(case: Case) -> Callable[[], object]:
    """A LaSNN step in plain SpikingJelly and PyTorch."""
    student = PlainNet(case.network, 10, case.width).to(case.device)
    teacher = models.teacher_resnet20(10).to(case.device).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-4, weight_decay=5e-4)
    seen: list[Tensor] = []
    for module in student.tapped:
        module.register_forward_hook(lambda module, args, out: seen.append(out.mean(0)))
    activations: dict[str, Tensor] = {}
    levels = list(NETWORKS[case.network][2].values())
    for name in set(levels):
        teacher.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: activations.__setitem__(name, out)
        )
    x, y = images(case)
    half = case.precision == "bfloat16"
    torch.backends.cuda.matmul.allow_tf32 = case.precision == "tf32"  # cuDNN's is on anyway

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        u = torch.rand(case.T, *x.shape, device=case.device)
        with torch.autocast(case.device, torch.bfloat16, enabled=half):
            scores = student((u <= x.abs()).to(x) * x.sign())
            with torch.no_grad():
                teacher(x)
        pairs = zip((activations[name] for name in levels), seen)
        attention = sum((plain_map(a) - plain_map(s)).norm(dim=1).mean() for a, s in pairs)
        (F.cross_entropy(scores, y) + 0.45 * attention).backward()
        optimizer.step()
        functional.reset_net(student)
        seen.clear()

    return step


def our_step(case: Case) -> Callable[[], object]:
    """The trainer's own step."""
    student = getattr(models, case.network)(10, width=case.width)
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = THRESHOLD
    names = [(f"features.{place}.neuron", name) for place, name in NETWORKS[case.network][2].items()]
    options = {}
    if (case.precision, case.compile, case.time_chunks) != ("float32", "no", 1):  # not in every checkout
        from lasnn_sj.training import TrainingOptions

        compiled = {"no": False, "yes": True, "graph": "graph"}[case.compile]
        options["options"] = TrainingOptions(
            precision=case.precision, compile=compiled, time_chunks=case.time_chunks
        )
    trainer = LaSNNTrainer(
        student, models.teacher_resnet20(10).eval(), encoder=PoissonEncoder(case.T), pairs=names,
        attention="gradient" if case.side == GRADIENT else "activation", device=case.device, **options,
    )  # fmt: skip
    x, y = images(case)

    def step() -> None:
        trainer.train_step(x, y)

    step.student = student
    return step


def keep_memory() -> None:
    """Let the process reuse freed memory."""
    from lasnn_sj.neurons import disable_malloc_trim  # not in every checkout that is measured

    disable_malloc_trim()


def images(case: Case) -> tuple[Tensor, Tensor]:
    """A batch in [-1, 1] and its labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(case.batch, 3, 32, 32, generator=generator) * 2 - 1
    return x.to(case.device), (torch.arange(case.batch) % 10).to(case.device)


def make(case: Case) -> Callable[[], object]:
    """The step of a case."""
    torch.manual_seed(0)
    return plain_step(case) if case.side == PLAIN else our_step(case)


class Remote:
    """A step in a process of its own, of this checkout or another one."""

    def __init__(self, case: Case, checkout: Path, keep: bool) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout)}
        settings = json.dumps(asdict(case) | {"threads": torch.get_num_threads(), "keep": keep})
        command = [sys.executable, __file__, "--serve", settings]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def __call__(self) -> None:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        self._answer()

    def _answer(self) -> None:
        if self.process.stdout.readline().strip() != "done":
            raise RuntimeError(f"the other process ended with {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(settings: dict) -> None:
    """Run a step for each line read."""
    threads, keep = settings.pop("threads"), settings.pop("keep")
    torch.set_num_threads(threads)
    if keep:
        keep_memory()
    case = Case(**settings)
    step, answers = make(case), sys.stdout
    sys.stdout = sys.stderr
    print("done", file=answers, flush=True)
    for _ in sys.stdin:
        step()
        common.synchronize(case.device)
        print("done", file=answers, flush=True)


def peak_mib() -> float:
    """Highest resident memory of this process so far (``ru_maxrss`` would include its parent's)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def print_memory(case: Case, keep: bool) -> None:
    """Run in a process of its own: peak of a few steps above what the imports took."""
    # late imports do not belong to the step: a tiny step makes them all happen first
    make(Case(case.side, T=2, batch=2, width=0.05))()
    if keep:
        keep_memory()
    before = peak_mib()
    step = make(case)
    for _ in range(3):
        step()
    print(json.dumps(peak_mib() - before))


def memory_mib(case: Case, keep: bool) -> float:
    """Peak memory of a step's process; the median of three, as what a heap keeps varies."""
    command = [sys.executable, __file__, "--memory-of", json.dumps(asdict(case))]
    command += ["--threads", str(torch.get_num_threads())] + (["--keep-memory"] if keep else [])
    peaks = []
    for _ in range(3):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"memory of {case.side}: {done.stderr.strip()}")
        peaks.append(json.loads(done.stdout.splitlines()[-1]))
    return statistics.median(peaks)


def device_mib(step: Callable[[], object]) -> float:
    """Peak memory that tensors take on the GPU in a step, everything else that is there included."""
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**20


def measure(cases: dict[str, Case], a: argparse.Namespace) -> list[dict]:
    """Rows of cases that are compared, run in turns."""
    calls: dict[str, Callable[[], object]] = {}
    peaks: dict[str, float] = {}
    if a.device == "cuda":  # one at a time, so that each one's memory is its own
        seconds: dict[str, list[float]] = {}
        for name, case in cases.items():
            torch.cuda.empty_cache()
            try:
                step = make(case)
                seconds |= common.in_turns({name: step}, a.device, a.runs)
                if name in seconds:
                    peaks[name] = device_mib(step)
            except Exception as error:  # out of memory must not end the comparison
                print(f"  {name}: {type(error).__name__}: {error}", flush=True)
            step = None
    else:
        for name, case in cases.items():
            remote = a.against is not None
            here = Path(__file__).parents[1]
            checkout = a.against if case.side == OTHER else here
            calls[name] = Remote(case, checkout, a.keep_memory) if remote else make(case)
        seconds = common.in_turns(calls, a.device, a.runs)
        for name in seconds:
            if isinstance(calls[name], Remote):
                calls[name].close()
            elif not a.no_memory:
                peaks[name] = memory_mib(cases[name], a.keep_memory)
    rows, reference = [], next(iter(seconds), None)
    for name, times in seconds.items():
        case, median = cases[name], statistics.median(times)
        row = {
            "what": name, "network": case.network, "T": case.T, "batch": case.batch, "width": case.width,
            "precision": case.precision, "compile": case.compile, "median_s": median, "min_s": min(times),
            "max_s": max(times), "runs": len(times), "faster": common.ratio(seconds[reference], times),
            "images_per_second": case.batch / median, "epoch_minutes": 50_000 / case.batch * median / 60,
        }  # fmt: skip
        if OURS in seconds:
            row["against_activation"] = common.ratio(times, seconds[OURS])
        if name in peaks:
            row["peak_mib"] = peaks[name]
            row["of_first_memory"] = peaks[name] / peaks[reference]
        if case.network in PAPER_MINUTES:
            row["paper_minutes"] = PAPER_MINUTES[case.network]
        rows.append(row)
    return rows


def plot(rows: list[dict], path: Path) -> None:
    """Time and memory against T, for one network, batch size and precision."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6))
    for axis, column, label in zip(axes, ("median_s", "peak_mib"), ("seconds a step (median)", "peak MiB")):
        for name in dict.fromkeys(row["what"] for row in rows):
            mine = [row for row in rows if row["what"] == name and column in row]
            axis.plot([row["T"] for row in mine], [row[column] for row in mine], "o-", label=name)
        axis.set_xlabel("T")
        axis.set_ylabel(label)
        axis.set_ylim(0)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=["vgg5"])
    parser.add_argument("--T", type=int, nargs="+", default=[100])
    parser.add_argument("--batch", type=int, nargs="+", default=[16])
    parser.add_argument("--width", type=float, nargs="+", default=[0.25])
    precisions = ["float32", "tf32", "bfloat16"]
    parser.add_argument("--precision", nargs="+", choices=precisions, default=["float32"])
    parser.add_argument("--compile", nargs="+", choices=["no", "yes", "graph"], default=["no"])
    parser.add_argument("--time-chunks", type=int, default=1, help="pieces of time of our steps: less memory")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of PyTorch and the neurons")
    parser.add_argument("--keep-memory", action="store_true", help="with neurons.disable_malloc_trim()")
    parser.add_argument("--no-memory", action="store_true", help="on the CPU, do not measure peak memory")
    parser.add_argument("--no-gradient", action="store_true", help="leave gradient attention out")
    parser.add_argument("--ours-only", action="store_true", help="leave plain SpikingJelly out")
    parser.add_argument("--against", type=Path, help="another checkout, instead of plain SpikingJelly")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--serve", type=json.loads, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.serve:
        serve(a.serve)
        return
    if a.threads:
        torch.set_num_threads(a.threads)
    if a.memory_of:
        print_memory(Case(**a.memory_of), a.keep_memory)
        return
    if a.against is not None and a.device == "cuda":
        parser.error("--against is for the CPU")
    if a.keep_memory:
        keep_memory()
    about = common.machine(a.device)
    print("; ".join(about.values()), flush=True)
    rows: list[dict] = []
    suffix = "_ours" * a.ours_only + "_against" * (a.against is not None) + "_keep_memory" * a.keep_memory
    suffix += "_widths" * (len(a.width) > 1) + f"_{a.time_chunks}_chunks" * (a.time_chunks > 1)
    name = f"train_step_{a.device}{suffix}"
    settings = itertools.product(a.batch, a.networks, a.width, a.T, a.precision)
    for batch, network, width, T, precision in settings:
        shared = {"network": network, "T": T, "batch": batch, "width": width, "device": a.device}
        cases = {}
        if a.against is not None:
            cases[OTHER] = Case(OTHER, precision=precision, **shared)
        elif not a.ours_only:
            cases[PLAIN] = Case(PLAIN, precision=precision, **shared)
        for mode in a.compile:
            title = OURS if mode == a.compile[0] else f"{OURS}, compile {mode}"
            cases[title] = Case(OURS, precision=precision, compile=mode, time_chunks=a.time_chunks, **shared)
        if not a.no_gradient and a.against is None:
            cases[GRADIENT] = Case(
                GRADIENT, precision=precision, compile=a.compile[0], time_chunks=a.time_chunks, **shared
            )
        print(f"\n{network}, width {width}, T = {T}, batch {batch}, {precision}", flush=True)
        new = measure(cases, a)
        columns = ["what", "median_s", "min_s", "max_s", "faster", "against_activation", "images_per_second"]
        common.show(new, [*columns, "epoch_minutes", "paper_minutes", "peak_mib", "of_first_memory"])
        rows += [row | {"keep_memory": a.keep_memory} | about for row in new]
        path = common.write(name, rows)  # now, in case the rest is cut off
    print(f"\n{path}")
    if len(a.networks) == len(a.batch) == len(a.precision) == len(a.width) == 1:
        plot(rows, common.RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
