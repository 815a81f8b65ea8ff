"""The three stages in a run folder."""

import csv
import dataclasses
import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from spikingjelly.activation_based.layer import Dropout

from lasnn_sj import models
from lasnn_sj.data import DeviceLoader
from lasnn_sj.data import images as data
from lasnn_sj.experiments import runner
from lasnn_sj.experiments.pipeline import DEFAULT as STAGES
from lasnn_sj.experiments.pipeline import Pipeline, Recipe, lr_factor, table
from lasnn_sj.experiments.recipes import described, rathi
from lasnn_sj.neurons import LIFNode
from lasnn_sj.runtime import FolderLock, LockError
from lasnn_sj.runtime.cost import Cost
from lasnn_sj.training.evaluation import device_of, evaluate

TINY = Recipe(
    student="conv3_linear2",
    width=0.1,
    T=2,
    encoding="direct",
    teacher_width=0.25,
    teacher_epochs=1,
    teacher_lr=0.1,
    teacher_batch=32,
    ann_epochs=8,
    ann_lr=0.1,
    ann_batch=16,
    calibration_images=32,
    calibration_steps=10,
    threshold_scale=0.5,
    epochs=1,
    lr=1e-3,
)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits").split(100).subset(256, 64)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, Pipeline(TINY, digits, folder).run()


def test_every_stage_leaves_its_result(finished):
    folder, results = finished
    assert tuple(results) == STAGES
    for stage in STAGES:
        saved = json.loads((folder / stage / "result.json").read_text())
        assert saved == results[stage]
        assert 0 <= saved["top1"] <= 100
        assert saved["samples"] == 64
    for stage in ("teacher", "ann", "hybrid", "lasnn"):
        assert "val_top1" in (folder / stage / "metrics.csv").read_text()


def test_epochs_are_evaluated_on_validation_images_and_test_images_once(finished, digits, tmp_path):
    """A hundredth of validation images, a 64th of test images; without the former nothing is evaluated."""
    folder, results = finished
    for stage in ("ann", "lasnn"):
        with open(folder / stage / "metrics.csv") as file:
            rows = list(csv.DictReader(file))
        assert all(float(row["val_top1"]) == pytest.approx(round(float(row["val_top1"]))) for row in rows)
        assert results[stage]["samples"] == 64
    whole = dataclasses.replace(digits, validation=None)
    Pipeline(dataclasses.replace(TINY, ann_epochs=1), whole, tmp_path).run(["ann"])
    assert "val_top1" not in (tmp_path / "ann" / "metrics.csv").read_text()


def test_finished_stages_are_skipped(finished, digits, monkeypatch):
    folder, results = finished
    monkeypatch.delattr(Pipeline, "_run")
    assert Pipeline(TINY, digits, folder).run() == results


def test_a_stage_without_result_runs_again(finished, digits):
    folder, results = finished
    (folder / "converted_10T" / "result.json").unlink()
    again = Pipeline(TINY, digits, folder).run()
    assert again["converted_10T"]["top1"] == results["converted_10T"]["top1"]


@pytest.mark.parametrize("stage", ["converted", "start"])
def test_what_a_process_left_that_was_killed_as_it_made_a_network_is_removed(
    finished, digits, tmp_path, stage
):
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder)
    (folder / stage / "weights.safetensors").unlink()
    left = folder / stage / ".weights.safetensors.abc.part"
    left.write_text("half")
    os.utime(left, (1e9, 1e9))
    Pipeline(TINY, digits, folder).student(stage)
    assert not left.exists()
    assert (folder / stage / "weights.safetensors").exists()


class Shifted(torch.utils.data.Dataset):
    """Images that are augmented: each time a little brighter or darker."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image, label = self.images[index]
        return image + 0.2 * torch.rand(()) - 0.1, label


def test_a_stage_does_not_depend_on_what_ran_before(finished, digits, tmp_path):
    augmented = dataclasses.replace(digits, train=Shifted(digits.train))
    ann = Pipeline(TINY, digits, finished[0]).student("ann")
    thresholds = []
    for before in range(2):
        torch.manual_seed(before)
        pipeline = Pipeline(TINY, augmented, tmp_path / str(before), ann=ann)
        pipeline.run(["converted"])
        thresholds.append((tmp_path / str(before) / "converted" / "thresholds.json").read_text())
    assert thresholds[0] == thresholds[1]


def test_the_cost_of_a_stage_is_not_that_of_those_it_needs(digits, tmp_path, monkeypatch):
    """A stage that begins runs alone: none of another is measured within it."""
    measured = []

    class Alone(Cost):
        def __enter__(self):
            assert "running" not in measured
            measured.append("running")
            return super().__enter__()

        def __exit__(self, *error):
            super().__exit__(*error)
            measured[-1] = "done"

    monkeypatch.setattr("lasnn_sj.experiments.runner.Cost", Alone)
    recipe = dataclasses.replace(TINY, ann_epochs=2)
    Pipeline(recipe, digits, tmp_path).run(["lasnn"])
    assert measured == ["done"] * 3  # teacher, ann, lasnn; converted and start are made, not evaluated


def test_a_trained_row_s_result_is_that_of_an_evaluation(finished, digits, tmp_path):
    # random codes: training has drawn many before the row is looked at
    recipe = dataclasses.replace(TINY, encoding="poisson", T=4)
    done = Pipeline(TINY, digits, finished[0])
    pipeline = Pipeline(recipe, digits, tmp_path, teacher=done.teacher(), ann=done.student("ann"))
    result = pipeline.run(["lasnn"])["lasnn"]
    test = digits.test_loader(recipe.batch)
    again = evaluate(pipeline.student("lasnn"), test, pipeline.encoder())
    assert again["loss"] == pytest.approx(result["loss"], rel=1e-6)
    assert again["top1"] == result["top1"]


def test_another_recipe_or_data_set_is_refused(finished, digits):
    folder, _ = finished
    with pytest.raises(ValueError, match="T: there 2, here 3"):
        Pipeline(dataclasses.replace(TINY, T=3), digits, folder)
    with pytest.raises(ValueError, match="train_images: there 256, here 128"):
        Pipeline(TINY, digits.subset(128), folder)


def test_an_exchanged_file_of_the_same_size_is_refused(tmp_path):
    """A table would have rows of two data sets: the file has the name and the counts that it had."""
    random = np.random.default_rng(0)
    arrays = {"x_train": random.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8), "y_train": np.arange(40) % 4}
    arrays |= {"x_test": arrays["x_train"][:8], "y_test": arrays["y_train"][:8]}
    path = tmp_path / "own.npz"
    np.savez(path, **arrays)
    Pipeline(TINY, data.load(path), tmp_path / "run")
    Pipeline(TINY, data.load(path), tmp_path / "run")
    for changed, said in (
        ({"x_train": 255 - arrays["x_train"]}, "train.items.0: there"),
        ({"y_test": arrays["y_test"][::-1]}, "test.labels: there"),
    ):
        np.savez(path, **arrays | changed)
        with pytest.raises(ValueError, match=said):
            Pipeline(TINY, data.load(path), tmp_path / "run")


@pytest.mark.parametrize("name", ["teacher", "ann", "snn_teacher"])
def test_another_network_in_place_of_one_that_was_given_is_refused(name, digits, tmp_path):
    Pipeline(TINY, digits, tmp_path, **{name: torch.nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="weights: there"):
        Pipeline(TINY, digits, tmp_path, **{name: torch.nn.Linear(2, 2)})


def test_thresholds_of_the_stages(finished, digits):
    """Converted: as balanced, no leak; start: times the scale, with the recipe's leak and surrogate."""
    folder, _ = finished
    pipeline = Pipeline(TINY, digits, folder)
    converted, start, trained = (pipeline.student(s) for s in ("converted", "start", "lasnn"))
    saved = json.loads((folder / "converted" / "thresholds.json").read_text())

    def nodes(net):
        return {n: m for n, m in net.named_modules() if isinstance(m, LIFNode)}

    assert {name: node.v_threshold for name, node in nodes(converted).items()} == saved
    for name, node in nodes(start).items():
        assert node.v_threshold == pytest.approx(0.5 * saved[name])
        assert (nodes(converted)[name].leak, node.leak) == (1.0, 0.99)
        assert node.surrogate_function.alpha == 0.3
        assert nodes(trained)[name].v_threshold == node.v_threshold
    ann = pipeline.student("ann")
    for name, weight in ann.named_parameters():
        assert torch.equal(weight, converted.get_parameter(name))
        assert torch.equal(weight, start.get_parameter(name))


def test_hybrid_and_lasnn_start_alike(finished, digits):
    """The first rows of both differ by what the attention adds, not by data, code or dropout: with
    alpha 0 they are the same run."""
    folder, results = finished
    recipe = dataclasses.replace(TINY, alpha=0.0)
    other = folder.parent / "alpha0"
    for stage in ("teacher", "ann", "converted", "start"):
        (other / stage).mkdir(parents=True, exist_ok=True)
        for file in ("result.json", "weights.safetensors"):
            (other / stage / file).write_bytes((folder / stage / file).read_bytes())
    zero = Pipeline(recipe, digits, other).run(("lasnn",))
    assert zero["lasnn"]["loss"] == pytest.approx(results["hybrid"]["loss"], rel=1e-5)


def test_a_given_teacher_is_used(digits, tmp_path):
    torch.manual_seed(0)
    teacher = models.teacher_resnet20(10, 1, 0.25)
    result = Pipeline(TINY, digits, tmp_path, teacher=teacher).run(("teacher",))
    assert not (tmp_path / "teacher" / "metrics.csv").exists()
    assert result["teacher"]["samples"] == 64


def test_given_networks_are_brought_to_the_device(digits, tmp_path, monkeypatch):
    """Their stages only evaluate, which moves images alone; "meta" stands for a GPU."""
    seen = []
    monkeypatch.setattr(
        "lasnn_sj.experiments.pipeline.evaluate",
        lambda net, loader, device: seen.append((device_of(net), device)) or {"top1": 0.0},
    )
    given = {
        "teacher": models.teacher_resnet20(10, 1, 0.25),
        "ann": models.conv3_linear2(10, 1, 8, 0.1, spiking=False),
    }
    Pipeline(TINY, digits, tmp_path, **given, device="meta").run(("teacher", "ann"))
    assert seen == [(torch.device("meta"), torch.device("meta"))] * 2


def test_spike_kd_without_a_teacher_is_refused_before_anything_is_trained(digits, tmp_path):
    with pytest.raises(ValueError, match="spike_kd needs an SNN that teaches"):
        Pipeline(TINY, digits, tmp_path).run(("spike_kd",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.json", "recipe.json"]


def test_unknown_stages(finished, digits):
    with pytest.raises(ValueError, match="stages must be among teacher, ann, .*, got distil"):
        Pipeline(TINY, digits, finished[0]).run(("distil",))


def test_table_by_hand():
    """Seeds 80 and 84: mean 82, sample deviation sqrt(8) = 2.83."""
    runs = [{"ann": {"top1": t, "seconds": s}} for t, s in ((80.0, 10.0), (84.0, 30.0))]
    assert table(TINY, runs).splitlines() == [
        "|                  | top-1 %, mean ± deviation of 2 seeds | seconds |",
        "| ---------------- | ------------------------------------ | ------- |",
        "| intermediate ANN | 82.00 ± 2.83                         | 20      |",
    ]


@pytest.mark.parametrize("file", ["result.json", "weights.safetensors"])
@pytest.mark.parametrize("content", [b"", b'{"top1": 4'])
def test_a_stage_whose_files_are_cut_is_run_again(finished, digits, tmp_path, caplog, file, content):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    path = folder / "start" / file
    whole = path.read_bytes()
    path.write_bytes(content)
    pipeline = Pipeline(TINY, digits, folder)
    result = pipeline.run(["start"])["start"]
    assert pipeline.student("start") is not None
    assert result["top1"] == finished[1]["start"]["top1"]
    assert str(path) in caplog.text
    if file.startswith("weights"):
        assert path.read_bytes() == whole


def test_a_stage_is_not_run_where_another_process_works(finished, digits, tmp_path):
    folder = shutil.copytree(finished[0], tmp_path / "run")
    with FolderLock(folder):
        assert tuple(Pipeline(TINY, digits, folder).run()) == STAGES  # reading needs no lock
        (folder / "start" / "result.json").unlink()
        with pytest.raises(LockError, match="in use by process"):
            Pipeline(TINY, digits, folder).run()


@pytest.mark.parametrize("what", ["start", "start/thresholds.json", "start/weights.safetensors"])
def test_nothing_is_written_through_a_link(finished, digits, tmp_path, what):
    folder, outside = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "outside"
    (folder / "start" / "result.json").unlink()
    if what == "start":
        shutil.rmtree(folder / what)
        outside.mkdir()
    else:
        (folder / what).unlink(missing_ok=True)
        outside.write_text("precious")
    (folder / what).symlink_to(outside)
    pipeline = Pipeline(TINY, digits, folder)
    if what == "start":
        with pytest.raises(ValueError, match="outside the run folder"):
            pipeline.run(["start"])
        assert not list(outside.iterdir())
    else:
        pipeline.run(["start"])
        assert outside.read_text() == "precious"


def test_the_preset_of_rathi_et_al(digits, tmp_path):
    """Dropout 0.5 in the classifier alone, AMSGrad, no leak, tenths after 40, 65 and 85 % of the epochs."""
    recipe = rathi(dataclasses.replace(TINY, ann_epochs=1))
    pipeline = Pipeline(recipe, digits, tmp_path)
    pipeline.run(["hybrid"])
    student = pipeline.student("hybrid")
    assert {m.p for m in student.classifier.modules() if isinstance(m, Dropout)} == {0.5}
    vgg5 = Pipeline(dataclasses.replace(recipe, student="vgg5"), digits, tmp_path / "vgg5")._build_ann()
    p = {name.split(".")[0]: m.p for name, m in vgg5.named_modules() if isinstance(m, torch.nn.Dropout)}
    assert p == {"features": 0.2, "classifier": 0.5}
    assert {m.leak for m in student.modules() if isinstance(m, LIFNode)} == {1.0}
    settings = json.loads((tmp_path / "hybrid" / "settings.json").read_text())
    assert settings["hyperparameters"]["amsgrad"] is True
    factors = [lr_factor("steps", 20, epoch) for epoch in range(20)]
    assert factors == pytest.approx([1.0] * 8 + [0.1] * 5 + [0.01] * 4 + [0.001] * 3)
    assert "classifier_dropout" not in described(TINY)  # folders from before the option are still known


@pytest.mark.parametrize(("schedule", "wanted"), [
    ("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447]),
])  # fmt: skip
def test_learning_rates_of_four_epochs_by_hand(schedule, wanted):
    assert [lr_factor(schedule, 4, epoch) for epoch in range(4)] == pytest.approx(wanted, rel=1e-5)


def test_images_kept_on_a_device_train_and_resume(digits, tmp_path, monkeypatch):
    """Forced on the CPU; each epoch has each image once, and an interrupted stage goes on to the bit."""
    monkeypatch.setattr(runner, "KEEPING", ("cpu",))
    plain = DeviceLoader.__iter__
    used, batches, stop = [], [], [None]

    def watched(self):
        used.append((self.augment, self.shuffle, self.batch_size, len(self.labels)))
        for batch in plain(self):
            batches.append(batch)
            if len(batches) == stop[0]:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch

    monkeypatch.setattr(DeviceLoader, "__iter__", watched)
    recipe = dataclasses.replace(TINY, ann_epochs=2, teacher_epochs=0)
    whole = Pipeline(recipe, digits, tmp_path / "whole").run(["ann"])
    assert set(used) == {(False, True, 16, 256), (False, False, 100, 100), (False, False, 100, 64)}
    first, second = batches[:16], batches[17:33]
    assert not torch.equal(first[0][1], second[0][1])
    everything = [torch.cat([labels for _, labels in epoch]).sort().values for epoch in (first, second)]
    assert torch.equal(*everything)

    batches.clear()
    stop[0] = 21  # within the second epoch
    with pytest.raises(KeyboardInterrupt):
        Pipeline(recipe, digits, tmp_path / "again").run(["ann"])
    stop[0] = None
    again = Pipeline(recipe, digits, tmp_path / "again").run(["ann"])
    assert again["ann"]["top1"] == whole["ann"]["top1"]
    ours, theirs = (load_file(tmp_path / name / "ann" / "weights.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    net = Pipeline(recipe, digits, tmp_path / "whole").student("ann")
    assert evaluate(net, digits.test_loader(100))["top1"] == whole["ann"]["top1"]  # of the same test images
