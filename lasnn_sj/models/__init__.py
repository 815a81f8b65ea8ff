"""The papers' networks: students (each as ANN or SNN) and teachers."""

from .resnet import ResNet, resnet12, resnet20
from .spiking_nets import (
    SpikingResNet18,
    SpikingVGG16,
    SpikingWRN16,
    spiking_resnet18,
    spiking_vgg16,
    spiking_wrn16_4,
)
from .teachers import WithStatistics, published_resnet20, teacher_densenet121, teacher_resnet20, teacher_vgg16
from .vgg import VGG, conv3_linear2, vgg5, vgg7, vgg9, vgg16

__all__ = [
    "VGG",
    "ResNet",
    "SpikingResNet18",
    "SpikingVGG16",
    "SpikingWRN16",
    "WithStatistics",
    "conv3_linear2",
    "published_resnet20",
    "resnet12",
    "resnet20",
    "spiking_resnet18",
    "spiking_vgg16",
    "spiking_wrn16_4",
    "teacher_densenet121",
    "teacher_resnet20",
    "teacher_vgg16",
    "vgg5",
    "vgg7",
    "vgg9",
    "vgg16",
]
