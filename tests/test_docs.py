"""Documentation: Python blocks run and do what the text says, links lead somewhere, tables are complete."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from lasnn_sj import __main__ as cli
from lasnn_sj import distillation

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^(<!-- not run: .+ -->\n)?```python\n(.*?)^```$", re.M | re.S)
PATH = re.compile(r"`((?:examples|benchmarks|lasnn_sj|tests|docs)/[\w./-]*)`")


def blocks(page):
    """Line number and source of each block that is to be run."""
    text = page.read_text()
    return [
        (text[: found.start(2)].count("\n"), found[2]) for found in BLOCK.finditer(text) if found[1] is None
    ]


def run(page, names):
    for line, source in blocks(page):
        code = compile("\n" * line + source, str(page), "exec")  # an error names the line of the page
        exec(code, names)


WITH_BLOCKS = [page for page in PAGES[1:] if blocks(page)]


@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_the_blocks_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(page, {})


def test_the_readme_s_blocks_run_and_the_first_learns(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    run(ROOT / "README.md", names)
    printed = re.findall(r"^(\w+): ([\d.]+) % of the test images$", capsys.readouterr().out, re.M)
    assert [name for name, _ in printed] == ["converted", "distilled"]
    converted, distilled = (float(top1) for _, top1 in printed)
    assert distilled > 90  # chance is 10
    assert distilled > converted + 5
    again = names["trainer"].evaluate(names["test_loader"])
    assert again["samples"] == 360


def test_there_are_blocks_and_links_and_paths_lead_somewhere():
    assert sum(len(blocks(page)) for page in PAGES) >= 10
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
        for path in PATH.findall(text):
            assert (ROOT / path).exists(), f"{page.name}: {path}"


def commands(program):
    """Arguments of each command line of the pages that begins with ``program``."""
    shells = [
        block for page in PAGES for block in re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.M | re.S)
    ]
    lines = re.findall(rf"^{program} (.+)$", "".join(shells), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def test_command_lines_of_the_pages_are_understood(monkeypatch):
    called = []

    def record(name, command):
        @functools.wraps(command)
        def recorded(*args, **kwargs):
            called.append(name)

        return recorded

    for name, command in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, record(name, command))
    monkeypatch.setattr(cli, "train", cli.COMMANDS["train"])
    lines = commands("lasnn-sj")
    assert len(lines) >= 4
    for line in lines:
        cli.main(line)
        assert called[-1] == line[0]
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    assert commands("make")
    assert {line[0] for line in commands("make")} <= set(targets)


def test_every_page_is_in_the_table_of_contents():
    index = (ROOT / "docs" / "index.md").read_text()
    entries = re.findall(r"^[\w/]+$", index, re.M)
    pages = {str(page.relative_to(ROOT / "docs").with_suffix("")) for page in (ROOT / "docs").rglob("*.md")}
    assert set(entries) == pages - {"index"}


def test_an_objective_of_your_own_takes_less_than_25_lines_and_trains():
    (source,) = (text for _, text in blocks(ROOT / "docs" / "methods.md") if "class QuietLayer" in text)
    assert len([line for line in source.splitlines() if line.strip()]) < 25
    names = {}
    exec(source, names)
    torch.manual_seed(0)
    student, trainer = names["student"], names["trainer"]
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.1
        if hasattr(module, "p"):
            module.p = 0.0  # of dropout, which is not part of a firing rate
    images, labels = 2 * torch.rand(4, 3, 32, 32) - 1, torch.arange(4)
    rates, layer = [], student.get_submodule("features.2.neuron")
    trainer.prepare(images, labels)
    hook = layer.register_forward_hook(lambda module, args, spikes: rates.append(spikes.mean().item()))
    before = student.features[0].weights.weight.detach().clone()
    part = trainer.train_step(images, labels).parts["quiet"].item()
    hook.remove()
    assert rates[0] > 0
    assert part == pytest.approx((rates[0] - 0.05) ** 2, rel=1e-4)
    assert not torch.equal(student.features[0].weights.weight, before)


def test_every_objective_has_a_row_in_the_methods_table():
    rows = re.findall(r"^\| `(\w+)`", (ROOT / "docs" / "methods.md").read_text(), re.M)
    objectives = {
        name
        for name in distillation.__all__
        if inspect.isclass(kind := getattr(distillation, name)) and issubclass(kind, distillation.Objective)
    }
    assert {"CrossEntropy", "LabelKD", "SparseKD", "DefaultKD"} <= objectives
    assert objectives - {"Objective", "Sum"} <= set(rows)


def test_project_files_are_valid():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert len(citation["references"]) == 2
    assert all(paper["title"] and paper["authors"] for paper in citation["references"])
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    pinned = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(), re.M)[1]
    assert hooks["repos"][0]["rev"] == f"v{pinned}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["ci"]["steps"]
