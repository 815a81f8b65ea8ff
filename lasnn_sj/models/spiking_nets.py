"""Directly trained spiking networks with batch norm, on SpikingJelly's layers and neurons.

Spiking ResNet18, WRN16-4 and VGG16 with IF neurons are the reverse-distillation paper's; ResNet-19 with
threshold-dependent batch norm is the common student of today's papers.

In the CIFAR form the stem is a 3x3 convolution at stride 1. The reverse-distillation paper is silent on the
stem of its DVS form (2 channels, 128x128 pixels). Ours halves images of 64 pixels or more until they have the
CIFAR form's 32: first by a stem of stride 2, then by 2x2 max pools, which keep spikes binary. Everything
behind the stem is the CIFAR form.
"""

from __future__ import annotations

import math

from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

from .layers import INITIAL_THRESHOLD, BatchNorm2d, Conv2d, check_input, scaled
from .registry import builder


def _neuron() -> neuron.IFNode:
    """Return IF neurons (Eq. 2): fire at ``v >= 1``, hard reset to 0. ATan, detached reset are ours."""
    return neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="m")


def _conv(c_in: int, c_out: int, kernel: int = 3, stride: int = 1) -> Conv2d:
    conv = Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False, step_mode="m")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _norm(channels: int) -> BatchNorm2d:
    return BatchNorm2d(channels, step_mode="m")


def _unit(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
    return [_conv(c_in, c_out, stride=stride), _norm(c_out), _neuron()]


def _halvings(image_size: int, smallest: int) -> int:
    """Return how often the stem halves the image."""
    if isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < smallest:
        raise ValueError(
            f"image_size must be a whole number of pixels, at least {smallest} for this network, "
            f"got {image_size!r}"
        )
    return max(0, int(math.log2(image_size // 32))) if image_size >= 64 else 0


def _pools(count: int) -> nn.Sequential:
    return nn.Sequential(*(layer.MaxPool2d(2, step_mode="m") for _ in range(count)))


class _Classifier(nn.Module):
    """Global average pooling and one linear layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.pool = layer.AdaptiveAvgPool2d(1, step_mode="m")
        self.flatten = layer.Flatten(step_mode="m")
        self.linear = layer.Linear(channels, num_classes, step_mode="m")

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.flatten(self.pool(x)))


class SpikingBlock(nn.Module):
    """Residual block of the spiking ResNet: ``neuron(norm(conv(neuron(norm(conv(x))))) + skip(x))``."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.neuron1 = _unit(c_in, c_out, stride)
        self.conv2, self.norm2, self.neuron2 = _unit(c_out, c_out)
        self.skip: nn.Module = nn.Identity()
        if c_in != c_out or stride != 1:
            self.skip = nn.Sequential(_conv(c_in, c_out, kernel=1, stride=stride), _norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Map spikes ``[T, N, C_in, H, W]`` to spikes ``[T, N, C_out, H / stride, W / stride]``."""
        y = self.neuron1(self.norm1(self.conv1(x)))
        return self.neuron2(self.norm2(self.conv2(y)) + self.skip(x))


class SpikingResNet18(nn.Module):
    """ResNet18 with IF neurons in place of ReLU: 64/128/256/512 channels, two blocks a stage.

    Args:
        num_classes: number of classes ``K``.
        in_channels: channels ``C``: 3 of colour images, 2 of event frames.
        image_size: side of the square images in pixels.
        width: factor of all channels.

    Shape:
        - input ``[T, N, C, H, W]``; directly encoded images (time stride 0) pass the first convolution
          and its batch norm once
        - output ``[T, N, K]``; its mean over time are the class scores

    Raises:
        ValueError: an image size or width that cannot be used.
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        halvings, channels = _halvings(image_size, smallest=1), scaled(64, width)
        self.stem = nn.Sequential(*_unit(in_channels, channels, stride=2 if halvings else 1))
        self.pools = _pools(halvings - 1)
        blocks = []
        for c_out, stride in zip((64, 128, 256, 512), (1, 2, 2, 2)):
            wide = scaled(c_out, width)
            blocks += [SpikingBlock(channels, wide, stride), SpikingBlock(wide, wide, 1)]
            channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.classifier = _Classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map encoded images or event frames to the class scores of every step."""
        check_input(x, spiking=True)
        return self.classifier(self.blocks(self.pools(self.stem(x))))


class SpikingWideBlock(nn.Module):
    """Pre-activation block of the wide ResNet: ``conv(neuron(norm(conv(neuron(norm(x)))))) + skip``.

    The skip is ``x``, or where the shape changes a 1x1 convolution of ``neuron(norm(x))``. The skips carry
    currents, not spikes; the input of every convolution behind the stem is spikes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.neuron1 = _norm(c_in), _neuron()
        self.conv1, self.norm2, self.neuron2 = _unit(c_in, c_out, stride)
        self.conv2 = _conv(c_out, c_out)
        same = c_in == c_out and stride == 1
        self.skip = None if same else _conv(c_in, c_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map currents ``[T, N, C_in, H, W]`` to currents ``[T, N, C_out, H / stride, W / stride]``."""
        spikes = self.neuron1(self.norm1(x))
        y = self.conv2(self.neuron2(self.norm2(self.conv1(spikes))))
        return y + (x if self.skip is None else self.skip(spikes))


class SpikingWRN16(nn.Module):
    """WRN16-k with IF neurons in place of ReLU: 16 channels, then 16k/32k/64k, two blocks a stage.

    Args:
        widen: widening factor ``k``, 4 in the paper.
        num_classes, in_channels, image_size, width: as for :class:`SpikingResNet18`.

    Shape:
        as :class:`SpikingResNet18`
    """

    def __init__(
        self, widen: int, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        halvings, channels = _halvings(image_size, smallest=1), scaled(16, width)
        self.stem = _conv(in_channels, channels, stride=2 if halvings else 1)
        self.pools = _pools(halvings - 1)
        blocks = []
        for c_out, stride in zip((16, 32, 64), (1, 2, 2)):
            wide = scaled(c_out * widen, width)
            blocks += [SpikingWideBlock(channels, wide, stride), SpikingWideBlock(wide, wide, 1)]
            channels = wide
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.neuron = _norm(channels), _neuron()
        self.classifier = _Classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map encoded images or event frames to the class scores of every step."""
        check_input(x, spiking=True)
        currents = self.blocks(self.pools(self.stem(x)))
        return self.classifier(self.neuron(self.norm(currents)))


class SpikingVGG(nn.Module):
    """Base of the VGG networks: batch norm, IF neurons, max pools, global average pooling, one linear layer.

    The classifier is the usual one of the CIFAR form, as in :func:`~lasnn_sj.models.teacher_vgg16`. A
    subclass sets ``PLAN``: channels of the convolutions, ``"M"`` for a max pool.

    Args:
        num_classes, in_channels, width: as for :class:`SpikingResNet18`.
        image_size: side of the square images, at least one pixel for the last pool's output.

    Shape:
        as :class:`SpikingResNet18`
    """

    PLAN: tuple[int | str, ...]

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        halvings = _halvings(image_size, smallest=2 ** self.PLAN.count("M"))
        channels = scaled(self.PLAN[0], width)
        self.stem = nn.Sequential(*_unit(in_channels, channels, stride=2 if halvings else 1))
        self.pools = _pools(halvings - 1)
        features: list[nn.Module] = []
        for item in self.PLAN[1:]:
            if item == "M":
                features.append(layer.MaxPool2d(2, step_mode="m"))
            else:
                features += _unit(channels, scaled(item, width))
                channels = scaled(item, width)
        self.features = nn.Sequential(*features)
        self.classifier = _Classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map encoded images or event frames to the class scores of every step."""
        check_input(x, spiking=True)
        return self.classifier(self.features(self.pools(self.stem(x))))


class SpikingVGG16(SpikingVGG):
    """VGG16 of the reverse-distillation paper, for images of 32 pixels and more; see :class:`SpikingVGG`."""

    PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


class SpikingVGG9(SpikingVGG):
    """Eight convolutions and a linear layer, for images of 8 pixels and more; see :class:`SpikingVGG`.

    VGG-11's plan without its last stage, with two convolutions in each of the first two.
    """

    PLAN = (64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512)


def _lif() -> neuron.LIFNode:
    """Return LIF neurons as Zheng et al.: ``v[t] = 0.25 * v[t-1] + x[t]``, threshold 1, hard reset to 0."""
    return neuron.LIFNode(
        tau=4 / 3, decay_input=False, surrogate_function=surrogate.PiecewiseQuadratic(alpha=1.0),
        detach_reset=True, step_mode="m",
    )  # fmt: skip


def _td_norm(channels: int, alpha: float = 1.0) -> BatchNorm2d:
    """Return threshold-dependent batch norm: to ``N(0, (alpha * v_threshold)^2)`` over time, batch and space.

    ``alpha * v_threshold`` (threshold 1) is the initial value of the weight, by which training scales it.
    """
    norm = BatchNorm2d(channels, step_mode="m")
    nn.init.constant_(norm.weight, alpha)
    return norm


class ThresholdNormBlock(nn.Module):
    """Block of ResNet-19: ``lif(tdbn(conv(lif(tdbn(conv(x))))) + skip(x))``.

    The two branches that are summed have ``alpha = 1 / sqrt(2)`` in their last batch norm. The skip is an
    identity, or a 1x1 convolution with batch norm where the shape changes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.neuron1 = _conv(c_in, c_out, stride=stride), _td_norm(c_out), _lif()
        self.conv2, self.norm2 = _conv(c_out, c_out), _td_norm(c_out, alpha=1 / math.sqrt(2))
        self.skip: nn.Module = nn.Identity()
        if c_in != c_out or stride != 1:
            conv = _conv(c_in, c_out, kernel=1, stride=stride)
            self.skip = nn.Sequential(conv, _td_norm(c_out, alpha=1 / math.sqrt(2)))
        self.neuron2 = _lif()

    def forward(self, x: Tensor) -> Tensor:
        """Map spikes ``[T, N, C_in, H, W]`` to spikes ``[T, N, C_out, H / stride, W / stride]``."""
        y = self.norm2(self.conv2(self.neuron1(self.norm1(self.conv1(x)))))
        return self.neuron2(y + self.skip(x))


class SpikingResNet19(nn.Module):
    """ResNet-19 with threshold-dependent batch norm (tdBN, Zheng et al., AAAI 2021).

    A 3x3 stem of 128 channels, stages of 3, 3 and 2 blocks with 128, 256 and 512 channels at strides 1, 2
    and 2, global average pooling, a hidden linear layer of 256 LIF neurons, and the output layer. tdBN
    normalizes the input of every neuron to ``N(0, (alpha * v_threshold)^2)``, with ``alpha`` 1 in a series of
    layers and ``1 / sqrt(2)`` before the sum of two branches. The surrogate is a triangle of height and
    half-width 1 (Deng et al., TET, 2022) in place of Zheng's rectangle. The weights of the hidden layer,
    which has no batch norm, start from ``N(0, 8.8 / n)`` for its ``n`` inputs, so that it fires at once (see
    :class:`~lasnn_sj.models.layers.LayerFactory`); with PyTorch's default it is silent.

    Args:
        num_classes, in_channels, image_size, width: as for :class:`SpikingResNet18`.

    Shape:
        as :class:`SpikingResNet18`
    """

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        halvings, channels = _halvings(image_size, smallest=1), scaled(128, width)
        self.stem = nn.Sequential(
            _conv(in_channels, channels, stride=2 if halvings else 1), _td_norm(channels), _lif()
        )
        self.pools = _pools(halvings - 1)
        blocks = []
        for c_out, count, first_stride in ((128, 3, 1), (256, 3, 2), (512, 2, 2)):
            wide = scaled(c_out, width)
            for stride in (first_stride, *[1] * (count - 1)):
                blocks.append(ThresholdNormBlock(channels, wide, stride))
                channels = wide
        self.blocks = nn.Sequential(*blocks)
        hidden = layer.Linear(channels, scaled(256, width), step_mode="m")
        nn.init.normal_(hidden.weight, 0.0, 1 / (INITIAL_THRESHOLD * math.sqrt(channels)))
        self.classifier = nn.Sequential(
            layer.AdaptiveAvgPool2d(1, step_mode="m"),
            layer.Flatten(step_mode="m"),
            hidden,
            _lif(),
            layer.Linear(hidden.out_features, num_classes, step_mode="m"),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map encoded images or event frames to the class scores of every step."""
        check_input(x, spiking=True)
        return self.classifier(self.blocks(self.pools(self.stem(x))))


@builder
def spiking_resnet18(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingResNet18:
    """Build a spiking ResNet18. For the arguments see :class:`SpikingResNet18`."""
    return SpikingResNet18(num_classes, in_channels, image_size, width)


@builder
def spiking_wrn16_4(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingWRN16:
    """Build a spiking WRN16-4. For the arguments see :class:`SpikingWRN16`."""
    return SpikingWRN16(4, num_classes, in_channels, image_size, width)


@builder
def spiking_vgg16(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingVGG16:
    """Build a spiking VGG16 with batch norm and IF neurons. For the arguments see :class:`SpikingVGG`.

    Not LaSNN's :func:`vgg16` (no batch norm, LIF neurons) and not the ANN :func:`teacher_vgg16`.
    """
    return SpikingVGG16(num_classes, in_channels, image_size, width)


@builder
def spiking_vgg9(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingVGG9:
    """Build a spiking VGG-9 with batch norm and IF neurons. For the arguments see :class:`SpikingVGG`.

    Not LaSNN's :func:`vgg9` (no batch norm, LIF neurons).
    """
    return SpikingVGG9(num_classes, in_channels, image_size, width)


@builder
def spiking_resnet19(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingResNet19:
    """Build a spiking ResNet-19 with tdBN. For the arguments see :class:`SpikingResNet19`."""
    return SpikingResNet19(num_classes, in_channels, image_size, width)
