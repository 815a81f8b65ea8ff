"""The papers' plain convolutional networks, as intermediate ANN or as SNN (LaSNN, Section III-A)."""

from __future__ import annotations

from torch import Tensor, nn

from .layers import Form, Unit, check_input, pooled_size, scaled

PLANS: dict[str, tuple[tuple[int | str, ...], tuple[int, ...]]] = {
    "conv3_linear2": ((64, "A", 128, "A", 128, "A"), (256,)),
    "vgg5": ((64, "A", 128, 128, "A"), (4096, 4096)),
    "vgg7": ((64, "A", 128, 256, "A", 256, 512, "A"), (4096, 4096)),
    "vgg9": ((64, "A", 128, 256, "A", 256, 512, "A", 512, "A", 512), (4096, 4096)),
    "vgg16": (
        (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512),
        (4096, 4096),
    ),
}


class VGG(nn.Module):
    """Convolutions 3x3, average pools, a linear classifier; no bias and no batch norm.

    Dropout follows every hidden layer except the one before a pool. With ``spiking=True`` each
    hidden layer ends in LIF neurons and the output integrates its input over time (Eq. 1-3).

    Args:
        convolutions: output channels, and ``"A"`` for a 2x2 average pool.
        hidden: sizes of the classifier's hidden layers.
        num_classes: ``K``.
        in_channels: ``C`` of the images.
        image_size: side of the square images.
        width: factor of all hidden channels and sizes.
        spiking: SNN or ANN; both have the same weights under the same names.
        leak: leak of the LIF neurons.
        dropout: dropout probability.

    Shape:
        - ANN: ``[N, C, H, W]`` to logits ``[N, K]``
        - SNN: ``[T, N, C, H, W]`` to output potentials ``[T, N, K]``; the scores are the last
    """

    def __init__(
        self,
        convolutions: tuple[int | str, ...],
        hidden: tuple[int, ...],
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        width: float = 1.0,
        spiking: bool = True,
        leak: float = 0.99,
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        form = Form(spiking, leak, dropout)
        extra, side = pooled_size(image_size, convolutions.count("A"))
        plan = [*convolutions, *["A"] * extra]
        features: list[nn.Module] = []
        channels, full = in_channels, in_channels
        for item, after in zip(plan, [*plan[1:], None]):
            if item == "A":
                features.append(form.pool())
            else:
                wide = scaled(item, width)
                features.append(Unit(form.conv(channels, wide), form.neuron(), form.dropout(after != "A")))
                channels, full = wide, item
        self.features = nn.Sequential(*features)
        self.flatten = form.flatten()
        units, size, full = [], channels * side * side, full * (32 >> convolutions.count("A")) ** 2
        for item in hidden:
            wide = scaled(item, width)
            units.append(Unit(form.linear(size, wide, full), form.neuron(), form.dropout()))
            size, full = wide, item
        self.classifier = nn.Sequential(*units)
        self.output = form.linear(size, num_classes, full)
        self.readout = form.readout()

    def forward(self, x: Tensor) -> Tensor:
        """Images to logits, or encoded images to potentials."""
        check_input(x, not isinstance(self.readout, nn.Identity))
        return self.readout(self.output(self.classifier(self.flatten(self.features(x)))))


def _build(
    name: str, num_classes: int, in_channels: int, image_size: int, width: float, spiking: bool,
    leak: float, dropout: float,
) -> VGG:  # fmt: skip
    return VGG(*PLANS[name], num_classes, in_channels, image_size, width, spiking, leak, dropout)


def conv3_linear2(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> VGG:  # fmt: skip
    """3Conv2Linear of LaSNN's tables (sizes ours); arguments as for :class:`VGG`."""
    return _build("conv3_linear2", num_classes, in_channels, image_size, width, spiking, leak, dropout)


def vgg5(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> VGG:  # fmt: skip
    """VGG5 of Rathi et al.; arguments as for :class:`VGG`."""
    return _build("vgg5", num_classes, in_channels, image_size, width, spiking, leak, dropout)


def vgg7(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> VGG:  # fmt: skip
    """VGG7 of LaSNN's CIFAR-100 rows (sizes ours); arguments as for :class:`VGG`."""
    return _build("vgg7", num_classes, in_channels, image_size, width, spiking, leak, dropout)


def vgg9(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> VGG:  # fmt: skip
    """VGG9 of Rathi et al.; arguments as for :class:`VGG`."""
    return _build("vgg9", num_classes, in_channels, image_size, width, spiking, leak, dropout)


def vgg16(
    num_classes: int, in_channels: int = 3, image_size: int = 32, width: float = 1.0,
    spiking: bool = True, leak: float = 0.99, dropout: float = 0.2,
) -> VGG:  # fmt: skip
    """VGG16 of Rathi et al., without bias and batch norm; arguments as for :class:`VGG`."""
    return _build("vgg16", num_classes, in_channels, image_size, width, spiking, leak, dropout)
