"""Runs grouped as a report shows them: parts of one kind, seeds of one recipe together."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..stages import ANNS, STAGES
from ..style import energy_unit, interval
from .reading import Part, Run, number, numbers, record, records, short_names

BASELINES = ("hybrid", "alone")
NOT_TRAINED = tuple(name for name, stage in STAGES.items() if not stage.trained and name not in ANNS)


@dataclass
class Table:
    """A table of text; the first cell of each row heads it, rows in ``marked`` stand out."""

    caption: str
    head: list[str]
    rows: list[list[str]]
    marked: set[int] = field(default_factory=set)


@dataclass
class Series:
    """Parts of one kind, of runs that differ by their seeds alone."""

    label: str
    kind: str
    parts: list[tuple[Run, Part]]

    def values(self, get: Callable[[Part], float | None]) -> list[float]:
        """Return the values by seed that exist."""
        found = [get(part) for _, part in self.parts]
        return [value for value in found if value is not None]

    def curves(self, get: Callable[[Part], Sequence[float]]) -> list[Sequence[float]]:
        """Return the sequences by seed that are not empty."""
        return [found for _, part in self.parts if (found := get(part))]

    @property
    def is_student(self) -> bool:
        """Return whether this is a spiking network, judged by its kind."""
        return self.kind not in ANNS


def recipes_of(runs: Sequence[Run]) -> list[list[Run]]:
    """Group runs; seeds of one recipe go together, whatever differs otherwise does not."""
    recipes: list[list[Run]] = []
    for run in runs:
        alike = next((members for members in recipes if all(_alike(run, other) for other in members)), None)
        if alike is None:
            recipes.append([run])
        else:
            alike.append(run)
    return recipes


def series_of(runs: Sequence[Run]) -> list[Series]:
    """Group the runs' parts by kind and recipe."""
    recipes = recipes_of(runs)
    names = group_names(recipes)
    found: dict[tuple[str, int], Series] = {}
    for variant, members in enumerate(recipes):
        for run in members:
            for part in run.parts:
                alone = len(recipes) == 1 or part.path == run.path
                label = part.title if alone else f"{part.title} ({names[variant]})"
                series = found.setdefault((part.kind, variant), Series(label, part.kind, []))
                series.parts.append((run, part))
    longest = [part.kind for part in max(runs, key=lambda run: len(run.parts)).parts]
    order = longest + [part.kind for run in runs for part in run.parts]
    return sorted(found.values(), key=lambda series: order.index(series.kind))


def group_names(recipes: Sequence[Sequence[Run]]) -> list[str]:
    """Name groups of runs: by the parent folder if a group is all seeds in it, else by the runs."""
    above = [{run.path.resolve().parent for run in members} for members in recipes]
    found = []
    for members, parents in zip(recipes, above):
        whole = len(parents) == 1 and sum(parents == other for other in above) == 1
        if whole and all(re.fullmatch(r"seed_?\d+", run.path.name) for run in members):
            found.append(parents.pop())
        else:
            found.append(members[0].path)
    names = short_names(found)
    for index, members in enumerate(recipes):
        if found[index] == members[0].path and len(members) > 1:
            names[index] = ", ".join(run.name for run in members[:3]) + ", ..." * (len(members) > 3)
    return names


def _alike(run: Run, other: Run) -> bool:
    """Return whether two runs differ by their seeds alone; two runs of one seed do not."""
    if run.seed is None or run.seed == other.seed:
        return False
    there = {part.kind: part.settings for part in other.parts if part.settings}
    pairs = [(part.settings, there[part.kind]) for part in run.parts if part.settings and part.kind in there]
    return all(
        {**mine, "seed": None} == {**theirs, "seed": None}
        for mine, theirs in [(run.recipe, other.recipe), *pairs]
    )


def top1(part: Part) -> float | None:
    """Return the final accuracy on test data."""
    return part.number("top1")


def last_validation(part: Part) -> float | None:
    """Return the last validation accuracy of a training without a result."""
    values = part.column("val_top1")[1]
    return values[-1] if top1(part) is None and values else None


def gains(series: Series, against: str) -> list[float]:
    """Return the accuracy minus that of another part of the same run, seed by seed."""
    if series.kind in (against, "teacher"):
        return []
    found = []
    for run, part in series.parts:
        other = next((top1(p) for p in run.parts if p.kind == against), None)
        mine = top1(part)
        if mine is not None and other is not None:
            found.append(mine - other)
    return found


def over_time(part: Part) -> list[float]:
    """Return the accuracy after each time step."""
    return numbers(part.inspection.get("top1_over_time")) or numbers(part.result.get("top1_over_time"))


def exits(part: Part) -> list[tuple[float, float]]:
    """Return mean steps used and accuracy of samples that stop once confident, in order of steps."""
    found = record(part.inspection.get("early_exit"))
    steps, accuracy = numbers(found.get("steps")), numbers(found.get("top1"))
    return sorted(zip(steps, accuracy)) if len(steps) == len(accuracy) else []


def operation(part: Part, name: str) -> float | None:
    """Return a number of the operations."""
    return number(record(part.inspection.get("operations")).get(name))


def total(part: Part, name: str) -> float | None:
    """Return the operations of all time steps."""
    values = numbers(record(part.inspection.get("operations")).get(name))
    return sum(values) if values else None


def name_of(series: Sequence[Series], kind: str) -> str:
    """Name of a kind that others are measured against; its row's in a comparison."""
    rows = {part.row for line in series if line.kind == kind for _, part in line.parts}
    row = rows.pop() if len(rows) == 1 else None
    return row or {"ann": "ANN", "hybrid": "hybrid", "alone": "student alone"}[kind]


def judged_on(runs: Iterable[Run]) -> str:
    """Name of the data that the results are of."""
    parts = sorted({run.judged for run in runs})
    return f"{' or '.join(parts)} data"


def energies(part: Part) -> list[float]:
    """Return the energy spent by the end of each time step, in picojoules."""
    return numbers(record(part.inspection.get("operations")).get("energy_pj"))


def energy_share(part: Part) -> float | None:
    """Return the energy in percent of that of the same network as ANN."""
    spent, ann = energies(part), operation(part, "ann_energy_pj")
    return 100 * spent[-1] / ann if spent and ann else None


def by_layer(part: Part, name: str) -> dict[str, float]:
    """Return numbers of each layer, such as ``"firing_rate"``, from the inspection."""
    pairs = [
        (str(layer.get("name")), number(layer.get(name))) for layer in records(part.inspection.get("layers"))
    ]
    return {layer: value for layer, value in pairs if value is not None}


def spikes(part: Part) -> dict[str, float]:
    """Return the mean spikes per neuron of each layer."""
    return by_layer(part, "spikes_per_neuron") or _of(record(part.result.get("spikes")))


def thresholds(part: Part) -> dict[str, float]:
    """Return the threshold of each layer."""
    return by_layer(part, "v_threshold") or _of(part.thresholds)


def _of(found: Mapping[str, object]) -> dict[str, float]:
    return {name: value for name, raw in found.items() if (value := number(raw)) is not None}


def text(value: float | None, shape: str) -> str:
    """Format a number; an empty text without one."""
    return "" if value is None else f"{value:{shape}}"


def spread(values: Sequence[float], shape: str) -> str:
    """Format a value, or mean and sample deviation of several different values."""
    if not values:
        return ""
    mean = f"{statistics.mean(values):{shape}}"
    return mean if len(set(values)) == 1 else f"{mean} ± {statistics.stdev(values):{shape.replace('+', '')}}"


def gain_text(values: Sequence[float]) -> str:
    """Format a gain, or the mean of several with its 95 % interval."""
    ends = interval(values)
    if ends is None or len(set(values)) == 1:
        return spread(values, "+.2f")
    return f"{statistics.mean(values):+.2f} ± {(ends[1] - ends[0]) / 2:.2f}"


def energy_text(picojoules: Sequence[float]) -> str:
    """Format energies with their unit."""
    if not picojoules:
        return ""
    scale, unit = energy_unit(statistics.mean(picojoules))
    values = [value / scale for value in picojoules]
    decimals = max(0, 3 - len(f"{statistics.mean(values):.0f}"))
    return f"{spread(values, f'.{decimals}f')} {unit}"


def file_name(text: str) -> str:
    """Convert a text to a part of a file name."""
    return "".join(letter if letter.isalnum() else "_" for letter in text)[:60]
