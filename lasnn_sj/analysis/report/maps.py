"""Attention maps of a report: input, then teacher and student at each level, sample by sample."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from . import charts
from .page import Series, file_name
from .reading import Part, records


@dataclass
class Tiles:
    """Attention maps of one part: for each sample its description and its images as data URIs."""

    title: str
    columns: list[tuple[str, str]]
    rows: list[tuple[str, bool, list[tuple[str, str]]]]
    sheet_name: str
    sheet: bytes = field(repr=False)


def maps(series: Sequence[Series]) -> Iterator[Tiles]:
    """Attention maps of every part that has them: input, then teacher and student at each level."""
    several = len({run.name for line in series for run, _ in line.parts}) > 1
    found = 0  # titles may be alike where file names are cut
    for line in series:
        for run, part in line.parts:
            title = f"{line.label}, {run.name}" if several and part.path != run.path else line.label
            tiles = _tiles(part, title, f"maps_{found}_{file_name(title)}")
            if tiles is not None:
                found += 1
                yield tiles


def _tiles(part: Part, title: str, name: str) -> Tiles | None:
    inputs = part.arrays.get("inputs")
    examples = records(part.inspection.get("examples"))
    if (
        inputs is None
        or inputs.dtype != np.uint8
        or inputs.ndim != 4
        or inputs.shape[3] != 3
        or not inputs.size
    ):
        return None
    count = min(len(inputs), len(examples))
    columns, images = [("input", "")], [[inputs[n] for n in range(count)]]
    for level, names in enumerate(records(part.inspection.get("levels"))):
        found = {who: _maps(part, f"{who}_{level}", count) for who in ("teacher", "student")}
        found = {who: values for who, values in found.items() if values is not None}
        high = [max(values[n].max() for values in found.values()) for n in range(count)] if found else []
        for who, values in found.items():
            columns.append((who, str(names.get(who))))
            images.append([charts.map_colours(values[n], high[n]) for n in range(count)])
    rows, sheet = [], []
    for n in range(count):
        about = examples[n]
        label, guess = about.get("label"), about.get("prediction")
        said = f"class {label}" if label == guess else f"class {label}, taken for {guess}"
        if about.get("teacher") is not None and about["teacher"] != label:
            said += f" (teacher: {about['teacher']})"
        cells = [
            (f"{who} {module}, sample {about.get('index')}", _uri(charts.png(image[n])))
            for (who, module), image in zip(columns, images)
        ]
        rows.append((said, label == guess, cells))
        sheet.append((said, [image[n] for image in images]))
    if not rows:
        return None
    heads = [f"{who}\n{module}" for who, module in columns]
    drawn = charts.sheet(f"Attention maps of {title}", heads, sheet)
    return Tiles(title, columns, rows, name, drawn)


def _maps(part: Part, name: str, count: int) -> np.ndarray | None:
    """Maps ``[N, H, W]`` in units of their root mean square, so that those of other sizes compare."""
    values = part.arrays.get(name)
    if values is None or values.ndim != 3 or len(values) < count or not values.size:
        return None
    if not np.issubdtype(values.dtype, np.floating):
        return None
    return np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0) * np.sqrt(values.shape[1] * values.shape[2])


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()
