"""What a report says: tables and pictures of runs, in the order of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from . import charts
from .charts import Line, Picture
from .reading import Part, Run, flat, number, numbers, record, records

COLUMNS = {
    "loss": "loss, all parts together",
    "ce": "cross-entropy",
    "attention": "attention loss (its weight included)",
    "kd": "distillation loss (its weight included)",
    "top1": "training accuracy, %",
    "val_loss": "validation loss",
    "val_top1": "validation accuracy, %",
    "lr": "learning rate",
}
UNITS = ((1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ"))


@dataclass
class Table:
    """A table of text; the first cell of each row heads it, rows in ``marked`` stand out."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    marked: set[int] = field(default_factory=set)


@dataclass
class Series:
    """One kind of part in runs that differ by their seeds alone."""

    label: str
    kind: str
    parts: list[tuple[Run, Part]]
    colour: int
    style: int

    def values(self, get: Callable[[Part], float | None]) -> list[float]:
        """What ``get`` finds, for each seed that has it."""
        found = [get(part) for _, part in self.parts]
        return [value for value in found if value is not None]

    def line(self, get: Callable[[Part], tuple[Sequence, Sequence]]) -> Line | None:
        """The curves that ``get`` finds; ``None`` where no seed has one."""
        curves = [curve for _, part in self.parts if (curve := get(part))[0]]
        return Line(self.label, curves, self.colour, self.style) if curves else None


def series_of(runs: Sequence[Run]) -> list[Series]:
    """The runs' parts by kind; seeds of one recipe go together, what differs otherwise does not."""
    recipes: list[list[Run]] = []
    for run in runs:
        alike = next((members for members in recipes if all(_alike(run, other) for other in members)), None)
        if alike is None:
            recipes.append([run])
        else:
            alike.append(run)
    found: dict[tuple[str, int], Series] = {}
    kinds = list(dict.fromkeys(part.kind for run in runs for part in run.parts))
    for variant, members in enumerate(recipes):
        of = ", ".join(run.name for run in members)
        for run in members:
            for part in run.parts:
                alone = len(recipes) == 1 or part.path == run.path
                label = part.title if alone else f"{part.title} ({of})"
                # from the end, where the methods stand that a run is about
                index = len(kinds) - 1 - kinds.index(part.kind) if len(kinds) > 1 else variant
                style = index // len(charts.SERIES) + (variant if len(kinds) > 1 and not alone else 0)
                series = Series(label, part.kind, [], index, style)
                found.setdefault((part.kind, variant), series).parts.append((run, part))
    order = [part.kind for run in runs for part in run.parts]
    return sorted(found.values(), key=lambda series: _place(series, runs, order))


def _alike(run: Run, other: Run) -> bool:
    """Whether two runs differ by their seeds alone, as far as both have settings."""
    there = {part.kind: part.settings for part in other.parts if part.settings}
    pairs = [(part.settings, there[part.kind]) for part in run.parts if part.settings and part.kind in there]
    return all(
        {**mine, "seed": None} == {**theirs, "seed": None}
        for mine, theirs in [(run.recipe, other.recipe), *pairs]
    )


def _place(series: Series, runs: Sequence[Run], order: Sequence[str]) -> int:
    longest = max(runs, key=lambda run: len(run.parts))
    kinds = [part.kind for part in longest.parts]
    return kinds.index(series.kind) if series.kind in kinds else len(kinds) + order.index(series.kind)


def results(series: Sequence[Series]) -> tuple[Table | None, list[Picture]]:
    """Accuracy, loss and cost of every part, against the ANN and the baseline, and as bars."""
    seeds = max((len(line.parts) for line in series), default=0)
    spread = "" if seeds < 2 else f", mean ± deviation of up to {seeds} seeds"
    kinds = {line.kind for line in series}
    columns: list[tuple[str, Callable[[Series], str]]] = [
        ("top-1 %", lambda line: _spread(line.values(_top1), ".2f")),
        ("no result, last validation: top-1 %", lambda line: _spread(line.values(_so_far), ".2f")),
    ]
    for against, title in (("ann", "ANN"), ("hybrid", "hybrid"), ("alone", "student alone")):
        if against in kinds:
            columns.append((
                f"points over {title}",
                lambda line, against=against: _spread(_gains(line, against), "+.2f"),
            ))  # fmt: skip
    for name, title, shape in (
        ("loss", "loss", ".3f"), ("teacher_top1", "its teacher, top-1 %", ".2f"),
        ("spikes_per_neuron", "spikes per neuron", ".3f"), ("seconds", "seconds", ".0f"),
        ("seconds_per_epoch", "seconds per epoch", ".1f"), ("peak_memory_mib", "peak memory, MiB", ".0f"),
    ):  # fmt: skip
        columns.append((title, lambda line, n=name, s=shape: _spread(line.values(lambda p: p.number(n)), s)))
    if seeds > 1:
        names = list(dict.fromkeys(run.name for line in series for run, _ in line.parts))
        for name in names:
            columns.append((
                name,
                lambda line, name=name: next(
                    (_text(_top1(part), ".2f") for run, part in line.parts if run.name == name), ""
                ),
            ))  # fmt: skip
    rows = [[line.label, *(cell(line) for _, cell in columns)] for line in series]
    rows = [row for row in rows if any(row[1:])]
    used = [0, *(i for i in range(1, len(columns) + 1) if any(row[i] for row in rows))]
    head = ["", *(title for title, _ in columns)]
    if not rows:
        return None, []
    table = Table(
        f"Results on the test data{spread}", [head[i] for i in used], [[row[i] for i in used] for row in rows]
    )
    names = list(dict.fromkeys(run.name for line in series for run, _ in line.parts))
    seeds_ = [_of_run(series, name) for name in names]
    drawn = Line("", [(list(found), list(found.values())) for found in seeds_])
    groups = [line.label for line in series if line.values(_top1)]
    if not groups:
        return table, []
    return table, [charts.bars("accuracy", "Accuracy on the test data", "top-1 %", groups, [drawn])]


def _of_run(series: Sequence[Series], name: str) -> dict[str, float]:
    found = {line.label: _top1(part) for line in series for run, part in line.parts if run.name == name}
    return {label: value for label, value in found.items() if value is not None}


def curves(series: Sequence[Series]) -> list[Picture]:
    """Every column of the metrics over the epochs; over the steps where no two epochs are done."""
    return [*_curves(series, "epoch"), *_curves(series, "step")]


def _curves(series: Sequence[Series], by: str) -> Iterator[Picture]:
    tables = [part.metrics if by == "epoch" else part.steps for line in series for _, part in line.parts]
    there = dict.fromkeys(name for rows in tables for row in rows for name in row)
    names = [name for name in COLUMNS if name in there]
    names += [name for name in there if name not in (*COLUMNS, "epoch", "step", "seconds")]
    for number_, name in enumerate(names):
        drawn = [line.line(lambda part, name=name: part.column(name, by)) for line in series]
        drawn = [line for line in drawn if line is not None]
        if drawn:
            title = COLUMNS.get(name, name)
            yield charts.lines(f"{by}_{number_}_{file_name(name)}", title, by, name, drawn)


def over_time(series: Sequence[Series]) -> tuple[list[Picture], Table | None]:
    """Accuracy after each time step, and against the energy that is spent by then."""
    anns = [line.values(_top1) for line in series if line.kind == "ann" and line.values(_top1)]
    ann = statistics.mean(anns[0]) if len(anns) == 1 else None  # of several networks none is the one
    # ten times the steps would press all others into a corner
    shown = [line for line in series if line.kind != "converted_10T"]
    by_step = [s for line in shown if (s := line.line(lambda p: _steps(p)))]
    pictures = []
    if by_step:
        pictures.append(charts.lines(
            "accuracy_over_time", "Accuracy after t of T time steps", "time step t", "top-1 %", by_step,
            across=ann, across_label="ANN",
        ))  # fmt: skip
    energies = [e for line in shown for e in line.values(lambda p: max(_energies(p), default=None))]
    if energies:
        ann_energy = {e for line in shown for e in line.values(lambda p: _operation(p, "ann_energy_pj"))}
        scale, unit = _unit(max([*energies, *ann_energy]))
        the_anns = ann_energy.pop() / scale if len(ann_energy) == 1 else None
        by_energy = [s for line in shown if (s := line.line(lambda p: _by_energy(p, scale)))]
        if by_energy:
            pictures.append(charts.lines(
                "accuracy_over_energy", "Accuracy against energy spent",
                f"energy of computing, {unit} per sample", "top-1 %", by_energy, across=ann,
                across_label="accuracy of the ANN", upright=the_anns,
                upright_label="energy of the ANN", log=True,
            ))  # fmt: skip
    table = Table("Accuracy and energy by time step", ["t"], [])
    timed = [line for line in shown if any(_steps(part)[0] for _, part in line.parts)]
    for line in timed:
        table.head += [f"{line.label}: top-1 %"]
        table.head += [f"{line.label}: energy"] * any(_energies(part) for _, part in line.parts)
    longest = max((len(_steps(part)[0]) for line in timed for _, part in line.parts), default=0)
    for t in range(longest):
        row = [str(t + 1)]
        for line in timed:
            row.append(_spread(line.values(lambda p, t=t: _at(_steps(p)[1], t)), ".2f"))
            if any(_energies(part) for _, part in line.parts):
                row.append(_energy(line.values(lambda p, t=t: _at(_energies(p), t))))
        table.rows.append(row)
    return pictures, table if table.rows else None


def operations(series: Sequence[Series]) -> Table | None:
    """Operations and energy of a sample beside those of the same network as ANN."""
    rows = []
    for line in series:
        synops = line.values(lambda p: _total(p, "synops"))
        energy = line.values(lambda p: max(_energies(p), default=None))
        ann = line.values(lambda p: _operation(p, "ann_energy_pj"))
        if not synops and not energy:
            continue
        ratio = [a / b for a, b in zip(energy, ann) if b > 0] if len(energy) == len(ann) else []
        rows.append([
            line.label,
            _spread(line.values(lambda p: number(p.inspection.get("T"))), ".0f"),
            _spread(synops, ",.0f"),
            _spread(line.values(lambda p: _total(p, "macs")), ",.0f"),
            _energy(energy),
            _spread(line.values(lambda p: _operation(p, "ann_macs")), ",.0f"),
            _energy(ann),
            _spread([100 * r for r in ratio], ".1f"),
        ])  # fmt: skip
    head = ["", "T", "SynOps", "MACs", "energy", "MACs as ANN", "energy as ANN", "% of the ANN's energy"]
    return Table("Operations and energy of computing, per sample", head, rows) if rows else None


def spikes(series: Sequence[Series]) -> tuple[list[Picture], list[Table]]:
    """Firing rate and spikes of each layer, and thresholds."""
    drawn_rate = [s for line in series if (s := line.line(lambda p: _layers(p, "firing_rate")))]
    drawn_spikes = [s for line in series if (s := line.line(_spikes))]
    pictures = []
    for name, title, x, drawn in (
        ("firing_rate", "Firing rate of each layer", "spikes per neuron and step", drawn_rate),
        (
            "spikes_per_neuron",
            "Spikes of each layer",
            "spikes per neuron, all time steps",
            drawn_spikes,
        ),
    ):
        if drawn:
            groups = list(dict.fromkeys(g for line in drawn for curve in line.curves for g in curve[0]))
            pictures.append(charts.bars(name, title, x, groups, drawn))
    tables = []
    for title, shape, get in (
        ("Thresholds by layer", ".4g", _thresholds),
        ("Mean spikes per neuron by layer, all time steps", ".4f", _spikes),
    ):
        found = {line.label: [dict(zip(*get(part))) for _, part in line.parts] for line in series}
        found = {label: columns for label, columns in found.items() if any(columns)}
        layers = list(dict.fromkeys(layer for columns in found.values() for c in columns for layer in c))
        rows = [
            [
                layer,
                *(_spread([c[layer] for c in columns if layer in c], shape) for columns in found.values()),
            ]
            for layer in layers
        ]
        if rows:
            tables.append(Table(title, ["layer", *found], rows))
    return pictures, tables


def configuration(runs: Sequence[Run], series: Sequence[Series]) -> list[Table]:
    """Recipes, then the settings of every part, then where and how they were run."""
    tables = [
        _compared("Recipe", {run.name: flat(run.recipe) for run in runs if run.recipe}),
        _compared("Settings of each training", _by_label(series, lambda part: flat(part.settings))),
        _compared(
            "Versions, hardware, seed and command line",
            _by_label(series, lambda part: flat(_environment(part))),
        ),
    ]  # fmt: skip
    return [table for table in tables if table.rows]


def _environment(part: Part) -> dict:
    found = record(part.inspection.get("environment"))
    if not found:
        return {}
    return {"seed": part.inspection.get("seed"), "parameters": part.inspection.get("parameters")} | found


def _by_label(series: Sequence[Series], get: Callable[[Part], dict[str, str]]) -> dict[str, dict[str, str]]:
    """Columns of a table of settings; where seeds differ, all their values."""
    found: dict[str, dict[str, str]] = {}
    for line in series:
        of_seeds = [settings for _, part in line.parts if (settings := get(part))]
        keys = dict.fromkeys(key for settings in of_seeds for key in settings)
        if keys:
            values = {key: dict.fromkeys(settings.get(key, "") for settings in of_seeds) for key in keys}
            found[line.label] = {key: ", ".join(different) for key, different in values.items()}
    return found


def _compared(caption: str, columns: dict[str, dict[str, str]]) -> Table:
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in keys]
    marked = {index for index, row in enumerate(rows) if len(set(row[1:])) > 1}
    return Table(caption, ["", *columns], rows, marked)


def _top1(part: Part) -> float | None:
    """The part's final accuracy on test data."""
    return part.number("top1")


def _so_far(part: Part) -> float | None:
    """Of a training without result the last accuracy on validation data."""
    values = part.column("val_top1")[1]
    return values[-1] if _top1(part) is None and values else None


def _gains(line: Series, against: str) -> list[float]:
    """Accuracy over another part of the same run, seed by seed."""
    if line.kind in (against, "teacher"):
        return []
    gains = []
    for run, part in line.parts:
        other = next((_top1(p) for p in run.parts if p.kind == against), None)
        mine = _top1(part)
        if mine is not None and other is not None:
            gains.append(mine - other)
    return gains


def _steps(part: Part) -> tuple[list[int], list[float]]:
    values = numbers(part.inspection.get("top1_over_time")) or numbers(part.result.get("top1_over_time"))
    return list(range(1, len(values) + 1)), values


def _operation(part: Part, name: str) -> float | None:
    return number(record(part.inspection.get("operations")).get(name))


def _total(part: Part, name: str) -> float | None:
    values = numbers(record(part.inspection.get("operations")).get(name))
    return sum(values) if values else None


def _energies(part: Part) -> list[float]:
    return numbers(record(part.inspection.get("operations")).get("energy_pj"))


def _by_energy(part: Part, scale: float) -> tuple[list[float], list[float]]:
    energies, values = _energies(part), numbers(part.inspection.get("top1_over_time"))
    pairs = list(zip(energies, values))
    return [e / scale for e, _ in pairs], [value for _, value in pairs]


def _layers(part: Part, name: str) -> tuple[list[str], list[float]]:
    layers = records(part.inspection.get("layers"))
    pairs = [(str(layer.get("name")), number(layer.get(name))) for layer in layers]
    pairs = [(layer, value) for layer, value in pairs if value is not None]
    return [layer for layer, _ in pairs], [value for _, value in pairs]


def _spikes(part: Part) -> tuple[list[str], list[float]]:
    found = _layers(part, "spikes_per_neuron")
    if found[0]:
        return found
    counted = {name: number(value) for name, value in record(part.result.get("spikes")).items()}
    counted = {name: value for name, value in counted.items() if value is not None}
    return list(counted), list(counted.values())


def _thresholds(part: Part) -> tuple[list[str], list[float]]:
    found = _layers(part, "v_threshold")
    if found[0]:
        return found
    balanced = {name: number(value) for name, value in part.thresholds.items()}
    balanced = {name: value for name, value in balanced.items() if value is not None}
    return list(balanced), list(balanced.values())


def _at(values: Sequence[float], index: int) -> float | None:
    return values[index] if index < len(values) else None


def _text(value: float | None, shape: str) -> str:
    return "" if value is None else f"{value:{shape}}"


def _spread(values: Sequence[float], shape: str) -> str:
    """A value, or mean and sample deviation of several that are not all the same."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{shape}}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):{shape.replace('+', '')}}"


def _unit(picojoules: float) -> tuple[float, str]:
    return next(((scale, unit) for scale, unit in UNITS if picojoules >= scale), UNITS[-1])


def _energy(picojoules: Sequence[float]) -> str:
    if not picojoules:
        return ""
    scale, unit = _unit(statistics.mean(picojoules))
    return f"{_spread([value / scale for value in picojoules], '.2f')} {unit}"


def file_name(text: str) -> str:
    """A text as part of a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)[:60]
