"""Mean spikes per neuron, as LaSNN's Fig. 6 and 7 count them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from spikingjelly.activation_based import functional, neuron
from torch import nn

from ..training.evaluation import batch_axis, check_batch, device_of, encoded_pieces, evaluating


@dataclass(frozen=True)
class SpikeStatistics:
    """Spikes of a network on some samples.

    Attributes:
        spikes_per_neuron: by module name, in the order in which the layers run: mean over samples and the
            layer's neurons of the number of spikes in all time steps.
        neurons: how many neurons each layer has.
        samples: how many samples were looked at.
        T: time steps.
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


@torch.no_grad()
def spike_statistics(
    model: nn.Module,
    loader: Iterable,
    encoder: nn.Module | None = None,
    samples: int = 2000,
    *,
    device: torch.device | str | None = None,
    chunk: int | None = None,
) -> SpikeStatistics:
    """Count a network's spikes: all time steps, the first ``samples`` samples, divided by the neurons.

    Args:
        model: network of SpikingJelly neurons, ``[T, N, ...]`` to anything; its mode is restored afterwards.
        loader: batches ``(images, labels)``; fewer samples than asked for are taken as they are.
        encoder: gives the input its time axis; ``None`` for event frames ``[T, N, ...]``.
        samples: the paper's number.
        device: the model's if not given.
        chunk: time steps held in memory at once, as for :func:`~lasnn_sj.training.evaluation.evaluate`.

    Raises:
        ValueError: no neuron ran, or no sample.
    """
    if samples < 1:
        raise ValueError(f"samples must be at least 1, got {samples}")
    device = torch.device(device) if device is not None else device_of(model)
    spikes: dict[str, int] = {}
    neurons: dict[str, int] = {}

    def counting(name: str):
        def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            spikes[name] = spikes.get(name, 0) + int(output.count_nonzero())
            one = output[0] if module.step_mode == "s" else output[0, 0]
            neurons[name] = one.numel()

        return count

    found = {name: m for name, m in model.named_modules() if isinstance(m, neuron.BaseNode)}
    hooks = [module.register_forward_hook(counting(name)) for name, module in found.items()]
    seen = T = 0
    try:
        with evaluating(model):
            for index, batch in enumerate(loader):
                images, labels = check_batch(batch, f"batch {index}")
                left = min(samples - seen, len(labels))
                images = images.narrow(batch_axis(images, labels), 0, left).to(device)
                T = 0
                for piece in encoded_pieces(encoder, images, chunk):
                    model(piece)
                    T += len(piece)
                functional.reset_net(model)
                seen += left
                if seen == samples:
                    break
    finally:
        for hook in hooks:
            hook.remove()
    if not neurons:
        what = "the loader gave no sample" if not seen else f"no neuron of {type(model).__name__} ran"
        raise ValueError(f"{what}; spikes cannot be counted")
    means = {name: count / (seen * neurons[name]) for name, count in spikes.items()}
    return SpikeStatistics(means, neurons, seen, T)
