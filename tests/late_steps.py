"""Shared by the tests of steps that are checked late: networks, batches, bad batches, signals."""

import os
import signal

import torch
from torch import nn

from lasnn_sj import Callback, distillation, models
from lasnn_sj.distillation import Attention, CrossEntropy, LabelKD, Objective
from lasnn_sj.distillation.objective import Sum
from lasnn_sj.models.readout import BatchError
from lasnn_sj.training import NonFiniteError
from lasnn_sj.training.step import LAG

# Operations whose result the host waits for on CUDA.
READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "_unique2", "item"}

# Errors of `bad_batches`, and of an objective that is not finite.
MESSAGES = {
    "image": (BatchError, "images hold NaN or infinity, in samples [1]"),
    "range": (ValueError, "needs pixels in [-1, 1], got values from"),
    "label": (BatchError, "labels must lie in [0, 4), the student's classes, got"),
    "loss": (NonFiniteError, "the loss is not finite (ce = inf)"),
    "gradient": (NonFiniteError, "the gradient is not finite, first in output.weight"),
}


def waits(func, args):
    """Return whether the host waits for the result of an operation."""
    name = func._schema.name.removeprefix("aten::")
    by_mask = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
    return name in READS or by_mask


class SmallTeacher(nn.Module):
    """Three stages of convolutions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.layer3 = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.linear = nn.Linear(8, 4)

    def forward(self, x):
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


# The methods of the tables, and every other objective with its own defaults.
METHODS = {
    "hybrid": lambda: CrossEntropy(),
    "lasnn": lambda: CrossEntropy() + Attention("activation"),
    "lasnn_gradient": lambda: CrossEntropy() + Attention("gradient"),
    "lasnn_label_kd": lambda: LabelKD() + Attention("activation"),
}


def student(batch_norm=False):
    """A spiking student, or an ANN with batch norm."""
    torch.manual_seed(0)
    if batch_norm:
        first = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(256, 4))
    return models.conv3_linear2(4, width=0.05, image_size=8)


def spiking_teacher():
    """A spiking teacher of the students' size."""
    torch.manual_seed(7)
    return models.conv3_linear2(4, width=0.05, image_size=8)


OTHERS = {
    name: one
    for name, one in vars(distillation).items()
    if isinstance(one, type) and issubclass(one, Objective) and one not in (Objective, Sum)
}
OTHERS |= {
    "SparseKD": lambda: distillation.SparseKD(spiking_teacher()),
    "SpikeKD": lambda: distillation.SpikeKD(spiking_teacher(), windows=2),
}


def batches(count, size=4, device="cpu"):
    """Batches of random images and labels."""
    generator = torch.Generator().manual_seed(3)
    return [
        (
            (torch.rand(size, 3, 8, 8, generator=generator) * 2 - 1).to(device),
            torch.randint(4, (size,), generator=generator).to(device),
        )
        for _ in range(count)
    ]


def bad_batches(kind, at):
    """Batches of which the one at position ``at`` cannot be trained on, or is of ones."""
    data = batches(LAG + 9)
    images, labels = data[at]
    if kind == "image":
        images[1, 0, 2, 2] = torch.nan
    elif kind == "range":
        images[1, 0, 2, 2] = 2.0
    elif kind == "label":
        labels[2] = 4
    else:
        images.fill_(1)
    return data


def assert_equal(a, b):
    """Compare two state dictionaries to the bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Interrupts(list):
    """Batches that send SIGINT to a training before the one at ``at``."""

    at = None

    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            training = signal.getsignal(signal.SIGINT) is not signal.default_int_handler
            if number == self.at and training:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


class Steps(Callback):
    """Notes the number and loss of each step."""

    def __init__(self):
        self.seen = []

    def on_step(self, trainer, parts):
        self.seen.append((trainer.step, parts["ce"].item()))
