"""Deferred handling of SIGTERM, SIGHUP and SIGINT: a training step and its checkpoint finish first."""

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
PATIENCE = 1.0  # longest time in seconds between a worker's death and the signal that caused it


class Stopped(BaseException):
    """A signal arrived at a point where nothing has to be finished first."""


class StopRequest:
    """Context that records SIGTERM, SIGHUP and SIGINT; a second signal has its usual effect.

    Handlers are installed in the main thread only, and not for signals that are ignored (``nohup``,
    background jobs of a shell).

    PyTorch's SIGCHLD handler raises an exception in the main thread when a worker of a loader dies. Within
    this context it is active in :meth:`safely` only, because elsewhere it would interrupt a step or a
    checkpoint. The loader detects workers that died in between when it waits for its next batch.

    Attributes:
        signal: the recorded signal, or ``None``.
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
                # None: not installed by Python, so it could not be restored
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
        """Context for work that may be interrupted at any point.

        Args:
            at_once: raise :class:`Stopped` when a signal arrives instead of only recording it.

        Raises:
            Stopped: a signal arrived and ``at_once`` is set, or it has killed a worker of the loader.
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
        if os.getpid() != self._process:  # a worker of a loader; its parent ends it
            return
        self.signal = signal.Signals(number)
        self._give_back()
        log.warning("%s: this step is finished and saved first; press again to stop now", self.signal.name)
        if self._at_once:
            self._at_once = False
            raise Stopped


@contextmanager
def outlasting(*loaders: object) -> Iterator[None]:
    """Context in which workers of these loaders ignore signals that are sent to the whole process group.

    ``timeout``, SLURM and systemd send SIGTERM to every process of a group; a terminal sends SIGINT and
    SIGHUP. The workers then end with the main process, which saves first.
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
    """A ``worker_init_fn`` that also calls the loader's own; a class, because spawned workers unpickle it."""

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        if hasattr(signal, "sigwaitinfo"):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
            threading.Thread(target=_take, args=(STOPS, os.getppid()), daemon=True).start()
        if self.then is not None:
            self.then(worker)


def _take(numbers: Iterable[signal.Signals], parent: int) -> None:
    """Discard signals except a SIGTERM from the parent process, which ends the worker."""
    while True:
        came = signal.sigwaitinfo(numbers)
        if came.si_signo == signal.SIGTERM and came.si_pid == parent:
            os._exit(0)
