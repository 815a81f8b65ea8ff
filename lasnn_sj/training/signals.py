"""SIGTERM and SIGINT that wait for the end of a training step."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

log = logging.getLogger(__name__)


class StopRequest:
    """Remembers SIGTERM and SIGINT while it is entered; a second one acts as it did before.

    Only the main thread can do so; entered in another one it leaves the signals alone.

    Attributes:
        signal: the one that came, or ``None``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                if signal.getsignal(number) is not None:  # None: not Python's to give back
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker: its parent will end it
            return
        self.signal = signal.Signals(number)
        self.__exit__()
        log.warning("%s: this step is finished and saved first; once more to stop at once", self.signal.name)

    def leave(self) -> None:
        """End the process, or the call in a notebook, as the signal would have."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))
