"""A table that was run, beside the printed numbers: Markdown, CSV, and curves over time."""

from __future__ import annotations

import io
import platform
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from ..analysis.stages import STAGES
from ..runtime import files
from . import scales, text
from .scales import Scale
from .tables import Row, Table

Results = Mapping[tuple[Row, int], Mapping[str, object]]
COLUMNS = (
    "top1", "loss", "samples", "teacher_top1", "seconds", "seconds_per_epoch", "peak_memory_mib",
    "spikes_per_neuron",
)  # fmt: skip


def write(
    stem: Path, name: str, table: Table, scale: Scale, results: Results, rows: Sequence[Row], device: str
) -> str:
    """Write ``stem.md``, ``.csv``, ``_curves.csv``, ``_curves.png``, ``_spikes.csv``; returns the first."""
    text = markdown(name, table, scale, results, rows, device)
    files.write(stem.with_suffix(".md"), text)
    _write_csv(stem.with_suffix(".csv"), scale, results)
    curves = {key: r["top1_over_time"] for key, r in results.items() if "top1_over_time" in r}
    if curves:
        _write_long(f"{stem}_curves.csv", ("t", "top1"), {k: enumerate(v, 1) for k, v in curves.items()})
        _plot(f"{stem}_curves.png", f"Table {name}, scale {scale}", results, curves)
    spikes = {key: r["spikes"].items() for key, r in results.items() if "spikes" in r}
    if spikes:
        _write_long(f"{stem}_spikes.csv", ("layer", "spikes_per_neuron"), spikes)
    return text


def markdown(
    name: str, table: Table, scale: Scale, results: Results, rows: Sequence[Row], device: str
) -> str:
    """Format the table with its environment; rows without a result are marked."""
    reduced = scale != "full"
    ours = "ours, top-1 %" + (f" ({scale} scale)" if reduced else "")
    head = ["row", "paper, top-1 %", ours, "seeds", "difference", "T", "s/epoch", "peak MiB", "spikes/neuron"]
    if any(row.paper_teacher is not None for row in rows):
        head.insert(1, "teacher: paper, ours")
    lines = [[*head, "reduced to", "note"] if reduced else [*head, "note"]]
    for row in rows:
        lines.append(
            _line(row, scale, [r for (other, _), r in results.items() if other == row], head, reduced)
        )
    warning = (
        "**Reduced: these are not the paper's settings, and the difference says nothing about its numbers.** "
        "Compare the rows with each other.\n\n"
        if reduced
        else ""
    )
    where = torch.cuda.get_device_name(device) if "cuda" in device else f"CPU ({platform.machine()})"
    kind = "Figure" if name.startswith("Fig") else "Table"
    return (
        f"# {kind} {name.removeprefix('Fig')}: {table.title}\n\n"
        f"{warning}"
        + text.markdown(lines)
        + f"\n\nScale {scale}; mean ± sample deviation over the seeds; peak "
        f"memory of the whole process, libraries included, on a CPU; {where}, torch {torch.__version__}.\n"
    )


def _line(row: Row, scale: Scale, found: Sequence[Mapping], head: Sequence[str], reduced: bool) -> list[str]:
    if row.cited:
        shown = {"row": row.name, "paper, top-1 %": f"{row.paper:.2f}", "T": str(row.T), "seeds": "0"}
        return [shown.get(column, "") for column in head] + [""] * reduced + [row.note]
    settings = (scales.reverse_kd if row.reverse else scales.lasnn)(row, scale, 0)
    T = settings.T if row.reverse else settings.recipe.T * STAGES[row.method].steps
    top1 = [r["top1"] for r in found]
    cells = {
        "row": row.name,
        "paper, top-1 %": "" if row.paper is None else f"{row.paper:.2f}",
        "teacher: paper, ours": _teachers(row, found),
        "seeds": str(len(found)),
        "difference": "" if row.paper is None or not top1 else f"{statistics.mean(top1) - row.paper:+.2f}",
        "T": "" if row.method == "ann" else str(T),
        "s/epoch": text.mean([r.get("seconds_per_epoch") for r in found], ".1f")
        + (f" (paper {60 * row.paper_minutes:g})" if row.paper_minutes else ""),
        "peak MiB": text.mean([r.get("peak_memory_mib") for r in found], ".0f")
        + (f" (paper {row.paper_gb:g} GB)" if row.paper_gb else ""),
        "spikes/neuron": text.mean([r.get("spikes_per_neuron") for r in found], ".2f"),
    }
    line = [cells.get(column, text.spread(top1)) for column in head]
    note = "; ".join(part for part in (row.note, _spikes_note(row)) if part)
    return [*line, settings.reduced, note] if reduced else [*line, note]


def _spikes_note(row: Row) -> str:
    if row.paper_spikes is None:
        return ""
    said = f"paper prints {row.paper_spikes:g} mean spikes"
    if row.paper_spikes > row.T:  # one neuron fires at most once in a step
        said += f", more than one neuron can fire in T = {row.T} steps (perhaps a sum over layers)"
    return said


def _teachers(row: Row, found: Sequence[Mapping]) -> str:
    if row.paper_teacher is None:
        return ""
    ours = text.spread([r["teacher_top1"] for r in found if "teacher_top1" in r])
    return f"{row.paper_teacher:.2f}, {ours}"


def _write_csv(path: Path, scale: Scale, results: Results) -> None:
    lines = [("row", "seed", "scale", "reduced", "paper_top1", *COLUMNS)]
    for (row, seed), result in results.items():
        settings = (scales.reverse_kd if row.reverse else scales.lasnn)(row, scale, seed)
        values = [result.get(column) for column in COLUMNS]
        lines.append((row.name, seed, scale, settings.reduced, row.paper, *values))
    files.write_csv(path, lines)


def _write_long(path: str, columns: tuple[str, str], lines: Mapping[tuple[Row, int], object]) -> None:
    rows = ((row.name, seed, *pair) for (row, seed), pairs in lines.items() for pair in pairs)
    files.write_csv(Path(path), [("row", "seed", *columns), *rows])


def _plot(path: str, title: str, results: Results, curves: Mapping[tuple[Row, int], Sequence[float]]) -> None:
    """Plot the accuracy after each step, one panel per network, mean and range over seeds; ANN dashed."""
    import matplotlib.pyplot as plt  # slow to import, needed only here

    nets = list(dict.fromkeys((row.dataset, row.net) for row, _ in curves))
    figure, axes = plt.subplots(
        1, len(nets), figsize=(5.5 * len(nets), 5.5), squeeze=False, layout="constrained"
    )
    for axis, (dataset, net) in zip(axes[0], nets, strict=True):
        for row in dict.fromkeys(row for row, _ in curves if (row.dataset, row.net) == (dataset, net)):
            of_row = torch.tensor([curve for (other, _), curve in curves.items() if other == row])
            t, name = range(1, of_row.shape[1] + 1), " ".join(row.name.split("/")[2:])
            label = f"{name.rpartition('-T')[0] or name}, T = {len(t)}"  # the paper's T is not the reduced
            (line,) = axis.plot(t, of_row.mean(0), label=label, marker="." if len(t) < 20 else None)
            axis.fill_between(t, of_row.amin(0), of_row.amax(0), alpha=0.15, color=line.get_color())
        ann = [
            r["top1"]
            for (row, _), r in results.items()
            if (row.dataset, row.net, row.method) == (dataset, net, "ann")
        ]
        if ann:
            axis.axhline(statistics.mean(ann), color="gray", linestyle="--", label="ANN")
        axis.set(title=f"{net}, {dataset}", xlabel="time steps t", ylabel="top-1 %", xscale="log")
        axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=2)
    figure.suptitle(title)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    files.write(Path(path), drawn.getvalue())
    plt.close(figure)
