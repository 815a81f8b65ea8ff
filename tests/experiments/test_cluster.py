"""Tables over jobs of a cluster: each row once, kills and time limits, states, and what goes wrong."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from types import SimpleNamespace

import pytest

from lasnn_sj import __main__ as cli
from lasnn_sj.experiments import Cluster, ClusterError, ExperimentError, cluster, reproduce
from lasnn_sj.experiments.jobs import attempt as run_attempt
from lasnn_sj.experiments.run import TableRunner, _phases, choose
from lasnn_sj.runtime import FolderLock, LockError, locks
from lasnn_sj.training.signals import StopRequest

submitit = pytest.importorskip("submitit")

ROWS = (
    "cifar10/conv3_linear2", "vgg5/ann", "vgg5/converted", "vgg5/converted_10T", "vgg5/hybrid",
    "vgg5/lasnn/activation",
)  # fmt: skip
CONV3 = "runs-cifar10-conv3_linear2-poisson-T4-resnet20-activation-seed0"  # five rows
VGG5 = "runs-cifar10-vgg5-poisson-T4-resnet20-activation-seed0"  # four rows


def run(folder, rows=ROWS, where=None, **options):
    where = where or Cluster("local", minutes=30)
    return reproduce("II", rows, "smoke", 1, run_dir=folder, device="cpu", where=where, **options)


def jobs_of(folder, rows=ROWS):
    runner = TableRunner("smoke", folder, folder / "smoke", None, "cpu")
    phases = _phases(runner, choose("II", rows, "smoke"), 1)
    return [runner.job(one) for phase in phases for one in phase]


def states_of(folder, rows=ROWS):
    records = folder / "smoke" / "cluster"
    return cluster.states(records, jobs_of(folder, rows), records / "table_II")


def wait_for(holder_of, folder, deadline=240):
    """The process that works at a job."""
    end = time.monotonic() + deadline
    while time.monotonic() < end:
        holder = locks.holder(folder / "smoke" / "cluster" / holder_of)
        if holder is not None:
            return holder["pid"]
        time.sleep(0.05)
    raise AssertionError(f"{holder_of} was not started")


def starts(folder):
    """How often each stage of each run folder was begun, by the logs."""
    found = Counter()
    for log in folder.glob("smoke/cluster/logs/*/*_log.err"):
        found.update(re.findall(r"^\S+ (\w+) of (\S+smoke/\S+)$", log.read_text(), re.MULTILINE))
    return found


def test_twelve_rows_with_two_kills_and_a_time_limit(tmp_path, capsys):
    """All rows once, those of jobs that were cut off at most again; each state is what it is."""
    ended = []

    def launch():
        try:
            ended.append(run(tmp_path, processes=2))
        except BaseException as error:
            ended.append(error)

    launcher, seen = threading.Thread(target=launch), {}
    launcher.start()
    cuts = {"teacher-cifar10-resnet20": signal.SIGKILL, VGG5: signal.SIGKILL, CONV3: signal.SIGUSR2}
    left = dict(cuts)
    while launcher.is_alive():
        for name, number in list(left.items()):
            holder = locks.holder(tmp_path / "smoke" / "cluster" / name)
            # the first of three trainings has begun
            ready = name != CONV3 or next(tmp_path.glob("smoke/runs/*/hybrid/settings.json"), None)
            if holder is not None and ready:
                os.kill(holder["pid"], number)
                del left[name]
                with pytest.raises(LockError, match="table_II is in use by"):
                    run(tmp_path)
        states = states_of(tmp_path)
        for one in states:
            if one.state == "running":
                assert "since 20" in one.why
            assert not (one.state != "finished" and seen.get(one.row) == "finished"), one
            seen[one.row] = one.state
        assert {one.state for one in states} <= {"waiting", "queued", "running", "finished"}, states
        time.sleep(0.2)
    (text,) = ended
    assert not left
    assert isinstance(text, str), text
    lines = [line for line in text.splitlines() if line.startswith("| cifar10/")]
    assert len(lines) == 12
    assert all(re.search(r"\| +\d+\.\d\d +\| 1 ", line) for line in lines)
    assert set(seen.values()) == {"finished"}
    for (stage, run_dir), count in starts(tmp_path).items():
        cut = any(name.partition("-")[2] in run_dir for name in cuts)
        assert count <= (2 if cut else 1), (stage, run_dir)
    cli.main(["reproduce", "II", "--rows", *ROWS, "--scale", "smoke", "--seeds", "1", "--run-dir",
              str(tmp_path), "--status"])  # fmt: skip
    assert "15 finished" in capsys.readouterr().out  # twelve rows, a teacher and two ANNs
    before = starts(tmp_path)
    assert run(tmp_path) == text  # nothing is run again
    assert starts(tmp_path) == before


def test_a_job_on_two_processes(tmp_path):
    rows = ("conv3_linear2/ann",)
    runner = TableRunner("smoke", tmp_path, tmp_path / "smoke", None, "cpu")
    launcher = cluster.Launcher(Cluster("local", gpus=2, minutes=30), tmp_path / "smoke" / "cluster", "cpu")
    ((job, result, error),) = launcher.run(runner.work, jobs_of(tmp_path, rows)[:1])
    assert (job.name, result, error) == ("ann-cifar10-conv3_linear2-seed0", {}, None)
    settings = (tmp_path / "smoke/anns/cifar10-conv3_linear2-seed0/ann/settings.json").read_text()
    assert '"processes": 2' in settings


def test_a_comparison_has_its_shared_networks_starts_and_rows_as_jobs(tmp_path, monkeypatch, capsys):
    ran = []

    def here(self, work, jobs):
        for job in jobs:
            assert not job.finished
            ran.append(job.name)
            yield job, *run_attempt(work, job.argument, self.device)
            assert job.finished

    monkeypatch.setattr(cluster.Launcher, "run", here)
    command = ["compare", "compare_digits", "--run-dir", str(tmp_path), "--recipe.epochs", "1",
               "--recipe.ann-epochs", "1", "--recipe.teacher-epochs", "1", "--seeds", "4"]  # fmt: skip
    cli.main([*command, "--launcher", "local"])
    assert ran[:3] == ["teacher_and_ANN", "start_seed_4", "start_not_trained_seed_4"]
    assert len(ran) == len(set(ran)) == 8  # and five rows
    assert "| hybrid" in capsys.readouterr().out
    assert "launcher" not in (tmp_path / "config.yaml").read_text()
    cli.main([*command, "--launcher", "local", "--status"])
    assert "8 finished" in capsys.readouterr().out


class Processes:
    """In submitit's place: processes that end at once, without a result or with one."""

    def __init__(self, code):
        self.code, self.submitted = code, 0

    def update_parameters(self, **_):
        pass

    def submit(self, attempt):
        self.submitted += 1
        self.process = subprocess.Popen([sys.executable, "-c", self.code.format(folder=attempt.folder)])
        return SimpleNamespace(job_id=str(self.process.pid))


def launcher_of(tmp_path, code):
    launcher = cluster.Launcher(Cluster("local"), tmp_path, "cpu")
    launcher._executor = Processes(code)
    return launcher


def test_a_job_that_always_dies_is_given_up_with_its_last_words(tmp_path):
    launcher = launcher_of(tmp_path, "import os; os.abort()")
    job = cluster.Job("job", 1, lambda: {"row": False})
    ((_, _, error),) = launcher.run(print, [job])
    assert launcher._executor.submitted == cluster.ATTEMPTS == 3
    assert error == "ended 3 times without a result: killed, and the log says nothing"
    (state,) = cluster.states(tmp_path, [job], tmp_path / "nobody")
    assert (state.state, state.why.partition(":")[0]) == ("failed", "ended without a result")


def test_a_row_that_failed_is_named_with_the_reason(tmp_path):
    said = '{{"result": {{"one": "OSError: no disk"}}, "error": null}}'
    launcher = launcher_of(tmp_path, f"open('{{folder}}/done.json', 'w').write('''{said}''')")
    job = cluster.Job("job", 1, lambda: {"one": False, "two": True})
    ((_, result, error),) = launcher.run(print, [job])
    launcher._executor.process.wait()
    assert (result, error) == ({"one": "OSError: no disk"}, None)
    states = cluster.states(tmp_path, [job], tmp_path / "nobody")
    assert [(one.row, one.state, one.why) for one in states] == [
        ("one", "failed", "OSError: no disk"), ("two", "finished", ""),
    ]  # fmt: skip
    assert "1 failed, 1 finished" in cluster.described(states)


def test_a_job_that_is_under_way_is_waited_for(tmp_path):
    """As after a launcher was killed: its job runs on."""
    done = tmp_path / "job" / "done.json"
    code = f"import time; time.sleep(1); open('{done}', 'w').write('{{{{\"result\": 7, \"error\": null}}}}')"
    first = launcher_of(tmp_path, code)
    job = cluster.Job("job", 1, lambda: {"row": done.exists()})
    first._submit(print, job, 0)
    second = launcher_of(tmp_path, code)
    assert [said[1:] for said in second.run(print, [job])] == [(7, None)]
    assert second._executor.submitted == 0


def test_of_two_processes_with_one_job_one_waits(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "POLL", 0.1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with FolderLock(tmp_path):
            os.write(write, b".")
            time.sleep(0.7)
            (tmp_path / "done").touch()
        os._exit(0)
    os.read(read, 1)
    with cluster._claimed(tmp_path):
        assert (tmp_path / "done").exists()
    os.waitpid(child, 0)


def train(told):
    with cluster._TimeLimit(), StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR2)
        assert stop.signal == signal.SIGTERM
        assert told == []
        stop.leave()


def test_a_training_saves_before_its_job_is_queued_again():
    """The signal before a time limit becomes the one that a training waits for; elsewhere it acts at once."""
    told = []
    before = signal.signal(signal.SIGUSR2, lambda *_: told.append("submitit"))
    try:
        with pytest.raises(SystemExit):
            train(told)
        assert told == ["submitit"]
        with cluster._TimeLimit():
            signal.raise_signal(signal.SIGUSR2)
            assert told == ["submitit"] * 2
    finally:
        signal.signal(signal.SIGUSR2, before)


def script(folder, name, text):
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_words_of_slurm_are_passed_on(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    words = "sbatch: error: invalid partition specified: nosuch"
    script(tools, "srun", "exit 0")
    script(tools, "squeue", "exit 0")
    script(tools, "sbatch", f'grep -q "partition=nosuch" "$1" && echo "{words}" >&2; exit 1')
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    with pytest.raises(ClusterError, match=f"SLURM refuses ann-.*: {words}"):
        run(tmp_path, where=Cluster("slurm", partition="nosuch"))
    assert {one.state for one in states_of(tmp_path)} == {"waiting"}
    with FolderLock(tmp_path / "smoke" / "cluster" / "table_II"):  # nobody holds it any more
        pass


def test_a_launcher_without_slurm_or_submitit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(ClusterError, match="launcher slurm: .*srun"):
        run(tmp_path, where=Cluster("slurm"))
    monkeypatch.setitem(sys.modules, "submitit", None)
    command = ["reproduce", "II", "--scale", "smoke", "--run-dir", str(tmp_path), "--launcher", "local"]
    with pytest.raises(SystemExit, match=r"needs submitit: pip install 'lasnn-sj\[cluster\]'"):
        cli.main(command)
    for option, value in (("--minutes", "0"), ("--gpus", "-1")):
        with pytest.raises(SystemExit, match=f"{option[2:]} must be"):
            cli.main([*command, option, value])


def test_a_run_folder_that_cannot_be_written(tmp_path):
    mount = ["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        command = ["reproduce", "II", "--scale", "smoke", "--run-dir", str(tmp_path / "run")]
        for more in ([], ["--launcher", "local"]):
            with pytest.raises(SystemExit, match=r"run/smoke.* cannot be written \(Read-only file system\)"):
                cli.main([*command, *more])
        with pytest.raises(SystemExit, match=r"cannot be written \(Read-only file system\)"):
            cli.main(["train", "smoke_digits", "--run-dir", str(tmp_path / "run")])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_full_disk_fails_the_row_and_loses_none(tmp_path, monkeypatch):
    rows, fsync = ("conv3_linear2/ann", "conv3_linear2/converted"), os.fsync
    reproduce("II", rows[:1], "smoke", 1, run_dir=tmp_path)

    def full(descriptor):
        if "runs" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExperimentError, match=r"1 of 2 rows failed .*No space left"):
        reproduce("II", rows, "smoke", 1, run_dir=tmp_path)
    monkeypatch.undo()
    assert "| 1 " in reproduce("II", rows, "smoke", 1, run_dir=tmp_path)


@pytest.mark.parametrize("shift", [-86400, 86400])
def test_clocks_that_differ_between_nodes(tmp_path, monkeypatch, shift):
    """A sign of life is a time that changes, by whatever clock: a day off is alive, silent is gone."""
    monkeypatch.setattr(locks, "STALE", 1.0)
    lock = tmp_path / "run.lock"
    lock.write_text('{"host": "elsewhere", "pid": 1, "since": "then", "token": "t"}')
    begun, stop = time.time() + shift, threading.Event()

    def beat():
        for number in range(100):
            if stop.wait(0.1):
                return
            os.utime(lock, (begun + number, begun + number))

    os.utime(lock, (begun, begun))
    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(LockError, match="process 1 on elsewhere"):
        FolderLock(tmp_path).__enter__()
    stop.set()
    thread.join()
    assert locks.holder(tmp_path)["host"] == "elsewhere"
    with FolderLock(tmp_path):
        assert locks.holder(tmp_path)["pid"] == os.getpid()


@pytest.mark.skipif(
    shutil.which("sinfo") is None or subprocess.run(["sinfo"], capture_output=True).returncode != 0,
    reason="there is no SLURM here",
)
def test_slurm_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "POLL", 2.0)
    text = run(tmp_path, ("conv3_linear2/ann", "conv3_linear2/converted"), Cluster("slurm", minutes=10))
    assert text.count("| cifar10/") == 2
    assert {one.state for one in states_of(tmp_path, ("conv3_linear2/ann",))} == {"finished"}
    with pytest.raises(ClusterError, match="nosuch"):
        run(tmp_path, ("vgg5/ann",), Cluster("slurm", partition="nosuch"))
