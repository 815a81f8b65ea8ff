"""Log lines of training on the console, beside the progress bar."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from ..runtime.progress import in_notebook

LOGGER = logging.getLogger(__package__.partition(".")[0])


class _Lines(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def lines_shown() -> Iterator[None]:
    """Context that writes this package's log lines to the console unless the program has set up logging.

    Where it has, its own handlers write them; those that write to the console do so above the progress bar.
    A notebook shows the progress bar alone, and warnings.
    """
    if LOGGER.hasHandlers():
        with logging_redirect_tqdm():
            yield
        return
    if in_notebook():
        yield
        return
    handler, level = _Lines(), LOGGER.level
    LOGGER.addHandler(handler)
    if level == logging.NOTSET:
        LOGGER.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        LOGGER.setLevel(level)
