"""LaSNN's loss in a training loop of your own: only taps, attention maps and objectives, no trainer.

    python examples/bare_loop.py

The lines between "what the loss needs" and "end" are all that distillation adds to a loop. The student is
that of your_own_model.py beside this file; the images are 8x8 digits, which come with scikit-learn.
"""

import argparse

import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import nn
from your_own_model import spiking_net

from lasnn_sj import DirectEncoder, models
from lasnn_sj.data import images as data
from lasnn_sj.distillation import (
    StudentTaps,
    TeacherTaps,
    activation_map,
    attention_loss,
    choose_pairs,
    weight_at,
)
from lasnn_sj.neurons import accelerate
from lasnn_sj.training.evaluation import evaluate

ALPHA = 0.9


def train_teacher(teacher: nn.Module, loader, epochs: int) -> None:
    """Cross-entropy, nothing else."""
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(teacher(images), labels).backward()
            optimizer.step()
    teacher.eval().requires_grad_(False)


def distil(student: nn.Module, teacher: nn.Module, encoder: nn.Module, loader, epochs: int) -> list[float]:
    """Train the student by Eq. 7-8; returns each epoch's mean attention loss."""
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3)
    images, _ = next(iter(loader))
    pairs = choose_pairs(student, teacher, encoder(images[:2]), images[:2])
    print(*pairs, sep="\n")
    student_taps = StudentTaps(student, [(pair.student, "firing_rate") for pair in pairs])
    teacher_taps = TeacherTaps(teacher, [pair.teacher for pair in pairs])
    history = []
    for epoch in range(1, epochs + 1):
        student.train()
        total = 0.0
        for images, labels in loader:
            with student_taps:
                scores = student(encoder(images)).mean(0)  # [T, N, K] -> [N, K]
            # what the loss needs
            with teacher_taps, torch.no_grad():
                teacher(images)
            student_maps = [activation_map(rate, power=1) for rate in student_taps.collect()]
            activations = teacher_taps.collect()
            teacher_maps = [activation_map(activations[p.teacher], size=p.size) for p in pairs]
            attention = attention_loss(teacher_maps, student_maps)
            # end
            loss = (
                F.cross_entropy(scores, labels)
                + ALPHA * weight_at("linear", epoch - 1, epochs) / 2 * attention
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            functional.reset_net(student)
            total += attention.item()
        history.append(total / len(loader))
        print(f"epoch {epoch}: attention loss {history[-1]:.3f}")
    student_taps.close()
    teacher_taps.close()
    return history


def main(epochs: int = 4, images: int | None = None) -> tuple[float, list[float]]:
    """The student's top-1 accuracy in percent, and the attention loss of each epoch."""
    torch.manual_seed(0)
    digits = data.load("digits").subset(images)
    train_loader, test_loader = digits.loaders(batch_size=32)
    teacher = models.teacher_resnet20(num_classes=10, in_channels=1, width=0.5)
    train_teacher(teacher, train_loader, epochs)
    student = accelerate(spiking_net(num_classes=10))
    encoder = DirectEncoder(T=4)
    history = distil(student, teacher, encoder, train_loader, epochs)
    top1 = evaluate(student, test_loader, encoder)["top1"]
    print(f"teacher {evaluate(teacher, test_loader)['top1']:.2f} %, student {top1:.2f} %")
    return top1, history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
