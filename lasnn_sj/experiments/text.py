"""Numbers and tables as text: mean and deviation, intervals, Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table; the first row is its head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def spread(values: Sequence[float], empty: str = "not run") -> str:
    """Format mean ± sample standard deviation; of one value the value, of none ``empty``."""
    if not values:
        return empty
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.2f}"


def gain(differences: Iterable[float]) -> str:
    """Format the mean of paired differences, with its sign and 95 % t-interval; empty if there is none."""
    values = list(differences)
    if not values:
        return ""
    half = interval(values)
    return f"{statistics.mean(values):+.2f}" + ("" if half is None else f" ± {half:.2f}")


def mean(values: Sequence[float | None], form: str) -> str:
    """Format the mean of the values that are there; empty if none is."""
    there = [value for value in values if value is not None]
    return f"{statistics.mean(there):{form}}" if there else ""


def interval(values: Sequence[float], level: float = 0.95) -> float | None:
    """Return half the width of a mean's t-interval, ``t * s / sqrt(n)``; ``None`` for fewer than 2 values."""
    from scipy import stats  # slow to import

    if len(values) < 2:
        return None
    quantile = float(stats.t.ppf((1 + level) / 2, len(values) - 1))
    return quantile * statistics.stdev(values) / math.sqrt(len(values))
