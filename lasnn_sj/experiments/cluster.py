"""Jobs on a cluster, or in processes that outlive this one, through submitit."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

import torch

from ..runtime import FolderLock, LockError, distributed, files, locks
from ..training.signals import StopRequest
from . import text
from .jobs import attempt as run_attempt
from .jobs import run_jobs

log = logging.getLogger(__name__)

GRACE = 120  # seconds between the signal before a time limit and the end, in which a step is finished
ATTEMPTS = 3  # of a job that ends without saying why, as when its memory runs out
POLL = 10.0  # seconds between looks at the jobs
REQUEUES = 10_000  # of a job at its time limit
SUBMITTED, DONE = "submitted.json", "done.json"


class ClusterError(RuntimeError):
    """Jobs that cannot be started; the message has the cluster's own words."""


@dataclass(frozen=True)
class Cluster:
    """Machines that the rows of a table run on.

    Attributes:
        launcher: "slurm" submits each row as a job of its own, "local" runs the same jobs on this machine; in
            processes of this command if not given.
        partition: of SLURM; the cluster's default if not given.
        gpus: of each job; with several the job's trainings are data-parallel.
        minutes: time limit of a job. One that is cut off is queued again and goes on.
        status: print which jobs are finished, running or failed, and why, and start nothing.
    """

    launcher: Literal["local", "slurm"] | None = None
    partition: str | None = None
    gpus: int = 0
    minutes: float = 240
    status: bool = False

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise ValueError(f"gpus must be at least 0, got {self.gpus}")
        if not self.minutes > 0:
            raise ValueError(f"minutes must be above 0, got {self.minutes}")


@dataclass(frozen=True)
class Job:
    """A job.

    Attributes:
        name: of its folder.
        argument: what its work is called with.
        parts: whether each of its rows is finished, by name.
    """

    name: str
    argument: object
    parts: Callable[[], Mapping[str, bool]]

    @property
    def finished(self) -> bool:
        """True if all its rows are."""
        return all(self.parts().values())


@dataclass(frozen=True)
class State:
    """A row: ``"waiting"``, ``"queued"``, ``"running"``, ``"finished"`` or ``"failed"``, and why."""

    row: str
    state: Literal["waiting", "queued", "running", "finished", "failed"]
    why: str = ""


class Launcher:
    """Runs jobs through submitit and keeps a record of each in a folder.

    Several tables may share ``folder``: a job that both need runs once.

    Args:
        cluster: where.
        folder: of the jobs' records and logs, on a file system that all nodes share.
        device: of the jobs.
        processes: how many run at once on this machine.

    Raises:
        ImportError: submitit is not installed.
        ClusterError: there is no SLURM here.
        OSError: the folder cannot be written.
    """

    def __init__(self, cluster: Cluster, folder: Path, device: str, processes: int = 1) -> None:
        self.cluster, self.folder, self.device, self.processes = cluster, folder, device, processes
        self._slurm = cluster.launcher == "slurm"
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                f"launcher {cluster.launcher} needs submitit: pip install 'lasnn-sj[cluster]'"
            ) from error
        files.make_folder(folder)
        self._refused = submitit.core.utils.FailedJobError
        kind = submitit.SlurmExecutor if self._slurm else submitit.LocalExecutor
        try:
            self._executor = kind(folder / "logs" / "%j", max_num_timeout=REQUEUES)
        except RuntimeError as error:
            raise ClusterError(f"launcher slurm: {error}") from error

    def run(
        self, work: Callable[[object, str], object], jobs: Sequence[Job]
    ) -> Iterator[tuple[Job, object, str | None]]:
        """Run jobs; as :func:`.jobs.run_jobs`, but for work that returns what JSON can hold.

        A job that is queued or running already, by an earlier launcher that was stopped, is waited for.

        Raises:
            ClusterError: the cluster refuses a job.
        """
        waiting, running = deque(), {}
        for job in jobs:
            if job.finished:
                yield job, None, None
            else:
                waiting.append(job)
        slots = set(range(len(waiting) if self._slurm else self.processes))
        while waiting or running:
            while waiting and len(running) < len(slots):
                job = waiting.popleft()
                running[job.name] = job, min(slots - {slot for _, slot in running.values()})
                record = _record(self.folder / job.name)
                if _alive(record):
                    log.info("%s is under way already, as job %s", job.name, record["id"])
                else:
                    self._submit(work, *running[job.name])
            for job, slot in list(running.values()):
                record = _record(self.folder / job.name)
                alive = _alive(record)  # a job that ends has written its result before
                said = files.read_json(self.folder / job.name / DONE)
                if said is not None and (said["error"] or said["result"] or job.finished):
                    del running[job.name]
                    yield job, said["result"], said["error"]
                elif not alive and record["attempt"] < ATTEMPTS:
                    why = _last_words(self.folder, record)
                    log.warning("%s ended without a result (%s) and is started again", job.name, why)
                    self._submit(work, job, slot, record["attempt"] + 1)
                elif not alive:
                    del running[job.name]
                    why = _last_words(self.folder, record)
                    yield job, None, f"ended {ATTEMPTS} times without a result: {why}"
            if running:
                time.sleep(POLL if self._slurm else POLL / 50)

    def _submit(self, work: Callable, job: Job, slot: int, attempt: int = 1) -> None:
        folder, gpus, minutes = self.folder / job.name, self.cluster.gpus, self.cluster.minutes
        files.make_folder(folder)
        (folder / DONE).unlink(missing_ok=True)
        threads, grace = None, min(GRACE, round(30 * minutes))
        if self._slurm:
            more = {"partition": self.cluster.partition} if self.cluster.partition else {}
            more |= {"gpus_per_node": gpus} if gpus else {}
            self._executor.update_parameters(
                job_name=f"lasnn-sj {job.name}"[:60], time=max(1, round(minutes)), nodes=1,
                ntasks_per_node=max(1, gpus), signal_delay_s=grace, additional_parameters={"requeue": True},
                **more,
            )  # fmt: skip
        else:
            threads = max(1, torch.get_num_threads() // self.processes)
            self._executor.update_parameters(
                timeout_min=minutes, tasks_per_node=max(1, gpus), signal_delay_s=grace,
                gpus_per_node=gpus, visible_gpus=tuple(range(slot * gpus, (slot + 1) * gpus)),
            )  # fmt: skip
        try:
            submitted = self._executor.submit(Attempt(work, job.argument, self.device, folder, threads))
        except self._refused as error:
            raise ClusterError(f"SLURM refuses {job.name}: {_words(error)}") from error
        record = {"id": submitted.job_id, "launcher": self.cluster.launcher, "attempt": attempt}
        if not self._slurm:
            record["started"] = locks.started(int(submitted.job_id))
        files.write_json(folder / SUBMITTED, record)
        log.info("%s is job %s", job.name, submitted.job_id)


@contextmanager
def running(
    cluster: Cluster,
    folder: Path,
    held: Path,
    devices: Sequence[str],
    processes: int,
    job_of: Callable[[object], Job],
) -> Iterator[Callable[[Callable, Sequence], Iterator[tuple[object, object, str | None]]]]:
    """Yield what runs ``work(argument, device)`` for arguments, on the cluster or in processes of this one.

    Args:
        cluster: where.
        folder: of the jobs' records.
        held: folder that one launcher at a time holds.
        devices: of :func:`.jobs.run_jobs`; the first is that of jobs without GPUs.
        processes: how many run at once on this machine.
        job_of: describes the job of an argument.

    Raises:
        LockError: another launcher holds the folder.
    """
    if cluster.launcher is None:
        yield lambda work, arguments: run_jobs(work, arguments, devices, processes)
        return
    launcher = Launcher(cluster, folder, "cuda" if cluster.gpus else devices[0], processes)
    files.make_folder(held)

    def run(work: Callable, arguments: Sequence) -> Iterator[tuple[object, object, str | None]]:
        for job, result, error in launcher.run(work, [job_of(argument) for argument in arguments]):
            yield job.argument, result, error

    with FolderLock(held):
        yield run


class Attempt:
    """The work of a job in its own process; at a time limit submitit queues it again.

    Args:
        work: what is called with ``argument`` and ``device``.
        argument: of the job.
        device: of the job.
        folder: of the job's record.
        threads: of this process; as many as the cores that it may use if not given.
    """

    def __init__(
        self, work: Callable, argument: object, device: str, folder: Path, threads: int | None
    ) -> None:
        self.work, self.argument, self.device = work, argument, device
        self.folder, self.threads = folder, threads

    def __call__(self) -> None:
        """Run the work and write down what it says, or let submitit queue it again."""
        import submitit

        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
        torch.set_num_threads(self.threads or len(os.sched_getaffinity(0)))
        environment = submitit.JobEnvironment()
        if environment.num_tasks > 1:
            # as torchrun does
            submitit.helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
            os.environ["TORCHELASTIC_RUN_ID"] = environment.job_id
        distributed.initialise(torch.device(self.device))
        with _TimeLimit(), _claimed(self.folder):
            result, error = run_attempt(self.work, self.argument, self.device)
            said = {"result": result, "error": error}
            distributed.by_main(lambda: files.write_json(self.folder / DONE, said))

    def checkpoint(self) -> object:
        """Name what is to run after a time limit: the same, which goes on where this one was cut off."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


class _TimeLimit:
    """Lets a training save at the signal before a time limit; then, and elsewhere at once, submitit acts."""

    def __enter__(self) -> None:
        self._saving = False
        self._submitit = signal.signal(signal.SIGUSR2, self._come)

    def _come(self, number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGTERM)
        if isinstance(getattr(handler, "__self__", None), StopRequest):
            self._saving = True
            signal.raise_signal(signal.SIGTERM)  # it finishes its step, saves and leaves
        else:
            self._submitit(number, frame)

    def __exit__(self, kind: type | None, *_: object) -> None:
        signal.signal(signal.SIGUSR2, self._submitit)
        if self._saving and kind is SystemExit:
            self._submitit(signal.SIGUSR2, None)


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """Hold a job's folder: of two launchers' processes with the same job one waits for the other."""
    lock = FolderLock(folder)

    def hold() -> None:
        while True:
            try:
                lock.__enter__()
                return
            except LockError as error:
                log.info("%s", error)
                time.sleep(POLL)

    distributed.by_main(hold)
    try:
        yield
    finally:
        if distributed.is_main():
            lock.__exit__()


def states(folder: Path, jobs: Sequence[Job], launcher: Path) -> list[State]:
    """States of the rows of jobs.

    Args:
        folder: of the jobs' records.
        jobs: all that the table has.
        launcher: folder that a launcher holds while it runs.
    """
    found, watched = [], locks.holder(launcher) is not None
    for job in jobs:
        record = _record(folder / job.name)
        alive, said = _alive(record), files.read_json(folder / job.name / DONE)
        for row, finished in job.parts().items():
            why = said and (said["error"] or (said["result"] or {}).get(row))
            if finished:
                state = State(row, "finished")
            elif record is None or (said and not why and not alive):  # or the job was another table's
                state = State(row, "waiting")
            elif alive:
                holder = locks.holder(folder / job.name)
                where = "" if holder is None else f" on {holder.get('host')}, since {holder.get('since')}"
                state = State(row, "queued" if holder is None else "running", f"job {record['id']}{where}")
            elif why:
                state = State(row, "failed", why)
            elif watched and record["attempt"] < ATTEMPTS:
                state = State(row, "queued", f"started again after: {_last_words(folder, record)}")
            else:
                state = State(row, "failed", f"ended without a result: {_last_words(folder, record)}")
            found.append(state)
    return found


def described(found: Sequence[State]) -> str:
    """States as a table, and how many rows are in each."""
    counts = Counter(one.state for one in found)
    lines = [("row", "state", ""), *((one.row, one.state, one.why) for one in found)]
    said = ", ".join(f"{number} {state}" for state, number in counts.items())
    return f"{text.markdown(lines)}\n\n{said}"


def _record(folder: Path) -> dict | None:
    """Read what was submitted last of a job."""
    return files.read_json(folder / SUBMITTED)


def _alive(record: Mapping | None) -> bool:
    """Return whether a job is queued or running."""
    if record is None:
        return False
    if record["launcher"] == "local":
        return locks.alive(int(record["id"]), record["started"])
    listed = subprocess.run(["squeue", "--noheader", "--me", "--format=%i"], capture_output=True, text=True)
    return listed.returncode != 0 or record["id"] in listed.stdout.split()  # a busy controller says nothing


def _last_words(folder: Path, record: Mapping) -> str:
    """Read what SLURM and the log say of a job that ended."""
    said = []
    if record["launcher"] == "slurm":
        shown = subprocess.run(["scontrol", "show", "job", record["id"]], capture_output=True, text=True)
        said += re.findall(r"(?:JobState|Reason|ExitCode)=\S+", shown.stdout)
    for log_file in sorted((folder / "logs" / record["id"]).glob("*_log.err")):
        lines = log_file.read_text(errors="replace").split("\n")
        said += [line.strip()[:200] for line in lines if line.strip()][-1:]
    return ", ".join(said) or "killed, and the log says nothing"


def _words(error: Exception) -> str:
    return " ".join(line.strip() for line in str(error).splitlines() if line.strip())
