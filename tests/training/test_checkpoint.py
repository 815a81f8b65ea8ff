"""Checkpoints: whole and verified or refused; what a full disk, damage, links and hostile files lead to."""

import json
import logging
import os
import pickle
import resource
import shutil
import subprocess
import zipfile

import pytest
import torch
from torch import nn

from lasnn_sj.runtime import files, random_state
from lasnn_sj.training import checkpoint
from lasnn_sj.training.checkpoint import CheckpointError

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int64)}
STATE = {"step": 3, "name": "x", "list": [1.5, None, (True, torch.ones(2))]}


def save(folder, number=1, weights=WEIGHTS, state=STATE):
    return checkpoint.save(folder, number, weights, state)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    weights, state = checkpoint.load(save(tmp_path))
    assert weights.keys() == WEIGHTS.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in WEIGHTS.items())
    assert state["list"][:2] == [1.5, None]
    assert torch.equal(state["list"][2][1], torch.ones(2))


def test_two_are_kept_and_the_newest_is_taken(tmp_path):
    for number in (1, 2, 10):
        save(tmp_path, number, state={"number": number})
    assert names(tmp_path) == ["00000002", "00000010"]
    assert checkpoint.load_latest(tmp_path)[2] == {"number": 10}


def test_an_older_one_that_cannot_be_removed_is_named_and_the_new_one_is_whole(tmp_path, monkeypatch, caplog):
    save(tmp_path, 1)
    save(tmp_path, 2)
    remove = shutil.rmtree

    def fails(path, **kwargs):
        if path.name == "00000001":
            raise OSError(5, "Input/output error", "manifest.json")
        remove(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fails)
        save(tmp_path, 3)
    assert f"the older checkpoint {tmp_path / '00000001'} could not be removed" in caplog.text
    assert checkpoint.load_latest(tmp_path)[0].name == "00000003"
    save(tmp_path, 4)
    assert names(tmp_path) == ["00000003", "00000004"]


def test_a_number_again_replaces_it_and_higher_ones_are_of_a_run_that_went_back(tmp_path):
    for number in (5, 9):
        save(tmp_path, number, state={"first": number})
    save(tmp_path, 5, state={"second": 5})
    assert names(tmp_path) == ["00000005"]
    assert checkpoint.load_latest(tmp_path)[2] == {"second": 5}


def test_what_a_killed_process_left_half_written_is_not_seen_and_removed(tmp_path):
    (tmp_path / ".00000007.part").mkdir()
    assert checkpoint.load_latest(tmp_path) is None
    save(tmp_path, 8)
    assert names(tmp_path) == ["00000008"]


def test_what_others_put_there_is_left_alone(tmp_path):
    """A file browser's notes, once a reason to end the run."""
    (tmp_path / ".DS_Store").write_text("notes")
    save(tmp_path, 1)
    save(tmp_path, 2)
    assert names(tmp_path) == [".DS_Store", "00000001", "00000002"]


def test_digits_that_are_no_ascii_are_somebody_elses(tmp_path):
    other = tmp_path / "\u00b2"
    other.mkdir()
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, number, {"a": torch.ones(1)}, {})
    assert other.is_dir()
    assert checkpoint.load_latest(tmp_path)[0].name == "00000003"


def test_weights_that_share_memory(tmp_path):
    """A layer used at two places has two names in state_dict; half of a tensor is one too."""
    shared = nn.Linear(2, 3)
    net = nn.Sequential(shared, nn.ReLU(), nn.Linear(3, 2), shared)
    weights = net.state_dict() | {"half": net[2].weight.detach()[:1], "turned": net[2].weight.detach().t()}
    loaded, _ = checkpoint.load(save(tmp_path, weights=weights))
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_random_states_of_more_gpus_than_there_are(monkeypatch):
    """A run goes on where fewer are visible; each of those there takes back its own."""
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: [torch.tensor([n]) for n in range(8)])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", taken.extend)
    random_state.set_random_state(random_state.random_state())
    assert taken == [0, 1]


def test_no_folder_and_an_empty_one(tmp_path):
    assert checkpoint.load_latest(tmp_path / "none") is None
    assert checkpoint.load_latest(tmp_path) is None


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def shorten(path):
    path.write_bytes(path.read_bytes()[:-1])


def link(path):
    target = path.rename(path.with_name("elsewhere"))
    path.symlink_to(target)


@pytest.mark.parametrize("file", ["student.safetensors", "state.pt", "manifest.json"])
@pytest.mark.parametrize("damage", [flip, shorten, os.remove, link])
def test_damage_of_the_latest_is_said_and_the_one_before_taken(tmp_path, caplog, file, damage):
    save(tmp_path, 1, state={"number": 1})
    latest = save(tmp_path, 2, state={"number": 2})
    if (file, damage) == ("manifest.json", flip):  # one bit of a hexadecimal digit
        manifest = latest / file
        manifest.write_text(manifest.read_text().replace('"sha256": "', '"sha256": "0', 1))
    else:
        damage(latest / file)
    with caplog.at_level(logging.WARNING, "lasnn_sj"):
        path, _, state = checkpoint.load_latest(tmp_path)
    assert (path.name, state) == ("00000001", {"number": 1})
    assert len(caplog.records) == 1
    assert "00000002 is damaged" in caplog.text
    assert "resuming from" in caplog.text


def test_all_damaged_is_an_error_that_changes_nothing(tmp_path):
    for number in (1, 2):
        flip(save(tmp_path, number) / "state.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(
        CheckpointError, match=r"no checkpoint of .*00000002 is .*00000001 is .*No file was changed"
    ):
        checkpoint.load_latest(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def rewrite(path, name, content):
    """A file of a checkpoint with a manifest that fits, as somebody who means harm would."""
    import hashlib

    (path / name).write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harm",)


def test_code_in_a_checkpoint_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path / "c")
    torch.save({"step": Harm()}, tmp_path / "bad.pt")
    for content in (pickle.dumps(Harm()), (tmp_path / "bad.pt").read_bytes()):
        rewrite(path, "state.pt", content)
        with pytest.raises(CheckpointError, match="damaged"):
            checkpoint.load(path)
    assert not (tmp_path / "harm").exists()


def test_a_compressed_state_could_be_of_any_size_and_is_refused(tmp_path):
    path = save(tmp_path)
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * (1 << 24))
    rewrite(path, "state.pt", (tmp_path / "bomb.zip").read_bytes())
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.load(path)


def test_a_state_that_could_not_be_read_again_is_refused_when_it_is_written(tmp_path):
    with pytest.raises(CheckpointError, match="00000001 could not be read again .*state_dict"):
        save(tmp_path, state={"bad": Harm()})
    assert checkpoint.load_latest(tmp_path) is None


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True
        )
    except FileNotFoundError:
        pytest.skip("there is no mount here")
    if mounted.returncode:
        pytest.skip("this user may not mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_leaves_the_last_checkpoint(small_disk):
    kept = save(small_disk, 1, {"a": torch.ones(10_000)})
    with pytest.raises(CheckpointError, match=r"00000002 .*No space left.*00000001, is intact\. Free"):
        save(small_disk, 2, {"a": torch.ones(60_000)})
    assert names(small_disk) == ["00000001"]
    assert torch.equal(checkpoint.load(kept)[0]["a"], torch.ones(10_000))


def test_a_limit_on_files_leaves_the_last_checkpoint(tmp_path):
    """The same for everybody who may not mount: the kernel refuses to write more than so many bytes."""
    import signal

    save(tmp_path, 1, {"a": torch.ones(10_000)})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        for number in (1, 2):  # in place of itself too
            with pytest.raises(CheckpointError, match=r"could not be written .*00000001, is intact"):
                save(tmp_path, number, {"a": torch.ones(60_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignored)
    assert names(tmp_path) == ["00000001"]
    assert checkpoint.load_latest(tmp_path)[1]["a"].shape == (10_000,)


def test_settings_written_and_compared(tmp_path):
    path = tmp_path / "settings.json"
    files.check_settings(path, {"alpha": 0.9, "pairs": [("a", "b")]})
    files.check_settings(path, {"pairs": [["a", "b"]], "alpha": 0.9})
    with pytest.raises(ValueError, match=r"other settings \(alpha: there 0.9, here 0.5\)"):
        files.check_settings(path, {"alpha": 0.5, "pairs": [("a", "b")]})


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_settings_that_are_damaged(tmp_path, content):
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"settings.json cannot be read as settings"):
        files.check_settings(path, {})
    assert path.read_bytes() == content


def test_a_link_out_of_the_run_folder_is_refused(tmp_path):
    run, outside = tmp_path / "run", tmp_path / "outside"
    run.mkdir()
    outside.mkdir()
    (run / "checkpoints").symlink_to(outside)
    (run / "settings.json").symlink_to(outside / "settings.json")
    with pytest.raises(ValueError, match="link to .*outside, outside the run folder"):
        files.inside(run, "checkpoints")
    with pytest.raises(ValueError, match="outside the run folder"):
        files.check_settings(run / "settings.json", {})
    assert not list(outside.iterdir())


def test_a_text_replaces_a_link_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "precious").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "precious")
    files.write(tmp_path / "link", "new")
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / "link").read_text() == "new"
    assert not (tmp_path / "link").is_symlink()
