"""Read run folders into plain values; a missing or damaged file becomes a note that names it."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from ...data.archives import ArchiveError, read_npz
from ...runtime.files import read_regular
from ..stages import ANNS, ORDER, folder_name, place, title

LARGEST = 1 << 28  # bytes of a file, and of an array in it
FORMAT = 1  # of inspection.json that this understands
FILES = ("settings.json", "metrics.csv", "result.json", "thresholds.json", "inspection.json",
         "weights.safetensors")  # fmt: skip


@dataclass
class Part:
    """One training, or another result, in a folder of its own.

    Attributes:
        path: its folder.
        kind: name of the folder, which tells it from the other parts of its run.
        settings, result, thresholds, inspection: the JSON files; empty where there is none to read.
        row: its name in a comparison.
        place: sorts the parts of a run.
        metrics, steps: one row for each epoch and step, numbers by column, ``None`` where a cell has none.
        arrays: inspection.npz.
    """

    path: Path
    kind: str
    settings: dict = field(default_factory=dict)
    result: dict = field(default_factory=dict)
    thresholds: dict = field(default_factory=dict)
    inspection: dict = field(default_factory=dict)
    row: str | None = None
    place: tuple = ()
    metrics: list[dict[str, float | None]] = field(default_factory=list)
    steps: list[dict[str, float | None]] = field(default_factory=list)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """Name of the row, or of the kind in words."""
        return self.row or title(self.kind)

    def number(self, name: str) -> float | None:
        """Return a number of the result, or else of the inspection."""
        value = number(self.result.get(name))
        return number(self.inspection.get(name)) if value is None else value

    def column(self, name: str, by: str = "epoch") -> tuple[list[float], list[float]]:
        """Return epochs (or steps) and values of a column of the metrics, if both exist."""
        points = [(row.get(by), row.get(name)) for row in (self.metrics if by == "epoch" else self.steps)]
        points = [(x, y) for x, y in points if x is not None and y is not None]
        return [x for x, _ in points], [y for _, y in points]


@dataclass
class Run:
    """A run folder with its parts, and notes on missing files.

    Attributes:
        path: the folder.
        name: name of the run among the report's others.
        recipe: recipe.json.
        config: config.yaml, as it is.
        judged: part of the data set that the results are of, ``"test"`` or ``"validation"``.
    """

    path: Path
    name: str
    recipe: dict = field(default_factory=dict)
    config: str | None = None
    judged: str = "test"
    parts: list[Part] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> object:
        """The seed, ``None`` where none is written down."""
        seeds = [self.recipe.get("seed"), *(part.settings.get("seed") for part in self.parts)]
        return next((seed for seed in seeds if seed is not None), None)


def read(folders: Iterable[str | Path]) -> list[Run]:
    """Read every run in the folders: a folder of one training, of stages or rows, or of several such runs.

    Runs are sought two folders deep, as the command line lays them out: ``runs/NAME/seed0``.

    Raises:
        NotADirectoryError: a path is not a folder.
        ValueError: a folder without any run.
    """
    runs: list[Run] = []
    folders = [Path(path) for path in folders]
    for path in folders:
        if not path.is_dir():
            what = "is a file" if path.exists() else "does not exist"
            raise NotADirectoryError(f"{path} {what}; a report is made of run folders")
    for path in folders:
        found = _runs_in(path)
        if not found:
            raise ValueError(
                f"{path} holds no run: none of {', '.join(FILES[:5])} is in it or in the folders below; give "
                f"the run_dir of a training"
            )
        for folder in found:
            if folder.resolve() not in [run.path.resolve() for run in runs]:
                below = folder != path or _compared(folder)
                above = _text(folder.parent / "config.yaml", []) if below else None
                runs.append(_read_run(folder, above))
    runs = _with_shared_parts(runs)
    names = short_names([run.path for run in runs])
    for run, name in zip(runs, names):
        run.name = name
        for part in run.parts:
            if part.path == run.path:
                part.kind = name
    return runs


def _with_shared_parts(runs: Sequence[Run]) -> list[Run]:
    """Give the seeds of a comparison the teacher and ANN that they share, in place of a run of their own."""
    shared = {run.path.parent: run for run in runs if run.path.name == "shared" and _compared(run.path)}
    seeds = [run for run in runs if shared.get(run.path.parent) is not run]
    for run in seeds:
        if run.path.parent in shared:
            there = [part.kind for part in run.parts]
            run.parts += [part for part in shared[run.path.parent].parts if part.kind not in there]
            run.parts.sort(key=lambda part: part.place)
    return seeds or list(runs)


def _compared(path: Path) -> bool:
    """Return whether a folder is part of a comparison."""
    return (path.parent / "comparison.json").exists()


def number(value: object) -> float | None:
    """Return a finite number, or ``None``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None


def numbers(value: object) -> list[float]:
    """Return a list of finite numbers; an empty one if anything else is in it."""
    found = [number(item) for item in value] if isinstance(value, list) else []
    return [] if None in found else found


def records(value: object) -> list[dict]:
    """Return the objects in a list."""
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def record(value: object) -> dict:
    """Return an object; an empty one if the value is something else."""
    return value if isinstance(value, dict) else {}


def flat(settings: Mapping, prefix: str = "") -> dict[str, str]:
    """Flatten settings to text; names of nested ones are joined by dots."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return found


def _read_run(path: Path, config: str | None) -> Run:
    run = Run(path, path.name)
    run.config = _text(path / "config.yaml", run.notes) or config
    run.recipe = _json(path / "recipe.json", run.notes, path)
    stages = (path / "recipe.json").exists()
    inside = [sub for sub in _folders(path) if _is_part(sub) or (stages and _is_empty(sub))]
    places = [path] * _is_part(path) + inside
    if not places:
        run.notes.append("nothing has begun: recipe.json is the only file")
    run.parts = [_read_part(place, path, stages and place != path, run.notes) for place in places]
    for part in run.parts:
        part.place = place(part.kind)
    if _compared(path):
        _name_rows(run)
    unseen = [
        part for part in run.parts
        if part.metrics and part.kind not in ANNS and not (part.path / "inspection.json").exists()
    ]  # fmt: skip
    if unseen:
        where = "" if unseen[0].path == path else f" in {', '.join(part.kind for part in unseen)}"
        run.notes.append(
            f"inspection.json is missing{where}: no attention maps, firing rates by layer or energy; "
            f"lasnn_sj.analysis.inspect(trainer, test_loader) writes it"
        )
    run.parts.sort(key=lambda part: part.place)
    return run


def _name_rows(run: Run) -> None:
    """Give the parts of a comparison their rows' names and order; the baseline is called hybrid inside."""
    try:
        about = record(yaml.safe_load(run.config or ""))
    except (yaml.YAMLError, RecursionError) as error:
        run.notes.append(f"config.yaml is damaged ({error}): rows have the names of their folders")
        about = {}
    rows = [row for row in record(about.get("rows")) if isinstance(row, str)]
    known = {folder_name(row): (number, row) for number, row in enumerate(rows)}
    if about.get("judge") == "validation":
        run.judged = "validation"
    for part in run.parts:
        if part.path.name in known:
            number, part.row = known[part.path.name]
            part.place = (len(ORDER), number)
            if part.row == about.get("baseline"):
                part.kind = "hybrid"
        elif part.kind == "start":
            part.row = "start (not trained)"


def _read_part(path: Path, run: Path, stage: bool, notes: list[str]) -> Part:
    part = Part(path, path.name)
    for name in ("settings", "result", "thresholds", "inspection"):
        setattr(part, name, _json(path / f"{name}.json", notes, run))
    part.settings.pop("fingerprint", None)
    part.metrics = _rows(path / "metrics.csv", "epoch", notes, run)
    if len(part.metrics) < 2:  # else the epochs say enough
        part.steps = _rows(path / "steps.csv", "step", notes, run)
    here = "" if path == run else f"{path.relative_to(run)}/"
    trained = (path / "settings.json").exists() or (path / "metrics.csv").exists()
    kept = _compared(run) and (path / "weights.safetensors").exists()  # balanced, and not evaluated there
    if stage and not kept and not (path / "result.json").exists():
        done = f"{len(part.metrics)} epochs are done" if trained else "it has not begun"
        notes.append(f"{here}result.json is missing: {path.name} is not finished, {done}")
    if trained and not (path / "metrics.csv").exists():
        notes.append(f"{here}metrics.csv is missing: no epoch is finished")
    if trained and not (path / "settings.json").exists():
        notes.append(f"{here}settings.json is missing: the settings of this training are not known")
    if part.inspection:
        _check_inspection(part, f"{here}inspection.json", notes)
        part.arrays = _arrays(path / "inspection.npz", notes, run)
    return part


def _check_inspection(part: Part, name: str, notes: list[str]) -> None:
    found, usable = part.inspection, {
        "top1_over_time": numbers(part.inspection.get("top1_over_time")),
        "layers": records(part.inspection.get("layers")),
        "operations": record(part.inspection.get("operations")),
        "examples": records(part.inspection.get("examples")),
        "levels": records(part.inspection.get("levels")),
        "environment": record(part.inspection.get("environment")),
    }  # fmt: skip
    if found.get("format") != FORMAT:
        notes.append(
            f"{name} has format {found.get('format')!r}, this report reads {FORMAT}: parts may be missing"
        )
    absent = [key for key, value in usable.items() if not value and not _said_to_be_absent(key, found)]
    if absent:
        notes.append(f"{name} has no usable {', '.join(absent)}")
    if isinstance(found.get("missing"), str):
        notes.append(f"{name} says: {found['missing']}")
    part.inspection = found | usable


def _said_to_be_absent(key: str, inspection: Mapping) -> bool:
    """Return whether the inspection notes that it lacks this part."""
    nothing = {"levels": [], "top1_over_time": None}
    return key in inspection and key in nothing and inspection[key] == nothing[key]


def _rows(path: Path, key: str, notes: list[str], run: Path) -> list[dict[str, float | None]]:
    text = _text(path, notes, run)
    if text is None:
        return []
    name = path.relative_to(run)
    try:
        lines = list(csv.reader(text.splitlines()))
    except csv.Error as error:
        notes.append(f"{name} is damaged: {error}")
        return []
    if not lines or key not in lines[0]:
        notes.append(f"{name} is damaged: its first line does not name the columns, {key} among them")
        return []
    columns, rows, bad, lost = lines[0], [], [], {}
    for index, line in enumerate(lines[1:], 2):
        if not line:
            continue
        row = dict(zip(columns, map(_cell, line)))
        if len(line) != len(columns) or row[key] is None or "bad" in row.values():
            bad.append(index)
        else:
            rows.append(row)
            for column, cell in zip(columns, line):
                if cell.strip() and row[column] is None:
                    lost.setdefault(column, []).append(f"{row[key]:g}")
    for column, places in lost.items():
        notes.append(
            f"{name}: {column} is not finite in {key} {', '.join(places[:8])}{', ...' * (len(places) > 8)}"
        )
    if bad or (rows and not text.endswith(("\n", "\r"))):
        lines_ = f"in line {', '.join(map(str, bad[:8]))}" if bad else "in its last line"
        notes.append(f"{name} is damaged or cut off {lines_}; what stands there is left out or may be short")
    elif not rows:
        notes.append(f"{name} holds no finished {key}")
    return rows


def _cell(text: str) -> float | str | None:
    if not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        return "bad"
    return number(value)


def _arrays(path: Path, notes: list[str], run: Path) -> dict[str, np.ndarray]:
    name = path.relative_to(run)
    if not path.exists():
        notes.append(f"{name} is missing: no attention maps")
        return {}
    found, damaged = {}, []
    try:
        _, names = read_npz(path, [])
        for key in names:
            try:
                found |= read_npz(path, [key], at_most=LARGEST)[0]
            except ArchiveError:
                damaged.append(key)
    except (OSError, ArchiveError) as error:
        notes.append(f"{name} is damaged: {error}")
        return {}
    if damaged:
        notes.append(f"{name} is damaged in {', '.join(damaged)}")
    return found


def _json(path: Path, notes: list[str], run: Path) -> dict:
    text = _text(path, notes, run)
    if text is None:
        return {}
    name, odd = path.relative_to(run), []
    try:
        found = json.loads(text, parse_constant=lambda word: odd.append(word) or float(word))
        json.dumps(found, ensure_ascii=False).encode()  # halves of characters could not be written
    except (ValueError, RecursionError) as error:
        notes.append(f"{name} is damaged: {error}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{name} is damaged: it holds no JSON object but {type(found).__name__}")
        return {}
    if odd:
        notes.append(f"{name} holds {len(odd)} numbers that are not finite, {odd[0]} first")
    return found


def _text(path: Path, notes: list[str], run: Path | None = None) -> str | None:
    if not path.exists():
        return None
    try:
        return read_regular(path.resolve(), at_most=LARGEST).decode()
    except (OSError, ValueError) as error:
        notes.append(f"{path.relative_to(run) if run else path} cannot be read: {error}")
        return None


def _folders(path: Path) -> list[Path]:
    hidden = ("checkpoints", "tensorboard")
    found = [sub for sub in path.iterdir() if sub.is_dir() and sub.name not in hidden]
    return sorted(sub for sub in found if not sub.name.startswith("."))


def _is_part(path: Path) -> bool:
    return any((path / name).exists() for name in (*FILES, "checkpoints"))


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir())


def _runs_in(path: Path, below: int = 2) -> list[Path]:
    """Return the folder itself if it is a run, else the runs in it; trainings side by side are one run."""
    if _is_part(path) or (path / "recipe.json").exists():
        return [path]
    inside = _folders(path)
    found = [path] if any(map(_is_part, inside)) else []
    deeper = [sub for sub in inside if below and not _is_part(sub)]
    return found + [run for sub in deeper for run in _runs_in(sub, below - 1)]


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest ends of the paths that tell them apart."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=1) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]
