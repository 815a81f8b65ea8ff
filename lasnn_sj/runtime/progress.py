"""Progress bars on terminals and in notebooks."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable

from tqdm import TqdmWarning

with warnings.catch_warnings():
    warnings.simplefilter("ignore", TqdmWarning)  # without ipywidgets, notebooks show the bar as text
    from tqdm.auto import tqdm


def in_notebook() -> bool:
    """Return whether output goes to a notebook, which shows progress bars although it is not a terminal."""
    return "ipykernel.zmqshell" in sys.modules


def progress_bar(iterable: Iterable | None = None, *, quiet: bool = False, **settings: object) -> tqdm:
    """Create a progress bar that shows on terminals and in notebooks, and not in log files.

    Args:
        iterable: object to iterate over; the bar is updated by hand without one.
        quiet: never show the bar.
        **settings: further arguments of :class:`tqdm.tqdm`.
    """
    if in_notebook():
        settings |= {"file": sys.stdout, "disable": quiet}
    else:
        settings |= {"dynamic_ncols": True, "disable": quiet or None}
    return tqdm(iterable, **settings)
