"""Tables and pictures of a report, in the order of the page."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

from ...training.metrics import NAMES, name_of
from .. import plots
from ..style import SERIES, column, distance_columns
from . import charts
from .charts import Picture
from .reading import Part, Run, flat, number, record
from .series import (
    BASELINES,
    NOT_TRAINED,
    Series,
    Table,
    energies,
    energy_share,
    energy_text,
    exits,
    file_name,
    gain_text,
    gains,
    judged_on,
    last_validation,
    operation,
    over_time,
    spikes,
    spread,
    text,
    thresholds,
    top1,
    total,
)
from .series import (
    name_of as name_of_kind,
)

AGAINST = ("ann", *BASELINES)
Column = tuple[str, Callable[[Series], str]]


def results(series: Sequence[Series]) -> tuple[list[Table], list[Picture]]:
    """Make the tables of accuracy, gains and cost, the main one first, and bars of accuracy and gains."""
    seeds = max((len(line.parts) for line in series), default=0)
    mean = "" if seeds < 2 else f", mean ± deviation of {seeds} seeds"
    kinds = {line.kind for line in series}

    def of(get: Callable[[Part], float | None], shape: str) -> Callable[[Series], str]:
        return lambda line: spread(line.values(get), shape)

    columns: list[Column] = [
        ("accuracy, %", of(top1, ".2f")),
        ("not finished; last validation accuracy, %", of(last_validation, ".2f")),
    ]
    for against in AGAINST:
        if against in kinds:
            title = f"points over {name_of_kind(series, against)}"
            if any(len(gains(line, against)) > 1 for line in series):
                title += ", 95 % interval"
            columns.append((title, lambda line, a=against: gain_text(gains(line, a))))
    columns += [
        ("its teacher, %", of(lambda p: p.number("teacher_top1"), ".2f")),
        ("spikes per neuron", of(lambda p: p.number("spikes_per_neuron"), ".3f")),
        ("energy, % of ANN", of(energy_share, ".1f")),
        ("seconds", lambda line: _mean(line.values(lambda p: p.number("seconds")), ".0f")),
    ]
    more: list[Column] = [
        ("cross-entropy", of(lambda p: p.number("loss"), ".3f")),
        ("test samples", of(lambda p: p.number("samples"), ".0f")),
        ("seconds per epoch", of(lambda p: p.number("seconds_per_epoch"), ".1f")),
        ("peak memory, MiB", of(lambda p: p.number("peak_memory_mib"), ".0f")),
    ]
    if seeds > 1:
        for name in dict.fromkeys(run.name for line in series for run, _ in line.parts):
            more.append((f"accuracy of {name}, %", lambda line, n=name: text(_of_run(line, n), ".2f")))
    on = judged_on(run for line in series for run, _ in line.parts)
    tables = [
        _table(f"Results on the {on}{mean}", series, columns),
        _table("Cross-entropy, time, memory and single runs", series, more),
    ]
    pictures = []
    # seeds that share a network have one value
    found = {line.label: v[:1] if len(set(v := line.values(top1))) == 1 else v for line in series}
    if any(found.values()):
        said = [f"{label} {statistics.mean(values):.4g}" for label, values in found.items() if values]
        pictures.append(charts.picture(
            plots.accuracies(found), "accuracy", f"Accuracy on the {on}",
            f"Accuracy on the {on} in percent: {', '.join(said)}.",
        ))  # fmt: skip
    against = next((kind for kind in (*BASELINES, "ann") if kind in kinds), None)
    gained = {line.label: gains(line, against) for line in series} if against else {}
    trained = [line.label for line in series if line.is_student and line.kind not in NOT_TRAINED]
    gained = {label: values for label, values in gained.items() if label in trained and values}
    if len(gained) > 1 or any(len(values) > 1 for values in gained.values()):
        said = [f"{label} {statistics.mean(values):+.4g}" for label, values in gained.items()]
        title = f"Gain over {name_of_kind(series, against)}"
        pictures.append(charts.picture(
            plots.gains(gained, over=name_of_kind(series, against)), "gains", title,
            f"{title} in points: {', '.join(said)}.",
        ))  # fmt: skip
    return [table for table in tables if table.rows], pictures


def _mean(values: Sequence[float], shape: str) -> str:
    return f"{statistics.mean(values):{shape}}" if values else ""


def _of_run(series: Series, name: str) -> float | None:
    return next((top1(part) for run, part in series.parts if run.name == name), None)


def _table(caption: str, series: Sequence[Series], columns: Sequence[Column]) -> Table:
    """Make a table of the rows and columns that hold anything."""
    rows = [[line.label, *(cell(line) for _, cell in columns)] for line in series]
    rows = [row for row in rows if any(row[1:])]
    used = [0, *(i for i in range(1, len(columns) + 1) if any(row[i] for row in rows))]
    head = ["", *(title for title, _ in columns)]
    return Table(caption, [head[i] for i in used], [[row[i] for i in used] for row in rows])


def curves(series: Sequence[Series]) -> list[tuple[str, list[Picture]]]:
    """Plot the metrics of students and of ANNs; over the steps if there is only one epoch."""
    found = []
    for title, name, student in (("Students", "student", True), ("Teacher and ANN", "ann", False)):
        # the others keep their colours
        group = {line.label: line if line.is_student is student else None for line in reversed(series)}
        pictures = [p for by in ("epoch", "step") for p in _curves(group, by, name)]
        if pictures:
            found.append((title, pictures))
    return found if len(found) > 1 else [("", pictures) for _, pictures in found]


def _curves(series: Mapping[str, Series | None], by: str, group: str) -> Iterator[Picture]:
    rows = {
        label: [] if line is None else line.curves(lambda p: p.metrics if by == "epoch" else p.steps)
        for label, line in series.items()
    }
    every = [row for seeds in rows.values() for history in seeds for row in history]
    there = dict.fromkeys(name for row in every for name in row)
    distances = distance_columns(there)
    names = [name for name in NAMES if name in there]
    names += [
        name for name in there if name not in (*NAMES, *distances, "epoch", "step", "seconds", "skipped")
    ]
    if "ce" in there and all(row.get("loss") == row.get("ce") for row in every):
        names.remove("loss")  # the same curve twice
    for place, name in enumerate(names):
        drawn = {label: [column(history, by, name)[1] for history in seeds] for label, seeds in rows.items()}
        drawn = {label: [ys for ys in seeds if len(ys) > 1] for label, seeds in drawn.items()}
        ends = [f"{label} ends at {_ends(seeds)}" for label, seeds in drawn.items() if seeds]
        fixed = name == "lr" and all(len(set(ys)) == 1 for seeds in drawn.values() for ys in seeds)
        if ends and not fixed:
            title = name_of(name)
            yield charts.picture(
                plots.training_curves(rows, [name], by=by), f"{group}_{by}_{place}_{file_name(name)}",
                title[0].upper() + title[1:], f"{title} over {by}. {'; '.join(ends)}.",
            )  # fmt: skip
    if distances and by == "epoch":
        for place, (label, histories) in enumerate(rows.items()):
            seeds = [h for h in histories if len(h) > 1 and any(h[-1].get(n) is not None for n in distances)]
            if seeds:
                found = {n: [ys for h in seeds if (ys := column(h, by, n)[1])] for n in distances}
                said = [f"{name_of(n)} ends at {_ends(curves)}" for n, curves in found.items()]
                title = f"Distance of the attention maps by level, {label}"
                yield charts.picture(
                    plots.map_distances(seeds), f"distances_{place}_{file_name(label)}", title,
                    f"{title}, over epoch. {'; '.join(said)}.",
                )  # fmt: skip


def over_steps(series: Sequence[Series]) -> tuple[list[Picture], Table | None]:
    """Plot the accuracy after each time step, and against the energy spent by then."""
    anns = [line.values(top1) for line in series if line.kind == "ann" and line.values(top1)]
    ann = statistics.mean(anns[0]) if len(anns) == 1 else None  # of several networks none is the one
    # Ten times the steps would press all others into a corner. Colours stay those of the other pictures.
    shown = [line.label for line in _shown(series)]
    accuracy = {s.label: s.curves(over_time) if s.label in shown else [] for s in reversed(series)}
    energy = {line.label: line.curves(energies) for line in reversed(series)}
    pictures = []
    if any(len(curve) > 1 for seeds in accuracy.values() for curve in seeds):
        said = [f"{label} ends at {_ends(seeds)}" for label, seeds in accuracy.items() if seeds]
        said += [] if ann is None else [f"ANN: {ann:.4g}"]
        pictures.append(charts.picture(
            plots.accuracy_over_time(accuracy, ann_top1=ann), "accuracy_over_time",
            "Accuracy when stopped after t time steps",
            f"Accuracy when stopped after t time steps. {'; '.join(said)}.",
        ))  # fmt: skip
    pictures += _early_exit({s.label: s.curves(exits) if s.label in shown else [] for s in reversed(series)})
    both = {label: seeds if energy[label] else [] for label, seeds in accuracy.items()}
    if any(len(curve) > 1 for seeds in both.values() for curve in seeds):
        of_ann = {e for line in series for e in line.values(lambda p: operation(p, "ann_energy_pj"))}
        of_ann = of_ann.pop() if len(of_ann) == 1 else None
        said = [
            f"{label} ends at {energy_text([s[-1] for s in energy[label]])}" for label in both if both[label]
        ]
        pictures.append(charts.picture(
            plots.accuracy_over_energy(both, energy, ann_top1=ann, ann_energy_pj=of_ann),
            "accuracy_over_energy", "Accuracy against energy",
            f"Accuracy against energy. {'; '.join(said)}.",
        ))  # fmt: skip
    table = Table("Accuracy and energy by time step", ["time step"], [])
    timed = [line.label for line in series if accuracy[line.label]]
    for label in timed:
        table.head += [f"{label}: accuracy, %"] + [f"{label}: energy"] * bool(energy[label])
    longest = max((len(curve) for seeds in accuracy.values() for curve in seeds), default=0)
    for t in range(longest):
        row = [str(t + 1)]
        for label in timed:
            row.append(spread([curve[t] for curve in accuracy[label] if t < len(curve)], ".2f"))
            if energy[label]:
                row.append(energy_text([curve[t] for curve in energy[label] if t < len(curve)]))
        table.rows.append(row)
    return pictures, table if table.rows else None


def _early_exit(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> list[Picture]:
    """Plot the accuracy against the mean steps used by samples that stop once confident."""
    if not any(len(points) > 1 for seeds in curves.values() for points in seeds):
        return []
    said = []
    for label, seeds in curves.items():
        for points in seeds[:1]:
            full = points[-1][1]
            steps, top1 = next(point for point in points if point[1] >= full - 0.5)
            said.append(f"{label}: {top1:.4g} with {steps:.3g} steps, {full:.4g} with all")
    return [charts.picture(
        plots.early_exit(curves), "early_exit", "Early exit: accuracy against mean time steps used",
        f"Accuracy when each sample stops once it is sure. {'; '.join(said)}.",
    )]  # fmt: skip


def _ends(seeds: Sequence[Sequence[float]]) -> str:
    return ", ".join(f"{curve[-1]:.4g}" for curve in seeds)


def _shown(series: Sequence[Series]) -> list[Series]:
    """Select the series of pictures of spikes and time steps; only trained ones if colours run out."""
    shown = [line for line in series if line.is_student and line.kind != "converted_10T"]
    return shown if len(shown) <= len(SERIES) else [s for s in shown if s.kind not in NOT_TRAINED]


def operations(series: Sequence[Series]) -> Table | None:
    """Tabulate operations and energy of a sample beside those of the same network as ANN."""

    def count(name: str) -> Callable[[Series], str]:
        return lambda line: spread(line.values(lambda p: total(p, name)), ",.0f")

    columns: list[Column] = [
        ("T", lambda line: spread(line.values(lambda p: number(p.inspection.get("T"))), ".0f")),
        ("SynOps", count("synops")),
        ("MACs", count("macs")),
        ("energy", lambda line: energy_text([e[-1] for e in line.curves(energies)])),
        ("MACs as ANN", lambda line: spread(line.values(lambda p: operation(p, "ann_macs")), ",.0f")),
        ("energy as ANN", lambda line: energy_text(line.values(lambda p: operation(p, "ann_energy_pj")))),
        ("% of the ANN's energy", lambda line: spread(line.values(energy_share), ".1f")),
    ]
    counted = [line for line in series if line.curves(energies) or line.values(lambda p: total(p, "synops"))]
    table = _table("Operations and energy of computing, per sample", counted, columns)
    return table if table.rows else None


def layers(series: Sequence[Series]) -> tuple[dict[bool, list[str]], list[Picture], list[Table]]:
    """List layers that never fire; plot the spikes of each layer, and thresholds."""
    # ten times the steps are ten times the spikes
    shown = [line.label for line in _shown(series)]
    found = {s.label: s.curves(spikes) if s.label in shown else [] for s in reversed(series)}
    silent: dict[bool, list[str]] = {True: [], False: []}
    for line in series:
        seeds = line.curves(spikes)
        never = [layer for layer in dict.fromkeys(n for s in seeds for n in s)
                 if all(s.get(layer, 0) == 0 for s in seeds)]  # fmt: skip
        if never:
            silent[line.kind not in NOT_TRAINED].append(f"{line.label}: {', '.join(never)}")
    pictures = []
    if any(found.values()):
        said = []
        for label, seeds in found.items():
            if seeds:
                each = {n: statistics.mean(s[n] for s in seeds if n in s) for s in seeds for n in s}
                said.append(f"{label}: {', '.join(f'{n} {value:.4g}' for n, value in each.items())}")
        pictures.append(charts.picture(
            plots.spikes_per_layer(found), "spikes_per_neuron", "Spikes of each layer",
            f"Spikes of each layer, per neuron and sample. {'; '.join(said)}.",
        ))  # fmt: skip
    tables = []
    for title, shape, get in (
        ("Mean spikes per neuron by layer, all time steps", ".4f", spikes),
        ("Thresholds by layer", ".4g", thresholds),
    ):
        columns = {line.label: c for line in series if (c := line.curves(get))}
        names = list(dict.fromkeys(n for seeds in columns.values() for s in seeds for n in s))
        rows = [[n, *(spread([s[n] for s in seeds if n in s], shape) for seeds in columns.values())]
                for n in names]  # fmt: skip
        if rows:
            tables.append(Table(title, ["layer", *columns], rows))
    return silent, pictures, tables


def configuration(runs: Sequence[Run], series: Sequence[Series]) -> list[Table]:
    """Tabulate folders, recipes, the settings of every part, and the environment."""
    tables = [
        Table("Folders", ["", "folder"], [[run.name, str(run.path)] for run in runs]),
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
    """Return the columns of a table of settings; all values where seeds differ."""
    found: dict[str, dict[str, str]] = {}
    for line in series:
        of_seeds = [settings for _, part in line.parts if (settings := get(part))]
        keys = dict.fromkeys(key for settings in of_seeds for key in settings)
        if keys:
            values = {key: dict.fromkeys(settings.get(key, "") for settings in of_seeds) for key in keys}
            found[line.label] = {key: ", ".join(different) for key, different in values.items()}
    return found


def _compared(caption: str, columns: Mapping[str, Mapping[str, str]]) -> Table:
    keys = list(dict.fromkeys(key for column in columns.values() for key in column))
    rows = [[key, *(column.get(key, "") for column in columns.values())] for key in keys]
    marked = {index for index, row in enumerate(rows) if len(set(row[1:])) > 1}
    return Table(caption, ["", *columns], rows, marked)
