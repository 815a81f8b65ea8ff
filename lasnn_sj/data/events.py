"""Event recordings as frames ``[T, 2, H, W]``: read by Tonic, cached on disk, augmented. Needs ``tonic``."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .archives import read_npz
from .frames import Augment, Framing, to_frames
from .images import Loaders

log = logging.getLogger(__name__)

# Tonic's class by name, and the labels that a mirror image changes: the other hand, the other sense of
# rotation. Digits are not mirrored (None).
SETS: dict[str, tuple[str, dict[int, int] | None]] = {
    "dvs-gesture": ("DVSGesture", {1: 2, 2: 1, 3: 6, 6: 3, 4: 5, 5: 4}),
    "n-mnist": ("NMNIST", None),
    "cifar10-dvs": ("CIFAR10DVS", {}),
}
LATEST = 2**53  # microseconds; 285 years
_FORMAT = 1  # of cached files; raise it when the same settings give other frames


class RecordingError(ValueError):
    """An event recording cannot be used; the message names the file and the cause."""


class EventFrames(Dataset):
    """Frames of the recordings of a Tonic data set, computed once and then read from disk.

    A cached file is named after everything that made it: data set, Tonic's version, the framing, and the
    recording's path, size and time of change. (Tonic's ``DiskCachedDataset`` knows a recording by its number
    alone, and writes in place.) A file that is damaged is reported and made anew.

    Args:
        recordings: Tonic data set, with ``data`` (paths), ``targets`` and ``sensor_size``.
        indices: of the recordings to use, in this order.
        name: of the data set.
        framing: how frames are made.
        cache: folder of the cached frames; ``None`` makes them at every access.
        augment: applied to what was cached.

    Items are ``(frames [T, 2, H, W] float32 event counts, label)``.
    """

    def __init__(
        self,
        recordings: Dataset,
        indices: Sequence[int],
        name: str,
        framing: Framing,
        cache: str | Path | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.recordings, self.indices, self.name = recordings, list(indices), name
        self.framing, self.augment = framing, augment
        self.cache = None if cache is None else Path(cache)
        self._root = Path(recordings.location_on_system)

    def __len__(self) -> int:
        return len(self.indices)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes by label, if Tonic has them."""
        found = getattr(self.recordings, "classes", None)
        return tuple(found) if found else None

    @property
    def labels(self) -> Tensor:
        """Labels ``[n]``."""
        return torch.tensor([int(self.recordings.targets[index]) for index in self.indices])

    def __getitem__(self, item: int) -> tuple[Tensor, int]:
        """Return the frames and label of one recording.

        Raises:
            RecordingError: the recording cannot be read, is empty, or has events off the sensor.
        """
        index = self.indices[item]
        label = int(self.recordings.targets[index])
        frames = torch.from_numpy(self.counts(item)).float()
        return (frames, label) if self.augment is None else self.augment(frames, label)

    def counts(self, item: int) -> np.ndarray:
        """Return the frames of one recording without augmentation, ``[T, 2, H, W]`` integers."""
        index = self.indices[item]
        if self.cache is None:
            return self._make(index)
        made_from = self._made_from(index)
        path = self.cache / f"{hashlib.sha256(made_from.encode()).hexdigest()[:32]}.npz"
        if path.exists():
            try:
                return self._read_cached(path, made_from)
            except (OSError, KeyError, ValueError) as error:
                log.warning("cached frames %s are damaged (%s) and made anew", path, error)
        frames = self._make(index)
        small = frames.astype(np.min_scalar_type(int(frames.max())))
        self._write_cached(path, small, made_from)
        return small

    def _made_from(self, index: int) -> str:
        import tonic

        path = Path(self.recordings.data[index])
        file = path.stat()
        return json.dumps(
            {
                "format": _FORMAT,
                "data": self.name,
                "tonic": tonic.__version__,
                "sensor": [int(side) for side in self.recordings.sensor_size],
                "recording": path.relative_to(self._root).as_posix(),
                "bytes": file.st_size,
                "changed_ns": file.st_mtime_ns,
            }
            | asdict(self.framing),
            sort_keys=True,
        )

    def _read_cached(self, path: Path, made_from: str) -> np.ndarray:
        found, _ = read_npz(path, ("made_from", "frames"))  # checks each array's CRC
        if str(found["made_from"]) != made_from:
            raise ValueError(f"made from {found['made_from']}")
        frames = found["frames"]
        if frames.ndim != 4 or frames.shape[:2] != (self.framing.T, 2) or frames.dtype.kind != "u":
            raise ValueError(f"it holds {frames.dtype} {frames.shape}")
        return frames

    def _write_cached(self, path: Path, frames: np.ndarray, made_from: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # under a temporary name first: another process may write the same recording
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".part", delete=False) as part:
            try:
                np.savez_compressed(part, frames=frames, made_from=np.array(made_from))
                part.close()
                os.replace(part.name, path)
            except BaseException:
                part.close()
                Path(part.name).unlink(missing_ok=True)
                raise

    def _make(self, index: int) -> np.ndarray:
        events = self._events(index)
        return to_frames(events, self.recordings.sensor_size[:2], self.framing)

    def _events(self, index: int) -> np.ndarray:
        path = self.recordings.data[index]
        try:
            events, _ = self.recordings[index]
        except ImportError:  # the reader of the format is not installed
            raise
        except Exception as error:  # each reader raises exceptions of its own types
            raise RecordingError(
                f"recording {path} cannot be read ({type(error).__name__}: {error}); unpack it again from "
                f"the data set's archive"
            ) from error
        self._check(events, path)
        if bool((np.diff(events["t"].astype(np.int64)) < 0).any()):
            events = events[np.argsort(events["t"], kind="stable")]
        if self.framing.denoise_us is not None:
            from tonic.transforms import Denoise

            events = Denoise(filter_time=self.framing.denoise_us)(events)
            if len(events) == 0:
                raise RecordingError(
                    f"recording {path} has no events left after denoise_us={self.framing.denoise_us}; "
                    f"a larger value drops fewer"
                )
        return events

    def _check(self, events: np.ndarray, path: str) -> None:
        if len(events) == 0:
            raise RecordingError(f"recording {path} has no events; remove it or unpack it again")
        first, last = int(events["t"].min()), int(events["t"].max())
        if max(abs(first), abs(last)) > LATEST:
            raise RecordingError(
                f"recording {path} has events at {first} to {last} microseconds, centuries away; remove it "
                f"or unpack it again"
            )
        width, height, polarities = self.recordings.sensor_size
        for name, size in (("x", width), ("y", height), ("p", polarities)):
            low, high = int(events[name].min()), int(events[name].max())
            if low < 0 or high >= size:
                raise RecordingError(
                    f"recording {path} has events with {name} from {low} to {high}, off the sensor's "
                    f"0 to {size - 1}; remove it or unpack it again"
                )


def collate(samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Stack samples ``([T, 2, H, W], label)`` to a batch ``(frames [T, N, 2, H, W], labels [N])``."""
    frames, labels = zip(*samples)
    return torch.stack(frames, dim=1), torch.tensor(labels)


@dataclass(frozen=True, repr=False)
class EventData(Loaders):
    """Training, validation and test recordings of a data set, and its description.

    Attributes:
        name: of the data set.
        train, test: give ``(frames [T, 2, H, W], label)``; ``train`` is augmented.
        classes: names by label.
        image_size: side of the square frames.
        in_channels: 2, the polarities.
        validation: training recordings that :meth:`~.Loaders.split` held out, not augmented; ``None`` before.
    """

    name: str
    train: EventFrames
    test: EventFrames
    classes: tuple[str, ...]
    image_size: int
    in_channels: int = 2
    validation: EventFrames | None = None

    collate: ClassVar = staticmethod(collate)
    least_evaluated: ClassVar[int] = 1

    @property
    def num_classes(self) -> int:
        """``K``."""
        return len(self.classes)

    def _split(self, train: list[int], held: list[int]) -> EventData:
        parts = copy.copy(self.train), copy.copy(self.train)
        for part, items in zip(parts, (train, held)):
            part.indices = [self.train.indices[item] for item in items]
        parts[1].augment = None
        return replace(self, train=parts[0], validation=parts[1])


def load(
    name: str,
    root: str | Path = "data",
    framing: Framing | None = None,
    augment: bool = True,
    cache: str | Path | None = None,
) -> EventData:
    """Load a data set of event recordings through Tonic, which downloads it if it is not under ``root``.

    DVS-Gesture and N-MNIST come with a test set; of CIFAR10-DVS each class' last tenth is the test set.

    Args:
        name: ``"dvs-gesture"``, ``"n-mnist"`` or ``"cifar10-dvs"``.
        root: folder as Tonic's ``save_to``, with ``DVSGesture/``, ``NMNIST/`` or ``CIFAR10DVS/`` in it.
        framing: 16 frames of equal event count if not given.
        augment: flip with the labels it changes, shift by up to a sixteenth and cut out an eighth of the
            side, in training.
        cache: folder of the cached frames, ``root/frames`` if not given.

    Raises:
        ImportError: Tonic is not installed.
        ValueError: an unknown name.
        FileNotFoundError: the data set does not exist and cannot be downloaded.
    """
    if name not in SETS:
        raise ValueError(f"name must be one of {', '.join(SETS)}, got {name!r}")
    root, framing = Path(root).expanduser(), framing or Framing()
    sets, kind = _tonic_sets(name, root)
    size = -(-kind.sensor_size[0] // framing.shrink)
    change = Augment(SETS[name][1], shift=size // 16, cutout=size // 8) if augment else None
    folder = root / "frames" if cache is None else Path(cache)
    _remove_old_parts(folder)
    train, test = (
        EventFrames(recordings, indices, name, framing, folder, change if role == 0 else None)
        for role, (recordings, indices) in enumerate(sets)
    )
    return EventData(name, train, test, tuple(kind.classes), size)


def _remove_old_parts(folder: Path) -> None:
    """Remove what processes left that were killed as they wrote; younger ones may be at it still."""
    for part in folder.glob(".*.part"):
        if time.time() - part.lstat().st_mtime > 24 * 3600:
            part.unlink(missing_ok=True)


def _tonic_sets(name: str, root: Path) -> tuple[list[tuple[Dataset, list[int]]], type]:
    """Return training and test recordings with the order of their indices, and Tonic's class."""
    try:
        import tonic
    except ImportError as error:
        raise ImportError("event recordings are read by Tonic: pip install 'lasnn-sj[events]'") from error
    kind = getattr(tonic.datasets, SETS[name][0])
    try:
        if name == "cifar10-dvs":
            recordings = kind(save_to=str(root))
            return _tenths(recordings), kind
        sets = [kind(save_to=str(root), train=train) for train in (True, False)]
    except Exception as error:  # no network, damaged archive, full disk: Tonic raises several kinds
        raise FileNotFoundError(
            f"{name} could not be read from {root / kind.__name__} ({type(error).__name__}: {error}); with a "
            f"network Tonic downloads it there, without one put the archive that Tonic names there"
        ) from error
    return [(recordings, _in_order(recordings)) for recordings in sets], kind


def _in_order(recordings: Dataset) -> list[int]:
    """Sort indices by path, numbers by value; Tonic's own order depends on the file system."""

    def key(index: int) -> list[str | int]:
        path = Path(recordings.data[index]).as_posix()
        return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]

    return sorted(range(len(recordings)), key=key)


def _tenths(recordings: Dataset) -> list[tuple[Dataset, list[int]]]:
    train, test = [], []
    by_label: dict[int, list[int]] = {}
    for index in _in_order(recordings):
        by_label.setdefault(int(recordings.targets[index]), []).append(index)
    for _, indices in sorted(by_label.items()):
        cut = len(indices) - len(indices) // 10
        train += indices[:cut]
        test += indices[cut:]
    return [(recordings, train), (recordings, test)]


def picture(counts: np.ndarray) -> np.ndarray:
    """Convert event counts ``[n, 2, H, W]`` to colours ``[n, H, W, 3]``, uint8: brighter red, darker blue."""
    # the few busiest pixels would leave all others white
    bright = max(float(np.quantile(counts[counts > 0], 0.95)) if counts.any() else 1.0, 1.0)
    off, on = np.clip(counts / bright, 0, 1).swapaxes(0, 1)
    colours = np.stack([1 - off, 1 - np.maximum(on, off), 1 - on], axis=-1)
    return (255 * colours).round().astype(np.uint8)


def draw(
    frames: Tensor | np.ndarray, folder: str | Path, name: str = "events", frame_ms: int = 100
) -> tuple[Path, Path]:
    """Draw a recording: brighter pixels red, darker ones blue, on white.

    Args:
        frames: event counts ``[T, 2, H, W]``.
        folder: folder of the file, created if missing.
        name: of the files, without ending.
        frame_ms: time of each frame of the animation, in milliseconds.

    Returns:
        Paths of the strip of all frames (PNG) and of the animation (GIF).

    Raises:
        ValueError: frames of another shape.
    """
    from PIL import Image

    counts = np.asarray(frames, dtype=np.float64)
    if counts.ndim != 4 or counts.shape[1] != 2 or not counts.size:
        raise ValueError(f"frames must be [T, 2, H, W] with T >= 1, got shape {counts.shape}")
    scale = -(-96 // counts.shape[-1])
    pixels = picture(counts).repeat(scale, axis=1).repeat(scale, axis=2)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    strip, animation = folder / f"{name}.png", folder / f"{name}.gif"
    framed = np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=128)
    rows = [np.concatenate(framed[start : start + 8], axis=1) for start in range(0, len(framed), 8)]
    longest = rows[0].shape[1]
    rows = [np.pad(row, ((0, 0), (0, longest - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    Image.fromarray(np.concatenate(rows)).save(strip)
    first, *others = (Image.fromarray(frame) for frame in pixels)
    first.save(animation, save_all=True, append_images=others, duration=frame_ms, loop=0)
    return strip, animation
