"""Files of a run folder: whole or not at all, never through links; settings compared key by key."""

import os

import pytest

from lasnn_sj.runtime import files


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    files.write_csv(path, [["step", 'a "name", quoted'], [1, 0.5]])
    assert path.read_bytes() == b'step,"a ""name"", quoted"\r\n1,0.5\r\n'

    def fails(*_):
        raise OSError(28, "No space left on device")

    for call in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(os, call, fails)
            with pytest.raises(OSError, match="No space left on device: .*a.csv"):
                files.write(path, "other")
        assert path.read_bytes().startswith(b"step")
        assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


def test_it_is_flushed_before_it_has_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        call = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, c=call: (done.append(n), c(*a))[1])
    files.write(tmp_path / "a", b"1")
    assert done == ["fsync", "replace", "fsync"]


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_what_is_in_its_place_is_replaced_and_not_followed(tmp_path, kind):
    outside, path = tmp_path / "outside", tmp_path / "inside"
    outside.write_text("theirs")
    os.symlink(outside, path) if kind == "link" else os.mkfifo(path)
    files.write(path, "ours")
    assert (outside.read_text(), path.read_text(), path.is_symlink()) == ("theirs", "ours", False)


def test_nothing_is_appended_through_a_link(tmp_path):
    (tmp_path / "outside").touch()
    os.symlink(tmp_path / "outside", tmp_path / "link")
    with pytest.raises(OSError, match="symbolic link"):
        files.append(tmp_path / "link", "x")
    assert (tmp_path / "outside").read_text() == ""
    files.append(tmp_path / "own", "a\n")
    files.append(tmp_path / "own", "b\n")
    assert (tmp_path / "own").read_text() == "a\nb\n"


def test_a_line_that_cannot_be_appended_is_named(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error: .*steps.csv"):
        files.append(tmp_path / "steps.csv", "1\n")


def test_parts_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".steps.csv.x1y2.part").touch()
    (tmp_path / "own.part").touch()
    files.remove_parts(tmp_path, age=60)  # another process may be at it
    assert len(list(tmp_path.iterdir())) == 2
    files.remove_parts(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["own.part"]
    (tmp_path / ".steps.csv.x1y2.part").touch()
    os.utime(tmp_path / ".steps.csv.x1y2.part", (1, 1))
    files.remove_parts(tmp_path, age=60)
    assert [path.name for path in tmp_path.iterdir()] == ["own.part"]
    files.remove_parts(tmp_path / "missing")


def test_a_difference_shows_only_what_differs(tmp_path):
    path = tmp_path / "settings.json"
    settings = {"student": {"class": "VGG", "layers": {"a": "Linear", "b": {"tau": 2.0}}}, "seed": 0}
    files.check_settings(path, settings)
    files.check_settings(path, settings)
    other = {"student": {"class": "VGG", "layers": {"a": "Linear", "b": {"tau": 8.0}}}, "seed": 0, "new": 1}
    only = r"\(student.layers.b.tau: there 2.0, here 8.0; new: there None, here 1\)"
    with pytest.raises(ValueError, match=only):
        files.check_settings(path, other)
    many = {"seed": 0, "student": settings["student"]} | {f"key{i}": i for i in range(20)}
    with pytest.raises(ValueError, match="and 12 more"):
        files.check_settings(path, many)


def test_damaged_json_is_said_and_not_used(tmp_path, caplog):
    path = tmp_path / "result.json"
    assert files.read_json(path) is None
    assert not caplog.text
    files.write_json(path, {"top1": 1.0})
    assert files.read_json(path) == {"top1": 1.0}
    for damaged in ("", '{"top1": 1', "[1]", "[" * 100_000):
        path.write_text(damaged)
        caplog.clear()
        assert files.read_json(path) is None
        assert f"{path} is damaged" in caplog.text
    path.unlink()
    os.mkfifo(path)
    assert files.read_json(path) is None
