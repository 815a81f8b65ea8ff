"""One self-contained page about runs, from their folders alone: no network, no data, no script."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ...runtime import files
from . import page, reading
from .charts import COLOURS, Picture
from .maps import maps as maps_of

__all__ = ["report"]

log = logging.getLogger(__name__)


def report(run_dirs: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write what run folders hold as one HTML page, with its pictures beside it as PNG files.

    A run folder is that of a :class:`~lasnn_sj.LaSNNTrainer`, of a ``Pipeline`` with its stages, of a
    ``Study`` with its rows, or a folder of several of these. Runs that differ by their seeds alone are
    shown as means; others are compared. Whatever is missing or damaged is named on the page. Needs
    ``matplotlib`` and ``jinja2`` (the extra ``report``).

    Args:
        run_dirs: one folder or several.
        out: the page, ``report.html`` if not given: in the folder, or in the one that all lie in. Its
            pictures go into a folder beside it that has its name.

    Returns:
        Path of the page.

    Raises:
        NotADirectoryError: a path that is no folder.
        ValueError: no folder at all, a folder as ``out``, or pictures' folder that is a link elsewhere.
    """
    folders = [Path(run_dirs)] if isinstance(run_dirs, (str, Path)) else [Path(path) for path in run_dirs]
    if not folders:
        raise ValueError("report needs at least one run folder, got none")
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out must be the page to write, such as {Path(out) / 'report.html'}, got a folder")
    runs = reading.read(folders)
    if out is None:
        out = Path(os.path.commonpath([folder.resolve() for folder in folders])) / "report.html"
    out = Path(out)
    series = page.series_of(runs)
    table, accuracy = page.results(series)
    curves = page.curves(series)
    timing, by_step = page.over_time(series)
    layers, layer_tables = page.spikes(series)
    maps = list(maps_of(series))
    text = _template().render(
        names=[run.name for run in runs],
        paths=[str(run.path) for run in runs],
        notes=_together(runs),
        results=table,
        accuracy=accuracy,
        curves=curves,
        timing=timing,
        by_step=by_step,
        operations=page.operations(series),
        layers=layers,
        layer_tables=layer_tables,
        maps=maps,
        configuration=page.configuration(runs, series),
        configs=dict.fromkeys(run.config for run in runs if run.config),
        colours=COLOURS,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f"{out.stem}_pictures"
    pictures = {picture.name: picture.png for picture in _all(accuracy, curves, timing, layers)}
    pictures |= {tiles.sheet_name: tiles.sheet for tiles in maps}
    if pictures:
        files.inside(out.parent, beside.name).mkdir(exist_ok=True)
    for name, data in pictures.items():
        files.write(beside / f"{name}.png", data)
    files.write(out, text.encode(errors="replace"))
    log.info("report of %d runs: %s, %d pictures in %s", len(runs), out, len(pictures), beside)
    return out


def _together(runs: list[reading.Run]) -> list[tuple[str, list[str]]]:
    """Notes by the runs that they are said of."""
    of: dict[str, list[str]] = {}
    for run in runs:
        for note in dict.fromkeys(run.notes):
            of.setdefault(note, []).append(run.name)
    names: dict[str, list[str]] = {}
    for note, said_of in of.items():
        names.setdefault(", ".join(said_of), []).append(note)
    return list(names.items())


def _all(*groups: list[Picture]) -> list[Picture]:
    return [picture for group in groups for picture in group]


def _template():
    try:
        import jinja2
    except ImportError as error:
        raise ImportError("reports need jinja2: pip install 'lasnn-sj[report]'") from error

    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html")
