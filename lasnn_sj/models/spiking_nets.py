"""The reverse-KD paper's spiking networks, on SpikingJelly's layers, with batch norm and IF neurons.

CIFAR form: a 3x3 stem at stride 1. The paper is silent on the stem of its DVS form (2 channels, 128x128
pixels); ours halves an image of 64 pixels or more until it has the CIFAR form's 32: first by a stem of
stride 2, then by 2x2 max pools, which keep spikes binary. Everything behind the stem is the CIFAR form.
"""

from __future__ import annotations

import math

from spikingjelly.activation_based import layer, neuron, surrogate
from torch import Tensor, nn

from .layers import BatchNorm2d, Conv2d, check_input, scaled


def _neuron() -> neuron.IFNode:
    """Eq. 2: fires at ``v >= 1``, hard reset to 0; ATan and the detached reset are ours."""
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
    """How often the stem halves the image."""
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
    """Block of the spiking ResNet: ``neuron(norm(conv(neuron(norm(conv(x))))) + skip(x))``."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1, self.neuron1 = _unit(c_in, c_out, stride)
        self.conv2, self.norm2, self.neuron2 = _unit(c_out, c_out)
        self.skip: nn.Module = nn.Identity()
        if c_in != c_out or stride != 1:
            self.skip = nn.Sequential(_conv(c_in, c_out, kernel=1, stride=stride), _norm(c_out))

    def forward(self, x: Tensor) -> Tensor:
        """Spikes ``[T, N, C_in, H, W]`` to spikes ``[T, N, C_out, H / stride, W / stride]``."""
        y = self.neuron1(self.norm1(self.conv1(x)))
        return self.neuron2(self.norm2(self.conv2(y)) + self.skip(x))


class SpikingResNet18(nn.Module):
    """ResNet18 with IF neurons in place of ReLU: 64/128/256/512 channels, two blocks a stage.

    Args:
        num_classes: ``K``.
        in_channels: ``C``: 3 of colour images, 2 of event frames.
        image_size: side of the square images.
        width: factor of all channels.

    Shape:
        - input ``[T, N, C, H, W]``; directly encoded images (time stride 0) pass the first convolution
          and its batch norm once
        - output ``[T, N, K]``; the class scores are its mean over time

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
        """Encoded images or event frames to class scores of every step."""
        check_input(x, spiking=True)
        return self.classifier(self.blocks(self.pools(self.stem(x))))


class SpikingWideBlock(nn.Module):
    """Pre-activation block of the wide ResNet: ``conv(neuron(norm(conv(neuron(norm(x)))))) + skip``.

    The skip is ``x``, or where the shape changes a 1x1 convolution of ``neuron(norm(x))``. What runs
    along the skips is a current, not spikes; every convolution is given spikes.
    """

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.neuron1 = _norm(c_in), _neuron()
        self.conv1, self.norm2, self.neuron2 = _unit(c_in, c_out, stride)
        self.conv2 = _conv(c_out, c_out)
        same = c_in == c_out and stride == 1
        self.skip = None if same else _conv(c_in, c_out, kernel=1, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        """Currents ``[T, N, C_in, H, W]`` to currents ``[T, N, C_out, H / stride, W / stride]``."""
        spikes = self.neuron1(self.norm1(x))
        y = self.conv2(self.neuron2(self.norm2(self.conv1(spikes))))
        return y + (x if self.skip is None else self.skip(spikes))


class SpikingWRN16(nn.Module):
    """WRN16-k with IF neurons in place of ReLU: 16 channels, then 16k/32k/64k, two blocks a stage.

    Args:
        widen: ``k``, 4 in the paper.
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
        """Encoded images or event frames to class scores of every step."""
        check_input(x, spiking=True)
        currents = self.blocks(self.pools(self.stem(x)))
        return self.classifier(self.neuron(self.norm(currents)))


class SpikingVGG16(nn.Module):
    """The 13 convolutions of VGG16 with batch norm, IF neurons and max pools, and one linear layer.

    The classifier is the CIFAR form's usual one, as :func:`~lasnn_sj.models.teacher_vgg16` has it.

    Args:
        num_classes, in_channels, width: as for :class:`SpikingResNet18`.
        image_size: side of the square images, at least 32.

    Shape:
        as :class:`SpikingResNet18`
    """

    PLAN = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")

    def __init__(
        self, num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
    ) -> None:
        super().__init__()
        halvings, channels = _halvings(image_size, smallest=32), scaled(self.PLAN[0], width)
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
        """Encoded images or event frames to class scores of every step."""
        check_input(x, spiking=True)
        return self.classifier(self.features(self.pools(self.stem(x))))


def spiking_resnet18(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingResNet18:
    """Spiking ResNet18; arguments as for :class:`SpikingResNet18`."""
    return SpikingResNet18(num_classes, in_channels, image_size, width)


def spiking_wrn16_4(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingWRN16:
    """Spiking WRN16-4; arguments as for :class:`SpikingWRN16`."""
    return SpikingWRN16(4, num_classes, in_channels, image_size, width)


def spiking_vgg16(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0
) -> SpikingVGG16:
    """Spiking VGG16 with batch norm; arguments as for :class:`SpikingVGG16`."""
    return SpikingVGG16(num_classes, in_channels, image_size, width)
