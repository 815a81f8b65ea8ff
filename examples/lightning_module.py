"""LaSNN's loss in a Lightning module: only taps, attention maps and objectives, no trainer of ours.

    pip install lightning     # or: pip install '.[lightning]'
    python examples/lightning_module.py

Lightning brings its own loop, devices, precision and checkpoints. The student is that of your_own_model.py
beside this file; the images are 8x8 digits, which come with scikit-learn.
"""

import argparse

import lightning
import torch
import torch.nn.functional as F
from spikingjelly.activation_based import functional
from torch import Tensor, nn
from your_own_model import spiking_net

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.data import images as data
from lasnn_sj.distillation import StudentTaps, TeacherTaps, activation_map, attention_loss, choose_pairs
from lasnn_sj.neurons import accelerate


class Distillation(lightning.LightningModule):
    """A student that learns from labels and from a trained teacher's attention (Eq. 7-8).

    Args:
        student: spiking network, ``[T, N, ...]`` to ``[T, N, K]``.
        teacher: trained network, images to logits.
        encoder: gives images their time axis.
        example: a few images, by which the compared layers are chosen.
        alpha: weight of the attention loss.
    """

    def __init__(
        self, student: nn.Module, teacher: nn.Module, encoder: nn.Module, example: Tensor, alpha: float = 0.9
    ) -> None:
        super().__init__()
        self.student, self.teacher, self.encoder, self.alpha = student, teacher, encoder, alpha
        teacher.eval().requires_grad_(False)
        self.pairs = choose_pairs(student, teacher, encoder(example), example)
        self.student_taps = StudentTaps(student, [(pair.student, "firing_rate") for pair in self.pairs])
        self.teacher_taps = TeacherTaps(teacher, [pair.teacher for pair in self.pairs])

    def train(self, mode: bool = True) -> "Distillation":
        """Lightning switches the whole module; the teacher's batch norms stay as they are."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Class scores ``[N, K]``."""
        functional.reset_net(self.student)  # here, as Lightning's backward still wants the last state
        return self.student(self.encoder(images)).mean(0)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, labels = batch
        with self.student_taps:
            scores = self(images)
        with self.teacher_taps, torch.no_grad():
            self.teacher(images)
        student_maps = [activation_map(rate, power=1) for rate in self.student_taps.collect()]
        activations = self.teacher_taps.collect()
        teacher_maps = [activation_map(activations[pair.teacher], size=pair.size) for pair in self.pairs]
        parts = {
            "ce": F.cross_entropy(scores, labels),
            "attention": self.alpha / 2 * attention_loss(teacher_maps, student_maps),
        }
        self.log_dict(parts, on_step=False, on_epoch=True, prog_bar=True)
        return sum(parts.values())

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        images, labels = batch
        self.log("top1", 100 * (self(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=2e-3)


def main(epochs: int = 4, images: int | None = None) -> dict[str, float]:
    """Return the last values that Lightning logged, ``top1`` in percent among them."""
    torch.manual_seed(0)
    digits = data.load("digits").subset(images)
    train_loader, test_loader = digits.loaders(batch_size=32)
    teacher = models.teacher_resnet20(num_classes=10, in_channels=1, width=0.5)
    adam = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    LaSNNTrainer(teacher, optimizer=adam).fit(train_loader, epochs=epochs)
    student = accelerate(spiking_net(num_classes=10))
    module = Distillation(student, teacher, DirectEncoder(T=4), next(iter(test_loader))[0][:2])
    trainer = lightning.Trainer(
        max_epochs=epochs, accelerator="auto", devices=1, logger=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, train_loader, test_loader)
    logged = {name: value.item() for name, value in trainer.callback_metrics.items()}
    print("  ".join(f"{name} {value:.3f}" for name, value in logged.items()))
    return logged


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=4)
    main(parser.parse_args().epochs)
