"""Your own networks: a student of stock SpikingJelly layers, a teacher from torchvision.

    python examples/your_own_model.py

Any multi-step SpikingJelly network can be the student and any module the teacher; which layers are
compared is chosen by their resolution, printed, and can be given by name instead.
"""

import logging

import torch
import torchvision
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn

from lasnn_sj import DirectEncoder, LaSNNTrainer
from lasnn_sj.data import images as data
from lasnn_sj.training.evaluation import evaluate


def spiking_net(num_classes: int) -> nn.Module:
    """Batch norm, max pooling, hard reset, ATan: nothing of it is lasnn_sj's."""

    def block(c_in: int, c_out: int) -> list[nn.Module]:
        spikes = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
        return [layer.Conv2d(c_in, c_out, 3, padding=1, bias=False), layer.BatchNorm2d(c_out), spikes]

    net = nn.Sequential(
        *block(1, 16), *block(16, 32), layer.MaxPool2d(2), *block(32, 32), layer.Flatten(),
        layer.Linear(32 * 16, num_classes),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def torchvision_teacher(num_classes: int) -> nn.Module:
    """ResNet18 with a stem for small grey images."""
    net = torchvision.models.resnet18(num_classes=num_classes)
    net.conv1 = nn.Conv2d(1, 64, 3, padding=1, bias=False)
    net.maxpool = nn.Identity()
    return net


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    digits = data.load("digits")
    train_loader, test_loader = digits.loaders(batch_size=32)

    teacher = torchvision_teacher(digits.num_classes)
    LaSNNTrainer(teacher).fit(train_loader, epochs=2)
    print(f"teacher: {evaluate(teacher, test_loader)['top1']:.2f} %")

    student = spiking_net(digits.num_classes)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    trainer = LaSNNTrainer(
        student, teacher.eval(), encoder=DirectEncoder(T=4), alpha=0.9, optimizer=optimizer
    )
    trainer.fit(train_loader, epochs=5)
    print(f"student: {trainer.evaluate(test_loader)['top1']:.2f} %")


if __name__ == "__main__":
    main()
