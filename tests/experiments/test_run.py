"""Running a table: shared parts once, resumed, in several processes, and what is written of it."""

import csv
import json

import pytest
import torch

from lasnn_sj import models
from lasnn_sj.data import images
from lasnn_sj.experiments import ExperimentError, reproduce, scales
from lasnn_sj.experiments.pipeline import Pipeline
from lasnn_sj.experiments.reverse import ReversePipeline
from lasnn_sj.experiments.run import TableRunner, choose

NAMES = ("vgg5/lasnn/activation", "vgg5/ann", "vgg5/converted")


def run(folder, names=NAMES, table="II", seeds=2, **options):
    return reproduce(table, names, "smoke", seeds, run_dir=folder, device="cpu", **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reproduce")
    return folder, run(folder)


def test_the_table_says_what_was_printed_what_was_run_and_what_was_reduced(finished):
    folder, text = finished
    assert text == (folder / "smoke" / "table_II.md").read_text()
    assert "**Reduced: these are not the paper's settings" in text
    (line,) = [line for line in text.splitlines() if "vgg5/lasnn" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[0] == "cifar10/vgg5/lasnn/activation/vgg16/poisson-T100"
    assert (cells[1], cells[3], cells[5]) == ("86.68", "2", "4")
    reduced = "256 digits, width 0.1, T 4 of 100, 1 of 100 epochs, teacher resnet20 for vgg16"
    assert cells[-2] == reduced
    with open(folder / "smoke" / "table_II.csv") as file:
        lines = [line for line in csv.DictReader(file) if "lasnn" in line["row"]]
    top1 = [float(line["top1"]) for line in lines]
    mean, deviation = sum(top1) / 2, abs(top1[0] - top1[1]) / 2**0.5
    assert cells[2] == f"{mean:.2f} ± {deviation:.2f}"
    assert cells[4] == f"{mean - 86.68:+.2f}"
    for line in lines:
        assert line["reduced"] == reduced
        assert 300 < float(line["peak_memory_mib"]) < 20000
        assert float(line["seconds_per_epoch"]) > 0


def test_curves_and_spikes_are_written(finished):
    folder, _ = finished
    stem = folder / "smoke" / "table_II"
    with open(f"{stem}_curves.csv") as file:
        curve = [line for line in csv.DictReader(file) if "lasnn" in line["row"] and line["seed"] == "1"]
    result = json.loads(next(folder.glob("smoke/runs/*seed1/lasnn/result.json")).read_text())
    assert [float(line["top1"]) for line in curve] == result["top1_over_time"]
    assert [line["t"] for line in curve] == ["1", "2", "3", "4"]
    assert curve[-1]["top1"] == str(result["top1_over_time"][-1])
    with open(f"{stem}_spikes.csv") as file:
        layers = {line["layer"] for line in csv.DictReader(file) if "lasnn" in line["row"]}
    assert layers == result["spikes"].keys() >= {"features.0.neuron"}
    assert (stem.parent / "table_II_curves.png").read_bytes().startswith(b"\x89PNG")


def test_teacher_and_anns_are_shared(finished):
    folder, _ = finished
    assert len(list(folder.glob("smoke/teachers/*"))) == 1
    assert len(list(folder.glob("smoke/anns/*"))) == 2
    assert len(list(folder.glob("smoke/runs/*"))) == 2


def test_what_is_finished_is_not_run_again(finished, monkeypatch):
    folder, text = finished
    for name in ("_train_ann", "_train_snn", "_examine"):
        monkeypatch.delattr(Pipeline, name)
    assert run(folder) == text


def test_a_row_that_failed_does_not_take_the_others_with_it(tmp_path, monkeypatch):
    train = ReversePipeline._train

    def fails(study, folder, objective):
        if "default" in str(folder):
            raise RuntimeError("out of luck")
        return train(study, folder, objective)

    monkeypatch.setattr(ReversePipeline, "_train", fails)
    with pytest.raises(
        ExperimentError, match="1 of 2 rows failed .*default, seed 0: RuntimeError: out of luck"
    ):
        run(tmp_path, ["cifar100/spiking_resnet18"], "2", seeds=1)
    lines = (tmp_path / "smoke" / "table_2.md").read_text().splitlines()
    assert any("/alone" in line and "not run" not in line for line in lines)
    assert any("/default" in line and "not run" in line for line in lines)
    monkeypatch.setattr(ReversePipeline, "_train", train)
    assert "not run" not in run(tmp_path, ["cifar100/spiking_resnet18"], "2", seeds=1)


def test_spike_kd_brings_its_teacher(tmp_path):
    text = run(tmp_path, ["conv3_linear2/spike_kd"], "III", seeds=1)
    assert "not run" not in text
    assert list(tmp_path.glob("smoke/runs/cifar10-vgg5-*/hybrid/result.json"))


def test_two_processes_give_what_one_gives(finished, tmp_path):
    text = run(tmp_path, processes=2)
    folder, one = finished

    def accuracies(text):
        return [line.split("|")[3] for line in text.splitlines() if line.startswith("| cifar10")]

    # float order differs with the number of threads; the tests' processes have one each
    assert torch.get_num_threads() == 1
    assert accuracies(text) == accuracies(one)


def test_what_does_not_exist_is_listed(tmp_path):
    with pytest.raises(ExperimentError, match="unknown table 'V'; known are I, II, III, IV, Fig3"):
        reproduce("V", run_dir=tmp_path)
    with pytest.raises(ExperimentError, match="unknown scale 'tiny'; known are full, small, smoke"):
        reproduce("I", scale="tiny", run_dir=tmp_path)
    with pytest.raises(ExperimentError, match=r"table I has no row 'vgg6'; it has\n  cifar10/2Conv2Linear"):
        reproduce("I", ["vgg6"], run_dir=tmp_path)
    with pytest.raises(ExperimentError, match="seeds must be at least 1, got 0"):
        reproduce("I", seeds=0, run_dir=tmp_path)
    assert not any(tmp_path.iterdir())


def test_missing_data_sets_are_named_in_a_line_each_before_anything_is_trained(tmp_path, monkeypatch):
    def absent(name, root, *_):
        raise FileNotFoundError(f"{name} could not be read from {root}")

    for name in ("cifar10", "cifar100"):
        monkeypatch.setitem(images._LOADERS, name, absent)
    with pytest.raises(ExperimentError) as stopped:
        reproduce("II", scale="full", seeds=1, root=tmp_path, run_dir=tmp_path / "runs")
    first, *lines = str(stopped.value).splitlines()
    assert first == "3 data sets are missing; no row was run:"
    assert lines[0] == f"  cifar10: cifar10 could not be read from {tmp_path}"
    assert [line.split(":")[0].strip() for line in lines] == ["cifar10", "cifar100", "tiny-imagenet"]
    assert "is not an unpacked tiny-imagenet-200" in lines[2]
    assert not (tmp_path / "runs").exists()


def test_a_folder_of_other_settings_is_refused(finished, tmp_path):
    """A run folder says what it was made with, so a copied or edited one cannot pass for another."""
    folder, _ = finished
    (row,) = choose("II", ["vgg5/converted"], "smoke")
    place = TableRunner("smoke", folder, folder / "smoke", None, "cpu")
    recipe = place.folder(row, 0) / "recipe.json"
    before = recipe.read_text()
    recipe.write_text(before.replace('"T": 4', '"T": 5'))
    with pytest.raises(ExperimentError, match="T: there 5, here 4"):
        run(folder, ["vgg5/converted"], seeds=1)
    recipe.write_text(before)


def test_reduced_rows_that_are_the_same_run_are_run_once():
    assert [row.teacher for row in choose("IV", scale="small") if row.method == "lasnn"] == ["densenet121"]
    assert len(choose("IV", scale="full")) == 15
    assert {row.net for row in choose("II", scale="small")} == {"conv3_linear2", "vgg5"}
    assert {row.dataset for row in choose("1", scale="small")} == {"cifar100"}


def test_a_teacher_from_elsewhere_is_not_mixed_in(tmp_path):
    """Seeds of one row that were taught by a checkpoint and by a teacher trained here would be averaged."""
    (row,) = choose("IV", ["vgg5/lasnn/activation/resnet20"], "small")
    path = tmp_path / "resnet20.th"
    torch.save({"state_dict": models.teacher_resnet20(10).state_dict()}, path)
    given, none = (TableRunner("small", tmp_path, tmp_path, checkpoint, "cpu") for checkpoint in (path, None))
    for _ in range(2):
        given.teacher(row)
    with pytest.raises(ValueError, match=r"other settings \(checkpoint: there '[0-9a-f]{64}', here None\)"):
        none.teacher(row)


def test_what_is_reduced_of_event_recordings():
    """All recordings that are there are used, however many they are, without augmentation."""
    (row,) = choose("1", ["dvs-gesture/spiking_resnet18/alone"], "small")
    settings = scales.reverse_kd(row, "small", 0)
    assert (settings.T, settings.framing.shrink, settings.recipe.epochs) == (8, 8, 12)
    assert settings.reduced == "not augmented, width 0.125, 12 of 200 epochs, T 8 of 16, 16 pixels"
    assert scales.reverse_kd(row, "full", 0).reduced == ""
