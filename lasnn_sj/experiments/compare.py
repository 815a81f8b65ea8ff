"""Methods of training compared on one student from one start, paired by seed."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import logging
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Subset
from tyro.conf import OmitArgPrefixes, Suppress

from .. import models
from ..analysis.inspection import environment
from ..analysis.stages import STAGES
from ..data import images as data
from ..data.images import ImageData
from ..distillation import Objective, parse_objective
from ..runtime import distributed, files
from ..runtime.files import check_settings
from . import cluster, config, pipeline, runs, text
from .jobs import default_processes
from .recipes import Recipe, described
from .run import ExperimentError
from .runner import folder_name

log = logging.getLogger(__name__)

START = "start (not trained)"
NOT_ROWS = tuple(name for name, stage in STAGES.items() if not stage.trained)
Results = Mapping[str, Mapping[int, Mapping]]  # by row and seed
COLUMNS = ("top1", "loss", "samples", "spikes_per_neuron", "seconds_per_epoch", "peak_memory_mib", "seconds")


@dataclass(frozen=True, kw_only=True)
class Comparison(runs.Experiment):
    """Objectives compared: each row trains one student from one start, seed by seed.

    A seed draws the training images, their order, augmentation and dropout; the start (conversion and
    balancing on that seed's images) is made once for all its rows. Whatever is finished is not run again, and
    interrupted rows resume; rows and seeds may be added.

    Attributes:
        recipe: student and settings; its seed is replaced by each of ``seeds``.
        rows: objective of each row by name, such as ``{"LaSNN": "CrossEntropy() + Attention()"}``.
        baseline: row that the others' gains are over.
        gains: rows whose gain over another row than the baseline is shown too, such as
            ``{"label KD + LaSNN": "label KD"}``.
        judge: images that rows are judged on: ``"validation"``, and no test image is touched, or ``"test"``,
            each once, when a row ends.
        judged_images: how many of the validation and of the test images are evaluated; all if not given.
        train_images: training images that each seed draws, in equal shares of each class; all but the
            validation images if not given.
        source: "cifar10", "cifar100", "tiny-imagenet", "digits", or an .npz file.
        root: folder of the downloaded data set.
        shrink: replace squares with this side, in pixels, by their mean; 1 leaves images as they are.
        ann_weights: safetensors file of a trained intermediate ANN; without one it is trained first, once.
        teacher_checkpoint: file of a trained ResNet-20 (the one of pytorch_resnet_cifar10); without one the
            recipe's teacher is trained first, once, where a row needs it.
        processes: rows that run at once; one for each core if not given, or one on a GPU.
        where: a cluster, or in processes of this one.
    """

    method: ClassVar[str] = "compare"

    recipe: Recipe
    rows: Suppress[dict[str, str]]
    baseline: str
    gains: Suppress[dict[str, str]] = field(default_factory=dict)
    judge: Literal["validation", "test"] = "validation"
    judged_images: int | None = None
    train_images: int | None = None
    source: str = "cifar10"
    root: Path = Path("data")
    shrink: int = 1
    ann_weights: Path | None = None
    teacher_checkpoint: Path | None = None
    processes: int | None = None
    where: OmitArgPrefixes[cluster.Cluster] = cluster.Cluster()

    def __post_init__(self) -> None:
        super().__post_init__()
        students = (*runs.LASNN_STUDENTS, *models.list_models("spiking_*"))
        if self.recipe.student not in students:
            known = config.nearest(self.recipe.student, students)
            raise ValueError(f"recipe.student: there is no {self.recipe.student!r}{known}")
        if self.ann_weights is not None and not pipeline.converts(self.recipe.student):
            raise ValueError(f"ann_weights: {self.recipe.student} is not converted from an ANN")
        if self.judge == "validation" and self.validation_images == 0:
            raise ValueError("validation_images is 0, so that judge: validation has no images")
        folders: dict[str, str] = {}
        for row in self.rows:
            self.objective(row)
            other = folders.setdefault(folder_name(row).casefold(), row)
            if other != row or folder_name(row) in (*NOT_ROWS, ""):
                raise ValueError(f"rows: {row!r} needs another name, its folder's would be taken")
        for key, name in (("baseline", self.baseline), *(("gains", n) for n in self.gains.items())):
            for row in (name,) if isinstance(name, str) else name:
                if row not in self.rows:
                    raise ValueError(f"{key}: unknown row {row!r}{config.nearest(row, list(self.rows))}")

    def objective(self, row: str) -> Objective:
        """Build the objective of a row."""
        try:
            return parse_objective(self.rows[row])
        except ValueError as error:
            raise ValueError(f"rows: {row}: {error}") from error

    def run(self) -> dict[int, Mapping[str, Mapping[str, float]]]:
        """Run all rows of all seeds; the table is written after each.

        Returns:
            Results by seed and row; none where the state of the rows is asked for, which is printed.

        Raises:
            ValueError: the folder holds a comparison with other settings, or a file or device does not exist.
            ExperimentError: rows that failed; the others are kept.
        """
        if self.where.status:
            every = [self._job(job) for phase in self._phases() for job in phase]
            folder = self.run_dir / "cluster"
            print(cluster.described(cluster.states(folder, every, folder)))
            return {}
        self._check_device()
        facts = self._facts()
        distributed.by_main(lambda: self._begin(facts))
        processes = self.processes or default_processes([self.device])
        if self.where.launcher is None:
            self._teach(), self._ann  # trained once, before processes could each begin to
        device = "cuda" if self.where.launcher and self.where.gpus else self.device
        work = dataclasses.replace(self, device=device, where=cluster.Cluster()).work
        failed, jobs = {}, self.run_dir / "cluster"
        with cluster.running(self.where, jobs, jobs, [self.device], processes, self._job) as run:
            for phase in self._phases():
                for job, _, error in run(work, phase):
                    if error is not None:
                        failed[job] = error
                    if job[1] is not None:
                        distributed.by_main(self._write)
                if failed:
                    listed = "; ".join(f"{self._label(job)}: {why}" for job, why in failed.items())
                    raise ExperimentError(
                        f"{len(failed)} of {len(phase)} rows failed (the others are kept): {listed}"
                    )
        results = distributed.of_main(self.results)
        distributed.by_main(lambda: print(f"\n{self._write()}"))
        return {seed: {row: by_seed[seed] for row, by_seed in results.items()} for seed in self.seeds}

    def _begin(self, facts: Mapping[str, object]) -> None:
        files.make_folder(self.run_dir)
        files.remove_parts(self.run_dir, files.ABANDONED)
        check_settings(self.run_dir / "comparison.json", facts)
        described = {"method": self.method} | config.plain(self)
        config.write(self.run_dir / runs.FILE, {k: v for k, v in described.items() if k != "where"})

    def _phases(self) -> list[list[tuple[int | None, str | None]]]:
        """Jobs ``(seed, row)`` of :meth:`work`; those of a phase need only what earlier ones made."""
        shared = [] if self.where.launcher is None else [[(None, None)]]
        starts = [(seed, None) for seed in self.seeds]
        return [*shared, starts, [(seed, row) for seed in self.seeds for row in (START, *self.rows)]]

    def _job(self, job: tuple[int | None, str | None]) -> cluster.Job:
        seed, row = job
        if seed is None:
            shared = self.run_dir / "shared"
            needed = ["ann"] if self.ann_weights is None and pipeline.converts(self.recipe.student) else []
            teaches = self.teacher_checkpoint is None and self._needs_teacher
            paths = [shared / name / "result.json" for name in [*needed, *["teacher"] * teaches]]
        else:
            name = "start" if row in (None, START) else folder_name(row)
            file = "weights.safetensors" if row is None else "result.json"
            paths = [self.run_dir / f"seed{seed}" / name / file]
        name = self._label(job)
        return cluster.Job(folder_name(name), job, lambda: {name: all(path.exists() for path in paths)})

    def _label(self, job: tuple[int | None, str | None]) -> str:
        seed, row = job
        return "teacher and ANN" if seed is None else f"{row or 'start'}, seed {seed}"

    def work(self, job: tuple[int | None, str | None], device: str) -> None:
        """Run a row of a seed, with ``None`` make that seed's start, without seed what all share."""
        seed, row = job
        if seed is None:
            self._teach(), self._ann
            return
        part = self.part(seed)
        if row is None:
            part.student("start")
        elif row == START:
            part.run(["start"])
        else:
            part.train(row, self.objective(row))

    def results(self) -> dict[str, dict[int, Mapping]]:
        """Read the existing results by row and seed."""
        found: dict[str, dict[int, Mapping]] = {}
        for row in (START, *self.rows):
            name = "start" if row == START else folder_name(row)
            paths = {seed: self.run_dir / f"seed{seed}" / name / "result.json" for seed in self.seeds}
            there = {seed: files.read_json(path) for seed, path in paths.items()}
            found[row] = {seed: result for seed, result in there.items() if result is not None}
        return found

    def part(self, seed: int) -> pipeline.Pipeline:
        recipe = dataclasses.replace(self.recipe, seed=seed)
        whole, folder = self.data, self.run_dir / f"seed{seed}"
        if self.train_images is not None and self.train_images < len(whole.train):
            _, drawn = data.stratified_split(data.labels_of(whole.train), self.train_images, seed)
            whole = dataclasses.replace(whole, train=Subset(whole.train, drawn.tolist()))
        return pipeline.Pipeline(
            recipe, whole, folder, teacher=self._teach(), ann=self._ann, device=self.device
        )

    def title(self) -> str:
        r, d = self.recipe, self.data
        count = len(d.train) if self.train_images is None else self.train_images
        return (
            f"{r.student}, width {r.width:g}, T = {r.T}, {r.encoding} input; {d.name}, {count} training "
            f"images of {d.image_size}x{d.image_size}, {r.epochs} epochs, learning rate {r.lr:g} "
            f"({r.lr_schedule}); judged on {len(d.test)} {self.judge} images"
        )

    @functools.cached_property
    def _shared(self) -> pipeline.Pipeline:
        """Teacher and intermediate ANN, of all seeds."""
        teacher = None
        if self.teacher_checkpoint is not None:
            _must_be_there("teacher_checkpoint", self.teacher_checkpoint)
            teacher = models.published_resnet20(self.teacher_checkpoint)
        folder = self.run_dir / "shared"
        return pipeline.Pipeline(
            self.recipe, self.data, folder, teacher, self._given_ann(), device=self.device
        )

    @property
    def _needs_teacher(self) -> bool:
        return any(self.objective(row).needs_teacher for row in self.rows)

    def _teach(self) -> nn.Module | None:
        return self._shared.teacher() if self._needs_teacher else None

    @functools.cached_property
    def _ann(self) -> nn.Module | None:
        return self._shared.student("ann") if self._shared.converts else None

    def _given_ann(self) -> nn.Module | None:
        if self.ann_weights is None:
            return None
        _must_be_there("ann_weights", self.ann_weights)
        r, d = self.recipe, self.data
        build = getattr(models, r.student)
        ann = build(d.num_classes, d.in_channels, d.image_size, r.width, spiking=False, dropout=r.dropout)
        try:
            ann.load_state_dict(load_file(self.ann_weights))
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(
                f"ann_weights: {self.ann_weights} does not hold {r.student} of width {r.width:g} ({error})"
            ) from error
        return ann

    def _facts(self) -> dict[str, object]:
        """Return the settings that all rows and seeds share; rows and seeds may be added."""
        own = config.plain(self)
        free = ("rows", "baseline", "gains", "seeds", "run_dir", "device", "processes", "root", "source",
                "ann_weights", "teacher_checkpoint", "where")  # fmt: skip
        given = {"ann": self.ann_weights, "teacher": self.teacher_checkpoint}
        for key, path in given.items():
            if path is not None:
                _must_be_there("ann_weights" if key == "ann" else "teacher_checkpoint", path)
        digests = {k: p and hashlib.sha256(p.read_bytes()).hexdigest()[:16] for k, p in given.items()}
        more = digests | {"data": self.data.name, "recipe": described(self.recipe)}
        return {k: v for k, v in own.items() if k not in free} | more

    def _load(self) -> ImageData:
        return data.load(self.source, self.root, shrink=self.shrink)

    def _limit(self, loaded: ImageData) -> ImageData:
        if self.judge == "validation":
            loaded = dataclasses.replace(loaded, test=loaded.validation)
        most = self.judged_images
        if most is None:
            return loaded
        held = None if loaded.validation is None else min(most, len(loaded.validation))
        return loaded.subset(test=min(most, len(loaded.test)), validation=held)

    def _encoder(self, seed: int) -> nn.Module:
        return pipeline.build_encoder(dataclasses.replace(self.recipe, seed=seed), self.device)

    @property
    def students(self) -> list[str]:
        return list(self.rows)

    def _row(self, folder: str) -> str | None:
        return next((row for row in self.rows if folder_name(row) == folder), None)

    def _write(self) -> str:
        """Write the table with what is finished: ``table.md``, ``.csv``, ``_curves.csv`` and ``.png``."""
        results = self.results()
        table = f"# Comparison\n\n{self.title()}\n\n{self.table(results)}\n{self._footer()}"
        files.write(self.run_dir / "table.md", table)
        self._write_csv(results)
        try:
            _plot(self, results, self.run_dir / "table.png")
        except ImportError:
            log.warning("no table.png, which needs matplotlib: pip install 'lasnn-sj[report]'")
        return table

    def table(self, results: Results) -> str:
        """Format results by row and seed as a Markdown table."""
        head = ["row", "seeds", "top-1 %", f"gain over {self.baseline}", "time", "s/epoch", "peak MiB",
                "spikes/neuron"]  # fmt: skip
        if self.gains:
            head.insert(4, "gain over another row")
        lines = [head]
        for row, by_seed in results.items():
            found = list(by_seed.values())
            ratios = paired(results, row, self.baseline, "seconds_per_epoch", lambda a, b: a / b)
            line = [
                row,
                str(len(found)),
                text.spread([r["top1"] for r in found]),
                ""
                if row in (self.baseline, START)
                else text.gain(paired(results, row, self.baseline).values()),
                f"x {statistics.mean(ratios.values()):.2f}" if ratios else "",
                text.mean([r.get("seconds_per_epoch") for r in found], ".1f"),
                text.mean([r.get("peak_memory_mib") for r in found], ".0f"),
                text.mean([r.get("spikes_per_neuron") for r in found], ".3f"),
            ]
            if self.gains:
                other = self.gains.get(row)
                line.insert(
                    4, "" if other is None else f"{text.gain(paired(results, row, other).values())} ({other})"
                )
            lines.append(line)
        return text.markdown(lines)

    def _footer(self) -> str:
        where = environment(self.device)
        versions, hardware = where["versions"], where["hardware"]
        shown = ", ".join(
            f"{k} {versions[k]}" for k in ("lasnn-sj", "torch", "spikingjelly") if k in versions
        )
        objectives = "\n".join(f"- {row}: `{objective}`" for row, objective in self.rows.items())
        return (
            f"\nTop-1: mean ± sample deviation over the seeds. Gains: mean of the differences by seed, with "
            f"its 95 % t-interval. Time: of an epoch, in units of the baseline's. Peak memory: of the "
            f"whole process, on a CPU.\n\n{objectives}\n\n`{where['command']}`; {shown}; "
            f"{hardware.get('gpu', hardware['processor'])}, {hardware['cores']} cores.\n"
        )

    def _write_csv(self, results: Results) -> None:
        table: list[tuple] = [("row", "seed", "gain", *COLUMNS, "judge", "objective")]
        over_time: list[tuple] = [("row", "seed", "t", "top1")]
        for row, by_seed in results.items():
            gains = {} if row == START else paired(results, row, self.baseline)
            for seed, result in by_seed.items():
                values = (result.get(column) for column in COLUMNS)
                table.append((row, seed, gains.get(seed), *values, self.judge, self.rows.get(row)))
                over_time += [(row, seed, *point) for point in enumerate(result.get("top1_over_time", ()), 1)]
        files.write_csv(self.run_dir / "table.csv", table)
        files.write_csv(self.run_dir / "table_curves.csv", over_time)


def paired(
    results: Results, row: str, other: str, key: str = "top1", of=lambda a, b: a - b
) -> dict[int, float]:
    """Return the differences of two rows by seed, for the seeds of both."""
    rows, others = results[row], results.get(other, {})
    both = {s: (r.get(key), others[s].get(key)) for s, r in rows.items() if s in others}
    return {seed: of(a, b) for seed, (a, b) in both.items() if a is not None and b is not None}


def _must_be_there(key: str, path: Path) -> None:
    if not path.is_file():
        raise ValueError(f"{key}: {path} does not exist")


def _plot(run: Comparison, results: Results, path: Path) -> None:
    """Plot gains with their intervals, and accuracy after each time step."""
    from matplotlib.figure import Figure  # slow to import, needed only here
    from matplotlib.ticker import MaxNLocator

    rows = [row for row in run.rows if results[row]]
    figure = Figure(figsize=(12, 1.5 + 0.5 * max(6, len(rows))), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours = {row: f"C{number}" for number, row in enumerate(run.rows)}
    shown = [row for row in rows if row != run.baseline and paired(results, row, run.baseline)]
    for height, row in enumerate(reversed(shown)):
        values = list(paired(results, row, run.baseline).values())
        left.errorbar(
            statistics.mean(values),
            height,
            xerr=text.interval(values),
            fmt="o",
            color=colours[row],
            capsize=4,
        )
        left.plot(values, [height - 0.2] * len(values), "|", color=colours[row], alpha=0.6)
    left.set_yticks(range(len(shown)), list(reversed(shown)))
    left.set_ylim(-0.7, max(len(shown) - 0.3, 0.7))
    left.axvline(0, color="gray", linewidth=1)
    left.set(xlabel=f"top-1 gain over {run.baseline}, points (95 % interval; bars: seeds)")
    for row in rows:
        curves = torch.tensor([r["top1_over_time"] for r in results[row].values() if "top1_over_time" in r])
        if len(curves):
            style = ("-", "--", ":")[int(colours[row][1:]) // 10 % 3]  # colours repeat after ten
            right.plot(
                range(1, curves.shape[1] + 1), curves.mean(0), color=colours[row], linestyle=style, label=row
            )
    right.set(xlabel="time steps t", ylabel=f"top-1 %, {run.judge} images")
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    if right.lines:  # before the first row is finished there is none
        right.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(run.title(), fontsize="small")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    files.write(path, drawn.getvalue())
