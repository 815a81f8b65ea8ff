"""Image data sets with pixels in [-1, 1] and their descriptions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.transforms import v2

from .archives import read_npz

# Per channel, of pixels in [0, 1]; the published values of the training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
CLASSES = {
    "digits": tuple("0123456789"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}
MOST_CLASSES = 100_000  # of files with fewer images; a wrong label must not create gigabytes of weights
_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Images(Dataset):
    """Images held in memory.

    Args:
        images: ``[n, H, W, C]``, uint8.
        labels: ``[n]``, whole numbers.
        transform: from an image ``[C, H, W]`` (uint8) to what a network takes.
        classes: names by label, where they are known.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        transform: Callable[[Tensor], Tensor],
        classes: Sequence[str] | None = None,
    ) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(np.asarray(labels).astype(np.int64))
        self.transform = transform
        self.classes = None if classes is None else tuple(classes)

    def __repr__(self) -> str:
        return f"Images({len(self)} of {list(self.images.shape[1:])})"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


class Loaders:
    """Loaders of a data set with the parts ``train``, ``test`` and optionally ``validation``."""

    collate: ClassVar[Callable | None] = None
    least_evaluated: ClassVar[int] = 100  # samples of an evaluation batch; small ones waste time

    def __repr__(self) -> str:
        held = "" if self.validation is None else f"{len(self.validation)} validation, "
        return (
            f"{type(self).__name__}({self.name!r}, {len(self.train)} training, {held}{len(self.test)} test "
            f"samples {[self.in_channels, self.image_size, self.image_size]}, {self.num_classes} classes)"
        )

    def loaders(self, batch_size: int, workers: int = 0, seed: int = 0) -> tuple[DataLoader, DataLoader]:
        """Return loaders of shuffled training batches, and of validation batches (else of test batches).

        ``seed`` fixes the order of the training samples.
        """
        generator = torch.Generator().manual_seed(seed)
        train = self._loader(self.train, batch_size, workers, shuffle=True, generator=generator)
        held = self.test if self.validation is None else self.validation
        return train, self._loader(held, max(batch_size, self.least_evaluated), workers)

    def test_loader(self, batch_size: int, workers: int = 0) -> DataLoader:
        """Return the loader of the test batches, in order."""
        return self._loader(self.test, max(batch_size, self.least_evaluated), workers)

    def split(self, held_out: int, seed: int = 0) -> Self:
        """Hold out training samples for validation; see :func:`stratified_split`.

        The samples held out leave ``train`` and are not augmented.

        Args:
            held_out: number of validation samples.
            seed: which samples are drawn.

        Raises:
            ValueError: there is a validation part already, the data set has no ``labels``, or a part would
                have no sample of some class.
        """
        if self.validation is not None:
            raise ValueError(
                f"{self.name} is split already, into {len(self.train)} training and {len(self.validation)} "
                f"validation samples"
            )
        train, held = stratified_split(labels_of(self.train), held_out, seed)
        return self._split(train.tolist(), held.tolist())

    def _loader(self, part: Dataset, batch_size: int, workers: int, **order: object) -> DataLoader:
        pin, collate = torch.cuda.is_available(), type(self).collate
        return DataLoader(part, batch_size, num_workers=workers, pin_memory=pin, collate_fn=collate, **order)


@dataclass(frozen=True, repr=False)
class ImageData(Loaders):
    """Training, validation and test images of a data set, and its description.

    Attributes:
        name: of the data set.
        train, test: give ``(image [C, H, W] in [-1, 1], label)``; ``train`` is augmented.
        num_classes, in_channels, image_size: ``K``, ``C`` and the side of the square images.
        mean, std: per channel, of pixels in [0, 1], for a teacher's own normalisation.
        validation: training images that :meth:`~Loaders.split` held out, not augmented; ``None`` before.
    """

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    validation: Dataset | None = None

    def _split(self, train: list[int], held: list[int]) -> ImageData:
        plain = _with_transform(self.train, _transform(self.test))
        return replace(self, train=Subset(self.train, train), validation=Subset(plain, held))

    def subset(
        self, train: int | None = None, test: int | None = None, validation: int | None = None
    ) -> ImageData:
        """Keep the first ``train``, ``test`` and ``validation`` images (all of them for ``None``)."""
        parts = {}
        for role, count in (("train", train), ("test", test), ("validation", validation)):
            images = getattr(self, role)
            if count is None:
                continue
            if images is None:
                raise ValueError(f"{self.name} has no validation images; hold some out by split(held_out)")
            if not 1 <= count <= len(images):
                raise ValueError(
                    f"{role} must be from 1 to the {len(images)} {role} images of {self.name}, got {count}"
                )
            parts[role] = Subset(images, range(count))
        return replace(self, **parts)

    def first_classes(self, count: int, per_class: int | None = None) -> ImageData:
        """Keep the first ``count`` classes, each with its first ``per_class`` training images (or all)."""
        if not 2 <= count <= self.num_classes:
            raise ValueError(
                f"count must be from 2 to the {self.num_classes} classes of {self.name}, got {count}"
            )
        if per_class is not None and per_class < 1:
            raise ValueError(f"per_class must be at least 1 image, got {per_class}")
        parts = {}
        for role, most in (("train", per_class), ("test", None), ("validation", None)):
            images = getattr(self, role)
            if images is not None:
                labels = labels_of(images)
                chosen = [torch.nonzero(labels == label).flatten()[:most] for label in range(count)]
                parts[role] = Subset(images, torch.cat(chosen).tolist())
        return replace(self, num_classes=count, **parts)


def labels_of(dataset: Dataset) -> Tensor:
    """Return the labels ``[n]`` of a data set with ``labels``, or of a ``Subset`` of one.

    Raises:
        ValueError: the data set has no ``labels``.
    """
    if isinstance(dataset, Subset):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    labels = getattr(dataset, "labels", None)
    if labels is None:
        raise ValueError(f"{type(dataset).__name__} has no labels; give it an attribute `labels` [n]")
    return torch.as_tensor(labels)


def _transform(dataset: Dataset) -> Callable[[Tensor], Tensor]:
    return _transform(dataset.dataset) if isinstance(dataset, Subset) else dataset.transform


def _with_transform(dataset: Dataset, transform: Callable[[Tensor], Tensor]) -> Dataset:
    """Copy a data set with the same images and another transform."""
    changed = copy.copy(dataset)
    if isinstance(dataset, Subset):
        changed.dataset = _with_transform(dataset.dataset, transform)
    else:
        changed.transform = transform
    return changed


def stratified_split(labels: Tensor, held_out: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Split sample indices so that each class keeps its share in both parts.

    Args:
        labels: ``[n]``, whole numbers.
        held_out: number of samples of the second part.
        seed: which samples are drawn.

    Returns:
        Indices of the first part and of the held-out part, int64, each in ascending order.

    Raises:
        ValueError: a part would have no sample of some class.
    """
    labels = torch.as_tensor(labels)
    n = len(labels)
    classes, counts = labels.unique(return_counts=True)
    if not len(classes) <= held_out <= n - len(classes):
        raise ValueError(
            f"held_out must be from {len(classes)} to {n - len(classes)}, one sample of each of the "
            f"{len(classes)} classes in both parts, got {held_out} of {n} samples"
        )
    exact = counts.double() * held_out / n
    share = exact.floor().long()
    # Largest remainders get the samples that rounding down has left.
    rest = held_out - int(share.sum())
    share[(exact - share).argsort(descending=True, stable=True)[:rest]] += 1
    if bool((share < 1).any()) or bool((share >= counts).any()):
        bad = classes[(share < 1) | (share >= counts)].tolist()
        raise ValueError(
            f"held_out = {held_out} of {n} samples leaves one part without any sample of class {bad[0]} "
            f"(classes concerned: {bad[:8]}); hold out another number, or leave out rare classes"
        )
    generator = torch.Generator().manual_seed(seed)
    held = torch.zeros(n, dtype=torch.bool)
    for label, count in zip(classes, share.tolist()):
        members = torch.nonzero(labels == label).flatten()
        held[members[torch.randperm(len(members), generator=generator)[:count]]] = True
    return torch.nonzero(~held).flatten(), torch.nonzero(held).flatten()


def load(
    source: str | Path,
    root: str | Path = "data",
    augment: bool = True,
    download: bool = True,
    shrink: int = 1,
) -> ImageData:
    """Load a data set by name or file.

    Args:
        source: ``"digits"`` (scikit-learn's 8x8 digits, part of the installation), ``"cifar10"``,
            ``"cifar100"``, ``"tiny-imagenet"``, or the path of an ``.npz`` file with the arrays
            ``x_train, y_train, x_test, y_test`` (uint8 images ``[n, H, W]`` or ``[n, H, W, C]``).
        root: folder of the data sets that have names.
        augment: random crops and flips on the training images (never on digits).
        download: let torchvision download CIFAR when it is not under ``root``.
        shrink: replace each square of ``shrink x shrink`` pixels by its mean, before any augmentation; 1
            leaves images as they are.

    Raises:
        ValueError: an unknown name, a file without the arrays, a folder that is not whole, or a ``shrink``
            that does not divide the side of the images.
        FileNotFoundError: the file or folder does not exist.
    """
    if source in _LOADERS:
        return _LOADERS[source](str(source), Path(root), augment, download, shrink)
    if Path(source).suffix == ".npz":
        return _npz(Path(source), augment, shrink)
    raise ValueError(
        f"source must be one of {', '.join(_LOADERS)} or a file that ends in .npz, got {str(source)!r}"
    )


def transforms(image_size: int, augment: bool) -> v2.Transform:
    """Transform uint8 images to [-1, 1]; augment as usual for CIFAR: pad by an eighth, crop, flip."""
    crop = [v2.RandomCrop(image_size, padding=image_size // 8), v2.RandomHorizontalFlip()]
    signed = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    return v2.Compose([*(crop if augment else []), *signed])


@dataclass(frozen=True)
class _Shrink:
    """Replace each square of uint8 pixels ``[..., H, W]`` by its mean, rounded."""

    factor: int

    def __call__(self, images: Tensor) -> Tensor:
        return F.avg_pool2d(images.float(), self.factor).round().to(torch.uint8)


def _shrunk_size(size: int, factor: int) -> int:
    if factor < 1 or size % factor:
        raise ValueError(f"shrink must divide the side of the images, {size} pixels, got {factor}")
    return size // factor


def _digits(name: str, root: Path, augment: bool, download: bool, shrink: int) -> ImageData:
    from sklearn.datasets import load_digits  # slow to import, needed only here

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.RandomState(0).permutation(len(images))
    test, train = order[:360], order[360:]
    arrays = (images[train], digits.target[train], images[test], digits.target[test])
    return _from_arrays(name, arrays, False, shrink)


def _cifar(name: str, root: Path, augment: bool, download: bool, shrink: int) -> ImageData:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = (kind(str(root), train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises exceptions of several types
        raise FileNotFoundError(
            f"{name} could not be read from {root} ({type(error).__name__}: {error}); with a network it is "
            f"downloaded there, without one put torchvision's archive there or give an .npz file"
        ) from error
    arrays = (train.data, np.array(train.targets), test.data, np.array(test.targets))
    return _from_arrays(name, arrays, augment, shrink, STATISTICS[name], train.classes)


def _npz(path: Path, augment: bool, shrink: int) -> ImageData:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; it must hold the arrays {', '.join(_KEYS)}")
    try:
        by_name, found = read_npz(path, _KEYS)
    except OSError as error:
        raise ValueError(f"{path} cannot be read as an .npz file ({error})") from error
    arrays = list(by_name.values())
    if len(arrays) < len(_KEYS):
        missing = [key for key in _KEYS if key not in found]
        raise ValueError(f"{path} lacks the arrays {', '.join(missing)}; it has {', '.join(found)}")
    for role in (0, 2):
        images, labels = arrays[role], arrays[role + 1]
        if images.ndim == 3:
            images = images[..., None]
        square = images.ndim == 4 and images.shape[1] == images.shape[2]
        if images.dtype != np.uint8 or not square or not images.size:
            raise ValueError(
                f"{path}: {_KEYS[role]} must be uint8 square images [n, H, H] or [n, H, H, C], at least one, "
                f"got {images.dtype} {arrays[role].shape}"
            )
        labels = labels.reshape(-1)
        if len(labels) != len(images) or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
            raise ValueError(
                f"{path}: {_KEYS[role + 1]} must be {len(images)} whole numbers from 0 on, got "
                f"{labels.dtype} {arrays[role + 1].shape}"
            )
        if labels.max() >= max(MOST_CLASSES, len(labels)):
            raise ValueError(
                f"{path}: {_KEYS[role + 1]} has the label {labels.max()}, which would make "
                f"{int(labels.max()) + 1} classes of {len(labels)} images; labels are numbered from 0 on"
            )
        arrays[role], arrays[role + 1] = images, labels
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(
            f"{path}: x_train and x_test must hold images of one shape [H, H, C], got "
            f"{arrays[0].shape[1:]} and {arrays[2].shape[1:]}"
        )
    return _from_arrays(path.stem, arrays, augment, shrink, STATISTICS.get(path.stem))


def _from_arrays(
    name: str,
    arrays: Sequence[np.ndarray],
    augment: bool,
    shrink: int = 1,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    classes: Sequence[str] | None = None,
) -> ImageData:
    x_train, y_train, x_test, y_test = arrays
    size = _shrunk_size(x_train.shape[1], shrink)
    if statistics is None:
        flat = x_train.reshape(-1, x_train.shape[-1]) / 255
        statistics = tuple(flat.mean(0).tolist()), tuple(np.maximum(flat.std(0), 1e-3).tolist())
    classes = classes or CLASSES.get(name)
    train = Images(x_train, y_train, transforms(size, augment), classes)
    test = Images(x_test, y_test, transforms(size, False), classes)
    if shrink > 1:
        for part in (train, test):
            part.images = torch.cat([_Shrink(shrink)(few) for few in part.images.split(1000)])
    return ImageData(
        name=name,
        train=train,
        test=test,
        num_classes=int(max(y_train.max(), y_test.max())) + 1,
        in_channels=x_train.shape[-1],
        image_size=size,
        mean=statistics[0],
        std=statistics[1],
    )


class _ImageFiles(Dataset):
    def __init__(self, files: list[tuple[Path, int]], transform: Callable[[Tensor], Tensor]) -> None:
        self.files, self.transform = files, transform
        self.labels = torch.tensor([label for _, label in files])

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            image = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB)
        except RuntimeError as error:
            raise RuntimeError(f"{path} cannot be read as an image ({error})") from error
        return self.transform(image), label


def _tiny_imagenet(name: str, root: Path, augment: bool, download: bool, shrink: int) -> ImageData:
    """Read the layout of the archive: ``train/ID/images/*.JPEG``, ``val/images``, ``val_annotations.txt``."""
    folder = root / "tiny-imagenet-200"
    if not (folder / "train").is_dir() or not (folder / "val" / "val_annotations.txt").is_file():
        raise FileNotFoundError(
            f"{folder} is not an unpacked tiny-imagenet-200 (it needs train/ and val/val_annotations.txt); "
            f"get tiny-imagenet-200.zip from cs231n.stanford.edu and unpack it there"
        )
    folders = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    classes = {name: i for i, name in enumerate(folders)}
    train, test = [], []
    for wnid, label in classes.items():
        paths = sorted((folder / "train" / wnid).rglob("*.JPEG"))
        if not paths:
            raise ValueError(f"{folder / 'train' / wnid} has no image *.JPEG; unpack the archive again")
        train += [(path, label) for path in paths]
    annotations = folder / "val" / "val_annotations.txt"
    for line in annotations.read_text().splitlines():
        file, _, rest = line.partition("\t")
        wnid = rest.partition("\t")[0]
        if not wnid:
            raise ValueError(f"{annotations}: the line {line!r} must begin with file and class, by tabs")
        if wnid not in classes:
            raise ValueError(
                f"{annotations}: {file} is of the class {wnid!r}, of which {folder / 'train'} has no folder; "
                f"unpack the archive again"
            )
        test.append((folder / "val" / "images" / file, classes[wnid]))
    mean, std = STATISTICS[name]
    size = _shrunk_size(64, shrink)
    first = [_Shrink(shrink)] if shrink > 1 else []
    return ImageData(
        name=name,
        train=_ImageFiles(train, v2.Compose([*first, transforms(size, augment)])),
        test=_ImageFiles(test, v2.Compose([*first, transforms(size, False)])),
        num_classes=len(classes),
        in_channels=3,
        image_size=size,
        mean=mean,
        std=std,
    )


# Data sets by name: functions of (name, root, augment, download, shrink).
_LOADERS: dict[str, Callable[[str, Path, bool, bool, int], ImageData]] = {
    "digits": _digits,
    "cifar10": _cifar,
    "cifar100": _cifar,
    "tiny-imagenet": _tiny_imagenet,
}
