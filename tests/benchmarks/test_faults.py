"""Runs with faults at calls that change a file; `make soak` tries thousands."""

import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import faults
from faults import Outcome, content, difference, refused


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and cc")
def test_a_sample_of_faults_loses_nothing():
    rows = faults.attack(kills=8, others=4, subjects={"trainer": 1})
    assert [row["fault"] for row in rows] == list(faults.FAULTS)
    assert [row["trials"] for row in rows] == [4, 4, 1, 1, 1, 1, 4, 2, 2, 4]
    assert [row["struck"] for row in rows] == [row["trials"] for row in rows]
    assert [lost for row in rows for lost in row["lost"]] == []
    assert rows[0]["calls"] > 50


def test_trials_are_spread_over_the_whole_run():
    trials = faults.planned(1000, 300, faults.SUBJECTS, seed=0)
    assert len(trials) == 1000 + 300 + 3 * 300
    assert {subject for subject, _, _ in trials} == set(faults.SUBJECTS)
    places = [place for subject, fault, place in trials if (subject, fault) == ("trainer", "kill")]
    assert sorted(int(place * len(places)) for place in places) == list(range(250))


@pytest.mark.parametrize(("end", "fault", "fine"), [
    ("SIGKILL", "kill", True),
    ("done", "EIO", True),
    ("OSError: [Errno 5] Input/output error: '/run/steps.csv'", "EIO", True),
    ("foreign OSError: [Errno 5] Input/output error", "EIO", False),
    ("SIGALRM", "no space", False),
    ("", "no space", False),
    ("OSError: [Errno 28] No space left on device: '/run/a'", "short write", False),
    ("KeyboardInterrupt", "SIGINT twice", True),
    ("foreign ValueError: x", "SIGTERM", False),
])  # fmt: skip
def test_what_a_fault_may_end_in(end, fault, fine):
    assert (refused(Outcome(end, 9, "write /run/a"), fault) is None) == fine


def test_what_is_lost_is_named(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, seconds, loss in ((one, 1, 0.5), (other, 2, 0.25)):
        (folder / "checkpoints" / "00000002").mkdir(parents=True)
        (folder / "checkpoints" / "00000002" / "student.safetensors").write_bytes(b"abc")
        (folder / "result.json").write_text(f'{{"seconds": {seconds}, "top1": 50}}')
        (folder / "metrics.csv").write_text(f"epoch,seconds,loss\n1,{seconds},{loss}\n")
        (folder / "table.md").write_text(f"| row | s/epoch |\n| --- | --- |\n| a | {seconds} |\n")
    (one / "checkpoints" / "00000001").mkdir()
    (one / "checkpoints" / "00000001" / "student.safetensors").write_bytes(b"older")
    assert difference(content(one), content(other)).startswith("metrics.csv: other content (")
    (other / "metrics.csv").write_text("epoch,seconds,loss\n1,7,0.5\n")
    assert difference(content(one), content(other)) is None
    (other / ".a.x.part").touch()
    (other / "checkpoints" / "00000002" / "student.safetensors").write_bytes(b"abd")
    assert difference(content(one), content(other)) == (
        ".a.x.part: too many; checkpoints/newest/student.safetensors: other content"
    )
