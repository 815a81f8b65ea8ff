"""The papers' residual networks, as intermediate ANN or as SNN (LaSNN, Section III-A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .layers import Form, Unit, check_input, drop, pooled_size, scaled


class Block(nn.Module):
    """``neuron(conv(dropout(neuron(conv(x)))) + skip(x))``, the skip an identity or a 1x1 convolution.

    Attributes:
        skip_scale: factor of the skip, 1 until thresholds are balanced. A balanced neuron fires at its
            activation divided by its threshold, so what passes through the block's first neuron is
            smaller by that threshold than what passes by on the skip; dividing the skip by it adds the
            two in the same unit, as the ANN does.
    """

    def __init__(self, form: Form, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = Unit(form.conv(c_in, c_out, stride=stride), form.neuron(), form.dropout())
        self.conv = form.conv(c_out, c_out)
        same = c_in == c_out and stride == 1
        self.skip = nn.Identity() if same else form.conv(c_in, c_out, kernel=1, stride=stride)
        self.neuron, self.dropout = form.neuron(), form.dropout(False)
        self.register_buffer("skip_scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W]`` of an ANN, ``[T, N, C, H, W]`` of an SNN."""
        current = torch.addcmul(self.conv(self.first(x)), self.skip(x), self.skip_scale)
        return drop(self.neuron, self.dropout, current)


class ResNet(nn.Module):
    """A stem of three 3x3 convolutions instead of a 7x7 one, then four stages of residual blocks.

    Stem: 64, 64, 64 channels with dropout after the first two, and a 2x2 average pool. Stages: 64, 128,
    256, 512 channels at strides 1, 2, 2, 2. No bias, no batch norm.

    Args:
        blocks: blocks of each stage.
        num_classes, in_channels, image_size, width, spiking, leak, dropout: as for
            :class:`~lasnn_sj.models.vgg.VGG`.

    Shape:
        - ANN: ``[N, C, H, W]`` to logits ``[N, K]``
        - SNN: ``[T, N, C, H, W]`` to output potentials ``[T, N, K]``; the scores are the last
    """

    def __init__(
        self,
        blocks: int,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        width: float = 1.0,
        spiking: bool = True,
        leak: float = 0.99,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        form = Form(spiking, leak, dropout)
        extra, side = pooled_size(image_size, 4)
        channels = scaled(64, width)
        self.stem = nn.Sequential(
            Unit(form.conv(in_channels, channels), form.neuron(), form.dropout()),
            Unit(form.conv(channels, channels), form.neuron(), form.dropout()),
            Unit(form.conv(channels, channels), form.neuron(), form.dropout(False)),
            form.pool(),
        )
        stages = []
        for c_out, stride in zip((64, 128, 256, 512), (1, 2, 2, 2)):
            wide = scaled(c_out, width)
            stage = [Block(form, channels, wide, stride)]
            stage += [Block(form, wide, wide, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = wide
        self.stages = nn.Sequential(*stages)
        self.pools = nn.Sequential(*(form.pool() for _ in range(extra)))
        self.flatten = form.flatten()
        self.output = form.linear(channels * side * side, num_classes, 512 * 2 * 2)
        self.readout = form.readout()

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits, or encoded images to potentials."""
        check_input(x, not isinstance(self.readout, nn.Identity))
        features = self.pools(self.stages(self.stem(x)))
        return self.readout(self.output(self.flatten(features)))


def resnet12(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> ResNet:  # fmt: skip
    """ResNet12 of Rathi et al., one block a stage; arguments as for :class:`ResNet`."""
    return ResNet(1, num_classes, in_channels, image_size, width, spiking, leak, dropout)


def resnet20(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> ResNet:  # fmt: skip
    """ResNet20 of Rathi et al., two blocks a stage; arguments as for :class:`ResNet`."""
    return ResNet(2, num_classes, in_channels, image_size, width, spiking, leak, dropout)
