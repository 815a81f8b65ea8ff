"""Reverse distillation from one description: rows of the paper's Tables 1 and 2, each skipped when done."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import CosineAnnealingLR

from .. import models
from ..analysis import inspection
from ..analysis.stages import title
from ..conversion.pruning import prune_magnitude
from ..data.encoding import PoissonEncoder
from ..data.events import EventFrames
from ..distillation import CrossEntropy, DefaultKD, Objective, SparseKD
from ..neurons import accelerate
from ..runtime import distributed, files, random_state
from ..training.checkpoint import CheckpointError
from ..training.evaluation import evaluate
from ..training.options import TrainingOptions
from ..training.trainer import Trainer
from . import text
from .recipes import ReverseRecipe
from .runner import Data, Runner, folder_name

log = logging.getLogger(__name__)

Result = Mapping[str, float]


class ReversePipeline(Runner):
    """A student trained alone, then once with each teacher, in a run folder.

    The network trained alone is the one that is pruned to be the others' teacher. Every row begins from
    the same weights and sees the samples in the same order. Accuracy is that of the last epoch.

    Args:
        recipe: the description.
        data: images or event frames. Where some are held out, every training evaluates them as it goes;
            test samples are evaluated once, at the end of a row.
        run_dir: each row has a folder here with its checkpoints, curves and ``result.json``; a row whose
            result exists is not run again; an interrupted row resumes.
        encoder: gives images their time axis; ``None`` for event frames. A generator that it has is seeded
            with the recipe's seed before each row.
        device: where to run.

    Raises:
        ValueError: the folder holds a run of another recipe, data set or way of making frames; the message
            lists what differs. Or torchrun started a number of processes that does not divide the batch.

    A row that another process works at in the same folder raises a ``LockError``.
    """

    def __init__(
        self,
        recipe: ReverseRecipe,
        data: Data,
        run_dir: str | Path,
        encoder: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        what = {"data": data.name, "train": len(data.train), "test": len(data.test), "encoder": repr(encoder)}
        what["validation"] = 0 if data.validation is None else len(data.validation)
        described = {key: value for key, value in asdict(recipe).items() if key not in ("ratios", "default")}
        frames = None
        if isinstance(data.train, EventFrames):
            augment = data.train.augment and asdict(data.train.augment)
            frames = asdict(data.train.framing) | {"augment": augment}
        super().__init__(recipe, data, run_dir, device, described | what, frames)
        self.encoder = encoder

    def run(self) -> dict[str, Result]:
        """Run the rows and return results by row: ``"alone"``, ``"sparse 0.1"``, ..., ``"default"``.

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
        """Load the trained network of a row."""
        net = self._build()
        path = self.run_dir / folder_name(row) / "weights.safetensors"
        error = self._fill(net, path)
        if error is not None and row != "alone":
            raise CheckpointError(f"{error}; remove {path.parent} to run that row again") from error
        if error is not None:  # this one can be run again here
            log.warning("%s; the row %s is run again", error, row)
            distributed.by_main(lambda: (path.parent / "result.json").unlink(missing_ok=True))
            self._row(row, CrossEntropy())
            error = self._fill(net, path)
        if error is not None:
            raise error
        return net

    def _sparse(self, ratio: float) -> Result:
        r, row = self.recipe, f"sparse {ratio:g}"
        result = self._finished(row)
        if result is not None:
            return result
        teacher = prune_magnitude(self.student("alone"), ratio, r.scope)
        accuracy = evaluate(teacher, self._test(r.batch), self.encoder, device=self.device)["top1"]
        return self._row(row, SparseKD(teacher, r.temperature, r.alpha, r.reduction), accuracy)

    def _row(self, row: str, objective: Objective, teacher_top1: float | None = None) -> Result:
        more = {} if teacher_top1 is None else {"teacher_top1": teacher_top1}
        return self._result(row, lambda folder: self._train(folder, objective) | more)

    def _train(self, folder: Path, objective: Objective) -> Result:
        r, net = self.recipe, self._build()
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
            options=TrainingOptions(precision=r.precision),
        )
        cost = self._fit(trainer, r.epochs, r.batch)
        seen = inspection.inspect(trainer, self._test(r.batch))
        return distributed.of_main(lambda: inspection.results(seen)) | cost

    def _build(self) -> nn.Module:
        random_state.seed_everything(self.recipe.seed)
        seed = self.recipe.seed + distributed.rank()
        for module in self.encoder.modules() if self.encoder is not None else ():
            if isinstance(module, PoissonEncoder) and module.generator is not None:
                module.generator.manual_seed(seed)  # or a row would go on where another ended
        build = getattr(models, self.recipe.student)
        d = self.data
        net = build(d.num_classes, d.in_channels, d.image_size, self.recipe.width)
        # a quarter less time on a CPU; the neurons take the layout as it is
        return accelerate(net).to(self.device, memory_format=torch.channels_last)


def table(runs: Sequence[Mapping[str, Result]]) -> str:
    """Format the results of one run, or of several seeds as mean and sample standard deviation.

    The gain over the student alone is the mean of the differences by seed, with its 95 % t-interval.
    """
    of = "" if len(runs) == 1 else f", mean ± deviation of {len(runs)} seeds"
    rows = [("", "teacher top-1 %", f"student top-1 %{of}", "gain", "seconds")]
    for row in runs[0]:
        teacher = [run[row].get("teacher_top1") for run in runs]
        rows.append((
            title(row),
            "" if None in teacher else text.spread(teacher),
            text.spread([run[row]["top1"] for run in runs]),
            "" if row == "alone" else text.gain([r[row]["top1"] - r["alone"]["top1"] for r in runs]),
            text.mean([run[row]["seconds"] for run in runs], ".0f"),
        ))  # fmt: skip
    return text.markdown(rows)


def write_csv(path: str | Path, runs: Mapping[int, Mapping[str, Result]]) -> None:
    """Write one line for each seed and row of several runs, ``runs`` by seed."""
    columns = ("seed", "row", "teacher_top1", "top1", "loss", "samples", "seconds")
    lines = [
        (seed, row, *(result.get(name) for name in columns[2:]))
        for seed, results in runs.items()
        for row, result in results.items()
    ]
    files.write_csv(Path(path), [columns, *lines])
