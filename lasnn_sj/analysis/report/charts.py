"""Charts, as SVG that follows the page's colours and as PNG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

# name: (on a light page, on a dark one); the first eight tell series apart, by lightness too.
COLOURS = {
    "c0": ("#0b5fa5", "#6ab7ff"),
    "c1": ("#c2410c", "#ff9466"),
    "c2": ("#04745c", "#4fd6ae"),
    "c3": ("#9d3c7c", "#f09ad2"),
    "c4": ("#8a6100", "#f0c24b"),
    "c5": ("#4b3fb3", "#a9a0ff"),
    "c6": ("#52606d", "#b4c0cc"),
    "c7": ("#8f1d2c", "#ff8a96"),
    "ink": ("#1b2733", "#e6ebf0"),
    "muted": ("#5a6775", "#a3b0bd"),
    "grid": ("#dde3e9", "#35414d"),
}
SERIES = [name for name in COLOURS if name.startswith("c")]
MARKERS = "osD^vP*X"
STYLES = ("-", "--", ":", "-.")
MOST_BARS = 24  # layers in one chart
MOST_POINTS = 400  # of a curve


@dataclass
class Line:
    """A series of a chart: one curve for each seed, drawn as their mean and their range."""

    label: str
    curves: list[tuple[Sequence[float], Sequence[float]]]
    colour: int = 0
    style: int = 0


@dataclass
class Picture:
    """A chart as it stands in the page and beside it.

    Attributes:
        name: of the PNG file.
        title, alt: what it shows, and the numbers in it that matter.
        svg: an ``<svg>`` element.
        png: the file.
    """

    name: str
    title: str
    alt: str
    svg: str = field(repr=False)
    png: bytes = field(repr=False)


def lines(
    name: str,
    title: str,
    x: str,
    y: str,
    series: Sequence[Line],
    across: float | None = None,
    across_label: str = "",
    upright: float | None = None,
    upright_label: str = "",
    log: bool = False,
) -> Picture:
    """Curves over epochs, time steps or energy; ``across`` and ``upright`` are values to compare with.

    With ``log`` the horizontal axis is logarithmic.
    """
    marks = (across is not None) + (upright is not None)
    figure, axes = _figure(2.2 + 0.2 * -(-(len(series) + marks) // 2))
    said = []
    for line in series:
        colour = COLOURS[SERIES[line.colour % len(SERIES)]][0]
        xs, ys = ([_thinned(curve[axis]) for curve in line.curves] for axis in (0, 1))
        shape = {"color": colour, "linestyle": STYLES[line.style % len(STYLES)], "linewidth": 1.8}
        if max(map(len, xs)) <= 16:
            shape |= {"marker": MARKERS[line.colour % len(MARKERS)], "markersize": 4.5}
        if len({len(places) for places in xs}) == 1:
            axes.plot(np.mean(xs, 0), np.mean(ys, 0), label=_plain(line.label), **shape)
            if len(xs) > 1 and all((places == xs[0]).all() for places in xs):
                axes.fill_between(xs[0], np.min(ys, 0), np.max(ys, 0), color=colour, alpha=0.15, lw=0)
            said.append(f"{line.label} ends at {np.mean(ys, 0)[-1]:.4g}")
        else:  # seeds that have come to different ends have no mean
            for index, (places, values) in enumerate(zip(xs, ys)):
                axes.plot(places, values, label=_plain(line.label) if index == 0 else None, **shape)
            said.append(f"{line.label} ends at {', '.join(f'{values[-1]:.4g}' for values in ys)}")
    for draw, value, label, style in (
        (axes.axhline, across, across_label, (0, (5, 3))),
        (axes.axvline, upright, upright_label, (0, (1, 2))),
    ):
        if value is not None:
            draw(value, color=COLOURS["muted"][0], linestyle=style, linewidth=1.4, label=label)
            said.append(f"{label}: {value:.4g}")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if log:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.get_major_locator().set_params(integer=True)
    _legend(figure, axes)
    return _picture(figure, name, title, f"{title}: {y} over {x}. " + "; ".join(said) + ".")


def bars(name: str, title: str, x: str, groups: Sequence[str], series: Sequence[Line]) -> Picture:
    """Horizontal bars: for each group one bar of each series; a series has a curve ``(groups, values)``."""
    shown = list(groups)[:MOST_BARS]
    thick = 0.8 / max(len(series), 1)
    figure, axes = _figure(
        height=1.0
        + 0.22 * (len(series) > 1) * -(-len(series) // 2)
        + max(0.15 * len(series), 0.26) * len(shown)
    )
    said = []
    for index, line in enumerate(series):
        colour = COLOURS[SERIES[line.colour % len(SERIES)]][0]
        places = np.arange(len(shown)) + (index - (len(series) - 1) / 2) * thick
        by_seed = [dict(zip(*curve)) for curve in line.curves]
        told = []
        for place, group in zip(places, shown):
            values = [seed[group] for seed in by_seed if group in seed]
            if not values:
                continue
            mean = sum(values) / len(values)
            told.append(f"{group} {mean:.4g}")
            label = _plain(line.label) if len(told) == 1 else None
            axes.barh(place, mean, height=thick * 0.9, color=colour, label=label)
            if len(values) > 1:
                axes.hlines(place, min(values), max(values), color=COLOURS["ink"][0], linewidth=1.2)
        said.append(f"{line.label} {', '.join(told)}".strip())
    axes.set_yticks(range(len(shown)), [_plain(group) for group in shown])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(x)
    if len(shown) < len(groups):
        title = f"{title} (the first {len(shown)} of {len(groups)} layers)"
    _legend(figure, axes)
    return _picture(figure, name, title, f"{title}: {x}. " + "; ".join(said) + ".")


def map_colours(values: np.ndarray, high: float) -> np.ndarray:
    """A map ``[H, W]`` as colours, uint8; 0 is dark and ``high`` bright."""
    import matplotlib

    shade = np.clip(values / high, 0, 1) if high > 0 else np.zeros_like(values)
    return (255 * matplotlib.colormaps["viridis"](shade)[..., :3]).round().astype(np.uint8)


def sheet(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> bytes:
    """A PNG file of tiles ``[H, W, 3]``, with a name over each column and beside each row."""
    from PIL import Image

    side, gap = 96, 8
    step = side + gap
    pixels = np.full((step * len(rows) - gap, step * len(columns) - gap, 3), 255, np.uint8)
    for row, (_, tiles) in enumerate(rows):
        for column, tile in enumerate(tiles):
            resized = Image.fromarray(tile).resize((side, side), Image.Resampling.NEAREST)
            pixels[row * step : row * step + side, column * step : column * step + side] = resized
    figure, axes = _figure(height=1.05 * len(rows) + 0.8)
    figure.set_figwidth(1.05 * len(columns) + 1.8)
    axes.imshow(pixels)
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.tick_params(length=0, labelsize=8, labeltop=True, labelbottom=False)
    axes.set_xticks([side / 2 + step * n for n in range(len(columns))], [_plain(name) for name in columns])
    axes.set_yticks([side / 2 + step * n for n in range(len(rows))], [_plain(label) for label, _ in rows])
    return _file(figure, title)


def png(pixels: np.ndarray, at_least: int = 1) -> bytes:
    """Colours ``[H, W, 3]`` as a PNG file, each pixel as a square so that a side has ``at_least`` pixels."""
    from PIL import Image

    scale = max(1, -(-at_least // max(pixels.shape[:2])))
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(scale, axis=0).repeat(scale, axis=1)).save(file, "png", optimize=True)
    return file.getvalue()


def _figure(height: float = 2.6):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("reports need matplotlib: pip install 'lasnn-sj[report]'") from error

    figure = Figure(figsize=(4.0, height), layout="constrained")
    axes = figure.add_subplot()
    ink, muted, grid = (COLOURS[name][0] for name in ("ink", "muted", "grid"))
    axes.set_axisbelow(True)
    axes.grid(visible=True, color=grid, linewidth=0.8)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(muted)
    axes.tick_params(colors=muted, labelcolor=ink, labelsize=9.5)
    axes.xaxis.label.set(color=ink, size=10)
    axes.yaxis.label.set(color=ink, size=10)
    return figure, axes


def _thinned(values: Sequence[float]) -> np.ndarray:
    """Values of a curve, evenly fewer where they are more than can be seen; the last stays."""
    chosen = np.linspace(0, len(values) - 1, min(len(values), MOST_POINTS)).round().astype(int)
    return np.asarray(values, dtype=float)[chosen]


def _plain(text: str) -> str:
    """A name as matplotlib shows it: no formula, not hidden for its first letter, not too long."""
    text = text if len(text) <= 44 else f"{text[:20]}…{text[-20:]}"
    return ("\u200b" if text.startswith("_") else "") + text.replace("$", r"\$")


def _legend(figure, axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        figure.legend(
            handles, labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9.5,
            labelcolor=COLOURS["ink"][0], handlelength=2.2, columnspacing=1.2,
        )  # fmt: skip


def _picture(figure, name: str, title: str, alt: str) -> Picture:
    import matplotlib

    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return Picture(name, title, alt, _inline(drawn.getvalue(), name, alt), _file(figure, title))


def _file(figure, title: str) -> bytes:
    pixels = io.BytesIO()
    figure.suptitle(_plain(title), fontsize=10.5, color=COLOURS["ink"][0])
    figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    return pixels.getvalue()


def _inline(svg: str, name: str, alt: str) -> str:
    """A matplotlib file as an element of a page: the page's colours and font, ids of its own."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    head, rest = svg.split(">", 1)
    view_box = re.search(r'viewBox="[^"]*"', head)[0]
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = re.sub(r'(xlink:href="#|url\(#)', rf"\1{name}-", rest)
    rest = re.sub(r"<style.*?</style>", "", rest, flags=re.DOTALL)
    rest = re.sub(r"font-family: [^;\"]*;? ?", "", rest)
    for colour, (light, _) in COLOURS.items():
        rest = rest.replace(light, f"var(--{colour})")
    return f'<svg role="img" aria-label="{html.escape(alt, quote=True)}" {view_box}>{rest}'
