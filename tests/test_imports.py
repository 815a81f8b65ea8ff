"""Direction of imports inside the package, read from the source."""

import ast
from pathlib import Path

import pytest

import lasnn_sj

ROOT = Path(lasnn_sj.__file__).parent
# A package imports only from packages of the levels before its own; a new one has to be given its place here.
LEVELS = [
    {"runtime", "neurons", "data"},
    {"models"},
    {"conversion", "distillation"},
    {"training"},
    {"analysis"},
    {"experiments"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = {path.relative_to(ROOT).with_suffix("").parts: path for path in sorted(ROOT.rglob("*.py"))}
PACKAGES = sorted({parts[0] for parts in FILES if len(parts) > 1})


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


def upward(source: str, parts: tuple[str, ...]) -> list[str]:
    """Packages that a module at ``parts`` imports though they are not below its own."""
    used = {name.split(".")[1] for name in imported(source, parts) if name.startswith("lasnn_sj.")}
    return sorted(room for room in used - {parts[0]} if room in LEVEL and not LEVEL[room] < LEVEL[parts[0]])


def users_of(prefix: str) -> set[str]:
    """Modules of the package that import ``prefix`` or anything in it."""
    return {
        ".".join(parts) for parts, path in FILES.items()
        if any(name == prefix or name.startswith(prefix + ".") for name in imported(path.read_text(), parts))
    }  # fmt: skip


def test_every_form_of_import_is_recognised():
    source = """
import torch.nn, tonic
from ..training import LaSNNTrainer
def f():
    from . import cuda
    from lasnn_sj.experiments import Recipe
"""
    assert imported(source, ("neurons", "op")) == {
        "torch.nn", "tonic", "lasnn_sj.training.LaSNNTrainer", "lasnn_sj.neurons.cuda",
        "lasnn_sj.experiments.Recipe",
    }  # fmt: skip
    assert upward(source, ("neurons", "op")) == ["experiments", "training"]
    assert upward("from ..neurons import op\nfrom ..data import load", ("models", "vgg")) == []
    assert upward("from ..conversion import convert", ("distillation", "taps")) == ["conversion"]


@pytest.mark.parametrize("parts", [parts for parts in FILES if parts != ("__init__",)], ids=".".join)
def test_imports_point_down(parts):
    assert parts[0] in LEVEL, f"give {parts[0]} a place in LEVELS"
    assert upward(FILES[parts].read_text(), parts) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_its_public_names_once(package):
    module = __import__(f"lasnn_sj.{package}", fromlist=["__all__"])
    assert sorted(set(module.__all__)) == sorted(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


@pytest.mark.parametrize("parts", FILES, ids=".".join)
def test_docstrings_say_what_a_thing_is_or_does(parts):
    nodes = ast.walk(ast.parse(FILES[parts].read_text()))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) or "" for node in nodes if isinstance(node, documented)]
    opened = ("What ", "Where ", "How ", "Whether ", "Who ")
    assert [text.partition("\n")[0] for text in found if text.startswith(opened)] == []


def test_tonic_is_imported_in_one_module_at_most():
    assert len(users_of("tonic")) <= 1


@pytest.mark.parametrize("forbidden", ["torchaudio", "spikingjelly.datasets"])
def test_imports_that_break_a_plain_install_are_absent(forbidden):
    assert not users_of(forbidden)


def test_users_are_found():
    assert "training.trainer" in users_of("torch")
