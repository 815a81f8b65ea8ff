"""Batches made on a device: the CPU transforms' distribution, order, resuming, errors."""

import os
import signal

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.utils.data import Subset

from lasnn_sj import LaSNNTrainer
from lasnn_sj.data import DeviceLoader, Images, transforms
from lasnn_sj.data.device_loader import crop_and_flip

SIGNIFICANCE = 1e-6  # probability that a correct loader fails a test with another seed


def dataset(count=10, size=8, channels=3):
    pixels = np.random.RandomState(0).randint(0, 256, (count, size, size, channels)).astype(np.uint8)
    return Images(pixels, np.arange(count) % 4, transforms(size, augment=True))


def every_outcome(image):
    """All crops and flips of ``[C, H, H]`` by torchvision's functions: ``{bytes: number}``."""
    size, pad = image.shape[-1], image.shape[-1] // 8
    padded = torch.nn.functional.pad(image, (pad,) * 4)
    crops = [padded[:, i : i + size, j : j + size] for i in range(2 * pad + 1) for j in range(2 * pad + 1)]
    return {t.contiguous().numpy().tobytes(): k for k, t in enumerate([*crops, *(c.flip(2) for c in crops)])}


def test_crops_and_flips_have_the_distribution_of_the_cpu_transforms():
    """All 18 outcomes of an 8 x 8 image, equally often on both sides, and no other."""
    data = dataset(1)
    image = data.images[0]
    outcomes = every_outcome(image)
    assert len(outcomes) == 18
    draws = 3600
    batch = crop_and_flip(image.expand(draws, -1, -1, -1), torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    one_by_one = [data.transform.transforms[1](data.transform.transforms[0](image)) for _ in range(draws)]
    for side in (batch, one_by_one):
        counts = np.bincount([outcomes[t.contiguous().numpy().tobytes()] for t in side], minlength=18)
        assert chisquare(counts).pvalue > SIGNIFICANCE


def test_images_of_a_batch_are_augmented_independently():
    data = dataset(2)
    tables = [every_outcome(image) for image in data.images]
    batch = crop_and_flip(data.images.repeat(6000, 1, 1, 1), torch.Generator().manual_seed(1))
    seen = [tables[k % 2][t.contiguous().numpy().tobytes()] for k, t in enumerate(batch)]
    pairs = np.bincount([18 * a + b for a, b in zip(seen[::2], seen[1::2])], minlength=18 * 18)
    assert chisquare(pairs).pvalue > SIGNIFICANCE


def test_without_augmentation_batches_equal_the_data_set_to_the_bit():
    data = dataset(10)
    data.transform = transforms(8, augment=False)
    batches = list(DeviceLoader(data, 4, "cpu"))
    assert [len(labels) for _, labels in batches] == [4, 4, 2]
    assert [len(labels) for _, labels in DeviceLoader(data, 4, "cpu", drop_last=True)] == [4, 4]
    assert [len(DeviceLoader(data, n, "cpu", drop_last=drop)) for n in (4, 5) for drop in (False, True)] == [
        3,
        2,
        2,
        2,
    ]
    assert torch.equal(torch.cat([x for x, _ in batches]), torch.stack([data[k][0] for k in range(10)]))
    assert torch.equal(torch.cat([y for _, y in batches]), data.labels)


def test_augmented_values_are_those_of_the_transforms():
    """Normalised after the crop, so that the padding is black: -1."""
    data = dataset(1)
    data.images.fill_(255)
    (images, _), = DeviceLoader(Subset(data, [0] * 50), 50, "cpu", augment=True)  # fmt: skip
    assert images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert set(images.unique().tolist()) == {-1.0, 1.0}


def test_each_epoch_has_each_image_once_in_an_order_of_its_own():
    data = dataset(10)
    data.labels = torch.arange(10)
    loader = DeviceLoader(data, 4, "cpu", shuffle=True, seed=3)
    first, second = (torch.cat([y for _, y in loader]).tolist() for _ in range(2))
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second
    again = DeviceLoader(data, 4, "cpu", shuffle=True, seed=3)
    assert torch.cat([y for _, y in again]).tolist() == first
    assert len(loader) == 3


def test_a_subset_of_a_subset():
    data = dataset(10)
    data.labels = torch.arange(10)
    loader = DeviceLoader(Subset(Subset(data, range(2, 8)), [5, 0]), 4, "cpu")
    assert [y.tolist() for _, y in loader] == [[7, 2]]


class Interrupted(DeviceLoader):
    """Sends this process a SIGINT with its n-th batch."""

    def __init__(self, *args, at=None, **settings):
        super().__init__(*args, **settings)
        self.at = at

    def __iter__(self):
        for batch in super().__iter__():
            self.at = None if self.at is None else self.at - 1
            if self.at == 0:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def fit(folder, at=None):
    """Weights after three epochs of six batches, with generators as new."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.3), torch.nn.Linear(192, 4))
    loader = Interrupted(dataset(22), 4, "cpu", augment=True, shuffle=True, seed=5, at=at)
    LaSNNTrainer(net, attention=None, run_dir=folder, seed=0).fit(loader, epochs=3)
    return net.state_dict()


@pytest.mark.parametrize("at", [2, 6, 9])
def test_a_run_that_was_interrupted_resumes_to_the_bit(at, tmp_path):
    expected = fit(None)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, at)
    resumed = fit(tmp_path)
    assert all(torch.equal(value, expected[name]) for name, value in resumed.items())


class Other(torch.utils.data.Dataset):
    pass


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="dataset must hold its images in memory .* got Other"):
        DeviceLoader(Other(), 4, "cpu")
    for batch_size in (0, True, 2.0):
        with pytest.raises(ValueError, match="batch_size must be a whole number, at least 1"):
            DeviceLoader(dataset(), batch_size, "cpu")
    with pytest.raises(ValueError, match="at least one image"):
        DeviceLoader(Subset(dataset(), []), 4, "cpu")


@pytest.mark.parametrize("augment", [True, False])
def test_a_loader_augments_as_the_data_set_does(augment):
    data = dataset()
    data.transform = transforms(8, augment)
    loader = DeviceLoader.of(Subset(Subset(data, range(9)), range(5)), 4, torch.device("cpu"), seed=3)
    assert (loader.augment, loader.shuffle, len(loader.labels)) == (augment, False, 5)
    assert loader.generator.initial_seed() == 3


def test_other_transforms_and_data_sets_are_left_to_a_data_loader():
    data = dataset()
    data.transform = transforms(16, augment=True)
    assert DeviceLoader.of(data, 4, torch.device("cpu")) is None
    assert DeviceLoader.of(torch.utils.data.TensorDataset(data.images), 4, torch.device("cpu")) is None
