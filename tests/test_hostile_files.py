"""Files made to do harm, or damaged anyhow: a message of a documented kind, nothing written, memory bounded.

``HOSTILE_EXAMPLES`` sets how many files of each kind are tried; ``make soak`` tries more.
"""

import csv
import hashlib
import io
import json
import logging
import os
import shutil
import struct
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lasnn_sj import DirectEncoder, models
from lasnn_sj.analysis.report import reading
from lasnn_sj.data import images as data
from lasnn_sj.data.archives import ArchiveError, read_npz
from lasnn_sj.runtime import files, locks
from lasnn_sj.training import checkpoint
from lasnn_sj.training.checkpoint import CheckpointError
from lasnn_sj.training.run_folder import RunFolder
from lasnn_sj.training.state import Progress

EXAMPLES = int(os.environ.get("HOSTILE_EXAMPLES", "20"))
LIMIT = 64 << 20  # bytes that a file of some kilobytes may make us take
many = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@st.composite
def damaged(draw, valid):
    """A valid file, cut, overwritten, with something put in, or something else altogether."""
    kind = draw(st.sampled_from(["cut", "overwrite", "insert", "number", "other", "twice"]))
    at = draw(st.integers(0, len(valid)))
    if kind == "cut":
        return valid[:at]
    if kind == "overwrite":
        new = draw(st.binary(min_size=1, max_size=8))
        return valid[:at] + new + valid[at + len(new) :]
    if kind == "insert":
        return valid[:at] + draw(st.binary(min_size=1, max_size=64)) + valid[at:]
    if kind == "number":  # sizes and offsets are little-endian numbers
        new = draw(st.sampled_from([0, 1, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1]))
        return valid[:at] + struct.pack("<Q", new) + valid[at + 8 :]
    if kind == "twice":
        return valid + valid[at:]
    return draw(st.binary(max_size=256))


class Watched:
    """A folder of its own, left as it was, in bounded memory."""

    def __init__(self):
        self.base = Path(tempfile.mkdtemp())
        self.folder = self.base / "inside"
        self.folder.mkdir()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        try:
            if exception[0] is None:
                assert [path.name for path in self.base.iterdir()] == ["inside"]
        finally:
            shutil.rmtree(self.base)

    def call(self, what, *arguments, refuses):
        """Return the call's result, or the message of an error of a documented kind."""
        before = sorted(self.folder.rglob("*"))
        here = sorted(Path.cwd().iterdir())
        tracemalloc.start()
        try:
            result = what(*arguments)
        except refuses as error:
            result = error
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < LIMIT
        assert not isinstance(result, Exception) or len(str(result)) > 20
        assert before == sorted(self.folder.rglob("*"))
        assert here == sorted(Path.cwd().iterdir())
        return result


# ---- .npz ----


def npz(compressed=False, **changes):
    random = np.random.default_rng(0)
    arrays = {
        "x_train": random.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8), "y_train": np.arange(4),
        "x_test": random.integers(0, 256, (2, 8, 8, 1), dtype=np.uint8), "y_test": np.arange(2),
    } | changes  # fmt: skip
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays)
    return buffer.getvalue()


@many
@given(st.data(), st.booleans())
def test_npz_files(draw, compressed):
    content = draw.draw(damaged(npz(compressed)))
    with Watched() as watched:
        path = watched.folder / "images.npz"
        path.write_bytes(content)
        result = watched.call(data.load, path, refuses=(ValueError, FileNotFoundError))
        if not isinstance(result, Exception):
            assert result.train[0][0].shape == (1, 8, 8)


shapes = st.lists(st.integers(0, 5), max_size=5).map(tuple)
dtypes = st.sampled_from(["u1", "i8", "f4", "c16", "S3", "U2", "M8[s]", "b1", [("a", "i4"), ("b", "u1")]])


@many
@given(st.sampled_from(["x_train", "y_train", "x_test", "y_test"]), shapes, dtypes)
def test_npz_arrays_of_any_shape_and_type(name, shape, dtype):
    with Watched() as watched:
        path = watched.folder / "images.npz"
        path.write_bytes(npz(**{name: np.zeros(shape, dtype)}))
        watched.call(data.load, path, refuses=ValueError)


def header(shape, dtype="|u1", version=(1, 0)):
    text = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text


def archive(path, entries, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in entries.items():
            file.writestr(name, content)


@pytest.mark.parametrize(
    "head",
    [
        header((2**40, 8, 8, 1)), header((2**62, 4)), header((-1, 8)), header((2**31, 2**31, 2**31)),
        header((1,), "|V1099511627776"), header((3,), "|O"), header((True, 2)),
        header((1,)).replace(b"(1,)", b"9**9"), header((1,), version=(9, 0)),
    ],
)  # fmt: skip
def test_a_header_that_declares_more_than_there_is(tmp_path, head):
    archive(tmp_path / "huge.npz", {"x_train.npy": head + b"\0" * 100})
    with Watched() as watched:
        error = watched.call(read_npz, tmp_path / "huge.npz", ["x_train"], refuses=ArchiveError)
        assert isinstance(error, ArchiveError)


def test_an_archive_that_unpacks_to_more_than_the_memory(tmp_path, monkeypatch):
    """A megabyte that unpacks to a gigabyte, on a machine with half of that."""
    monkeypatch.setattr("lasnn_sj.data.archives._memory", lambda: 2**24)
    size = 2**25
    archive(tmp_path / "a.npz", {"x_train.npy": header((size,)) + bytes(size)}, zipfile.ZIP_DEFLATED)
    with Watched() as watched:
        error = watched.call(read_npz, tmp_path / "a.npz", ["x_train"], refuses=ArchiveError)
        assert "more memory than there is" in str(error)


def test_an_entry_that_lies_about_its_size(tmp_path):
    archive(tmp_path / "a.npz", {"x_train.npy": header((2**38,)) + b"\0" * 100})
    content = bytearray((tmp_path / "a.npz").read_bytes())
    place = content.rindex(b"PK\x01\x02") + 20
    content[place : place + 8] = struct.pack("<II", 2**32 - 2, 2**32 - 2)  # compressed and plain size
    (tmp_path / "a.npz").write_bytes(content)
    with Watched() as watched:
        error = watched.call(read_npz, tmp_path / "a.npz", ["x_train"], refuses=ArchiveError)
        assert isinstance(error, ArchiveError)


@pytest.mark.parametrize(
    "name", ["../evil.npy", "/tmp/evil_of_lasnn_sj.npy", "a/../../evil.npy", "x_train.npy/../e"]
)
def test_names_in_an_archive_are_no_paths(tmp_path, name):
    content = npz()
    path = tmp_path / "run" / "images.npz"
    path.parent.mkdir()
    path.write_bytes(content)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(name, header((1,)) + b"\0")
    before = sorted(tmp_path.rglob("*"))
    data.load(path)
    assert before == sorted(tmp_path.rglob("*"))
    assert not Path("/tmp/evil_of_lasnn_sj.npy").exists()


# ---- checkpoints ----


def files_of_a_checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        weights = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
        state = {"step": 3, "history": [{"loss": 1.0}], "list": [None, (True, torch.ones(2))], "s": "text"}
        path = checkpoint.save(Path(folder), 1, weights, state)
        return {file.name: file.read_bytes() for file in path.iterdir()}


FILES = files_of_a_checkpoint()


def write_checkpoint(folder, files):
    path = folder / "00000001"
    path.mkdir()
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


@many
@given(st.data(), st.sampled_from(sorted(FILES)))
def test_checkpoints_that_are_damaged(draw, name):
    """The checksums find every change of the files that they stand for."""
    content = draw.draw(damaged(FILES[name]))
    with Watched() as watched:
        path = write_checkpoint(watched.folder, FILES | {name: content})
        result = watched.call(checkpoint.load, path, refuses=CheckpointError)
        if name != "manifest.json":
            assert isinstance(result, CheckpointError) or content == FILES[name]


@many
@given(st.data(), st.sampled_from(["student.safetensors", "state.pt"]))
def test_checkpoints_whose_checksums_were_made_to_fit(draw, name):
    content = draw.draw(damaged(FILES[name]))
    manifest = json.loads(FILES["manifest.json"])
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with Watched() as watched:
        files = FILES | {name: content, "manifest.json": json.dumps(manifest).encode()}
        path = write_checkpoint(watched.folder, files)
        watched.call(checkpoint.load, path, refuses=CheckpointError)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@many
@given(json_values)
def test_manifests_of_any_content(value):
    with Watched() as watched:
        path = write_checkpoint(watched.folder, FILES | {"manifest.json": json.dumps(value).encode()})
        result = watched.call(checkpoint.load, path, refuses=CheckpointError)
        assert isinstance(result, CheckpointError)


@many
@given(
    st.sampled_from(["step", "history", "optimizer", "scheduler", "epoch", "processes", "scaler"]),
    json_values,
)
def test_states_of_any_content_do_not_fit_a_run(name, value):
    """Whole checkpoints with nonsense inside: named, or harmless because it is what would have been there."""
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    progress = Progress(net, optimizer, scheduler, torch.amp.GradScaler("cpu"), torch.device("cpu"))
    kept = []

    class InMemory(RunFolder):
        def save(self, step, weights, state):
            kept[:] = [dict(weights), state]

        def load(self):
            return Path("00000001"), kept[0], kept[1] | {name: value}

    error = None
    with Watched() as watched:
        folder = InMemory(watched.folder, 1)
        progress.save(folder)
        try:
            progress.resume(folder)
        except CheckpointError as raised:
            error = raised
    assert error is None or "does not fit this run" in str(error)


# ---- settings ----


@many
@given(st.data(), json_values)
def test_settings_files(draw, value):
    whole = json.dumps({"alpha": 0.9, "pairs": [["a", "b"]], "value": value}).encode()
    content = draw.draw(damaged(whole))
    with Watched() as watched:
        path = watched.folder / "settings.json"
        path.write_bytes(content)
        watched.call(files.check_settings, path, {"alpha": 0.9}, refuses=ValueError)
        assert path.read_bytes() == content


@many
@given(st.data(), json_values)
def test_configuration_files(draw, value):
    config = pytest.importorskip("lasnn_sj.experiments.config")
    from lasnn_sj.experiments.pipeline import Recipe

    content = draw.draw(damaged(json.dumps({"student": "vgg5", "T": 3, "x": value}).encode()))
    with Watched() as watched:
        path = watched.folder / "a.yaml"
        path.write_bytes(content)

        def build():
            return config.build(Recipe, config.read(path), str(path))

        watched.call(build, refuses=config.ConfigError)


# ---- trained students ----


def files_of_a_student():
    with tempfile.TemporaryDirectory() as folder:
        net = models.conv3_linear2(3, in_channels=1, image_size=8, width=0.05)
        path = models.save_pretrained(net, DirectEncoder(4), folder, metrics={"top1": 50.0})
        return {name: (path / name).read_bytes() for name in ("model.safetensors", "config.json")}


STUDENT = files_of_a_student()


def read_student(files):
    with Watched() as watched:
        for name, content in files.items():
            (watched.folder / name).write_bytes(content)
        result = watched.call(models.from_pretrained, watched.folder, refuses=models.PretrainedError)
        if not isinstance(result, Exception):
            net, encoder = result
            assert {name: tensor.shape for name, tensor in net.state_dict().items()}
            assert encoder is None or encoder.T >= 1


@many
@given(st.data(), st.sampled_from(sorted(STUDENT)))
def test_trained_students_that_are_damaged(draw, name):
    read_student(STUDENT | {name: draw.draw(damaged(STUDENT[name]))})


@many
@given(json_values, st.data())
def test_trained_students_of_any_config(value, draw):
    config = json.loads(STUDENT["config.json"])
    place = draw.draw(st.sampled_from([config, config["architecture"], config["architecture"]["arguments"]]))
    place[draw.draw(st.sampled_from(sorted(place)))] = value
    read_student(STUDENT | {"config.json": json.dumps(config).encode()})


# ---- teachers and run folders ----


def teacher_file():
    net = models.teacher_resnet20(10)
    buffer = io.BytesIO()
    torch.save({"state_dict": net.state_dict()}, buffer)
    return buffer.getvalue()


TEACHER = teacher_file()


@many
@given(draw=st.data())
def test_teacher_files(draw):
    with Watched() as watched:
        path = watched.folder / "resnet20.th"
        path.write_bytes(draw.draw(damaged(TEACHER)))
        result = watched.call(models.published_resnet20, path, refuses=ValueError)
        assert not isinstance(result, Exception) or "resnet20.th is not a checkpoint" in str(result)


STEPS = b"step,epoch,lr,loss,ce\r\n" + b"".join(b"%d,1,0.1,2.5,2.5\r\n" % n for n in range(1, 9))


@many
@given(draw=st.data())
def test_tables_of_steps(draw):
    """What is left are whole rows up to the checkpoint's step, each once."""
    logging.disable(logging.WARNING)
    try:
        with Watched() as watched:
            folder = RunFolder(watched.folder, 1)
            (watched.folder / "steps.csv").write_bytes(draw.draw(damaged(STEPS)))
            watched.call(folder.go_back, 6, [], refuses=())
            head, *rows = csv.reader((watched.folder / "steps.csv").read_text().splitlines())
            steps = [int(row[0]) for row in rows if [float(cell or 0) for cell in row]]
            assert steps == sorted(set(steps))
            assert all(step <= 6 for step in steps)
            assert head[:4] == ["step", "epoch", "lr", "loss"]
    finally:
        logging.disable(logging.NOTSET)


LOCK = json.dumps({"host": "here", "boot": "b", "namespace": "n", "pid": 1, "started": "5", "since": "s",
                   "token": "t"}).encode()  # fmt: skip


@many
@given(draw=st.data())
def test_locks(draw):
    """Held by somebody, or stale and taken over."""
    with Watched() as watched, pytest.MonkeyPatch.context() as patch:
        patch.setattr(locks, "STALE", 0.0)
        patch.setattr(locks, "CUT", 0.0)
        (watched.folder / locks.NAME).write_bytes(draw.draw(damaged(LOCK)))
        logging.disable(logging.WARNING)
        held = ""
        try:
            with locks.FolderLock(watched.folder) as lock:
                lock.check()
        except locks.LockError as error:
            held = str(error)
        finally:
            logging.disable(logging.NOTSET)
        assert not held or str(watched.folder) in held


RUN = {
    "recipe.json": b'{"student": "vgg5", "T": 4, "seed": 0}',
    "hybrid/settings.json": b'{"optimizer": "Adam", "hyperparameters": {"lr": 0.1}}',
    "hybrid/result.json": b'{"top1": 50.0, "loss": 1.5, "samples": 8, "spikes": {"a": 0.5}}',
    "hybrid/metrics.csv": b"epoch,loss,top1,lr,seconds\r\n1,2.5,40,0.1,3\r\n",
    "hybrid/steps.csv": STEPS,
    "converted/thresholds.json": b'{"features.0.neuron": 12.5}',
    "converted/result.json": b'{"top1": 10.0, "loss": 2.5, "samples": 8}',
}


@many
@given(st.data(), st.sampled_from(sorted(RUN)))
def test_run_folders_that_a_report_reads(draw, name):
    with Watched() as watched:
        for file, content in RUN.items():
            path = watched.folder / file
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(draw.draw(damaged(content)) if file == name else content)
        (run,) = watched.call(reading.read, [watched.folder], refuses=())
        for note in run.notes:
            note.encode()


# ---- events ----


class Recordings(torch.utils.data.Dataset):
    """One recording in the form of Tonic's data sets."""

    sensor_size = (4, 4, 2)
    targets = (0,)

    def __init__(self, folder):
        self.location_on_system, self.data = str(folder), [str(folder / "0.npy")]
        np.save(folder / "0.npy", np.zeros(1))
        os.utime(folder / "0.npy", (0, 0))  # the cache knows a recording by it

    def __getitem__(self, index):
        rows = [(t, t % 4, t // 4 % 4, t % 2) for t in range(20)]
        return np.array(rows, dtype=[("t", "i8"), ("x", "i8"), ("y", "i8"), ("p", "i8")]), 0


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """Event frames, their counts, and the file that they were cached in."""
    pytest.importorskip("tonic")
    from lasnn_sj.data import events

    folder = tmp_path_factory.mktemp("cached")
    frames = events.EventFrames(Recordings(folder), [0], "x", events.Framing(T=2), folder / "cache")
    right = frames.counts(0)
    (path,) = (folder / "cache").iterdir()
    return frames, right, path, path.read_bytes()


@many
@given(draw=st.data())
def test_cached_event_frames_that_are_damaged_are_made_anew(cached, draw):
    frames, right, path, content = cached
    path.write_bytes(draw.draw(damaged(content)))
    before = sorted(path.parents[1].rglob("*"))
    logging.disable(logging.WARNING)
    try:
        with Watched() as watched:
            assert (watched.call(frames.counts, 0, refuses=()) == right).all()
    finally:
        logging.disable(logging.NOTSET)
    assert before == sorted(path.parents[1].rglob("*"))


@pytest.fixture(scope="module")
def gestures(tmp_path_factory):
    tonic = pytest.importorskip("tonic")
    from recordings import write_gestures

    root = tmp_path_factory.mktemp("gestures")
    write_gestures(root)
    return tonic.datasets.DVSGesture(save_to=str(root), train=True)


@many
@given(draw=st.data())
def test_event_files(gestures, draw):
    """DVS-Gesture's own files: frames, or an error that names the file."""
    from lasnn_sj.data import events

    buffer = io.BytesIO()
    np.save(buffer, np.array([[1, 2, 0, 5], [3, 4, 1, 9]]))
    path = Path(gestures.data[0])
    path.write_bytes(draw.draw(damaged(buffer.getvalue())))
    frames = events.EventFrames(gestures, [0], "dvs-gesture", events.Framing(T=2))
    with Watched() as watched:
        result = watched.call(frames.__getitem__, 0, refuses=events.RecordingError)
        if isinstance(result, Exception):
            assert str(path) in str(result)
        else:
            assert result[0].shape == (2, 2, 128, 128)
