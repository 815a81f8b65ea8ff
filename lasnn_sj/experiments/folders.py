"""Trained students in every folder that this package writes, for evaluation and export."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

from .. import models
from ..analysis.stages import STAGES, place
from ..data import DirectEncoder, PoissonEncoder, events
from ..data import images as data
from ..neurons import accelerate
from ..runtime import distributed
from ..runtime.files import read_json
from ..training.checkpoint import CheckpointError, load_weights
from ..training.evaluation import evaluate
from ..training.run_folder import BEST, WEIGHTS
from . import config, runs
from .pipeline import build_encoder, converts, to_snn
from .recipes import Recipe, ReverseRecipe
from .runner import ABOUT

DEPTH = 4  # levels of folders that are searched for students
BATCH = 100


@dataclass(frozen=True)
class Student:
    """A trained student in a folder.

    Attributes:
        folder: folder of its weights.
        row: name of its stage or row.
        seed: seed of its run, if known.
        sample_shape: channels, height and width of its input at each step.
        load: builds network and encoder on a device.
        test: makes batches of the run's test data.
        device: device of its run.
    """

    folder: Path
    row: str
    seed: int | None
    sample_shape: tuple[int, int, int]
    load: Callable[[str], tuple[nn.Module, nn.Module | None]]
    test: Callable[[], DataLoader]
    device: str = "cpu"

    def evaluate(self, device: str | None = None) -> dict[str, float]:
        """Compute loss and accuracy on the test data, on the device of the run if none is given."""
        device = str(distributed.initialise(torch.device(device or self.device)))
        net, encoder = self.load(device)
        return evaluate(net, self.test(), encoder, device=device)


def students(
    folder: str | Path, rows: Sequence[str] = (), source: str | None = None, root: str | Path = "data"
) -> list[Student]:
    """Find the trained students of a folder that this package wrote.

    Args:
        folder: folder of ``lasnn-sj train``, ``compare`` or ``reproduce``, of a ``Pipeline`` (such as the
            quickstart's) or ``ReversePipeline``, of a trainer (its ``run_dir``), or of ``save_pretrained``.
        rows: only these rows.
        source: data set or .npz file, if the folder does not name it.
        root: folder of the data sets.

    Raises:
        ConfigError: there is no such student; the message lists those found, or what is unknown.
        FileNotFoundError: the folder or a row does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the run_dir of a run")
    if (folder / runs.FILE).is_file():
        return _of_experiment(folder, rows)
    seed = re.fullmatch(r"seed(\d+)", folder.name)
    if seed and (folder.parent / runs.FILE).is_file():
        return [one for one in _of_experiment(folder.parent, rows) if one.seed == int(seed[1])]
    if (folder / "config.json").is_file():
        return [_pretrained(folder, source, Path(root))]
    found = [one for inner in _run_folders(folder, DEPTH) for one in _of_runner(inner, source, Path(root))]
    chosen = [one for one in found if not rows or one.row in rows]
    if chosen:
        return chosen
    if found:
        listed = ", ".join(dict.fromkeys(one.row for one in found))
        raise FileNotFoundError(f"{folder} has no finished {', '.join(rows)}; it has {listed}")
    if (folder / "settings.json").is_file():
        return _of_trainer(folder, rows, source, Path(root))
    raise config.ConfigError(
        f"{folder} has no finished student: no {runs.FILE}, no {ABOUT} down to {DEPTH} levels, no config.json"
    )


def _run_folders(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / ABOUT).is_file():
        yield folder
    elif depth:
        for inner in sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()):
            yield from _run_folders(inner, depth - 1)


def _of_experiment(folder: Path, rows: Sequence[str]) -> list[Student]:
    run, seeds = runs.open_folder(folder)
    found = []
    for seed in seeds:
        for row in rows or run.students:
            where = folder / f"seed{seed}"

            def load(device: str, seed: int = seed, row: str = row) -> tuple[nn.Module, nn.Module | None]:
                there = dataclasses.replace(run, device=device)
                return there.student(seed, row), there._encoder(seed)

            run.must_be_finished(seed, row)
            test = partial(_test_of, run)
            found.append(Student(where, row, seed, run.sample_shape, load, test, run.device))
    return found


def _test_of(run: runs.Experiment) -> DataLoader:
    return run.data.test_loader(run.recipe.batch, run.recipe.workers)


def _of_runner(folder: Path, source: str | None, root: Path) -> list[Student]:
    """Yield the finished students of a ``Pipeline`` or ``ReversePipeline``."""
    about, there = read_json(folder / ABOUT), read_json(folder / "recipe.json")
    if about is None or there is None:
        raise config.ConfigError(f"{folder / ABOUT} or recipe.json beside it is damaged")
    about = there | about
    reverse = about["kind"] == "ReversePipeline"
    recipe = _recipe(ReverseRecipe if reverse else Recipe, there)
    shape = (about["in_channels"], about["image_size"], about["image_size"])
    load, found = (_load_reverse if reverse else _load_lasnn), []
    inside = [path.parent for path in folder.glob("*/result.json")]
    for stage in sorted(inside, key=lambda path: place(path.name)):
        if (stage / "weights.safetensors").is_file() and _leaves_snn(stage.name):
            row = stage.name.replace("_", " ") if reverse else stage.name
            test = partial(_test_images, about, folder, source, root, recipe.batch)
            one = partial(load, folder, stage.name, recipe, about)
            found.append(Student(stage, row, recipe.seed, shape, one, test))
    return found


def _leaves_snn(stage: str) -> bool:
    return stage not in STAGES or STAGES[stage].leaves == "snn"


def _recipe(kind: type, there: dict) -> Recipe | ReverseRecipe:
    known = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in there.items() if name in known})


def _load_lasnn(
    folder: Path, stage: str, recipe: Recipe, about: dict, device: str
) -> tuple[nn.Module, nn.Module]:
    build = getattr(models, recipe.student)
    size = (about["num_classes"], about["in_channels"], about["image_size"], recipe.width)
    if converts(recipe.student):
        snn = to_snn(build(*size, spiking=False), recipe)
    else:
        snn = accelerate(build(*size))
    snn = load_weights(folder / stage / "weights.safetensors", snn).to(device)
    return snn, build_encoder(recipe, device)


def _load_reverse(
    folder: Path, stage: str, recipe: ReverseRecipe, about: dict, device: str
) -> tuple[nn.Module, nn.Module | None]:
    build = getattr(models, recipe.student)
    net = build(about["num_classes"], about["in_channels"], about["image_size"], recipe.width)
    net = load_weights(folder / stage / "weights.safetensors", accelerate(net)).to(device)
    return net, _encoder(about["encoder"])


def _of_trainer(folder: Path, rows: Sequence[str], source: str | None, root: Path) -> list[Student]:
    """Find the last and the best weights of a trainer's run folder."""
    settings = read_json(folder / "settings.json") or {}
    built = settings.get("architecture")
    if not built:
        raise config.ConfigError(
            f"{folder} holds {settings.get('student', 'a network')}, which no function of lasnn_sj.models "
            f"built; in Python, lasnn_sj.training.load_weights(FILE, student) gives a network its weights"
        )
    files = {"last": folder / WEIGHTS, "best": folder / BEST}
    there = {row: file for row, file in files.items() if file.is_file()}
    if not there:
        raise config.ConfigError(f"{folder} has no {WEIGHTS}: its training is not finished")
    missing = [row for row in rows if row not in there]
    if missing:
        raise FileNotFoundError(f"{folder} has no {', '.join(missing)}; it has {', '.join(there)}")

    def load(file: Path, device: str) -> tuple[nn.Module, nn.Module | None]:
        net = models.create(built["name"], **built["arguments"])
        try:
            load_weights(file, net)
        except CheckpointError:  # its neurons may have been replaced by ours
            load_weights(file, accelerate(net))
        return net.to(device), _encoder(settings["encoder"])

    shape = _sample_shape(built["arguments"])
    test = partial(_named_images, folder, source, root, built["arguments"])
    return [
        Student(folder, row, settings.get("seed"), shape, partial(load, file), test)
        for row, file in there.items() if row in (rows or there)
    ]  # fmt: skip


def _encoder(text: str) -> nn.Module | None:
    """Return the encoder of a run; none for event frames and ANNs."""
    if text == "None":
        return None
    found = re.fullmatch(r"(Direct|Poisson)Encoder\(T=(\d+)\)", text)
    if found is None:
        raise config.ConfigError(f"the encoder {text!r} cannot be built from its description")
    return {"Direct": DirectEncoder, "Poisson": PoissonEncoder}[found[1]](int(found[2]))


def _test_images(about: dict, folder: Path, source: str | None, root: Path, batch: int) -> DataLoader:
    name, frames = source or about["data"], read_json(folder / "frames.json")
    if frames is not None:
        frames.pop("augment", None)
        return events.load(name, root, events.Framing(**frames), augment=False).test_loader(batch)
    return _load_images(name, root, about["num_classes"], about["image_size"], about["test"]).test_loader(
        batch
    )


def _load_images(name: str, root: Path, classes: int, size: int, test: int | None) -> data.ImageData:
    file = root / f"{name}.npz"
    try:
        loaded = data.load(file if file.is_file() else name, root, download=False)
        if size < loaded.image_size:
            shrink = loaded.image_size // size
            loaded = data.load(file if file.is_file() else name, root, download=False, shrink=shrink)
    except ValueError as error:
        raise config.ConfigError(
            f"the run's data set is {name!r}; give its location by --source ({error})"
        ) from error
    if classes < loaded.num_classes:
        loaded = loaded.first_classes(classes)
    return loaded.subset(test=None if test is None else min(test, len(loaded.test)))


def _pretrained(folder: Path, source: str | None, root: Path) -> Student:
    def load(device: str) -> tuple[nn.Module, nn.Module | None]:
        net, encoder = models.from_pretrained(folder)
        return net.to(device), encoder

    built = load("cpu")[0].pretrained_config["architecture"]["arguments"]
    test = partial(_named_images, folder, source, root, built)
    return Student(folder, folder.name, None, _sample_shape(built), load, test)


def _named_images(folder: Path, source: str | None, root: Path, built: dict) -> DataLoader:
    """Test batches of a data set that the folder does not name."""
    if source is None:
        raise config.ConfigError(f"{folder} does not name its training data; give --source, such as digits")
    return _load_images(source, root, built["num_classes"], _sample_shape(built)[1], None).test_loader(BATCH)


def _sample_shape(built: dict) -> tuple[int, int, int]:
    size = built.get("image_size", 32)
    return (built.get("in_channels", 3), size, size)
