"""The three stages of LaSNN from one description (Section III-D), each skipped when its result is there."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LambdaLR, MultiStepLR

from .. import models
from ..analysis import inspection
from ..analysis.spikes import spike_statistics
from ..analysis.stages import STAGES
from ..conversion.calibration import calibrate
from ..conversion.convert import balance_thresholds, convert, scale_output
from ..data.encoding import DirectEncoder, PoissonEncoder
from ..data.images import ImageData
from ..distillation import Attention, CrossEntropy, LabelKD, Objective, SpikeKD
from ..neurons import LinearSurrogate, TimeLoopNode, accelerate
from ..runtime import distributed, files, random_state
from ..training.checkpoint import save_weights
from ..training.evaluation import evaluate
from ..training.options import TrainingOptions
from ..training.trainer import Trainer
from . import text
from .recipes import Recipe, described
from .runner import Runner, folder_name

log = logging.getLogger(__name__)

CHUNK = 32  # time steps of an evaluation in memory at once
DEFAULT = tuple(name for name, stage in STAGES.items() if not stage.extra)
OF_AN_ANN = ("ann", "calibrated", "converted", "converted_10T")


class Pipeline(Runner):
    """Run a recipe's stages in a run folder.

    Args:
        recipe: the description.
        data: images. Where some are held out (:meth:`.ImageData.split`), the stages that train evaluate them
            as they go (``val_`` columns of ``metrics.csv``); test images are evaluated once, at the end of
            a stage.
        run_dir: each stage has a folder here with its checkpoints, curves and ``result.json``; a stage
            whose result exists is not run again; an interrupted stage resumes.
        teacher: a ready teacher instead of stage 1's, taking images in [-1, 1].
        ann: a ready intermediate ANN, the recipe's ``student`` with ReLU, instead of stage 2's.
        snn_teacher: what teaches in the stage ``"spike_kd"``, a trained SNN for the recipe's encoding.
        device: where to run.

    A student that is not converted (``"spiking_resnet18"``, ...) has the stages ``"teacher"``, ``"start"``
    (its initial weights) and those that train it. The stages are those of
    :data:`~lasnn_sj.analysis.stages.STAGES`; the baselines ``"calibrated"``
    (:func:`~lasnn_sj.conversion.calibrate`, at the recipe's ``T``), ``"label_kd"``
    (:class:`~lasnn_sj.distillation.LabelKD`) and ``"spike_kd"`` (:class:`~lasnn_sj.distillation.SpikeKD`)
    have to be named.

    Raises:
        ValueError: the folder holds a run of another recipe or data set, or was given other networks; the
            message lists what differs. Or torchrun started a number of processes that does not divide the
            batches.
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
        counted = {
            "data": data.name,
            "train_images": len(data.train),
            "test_images": len(data.test),
            "validation_images": 0 if data.validation is None else len(data.validation),
            "given_ann": ann is not None,
        }
        super().__init__(recipe, data, run_dir, device, described(recipe) | counted)
        for name, net in {"teacher": teacher, "ann": ann, "snn_teacher": snn_teacher}.items():
            if net is not None:
                self._hold_to(name, net)
        self._given, self._ann, self._snn_teacher = (
            None if net is None else net.to(self.device) for net in (teacher, ann, snn_teacher)
        )

    def run(self, stages: Sequence[str] = DEFAULT) -> dict[str, dict[str, float]]:
        """Run the stages and return their results by name.

        Each has ``top1`` in percent, ``loss``, ``samples``, ``seconds`` (of the process that finished it)
        and ``peak_memory_mib``; a trained one ``seconds_per_epoch``; an SNN ``top1_over_time`` (after 1,
        2, ..., ``T`` steps), ``spikes_per_neuron`` and, by layer, ``spikes``.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown:
            raise ValueError(f"stages must be among {', '.join(STAGES)}, got {', '.join(unknown)}")
        needs_ann = [stage for stage in stages if stage in OF_AN_ANN]
        if needs_ann and not self.converts:
            raise ValueError(
                f"{self.recipe.student} has no intermediate ANN, which the stages {', '.join(needs_ann)} need"
            )
        return {stage: self._stage(stage) for stage in stages}

    @property
    def converts(self) -> bool:
        """True if the student is trained as an ANN first and then converted."""
        return converts(self.recipe.student)

    def encoder(self, T: int | None = None) -> nn.Module:
        """Build the seeded encoder of the recipe, for ``T`` steps if given."""
        return build_encoder(self.recipe, self.device, T)

    def teacher(self) -> nn.Module:
        """Return the trained network of stage 1, or the given one."""
        given = None if self._given is None else type(self._given).__name__
        self._check("teacher.json", {"given_teacher": given})
        if self._given is not None:
            return self._given.eval()
        self._stage("teacher")
        return self._load("teacher", self._build_teacher()).eval()

    def student(self, stage: str) -> nn.Module:
        """Return the network of ``"ann"``, ``"converted"``, ``"start"`` or a stage that trains from it.

        Missing networks are trained; ``"converted"`` and ``"start"`` are created without an evaluation.
        """
        if stage == "ann" and self._ann is not None:
            return self._ann
        if stage in ("converted", "start"):
            self._make(stage)
        elif stage in STAGES:
            self._stage(stage)
        net = self._build_ann() if self.converts else self._build_snn()
        return self._load(stage, to_snn(net, self.recipe) if self.converts and stage != "ann" else net)

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
        stage = STAGES.get(folder_name(row))
        if stage is not None and not stage.trained:
            raise ValueError(f"{row!r} is the name of another stage; call the row something else")
        self._check_objective(self.run_dir / folder_name(row), objective)

        def prepare() -> None:
            self._make("start")
            if objective.needs_teacher:
                self.teacher()

        def run(folder: Path) -> dict[str, float]:
            return self._train_snn(folder, objective, self.teacher() if objective.needs_teacher else None)

        # The trainer locks the row's folder: other rows may be trained by other processes.
        return self._result(row, run, prepare, whole_folder=False)

    def _check_objective(self, folder: Path, objective: Objective) -> None:
        distributed.by_main(lambda: folder.mkdir(exist_ok=True))
        self._check(f"{folder.name}/objective.json", {"objective": repr(objective)})

    def _stage(self, stage: str) -> dict[str, float]:
        return self._result(stage, lambda folder: self._run(stage, folder), lambda: self._prepare(stage))

    def _prepare(self, stage: str) -> None:
        """Run the stages that a stage needs, whose time is not counted."""
        needs, teacher = STAGES[stage].needs, STAGES[stage].teacher
        if teacher == "snn" and self._snn_teacher is None:
            raise ValueError(f"the stage {stage} needs an SNN that teaches: give Pipeline an snn_teacher")
        if needs == "ann" and self._ann is None:
            self._stage("ann")
        elif needs not in (None, "ann") and (self.converts or needs not in OF_AN_ANN):
            self._make(needs)
        if teacher == "ann" and self._given is None:
            self._stage("teacher")

    def _run(self, stage: str, folder: Path) -> dict[str, float]:
        """Run a stage and save its network in its folder."""
        r = self.recipe
        match stage:
            case "teacher" if self._given is not None:
                return evaluate(self._given, self._test(r.teacher_batch), device=self.device)
            case "teacher":
                net = self._build_teacher()
                return self._train_ann(net, folder, r.teacher_epochs, r.teacher_lr, r.teacher_batch)
            case "ann" if self._ann is not None:
                return evaluate(self._ann, self._test(r.ann_batch), device=self.device)
            case "ann":
                return self._train_ann(self._build_ann(), folder, r.ann_epochs, r.ann_lr, r.ann_batch)
            case "calibrated":
                (images, _), ann = self._calibration_batch(), self.student("ann")
                snn = distributed.of_main(lambda: calibrate(ann, images, self.encoder(), progress=True).cpu())
                return self._examine(snn.to(self.device))
            case "converted" | "converted_10T" | "start":
                made = "converted" if stage == "converted_10T" else stage
                return self._examine(self.student(made), STAGES[stage].steps * r.T)
            case "hybrid":
                return self._train_snn(folder, CrossEntropy())
            case "label_kd":
                return self._train_snn(folder, LabelKD(), self.teacher())
            case "spike_kd":
                return self._train_snn(folder, SpikeKD(self._snn_teacher))
        objective = CrossEntropy() + Attention(r.attention, alpha=r.alpha)
        return self._train_snn(folder, objective, self.teacher())

    def _make(self, stage: str) -> None:
        """Create the network of ``"converted"`` or ``"start"`` unless its weights exist."""
        path = files.inside(self.run_dir, stage) / "weights.safetensors"
        if distributed.of_main(path.exists):
            return
        with self._held():
            previous = "converted" if stage == "start" else "ann"
            before = self.student(previous) if self.converts else None

            def make() -> None:
                path.parent.mkdir(exist_ok=True)
                files.remove_parts(path.parent, files.ABANDONED)
                if not self.converts:
                    save_weights(path, self._build_snn())
                    return
                random_state.seed_everything(self.recipe.seed)
                images, labels = self._calibration_batch()
                made = self._make_converted if stage == "converted" else self._make_start
                save_weights(path, made(before, images, labels, path.parent))

            distributed.by_main(make)

    def _calibration_batch(self) -> tuple[Tensor, Tensor]:
        r = self.recipe
        loader, _ = self.data.loaders(r.calibration_images, r.workers, seed=r.seed)
        images, labels = next(iter(loader))
        return images.to(self.device), labels.to(self.device)

    def _make_converted(self, ann: nn.Module, images: Tensor, labels: Tensor, folder: Path) -> nn.Module:
        r, snn = self.recipe, to_snn(ann, self.recipe)
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

    def _train_snn(
        self, folder: Path, objective: Objective, teacher: nn.Module | None = None
    ) -> dict[str, float]:
        r = self.recipe
        self._check_objective(folder, objective)
        snn = self.student("start")
        optimizer = Adam(snn.parameters(), lr=r.lr, weight_decay=r.weight_decay, amsgrad=r.amsgrad)
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
        cost = self._fit(trainer, r.epochs, r.batch)
        trainer.encoder = self.encoder()  # codes that whoever evaluates the kept network has too
        seen = inspection.inspect(trainer, self._test(r.batch))
        return distributed.of_main(lambda: inspection.results(seen)) | cost

    def _examine(self, snn: nn.Module, T: int | None = None) -> dict[str, object]:
        """Evaluate an SNN: accuracy after each step, and spike counts."""
        test = self._test(self.recipe.batch)
        result = evaluate(snn, test, self.encoder(T), device=self.device, chunk=CHUNK, over_time=True)
        seen = spike_statistics(snn, test, self.encoder(T), device=self.device, chunk=CHUNK)
        return result | {"spikes_per_neuron": seen.mean, "spikes": seen.spikes_per_neuron}

    def _train_ann(
        self, net: nn.Module, folder: Path, epochs: int, lr: float, batch: int
    ) -> dict[str, float]:
        optimizer = SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
        scheduler = MultiStepLR(optimizer, [round(epochs * part) for part in (0.6, 0.8, 0.9)])
        trainer = Trainer(
            net, optimizer=optimizer, scheduler=scheduler, run_dir=folder, device=self.device,
            seed=self.recipe.seed,
        )  # fmt: skip
        cost = self._fit(trainer, epochs, batch)
        return trainer.evaluate(self._test(batch)) | cost

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
        net = build(d.num_classes, d.in_channels, d.image_size, r.width, spiking=False, dropout=r.dropout)
        if r.classifier_dropout is not None and hasattr(net, "classifier"):
            for module in net.classifier.modules():
                if isinstance(module, nn.Dropout):
                    module.p = r.classifier_dropout
        return net.to(self.device)

    def _build_snn(self) -> nn.Module:
        r, d = self.recipe, self.data
        random_state.seed_everything(r.seed + 1)
        net = models.create(
            r.student, num_classes=d.num_classes, in_channels=d.in_channels, image_size=d.image_size,
            width=r.width,
        )  # fmt: skip
        # a quarter less time on a CPU; the neurons take the layout as it is
        return accelerate(net).to(self.device, memory_format=torch.channels_last)

    def _load(self, stage: str, net: nn.Module) -> nn.Module:
        path = self.run_dir / folder_name(stage) / "weights.safetensors"
        error = self._fill(net, path)
        if error is not None and stage in STAGES:
            log.warning("%s; the stage %s is run again", error, stage)
            again = self._make if stage in ("converted", "start") else self._stage
            stale = path if again == self._make else path.parent / "result.json"
            distributed.by_main(lambda: stale.unlink(missing_ok=True))
            again(stage)
            error = self._fill(net, path)
        if error is not None:
            raise error
        return net


def converts(student: str) -> bool:
    """Return whether a network of :mod:`lasnn_sj.models` is trained as an ANN first and then converted."""
    return not student.startswith("spiking_")


def to_snn(ann: nn.Module, recipe: Recipe) -> nn.Module:
    """Convert an ANN to an SNN with the leak and surrogate of a recipe."""
    snn = convert(ann, leak=recipe.leak)
    for node in _nodes(snn):
        node.surrogate_function = LinearSurrogate(recipe.gamma)
    return snn


def build_encoder(recipe: Recipe, device: torch.device | str, T: int | None = None) -> nn.Module:
    """A recipe's encoder, for ``T`` steps instead of its own if given, seeded for each process."""
    T = T or recipe.T
    if recipe.encoding == "direct":
        return DirectEncoder(T)
    seed = recipe.seed + distributed.rank()
    return PoissonEncoder(T, torch.Generator(device).manual_seed(seed))


def lr_factor(schedule: str, epochs: int, epoch: int) -> float:
    """Return the factor of the learning rate in an epoch, starting at 0; see :class:`.Recipe`."""
    progress = epoch / epochs
    if schedule == "steps":
        return 0.1 ** sum(progress >= part for part in (0.4, 0.65, 0.85))
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[
        schedule
    ]


def _nodes(snn: nn.Module) -> list[TimeLoopNode]:
    return [module for module in snn.modules() if isinstance(module, TimeLoopNode)]


def table(recipe: Recipe, runs: Sequence[Mapping[str, Mapping[str, float]]]) -> str:
    """Format the results of one run, or of several seeds as mean and sample standard deviation."""
    head = "top-1 %" if len(runs) == 1 else f"top-1 %, mean ± deviation of {len(runs)} seeds"
    rows = [("", head, "seconds")]
    for stage in (stage for stage in STAGES if stage in runs[0]):
        label = STAGES[stage].label(recipe.T)
        top1 = text.spread([run[stage]["top1"] for run in runs])
        rows.append((label, top1, text.mean([run[stage]["seconds"] for run in runs], ".0f")))
    return text.markdown(rows)
