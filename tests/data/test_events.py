"""Event recordings: frames, cache, augmentation, batches, and what happens to damaged files.

Recordings are written in the form in which DVS-Gesture and N-MNIST are published and read by Tonic's own
classes. Real ones are used where the environment variable LASNN_SJ_DATA names a folder that has
``dvs/DVSGesture`` (or ``nmnist/nmnist_small.npz``).
"""

import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recordings import write_gestures

tonic = pytest.importorskip("tonic")

from lasnn_sj import LaSNNTrainer  # noqa: E402
from lasnn_sj.data import events  # noqa: E402
from lasnn_sj.data.events import RecordingError, collate  # noqa: E402
from lasnn_sj.data.frames import Augment, Framing, to_frames  # noqa: E402
from lasnn_sj.experiments import reverse  # noqa: E402

DTYPE = tonic.datasets.DVSGesture.dtype
REAL = Path(os.environ.get("LASNN_SJ_DATA", "/nowhere"))
needs_gestures = pytest.mark.skipif(not (REAL / "dvs" / "DVSGesture").is_dir(), reason="no LASNN_SJ_DATA")
needs_digits = pytest.mark.skipif(
    not (REAL / "nmnist" / "nmnist_small.npz").is_file(), reason="no LASNN_SJ_DATA"
)


def structured(rows):
    return np.array([tuple(row) for row in rows], dtype=DTYPE)


@pytest.fixture
def root(tmp_path):
    write_gestures(tmp_path)
    return tmp_path


def item_of(data, name):
    return next(i for i, index in enumerate(data.indices) if data.recordings.data[index].endswith(name))


def test_a_dvs_gesture_folder(root):
    data = events.load("dvs-gesture", root, Framing(T=4), augment=False)
    assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (110, 110, 11, 128)
    assert data.classes[3] == data.test.classes[3] == "Right arm cw"
    for part in (data.train, data.test):
        assert sorted(part[i][1] for i in range(110)) == sorted(list(range(11)) * 10)
    frames, label = data.train[item_of(data.train, "user03_led/7.npy")]
    assert (frames.dtype, label) == (torch.float32, 7)
    rows = np.load(root / "DVSGesture/ibmGestureTrain/user03_led/7.npy")
    rows[:, 3] *= 1000
    assert (frames.numpy() == to_frames(structured(rows), (128, 128), Framing(T=4))).all()


def test_recordings_come_in_the_order_of_their_names_not_of_the_file_system(root):
    part = events.load("dvs-gesture", root, Framing(T=2)).test
    names = [Path(part.recordings.data[i]) for i in part.indices]
    keys = [(int(path.parent.name[4:6]), int(path.stem)) for path in names]
    assert keys == sorted(keys)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_have_their_time_axis_in_front(root, workers):
    data = events.load("dvs-gesture", root, Framing(T=3, shrink=8), augment=False)
    train, test = data.loaders(40, workers)
    frames, labels = next(iter(test))
    assert (tuple(frames.shape), frames.is_contiguous()) == ((3, 40, 2, 16, 16), True)
    assert labels.dtype == torch.int64
    assert torch.equal(frames[:, 5], data.test[5][0])
    assert [len(labels) for _, labels in train] == [40, 40, 30]
    orders = [torch.cat([y for _, y in data.loaders(40, workers, seed=s)[0]]).tolist() for s in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]


def test_validation_recordings_are_training_recordings_without_augmentation(root):
    whole = events.load("dvs-gesture", root, Framing(T=1, shrink=8))
    part = whole.split(22)
    assert (len(part.train), len(part.validation), len(part.test)) == (88, 22, 110)
    assert part.validation.labels.bincount().tolist() == [2] * 11
    assert sorted(part.train.indices + part.validation.indices) == sorted(whole.train.indices)
    assert (part.train.augment, part.validation.augment) == (whole.train.augment, None)
    assert len(part.loaders(10)[1].dataset) == 22
    assert len(part.test_loader(10).dataset) == 110


def test_workers_augment_differently_and_as_the_seed_says(root):
    data = events.load("dvs-gesture", root, Framing(T=1, shrink=8))
    epochs = [torch.cat([x for x, _ in data.loaders(55, 2, seed=s)[0]], 1) for s in (0, 0, 1)]
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


def counted(monkeypatch):
    calls, make = [], events.EventFrames._make
    monkeypatch.setattr(events.EventFrames, "_make", lambda self, i: calls.append(i) or make(self, i))
    return calls


def test_frames_are_made_once(root, tmp_path, monkeypatch):
    calls, cache = counted(monkeypatch), tmp_path / "cache"
    first = events.load("dvs-gesture", root, Framing(T=4), False, cache).test
    before = [first[i][0] for i in range(5)]
    assert len(calls) == 5
    again = events.load("dvs-gesture", root, Framing(T=4), False, cache).test
    assert all(torch.equal(before[i], again[i][0]) for i in range(5))
    assert len(calls) == 5
    assert len(list(cache.iterdir())) == 5


@pytest.mark.parametrize("changed", [
    Framing(T=5), Framing(T=4, by="time"), Framing(T=4, denoise_us=1e9), Framing(T=4, shrink=2),
])  # fmt: skip
def test_a_changed_setting_never_reads_the_cache(changed, root, monkeypatch):
    calls = counted(monkeypatch)
    events.load("dvs-gesture", root, Framing(T=4), False).test.counts(0)
    new = events.load("dvs-gesture", root, changed, False).test
    frames = new.counts(0)
    assert len(calls) == 2
    assert (frames == new._make(new.indices[0])).all()


@pytest.mark.parametrize("what", ["recording", "split", "tonic", "format"])
def test_a_changed_recording_or_version_never_reads_the_cache(what, root, monkeypatch):
    calls = counted(monkeypatch)
    data = events.load("dvs-gesture", root, Framing(T=4), False)
    data.test.counts(0)
    part = data.test
    if what == "recording":
        path = Path(part.recordings.data[part.indices[0]])
        np.save(path, np.load(path)[::-1])  # as many bytes
        os.utime(path, ns=(1, 1))
    elif what == "split":
        part = data.train
    elif what == "tonic":
        monkeypatch.setattr(tonic, "__version__", "0")
    else:
        monkeypatch.setattr(events, "_FORMAT", 2)
    part.counts(0)
    assert len(calls) == 2


def spoil(path, how):
    content = path.read_bytes()
    if how == "half":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "flipped":  # one bit of the compressed frames
        middle = content.index(b"frames.npy") + 200
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "text":
        path.write_text("nothing of the kind")
    elif how == "other":
        np.savez(path, frames=np.zeros((1, 2, 3, 3)), made_from=np.array("another recording"))
    else:
        np.savez(path, frames=np.zeros((1, 2, 3, 3)))


@pytest.mark.parametrize("how", ["half", "empty", "flipped", "text", "other", "lacking"])
def test_a_damaged_cached_file_is_reported_and_made_anew(how, root, tmp_path, caplog):
    cache = tmp_path / "cache"
    part = events.load("dvs-gesture", root, Framing(T=4), False, cache).test
    before = [part[i][0] for i in range(2)]
    first, second = (path for path in sorted(cache.iterdir(), key=lambda p: p.stat().st_mtime_ns))
    kept = second.read_bytes()
    spoil(first, how)
    with caplog.at_level(logging.WARNING, "lasnn_sj"):
        assert torch.equal(part[0][0], before[0])
    assert [r for r in caplog.records if "damaged" in r.message and str(first) in r.message]
    caplog.clear()
    assert all(torch.equal(part[i][0], before[i]) for i in range(2))
    assert not caplog.records
    assert second.read_bytes() == kept


def test_a_process_killed_while_it_writes_leaves_nothing_that_is_read(root, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    part = events.load("dvs-gesture", root, Framing(T=4), False, cache).test

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            part.counts(0)
    assert not list(cache.iterdir())
    assert (part.counts(0) == part._make(part.indices[0])).all()


def test_old_parts_of_killed_processes_are_removed_from_the_cache(root, tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    for name, age in (("old", 2 * 24 * 3600), ("young", 60)):
        part = cache / f".{name}.part"
        part.touch()
        os.utime(part, (time.time() - age,) * 2)
    events.load("dvs-gesture", root, Framing(T=4), False, cache)
    assert [path.name for path in cache.iterdir()] == [".young.part"]


def test_many_events_at_one_pixel_are_all_counted(root):
    """More than a byte or 16 bits hold (Tonic's frames are int16)."""
    for n in (300, 40_000, 70_000):
        path = root / "DVSGesture/ibmGestureTest/user01_led/0.npy"
        np.save(path, np.tile([5, 6, 1, 7], (n, 1)))
        part = events.load("dvs-gesture", root, Framing(T=1), False).test
        item = item_of(part, "user01_led/0.npy")
        for _ in range(2):  # made, then from the cache
            assert part[item][0][0, 1, 6, 5] == n


def test_denoising_drops_the_lonely_event(root):
    """Three neighbours within 10 ms stay, an event alone in space and one alone in time go."""
    rows = [(10, 10, 0, 100), (11, 10, 0, 101), (10, 11, 1, 102), (90, 90, 0, 150), (11, 11, 0, 250)]
    np.save(root / "DVSGesture/ibmGestureTest/user01_led/0.npy", np.array(rows))
    for denoise_us, kept in ((None, 5), (10_000, 2)):
        part = events.load("dvs-gesture", root, Framing(T=1, denoise_us=denoise_us), False).test
        frames = part[item_of(part, "user01_led/0.npy")][0]
        assert frames.sum() == kept  # Tonic keeps an event only after its neighbour, so not the first
    assert (frames[0, 0, 10, 11], frames[0, 1, 11, 10]) == (1, 1)


def test_events_out_of_order_are_sorted(root):
    path = root / "DVSGesture/ibmGestureTest/user01_led/0.npy"
    part = events.load("dvs-gesture", root, Framing(T=4, by="time"), False, cache=None).test
    item, rows = item_of(part, "user01_led/0.npy"), np.load(path)
    before = part._make(part.indices[item])
    np.save(path, rows[::-1])
    assert (part._make(part.indices[item]) == before).all()


@pytest.mark.parametrize(("rows", "message"), [
    (np.zeros((0, 4), int), r"user02_led/4.npy has no events; remove it or unpack it again"),
    (np.array([[128, 0, 0, 0]]), r"4.npy has events with x from 128 to 128, off the sensor's 0 to 127"),
    (np.array([[0, 0, 0, 0], [0, -1, 0, 0]]), "has events with y from -1 to 0, off the sensor"),
    (np.array([[0, 0, 0, 0], [1, 1, 0, 2**60]]), r"4.npy has events at .* microseconds, centuries away"),
    (np.zeros((3, 2), int), r"user02_led/4.npy cannot be read \(IndexError: .*unpack it again"),
    (b"\x93NUMPY\x01", "user02_led/4.npy cannot be read .* unpack it again"),
    ("lonely", "no events left after denoise_us=1.0; a larger value"),
])  # fmt: skip
@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_recording_is_named_and_the_others_are_left_alone(rows, message, root, workers):
    denoise = 1.0 if isinstance(rows, str) else None
    data = events.load("dvs-gesture", root, Framing(T=2, denoise_us=denoise), False)
    path = root / "DVSGesture/ibmGestureTest/user02_led/4.npy"
    if isinstance(rows, bytes):
        path.write_bytes(rows)
    else:
        np.save(path, np.array([[5, 5, 0, 100], [50, 50, 0, 200]]) if isinstance(rows, str) else rows)
    item = item_of(data.test, "user02_led/4.npy")
    part = torch.utils.data.Subset(data.test, [item])
    with pytest.raises(RecordingError, match=message):
        list(torch.utils.data.DataLoader(part, num_workers=workers, collate_fn=collate))
    if denoise is None:
        assert data.test[item - 1][0].sum() > 0
        assert len(list((root / "frames").iterdir())) == 1  # of the good one


@pytest.mark.parametrize("name", events.SETS)
def test_a_missing_archive_without_network(name, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    folder = {"dvs-gesture": "DVSGesture", "n-mnist": "NMNIST", "cifar10-dvs": "CIFAR10DVS"}[name]
    with pytest.raises(
        FileNotFoundError, match=rf"{name} could not be read from .*{folder} .*put the archive"
    ):
        events.load(name, tmp_path)


def test_bad_arguments(tmp_path):
    with pytest.raises(ValueError, match="name must be one of dvs-gesture, n-mnist, cifar10-dvs, got 'dvs'"):
        events.load("dvs", tmp_path)
    for arguments, message in (
        ({"T": 0}, "T must be a whole number, at least 1, got 0"),
        ({"T": 4.0}, "T must be a whole number"),
        ({"shrink": 0}, "shrink must be a whole number"),
        ({"by": "events"}, 'by must be "count" or "time", got \'events\''),
        ({"denoise_us": 0}, "denoise_us must be above 0 microseconds"),
    ):
        with pytest.raises(ValueError, match=message):
            Framing(**arguments)


def test_a_flip_changes_the_label_with_the_hand():
    names = [name.lower() for name in tonic.datasets.DVSGesture.classes]
    flips = events.SETS["dvs-gesture"][1]
    mirrored = {"right": "left", "left": "right", "cw": "ccw", "ccw": "cw"}
    for label, name in enumerate(names):
        other = " ".join(mirrored.get(word, word) for word in name.split())
        assert names[flips.get(label, label)] == other
    frames, seen = torch.arange(24.0).view(1, 2, 3, 4), set()
    for seed in range(20):
        torch.manual_seed(seed)
        changed, label = Augment(flip=flips)(frames, 3)
        assert torch.equal(changed, frames.flip(-1) if label == 6 else frames)
        seen.add(label)
    assert seen == {3, 6}


def test_training_is_augmented_and_the_test_set_is_not(root):
    data = events.load("dvs-gesture", root, Framing(T=2))
    assert data.train.augment == Augment(events.SETS["dvs-gesture"][1], shift=8, cutout=16)
    assert data.test.augment is None
    assert events.load("dvs-gesture", root, augment=False).train.augment is None


def test_n_mnist_through_the_same_function(tmp_path, monkeypatch):
    """Its 40-bit events: x, y, polarity and 23 bits of time."""
    monkeypatch.setattr(tonic.datasets.NMNIST, "_folder_contains_at_least_n_files_of_type", lambda *a: True)
    write_digits(tmp_path, [(3, digit(50, seed=1)), (8, digit(60, seed=2))], [(5, digit(70, seed=3))])
    data = events.load("n-mnist", tmp_path, Framing(T=4), augment=False)
    assert (len(data.train), len(data.test), data.num_classes, data.image_size) == (2, 1, 10, 34)
    frames, label = data.test[0]
    assert (label, frames.shape, frames.sum()) == (5, (4, 2, 34, 34), 70)
    x, y, t, p = digit(70, seed=3)
    expected = np.zeros(70, dtype=DTYPE)
    expected["x"], expected["y"], expected["t"], expected["p"] = x, y, t, p
    assert (frames.numpy() == to_frames(expected, (34, 34), Framing(T=4))).all()
    assert events.load("n-mnist", tmp_path).train.augment.flip is None


def digit(n, seed):
    r = np.random.RandomState(seed)
    return r.randint(0, 34, n), r.randint(0, 34, n), np.sort(r.randint(0, 300_000, n)), r.randint(0, 2, n)


def write_digits(root, train, test):
    for folder, archive, digits in (("Train", "train.zip", train), ("Test", "test.zip", test)):
        for number, (label, (x, y, t, p)) in enumerate(digits):
            place = root / "NMNIST" / folder / str(label)
            place.mkdir(parents=True, exist_ok=True)
            word = (p.astype(np.int64) << 23) | t
            columns = [x, y, word >> 16, (word >> 8) & 255, word & 255]
            (place / f"{number:05d}.bin").write_bytes(np.stack(columns, 1).astype(np.uint8).tobytes())
        (root / "NMNIST" / archive).touch()


def test_cifar10_dvs_through_the_same_function(tmp_path, monkeypatch):
    """Twenty recordings of each class: the last two, by number, are its test set. Its reader is replaced."""
    kind = tonic.datasets.CIFAR10DVS
    monkeypatch.setattr(kind, "_check_exists", lambda self: True)
    dtype = np.dtype([("t", np.uint64), ("x", np.uint16), ("y", np.uint16), ("on", bool)])

    def read(path):
        rows = np.zeros(30, dtype)
        rows["t"], rows["x"], rows["y"] = np.arange(30), 127, int(Path(path).stem.split("_")[-1])
        return rows

    monkeypatch.setattr("tonic.datasets.cifar10dvs.read_aedat4", read)
    for name in kind.classes:
        (tmp_path / "CIFAR10DVS" / name).mkdir(parents=True)
        for number in range(20):
            (tmp_path / "CIFAR10DVS" / name / f"cifar10_{name}_{number}.aedat4").touch()
    data = events.load("cifar10-dvs", tmp_path, Framing(T=2), augment=False)
    assert (len(data.train), len(data.test), data.num_classes) == (180, 20, 10)
    assert data.classes[1] == "automobile"
    rows = {int(frames.nonzero()[0, 2]) for frames, _ in (data.test[i] for i in range(20))}
    assert rows == {18, 19}
    assert [data.test[i][1] for i in range(20)] == [label for label in range(10) for _ in range(2)]


def test_the_picture_of_a_recording(tmp_path):
    frames = torch.zeros(10, 2, 32, 32)
    frames[:, 1, 4, 5] = 3  # brighter: red
    frames[:, 0, 20, 8] = 3  # darker: blue
    frames[range(10), 1, range(20, 30), 30] = 3  # moves: a GIF holds equal frames only once
    frames[9, :, :20] = 0
    strip, animation = events.draw(frames, tmp_path / "run", "wave", frame_ms=50)
    assert (strip, animation) == (tmp_path / "run" / "wave.png", tmp_path / "run" / "wave.gif")
    picture = Image.open(strip)  # two rows of eight frames, each pixel three wide, a grey line around
    assert picture.size == (8 * 98, 2 * 98)
    assert picture.getpixel((1 + 5 * 3, 1 + 4 * 3)) == (255, 0, 0)
    assert picture.getpixel((98 + 1 + 8 * 3, 1 + 20 * 3)) == (0, 0, 255)
    assert picture.getpixel((98 + 1 + 5 * 3, 98 + 1 + 4 * 3)) == (255, 255, 255)
    with Image.open(animation) as film:
        assert (film.n_frames, film.size, film.info["loop"], film.info["duration"]) == (10, (96, 96), 0, 50)


@pytest.mark.parametrize("shape", [(0, 2, 4, 4), (4, 3, 4, 4), (2, 4, 4)])
def test_only_frames_are_drawn(shape, tmp_path):
    with pytest.raises(ValueError, match=r"frames must be \[T, 2, H, W\] with T >= 1, got shape"):
        events.draw(np.zeros(shape), tmp_path)


@needs_gestures
@pytest.mark.parametrize("by", ["count", "time"])
def test_real_gestures_conserve_their_events(by, tmp_path):
    data = events.load("dvs-gesture", REAL / "dvs", Framing(by=by), False, tmp_path)
    assert (len(data.train), len(data.test)) == (110, 110)
    for part in (data.train, data.test):
        for item in range(0, 110, 5):
            rows = np.load(part.recordings.data[part.indices[item]])
            frames, label = part[item]
            assert frames.shape == (16, 2, 128, 128)
            assert frames.sum() == len(rows)
            assert frames[:, 1].sum() == rows[:, 2].sum()
            assert label == int(Path(part.recordings.data[part.indices[item]]).stem)


@needs_gestures
def test_a_small_net_learns_real_gestures(tmp_path):
    """A minute's training on some windows of each recording, tested on later windows: chance is 10 %."""
    from spikingjelly.activation_based import functional, layer, neuron, surrogate
    from torch import nn

    torch.manual_seed(0)
    data = events.load("dvs-gesture", REAL / "dvs", Framing(T=4, shrink=8), False, tmp_path)

    def block(c_in, c_out):
        spikes = neuron.IFNode(surrogate_function=surrogate.ATan(), detach_reset=True)
        return [layer.Conv2d(c_in, c_out, 3, padding=1, bias=False), layer.BatchNorm2d(c_out), spikes]

    net = nn.Sequential(
        *block(2, 16), layer.MaxPool2d(2), *block(16, 16), layer.MaxPool2d(2), layer.Flatten(),
        layer.Linear(16 * 16, 11),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    train, test = data.loaders(10)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    trainer = LaSNNTrainer(net, optimizer=optimizer, seed=0)
    trainer.fit(train, epochs=5)
    assert trainer.evaluate(test)["top1"] > 50


@needs_digits
def test_real_digits(tmp_path, monkeypatch):
    """N-MNIST recordings, written back into its files and read by Tonic."""
    monkeypatch.setattr(tonic.datasets.NMNIST, "_folder_contains_at_least_n_files_of_type", lambda *a: True)
    with np.load(REAL / "nmnist" / "nmnist_small.npz") as file:
        arrays = {name: file[name] for name in file.files if name.startswith("test")}
    ends = np.cumsum(arrays["test_events"])
    digits = []
    for end, count, label in zip(ends, arrays["test_events"], arrays["test_label"]):
        part = slice(end - count, end)
        digits.append((int(label), tuple(arrays[f"test_{c}"][part].astype(np.int64) for c in "xytp")))
    write_digits(tmp_path, digits[:50], digits[50:])
    data = events.load("n-mnist", tmp_path, Framing(T=5), augment=False)
    totals = {int(data.test[i][0].sum()) for i in range(len(data.test))}
    assert totals == {len(x) for _, (x, _, _, _) in digits[50:]}


def test_a_study_folder_of_other_frames_is_refused(root, tmp_path):
    """Rows of 4 and of 2 time steps would stand in one table."""
    run = tmp_path / "run"

    def study(framing, augment=True):
        frames = events.load("dvs-gesture", root, framing, augment)
        return reverse.ReversePipeline(reverse.ReverseRecipe(), frames, run)

    study(Framing(T=4))
    study(Framing(T=4))
    with pytest.raises(ValueError, match=r"other settings \(T: there 4, here 2\)"):
        study(Framing(T=2))
    with pytest.raises(ValueError, match=r"other settings \(augment: there .*, here None\)"):
        study(Framing(T=4), augment=False)
