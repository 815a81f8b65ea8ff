"""The tutorial notebook runs from its first cell to its last, the student learns, the figures are shown."""

import base64
import io
import os
import re
from pathlib import Path

import nbclient
import nbformat
import numpy as np
import pytest
from PIL import Image

TUTORIAL = Path(__file__).parents[1] / "examples" / "tutorial.ipynb"
FIGURES = 7


def figures(notebook):
    """The pictures in the outputs of a notebook, as arrays."""
    data = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    pngs = [one["image/png"] for one in data if "image/png" in one]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in pngs]


def printed(notebook):
    """The text that the cells of a notebook wrote, by stream."""
    streams = {"stdout": "", "stderr": ""}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                streams[output.name] += output.text
    return streams


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after a run without ipywidgets, and the folder it ran in."""
    folder = tmp_path_factory.mktemp("notebook")
    (folder / "ipywidgets.py").write_text("raise ImportError('not installed')\n")
    notebook = nbformat.read(TUTORIAL, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    path = os.pathsep.join([str(folder), str(TUTORIAL.parents[1])])
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )  # fmt: skip
    client.execute(env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    return notebook, folder


def test_the_student_of_the_tutorial_learns(executed):
    text = printed(executed[0])["stdout"]
    top1 = {name: float(value) for name, value in re.findall(r"^(\w+): ([\d.]+) % of the test", text, re.M)}
    assert list(top1) == ["converted", "calibrated", "hybrid", "LaSNN"]
    assert top1["LaSNN"] > 85  # chance is 10
    assert top1["LaSNN"] > top1["converted"] + 5


def test_the_figures_of_the_tutorial_are_shown(executed):
    shown = figures(executed[0])
    assert len(shown) == FIGURES
    for picture in shown:
        assert min(picture.shape) > 150
        assert 0.005 < (picture < 200).mean() < 0.9  # something is drawn, on white


def test_progress_bars_show_in_a_notebook_without_widgets(executed):
    streams = printed(executed[0])
    assert len(re.findall(r"^epoch (\d+)/\1: 100%\|█+\| ", streams["stdout"], re.M)) == 4
    assert "attention=" in streams["stdout"]
    assert "attention_alpha" not in streams["stdout"]  # logged, too long for a bar
    assert streams["stderr"] == ""


def test_the_tutorial_writes_a_run_that_a_report_reads(executed):
    found = {path.name for path in (executed[1] / "runs" / "tutorial").iterdir()}
    assert {"metrics.csv", "inspection.json"} <= found


def test_the_committed_notebook_is_small_and_shows_its_figures():
    notebook = nbformat.read(TUTORIAL, as_version=4)
    nbformat.validate(notebook)
    assert TUTORIAL.stat().st_size < 300_000
    assert len(figures(notebook)) == FIGURES
    assert printed(notebook)["stderr"] == ""
