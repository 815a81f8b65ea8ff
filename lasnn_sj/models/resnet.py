"""The papers' residual networks, as intermediate ANN or as SNN (LaSNN, Section III-A)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..neurons import Sequential
from .layers import LayerFactory, check_input, conv_gain, drop, pooled_size, scaled
from .registry import student_builder


class Block(nn.Module):
    """Residual block: ``neuron(conv(first(x)) + skip_scale * skip(x))``, ``first`` a layer of its own.

    The skip is an identity, or a 1x1 convolution where the shape changes.

    Attributes:
        skip_scale: factor of the skip, 1 until thresholds are balanced. A balanced neuron fires at its
            activation divided by its threshold, so the signal through the block's first neuron is smaller
            than the skip's by that threshold. Dividing the skip by the threshold too adds both in the same
            unit, as the ANN does.
    """

    def __init__(self, factory: LayerFactory, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.first = factory.conv_unit(c_in, c_out, stride)
        self.conv = factory.conv(c_out, c_out)
        same = c_in == c_out and stride == 1
        self.skip = nn.Identity() if same else factory.conv(c_in, c_out, kernel=1, stride=stride)
        # The variances of both branches add up; that of an identity is its spikes' own.
        gain = conv_gain(c_out, c_out) + (1.0 if same else conv_gain(c_in, c_out))
        self.neuron, self.dropout = factory.neuron(gain), factory.dropout(False)
        self.register_buffer("skip_scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Take and return ``[N, C, H, W]`` in an ANN, ``[T, N, C, H, W]`` in an SNN."""
        current = torch.addcmul(self.conv(self.first(x)), self.skip(x), self.skip_scale)
        return drop(self.neuron, self.dropout, current)


class ResNet(nn.Module):
    """Rathi's residual network: a stem of three 3x3 convolutions, then four stages of residual blocks.

    The stem has 64 channels, dropout after its first two layers, and a 2x2 average pool. The stages have
    64, 128, 256 and 512 channels at strides 1, 2, 2 and 2. No bias, no batch norm. A fresh SNN fires in
    every layer, see :class:`~lasnn_sj.models.layers.LayerFactory`.

    Args:
        blocks: number of blocks in each stage.
        num_classes, in_channels, image_size, width, spiking, leak, dropout: as for
            :class:`~lasnn_sj.models.vgg.VGG`.

    Shape:
        - ANN: ``[N, C, H, W]`` to logits ``[N, K]``
        - SNN: ``[T, N, C, H, W]`` to output potentials ``[T, N, K]``; the last are the class scores

    Raises:
        ValueError: an image size, width or dropout probability that cannot be used.
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
        factory = LayerFactory(spiking, leak, dropout)
        extra, side = pooled_size(image_size, 4)
        channels = scaled(64, width)
        self.stem = Sequential(
            factory.conv_unit(in_channels, channels),
            factory.conv_unit(channels, channels),
            factory.conv_unit(channels, channels, dropout=False),
            factory.pool(),
        )
        stages = []
        for c_out, stride in zip((64, 128, 256, 512), (1, 2, 2, 2)):
            wide = scaled(c_out, width)
            stage = [Block(factory, channels, wide, stride)]
            stage += [Block(factory, wide, wide, 1) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(*stage))
            channels = wide
        self.stages = nn.Sequential(*stages)
        self.pools = nn.Sequential(*(factory.pool() for _ in range(extra)))
        self.flatten = factory.flatten()
        self.output = factory.linear(channels * side * side, num_classes, 512 * 2 * 2)
        self.readout = factory.readout()

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits (ANN), or encoded images to potentials (SNN)."""
        check_input(x, not isinstance(self.readout, nn.Identity))
        features = self.pools(self.stages(self.stem(x)))
        return self.readout(self.output(self.flatten(features)))


resnet12 = student_builder("resnet12", ResNet, 1, doc="ResNet12 of Rathi et al., one block a stage.")
resnet20 = student_builder(
    "resnet20", ResNet, 2,
    doc="ResNet20 of Rathi et al., two blocks a stage. Not the ANN :func:`teacher_resnet20` of He et al.",
)  # fmt: skip
