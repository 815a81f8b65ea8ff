"""What a LaSNN step keeps on CUDA between its passes, ours against plain SpikingJelly 2, without a GPU.

    python benchmarks/cuda_memory.py                          # 3Conv2Linear, VGG5, VGG9, width 1, T = 100
    python benchmarks/cuda_memory.py --batch 64 --T 25

The forward passes of ``train_step.py`` run on tensors of a CUDA device that have a shape and no values.
Counted is all memory that is alive when the scores are ready, which the backward pass needs. Weights,
gradients and the optimizer's moments are the same on both sides and are given beside it. The numbers are
computed, not measured: an allocator rounds up, and what operations need while they run is left out. In
float32, in which plain SpikingJelly has fused kernels. Writes ``results/cuda_memory.csv``.
"""

from __future__ import annotations

import argparse
import gc
import weakref
from unittest import mock

import common
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from train_step import NETWORKS, OURS, PLAIN, PlainNet

from lasnn_sj import models
from lasnn_sj.neurons import TimeLoopNode, cuda, nodes


class Memory(TorchDispatchMode):
    """Counts the bytes of the memory that operations return and that is still alive.

    Args:
        apart: tensors whose memory does not count.
    """

    def __init__(self, apart: list[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self._apart = {t.untyped_storage()._cdata for t in apart}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        for t in tree_flatten(out)[0]:
            key = t.untyped_storage()._cdata if isinstance(t, Tensor) else None
            if key is not None and key not in self.alive and key not in self._apart:
                self.alive[key] = t.untyped_storage().nbytes()
                weakref.finalize(t.untyped_storage(), self.alive.pop, key)
        return out


def kept_bytes(net: nn.Module, x: Tensor) -> int:
    """Return the bytes that are alive after a forward pass, for tensors of a :class:`FakeTensorMode`."""
    # without a driver nothing says that the kernels could run; and pools would not be joined while operations
    # are counted
    with (
        mock.patch.object(cuda, "why_not", return_value=None),
        mock.patch.object(nodes, "is_in_torch_dispatch_mode", return_value=False),
        Memory([*net.parameters(), *net.buffers()]) as memory,
    ):
        scores = net(x.clone())
        gc.collect()
        total = sum(memory.alive.values())
    del scores
    return total


def network(side: str, name: str, width: float) -> nn.Module:
    """The student of ``train_step.py``, with the averages over time that activation attention reads."""
    net = PlainNet(name, 10, width) if side == PLAIN else getattr(models, name)(10, width=width)
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    rates: list[Tensor] = []
    for module in net.tapped if side == PLAIN else ():
        module.register_forward_hook(lambda module, args, out: rates.append(out.mean(0)))
    for module in net.modules():
        if isinstance(module, TimeLoopNode):
            module.record = ("firing_rate",)
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--T", type=int, nargs="+", default=[100])
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--width", type=float, default=1.0)
    a = parser.parse_args()
    rows = []
    for name in a.networks:
        for T in a.T:
            for batch in a.batch:
                kept = {}
                for side in (PLAIN, OURS):
                    with FakeTensorMode(), torch.device("cuda"):
                        net = network(side, name, a.width)
                        weights = sum(p.nbytes for p in net.parameters())
                        kept[side] = kept_bytes(net, torch.empty(T, batch, 3, 32, 32))
                rows.append({
                    "network": name, "T": T, "batch": batch, "width": a.width,
                    "plain_mib": kept[PLAIN] / 2**20, "ours_mib": kept[OURS] / 2**20,
                    "of_plain": kept[OURS] / kept[PLAIN], "weights_and_adam_mib": 4 * weights / 2**20,
                })  # fmt: skip
    common.show(rows, list(rows[0]))
    print(f"\n{common.write('cuda_memory', rows)}")


if __name__ == "__main__":
    main()
