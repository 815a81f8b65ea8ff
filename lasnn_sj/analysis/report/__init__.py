"""HTML reports about runs, from their folders alone: one self-contained page, without scripts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path

from ...runtime import files
from ..style import COLOURS
from . import page, reading
from .samples import samples as samples_of
from .series import series_of
from .verdict import subtitle_of, title_of, verdict_of

__all__ = ["report"]

log = logging.getLogger(__name__)


def report(run_dirs: str | Path | Iterable[str | Path], out: str | Path | None = None) -> Path:
    """Write an HTML page about runs, with its pictures beside it as PNG files.

    A run folder is that of a :class:`~lasnn_sj.LaSNNTrainer`, of a ``Pipeline`` with its stages, of a
    ``ReversePipeline`` with its rows, or a folder of several of these. Runs that differ by their seeds
    alone are shown as means; others are compared. Missing and damaged files are named on the page. Needs
    ``matplotlib`` and ``jinja2`` (the extra ``report``).

    Args:
        run_dirs: one folder or several.
        out: path of the page; ``report.html`` in the folder, or in the common parent of several, if not
            given. The pictures go into a folder beside it, such as ``report_pictures``.

    Returns:
        Path of the page.

    Raises:
        NotADirectoryError: a path is not a folder.
        ValueError: no folder at all, a folder without any run, a folder as ``out``, or a link that leads out
            of it in place of the pictures' folder.
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
    series = series_of(runs)
    tables, accuracy = page.results(series)
    curves = page.curves(series)
    timing, by_step = page.over_steps(series)
    silent, spikes, layer_tables = page.layers(series)
    samples = list(samples_of(series))
    text = _template().render(
        title=title_of(folders, runs),
        subtitle=subtitle_of(runs, series),
        verdict=verdict_of(series),
        notes=_together(runs),
        results=tables,
        accuracy=accuracy,
        curves=curves,
        timing=timing,
        by_step=by_step,
        operations=page.operations(series),
        silent=silent,
        layers=spikes,
        layer_tables=layer_tables,
        samples=samples,
        configuration=page.configuration(runs, series),
        configs=dict.fromkeys(run.config for run in runs if run.config),
        colours=COLOURS,
    )
    drawn = [*accuracy, *timing, *spikes, *(picture for _, group in curves for picture in group)]
    drawn += [picture for one in samples for picture in one.pictures]
    pictures = {picture.name: picture.png for picture in drawn}
    pictures |= {one.maps.name: one.maps.sheet for one in samples if one.maps is not None}
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.parent / f"{out.stem}_pictures"
    if pictures:
        files.inside(out.parent, beside.name).mkdir(exist_ok=True)
    for folder in (out.parent, beside):
        files.remove_parts(folder, files.ABANDONED)
    for name, data in pictures.items():
        files.write(beside / f"{name}.png", data)
    files.write(out, text.encode(errors="replace"))
    log.info("report of %d runs: %s, %d pictures in %s", len(runs), out, len(pictures), beside)
    return out


def _together(runs: list[reading.Run]) -> list[tuple[str, list[str]]]:
    """Merge the notes of runs, with the names of the runs that share them."""
    of: dict[str, list[str]] = {}
    for run in runs:
        for note in dict.fromkeys(run.notes):
            of.setdefault(note, []).append(run.name)
    names: dict[str, list[str]] = {}
    for note, runs_with_it in of.items():
        names.setdefault(", ".join(runs_with_it), []).append(note)
    return list(names.items())


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
