"""Common style of the figures: colours, axes, curves with their range over seeds, legends."""

from __future__ import annotations

import math
import numbers
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# name: (on a light page, on a dark one); the first eight tell series apart, by lightness too.
COLOURS = {
    "c0": ("#0b5fa5", "#6ab7ff"),
    "c1": ("#c2410c", "#ff9466"),
    "c2": ("#04745c", "#4fd6ae"),
    "c3": ("#9d3c7c", "#f09ad2"),
    "c4": ("#8a6100", "#f0c24b"),
    "c5": ("#4b3fb3", "#a9a0ff"),
    "c6": ("#52606d", "#b4c0cc"),
    "c7": ("#7a1fa2", "#d9a2f2"),
    "ink": ("#1b2733", "#e6ebf0"),
    "muted": ("#5a6775", "#a3b0bd"),
    "grid": ("#dde3e9", "#35414d"),
    "bad": ("#c81e1e", "#ff7b72"),
}
SERIES = [light for name, (light, _) in COLOURS.items() if name[1:].isdigit()]
INK, MUTED, GRID, BAD = (COLOURS[name][0] for name in ("ink", "muted", "grid", "bad"))
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")
DASHED, DOTTED = (0, (5, 3)), (0, (1, 2))
PANEL = (4.0, 2.3)  # inches, without the legend
MOST_POINTS = 400  # of a curve

Curve = tuple[Sequence[float], Sequence[float]]


def new_figure(
    panels: int = 1, height: float | None = None, width: float | None = None, ratios: Sequence[float] = ()
) -> tuple[Figure, list[Axes]]:
    """Make a figure with three panels in a row, or panels in one column with ``ratios`` of their heights."""
    from .figure import NotebookFigure

    columns = 1 if ratios else min(panels, 3)
    rows = math.ceil(panels / columns)
    size = (width or PANEL[0] * columns, height or PANEL[1] * rows)
    figure = NotebookFigure(figsize=size, layout="constrained", facecolor="white")
    grid = figure.add_gridspec(rows, columns, height_ratios=ratios or None)
    found = [figure.add_subplot(grid[n // columns, n % columns]) for n in range(panels)]
    for axes in found:
        axes.set_axisbelow(True)
        axes.patch.set_visible(False)
        axes.grid(visible=True, color=GRID, linewidth=0.8)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(MUTED)
        axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
        axes.xaxis.label.set(color=INK, size=9.5)
        axes.yaxis.label.set(color=INK, size=9.5)
        axes.xaxis.get_major_formatter().set_useOffset(False)
        axes.yaxis.get_major_formatter().set_useOffset(False)
    return figure, found


def by_seed(values: Mapping[str, object], kind: type | tuple[type, ...]) -> dict[str, list]:
    """Bring values by label into lists with one item for each seed.

    Args:
        values: an item, or a list of items, by label.
        kind: type of an item, or of what an item holds where it is itself a list.
    """
    found: dict[str, list] = {}
    for label, value in values.items():
        if isinstance(value, (numbers.Real, Mapping)):
            found[label] = [value]
        else:
            items = list(value)
            found[label] = [items] if items and isinstance(items[0], kind) else items
    return found


def draw_curve(
    axes: Axes, label: str, curves: Sequence[Curve], index: int, style: object | None = None
) -> None:
    """Draw curves of several seeds as mean and range, or one by one where their x values differ."""
    if not curves:
        return
    colour = SERIES[index % len(SERIES)]
    xs, ys = ([_thinned(curve[axis]) for curve in curves] for axis in (0, 1))
    shape = {"color": colour, "linewidth": 1.8}
    shape["linestyle"] = style or STYLES[index // len(SERIES) % len(STYLES)]
    if max(map(len, xs)) <= 16:
        shape |= {"marker": MARKERS[index % len(MARKERS)], "markersize": 4.5}
    if len({len(places) for places in xs}) == 1:
        axes.plot(np.mean(xs, 0), np.mean(ys, 0), label=plain(label), **shape)
        if len(xs) > 1 and all((places == xs[0]).all() for places in xs):
            axes.fill_between(xs[0], np.min(ys, 0), np.max(ys, 0), color=colour, alpha=0.15, linewidth=0)
        return
    for number, (places, values) in enumerate(zip(xs, ys)):
        axes.plot(places, values, label=plain(label) if number == 0 else None, **shape)


def name_axes(axes: Axes, x: str, y: str) -> None:
    """Label both axes; an axis that counts epochs or steps gets whole numbers."""
    axes.set_xlabel(plain(x))
    axes.set_ylabel(plain(y))
    if x in ("epoch", "step", "time step"):
        from matplotlib.ticker import MaxNLocator

        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def make_room(axes: Axes, values: Sequence[float], percent: bool = False) -> None:
    """Give the vertical axis a minimum range, so that noise is not magnified: 5 points or a tenth."""
    if not values:
        return
    low, high = min(values), max(values)
    least = 5.0 if percent else 0.1 * max(abs(low), abs(high)) or 1.0
    if high - low < least:
        middle = (low + high) / 2
        low, high = middle - least / 2, middle + least / 2
        if percent:
            low, high = (95.0, 100.0) if high > 100 else (0.0, 5.0) if low < 0 else (low, high)
        margin = 0.05 * (high - low)
        axes.set_ylim(low - margin, high + margin)


def write(axes: Axes, text: str, x: float, y: float, colour: str) -> None:
    """Write a value to the right of a bar's end."""
    axes.annotate(
        text, (x, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5, color=colour,
        annotation_clip=False,
    )  # fmt: skip


def use_log(axis: Axis) -> None:
    """Make an axis logarithmic, with plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_data_interval()
    subs = (1,) if low > 0 and high / low > 200 else (1, 2, 5)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())


def add_legend(figure: Figure, panels: Sequence[Axes]) -> None:
    """Add one legend below the panels, in as many columns as the labels leave room for."""
    entries = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels()):
            entries.setdefault(label, handle)
    entries.pop("", None)
    if not entries:
        return
    width, height = figure.get_size_inches()
    columns = max(1, min(len(entries), int(width / (0.55 + 0.082 * max(map(len, entries))))))
    figure.set_figheight(height + 0.08 + 0.19 * math.ceil(len(entries) / columns))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False,
        fontsize=9, labelcolor=INK, handlelength=2.0, columnspacing=1.2, borderaxespad=0.2,
    )  # fmt: skip


def shared_scale(teacher: np.ndarray | None, student: np.ndarray | None) -> list[np.ndarray | None]:
    """Convert maps ``[N, h, w]`` of one level to colours ``[N, h, w, 3]``, uint8, on one scale per sample."""
    import matplotlib

    found: list[np.ndarray | None] = []
    for maps in (teacher, student):
        if maps is None:
            found.append(None)
            continue
        maps = np.nan_to_num(np.asarray(maps, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
        rms = np.sqrt(np.square(maps).mean((1, 2), keepdims=True))
        found.append(maps / np.where(rms > 0, rms, 1))
    high = np.max([maps.max((1, 2)) for maps in found if maps is not None] or [[1.0]], axis=0)
    high = np.where(high > 0, high, 1)[:, None, None]
    palette = matplotlib.colormaps["viridis"]
    return [
        None if m is None else (255 * palette(np.clip(m / high, 0, 1))[..., :3]).round().astype(np.uint8)
        for m in found
    ]


def energy_unit(picojoules: float) -> tuple[float, str]:
    """Return the largest unit of energy that leaves at least 1, as its picojoules and its name."""
    units = ((1e9, "mJ"), (1e6, "µJ"), (1e3, "nJ"), (1.0, "pJ"))
    return next((unit for unit in units if picojoules >= unit[0]), units[-1])


def deviation(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean minus and plus the sample deviation."""
    mean, half = statistics.mean(values), statistics.stdev(values)
    return mean - half, mean + half


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean (Student's t); ``None`` for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values) - half, statistics.mean(values) + half


def distance_columns(columns: Sequence[str] | Mapping[str, object]) -> list[str]:
    """Return the columns that hold distances of attention maps; that of flat maps is the last."""
    found = [n for n in columns if n.startswith(("attention_", "distance_")) and not n.endswith("_alpha")]
    return sorted(found, key=lambda name: name.endswith("_flat"))


def layer_labels(names: Sequence[str]) -> list[str]:
    """Shorten names of layers: drop a last part that all share, and cut long ones in the middle."""
    parts = [name.split(".") for name in names]
    while len(names) > 1 and min(map(len, parts)) > 1 and len({part[-1] for part in parts}) == 1:
        parts = [part[:-1] for part in parts]
    return [plain(".".join(part), 24) for part in parts]


def plain(text: str, most: int = 44) -> str:
    """Escape a name for matplotlib (formulas, a leading underscore, no UTF-8), and cut it where too long."""
    text = text.encode(errors="replace").decode()
    half = (most - 1) // 2
    text = text if len(text) <= most else f"{text[:half]}…{text[-half:]}"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def column(rows: Sequence[Mapping[str, float | None]], x: str, y: str) -> Curve:
    """Return two columns of rows, where both have a number."""
    points = [(row.get(x), row.get(y)) for row in rows]
    points = [(a, b) for a, b in points if a is not None and b is not None]
    return [a for a, _ in points], [b for _, b in points]


def _thinned(values: Sequence[float]) -> np.ndarray:
    """Thin a curve of more values than can be seen, evenly; the last value stays."""
    chosen = np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int)
    return np.asarray(values, dtype=float)[chosen]
