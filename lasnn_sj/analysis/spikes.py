"""Spikes of a network: mean numbers by layer (LaSNN's Fig. 6 and 7), and traces of single neurons."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import Tensor, nn

from ..runtime import distributed
from ..training.evaluation import (
    batch_axis,
    check_batch,
    device_of,
    encoded_pieces,
    evaluating,
    in_pieces,
)


@dataclass(frozen=True)
class SpikeStatistics:
    """Mean numbers of spikes of a network.

    Attributes:
        spikes_per_neuron: by module name, in the order in which the layers run: spikes in all time steps,
            mean over the samples and the layer's neurons.
        neurons: number of neurons of each layer.
        samples: number of samples that were counted.
        T: number of time steps.
    """

    spikes_per_neuron: dict[str, float]
    neurons: dict[str, int]
    samples: int
    T: int

    @property
    def mean(self) -> float:
        """Spikes of a sample in all layers and time steps, divided by the number of all neurons."""
        spikes = sum(self.spikes_per_neuron[name] * n for name, n in self.neurons.items())
        return spikes / sum(self.neurons.values())

    @property
    def silent(self) -> tuple[str, ...]:
        """Names of the layers that never fired."""
        return tuple(name for name, spikes in self.spikes_per_neuron.items() if spikes == 0)


@dataclass(frozen=True)
class Traces:
    """Spikes and potentials of a few neurons of each layer while the network processes one sample.

    Attributes:
        spikes: by module name, ``[T, M]`` bool.
        potentials: by module name, ``[T, M]`` float32: the layer's ``v`` after each step, which is the
            potential before the reset in LaSNN's neurons and after it in SpikingJelly's.
        neurons: by module name, the ``M`` neurons as indices into the flattened layer.
        v_threshold: by module name, of layers with a single threshold.
    """

    spikes: dict[str, Tensor]
    potentials: dict[str, Tensor]
    neurons: dict[str, list[int]]
    v_threshold: dict[str, float]


def first_samples(
    loader: Iterable, encoder: nn.Module | None, samples: int, chunk: int | None = None
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yield images, labels and the axis of the samples for the first ``samples`` samples.

    Each is a batch, or a piece of one where that would take much memory.

    Raises:
        BatchError: a batch that cannot be used.
        ValueError: ``samples`` below 1, or an input without time axis where there is no encoder.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    left = samples
    for index, batch in enumerate(loader):
        images, labels = check_batch(batch, f"batch {index}")
        axis = batch_axis(images, labels)
        if encoder is None:
            # T may be N: without an encoder the second axis is that of the samples
            axis = 1
            if images.dim() < 3 or images.shape[1] != len(labels):
                raise ValueError(
                    f"batch {index} has no time axis: give an encoder for images {tuple(images.shape)}, or "
                    f"event frames [T, N, C, H, W]"
                )
        count = min(left, len(labels))
        images, labels = images.narrow(axis, 0, count), labels[:count]
        yield from ((*piece, axis) for piece in in_pieces(images, labels, encoder, chunk))
        left -= count
        if not left:
            return


@torch.no_grad()
def spike_statistics(
    student: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    *,
    samples: int = 2000,
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> SpikeStatistics:
    """Count the spikes of a network in all time steps, per neuron.

    Several processes take turns with the batches, and all get the same result; all must call it, and their
    loaders must give the same batches.

    Args:
        student: network of SpikingJelly neurons, ``[T, N, ...]`` to anything; its mode is restored
            afterwards.
        loader: batches ``(images, labels)``.
        encoder: encodes images ``[N, ...]`` as ``[T, N, ...]``; ``None`` for event frames.
        samples: number of samples to count, from the first on (2000 in the paper); all of them where the
            loader has fewer.
        device: device to run on; the student's if not given.
        chunk: time steps held in memory at once, as for :func:`~lasnn_sj.training.evaluation.evaluate`.

    Raises:
        BatchError: a batch that cannot be used.
        ValueError: no neuron ran, no sample, or an input without time axis and no encoder.
    """
    device = torch.device(device) if device is not None else device_of(student)
    spikes: dict[str, int] = {}
    neurons: dict[str, int] = {}

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        spikes[name] = spikes.get(name, 0) + int(output.count_nonzero())
        one = output[0] if module.step_mode == "s" else output[0, 0]
        neurons[name] = one.numel()

    seen = T = 0
    with _watching(student, count), evaluating(student):
        for number, (images, labels, _) in enumerate(first_samples(loader, encoder, samples, chunk)):
            if number % distributed.world_size() != distributed.rank():
                continue
            T = 0
            for piece in encoded_pieces(encoder, images.to(device), chunk):
                student(piece)
                T += len(piece)
            functional.reset_net(student)
            seen += len(labels)
    every = distributed.of_all((spikes, neurons, seen, T))
    seen, T = sum(part[2] for part in every), max(part[3] for part in every)
    neurons = every[0][1]  # process 0 has the first batch
    spikes = {name: sum(part[0].get(name, 0) for part in every) for name in neurons}
    if not neurons:
        what = "the loader gave no sample" if not seen else f"no neuron of {type(student).__name__} ran"
        raise ValueError(f"{what}; spikes cannot be counted")
    means = {name: total / (seen * neurons[name]) for name, total in spikes.items()}
    return SpikeStatistics(means, neurons, seen, T)


@torch.no_grad()
def record_traces(
    student: nn.Module,
    images: Tensor,
    encoder: nn.Module | None = None,
    *,
    neurons: int = 6,
    device: torch.device | str | None = None,
) -> Traces:
    """Record spikes and potentials of a few neurons of each layer for one sample.

    The neurons of a layer are evenly spaced among those that fire on the sample; silent ones are added
    where fewer fire. The network runs one time step at a time, so its layers must carry their state from
    step to step, as all of SpikingJelly's do.

    Args:
        student: network of SpikingJelly neurons in multi-step mode; its mode is restored afterwards.
        images: one sample, ``[1, C, H, W]``, or ``[T, 1, C, H, W]`` where there is no encoder.
        encoder: encodes images as ``[T, 1, ...]``.
        neurons: most neurons of each layer.
        device: device to run on; the student's if not given.

    Raises:
        ValueError: more than one sample, ``neurons`` below 1, or no neuron ran.
    """
    if neurons < 1:
        raise ValueError(f"neurons must be at least 1, got {neurons}")
    device = torch.device(device) if device is not None else device_of(student)
    encoded = images.to(device) if encoder is None else encoder(images.to(device))
    if encoded.dim() < 3 or encoded.shape[1] != 1:
        raise ValueError(
            f"images must hold one sample, encoded as [T, 1, ...], got {tuple(encoded.shape)} of images "
            f"{tuple(images.shape)}"
        )

    fired: dict[str, Tensor] = {}
    spikes: dict[str, list[Tensor]] = {}
    potentials: dict[str, list[Tensor]] = {}

    def count(name: str, module: nn.Module, output: Tensor) -> None:
        fired[name] = fired.get(name, 0) + (output.flatten() != 0).long()

    def read(name: str, module: nn.Module, output: Tensor) -> None:
        spikes.setdefault(name, []).append(output.flatten()[chosen[name]] != 0)
        v = module.v.flatten().float() if isinstance(module.v, Tensor) else output.new_zeros(output.numel())
        potentials.setdefault(name, []).append(v[chosen[name]])

    with evaluating(student):
        for hook in (count, read):  # the first pass finds the neurons that fire
            functional.reset_net(student)
            with _watching(student, hook):
                for step in encoded:
                    student(step.unsqueeze(0))
            if hook is count:
                chosen = {name: _spaced(counts, neurons) for name, counts in fired.items()}
    if not fired:
        raise ValueError(f"no neuron of {type(student).__name__} ran; there is nothing to record")
    return Traces(
        {name: torch.stack(steps).cpu() for name, steps in spikes.items()},
        {name: torch.stack(steps).cpu() for name, steps in potentials.items()},
        {name: indices.tolist() for name, indices in chosen.items()},
        {name: value for name in fired if (value := threshold_of(student.get_submodule(name))) is not None},
    )


def threshold_of(layer: nn.Module) -> float | None:
    """Return the threshold of a layer of neurons, where it has a single one."""
    value = getattr(layer, "v_threshold", None)
    if isinstance(value, Tensor):
        return value.item() if value.numel() == 1 else None
    return float(value) if isinstance(value, (int, float)) else None


def _spaced(counts: Tensor, most: int) -> Tensor:
    """Choose at most ``most`` neurons, evenly spaced among those that fire, then among silent ones."""
    found = []
    for group in (torch.nonzero(counts > 0).flatten(), torch.nonzero(counts == 0).flatten()):
        n = min(most - sum(map(len, found)), len(group))
        # the middles of n equal parts
        places = ((torch.arange(n, device=counts.device) + 0.5) * (len(group) / max(n, 1))).long()
        found.append(group[places])
    return torch.cat(found).sort().values


@contextmanager
def _watching(student: nn.Module, hook: Callable[[str, nn.Module, Tensor], None]) -> Iterator[None]:
    """Call ``hook(name, module, output)`` after the forward of each neuron layer."""

    def after(name: str):
        return lambda module, args, output: hook(name, module, output)

    layers = [(n, m) for n, m in student.named_modules() if isinstance(m, neuron.BaseNode)]
    handles = [module.register_forward_hook(after(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
