"""Layers that leave out zeros, against dense ones: each product, and a whole LaSNN step.

    python benchmarks/sparse.py                             # products, and a step of VGG5, width 0.5, T = 100
    python benchmarks/sparse.py --no-products --T 8 32 100 --widths 0.25 0.5 --thresholds 0.4
    python benchmarks/sparse.py --layers --networks vgg5 conv3_linear2 --T 8 32 100

A step is that of ``train_step.py``. It is run with PyTorch's own dense products ("dense"), with dense
products of the library that is faster on this processor ("faster dense"; of linear layers), and with
``neurons.Linear`` and ``neurons.Conv2d`` as they are ("sparse"). Higher thresholds make fewer spikes;
``density`` is the share of nonzero inputs of all weight layers but the first. With one thread, the default,
times are processor times of that thread, which other processes disturb less than wall times. Writes
``sparse_products.csv``, ``sparse_steps.csv`` and a plot of the steps.

With ``--layers`` it prints instead, for each weight layer of a step, the times of its dense products by
PyTorch, beside the density of its input and of its output's gradient, and writes ``layers.csv``.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
import train_step
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from lasnn_sj.neurons import convolution, disable_malloc_trim, linear
from lasnn_sj.neurons.sparse import sparse_product
from lasnn_sj.neurons.sparse_convolution import sparse_convolution, sparse_weight_gradient

SHAPES = ((1600, 4096, 2048), (1600, 2048, 2048), (1600, 1024, 256), (128, 4096, 2048))  # T * N, in, out
IMAGES = ((1600, 64, 64, 16), (1600, 32, 64, 16), (1600, 64, 64, 8))  # T * N, in, out, side
DENSITIES = (0.02, 0.1, 0.2, 0.3, 0.5)
DENSE, FASTER, SPARSE = "dense", "faster dense", "sparse"
OFF = float("inf")
CHANGED = {  # what makes the layers dense
    DENSE: ((linear, "SMALLEST", OFF), (convolution, "SMALLEST", OFF)),
    FASTER: ((linear, "DENSEST", -OFF), (convolution, "SMALLEST", OFF)),
    SPARSE: (),
}


def in_turns(calls: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call, in turns; the first run of each does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            start = clock()
            call()
            if run:
                seconds[name].append(clock() - start)
    return seconds


def medians(seconds: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds, and ratios of sides that were run in turns."""
    row = {f"{name} ms": 1e3 * statistics.median(times) for name, times in seconds.items()}
    others = [name for name in (DENSE, FASTER) if SPARSE in seconds and name in seconds]
    return row | {f"of {name}": common.ratio(seconds[SPARSE], seconds[name]) for name in others}


def products(runs: int) -> list[dict]:
    """Rows of a layer's three products at each density, in the layouts that a step has."""
    rows = []
    for M, K, N in SHAPES:
        for density in DENSITIES:
            x, weight = (torch.rand(M, K) < density).float(), torch.randn(N, K)
            g = torch.randn(M, N) * (torch.rand(M, N) < density)
            pairs = {"forward": (x, weight.t()), "input gradient": (g, weight), "weight gradient": (g.t(), x)}
            for what, (a, b) in pairs.items():
                calls = {
                    DENSE: lambda a=a, b=b: a @ b,
                    FASTER: lambda a=a, b=b: linear.dense_product(a, b),
                    SPARSE: lambda a=a, b=b: sparse_product(a, b),
                }
                row = {"T*N, in, out": f"{M}, {K}, {N}", "product": what, "density": density}
                rows.append(row | medians(in_turns(calls, runs)) | {"taken": linear.pays(a, b, density)})
    return rows


def image_products(runs: int) -> list[dict]:
    """Rows of a convolution's three products at each density."""
    rows = []
    for n, c_in, c_out, side in IMAGES:
        conv = layer.Conv2d(c_in, c_out, 3, padding=1, bias=False).to(memory_format=torch.channels_last)
        weight = conv.weight.detach()
        back = weight.flip(2, 3).transpose(0, 1).contiguous()
        for density in DENSITIES:
            x, g = (torch.rand(n, side, side, c).permute(0, 3, 1, 2) for c in (c_in, c_out))
            x, g = ((t < density).float() for t in (x, g))
            pairs = {
                "forward": (
                    lambda x=x, w=weight: torch.conv2d(x, w, None, 1, 1),
                    lambda x=x, w=weight: sparse_convolution(x, w),
                    convolution.OUTPUT,
                ),
                "input gradient": (
                    lambda x=x, g=g, conv=conv: backward(conv, x, g, [True, False, False]),
                    lambda g=g, w=back: sparse_convolution(g, w),
                    convolution.OUTPUT,
                ),
                "weight gradient": (
                    lambda x=x, g=g, conv=conv: backward(conv, x, g, [False, True, False]),
                    lambda x=x, g=g: sparse_weight_gradient(x, g),
                    convolution.WEIGHT,
                ),
            }
            for what, (dense, sparse, most) in pairs.items():
                row = {"T*N, in, out": f"{n}, {c_in}, {c_out}, {side}x{side}", "product": what}
                times = medians(in_turns({DENSE: dense, SPARSE: sparse}, runs))
                rows.append(row | {"density": density} | times | {"taken": density < most})
    return rows


def weight_layers(step: Callable[[], None]) -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Input and output's gradient of each weight layer in a step."""
    step()  # the trainer looks at the student before its first step
    seen: dict[str, list] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            seen[name] = [module, args[0].detach()]
            out.register_hook(lambda g: seen[name].append(g.detach()))

        return hook

    chosen = [
        item for item in step.student.named_modules() if isinstance(item[1], (layer.Conv2d, layer.Linear))
    ]
    hooks = [module.register_forward_hook(keep(name)) for name, module in chosen]
    step()
    for hook in hooks:
        hook.remove()
    return {name: tuple(kept) for name, kept in seen.items()}


def nonzero(x: Tensor) -> float:
    """Share of values that are not 0."""
    return x.count_nonzero().item() / x.numel()


def step_rows(case: train_step.Case, threshold: float, runs: int) -> list[dict]:
    """Row of a whole step on each side."""
    train_step.THRESHOLD = threshold
    step = train_step.make(case)
    values = [x for _, x, _ in weight_layers(step).values()][1:]
    density = sum(x.count_nonzero().item() for x in values) / sum(x.numel() for x in values)
    calls = {side: on_side(side, step) for side in CHANGED}
    row = {"network": case.network, "width": case.width, "T": case.T, "threshold": threshold}
    return [row | {"density": density} | medians(in_turns(calls, runs))]


def on_side(side: str, step: Callable[[], None]) -> Callable[[], None]:
    """Return the step with that side's products."""

    def run() -> None:
        before = [(module, name, getattr(module, name)) for module, name, _ in CHANGED[side]]
        for module, name, value in CHANGED[side]:
            setattr(module, name, value)
        step()
        for module, name, value in before:
            setattr(module, name, value)

    return run


def backward(conv: layer.Conv2d, x: Tensor, g: Tensor, which: list[bool]) -> object:
    """Gradients of a convolution."""
    rest = (None, conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups, which)
    return torch.ops.aten.convolution_backward(g, x, conv.weight.detach(), *rest)


def layer_rows(case: train_step.Case, threshold: float, runs: int) -> list[dict]:
    """Rows of each weight layer, and of the whole step."""
    train_step.THRESHOLD = threshold
    step = train_step.make(case)
    whole = statistics.median(in_turns({"step": step}, runs)["step"])
    row, rows, total = {"network": case.network, "width": case.width, "T": case.T}, [], 0.0
    for name, (module, x, g) in weight_layers(step).items():
        x, g, weight = x.flatten(0, 1), g.flatten(0, 1), module.weight.detach()
        if isinstance(module, layer.Linear):
            calls = {
                "forward": lambda x=x, w=weight: x @ w.t(),
                "weight gradient": lambda x=x, g=g: g.t() @ x,
                "input gradient": lambda g=g, w=weight: g @ w,
            }
        else:
            calls = {
                "forward": lambda x=x, w=weight, m=module: torch.conv2d(x, w, None, m.stride, m.padding),
                "weight gradient": lambda x=x, g=g, m=module: backward(m, x, g, [False, True, False]),
                "input gradient": lambda x=x, g=g, m=module: backward(m, x, g, [True, False, False]),
            }
        if not rows:
            del calls["input gradient"]  # nothing needs that of the first layer
        times = medians(in_turns(calls, runs))
        total += sum(times.values())
        rows.append(row | {"layer": name, "input": nonzero(x), "gradient": nonzero(g)} | times)
    return [*rows, row | {"layer": f"all: {total / whole / 1e3:.0%} of {whole * 1e3:.0f} ms"}]


def plot(rows: list[dict], path: Path) -> None:
    """Time of a step against the density of spikes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(5.5, 3.6))
    rows = sorted(rows, key=lambda row: row["density"])
    for side in (DENSE, FASTER, SPARSE):
        axis.plot(
            [100 * row["density"] for row in rows], [row[f"{side} ms"] for row in rows], "o-", label=side
        )
    axis.set_xlabel("nonzero inputs of weight layers but the first, %")
    axis.set_ylabel("ms a step (median)")
    axis.set_ylim(0)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=train_step.NETWORKS, default=["vgg5"])
    parser.add_argument("--widths", type=float, nargs="+", default=[0.5])
    parser.add_argument("--T", type=int, nargs="+", default=[100])
    parser.add_argument("--thresholds", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.2, 2, 4, 8, 12])
    parser.add_argument("--layers", action="store_true", help="time of each layer in today's step")
    parser.add_argument("--no-products", action="store_true", help="steps only")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    disable_malloc_trim()
    about = common.machine("cpu")
    print("; ".join(about.values()), flush=True)
    if not (a.layers or a.no_products):
        rows = products(a.runs) + image_products(a.runs)
        common.show(rows, list(rows[0]))
        print(common.write("sparse_products", [row | about for row in rows]), flush=True)
    rows = []
    thresholds = [train_step.THRESHOLD] if a.layers else a.thresholds
    for network, width, T, threshold in itertools.product(a.networks, a.widths, a.T, thresholds):
        case = train_step.Case(train_step.OURS, network=network, T=T, width=width)
        new = (layer_rows if a.layers else step_rows)(case, threshold, a.runs)
        common.show(new, list(new[0]) if len(new) == 1 else [*new[0], "input gradient ms"])
        rows += [row | about for row in new]
        print(common.write("layers" if a.layers else "sparse_steps", rows), flush=True)
    if not a.layers and len(a.networks) == len(a.widths) == len(a.T) == 1:
        plot(rows, common.RESULTS / "sparse_steps.png")


if __name__ == "__main__":
    main()
