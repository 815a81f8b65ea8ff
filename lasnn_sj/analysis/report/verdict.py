"""Title and verdict of a report: one sentence and three numbers."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..style import interval
from .reading import Run, number
from .series import (
    ANNS,
    BASELINES,
    NOT_TRAINED,
    Series,
    energy_share,
    gain_text,
    gains,
    group_names,
    judged_on,
    last_validation,
    name_of,
    recipes_of,
    spread,
    top1,
)

NBSP = "\N{NO-BREAK SPACE}"


@dataclass
class Verdict:
    """The upper part of the page.

    Attributes:
        sentence: result in one sentence.
        numbers: ``(value, meaning)``, three at most.
        caution: how far the numbers can be trusted.
        about: label of the series that the sentence is about.
    """

    sentence: str
    numbers: list[tuple[str, str]] = field(default_factory=list)
    caution: str = ""
    about: str = ""


def title_of(folders: Sequence[Path], runs: Sequence[Run]) -> str:
    """Return the heading of the page: the name of the folder, or of the compared runs."""
    if len(folders) == 1:
        path = folders[0].resolve()
        seed = re.fullmatch(r"seed_?(\d+)", path.name)
        return f"{path.parent.name}, seed {seed[1]}" if seed else path.name
    names = group_names(recipes_of(runs))
    if len(names) > 3:
        return f"Comparison of {len(names)} runs"
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def subtitle_of(runs: Sequence[Run], series: Sequence[Series]) -> str:
    """Return network, data set, time steps and encoding, as far as all runs share them."""

    def shared(name: str) -> object:
        values = {str(run.recipe.get(name)): run.recipe.get(name) for run in runs}
        return next(iter(values.values())) if len(values) == 1 else None

    steps = {number(p.inspection.get("T")) for s in series if s.is_student for _, p in s.parts} - {None}
    T = shared("T") or (f"{steps.pop():g}" if len(steps) == 1 else None)
    student = shared("student")
    if student is None:
        nets = {str(p.inspection.get("student")) for s in series for _, p in s.parts if p.inspection}
        student = nets.pop() if len(nets) == 1 else None
    data, encoding = shared("data"), shared("encoding")
    said = [str(student)] if isinstance(student, str) else []
    said += [f"on {data}"] if isinstance(data, str) else []
    words = " ".join(said)
    rest = [f"T = {T}"] if T else []
    rest += [f"{encoding} encoding"] if isinstance(encoding, str) else []
    return ", ".join([words] * bool(words) + rest)


def verdict_of(series: Sequence[Series]) -> Verdict:
    """Summarize the best finished student, or how far the trainings are."""
    main, of = main_series(series)
    if main is None:
        return _unfinished(series)
    values = main.values(top1)
    accuracy, many = statistics.mean(values), len(values)
    kinds = {line.kind for line in series}
    baseline = next((kind for kind in BASELINES if kind in kinds and gains(main, kind)), None)
    sentence = f"{_capital(main.label)} reaches {accuracy:.2f}{NBSP}% accuracy"
    shown = [(f"{spread(values, '.2f')}{NBSP}%", f"accuracy of {main.label}")]
    gained: list[float] = []
    if baseline is not None:
        gained = gains(main, baseline)
        name = name_of(series, baseline)
        name = {"hybrid": "hybrid training", "student alone": "the student alone"}.get(name, name)
        sentence += f", {_points(statistics.mean(gained))} {name}"
        shown.append((gain_text(gained), f"points over {name}" + ", 95 % interval" * (len(gained) > 1)))
    over_ann = gains(main, "ann") if main.kind != "ann" else []
    if over_ann:
        joined = " and" if baseline is not None else ","
        sentence += f"{joined} {_points(statistics.mean(over_ann))} the ANN"
    share = main.values(energy_share)
    if share:
        sentence += f", with {statistics.mean(share):.0f}{NBSP}% of the ANN's energy of computing"
        shown.append((f"{spread(share, '.0f')}{NBSP}%", "of the ANN's energy of computing"))
    on = judged_on(run for run, _ in main.parts)
    fill = [(gain_text(over_ann), "points over the ANN")] if over_ann else []
    for name, meaning, shape in (
        ("spikes_per_neuron", "spikes per neuron", ".2f"),
        ("loss", f"cross-entropy on the {on}", ".3f"),
        ("samples", f"{on.removesuffix(' data')} samples", ".0f"),
    ):
        found = main.values(lambda part, name=name: part.number(name))
        fill += [(spread(found, shape), meaning)] if found else []
    return Verdict(f"{sentence}.", (shown + fill)[:3], _caution(main, many, of, gained), main.label)


def main_series(series: Sequence[Series]) -> tuple[Series | None, int]:
    """Return the series that the page is about, and the number of series it is the best of."""
    finished = [line for line in series if line.values(top1)]
    trained = [line for line in finished if line.is_student and line.kind not in NOT_TRAINED]
    methods = [line for line in trained if line.kind not in BASELINES]
    ours = [line for line in methods if line.kind == "lasnn"]
    converted = [line for line in finished if line.kind in NOT_TRAINED]
    for group in (ours, methods, trained, converted, [s for s in finished if s.kind in ANNS]):
        if group:
            return max(group, key=lambda line: statistics.mean(line.values(top1))), len(group)
    return None, 0


def _caution(main: Series, seeds: int, of: int, gained: Sequence[float]) -> str:
    on = judged_on(run for run, _ in main.parts)
    said = [f"The best of {of} on these {on}."] if of > 1 else []
    ends = interval(gained)
    if seeds > 1:
        said.append(f"Means of {seeds} seeds.")
        if ends is not None:
            sure = "excludes" if ends[0] > 0 or ends[1] < 0 else "includes"
            said.append(f"The gain's 95 % interval, {ends[0]:+.2f} to {ends[1]:+.2f} points, {sure} 0.")
        return " ".join(said)
    samples = main.values(lambda part: part.number("samples"))
    accuracy = statistics.mean(main.values(top1)) / 100
    if samples and samples[0] >= 1 and 0 <= accuracy <= 1:
        n = samples[0]
        # Wilson's interval: that of the normal distribution has no width at 100 %
        half = 1.96 / (1 + 1.96**2 / n) * math.sqrt(accuracy * (1 - accuracy) / n + (1.96 / (2 * n)) ** 2)
        said.append(
            f"One seed and {n:.0f} {on.removesuffix(' data')} samples: an accuracy is known to about "
            f"± {100 * half:.1f} points."
        )
    return " ".join(said)


def _unfinished(series: Sequence[Series]) -> Verdict:
    begun = [line for line in series if any(part.metrics or part.steps for _, part in line.parts)]
    if not begun:
        return Verdict("No training has finished an epoch yet, and there is no result.")
    main = next((line for line in reversed(begun) if line.is_student), begun[-1])
    part = max((part for _, part in main.parts), key=lambda part: len(part.metrics))
    epochs = len(part.metrics)
    done = f"{epochs} epoch{'s' * (epochs != 1)}" if epochs else f"{len(part.steps)} steps"
    shown = [(str(epochs or len(part.steps)), "epochs done" if epochs else "steps done")]
    sentence = f"{_capital(main.label)} has trained for {done}"
    validation = main.values(last_validation)
    if validation:
        sentence += f" and reaches {statistics.mean(validation):.2f}{NBSP}% validation accuracy"
        shown.append((f"{spread(validation, '.2f')}{NBSP}%", "validation accuracy"))
    for name, meaning, shape in (("top1", "% training accuracy", ".2f"), ("ce", "cross-entropy", ".3f"),
                                 ("loss", "training loss", ".3f")):  # fmt: skip
        ys = part.column(name)[1] or part.column(name, "step")[1]
        shown += [(f"{ys[-1]:{shape}}", meaning)] if ys else []
    return Verdict(f"{sentence}; there is no result on test data yet.", shown[:3])


def _points(gain: float) -> str:
    if round(gain, 2) == 0:
        return "as much as"
    size = f"{abs(gain):.2f}"
    return f"{size} point{'s' * (size != '1.00')} {'above' if gain > 0 else 'below'}"


def _capital(label: str) -> str:
    return label[:1].upper() + label[1:]
