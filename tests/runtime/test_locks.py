"""A folder's lock: one holder, named in errors; stale locks are replaced; readers and forks leave it."""

import json
import multiprocessing
import os
import threading
import time

import pytest

from lasnn_sj.runtime import locks
from lasnn_sj.runtime.locks import FolderLock, LockError


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the folder."""

    def hold():
        with FolderLock(tmp_path):
            held.set()
            time.sleep(60)

    context = multiprocessing.get_context("fork")
    held = context.Event()
    process = context.Process(target=hold)
    process.start()
    assert held.wait(30)
    yield process
    process.kill()
    process.join()


def pretend(path, **changes):
    """Make a lock that of another holder, with its time of change as it was."""
    there, times = json.loads(path.read_text()), path.stat()
    path.write_text(json.dumps(there | changes))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_it_is_there_while_it_is_held(tmp_path):
    with FolderLock(tmp_path) as lock:
        lock.check()
        said = json.loads((tmp_path / locks.NAME).read_text())
        assert said["pid"] == os.getpid()
        assert {"host", "since"} <= said.keys()
    assert list(tmp_path.iterdir()) == []
    with FolderLock(tmp_path):
        pass


def test_a_second_one_is_told_who_holds_it(tmp_path, holder):
    with pytest.raises(LockError, match=rf"in use by process {holder.pid} on .*, since .*another run folder"):
        FolderLock(tmp_path).__enter__()


def test_a_lock_that_was_removed_is_no_longer_held(tmp_path):
    with FolderLock(tmp_path) as lock:
        lock.path.unlink()
        with pytest.raises(LockError, match="no longer holds the lock .*, no process does"):
            lock.check()


def test_the_same_process_is_no_exception(tmp_path):
    with FolderLock(tmp_path), pytest.raises(LockError, match="this very process"):
        FolderLock(tmp_path).__enter__()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder, caplog, reaped):
    holder.kill()
    if reaped:
        holder.join()
    else:  # a zombie still has its number
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    with FolderLock(tmp_path) as lock:
        lock.check()
    assert f"in use by process {holder.pid}" in caplog.text
    assert "has ended; its lock is replaced" in caplog.text


def test_a_number_that_another_process_has_now_is_not_the_holder(tmp_path, holder):
    pretend(tmp_path / locks.NAME, started="1")
    with FolderLock(tmp_path):
        pass


def test_on_another_host_signs_of_life_count(tmp_path, holder, monkeypatch, caplog):
    monkeypatch.setattr(locks, "STALE", 0.6)
    monkeypatch.setattr(locks, "BEAT", 0.2)
    path = tmp_path / locks.NAME
    pretend(path, host="elsewhere")
    ended = threading.Event()
    beats = threading.Thread(target=lambda: [os.utime(path) for _ in iter(lambda: ended.wait(0.1), True)])
    beats.start()
    with pytest.raises(LockError, match="on elsewhere"):
        FolderLock(tmp_path).__enter__()
    ended.set()
    beats.join()
    start = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - start >= 0.6
    assert "waiting at most" in caplog.text


@pytest.mark.parametrize("content", ["", '{"host": "he'])
def test_a_lock_cut_off_as_it_was_written_is_stale_after_seconds(tmp_path, monkeypatch, content):
    monkeypatch.setattr(locks, "CUT", 0.3)
    (tmp_path / locks.NAME).write_text(content)
    start = time.monotonic()
    with FolderLock(tmp_path):
        assert time.monotonic() - start < 10  # not the minutes that a lock of another machine has


def test_a_lock_that_cannot_be_written_is_named_and_not_left(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="No space left on device: .*run.lock"):
        FolderLock(tmp_path).__enter__()
    assert not list(tmp_path.iterdir())


def test_its_time_of_change_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT", 0.05)
    with FolderLock(tmp_path) as lock:
        os.utime(lock.path, (1, 1))
        end = time.monotonic() + 5
        while lock.path.stat().st_mtime == 1 and time.monotonic() < end:
            time.sleep(0.02)
        assert lock.path.stat().st_mtime > 1


def test_who_lost_it_is_told_and_does_not_remove_the_other_ones(tmp_path):
    with FolderLock(tmp_path) as lock:
        pretend(lock.path, token="another", pid=1)
        with pytest.raises(LockError, match="process 1 on .* does; nothing is written"):
            lock.check()
    assert lock.path.exists()


def test_a_fork_of_the_holder_does_not_release_it(tmp_path):
    with FolderLock(tmp_path) as lock:
        child = os.fork()
        if child == 0:
            lock.__exit__()
            os._exit(0)
        os.waitpid(child, 0)
        lock.check()


def test_of_many_that_find_a_stale_lock_one_has_it(tmp_path):
    """Processes that begin at once; each holds the folder for a moment, and nobody beside it."""
    (tmp_path / "log").touch()
    with FolderLock(tmp_path) as lock:
        pretend(lock.path, started="1")
        stale = lock.path.read_bytes()
    lock.path.write_bytes(stale)
    start, children = time.monotonic() + 0.3, []
    for number in range(8):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                time.sleep(max(0, start - time.monotonic()))
                try:
                    with FolderLock(tmp_path) as mine, open(tmp_path / "log", "a") as file:
                        for word in ("in", "out"):
                            file.write(f"{word} {number}\n")
                            file.flush()
                            time.sleep(0.05)
                        mine.check()
                except LockError:
                    pass
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 8
    said = (tmp_path / "log").read_text().split("\n")[:-1]
    assert said
    assert all(a == f"in {b.split()[1]}" and b.startswith("out") for a, b in zip(said[::2], said[1::2]))
