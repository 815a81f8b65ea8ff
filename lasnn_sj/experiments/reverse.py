"""Reverse distillation from one description: rows of the paper's Tables 1 and 2, each skipped when done."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader

from .. import models
from ..analysis import inspection
from ..conversion.pruning import prune_magnitude
from ..data.encoding import PoissonEncoder
from ..data.events import EventFrames
from ..distillation import CrossEntropy, DefaultKD, Objective, SparseKD
from ..neurons import accelerate
from ..runtime import distributed, files, random_state
from ..runtime.cost import Cost
from ..runtime.files import check_settings
from ..runtime.locks import FolderLock
from ..training.checkpoint import CheckpointError, load_weights, save_weights
from ..training.evaluation import evaluate
from ..training.trainer import Trainer

log = logging.getLogger(__name__)

Result = Mapping[str, float]


class Data(Protocol):
    """What a study wants of :class:`~lasnn_sj.data.ImageData` or :class:`~lasnn_sj.data.EventData`."""

    name: str
    num_classes: int
    in_channels: int
    image_size: int
    train: Sequence
    test: Sequence
    validation: Sequence | None

    def loaders(self, batch_size: int, workers: int = 0, seed: int = 0) -> tuple[DataLoader, DataLoader]: ...

    def test_loader(self, batch_size: int, workers: int = 0) -> DataLoader: ...


@dataclass(frozen=True)
class Recipe:
    """How the student is trained, alone and with each teacher; the paper's CIFAR-100 is the default.

    The paper gives neither optimiser nor temperatures and weights; those are ours (Yuan et al.'s for the
    virtual teacher).

    Attributes:
        student: network of :mod:`lasnn_sj.models`; teachers are pruned copies of it.
        width: factor of its channels.
        epochs: of every training.
        batch: samples of a training step.
        lr: learning rate, with a cosine to 0 over the epochs.
        weight_decay: of every training.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adam"``.
        ratios: sparse-KD with teachers pruned this far; 0 is plain self-distillation.
        scope: ``"global"`` or ``"layer"``, what is ranked together when a teacher is pruned.
        temperature: of sparse-KD's softening.
        alpha: weight of sparse-KD's distillation, in [0, 1].
        default: whether there is a row of teacher-default KD.
        default_probability: the virtual teacher's, of the true class, above 1 / K.
        default_temperature: of the virtual teacher's softening.
        default_alpha: weight of teacher-default KD's distillation, in [0, 1].
        default_soften: ``"probability"`` or ``"log"``, what of the virtual teacher is softened.
        validate_every: epochs between evaluations on the validation samples.
        seed: of weights, order of the samples and random codes; the same for every row.
        workers: processes that load samples.
    """

    student: Literal["spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16"] = "spiking_resnet18"
    width: float = 1.0
    epochs: int = 200
    batch: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    ratios: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7)
    scope: Literal["global", "layer"] = "global"
    temperature: float = 4.0
    alpha: float = 0.5
    default: bool = True
    default_probability: float = 0.99
    default_temperature: float = 20.0
    default_alpha: float = 0.1
    default_soften: Literal["probability", "log"] = "probability"
    validate_every: int = 1
    seed: int = 0
    workers: int = 0


class Study:
    """A student trained alone, then once with each teacher, in a run folder.

    The network trained alone is the one that is pruned to be the others' teacher. Every row begins from
    the same weights and sees the samples in the same order. Accuracy is that of the last epoch.

    Args:
        recipe: the description.
        data: images or event frames. Where some are held out, every training evaluates them as it goes;
            test samples are evaluated once, at the end of a row.
        run_dir: each row has a folder here with its checkpoints, curves and ``result.json``; a row whose
            result is there is not run again, a row that was cut off goes on.
        encoder: gives images their time axis; ``None`` for event frames. A generator that it has is seeded
            with the recipe's seed before each row.
        device: where to run.

    Raises:
        ValueError: the folder holds a study of another recipe, data set or way of making frames; the message
            lists what differs.
        RuntimeError: several processes under torchrun.

    A row that another process works at in the same folder raises a ``LockError``.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        run_dir: str | Path,
        encoder: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        distributed.refuse("Study")
        self.recipe, self.data, self.encoder = recipe, data, encoder
        self.run_dir, self.device = Path(run_dir), torch.device(device)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.run_dir)
        what = {"data": data.name, "train": len(data.train), "test": len(data.test), "encoder": repr(encoder)}
        what["validation"] = 0 if data.validation is None else len(data.validation)
        described = {key: value for key, value in asdict(recipe).items() if key not in ("ratios", "default")}
        check_settings(self.run_dir / "recipe.json", described | what)
        if isinstance(data.train, EventFrames):
            augment = data.train.augment and asdict(data.train.augment)
            check_settings(self.run_dir / "frames.json", asdict(data.train.framing) | {"augment": augment})

    def run(self) -> dict[str, Result]:
        """Results by row: ``"alone"``, ``"sparse 0.1"``, ..., ``"default"``.

        Each has ``top1`` in percent, ``loss``, ``samples``, ``top1_over_time`` (after 1, 2, ..., ``T``
        steps), ``spikes_per_neuron``, ``seconds`` (of the process that finished it), ``seconds_per_epoch``,
        ``peak_memory_mib``, and for sparse-KD ``teacher_top1``.
        """
        results = {"alone": self._row("alone", CrossEntropy())}
        for ratio in self.recipe.ratios:
            results[f"sparse {ratio:g}"] = self._sparse(ratio)
        if self.recipe.default:
            r = self.recipe
            objective = DefaultKD(
                r.default_probability, r.default_temperature, r.default_alpha, r.default_soften
            )
            results["default"] = self._row("default", objective)
        return results

    def student(self, row: str) -> nn.Module:
        """The trained network of a row."""
        net = self._build()
        path = self._folder(row) / "weights.safetensors"
        try:
            return load_weights(path, net)
        except CheckpointError as error:
            if row != "alone":  # this one can be run again here
                raise CheckpointError(f"{error}; remove {path.parent} to run that row again") from error
            log.warning("%s; the row %s is run again", error, row)
        (path.parent / "result.json").unlink(missing_ok=True)
        self._row(row, CrossEntropy())
        return load_weights(path, net)

    def _sparse(self, ratio: float) -> Result:
        row = f"sparse {ratio:g}"
        result = self._done(row)
        if result is not None:
            return result
        teacher = prune_magnitude(self.student("alone"), ratio, self.recipe.scope)
        test = self.data.test_loader(self.recipe.batch, self.recipe.workers)
        accuracy = evaluate(teacher, test, self.encoder, device=self.device)["top1"]
        return self._row(row, SparseKD(teacher, self.recipe.temperature, self.recipe.alpha), accuracy)

    def _row(self, row: str, objective: Objective, teacher_top1: float | None = None) -> Result:
        folder = self._folder(row)
        path = folder / "result.json"
        result = self._done(row)
        if result is not None:
            return result
        with self._lock:
            log.info("%s: %s", folder, objective)
            with Cost(self.device) as cost:
                result = self._train(folder, objective)
            result |= {"seconds": cost.seconds, "peak_memory_mib": cost.peak_memory_mib}
            if teacher_top1 is not None:
                result["teacher_top1"] = teacher_top1
            files.write_json(path, result)
        return result

    def _done(self, row: str) -> Result | None:
        folder = self._folder(row)
        files.inside(self.run_dir, folder.name)
        return files.read_json(folder / "result.json")

    def _train(self, folder: Path, objective: Objective) -> Result:
        r, net = self.recipe, self._build()
        train, held = self.data.loaders(r.batch, r.workers, seed=r.seed)
        if r.optimizer == "sgd":
            optimizer = SGD(net.parameters(), lr=r.lr, momentum=0.9, weight_decay=r.weight_decay)
        else:
            optimizer = Adam(net.parameters(), lr=r.lr, weight_decay=r.weight_decay)
        trainer = Trainer(
            net,
            objective,
            encoder=self.encoder,
            optimizer=optimizer,
            scheduler=CosineAnnealingLR(optimizer, r.epochs),
            run_dir=folder,
            device=self.device,
            seed=r.seed,
        )
        validation = None if self.data.validation is None else held
        history = trainer.fit(train, validation, r.epochs, r.validate_every)
        save_weights(folder / "weights.safetensors", net)
        per_epoch = statistics.median(row["seconds"] for row in history)
        return inspection.results(inspection.inspect(trainer, self.data.test_loader(r.batch, r.workers))) | {
            "seconds_per_epoch": per_epoch
        }

    def _folder(self, row: str) -> Path:
        return self.run_dir / row.replace(" ", "_")

    def _build(self) -> nn.Module:
        random_state.seed_everything(self.recipe.seed)
        for module in self.encoder.modules() if self.encoder is not None else ():
            if isinstance(module, PoissonEncoder) and module.generator is not None:
                module.generator.manual_seed(self.recipe.seed)  # or a row would go on where another ended
        build = getattr(models, self.recipe.student)
        d = self.data
        net = build(d.num_classes, d.in_channels, d.image_size, self.recipe.width)
        # a quarter less time on a CPU; the neurons take the layout as it is
        return accelerate(net).to(self.device, memory_format=torch.channels_last)


def title(row: str) -> str:
    """A row's name as the tables have it."""
    kind, _, ratio = row.partition(" ")
    if kind == "sparse":
        return f"sparse-KD, teacher pruned {ratio}" if float(ratio) else "self-KD (teacher not pruned)"
    return {"alone": "student alone", "default": "teacher-default KD"}[kind]


def table(runs: Sequence[Mapping[str, Result]]) -> str:
    """Markdown table of one study, or of several seeds as mean and sample standard deviation.

    The last column is the gain over the student alone, seed by seed.
    """
    of = "" if len(runs) == 1 else f", mean ± deviation of {len(runs)} seeds"
    rows = [("", "teacher top-1 %", f"student top-1 %{of}", "gain", "seconds")]
    for row in runs[0]:
        teacher = [run[row].get("teacher_top1") for run in runs]
        rows.append((
            title(row),
            "" if None in teacher else _spread(teacher),
            _spread([run[row]["top1"] for run in runs]),
            "" if row == "alone" else _spread([run[row]["top1"] - run["alone"]["top1"] for run in runs], "+"),
            f"{statistics.mean(run[row]['seconds'] for run in runs):.0f}",
        ))  # fmt: skip
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(cells, widths)) + " |" for cells in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _spread(values: Sequence[float], sign: str = "") -> str:
    mean = f"{statistics.mean(values):{sign}.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def write_csv(path: str | Path, runs: Mapping[int, Mapping[str, Result]]) -> None:
    """One line for each seed and row of several studies, ``runs`` by seed."""
    columns = ("seed", "row", "teacher_top1", "top1", "loss", "samples", "seconds")
    lines = [
        (seed, row, *(result.get(name) for name in columns[2:]))
        for seed, results in runs.items()
        for row, result in results.items()
    ]
    files.write_csv(Path(path), [columns, *lines])
