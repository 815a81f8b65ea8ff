"""Building blocks that the papers' networks share, each in an ANN and a spiking form."""

from __future__ import annotations

import math

import torch
from spikingjelly.activation_based import layer
from torch import Tensor, nn

from ..neurons import IntegratorNode, LIFNode, TimeLoopNode


class Conv2d(layer.Conv2d):
    """SpikingJelly's convolution, which computes an input that repeats over time only once.

    A directly encoded image has time stride 0; so has this layer's output then.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode."""
        if self.step_mode == "m" and _repeats(x):
            return super().forward(x[:1]).expand(len(x), -1, -1, -1, -1)
        return super().forward(x)


class BatchNorm2d(layer.BatchNorm2d):
    """SpikingJelly's batch norm over time and batch, which keeps a time stride of 0.

    Equal steps have the mean and variance of one of them; only the running variance differs, in its
    factor ``n / (n - 1)``, where ``n`` counts the pixels of one step instead of all.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` in single-step mode, ``[T, N, C, H, W]`` in multi-step mode."""
        if self.step_mode == "m" and _repeats(x):
            return super().forward(x[:1]).expand(len(x), -1, -1, -1, -1)
        return super().forward(x)


def _repeats(x: Tensor) -> bool:
    return x.dim() == 5 and x.stride(0) == 0 and len(x) > 1


class Form:
    """Whether a network is built as an ANN or as an SNN, and of which neurons.

    Args:
        spiking: ``True`` for LIF neurons on ``[T, N, ...]``, ``False`` for ReLU on ``[N, ...]``.
        leak: leak of all neurons (the thresholds come from balancing, 1 until then).
        dropout: dropout probability; a spiking network shares one mask over all steps of a sequence.
    """

    def __init__(self, spiking: bool, leak: float, dropout: float) -> None:
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {dropout}")
        self.spiking, self.leak, self.p = spiking, leak, dropout
        self.step_mode = "m" if spiking else "s"

    def neuron(self) -> nn.Module:
        """A layer's nonlinearity."""
        return LIFNode(leak=self.leak, step_mode="m") if self.spiking else nn.ReLU()

    def dropout(self, wanted: bool = True) -> nn.Module:
        """Dropout after a hidden layer, or nothing."""
        if not (wanted and self.p):
            return nn.Identity()
        # SpikingJelly's keeps its mask until the network is reset, which nobody does to an ANN.
        return layer.Dropout(self.p, step_mode="m") if self.spiking else nn.Dropout(self.p)

    def conv(self, c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> Conv2d:
        """Convolution without bias that keeps the size at stride 1; from N(0, sqrt(2 / (k * k * C_out)))."""
        conv = Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False, step_mode=self.step_mode)
        nn.init.normal_(conv.weight, 0.0, math.sqrt(2 / (kernel * kernel * c_out)))
        return conv

    def linear(self, n_in: int, n_out: int, full_in: int) -> layer.Linear:
        """Linear layer without bias; from N(0, 0.01) at full size.

        A layer narrower than the paper's ``full_in`` inputs draws from a wider distribution, so that its
        output is as large as at full size: at 0.01 the signal of a narrow network dies out.
        """
        linear = layer.Linear(n_in, n_out, bias=False, step_mode=self.step_mode)
        nn.init.normal_(linear.weight, 0.0, 0.01 * math.sqrt(full_in / n_in))
        return linear

    def pool(self) -> layer.AvgPool2d:
        """Average pooling, 2x2."""
        return layer.AvgPool2d(2, step_mode=self.step_mode)

    def flatten(self) -> layer.Flatten:
        """Feature maps to vectors."""
        return layer.Flatten(step_mode=self.step_mode)

    def readout(self) -> nn.Module:
        """Output layer: potentials of every step, or the logits as they are."""
        return IntegratorNode(step_mode="m") if self.spiking else nn.Identity()


class Unit(nn.Module):
    """Weights, nonlinearity and dropout: ``dropout(neuron(weights(x)))``."""

    def __init__(self, weights: nn.Module, neuron: nn.Module, dropout: nn.Module) -> None:
        super().__init__()
        self.weights, self.neuron, self.dropout = weights, neuron, dropout

    def forward(self, x: Tensor) -> Tensor:
        """``[N, ...]`` of an ANN, ``[T, N, ...]`` of an SNN."""
        return drop(self.neuron, self.dropout, self.weights(x))


def drop(neuron: nn.Module, dropout: nn.Module, x: Tensor) -> Tensor:
    """``dropout(neuron(x))``; where both are over time, without a pass of its own for the dropout."""
    folds = isinstance(neuron, TimeLoopNode) and isinstance(dropout, layer.Dropout)
    if not (folds and neuron.step_mode == "m"):
        return dropout(neuron(x))
    if not dropout.training:
        return neuron(x)
    if dropout.mask is None:
        dropout.mask = dropout.create_mask(x[0])
    return neuron(x, mask=dropout.mask)


def scaled(channels: int, width: float) -> int:
    """Channels of a layer in a network ``width`` times as wide, at least 1."""
    if not (math.isfinite(width) and width > 0):
        raise ValueError(f"width must be a positive number, got {width}")
    return max(1, round(channels * width))


def pooled_size(image_size: int, halvings: int) -> tuple[int, int]:
    """Extra pools before the classifier, and the feature map's side after all pools.

    Images of 64 pixels get one more pool than those of 32, 128 two, so that the classifier keeps
    its size.
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
    """Raise where a network is given the other form's input."""
    want, shape = (5, "[T, N, C, H, W]; encode images first") if spiking else (4, "[N, C, H, W]")
    if isinstance(x, Tensor) and x.dim() != want and not torch.jit.is_tracing():
        kind = "a spiking network" if spiking else "an ANN"
        raise ValueError(f"{kind} takes {shape}, got shape {tuple(x.shape)}")
