"""Building blocks of the papers' networks, each in an ANN form and a spiking form."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from .. import neurons
from ..neurons import IntegratorNode, LIFNode, Linear, TimeLoopNode
from ..neurons.marks import mark
from ..neurons.nodes import output_is_read


class Conv2d(neurons.Conv2d):
    """A convolution that is computed once where the input repeats over time.

    A directly encoded image has time stride 0, and so has this layer's output for it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Take and return ``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode."""
        if self.step_mode == "m" and _repeats(x):
            return super().forward(x[:1]).expand(len(x), -1, -1, -1, -1)
        return super().forward(x)


class BatchNorm2d(layer.BatchNorm2d):
    """SpikingJelly's batch norm over time and batch, computed once where the input repeats over time.

    Equal steps have the mean and variance of one of them. Only the running variance differs, in its
    factor ``n / (n - 1)``: ``n`` counts the pixels of one step instead of those of all steps.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Take and return ``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode."""
        if self.step_mode == "m" and _repeats(x):
            return super().forward(x[:1]).expand(len(x), -1, -1, -1, -1)
        return super().forward(x)


def _repeats(x: Tensor) -> bool:
    return x.dim() == 5 and x.stride(0) == 0 and len(x) > 1


FIRING_RATE = 0.25  # of every layer of a fresh spiking network, at its first step
# Ratio of threshold and deviation of the input: z * sqrt(rate), where P(N(0, 1) > z) = rate.
INITIAL_THRESHOLD = NormalDist().inv_cdf(1 - FIRING_RATE) * math.sqrt(FIRING_RATE)


class LayerFactory:
    """Build the layers of one network, all in its ANN form or all in its spiking form.

    **Initial thresholds.** With every threshold at 1 the signal of a fresh network dies out within a few
    layers. A fresh layer's threshold therefore fits its initial weights. Let the spikes of the layer before
    be 1 with probability ``r``, and let a neuron have ``n`` inputs with weights of variance ``s^2``. Its
    input per step has mean 0 and variance ``n * s^2 * r``, so a neuron that starts at 0 fires in a single
    step with probability ``P(N(0, 1) > v_threshold / sqrt(n * s^2 * r))``. That is ``r`` again, in every
    layer, for

    ``v_threshold = z * sqrt(r) * sqrt(n * s^2)``, where ``P(N(0, 1) > z) = r``

    With ``r = 1/4``, ``v_threshold = 0.337 * sqrt(n * s^2)``. The rate 1/4 is stable: a layer that fires
    less, for example behind an average pool, is followed by layers closer to 1/4, as long as its rate is
    above 0.035. Potentials carried over from earlier steps only add to it: at ``T = 4`` every layer of every
    network fires in 5 to 60 % of the steps (tested on uniform noise); at ``T = 1`` the last layers of VGG16
    are silent. Threshold balancing replaces these thresholds, and a converted network starts at 1.

    Args:
        spiking: ``True`` for LIF neurons on ``[T, N, ...]``, ``False`` for ReLU on ``[N, ...]``.
        leak: leak of all neurons.
        dropout: dropout probability; a spiking network shares one mask over all steps of a sequence.

    Raises:
        ValueError: the dropout probability is outside [0, 1).
    """

    def __init__(self, spiking: bool, leak: float, dropout: float) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.spiking, self.leak, self.p = spiking, leak, dropout
        self.step_mode = "m" if spiking else "s"

    def neuron(self, gain: float) -> nn.Module:
        """Return a layer's nonlinearity; ``gain`` is ``n * s^2`` of the weights before it."""
        if not self.spiking:
            return nn.ReLU()
        return LIFNode(v_threshold=INITIAL_THRESHOLD * math.sqrt(gain), leak=self.leak, step_mode="m")

    def dropout(self, enabled: bool = True) -> nn.Module:
        """Return the dropout after a hidden layer, or an identity."""
        if not (enabled and self.p):
            return nn.Identity()
        # SpikingJelly's keeps its mask until the network is reset, and an ANN is never reset.
        return layer.Dropout(self.p, step_mode="m") if self.spiking else nn.Dropout(self.p)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> Conv2d:
        """Return a padded convolution without bias, from N(0, sqrt(2 / (k * k * C_out)))."""
        conv = Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False, step_mode=self.step_mode)
        nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (kernel * kernel * c_out)))
        return conv

    def linear(self, n_in: int, n_out: int, full_in: int) -> Linear:
        """Return a linear layer without bias, from N(0, 0.01) at full width.

        A layer with fewer inputs than the paper's ``full_in`` draws from a wider distribution, so that its
        output is as large as at full width; at 0.01 the signal of a narrow network dies out.
        """
        linear = Linear(n_in, n_out, bias=False, step_mode=self.step_mode)
        nn.init.normal_(linear.weight, 0.0, 0.01 * math.sqrt(full_in / n_in))
        return linear

    def conv_unit(self, c_in: int, c_out: int, stride: int = 1, dropout: bool = True) -> Unit:
        """Return a 3x3 convolution with its nonlinearity and dropout."""
        conv = self.conv(c_in, c_out, stride=stride)
        return Unit(conv, self.neuron(conv_gain(c_in, c_out)), self.dropout(dropout))

    def linear_unit(self, n_in: int, n_out: int, full_in: int) -> Unit:
        """Return a linear layer with its nonlinearity and dropout."""
        return Unit(self.linear(n_in, n_out, full_in), self.neuron(1e-4 * full_in), self.dropout())

    def pool(self) -> layer.AvgPool2d:
        """Return a 2x2 average pool."""
        return layer.AvgPool2d(2, step_mode=self.step_mode)

    def flatten(self) -> layer.Flatten:
        """Return the layer that turns feature maps into vectors."""
        return layer.Flatten(step_mode=self.step_mode)

    def readout(self) -> nn.Module:
        """Return the output layer: an integrator (Eq. 3) of an SNN, an identity of an ANN."""
        return IntegratorNode(step_mode="m") if self.spiking else nn.Identity()


def conv_gain(c_in: int, c_out: int) -> float:
    """Return ``n * s^2`` of a convolution's initial weights: ``k^2 C_in * 2 / (k^2 C_out)``."""
    return 2 * c_in / c_out


class Unit(nn.Module):
    """Weights, nonlinearity and dropout of a layer: ``dropout(neuron(weights(x)))``."""

    def __init__(self, weights: nn.Module, neuron: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.weights, self.neuron, self.dropout = weights, neuron, dropout

    def forward(self, x: Tensor, pool: bool = False) -> Tensor:
        """Take and return ``[N, ...]`` in an ANN, ``[T, N, ...]`` in an SNN; ``pool`` as in :func:`drop`."""
        return drop(self.neuron, self.dropout, self.weights(x), pool)

    def may_pool(self) -> bool:
        """Return whether the neuron's time loop may average its spikes: nothing else reads them."""
        if not (isinstance(self.neuron, TimeLoopNode) and self.neuron.may_pool()):
            return False
        folds = isinstance(self.dropout, (nn.Identity, layer.Dropout))
        return folds and not (output_is_read(self) or output_is_read(self.dropout))


def drop(neuron: nn.Module, dropout: nn.Module, x: Tensor, pool: bool = False) -> Tensor:
    """Return ``dropout(neuron(x))``; in multi-step mode the neuron's time loop applies the mask.

    ``pool`` lets the time loop also average 2x2 pixels; see :meth:`Unit.may_pool`.
    """
    options = {"pool": True} if pool else {}
    folds = isinstance(neuron, TimeLoopNode) and isinstance(dropout, layer.Dropout)
    if not (folds and neuron.step_mode == "m"):
        return dropout(neuron(x, **options))
    if not dropout.training:
        return neuron(x, **options)
    if dropout.mask is None:
        dropout.mask = dropout.create_mask(x[0])
    spikes = neuron(x, mask=dropout.mask, **options)
    if not pool:
        mark(spikes, dropout.mask)
    return spikes


def scaled(channels: int, width: float) -> int:
    """Return a layer's channels in a network ``width`` times as wide, at least 1."""
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, got {width}")
    return max(1, round(channels * width))


def pooled_size(image_size: int, halvings: int) -> tuple[int, int]:
    """Return the number of extra pools before the classifier, and the side of the map after all pools.

    Images of 64 pixels get one extra pool, those of 128 two, so that the classifier keeps its size.
    """
    extra = max(0, int(math.log2(image_size // 32))) if image_size >= 64 else 0
    side, rest = divmod(image_size, 2 ** (halvings + extra))
    if side < 1 or rest:
        raise ValueError(
            f"image_size must be a multiple of {2 ** (halvings + extra)} for this network, "
            f"which halves the image {halvings + extra} times, got {image_size}"
        )
    return extra, side


def check_input(x: Tensor, spiking: bool) -> None:
    """Raise :class:`ValueError` where an SNN gets an ANN's input or the reverse."""
    want, shape = (5, "[T, N, C, H, W]; encode images first") if spiking else (4, "[N, C, H, W]")
    if isinstance(x, Tensor) and x.dim() != want and not torch.jit.is_tracing():
        kind = "a spiking network" if spiking else "an ANN"
        hint = ": DirectEncoder(T)(images), or encoder=DirectEncoder(T) in LaSNNTrainer" * spiking
        raise ValueError(f"{kind} takes {shape}, got shape {tuple(x.shape)}{hint}")
