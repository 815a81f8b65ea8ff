"""SIGTERM, SIGHUP and SIGINT that wait for the end of a training step, in the presence of loader workers."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType

from torch.utils.data import DataLoader

log = logging.getLogger(__name__)

STOPS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
PATIENCE = 1.0  # seconds in which a worker's death and the signal that caused it may come


class Stopped(BaseException):
    """A signal came where nothing has to be finished first."""


class StopRequest:
    """Remembers SIGTERM, SIGHUP and SIGINT while it is entered; a second one acts as it did before.

    Only the main thread can do so; entered in another one it leaves the signals alone, as it does those
    that are ignored (``nohup``, a shell's background jobs).

    Meanwhile PyTorch's handler of SIGCHLD, which raises wherever the main thread is when a loader's worker
    has died, is active within :meth:`safely` alone; elsewhere it would cut through a step or a checkpoint.
    A death between is found by the loader when it waits for its next batch.

    Attributes:
        signal: the one that came, or ``None``.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._entered, self._at_once = False, False
        self._on_child: object = None

    def __enter__(self) -> StopRequest:
        self._process = os.getpid()
        if threading.current_thread() is threading.main_thread():
            self._entered = True
            for number in STOPS:
                # None: not Python's to give back
                if signal.getsignal(number) not in (None, signal.SIG_IGN):
                    self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception: object) -> None:
        self._give_back()
        if self._on_child is not None:
            signal.signal(signal.SIGCHLD, self._on_child)
        self._entered, self._on_child = False, None

    @contextmanager
    def safely(self, at_once: bool = False) -> Iterator[None]:
        """Run what leaves nothing half done when it is cut off.

        Args:
            at_once: whether a signal ends it, instead of being remembered alone.

        Raises:
            Stopped: a signal came and ``at_once`` is set, or it has ended a loader's worker.
        """
        if at_once and self.signal is not None:  # it came just before
            raise Stopped
        self._at_once = at_once
        if self._on_child is not None:
            signal.signal(signal.SIGCHLD, self._on_child)
        try:
            yield
        except RuntimeError as error:
            if "DataLoader worker" in str(error) and self._comes():
                raise Stopped from error
            raise
        finally:
            self._at_once = False
            if self._entered and callable(signal.getsignal(signal.SIGCHLD)):
                self._on_child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def leave(self) -> None:
        """End the process, or the call in a notebook, as the signal would have."""
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + (self.signal or signal.SIGTERM))

    def _comes(self) -> bool:
        """Return whether a signal has arrived or is arriving; a group receives it at different times."""
        end = time.monotonic() + PATIENCE
        while self.signal is None and self._before and time.monotonic() < end:
            time.sleep(0.01)
        return self.signal is not None

    def _give_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker: its parent will end it
            return
        self.signal = signal.Signals(number)
        self._give_back()
        log.warning("%s: this step is finished and saved first; once more to stop at once", self.signal.name)
        if self._at_once:
            self._at_once = False
            raise Stopped


@contextmanager
def outlasting(*loaders: object) -> Iterator[None]:
    """Let workers that these loaders start meanwhile outlast signals to the whole group of processes.

    ``timeout``, SLURM and systemd send SIGTERM to every process, a terminal SIGINT and SIGHUP. The workers
    end when the main process does, which saves first.
    """
    changed = [loader for loader in loaders if isinstance(loader, DataLoader) and loader.num_workers]
    before = [loader.worker_init_fn for loader in changed]
    for loader, init in zip(changed, before):
        loader.worker_init_fn = _Outlasting(init)
    try:
        yield
    finally:
        for loader, init in zip(changed, before):
            loader.worker_init_fn = init


class _Outlasting:
    """A ``worker_init_fn`` (a class, for workers that are spawned) that calls the loader's own, too."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(signal, "sigwaitinfo"):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            threading.Thread(target=_take, args=(STOPS, os.getppid()), daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _take(numbers: Iterable[signal.Signals], parent: int) -> None:
    """Take signals from everybody but the parent, which ends with SIGTERM a worker that does not end."""
    while True:
        came = signal.sigwaitinfo(numbers)
        if came.si_signo == signal.SIGTERM and came.si_pid == parent:
            os._exit(0)
