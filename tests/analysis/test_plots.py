"""Figures show the numbers that they are given, and stay readable."""

import io

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from lasnn_sj.analysis import Traces, plots
from lasnn_sj.analysis.style import interval, layer_labels

HISTORY = [
    {
        "epoch": e,
        "ce": ce,
        "top1": top1,
        "lr": lr,
        "seconds": 3.0,
        "attention_low": low,
        "attention_flat": 0.6,
    }
    for e, ce, top1, lr, low in ((1, 2.0, 40.0, 0.1, 0.5), (2, 1.0, 60.0, 0.001, 0.25))
]
OTHER = [row | {"ce": row["ce"] + 1} for row in HISTORY]


def lines(axes):
    return {line.get_label(): line.get_xydata().tolist() for line in axes.lines}


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_training_curves():
    figure = plots.training_curves(HISTORY)
    assert isinstance(figure, Figure)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "cross-entropy",
        "training accuracy, %",
        "learning rate",
    ]
    assert figure.axes[0].lines[0].get_xydata().tolist() == [[1, 2], [2, 1]]
    assert [axes.get_yscale() for axes in figure.axes] == ["linear", "linear", "log"]
    assert not figure.legends
    (axes,) = plots.training_curves({"a": HISTORY, "none": [], "b": [HISTORY, OTHER]}, ["ce"]).axes
    assert lines(axes) == {"a": [[1, 2], [2, 1]], "b": [[1, 2.5], [2, 1.5]]}  # the mean of two seeds
    assert axes.lines[1].get_color() == plots.SERIES[2]  # the second is absent and keeps its colour
    low, high = (path.vertices[:, 1] for path in [axes.collections[0].get_paths()[0]] * 2)
    assert (low.min(), high.max()) == (1, 3)
    with pytest.raises(ValueError, match=r"must hold rows with \['kd'\], got columns \['epoch', 'ce'"):
        plots.training_curves(HISTORY, ["kd"])
    with pytest.raises(ValueError, match="got columns"):
        plots.training_curves([])


def test_what_hardly_changes_is_not_magnified():
    rows = [{"epoch": e, "ce": 2.3025 + 1e-6 * e, "top1": 10 + 0.01 * e} for e in range(5)]
    figure = plots.training_curves(rows)
    figure.canvas.draw()
    for axes, least in zip(figure.axes, (0.23, 5)):
        low, high = axes.get_ylim()
        assert high - low >= least
        assert axes.yaxis.get_offset_text().get_text() == ""
    assert (
        plots.training_curves([{"epoch": 1, "top1": 99.5}, {"epoch": 2, "top1": 99.6}]).axes[0].get_ylim()[1]
        < 101
    )


def test_distances_of_maps():
    (axes,) = plots.map_distances([row | {"attention_high": 0.5} for row in HISTORY]).axes
    drawn = lines(axes)
    assert drawn["low"] == [[1, 0.5], [2, 0.25]]
    assert drawn["high"] == [[1, 0.5], [2, 0.5]]
    assert drawn["sum"] == [[1, 1.0], [2, 0.75]]
    assert drawn["sum, flat maps"] == [[1, 0.6], [2, 0.6]]
    with pytest.raises(ValueError, match="must hold distances of attention maps by level"):
        plots.map_distances([{"epoch": 1, "ce": 2.0}])


def test_accuracy_over_time_and_energy():
    (axes,) = plots.accuracy_over_time({"a": [10, 50.0]}, ann_top1=90).axes
    assert lines(axes)["a"] == [[1, 10], [2, 50]]
    assert lines(axes)["ANN"][0][1] == 90
    (axes,) = plots.accuracy_over_energy({"a": [10, 50.0]}, {"a": [2e3, 4e6]}, ann_energy_pj=8e6).axes
    assert lines(axes)["a"] == [[0.002, 10], [4, 50]]
    assert axes.get_xlabel() == "energy per sample, µJ"
    assert lines(axes)["energy of the ANN"][0][0] == 8
    assert axes.get_xscale() == "log"


def test_early_exit():
    (axes,) = plots.early_exit({"a": [[(1.0, 10.0), (2.5, 50.0)]], "none": []}).axes
    assert lines(axes) == {"a": [[1, 10], [2.5, 50]]}
    assert axes.get_xlabel() == "mean time steps used"
    two = [[(1.0, 10.0), (2.0, 50.0)], [(1.0, 20.0), (3.0, 60.0)]]
    (axes,) = plots.early_exit({"a": two}).axes
    assert lines(axes)["a"] == [[1, 15], [2.5, 55]]


def test_bars_have_their_values_and_intervals():
    (axes,) = plots.gains({"KD": [1.0, 2.0, 3.0], "none": [], "one": -1.5}, over="hybrid").axes
    assert [bar.get_width() for bar in axes.patches] == [2, -1.5]
    half = 4.302653 / 3**0.5  # Student's t of two degrees of freedom, deviation 1
    assert texts(axes) == [f"+2.00 ± {half:.2f}", "-1.50"]
    (segment,) = axes.collections[0].get_segments()
    assert segment[:, 0] == pytest.approx([2 - half, 2 + half], rel=1e-5)
    assert axes.get_xlabel() == "points over hybrid,\n95 % interval"
    (axes,) = plots.accuracies({"a": 91.234}, intervals={"a": (90.0, 92.0)}).axes
    assert texts(axes) == ["91.23 ± 1.00"]
    assert max(axes.get_xticks()) == 100
    assert texts(plots.accuracies({"a": [90.0, 92.0]}).axes[0]) == ["91.00 ± 1.41"]  # sample deviation
    with pytest.raises(ValueError, match="values by method are needed"):
        plots.gains({"a": []})


def test_the_interval_by_hand():
    assert interval([5.0]) is None
    assert interval([1.0, 2.0]) == pytest.approx((1.5 - 12.7062 * 0.5, 1.5 + 12.7062 * 0.5), rel=1e-4)


def test_spikes_per_layer():
    (axes,) = plots.spikes_per_layer({"a": {"f.0.neuron": 0.5, "f.1.neuron": 0.0}}).axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["f.0", "f.1"]
    assert [tick.get_color() for tick in axes.get_yticklabels()] == [plots.INK, plots.BAD]
    assert texts(axes) == ["0.5", "never fires"]
    assert [line.get_color() for line in axes.lines] == [plots.BAD]
    many = {label: {f"layer{n}.neuron": 0.1 * n for n in range(20)} for label in "abc"}
    (axes,) = plots.spikes_per_layer(many).axes  # dots, with one line of text for what never fires
    assert texts(axes) == ["never fires"] * 3
    assert lines(axes)["b"][5] == [pytest.approx(0.5), 5]


def test_labels_of_layers():
    assert layer_labels(["blocks.0.neuron1", "stem.2"]) == ["blocks.0.neuron1", "stem.2"]
    assert layer_labels(["a.0.spikes.neuron", "a.1.spikes.neuron"]) == ["a.0", "a.1"]
    assert layer_labels(["x" * 50, "y"]) == ["x" * 11 + "…" + "x" * 11, "y"]


def test_a_raster():
    spikes = torch.tensor([[1, 0], [0, 0], [1, 1]], dtype=torch.bool)
    v = torch.tensor([[2.0, 0.0], [1.0, 0.5], [3.0, 2.5]])
    traces = Traces({"a.neuron": spikes, "b.neuron": ~spikes}, {"a.neuron": v, "b.neuron": v},
                    {"a.neuron": [0, 7], "b.neuron": [1, 2]}, {"a.neuron": 2.0, "b.neuron": 0.5})  # fmt: skip
    raster, below = plots.spike_raster(traces).axes
    events = [collection.get_positions() for collection in raster.collections]
    assert [list(times) for times in events] == [[1, 3], [3], [2], [1, 2]]
    assert lines(below)["a"] == [
        [1, 1.0],
        [2, 0.5],
        [3, 1.5],
    ]  # of the one with two spikes
    assert lines(below)["b"] == [[1, 0.0], [2, 1.0], [3, 5.0]]
    assert below.get_ylabel() == "potential / threshold"
    assert len(plots.spike_raster(traces, layers=["b.neuron"]).axes[0].collections) == 2
    with pytest.raises(ValueError, match="layers must be among a.neuron, b.neuron, got c"):
        plots.spike_raster(traces, layers=["c"])


def test_a_confusion_matrix():
    (axes,) = plots.confusion_matrix(np.array([[3, 1], [0, 4]]), ["cat", "dog"]).axes
    assert texts(axes) == ["3", "1", "4"]
    np.testing.assert_allclose(axes.images[0].get_array()[..., 3], 0.75 * np.array([[0.75, 0.25], [0, 1]]))
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["cat", "dog"]
    assert texts(plots.confusion_matrix(np.eye(50, dtype=int)).axes[0]) == []
    with pytest.raises(ValueError, match=r"counts must be \[K, K\], got shape \(2, 3\)"):
        plots.confusion_matrix(np.zeros((2, 3)))
    with pytest.raises(ValueError, match="classes must be 2 names, one for each row of counts, got 1"):
        plots.confusion_matrix(np.eye(2), ["cat"])


def test_attention_maps():
    inputs = np.zeros((2, 8, 8, 3), np.uint8)
    teacher = np.zeros((2, 2, 2))
    teacher[:, 0, 0] = 1.0  # root mean square 1/2: 2 at its highest
    student = np.ones((2, 1, 1))
    figure = plots.attention_maps(
        inputs, [teacher, None], [student, student], samples=["a", "b"], levels=["x", "y"]
    )
    axes, bar = figure.axes
    heads = [tick.get_text() for tick in axes.get_xticklabels()]
    assert heads == ["input", "teacher\nx", "student\nx", "student\ny"]
    pixels = axes.images[0].get_array()
    yellow, dark, half = [253, 231, 37], [68, 1, 84], [33, 145, 140]
    assert pixels[0, 70, :3].tolist() == yellow
    assert pixels[63, 70, :3].tolist() == dark
    np.testing.assert_allclose(pixels[10, 150, :3].astype(int), half, atol=1)  # 1 of 2
    assert pixels[10, 220, :3].tolist() == yellow  # alone in its level
    assert [tick.get_text() for tick in bar.get_yticklabels()] == ["0", "highest"]


def test_names_of_layers_above_attention_maps_do_not_overlap():
    maps = [np.ones((2, 4, 4))] * 2
    layers = ["features.0.neuron", "classifier.blocks.12.neuron"]
    figure = plots.attention_maps(np.zeros((2, 8, 8, 3), np.uint8), maps, maps, levels=layers)
    figure.canvas.draw()
    boxes = [tick.get_window_extent() for tick in figure.axes[0].get_xticklabels()]
    assert len(boxes) == 5
    assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_a_notebook_shows_a_figure_as_a_picture():
    picture = plots.training_curves(HISTORY)._repr_png_()
    with Image.open(io.BytesIO(picture)) as image:
        assert image.format == "PNG"
        assert len(image.convert("L").getcolors()) > 10


@pytest.mark.parametrize("label", ["_hidden", "a$x$", "long " * 30])
def test_labels_are_shown_as_they_are(label):
    figure = plots.training_curves({label: HISTORY}, ["ce"])
    figure.canvas.draw()
    (text,) = (text.get_text() for text in figure.legends[0].get_texts())
    assert text.replace("\u200b", "").replace("\\", "")[:5] == label[:5]
    assert len(text) <= 46
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0
    assert box.x1 <= figure.bbox.x1
