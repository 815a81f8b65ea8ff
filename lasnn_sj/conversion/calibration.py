"""Calibrated conversion of ANNs with batch norm and biases (Li et al., 2021; LaSNN, Fig. 3)."""

from __future__ import annotations

import copy

import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..neurons import IFNode, IntegratorNode
from ..runtime.progress import progress_bar
from .convert import ConversionError, check_convertible

SAMPLE = 1 << 17  # number of activations that determine a threshold
CHUNK = 4  # number of time steps in memory at once


class CalibratedNeuron(nn.Module):
    """Integrate-and-fire neurons in place of a ReLU, whose spikes have the value of their threshold.

    The mean of the output over time then approximates the ReLU's activation. Weights, biases, batch norm (a
    scale and a shift in evaluation mode) and shortcuts are kept.

    Attributes:
        charge: initial potential as a fraction of the threshold.
        bias: added to the input of every step, one number per channel.

    Shape:
        - input and output ``[T * N, C, ...]``
    """

    def __init__(self) -> None:
        super().__init__()
        self.node = IFNode(step_mode="m")
        self.T, self.charge = 1, 0.0
        self.register_buffer("bias", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Map the input currents of all steps to spikes times the threshold."""
        x = (x + self.bias.view(1, -1, *[1] * (x.dim() - 2))).unflatten(0, (self.T, -1))
        if not isinstance(self.node.v, Tensor):
            self.node.v = torch.full_like(x[0], self.charge * self.node.v_threshold)
        return (self.node(x) * self.node.v_threshold).flatten(0, 1)


class CalibratedSNN(nn.Module):
    """An ANN with :class:`CalibratedNeuron` for its ReLUs; other layers take the steps as a larger batch.

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
        """The neurons by the names of the ReLUs that they replace."""
        return {n: m for n, m in self.body.named_modules() if isinstance(m, CalibratedNeuron)}

    def forward(self, x: Tensor) -> Tensor:
        """Map encoded images to potentials."""
        for neuron in self.neurons.values():
            neuron.T = len(x)
        return self.readout(self.body(x.flatten(0, 1)).unflatten(0, (len(x), -1)))


def calibrate(
    ann: nn.Module, images: Tensor, encoder: nn.Module, correct: bool = True, progress: bool = False
) -> CalibratedSNN:
    """Convert an ANN and correct the errors of few time steps (Li et al., 2021).

    A rate over ``T`` steps has ``T + 1`` possible values up to the threshold. A layer's threshold is the one
    at which clipping and rounding its ReLU's activations on ``images`` to those values has the smallest mean
    squared error. Potentials start at half the threshold, which turns rounding down into rounding to the
    nearest. Then, layer by layer in the order in which they run, with earlier layers already corrected, the
    mean difference between the ANN's activation and the spiking layer's output over images, time and space is
    added to the bias of each channel. The corrections of single neurons' potentials and of weights in that
    paper are left out.

    Args:
        ann: a network of modules with one ``nn.ReLU`` for each use and average pooling; batch norm and
            biases are allowed. It is not changed.
        images: one batch ``[N, C, H, W]`` for the encoder.
        encoder: its ``T`` is the number of steps that the network is calibrated for.
        correct: ``False`` gives the conversion that calibration is compared with: thresholds at the largest
            activation, potentials that start at 0, biases unchanged.
        progress: show a progress bar.

    Returns:
        A network ``[T, N, ...]`` to ``[T, N, K]`` in evaluation mode; it must stay in that mode.

    Raises:
        ConversionError: max pooling, another nonlinearity, no ReLU module, a ReLU module that is used in two
            places or runs twice, or one that no image activates.
    """
    snn = CalibratedSNN(ann)
    wanted = _activations(ann, images)
    neurons = {name: snn.neurons[name] for name in wanted}  # in the order in which they run
    for name, neuron in neurons.items():
        peak = wanted[name].amax().item()
        if not 0 < peak < float("inf"):
            raise ConversionError(
                f"layer '{name}' (ReLU): its largest activation on the images is {peak}, so no threshold can "
                f"be set; calibrate a trained network"
            )
        neuron.node.v_threshold = _threshold(wanted[name], encoder.T) if correct else peak
        neuron.charge = 0.5 if correct else 0.0
        neuron.bias = images.new_zeros(wanted[name].shape[1])
    if correct:
        with torch.no_grad():
            bar = progress_bar(neurons.items(), quiet=not progress, desc="calibrating", unit="layer")
            for name, neuron in bar:
                neuron.bias += _channel_mean(wanted[name]) - _spiking_mean(snn, neuron, encoder, images)
    functional.reset_net(snn)
    return snn


def _threshold(activation: Tensor, T: int) -> float:
    """Return the best of 100 thresholds: that of the smallest error of a rate over ``T`` steps."""
    peak = activation.amax().item()
    values = activation.flatten()
    if len(values) > SAMPLE:  # at random: a fixed stride would take a few columns of a map only
        chosen = torch.randint(len(values), (SAMPLE,), generator=torch.Generator().manual_seed(0))
        values = values[chosen.to(values.device)]

    def error(threshold: float) -> float:
        rate = (values * (T / threshold)).round().clamp(max=T) * (threshold / T)
        return (rate - values).square().mean().item()

    return min((peak * percent / 100 for percent in range(1, 101)), key=error)


def _spiking(ann: nn.Module) -> nn.Module:
    """Return a copy of the ANN with neurons in place of its ReLUs."""
    check_convertible(ann, normalized=True)
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
    """Return the output of each ReLU by name, in the order in which they run."""
    seen: dict[str, Tensor] = {}
    training = ann.training

    def watch(name: str, output: Tensor) -> None:
        if name in seen:
            raise ConversionError(
                f"layer '{name}' (ReLU) runs more than once in a forward pass: a neuron keeps the state of "
                f"one layer, so use one nn.ReLU for each"
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
    """End a forward pass behind the neurons whose output is measured."""


def _spiking_mean(snn: CalibratedSNN, neuron: CalibratedNeuron, encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the mean output of each channel over images, time and space."""

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
                    "a ReLU ran in the ANN's forward pass, but its neurons did not run in the SNN's"
                )
    return total


def _channel_mean(activation: Tensor) -> Tensor:
    """Return the mean of ``[N, C, ...]`` over all dimensions but the channels."""
    return activation.transpose(0, 1).flatten(1).mean(1)
