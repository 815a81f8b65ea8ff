"""The page says what the files say, stands alone, and survives whatever is in a run folder."""

import base64
import csv
import html
import io
import json
import os
import shutil
import sys
import tracemalloc
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from PIL import Image

from lasnn_sj import DirectEncoder, LaSNNTrainer, models
from lasnn_sj.analysis.inspection import inspect, inspect_student
from lasnn_sj.analysis.report import charts, report
from lasnn_sj.analysis.report.charts import Picture

K, T = 4, 4
RECIPE = {"student": "conv3_linear2", "T": T, "alpha": 0.9, "seed": 0}
TOP1 = {"teacher": 91.5, "ann": 70.25, "converted": 10.0, "hybrid": 65.5, "lasnn": 68.75}


class Page(HTMLParser):
    """Access to the parts of a page that tests check."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.images, self.links, self.ids, self.labels = set(), [], [], [], []
        self.tables, self.text, self._caption, self._cell = {}, "", None, None
        self.title, self.headline, self._tag = "", [], ""
        self.source = Path(path).read_text(encoding="utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self._tag = tag
        self.tags.add(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.labels += [found["aria-label"]] if tag == "svg" else []
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        if tag == "img":
            self.images.append(found)
        if tag == "figcaption":
            self._caption = ""
        if tag == "table":
            self.tables.setdefault(self._caption, [])
        if tag == "tr" and self._caption in self.tables:
            self.tables[self._caption].append([])
        if tag in ("th", "td") and self._caption in self.tables:
            self._cell = ""

    def handle_endtag(self, tag):
        self._tag = ""
        if tag == "figure":
            self._caption = None
        if tag in ("th", "td") and self._cell is not None:
            self.tables[self._caption][-1].append(self._cell.strip())
            self._cell = None

    def handle_data(self, data):
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        self.text += data
        if self._tag == "h1":
            self.title += data.strip()
        if self._tag == "dt" and data.strip():
            self.headline.append((None, data))
        if self._tag == "dd" and data.strip():
            self.headline[-1] = (data, self.headline[-1][1])
        if self._cell is not None:
            self._cell += data
        elif self._caption == "":
            self._caption = data

    def table(self, caption):
        """Rows by their first cell, each as a dict by the heads of the columns."""
        head, *rows = next(rows for name, rows in self.tables.items() if name and name.startswith(caption))
        return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}

    def label(self, start):
        return next(label for label in self.labels if label.startswith(start))


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def add_metrics(folder, columns, rows):
    with open(folder / "metrics.csv", "w", newline="") as file:
        csv.writer(file).writerows([columns, *rows])


@pytest.fixture(scope="module")
def inspected(tmp_path_factory):
    """The two files that a real inspection writes."""
    folder = tmp_path_factory.mktemp("inspected")
    torch.manual_seed(0)
    student, teacher = models.conv3_linear2(K, 3, 16, width=0.1), models.teacher_resnet20(K, width=0.25)
    for module in student.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.2
    batches = [(torch.rand(16, 3, 16, 16) * 2 - 1, torch.arange(16) % K)]
    inspect_student(student, teacher.eval(), batches, DirectEncoder(T), folder, examples=4, seed=5)
    return folder


def make_run(folder, inspected, seed=0, plus=0.0, **recipe):
    """A Pipeline's folder as a finished run leaves it."""
    write(folder / "recipe.json", RECIPE | {"seed": seed} | recipe)
    for stage, top1 in TOP1.items():
        result = {"loss": 1.25, "top1": top1 + plus, "samples": 16, "seconds": 12.3}
        write(folder / stage / "result.json", result)
    write(folder / "converted" / "thresholds.json", {"features.0.neuron": 12.5})
    for stage in ("hybrid", "lasnn"):
        write(folder / stage / "settings.json", {"optimizer": "Adam", "hyperparameters": {"lr": 5e-4}})
        rows = [[1, 2.5, 2.0, 40, 5e-4, 3, ""], [2, 1.5, 1.0, 50, 5e-4, 3, 60]]
        add_metrics(folder / stage, ["epoch", "loss", "ce", "top1", "lr", "seconds", "val_top1"], rows)
    for name in ("inspection.json", "inspection.npz"):
        shutil.copy(inspected / name, folder / "lasnn" / name)
    shutil.copy(folder / "lasnn" / "inspection.json", folder / "hybrid" / "inspection.json")
    shutil.copy(folder / "lasnn" / "inspection.npz", folder / "hybrid" / "inspection.npz")
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Charts are made but not drawn, which takes most of a report's time."""

    def picture(figure, name, title, alt):
        return Picture(name, title, alt, f'<svg aria-label="{html.escape(alt, quote=True)}"></svg>', b"")

    monkeypatch.setattr(charts, "picture", picture)
    monkeypatch.setattr(charts, "file", lambda figure, title: b"")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, inspected):
    run = make_run(tmp_path_factory.mktemp("runs") / "run", inspected)
    return run, report(run)


@pytest.fixture(scope="module")
def page(finished):
    return Page(finished[1])


def test_the_page_lies_in_its_folder_and_nothing_is_missing(finished, page):
    assert finished[1] == finished[0] / "report.html"
    assert "What is missing" not in page.text


def test_results_are_those_of_the_files(page):
    table = page.table("Results on the test data")
    assert {name: row["accuracy, %"] for name, row in table.items()} == {
        "teacher": "91.50", "intermediate ANN": "70.25", "converted": "10.00",
        "hybrid (CE only)": "65.50", "LaSNN": "68.75",
    }  # fmt: skip
    assert table["LaSNN"]["points over ANN"] == "-1.50"  # 68.75 - 70.25
    assert table["LaSNN"]["points over hybrid"] == "+3.25"  # 68.75 - 65.5
    assert table["converted"]["points over hybrid"] == "-55.50"
    assert page.table("Cross-entropy, time")["LaSNN"]["cross-entropy"] == "1.250"
    assert "LaSNN 68.75" in page.label("Accuracy on the test data")


def test_every_part_of_the_metrics_has_its_curve(page):
    assert "LaSNN ends at 1.5" in page.label("training loss over epoch")
    assert "hybrid (CE only) ends at 1" in page.label("cross-entropy over epoch")
    assert "LaSNN ends at 50" in page.label("training accuracy, % over epoch")
    assert not any("seconds over epoch" in label for label in page.labels)
    assert not any("learning rate" in label for label in page.labels)  # it is constant
    assert not any("validation accuracy" in label for label in page.labels)  # a single point


def test_operations_energy_spikes_and_thresholds_are_those_of_the_inspection(inspected, page):
    found = json.loads((inspected / "inspection.json").read_text())
    counted, row = found["operations"], page.table("Operations and energy of computing")["LaSNN"]
    assert row["SynOps"] == f"{sum(counted['synops']):,.0f}"
    assert row["MACs"] == f"{sum(counted['macs']):,.0f}"
    assert row["MACs as ANN"] == f"{counted['ann_macs']:,.0f}"
    assert row["energy as ANN"] == f"{4.6 * counted['ann_macs'] / 1e3:.3g} nJ"
    assert row["T"] == str(T)
    share = 100 * counted["energy_pj"][-1] / counted["ann_energy_pj"]
    assert row["% of the ANN's energy"] == f"{share:.1f}"
    by_step = page.table("Accuracy and energy by time step")
    assert list(by_step) == ["1", "2", "3", "4"]
    assert by_step["4"]["LaSNN: accuracy, %"] == f"{found['top1_over_time'][-1]:.2f}"
    assert "ANN: 70.25" in page.label("Accuracy when stopped after t")
    exits = found["early_exit"]
    label = page.label("Accuracy when each sample stops once it is sure")
    assert f"{exits['top1'][-1]:.4g} with all" in label
    pairs = zip(exits["steps"], exits["top1"])
    least = min(steps for steps, accuracy in pairs if accuracy >= exits["top1"][-1] - 0.5)
    assert f"with {least:.3g} steps" in label
    spikes = page.table("Mean spikes per neuron by layer")
    for layer in found["layers"]:
        assert spikes[layer["name"]]["LaSNN"] == f"{layer['spikes_per_neuron']:.4f}"
        assert f"{layer['name']} {layer['spikes_per_neuron']:.4g}" in page.label("Spikes of each layer")
    thresholds = page.table("Thresholds by layer")
    assert thresholds["features.0.neuron"]["converted"] == "12.5"
    assert thresholds["features.0.neuron"]["LaSNN"] == "0.2"


def test_maps_are_drawn_from_the_arrays(inspected, page):
    found = json.loads((inspected / "inspection.json").read_text())
    columns = 1 + 2 * len(found["levels"])
    assert len(page.images) == 2 * 4 * columns  # hybrid and lasnn, 4 examples
    with np.load(inspected / "inspection.npz") as arrays:
        inputs, student, teacher = arrays["inputs"], arrays["student_0"], arrays["teacher_0"]
    for n in range(4):
        shown = [np.asarray(open_image(image)) for image in page.images[n * columns : (n + 1) * columns]]
        np.testing.assert_array_equal(shown[0], inputs[n])
        # dark blue is 0 and yellow the larger map's highest value: viridis grows in its green
        values = [teacher[n] * teacher[n].shape[0], student[n] * student[n].shape[0]]
        high = max(value.max() for value in values)
        for tile, value in zip(shown[1:3], values):
            assert tile.shape[:2] == value.shape
            order = np.argsort(value, axis=None)
            assert (np.diff(tile[..., 1].flatten()[order].astype(int)) >= 0).all()
            brightest = tile.reshape(-1, 3)[order[-1]]
            assert (value.max() < high) or brightest.tolist() == [253, 231, 37]
    assert all(image["alt"] for image in page.images)
    assert page.images[1]["alt"].startswith(f"teacher {found['levels'][0]['teacher']}, sample ")


def open_image(attributes):
    kind, data = attributes["src"].split(",", 1)
    assert kind == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data, validate=True)))


def test_the_page_stands_alone(finished, page):
    assert not page.tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    assert all(link.startswith(("data:image/png;base64,", "#")) for link in page.links)
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert len(page.ids) == len(set(page.ids))
    for link in page.links:
        assert not link.startswith("#") or link[1:] in page.ids
    files = list((finished[0] / "report_pictures").glob("*.png"))
    assert len(files) == page.source.count("<svg") + 2  # and a sheet of maps for hybrid and lasnn
    for file in files:
        with Image.open(file) as image:
            image.verify()


def test_configuration_and_where_it_was_run(page):
    assert page.table("Recipe")["alpha"] == {"run": "0.9"}
    assert page.table("Settings")["hyperparameters.lr"]["LaSNN"] == "0.0005"
    where = page.table("Versions, hardware, seed and command line")
    assert where["versions.torch"]["LaSNN"] in torch.__version__
    assert where["seed"]["LaSNN"] == "5"
    assert where["command"]["LaSNN"] == " ".join(sys.argv)


def test_seeds_are_averaged_and_other_recipes_compared(tmp_path, inspected, undrawn):
    for seed, plus in ((0, 0.0), (1, 2.0)):
        make_run(tmp_path / "table" / f"seed{seed}", inspected, seed, plus)
    (tmp_path / "table" / "config.yaml").write_text("method: lasnn\n")
    page = Page(report(tmp_path / "table"))
    table = page.table("Results on the test data, mean ± deviation of 2 seeds")
    assert table["LaSNN"]["accuracy, %"] == "69.75 ± 1.41"  # 68.75 and 70.75
    assert table["LaSNN"]["points over ANN, 95 % interval"] == "-1.50"  # both seeds
    more = page.table("Cross-entropy, time, memory and single runs")["LaSNN"]
    assert (more["accuracy of seed0, %"], more["accuracy of seed1, %"]) == ("68.75", "70.75")
    assert page.table("Recipe")["seed ≠"] == {"seed0": "0", "seed1": "1"}
    assert "method: lasnn" in page.text

    make_run(tmp_path / "table" / "other", inspected, 0, 1.0, alpha=0.5)
    page = Page(report([tmp_path / "table" / "seed0", tmp_path / "table" / "other"], tmp_path / "two.html"))
    table = page.table("Results on the test data")
    assert table["LaSNN (seed0)"]["accuracy, %"] == "68.75"
    assert table["LaSNN (other)"]["accuracy, %"] == "69.75"
    assert page.table("Recipe")["alpha ≠"] == {"seed0": "0.9", "other": "0.5"}
    assert (tmp_path / "two_pictures" / "accuracy.png").exists()


def test_trainers_of_their_own_are_compared(tmp_path, undrawn):
    x, y = torch.rand(8, 3, 16, 16), torch.arange(8) % K
    for name, seed in (("a", 0), ("b", 1)):
        trainer = LaSNNTrainer(
            models.conv3_linear2(K, 3, 16, width=0.1), attention=None, encoder=DirectEncoder(2), seed=seed,
            run_dir=tmp_path / name,
        )  # fmt: skip
        trainer.fit([(x, y)], [(x, y)], epochs=2)
    inspect(trainer, [(x, y)])
    made = report([tmp_path / "a", tmp_path / "b"])
    assert made == tmp_path / "report.html"
    page, last = Page(made), trainer.history[-1]
    table = page.table("Results on the test data")
    assert table["b"]["accuracy, %"] == f"{last['val_top1']:.2f}"  # inspected on the same images
    assert table["a"]["accuracy, %"] == ""
    assert table["a"]["not finished; last validation accuracy, %"] != "" == table["b"][list(table["b"])[1]]
    assert f"b ends at {last['ce']:.4g}" in page.label("cross-entropy over epoch")
    assert "inspection.json is missing: no attention maps" in page.text  # of a
    assert list(page.table("Thresholds by layer")["features.0.neuron"]) == ["b"]
    assert page.table("Settings")["seed ≠"] == {"a": "0", "b": "1"}


def test_runs_of_every_kind_in_one_folder_are_all_shown(tmp_path, undrawn):
    write(tmp_path / "plain" / "settings.json", {"seed": 0})
    write(tmp_path / "plain" / "result.json", {"top1": 50.0})
    write(tmp_path / "stages" / "recipe.json", {"seed": 0, "T": 4})
    write(tmp_path / "stages" / "lasnn" / "result.json", {"top1": 60.0})
    write(tmp_path / "seeds" / "config.yaml", "method: reverse\n")
    write(tmp_path / "seeds" / "seed0" / "recipe.json", {"seed": 0, "lr": 0.1})
    write(tmp_path / "seeds" / "seed0" / "alone" / "result.json", {"top1": 70.0})
    page = Page(report(tmp_path))
    found = {name: row["accuracy, %"] for name, row in page.table("Results on the test data").items()}
    assert found == {
        f"plain ({tmp_path.name})": "50.00", "LaSNN (stages)": "60.00", "student alone (seeds)": "70.00",
    }  # fmt: skip
    assert "method: reverse" in page.text


def test_trainings_with_other_settings_are_not_taken_for_seeds(tmp_path, undrawn):
    for name, alpha, seed, top1 in (("a", 0.1, 0, 40.0), ("b", 0.9, 0, 60.0), ("c", 0.9, 1, 62.0)):
        write(tmp_path / name / "lasnn" / "settings.json", {"alpha": alpha, "seed": seed})
        write(tmp_path / name / "lasnn" / "result.json", {"top1": top1})
    table = Page(report(tmp_path)).table("Results on the test data")
    assert {name: row["accuracy, %"] for name, row in table.items()} == {
        "LaSNN (a)": "40.00", "LaSNN (b, c)": "61.00 ± 1.41",
    }  # fmt: skip


def test_what_is_not_finished_has_no_part_in_the_mean(tmp_path, undrawn):
    for seed, results in ((0, {"hybrid": 50.0, "lasnn": 60.0}), (1, {"hybrid": 52.0})):
        write(tmp_path / f"seed{seed}" / "recipe.json", {"seed": seed})
        for stage in ("hybrid", "lasnn"):
            write(tmp_path / f"seed{seed}" / stage / "settings.json", {"seed": seed})
            add_metrics(tmp_path / f"seed{seed}" / stage, ["epoch", "loss", "val_top1"], [[1, 2.0, 20]])
        for stage, top1 in results.items():
            write(tmp_path / f"seed{seed}" / stage / "result.json", {"top1": top1})
    page = Page(report(tmp_path))
    table = page.table("Results on the test data")
    assert table["hybrid (CE only)"]["accuracy, %"] == "51.00 ± 1.41"
    lasnn = table["LaSNN"]
    assert (lasnn["accuracy, %"], lasnn["points over hybrid"]) == ("60.00", "+10.00")
    assert page.table("Cross-entropy, time")["LaSNN"] == {
        "accuracy of seed0, %": "60.00",
        "accuracy of seed1, %": "",
    }
    assert lasnn["not finished; last validation accuracy, %"] == "20.00"
    assert "LaSNN 60" in page.label("Accuracy on the test data")


def test_anns_of_several_networks_have_no_mean(tmp_path, undrawn):
    for name, top1 in (("vgg5", 70.0), ("vgg9", 90.0)):
        write(tmp_path / name / "recipe.json", {"student": name})
        write(tmp_path / name / "ann" / "result.json", {"top1": top1})
        write(tmp_path / name / "lasnn" / "result.json", {"top1": 60.0, "top1_over_time": [10.0, 60.0]})
    assert "ANN" not in Page(report(tmp_path)).label("Accuracy when stopped after t")


def test_every_student_has_a_sheet_of_maps_of_its_own(tmp_path, inspected, undrawn):
    for recipe in ("recipe_with_a_long_name_1", "recipe_with_a_long_name_2"):
        for seed in (0, 1, 2):
            make_run(tmp_path / recipe / f"seed{seed}", inspected, seed, about=recipe)
    report(tmp_path)
    sheets = list((tmp_path / "report_pictures").glob("maps_*.png"))
    assert len(sheets) == 2 * 2  # recipes, hybrid and lasnn; of the seeds the first


def test_the_verdict_is_computed(page, tmp_path, undrawn):
    sentence = (
        "LaSNN reaches 68.75 % accuracy, 3.25 points above hybrid training and 1.50 points below the ANN"
    )
    assert f"{sentence}, with " in page.text
    assert [value for value, _ in page.headline][:2] == ["68.75 %", "+3.25"]
    assert len(page.headline) == 3
    # Wilson: 1.96 / (1 + 0.2401) * sqrt(0.6875 * 0.3125 / 16 + (1.96 / 32)^2) = 20.7 points
    assert "One seed and 16 test samples: an accuracy is known to about ± 20.7 points." in page.text
    for seed, (alone, default) in enumerate([(60.0, 61.0), (61.0, 62.5), (62.0, 63.5)]):
        write(tmp_path / f"seed{seed}" / "recipe.json", {"seed": seed})
        write(tmp_path / f"seed{seed}" / "alone" / "result.json", {"top1": alone})
        write(tmp_path / f"seed{seed}" / "default" / "result.json", {"top1": default})
        write(tmp_path / f"seed{seed}" / "sparse_0.5" / "result.json", {"top1": alone})
    page = Page(report(tmp_path))
    assert "Teacher-default KD reaches 62.33 % accuracy, 1.33 points above the student alone." in page.text
    # 1.3333 -+ 4.3027 * 0.2887 / sqrt(3)
    assert "The best of 2 on these test data. Means of 3 seeds. " in page.text
    assert "The gain's 95 % interval, +0.62 to +2.05 points, excludes 0." in page.text
    assert "sparse-KD, pruned 0.5" in page.source  # no break within the number


def test_the_verdict_of_what_is_not_finished(tmp_path, undrawn):
    write(tmp_path / "settings.json", {"seed": 0})
    add_metrics(tmp_path, ["epoch", "ce", "val_top1"], [[1, 2.0, 30], [2, 1.5, 40]])
    page = Page(report(tmp_path))
    assert "has trained for 2 epochs and reaches 40.00 % validation accuracy; there is no result" in page.text
    assert page.headline == [
        ("2", "epochs done"),
        ("40.00 %", "validation accuracy"),
        ("1.500", "cross-entropy"),
    ]


@pytest.mark.parametrize(("seeds", "rows"), [((0, 0), ["LaSNN (a)", "LaSNN (b)"]), ((0, 1), ["LaSNN"])])
def test_two_runs_of_one_seed_are_not_two_seeds(tmp_path, undrawn, seeds, rows):
    for name, seed in zip("ab", seeds):
        write(tmp_path / name / "recipe.json", {"seed": seed})
        write(tmp_path / name / "lasnn" / "result.json", {"top1": 50.0 + seed})
    page = Page(report(tmp_path))
    assert list(page.table("Results on the test data")) == rows
    assert ("2 seeds" in page.text) == (len(rows) == 1)


def test_titles(tmp_path, undrawn):
    for seed in (0, 1):
        write(
            tmp_path / "digits" / f"seed{seed}" / "recipe.json", {"student": "vgg5", "data": "digits", "T": 8}
        )
        write(tmp_path / "digits" / f"seed{seed}" / "lasnn" / "result.json", {"top1": 50.0})
    assert Page(report(tmp_path / "digits")).text.count("digits") >= 2
    page = Page(report(tmp_path / "digits" / "seed1"))
    assert page.title == "digits, seed 1"
    assert "vgg5 on digits, T = 8" in page.text
    two = report([tmp_path / "digits" / "seed0", tmp_path / "digits" / "seed1"], tmp_path / "two.html")
    assert Page(two).title == "seed0 and seed1"
    assert Page(two).table("Folders")["seed0"] == {"folder": str(tmp_path / "digits" / "seed0")}


def test_students_are_apart_from_the_anns(tmp_path, inspected, undrawn):
    run = make_run(tmp_path / "run", inspected)
    write(run / "ann" / "settings.json", {"seed": 0})
    add_metrics(run / "ann", ["epoch", "loss", "ce", "lr"], [[1, 3.0, 3.0, 0.1], [2, 2.25, 2.25, 0.01]])
    page = Page(report(run))
    of_students, of_anns = (label for label in page.labels if label.startswith("cross-entropy over epoch"))
    assert "LaSNN ends at 1" in of_students
    assert "ANN" not in of_students
    assert of_anns == "cross-entropy over epoch. intermediate ANN ends at 2.25."
    # the ANN's loss is its cross-entropy: one card
    assert sum(label.startswith("training loss") for label in page.labels) == 1
    assert "learning rate over epoch. intermediate ANN ends at 0.01." in page.labels


def test_distances_of_the_maps_by_level(tmp_path, undrawn):
    write(tmp_path / "settings.json", {})
    columns = [
        "epoch",
        "ce",
        "attention",
        "attention_low",
        "attention_high",
        "attention_flat",
        "attention_alpha",
    ]
    add_metrics(tmp_path, columns, [[1, 2, 1, 0.5, 0.9, 1.2, 0.9], [2, 1, 1, 0.4, 0.8, 1.2, 0.0]])
    page = Page(report(tmp_path))
    label = page.label("Distance of the attention maps by level")
    assert "attention low ends at 0.4; attention high ends at 0.8; attention flat ends at 1.2" in label
    assert page.label("weight of the attention loss over epoch")
    assert not any(label.startswith("attention low") for label in page.labels)


def test_samples_have_the_names_of_their_classes(tmp_path, inspected, undrawn):
    run = make_run(tmp_path / "run", inspected)
    found = json.loads((run / "lasnn" / "inspection.json").read_text())
    found["classes"] = ["cat", "dog", "bird", "fish"]
    found["examples"][0] |= {"label": 1, "prediction": 3, "teacher": 0}
    write(run / "lasnn" / "inspection.json", found)
    with np.load(run / "lasnn" / "inspection.npz") as arrays:
        counts = np.array([[4, 0, 0, 0], [0, 1, 0, 3], [0, 0, 4, 0], [1, 0, 0, 3]])
        np.savez(run / "lasnn" / "inspection.npz", **(dict(arrays) | {"confusion": counts}))
    page = Page(report(run))
    assert "✗ dog, taken for fish (teacher: cat)" in page.text
    assert "Most frequent errors: dog taken for fish (3 of 4); fish taken for cat (1 of 4)." in page.text
    assert "class 0" in page.text  # hybrid's inspection has no names
    assert page.label("Confusion matrix of LaSNN: 12 of 16 samples lie on the diagonal.")
    neurons = sum(len(entry["neurons"]) for entry in found["traces"])
    label = page.label("Spikes and potentials of")
    assert label.startswith(
        f"Spikes and potentials of {neurons} neurons of hybrid (CE only) on a sample of class"
    )


def test_layers_that_never_fire_are_named(tmp_path, inspected, undrawn):
    run = make_run(tmp_path / "run", inspected)
    found = json.loads((run / "lasnn" / "inspection.json").read_text())
    found["layers"][1]["spikes_per_neuron"] = 0.0
    write(run / "lasnn" / "inspection.json", found)
    page = Page(report(run))
    assert f"Layers that never fire. LaSNN: {found['layers'][1]['name']}" in " ".join(page.text.split())


ROWS = {"plain training": "CrossEntropy()", "KD + maps": "LabelKD() + Attention('activation')",
        "KD": "LabelKD()"}  # fmt: skip


def make_comparison(folder, judge="test", rows=ROWS, plain=60.0):
    """Two seeds of a comparison with their shared networks; rows are in no order of the alphabet."""
    write(folder / "comparison.json", {})
    about = {"method": "compare", "rows": rows, "baseline": "plain training", "judge": judge}
    write(folder / "config.yaml", json.dumps(about))
    for stage, top1 in (("teacher", 90.0), ("ann", 80.0)):
        write(folder / "shared" / stage / "result.json", {"top1": top1})
    write(folder / "shared" / "recipe.json", {"seed": 0})
    for seed in (0, 1):
        run = folder / f"seed{seed}"
        write(run / "recipe.json", {"seed": seed})
        write(run / "converted" / "weights.safetensors", "x")
        write(run / "start" / "result.json", {"top1": 20.0})
        for name, top1 in (("plain_training", plain), ("KD_maps", 63.0 + 2 * seed), ("KD", 62.0)):
            write(run / name / "result.json", {"top1": top1})
            write(run / name / "objective.json", {"objective": "..."})
    return folder


def test_a_comparison_has_its_shared_networks_and_its_rows_by_name(tmp_path, undrawn):
    make_comparison(tmp_path)
    page = Page(report(tmp_path))
    table = page.table("Results on the test data, mean ± deviation of 2 seeds")
    assert list(table) == ["teacher", "intermediate ANN", "start (not trained)", *ROWS]
    assert table["teacher"]["accuracy, %"] == "90.00"
    assert table["KD + maps"]["accuracy, %"] == "64.00 ± 1.41"
    # half the interval: t = 12.706 for one degree of freedom, deviation 1.414, two seeds
    assert table["KD + maps"]["points over plain training, 95 % interval"] == "+4.00 ± 12.71"
    assert table["KD"]["points over ANN, 95 % interval"] == "-18.00"
    assert "KD + maps reaches 64.00 % accuracy, 4.00 points above plain training" in page.text
    assert "points over plain training, 95 % interval" in page.text
    assert "What is missing" not in page.text


def test_one_seed_of_a_comparison_has_its_rows_names_too(tmp_path, undrawn):
    make_comparison(tmp_path / "study")
    page = Page(report(tmp_path / "study" / "seed1"))
    table = page.table("Results on the test data")
    assert list(table) == ["start (not trained)", *ROWS]
    assert table["KD + maps"]["points over plain training"] == "+5.00"
    assert page.title == "study, seed 1"


def test_a_comparison_on_validation_images_does_not_say_test(tmp_path, undrawn):
    make_comparison(tmp_path, judge="validation")
    page = Page(report(tmp_path))
    assert page.table("Results on the validation data, mean ± deviation of 2 seeds")
    assert "The best of 2 on these validation data." in page.text
    assert "test data" not in page.text


def test_a_comparison_with_a_damaged_configuration_has_its_folders_names(tmp_path, undrawn):
    make_comparison(tmp_path)
    (tmp_path / "config.yaml").write_text("rows: [")
    page = Page(report(tmp_path))
    assert "KD_maps" in page.table("Results on the test data, mean ± deviation of 2 seeds")
    assert "config.yaml is damaged" in page.text


def test_maps_without_a_teacher_are_not_said_to_share_a_scale(tmp_path, inspected, undrawn):
    shutil.copy(inspected / "inspection.json", tmp_path)
    shutil.copy(inspected / "inspection.npz", tmp_path)
    assert "Both maps of a level share one scale" in Page(report(tmp_path)).text
    with np.load(inspected / "inspection.npz") as arrays:
        kept = {name: array for name, array in arrays.items() if not name.startswith("teacher_")}
    np.savez(tmp_path / "inspection.npz", **kept)
    page = Page(report(tmp_path))
    assert "Each map has a scale of its own." in page.text
    assert "Both maps" not in page.text


def test_a_study_has_its_rows_in_order(tmp_path, undrawn):
    write(tmp_path / "recipe.json", {"student": "spiking_resnet18", "seed": 0})
    for row, top1 in (("default", 40.0), ("sparse_0.5", 38.0), ("alone", 39.0), ("sparse_0", 37.5)):
        write(tmp_path / row / "result.json", {"top1": top1, "loss": 1.5, "teacher_top1": 30})
    table = Page(report(tmp_path)).table("Results on the test data")
    assert [(name, row["points over student alone"]) for name, row in table.items()] == [
        ("student alone", ""), ("self-KD (teacher not pruned)", "-1.50"), ("sparse-KD, pruned 0.5", "-1.00"),
        ("teacher-default KD", "+1.00"),
    ]  # fmt: skip


def test_a_path_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(NotADirectoryError, match="nothing_here does not exist"):
        report(tmp_path / "nothing_here")
    (tmp_path / "a_file").touch()
    with pytest.raises(NotADirectoryError, match="a_file is a file"):
        report([tmp_path, tmp_path / "a_file"])
    with pytest.raises(ValueError, match="at least one run folder"):
        report([])
    with pytest.raises(
        ValueError, match="out must be the page to write, such as .*report.html, got a folder"
    ):
        report(tmp_path, tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty" / "deeper").mkdir(parents=True)
    with pytest.raises(ValueError, match="empty holds no run: none of settings.json, .* give the run_dir"):
        report(tmp_path / "empty")
    assert not (tmp_path / "empty" / "report.html").exists()
    write(tmp_path / "run" / "result.json", {"top1": 50.0})
    with pytest.raises(ValueError, match="empty holds no run"):
        report([tmp_path / "run", tmp_path / "empty"])


def test_an_unfinished_run_says_what_is_missing(tmp_path, undrawn):
    write(tmp_path / "recipe.json", RECIPE)
    write(tmp_path / "ann" / "result.json", {"top1": 70.25})
    write(tmp_path / "hybrid" / "settings.json", {"seed": 0})
    add_metrics(tmp_path / "hybrid", ["epoch", "loss"], [[1, 2.0], [2, 1.5]])
    (tmp_path / "lasnn").mkdir()
    write(tmp_path / "label_kd" / "settings.json", {"seed": 0})
    (tmp_path / "label_kd" / "steps.csv").write_text(
        "step,epoch,lr,loss,kd\n1,1,0.1,3,2\n2,1,0.1,2.5,1.5\n3,1,0."
    )
    page = Page(report(tmp_path))
    assert "hybrid/result.json is missing: hybrid is not finished, 2 epochs are done" in page.text
    assert "lasnn/result.json is missing: lasnn is not finished, it has not begun" in page.text
    assert "label_kd/metrics.csv is missing: no epoch is finished" in page.text
    assert "label_kd/steps.csv is damaged or cut off in line 4" in page.text
    assert "label distillation ends at 2.5" in page.label("training loss over step")
    assert "inspection.json is missing in hybrid:" in page.text
    assert page.table("Results on the test data")["intermediate ANN"]["accuracy, %"] == "70.25"
    assert "hybrid (CE only) ends at 1.5" in page.label("training loss")


def test_long_curves_are_thinned_and_keep_their_end(tmp_path):
    write(tmp_path / "settings.json", {})
    rows = "".join(f"{n},1,{1 / n}\n" for n in range(1, 30_001))
    (tmp_path / "steps.csv").write_text("step,epoch,loss\n" + rows)
    made = report(tmp_path)
    assert f"ends at {1 / 30_000:.4g}" in Page(made).label("training loss")
    assert made.stat().st_size < 100_000


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path, inspected, undrawn):
    run = make_run(tmp_path / "run", inspected)
    whole = (run / "hybrid" / "result.json").read_text()
    write(run / "hybrid" / "result.json", whole[: len(whole) // 2])
    write(run / "teacher" / "result.json", [1, 2])
    (run / "ann" / "result.json").write_bytes(b"\xff\xfe\x00")
    (run / "hybrid" / "metrics.csv").write_text("epoch,loss,ce\n1,2.5,2.0\n2,1.5,1.0\n3,1.")
    archive = bytearray((run / "lasnn" / "inspection.npz").read_bytes())
    with np.load(run / "lasnn" / "inspection.npz") as arrays:
        names = arrays.files
    start = archive.index(b"student_0.npy") + 60
    archive[start : start + 40] = bytes(40)  # one of its arrays
    (run / "lasnn" / "inspection.npz").write_bytes(archive)
    half = (run / "hybrid" / "inspection.npz").read_bytes()
    (run / "hybrid" / "inspection.npz").write_bytes(half[: len(half) // 2])
    page = Page(report(run))
    for name in ("hybrid/result.json", "teacher/result.json", "hybrid/inspection.npz"):
        assert f"{name} is damaged: " in page.text
    assert "ann/result.json cannot be read: " in page.text
    assert "hybrid/metrics.csv is damaged or cut off in line 4" in page.text
    assert "lasnn/inspection.npz is damaged in student_0" in page.text
    assert "hybrid (CE only) ends at 1.5" in page.label("training loss")
    assert page.table("Results on the test data")["LaSNN"]["accuracy, %"] == "68.75"
    maps = [name for name in names if name.partition("_")[2].isdigit()]
    assert len(page.images) == 4 * len(maps)  # the inputs, and all maps of lasnn's but the damaged one


@pytest.mark.parametrize(
    "text", ["", "loss,ce\n1,2\n", "epoch,loss\n", 'epoch,"loss\n1,2', "epoch,loss\n\0\n"]
)
def test_metrics_of_no_use(tmp_path, text, undrawn):
    write(tmp_path / "settings.json", {})
    (tmp_path / "metrics.csv").write_text(text)
    page = Page(report(tmp_path))
    assert not page.labels
    assert "metrics.csv is damaged" in page.text or "metrics.csv holds no finished epoch" in page.text


def test_numbers_that_are_not_finite_are_named(tmp_path, undrawn):
    write(tmp_path / "settings.json", {})
    add_metrics(tmp_path, ["epoch", "loss", "top1", "val_top1"], [[1, 2.0, 50, ""], [2, "nan", 10, 40]])
    write(tmp_path / "result.json", {"top1": 40.0, "loss": float("inf")})
    page = Page(report(tmp_path))
    assert "metrics.csv: loss is not finite in epoch 2" in page.text
    assert "val_top1 is not finite" not in page.text  # it was not measured
    assert "result.json holds 1 numbers that are not finite, Infinity first" in page.text


JUNK = [None, "x", [], {}, [1, "a"], [{}], float("nan"), [float("inf")] * 4, True]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_an_older_or_strange_inspection_is_survived(tmp_path, inspected, junk, undrawn):
    """Every entry in turn is something else; entries of entries too."""
    found = json.loads((inspected / "inspection.json").read_text())
    for key in found:
        write(tmp_path / key / "inspection.json", found | {key: junk, "format": 0})
        write(tmp_path / key / "result.json", {key: junk, "top1": junk, "spikes": junk, "loss": 1.0})
    for key in ("layers", "examples", "levels", "traces"):
        for inner in found[key][0]:
            broken = [entry | {inner: junk} for entry in found[key]]
            write(tmp_path / f"{key}_{inner}" / "inspection.json", found | {key: broken})
    for inner in found["operations"]:
        broken = found | {"operations": found["operations"] | {inner: junk}}
        write(tmp_path / f"operations_{inner}" / "inspection.json", broken)
    for folder in tmp_path.iterdir():
        shutil.copy(inspected / "inspection.npz", folder)
    page = Page(report(tmp_path))
    assert "layers/inspection.json has format 0, this report reads 1" in page.text
    assert "operations/inspection.json has no usable operations" in page.text


@pytest.mark.parametrize(
    "odd",
    [
        {"inputs": np.zeros((4, 0, 16, 3), np.uint8)},
        {"inputs": np.zeros((4, 16, 16, 3))},
        {"inputs": np.zeros((4, 16, 16), np.uint8)},
        {"student_0": np.zeros((4, 0, 0), np.float32), "teacher_0": np.zeros((4, 4), np.float32)},
        {"student_0": np.full((4, 2, 2), np.nan, np.float32), "teacher_0": np.zeros((4, 2, 2), np.int64)},
        {"student_0": np.zeros((1, 2, 2), np.float32)},
        {"student_0": np.array([{}] * 4, dtype=object)},
        {"confusion": np.zeros((2, 3), np.int32), "trace_spikes": np.zeros((4, 0), np.uint8)},
        {"confusion": np.full((4, 4), -1), "trace_potentials": np.zeros((4, 2, 2), np.float32)},
        {"confusion": np.full((4, 4), 0.5), "trace_spikes": np.ones((4, 3), np.uint8)},
    ],
    ids=lambda odd: ", ".join(f"{name} {array.dtype}{array.shape}" for name, array in odd.items()),
)
def test_strange_arrays_are_left_out(tmp_path, inspected, undrawn, odd):
    shutil.copy(inspected / "inspection.json", tmp_path)
    with np.load(inspected / "inspection.npz") as arrays:
        np.savez(tmp_path / "inspection.npz", **(dict(arrays) | odd))
    page = Page(report(tmp_path))
    shown = len(page.images) // 4
    nan = "student_0" in odd and odd["student_0"].dtype == np.float32 and np.isnan(odd["student_0"]).any()
    maps = sum("_0" in name for name in odd)
    assert shown == (0 if "inputs" in odd else 7 - maps + nan)
    for name, start in (("confusion", "Confusion matrix"), ("trace_", "Spikes and potentials")):
        drawn = any(label.startswith(start) for label in page.labels)
        assert drawn == (not any(key.startswith(name) for key in odd))


def test_values_that_no_float_or_file_can_hold(tmp_path, undrawn):
    write(tmp_path / "a" / "result.json", '{"top1": 1' + 400 * "0" + ', "loss": 1.5}')
    write(tmp_path / "b" / "result.json", '{"top1": 50, "loss": "\\ud800"}')
    page = Page(report(tmp_path))
    assert page.text.count("b/result.json is damaged") == 1
    assert not page.labels


def test_nothing_from_files_becomes_markup(tmp_path, inspected):
    evil = '<script>alert("1")</script>&$\\frac{'
    run = tmp_path / "<script>alert(1)<b>$x$"
    found = json.loads((inspected / "inspection.json").read_text())
    found["layers"][0]["name"] = found["levels"][0]["student"] = found["missing"] = evil
    found["examples"][0]["label"] = evil
    found["environment"]["command"] = evil
    write(run / "recipe.json", {evil: evil})
    write(run / "_lasnn<i>" / "inspection.json", found)
    shutil.copy(inspected / "inspection.npz", run / "_lasnn<i>")
    write(run / "_lasnn<i>" / "result.json", {"top1": 1.0, "top1_over_time": evil})
    write(run / "_lasnn<i>" / "settings.json", {evil: [evil]})
    add_metrics(run / "_lasnn<i>", ["epoch", evil, "loss"], [[1, 2, 3], [2, 3, 4]])
    (run / "config.yaml").write_text(evil)
    page = Page(report(run))
    assert not page.tags & {"script", "b", "i"}
    assert page.text.count(evil) >= 5
    assert "<script>" not in page.source.replace("&lt;script&gt;", "")
    assert all(path.parent == run / "report_pictures" for path in run.rglob("*.png"))


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [375, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_draws_all_of_it(finished, page, tmp_path, width, scheme):
    chromium = browser.Browser(tmp_path)
    try:
        chromium.open(finished[1], width, scheme)
        bad = (
            "Runtime.exceptionThrown",
            "Runtime.consoleAPICalled",
            "Log.entryAdded",
            "Network.loadingFailed",
        )
        assert [event for event in chromium.events if event.get("method") in bad] == []
        asked = [e["params"]["request"]["url"] for e in chromium.events
                 if e.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        assert [url for url in asked if not url.startswith("data:")] == [finished[1].as_uri()]
        chromium.value("document.querySelectorAll('details').forEach(d => d.open = true)")
        drawn = "[...document.images].filter(i => i.complete && i.naturalWidth > 0 && i.width > 40).length"
        assert chromium.value(drawn) == len(page.images) > 0
        sizes = "[...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().width)"
        assert len(chromium.value(sizes)) == len(page.labels)
        assert all(width >= 250 for width in chromium.value(sizes))
        # nothing is wider than the window; what is lies in a box that scrolls
        assert chromium.value("document.documentElement.scrollWidth") == width
        boxes = "[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect())"
        assert chromium.value(f"Math.min(...{boxes}.map(b => Math.max(b.width, b.height)))") >= 11
        if width == 375:  # names that wrap begin below each other
            name = "getComputedStyle(document.querySelector('.stack td'), '::before').textAlign"
            assert chromium.value(name) == "left"
        page_colour = chromium.value("getComputedStyle(document.body).backgroundColor")
        assert page_colour == {"light": "rgb(255, 255, 255)", "dark": "rgb(16, 22, 28)"}[scheme]
        text = chromium.value("getComputedStyle(document.querySelector('svg text')).fill")
        assert text == {"light": "rgb(27, 39, 51)", "dark": "rgb(230, 235, 240)"}[scheme]
    finally:
        chromium.close()


@pytest.mark.parametrize("what", ["pictures", "page"])
def test_nothing_is_written_through_a_link(inspected, tmp_path, undrawn, what):
    run, outside = make_run(tmp_path / "run", inspected), tmp_path / "outside"
    if what == "pictures":
        outside.mkdir()
        (run / "report_pictures").symlink_to(outside)
        with pytest.raises(ValueError, match="report_pictures is a link to .*outside"):
            report(run)
        assert not list(outside.iterdir())
    else:
        outside.write_text("precious")
        (run / "report.html").symlink_to(outside)
        report(run)
        assert outside.read_text() == "precious"


def test_pipes_and_archives_that_unpack_to_too_much_are_named(inspected, tmp_path, undrawn):
    """A pipe would be waited for; a few kilobytes would take 257 MiB."""
    run = make_run(tmp_path / "run", inspected)
    for name in ("metrics.csv", "settings.json"):
        (run / "hybrid" / name).unlink()
        os.mkfifo(run / "hybrid" / name)
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        head, {"descr": "|u1", "fortran_order": False, "shape": (257 * 2**20,)}
    )
    with zipfile.ZipFile(run / "lasnn" / "inspection.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("inputs.npy", "w") as file:
            file.write(head.getvalue())
            for _ in range(257):
                file.write(bytes(2**20))
    tracemalloc.start()
    page = report(run).read_text()
    assert tracemalloc.get_traced_memory()[1] < 2**27
    tracemalloc.stop()
    for name in ("hybrid/metrics.csv", "hybrid/settings.json"):
        assert f"{name} cannot be read" in page
    assert "lasnn/inspection.npz is damaged in inputs" in page
