"""Runs that are killed, signalled or refused a write at any call that changes a file, and started again.

    python benchmarks/faults.py                     # all of it; `make soak` runs it, too
    python benchmarks/faults.py --kills 50 --others 10 --subjects trainer report

``faults.c`` is compiled with ``cc`` and preloaded. One process imports everything, warms up and forks for
each trial: a child trains (or writes a table, or a report) until its n-th call meets a fault; another child
starts the same again, to its end. What is then in the folder must be what an undisturbed run leaves, byte for
byte, temporary files included; times, TensorBoard's files and older checkpoints are left out. Where the fault
ends the first child, its error must be of a documented kind and name a path in the folder.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import errno
import gc
import io
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

SOURCE = Path(__file__).with_name("faults.c")
PATIENCE = 300  # seconds until a child counts as one that hangs
# Action of faults.c, its parameter, and share of the trials of its kind.
FAULTS = {
    "kill": (1, 0, 0.5),
    "kill within a write": (2, 0, 0.5),
    "SIGTERM": (3, signal.SIGTERM, 0.25),
    "SIGINT": (3, signal.SIGINT, 0.25),
    "SIGHUP": (3, signal.SIGHUP, 0.25),
    "SIGINT twice": (4, signal.SIGINT, 0.25),
    "EIO": (5, errno.EIO, 1.0),
    "no space": (6, 0, 0.5),
    "no space within a write": (8, 0, 0.5),
    "short write": (7, 0, 1.0),
}
# Shares of the trials; those that take longer have fewer.
SUBJECTS = {"trainer": 10, "reverse": 3, "pipeline": 3, "compare": 1, "reproduce": 1, "report": 2}
TIMES = {"seconds", "seconds_per_epoch", "peak_memory_mib", "s/epoch", "peak MiB", "time", "date"}


@dataclass(frozen=True)
class Outcome:
    """End of a child: ``"done"``, its error as text, or its signal; the calls it made; the call at fault."""

    end: str
    calls: int
    last: str


def compiled(folder: Path) -> Path | None:
    """The library, or ``None`` where there is no compiler (or no Linux)."""
    compiler = shutil.which("cc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "faults.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE)], check=True)
    return library


def attack(
    kills: int,
    others: int,
    subjects: Mapping[str, int] = SUBJECTS,
    seed: int = 0,
    jobs: int = 1,
    minutes: float = 40.0,
    say: bool = False,
) -> list[dict[str, object]] | None:
    """Run trials in processes with the library preloaded.

    Args:
        kills: trials with SIGKILL, half of them in the middle of a write.
        others: trials with a signal, and as many of each error: EIO, no space, a short write.
        subjects: what is disturbed, and its share of the trials.
        seed: of the calls that are chosen.
        jobs: processes that share the trials.
        minutes: after which no trial is begun any more, and those that are left are not counted.
        say: print each trial that was lost as it is found.

    Returns:
        A row for each subject and fault: ``trials``, ``struck`` (in which the fault was met), and ``lost``
        (descriptions); ``None`` where the library cannot be compiled.
    """
    with tempfile.TemporaryDirectory() as folder:
        library = compiled(Path(folder))
        if library is None:
            return None
        environment = os.environ | {
            "LD_PRELOAD": str(library), "FAULTS": str(library), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg",
        }  # fmt: skip
        processes = []
        for job in range(jobs):
            plan = {"kills": kills, "others": others, "subjects": dict(subjects), "seed": seed}
            plan |= {"part": [job, jobs], "minutes": minutes}
            command = [sys.executable, __file__, "--plan", json.dumps(plan)]
            stderr = None if say else subprocess.DEVNULL
            processes.append(
                subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=stderr)
            )
        rows: dict[tuple[str, str], dict[str, object]] = {}
        for process in processes:
            said, _ = process.communicate()
            if process.returncode:
                raise RuntimeError(f"the process of the trials ended with {process.returncode}")
            for row in json.loads(said.splitlines()[-1]):
                whole = rows.setdefault(
                    (row["subject"], row["fault"]), row | {"trials": 0, "struck": 0, "lost": []}
                )
                for name in ("trials", "struck", "lost"):
                    whole[name] += row[name]
        order = [(subject, fault) for subject in subjects for fault in FAULTS]
        return [rows[key] for key in order if key in rows]


def planned(kills: int, others: int, subjects: Mapping[str, int], seed: int) -> list[tuple[str, str, float]]:
    """Subject, fault and place in [0, 1) of each trial, shuffled; places are spread over the whole run."""
    draw, whole, trials = random.Random(seed), sum(subjects.values()), []
    for fault in FAULTS:
        count = round((kills if fault.startswith("kill") else others) * FAULTS[fault][2])
        done = 0
        for number, (subject, share) in enumerate(subjects.items()):
            mine = count - done if number == len(subjects) - 1 else round(count * share / whole)
            done += mine
            trials += [(subject, fault, (trial + draw.random()) / mine) for trial in range(mine)]
    draw.shuffle(trials)  # so that a part of them is a sample
    return trials


class Zygote:
    """Forks children that run a subject in a folder, with or without a fault.

    Args:
        subjects: functions of a folder, by name.
        base: folder for all of it; nothing may be written elsewhere in it than in a trial's own folder.
    """

    def __init__(self, subjects: Mapping[str, Callable[[Path], object]], base: Path) -> None:
        self.subjects, self.base = subjects, base
        self.library = ctypes.CDLL(os.environ["FAULTS"])
        self.library.faults_calls.restype = ctypes.c_long
        self.library.faults_last.restype = ctypes.c_char_p
        self.reference: dict[str, dict[str, object]] = {}
        self.calls: dict[str, int] = {}

    def run(self, subject: str, folder: Path, fault: str | None = None, at: int = 0) -> Outcome:
        """Run a subject in a child of its own."""
        action, parameter, _ = (0, 0, 1) if fault is None else FAULTS[fault]
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.close(read)
                signal.alarm(PATIENCE)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                self.library.faults_arm(os.fsencode(folder), action, ctypes.c_long(at), parameter)
                end = "done"
                try:
                    self.subjects[subject](folder)
                except BaseException as error:
                    end = described(error, folder)
                os.write(write, end.encode(errors="replace")[:4000])
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb") as pipe:
            end = pipe.read().decode(errors="replace")
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            end = signal.Signals(os.WTERMSIG(status)).name
        return Outcome(end, self.library.faults_calls(), os.fsdecode(self.library.faults_last()))

    def undisturbed(self, subject: str) -> None:
        """Remember what a subject leaves by itself, and how many calls it makes."""
        folder = self.base / "run"  # as in the trials: some files name it
        folder.mkdir()
        outcome = self.run(subject, folder)
        if outcome.end != "done":
            raise RuntimeError(f"{subject} by itself ended with {outcome.end}")
        self.reference[subject], self.calls[subject] = content(folder), outcome.calls
        shutil.rmtree(folder)

    def trial(self, subject: str, fault: str, at: int) -> tuple[bool, str | None]:
        """Whether the fault was met, and what was lost, if anything."""
        folder = self.base / "run"
        folder.mkdir()
        try:
            first = self.run(subject, folder, fault, at)
            lost = refused(first, fault)
            for part in folder.rglob(".*.part"):  # as if a while had passed
                os.utime(part, (1e9, 1e9))
            if lost is None and first.end != "done":
                second = self.run(subject, folder)
                if second.end != "done":
                    lost = f"started again it ended with {second.end}"
            if lost is None:
                lost = difference(self.reference[subject], content(folder))
            if lost is None and sorted(os.listdir(self.base)) != ["input", "run"]:
                lost = f"beside the folder there is {os.listdir(self.base)}"
            said = (
                None
                if lost is None
                else f"{subject}, {fault} at call {at} ({first.last}; {first.end}): {lost}"
            )
            return bool(first.last), said
        finally:
            for path in self.base.iterdir():
                if path.name != "input":
                    shutil.rmtree(path)


def described(error: BaseException, folder: Path) -> str:
    """Text of an error; ``foreign`` where it is of no documented kind or names no file."""
    from lasnn_sj.experiments import ExperimentError
    from lasnn_sj.runtime import LockError
    from lasnn_sj.training.checkpoint import CheckpointError

    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        return type(error).__name__
    text = f"{type(error).__name__}: {error}"
    known = isinstance(error, (OSError, CheckpointError, LockError, ExperimentError))
    if known and str(folder) in text:
        return text
    import traceback

    return f"foreign {text}\n{''.join(traceback.format_tb(error.__traceback__)[-4:])}"


def refused(first: Outcome, fault: str) -> str | None:
    """What is wrong with the end of a child that met a fault."""
    end = first.end
    if not first.last and end != "done":
        return f"it ended with {end}, before the fault"
    if fault.startswith("kill"):
        return None if end in ("SIGKILL", "done") else f"it ended with {end}"
    if fault.startswith("SIG"):
        fine = end in ("done", "SystemExit", "KeyboardInterrupt", fault.split()[0])
        return None if fine else f"it ended with {end}"
    if fault == "short write":
        return None if end == "done" else f"half a write is no error, it ended with {end}"
    return f"it ended with {end}" if end.startswith(("foreign", "SIG")) or not end else None


def content(folder: Path) -> dict[str, object]:
    """Files by name without times; of checkpoints the newest one's."""
    files = {
        str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file() or p.is_symlink()
    }
    newest: dict[str, str] = {}
    for path in (p for p in folder.rglob("checkpoints/*/") if p.name.isdigit()):
        newest[str(path.parent)] = max(path.name, newest.get(str(path.parent), ""))
    found = {}
    for name, path in files.items():
        if "tensorboard" in path.parts:
            continue
        if path.name == "run.lock":  # stays after a kill behind the last result
            continue
        if path.parent.parent.name == "checkpoints" and path.parent.name.isdigit():
            if path.parent.name != newest[str(path.parent.parent)] or path.name == "manifest.json":
                continue
            name = str(path.parent.parent.relative_to(folder) / "newest" / path.name)
        found[name] = timeless(path)
    return found


def timeless(path: Path) -> object:
    """A file's content without times."""
    import torch

    data = path.read_bytes()
    try:
        match path.suffix:
            case ".json":
                return repr(_without(json.loads(data)))
            case ".pt":
                return repr(_without(torch.load(io.BytesIO(data), weights_only=True)))
            case ".csv":
                rows = list(csv.reader(data.decode().splitlines()))
                return repr(_columns(rows))
            case ".md":
                lines = [[cell.strip() for cell in line.split("|")] for line in data.decode().splitlines()]
                head = next((line for line in lines if len(line) > 1), [])
                return repr(_columns([head, *(line for line in lines if len(line) == len(head))]))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return data


def _without(value: object) -> object:
    import torch

    if isinstance(value, Mapping):
        return {key: _without(inner) for key, inner in value.items() if key not in TIMES}
    if isinstance(value, (list, tuple)):
        return [_without(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            list(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    return value


def _columns(rows: list[list[str]]) -> list[list[str]]:
    kept = [number for number, name in enumerate(rows[0]) if name not in TIMES] if rows else []
    return [[row[number] for number in kept if number < len(row)] for row in rows]


def difference(one: Mapping[str, object], other: Mapping[str, object]) -> str | None:
    """The first differences of two folders in words."""
    names = [name for name in sorted(one.keys() | other.keys()) if one.get(name) != other.get(name)]
    words = []
    for name in names[:4]:
        there = "missing" if name not in other else "too many" if name not in one else "other content"
        words.append(f"{name}: {there}")
        if there == "other content" and isinstance(one[name], str):
            at = len(os.path.commonprefix([one[name], other[name]]))
            words[-1] += f" ({one[name][max(0, at - 30) : at + 20]} and {other[name][at : at + 20]})"
    return "; ".join(words) or None


def subjects_of(base: Path) -> dict[str, Callable[[Path], object]]:
    """What is disturbed, as small as it can be: each takes a folder that may hold a part of it already."""
    import numpy as np
    import torch
    from spikingjelly.activation_based import layer
    from torch import nn

    from lasnn_sj import DirectEncoder, LaSNNTrainer, PoissonEncoder, models
    from lasnn_sj.analysis.report import charts
    from lasnn_sj.analysis.report import report as write_report
    from lasnn_sj.data import images
    from lasnn_sj.experiments import reproduce, scales
    from lasnn_sj.experiments.compare import Comparison
    from lasnn_sj.experiments.pipeline import Pipeline
    from lasnn_sj.experiments.recipes import Recipe, ReverseRecipe
    from lasnn_sj.experiments.reverse import ReversePipeline
    from lasnn_sj.neurons import IntegratorNode, LIFNode
    from lasnn_sj.training import TrainingOptions

    own = base / "input"
    own.mkdir()
    draw = np.random.default_rng(0)
    parts = {}
    for name, count in (("train", 20), ("test", 8)):
        parts[f"x_{name}"] = draw.integers(0, 256, (count, 8, 8, 1), dtype=np.uint8)
        parts[f"y_{name}"] = np.arange(count) % 4
    np.savez(own / "tiny.npz", **parts)
    tiny = images.load(own / "tiny.npz").split(8)
    recipe = Recipe(
        student="conv3_linear2", width=0.05, T=2, encoding="direct", teacher_width=0.0625, teacher_epochs=1,
        teacher_batch=12, ann_epochs=2, ann_lr=0.1, ann_batch=6, calibration_images=12, calibration_steps=6,
        threshold_scale=0.5, epochs=2, lr=1e-3, batch=6,
    )  # fmt: skip

    def smallest(*_: object) -> nn.Module:
        return nn.Sequential(
            layer.Conv2d(1, 3, 3, padding=1, step_mode="m"),
            LIFNode(v_threshold=0.3, step_mode="m"),
            layer.Flatten(step_mode="m"),
            layer.Dropout(0.2, step_mode="m"),
            layer.Linear(3 * 64, 4, step_mode="m"),
            IntegratorNode(step_mode="m"),
        )

    models.smallest = smallest  # for a recipe

    def trainer(folder: Path) -> None:
        torch.manual_seed(0)
        student = smallest()
        teacher = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 4)
        ).eval()
        optimizer = torch.optim.Adam(student.parameters(), lr=3e-3)
        LaSNNTrainer(
            student,
            teacher,
            encoder=PoissonEncoder(2, torch.Generator().manual_seed(5)),
            optimizer=optimizer,
            scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7),
            pairs=[("1", "1")],
            run_dir=folder,
            seed=0,
            options=TrainingOptions(checkpoint_every=2),
        ).fit(*tiny.loaders(3, seed=2), epochs=2)

    def pipeline(folder: Path) -> None:
        Pipeline(recipe, tiny, folder).run()

    def reverse(folder: Path) -> None:
        small = ReverseRecipe(student="smallest", epochs=2, batch=6, ratios=(0.5,), default=False)
        ReversePipeline(small, tiny, folder, DirectEncoder(2)).run()

    def compare(folder: Path) -> None:
        rows = {"hybrid": "CrossEntropy()", "label": "LabelKD()"}
        short, source = replace(recipe, epochs=1), str(own / "tiny.npz")
        Comparison(
            recipe=short, rows=rows, baseline="hybrid", seeds=(0,), source=source, validation_images=8,
            run_dir=folder, processes=1, device="cpu",
        ).run()  # fmt: skip

    def table(folder: Path) -> None:
        # rates of random codes take some steps to reach the last layer
        scales.SMOKE_LASNN = replace(recipe, epochs=1, ann_epochs=4, calibration_steps=50)
        scales.images = lambda *_: tiny
        reproduce("II", ("conv3_linear2/lasnn/activation",), "smoke", 1, run_dir=folder, device="cpu")

    def undrawn(figure: object, name: str, title: str, alt: str) -> charts.Picture:
        return charts.Picture(name, title, alt, "<svg></svg>", name.encode())

    charts.picture, charts.file = undrawn, lambda figure, title: title.encode()  # most of a report's time

    def page(folder: Path) -> None:
        write_report(own / "finished", folder / "report.html")

    chosen = {
        "trainer": trainer,
        "pipeline": pipeline,
        "reverse": reverse,
        "compare": compare,
        "reproduce": table,
    }
    return chosen | {"report": page}


def work(
    kills: int, others: int, subjects: Mapping[str, int], seed: int, part: tuple[int, int], minutes: float
) -> None:
    """Run a part of the trials in this process, in which the library is preloaded; print rows as JSON."""
    import torch
    from tqdm import tqdm

    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(1)
    tqdm.monitor_interval = 0
    warnings.simplefilter("ignore")
    logging.getLogger("lasnn_sj").addHandler(logging.NullHandler())
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as base:
        base = Path(base).resolve()
        functions = subjects_of(base)
        zygote = Zygote(functions, base)
        with Quiet():
            if "report" in subjects:
                functions["pipeline"](base / "input" / "finished")
            for name in subjects:  # imports, compiled kernels
                with tempfile.TemporaryDirectory(dir=base) as folder:
                    functions[name](Path(folder))
        gc.collect()
        gc.freeze()
        for name in subjects:
            zygote.undisturbed(name)
        rows: dict[tuple[str, str], dict[str, object]] = {}
        for number, (subject, fault, place) in enumerate(planned(kills, others, subjects, seed)):
            if number % part[1] != part[0] or time.monotonic() > end:
                continue
            at = 1 + int(place * zygote.calls[subject])
            struck, lost = zygote.trial(subject, fault, at)
            none = {"subject": subject, "fault": fault, "calls": zygote.calls[subject]}
            row = rows.setdefault((subject, fault), none | {"trials": 0, "struck": 0, "lost": []})
            row["trials"] += 1
            row["struck"] += struck
            if lost is not None:
                row["lost"].append(lost)
                print(lost, file=sys.stderr, flush=True)
    print(json.dumps(list(rows.values())))


class Quiet:
    """Nothing on standard output and error meanwhile."""

    def __enter__(self) -> None:
        self.kept = [os.dup(1), os.dup(2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        os.close(nowhere)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        for number, kept in enumerate(self.kept, 1):
            os.dup2(kept, number)
            os.close(kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--others", type=int, default=300, help="trials with a signal, and of each error")
    parser.add_argument("--subjects", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.plan:
        work(**json.loads(a.plan))
        return
    chosen = {name: SUBJECTS[name] for name in a.subjects}
    rows = attack(a.kills, a.others, chosen, a.seed, a.jobs, a.minutes, say=True)
    if rows is None:
        print("skipped: there is no C compiler (cc), or this is not Linux")
        return
    for row in rows:
        counts = f"{row['trials']} trials, {row['struck']} struck, {len(row['lost'])} lost"
        print(f"{row['subject']}, {row['fault']}: {counts}")


if __name__ == "__main__":
    main()
