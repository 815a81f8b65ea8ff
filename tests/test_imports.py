"""Who may import whom inside the package, read from the source."""

import ast
from pathlib import Path

import pytest

import lasnn_sj

ROOT = Path(lasnn_sj.__file__).parent
# A module imports only from levels below its own; a new one has to be given its place here.
LEVELS = [
    {"neurons", "archives"},
    {
        "encoding",
        "attention",
        "objectives",
        "taps",
        "models",
        "data",
        "checkpoint",
        "config",
        "pruning",
        "distributed",
        "events",
        "cost",
    },
    {"conversion", "export"},
    {"calibration"},
    {"batches", "callbacks", "interrupts"},
    {"evaluation"},
    {"forward", "metrics", "nonfinite", "run_folder"},
    {"distillation", "precision", "progress"},
    {"step"},
    {"activity", "energy"},
    {"inspection"},
    {"trainer", "report"},
    {"pipeline", "reverse"},
    {"experiments", "runs"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted(ROOT.rglob("*.py"))}


def imported(source: str, parts: tuple[str, ...]) -> set[str]:
    """Full names that a module at ``parts`` imports, functions included."""
    package, names = ["lasnn_sj", *parts[:-1]], set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


IMPORTS = {parts: imported(path.read_text(), parts) for parts, path in FILES.items()}


def rooms(parts: tuple[str, ...]) -> set[str]:
    """Top-level modules of the package that a file imports, its own room aside."""
    inside = {name.split(".")[1] for name in IMPORTS[parts] if name.startswith("lasnn_sj.")}
    return inside - {parts[0]}


def users_of(prefix: str) -> set[str]:
    uses = {
        ".".join(parts) for parts, names in IMPORTS.items()
        if any(name == prefix or name.startswith(prefix + ".") for name in names)
    }  # fmt: skip
    return uses


def test_the_reader_of_imports_sees_every_form():
    source = """
import torch.nn, tonic
from ..trainer import LaSNNTrainer
def f():
    from . import cuda
    from lasnn_sj.pipeline import Recipe
"""
    assert imported(source, ("neurons", "op")) == {
        "torch.nn", "tonic", "lasnn_sj.trainer.LaSNNTrainer", "lasnn_sj.neurons.cuda",
        "lasnn_sj.pipeline.Recipe",
    }  # fmt: skip


@pytest.mark.parametrize("parts", FILES, ids=".".join)
def test_imports_point_down(parts):
    if parts == ("__init__",):
        assert not rooms(parts) & {"pipeline", "reverse", "experiments", "__main__"}
        return
    assert parts[0] in LEVEL, f"give {parts[0]} a place in LEVELS"
    for room in rooms(parts):
        assert LEVEL.get(room, -1) < LEVEL[parts[0]], f"{'.'.join(parts)} imports {room}"


@pytest.mark.parametrize("room", ["pipeline", "reverse", "experiments"])
def test_only_the_command_line_imports(room):
    users = {user.split(".")[0] for user in users_of(f"lasnn_sj.{room}")}
    assert users <= {"__main__", "experiments", "runs"}


def test_tonic_is_imported_in_one_module_at_most():
    assert len(users_of("tonic")) <= 1


@pytest.mark.parametrize("forbidden", ["torchaudio", "spikingjelly.datasets"])
def test_what_breaks_a_plain_install_is_not_imported(forbidden):
    assert not users_of(forbidden)


def test_torch_is_seen_by_this_test():
    assert "trainer" in users_of("torch")
