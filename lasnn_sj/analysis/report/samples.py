"""Test samples in a report: confusion matrix, attention maps, spikes and potentials of a few neurons."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from .. import plots
from ..spikes import Traces
from ..style import shared_scale
from . import charts
from .charts import Picture
from .reading import Part, number, numbers, records
from .series import Series, file_name


@dataclass
class Maps:
    """Attention maps of one student: for each sample its description and its images as data URIs."""

    columns: list[tuple[str, str]]
    rows: list[tuple[str, bool, list[tuple[str, str]]]]
    name: str
    sheet: bytes = field(repr=False)

    @property
    def taught(self) -> bool:
        """Return whether maps of a teacher are among them."""
        return any(who == "teacher" for who, _ in self.columns)


@dataclass
class Samples:
    """One student's part of the section.

    Attributes:
        label: of its series.
        title: its name.
        pictures: confusion matrix and raster, as far as there are.
        confused: the classes that are most often taken for one another, in words.
        maps: attention maps.
    """

    label: str
    title: str
    pictures: list[Picture]
    confused: str
    maps: Maps | None


def samples(series: Sequence[Series]) -> Iterator[Samples]:
    """Yield every inspected student, the first of several seeds."""
    for place, line in enumerate(series):
        for run, part in line.parts:
            title = line.label if len(line.parts) == 1 else f"{part.title}, {run.name}"
            name = f"{place}_{file_name(title)}"
            counts = _confusion(part)
            drawn = [_confusion_picture(part, counts, title, name), _raster_picture(part, title, name)]
            pictures = [picture for picture in drawn if picture is not None]
            maps = _maps(part, title, f"maps_{name}")
            if pictures or maps is not None:
                yield Samples(line.label, title, pictures, _confused(part, counts), maps)
                break


def class_names(part: Part) -> list[str] | None:
    """Return the names of the classes, if the inspection holds them."""
    found = part.inspection.get("classes")
    if isinstance(found, list) and found and all(isinstance(name, str) for name in found):
        return found
    return None


def _class(part: Part, label: object) -> str:
    names = class_names(part)
    if names and isinstance(label, int) and not isinstance(label, bool) and 0 <= label < len(names):
        return names[label]
    return f"class {label}"


def _confusion(part: Part) -> np.ndarray | None:
    counts = part.arrays.get("confusion")
    usable = counts is not None and counts.ndim == 2 and counts.shape[0] == counts.shape[1] > 1
    if not usable or not np.issubdtype(counts.dtype, np.integer) or counts.min() < 0:
        return None
    return counts


def _confusion_picture(part: Part, counts: np.ndarray | None, title: str, name: str) -> Picture | None:
    if counts is None:
        return None
    names = class_names(part)
    figure = plots.confusion_matrix(counts, names if names and len(names) == len(counts) else None)
    right = counts.trace()
    return charts.picture(
        figure, f"confusion_{name}", "Confusion matrix",
        f"Confusion matrix of {title}: {right} of {counts.sum()} samples lie on the diagonal.",
    )  # fmt: skip


def _confused(part: Part, counts: np.ndarray | None, most: int = 3) -> str:
    if counts is None:
        return ""
    off = counts - np.diag(np.diag(counts))
    said = []
    for place in np.argsort(-off, axis=None, kind="stable")[:most]:
        row, column = np.unravel_index(place, off.shape)
        if off[row, column]:
            of = f"{off[row, column]} of {counts[row].sum()}"
            said.append(f"{_class(part, int(row))} taken for {_class(part, int(column))} ({of})")
    return f"Most frequent errors: {'; '.join(said)}." if said else "No error on these data."


def _raster_picture(part: Part, title: str, name: str) -> Picture | None:
    traces = _traces(part)
    if traces is None:
        return None
    fired = sum(int(spikes.sum()) for spikes in traces.spikes.values())
    shown = sum(spikes.shape[1] for spikes in traces.spikes.values())
    about = records(part.inspection.get("examples"))
    what = f" on a sample of {_class(part, about[0].get('label'))}" if about else ""
    return charts.picture(
        plots.spike_raster(traces), f"raster_{name}", f"Spikes and potentials of a few neurons{what}",
        f"Spikes and potentials of {shown} neurons of {title}{what}: {fired} spikes.",
    )  # fmt: skip


def _traces(part: Part) -> Traces | None:
    """Return the recorded neurons, if their arrays match the inspection."""
    spikes, potentials = part.arrays.get("trace_spikes"), part.arrays.get("trace_potentials")
    if spikes is None or potentials is None or spikes.ndim != 2 or spikes.shape != potentials.shape:
        return None
    if not spikes.size or spikes.dtype.kind not in "bui" or potentials.dtype.kind != "f":
        return None
    potentials = np.nan_to_num(potentials.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0)
    found, first = Traces({}, {}, {}, {}), 0
    for layer in records(part.inspection.get("traces")):
        name, neurons = str(layer.get("layer")), numbers(layer.get("neurons"))
        if not neurons:
            return None
        last = first + len(neurons)
        found.spikes[name] = torch.from_numpy(spikes[:, first:last] != 0)
        found.potentials[name] = torch.from_numpy(potentials[:, first:last].copy())
        found.neurons[name] = [int(neuron) for neuron in neurons]
        threshold = number(layer.get("v_threshold"))
        if threshold is not None and threshold > 0:
            found.v_threshold[name] = threshold
        first = last
    return found if found.spikes and first == spikes.shape[1] else None


def _maps(part: Part, title: str, name: str) -> Maps | None:
    inputs = part.arrays.get("inputs")
    examples = records(part.inspection.get("examples"))
    if inputs is None or inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[3] != 3:
        return None
    count = min(len(inputs), len(examples))
    if not inputs.size or not count:
        return None
    columns, images = [("input", "")], [inputs[:count]]
    levels = records(part.inspection.get("levels"))
    pairs = [[_array(part, f"{who}_{level}", count) for who in ("teacher", "student")]
             for level in range(len(levels))]  # fmt: skip
    for names, pair in zip(levels, pairs):
        for who, tiles in zip(("teacher", "student"), shared_scale(*pair)):
            if tiles is not None:
                columns.append((who, str(names.get(who))))
                images.append(tiles)
    rows = []
    for n, about in enumerate(examples[:count]):
        cells = [(f"{who} {module}, sample {about.get('index')}", _uri(charts.png(tiles[n])))
                 for (who, module), tiles in zip(columns, images)]  # fmt: skip
        rows.append((_said(part, about), about.get("label") == about.get("prediction"), cells))
    figure = plots.attention_maps(
        inputs[:count], [pair[0] for pair in pairs], [pair[1] for pair in pairs],
        samples=[said for said, _, _ in rows], levels=[str(names.get("student")) for names in levels],
    )  # fmt: skip
    return Maps(columns, rows, name, charts.file(figure, f"Attention maps of {title}"))


def _said(part: Part, about: dict) -> str:
    """Describe a sample: its class, and wrong predictions of student and teacher."""
    label, guess, teacher = about.get("label"), about.get("prediction"), about.get("teacher")
    said = _class(part, label)
    if guess != label:
        said += f", taken for {_class(part, guess)}"
    return said if teacher is None or teacher == label else f"{said} (teacher: {_class(part, teacher)})"


def _array(part: Part, name: str, count: int) -> np.ndarray | None:
    """Return maps ``[N, H, W]``, if they are usable."""
    values = part.arrays.get(name)
    if values is None or values.ndim != 3 or len(values) < count or not values.size:
        return None
    return values[:count] if np.issubdtype(values.dtype, np.floating) else None


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
