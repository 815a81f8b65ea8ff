"""The three stages of LaSNN from one description (Section III-D), each skipped when its result is there."""

from __future__ import annotations

import logging
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR
from torch.utils.data import DataLoader

from .. import models
from ..analysis import inspection
from ..analysis.spikes import spike_statistics
from ..conversion.calibration import calibrate
from ..conversion.convert import balance_thresholds, convert, scale_output
from ..data.encoding import DirectEncoder, PoissonEncoder
from ..data.images import ImageData
from ..distillation import Attention, CrossEntropy, LabelKD, Objective, SpikeKD
from ..neurons import LinearSurrogate, TimeLoopNode
from ..runtime import distributed, files, random_state
from ..runtime.cost import Cost
from ..runtime.files import check_settings
from ..runtime.locks import FolderLock
from ..training.checkpoint import CheckpointError, load_weights, save_weights
from ..training.evaluation import evaluate
from ..training.options import TrainingOptions
from ..training.trainer import Trainer

log = logging.getLogger(__name__)

CHUNK = 32  # time steps of an evaluation in memory at once
STAGES = ("teacher", "ann", "converted", "converted_10T", "start", "hybrid", "lasnn")
UNTRAINED = ("teacher", "ann", "converted", "converted_10T", "calibrated", "start")
NEEDS = {
    "converted": "ann", "converted_10T": "converted", "calibrated": "ann", "start": "converted",
    "hybrid": "start", "label_kd": "start", "spike_kd": "start", "lasnn": "start",
}  # fmt: skip
TITLES = {
    "teacher": "teacher",
    "ann": "intermediate ANN",
    "converted": "converted, T = {T}",
    "converted_10T": "converted, T = {T10}",
    "calibrated": "calibrated, T = {T}",
    "start": "thresholds x {scale}, T = {T}",
    "hybrid": "hybrid (CE only), T = {T}",
    "label_kd": "label distillation, T = {T}",
    "spike_kd": "spike-based KD (approximation), T = {T}",
    "lasnn": "LaSNN, T = {T}",
}


@dataclass(frozen=True)
class Recipe:
    """One LaSNN run, with the paper's settings as defaults.

    Attributes:
        student: network of :mod:`lasnn_sj.models`, as intermediate ANN and as SNN.
        width: factor of the student's channels.
        T: time steps of training and inference.
        encoding: ``"poisson"`` or ``"direct"``.
        attention: ``"activation"`` or ``"gradient"``.
        alpha: weight of the attention loss.
        leak: factor of the potential per time step (Eq. 1); 1 is no leak.
        gamma: height of the surrogate (Eq. 15).
        dropout: dropout probability of the student, as ANN and as SNN.
        teacher: ``"resnet20"``, ``"vgg16"`` or ``"densenet121"`` in CIFAR form.
        teacher_width: factor of the teacher's channels (not of DenseNet121's).
        teacher_epochs: of stage 1, the teacher's training by SGD.
        teacher_lr: learning rate of stage 1, a tenth after 60, 80 and 90 % of the epochs.
        teacher_batch: images of a training step in stage 1.
        ann_epochs: of stage 2, the intermediate ANN's training by SGD.
        ann_lr: learning rate of stage 2, falling as stage 1's.
        ann_batch: images of a training step in stage 2.
        calibration_images: how many threshold balancing sees.
        calibration_steps: time steps of threshold balancing.
        threshold_statistic: ``"max"`` or a percentile.
        threshold_scale: factor of the thresholds for stage 3 (the converted SNN itself has factor 1).
        output_scale: multiply the output layer's weights by one factor before stage 3, so that its loss
            begins low; see :func:`~lasnn_sj.conversion.scale_output`.
        epochs: of stage 3, the student's training by Adam; the baselines that train have the same.
        lr: learning rate of stage 3 in its first epoch.
        lr_schedule: learning rate over the epochs of stage 3: ``"constant"`` as in the paper, ``"linear"``
            (``1 - e / E`` of it in epoch ``e`` of ``E``, from 0 on) or ``"cosine"``.
        batch: images of a training step in stage 3.
        weight_decay: of stage 3.
        precision: of convolutions and linear layers in stage 3.
        validate_every: epochs between evaluations on the validation images, in every stage that trains.
        seed: of weights, order of the images, codes and dropout.
        workers: processes that load images.
    """

    student: str = "vgg5"
    width: float = 1.0
    T: int = 100
    encoding: Literal["poisson", "direct"] = "poisson"
    attention: Literal["activation", "gradient"] = "activation"
    alpha: float = 0.9
    leak: float = 0.99
    gamma: float = 0.3
    dropout: float = 0.2
    teacher: Literal["resnet20", "vgg16", "densenet121"] = "resnet20"
    teacher_width: float = 1.0
    teacher_epochs: int = 300
    teacher_lr: float = 0.01
    teacher_batch: int = 256
    ann_epochs: int = 200
    ann_lr: float = 0.01
    ann_batch: int = 256
    calibration_images: int = 512
    calibration_steps: int = 2500
    threshold_statistic: Literal["max"] | float = "max"
    threshold_scale: float = 0.7
    output_scale: bool = False
    epochs: int = 100
    lr: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    batch: int = 16
    weight_decay: float = 5e-4
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    validate_every: int = 1
    seed: int = 0
    workers: int = 0


class Pipeline:
    """Runs a recipe's stages in a run folder.

    Args:
        recipe: the description.
        data: images. Where some are held out (:meth:`.ImageData.split`), the stages that train evaluate them
            as they go (``val_`` columns of ``metrics.csv``); test images are evaluated once, at the end of
            a stage.
        run_dir: each stage has a folder here with its checkpoints, curves and ``result.json``; a stage
            whose result is there is not run again, a stage that was cut off goes on.
        teacher: a ready teacher instead of stage 1's, taking images in [-1, 1].
        ann: a ready intermediate ANN, the recipe's ``student`` with ReLU, instead of stage 2's.
        snn_teacher: what teaches in the stage ``"spike_kd"``, a trained SNN for the recipe's encoding.
        device: where to run.

    The stages are those of :data:`STAGES`, which :meth:`run` runs by itself, and the baselines
    ``"calibrated"`` (:func:`~lasnn_sj.conversion.calibration.calibrate`, at the recipe's ``T``),
    ``"label_kd"`` (:class:`~lasnn_sj.distillation.objectives.LabelKD`) and ``"spike_kd"``
    (:class:`~lasnn_sj.distillation.objectives.SpikeKD`), which have to be named.

    Raises:
        ValueError: the folder holds a run of another recipe or data set; the message lists what differs.
        RuntimeError: several processes under torchrun.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: ImageData,
        run_dir: str | Path,
        teacher: nn.Module | None = None,
        ann: nn.Module | None = None,
        snn_teacher: nn.Module | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        distributed.refuse("Pipeline")
        self.recipe, self.data, self.device = recipe, data, torch.device(device)
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock = FolderLock(self.run_dir)
        self._given, self._ann, self._snn_teacher = (
            None if net is None else net.to(self.device) for net in (teacher, ann, snn_teacher)
        )
        check_settings(
            self.run_dir / "recipe.json",
            asdict(recipe)
            | {
                "data": data.name,
                "train_images": len(data.train),
                "test_images": len(data.test),
                "validation_images": 0 if data.validation is None else len(data.validation),
                "given_ann": ann is not None,
            },
        )

    def run(self, stages: Sequence[str] = STAGES) -> dict[str, dict[str, float]]:
        """Results of the stages by name.

        Each has ``top1`` in percent, ``loss``, ``samples``, ``seconds`` (of the process that finished it)
        and ``peak_memory_mib``; a trained one ``seconds_per_epoch``; an SNN ``top1_over_time`` (after 1,
        2, ..., ``T`` steps), ``spikes_per_neuron`` and, by layer, ``spikes``.
        """
        unknown = [stage for stage in stages if stage not in TITLES]
        if unknown:
            raise ValueError(f"stages must be among {', '.join(TITLES)}, got {', '.join(unknown)}")
        return {stage: self._stage(stage) for stage in stages}

    def encoder(self, T: int | None = None) -> nn.Module:
        """The recipe's encoder, for ``T`` steps instead of its own if given, seeded."""
        return build_encoder(self.recipe, self.device, T)

    def teacher(self) -> nn.Module:
        """Stage 1's network, trained, or the one that was given."""
        given = None if self._given is None else type(self._given).__name__
        check_settings(self.run_dir / "teacher.json", {"given_teacher": given})
        if self._given is not None:
            return self._given.eval()
        self._stage("teacher")
        return self._load("teacher", self._build_teacher()).eval()

    def student(self, stage: str) -> nn.Module:
        """The network of ``"ann"``, ``"converted"``, ``"start"`` or a stage that trains from it.

        What is not there yet is trained; ``"converted"`` and ``"start"`` are made without evaluating them.
        """
        if stage == "ann" and self._ann is not None:
            return self._ann
        if stage in ("converted", "start"):
            self._make(stage)
        elif stage in TITLES:
            self._stage(stage)
        net = self._build_ann()
        return self._load(stage, net if stage == "ann" else self._to_snn(net))

    def train(self, row: str, objective: Objective) -> dict[str, float]:
        """Train the start network with an objective, in a folder of its own beside the stages'.

        Args:
            row: name of the row.
            objective: loss; it is given the pipeline's teacher if it needs one.

        Returns:
            The result, as of a stage in :meth:`run`; from its folder if it is there.

        Raises:
            ValueError: the name is that of a stage before the training, or the folder has a row of another
                objective.
        """
        if folder_name(row) in UNTRAINED:
            raise ValueError(f"{row!r} is the name of another stage; call the row something else")
        folder = self.run_dir / folder_name(row)
        folder.mkdir(exist_ok=True)
        check_settings(folder / "objective.json", {"objective": repr(objective)})
        path = files.inside(self.run_dir, f"{folder.name}/result.json")
        result = files.read_json(path)
        if result is None:
            self._make("start")
            teacher = self.teacher() if objective.needs_teacher else None
            # The trainer locks the row's folder: other rows may be trained by other processes.
            result = self._measure(path, lambda folder: self._train_snn(folder, objective, teacher))
        return result

    def _stage(self, stage: str) -> dict[str, float]:
        path = files.inside(self.run_dir, f"{stage}/result.json")
        result = files.read_json(path)
        if result is None:
            with self._lock:
                self._prepare(stage)
                path.parent.mkdir(exist_ok=True)
                result = self._measure(path, getattr(self, f"_run_{stage}"))
        return result

    def _measure(self, path: Path, run: Callable[[Path], dict]) -> dict:
        """Run a stage or row and write its result."""
        log.info("%s of %s", path.parent.name, self.run_dir)
        # What a stage gives must not depend on which others this process has run: calibration images are
        # augmented.
        random_state.seed_everything(self.recipe.seed)
        with Cost(self.device) as cost:
            result = run(path.parent)
        result |= {"seconds": cost.seconds, "peak_memory_mib": cost.peak_memory_mib}
        files.write_json(path, result)
        return result

    def _prepare(self, stage: str) -> None:
        """Make what a stage needs first: its time is its own."""
        if stage == "spike_kd" and self._snn_teacher is None:
            raise ValueError("the stage spike_kd needs an SNN that teaches: give Pipeline an snn_teacher")
        needed = NEEDS.get(stage)
        if needed == "ann" and self._ann is None:
            self._stage("ann")
        elif needed not in (None, "ann"):
            self._make(needed)
        if stage in ("label_kd", "lasnn") and self._given is None:
            self._stage("teacher")

    def _make(self, stage: str) -> None:
        """Make the network of ``"converted"`` or ``"start"``, where its weights are not there yet."""
        path, r = files.inside(self.run_dir, stage) / "weights.safetensors", self.recipe
        if path.exists():
            return
        with self._lock:
            before = self.student("converted" if stage == "start" else "ann")
            path.parent.mkdir(exist_ok=True)
            random_state.seed_everything(r.seed)
            loader, _ = self.data.loaders(r.calibration_images, r.workers, seed=r.seed)
            images, labels = (tensor.to(self.device) for tensor in next(iter(loader)))
            make = self._make_converted if stage == "converted" else self._make_start
            save_weights(path, make(before, images, labels, path.parent))

    def _run_teacher(self, folder: Path) -> dict[str, float]:
        r = self.recipe
        if self._given is not None:
            return evaluate(self._given, self._test(r.teacher_batch), device=self.device)
        net = self._build_teacher()
        result = self._train_ann(net, folder, r.teacher_epochs, r.teacher_lr, r.teacher_batch)
        self._keep(folder, net)
        return result

    def _run_ann(self, folder: Path) -> dict[str, float]:
        r = self.recipe
        if self._ann is not None:
            return evaluate(self._ann, self._test(r.ann_batch), device=self.device)
        net = self._build_ann()
        result = self._train_ann(net, folder, r.ann_epochs, r.ann_lr, r.ann_batch)
        self._keep(folder, net)
        return result

    def _make_converted(self, ann: nn.Module, images: Tensor, labels: Tensor, folder: Path) -> nn.Module:
        r, snn = self.recipe, self._to_snn(ann)
        thresholds = balance_thresholds(
            snn, images, self.encoder(r.calibration_steps), r.threshold_statistic, progress=True
        )
        for node in _nodes(snn):
            node.leak = 1.0
        files.write_json(folder / "thresholds.json", thresholds)
        return snn

    def _make_start(self, snn: nn.Module, images: Tensor, labels: Tensor, folder: Path) -> nn.Module:
        r = self.recipe
        for node in _nodes(snn):
            node.leak = r.leak
            node.v_threshold *= r.threshold_scale
        for module in snn.modules():
            if isinstance(module, models.resnet.Block):
                module.skip_scale.div_(r.threshold_scale)
        if r.output_scale:
            factor = scale_output(snn, images, labels, self.encoder())
            log.info("output of %s times %.4g", folder, factor)
        return snn

    def _run_converted(self, folder: Path) -> dict[str, float]:
        return self._examine(self.student("converted"))

    def _run_converted_10T(self, folder: Path) -> dict[str, float]:
        return self._examine(self.student("converted"), 10 * self.recipe.T)

    def _run_calibrated(self, folder: Path) -> dict[str, float]:
        r = self.recipe
        loader, _ = self.data.loaders(r.calibration_images, r.workers, seed=r.seed)
        images = next(iter(loader))[0].to(self.device)
        snn = calibrate(self.student("ann"), images, self.encoder(), progress=True)
        return self._examine(snn)

    def _run_start(self, folder: Path) -> dict[str, float]:
        return self._examine(self.student("start"))

    def _run_hybrid(self, folder: Path) -> dict[str, float]:
        return self._train_snn(folder, CrossEntropy())

    def _run_label_kd(self, folder: Path) -> dict[str, float]:
        return self._train_snn(folder, LabelKD(), self.teacher())

    def _run_spike_kd(self, folder: Path) -> dict[str, float]:
        return self._train_snn(folder, SpikeKD(self._snn_teacher))

    def _run_lasnn(self, folder: Path) -> dict[str, float]:
        objective = CrossEntropy() + Attention(self.recipe.attention, alpha=self.recipe.alpha)
        return self._train_snn(folder, objective, self.teacher())

    def _train_snn(
        self, folder: Path, objective: Objective, teacher: nn.Module | None = None
    ) -> dict[str, float]:
        r = self.recipe
        check_settings(folder / "objective.json", {"objective": repr(objective)})
        snn = self.student("start")
        train, validation = self._training(r.batch)
        optimizer = Adam(snn.parameters(), lr=r.lr, weight_decay=r.weight_decay)
        trainer = Trainer(
            snn,
            objective,
            teacher=teacher,
            encoder=self.encoder(),
            optimizer=optimizer,
            scheduler=LambdaLR(optimizer, partial(lr_factor, r.lr_schedule, r.epochs)),
            run_dir=folder,
            device=self.device,
            seed=r.seed,
            options=TrainingOptions(precision=r.precision),
        )
        history = trainer.fit(train, validation, r.epochs, r.validate_every)
        self._keep(folder, snn)
        trainer.encoder = self.encoder()  # codes that whoever evaluates the kept network has too
        return inspection.results(inspection.inspect(trainer, self._test(r.batch))) | _per_epoch(history)

    def _training(self, batch: int) -> tuple[DataLoader, DataLoader | None]:
        """Training batches, and validation batches where images are held out."""
        train, held = self.data.loaders(batch, self.recipe.workers, seed=self.recipe.seed)
        return train, None if self.data.validation is None else held

    def _test(self, batch: int) -> DataLoader:
        return self.data.test_loader(batch, self.recipe.workers)

    def _examine(self, snn: nn.Module, T: int | None = None) -> dict[str, object]:
        """What is said of an SNN: accuracy after each step, and spikes."""
        test = self._test(self.recipe.batch)
        result = evaluate(snn, test, self.encoder(T), device=self.device, chunk=CHUNK, over_time=True)
        seen = spike_statistics(snn, test, self.encoder(T), device=self.device, chunk=CHUNK)
        return result | {"spikes_per_neuron": seen.mean, "spikes": seen.spikes_per_neuron}

    def _train_ann(
        self, net: nn.Module, folder: Path, epochs: int, lr: float, batch: int
    ) -> dict[str, float]:
        train, validation = self._training(batch)
        optimizer = SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        scheduler = MultiStepLR(optimizer, [round(epochs * part) for part in (0.6, 0.8, 0.9)])
        trainer = Trainer(
            net, optimizer=optimizer, scheduler=scheduler, run_dir=folder, device=self.device,
            seed=self.recipe.seed,
        )  # fmt: skip
        history = trainer.fit(train, validation, epochs, self.recipe.validate_every)
        return trainer.evaluate(self._test(batch)) | _per_epoch(history)

    def _build_teacher(self) -> nn.Module:
        r, d = self.recipe, self.data
        random_state.seed_everything(r.seed)
        if r.teacher == "densenet121":
            net = models.teacher_densenet121(d.num_classes, d.in_channels)
        else:
            build = {"resnet20": models.teacher_resnet20, "vgg16": models.teacher_vgg16}[r.teacher]
            net = build(d.num_classes, d.in_channels, r.teacher_width)
        return models.InputNormalization(net, d.mean, d.std).to(self.device)

    def _build_ann(self) -> nn.Module:
        r, d = self.recipe, self.data
        random_state.seed_everything(r.seed + 1)
        build = getattr(models, r.student)
        return build(
            d.num_classes, d.in_channels, d.image_size, r.width, spiking=False, dropout=r.dropout
        ).to(self.device)

    def _to_snn(self, ann: nn.Module) -> nn.Module:
        snn = convert(ann, leak=self.recipe.leak)
        for node in _nodes(snn):
            node.surrogate_function = LinearSurrogate(self.recipe.gamma)
        return snn

    @staticmethod
    def _keep(folder: Path, net: nn.Module) -> None:
        save_weights(folder / "weights.safetensors", net)

    def _load(self, stage: str, net: nn.Module) -> nn.Module:
        path = self.run_dir / folder_name(stage) / "weights.safetensors"
        try:
            return load_weights(path, net)
        except CheckpointError as error:
            if stage not in TITLES:
                raise
            log.warning("%s; the stage %s is run again", error, stage)
        if stage in ("converted", "start"):
            path.unlink(missing_ok=True)
            self._make(stage)
        else:
            (path.parent / "result.json").unlink(missing_ok=True)
            self._stage(stage)
        return load_weights(path, net)


def build_encoder(recipe: Recipe, device: torch.device | str, T: int | None = None) -> nn.Module:
    """A recipe's encoder, for ``T`` steps instead of its own if given, seeded."""
    T = T or recipe.T
    if recipe.encoding == "direct":
        return DirectEncoder(T)
    return PoissonEncoder(T, torch.Generator(device).manual_seed(recipe.seed))


def folder_name(row: str) -> str:
    """Name of a row's folder: letters, digits, points and dashes, anything else as underscores."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", row).strip("_")


def lr_factor(schedule: str, epochs: int, epoch: int) -> float:
    """Factor of the learning rate in an epoch, 0 the first: 1, ``1 - epoch / epochs``, or half a cosine."""
    progress = epoch / epochs
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
        schedule
    ]


def _nodes(snn: nn.Module) -> list[TimeLoopNode]:
    return [module for module in snn.modules() if isinstance(module, TimeLoopNode)]


def _per_epoch(history: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {"seconds_per_epoch": statistics.median(row["seconds"] for row in history)}


def table(recipe: Recipe, runs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Markdown table of one run, or of several seeds as mean and sample standard deviation."""
    head = "top-1 %" if len(runs) == 1 else f"top-1 %, mean ± deviation of {len(runs)} seeds"
    rows = [("", head, "seconds")]
    for stage in (stage for stage in TITLES if stage in runs[0]):
        top1 = [run[stage]["top1"] for run in runs]
        spread = "" if len(runs) == 1 else f" ± {statistics.stdev(top1):.2f}"
        seconds = statistics.mean(run[stage]["seconds"] for run in runs)
        title = TITLES[stage].format(T=recipe.T, T10=10 * recipe.T, scale=recipe.threshold_scale)
        rows.append((title, f"{statistics.mean(top1):.2f}{spread}", f"{seconds:.0f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)
