"""Runs described by a configuration: a recipe, its data, some seeds, one table."""

from __future__ import annotations

import dataclasses
import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import nn

from .. import models
from ..analysis.stages import STAGES
from ..data import events
from ..data import images as data
from ..data.encoding import DirectEncoder
from ..data.images import ImageData
from ..neurons import disable_malloc_trim
from ..runtime import distributed, files
from . import config, pipeline, reverse
from .recipes import Recipe, ReverseRecipe

FILE = "config.yaml"
CONFIGS = Path(__file__).parent / "configs"  # of the package
FRACTION = ("lie in [0, 1]", lambda n: 0 <= n <= 1)
# What would else be refused hours later, by the stage that needs it: names of numbers, bounds, test.
LIMITS = {
    name: (words, fits)
    for names, words, fits in (
        ("seeds workers alpha weight_decay validation_images", "be at least 0", lambda n: n >= 0),
        ("T epochs batch teacher_epochs teacher_batch ann_epochs ann_batch validate_every calibration_images "
         "calibration_steps classes per_class shrink train_images test_images judged_images processes",
         "be at least 1", lambda n: n >= 1),
        ("width teacher_width lr teacher_lr ann_lr gamma threshold_scale temperature default_temperature",
         "be above 0", lambda n: n > 0),
        ("dropout classifier_dropout ratios", "lie in [0, 1)", lambda n: 0 <= n < 1),
        ("leak default_probability default_alpha", *FRACTION),
        ("threshold_statistic", 'be "max" or lie in (0, 100]', lambda n: 0 < n <= 100),
    )
    for name in names.split()
}  # fmt: skip
LASNN_STUDENTS = ("conv3_linear2", "vgg5", "vgg7", "vgg9", "vgg16", "resnet12", "resnet20")


@dataclass(frozen=True, kw_only=True)
class Experiment(ABC):
    """A recipe over some seeds; ``run_dir/seed0``, ... hold the parts, ``run_dir/table.md`` the table.

    Attributes:
        seeds: one run of all rows each.
        run_dir: folder of the results, curves, checkpoints and tables.
        validation_images: training images (recordings) held out and evaluated after each epoch, the same
            number of each class; a tenth if not given, and with 0 none, which trains on all as the papers
            do. Test images are evaluated once, at the end.
        device: "cpu", "cuda", "cuda:1", ...
    """

    method: ClassVar[str]
    limits: ClassVar[Mapping[str, tuple]] = LIMITS

    seeds: tuple[int, ...] = (0,)
    run_dir: Path = Path("runs/unnamed")
    validation_images: int | None = None
    device: str = "cpu"

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError("seeds must hold at least one number, got none")
        if self.recipe.seed:
            raise ValueError(f"recipe.seed is set from seeds; give seeds: [{self.recipe.seed}] instead")
        for prefix, described in (("", self), ("recipe.", self.recipe)):
            for field in dataclasses.fields(described):
                self._check_numbers(prefix + field.name, getattr(described, field.name))

    @functools.cached_property
    def data(self) -> ImageData | events.EventData:
        """The data set with its validation part, loaded at first use."""
        return self._limit(hold_out(distributed.main_first(self._load), self.validation_images))

    def run(self) -> dict[int, Mapping[str, Mapping[str, float]]]:
        """Run all rows of all seeds; print and write the table after each seed.

        An interrupted run resumes, and finished rows are not run again.

        Returns:
            Results by seed and row.

        Raises:
            ValueError: the folder holds a run with other settings, or the device does not exist.
        """
        self._check_device()
        if self.device == "cpu":
            disable_malloc_trim()  # mapping new memory for every large tensor takes longer than filling it
        parts = {seed: self.part(seed) for seed in self.seeds}  # raises if the folder belongs to another run
        described = {"method": self.method} | config.plain(self)
        distributed.by_main(lambda: config.write(self.run_dir / FILE, described))
        results = {}
        for seed, part in parts.items():
            results[seed] = self._run_part(part)
            distributed.by_main(lambda: self._publish(results))
        return results

    def _publish(self, results: Mapping[int, Mapping]) -> None:
        """Write and print the table."""
        text = self._table(results)
        files.write(self.run_dir / "table.md", text + "\n")
        print(f"\n{self.title()}\n{text}")

    def student(self, seed: int, row: str) -> nn.Module:
        """Load the trained student of a row.

        Raises:
            FileNotFoundError: the row is not finished; the message lists the finished rows.
            ValueError: the device does not exist.
        """
        self._check_device()
        self.must_be_finished(seed, row)
        return self.part(seed).student(row)

    def must_be_finished(self, seed: int, row: str) -> None:
        """Raise :class:`FileNotFoundError` if a row has no trained student."""
        done = self.finished(seed)
        if row not in done:
            what = "keeps no network of" if self._row(row.replace(" ", "_")) is None else "has no finished"
            raise FileNotFoundError(
                f"{self.run_dir} {what} {row!r} of seed {seed}; finished are {', '.join(done) or 'none'}"
                + ("" if what.startswith("keeps") else ". Train again to finish what is missing")
            )

    def finished(self, seed: int) -> list[str]:
        """Return the rows of a seed that have a trained spiking network and its result."""
        folders = sorted(path.parent for path in (self.run_dir / f"seed{seed}").glob("*/result.json"))
        rows = (self._row(f.name) for f in folders if (f / "weights.safetensors").exists())
        return [row for row in rows if row is not None]

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of what the student is given at each step."""
        return (self.data.in_channels, self.data.image_size, self.data.image_size)

    @property
    @abstractmethod
    def students(self) -> list[str]:
        """Rows whose trained students the run is about."""

    @abstractmethod
    def part(self, seed: int) -> pipeline.Pipeline | reverse.ReversePipeline:
        """Build the pipeline of one seed."""

    @abstractmethod
    def title(self) -> str:
        """Return the heading of the table."""

    @abstractmethod
    def _load(self) -> ImageData | events.EventData:
        """Load the whole data set."""

    def _limit(self, loaded: ImageData | events.EventData) -> ImageData | events.EventData:
        """Select the part of the data set that the run uses."""
        return loaded

    @abstractmethod
    def _encoder(self, seed: int) -> nn.Module | None: ...

    def _table(self, results: Mapping[int, Mapping]) -> str:
        raise NotImplementedError

    @abstractmethod
    def _row(self, folder: str) -> str | None:
        """Return the row whose folder has this name; ``None`` if the folder holds no student."""

    def _run_part(self, part: pipeline.Pipeline | reverse.ReversePipeline) -> Mapping:
        return part.run()

    def _check_numbers(self, key: str, given: object) -> None:
        words, fits = self.limits.get(key.removeprefix("recipe."), ("", None))
        for number in given if isinstance(given, tuple) else (given,):
            if fits and isinstance(number, (int, float)) and not fits(number):
                raise ValueError(f"{key} must {words}, got {number}")

    def _check_device(self) -> None:
        try:
            device = torch.device(self.device)
        except RuntimeError as error:
            raise ValueError(f"device must be such as cpu, cuda or cuda:1, got {self.device!r}") from error
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {self.device}, but PyTorch sees no CUDA device; give device cpu")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            last = torch.cuda.device_count() - 1
            raise ValueError(f"device is {self.device}, but the CUDA devices are cuda:0 to cuda:{last}")
        distributed.initialise(device)


@dataclass(frozen=True, kw_only=True)
class LaSNN(Experiment):
    """LaSNN on images: teacher, intermediate ANN, conversion, training without and with the teacher.

    Attributes:
        recipe: networks and settings; its seed is replaced by each of ``seeds``.
        stages: rows of the table; baselines beyond these are ``"label_kd"`` and ``"calibrated"``.
        source: "cifar10", "cifar100", "tiny-imagenet", "digits", or an .npz file.
        root: folder of the downloaded data set.
        train_images: how many of the training images, validation images aside; all if not given.
        test_images: how many of the test images, all if not given.
        teacher_checkpoint: file of a trained ResNet-20 (the one of pytorch_resnet_cifar10) that takes the
            place of stage 1.
    """

    method: ClassVar[str] = "lasnn"

    recipe: Recipe
    stages: tuple[str, ...] = pipeline.DEFAULT
    source: str = "cifar10"
    root: Path = Path("data")
    train_images: int | None = None
    test_images: int | None = None
    teacher_checkpoint: Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, given, known in (
            ("recipe.student", (self.recipe.student,), LASNN_STUDENTS),
            # spike_kd needs an SNN that teaches, which only Python can give
            ("stages", self.stages, tuple(name for name, stage in STAGES.items() if stage.teacher != "snn")),
        ):
            for name in given:
                if name not in known:
                    raise ValueError(f"{key}: unknown name {name!r}{config.nearest(name, known)}")

    @property
    def students(self) -> list[str]:
        return [stage for stage in self.stages if STAGES[stage].leaves == "snn"][-1:] or ["lasnn"]

    def part(self, seed: int) -> pipeline.Pipeline:
        path = self.teacher_checkpoint
        if path is not None and not path.is_file():
            raise ValueError(f"teacher_checkpoint: {path} does not exist")
        teacher = None if path is None else models.published_resnet20(path)
        recipe = dataclasses.replace(self.recipe, seed=seed)
        folder = self.run_dir / f"seed{seed}"
        return pipeline.Pipeline(recipe, self.data, folder, teacher=teacher, device=self.device)

    def title(self) -> str:
        return f"{self.recipe.student}, width {self.recipe.width}, {len(self.data.train)} training images"

    def _load(self) -> ImageData:
        return data.load(self.source, self.root)

    def _limit(self, loaded: ImageData) -> ImageData:
        return loaded.subset(self.train_images, self.test_images)

    def _encoder(self, seed: int) -> nn.Module:
        return self.part(seed).encoder()

    def _run_part(self, part: pipeline.Pipeline) -> Mapping:
        return part.run(self.stages)

    def _table(self, results: Mapping[int, Mapping]) -> str:
        return pipeline.table(self.recipe, list(results.values()))

    def _row(self, folder: str) -> str | None:
        return folder if folder in STAGES and STAGES[folder].leaves == "snn" else None


class _Reverse(Experiment):
    """Base class of reverse distillation on images and on event frames."""

    limits: ClassVar[Mapping[str, tuple]] = LIMITS | {"alpha": FRACTION}

    @property
    def students(self) -> list[str]:
        sparse = [f"sparse {ratio:g}" for ratio in self.recipe.ratios]
        return ["alone", *sparse, *(["default"] if self.recipe.default else [])]

    def _table(self, results: Mapping[int, Mapping]) -> str:
        reverse.write_csv(self.run_dir / "table.csv", results)
        return reverse.table(list(results.values()))

    def _row(self, folder: str) -> str | None:
        return folder.replace("_", " ")


@dataclass(frozen=True, kw_only=True)
class ReverseOnImages(_Reverse):
    """Reverse distillation on images: the student alone, and with each teacher.

    Attributes:
        recipe: settings; its seed is replaced by each of ``seeds``.
        T: time steps.
        source: "cifar100", "cifar10", "tiny-imagenet", "digits", or an .npz file.
        root: folder of the downloaded data set.
        classes: number of classes, the first ones; all if not given.
        per_class: training images of each class, all if not given.
        shrink: replace squares with this side, in pixels, by their mean (VGG16 needs 32x32
            images); 1 for none.
    """

    method: ClassVar[str] = "reverse"

    recipe: ReverseRecipe
    T: int = 4
    source: str = "cifar100"
    root: Path = Path("data")
    classes: int | None = None
    per_class: int | None = None
    shrink: int = 1

    def part(self, seed: int) -> reverse.ReversePipeline:
        recipe = dataclasses.replace(self.recipe, seed=seed)
        return reverse.ReversePipeline(
            recipe, self.data, self.run_dir / f"seed{seed}", self._encoder(seed), self.device
        )

    def title(self) -> str:
        r, d = self.recipe, self.data
        return (
            f"{r.student}, width {r.width}, T = {self.T}, {d.num_classes} classes, {len(d.train)} "
            f"training and {len(d.test)} test images of {d.image_size}x{d.image_size}, {r.epochs} epochs"
        )

    def _load(self) -> ImageData:
        return data.load(self.source, self.root, shrink=self.shrink)

    def _limit(self, loaded: ImageData) -> ImageData:
        if self.classes is not None or self.per_class is not None:
            loaded = loaded.first_classes(self.classes or loaded.num_classes, self.per_class)
        return loaded

    def _encoder(self, seed: int) -> nn.Module:
        return DirectEncoder(self.T)


@dataclass(frozen=True, kw_only=True)
class ReverseOnEvents(_Reverse):
    """Reverse distillation on event recordings: the student alone, and with each teacher.

    Attributes:
        recipe: network and settings; its seed is replaced by each of ``seeds``.
        framing: how recordings become frames; its T is the network's.
        source: "dvs-gesture", "n-mnist" or "cifar10-dvs".
        root: folder with DVSGesture, NMNIST or CIFAR10DVS in it.
        cache: folder of the cached frames, ``root/frames`` if not given.
        augment: flip (with the labels it changes), shift and cutout in training.
    """

    method: ClassVar[str] = "reverse-events"

    recipe: ReverseRecipe
    framing: events.Framing = events.Framing()
    source: Literal["dvs-gesture", "n-mnist", "cifar10-dvs"] = "dvs-gesture"
    root: Path = Path("data")
    cache: Path | None = None
    augment: bool = True

    def part(self, seed: int) -> reverse.ReversePipeline:
        recipe = dataclasses.replace(self.recipe, seed=seed)
        return reverse.ReversePipeline(recipe, self.data, self.run_dir / f"seed{seed}", device=self.device)

    def title(self) -> str:
        r, d = self.recipe, self.data
        return (
            f"{r.student}, width {r.width}, T = {self.framing.T}, {len(d.train)} training and {len(d.test)} "
            f"test recordings (one is {100 / len(d.test):.2f} points), frames of "
            f"{d.image_size}x{d.image_size}, {r.epochs} epochs"
        )

    def _load(self) -> events.EventData:
        return events.load(self.source, self.root, self.framing, self.augment, self.cache)

    def _encoder(self, seed: int) -> None:
        return None


def methods() -> dict[str, type[Experiment]]:
    """Return the kinds of runs by the ``method`` of a YAML file."""
    from .compare import Comparison

    return {kind.method: kind for kind in (LaSNN, ReverseOnImages, ReverseOnEvents, Comparison)}


def hold_out(loaded: ImageData | events.EventData, held_out: int | None) -> ImageData | events.EventData:
    """Hold out validation samples of a data set, a tenth of the training samples for ``None``."""
    held_out = len(loaded.train) // 10 if held_out is None else held_out
    return loaded.split(held_out) if held_out else loaded


def read(path: str | Path) -> Experiment:
    """Read the run that a YAML file describes; ``method`` is one of :func:`methods`.

    Args:
        path: the file, or the name of one of the package's configurations.

    Raises:
        ConfigError: the file cannot be read, or a key or value in it is wrong; the message names it.
    """
    path = Path(path)
    if not path.is_file() and (CONFIGS / f"{path.stem}.yaml").is_file():
        path = CONFIGS / f"{path.stem}.yaml"
    mapping = config.read(path)
    method = mapping.pop("method", None)
    known = methods()
    if method not in known:
        given = "no method" if method is None else f"unknown method {method!r}"
        raise config.ConfigError(f"{path}: {given}{config.nearest(str(method), list(known))}")
    return config.build(known[method], mapping, str(path))


def open_folder(run_dir: str | Path) -> tuple[Experiment, list[int]]:
    """Read the run of a folder, and the seeds that have a folder in it.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder = Path(run_dir)
    if not (folder / FILE).is_file():
        raise config.ConfigError(
            f"{folder} has no {FILE}; give the folder (run_dir) of a run of the command line or the examples"
        )
    named = (re.fullmatch(r"seed([0-9]{1,18})", path.name) for path in folder.iterdir())
    seeds = sorted(int(found[1]) for found in named if found)
    if not seeds:
        raise config.ConfigError(f"{folder} has no seed's folder; train again")
    return dataclasses.replace(read(folder / FILE), run_dir=folder), seeds
