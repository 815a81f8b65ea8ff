"""Data sets: what is read, what is refused, and that seeds reproduce it."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch
import torchvision
from torch.utils.data import DataLoader

from lasnn_sj.data import images as data


def stacked(dataset):
    images, labels = zip(*(dataset[i] for i in range(len(dataset))))
    return torch.stack(images), [int(label) for label in labels]


# ---- digits ----


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_sizes(digits):
    assert (len(digits.train), len(digits.test)) == (1437, 360)
    assert (digits.num_classes, digits.in_channels, digits.image_size) == (10, 1, 8)
    assert digits.train[0][0].shape == (1, 8, 8)
    assert digits.test.classes == tuple("0123456789")


def test_digits_pixels_fill_minus_one_to_one(digits):
    pixels, _ = stacked(digits.train)
    assert pixels.dtype == torch.float32
    assert (pixels.min(), pixels.max()) == (-1, 1)


def test_digits_train_and_test_are_scikit_learns_images_each_once(digits):
    from sklearn.datasets import load_digits

    bunch = load_digits()
    expected = sorted((*row.astype(int), label) for row, label in zip(bunch.data, bunch.target))
    rows = []
    for part in (digits.train, digits.test):
        images, labels = stacked(part)
        grey = ((images + 1) * 8).round().int().flatten(1).tolist()  # back to 0..16
        rows += [(*image, label) for image, label in zip(grey, labels)]
    assert sorted(rows) == expected


def test_digits_test_images_have_every_class(digits):
    assert np.bincount(stacked(digits.test)[1], minlength=10).min() >= 20


def test_digits_are_the_same_every_time(digits):
    again = data.load("digits", augment=True)
    assert torch.equal(stacked(again.train)[0], stacked(digits.train)[0])


def test_statistics_of_the_training_pixels(digits):
    pixels = (stacked(digits.train)[0].double() + 1) / 2
    assert digits.mean == pytest.approx((pixels.mean().item(),), rel=1e-6)
    assert digits.std == pytest.approx((pixels.std(correction=0).item(),), rel=1e-6)


# ---- npz ----


def arrays(n_train=6, n_test=4, size=8, channels=3, classes=5):
    random = np.random.default_rng(0)
    shape = (size, size, channels)
    return {
        "x_train": random.integers(0, 256, (n_train, *shape), dtype=np.uint8),
        "y_train": np.arange(n_train) % classes,
        "x_test": random.integers(0, 256, (n_test, *shape), dtype=np.uint8),
        "y_test": np.arange(n_test) % classes,
    }


def saved(path, **changes):
    np.savez(path, **{name: array for name, array in (arrays() | changes).items() if array is not None})
    return path


def test_npz_round_trip(tmp_path):
    loaded = data.load(saved(tmp_path / "mine.npz"), augment=False)
    assert (loaded.name, loaded.num_classes, loaded.in_channels, loaded.image_size) == ("mine", 5, 3, 8)
    for role in ("train", "test"):
        images, labels = stacked(getattr(loaded, role))
        expected = arrays()[f"x_{role}"].transpose(0, 3, 1, 2) / 127.5 - 1
        np.testing.assert_allclose(images, expected, atol=1e-6)  # float32
        assert labels == arrays()[f"y_{role}"].tolist()


def test_shrunk_images_are_the_means_of_squares_of_pixels(tmp_path):
    loaded = data.load(saved(tmp_path / "mine.npz"), augment=False, shrink=2)
    assert loaded.image_size == 4
    for role in ("train", "test"):
        images, _ = stacked(getattr(loaded, role))
        squares = arrays()[f"x_{role}"].astype(float).reshape(-1, 4, 2, 4, 2, 3).mean((2, 4))
        expected = np.round(squares).transpose(0, 3, 1, 2) / 127.5 - 1
        np.testing.assert_allclose(images, expected, atol=1e-6)
    augmented = data.load(saved(tmp_path / "mine.npz"), shrink=2)
    assert augmented.train[0][0].shape == (3, 4, 4)


@pytest.mark.parametrize("shrink", [0, 3, 16])
def test_a_shrink_that_does_not_divide_the_images_is_refused(tmp_path, shrink):
    with pytest.raises(
        ValueError, match=f"shrink must divide the side of the images, 8 pixels, got {shrink}"
    ):
        data.load(saved(tmp_path / "mine.npz"), shrink=shrink)


def test_npz_without_channel_axis_and_with_labels_in_a_column(tmp_path):
    """The layout of keras.datasets: mnist has no channel axis, cifar10 labels [n, 1]."""
    grey = {name: array[..., 0] if name[0] == "x" else array[:, None] for name, array in arrays().items()}
    loaded = data.load(saved(tmp_path / "grey.npz", **grey), augment=False)
    assert loaded.in_channels == 1
    assert stacked(loaded.train)[0].shape == (6, 1, 8, 8)
    assert stacked(loaded.train)[1] == [0, 1, 2, 3, 4, 0]


def test_classes_are_counted_over_both_parts(tmp_path):
    assert data.load(saved(tmp_path / "a.npz", y_test=np.array([0, 1, 2, 7]))).num_classes == 8


def test_a_known_name_brings_the_published_statistics(tmp_path):
    loaded = data.load(saved(tmp_path / "cifar10.npz"))
    assert loaded.mean == (0.4914, 0.4822, 0.4465)
    assert loaded.std == (0.2470, 0.2435, 0.2616)


@pytest.mark.parametrize(("changes", "said"), [
    ({"y_test": None, "x_test": None}, "lacks the arrays x_test, y_test; it has x_train, y_train"),
    ({"x_train": np.zeros((6, 8, 8, 3), "f4")}, r"x_train must be uint8 square .*got float32 \(6, 8, 8, 3\)"),
    ({"x_test": np.zeros((4, 8, 9, 3), np.uint8)}, r"x_test must be uint8 square .*\(4, 8, 9, 3\)"),
    ({"x_train": np.zeros((6, 8), np.uint8)}, r"x_train must be .*got uint8 \(6, 8\)"),
    ({"x_test": np.zeros((0, 8, 8, 3), "u1"), "y_test": np.zeros(0, int)}, "x_test must be .*at least one"),
    ({"x_test": np.zeros((4, 8, 8, 1), np.uint8)}, r"one shape .*\(8, 8, 3\) and \(8, 8, 1\)"),
    ({"y_train": np.array([0, 1, 2, 3, 4, -1])}, "y_train must be 6 whole numbers from 0 on, got int64"),
    ({"y_train": np.arange(5)}, r"y_train must be 6 whole numbers .*\(5,\)"),
    ({"y_test": np.zeros(4)}, "y_test must be 4 whole numbers from 0 on, got float64"),
    ({"y_test": np.array(["a", "b", "c", "d"], object)}, r"bad\.npz cannot be read as an \.npz file"),
    ({"y_test": np.array(["a", "b", "c", "d"])}, "y_test must be 4 whole numbers from 0 on, got <U1"),
    ({"y_test": np.array([0, 1, 2, 5 * 10**7])}, "the label 50000000, .*50000001 classes of 4 images"),
])  # fmt: skip
def test_npz_files_that_are_refused(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        data.load(saved(tmp_path / "bad.npz", **changes))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_truncated_npz_file_is_named(tmp_path, keep):
    path = saved(tmp_path / "short.npz")
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(ValueError, match=r"short\.npz cannot be read as an \.npz file"):
        data.load(path)


def test_a_damaged_npz_file_is_named(tmp_path):
    path = saved(tmp_path / "damaged.npz")
    content = bytearray(path.read_bytes())
    content[400] ^= 255  # a pixel of x_train: the archive's checksum is off
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.npz cannot be read"):
        data.load(path)


def test_a_single_array_under_the_name_of_an_npz_file_is_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.zeros(3))
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"one\.npz cannot be read as an \.npz file"):
        data.load(tmp_path / "one.npz")


def test_a_missing_npz_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.npz does not exist; it must hold"):
        data.load(tmp_path / "nothing.npz")


@pytest.mark.parametrize("source", ["imagenet-of-mine", "images/", "arrays.npy", ""])
def test_unknown_names(source):
    with pytest.raises(ValueError, match=r"source must be one of digits, cifar10, cifar100, tiny-imagenet"):
        data.load(source)


# ---- augmentation, subsets, loaders ----


def test_augmentation_is_a_crop_of_the_padded_image_perhaps_mirrored(tmp_path):
    source = saved(tmp_path / "a.npz")
    plain = data.load(source, augment=False).train[0][0]
    padded = torch.nn.functional.pad(plain, (1, 1, 1, 1), value=-1)  # an eighth of 8 pixels, black
    crops = [padded[:, i : i + 8, j : j + 8] for i in range(3) for j in range(3)]
    allowed = [*crops, *(crop.flip(2) for crop in crops)]
    train = data.load(source, augment=True).train
    torch.manual_seed(0)
    seen = set()
    for _ in range(300):
        image, _ = train[0]
        seen.add(next(k for k, crop in enumerate(allowed) if torch.equal(crop, image)))
    assert seen == set(range(18))  # each is missed with probability (17/18)^300 = 4e-8


def test_test_images_are_not_augmented(tmp_path):
    test = data.load(saved(tmp_path / "a.npz"), augment=True).test
    assert all(torch.equal(test[0][0], test[0][0]) for _ in range(20))


def test_a_subset_holds_the_first_images(digits):
    part = digits.subset(train=50, test=7)
    assert (len(part.train), len(part.test)) == (50, 7)
    assert torch.equal(part.train[49][0], digits.train[49][0])
    assert len(digits.subset(test=7).train) == 1437


@pytest.mark.parametrize(("counts", "said"), [
    ({"train": 0}, "train must be from 1 to the 1437 train images of digits, got 0"),
    ({"train": 1438}, "got 1438"),
    ({"test": 361}, "test must be from 1 to the 360 test images of digits, got 361"),
    ({"test": -1}, "got -1"),
])  # fmt: skip
def test_subset_limits(digits, counts, said):
    with pytest.raises(ValueError, match=said):
        digits.subset(**counts)


def test_the_first_classes_with_the_first_images_of_each(tmp_path):
    source = saved(tmp_path / "a.npz", y_train=np.array([2, 1, 0, 1, 1, 0]), y_test=np.array([3, 1, 0, 1]))
    whole = data.load(source, augment=False)
    part = whole.first_classes(2, per_class=2)
    assert part.num_classes == 2
    assert stacked(part.train)[1] == [0, 0, 1, 1]
    assert torch.equal(stacked(part.train)[0], stacked(whole.train)[0][[2, 5, 1, 3]])
    assert torch.equal(stacked(part.test)[0], stacked(whole.test)[0][[2, 1, 3]])


@pytest.mark.parametrize(("arguments", "said"), [
    ({"count": 1}, "count must be from 2 to the 10 classes of digits, got 1"),
    ({"count": 11}, "got 11"),
    ({"count": 2, "per_class": 0}, "per_class must be at least 1"),
])  # fmt: skip
def test_limits_of_first_classes(digits, arguments, said):
    with pytest.raises(ValueError, match=said):
        digits.first_classes(**arguments)


# ---- validation split ----


def test_a_stratified_split_by_hand():
    """Of 6, 3 and 1 x 3 samples a third: 2, 1 and 1; each sample in one part, in ascending order."""
    labels = torch.tensor([0, 1, 0, 2, 0, 1, 0, 2, 0, 1, 0, 2])
    train, held = data.stratified_split(labels, 4)
    assert labels[held].bincount().tolist() == [2, 1, 1]
    assert sorted(train.tolist() + held.tolist()) == list(range(12))
    assert train.tolist() == sorted(train.tolist())
    assert held.tolist() == sorted(held.tolist())


def test_samples_left_by_rounding_go_to_the_largest_remainders():
    """Shares of 3 of 10 with 5, 3, 2 samples are 1.5, 0.9, 0.6: the rests 0.9 and 0.6 come before 0.5."""
    labels = torch.tensor([5] * 5 + [7] * 3 + [9] * 2)
    _, held = data.stratified_split(labels, 3)
    assert labels[held].tolist() == [5, 7, 9]


def test_the_split_of_a_seed_is_fixed():
    """Trained networks rely on these very images to be held out."""
    labels = torch.arange(20) % 2
    assert data.stratified_split(labels, 4)[1].tolist() == [2, 7, 8, 19]
    assert data.stratified_split(labels, 4, seed=1)[1].tolist() == [5, 7, 10, 12]


@pytest.mark.parametrize(("labels", "held_out", "said"), [
    ([0, 0, 1, 1], 1, "held_out must be from 2 to 2, one sample of each of the 2 classes in both"),
    ([0, 0, 1, 1], 4, "got 4 of 4 samples"),
    ([0] * 19 + [1], 4, r"held_out = 4 of 20 samples leaves one part without any sample of class 1 "),
])  # fmt: skip
def test_a_split_that_leaves_a_class_empty_is_refused(labels, held_out, said):
    with pytest.raises(ValueError, match=said):
        data.stratified_split(torch.tensor(labels), held_out)


def test_validation_images_are_training_images_without_augmentation(tmp_path):
    random = np.random.default_rng(2).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
    whole = data.load(saved(tmp_path / "a.npz", x_train=random, y_train=np.arange(20) % 2))
    part = whole.split(4)
    _, held = data.stratified_split(whole.train.labels, 4)
    plain, labels = stacked(data.load(tmp_path / "a.npz", augment=False).train)
    assert torch.equal(stacked(part.validation)[0], plain[held])
    assert stacked(part.validation)[1] == [labels[i] for i in held]
    assert len(part.train) == 16
    assert not torch.equal(stacked(part.train)[0], stacked(part.train)[0])  # still augmented
    assert part.train.dataset.images is part.validation.dataset.images  # shared, not copied


def test_a_split_of_a_subset_a_subset_of_a_split(digits):
    part = digits.subset(train=100).split(20)
    assert (len(part.train), len(part.validation)) == (80, 20)
    assert data.labels_of(part.validation).tolist() == stacked(part.validation)[1]
    small = part.subset(validation=5)
    assert (len(small.train), len(small.validation), len(small.test)) == (80, 5, 360)
    two = part.first_classes(2, per_class=3)
    assert stacked(two.train)[1] == [0, 0, 0, 1, 1, 1]
    assert set(stacked(two.validation)[1]) == {0, 1}


def test_loaders_give_validation_images_where_there_are_any(digits):
    part = digits.split(50)
    _, held = part.loaders(16)
    assert torch.cat([labels for _, labels in held]).tolist() == stacked(part.validation)[1]
    assert len(part.test_loader(16).dataset) == 360
    assert len(digits.loaders(16)[1].dataset) == 360


def test_splits_that_cannot_be_made(digits):
    with pytest.raises(ValueError, match="digits is split already, into 1387 training and 50 validation"):
        digits.split(50).split(50)
    with pytest.raises(ValueError, match="has no validation images; hold some out"):
        digits.subset(validation=5)
    unnamed = dataclasses.replace(digits, train=list(digits.train))
    with pytest.raises(ValueError, match="list has no labels; give it an attribute `labels`"):
        unnamed.split(50)


def order(loaded, seed):
    train, _ = loaded.loaders(16, seed=seed)
    return [torch.cat([labels for _, labels in train]).tolist() for _ in range(2)]  # two epochs


def test_the_seed_fixes_the_order_of_the_training_images(digits):
    part = digits.subset(train=200)
    torch.manual_seed(1)
    first = order(part, seed=3)
    torch.manual_seed(2)
    assert order(part, seed=3) == first
    assert order(part, seed=4) != first
    assert first[0] != first[1]  # shuffled anew in each epoch
    assert sorted(first[0]) == sorted(first[1])


def test_test_batches_come_in_order_and_complete(digits):
    _, test = digits.loaders(16)
    assert isinstance(test, DataLoader)
    assert torch.cat([labels for _, labels in test]).tolist() == stacked(digits.test)[1]


# ---- CIFAR through torchvision ----


def fake_cifar(root, name):
    """Tiny batches in the archive's pickle format: rows of 3072 bytes, channel by channel."""
    random = np.random.default_rng(1)
    if name == "cifar10":
        folder, files, key = "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "labels"
        meta, classes = ("batches.meta", "label_names"), 10
    else:
        folder, files, key = "cifar-100-python", ["train"], "fine_labels"
        meta, classes = ("meta", "fine_label_names"), 100
    (root / folder).mkdir()
    for file in [*files, "test_batch" if name == "cifar10" else "test"]:
        rows = random.integers(0, 256, (4, 3072), dtype=np.uint8)
        content = {"data": rows, key: [0, 3, classes - 1, 2]}
        (root / folder / file).write_bytes(pickle.dumps(content))
    names = {meta[1]: [str(i) for i in range(classes)]}
    (root / folder / meta[0]).write_bytes(pickle.dumps(names))
    return rows


@pytest.mark.parametrize(("name", "n_train", "classes"), [("cifar10", 20, 10), ("cifar100", 4, 100)])
def test_cifar_is_read_from_torchvisions_archive(tmp_path, monkeypatch, name, n_train, classes):
    test_rows = fake_cifar(tmp_path, name)
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda path, md5=None: True)
    loaded = data.load(name, tmp_path, download=False)
    assert (len(loaded.train), len(loaded.test)) == (n_train, 4)
    assert (loaded.num_classes, loaded.in_channels, loaded.image_size) == (classes, 3, 32)
    assert (loaded.mean, loaded.std) == data.STATISTICS[name]
    images, labels = stacked(loaded.test)
    np.testing.assert_allclose(images, test_rows.reshape(4, 3, 32, 32) / 127.5 - 1, atol=1e-6)  # float32
    assert labels == [0, 3, classes - 1, 2]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_data_set_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name} could not be read from .*or give an \.npz file"):
        data.load(name, tmp_path, download=False)


def test_a_damaged_archive_is_named(tmp_path):
    fake_cifar(tmp_path, "cifar10")  # its checksums are not the published ones
    with pytest.raises(FileNotFoundError, match="cifar10 could not be read"):
        data.load("cifar10", tmp_path, download=False)


# ---- Tiny ImageNet ----


@pytest.fixture
def tiny(tmp_path):
    """Two classes of two training images, three test images; each image has one colour of its own."""
    folder = tmp_path / "tiny-imagenet-200"
    (folder / "val" / "images").mkdir(parents=True)
    (folder / "train").mkdir()
    (folder / "train" / ".listing").touch()  # a stray file is no class

    def write(path, colour):
        torchvision.io.write_jpeg(torch.full((3, 64, 64), colour, dtype=torch.uint8), str(path), quality=100)

    for c, wnid in enumerate(("n01", "n02")):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(2):
            write(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", 100 * c + 10 * i)
    lines = []
    for i, wnid in enumerate(("n02", "n01", "n02")):
        write(folder / "val" / "images" / f"val_{i}.JPEG", 50 * i)
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t63\t63")
    (folder / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_tiny_imagenet_folder(tiny):
    loaded = data.load("tiny-imagenet", tiny, augment=False)
    assert (loaded.num_classes, loaded.in_channels, loaded.image_size) == (2, 3, 64)
    expected = {"train": ([0, 10, 100, 110], [0, 0, 1, 1]), "test": ([0, 50, 100], [1, 0, 1])}
    for role, (colours, labels) in expected.items():
        images, actual = stacked(getattr(loaded, role))
        assert actual == labels
        colours = torch.tensor(colours).view(-1, 1, 1, 1).expand(-1, 3, 64, 64)
        # JPEG keeps a grey of one shade to a level or so of 255
        torch.testing.assert_close(images, colours / 127.5 - 1, rtol=0, atol=2 / 127.5)


def test_tiny_imagenet_shrunk(tiny):
    loaded = data.load("tiny-imagenet", tiny, augment=False, shrink=4)
    assert loaded.image_size == 16
    images, _ = stacked(loaded.train)
    colours = torch.tensor([0, 10, 100, 110]).view(-1, 1, 1, 1).expand(-1, 3, 16, 16)
    torch.testing.assert_close(images, colours / 127.5 - 1, rtol=0, atol=2 / 127.5)


def test_a_damaged_image_is_named(tiny):
    (tiny / "tiny-imagenet-200" / "val" / "images" / "val_1.JPEG").write_bytes(b"no image")
    loaded = data.load("tiny-imagenet", tiny)
    with pytest.raises(RuntimeError, match=r"val_1\.JPEG cannot be read as an image"):
        loaded.test[1]


def test_a_missing_tiny_imagenet_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="tiny-imagenet-200 is not an unpacked tiny-imagenet-200"):
        data.load("tiny-imagenet", tmp_path)


def test_a_half_unpacked_tiny_imagenet_folder_is_named(tiny):
    annotations = tiny / "tiny-imagenet-200" / "val" / "val_annotations.txt"
    whole = annotations.read_text()
    annotations.write_text(whole + "val_3.JPEG\tn03\t0\t0\t63\t63\n")
    with pytest.raises(
        ValueError, match=r"val_annotations\.txt: .*class 'n03', of which .*train has no folder"
    ):
        data.load("tiny-imagenet", tiny)
    annotations.write_text("val_0.JPEG\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt: .*'val_0\.JPEG' .* file and class"):
        data.load("tiny-imagenet", tiny)
    annotations.write_text(whole)
    for file in (tiny / "tiny-imagenet-200" / "train" / "n02").rglob("*.JPEG"):
        file.unlink()
    with pytest.raises(ValueError, match=r"train.n02 has no .*JPEG"):
        data.load("tiny-imagenet", tiny)


def test_a_data_set_is_shown_by_its_name_and_sizes():
    digits = data.load("digits")
    shown = "ImageData('digits', 1437 training, 360 test samples [1, 8, 8], 10 classes)"
    assert repr(digits) == shown
    assert repr(digits.split(100)) == shown.replace("1437 training, ", "1337 training, 100 validation, ")
    assert repr(digits.test) == "Images(360 of [1, 8, 8])"
