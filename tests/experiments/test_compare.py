"""Comparison of objectives: shared starts, resumption, paired gains, and images that are not touched."""

import contextlib
import csv
import dataclasses
import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from lasnn_sj import __main__ as cli
from lasnn_sj import models
from lasnn_sj.data.images import Images, labels_of
from lasnn_sj.experiments import compare, jobs, pipeline, runs, text
from lasnn_sj.experiments.config import ConfigError
from lasnn_sj.experiments.recipes import Recipe

CONFIG = runs.CONFIGS / "compare_digits.yaml"
SPIKING = Recipe(student="spiking_vgg9", width=0.1, T=2, encoding="direct", epochs=1, batch=32, lr=1e-3)
ROWS = {"hybrid": "CrossEntropy()", "label KD": "LabelKD(temperature=2.0)"}


def comparison(folder, **changes):
    whole = runs.read(CONFIG)
    recipe = dataclasses.replace(whole.recipe, ann_epochs=3, epochs=1)
    few = {"rows": ROWS, "gains": {}, "seeds": (0, 1), "recipe": recipe, "processes": 1}
    return dataclasses.replace(whole, **(few | {"run_dir": folder} | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    return folder, comparison(folder).run()


def test_the_example_runs_from_the_command_line(tmp_path, capsys):
    cli.main(["compare", "compare_digits", "--run-dir", str(tmp_path), "--recipe.epochs", "1",
              "--recipe.ann-epochs", "2", "--seeds", "3", "4", "--processes", "1"])  # fmt: skip
    printed = capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert table in printed
    names = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("|")]
    assert names[2:] == ["start (not trained)", "hybrid", "LaSNN", "LaSNN by gradients", "label KD",
                         "label KD + LaSNN"]  # fmt: skip
    assert "(label KD)" in table
    assert "torch" in table
    assert "validation images" in table
    cli.main(["evaluate", str(tmp_path), "label KD + LaSNN"])
    saved = json.loads((tmp_path / "seed4" / "label_KD_LaSNN" / "result.json").read_text())
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:6] == ["4", "label", "KD", "+", "LaSNN", f"{saved['top1']:.2f}"]


def test_results_table_and_picture(finished):
    folder, results = finished
    assert list(results) == [0, 1]
    for seed, rows in results.items():
        assert list(rows) == ["start (not trained)", "hybrid", "label KD"]
        for row, result in rows.items():
            assert result["samples"] == 100
            assert len(result["top1_over_time"]) == 4
            assert result["top1_over_time"][-1] == result["top1"]
            assert row.startswith("start") or result["seconds_per_epoch"] > 0
        assert rows == {row: rows[row] for row in rows}, seed
    with open(folder / "table.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6
    for line in lines:
        if line["row"] == "label KD":
            of_seed = results[int(line["seed"])]
            gain = of_seed["label KD"]["top1"] - of_seed["hybrid"]["top1"]
            assert float(line["gain"]) == pytest.approx(gain)
            assert line["objective"] == "LabelKD(temperature=2.0)"
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")


def test_rows_of_a_seed_share_their_start_and_seeds_differ_in_their_images(finished):
    folder, _ = finished
    starts = [load_file(folder / f"seed{seed}" / "start" / "weights.safetensors") for seed in (0, 1)]
    anns = list(folder.glob("**/ann/weights.safetensors"))
    assert anns == [folder / "shared" / "ann" / "weights.safetensors"]
    run = comparison(folder)
    images = [set(run.part(seed).data.train.indices) for seed in (0, 1)]
    assert images[0] != images[1]
    assert [len(drawn) for drawn in images] == [200, 200]
    weights = load_file(anns[0])
    for start in starts:  # one ANN; only thresholds and the output's scale are of a seed
        assert all(
            torch.equal(start[name], weight) for name, weight in weights.items() if "output" not in name
        )


def test_what_is_finished_is_not_run_again_and_rows_may_be_added(finished, tmp_path, monkeypatch):
    folder, results = finished
    trained = []
    train = pipeline.Pipeline._train_snn

    def counted(part, folder, objective, teacher=None):
        trained.append((part.recipe.seed, repr(objective)))
        return train(part, folder, objective, teacher)

    monkeypatch.setattr(pipeline.Pipeline, "_train_snn", counted)
    assert comparison(folder).run() == results
    assert trained == []
    more = comparison(folder, rows=ROWS | {"sure": "DefaultKD()"}, seeds=(1,)).run()
    assert trained == [(1, "DefaultKD()")]
    assert more[1]["hybrid"] == results[1]["hybrid"]


def test_a_student_with_batch_norm_starts_from_its_initial_weights(tmp_path, capsys):
    few = {"rows": {"CE": "CrossEntropy()"}, "baseline": "CE", "recipe": SPIKING, "seeds": (0,)}
    run = comparison(tmp_path, **few, train_images=64, judged_images=50)
    results = run.run()[0]
    assert results["start (not trained)"]["top1"] < 25  # ten classes
    assert not (tmp_path / "seed0" / "converted").exists()
    assert not (tmp_path / "shared" / "ann").exists()
    start = load_file(tmp_path / "seed0" / "start" / "weights.safetensors")
    torch.manual_seed(1)
    built = models.create("spiking_vgg9", num_classes=10, in_channels=1, image_size=8, width=0.1).state_dict()
    assert all(torch.equal(start[name], weights) for name, weights in built.items())
    cli.main(["evaluate", str(tmp_path), "CE"])
    assert f"{results['CE']['top1']:.2f}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="spiking_vgg9 has no intermediate ANN, which the stages ann need"):
        run.part(0).run(["ann"])


def test_images_may_be_smaller(tmp_path):
    run = comparison(tmp_path, recipe=dataclasses.replace(SPIKING, student="spiking_resnet18"), shrink=2)
    assert run.data.image_size == 4
    assert "images of 4x4" in run.title()


def test_another_objective_or_setting_in_the_same_folder_is_refused(finished):
    folder, _ = finished
    with pytest.raises(
        ValueError, match=r"objective: there 'LabelKD\(temperature=2.0\)', here 'LabelKD\(\)'"
    ):
        comparison(folder, rows=ROWS | {"label KD": "LabelKD()"}).run()
    with pytest.raises(ValueError, match="judge: there 'validation', here 'test'"):
        comparison(folder, judge="test").run()


def test_test_images_are_not_touched_where_validation_judges(tmp_path, monkeypatch):
    """With ``judge: test`` each is looked at once by each row, and once by the start."""
    seen = []
    get = Images.__getitem__

    def watched(images, index):
        if images is whole.test:
            seen.append(index)
        return get(images, index)

    monkeypatch.setattr(Images, "__getitem__", watched)
    run = comparison(tmp_path / "a", rows={"hybrid": "CrossEntropy()"}, seeds=(0,), judged_images=40)
    whole = run._load()
    monkeypatch.setattr(compare.Comparison, "_load", lambda self: whole)
    run.run()
    assert seen == []
    tested = dataclasses.replace(run, judge="test", run_dir=tmp_path / "b")
    tested.run()
    assert set(seen) == set(range(40))
    held = labels_of(tested.data.validation)
    assert len(held) == 40


def test_gains_by_hand():
    """Gains 1, 3, 2: mean 2, s = 1, t(0.975; 2) = 4.3027, half 4.3027 / sqrt(3) = 2.48."""
    rows = {"hybrid": (60.0, 70.0, 65.0), "LaSNN": (61.0, 73.0, 67.0)}
    results = {
        row: {s: {"top1": top1, "seconds_per_epoch": 2.0 + (row == "LaSNN")} for s, top1 in enumerate(values)}
        for row, values in rows.items()
    }
    assert compare.paired(results, "LaSNN", "hybrid") == {0: 1.0, 1: 3.0, 2: 2.0}
    line = comparison(Path("nowhere")).table({"hybrid": results["hybrid"], "LaSNN": results["LaSNN"]})
    cells = [cell.strip() for cell in line.splitlines()[-1].strip("|").split("|")]
    assert cells[:5] == ["LaSNN", "3", "67.00 ± 6.00", "+2.00 ± 2.48", "x 1.50"]
    del results["LaSNN"][1]
    assert compare.paired(results, "LaSNN", "hybrid") == {0: 1.0, 2: 2.0}


def test_an_interval_by_hand():
    assert text.interval([1.0, 3.0, 2.0]) == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert text.interval([1.0]) is None


@pytest.mark.parametrize(("changes", "said"), [
    ({"rows": {"a": "Attension()"}, "baseline": "a"}, "rows: a: unknown objective 'Attension'"),
    ({"rows": {"a": "import os"}, "baseline": "a"}, "rows: a: .* is not a sum of objectives"),
    ({"baseline": "hybird"}, "baseline: unknown row 'hybird'; did you mean hybrid"),
    ({"gains": {"label KD": "nothing"}}, "gains: unknown row 'nothing'"),
    ({"rows": ROWS | {"Hybrid!": "CrossEntropy()"}}, "'Hybrid!' needs another name, its folder's"),
    ({"rows": ROWS | {"start": "CrossEntropy()"}}, "'start' needs another name"),
    ({"validation_images": 0}, "validation_images is 0"),
    ({"processes": 0}, "processes must be at least 1, got 0"),
    ({"recipe": SPIKING, "ann_weights": Path("w")}, "ann_weights: spiking_vgg9 is not converted from an ANN"),
])  # fmt: skip
def test_what_cannot_be_compared_is_named(changes, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        comparison(tmp_path, **changes)


def test_files_that_are_not_there_or_not_the_student(tmp_path):
    with pytest.raises(ValueError, match="ann_weights: .*nothing.* does not exist"):
        comparison(tmp_path, ann_weights=Path("nothing")).run()
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"not safe")
    with pytest.raises(ValueError, match=r"w.safetensors does not hold conv3_linear2 of width 0.1"):
        comparison(tmp_path, ann_weights=weights).run()
    path = tmp_path / "c.yaml"
    path.write_text("method: compare\nbaseline: a\nrows: {a: 3}\nrecipe: {}")
    with pytest.raises(ConfigError, match=r"rows\.a must be text, got 3"):
        runs.read(path)


def double(job, device):
    if job == 3:
        raise ValueError("three")
    return 2 * job


def test_jobs_in_two_processes():
    done = sorted(jobs.run_jobs(double, [1, 2, 3, 4], ["cpu"], 2))
    assert done == [(1, 2, None), (2, 4, None), (3, None, "ValueError: three"), (4, 8, None)]
    assert list(jobs.run_jobs(double, [3], ["cpu"], 2)) == [(3, None, "ValueError: three")]


def test_workers_end_with_their_parent_and_begin_no_other_job(tmp_path):
    """The parent is killed at once; its worker saves on SIGTERM, and the pool would give it the next job."""
    log = tmp_path / "log"

    def work(job, device):
        with open(log, "a") as file:
            file.write(f"{job} on {device}\n")
        try:
            time.sleep(60)
        finally:
            log.with_name("saved").touch()

    def stop(*_):
        raise SystemExit(143)

    parent = os.fork()
    if parent == 0:
        me = os.getpid()
        if os.fork() == 0:
            try:
                signal.signal(signal.SIGTERM, stop)
                jobs._start_worker(work, SimpleNamespace(get=lambda: "cpu"), 1, me)
                for job in ("first", "second"):
                    with contextlib.suppress(BaseException):
                        jobs._call(job)
            finally:
                os._exit(0)
        time.sleep(60)
        os._exit(0)
    wait_for(log.exists)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_for(log.with_name("saved").exists)
    time.sleep(0.3)
    assert log.read_text() == "first on cpu\n"


def wait_for(condition, within=30):
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["table.md", "table.csv", "table_curves.csv", "table.png"])
def test_no_table_is_written_through_a_link(finished, tmp_path, name):
    here = comparison(tmp_path / "run")
    shutil.copytree(finished[0], here.run_dir)
    (tmp_path / "outside").write_text("theirs")
    (here.run_dir / name).unlink()
    (here.run_dir / name).symlink_to(tmp_path / "outside")
    here._write()
    assert (tmp_path / "outside").read_text() == "theirs"
    assert not (here.run_dir / name).is_symlink()


def test_a_damaged_result_is_a_row_that_is_not_there(finished, tmp_path, caplog):
    here = comparison(tmp_path / "run")
    shutil.copytree(finished[0], here.run_dir)
    path = next(here.run_dir.glob("seed*/hybrid/result.json"))
    path.write_text('{"top1": 5')
    assert int(path.parts[-3].removeprefix("seed")) not in here.results()["hybrid"]
    assert f"{path} is damaged" in caplog.text
