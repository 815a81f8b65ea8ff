"""Teachers in their CIFAR form (3x3 stem, no early pooling), with bias and batch norm.

Any ``nn.Module`` can be a teacher; these are the three of the LaSNN paper.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from ..runtime.files import read_regular
from .registry import builder

LARGEST = 1 << 28  # bytes of a teacher's file


class InputNormalization(nn.Module):
    """Wrap a teacher that expects its own input normalization.

    Students and intermediate ANNs take pixels normalized to [-1, 1], and the teacher gets the same batch.
    This wrapper converts it to ``(pixel - mean) / std``, which the teacher was trained on.

    Args:
        model: the teacher.
        mean, std: of pixels in [0, 1], one number per channel.

    Shape:
        - input ``[N, C, H, W]`` in [-1, 1]
        - output as the model's
    """

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Map images in [-1, 1] to logits."""
        return self.model(((images + 1) / 2 - self.mean) / self.std)


class _BasicBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU(inplace=True)
        self.stride, self.grown = stride, c_out - c_in

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        if self.stride != 1 or self.grown:
            # Shortcut without weights (option A of He et al.): every other pixel, zeros for new channels.
            x = F.pad(x[:, :, :: self.stride, :: self.stride],
                      (0, 0, 0, 0, self.grown // 2, self.grown - self.grown // 2))  # fmt: skip
        return self.relu2(y + x)


class TeacherResNet20(nn.Module):
    """ResNet-20 of He et al. for CIFAR: 16/32/64 channels, three blocks a stage, weightless shortcuts.

    Layers are named as in the commonly published checkpoints, which therefore load into it.

    Shape:
        - input ``[N, C, H, W]``
        - output logits ``[N, K]``
    """

    def __init__(self, num_classes: int, in_channels: int = 3, width: float = 1.0) -> None:
        super().__init__()
        c1, c2, c3 = (max(1, round(c * width)) for c in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_channels, c1, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c1)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(c1, c1, 1)
        self.layer2 = self._stage(c1, c2, 2)
        self.layer3 = self._stage(c2, c3, 2)
        self.linear = nn.Linear(c3, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(c_in: int, c_out: int, stride: int) -> nn.Sequential:
        first = _BasicBlock(c_in, c_out, stride)
        return nn.Sequential(first, *(_BasicBlock(c_out, c_out, 1) for _ in range(2)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


@builder
def teacher_resnet20(num_classes: int, in_channels: int = 3, width: float = 1.0) -> TeacherResNet20:
    """Build the ResNet-20 of He et al. For the arguments see :class:`TeacherResNet20`."""
    return TeacherResNet20(num_classes, in_channels, width)


def published_resnet20(path: str | Path) -> nn.Module:
    """Load a trained ResNet-20 for CIFAR-10 from a file of github.com/akamaster/pytorch_resnet_cifar10.

    Args:
        path: for example ``resnet20-12fca82f.th``, which was trained on images normalized with ImageNet's
            mean and deviation. No code in the file is executed.

    Returns:
        The teacher in evaluation mode, for images in [-1, 1].

    Raises:
        ValueError: the file belongs to another network or is damaged.
    """
    net = teacher_resnet20(num_classes=10)
    try:
        data = io.BytesIO(read_regular(Path(path).resolve(), at_most=LARGEST))
        if zipfile.is_zipfile(data):
            with zipfile.ZipFile(data) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it holds compressed data, which no checkpoint of PyTorch does")
        data.seek(0)  # is_zipfile moves it, in files of the format before zip too
        weights = torch.load(data, map_location="cpu", weights_only=True)["state_dict"]
        net.load_state_dict({name.removeprefix("module."): tensor for name, tensor in weights.items()})
    except Exception as error:  # what is damaged raises every kind
        why = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is not a checkpoint of that ResNet-20 ({why})") from error
    return InputNormalization(net, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)).eval()


@builder
def teacher_vgg16(num_classes: int, in_channels: int = 3, width: float = 1.0) -> nn.Module:
    """Build a VGG16 with batch norm: 13 convolutions, global average pooling, one linear layer.

    Args:
        num_classes: number of classes ``K``.
        in_channels: channels ``C`` of the images.
        width: factor of all channels.

    Shape:
        - input ``[N, C, H, W]``
        - output logits ``[N, K]``
    """
    plan = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)
    layers: list[nn.Module] = []
    channels = in_channels
    for item in plan:
        if item == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            wide = max(1, round(item * width))
            layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.BatchNorm2d(wide), nn.ReLU(inplace=True)]
            channels = wide
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@builder
def teacher_densenet121(num_classes: int, in_channels: int = 3) -> nn.Module:
    """Build torchvision's DenseNet121 with a 3x3 stem at stride 1 and no pooling before the first block.

    Args:
        num_classes: number of classes ``K``.
        in_channels: channels ``C`` of the images.

    Shape:
        - input ``[N, C, H, W]``
        - output logits ``[N, K]``
    """
    net = torchvision.models.densenet121(weights=None, num_classes=num_classes)
    net.features.conv0 = nn.Conv2d(in_channels, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.features.conv0.weight)
    net.features.pool0 = nn.Identity()
    return net
