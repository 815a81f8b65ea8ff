"""Networks of the papers and of today's comparisons: students, intermediate ANNs and teachers.

The builders whose names are similar:

======================== ==== =============== ========== ====================================================
builder                  kind neurons         batch norm used as
======================== ==== =============== ========== ====================================================
:func:`vgg16`            SNN  LIF, soft reset no         LaSNN's student; its ANN with ``spiking=False``
:func:`spiking_vgg16`    SNN  IF, hard reset  yes        student of the reverse-distillation paper
:func:`spiking_vgg9`     SNN  IF, hard reset  yes        small student, trained directly
:func:`teacher_vgg16`    ANN  ReLU            yes        LaSNN's teacher
:func:`resnet12`         SNN  LIF, soft reset no         LaSNN's student; its ANN with ``spiking=False``
:func:`resnet20`         SNN  LIF, soft reset no         Rathi's: stem of three convolutions, four stages
:func:`teacher_resnet20` ANN  ReLU            yes        LaSNN's teacher: He et al. for CIFAR, three stages
:func:`spiking_resnet18` SNN  IF, hard reset  yes        student of the reverse-distillation paper
:func:`spiking_resnet19` SNN  LIF, hard reset tdBN       student of most of today's papers (Zheng et al.)
======================== ==== =============== ========== ====================================================

:func:`create` builds a model by its name, :func:`list_models` lists the names. :func:`save_pretrained` and
:func:`from_pretrained` write and read trained students.
"""

from .pretrained import PretrainedError, from_hub, from_pretrained, push_to_hub, save_pretrained
from .registry import create, list_models
from .resnet import ResNet, resnet12, resnet20
from .spiking_nets import (
    SpikingResNet18,
    SpikingResNet19,
    SpikingVGG9,
    SpikingVGG16,
    SpikingWRN16,
    spiking_resnet18,
    spiking_resnet19,
    spiking_vgg9,
    spiking_vgg16,
    spiking_wrn16_4,
)
from .teachers import (
    InputNormalization,
    published_resnet20,
    teacher_densenet121,
    teacher_resnet20,
    teacher_vgg16,
)
from .vgg import VGG, conv3_linear2, vgg5, vgg7, vgg9, vgg16

__all__ = [
    "VGG",
    "InputNormalization",
    "PretrainedError",
    "ResNet",
    "SpikingResNet18",
    "SpikingResNet19",
    "SpikingVGG9",
    "SpikingVGG16",
    "SpikingWRN16",
    "conv3_linear2",
    "create",
    "from_hub",
    "from_pretrained",
    "list_models",
    "published_resnet20",
    "push_to_hub",
    "resnet12",
    "resnet20",
    "save_pretrained",
    "spiking_resnet18",
    "spiking_resnet19",
    "spiking_vgg9",
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
