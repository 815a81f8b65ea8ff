"""Run the rows of a table, with shared parts run once, on several devices or processes."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from .. import models
from ..analysis.stages import STAGES
from ..data import events
from ..data import images as data
from ..runtime import distributed, files
from ..runtime.files import check_settings
from . import cluster, report, scales
from .pipeline import Pipeline
from .reverse import ReversePipeline
from .runner import folder_name
from .scales import SCALES, Scale
from .tables import TABLES, Row, Table

log = logging.getLogger(__name__)

SNN_TEACHER = {"full": "vgg9", "small": "vgg5", "smoke": "vgg5"}  # of spike-based distillation
Results = dict[tuple[Row, int], Mapping[str, object]]


class ExperimentError(ValueError):
    """A table, row or data set does not exist, or rows failed; the message lists what is known."""


@dataclass(frozen=True)
class TableRunner:
    """Runner of the rows of a table, sent to worker processes.

    Attributes:
        scale: size of the run.
        root: folder of the data sets.
        run_dir: folder of this scale's runs, shared by all tables.
        teacher_checkpoint: a trained ResNet-20 for CIFAR-10, or ``None``.
        device: device of this process.
    """

    scale: Scale
    root: Path
    run_dir: Path
    teacher_checkpoint: Path | None
    device: str

    def images(self, row: Row) -> data.ImageData:
        """Load the images of a row, once per process."""
        return scales.images(row.dataset, self.scale, self.root, row.reverse)

    def samples(self, row: Row) -> data.ImageData | events.EventData:
        """Load the images or event frames of a row."""
        framing = scales.reverse_kd(row, self.scale, 0).framing if row.reverse else None
        if framing is None:
            return self.images(row)
        return scales.recordings(row.dataset, framing, self.scale == "full", self.root)

    def teacher(self, row: Row) -> nn.Module:
        """Return the teacher of a row, of seed 0 for all seeds; train it first if needed.

        Raises:
            ValueError: rows in this folder had another teacher, a checkpoint's or one trained here.
        """
        settings = scales.lasnn(row, self.scale, 0)
        name = settings.recipe.teacher
        folder, ready = self.run_dir / "teachers" / f"{row.dataset}-{name}", self._has_ready(row, name)
        digest = hashlib.sha256(self.teacher_checkpoint.read_bytes()).hexdigest() if ready else None

        def begin() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            check_settings(folder / "checkpoint.json", {"checkpoint": digest})

        distributed.by_main(begin)
        if ready:
            return models.published_resnet20(self.teacher_checkpoint)
        # only what concerns the teacher: the recipe of a folder is compared when it is used again
        recipe = replace(
            settings.recipe, student="vgg5", T=1, attention="activation", encoding="poisson", width=1.0
        )
        return Pipeline(recipe, self.images(row), folder, device=self.device).teacher()

    def _has_ready(self, row: Row, teacher: str) -> bool:
        fits = teacher == "resnet20" and row.dataset == "cifar10" and self.scale != "smoke"
        return fits and self.teacher_checkpoint is not None

    def ann(self, row: Row, seed: int) -> nn.Module:
        """Return the intermediate ANN of a row; train it first if needed."""
        return self._ann_pipeline(row, seed).student("ann")

    def _ann_pipeline(self, row: Row, seed: int) -> Pipeline:
        folder = self.run_dir / "anns" / f"{row.dataset}-{row.net}-seed{seed}"
        recipe = scales.lasnn(row, self.scale, seed).recipe
        recipe = replace(recipe, T=1, teacher="resnet20", attention="activation", encoding="poisson")
        return Pipeline(recipe, self.images(row), folder, device=self.device)

    def folder(self, row: Row, seed: int) -> Path:
        """Return the run folder of a row, shared by rows that differ only in the method."""
        if row.reverse:
            return self.run_dir / "studies" / f"{row.dataset}-{row.net}-seed{seed}"
        if row.method == "ann":
            return self.run_dir / "anns" / f"{row.dataset}-{row.net}-seed{seed}"
        r = scales.lasnn(row, self.scale, seed).recipe
        name = f"{row.dataset}-{row.net}-{r.encoding}-T{r.T}-{r.teacher}-{r.attention}-seed{seed}"
        return self.run_dir / "runs" / name

    def run(self, row: Row, seed: int) -> Mapping[str, object]:
        """Return the result of a row; run the row first if needed."""
        if row.reverse:
            return self._run_reverse(row, seed)
        if row.method == "ann":
            return self._ann_pipeline(row, seed).run(["ann"])["ann"]
        return self._pipeline(row, seed).run([row.method])[row.method]

    def _pipeline(self, row: Row, seed: int) -> Pipeline:
        teaches = STAGES[row.method].teacher
        done = self.finished(row, seed)
        snn_teacher = None
        if teaches == "snn" and not done:
            snn_teacher = self._pipeline(snn_teacher_of(row, self.scale), seed).student("hybrid")
        return Pipeline(
            scales.lasnn(row, self.scale, seed).recipe,
            self.images(row),
            self.folder(row, seed),
            teacher=self.teacher(row) if teaches == "ann" and not done else None,
            ann=self.ann(row, seed),
            snn_teacher=snn_teacher,
            device=self.device,
        )

    def finished(self, row: Row, seed: int) -> bool:
        """Return whether a row is finished."""
        path = self.folder(row, seed) / folder_name(row.method) / "result.json"
        return distributed.of_main(path.exists)

    def work(self, job: tuple[str, list[Row], int], device: str) -> dict[str, str]:
        """Train a teacher or intermediate ANN that rows share, or run the rows of one run folder.

        Returns:
            Errors of rows, by :func:`label`; the other rows have been run.
        """
        what, rows, seed = job
        here, failed = replace(self, device=device), {}
        for row in rows:
            try:
                log.info("%s of %s, seed %d", what, row.name, seed)
                if what == "teacher":
                    here.teacher(row)
                elif what == "ann":
                    here.ann(row, seed)
                else:
                    here.run(row, seed)
            except Exception as error:  # a failing row must not end the others
                if distributed.world_size() > 1:  # the others are in the midst of it
                    raise
                log.exception("%s of %s, seed %d failed", what, row.name, seed)
                if what == "rows":  # rows without their teacher or ANN fail by themselves
                    failed[label(row, seed)] = f"{type(error).__name__}: {error}"
        return failed

    def job(self, described: tuple[str, list[Row], int]) -> cluster.Job:
        """The job of :meth:`work`'s argument."""
        what, rows, seed = described
        if what == "rows":
            folder = self.folder(rows[0], seed)
            parts = {label(row, seed): folder / folder_name(row.method) for row in rows}
            name = f"{folder.parent.name}-{folder.name}"
        else:
            teacher = scales.lasnn(rows[0], self.scale, 0).recipe.teacher
            own = f"{rows[0].dataset}-{teacher if what == 'teacher' else f'{rows[0].net}-seed{seed}'}"
            name = f"{what}-{own}"
            parts = {f"{what} {own}": self.run_dir / f"{what}s" / own / what}
        return cluster.Job(
            name, described, lambda: {n: (path / "result.json").exists() for n, path in parts.items()}
        )

    def _run_reverse(self, row: Row, seed: int) -> Mapping[str, object]:
        settings = scales.reverse_kd(row, self.scale, seed)
        kind, _, ratio = row.method.partition(" ")
        recipe = replace(
            settings.recipe, ratios=(float(ratio),) if kind == "sparse" else (), default=kind == "default"
        )
        folder = self.folder(row, seed)
        return ReversePipeline(recipe, self.samples(row), folder, settings.encoder(), self.device).run()[
            row.method
        ]


def label(row: Row, seed: int) -> str:
    """A row and seed in words."""
    return f"{row.name}, seed {seed}"


def snn_teacher_of(row: Row, scale: Scale) -> Row:
    """Return the row whose network is the teacher of a row of spike-based distillation."""
    return replace(row, net=SNN_TEACHER[scale], method="hybrid")


def reproduce(
    table: str,
    rows: Sequence[str] = (),
    scale: Scale = "small",
    seeds: int = 3,
    root: str | Path = "data",
    run_dir: str | Path = "runs/reproduce",
    teacher_checkpoint: str | Path | None = None,
    device: str | None = None,
    processes: int | None = None,
    where: cluster.Cluster | None = None,
) -> str:
    """Run a table of the papers and write it beside the printed numbers.

    Every row has a run folder under ``run_dir/scale``, which all tables share: teachers and intermediate
    ANNs are trained once, finished rows are not run again, and interrupted rows resume. The table is
    written to ``run_dir/scale/table_NAME.md`` and ``.csv``, with ``_curves.csv`` and ``.png`` (accuracy
    after each time step) and ``_spikes.csv`` (mean spikes per neuron of each layer) beside it.

    Args:
        table: ``"I"`` to ``"IV"``, ``"Fig3"`` to ``"Fig7"`` (LaSNN), ``"1"`` to ``"3"`` (reverse
            distillation).
        rows: only rows whose name has one of these between its slashes, as ``"vgg5/lasnn"``; all rows, or
            at a reduced scale those of the networks that fit it, if none is given.
        scale: ``"full"``, the paper's settings; ``"small"``, about an hour of two cores; ``"smoke"``, a test.
        seeds: number of seeds, starting at 0.
        root: folder of the data sets; ``root/NAME.npz`` is used if it exists, else the data set that
            torchvision or Tonic downloads there.
        run_dir: folder of all scales.
        teacher_checkpoint: a trained ResNet-20 for CIFAR-10 (see :func:`~lasnn_sj.models.published_resnet20`)
            where a row's teacher is a ResNet-20.
        device: ``"cpu"``, ``"cuda"``, ...; all GPUs if not given, the CPU without a GPU.
        processes: number of rows that run at once; one per GPU, or one on the CPU, if not given.
        where: a cluster, or in processes of this one.

    Returns:
        The table in Markdown, or with ``where.status`` the state of its rows.

    Raises:
        ExperimentError: no such table, row, scale or data set, or rows that failed (the others are written).
        LockError: another launcher runs this table.
        ClusterError: the cluster refuses a job.
    """
    chosen, where = choose(table, rows, scale), where or cluster.Cluster()
    if seeds < 1:
        raise ExperimentError(f"seeds must be at least 1, got {seeds}")
    devices = [device] if device else ["cpu"] if where.launcher or where.status else _devices()
    runner = TableRunner(
        scale,
        Path(root),
        Path(run_dir) / scale,
        None if teacher_checkpoint is None else Path(teacher_checkpoint),
        devices[0],
    )
    rows = [row for row in chosen if not row.cited]
    phases = _phases(runner, rows, seeds)
    jobs, held = runner.run_dir / "cluster", runner.run_dir / "cluster" / f"table_{table}"
    if where.status:
        every = [runner.job(one) for phase in phases for one in phase]
        return cluster.described(cluster.states(jobs, every, held))
    distributed.initialise(torch.device(devices[0]))
    distributed.main_first(lambda: _check_data(runner, rows))

    def begin() -> None:
        files.make_folder(runner.run_dir)
        files.remove_parts(runner.run_dir, files.ABANDONED)

    distributed.by_main(begin)
    log.info("table %s at scale %s: %d rows, %d seeds of each", table, scale, len(rows), seeds)
    with cluster.running(where, jobs, held, devices, processes or len(devices), runner.job) as run:
        failed = _run_all(runner, phases, run)
    results: Results = {}
    for row in rows:
        for seed in range(seeds):
            if label(row, seed) not in failed:
                results[row, seed] = runner.run(row, seed)
    stem = runner.run_dir / f"table_{table}"
    text = distributed.of_main(
        lambda: report.write(stem, table, TABLES[table], scale, results, chosen, runner.device)
    )
    if failed:
        listed = "; ".join(f"{name}: {why}" for name, why in failed.items())
        raise ExperimentError(
            f"{len(failed)} of {len(rows) * seeds} rows failed (the others are kept): {listed}"
        )
    return text


def _check_data(runner: TableRunner, rows: Sequence[Row]) -> None:
    """Load every data set once, before anything is trained.

    Raises:
        ExperimentError: with a line for each data set that is missing or damaged.
    """
    missing = {}
    for row in {(row.dataset, row.reverse): row for row in rows}.values():
        try:
            runner.samples(row)
        except (OSError, ValueError, ImportError) as error:
            missing.setdefault(row.dataset, str(error).splitlines()[0])
    if missing:
        listed = "".join(f"\n  {name}: {error}" for name, error in missing.items())
        raise ExperimentError(f"{len(missing)} data sets are missing; no row was run:{listed}")


def choose(table: str, names: Iterable[str] = (), scale: Scale = "small") -> list[Row]:
    """Select the rows of a table that :func:`reproduce` runs."""
    if table not in TABLES:
        raise ExperimentError(f"unknown table {table!r}; known are {', '.join(TABLES)}")
    if scale not in SCALES:
        raise ExperimentError(f"unknown scale {scale!r}; known are {', '.join(SCALES)}")
    found: Table = TABLES[table]
    names = list(names)
    for name in names:
        if not any(_named(row, name) for row in found.rows):
            listed = "\n  ".join(row.name for row in found.rows)
            raise ExperimentError(f"table {table} has no row {name!r}; it has\n  {listed}")
    if names:
        return [row for row in found.rows if any(_named(row, name) for name in names)]
    if scale == "full":
        return list(found.rows)
    # what is left of Tiny ImageNet or of 128 x 128 events at a reduced scale is another task
    fits = [row for row in found.rows if row.net in found.small and row.dataset in ("cifar10", "cifar100")]
    # reduced, rows with different teachers may be the same run
    return list({_run_of(row, scale): row for row in reversed(fits)}.values())[::-1]


def _named(row: Row, name: str) -> bool:
    return row.name == name or f"/{row.name}/".find(f"/{name}/") >= 0


def _run_of(row: Row, scale: Scale) -> tuple:
    settings = (scales.reverse_kd if row.reverse else scales.lasnn)(row, scale, 0)
    return row.dataset, row.method, json.dumps(repr(settings.recipe))


def _devices() -> list[str]:
    """All GPUs, or the CPU; under torchrun each process has its own."""
    count = torch.cuda.device_count()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return ["cuda" if count else "cpu"]
    return [f"cuda:{i}" for i in range(count)] or ["cpu"]


def _phases(runner: TableRunner, rows: Sequence[Row], seeds: int) -> list[list[tuple[str, list[Row], int]]]:
    """Group jobs ``(what, rows, seed)`` in phases; a phase needs only the results of earlier ones.

    Rows that share a run folder are one job, so that no two processes write into it.
    """
    first, ours = {}, [row for row in rows if not row.reverse]
    ours += [snn_teacher_of(row, runner.scale) for row in ours if STAGES[row.method].teacher == "snn"]
    for row in ours:
        if STAGES[row.method].teacher == "ann":
            name = scales.lasnn(row, runner.scale, 0).recipe.teacher
            if not runner._has_ready(row, name):
                first[row.dataset, name] = ("teacher", [row], 0)
        for seed in range(seeds):
            first[row.dataset, row.net, seed] = ("ann", [row], seed)
    second: dict[Path, tuple[str, list[Row], int]] = {}
    third: dict[Path, tuple[str, list[Row], int]] = {}
    for seed in range(seeds):
        for row in dict.fromkeys([*ours, *rows]):
            phase = third if not row.reverse and STAGES[row.method].teacher == "snn" else second
            phase.setdefault(runner.folder(row, seed), ("rows", [], seed))[1].append(row)
    return [list(jobs.values()) for jobs in (first, second, third) if jobs]


def _run_all(
    runner: TableRunner, phases: Sequence[Sequence[tuple[str, list[Row], int]]], run: Callable
) -> dict[str, str]:
    """Run everything; returns why rows failed, by :func:`label`."""
    failed: dict[str, str] = {}
    begun, done, total = time.monotonic(), 0, sum(map(len, phases))
    for jobs in phases:
        for (what, chosen, seed), errors, error in run(runner.work, jobs):
            if error is not None:
                log.error("%s of %s, seed %d: %s", what, chosen[0].name, seed, error)
                errors = {label(row, seed): error for row in chosen} if what == "rows" else {}
            failed |= errors or {}
            done += 1
            left = (time.monotonic() - begun) / done * (total - done) / 60
            log.info("%d of %d jobs done, about %.0f minutes left", done, total, left)
    return failed
