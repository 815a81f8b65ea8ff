"""The command line, the configurations in the package, and what is refused in them."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from lasnn_sj import DirectEncoder, LaSNNTrainer, PoissonEncoder, data, models
from lasnn_sj import __main__ as cli
from lasnn_sj.data.events import Framing
from lasnn_sj.experiments import Cluster, config, reverse, runs
from lasnn_sj.experiments.recipes import Recipe, rathi
from lasnn_sj.neurons import accelerate
from lasnn_sj.training import TrainingOptions, load_weights

CONFIGS = sorted(runs.CONFIGS.glob("*.yaml"))
SIZES = {
    "cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "tiny-imagenet": (200, 3, 64), "digits": (10, 1, 8),
    "dvs-gesture": (11, 2, 128), "n-mnist": (10, 2, 34),
}  # fmt: skip


def lines_of(capsys):
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_parses_and_its_networks_build(path):
    run = runs.read(path)
    classes, channels, size = SIZES[run.source]
    r = run.recipe
    with torch.device("meta"):  # shapes without memory
        student = getattr(models, r.student)(classes, channels, size, r.width)
        if isinstance(run, runs.LaSNN):
            build = getattr(models, f"teacher_{r.teacher}")
            build(classes, channels)
            assert next(student.parameters()).shape[1] == channels
    assert run.run_dir == Path("runs") / path.stem  # no two share a folder
    again = config.build(type(run), config.plain(run), "again")
    assert again == run


def test_there_is_a_configuration_for_every_network_and_method():
    found = [runs.read(path) for path in CONFIGS if not path.stem.startswith(("smoke", "compare"))]
    lasnn = {
        (run.recipe.student, run.recipe.encoding, run.recipe.attention)
        for run in found
        if isinstance(run, runs.LaSNN)
    }
    for student in ("vgg5", "vgg9", "resnet12"):
        for encoding in ("poisson", "direct"):
            for attention in ("activation", "gradient"):
                assert (student, encoding, attention) in lasnn
    assert {student for student, _, _ in lasnn} == set(runs.LASNN_STUDENTS)
    reverse = {(run.method, run.recipe.student) for run in found if run.method != "lasnn"}
    assert reverse == {
        ("reverse", "spiking_resnet18"), ("reverse", "spiking_wrn16_4"), ("reverse", "spiking_vgg16"),
        ("reverse-events", "spiking_resnet18"), ("reverse-events", "spiking_wrn16_4"),
    }  # fmt: skip


def test_the_papers_settings_are_in_the_configurations():
    folder = CONFIGS[0].parent
    lasnn = runs.read(folder / "lasnn_cifar10_vgg9_poisson_activation.yaml").recipe
    assert (lasnn.T, lasnn.alpha, lasnn.epochs, lasnn.batch, lasnn.lr) == (100, 0.9, 100, 16, 1e-4)
    assert [
        runs.read(folder / f"lasnn_cifar10_{net}_direct_activation.yaml").recipe.T
        for net in ("vgg5", "vgg9", "resnet12")
    ] == [30, 50, 50]
    events = runs.read(folder / "reverse_dvs_gesture_wrn16_4.yaml")
    assert (events.framing, events.recipe.lr, events.recipe.batch) == (Framing(T=16), 1e-3, 16)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Run folders of the smoke configurations, trained through the command line."""
    folders = {}
    for name in ("smoke_digits", "smoke_reverse_digits"):
        folder = tmp_path_factory.mktemp(name) / "run"
        path = CONFIGS[0].parent / f"{name}.yaml"
        cli.main(["train", str(path), "--run-dir", str(folder), "--seeds", "3"])
        folders[name] = folder
    return folders


def test_train_leaves_table_and_configuration(trained, capsys):
    folder = trained["smoke_digits"]
    table = (folder / "table.md").read_text()
    result = json.loads((folder / "seed3" / "lasnn" / "result.json").read_text())
    assert f"| LaSNN, T = 4             | {result['top1']:.2f}" in table
    run, seeds = runs.open_folder(folder)
    assert seeds == [3]
    for name in ("seed\u00b2", "seed\u0663", "seeds", "seed-1"):  # no seeds, and one is no number at all
        (folder / name).mkdir()
    assert runs.open_folder(folder)[1] == [3]
    assert (run.seeds, run.run_dir, run.recipe.T) == ((3,), folder, 4)
    # again: every stage is there, nothing is trained
    cli.main(["train", str(folder / "config.yaml")])
    assert table.strip() in capsys.readouterr().out


def test_evaluate_repeats_the_training_s_result(trained, capsys):
    for name, rows in (("smoke_digits", ["lasnn", "hybrid"]), ("smoke_reverse_digits", [])):
        folder = trained[name]
        cli.main(["evaluate", str(folder), *rows])
        lines = lines_of(capsys)[1:]
        done = rows or ["alone", "sparse 0.3", "default"]
        assert [line[6:27].strip() for line in lines] == done
        for row, line in zip(done, lines):
            result = json.loads((folder / "seed3" / row.replace(" ", "_") / "result.json").read_text())
            assert line.split()[-3:] == [
                f"{result['top1']:.2f}",
                f"{result['loss']:.4f}",
                str(result["samples"]),
            ]


def test_a_run_s_own_rows_are_those_that_keep_a_network():
    run = runs.LaSNN(recipe=Recipe(), stages=("lasnn", "label_kd", "calibrated"))
    assert run.students == ["label_kd"]


def test_export_writes_what_hard_reset_trained(trained, capsys, tmp_path):
    nir = pytest.importorskip("nir")
    cli.main(["export", str(trained["smoke_reverse_digits"]), str(tmp_path / "s.nir"), "--row", "alone"])
    assert "alone of seed 3, input [1, 8, 8] at each step" in capsys.readouterr().out
    assert sum(isinstance(n, nir.IF) for n in nir.read(tmp_path / "s.nir").nodes.values()) == 17
    with pytest.raises(SystemExit, match="features.0.neuron, .*: LIFNode resets by subtracting"):
        cli.main(["export", str(trained["smoke_digits"]), str(tmp_path / "soft.nir")])
    assert not (tmp_path / "soft.nir").exists()


def test_what_a_run_folder_lacks_is_named(trained, tmp_path):
    folder = str(trained["smoke_reverse_digits"])
    with pytest.raises(
        SystemExit, match=r"no finished 'sparse 0.5' of seed 3; finished are alone, default, sparse 0.3"
    ):
        cli.main(["evaluate", folder, "sparse 0.5"])
    with pytest.raises(
        SystemExit, match=r"keeps no network of 'calibrated' of seed 3; finished are .*start$"
    ):
        cli.main(["evaluate", str(trained["smoke_digits"]), "calibrated"])
    with pytest.raises(SystemExit, match="has no finished student: no config.yaml"):
        cli.main(["evaluate", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds a run with other settings .*epochs: there 1, here 2"):
        cli.main(["train", f"{folder}/config.yaml", "--recipe.epochs", "2"])
    assert runs.open_folder(folder)[0].recipe.epochs == 1  # the refused run has not taken the folder over


@pytest.mark.parametrize(("text", "message"), [
    ("method: lasnn\nrecipe: {epoch: 3}", r"unknown key recipe\.epoch; did you mean recipe\.epochs\?"),
    ("method: lasnn\nepochs: 3\nrecipe: {}", r"unknown key epochs; did you mean recipe\.epochs\?"),
    ("method: lasnn\nrun_dirr: x\nrecipe: {}", r"unknown key run_dirr; did you mean run_dir\?"),
    ("method: lasnn\nqqq: 3\nrecipe: {}", r"unknown key qqq; known are seeds, run_dir, validation_images"),
    ("method: lasn\nrecipe: {}", r"unknown method 'lasn'; did you mean lasnn\?"),
    ("recipe: {}", "no method; known are lasnn, reverse, reverse-events"),
    ("method: lasnn", "recipe must be given"),
    ("method: lasnn\nrecipe: 3", "recipe must hold keys and values of its own, got 3"),
    ("method: lasnn\nrecipe: {T: ten}", r"recipe\.T must be a whole number, got 'ten'"),
    ("method: lasnn\nrecipe: {T: 10.5}", r"recipe\.T must be a whole number, got 10\.5"),
    ("method: lasnn\nrecipe: {T: true}", r"recipe\.T must be a whole number, got True"),
    ("method: lasnn\nrecipe: {lr: fast}", r"recipe\.lr must be a number, got 'fast'"),
    ("method: lasnn\nrecipe: {attention: gradeint}",
     r"recipe\.attention must be 'activation' or 'gradient', got 'gradeint'; did you mean gradient\?"),
    ("method: lasnn\nrecipe: {threshold_statistic: mx}", r"be 'max' or a number, got 'mx'; .* max\?"),
    ("method: lasnn\nrecipe: {student: vgg55}", r"student: unknown name 'vgg55'; did you mean vgg5\?"),
    ("method: lasnn\nstages: [lasnn, spike_kd]\nrecipe: {}", "stages: unknown name 'spike_kd'"),
    ("method: lasnn\nstages: [teachr]\nrecipe: {}", r"stages: unknown name 'teachr'; did you mean teacher\?"),
    ("method: lasnn\ntrain_images: many\nrecipe: {}", "train_images must be a whole number or null"),
    ("method: lasnn\nseeds: 3\nrecipe: {}", r"seeds must be a list, as \[3\], got 3"),
    ("method: lasnn\nseeds: []\nrecipe: {}", "seeds must hold at least one number"),
    ("method: lasnn\nseeds: [a]\nrecipe: {}", r"seeds\[0\] must be a whole number, got 'a'"),
    ("method: lasnn\nrecipe: {seed: 3}", r"recipe\.seed is set from seeds; give seeds: \[3\]"),
    ("method: lasnn\nseeds: [0, -1]\nrecipe: {}", "seeds must be at least 0, got -1"),
    ("method: lasnn\nrecipe: {T: 0}", r"recipe\.T must be at least 1, got 0"),
    ("method: lasnn\nrecipe: {epochs: 0}", r"recipe\.epochs must be at least 1, got 0"),
    ("method: lasnn\nrecipe: {batch: 0}", r"recipe\.batch must be at least 1, got 0"),
    ("method: lasnn\nrecipe: {lr: .nan}", r"recipe\.lr must be above 0, got nan"),
    ("method: lasnn\nrecipe: {width: 0}", r"recipe\.width must be above 0, got 0\.0"),
    ("method: lasnn\nrecipe: {dropout: 1}", r"recipe\.dropout must lie in \[0, 1\), got 1\.0"),
    ("method: lasnn\nrecipe: {threshold_statistic: 200}", r"threshold_statistic must be \"max\" or lie in"),
    ("method: lasnn\nteacher_checkpoint: nothing.th\nsource: digits\nrun_dir: RUN\nrecipe: {}",
     r"teacher_checkpoint: nothing\.th does not exist"),
    ("method: lasnn\ndevice: gpu\nrecipe: {}", "device must be such as cpu, cuda or cuda:1, got 'gpu'"),
    ("method: reverse\nshrink: 0\nrecipe: {}", "shrink must be at least 1, got 0"),
    ("method: reverse\nclasses: 0\nrecipe: {}", "classes must be at least 1, got 0"),
    ("method: reverse\nrecipe: {alpha: 2}", r"recipe\.alpha must lie in \[0, 1\], got 2\.0"),
    ("method: reverse\nrecipe: {ratios: [0.5, 1]}", r"recipe\.ratios must lie in \[0, 1\), got 1\.0"),
    ("method: reverse-events\nframing: {T: 0}\nrecipe: {}", r"framing\.T must be a whole .* got 0"),
    ("method: reverse-events\naugment: maybe\nrecipe: {}", "augment must be true or false, got 'maybe'"),
    ("- a\n- b", "must hold keys and values, got list"),
    ("a: [", "is not valid YAML"),
    ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", r"aliases \(.name\) are not allowed"),
    ("a: 2024-13-45", "is not valid YAML"),
    ("a: " + "9" * 5000, "is not valid YAML"),
    ("a: 0b_", "is not valid YAML"),
    ("? [a, b]\n: 1", "is not valid YAML|unknown key|no method"),
    ("[" * 10000, "is not valid YAML"),
    ("method: lasnn\nrecipe:\n  epochs: 3\n  T: 4\n  epochs: 5", "duplicate key epochs"),
    ("a: !!python/object/apply:os.system ['true']", "is not valid YAML"),
])  # fmt: skip
def test_a_wrong_key_or_value_is_named(text, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(text.replace("RUN", str(tmp_path)))
    with pytest.raises(SystemExit, match=message) as stopped:
        cli.main(["train", str(path)])
    assert "c.yaml" in str(stopped.value) or message.startswith(("device", "teacher_checkpoint"))


def test_wrong_overrides_are_named(capsys, monkeypatch):
    monkeypatch.setattr(runs.LaSNN, "run", lambda self: pytest.fail("was run"))
    path = str(CONFIGS[0].parent / "smoke_digits.yaml")
    for override, message in (
        (["--recipe.epoch", "3"], "--recipe.epochs"),
        (["--recipe.epochs", "many"], "many"),
        (["--recipe.student", "vgg55"], "vgg5"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.main(["train", path, *override])
        assert message in capsys.readouterr().err + str(stopped.value)
    with pytest.raises(SystemExit, match=r"smoke_digit\.yaml does not exist; did you mean smoke_digits"):
        cli.main(["train", path.replace("digits", "digit")])


def test_overrides_take_the_file_s_place(monkeypatch):
    seen = []
    monkeypatch.setattr(runs.LaSNN, "run", lambda self: seen.append(self))
    path = CONFIGS[0].parent / "lasnn_cifar10_vgg5_direct_gradient.yaml"
    cli.main(
        ["train", str(path), "--recipe.T", "7", "--device", "cpu", "--recipe.threshold-statistic", "99.9"]
    )
    (run,) = seen
    there = runs.read(path)
    recipe = dataclasses.replace(there.recipe, T=7, threshold_statistic=99.9)
    assert run == dataclasses.replace(there, recipe=recipe, device="cpu")


def test_a_device_that_is_not_there(trained, tmp_path, monkeypatch, capsys):
    """A run of a machine with a GPU: evaluated where it is asked for, exported anywhere."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = shutil.copytree(trained["smoke_reverse_digits"], tmp_path / "from_elsewhere")
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("device: cpu", "device: cuda"))
    with pytest.raises(SystemExit, match="device is cuda, but PyTorch sees no CUDA device; give device cpu"):
        cli.main(["evaluate", str(folder)])
    cli.main(["evaluate", str(folder), "--device", "cpu"])
    assert [line[6:16].strip() for line in lines_of(capsys)[-3:]] == ["alone", "sparse 0.3", "default"]
    cli.main(["export", str(folder), str(tmp_path / "s.nir")])
    path = str(CONFIGS[0].parent / "smoke_digits.yaml")
    with pytest.raises(SystemExit, match="device is cuda, but PyTorch sees no CUDA device; give device cpu"):
        cli.main(["train", path, "--device", "cuda", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_foreign_errors_keep_their_traceback(monkeypatch):
    monkeypatch.setattr(runs, "read", lambda path: int("x"))
    with pytest.raises(ValueError, match="invalid literal"):
        cli.main(["train", "c.yaml"])


def test_an_interrupted_run_says_how_it_goes_on(monkeypatch, capsys):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "read", interrupted)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "c.yaml"])
    assert stopped.value.code == 130
    assert "run the same command again to resume" in capsys.readouterr().err


def test_reproduce_and_report_hand_over_their_arguments(monkeypatch, capsys):
    seen = []

    def reproduce(*args):
        seen.append(args)
        return "the table"

    def report(*args):
        seen.append(args)
        return Path("report.html")

    monkeypatch.setattr("lasnn_sj.experiments.reproduce", reproduce)
    monkeypatch.setattr("lasnn_sj.analysis.report.report", report)
    cli.main(["reproduce", "IV", "--rows", "vgg5", "vgg9", "--scale", "smoke", "--seeds", "2", "--launcher",
              "slurm", "--partition", "long", "--gpus", "4", "--minutes", "90", "--status"])  # fmt: skip
    cli.main(["report", "a", "b", "--out", "c.html"])
    here = Path("data"), Path("runs/reproduce"), None, None, None, Cluster("slurm", "long", 4, 90, True)
    assert seen == [("IV", ("vgg5", "vgg9"), "smoke", 2, *here), ((Path("a"), Path("b")), Path("c.html"))]
    assert lines_of(capsys) == ["the table", "report.html"]


def test_info_works_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cli.main(["info"])
    text = capsys.readouterr().out
    assert f"  torch          {torch.__version__.split('+')[0]}" in text
    assert "  cpu            numba: the fastest for this device" in text
    assert "  cuda           none: this PyTorch" in text
    assert "  cuda           no device here; would be " in text


@pytest.mark.parametrize("args", [["--help"], ["train", "--help"], ["reproduce", "--help"]])
def test_help_needs_no_torch(args):
    code = f"import sys; sys.argv = ['lasnn-sj', *{args}]\n" + (
        "from lasnn_sj.__main__ import main\n"
        "try: main()\n"
        "except SystemExit as stopped: print(stopped.code, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "0 False"
    assert "Train" in result.stdout


def test_help_of_a_configuration_says_units_and_values(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", str(CONFIGS[0].parent / "reverse_dvs_gesture_resnet18.yaml"), "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--recipe.epochs INT of every training. (default: 200)" in text
    assert "--framing.denoise-us {None}|FLOAT drop an event" in text
    assert "microseconds" in text


@pytest.mark.parametrize("kind", [*runs.methods().values(), Recipe, reverse.ReverseRecipe, Framing])
def test_every_option_has_words_of_its_own(kind):
    """Text that ``--help`` prints: tyro finds a field's words by its name alone."""
    text = "".join(base.__doc__ or "" for base in kind.__mro__)
    without = [
        field.name
        for field in dataclasses.fields(kind)
        if not re.search(rf"^ +{field.name}: \S", text, re.MULTILINE)
    ]
    assert without == []


@dataclasses.dataclass(frozen=True)
class Inner:
    """For :func:`config.build`.

    Attributes:
        sizes: of things.
    """

    sizes: tuple[float, ...] = ()


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    kind: Literal["a", 1] = "a"
    path: Path | None = None
    flag: bool = False


def test_build_by_hand():
    built = config.build(Outer, {"inner": {"sizes": [1, "2e-3", 0.5]}, "kind": 1, "path": "x/y"}, "f")
    assert built == Outer(Inner((1.0, 0.002, 0.5)), 1, Path("x/y"))
    assert [type(size) for size in built.inner.sizes] == [float] * 3
    assert config.plain(built) == {
        "inner": {"sizes": [1.0, 0.002, 0.5]}, "kind": 1, "path": "x/y", "flag": False
    }  # fmt: skip
    for kind in (True, "1"):  # a Literal's number is neither a truth value nor text
        with pytest.raises(config.ConfigError, match="f: kind must be 'a' or 1"):
            config.build(Outer, {"inner": {}, "kind": kind}, "f")


def test_a_written_recipe_is_read_as_it_was(tmp_path):
    run = runs.LaSNN(recipe=Recipe(lr=1e-4, weight_decay=5e-4, threshold_statistic=99.9), seeds=(1, 2))
    config.write(tmp_path / "c.yaml", {"method": "lasnn"} | config.plain(run))
    assert runs.read(tmp_path / "c.yaml") == run


def test_every_folder_that_is_written_can_be_evaluated(trained, tmp_path, capsys):
    """A pipeline, several of them, one seed, a student by itself; of a trainer alone what is not known."""
    folder = trained["smoke_digits"]
    wanted = f"{json.loads((folder / 'seed3/lasnn/result.json').read_text())['top1']:.2f}"

    def evaluated(path, *more):
        cli.main(["evaluate", str(path), *more])
        return [line.split() for line in lines_of(capsys)[1:]]

    assert evaluated(folder / "seed3") == [["3", "lasnn", *evaluated(folder)[0][2:]]]
    several = tmp_path / "reproduced"
    shutil.copytree(folder / "seed3", several / "runs" / "a")
    shutil.copytree(folder / "seed3", several / "runs" / "b")
    alone = evaluated(several / "runs" / "a")
    assert [line[:2] for line in alone] == [["3", row] for row in ("converted", "start", "hybrid", "lasnn")]
    assert alone[-1][2] == wanted
    found = evaluated(several, "lasnn")
    assert [line[2] for line in found] == [wanted, wanted]
    assert [line[-1] for line in found] == [str(several / "runs" / name / "lasnn") for name in "ab"]
    reverse = trained["smoke_reverse_digits"]
    shutil.copytree(reverse / "seed3", tmp_path / "reverse")
    again = evaluated(tmp_path / "reverse", "default")
    assert again == [line for line in evaluated(reverse) if line[1] == "default"]
    nir = tmp_path / "s.nir"
    cli.main(["export", str(tmp_path / "reverse"), str(nir), "--row", "alone"])
    assert "alone of seed 3, input [1, 8, 8]" in capsys.readouterr().out

    run = runs.open_folder(folder)[0]
    models.save_pretrained(models.vgg5(10, 1, 8, 0.1), run._encoder(3), tmp_path / "pretrained")
    with pytest.raises(SystemExit, match="does not name its training data; give --source"):
        cli.main(["evaluate", str(tmp_path / "pretrained")])
    assert evaluated(tmp_path / "pretrained", "--source", "digits")[0][-1] == "360"
    shutil.copy(folder / "seed3" / "lasnn" / "settings.json", tmp_path / "settings.json")
    for path in ("reproduced", "reverse", "pretrained"):
        shutil.rmtree(tmp_path / path)
    with pytest.raises(SystemExit, match="has no weights.safetensors: its training is not finished"):
        cli.main(["evaluate", str(tmp_path)])


@pytest.mark.parametrize("kind", ["vgg", "poisson", "resnet", "accelerated", "ann"])
def test_a_trainer_s_folder_can_be_evaluated_and_exported(kind, tmp_path, capsys):
    digits = data.load("digits").subset(train=100).split(20)
    train, held = digits.loaders(20)
    resnet = kind in ("resnet", "accelerated")
    net = models.spiking_resnet18(10, 1, 8, 0.05) if resnet else models.vgg5(10, 1, 8, 0.1, kind != "ann")
    encoder = None if kind == "ann" else PoissonEncoder(2) if kind == "poisson" else DirectEncoder(2)
    options = TrainingOptions(keep_best=kind == "resnet")
    net = accelerate(net) if kind == "accelerated" else net
    trainer = LaSNNTrainer(net, encoder=encoder, run_dir=tmp_path, seed=3, options=options)
    trainer.fit(train, held, epochs=2)
    cli.main(["evaluate", str(tmp_path), "--source", "digits"])
    printed = [line.split() for line in lines_of(capsys)[1:]]
    assert [line[:2] + line[4:] for line in printed] == [
        ["3", row, "360"] for row in (["last", "best"] if kind == "resnet" else ["last"])
    ]
    if kind != "poisson":  # whose spikes are drawn anew
        again = trainer.evaluate(digits.test_loader(100))
        assert printed[0][2:4] == [f"{again['top1']:.2f}", f"{again['loss']:.4f}"]
    if kind == "resnet":
        load_weights(tmp_path / "best.safetensors", net)
        assert printed[1][2] == f"{trainer.evaluate(digits.test_loader(100))['top1']:.2f}"
        cli.main(["export", str(tmp_path), str(tmp_path / "s.nir"), "--row", "last"])
        assert "last of seed 3, input [1, 8, 8]" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="does not name its training data; give --source"):
        cli.main(["evaluate", str(tmp_path)])
    with pytest.raises(SystemExit, match="has no first; it has last"):
        cli.main(["evaluate", str(tmp_path), "first"])


def test_a_trainer_s_folder_of_another_network_says_how_to_load_it(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    LaSNNTrainer(net, run_dir=tmp_path).fit(data.load("digits").subset(train=20).loaders(20)[0], epochs=1)
    with pytest.raises(
        SystemExit, match=r"Sequential, which no function of lasnn_sj.models built; .*load_we"
    ):
        cli.main(["evaluate", str(tmp_path), "--source", "digits"])


def test_help_has_no_markup(capsys):
    for name in ("smoke_digits", "reverse_dvs_gesture_resnet18", "compare_digits"):
        for args in (["train", name, "--help"], ["train", "--help"], ["evaluate", "--help"]):
            with pytest.raises(SystemExit):
                cli.main(args)
            assert "`" not in capsys.readouterr().out


def test_configurations_of_the_package_are_found_by_name(monkeypatch):
    monkeypatch.setattr(runs.LaSNN, "run", lambda self: seen.append(self))
    seen = []
    cli.main(["train", "smoke_digits", "--recipe.T", "7"])
    assert (seen[0].source, seen[0].recipe.T) == ("digits", 7)
    with pytest.raises(SystemExit, match=r"smoke_digit does not exist; did you mean smoke_digits"):
        cli.main(["train", "smoke_digit"])


def test_the_configuration_of_rathi_et_al_is_the_preset():
    plain = runs.read("lasnn_cifar10_vgg5_poisson_activation").recipe
    assert runs.read("lasnn_cifar10_vgg5_rathi").recipe == rathi(plain)
