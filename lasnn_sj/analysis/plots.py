"""Figures of training, spikes, energy and attention.

Each function returns a new :class:`matplotlib.figure.Figure`: a notebook shows it, and
``figure.savefig("curves.png")`` saves it. Where a function takes values by label, the labels are the names in
the legend, and a label with several sets of values (one for each seed) is drawn as their mean and range. A
label without values is left out but keeps its colour, so that figures beside each other can share colours.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import TYPE_CHECKING

import numpy as np

from ..training.metrics import NAMES, name_of
from . import style
from .spikes import Traces
from .style import BAD, DASHED, DOTTED, GRID, INK, MARKERS, MUTED, SERIES, layer_labels, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = Mapping[str, float | None]

MOST_BARS = 40  # above, a dot for each value
MOST_LAYERS = 8  # of a raster
FLAT = "sum, flat maps"


def training_curves(
    histories: Sequence[Row] | Mapping[str, Sequence[Row] | Sequence[Sequence[Row]]],
    columns: Sequence[str] | None = None,
    *,
    by: str = "epoch",
) -> Figure:
    """Plot columns of the metrics over the epochs, one panel for each.

    Args:
        histories: ``trainer.history`` (rows of ``metrics.csv``), or several by label.
        columns: names of the columns; all but the distances of single maps if not given.
        by: column on the horizontal axis, such as ``"step"``.

    Raises:
        ValueError: no rows, or a column that no row has.
    """
    by_label = style.by_seed(histories if isinstance(histories, Mapping) else {"": histories}, Mapping)
    rows = [row for seeds in by_label.values() for history in seeds for row in history]
    there = list(dict.fromkeys(name for row in rows for name in row if row[name] is not None))
    if columns is None:
        hidden = (by, "epoch", "step", "seconds", *style.distance_columns(there))
        columns = [
            *(n for n in NAMES if n in there),
            *(n for n in there if n not in (*NAMES, *hidden)),
        ]
    missing = [name for name in columns if name not in there]
    if missing or not columns:
        raise ValueError(f"histories must hold rows with {missing or 'columns to plot'}, got columns {there}")
    figure, panels = style.new_figure(len(columns))
    for axes, name in zip(panels, columns):
        values = []
        for index, (label, seeds) in enumerate(by_label.items()):
            curves = [style.column(history, by, name) for history in seeds]
            curves = [curve for curve in curves if curve[0]]
            style.draw_curve(axes, label, curves, index)
            values += [y for _, ys in curves for y in ys]
        style.name_axes(axes, by, name_of(name))
        positive = [value for value in values if value > 0]
        if name == "lr" and positive and max(positive) > 4 * min(positive):
            style.use_log(axes.yaxis)
        else:
            style.make_room(axes, values, percent=name.endswith("top1"))
    style.add_legend(figure, panels)
    return figure


def map_distances(history: Sequence[Row] | Sequence[Sequence[Row]], *, by: str = "epoch") -> Figure:
    """Plot the distances of a student's attention maps from the teacher's, level by level, over the epochs.

    Args:
        history: ``trainer.history`` of a training with :class:`~lasnn_sj.distillation.Attention`, whose
            columns ``attention_low``, ... hold the distances; or several, one for each seed. Where
            ``attention_flat`` is logged, the sum of the distances is drawn beside that of flat maps.
        by: column on the horizontal axis.

    Raises:
        ValueError: no such column.
    """
    seeds = style.by_seed({"": history}, Mapping)[""]
    names = style.distance_columns(dict.fromkeys(name for rows in seeds for row in rows for name in row))
    levels = [name for name in names if not name.endswith("_flat")]
    if not levels:
        raise ValueError("history must hold distances of attention maps by level, such as attention_low")
    figure, (axes,) = style.new_figure(1)
    drawn = {name.split("_", 1)[1]: [style.column(rows, by, name) for rows in seeds] for name in levels}
    if len(names) > len(levels):
        whole = [
            [row | {"sum": sum(row[n] for n in levels)} for row in rows if all(row.get(n) for n in levels)]
            for rows in seeds
        ]
        drawn["sum"] = [style.column(rows, by, "sum") for rows in whole]
        drawn[FLAT] = [style.column(rows, by, names[-1]) for rows in seeds]
    for index, (label, curves) in enumerate(drawn.items()):
        dash = DASHED if label == FLAT else None
        style.draw_curve(axes, label, [curve for curve in curves if curve[0]], index, dash)
    style.name_axes(axes, by, "distance of the maps")
    axes.set_ylim(bottom=0)
    style.add_legend(figure, [axes])
    return figure


def accuracy_over_time(
    top1: Mapping[str, Sequence[float] | Sequence[Sequence[float]]], *, ann_top1: float | None = None
) -> Figure:
    """Plot accuracy against the time step after which the network is stopped.

    Args:
        top1: accuracy in percent after 1, 2, ..., ``T`` steps, by label; see
            :func:`~lasnn_sj.training.evaluation.accuracy_over_time`.
        ann_top1: accuracy of the ANN, as a horizontal line.
    """
    figure, (axes,) = style.new_figure(1)
    for index, (label, seeds) in enumerate(style.by_seed(top1, Real).items()):
        style.draw_curve(axes, label, [(range(1, len(ys) + 1), ys) for ys in seeds], index)
    if ann_top1 is not None:
        axes.axhline(ann_top1, color=MUTED, linestyle=DASHED, linewidth=1.4, label="ANN")
    style.name_axes(axes, "time step", "accuracy, %")
    style.add_legend(figure, [axes])
    return figure


def early_exit(curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]]) -> Figure:
    """Plot accuracy against the mean number of time steps used, where samples stop once they are sure.

    Args:
        curves: ``(steps, accuracy in percent)`` of each threshold, one curve for each seed, by label; see
            ``early_exit`` of :func:`~lasnn_sj.training.evaluate`.
    """
    figure, (axes,) = style.new_figure(1)
    for index, (label, seeds) in enumerate(curves.items()):
        style.draw_curve(axes, label, [tuple(zip(*points)) for points in seeds], index)
    style.name_axes(axes, "mean time steps used", "accuracy, %")
    style.add_legend(figure, [axes])
    return figure


def accuracy_over_energy(
    top1: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    energy_pj: Mapping[str, Sequence[float] | Sequence[Sequence[float]]],
    *,
    ann_top1: float | None = None,
    ann_energy_pj: float | None = None,
) -> Figure:
    """Plot accuracy against the energy that a sample has cost when the network is stopped.

    Args:
        top1: as for :func:`accuracy_over_time`.
        energy_pj: picojoules after 1, 2, ..., ``T`` steps, by the same labels; see
            :attr:`~lasnn_sj.analysis.Operations.energy_pj`.
        ann_top1, ann_energy_pj: accuracy and energy of the ANN, as lines.
    """
    energies = style.by_seed(energy_pj, Real)
    values = [e for seeds in energies.values() for ys in seeds for e in ys]
    scale, unit = style.energy_unit(max([*values, ann_energy_pj or 0.0], default=0.0))
    figure, (axes,) = style.new_figure(1)
    for index, (label, seeds) in enumerate(style.by_seed(top1, Real).items()):
        pairs = [list(zip(e, ys)) for e, ys in zip(energies.get(label, []), seeds)]
        style.draw_curve(
            axes, label, [([e / scale for e, _ in p], [y for _, y in p]) for p in pairs if p], index
        )
    if ann_top1 is not None:
        axes.axhline(ann_top1, color=MUTED, linestyle=DASHED, linewidth=1.4, label="accuracy of the ANN")
    if ann_energy_pj is not None:
        axes.axvline(ann_energy_pj / scale, color=MUTED, linestyle=DOTTED, linewidth=1.6,
                     label="energy of the ANN")  # fmt: skip
    style.name_axes(axes, f"energy per sample, {unit}", "accuracy, %")
    style.use_log(axes.xaxis)
    style.add_legend(figure, [axes])
    return figure


def accuracies(
    top1: Mapping[str, float | Sequence[float]],
    *,
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Plot the accuracy of each method as a bar with its value.

    Args:
        top1: percent, by method; several values are seeds.
        intervals: ``(low, high)`` by method; mean ± sample deviation of the seeds if not given.
    """
    if intervals is None:
        seeds = style.by_seed(top1, ())
        intervals = {label: style.deviation(values) for label, values in seeds.items() if len(values) > 1}
    figure = _value_bars(top1, intervals, "accuracy, %", "{:.2f}")
    figure.axes[0].set_xticks((0, 50, 100))
    return figure


def gains(
    points: Mapping[str, float | Sequence[float]],
    *,
    over: str = "the baseline",
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """Plot the gain in accuracy of each method over a baseline as a bar with its value.

    Args:
        points: percentage points, by method; several values are seeds, each against the baseline's run of
            the same seed.
        over: name of the baseline.
        intervals: ``(low, high)`` by method; the 95 % interval of the seeds' mean if not given.
    """
    if intervals is None:
        seeds = style.by_seed(points, ())
        intervals = {label: ends for label, values in seeds.items() if (ends := style.interval(values))}
    figure = _value_bars(points, intervals, "points", "{:+.2f}")
    name = f"points over {plain(over, 32)}"
    if intervals:  # in a line of its own
        figure.set_figheight(figure.get_figheight() + 0.15)
        name += ",\n95 % interval"
    figure.axes[0].set_xlabel(name)
    figure.axes[0].axvline(0, color=INK, linewidth=1)
    return figure


def spikes_per_layer(
    spikes: Mapping[str, Mapping[str, float] | Sequence[Mapping[str, float]]],
    *,
    name: str = "spikes per neuron, all time steps",
) -> Figure:
    """Plot the spikes of each layer; layers that never fire are marked in red.

    Args:
        spikes: for each label the values by layer, such as
            :attr:`~lasnn_sj.analysis.SpikeStatistics.spikes_per_neuron`.
        name: name of the horizontal axis.
    """
    found = {label: _by_layer(seeds) for label, seeds in style.by_seed(spikes, ()).items()}
    layers = list(dict.fromkeys(layer for by_layer in found.values() for layer in by_layer))
    shown = {label: by_layer for label, by_layer in found.items() if by_layer}
    dots = len(shown) * len(layers) > MOST_BARS
    height = 0.24 * len(layers) if dots else max(0.2 * len(shown) + 0.1, 0.28) * len(layers)
    figure, (axes,) = style.new_figure(1, height + 0.6)
    thick = 0 if dots else 0.84 / max(len(shown), 1)
    most = max((max(values) for by_layer in shown.values() for values in by_layer.values()), default=1) or 1
    silent = set()
    for order, (label, by_layer) in enumerate(shown.items()):
        index = list(found).index(label)
        colour = SERIES[index % len(SERIES)]
        places = [layers.index(layer) + (order - (len(shown) - 1) / 2) * thick for layer in by_layer]
        means = [statistics.mean(values) for values in by_layer.values()]
        if dots:
            axes.plot(means, places, MARKERS[index % len(MARKERS)], color=colour, label=plain(label))
        else:
            hatch = "///" if index >= len(SERIES) else None
            axes.barh(places, means, thick * 0.85, color=colour, label=plain(label), hatch=hatch)
        for place, mean, (layer, values) in zip(places, means, by_layer.items()):
            if not dots and len(values) > 1:
                axes.hlines(place, min(values), max(values), color=INK, linewidth=1.2)
            if mean == 0:
                silent.add(layer)
                half = 0.4 if dots else thick * 0.42
                axes.plot([0, 0], [place - half, place + half], color=BAD, linewidth=3, clip_on=False)
            if mean == 0 or not dots:
                said, tone = ("never fires", BAD) if mean == 0 else (f"{mean:.3g}", MUTED)
                style.write(axes, said, max(values), place, tone)
    axes.set_yticks(range(len(layers)), [plain(text) for text in layer_labels(layers)])
    for tick, layer in zip(axes.get_yticklabels(), layers):
        tick.set_color(BAD if layer in silent else INK)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_xlim(0, most * (1.05 if dots else 1.18))
    style.name_axes(axes, name, "")
    axes.grid(visible=dots, axis="y")
    style.add_legend(figure, [axes])
    return figure


def spike_raster(traces: Traces, *, layers: Sequence[str] | None = None) -> Figure:
    """Plot the spikes of recorded neurons, and below them potentials: of three layers one neuron each, the
    median in spikes among those that fire.

    Args:
        traces: from :func:`~lasnn_sj.analysis.record_traces`.
        layers: names of the layers; eight of them, evenly spaced, if not given.

    Raises:
        ValueError: no layer, or one that was not recorded.
    """
    recorded = list(traces.spikes)
    if layers is None:
        places = np.linspace(0, len(recorded) - 1, min(MOST_LAYERS, len(recorded))).round().astype(int)
        layers = [recorded[place] for place in places]
    unknown = [name for name in layers if name not in traces.spikes]
    if unknown or not layers:
        raise ValueError(f"layers must be among {', '.join(recorded)}, got {', '.join(unknown) or 'none'}")
    rows = sum(traces.spikes[name].shape[1] for name in layers)
    tall = (max(0.075 * rows, 1.2), 1.5)
    figure, (raster, below) = style.new_figure(2, sum(tall) + 0.8, ratios=tall)
    raster.sharex(below)
    labels, first, ticks = layer_labels(layers), 0, []
    for index, name in enumerate(layers):
        spikes = np.asarray(traces.spikes[name], dtype=bool)
        T, M = spikes.shape
        times = [np.nonzero(spikes[:, m])[0] + 1 for m in range(M)]
        colour = SERIES[index % len(SERIES)]
        raster.eventplot(
            times, lineoffsets=first + np.arange(M), linelengths=0.8, linewidths=1.6, colors=colour
        )
        ticks.append(first + (M - 1) / 2)
        first += M
        raster.axhline(first - 0.5, color=GRID, linewidth=0.8)
    raster.set_ylim(first - 0.5, -0.5)
    raster.set_yticks(ticks, [plain(label) for label in labels])
    raster.grid(visible=False)
    raster.tick_params(labelbottom=False)
    chosen = sorted({0, len(layers) // 2, len(layers) - 1})
    scaled = all(traces.v_threshold.get(layers[index]) for index in chosen)
    for index in chosen:
        name = layers[index]
        spikes, v = (np.asarray(values[name]) for values in (traces.spikes, traces.potentials))
        counts = spikes.sum(0)
        ranked = sorted(np.nonzero(counts)[0].tolist(), key=lambda neuron: counts[neuron]) or [0]
        typical = ranked[len(ranked) // 2]  # the median of those that fire
        unit = traces.v_threshold[name] if scaled else 1.0
        style.draw_curve(below, labels[index], [(range(1, len(v) + 1), v[:, typical] / unit)], index)
    if scaled:
        below.axhline(1, color=MUTED, linestyle=DASHED, linewidth=1.2, label="threshold")
    style.name_axes(below, "time step", "potential / threshold" if scaled else "potential")
    below.set_xlim(0.5, T + 0.5)
    style.add_legend(figure, [below])
    return figure


def confusion_matrix(counts: np.ndarray, classes: Sequence[str] | None = None) -> Figure:
    """Plot how often samples of each class (row) are predicted as each class (column).

    Shades are shares of the row; up to 12 classes have their numbers in the cells.

    Args:
        counts: ``[K, K]``, numbers of samples.
        classes: names of the classes; their numbers if not given.

    Raises:
        ValueError: ``counts`` is not square, or there are not ``K`` names.
    """
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise ValueError(f"counts must be [K, K], got shape {counts.shape}")
    K = len(counts)
    if classes is not None and len(classes) != K:
        raise ValueError(f"classes must be {K} names, one for each row of counts, got {len(classes)}")
    names = [plain(str(name), 18) for name in (range(K) if classes is None else classes)]
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    figure, (axes,) = style.new_figure(1, 4.0)
    shades = np.zeros((K, K, 4))
    shades[..., :3] = np.array([59, 139, 208]) / 255  # seen on light and on dark
    shades[..., 3] = 0.75 * share
    axes.imshow(shades, interpolation="nearest", aspect="equal")
    if K <= 12:
        for row in range(K):
            for column in np.nonzero(counts[row])[0]:
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=8.5,
                          color=INK)  # fmt: skip
    every = max(1, math.ceil(K / 25))
    long = max(map(len, names)) > 2 or K > 12
    axes.set_xticks(range(0, K, every), names[::every], rotation=90 if long else 0)
    axes.set_yticks(range(0, K, every), names[::every])
    axes.tick_params(labelsize=8.5, length=0)
    style.name_axes(axes, "predicted class", "true class")
    axes.grid(visible=False)
    return figure


def attention_maps(
    inputs: np.ndarray,
    teacher: Sequence[np.ndarray | None],
    student: Sequence[np.ndarray | None],
    *,
    samples: Sequence[str] | None = None,
    levels: Sequence[str] | None = None,
) -> Figure:
    """Plot inputs and, level by level, the attention maps of teacher and student.

    The maps of a level share one scale for each sample: from 0 to the larger one's highest value, each in
    units of its own root mean square.

    Args:
        inputs: ``[N, H, W, 3]``, uint8.
        teacher, student: maps ``[N, h, w]`` of each level; ``None`` where there is none.
        samples: name of each row.
        levels: name of each level.
    """
    names = layer_labels(levels) if levels else [f"level {n + 1}" for n in range(len(teacher))]
    columns: list[tuple[str, np.ndarray]] = [("input", inputs)]
    for name, *maps in zip(names, teacher, student, strict=True):
        tiles = style.shared_scale(*maps)
        columns += [(f"{who}\n{name}", t) for who, t in zip(("teacher", "student"), tiles) if t is not None]
    side, gap = 64, 6
    step, N = side + gap, len(inputs)
    pixels = np.full((step * N - gap, step * len(columns) - gap, 4), 0, np.uint8)
    for column, (_, tiles) in enumerate(columns):
        for row, tile in enumerate(tiles):
            h, w = tile.shape[:2]
            resized = tile[np.arange(side) * h // side][:, np.arange(side) * w // side]
            place = pixels[row * step : row * step + side, column * step : column * step + side]
            place[..., :3], place[..., 3] = resized, 255
    longest = max(len(line) for name, _ in columns for line in name.split("\n"))
    scale = max(1.0, longest / 11)  # room for the names above the columns
    figure, (axes,) = style.new_figure(1, 0.8 * N * scale + 1.1, width=0.8 * len(columns) * scale + 2.4)
    axes.imshow(pixels)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8.5, labeltop=True, labelbottom=False)
    middles = [side / 2 + step * n for n in range(max(N, len(columns)))]
    axes.set_xticks(middles[: len(columns)], [name for name, _ in columns])
    axes.set_yticks(middles[:N], [plain(name) for name in samples or map(str, range(N))])
    if len(columns) > 1:
        from matplotlib.cm import ScalarMappable

        bar = figure.colorbar(ScalarMappable(cmap="viridis"), ax=axes, shrink=min(1.0, 3 / N), aspect=15)
        bar.set_ticks([0, 1], labels=["0", "highest"], fontsize=8.5, color=INK)
        bar.outline.set_visible(False)
    return figure


def _value_bars(
    values: Mapping[str, float | Sequence[float]],
    intervals: Mapping[str, tuple[float, float]],
    name: str,
    shape: str,
) -> Figure:
    """Plot horizontal bars with their values, and a line for the interval where there is one."""
    found = {label: seeds for label, seeds in style.by_seed(values, ()).items() if seeds}
    if not found:
        raise ValueError("values by method are needed, got none")
    means = {label: statistics.mean(seeds) for label, seeds in found.items()}
    names = [plain(label, 28) for label in means]
    figure, (axes,) = style.new_figure(height=0.55 + 0.27 * len(found))
    low, high, longest = min(0.0, *means.values()), max(0.0, *means.values()), 0
    for place, (label, mean) in enumerate(means.items()):
        axes.barh(place, mean, height=0.62, color=SERIES[0])
        ends, said = intervals.get(label), shape.format(mean)
        if ends is not None:
            axes.hlines(place, *ends, color=INK, linewidth=1.4)
            said += f" ± {(ends[1] - ends[0]) / 2:.2f}"
            low, high = min(low, ends[0]), max(high, ends[1])
        longest = max(longest, len(said) + 1)
        at = max(0, mean, *(ends or ()))
        style.write(axes, said, at, place, INK)
    span = high - low or 1.0
    wide = style.PANEL[0] - 0.2 - 0.07 * max(map(len, names))  # inches that the names leave
    text = 0.068 * longest
    axes.set_xlim(low - (0.03 * span if low < 0 else 0), high + span * text / max(wide - text, 0.5))
    axes.set_yticks(range(len(means)), names)
    axes.set_ylim(len(means) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    style.name_axes(axes, name, "")
    return figure


def _by_layer(seeds: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the values of all seeds by layer."""
    layers = dict.fromkeys(layer for one in seeds for layer in one)
    return {layer: [one[layer] for one in seeds if layer in one] for layer in layers}
