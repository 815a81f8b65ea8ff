"""Frames of event recordings against counts by hand, Tonic and SpikingJelly; augmentation of frames."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from recordings import recording
from spikingjelly.datasets.utils import integrate_events_by_fixed_frames_number

tonic = pytest.importorskip("tonic")

from lasnn_sj.data.frames import Augment, Framing, to_frames  # noqa: E402

DTYPE = tonic.datasets.DVSGesture.dtype


def structured(rows):
    return np.array([tuple(row) for row in rows], dtype=DTYPE)


def test_frames_of_equal_count_by_hand():
    """Five events in two frames: 2 * i // 5 puts three into the first and two into the second."""
    rows = [(0, 0, 0, 10), (0, 0, 0, 11), (3, 1, 1, 12), (1, 0, 0, 900), (0, 2, 1, 901)]
    frames = to_frames(structured(rows), (4, 3), Framing(T=2))
    assert frames.shape == (2, 2, 3, 4)
    expected = np.zeros((2, 2, 3, 4), int)
    expected[0, 0, 0, 0] = 2
    expected[0, 1, 1, 3] = 1
    expected[1, 0, 0, 1] = 1
    expected[1, 1, 2, 0] = 1
    assert (frames == expected).all()


def test_frames_of_equal_time_by_hand():
    """From 10 to 109 microseconds are 100: up to 59 in the first frame, the very last event in the second."""
    rows = [(0, 0, 0, 10), (1, 0, 0, 59), (2, 0, 0, 60), (3, 0, 1, 109)]
    frames = to_frames(structured(rows), (4, 1), Framing(T=2, by="time"))
    assert frames[:, 0, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]
    assert frames[1, 1, 0, 3] == 1


@pytest.mark.parametrize(
    ("by", "n", "T"),
    [("count", 1003, 16), ("count", 96, 8), ("count", 3, 4), ("time", 1003, 16), ("time", 1000, 7)],
)
def test_the_remainder_in_the_last_frame_is_spikingjellys_framing(by, n, T):
    random = np.random.default_rng(n)
    x, y, p = (random.integers(0, most, n) for most in (5, 4, 2))
    rows = structured(zip(x, y, p, np.sort(random.integers(50, 50_000, n))))
    split = {"count": "number", "time": "time"}[by]
    theirs = integrate_events_by_fixed_frames_number(rows, split, T, 4, 5)
    assert (to_frames(rows, (5, 4), Framing(T, by, remainder="last")) == theirs).all()
    assert theirs.sum() == n


def test_frames_are_summed_over_squares_of_pixels():
    rows = [(0, 0, 1, 0), (1, 1, 1, 1), (2, 1, 1, 2), (4, 4, 1, 3)]
    frames = to_frames(structured(rows), (5, 5), Framing(T=1, shrink=2))
    assert frames[0, 1].tolist() == [[2, 1, 0], [0, 0, 0], [0, 0, 1]]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 200), T=st.integers(1, 20), by=st.sampled_from(["count", "time"]),
    shrink=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_event_is_in_one_frame(n, T, by, shrink, seed):
    rows = structured(recording(n, size=13, seed=seed))
    frames = to_frames(rows, (13, 13), Framing(T, by, shrink=shrink))
    assert frames.sum() == n
    assert frames.sum((0, 2, 3)).tolist() == [(~rows["p"]).sum(), rows["p"].sum()]
    if by == "count":
        sums = frames.sum((1, 2, 3))
        assert sums.max() - sums.min() <= 1


@pytest.mark.parametrize("T", [1, 4, 16])
def test_frames_of_equal_count_are_tonics_where_it_drops_nothing(T):
    rows = structured(recording(16 * 20))
    theirs = tonic.transforms.ToFrame(sensor_size=(128, 128, 2), n_event_bins=T)(rows)
    assert (to_frames(rows, (128, 128), Framing(T)) == theirs).all()
    more = structured(recording(16 * 20 + 3))
    assert tonic.transforms.ToFrame(sensor_size=(128, 128, 2), n_event_bins=16)(more).sum() == 16 * 20
    assert to_frames(more, (128, 128), Framing(16)).sum() == 16 * 20 + 3


def test_times_that_64_bits_cannot_divide_are_refused():
    """They used to come out below zero, in frame 0."""
    fields = [(name, np.int64) for name in "txyp"]
    rows = np.array([(0, 0, 0, 0), (2**60, 1, 0, 1)], fields)
    with pytest.raises(ValueError, match="too far apart for 16 frames"):
        to_frames(rows, (2, 2), Framing(T=16, by="time"))
    rows["t"][1] = 2**58
    assert to_frames(rows, (2, 2), Framing(T=16, by="time"))[-1].sum() == 1


def test_without_flips_a_label_stays():
    torch.manual_seed(0)
    frames = torch.rand(1, 2, 8, 8)
    for _ in range(10):
        changed, label = Augment(flip=None)(frames, 6)
        assert (label, torch.equal(changed, frames)) == (6, True)


def test_shift_moves_all_frames_alike_and_brings_in_nothing():
    frames, seen = torch.zeros(3, 2, 9, 9), set()
    frames[:, :, 4, 4] = 1
    for seed in range(200):
        torch.manual_seed(seed)
        moved, _ = Augment(shift=2)(frames, 0)
        assert moved.sum() == 6
        (row, column) = moved[0, 0].nonzero()[0].tolist()
        assert (moved[:, :, row, column] == 1).all()
        seen.add((row - 4, column - 4))
    assert seen == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}
    torch.manual_seed(0)
    assert Augment(shift=8)(torch.ones(1, 2, 9, 9), 0)[0].sum() < 2 * 81


def test_cutout_empties_one_square():
    frames = torch.ones(3, 2, 8, 10)
    for _ in range(20):
        cut, _ = Augment(cutout=3)(frames, 0)
        assert (cut.sum((2, 3)) == 80 - 9).all()
        assert (cut == cut[0, 0]).all()
    assert frames.sum() == 480  # what was given is left alone
