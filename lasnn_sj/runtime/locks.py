"""Lock on a folder: one writer at a time, on one machine or on a shared file system."""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path

from .files import named

log = logging.getLogger(__name__)

NAME = "run.lock"
BEAT = 15.0  # seconds between updates of the lock's modification time
STALE = 120.0  # seconds without a sign of life; NFS may show an old modification time for a minute
CUT = 5.0  # seconds in which a lock that is there has its content


class LockError(RuntimeError):
    """Another process writes to the folder; the message names the process and its start."""


class FolderLock:
    """Lock a folder for writing within ``with FolderLock(folder)``; reading needs no lock.

    The context may be entered again while the lock is held.

    The lock is the file ``run.lock``, created with ``O_EXCL`` (atomic on NFS too). It names host, process and
    start time, and its modification time is updated every 15 seconds. A lock is stale if its process has
    ended or, on another machine, has not updated the file for two minutes, for which the caller waits. A
    stale lock is replaced, with a warning.

    Args:
        folder: an existing folder.

    Raises:
        LockError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._own: dict[str, object] | None = None
        self._depth = 0

    def __enter__(self) -> FolderLock:
        if self._depth == 0:
            self._acquire()
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth or self._own["pid"] != os.getpid():  # a fork of the holder
            return
        self._ended.set()
        own, self._own = self._own, None
        if (_read(self.path) or {}).get("token") == own["token"]:
            self.path.unlink(missing_ok=True)

    def check(self) -> None:
        """Raise :class:`LockError` if the lock is no longer held, for example after a long suspension."""
        if self._own is None:
            return
        there = _read(self.path)
        if there is None or there.get("token") != self._own["token"]:
            who = "no process" if there is None else f"process {there.get('pid')} on {there.get('host')}"
            raise LockError(
                f"this process no longer holds the lock {self.path}, {who} does; nothing is written there"
            )

    def _acquire(self) -> None:
        own = _place() | {
            "pid": os.getpid(),
            "started": started(os.getpid()),
            "since": datetime.now().astimezone().isoformat(timespec="seconds"),
            "token": uuid.uuid4().hex,
        }
        while not self._create(own):
            owner = _read(self.path)
            if owner is None:
                continue  # released meanwhile
            who = "a process that its lock does not name"
            if owner.keys() >= {"pid", "host", "since"}:
                who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
            stale = self._is_stale(owner, who)
            if stale is None:
                continue
            if not stale:
                raise LockError(
                    f"{self.path.parent} is in use by {who}"
                    + (", which is this very process" if owner.get("pid") == os.getpid() else "")
                    + f"; wait for its end, or use another run folder. ({self.path} is its lock)"
                )
            if self._remove(owner):
                log.warning(
                    "%s was in use by %s, which has ended; its lock is replaced", self.path.parent, who
                )
        self._own = own
        self._ended = threading.Event()
        threading.Thread(target=self._beat, args=(self._ended,), name="run lock", daemon=True).start()

    def _create(self, own: Mapping[str, object]) -> bool:
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            if self.path.is_symlink() or (self.path.exists() and not self.path.is_file()):
                raise LockError(f"{self.path} is not a regular file, as a lock is; remove it") from None
            return False
        try:
            with named(self.path), open(descriptor, "w") as file:
                file.write(json.dumps(own))  # at once: a lock that is cut off costs the next process seconds
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise
        return True

    def _is_stale(self, owner: Mapping[str, object], who: str) -> bool | None:
        """Return whether the holder has ended; ``None`` if the lock has a new holder meanwhile."""
        if {name: owner.get(name) for name in _place()} == _place() and isinstance(owner.get("pid"), int):
            return not alive(owner["pid"], owner.get("started"))
        patience = STALE if "token" in owner else CUT
        log.warning(
            "%s is in use by %s; waiting at most %g s for its update", self.path.parent, who, patience
        )
        first, end = owner["beat"], time.monotonic() + patience
        while time.monotonic() < end:
            time.sleep(min(1.0, BEAT / 4))
            now = _read(self.path)
            if now is None or now.get("token") != owner.get("token"):
                return None
            if now["beat"] != first:
                return False
        return True

    def _remove(self, owner: Mapping[str, object]) -> bool:
        """Remove a stale lock; of several processes that try, only one can rename it."""
        aside = self.path.with_name(f".{NAME}.{uuid.uuid4().hex}.part")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        mine = (_read(aside) or {}).get("token") == owner.get("token")
        if not mine:  # the new lock of a process that was faster
            try:
                os.link(aside, self.path)
            except OSError:  # a third process holds it; check() reports this to the second
                pass
        aside.unlink(missing_ok=True)
        return mine

    def _beat(self, ended: threading.Event) -> None:
        while not ended.wait(BEAT):
            try:
                os.utime(self.path)
            except OSError:  # removed: check() reports it
                pass


def _read(path: Path) -> dict[str, object] | None:
    """Read a lock's content, with its modification time as ``beat``; ``None`` if there is no lock."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            beat, said = os.fstat(file.fileno()).st_mtime_ns, file.read(4096)
    except FileNotFoundError:
        return None
    try:
        owner = json.loads(said)
    except ValueError:  # incomplete
        owner = None
    return (owner if isinstance(owner, dict) else {}) | {"beat": beat}


def holder(folder: Path) -> dict[str, object] | None:
    """Return ``host``, ``pid`` and ``since`` of a folder's holder; ``None`` for nobody or a dead one."""
    owner = _read(folder / NAME)
    here = owner is not None and {name: owner.get(name) for name in _place()} == _place()
    if owner is None or (here and not alive(owner.get("pid", 0), owner.get("started"))):
        return None
    return owner


def _place() -> dict[str, object]:
    """Name the scope in which a process number is unique: host, boot, and PID namespace."""
    boot = namespace = None
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        pass
    return {"host": socket.gethostname(), "boot": boot, "namespace": namespace}


def alive(pid: int, since: object) -> bool:
    """Return whether a process of this machine runs that started then; see :func:`started`."""
    try:
        if pid < 1:
            return False
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        pass
    now = started(pid)
    return now != "ended" and (now is None or since is None or now == since)


def started(pid: int) -> str | None:
    """Return a process' start time in kernel ticks; ``None`` if unknown, ``"ended"`` for a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return "ended" if fields[0] in "ZX" else fields[19]
