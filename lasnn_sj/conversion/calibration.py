"""Calibrated conversion, a baseline of LaSNN's Fig. 3, for ANNs with batch norm and biases."""

from __future__ import annotations

import copy

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..neurons import IFNode, IntegratorNode
from .convert import ConversionError, check_convertible

SAMPLE = 1 << 17  # activations that a threshold is chosen by
CHUNK = 4  # time steps in memory at once


class CalibratedNeuron(nn.Module):
    """Takes the place of a ReLU: integrate-and-fire neurons whose spikes are worth their threshold.

    So the mean over time of the output is the ReLU's activation, and weights, biases, batch norm (a scale
    and a shift in evaluation mode) and shortcuts stay as they are.

    Attributes:
        charge: potential at the start, as a part of the threshold.
        bias: added to the input of every step, one per channel.

    Shape:
        - input and output ``[T * N, C, ...]``
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = IFNode(step_mode="m")
        self.T, self.charge = 1, 0.0
        self.register_buffer("bias", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Currents of all steps to spikes times the threshold."""
        x = (x + self.bias.view(1, -1, *[1] * (x.dim() - 2))).unflatten(0, (self.T, -1))
        if not isinstance(self.node.v, Tensor):
            self.node.v = torch.full_like(x[0], self.charge * self.node.v_threshold)
        return (self.node(x) * self.node.v_threshold).flatten(0, 1)


class CalibratedSNN(nn.Module):
    """An ANN whose ReLUs are :class:`CalibratedNeuron`; all else sees the steps as a larger batch.

    Shape:
        - input ``[T, N, ...]``
        - output ``[T, N, K]``, the sum of the logits up to each step
    """

    def __init__(self, ann: nn.Module) -> None:
        super().__init__()
        self.body = _spiking(ann)
        self.readout = IntegratorNode(step_mode="m")
        self.eval()

    @property
    def neurons(self) -> dict[str, CalibratedNeuron]:
        """By the name that the ReLU had."""
        return {n: m for n, m in self.body.named_modules() if isinstance(m, CalibratedNeuron)}

    def forward(self, x: Tensor) -> Tensor:
        """Encoded images to potentials."""
        for neuron in self.neurons.values():
            neuron.T = len(x)
        return self.readout(self.body(x.flatten(0, 1)).unflatten(0, (len(x), -1)))


def calibrate(
    ann: nn.Module, images: Tensor, encoder: nn.Module, correct: bool = True, progress: bool = False
) -> CalibratedSNN:
    """Convert an ANN and correct what few time steps do to its activations (Li et al., 2021).

    A rate over ``T`` steps takes ``T + 1`` values up to the threshold. The threshold of a layer is the one
    for which clipping and rounding its ReLU's activations on ``images`` to those values costs the least
    mean squared error; neurons start at half of it, which rounds to the nearest instead of down. Then,
    layer by layer in the order in which they run, earlier layers corrected already, the difference between
    the ANN's activation and the spiking layer's mean output, a mean over images and places, is added to
    the bias of each channel. Their correction of single neurons' potentials and of weights is left out.

    Args:
        ann: a network of modules, one ``nn.ReLU`` for each use, with average pooling; batch norm and biases
            are welcome. It is not changed.
        images: one batch ``[N, C, H, W]`` as the encoder takes it.
        encoder: of the ``T`` steps for which the network is calibrated.
        correct: ``False`` is the conversion that calibration improves upon: thresholds at the largest
            activation, no charge at the start, biases as they are.
        progress: show a progress bar.

    Returns:
        ``[T, N, ...]`` to ``[T, N, K]``, in evaluation mode, where it has to stay.

    Raises:
        ConversionError: max pooling, another nonlinearity, a ReLU module in two places or none, a ReLU
            that runs twice or that no image activates.
    """
    snn = CalibratedSNN(ann)
    wanted = _activations(ann, images)
    neurons = {name: snn.neurons[name] for name in wanted}  # in the order in which they run
    for name, neuron in neurons.items():
        peak = wanted[name].amax().item()
        if not 0 < peak < float("inf"):
            raise ConversionError(
                f"layer '{name}' (ReLU): its largest activation on the images is {peak}, so no threshold can "
                f"be set; is the network trained?"
            )
        neuron.node.v_threshold = _threshold(wanted[name], encoder.T) if correct else peak
        neuron.charge = 0.5 if correct else 0.0
        neuron.bias = images.new_zeros(wanted[name].shape[1])
    if correct:
        with torch.no_grad():
            for name, neuron in tqdm(neurons.items(), desc="calibrating", unit="layer", disable=not progress):
                neuron.bias += _channel_mean(wanted[name]) - _spiking_mean(snn, neuron, encoder, images)
    functional.reset_net(snn)
    return snn


def _threshold(activation: Tensor, T: int) -> float:
    """The threshold for which a rate over ``T`` steps is nearest to the activation, of 100 that are tried."""
    peak = activation.amax().item()
    values = activation.flatten()
    if len(values) > SAMPLE:  # drawn: equal steps would see a few columns of a map only
        chosen = torch.randint(len(values), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(values.device)]

    def error(threshold: float) -> float:
        rate = (values * (T / threshold)).round().clamp(max=T) * (threshold / T)
        return (rate - values).square().mean().item()

    return min((peak * percent / 100 for percent in range(1, 101)), key=error)


def _spiking(ann: nn.Module) -> nn.Module:
    check_convertible(ann, normalised=True)
    body = copy.deepcopy(ann).eval().requires_grad_(False)
    for name, module in list(body.named_modules()):
        if isinstance(module, nn.ReLU):
            if not name:
                raise ConversionError("the network is a single ReLU; there is nothing to convert")
            parent, _, child = name.rpartition(".")
            setattr(body.get_submodule(parent), child, CalibratedNeuron())
    return body


@torch.no_grad()
def _activations(ann: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """What each ReLU gives, by name, in the order in which they run."""
    seen: dict[str, Tensor] = {}
    training = ann.training

    def watch(name: str, output: Tensor) -> None:
        if name in seen:
            raise ConversionError(
                f"layer '{name}' (ReLU) runs more than once in a forward pass: neurons keep the state of one "
                f"layer, so give each use an nn.ReLU of its own"
            )
        seen[name] = output.clone()  # a later layer may work in place

    hooks = [
        module.register_forward_hook(lambda _, args, output, name=name: watch(name, output))
        for name, module in ann.named_modules()
        if isinstance(module, nn.ReLU)
    ]
    ann.eval()
    try:
        ann(images)
    finally:
        for hook in hooks:
            hook.remove()
        ann.train(training)
    return seen


class _Stop(Exception):
    """Ends a forward pass behind the neurons whose output was wanted."""


def _spiking_mean(snn: CalibratedSNN, neuron: CalibratedNeuron, encoder: nn.Module, images: Tensor) -> Tensor:
    def watch(module: nn.Module, args: tuple, output: Tensor) -> None:
        raise _Stop(_channel_mean(output))

    total = 0.0
    functional.reset_net(snn)
    with neuron.register_forward_hook(watch):
        for start in range(0, encoder.T, CHUNK):
            piece = encoder.steps(images, min(CHUNK, encoder.T - start))
            try:
                snn(piece)
            except _Stop as stop:
                total += stop.args[0] * (len(piece) / encoder.T)
            else:
                raise ConversionError(
                    "a ReLU of the network ran for the ANN, but its neurons did not for the SNN"
                )
    return total


def _channel_mean(activation: Tensor) -> Tensor:
    """Mean of ``[N, C, ...]`` over all but the channels."""
    return activation.transpose(0, 1).flatten(1).mean(1)
