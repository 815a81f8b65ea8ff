"""Registers, spills, occupancy and memory traffic of every CUDA kernel variant, without a GPU.

    python benchmarks/kernel_resources.py                  # all variants, sm_80 90 100 120: about two minutes
    python benchmarks/kernel_resources.py --every 61       # a sample

NVRTC compiles ``lif.cu`` with CuPy's options, and ``ptxas -v`` reports what each kernel uses. Occupancy
follows from the registers and the architecture's limits. Bytes are counted: what a variant reads and writes
for each neuron and step, and once for each neuron. The roofline time is these bytes at ``--bandwidth``, by
default 3.0 TB/s. Writes ``results/kernel_resources.csv`` (each variant) and ``.md`` (a summary).
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import common

from lasnn_sj.neurons import cuda
from lasnn_sj.neurons.op import RESETS, SHAPES

# Per multiprocessor: resident threads and blocks ("Technical Specifications per Compute Capability" of the
# CUDA programming guide). Each has 65,536 registers in four partitions.
LIMITS = {80: (2048, 32), 90: (2048, 32), 100: (2048, 32), 120: (1536, 24)}
PARTITIONS, PARTITION_REGISTERS, REGISTER_UNIT = 4, 16384, 256
SIZES = {"float": 4, "BFloat16": 2, "Float16": 2}
NAME = re.compile(r"lif_(\w+)<(\w+), (\d+), (\d), (\d), (\d), (\d)>")
T = 100  # time steps over which a neuron's own bytes are spread


@dataclass(frozen=True)
class Usage:
    """Resources of a kernel, by ``ptxas``: registers a thread, bytes of stack, spills and shared memory."""

    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def nvrtc_libraries() -> list[Path]:
    """NVRTC of the wheels that torch brings, and of a folder beside them for what those dropped."""
    folders = [*map(Path, sys.path), Path(sys.prefix) / "nvrtc12"]
    return [lib for folder in folders for lib in sorted(folder.glob("nvidia/*/lib/libnvrtc.so.*"))]


class Nvrtc:
    """As much of NVRTC as compiles one source for one architecture.

    Attributes:
        archs: the architectures it compiles for, e.g. 90.
    """

    def __init__(self, path: Path) -> None:
        # by itself: another version of the library may be loaded already
        self.library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_DEEPBIND)
        count = ctypes.c_int()
        self.library.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self.library.nvrtcGetSupportedArchs(archs)
        self.archs = list(archs)

    def compile(
        self, source: str, kernels: list[str], arch: int, define: str | None = None
    ) -> dict[str, Usage]:
        """Compile kernels as CuPy does, with a further option if given, and return what each uses.

        Raises:
            RuntimeError: the source does not compile, or with a warning; the message is the log.
        """
        lib, program = self.library, ctypes.c_void_p()
        _check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"lif.cu", 0, None, None))
        for kernel in kernels:
            _check(lib.nvrtcAddNameExpression(program, kernel.encode()))
        names = [*cuda.OPTIONS, "-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v"]
        options = [name.encode() for name in [*names, f"-arch=sm_{arch}", *([define] if define else [])]]
        status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        size = ctypes.c_size_t()
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, buffer)
        log = buffer.value.decode()
        warned = any("warning" in line for line in log.splitlines() if "Architectures prior" not in line)
        if status or warned:
            raise RuntimeError(f"NVRTC for sm_{arch}: {log[:4000]}")
        reports = _reports(log)
        usage = {}
        for kernel in kernels:
            mangled = ctypes.c_char_p()
            _check(lib.nvrtcGetLoweredName(program, kernel.encode(), ctypes.byref(mangled)))
            usage[kernel] = reports[mangled.value.decode()]
        lib.nvrtcDestroyProgram(ctypes.byref(program))
        return usage


def usage_of(library: Nvrtc, kernels: list[str], arch: int) -> dict[str, tuple[Usage, bool]]:
    """Return what each kernel uses when launched, and whether it had to be compiled with more registers."""
    first = library.compile(cuda.source(), kernels, arch)
    spilled = [kernel for kernel, used in first.items() if used.stack_bytes]
    again = library.compile(cuda.source(), spilled, arch, cuda.MORE_REGISTERS) if spilled else {}
    return {kernel: (again.get(kernel, used), kernel in again) for kernel, used in first.items()}


def _check(status: int) -> None:
    if status:
        raise RuntimeError(f"NVRTC returned {status}")


def _reports(log: str) -> dict[str, Usage]:
    """Usage by mangled name, from what ``ptxas -v`` prints."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:

        def number(pattern: str, text: str = part) -> int:
            return sum(int(value) for value in re.findall(pattern, text))

        found[part.partition("'")[0]] = Usage(
            number(r"Used (\d+) registers"),
            number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill"),
            number(r"(\d+) bytes smem"),
        )
    return found


def occupancy(registers: int, arch: int) -> float:
    """Resident threads of a multiprocessor as a share of the most it may have."""
    threads, blocks = LIMITS[arch]
    per_warp = -(-32 * registers // REGISTER_UNIT) * REGISTER_UNIT
    warps = PARTITIONS * (PARTITION_REGISTERS // per_warp)
    resident = min(warps * 32 // cuda.THREADS, blocks, threads // cuda.THREADS)
    return resident * cuda.THREADS / threads


def unroll(size: int, width: int) -> int:
    """Steps that a thread reads ahead, ``UNROLL`` of ``lif.cu``."""
    return 4 if size * width >= 16 else 8 if size * width >= 8 else 16


def bytes_moved(kernel: str) -> tuple[float, float, float]:
    """Bytes read and written for each neuron and step, and moved once for each neuron.

    They are the least possible: the forward reads the input once and writes the spikes, or a quarter of them
    where 2x2 pixels are averaged, and for a backward a byte of slope; the backward reads the spikes' gradient
    and the slope and writes the input's gradient. A bit tells who fired where the backward has to know.
    Without dropout mask; the rate is asked for, as attention does.
    """
    direction, dtype, _, reset, shape, amap, pool = NAME.fullmatch(kernel).groups()
    size, amap = SIZES[dtype], int(amap)
    spikes = size / 4 if int(pool) else size
    bit = (amap or reset == "2") / 8
    if direction == "forward":
        kept = 1 + bit if shape != "3" else 0
        return size, spikes + kept, 4 * (3 + amap)  # v, v_T, rate, map
    at_start = reset == "0" and shape != "3"  # v0, for the first step's attached reset
    return spikes + 1 + bit, size, 4 * (3 + amap + at_start)


def row(kernel: str, arch: int, usage: Usage, more_registers: bool, bandwidth: float) -> dict[str, object]:
    """A variant's row of the table."""
    direction, dtype, width, reset, shape, amap, pool = NAME.fullmatch(kernel).groups()
    share = occupancy(usage.registers, arch)
    size, width = SIZES[dtype], int(width)
    read, written, once = bytes_moved(kernel)
    in_flight = share * LIMITS[arch][0] * unroll(size, width) * width * read
    return {
        "kernel": kernel, "arch": f"sm_{arch}", "direction": direction, "dtype": dtype, "width": width,
        "reset": RESETS[int(reset)], "shape": SHAPES[int(shape)], "map": int(amap), "pool": int(pool),
        "registers": usage.registers, "more_registers": more_registers,
        "stack_bytes": usage.stack_bytes, "spill_bytes": usage.spill_bytes,
        "shared_bytes": usage.shared_bytes, "occupancy": share, "kib_ahead": in_flight / 1024,
        "bytes_per_neuron_step": read + written, "bytes_per_neuron": once,
        "roofline_us": ((read + written) * T + once) * 1e6 / bandwidth * 1e6,
    }  # fmt: skip


def summary(rows: list[dict], bandwidth: float) -> str:
    """Markdown: one line for each architecture, direction, dtype, width, map and pool."""
    kinds: dict[tuple, list[dict]] = {}
    for r in rows:
        key = tuple(r[c] for c in ("arch", "direction", "dtype", "width", "map", "pool"))
        kinds.setdefault(key, []).append(r)
    lines = [
        "# Resources of the CUDA kernels",
        "",
        f"{len(rows)} variants as compiled, {cuda.THREADS} threads a block; ranges are over resets and "
        f"surrogates. Ahead: KiB that the resident threads of a multiprocessor request before they use them. "
        f"Pool: the kernel averages 2x2 pixels. Bytes: for each neuron and step, counted. Time: of 10^6 "
        f"neurons over {T} steps at {bandwidth / 1e12:g} TB/s; computed, not measured.",
        "",
        "| arch | pass | dtype | width | map | pool | registers | spills | shared | occupancy | ahead "
        "| bytes | us |",
        "|---" * 13 + "|",
    ]
    for (arch, direction, dtype, width, amap, pool), group in kinds.items():

        def span(column: str, form: str = "{:g}", group: list[dict] = group) -> str:
            ends = [form.format(end(r[column] for r in group)) for end in (min, max)]
            return "-".join(dict.fromkeys(ends))

        cells = [arch, direction, dtype, width, *("yes" if flag else "no" for flag in (amap, pool))]
        cells += [span("registers")]
        cells += [span("spill_bytes"), span("shared_bytes"), span("occupancy", "{:.0%}")]
        cells += [span("kib_ahead", "{:.0f}"), span("bytes_per_neuron_step"), span("roofline_us", "{:.0f}")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--archs", type=int, nargs="+", choices=LIMITS, default=list(LIMITS))
    parser.add_argument("--every", type=int, default=1, help="compile only every n-th variant")
    parser.add_argument("--bandwidth", type=float, default=3.0e12, help="bytes a second")
    a = parser.parse_args()
    libraries = [Nvrtc(path) for path in nvrtc_libraries()]
    rows = []
    for arch in a.archs:
        library = next((lib for lib in libraries if arch in lib.archs), None)
        if library is None:
            sys.exit(f"no NVRTC at hand compiles for sm_{arch}; torch built with CUDA brings one")
        usage = usage_of(library, cuda.kernel_names()[:: a.every], arch)
        rows += [row(kernel, arch, *use, a.bandwidth) for kernel, use in usage.items()]
    spilled = [r for r in rows if r["spill_bytes"] or r["stack_bytes"]]
    text = summary(rows, a.bandwidth)
    print(text)
    again = sum(r["more_registers"] for r in rows)
    print(f"{len(rows)} variants, {len(spilled)} with spills or a stack frame, {again} compiled again")
    for r in spilled:
        print(f"  {r['kernel']} {r['arch']}: {r['spill_bytes']} bytes spilled, stack {r['stack_bytes']}")
    if a.every == 1:
        common.write("kernel_resources", rows)
        (common.RESULTS / "kernel_resources.md").write_text(text)


if __name__ == "__main__":
    main()
