"""Others' networks and images: a timm teacher, a student of SpikingJelly's models, torchvision's transforms.

    pip install timm          # or: pip install '.[teachers]'
    python examples/model_zoos.py --teacher test_resnet

Any convolutional network that timm knows can be the teacher; with ``--pretrained`` its published weights are
where training starts. The student is SpikingJelly's ``MNISTNet`` as its zoo builds it. The images are
scikit-learn's digits, enlarged and augmented by ``torchvision.transforms.v2``.
"""

import argparse
import logging

import timm
import torch
from sklearn.datasets import load_digits
from spikingjelly.activation_based import functional, neuron, surrogate
from spikingjelly.activation_based.model import parametric_lif_net
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms import v2

from lasnn_sj import DirectEncoder, LaSNNTrainer
from lasnn_sj.training.evaluation import evaluate

AUGMENT = v2.Compose([
    v2.RandomAffine(degrees=10, translate=(0.1, 0.1), fill=-1.0),
    v2.RandomErasing(p=0.2, value=-1.0),
])  # fmt: skip


def loaders(images: int | None) -> tuple[DataLoader, DataLoader]:
    """Training and test batches of 28x28 images in [-1, 1], the training images augmented batch by batch."""
    digits = load_digits()
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1)
    prepare = v2.Compose([v2.Normalize([8.0], [8.0]), v2.Resize(28, antialias=True)])
    data, labels = prepare(pixels), torch.from_numpy(digits.target)
    test = slice(-360, None)
    train = slice(0, len(data) - 360 if images is None else images)

    def augmented(samples: list) -> tuple[torch.Tensor, torch.Tensor]:
        batch, targets = torch.utils.data.default_collate(samples)
        return AUGMENT(batch), targets

    generator = torch.Generator().manual_seed(0)
    return (
        DataLoader(
            TensorDataset(data[train], labels[train]), 32, shuffle=True, collate_fn=augmented,
            generator=generator,
        ),
        DataLoader(TensorDataset(data[test], labels[test]), 120),
    )  # fmt: skip


def main(
    teacher_name: str = "test_resnet", pretrained: bool = False, epochs: int = 3, images: int | None = None
) -> tuple[float, float]:
    """Top-1 accuracy of teacher and student in percent."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.manual_seed(0)
    train_loader, test_loader = loaders(images)

    teacher = timm.create_model(teacher_name, pretrained=pretrained, num_classes=10, in_chans=1)
    adam = torch.optim.Adam(teacher.parameters(), lr=2e-3)
    LaSNNTrainer(teacher, optimizer=adam).fit(train_loader, epochs=2 * epochs)

    student = parametric_lif_net.MNISTNet(
        channels=16, spiking_neuron=neuron.IFNode, surrogate_function=surrogate.ATan(), detach_reset=True
    )
    functional.set_step_mode(student, "m")
    trainer = LaSNNTrainer(
        student,
        teacher.eval(),
        encoder=DirectEncoder(T=4),
        optimizer=torch.optim.Adam(student.parameters(), lr=2e-3),
    )
    trainer.fit(train_loader, epochs=epochs)
    result = evaluate(teacher, test_loader)["top1"], trainer.evaluate(test_loader)["top1"]
    print(f"teacher {teacher_name} {result[0]:.2f} %, student {result[1]:.2f} %")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="test_resnet", help="a name of timm.list_models()")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's published weights")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    main(options.teacher, options.pretrained, options.epochs)
