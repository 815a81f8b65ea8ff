"""Memory that is kept on CUDA, counted by hand."""

import sys
from pathlib import Path

import torch
from spikingjelly.activation_based import functional, layer
from torch._subclasses.fake_tensor import FakeTensorMode

from lasnn_sj.neurons import Conv2d, LIFNode, Linear, Sequential, marks

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import cuda_memory


def kept(monkeypatch, smallest):
    monkeypatch.setattr(marks, "SMALLEST", smallest)
    with FakeTensorMode(), torch.device("cuda"):
        net = Sequential(
            Conv2d(3, 16, 3, padding=1, bias=False), LIFNode(), layer.AvgPool2d(2),
            Conv2d(16, 8, 3, padding=1, bias=False), LIFNode(), layer.Flatten(), Linear(8 * 16, 4),
        )  # fmt: skip
        functional.set_step_mode(net, "m")
        for parameter in net.parameters():
            if parameter.dim() == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        return cuda_memory.kept_bytes(net, torch.empty(5, 2, 3, 8, 8))


def test_bytes_by_hand(monkeypatch):
    steps = 5 * 2  # times samples
    first, second = 16 * 8 * 8, 8 * 4 * 4  # neurons
    inputs = 3 * 8 * 8 * 4
    states = 2 * (first + second) * 4  # before and after the sequence, of two samples
    slopes = first + second
    averages, spikes, scores = 4 * first // 4, 4 * second, 4 * 4
    everything = steps * (inputs + slopes + averages + spikes + scores) + 2 * states
    assert kept(monkeypatch, 1 << 40) == everything
    assert kept(monkeypatch, 0) == everything - steps * averages * 3 // 4  # a byte for each average


def test_ours_is_below_plain():
    sizes = {}
    for side in (cuda_memory.PLAIN, cuda_memory.OURS):
        with FakeTensorMode(), torch.device("cuda"):
            net = cuda_memory.network(side, "conv3_linear2", 0.25)
            sizes[side] = cuda_memory.kept_bytes(net, torch.empty(20, 4, 3, 32, 32))
    assert 0 < sizes[cuda_memory.OURS] < 0.3 * sizes[cuda_memory.PLAIN]
