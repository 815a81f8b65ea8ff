"""Conversion of figures to SVG in the page's colours and to PNG files."""

from __future__ import annotations

import html
import io
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from ..style import COLOURS, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class Picture:
    """A figure as an element of the page and as a file.

    Attributes:
        name: of the PNG file.
        title: heading.
        alt: description for screen readers.
        svg: an ``<svg>`` element.
        png: the file.
    """

    name: str
    title: str
    alt: str
    svg: str = field(repr=False)
    png: bytes = field(repr=False)


def picture(figure: Figure, name: str, title: str, alt: str) -> Picture:
    """Draw a figure of :mod:`~lasnn_sj.analysis.plots`."""
    import matplotlib

    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata=nothing)
    return Picture(name, title, alt, _inline(drawn.getvalue(), name, alt), file(figure, title))


def file(figure: Figure, title: str) -> bytes:
    """Render a figure with its title as a PNG file."""
    pixels = io.BytesIO()
    figure.suptitle(plain(title, 60), fontsize=10.5, color=COLOURS["ink"][0])
    figure.savefig(pixels, format="png", dpi=160, facecolor="white")
    return pixels.getvalue()


def png(pixels: np.ndarray) -> bytes:
    """Encode colours ``[H, W, 3]`` as a PNG file."""
    from PIL import Image

    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "png", optimize=True)
    return written.getvalue()


def _inline(svg: str, name: str, alt: str) -> str:
    """Turn a file of matplotlib into an element of the page: its colours and font, unique ids."""
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
