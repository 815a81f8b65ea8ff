"""The CUDA kernels compile for every architecture without spills; counts and occupancy by hand."""

import re
import sys
from pathlib import Path

import pytest

from lasnn_sj.neurons import cuda

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import kernel_resources as resources

ARCHITECTURES = (70, 80, 90, 100, 120)
# Spilled by NVRTC 13.0 unless compiled with MORE_REGISTERS.
SPILLED = {90: ["lif_backward<BFloat16, 4, 0, 3, 1, 0>"], 100: ["lif_backward<float, 4, 2, 0, 1, 0>"]}
LARGEST = "lif_backward<BFloat16, 8, 2, 1, 1, 0>"  # the most live values


def variants_for(arch: int) -> list[str]:
    """Every 61st variant, from another one for each architecture, and the largest."""
    return [*cuda.kernel_names()[ARCHITECTURES.index(arch) :: 61], LARGEST]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_without_spills(arch):
    libraries = [resources.Nvrtc(path) for path in resources.nvrtc_libraries()]
    if not libraries:
        pytest.skip("no NVRTC: this torch is built without CUDA")
    library = next((lib for lib in libraries if arch in lib.archs), None)
    if library is None:
        pytest.skip(
            f"NVRTC at hand does not know sm_{arch} (CUDA 13 dropped Volta). What does: pip install "
            f"--no-deps --target {sys.prefix}/nvrtc12 nvidia-cuda-nvrtc-cu12==12.9.86"
        )
    kernels = [*variants_for(arch), *SPILLED.get(arch, [])]
    usage = resources.usage_of(library, kernels, arch)
    assert set(usage) == set(kernels)
    for kernel, (used, _) in usage.items():
        assert (used.spill_bytes, used.stack_bytes) == (0, 0), kernel
        assert 16 <= used.registers <= 255, kernel


def test_spills_are_found():
    """A kernel that keeps more values than a thread has registers."""
    libraries = [lib for path in resources.nvrtc_libraries() if 90 in (lib := resources.Nvrtc(path)).archs]
    if not libraries:
        pytest.skip("no NVRTC that knows sm_90")
    source = """template <int N> __global__ void __launch_bounds__(128) greedy(float* x) {
        float kept[N];
        #pragma unroll
        for (int i = 0; i < N; ++i) kept[i] = x[i * 131 + threadIdx.x];
        #pragma unroll 1
        for (int j = 0; j < 1000; ++j)
            #pragma unroll
            for (int i = 0; i < N; ++i) kept[i] = kept[i] * kept[i] + kept[(i + 1) % N];
        #pragma unroll
        for (int i = 0; i < N; ++i) x[i * 131 + threadIdx.x] = kept[i];
    }"""
    usage = libraries[0].compile(source, ["greedy<8>", "greedy<300>"], 90)
    assert usage["greedy<8>"].spill_bytes == 0
    assert usage["greedy<300>"].spill_bytes > 300


def test_the_compiled_variants_stand_for_all():
    """Each value of each template parameter is compiled for each architecture."""

    def values(names: list[str]) -> list[set[str]]:
        return [set(column) for column in zip(*(re.split("[<>, ]+", name) for name in names))]

    for arch in ARCHITECTURES:
        assert values(variants_for(arch)) == values(cuda.kernel_names())
    assert LARGEST in cuda.kernel_names()


@pytest.mark.parametrize(("registers", "arch", "threads"), [
    (32, 90, 2048),  # 16 warps of each partition
    (33, 90, 1536),  # rounded to 40: 12 warps of each partition
    (64, 80, 1024),
    (255, 90, 256),
    (32, 120, 1536),  # as many as may be resident
])  # fmt: skip
def test_occupancy(registers, arch, threads):
    assert resources.occupancy(registers, arch) == threads / resources.LIMITS[arch][0]


@pytest.mark.parametrize(("kernel", "read", "written", "once"), [
    ("lif_forward<float, 4, 0, 0, 0, 0>", 4, 5, 12),  # x; spikes, slope; v, v_T, rate
    ("lif_forward<BFloat16, 8, 1, 3, 1, 0>", 2, 2, 16),  # no slope; the map too
    ("lif_forward<BFloat16, 8, 2, 0, 0, 1>", 2, 1.625, 12),  # a quarter of the spikes, slope, a bit
    ("lif_backward<float, 4, 0, 3, 0, 0>", 5, 4, 12),  # gradient, slope; gradient of x
    ("lif_backward<Float16, 8, 2, 3, 0, 0>", 3.125, 2, 12),  # a bit for who fired
    ("lif_backward<Float16, 8, 0, 0, 1, 1>", 1.625, 2, 20),  # a quarter of the gradient; map and v0
])  # fmt: skip
def test_bytes(kernel, read, written, once):
    assert resources.bytes_moved(kernel) == (read, written, once)


def test_unroll_is_that_of_the_source():
    (line,) = re.findall(r"constexpr int UNROLL = (.*);", cuda.source())
    for size, width in ((4, 4), (4, 2), (4, 1), (2, 8), (2, 4), (2, 1)):
        python = re.sub(r"sizeof\(T\) \* W >= 16 \? 4 : sizeof\(T\) \* W >= 8 \? 8 : 16", "ok", line)
        assert python == "ok"
        assert resources.unroll(size, width) == {16: 4, 8: 8}.get(size * width, 16)
