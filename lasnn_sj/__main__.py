"""Command line, ``python -m lasnn_sj`` or ``lasnn-sj``; each command imports its own dependencies."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import tyro
from tyro.conf import Positional

PROG = "lasnn-sj"
ABOUT = "Train spiking neural networks by distillation, and see what came out."
PACKAGES = (
    "torch", "torchvision", "spikingjelly", "numba", "numpy", "cupy-cuda12x", "cupy-cuda13x", "triton",
    "tonic", "timm", "nir", "nirtorch", "safetensors", "tensorboard", "torchmetrics", "tyro",
)  # fmt: skip


def train(config: Positional[Path], overrides: Positional[tuple[str, ...]] = ()) -> None:
    """Train the run that a YAML file describes, print and write its table; an interrupted run resumes.

    "lasnn-sj train CONFIG --help" lists a configuration's options with units and values. The package brings
    a configuration for every network and method, such as smoke_digits or
    lasnn_cifar10_vgg9_poisson_activation; a name that does not exist lists those near.

    Args:
        config: YAML file with method (lasnn, reverse or reverse-events), recipe, run_dir, ..., or the name of
            a configuration that the package brings.
        overrides: options in the file's place, such as --recipe.epochs 3 --device cuda.
    """
    from .experiments import runs

    described = runs.read(config)
    _remove_markup(type(described), type(described.recipe), type(getattr(described, "framing", None)))
    tyro.cli(type(described), default=described, args=overrides, prog=f"{PROG} train {config}").run()


def compare(config: Positional[Path], overrides: Positional[tuple[str, ...]] = ()) -> None:
    """Compare training methods on one student, seed by seed; an interrupted comparison resumes.

    "lasnn-sj compare CONFIG --help" lists its options. The package brings compare_digits and
    compare_cifar10_conv3_linear2.

    Args:
        config: YAML file with method: compare, recipe, rows, baseline, run_dir, ..., or the name of a
            configuration that the package brings.
        overrides: options in the file's place, such as --seeds 0 1 2 --judge test.
    """
    train(config, overrides)


def evaluate(
    run_dir: Positional[Path],
    rows: Positional[tuple[str, ...]] = (),
    source: str | None = None,
    root: Path = Path("data"),
    device: str | None = None,
) -> None:
    """Print the accuracy of trained students on their test data.

    Args:
        run_dir: folder of train, compare, reproduce or the quickstart, of a trainer (its run_dir), or of
            save_pretrained.
        rows: which of its students, such as lasnn, hybrid, alone, "sparse 0.3", or best and last of a
            trainer's; the run's own if not given.
        source: data set or .npz file, if the folder does not name it.
        root: folder of the data sets, if the folder does not name it.
        device: "cpu", "cuda", ...; the run's if not given.
    """
    from .experiments.folders import students
    from .runtime import distributed

    found = students(run_dir, rows, source, root)
    several = len({(one.seed, one.row) for one in found}) < len(found)
    for one in found:
        result = one.evaluate(device)
        if not distributed.is_main():
            continue
        if one is found[0]:
            print("seed  row                  top-1 %   loss     samples" + several * "  folder")
        seed = "" if one.seed is None else one.seed
        line = f"{seed:<5} {one.row:<20} {result['top1']:<9.2f} {result['loss']:<8.4f} {result['samples']}"
        print(line + several * f"     {one.folder}")


def reproduce(
    table: Positional[str],
    rows: tuple[str, ...] = (),
    scale: Literal["full", "small", "smoke"] = "small",
    seeds: int = 3,
    root: Path = Path("data"),
    run_dir: Path = Path("runs/reproduce"),
    teacher_checkpoint: Path | None = None,
    device: str | None = None,
    processes: int | None = None,
    launcher: Literal["local", "slurm"] | None = None,
    partition: str | None = None,
    gpus: int = 0,
    minutes: float = 240,
    status: bool = False,
) -> None:
    """Train the rows of one of the papers' tables or figures, and print them beside the printed numbers.

    Args:
        table: its name, such as I, II, IV, Fig5, 1 or 2; an unknown one lists those there are.
        rows: some of its rows by name; all that fit the scale if not given.
        scale: full, the papers' settings (days on a GPU); small, about an hour of two cores for a table;
            smoke, a test of seconds.
        seeds: how many runs of each row.
        root: folder of the data sets.
        run_dir: folder of all results; what is finished there is not run again.
        teacher_checkpoint: file of a trained ResNet-20 for CIFAR-10.
        device: "cpu", "cuda", ...; all GPUs if not given, the CPU where there is none.
        processes: how many rows run at once; one for each GPU, or on the CPU one, if not given.
        launcher: slurm submits each row as a job of its own, local runs the same jobs on this machine.
        partition: of SLURM; the cluster's default if not given.
        gpus: of each job; with several the job's trainings are data-parallel.
        minutes: time limit of a job; one that is cut off is queued again and goes on.
        status: print which rows are finished, running or failed, and why, and start nothing.
    """
    from . import experiments
    from .runtime import distributed

    where = experiments.Cluster(launcher, partition, gpus, minutes, status)
    text = experiments.reproduce(
        table, rows, scale, seeds, root, run_dir, teacher_checkpoint, device, processes, where
    )
    if distributed.is_main():
        print(text)


def report(run_dirs: Positional[tuple[Path, ...]], out: Path | None = None) -> None:
    """Write one HTML page about a run, or one that compares several.

    Args:
        run_dirs: folders of the runs.
        out: page to write, ``report.html`` in the folder, or in the one that all lie in, if not given.
    """
    from .analysis.report import report as write

    print(write(run_dirs, out))


def export(
    run_dir: Positional[Path], out: Positional[Path], row: str | None = None, seed: int | None = None
) -> None:
    """Write a trained student as NIR, for other simulators and neuromorphic hardware.

    Needs neurons with hard reset, which the networks of reverse distillation have.

    Args:
        run_dir: folder of train, compare, reproduce or the quickstart, of a trainer (its run_dir), or of
            save_pretrained.
        out: file to write, such as student.nir.
        row: which of its students, the last row's if not given.
        seed: of which seed, the first if not given.
    """
    from .conversion import nir as nir_export
    from .experiments.folders import students

    found = students(run_dir, () if row is None else (row,))
    seeds = [one.seed for one in found]
    seed = seeds[0] if seed is None else seed
    if seed not in seeds:
        raise ValueError(f"seed must be one of {', '.join(map(str, dict.fromkeys(seeds)))}, got {seed}")
    one = [one for one in found if one.seed == seed][-1]
    path = nir_export.save(one.load("cpu")[0], out, one.sample_shape)
    of = "" if one.seed is None else f" of seed {one.seed}"
    print(f"{path}: {one.row}{of}, input {list(one.sample_shape)} at each step")


def info() -> None:
    """Print versions, devices, the backend of the neurons with its reason, and the cache folders."""
    from . import __version__

    def installed(package: str) -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return "not installed"

    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    print(f"lasnn-sj {__version__}, Python {platform.python_version()}, {system}\n\nversions", flush=True)
    for package in PACKAGES:
        print(f"  {package:<14} {installed(package)}")
    sys.stdout.flush()  # what follows takes seconds to import

    import torch

    from . import neurons

    print("\ndevices")
    print(f"  cpu            {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        print(f"  cuda:{index}         {device.name}, {device.total_memory / 2**30:.0f} GiB, "
              f"compute capability {device.major}.{device.minor}")  # fmt: skip
    if not torch.cuda.is_available():
        why = "is built without CUDA" if torch.version.cuda is None else "finds no CUDA device"
        print(f"  cuda           none: this PyTorch {why}")
    print("\nneurons' time loop")
    for device in ("cpu", "cuda"):
        choice = neurons.backend(device)
        absent = "" if device == "cpu" or torch.cuda.is_available() else "no device here; would be "
        print(f"  {device:<14} {absent}{choice.name}: {choice.reason}")
    home = Path.home()
    kernels = Path(neurons.__file__).parent / "__pycache__"
    hub = (
        os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", home / ".cache/huggingface")) / "hub"
    )
    print("\ncaches")
    print(f"  CPU kernels    {os.environ.get('NUMBA_CACHE_DIR') or kernels}")
    print(f"  CUDA kernels   {os.environ.get('CUPY_CACHE_DIR') or home / '.cupy/kernel_cache'}")
    print(f"  torchvision    {torch.hub.get_dir()}")
    print(f"  timm           {hub}")
    print("  event frames   frames in a configuration's root (or its cache)")


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "compare": compare,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "report": report,
    "export": export,
    "info": info,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; errors of this package's checks are printed without a traceback, with exit status 1."""
    args = list(sys.argv[1:] if args is None else args)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        if args[:1] in (["train"], ["compare"]) and len(args) > 1 and not args[1].startswith("-"):
            COMMANDS[args[0]](Path(args[1]), tuple(args[2:]))  # the rest are options of the file's method
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, args=args, prog=PROG, description=ABOUT)
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if not _is_ours(error):
            raise
        sys.exit(f"{PROG}: {error}")
    except KeyboardInterrupt:
        print(f"{PROG}: stopped; run the same command again to resume", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def _remove_markup(*kinds: type) -> None:
    """Make the docstrings that ``--help`` prints plain text."""
    for kind in kinds:
        for one in kind.__mro__[:-1]:
            text = re.sub(r":\w+:`[.~!]*([^`]+)`", r"\1", one.__doc__ or "")
            if one.__module__.startswith(__package__):
                one.__doc__ = text.replace("``", "")


def _is_ours(error: Exception) -> bool:
    """Return whether this package raised the error; other errors need their traceback."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    return Path(__file__).parent in raised_in.parents


if __name__ == "__main__":
    main()
