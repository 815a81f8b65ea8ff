"""Image data sets as students and teachers see them: pixels in [-1, 1], labels, and what describes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from .archives import read_npz

# Per channel, of pixels in [0, 1]; the published values of the training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)),
}
NAMES = ("digits", *STATISTICS)
_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Images(Dataset):
    """Images held in memory.

    Args:
        images: ``[n, H, W, C]``, uint8.
        labels: ``[n]``, whole numbers.
        transform: from an image ``[C, H, W]`` (uint8) to what a network takes.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: Callable[[Tensor], Tensor]) -> None:
        self.images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
        self.labels = torch.from_numpy(np.asarray(labels).astype(np.int64))
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


@dataclass(frozen=True)
class ImageData:
    """A data set's training and test images, and what networks for it have to know.

    Attributes:
        name: of the data set.
        train, test: give ``(image [C, H, W] in [-1, 1], label)``; ``train`` is augmented.
        num_classes, in_channels, image_size: ``K``, ``C`` and the side of the square images.
        mean, std: per channel, of pixels in [0, 1], for a teacher's own normalisation.
    """

    name: str
    train: Dataset
    test: Dataset
    num_classes: int
    in_channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def loaders(self, batch_size: int, workers: int = 0, seed: int = 0) -> tuple[DataLoader, DataLoader]:
        """Shuffled training batches and test batches; ``seed`` fixes the order of the former."""
        shared = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        generator = torch.Generator().manual_seed(seed)
        train = DataLoader(self.train, batch_size, shuffle=True, generator=generator, **shared)
        return train, DataLoader(self.test, max(batch_size, 100), **shared)

    def subset(self, train: int | None = None, test: int | None = None) -> ImageData:
        """The first ``train`` training and ``test`` test images (all of them for ``None``)."""
        parts = {}
        for role, count in (("train", train), ("test", test)):
            images = getattr(self, role)
            if count is None:
                continue
            if not 1 <= count <= len(images):
                raise ValueError(
                    f"{role} must be from 1 to the {len(images)} {role} images of {self.name}, got {count}"
                )
            parts[role] = torch.utils.data.Subset(images, range(count))
        return replace(self, **parts)

    def first_classes(self, count: int, per_class: int | None = None) -> ImageData:
        """Only the first ``count`` classes, each with its first ``per_class`` training images (or all)."""
        if not 2 <= count <= self.num_classes:
            raise ValueError(
                f"count must be from 2 to the {self.num_classes} classes of {self.name}, got {count}"
            )
        if per_class is not None and per_class < 1:
            raise ValueError(f"per_class must be at least 1 image, got {per_class}")
        parts = {}
        for role, most in (("train", per_class), ("test", None)):
            labels = getattr(getattr(self, role), "labels", None)
            if labels is None:
                raise ValueError(
                    f"first_classes needs whole data held in memory, {self.name}'s {role} is not"
                )
            chosen = [torch.nonzero(labels == label).flatten()[:most] for label in range(count)]
            parts[role] = torch.utils.data.Subset(getattr(self, role), torch.cat(chosen).tolist())
        return replace(self, num_classes=count, **parts)


def load(
    source: str | Path, root: str | Path = "data", augment: bool = True, download: bool = True
) -> ImageData:
    """Load a data set by name or file.

    Args:
        source: ``"digits"`` (scikit-learn's 8x8 digits, part of the installation), ``"cifar10"``,
            ``"cifar100"``, ``"tiny-imagenet"``, or the path of an ``.npz`` file with the arrays
            ``x_train, y_train, x_test, y_test`` (uint8 images ``[n, H, W]`` or ``[n, H, W, C]``).
        root: folder of the data sets that have names.
        augment: random crops and flips on the training images (never on digits).
        download: let torchvision download CIFAR when it is not under ``root``.

    Raises:
        ValueError: an unknown name, a file without the arrays, or a folder that is not whole.
        FileNotFoundError: the file or folder is not there.
    """
    if source == "digits":
        return _digits()
    if source in ("cifar10", "cifar100"):
        return _cifar(str(source), Path(root), augment, download)
    if source == "tiny-imagenet":
        return _tiny_imagenet(Path(root) / "tiny-imagenet-200", augment)
    if Path(source).suffix == ".npz":
        return _npz(Path(source), augment)
    raise ValueError(
        f"source must be one of {', '.join(NAMES)} or a file that ends in .npz, got {str(source)!r}"
    )


def transforms(image_size: int, augment: bool) -> v2.Transform:
    """uint8 images to [-1, 1], with the augmentation usual for CIFAR: pad by an eighth, crop, flip."""
    crop = [v2.RandomCrop(image_size, padding=image_size // 8), v2.RandomHorizontalFlip()]
    signed = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5], [0.5])]
    return v2.Compose([*(crop if augment else []), *signed])


def _digits() -> ImageData:
    from sklearn.datasets import load_digits  # slow to import, needed only here

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
    order = np.random.RandomState(0).permutation(len(images))
    test, train = order[:360], order[360:]
    arrays = (images[train], digits.target[train], images[test], digits.target[test])
    return _from_arrays("digits", arrays, augment=False)


def _cifar(name: str, root: Path, augment: bool, download: bool) -> ImageData:
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    try:
        train, test = (kind(str(root), train=is_train, download=download) for is_train in (True, False))
    except Exception as error:  # torchvision raises several kinds: no network, damaged archive, not there
        raise FileNotFoundError(
            f"{name} could not be read from {root} ({type(error).__name__}: {error}); with a network it is "
            f"downloaded there, without one put torchvision's archive there or give an .npz file"
        ) from error
    arrays = (train.data, np.array(train.targets), test.data, np.array(test.targets))
    return _from_arrays(name, arrays, augment, STATISTICS[name])


def _npz(path: Path, augment: bool) -> ImageData:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; it must hold the arrays {', '.join(_KEYS)}")
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
        arrays[role], arrays[role + 1] = images, labels
    if arrays[0].shape[1:] != arrays[2].shape[1:]:
        raise ValueError(
            f"{path}: x_train and x_test must hold images of one shape [H, H, C], got "
            f"{arrays[0].shape[1:]} and {arrays[2].shape[1:]}"
        )
    return _from_arrays(path.stem, arrays, augment, STATISTICS.get(path.stem))


def _from_arrays(
    name: str,
    arrays: Sequence[np.ndarray],
    augment: bool,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
) -> ImageData:
    x_train, y_train, x_test, y_test = arrays
    size = x_train.shape[1]
    if statistics is None:
        flat = x_train.reshape(-1, x_train.shape[-1]) / 255
        statistics = tuple(flat.mean(0).tolist()), tuple(np.maximum(flat.std(0), 1e-3).tolist())
    return ImageData(
        name=name,
        train=Images(x_train, y_train, transforms(size, augment)),
        test=Images(x_test, y_test, transforms(size, False)),
        num_classes=int(max(y_train.max(), y_test.max())) + 1,
        in_channels=x_train.shape[-1],
        image_size=size,
        mean=statistics[0],
        std=statistics[1],
    )


class _ImageFiles(Dataset):
    def __init__(self, files: list[tuple[Path, int]], transform: Callable[[Tensor], Tensor]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        try:
            image = torchvision.io.decode_image(str(path), torchvision.io.ImageReadMode.RGB)
        except RuntimeError as error:
            raise RuntimeError(f"{path} cannot be read as an image ({error})") from error
        return self.transform(image), label


def _tiny_imagenet(folder: Path, augment: bool) -> ImageData:
    """The archive's own layout: ``train/ID/images/*.JPEG``, ``val/images``, ``val/val_annotations.txt``."""
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
    mean, std = STATISTICS["tiny-imagenet"]
    return ImageData(
        name="tiny-imagenet",
        train=_ImageFiles(train, transforms(64, augment)),
        test=_ImageFiles(test, transforms(64, False)),
        num_classes=len(classes),
        in_channels=3,
        image_size=64,
        mean=mean,
        std=std,
    )
