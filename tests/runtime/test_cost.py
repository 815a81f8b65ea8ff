"""Time and peak memory of a piece of work."""

import time

import pytest
import torch

from lasnn_sj.runtime.cost import Cost


def test_seconds():
    with Cost() as cost:
        time.sleep(0.05)
    assert 0.05 <= cost.seconds < 1


def test_work_that_a_device_still_has_is_not_counted(monkeypatch):
    queued = [0.2]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: time.sleep(queued.pop() if queued else 0))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 << 20)
    with Cost("cuda") as cost:
        pass
    assert cost.seconds < 0.1
    assert cost.peak_memory_mib == 3


@pytest.mark.skipif("not __import__('sys').platform.startswith('linux')")
def test_peak_memory_sees_what_was_freed_again_and_forgets_earlier_work():
    with Cost() as large:
        torch.ones(64 << 20)  # 256 MiB
    with Cost() as small:
        torch.ones(1 << 20)
    assert large.peak_memory_mib - small.peak_memory_mib == pytest.approx(252, abs=40)


def test_peak_memory_is_kept_when_the_work_fails():
    with pytest.raises(RuntimeError, match="broken"), Cost() as cost:
        raise RuntimeError("broken")
    assert cost.seconds >= 0
