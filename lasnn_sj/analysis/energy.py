"""Operations and energy of a spiking network by time step, and of the same network as ANN."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.op_counter import (
    BaseCounter,
    DispatchCounterMode,
    MACCounter,
    SimpleEnergyCostConfig,
    SynOpCounter,
)
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from ..training.evaluation import device_of, evaluating
from .spikes import first_samples

aten = torch.ops.aten
COST = SimpleEnergyCostConfig.fp32()


@dataclass(frozen=True)
class Operations:
    """Mean operations of one sample; batch norm counts as folded into the weights.

    Attributes:
        synops: synaptic operations of each time step: for every spike one accumulation at every synapse
            that it reaches. An average pool is a factor of the synapses behind it, so a pooled spike
            counts once (but where windows at the border are divided by other numbers, which makes real
            values of them); signed spikes, sums of spikes and events count as spikes.
        macs: multiply-accumulates of each time step, where a layer takes real values (the first one of
            directly encoded images); what is computed once for all steps counts in the first.
        ann_macs: multiply-accumulates of the same network as ANN, each layer once.
        samples: number of samples that were counted.
    """

    synops: tuple[float, ...]
    macs: tuple[float, ...]
    ann_macs: float
    samples: int

    @property
    def energy_pj(self) -> list[float]:
        """Energy of computing spent by the end of each time step, in picojoules, without memory access."""
        steps = (COST.e_ac_pj * s + COST.e_mac_pj * m for s, m in zip(self.synops, self.macs))
        return list(itertools.accumulate(steps))

    @property
    def ann_energy_pj(self) -> float:
        """Energy of the same network as ANN, in picojoules."""
        return COST.e_mac_pj * self.ann_macs


@torch.no_grad()
def count_operations(
    student: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    *,
    samples: int = 32,
    device: torch.device | str | None = None,
) -> Operations:
    """Count the operations of a network per sample, by SpikingJelly's ``op_counter``.

    SpikingJelly's counters take what an average pool or a signed code gives for real values and count
    dense multiply-accumulates; this one follows the spikes through them. Operations between two
    activations (attention of transformers) are spread evenly over the steps. Whole numbers of event frames
    are numbers of events, each of which counts as a spike.

    Args:
        student: network in multi-step mode; its mode is restored afterwards.
        loader: batches ``(images, labels)``.
        encoder: encodes images ``[N, ...]`` as ``[T, N, ...]``; ``None`` for event frames.
        samples: number of samples to count, from the first on; all of them where the loader has fewer.
        device: device to run on; the student's if not given.

    Raises:
        BatchError: a batch that cannot be used.
        ValueError: no sample, or an input without time axis and no encoder.
    """
    device = torch.device(device) if device is not None else device_of(student)
    counted: list[Operations] = []
    with evaluating(student):
        for images, _, _ in first_samples(loader, encoder, samples):
            encoded = images.to(device) if encoder is None else encoder(images.to(device))
            counted.append(_count(student, encoded, events=encoder is None))
            functional.reset_net(student)
    if not counted:
        raise ValueError("the loader gave no sample; operations cannot be counted")
    total = sum(one.samples for one in counted)

    def mean(values: Iterable[float]) -> float:
        return sum(value * one.samples for value, one in zip(values, counted)) / total

    return Operations(
        tuple(map(mean, zip(*(one.synops for one in counted)))),
        tuple(map(mean, zip(*(one.macs for one in counted)))),
        mean(one.ann_macs for one in counted),
        total,
    )


def _count(student: nn.Module, encoded: Tensor, events: bool) -> Operations:
    """Count the operations of an encoded batch ``[T, N, ...]``; with ``events`` its integers count events."""
    counter = _Counter(student, *encoded.shape[:2])
    if events and bool((encoded == encoded.round()).all()):
        counter.mark(encoded, 1)
    entering = register_module_forward_pre_hook(counter.enter)
    try:
        with DispatchCounterMode([counter]):
            student(encoded)
    finally:
        entering.remove()
    return counter.operations()


class _Counter(BaseCounter):
    """Counter by the rows of a layer's input, ``[T * N, ...]`` or ``[N, ...]``, and the tensors' values.

    A tensor of spikes is known by its values (0 and 1, or signed), or because it was made by averaging
    or adding such tensors: then a mark on its memory says by which factor it becomes whole numbers.
    """

    def __init__(self, model: nn.Module, T: int, batch: int) -> None:
        super().__init__()
        self.T, self.batch = T, batch
        self._weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._layer: nn.Module | None = None
        self._marks: dict[int, float] = {}
        self._kept: list[Tensor] = []  # while it is kept, no other tensor has its memory
        self._calls: dict[int, list[tuple[Tensor, bool, float]]] = defaultdict(list)
        self._spread = {"synops": 0.0, "macs": 0.0, "ann": 0.0}
        self._whole = (SynOpCounter(), MACCounter())
        self.rules = {
            aten.convolution.default: self._convolution,
            aten.mm.default: lambda args, kwargs, out: self._linear(args[0], args[1]),
            aten.addmm.default: lambda args, kwargs, out: self._linear(args[1], args[2]),
            aten.avg_pool2d.default: self._average_pool,
            aten._adaptive_avg_pool2d.default: self._average,
            aten.mean.dim: self._average,
            aten.clone.default: self._average,
            aten.add.Tensor: self._sum,
        } | {
            product: lambda args, kwargs, out, product=product: self._both(product, args, kwargs, out)
            for product in (aten.bmm.default, aten.baddbmm.default)
        }

    def enter(self, module: nn.Module, args: tuple) -> None:
        """Note the module that runs next; a forward pre-hook of every module."""
        self._layer = module

    def mark(self, x: Tensor, factor: float) -> None:
        """Record that ``x * factor`` holds numbers of spikes."""
        self._marks[x.untyped_storage().data_ptr()] = factor
        self._kept.append(x)

    def _spikes(self, x: Tensor) -> tuple[Tensor, float] | None:
        """Return the spike counts in ``x`` and their factor (see :meth:`mark`); ``None`` for real values."""
        factor = self._marks.get(x.untyped_storage().data_ptr())
        if factor is None:
            return (x.abs().double(), 1.0) if bool(((x == 0) | (x.abs() == 1)).all()) else None
        counts = x.double() * factor
        whole = counts.round()
        return (whole.abs(), factor) if bool(((counts - whole).abs() < 1e-3).all()) else None

    def _sum(self, args, kwargs, out) -> int:
        if not kwargs and all(isinstance(x, Tensor) and x.shape == out.shape for x in args):
            found = [self._spikes(x) for x in args]
            if None not in found and found[0][1] == found[1][1]:
                self.mark(out, found[0][1])
        return 0

    def _average(self, args, kwargs, out) -> int:
        return self._averaged(args[0], args[0].numel() / out.numel(), out)

    def _average_pool(self, args, kwargs, out) -> int:
        full = [*args, *([], 0, False, True, None)[len(args) - 2 :]]
        one = torch.ones_like(args[0][:1, :1])
        over = aten.avg_pool2d(one, *full[1:6], 1) / aten.avg_pool2d(one, *full[1:])
        # windows at the border that are divided by another number have no common factor
        return self._averaged(args[0], over.max().item(), out) if over.max() - over.min() < 1e-3 else 0

    def _averaged(self, x: Tensor, over: float, out: Tensor) -> int:
        spikes = self._spikes(x)
        if spikes is not None:
            self.mark(out, spikes[1] * over)
        return 0

    def _convolution(self, args, kwargs, out) -> int:
        x, weight, _, stride, padding, dilation, transposed, _, groups = args[:9]
        if transposed:
            return self._both(aten.convolution.default, args, kwargs, out)
        dense = float(weight[0].numel() * out.numel())
        spikes = self._spikes(x)
        if spikes is None:
            return self._call(weight, torch.full((len(x),), dense / len(x)), False, dense)
        # all channels of a position reach the same number of synapses
        counts = spikes[0].sum(1, keepdim=True)
        ones = torch.ones(1, 1, *weight.shape[2:], dtype=counts.dtype, device=x.device)
        zeros = [0] * (x.dim() - 2)
        reached = aten.convolution(counts, ones, None, stride, padding, dilation, False, zeros, 1)
        return self._call(weight, reached.flatten(1).sum(1) * (len(weight) // groups), True, dense)

    def _linear(self, x: Tensor, weight: Tensor) -> int:
        dense = float(x.numel() * weight.shape[1])
        spikes = self._spikes(x)
        if spikes is None:
            return self._call(weight, torch.full((len(x),), dense / len(x)), False, dense)
        return self._call(weight, spikes[0].sum(1) * weight.shape[1], True, dense)

    def _call(self, weight: Tensor, rows: Tensor, spikes: bool, dense: float) -> int:
        key = weight.untyped_storage().data_ptr()
        if key not in self._weights:  # made anew for each call, as a pruned or normalised layer's
            key = id(self._layer)
        self._calls[key].append((rows.double().cpu(), spikes, dense))
        return int(rows.sum()) if spikes else 0

    def _both(self, function, args, kwargs, out) -> int:
        synops, macs = (counter.rules[function](args, kwargs, out) for counter in self._whole)
        real = [torch.full_like(a, 0.5) if isinstance(a, Tensor) else a for a in args]
        self._spread["synops"] += synops
        self._spread["macs"] += macs
        self._spread["ann"] += self._whole[1].rules[function](real, kwargs, out)
        return synops

    def operations(self) -> Operations:
        """Return the mean counts of one sample."""
        T, batch = self.T, self.batch
        steps = {True: torch.zeros(T, dtype=torch.float64), False: torch.zeros(T, dtype=torch.float64)}
        steps[True] += self._spread["synops"] / T
        steps[False] += self._spread["macs"] / T
        ann = self._spread["ann"] / T
        for calls in self._calls.values():
            for index, (rows, spikes, dense) in enumerate(calls):
                if len(rows) == batch:  # one step, or what is the same at every step
                    looped = len(calls) % T == 0  # a layer may also be called several times in a step
                    steps[spikes][index * T // len(calls) if looped else 0] += rows.sum()
                    ann += dense / (T if looped else 1)
                else:
                    steps[spikes] += rows.view(T, -1).sum(1) if len(rows) % T == 0 else rows.sum() / T
                    ann += dense / T
        per_sample = {kind: tuple((values / batch).tolist()) for kind, values in steps.items()}
        return Operations(per_sample[True], per_sample[False], ann / batch, batch)
