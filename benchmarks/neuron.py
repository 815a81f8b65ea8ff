"""A layer of LIF neurons, forward and backward: ours against SpikingJelly, snnTorch and Norse.

    python benchmarks/neuron.py                      # CPU
    python benchmarks/neuron.py --device cuda
    python benchmarks/neuron.py --legacy-python ENV/bin/python

All rows of a size run in turns in one process. The last two are layers with a 2x2 average pool behind them,
of 64 channels, channels last, where the number of neurons allows. On the CPU the process keeps freed memory
for all rows (``neurons.disable_malloc_trim()``, as a training on the CPU should), so that none pays for new
pages; ``--fresh-memory`` leaves that to the C library. ``--legacy-python`` is the interpreter of an
environment that holds ``spikingjelly==0.0.0.0.14`` (and CuPy, for its CuPy backend); its rows run in a
process of their own, beside the others' turns. Prints a table and writes ``results/neuron_DEVICE.csv`` and
``.png``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable

import common
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import neuron, surrogate
from torch import Tensor

from lasnn_sj.neurons import LIFNode, accelerate, disable_malloc_trim, use_backend

SIZES = {
    "cpu": ((32, 524_288), (100, 20_000), (8, 262_144)),
    "cuda": ((32, 4_194_304), (100, 20_000), (8, 16_777_216)),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
REFERENCE = "SpikingJelly 2 LIFNode"
POOLED = ", then a 2x2 average pool"
COPY, CLONE = "float32 copy_ into memory at hand", "float32 clone into new memory"

LEGACY = """
import json, sys, time, torch
from spikingjelly.activation_based import neuron, surrogate, functional
T, n, device, backend, runs, threads = sys.argv[1:]
T, n = int(T), int(n)
torch.set_num_threads(int(threads))
node = neuron.LIFNode(tau=2.0, decay_input=False, v_reset=None, surrogate_function=surrogate.ATan(),
                      detach_reset=True, step_mode="m", backend=backend).to(device)
x = torch.randn(T, n, device=device).add_(0.5).requires_grad_()
g = torch.ones(T, n, device=device)
def step():
    torch.autograd.grad(node(x), x, g)
    functional.reset_net(node)
seconds = []
for i in range(int(runs) + 2):
    if device == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda": torch.cuda.synchronize()
    if i >= 2: seconds.append(time.perf_counter() - start)
print(json.dumps(seconds))
"""


def stock_lif() -> neuron.LIFNode:
    """SpikingJelly's LIF in the setting that every library here has: soft reset, ATan."""
    return neuron.LIFNode(
        tau=2.0, decay_input=False, v_reset=None, surrogate_function=surrogate.ATan(), detach_reset=True,
        step_mode="m",
    )  # fmt: skip


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, g: Tensor) -> Callable[[], None]:
    """One forward and backward of a layer over time, from a fresh state."""

    def call() -> None:
        # not .backward(): adding up x.grad is no part of the layer, and costs as much as one
        torch.autograd.grad(layer(x), x, g)

    return call


def from_reset(node: torch.nn.Module, backend: str = "auto") -> Callable[[Tensor], Tensor]:
    """A SpikingJelly node that begins each call at its reset state."""

    def run(x: Tensor) -> Tensor:
        node.reset()
        with use_backend(backend):
            return node(x)

    return run


def flexsn() -> Callable[[Tensor], Tensor]:
    """SpikingJelly 2's FlexSN: the user writes a step, it makes the loop."""

    def core(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        v = 0.5 * v + x
        spikes = surrogate.atan.apply(v - 1.0, 2.0)
        return spikes, v - spikes.detach()

    return from_reset(neuron.FlexSN(core, num_states=1))


def snntorch_lif() -> Callable[[Tensor], Tensor]:
    """snnTorch's Leaky in its usual loop over time."""
    import snntorch

    node = snntorch.Leaky(beta=0.5, spike_grad=snntorch.surrogate.atan(), reset_mechanism="subtract")

    def run(x: Tensor) -> Tensor:
        state, out = node.init_leaky(), []
        for step in x:
            spikes, state = node(step, state)
            out.append(spikes)
        return torch.stack(out)

    return run


def norse_lif() -> Callable[[Tensor], Tensor]:
    """Norse's LIFBox over a sequence."""
    import norse.torch as norse
    from norse.torch.functional.lif_box import LIFBoxParameters

    cell = norse.LIFBoxCell(LIFBoxParameters(), dt=0.5)

    def run(x: Tensor) -> Tensor:
        state, out = None, []
        for step in x:
            spikes, state = cell(step, state)
            out.append(spikes)
        return torch.stack(out)

    return run


def layers(device: str) -> dict[str, Callable[[], Callable[[Tensor], Tensor]]]:
    """Contestants of the comparison, each made at its first turn."""
    ours = {"cpu": "numba", "cuda": "cupy"}[device]
    return {
        REFERENCE: lambda: from_reset(stock_lif().to(device)),
        f"lasnn_sj {ours}, LIFNode of the paper": lambda: from_reset(LIFNode(leak=0.5, step_mode="m"), ours),
        f"lasnn_sj {ours}, SpikingJelly's LIFNode": lambda: from_reset(
            accelerate(stock_lif()).to(device), ours
        ),
        "lasnn_sj plain PyTorch": lambda: from_reset(LIFNode(leak=0.5, step_mode="m"), "torch"),
        "SpikingJelly 2 FlexSN": flexsn,
        "snnTorch Leaky": snntorch_lif,
        "Norse LIFBox": norse_lif,
    }


def pooled_layers(device: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Contestants with an average pool, on ``[T, 1, 64, H, W]``."""
    ours = {"cpu": "numba", "cuda": "cupy"}[device]
    node, stock = LIFNode(leak=0.5, step_mode="m"), from_reset(stock_lif().to(device))

    def of_our_loop(x: Tensor) -> Tensor:
        node.reset()
        with use_backend(ours):
            return node(x, pool=True)

    def of_stock(x: Tensor) -> Tensor:
        return F.avg_pool2d(stock(x).flatten(0, 1), 2).unflatten(0, x.shape[:2])

    return {REFERENCE + POOLED: of_stock, f"lasnn_sj {ours}{POOLED}": of_our_loop}


def as_images(x: Tensor) -> Tensor | None:
    """View ``[T, n]`` as ``[T, 1, 64, H, W]``, channels last; ``None`` if that has odd sides."""
    T, n = x.shape
    height = 1 << ((n // 64).bit_length() - 1) // 2
    if n % (256 * height) or height % 2:
        return None
    return x.detach().view(T, 1, height, n // 64 // height, 64).permute(0, 1, 4, 2, 3).requires_grad_()


def bytes_moved(T: int, n: int, size: int, pooled: bool) -> float:
    """Bytes that the op has to move: x, spikes, byte of slope; gradient, byte again, gradient of x."""
    spikes = size / 4 if pooled else size
    return T * n * 2 * (size + spikes + 1)


def measure(T: int, n: int, dtype: str, device: str, runs: int, legacy: str | None) -> list[dict]:
    """Rows of one size."""
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(T, n, device=device, generator=generator).add_(0.5).to(DTYPES[dtype]).requires_grad_()
    g = torch.ones_like(x)
    calls = {COPY: common.copy_seconds(T * n, device), CLONE: torch.ones(T, n, device=device).clone}
    for name, make in layers(device).items():
        try:
            calls[name] = forward_backward(make(), x, g)
        except Exception as error:  # not installed, or not for this device
            print(f"  {name}: {type(error).__name__}: {error}")
    images = as_images(x)
    if images is not None:
        _, N, C, H, W = images.shape
        averages = x.new_ones(T, N, H // 2, W // 2, C).permute(0, 1, 4, 2, 3)
        for name, layer in pooled_layers(device).items():
            calls[name] = forward_backward(layer, images, averages)
    seconds = common.in_turns(calls, device, runs)
    if legacy and dtype == "float32":
        for backend in ("torch", "cupy") if device == "cuda" else ("torch",):
            name = f"SpikingJelly 0.0.0.0.14 {backend}"
            arguments = [T, n, device, backend, runs, torch.get_num_threads()]
            done = subprocess.run(
                [legacy, "-c", LEGACY, *map(str, arguments)], capture_output=True, text=True
            )
            if done.returncode:
                print(f"  {name}: {done.stderr.strip().splitlines()[-1]}")
            else:
                seconds[name] = json.loads(done.stdout.splitlines()[-1])
    copy, clone = seconds[COPY], seconds[CLONE]
    bandwidth = 8 * T * n / statistics.median(copy)
    rows = []
    for name, times in seconds.items():
        row = {
            "what": name, "T": T, "neurons": n, "dtype": dtype, "median_ms": 1e3 * statistics.median(times),
            "min_ms": 1e3 * min(times), "max_ms": 1e3 * max(times), "runs": len(times),
            "faster_than_spikingjelly2": common.ratio(seconds[REFERENCE], times),
            "copies": common.ratio(times, copy), "clones": common.ratio(times, clone),
        }  # fmt: skip
        if name.startswith("lasnn_sj") and "plain" not in name:
            moved = bytes_moved(T, n, x.element_size(), name.endswith(POOLED))
            row["of_copy_bandwidth"] = moved / statistics.median(times) / bandwidth
        rows.append(row)
    return rows


def plot(rows: list[dict], path: str) -> None:
    """Times of all rows, one panel a size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sizes = list(dict.fromkeys((row["T"], row["neurons"], row["dtype"]) for row in rows))
    figure, axes = pyplot.subplots(len(sizes), 1, figsize=(9, 2.6 * len(sizes)), squeeze=False)
    for axis, size in zip(axes[:, 0], sizes):
        mine = [row for row in rows if (row["T"], row["neurons"], row["dtype"]) == size][::-1]
        colours = ["#c0392b" if row["what"].startswith("lasnn_sj") else "#7f8c8d" for row in mine]
        axis.barh([row["what"] for row in mine], [row["median_ms"] for row in mine], color=colours)
        axis.set_xscale("log")
        axis.set_title(f"T = {size[0]}, {size[1]:,} neurons, {size[2]}", fontsize=10)
        axis.set_xlabel("milliseconds, forward and backward (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--sizes", nargs="+", help="T and neurons, such as 32x4194304")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32"])
    parser.add_argument("--legacy-python", help="interpreter with spikingjelly==0.0.0.0.14")
    parser.add_argument(
        "--fresh-memory", action="store_true", help="on the CPU, without neurons.disable_malloc_trim()"
    )
    arguments = parser.parse_args()
    keeps_memory = arguments.device == "cpu" and not arguments.fresh_memory and disable_malloc_trim()
    about = common.machine(arguments.device)
    print("; ".join(about.values()))
    rows = []
    name = f"neuron_{arguments.device}" + ("_fresh_memory" if arguments.fresh_memory else "")
    sizes = [tuple(map(int, size.split("x"))) for size in arguments.sizes or ()]
    for T, n in sizes or SIZES[arguments.device]:
        for dtype in arguments.dtypes:
            print(f"\nT = {T}, {n:,} neurons, {dtype}", flush=True)
            new = measure(T, n, dtype, arguments.device, arguments.runs, arguments.legacy_python)
            columns = [
                "what",
                "median_ms",
                "min_ms",
                "max_ms",
                "faster_than_spikingjelly2",
                "copies",
                "clones",
            ]
            common.show(new, [*columns, "of_copy_bandwidth"])
            rows += [row | {"keep_memory": keeps_memory} | about for row in new]
            path = common.write(name, rows)  # now, in case the rest is cut off
    print(f"\n{path}")
    plot(rows, str(common.RESULTS / f"{name}.png"))


if __name__ == "__main__":
    main()
