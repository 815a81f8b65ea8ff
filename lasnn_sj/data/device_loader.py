"""Batches of images that stay on a device and are augmented there."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset

from .images import Images, transforms


class DeviceLoader:
    """Batches of images that stay on a device as uint8 and are augmented there.

    A :class:`~torch.utils.data.DataLoader` augments image by image in Python, which takes longer than a
    training step on a GPU. Here a batch takes a few kernels, whatever its size. The augmentation draws from
    the distribution of :func:`~lasnn_sj.data.transforms`: zero-pad by an eighth, crop at random, flip with
    probability 1/2. The trainer saves the state of ``generator``, so a resumed run has the same order and
    augmentation. Processes of a distributed run do not share it out: give each its own part of the data.

    Args:
        dataset: :class:`~lasnn_sj.data.Images`, or a ``Subset`` of one; its own transform is not used.
        batch_size: ``N``.
        device: where the images stay and batches are made. CIFAR-10's training images take 154 MB.
        augment: crop and flip at random.
        shuffle: visit the images in a new random order in each epoch.
        seed: of ``generator``, which draws the order and the augmentation.
        drop_last: leave out the last batch of an epoch where it is smaller than ``batch_size``.

    Attributes:
        generator: random-number generator on ``device``.

    Shape:
        - batches ``(images, labels)``: float32 ``[N, C, H, W]`` in [-1, 1], channels_last if augmented; int64
          ``[N]``

    Raises:
        TypeError: a data set that does not hold its images in memory.
        ValueError: ``batch_size`` below 1, or no image.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        device: torch.device | str,
        *,
        augment: bool = False,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number, at least 1, got {batch_size!r}")
        images, labels = _in_memory(dataset)
        if not len(labels):
            raise ValueError("dataset must hold at least one image, got none")
        self.images, self.labels = images.to(device), labels.to(device)
        self.batch_size, self.augment, self.shuffle = batch_size, augment, shuffle
        self.drop_last = drop_last
        self.generator = torch.Generator(device).manual_seed(seed)
        self._signed = transforms(images.shape[-1], augment=False)

    @classmethod
    def of(
        cls, dataset: Dataset, batch_size: int, device: torch.device, *, shuffle: bool = False, seed: int = 0
    ) -> DeviceLoader | None:
        """Return a loader that augments as the data set's own transform does.

        Returns:
            ``None`` where the images are not in memory, or their transform is not one of
            :func:`~lasnn_sj.data.transforms`.
        """
        source = dataset
        while isinstance(source, Subset):
            source = source.dataset
        if not isinstance(source, Images):
            return None
        for augment in (False, True):
            if repr(source.transform) == repr(transforms(source.images.shape[-1], augment)):
                return cls(dataset, batch_size, device, augment=augment, shuffle=shuffle, seed=seed)
        return None

    def __len__(self) -> int:
        """Return the number of batches of an epoch."""
        whole, rest = divmod(len(self.labels), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        count, device = len(self.labels), self.labels.device
        if self.shuffle:
            order = torch.randperm(count, generator=self.generator, device=device)
        else:
            order = torch.arange(count, device=device)
        for indices in order.split(self.batch_size)[: len(self)]:
            images = self.images[indices]
            if self.augment:
                images = crop_and_flip(images, self.generator)
            yield self._signed(images), self.labels[indices]


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Zero-pad square images by an eighth, crop each at random to its size and flip half of them.

    Args:
        images: ``[N, C, H, H]``, any dtype.
        generator: on the images' device.

    Returns:
        ``[N, C, H, H]``, channels_last.
    """
    count, _, size, _ = images.shape
    pad = size // 8
    device = images.device
    places = torch.arange(size, device=device)
    top, left = torch.randint(2 * pad + 1, (2, count, 1), generator=generator, device=device)
    flip = torch.randint(2, (count, 1), generator=generator, device=device).bool()
    rows = top + places
    columns = left + torch.where(flip, places.flip(0), places)
    image = torch.arange(count, device=device)[:, None, None]
    cropped = F.pad(images, (pad,) * 4)[image, :, rows[:, :, None], columns[:, None, :]]  # [N, H, W, C]
    return cropped.permute(0, 3, 1, 2)


def _in_memory(dataset: Dataset) -> tuple[Tensor, Tensor]:
    if isinstance(dataset, Subset):
        images, labels = _in_memory(dataset.dataset)
        indices = torch.as_tensor(list(dataset.indices), dtype=torch.long)
        return images[indices], labels[indices]
    if not isinstance(dataset, Images):
        raise TypeError(
            f"dataset must hold its images in memory (lasnn_sj.data.Images or a Subset of one), got "
            f"{type(dataset).__name__}; use a DataLoader for it"
        )
    return dataset.images, dataset.labels
