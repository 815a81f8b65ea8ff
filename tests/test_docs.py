"""Documentation: Python blocks run and do what the text says, links lead somewhere, tables are complete."""

import functools
import inspect
import json
import logging
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from spikingjelly.activation_based import neuron

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


def lasnn(names, printed):
    assert names["curve"][-1] > names["curve"][4] + 30  # a converted SNN needs many time steps
    assert f"after 5 steps {names['curve'][4]:.1f} %, after 60 steps {names['curve'][-1]:.1f} %" in printed
    nodes = dict(names["student"].named_modules())
    assert len(names["thresholds"]) == 4
    for name, threshold in names["thresholds"].items():  # balanced again, by the same factor in each layer
        assert nodes[name].v_threshold == pytest.approx(0.4 * threshold, rel=0.25)
    trainer = names["trainer"]
    assert str(trainer.pairs) in printed
    assert 1 <= len(trainer.pairs) <= 3
    assert [row["attention_alpha"] for row in trainer.history] == pytest.approx([0.9, 0.45, 0.0])
    assert trainer.evaluate(names["test_loader"])["top1"] > 80
    there = {path.name for path in Path("runs/tutorial").iterdir()}
    assert {"checkpoints", "metrics.csv", "tensorboard", "weights.safetensors"} <= there
    train, held = names["digits"].split(100).loaders(100)
    assert sum(len(labels) for _, labels in held) == 100
    assert sum(len(labels) for _, labels in train) == 1437 - 100


def reverse(names, printed):
    assert min(names["alone"], names["sparse"], names["default"]) > 80
    assert (
        "alone {alone:.1f} %, sparse-KD {sparse:.1f} %, default-KD {default:.1f} %".format(**names) in printed
    )
    weights = [names["teacher"][place].weight for place in (0, 4)]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.3 * sum(w.numel() for w in weights))
    one, other = names["fresh"]().state_dict(), names["fresh"]().state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)


def long_runs(names, printed):
    trainer, tops = names["trainer"], [row["val_top1"] for row in names["trainer"].history]
    best = tops.index(max(tops))
    assert f"epoch {best + 1} of {len(tops)}: {max(tops):.1f} %" in printed
    assert len(tops) in (10, best + 3)  # to the end, or two validations without a new best
    assert trainer.evaluate(names["val_loader"])["top1"] == pytest.approx(max(tops))  # its weights are loaded
    assert max(tops) > 60


def methods(names, printed):
    assert repr(names["objective"]) == "LabelKD() + Attention(kind='gradient')"
    found = names["trainer"].train_step(2 * torch.rand(4, 3, 32, 32) - 1, torch.arange(4))
    assert set(found.parts) == {"ce", "quiet"}


def models(names, printed):
    assert "spiking_resnet19" in printed.splitlines()[0]
    assert printed.splitlines()[1] == "{'top1': 10.0}"
    there = {path.name for path in Path("students/resnet19").iterdir()}
    assert there == {"model.safetensors", "config.json", "README.md"}
    assert names["encoder"].T == 4


def hot_path(names, printed):
    assert "ParametricLIFNode" in printed
    assert type(names["net"][1]).__module__.startswith("lasnn_sj.neurons")
    assert type(names["net"][4]) is neuron.ParametricLIFNode


def analysis(names, printed):
    assert Path("curves.png").read_bytes().startswith(b"\x89PNG")


# What the text around the blocks of a page claims.
CLAIMS = {claim.__name__: claim for claim in (lasnn, reverse, long_runs, methods, models, hot_path, analysis)}


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if blocks(page)], ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run_and_its_claims_hold(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    run(page, names)
    CLAIMS[page.stem](names, capsys.readouterr().out)


def test_the_readme_s_blocks_run_and_the_first_learns(tmp_path, monkeypatch, capsys, caplog):
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
    assert repr(names["objective"]).startswith("SparseKD(")
    images, labels = next(iter(names["train_loader"]))
    assert set(names["trainer"].train_step(images, labels).parts) == {"ce", "kd"}

    for epochs in (1, 2):  # with run_dir, and the same call again
        adam = torch.optim.Adam(names["student"].parameters(), lr=2e-3)
        trainer = names["LaSNNTrainer"](
            names["student"], names["teacher"], encoder=names["DirectEncoder"](T=4), optimizer=adam,
            run_dir="runs/first",
        )  # fmt: skip
        with caplog.at_level(logging.INFO, "lasnn_sj"):
            assert len(trainer.fit(names["train_loader"], epochs=epochs)) == epochs
    assert "continuing after epoch 1, step 45" in caplog.text  # 1437 images in batches of 32
    there = {path.name for path in Path("runs/first").iterdir()}
    assert {"checkpoints", "weights.safetensors", "metrics.csv", "tensorboard"} <= there


def test_the_readme_s_commands_run_and_what_they_write_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = re.search(r"^```sh\n(lasnn-sj train .*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    lines = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [line[0] for line in lines] == ["train", "report", "evaluate", "info"]
    said = []
    for line in lines:
        cli.main(line)
        said.append(capsys.readouterr().out)
    assert re.search(r"LaSNN, T = 4 +\| \d\d\.\d\d", said[0])
    assert Path("runs/lasnn_digits/report.html").stat().st_size > 100_000
    result = json.loads(Path("runs/lasnn_digits/seed0/lasnn/result.json").read_text())
    assert result["top1"] > 80
    assert said[2].splitlines()[-1].split()[:3] == ["0", "lasnn", f"{result['top1']:.2f}"]
    assert re.search(r"cpu +numba: ", said[3])


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
