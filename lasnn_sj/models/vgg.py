"""The papers' plain convolutional networks, as intermediate ANN or as SNN (LaSNN, Section III-A)."""

from __future__ import annotations

from torch import Tensor, nn

from ..neurons import Sequential
from .layers import LayerFactory, check_input, pooled_size, scaled
from .registry import student_builder


class VGG(nn.Module):
    """3x3 convolutions, average pools and a linear classifier, without bias and batch norm.

    Dropout follows every hidden layer except the one before a pool. With ``spiking=True`` every hidden
    layer ends in LIF neurons and the output integrates its input over time (Eq. 1-3). A fresh SNN fires in
    every layer, see :class:`~lasnn_sj.models.layers.LayerFactory`.

    Args:
        convolutions: output channels of each convolution, and ``"A"`` for a 2x2 average pool.
        hidden: sizes of the classifier's hidden layers.
        num_classes: number of classes ``K``.
        in_channels: channels ``C`` of the images.
        image_size: side of the square images in pixels.
        width: factor of all hidden channels and sizes.
        spiking: build the SNN if true, else the ANN; both have the same weights under the same names.
        leak: leak of the LIF neurons.
        dropout: dropout probability.

    Shape:
        - ANN: ``[N, C, H, W]`` to logits ``[N, K]``
        - SNN: ``[T, N, C, H, W]`` to output potentials ``[T, N, K]``; the last are the class scores

    Raises:
        ValueError: an image size, width or dropout probability that cannot be used.
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
        factory = LayerFactory(spiking, leak, dropout)
        extra, side = pooled_size(image_size, convolutions.count("A"))
        plan = [*convolutions, *["A"] * extra]
        features: list[nn.Module] = []
        channels, full = in_channels, in_channels
        for item, after in zip(plan, [*plan[1:], None]):
            if item == "A":
                features.append(factory.pool())
            else:
                wide = scaled(item, width)
                features.append(factory.conv_unit(channels, wide, dropout=after != "A"))
                channels, full = wide, item
        self.features = Sequential(*features)
        self.flatten = factory.flatten()
        units, size, full = [], channels * side * side, full * (32 >> convolutions.count("A")) ** 2
        for item in hidden:
            wide = scaled(item, width)
            units.append(factory.linear_unit(size, wide, full))
            size, full = wide, item
        self.classifier = nn.Sequential(*units)
        self.output = factory.linear(size, num_classes, full)
        self.readout = factory.readout()

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits (ANN), or encoded images to potentials (SNN)."""
        check_input(x, not isinstance(self.readout, nn.Identity))
        return self.readout(self.output(self.classifier(self.flatten(self.features(x)))))


conv3_linear2 = student_builder(
    "conv3_linear2",
    VGG,
    (64, "A", 128, "A", 128, "A"),
    (256,),
    doc="3Conv2Linear of LaSNN's tables (sizes ours).",
)
vgg5 = student_builder("vgg5", VGG, (64, "A", 128, 128, "A"), (4096, 4096), doc="VGG5 of Rathi et al.")
vgg7 = student_builder(
    "vgg7", VGG, (64, "A", 128, 256, "A", 256, 512, "A"), (4096, 4096),
    doc="VGG7 of LaSNN's CIFAR-100 rows (sizes ours).",
)  # fmt: skip
vgg9 = student_builder(
    "vgg9", VGG, (64, "A", 128, 256, "A", 256, 512, "A", 512, "A", 512), (4096, 4096),
    doc="VGG9 of Rathi et al.",
)  # fmt: skip
vgg16 = student_builder(
    "vgg16", VGG,
    (64, 64, "A", 128, 128, "A", 256, 256, 256, "A", 512, 512, 512, "A", 512, 512, 512), (4096, 4096),
    doc="LaSNN's VGG16, after Rathi et al.: no bias, no batch norm, average pools, LIF neurons. "
    "Not :func:`spiking_vgg16` (batch norm, IF neurons) and not the ANN :func:`teacher_vgg16`.",
)  # fmt: skip
